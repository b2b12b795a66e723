"""Modules of stage 3: the message and its coder, the sender, slots and the cache they are put into, what both keep."""
