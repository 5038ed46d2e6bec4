"""Requests that differ in what they are made of, not only in values: masks or none, lists, private switches."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import pytest
import tiny
import torch
from conformance.case import CASES, PROMPTS, SIZED
from driving import Driver, alone, assert_equal_to_alone, config, distance, request

from steploom.worker.runner import Runner
from steploom.worker.trials import trial

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}


def embedded(name: str, length: int, real: int | None = None) -> Any:
    """A request of Qwen-Image with prompt embeddings, of which the first ``real`` are; None: without a mask."""
    noise = torch.Generator().manual_seed(length)
    own: dict[str, Any] = {"prompt_embeds": torch.randn(1, length, 32, generator=noise)}
    if real is not None:
        own["prompt_embeds_mask"] = (torch.arange(length) < real).long().unsqueeze(0)
    return request(name, None, length, **SMALL, **own)  # pyright: ignore[reportArgumentType]


def test_text_with_a_mask_and_without_share():
    """Qwen-Image drops masks that hide nothing: what merges has then not the same arguments."""
    mates = [embedded("a", 5), embedded("b", 9, 7), embedded("c", 9), embedded("d", 5, 3)]
    driver, _ = assert_equal_to_alone(tiny.qwen_image, mates)
    assert driver.sharing("b")[-1] == 4


def test_lists_of_prompts_of_equal_and_unequal_lengths_share():
    mates = [request("a", ["one", "two"], 1, **SMALL), request("b", ["a", "longer"], 2, **SMALL)]  # pyright: ignore
    driver, _ = assert_equal_to_alone(tiny.qwen_image, mates)
    assert driver.sharing("a")[-1] == 2


def conditioned_at_zero() -> Any:
    """A Qwen-Image whose transformer looks at the sizes of every row, as that of Qwen-Image-Edit-2511 does."""
    pipe = tiny.qwen_image()
    for part in (pipe.transformer, *pipe.transformer.transformer_blocks):
        part.zero_cond_t = True
    return pipe


@pytest.mark.parametrize("build", [tiny.qwen_image, conditioned_at_zero])
def test_pictures_of_one_prompt_and_lists_of_prompts_share(build):
    """Qwen-Image is told a size for each prompt, but not for each picture."""
    mates = [
        request("one", "x", 3, **SMALL),
        request("pictures", "one", 1, num_images_per_prompt=2, **SMALL),
        request("prompts", ["a", "longer"], 2, **SMALL),  # pyright: ignore[reportArgumentType]
    ]
    driver, _ = assert_equal_to_alone(build, mates)
    assert driver.sharing("one")[-1] == 3


@pytest.mark.parametrize("build", [tiny.flux, tiny.wan])
def test_embeddings_of_one_row_for_two_pictures_are_no_rule_for_others(build):
    """Flux and Wan spread them over the rows; what is learned of such a call holds for such calls alone."""
    video = {"num_frames": 5} if build is tiny.wan else {}
    each = "num_videos_per_prompt" if video else "num_images_per_prompt"
    asked = [request(f"r{n}", "ab"[n % 2], n, max_sequence_length=16, **SMALL, **video) for n in range(3)]
    several = [request(f"s{n}", "ab"[n], n, max_sequence_length=16, **SMALL, **video, **{each: 2}) for n in range(2)]
    noise = torch.Generator().manual_seed(1)
    sizes = {"negative_prompt_embeds" if video else "pooled_prompt_embeds": (1, 16, 32) if video else (1, 32)}
    given = {
        name: torch.randn(*size, generator=noise) for name, size in {"prompt_embeds": (1, 16, 32), **sizes}.items()
    }
    odd = [request(f"o{n}", None, 9, **SMALL, **video, **given, **{each: 2}) for n in range(2)]  # pyright: ignore
    driver = Driver(Runner.from_pipeline(build(), config()))
    driver.drain(odd[:1])
    driver.drain([odd[1], *asked, *several])
    pipe = build()
    for one in (*odd, *asked, *several):
        assert distance(driver.finished[one.request_id].output, alone(pipe, one)) < 1e-4
    assert driver.sharing("r0")[-1] == len(asked) + len(several)


def test_the_requests_lists_stay_as_they_are():
    """Z-Image puts each prompt's chat form into the list that it was given."""
    prompts, case = ["a", "two boats"], CASES["ZImagePipeline"]
    driver = Driver(Runner.from_pipeline(case.build(), config()))
    driver.drain([case.request(0, prompt=prompts)])
    assert driver.finished["r0"].error is None
    assert prompts == ["a", "two boats"]


def grounded(i: int) -> Any:
    """Boxes are drawn in during the first ``i`` of four steps."""
    boxes = {"gligen_phrases": ["a boat"], "gligen_boxes": [[0.1, 0.1, 0.7, 0.8]]}
    settings = {"height": 16, "width": 16, "num_inference_steps": 4, "gligen_scheduled_sampling_beta": i / 4}
    return request(f"r{i}", PROMPTS[i % 3], i, **settings, **boxes)


