"""Exceptions that would end the process: out of a model's own code they are its failure, and end nothing else."""

from __future__ import annotations

import signal
import threading

import greenlet

from steploom import errors


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


def words_of(fault: BaseException) -> str:
    """What was raised, in words: ``SystemExit`` and the like mostly have none of their own."""
    said = " ".join(errors.words_of(fault).split())
    return f"{type(fault).__name__}: {said}" if said else type(fault).__name__
