"""The options of ``steploom serve``; each is also a variable of the environment and an entry of its file."""

from __future__ import annotations

import argparse
from pathlib import Path

from steploom.cli import arguments
from steploom.cli.serving import settings

MAX_BATCH = 32
"""Twice the engine's own: a full batch makes the next client wait for its first preview until somebody is done."""

_RANKS = {
    "ulysses-degree": "the sequence, by Ulysses attention",
    "ring-degree": "the sequence, by ring attention",
    "tensor-parallel-size": "the transformer's weights",
}
"""What ranks of a worker may share, by option."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all of them, and makes them settings (:mod:`steploom.cli.serving.settings`)."""
    parser.add_argument("served", nargs="?", type=arguments.model, metavar="MODEL",
                        help="a folder, a hub id, a checkpoint file, pkg.module:factory (default: demo)")  # fmt: skip
    _add_place(parser.add_argument_group("server"))
    _add_clients(parser.add_argument_group("clients"))
    _add_work(parser.add_argument_group("work"))
    _add_telemetry(parser.add_argument_group("telemetry"))
    _add_limits(parser.add_argument_group("limits of one request"))
    _add_videos(parser.add_argument_group("videos"))
    arguments.add_engine_options(parser)
    settings.layer(parser)


def _add_place(group: arguments.Options) -> None:
    group.add_argument("--config", type=Path, metavar="FILE",
                       help="a TOML file with settings (`steploom config --help` says how)")  # fmt: skip
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)"
    )
    group.add_argument("--uds", metavar="FILE", help="listen at a unix socket instead")
    group.add_argument("--uds-mode", type=_mode, default="660", metavar="MODE",
                       help="who may connect to it, in octal (default: %(default)s)")  # fmt: skip
    group.add_argument("--root-path", type=_root, default="", metavar="PATH", help="where a proxy has put the server")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="and this key")
    group.add_argument("--drain-timeout", type=arguments.patience, default=30.0, metavar="S",
                       help="seconds that requests get to end when the server does (default: %(default)g)")  # fmt: skip
    group.add_argument("--answer-timeout", type=arguments.count, default=5, metavar="S",
                       help="seconds that clients then get to take their answers (default: %(default)s)")  # fmt: skip
    group.add_argument("--head-timeout", type=arguments.rate, default=60.0, metavar="S",
                       help="seconds in which the head of a request must arrive (default: %(default)g)")  # fmt: skip
    group.add_argument("--stream-silence", type=arguments.rate, default=15.0, metavar="S",
                       help="seconds of silence after which a stream says it lives (default: %(default)g)")  # fmt: skip
    group.add_argument("--max-connections", type=arguments.count, default=4096, metavar="N",
                       help="connections at once; more are closed (default: %(default)s)")  # fmt: skip
    group.add_argument("--keep-alive", type=arguments.rate, default=5.0, metavar="S",
                       help="seconds between two requests of a connection (default: %(default)g)")  # fmt: skip


def _add_clients(group: arguments.Options) -> None:
    group.add_argument("--api-key", action="append", default=[], metavar="KEY",
                       help="clients must bring it; may be repeated (better: STEPLOOM_API_KEY, or a file)")  # fmt: skip
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file with a key a line")
    group.add_argument("--admin-key", action="append", default=[], metavar="KEY",
                       help="whoever brings it may pause, drain and reload the engine, under /admin; may be repeated "
                       "(default: there is no /admin)")  # fmt: skip
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME",
                       help="what clients call the model; may be repeated (default: its own name)")  # fmt: skip
    group.add_argument("--lora-model", type=_named, action="append", default=[], metavar="NAME=PATH",
                       help="a LoRA adapter that is a model of its own name; may be repeated")  # fmt: skip
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                       help="web pages of this origin may use the server; may be repeated (default: none)")  # fmt: skip
    group.add_argument("--preview", default="auto", metavar="auto|off|VAE",
                       help="previews: auto makes them with what the model has, off sends none, a folder or hub id "
                       "of diffusers' AutoencoderTiny decodes them (default: %(default)s)")  # fmt: skip
    group.add_argument("--no-page", action="store_true", help="no page at /, and nothing of what feeds it")


