"""Which arguments a pipeline cannot do without, as its own check says."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

from steploom import DiffusionRequest, EngineConfig, InvalidRequest
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import Parameter, PipelineInfo
from steploom.worker import tasks
from steploom.worker.traits.needs import does_without, needs


class Asks:
    """Refuses in all the ways of which some depend on what else is given."""

    def __call__(
        self, a: Any = None, b: Any = None, c: Any = None, d: Any = None, e: Any = 1, f: Any = None, g: Any = None,
        h: Any = None,
    ) -> None:  # fmt: skip
        d = d or 7
        self.check_inputs(a, b, c, d, e, f, h=g)

    def check_inputs(self, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, h: Any) -> None:
        if b is not None and a is not None:
            raise ValueError("not both")
        elif a is None and b is None:
            raise ValueError("one of them")
        if a is not None:
            pass
        elif c is None:
            raise ValueError("c without a")
        if d is None:
            raise ValueError("which was mended")
        if e is None:
            raise ValueError("which has a default")
        if h is None:
            raise ValueError("which is another one there")
        if b is None:
            return
        if f is None:
            raise ValueError("f with b")


def test_only_what_is_always_asked_for_is_needed() -> None:
    assert needs(Asks) == [["a", "b"]]
    assert needs(object()) == []


def test_what_diffusers_asks_for() -> None:
    assert needs(diffusers.StableDiffusionXLPipeline) == [["prompt", "prompt_embeds"]]
    assert needs(diffusers.LLaDA2Pipeline) == [["prompt", "messages", "input_ids"]]
    assert ["image", "video"] in needs(diffusers.CosmosVideoToWorldPipeline)
    assert needs(diffusers.DDPMPipeline) == []


class Goes:
    """Asks for None in ways that are an answer, and in others."""

    def __call__(
        self, a: Any = None, b: Any = None, c: Any = None, d: Any = None, e: Any = None, f: Any = None, g: Any = None
    ) -> Any:  # fmt: skip
        size = c.size
        if b is not None:
            g.append(1 if a is None else 2)
        else:
            size = 3
        if c is None:
            return size
        else:
            size = 4
        if d is not None:
            size = 5
        if e is None:
            raise ValueError("needed")
        else:
            size = 6
        return 1 if f is not None and size else 2


def test_what_a_call_does_without() -> None:
    assert [name for name in "abcdefg" if does_without(Goes, name)] == ["a", "b"]
    assert not does_without(object(), "a")


@pytest.mark.parametrize(
    ("cls", "without"),
    [
        (diffusers.JoyImageEditPipeline, True),
        (diffusers.BriaFiboEditPipeline, True),
        (diffusers.LongCatImageEditPipeline, False),  # which has read its size by then
        (diffusers.QwenImageEditPipeline, False),
        (diffusers.StableDiffusionInstructPix2PixPipeline, False),
    ],
)
def test_which_editing_is_drawing_too(cls: type, without: bool) -> None:
    assert ("text-to-image" in tasks.own_tasks(cls)) == without


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "WanPipeline", "LLaDA2Pipeline"])
def test_a_request_without_is_refused_before_any_work(name: str) -> None:
    pipeline = getattr(diffusers, name)
    parameters = [Parameter(one) for one in inspect.signature(pipeline.__call__).parameters]
    info = PipelineInfo(pipeline_class=name, parameters=parameters, needs=needs(pipeline))
    first, *others = info.needs[0]
    for given in ({}, {others[0]: None}):
        with pytest.raises(InvalidRequest, match=f"^prompt: {name} requires it, or {others[0]}") as refused:
            check_arguments(DiffusionRequest(**given), info, EngineConfig())
        assert refused.value.field == "prompt"
    check_arguments(DiffusionRequest("a cat"), info, EngineConfig())
    check_arguments(DiffusionRequest(**{others[0]: object()}), PipelineInfo(
        pipeline_class=name, parameters=[Parameter(others[0])], needs=[[first, *others]]), EngineConfig())  # fmt: skip
