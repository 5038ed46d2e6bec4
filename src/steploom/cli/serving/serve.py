"""``steploom serve``: the model behind OpenAI's API."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.cli.option import MASK
from steploom.cli.serving import listening
from steploom.cli.serving.serve_options import add_options
from steploom.config import EngineConfig
from steploom.errors import ConfigError, InvalidRequest, QueueFull, SteploomError, unusable

if TYPE_CHECKING:
    import socket

    import uvicorn

    from steploom import AsyncDiffusionEngine
    from steploom.cli.serving.shutdown import Server
    from steploom.protocol import PipelineInfo
    from steploom.server import ServerSettings
    from steploom.server.state import ServerState

log = logging.getLogger("steploom.serve")

EXIT_FAILED = 1

LIMITS = ("max_images", "max_prompt_chars", "max_body_bytes", "max_videos", "max_video_bytes",
          "max_unfinished_videos")  # fmt: skip
"""Options that are fields of ``ServerSettings`` of the same name."""

PREVIEWS = ("auto", "off")
"""What ``--preview`` takes beside a tiny autoencoder."""
_SMALL = 256
"""Pixels of a side of the video that warms up, at most."""

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
  with all settings in a file (`steploom config --help`)
    steploom serve --config serve.toml

then, with the OpenAI SDK:
  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.images.generate(prompt="a small blue star on a black background", size="64x64")
"""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``serve`` to the command."""
    parser = arguments.add_command(
        commands, "serve", run, summary="serve a model over HTTP, as the OpenAI SDK expects it", examples=_EXAMPLES
    )
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom serve`` until it is told to end.

    Raises:
        ConfigError: A setting is wrong, or the extra ``server`` is missing.
        EngineError: The model cannot be loaded.
    """
    config = engine_config(options)
    keys = _keys(options)
    listening.check_tls(options)
    try:
        import uvicorn

        from steploom.server import ServerSettings
        from steploom.server.telemetry import beside, logs
    except ImportError as error:
        raise ConfigError(f"serve: {unusable(error)}; pip install 'steploom[server]'") from None
    del uvicorn
    logs.configure(options.log_format)
    server_settings = ServerSettings(
        api_keys=keys,
        admin_keys=_admin_keys(options),
        model_names=tuple(options.served_model_name),
        on_disconnect="keep" if options.keep_abandoned else "cancel",
        previews=options.preview != "off",
        default_timeout_s=options.timeout,
        cors_origins=tuple(options.cors_origin),
        **{name: getattr(options, name) for name in LIMITS},
        body_timeout_s=options.body_timeout,
        stream_silence_s=options.stream_silence,
        scrape_timeout_s=options.scrape_timeout,
        video_dir=options.video_dir,
        video_ttl_s=options.video_ttl,
        page=not options.no_page,
    )
    with beside.written_beside(options.log_timeout):
        try:
            return _listen(options, config, server_settings)
        except (SteploomError, OSError) as error:
            if not logs.writes_json():
                raise
            log.critical("%s", " ".join(str(error).split()))  # whoever reads the log is told why it ends
            return EXIT_FAILED


