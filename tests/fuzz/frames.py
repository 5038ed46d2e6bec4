"""What the decoder is fuzzed with: a valid message of every type, and messages as one string of bytes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image

from steploom import codec
from steploom.codec.keys import LOOKED_AT, check_keys
from steploom.codec.rules import Code
from steploom.config import EngineConfig
from steploom.errors import GenerationFailed, ProtocolError
from steploom.protocol import ErrorInfo, NewRequest, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.worker import messages
from steploom.worker.messages import Answer, Command, Configure, ToEngine, ToWorker
from steploom.worker.ranks import spmd as ranks
from steploom.worker.ranks.spmd import Said, Word

MEMORY = 256 << 20
"""Bytes that decoding a message may take, at most."""
STATM = Path("/proc/self/statm")
LARGEST = 1 << 20
"""Bytes of a fuzzed message, at most."""


def everything() -> dict[str, Any]:
    """A value for each extension code of the wire."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

    palette = Image.new("P", (3, 2))
    palette.putpalette([1, 2, 3] * 256)
    drawn_from = torch.Generator().manual_seed(1)
    return {
        "plain": [None, True, 7, -2.5, "text", b"bytes"],
        "tuple": (1, "a"), "set": {1, 2}, "frozenset": frozenset({"a"}), "integer": 1 << 80, "complex": 1 + 2j,
        "bytes": b"x" * 3000, "tensor": torch.arange(6, dtype=torch.float16).reshape(2, 3), "empty": torch.empty(0, 4),
        "array": np.arange(6, dtype="<i4").reshape(3, 2), "void": np.empty((0, 2), "<f8"), "scalar": np.float64(1.5),
        "images": [Image.new("RGB", (3, 2)), Image.new("1", (9, 2)), Image.new("LA", (2, 2)), palette],
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "dataclass": StableDiffusionPipelineOutput([], None),
        "struct": RequestReport(run_id="r#1"), "request": DiffusionRequest("a cat", seed=1),
        "error": GenerationFailed("it failed"), "generators": [drawn_from] * 2,
    }  # fmt: skip


def valid() -> Iterator[tuple[str, list[bytes]]]:
    """A message of every type, by name, as frames."""
    request = DiffusionRequest("a cat", seed=1, height=64, width=64, **{k: v for k, v in everything().items() if k in (
        "tensor", "array", "images", "complex", "dtype")})  # fmt: skip
    output = SchedulerOutput(3, [NewRequest("r#1", request)], ["s#2"], ["t#3"], "key")
    error = ErrorInfo.of(GenerationFailed("it failed"), "a traceback")
    report = RequestReport(run_id="r#1", finished=True, output=everything(), latents=torch.zeros(2, 3), error=error)
    made: dict[type, Any] = {
        messages.Hello: messages.Hello(),
        messages.Configure: Configure.of(EngineConfig(model="demo")),
        messages.Tick: messages.Tick(output),
        messages.Amend: messages.Amend(output),
        messages.Call: messages.Call(1, "stats", [1, everything()], {"a": (1, 2)}),
        messages.Withdraw: messages.Withdraw(1),
        messages.Close: messages.Close(),
        messages.Progress: messages.Progress("loading"),
        messages.Ready: messages.Ready(PipelineInfo(pipeline_class="P", parameters=[]), ["diffusers"]),
        messages.Ticked: messages.Ticked(3, RunnerOutput(tick=3, reports=[report])),
        messages.Returned: messages.Returned(1, everything()),
        messages.Fatal: messages.Fatal(error),
        ranks.Begin: ranks.Begin(Configure.of(EngineConfig(model="demo")), 1, 2, "a file"),
        ranks.Met: ranks.Met(),
        ranks.Failed: ranks.Failed(error),
        ranks.Faulted: ranks.Faulted("ValueError: why"),
        ranks.Did: ranks.Did([["r#1", "denoise", 1, None, False, None, "key", 1, 2, 0]], 3, 4),
        ranks.Go: ranks.Go(),
        ranks.Settled: ranks.Settled(everything()),
    }
    for wrap, kinds in ((ToWorker, Command), (ToEngine, Answer), (Said, Word)):
        for kind in kinds.__args__:
            yield f"{wrap.__name__}-{kind.__name__}", [bytes(frame) for frame in codec.encode(wrap(made[kind]))]


