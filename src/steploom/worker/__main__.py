"""A worker process: ``python -m steploom.worker ADDRESS`` is started by an engine, and ends with it.

``python -m steploom.worker --listen ADDRESS`` is started by hand, or by whatever starts processes where you are.
Engines attach to it with :class:`steploom.executor.AttachedExecutor`, one after another, and it outlives them; SIGTERM
or Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys

from steploom import streams
from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.weave.exits import Ended
from steploom.worker.listening import GREET_S, listen
from steploom.worker.memory import keep_freed
from steploom.worker.process import end_with_engine, run
from steploom.worker.ranks.group import follow
from steploom.worker.serving import DEFAULT_RUNNER


def main() -> int:
    """Serves the engine that started this process, or those that attach to it; the exit code."""
    streams.open_those_that_are_closed()
    parser = argparse.ArgumentParser(prog="python -m steploom.worker", description=__doc__)
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("address", nargs="?", help="path of the socket of the engine that started this process")
    whom.add_argument("--listen", metavar="ADDRESS", help="path of a socket to wait at for engines, one after another")
    whom.add_argument("--link", type=int, help="a connection with the rank of the same worker that started this one")
    parser.add_argument("--runner", default=DEFAULT_RUNNER, help="factory of the runner, as pkg.module:name")
    largest = EngineConfig.max_message_bytes
    parser.add_argument("--max-message-bytes", type=int, default=largest, help="what one message may come to")
    greeting = "seconds in which an engine that has connected to --listen must have said who it is"
    parser.add_argument("--greet-timeout", type=_seconds, default=GREET_S, metavar="S", help=greeting)
    parser.add_argument("--alive-fd", type=int, help="a pipe whose end tells the engine that this process has ended")
    arguments = parser.parse_args()
    faulthandler.enable()
    keep_freed()
    if arguments.listen is not None:
        return _listen(arguments.listen, arguments.runner, arguments.greet_timeout)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when a worker ends
    if arguments.alive_fd is not None:
        os.set_inheritable(arguments.alive_fd, False)
    end_with_engine(arguments.address)
    if arguments.link is not None:
        return follow(arguments.link, arguments.runner)
    return run(arguments.address, arguments.runner, arguments.max_message_bytes)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of seconds greater than 0")
    return value


def _listen(address: str, runner: str, greet_s: float) -> int:
    """Until a signal comes."""

    def end(number: int, frame: object) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)  # it is ending
        raise Ended(number)

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, end)
    try:
        listen(address, runner, greet_s)
    except ConfigError as error:
        print(f"steploom worker: {error}", file=sys.stderr)  # noqa: T201 - for whoever started it
        return 2
    except Ended as ended:
        return 128 + ended.number
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything was closed; taking torch and diffusers apart, module by module, would keep the engine waiting.
    os._exit(code)
