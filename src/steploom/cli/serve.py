"""``steploom serve``: the model behind OpenAI's API."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.errors import ConfigError

if TYPE_CHECKING:
    import anyio
    import uvicorn

    from steploom import AsyncDiffusionEngine
    from steploom.server import ServerSettings
    from steploom.server.state import ServerState

log = logging.getLogger("steploom.serve")

_ANSWERING_S = 5
"""Seconds to tell clients, once the time to drain is over, that the server was shut down."""

KEY_VARIABLE = "STEPLOOM_API_KEY"
_EXAMPLES = """
examples:
  the built-in model on http://127.0.0.1:8000/v1
    steploom serve
  a model of your own, for everybody on the network, with a key
    STEPLOOM_API_KEY=... steploom serve ./my-sd3 --host 0.0.0.0 --port 9000
  at most 8 requests share a forward, 200 wait; two LoRA adapters as models of their own name
    steploom serve owner/name --max-batch 8 --max-queue 200 --lora-model ink=./ink.safetensors --lora-model fog=./fog
  behind a proxy, on a unix socket
    steploom serve ./my-sd3 --uds /run/steploom.sock --root-path /images

then, with the OpenAI SDK:
  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.images.generate(prompt="a small blue star on a black background", size="64x64")
"""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``serve`` to the command."""
    parser = arguments.add_command(
        commands, "serve", run, summary="serve a model over HTTP, as the OpenAI SDK expects it", examples=_EXAMPLES
    )
    parser.add_argument("served", nargs="?", type=arguments.model, metavar="MODEL",
                        help="a folder, a hub id, a checkpoint file, pkg.module:factory (default: demo)")  # fmt: skip
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--uds", metavar="FILE", help="listen at a unix socket instead")
    group.add_argument("--root-path", default="", metavar="PATH", help="where a proxy has put the server")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="and this key")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY",
                       help=f"clients must bring it; may be repeated (better: {KEY_VARIABLE}, or a file)")  # fmt: skip
    group.add_argument("--api-key-file", type=pathlib.Path, metavar="FILE", help="a file with a key a line")
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME",
                       help="what clients call the model; may be repeated (default: its own name)")  # fmt: skip
    group.add_argument("--lora-model", type=_named, action="append", default=[], metavar="NAME=PATH",
                       help="a LoRA adapter that is a model of its own name; may be repeated")  # fmt: skip
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                       help="web pages of this origin may use the server; may be repeated (default: none)")  # fmt: skip
    group.add_argument("--drain-timeout", type=arguments.rate, default=30.0, metavar="S",
                       help="seconds that requests get to end when the server does (default: %(default)g)")  # fmt: skip
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="how to log (default: %(default)s)"
    )
    group.add_argument("--profile", metavar="FILE", help="write a Chrome trace of ticks and requests")
    group.add_argument("--keep-abandoned", action="store_true",
                       help="finish requests whose client hung up, instead of cancelling them")  # fmt: skip
    group.add_argument("--timeout", type=arguments.rate, metavar="S", help="for requests that give none")
    group.add_argument("--max-queue", type=arguments.count, metavar="N", help="requests that wait, at most")
    group.add_argument("--max-tokens", type=arguments.count, metavar="N", help="tokens of a text, at most")
    group.add_argument("--max-batch", type=arguments.count, metavar="N", help="requests that share a forward, at most")
    arguments.add_engine_options(parser)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer between 0 and 65535")
    return int(text)


