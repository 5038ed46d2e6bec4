"""Arguments of a kind that the pipeline's annotations exclude are refused before any work."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from steploom import EngineConfig, InvalidRequest, codec
from steploom.engine.checks.pictures import load_pictures
from steploom.engine.checks.validation import check_arguments
from steploom.media.pictures import brief
from steploom.protocol import NewRequest, Parameter, PipelineInfo
from steploom.requests import DiffusionRequest
from steploom.weave import signatures
from steploom.worker.traits import annotations

FLUX = annotations.kinds(diffusers.FluxPipeline)
SDXL = annotations.kinds(diffusers.StableDiffusionXLPipeline)
NUMBERED = {
    name
    for name, one in signatures.call_parameters(diffusers.FluxPipeline).items()
    if not annotations.takes_none(diffusers.FluxPipeline, one)
}
INFO = PipelineInfo(
    pipeline_class="P",
    parameters=[
        *(Parameter(name, kind=kind, takes_none=name not in NUMBERED) for name, kind in {**FLUX, **SDXL}.items()),
        *map(Parameter, ("sigmas", "generator", "controlnet_conditioning_scale", "messages", "frame_rate")),
    ],
)
NAMED = ("SanaVideoPipeline", "WanAnimatePipeline", "StableDiffusionGLIGENTextImagePipeline", "WanVACEPipeline",
         "FluxFillPipeline", "VisualClozePipeline", "DiffusionGemmaPipeline")  # fmt: skip
NAN = float("nan")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def check(prompt: Any = "a cat", **params: Any) -> None:
    check_arguments(DiffusionRequest(prompt, **params), INFO, EngineConfig())


def test_the_kinds_are_those_of_the_annotations() -> None:
    assert FLUX["guidance_scale"] == "number"
    assert FLUX["latents"] == SDXL["latents"] == SDXL["prompt_embeds"] == "tensor"
    assert SDXL["negative_prompt"] == "text"
    assert SDXL["cross_attention_kwargs"] == "mapping"
    assert SDXL["callback_on_step_end"] == "function"
    assert SDXL["ip_adapter_image"] == "picture"


def test_free_noise_takes_texts_by_frame() -> None:
    kind = annotations.kinds(diffusers.AnimateDiffPipeline)["prompt"]
    info = PipelineInfo(pipeline_class="P", parameters=[Parameter("prompt", kind=kind)])
    for prompt in ({0: "a cat", 8: "a dog"}, "a cat", ["a cat", "a dog"]):
        check_arguments(DiffusionRequest(prompt), info, EngineConfig())
        frames = codec.encode(NewRequest("r#1", DiffusionRequest(prompt)))
        assert codec.decode(frames, NewRequest).request.prompt == prompt
    for wrong in ({}, {"0": "a cat"}, {0: None}):
        with pytest.raises(InvalidRequest, match="FreeNoise a dict of str by frame"):
            check_arguments(DiffusionRequest(wrong), info, EngineConfig())
    with pytest.raises(InvalidRequest, match="must be a str, or a list of str"):
        check({0: "a cat"})


def test_what_is_named_like_pictures_takes_them_by_its_annotation() -> None:
    of = {name: annotations.kinds(getattr(diffusers, name)) for name in NAMED}
    assert of["SanaVideoPipeline"]["frames"] == of["WanAnimatePipeline"]["prev_segment_conditioning_frames"] == "number"
    assert of["StableDiffusionGLIGENTextImagePipeline"]["input_images_mask"] == "other"
    assert of["StableDiffusionGLIGENTextImagePipeline"]["gligen_images"] == "picture"
    assert of["WanAnimatePipeline"]["pose_video"] == of["WanVACEPipeline"]["reference_images"] == "picture"
    lax = [("FluxFillPipeline", "image"), ("VisualClozePipeline", "image"), ("DiffusionGemmaPipeline", "image")]
    assert not [name for name, argument in lax if argument in of[name]], "annotations that say less than is taken"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *(("guidance_scale", value, "a finite number") for value in ("5", NAN, -float("inf"), [1], {}, True, 1j)),
        ("true_cfg_scale", np.float32("nan"), "a finite number"),
        *(("guidance_scale", value, "a finite number") for value in (10**400, -(2**63), 2**63, Decimal(3))),
        *(("guidance_scale", value, "a finite number") for value in (Fraction(7, 2), np.bool_(True), np.ones(1), {5})),
        ("guidance_scale", np.longdouble(1), "a finite number"),
        ("clip_skip", "x", "a finite number"),
        *(("max_sequence_length", value, "at least 1") for value in (np.bool_(True), np.int64(0), np.float32(2), "8")),
        *(("height", value, "an integer of at least 1") for value in ("1024", Unprintable(), 64.0, Decimal(64))),
        ("guidance_scale", Unprintable(), "<Unprintable>: must be a finite number"),
        ("latents", Unprintable(), "<Unprintable>: must be"),
        ("max_sequence_length", -5, "an integer of at least 1"),
        ("max_sequence_length", 2.5, "an integer of at least 1"),
        ("prompt", [], "is empty"),
        ("prompt", 5, "a str, or a list of str"),
        ("prompt", ("a", "b"), r"a str, or a list of str, no tuple; give list\(...\)"),
        ("prompt", ["a", None], "a str, or a list of str"),
        ("prompt", b"a", "a str, or a list of str"),
        ("negative_prompt", {}, "a str, or a list of str"),
        ("negative_prompt", ["a", "b"], "2 texts for 1 prompts"),
        ("prompt_2", ["a", "b"], "2 texts for 1 prompts"),
        ("latents", np.zeros((1, 4, 8, 8)), "torch.from_numpy"),
        ("prompt_embeds", "x", "a torch.Tensor"),
        ("cross_attention_kwargs", 5, "a dict"),
        ("callback_on_step_end", "x", "a function"),
        ("callback_on_step_end", lambda: None, r"a function of \(pipeline, step, timestep, callback_kwargs\)"),
        ("num_inference_steps", None, "leave it out for the pipeline's own default"),
        ("num_images_per_prompt", None, "leave it out for the pipeline's own default"),
        ("guidance_scale", None, "must be a finite number.*; leave it out"),
        *(("sigmas", value, "finite numbers") for value in ([10**400], [Fraction(1, 2)], {1.0}, [[1.0]])),
        *(("sigmas", value, "finite numbers") for value in ("x", 5, [], [NAN], ["a"], {"a": 1})),
    ],
)
def test_another_kind_is_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}.*{words}") as refused:
        check(**{field: value})
    assert refused.value.field == field


def test_none_is_no_number_but_where_the_pipeline_asks_for_it() -> None:
    assert {"num_inference_steps", "num_images_per_prompt", "guidance_scale", "true_cfg_scale"} <= NUMBERED
    assert not NUMBERED & {"height", "sigmas", "return_dict", "output_type", "latents"}
    sound = signatures.call_parameters(diffusers.AceStepPipeline)["audio_duration"]
    assert isinstance(sound.default, float)
    assert annotations.takes_none(diffusers.AceStepPipeline, sound)  # which then takes the length of the source
    between = signatures.call_parameters(diffusers.SanaSprintPipeline)["intermediate_timesteps"]
    assert annotations.takes_none(diffusers.SanaSprintPipeline, between)  # as its check of inputs says
    height = signatures.call_parameters(diffusers.StableVideoDiffusionPipeline)["height"]
    assert isinstance(height.default, int)
    assert annotations.takes_none(diffusers.StableVideoDiffusionPipeline, height)  # height or ...


DEEP: list[Any] = []
for _ in range(10**4):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("frame_rate", -1, "-1: must be a finite number greater than 0"),
        ("controlnet_conditioning_scale", [1.0, NAN], r"\[1.0, nan\]: holds nan: must be a finite number"),
        ("controlnet_conditioning_scale", 10**400, r"10+\.\.\.: must be a finite number"),
        ("cross_attention_kwargs", {"scale": NAN}, r"{'scale': nan}: holds nan: must be a finite number"),
        ("cross_attention_kwargs", {"a": {"b": (1, 10**5000)}}, r"{'a': {'b': \(1, <int>\)}}: holds <int>: must be"),
        ("cross_attention_kwargs", {"a": DEEP}, "nested more than 8 deep"),
        ("messages", [{"role": "user", "content": [{"text": "x\ud800"}]}], r"'x\\ud800': has half of a surrogate pair"),
        ("prompt", "x\udfff", "half of a surrogate pair; give whole characters"),
        ("prompt", ["x", "\ud83d"], "half of a surrogate pair"),
        ("negative_prompt", "\ud800", "half of a surrogate pair"),
        ("prompt_2", ["\ud800"], "half of a surrogate pair"),
    ],
)
def test_numbers_are_finite_and_characters_whole_wherever_they_are(field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}.*{words}") as refused:
        check(**{field: value})
    assert refused.value.field == field
    assert len(str(refused.value)) < 300


async def test_tensors_are_finite() -> None:
    for value in (torch.full((1, 4), NAN), [torch.zeros(1), torch.tensor([float("-inf")])]):
        with pytest.raises(InvalidRequest, match=r"^latents=.*its values go from") as refused:
            await load_pictures(DiffusionRequest("a cat", latents=value), INFO, 100)
        assert refused.value.field == "latents"
    for fine in (torch.zeros(1, 4), torch.tensor([1, 2]), torch.zeros(0), torch.zeros(2, device="meta"), None):
        await load_pictures(DiffusionRequest("a cat", latents=fine), INFO, 100)


def test_a_message_says_little_of_a_large_value() -> None:
    assert brief(list(range(9))) == "[0, 1, 2, ...]"
    assert brief((1, {"a": 2})) == "(1, {'a': 2})"
    assert brief({1: DEEP, 2: 0, 3: 0, 4: 0}) == "{1: [[[...]]], 2: 0, 3: 0, ...}"
    assert brief("x" * 100) == "'" + "x" * 79 + "..."
    assert (brief(10**5000), brief(Unprintable()), brief(Decimal(3))) == ("<int>", "<Unprintable>", "Decimal('3')")


def test_what_diffusers_takes_passes() -> None:
    check("\U0001f600 \ud7ff", guidance_scale=-0.0, num_inference_steps=np.int64(3), height=np.int32(64))
    check(
        ["a", "b"], negative_prompt=["c", "d"], prompt_2="e", guidance_scale=np.float32(3), eta=0, clip_skip=None,
        latents=torch.zeros(1), sigmas=np.linspace(1, 0.1, 4), cross_attention_kwargs={"scale": 0.5},
        callback_on_step_end=print, callback_on_step_end_tensor_inputs=[], height=None,
    )  # fmt: skip
    check(callback_on_step_end=lambda pipe, step, timestep, kwargs: kwargs)
    check(None, prompt_embeds=torch.zeros(1), negative_prompt_embeds=[torch.zeros(1)], sigmas=torch.ones(3))
