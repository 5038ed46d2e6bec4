"""An executor of your own: whole requests go to a service of your own, over gRPC.

python examples/grpc_service.py unix:/tmp/mine/steploom         # there (HOST:PORT wants STEPLOOM_GRPC_TOKEN)
python examples/grpc_executor.py unix:/tmp/mine/steploom [FOLDER]
"""

import asyncio
import itertools
import os
import sys
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import grpc
import grpc.aio
from grpc_service import OPTIONS, SERVICE, TOKEN, TOLD, Answer, Call, pack, unpack

from steploom import (
    AsyncDiffusionEngine,
    DiffusionOutput,
    DiffusionRequest,
    EngineConfig,
    EngineDead,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    InvalidRequest,
    RequestError,
)
from steploom.executor import DiffusionExecutor, ProgressCallback
from steploom.protocol import PipelineInfo

PROMPTS = ["a large red circle on a white background", "a small yellow star on a blue background"]


class GrpcExecutor(DiffusionExecutor):
    """Sends whole requests to the service at ``config.model``. Its tensors, images and errors are as over a process."""

    granularity = "request"

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self._channel: grpc.aio.Channel | None = None
        self._name, self._count = uuid.uuid4().hex, itertools.count()  # others ask the service too, by ids of their own

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        on_progress(f"waiting for {self.config.model}")
        self._channel = grpc.aio.insecure_channel(self.config.model, options=OPTIONS)
        try:
            return unpack(await self._ask("Info", b"", wait=True), PipelineInfo)  # start_timeout_s bounds it
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.shutdown()
            raise

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        return [await self._generate(request) for request in requests]

    async def _generate(self, request: DiffusionRequest) -> DiffusionOutput:
        """One request. Cancelling this cancels it there: gRPC tells the service."""
        try:
            for name in ("preview_every", "latents_every"):  # one request, one answer
                if getattr(request, name):
                    raise InvalidRequest(f"{name}: the service answers when all is done, give 0", field=name)
            there = request.with_id(f"{self._name}-{next(self._count)}-{request.request_id}")
            data = await anyio.to_thread.run_sync(pack, there)  # pictures to start from may be large
            answer = await anyio.to_thread.run_sync(unpack, await self._ask("Generate", data), Answer)
            error = None if answer.error is None else answer.error.exception()
        except RequestError as refusal:
            return DiffusionOutput(request_id=request.request_id, seed=request.seed, error=refusal)
        if isinstance(error, EngineError):
            raise error
        return DiffusionOutput(
            request_id=request.request_id,
            seed=request.seed,
            output=answer.result,
            error=error,
            **{name: getattr(answer, name) for name in TOLD},
        )

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """Forwarded. Our clock decides what is late; who leaves ends the call there, where the clock began later."""
        call = Call(method, timeout, list(args), dict(kwargs or {}), unique_reply_rank)
        with anyio.fail_after(timeout):
            await anyio.lowlevel.checkpoint()
            answer = unpack(await self._ask("Call", pack(call)), Answer)
        if answer.error is not None:
            raise answer.error.exception()
        return answer.result

    async def wait_failed(self) -> EngineError:
        """The service never answers this call: its end is the end of the service."""
        try:
            await self._ask("Watch", b"", wait=True)
        except EngineError as error:
            return error
        return EngineDead(f"{self.config.model} ended the watch")

    async def shutdown(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _ask(self, method: str, data: bytes, *, wait: bool = False) -> bytes:
        """What the service answers; what goes wrong on the way is an error of ours."""
        if self._channel is None:
            raise EngineNotRunning("the executor was not started, or is closed")
        token = os.environ.get(TOKEN)
        metadata = (("authorization", f"Bearer {token}"),) if token else None
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer = await apart(call(data, metadata=metadata, wait_for_ready=wait))
        except grpc.aio.UsageError as error:
            raise EngineNotRunning(f"the executor was closed: {error}") from None
        if isinstance(answer, grpc.aio.AioRpcError):
            raise self._error(answer)
        if answer is None:
            raise EngineNotRunning("the executor was closed")
        return answer

    def _error(self, error: grpc.aio.AioRpcError) -> Exception:
        code, told = error.code(), f"{self.config.model}: {error.code().name}: {error.details()}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimeoutError(told)
        if code is grpc.StatusCode.UNKNOWN:  # the service's own code raised
            return GenerationFailed(told)
        return EngineNotRunning(told) if self._channel is None else EngineError(told)


async def apart(call: Awaitable[bytes]) -> bytes | grpc.aio.AioRpcError | None:
    """What a call came to; None if gRPC itself has cancelled it, as it does when its channel is closed.

    It has a task of its own, which ends with this. gRPC answers a cancellation with a new one. Awaited here, that would
    take the place of the one that a scope has sent, which does not know it for its own and lets it through.
    """
    came: bytes | grpc.aio.AioRpcError | None = None

    async def wait() -> None:
        nonlocal came
        try:
            came = await call
        except grpc.aio.AioRpcError as error:
            came = error

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
    return came


async def draw(address: str) -> list[DiffusionOutput]:
    config = EngineConfig(model=address, distributed_executor_backend=GrpcExecutor)
    async with AsyncDiffusionEngine(config) as engine:
        return await asyncio.gather(*(engine.generate(prompt, seed=1) for prompt in PROMPTS))


def main(address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for place, out in enumerate(asyncio.run(draw(address))):
        path = folder / f"grpc-executor-{place}.png"
        out.images[0].save(path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1], Path(*sys.argv[2:] or ["out"]))
