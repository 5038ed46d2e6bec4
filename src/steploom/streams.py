"""The three standard streams of a process, which whoever started it may have closed."""

from __future__ import annotations

import os
import sys


def open_those_that_are_closed() -> None:
    """Has nothing be read from, and what is said go nowhere, where a standard stream is closed (``command <&- >&-``).

    To be called before anything opens a file: the first one would take the stream's number. uvloop ends the process if
    that was a socket, and a library that writes to standard output would write into whatever is there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a file gets the lowest number that is free: this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - for good, and cheaply