def test_a_dict_that_requests_share_is_written_to_by_none_of_them():
    """GLIGEN puts its boxes into the dict that it was given: of its mates, and of who learns the batch axes."""
    common: dict[str, Any] = {"cross_attention_kwargs": {"scale": 1.0}}
    mates = [request(one.request_id, one.prompt, one.seed, **one.params, **common) for one in map(grounded, range(3))]
    driver, _ = assert_equal_to_alone(CASES["StableDiffusionGLIGENPipeline"].build, mates)
    common["cross_attention_kwargs"] = given = {"scale": 1.0}
    driver.drain([request("later", mates[0].prompt, 1, **mates[0].params | common)])
    assert driver.finished["later"].error is None
    assert given == {"scale": 1.0}


@pytest.mark.slow
def test_a_switch_deep_inside_a_module_is_its_requests_own():
    """GLIGEN turns its gated layers off in the middle of the call: those of one request, not of all."""

    driver, _ = assert_equal_to_alone(CASES["StableDiffusionGLIGENPipeline"].build, [grounded(i) for i in (1, 3, 2)])
    assert 2 in driver.sharing("r3")  # the ones that have theirs on, or off, at the same time


TEXTS: tuple[str, ...] = ("a red circle", "two boats on the river at dusk, seen from a bridge", "old house")


def tried(name: str, guidance: tuple[float, ...], prompts: tuple[Any, ...] = TEXTS) -> trial.Verdict:
    """Three requests of unlike prompts and guidance."""
    case, key = CASES[name], "true_cfg_scale" if name.startswith("Qwen") else "guidance_scale"
    mates = [case.request(i, **{"prompt": prompts[i], key: guidance[i]}) for i in range(3)]
    return trial.trial(case.build(), mates)


UNGUIDED = [("Lumina2Pipeline", 1.0), ("QwenImagePipeline", 1.0), ("ZImagePipeline", 0.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "off"), UNGUIDED)
@pytest.mark.parametrize("guided", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
def test_prompts_of_unlike_lengths_share_with_and_without_guidance(name: str, off: float, guided: Any) -> None:
    found = tried(name, tuple(3.0 + i if on else off for i, on in enumerate(guided)))
    assert found.equal, found
    assert set(found.reasons) <= {"only one"}
    # Lumina 2 and Qwen-Image make a call of its own for guidance, for which there is then only one.
    twice = len(set(guided)) == 2 and name != "ZImagePipeline"
    assert found.share >= (0.5 if twice else trial.BATCHED_SHARE), found


@pytest.mark.parametrize("name", ["Lumina2Pipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_a_list_of_prompts_shares_with_single_ones(name: str) -> None:
    found = tried(name, (3.0, 4.0, 5.0), (TEXTS[0], [TEXTS[1], TEXTS[2]], "x"))
    assert found.equal, found
    assert found.batched, found


RULED = [
    "BriaFiboPipeline", "ConsisIDPipeline", "Flux2KleinKVPipeline", "GlmImagePipeline-image", "LattePipeline",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RULED)
def test_what_only_a_rule_of_the_family_merges_shares(name: str) -> None:
    case = CASES[name]
    found = trial.trial(case.build(), [case.request(i) for i in range(3)])
    assert found.equal, found
    assert found.batched, found


def test_the_reasons_of_a_trial_are_the_denoisers() -> None:
    """Whose pipeline hooks into its text encoder, so that it encodes alone."""
    case = CASES["JoyImageEditPipeline-drawn"]
    runner = Runner.from_pipeline(case.build(), config())
    trial.Together(runner).run([case.request(i) for i in range(3)])
    hooked = "the pipeline has put a hook on a part of the module"
    assert hooked in runner.stats().alone_calls
    assert hooked not in runner.counters.denoiser_alone
    assert any(reason.startswith(SIZED) for reason in runner.counters.denoiser_alone)


@pytest.mark.parametrize(
    ("build", "given"),
    [
        (tiny.flux, {"prompt_embeds": (1, 16, 32), "pooled_prompt_embeds": (1, 32)}),
        (tiny.wan, {"prompt_embeds": (1, 16, 32), "negative_prompt_embeds": (1, 16, 32), "num_frames": 5}),
    ],
    ids=["flux", "wan"],
)
def test_embeddings_in_place_of_prompts_share(build, given):
    """Both repeat a prompt for each image of a request, but not its embeddings: those are no shared argument."""
    mates = []
    for seed in range(3):
        noise = torch.Generator().manual_seed(seed)
        own = {n: torch.randn(v, generator=noise) if isinstance(v, tuple) else v for n, v in given.items()}
        mates.append(request("abc"[seed], None, seed, **SMALL, **own))  # pyright: ignore[reportArgumentType]
    driver, _ = assert_equal_to_alone(build, mates)
    assert driver.sharing("b")[-1] == 3
