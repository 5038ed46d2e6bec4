"""What the application writes into once it has asked does not reach its request, however late that runs, or again."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import anyio
import numpy
import pytest
import torch
from mortal_site import STEPS, Site
from PIL import Image
from scripted_runner import Gate

from steploom import DiffusionRequest
from steploom.engine.checks.buffers import kept

pytestmark = pytest.mark.usefixtures("temporary")
SIDES = pytest.mark.parametrize("side", [4, 800], ids=["small", "large"])


class Buffers:
    """All kinds of what can be written into."""

    def __init__(self, side: int) -> None:
        self.array = numpy.arange(side * side, dtype=numpy.float32).reshape(side, side)
        self.picture = Image.fromarray(self.array.astype(numpy.uint8))
        self.bytes = bytearray(b"x" * side * side)
        self.inner = [1, 2, 3]
        self.all: dict[str, Any] = {"a": self.array, "p": [self.picture], "b": self.bytes, "i": self.inner}

    def overwrite(self) -> None:
        self.array.fill(0)
        self.picture.paste(0, (0, 0, *self.picture.size))
        self.bytes[:] = b"y" * len(self.bytes)
        self.inner[:] = [7, 8]
        self.all["more"] = 5


async def undisturbed(engine: Any, name: str, side: int) -> Any:
    return (await engine.generate(name, seed=1, num_inference_steps=STEPS, buffers=Buffers(side).all)).output


@SIDES
async def test_who_is_replayed_begins_with_what_was_given(site: Site, gate: Gate, side: int) -> None:
    async with site.engine() as engine:
        expected = await undisturbed(engine, "a", side)
        given = Buffers(side)
        own = {"num_inference_steps": STEPS, "buffers": given.all, "gate": str(gate.path), "at": 3}
        async with engine.stream("a", seed=1, **own) as run:
            await gate.reached()
            given.overwrite()
            site.kill()
            gate.close()
            assert (await run.result()).output == expected
        assert (await engine.generate("a", seed=1, num_inference_steps=STEPS, buffers=given.all)).output != expected
    assert len(site.loads) == 2


async def test_who_waits_begins_with_what_was_given(site: Site, gate: Gate) -> None:
    async with site.engine(max_batch=1, max_resident=1) as engine:
        expected = await undisturbed(engine, "b", 4)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: engine.generate("a", num_inference_steps=STEPS, gate=str(gate.path)))
            await gate.reached()
            given = Buffers(4)
            async with engine.stream("b", seed=1, num_inference_steps=STEPS, buffers=given.all) as run:
                given.overwrite()
                gate.close()
                assert (await run.result()).output == expected


@dataclasses.dataclass
class Condition:
    frames: torch.Tensor
    strength: float = 1.0


async def test_the_same_object_stays_one_and_others_stay_as_they_are() -> None:
    latents, generator, function = torch.ones(2, 3, requires_grad=True), torch.Generator(), len
    condition = Condition(latents)
    prompts, texts = ["a", "b"], ("c", ["d"])
    request = DiffusionRequest(prompts, generator=[generator, generator], latents=latents, conditions=[condition],
                               again=latents, texts=texts, function=function, lora=[("ink", 0.5)])  # fmt: skip
    copy = await kept(request)
    with torch.no_grad():
        latents.zero_()
    prompts.append("c")
    texts[1].append("e")
    condition.strength = 0.0
    assert copy.prompt == ["a", "b"]
    assert copy.lora == [("ink", 0.5)]
    assert copy.request_id == request.request_id
    params = copy.params
    assert params["texts"] == ("c", ["d"])
    assert params["latents"].tolist() == [[1.0] * 3] * 2
    assert params["latents"] is params["again"] is params["conditions"][0].frames
    assert params["conditions"][0].strength == 1.0
    assert params["generator"] == [generator, generator]
    assert params["function"] is function


class Watched(numpy.ndarray):
    """Notes the threads in which it is copied."""

    threads: list[int]

    def copy(self, order: Any = "C") -> Any:
        self.threads.append(threading.get_ident())
        return numpy.array(self)


@SIDES
async def test_what_is_large_is_copied_in_a_thread(side: int) -> None:
    given = numpy.ones((side, side)).view(Watched)
    given.threads = []
    await kept(DiffusionRequest("a", image=given))
    assert [thread == threading.get_ident() for thread in given.threads] == [side == 4]


class Closed(numpy.ndarray):
    def copy(self, order: Any = "C") -> Any:
        raise ValueError("nothing to read")


async def test_what_cannot_be_copied_is_left_to_the_checks() -> None:
    given = numpy.ones(3).view(Closed)
    assert (await kept(DiffusionRequest("a", image=[given]))).params["image"][0] is given