def _tick(**output: Any) -> dict[str, Any]:
    return {"command": {"type": "Tick", "output": {"tick": 1, "scheduled_cached_reqs": [], **output}}}


def nearly_valid() -> Iterator[tuple[str, list[bytes]]]:
    """Messages as another version, or another process, may send them."""
    returned = dict(valid())["ToEngine-Returned"]
    yield "request-is-text", [msgspec.msgpack.encode(_tick(scheduled_new_reqs=[{"run_id": "r#1", "request": "text"}]))]
    yield "frame-too-many", [*returned, b"more"]
    yield "frame-missing", returned[:-1]
    integers = [msgspec.msgpack.Ext(int(Code.INTEGER), msgspec.msgpack.encode(hex(n))) for n in range(1025)]
    items = msgspec.msgpack.Ext(int(Code.SET), msgspec.msgpack.encode(list(range(1025))))
    for name, result in (("set-too-large", items), ("integers-too-many", integers)):
        yield name, [msgspec.msgpack.encode({"answer": {"type": "Returned", "call": 1, "result": result}})]
    root = "diffusers.pipelines.stable_diffusion"
    for name, module, kind in (
        ("class-unknown", root, "Output"),
        ("module-unknown", f"{root}.none", "Output"),
        ("no-dataclass", "diffusers.models.autoencoders.vae", "Encoder"),
        ("package-unknown", "numpy", "ndarray"),
    ):
        inner = msgspec.msgpack.Ext(int(Code.DATACLASS), msgspec.msgpack.encode([module, kind, {"images": []}]))
        yield name, [msgspec.msgpack.encode({"answer": {"type": "Returned", "call": 1, "result": inner}})]


def joined(frames: list[bytes]) -> bytes:
    """Frames as one string: a byte for their number, four for each length, then themselves."""
    return bytes([len(frames)]) + b"".join(len(f).to_bytes(4, "little") for f in frames) + b"".join(frames)


def split(data: bytes) -> list[memoryview]:
    """The frames of any string whatsoever, writable and at any address, as from a socket. What is missing is cut."""
    count = max(1, data[0] % 32) if data else 1
    sizes = [int.from_bytes(data[1 + 4 * i : 5 + 4 * i], "little") for i in range(count)]
    memory = memoryview(bytearray(data))
    place, frames = 1 + 4 * count, list[memoryview]()
    for size in sizes:
        frames.append(memory[place : place + size])
        place += size
    return frames


@contextlib.contextmanager
def bounded() -> Generator[None]:
    """This process gets no more memory than it has and ``MEMORY``: more is a MemoryError, or torch's own words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def decode(data: bytes) -> str:
    """Decodes as engine, as worker and as rank; what came of it. All but a message or a ProtocolError goes through.

    Raises:
        MemoryError: Decoding asked for more than ``MEMORY``, which the decoder itself makes a ProtocolError of.
    """
    frames = split(data)
    found = ""
    for kind in (ToEngine, ToWorker, Said):
        try:
            with bounded():
                codec.decode(frames, kind)
            found += "+"
        except ProtocolError as error:
            if "MemoryError" in str(error) or "allocate memory" in str(error):
                raise MemoryError(f"more than {MEMORY} bytes: {error}") from error
            found += "-"
    if len(frames[0]) < LOOKED_AT:  # else it has been looked at
        with contextlib.suppress(ProtocolError):
            check_keys(frames[0], least=0)
    return found
