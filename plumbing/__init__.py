"""What a reader of the stages need not open: starting, checking, loading, saving, reporting. Nothing here learns.

A module's name says what is inside. Dependencies point one way: a stage imports common.py, and both import plumbing.
`scale.py` alone stands on common.py: it measures stage 1 for models that are not there.
"""