def _named(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{text!r}: must read NAME=PATH, for example ink=./ink.safetensors")
    return name, place


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom serve`` until it is told to end.

    Raises:
        ConfigError: A setting is wrong, or the extra ``server`` is missing.
        EngineError: The model cannot be loaded.
    """
    config = _engine_config(options)
    keys = _keys(options, os.environ)
    try:
        import uvicorn

        from steploom.server import ServerSettings
        from steploom.server.telemetry import logs, otlp
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is missing; pip install 'steploom[server]'") from None
    settings = ServerSettings(
        api_keys=keys,
        model_names=tuple(options.served_model_name),
        on_disconnect="keep" if options.keep_abandoned else "cancel",
        default_timeout_s=options.timeout,
        cors_origins=tuple(options.cors_origin),
        **({} if options.max_tokens is None else {"max_tokens": options.max_tokens}),
    )
    from steploom.cli import loop
    from steploom.engine.async_engine import AsyncDiffusionEngine

    del uvicorn
    logs.configure(options.log_format)
    engine = AsyncDiffusionEngine(config)
    with contextlib.ExitStack() as ends:
        if options.profile:
            from steploom.telemetry import ProfileObserver

            engine.observers.append(ends.enter_context(ProfileObserver(options.profile)))
        end_of_traces = otlp.set_up(os.environ)
        if end_of_traces is not None:
            ends.callback(end_of_traces)
        return loop.run(_serve(options, engine, settings))


def _engine_config(options: argparse.Namespace) -> Any:
    given = {"max_waiting": options.max_queue, "max_batch": options.max_batch}
    if options.served is not None:
        if options.model is not None:
            raise ConfigError(f"--model {options.model}: MODEL={options.served} is given already; leave one out")
        options.model = options.served
    config = arguments.engine_config(options, **{name: value for name, value in given.items() if value is not None})
    if options.lora_model:
        config = dataclasses.replace(config, loras={**(config.loras or {}), **dict(options.lora_model)})
    return config


def _keys(options: argparse.Namespace, env: Mapping[str, str]) -> tuple[str, ...]:
    """All API keys: of the options, of the file, else of the environment."""
    keys: list[str] = list(options.api_key)
    if options.api_key_file is not None:
        lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {options.api_key_file}: has no key; write one a line")
        keys += found
    if not keys and env.get(KEY_VARIABLE):
        keys = [env[KEY_VARIABLE]]
    return tuple(keys)


async def _serve(options: argparse.Namespace, engine: AsyncDiffusionEngine, settings: ServerSettings) -> int:
    """Listens at once, so that ``/live`` answers and ``/ready`` says why not yet; then loads and warms up the model."""
    import anyio

    from steploom.server import create_app

    app = create_app(engine, settings)
    state: ServerState = app.state.server
    state.loading = "starting"
    draining = anyio.Event()
    server = _server(options, app, state, draining)
    async with anyio.create_task_group() as group:
        group.start_soon(_hold, engine, state, server)
        group.start_soon(_drain, engine, state, draining, options.drain_timeout)
        await server.serve()
        group.cancel_scope.cancel()
    return 0 if server.started else 1


async def _hold(engine: AsyncDiffusionEngine, state: ServerState, server: uvicorn.Server) -> None:
    """Loads the model, warms it up, says that it is ready, and holds it until the server has ended."""
    import anyio

    def on_progress(line: str) -> None:
        state.loading = line
        log.info("%s", line)

    try:
        await engine.start(on_progress)
        try:
            state.loading = "warming up"
            with state.telemetry.aside():
                await _warm_up(engine)
            state.loading = None
            _say(f"{', '.join(state.model_names)} is ready at {_address(server)}")
            await anyio.sleep_forever()
        finally:
            await engine.close()
    finally:
        server.should_exit = True  # a model that cannot be loaded ends the server too


async def _drain(engine: AsyncDiffusionEngine, state: ServerState, draining: anyio.Event, timeout_s: float) -> None:
    """Once told to, lets what runs end; what takes too long is told that the server was shut down."""
    import anyio

    await draining.wait()
    with anyio.move_on_after(timeout_s):
        await state.running.emptied()
    await engine.close()


def _say(line: str) -> None:
    """Tells whoever has started the server."""
    from steploom.server.telemetry import logs

    if logs.writes_json():
        log.info("%s", line)
    else:
        sys.stderr.write(f"steploom: {line}\n")


async def _warm_up(engine: AsyncDiffusionEngine) -> None:
    """Two short requests at once: what is compiled, probed and verified at first use is so before anybody waits."""
    import anyio

    info = engine.info
    known = {parameter.name for parameter in info.parameters}
    required = {parameter.name for parameter in info.parameters if parameter.required}
    if not required <= {"prompt"}:
        return  # it needs a picture, and which one is not ours to say
    short = {"num_inference_steps": 2, "gen_length": 8}
    short = {name: value for name, value in short.items() if name in known}
    async with anyio.create_task_group() as group:
        for seed, prompt in enumerate(("warm-up", "another warm-up")):
            group.start_soon(_one, engine, prompt if "prompt" in known else None, {"seed": seed, **short})


async def _one(engine: AsyncDiffusionEngine, prompt: str | None, params: dict[str, Any]) -> None:
    await engine.generate(prompt, **params)


def _address(server: uvicorn.Server) -> str:
    config = server.config
    if config.uds:
        return config.uds
    sockets = [found.getsockname() for one in server.servers for found in one.sockets]
    host, port = sockets[0][:2] if sockets else (config.host, config.port)
    scheme = "https" if config.is_ssl else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _server(options: argparse.Namespace, app: Any, state: ServerState, draining: anyio.Event) -> uvicorn.Server:
    import uvicorn

    loop = asyncio.get_running_loop()

    class Server(uvicorn.Server):
        """The first signal drains, the second one ends at once."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
            elif len(state.running):
                _say(f"finishing {len(state.running)} requests; once more to stop at once")
            state.draining = self.should_exit = True
            loop.call_soon_threadsafe(draining.set)

    tls = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile} if options.ssl_certfile else {}
    where = {"uds": options.uds} if options.uds else {"host": options.host, "port": options.port}
    config = uvicorn.Config(
        app, **where, **tls, root_path=options.root_path, lifespan="off", log_config=None, access_log=False,
        timeout_graceful_shutdown=math.ceil(options.drain_timeout) + _ANSWERING_S, server_header=False,
    )  # fmt: skip
    return Server(config)
