"""A service that runs whole requests, over gRPC: the other end of ``grpc_executor.py``.

python examples/grpc_service.py ADDRESS [MODEL]     # unix:/path/of/a/socket, or HOST:PORT

Messages are those of steploom's own codec (tensors and images as raw bytes, no pickle), in frames; so there is no
``.proto``, and nothing is generated. A unix socket is for this user alone. Behind HOST:PORT everybody may ask who has
the token in ``STEPLOOM_GRPC_TOKEN``, and nothing is encrypted: give the server credentials before it leaves home.
"""

import asyncio
import hmac
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import anyio
import grpc
import grpc.aio
import msgspec

from steploom import AsyncDiffusionEngine, DiffusionRequest, SteploomError, codec
from steploom.protocol import ErrorInfo

SERVICE = "steploom.example.Diffusion"
TOKEN = "STEPLOOM_GRPC_TOKEN"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),  # each end asks whether the other is there, also while a request runs for long
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # and the other does not take offence
]
"""Of both ends. Who has vanished, or stands still, is noticed after 20 s."""


class Call(msgspec.Struct):
    """A collective RPC."""

    method: str
    timeout: float | None = None
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    unique_reply_rank: int | None = None


class Answer(msgspec.Struct):
    """What came of a call or a request: an error, if there is one."""

    result: Any = None
    frame_rate: float | None = None
    sampling_rate: int | None = None
    texts: list[str] | None = None
    trajectory_latents: Any = None
    trajectory_timesteps: Any = None
    generator_states: Any = None
    error: ErrorInfo | None = None


TOLD = ("frame_rate", "sampling_rate", "texts", "trajectory_latents", "trajectory_timesteps", "generator_states")
"""What an output has beside the pipeline's own, and an answer too."""


def pack(value: Any, packages: Sequence[str] = codec.PACKAGES) -> bytes:
    """A message of gRPC's: the frames of the codec, one after another."""
    return msgspec.msgpack.encode([bytes(frame) for frame in codec.encode(value, packages=packages)])


def unpack(data: bytes, kind: Any, packages: Sequence[str] = codec.PACKAGES) -> Any:
    """The value of type ``kind`` in a message."""
    return codec.decode(msgspec.msgpack.decode(data, type=list[bytes]), kind, packages=packages)


class Service(grpc.GenericRpcHandler):
    """Answers with an engine."""

    def __init__(self, engine: AsyncDiffusionEngine, token: str | None) -> None:
        self._engine = engine
        self._token = token
        self._methods = {
            "Info": grpc.unary_unary_rpc_method_handler(self.info),
            "Generate": grpc.unary_unary_rpc_method_handler(self.generate),
            "Call": grpc.unary_unary_rpc_method_handler(self.call),
            "Watch": grpc.unary_unary_rpc_method_handler(self.watch),
        }

    def service(self, handler_call_details: Any) -> Any:
        service, _, name = handler_call_details.method.removeprefix("/").rpartition("/")
        return self._methods.get(name) if service == SERVICE else None

    async def _admit(self, context: Any) -> None:
        """Ends the call of whoever does not have the token."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given, f"Bearer {self._token}"):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"set {TOKEN} to the service's token")

    async def info(self, data: bytes, context: Any) -> bytes:
        """What the pipeline takes."""
        await self._admit(context)
        return pack(msgspec.structs.replace(self._engine.info, in_process=False))

    async def generate(self, data: bytes, context: Any) -> bytes:
        """A whole request. A caller that leaves cancels it: gRPC cancels this task."""
        await self._admit(context)
        try:
            output = await self._engine.generate(unpack(data, DiffusionRequest))
            return pack(Answer(output.output, **{name: getattr(output, name) for name in TOLD}))
        except SteploomError as error:
            return pack(Answer(error=ErrorInfo.of(error)))

    async def call(self, data: bytes, context: Any) -> bytes:
        """A collective RPC, with what is left of its time."""
        await self._admit(context)
        asked = unpack(data, Call)
        try:
            result = await self._engine.collective_rpc(
                asked.method, asked.timeout, asked.args, asked.kwargs, asked.unique_reply_rank
            )
            return pack(Answer(result))
        except (SteploomError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the worker did not answer in time")
            return pack(Answer(error=ErrorInfo.of(error)))

    async def watch(self, data: bytes, context: Any) -> bytes:
        """Is not answered: who waits learns from its end that the service is gone."""
        await self._admit(context)
        await anyio.sleep_forever()
        return b""


async def serve(address: str, model: str) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    token = os.environ.get(TOKEN)
    if not address.startswith("unix:") and not token:
        sys.exit(f"{address}: whoever reaches it could use it; set {TOKEN}, or listen at unix:/path")
    ended = anyio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with AsyncDiffusionEngine(model=model) as engine:
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((Service(engine, token),))
        mask = os.umask(0o177)
        try:
            port = server.add_insecure_port(address)
        finally:
            os.umask(mask)
        await server.start()
        if not address.startswith("unix:"):  # port 0 takes any that is free
            address = f"{address.rpartition(':')[0]}:{port}"
        print(f"listening at {address}", flush=True)
        await ended.wait()
        await server.stop(grace=None)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], *(sys.argv[2:3] or ["demo"])))
