"""Every stage imports this first: what must be in order before torch is imported, which takes seconds.

Ctrl-C during the imports ends in one line, too. Where a shell has closed standard input, output or error, os.devnull
takes its number. Else the next file that is opened would get it, and what a library prints would go into that file.
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
