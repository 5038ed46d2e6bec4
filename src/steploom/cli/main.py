"""The ``steploom`` command: reads arguments, runs a subcommand, turns errors into one line and an exit code.

Whatever takes time to import is imported inside of :func:`main`, where Ctrl-C is one line too.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from steploom.cli.arguments import Parser

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""What shells expect of a program that Ctrl-C ended: 128 + SIGINT."""

_EXAMPLES = """
examples:
  steploom demo                                        see twelve images develop at once
  steploom generate "a small blue star on a black background" -o star.png
  steploom serve                                       the OpenAI SDK at http://127.0.0.1:8000/v1
  steploom verify ./my-model                           equal to diffusers, and batched?
  steploom bench tick                                  where the time of a tick goes
  steploom config show                                 the settings of `steploom serve`, and where each came from
  steploom doctor                                      what is here, and what is wrong

`steploom COMMAND --help` says more.
"""


def build_parser() -> Parser:
    """The parser of the whole command. Cheap: no subcommand's machinery is imported."""
    from steploom import __version__
    from steploom.cli import demo, doctor, generate, verify
    from steploom.cli.arguments import Parser
    from steploom.cli.benches import bench
    from steploom.cli.serving import serve, show

    parser = Parser(
        prog="steploom",
        description="Any diffusers pipeline, continuously batched: many requests share each forward.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"steploom {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in (demo, generate, serve, show, verify, bench, doctor):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (that of the process if None) and returns its exit code.

    0 is success, 1 a failure that one line on standard error explains, 2 a wrong argument, 130 Ctrl-C.
    """
    try:
        return _run(argv)
    except KeyboardInterrupt:
        _interrupt_is_handled()
        _complain("interrupted")
        return EXIT_INTERRUPTED


def _interrupt_is_handled() -> None:
    """Has the process end with our exit code, and not by SIGINT.

    Python remembers that an ``exec`` of text (every dataclass is one) was interrupted, even if it is caught, and then
    kills itself at its end if it was started by ``python -m``. The next ``exec`` makes it forget.
    """
    exec("")


def _run(argv: Sequence[str] | None) -> int:
    """:func:`main` without Ctrl-C."""
    from steploom import streams

    streams.open_those_that_are_closed()
    try:
        import os

        from steploom.errors import SteploomError

        arguments = _read(argv)
    except ImportError as error:  # without these, not even `steploom doctor` runs
        _complain(f"{error}; pip install --force-reinstall steploom")
        return EXIT_FAILED
    out: Any = sys.stdout
    if hasattr(out, "reconfigure"):  # our signs, and a file's name, may be more than the terminal can show
        out.reconfigure(errors="replace")
    try:
        try:
            return arguments.run(arguments)
        finally:
            out.flush()
    except BrokenPipeError:
        # Whoever read our output left (`steploom doctor | head`): nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return EXIT_FAILED
    except ImportError as error:
        _complain(f"{' '.join(str(error).split())}; `steploom doctor` says what is wrong with this installation")
        return EXIT_FAILED
    except (SteploomError, OSError) as error:
        _complain(" ".join(str(error).split()))
        return EXIT_FAILED


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments, with logging set up as they say."""
    import logging

    from steploom.cli.serving import settings
    from steploom.errors import ConfigError

    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        settings.complete(arguments)
    except ConfigError as error:
        parser.exit(EXIT_USAGE, f"steploom: {' '.join(str(error).split())}\n")
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    settings.warn_of_unknown(arguments)
    return arguments


def _complain(text: str) -> None:
    sys.stderr.write(f"steploom: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