def _listen(options: argparse.Namespace, config: EngineConfig, settings: ServerSettings) -> int:
    """Serves until told to end; returns the exit code."""
    from steploom.server.telemetry import otlp

    with listening.listening(options) as sockets:  # first of all: a port in use is known at once
        from steploom.cli import loop
        from steploom.engine.async_engine import AsyncDiffusionEngine

        engine = AsyncDiffusionEngine(config)
        with contextlib.ExitStack() as ends:
            if options.profile:
                from steploom.telemetry import ProfileObserver

                try:
                    engine.observers.append(ends.enter_context(ProfileObserver(options.profile)))
                except OSError as error:
                    raise ConfigError(f"--profile {options.profile}: cannot be written: {error.strerror}") from None
            end_of_traces = otlp.set_up(os.environ, options.span_timeout)
            code = loop.run(_serve(options, engine, settings, sockets))
            if end_of_traces is not None and code == 0:  # a second signal waits for no collector
                end_of_traces()
            return code


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine's settings.

    Raises:
        ConfigError: One is wrong.
    """
    names = {"max_queue": "max_waiting", "max_queue_seconds": "max_waiting_s"}
    names |= {name: name for name in ("max_batch", "data_parallel_size", "ulysses_degree", "ring_degree",
                                      "tensor_parallel_size", "policy", "max_steps", "max_pixels",
                                      "max_tokens")}  # fmt: skip
    given = {field: getattr(options, name) for name, field in names.items() if arguments.is_given(options, name)}
    if options.preview not in PREVIEWS:
        given["preview_vae"] = options.preview
    config = arguments.engine_config(options, **given)
    if options.lora_model:
        config = dataclasses.replace(config, loras={**(config.loras or {}), **dict(options.lora_model)})
    return config


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    """All API keys, those of the file too.

    Raises:
        ConfigError: A file has none, or one is only what ``steploom config show`` puts in place of a key.
    """
    keys: list[str] = list(options.api_key)
    if MASK in keys:
        raise ConfigError(
            f"api_key = {MASK!r}: stands for a key that was not shown; write the key itself, or api_key_file"
        )
    if options.api_key_file is not None:
        try:
            lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--api-key-file {options.api_key_file}: cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {options.api_key_file}: has no key; write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def _admin_keys(options: argparse.Namespace) -> tuple[str, ...]:
    """Those for ``/admin``.

    Raises:
        ConfigError: One is only what ``steploom config show`` puts in place of a key.
    """
    if MASK in options.admin_key:
        raise ConfigError(f"admin_key = {MASK!r}: stands for a key that was not shown; write the key itself")
    return tuple(dict.fromkeys(options.admin_key))


async def _serve(
    options: argparse.Namespace, engine: AsyncDiffusionEngine, settings: ServerSettings, sockets: list[socket.socket]
) -> int:
    """Listens at once, so that ``/live`` answers and ``/ready`` says why not yet; then loads and warms up the model."""
    import anyio

    from steploom.cli.serving import shutdown
    from steploom.server import create_app

    app = create_app(engine, settings)
    state: ServerState = app.state.server
    state.loading = "starting"
    server = shutdown.Server(_server_config(options, app), state)
    async with anyio.create_task_group() as group:
        group.start_soon(_hold, engine, state, server, listening.address_of(options, sockets))
        group.start_soon(shutdown.drain, engine, state, server, options.drain_timeout)
        group.start_soon(shutdown.stop_now, server, group.cancel_scope)
        await server.serve(sockets)
        group.cancel_scope.cancel()
    return server.exit_code


def _server_config(options: argparse.Namespace, app: Any) -> uvicorn.Config:
    import uvicorn

    most = listening.allow_connections(options.max_connections)
    tls = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile} if options.ssl_certfile else {}
    return uvicorn.Config(
        app, **tls, http=listening.protocol(most, options.head_timeout), ws="none", root_path=options.root_path,
        lifespan="off", log_config=None, access_log=False, server_header=False, timeout_keep_alive=options.keep_alive,
        timeout_graceful_shutdown=options.answer_timeout,
        forwarded_allow_ips="*" if options.uds is not None else None,  # only a proxy that the file's mode lets in
    )  # fmt: skip


async def _hold(engine: AsyncDiffusionEngine, state: ServerState, server: Server, address: str) -> None:
    """Loads the model, warms it up, says that it is ready, and holds it until the server has ended."""
    import anyio

    from steploom.server.telemetry import logs
    from steploom.worker.memory import still

    def on_progress(line: str) -> None:
        state.loading = line
        log.info("%s", line)

    try:
        await engine.start(on_progress)
        try:
            state.loading = "warming up"
            with state.aside():
                await _warm_up(engine)
            still.freeze()  # a full collection would hold up everybody for 0.1 s
            async with state:
                state.loading = None
                logs.say(f"{', '.join(state.model_names)} is ready at {address}")
                fault = await engine.wait_ended()
                if fault is not None:  # and then the server says so at /ready
                    log.error("%s", fault)
                await anyio.sleep_forever()
        finally:
            await engine.close()
    finally:
        server.should_exit = True  # a model that cannot be loaded ends the server too


async def _warm_up(engine: AsyncDiffusionEngine) -> None:
    """Two short requests at once: what is compiled, probed and verified at first use is so before anybody waits.

    They are within the limits: whoever allows one step, or one request to wait, is served as well.
    """
    import anyio

    info = engine.info
    known = {parameter.name for parameter in info.parameters}
    required = {parameter.name for parameter in info.parameters if parameter.required}
    if not required <= {"prompt"}:
        return  # it needs a picture, and which one is not ours to say
    params = {name: value for name, value in _short(info, engine.config).items() if name in known}
    async with anyio.create_task_group() as group:
        for seed, prompt in enumerate(("warm-up", "another warm-up")):
            group.start_soon(_one, engine, prompt if "prompt" in known else None, {"seed": seed, **params})


def _short(info: PipelineInfo, config: EngineConfig) -> dict[str, int]:
    """Arguments of a short request: few steps; of a video few and small frames, since a whole one takes minutes."""
    steps = min(2, config.max_steps)
    if "videos" not in info.makes:
        return {"num_inference_steps": steps, "gen_length": min(8, config.max_tokens)}
    side = max(_SMALL // info.size_multiple, 1) * info.size_multiple
    width, height = (min(side, most) for most in info.default_size or (side, side))
    return {"num_inference_steps": steps, "num_frames": 1 + info.frame_multiple, "width": width, "height": height}


async def _one(engine: AsyncDiffusionEngine, prompt: str | None, params: dict[str, Any]) -> None:
    from steploom import GenerationFailed

    try:
        await engine.generate(prompt, **params)
    except (InvalidRequest, QueueFull) as error:  # the pipeline's own size is beyond --max-pixels, or --max-queue is 1
        log.info("a request less to warm up with: %s", error)
    except GenerationFailed as error:  # others may ask for something else
        log.warning("warming up failed: %s", error)