def _add_work(group: arguments.Options) -> None:
    group.add_argument("--max-queue", type=arguments.count, metavar="N", help="requests that wait, at most")
    group.add_argument("--max-queue-seconds", type=arguments.or_none(arguments.rate), metavar="S",
                       help="seconds of work that waits, at most, as estimated")  # fmt: skip
    group.add_argument("--max-batch", type=arguments.count_or_auto, default=MAX_BATCH, metavar="N",
                       help="requests that share a forward, at most; auto: up to where one more only makes everybody "
                       "late, as measured for each size (default: %(default)s)")  # fmt: skip
    group.add_argument("--data-parallel-size", type=arguments.count, metavar="N",
                       help="worker processes that serve one queue, each with a model of its own; of several GPUs each "
                       "has one (default: 1)")  # fmt: skip
    for name, part in _RANKS.items():
        words = f"processes (GPUs) that make up one worker, each with a part of {part} (default: 1)"
        group.add_argument(f"--{name}", type=arguments.count, metavar="N", help=words)
    group.add_argument("--policy", metavar="NAME",
                       help="who runs next: deadline (the earliest that can be kept), srpt (the shortest rest), fcfs, "
                       "or pkg.module.Class (default: deadline)")  # fmt: skip
    group.add_argument("--timeout", type=arguments.or_none(arguments.rate), metavar="S",
                       help="for requests that give none")  # fmt: skip
    group.add_argument("--keep-abandoned", action="store_true",
                       help="finish requests whose client hung up, instead of cancelling them")  # fmt: skip


def _add_telemetry(group: arguments.Options) -> None:
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="how to log (default: %(default)s)"
    )
    group.add_argument("--profile", metavar="FILE", help="write a Chrome trace of ticks and requests")
    group.add_argument("--scrape-timeout", type=arguments.rate, default=0.2, metavar="S",
                       help="seconds that /metrics waits for workers in a tick (default: %(default)g)")  # fmt: skip
    group.add_argument("--log-timeout", type=arguments.rate, default=2.0, metavar="S",
                       help="seconds in which the log's last lines must be read (default: %(default)g)")  # fmt: skip
    group.add_argument("--span-timeout", type=arguments.rate, default=5.0, metavar="S",
                       help="seconds in which a collector must take the last spans (default: %(default)g)")  # fmt: skip


def _add_videos(group: arguments.Options) -> None:
    group.add_argument("--video-dir", metavar="FOLDER",
                       help="where they are stored (default: one for this model in your state folder)")  # fmt: skip
    group.add_argument("--video-ttl", type=arguments.rate, default=24 * 3600.0, metavar="S",
                       help="seconds that one stays once it is done (default: %(default)g)")  # fmt: skip
    group.add_argument("--max-videos", type=arguments.count, default=1000, metavar="N",
                       help="stored videos; the oldest make room (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-video-bytes", type=arguments.count, default=20 * 1024**3, metavar="N",
                       help="size of all of them, likewise (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-unfinished-videos", type=arguments.count, default=100, metavar="N",
                       help="videos that wait or run (default: %(default)s)")  # fmt: skip


def _add_limits(group: arguments.Options) -> None:
    group.add_argument("--max-images", type=arguments.count, default=10, metavar="N",
                       help="images, the field n (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-tokens", type=arguments.count, metavar="N", help="tokens of a text (default: 4096)")
    group.add_argument("--max-steps", type=arguments.count, metavar="N", help="steps (default: 1000)")
    group.add_argument("--max-pixels", type=arguments.count, metavar="N",
                       help="width times height of what is made, and of images sent (default: 16777216)")  # fmt: skip
    group.add_argument("--max-prompt-chars", type=arguments.count, default=32_000, metavar="N",
                       help="length of a prompt (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-body-bytes", type=arguments.count, default=64 * 1024 * 1024, metavar="N",
                       help="size of a request's body (default: %(default)s)")  # fmt: skip
    group.add_argument("--body-timeout", type=arguments.rate, default=120.0, metavar="S",
                       help="seconds in which a body must arrive (default: %(default)g)")  # fmt: skip


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer between 0 and 65535")
    return int(text)


def _mode(text: str) -> str:
    if not (text and set(text) <= set("01234567") and int(text, 8) <= 0o777):
        raise argparse.ArgumentTypeError(f"{text!r}: must be permissions in octal, for example 660")
    return text


def _root(text: str) -> str:
    if text.strip("/") and (not text.startswith("/") or not text.isascii()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a path that begins with /, for example /images")
    return text.rstrip("/")


def _named(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{text!r}: must read NAME=PATH, for example ink=./ink.safetensors")
    return name, place
