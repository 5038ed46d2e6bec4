"""An executor of your own: whole requests go to another machine's ``steploom serve``, over HTTP.

steploom serve --port 8000                                       # there
python examples/http_executor.py http://127.0.0.1:8000 [FOLDER]  # here

Everything of this engine works in front of it: its queue and priorities, timeouts, cancelling, ``/metrics``.
"""

import asyncio
import base64
import io
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import anyio
import anyio.lowlevel
from PIL import Image

from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    DiffusionOutput,
    DiffusionRequest,
    EngineConfig,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestError,
    SteploomError,
)
from steploom.executor import DiffusionExecutor, ProgressCallback
from steploom.protocol import PipelineInfo

PROMPTS = ["a large red circle on a white background", "a small yellow star on a blue background"]
ERRORS = {429: QueueFull, 499: RequestCancelled, 504: DeadlineExceeded}
OWN = ("seed", "lora", "cache", "priority", "timeout", "deadline", "user")
"""Fields of a request that the server takes too, beside the pipeline's arguments."""
REFUSED = ("task", "noise_scheduler", "output_type", "return_trajectory", "preview_every", "latents_every")
"""Those that it does not take, or whose answers are no images."""
SAMPLES = "num_images_per_prompt"
"""What the server calls ``n``, as OpenAI does."""
OTHERWISE = {"n": f"give {SAMPLES}", "stream": "use engine.stream()", "response_format": "images come as they are"}
"""What the server takes and a request to an engine has other ways for."""
KEPT_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 40_000}
"""A machine that has vanished is noticed after 40 s, on systems that have these options."""


class Draining(EngineError):
    """The server is being drained, or shut down: of what it is asked it does no more, and another one may."""


class HttpExecutor(DiffusionExecutor):
    """Sends whole requests to the server at ``config.model``, which batches them by itself.

    ``STEPLOOM_REMOTE_KEY`` is its API key, if it wants one.
    """

    granularity = "request"

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self._session: aiohttp.ClientSession | None = None

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        on_progress(f"waiting for {self.config.model}")
        key = os.environ.get("STEPLOOM_REMOTE_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = aiohttp.ClientSession(
            self.config.model,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),  # the engine's own timeouts end requests
            connector=aiohttp.TCPConnector(limit=0, socket_factory=kept_alive),  # its max_batch bounds how many run
        )
        try:
            await self._ask("GET", "/ready")  # start_timeout_s bounds it
            (model, *_) = (await self._ask("GET", "/v1/models"))["data"]
            return PipelineInfo(pipeline_class=model["id"], makes=["images"])  # no parameters: the server checks them
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.shutdown()
            if isinstance(error, (LookupError, TypeError, ValueError)):
                told = f"{self.config.model} answered nonsense: {type(error).__name__}: {error}"
                raise EngineError(told) from None
            raise

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        return [await self._generate(request) for request in requests]

    async def _generate(self, request: DiffusionRequest) -> DiffusionOutput:
        """One request. Cancelling this closes the connection, and the server ends what nobody waits for."""
        try:
            answer = await self._ask("POST", "/v1/images/generations", body_of(request))
        except (RequestError, Draining) as error:
            told = RequestCancelled(str(error), drained=True) if isinstance(error, Draining) else error
            return DiffusionOutput(request_id=request.request_id, seed=request.seed, error=told)
        try:
            images = await anyio.to_thread.run_sync(images_of, answer, request)
        except (LookupError, TypeError, ValueError, OSError, Image.DecompressionBombError) as error:
            told = f"{self.config.model} answered nonsense: {type(error).__name__}: {error}"
            raise EngineError(told) from None
        return DiffusionOutput(request_id=request.request_id, seed=request.seed, output=SimpleNamespace(images=images))

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """``ping`` asks the remote's workers; a plain server forwards no other method."""
        with anyio.fail_after(timeout):
            await anyio.lowlevel.checkpoint()
            if method != "ping":
                raise InvalidRequest(f"method={method!r}: the server forwards 'ping' only", field="method")
            await self._ask("GET", "/health")
        return "pong" if unique_reply_rank is not None else ["pong"]

    async def shutdown(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the server answers, as JSON; its errors are ours."""
        if self._session is None:
            raise EngineNotRunning("the executor was not started, or is closed")
        try:
            async with self._session.request(method, path, json=body) as response:
                answer = await response.json(content_type=None)
                if response.status >= 400:
                    raise error_of(response.status, answer)
                return answer
        except SteploomError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if self._session is None:
                raise EngineNotRunning("the executor was closed") from None
            raise EngineError(f"{self.config.model} does not answer: {type(error).__name__}: {error}") from None


def images_of(answer: Any, request: DiffusionRequest) -> list[Image.Image]:
    """The images in an answer: as many as were asked for."""
    files = [base64.b64decode(entry["b64_json"], validate=True) for entry in answer["data"]]
    asked = request.params.get(SAMPLES) or 1
    if len(files) != asked:
        raise ValueError(f"{len(files)} images, and not {asked}")
    return [Image.open(io.BytesIO(file)).copy() for file in files]


def kept_alive(info: Any) -> socket.socket:
    """A socket that asks now and then whether the other end is there: a server says nothing while it draws."""
    made = socket.socket(*info[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEPT_ALIVE.items():
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


def body_of(request: DiffusionRequest) -> dict[str, Any]:
    """The request as the server reads it; what JSON cannot hold is refused here, what it does not know there."""
    if request.prompt is not None and not isinstance(request.prompt, str):
        raise InvalidRequest("prompt: one server request has one prompt; send several requests", field="prompt")
    for name in REFUSED:
        if getattr(request, name) != getattr(DiffusionRequest(), name):
            raise InvalidRequest(f"{name}={getattr(request, name)!r}: does not travel to the server", field=name)
    for name, value in request.params.items():
        if name in OTHERWISE:
            raise InvalidRequest(f"{name}: does not travel to the server; {OTHERWISE[name]}", field=name)
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise InvalidRequest(f"{name}: a {type(value).__name__} does not travel to the server", field=name)
    own = {name: getattr(request, name) for name in OWN}
    params = {"n" if name == SAMPLES else name: value for name, value in request.params.items()}
    return {"prompt": request.prompt, **{name: value for name, value in own.items() if value}, **params,
            "seed": request.seed}  # fmt: skip


def error_of(status: int, answer: Any) -> Exception:
    """The exception that the server had before it became an answer."""
    told = answer.get("error") if isinstance(answer, dict) else None
    message, field = (told.get("message"), told.get("param")) if isinstance(told, dict) else (str(answer), None)
    if status in ERRORS:
        return ERRORS[status](message)
    if status == 503 or status in (401, 403, 404):
        draining = isinstance(told, dict) and told.get("code") == "draining"
        return (Draining if draining else EngineError)(f"HTTP {status}: {message}")
    return InvalidRequest(message, field=field) if status < 500 else GenerationFailed(message)


async def draw(address: str) -> list[DiffusionOutput]:
    config = EngineConfig(model=address, distributed_executor_backend=HttpExecutor)
    async with AsyncDiffusionEngine(config) as engine:
        return await asyncio.gather(*(engine.generate(prompt, seed=1) for prompt in PROMPTS))


def main(address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    for place, out in enumerate(asyncio.run(draw(address))):
        path = folder / f"http-executor-{place}.png"
        out.images[0].save(path)
        print(f"{path}  {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1], Path(*sys.argv[2:] or ["out"]))
