"""Exceptions that would end the process: out of a model's own code they are its failure, and end nothing else."""

from __future__ import annotations

import signal
import threading

import greenlet


class Ended(BaseException):
    """A signal ends this worker, whatever runs.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def is_strangers(fault: BaseException) -> bool:
    """Whether a model's code has raised what is no ``Exception`` (``SystemExit``, ``GeneratorExit``...) of its own.

    Not so a signal's, nor what unwinds a program. ``KeyboardInterrupt`` is a signal's only where Ctrl-C makes one.
    """
    if isinstance(fault, (Exception, Ended)):
        return False
    if isinstance(fault, greenlet.GreenletExit):
        return greenlet.getcurrent().parent is None  # on the hub nothing is unwound
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    return not (isinstance(fault, KeyboardInterrupt) and interrupts and main)
