"""Every stage imports this first: what must be in order before torch is imported, which takes seconds.

Ctrl-C during the imports ends in one line, too. Where a shell has closed standard input, output or error, its number is
taken: it would be the next file's, and what a library prints would be written into that file.
"""

import os
import sys


def in_one_line(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted before the run began", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = in_one_line
for stream in (sys.stdin, sys.stdout, sys.stderr):
    if stream is None:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
