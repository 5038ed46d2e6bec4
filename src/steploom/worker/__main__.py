"""``python -m steploom.worker ADDRESS``: a worker process, started by an engine, never by hand."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys

from steploom.worker.memory import keep_freed
from steploom.worker.process import end_with_engine, run
from steploom.worker.serving import DEFAULT_RUNNER


def main() -> int:
    """Serves the engine that started this process; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m steploom.worker", description=main.__doc__)
    parser.add_argument("address", help="path of the engine's socket")
    parser.add_argument("--runner", default=DEFAULT_RUNNER, help="factory of the runner, as pkg.module:name")
    parser.add_argument("--alive-fd", type=int, help="a pipe whose end tells the engine that this process has ended")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when a worker ends
    faulthandler.enable()
    keep_freed()
    if arguments.alive_fd is not None:
        os.set_inheritable(arguments.alive_fd, False)
    end_with_engine(arguments.address)
    return run(arguments.address, arguments.runner)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything was closed; taking torch and diffusers apart, module by module, would keep the engine waiting.
    os._exit(code)
