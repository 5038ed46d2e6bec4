"""The ``steploom`` command: reads arguments, runs a subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from steploom import __version__
from steploom.cli import demo, doctor, generate
from steploom.cli.arguments import Parser
from steploom.errors import SteploomError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
"""What shells expect of a program that Ctrl-C ended: 128 + SIGINT."""

_EXAMPLES = """
examples:
  steploom demo                                        see twelve images develop at once
  steploom generate "a small blue star on a black background" -o star.png
  steploom doctor                                      what is here, and what is wrong

`steploom COMMAND --help` says more.
"""


def build_parser() -> Parser:
    """The parser of the whole command. Cheap: no subcommand's machinery is imported."""
    parser = Parser(
        prog="steploom",
        description="Any diffusers pipeline, continuously batched: many requests share each forward.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"steploom {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in (demo, generate, doctor):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (that of the process if None) and returns its exit code.

    0 is success, 1 a failure that one line on standard error explains, 2 a wrong argument, 130 Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left (`steploom doctor | head`): nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (SteploomError, OSError) as error:
        _complain(" ".join(str(error).split()))
        return EXIT_FAILED


def _complain(text: str) -> None:
    sys.stderr.write(f"steploom: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
