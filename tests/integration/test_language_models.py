"""Diffusion language models: the same tokens as alone, whoever shares the forward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_language
import torch
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler, LLaDA2Pipeline
from driving import Driver

from steploom.config import EngineConfig
from steploom.requests import DiffusionRequest
from steploom.worker.runner import Runner
from steploom.worker.trials.trial import run_alone

PROMPTS = ("a red circle", "two boats by the sea at dusk, seen from afar", "old house", "x")


def llada_requests(**common: Any) -> list[DiffusionRequest]:
    """Different in everything that a user may vary; two of them are greedy."""
    varied = [
        {"gen_length": 24, "block_length": 8, "num_inference_steps": 5, "temperature": 1.0, "threshold": 0.3},
        {"gen_length": 12, "block_length": 4, "num_inference_steps": 4, "temperature": 0.0},
        {"gen_length": 19, "block_length": 8, "num_inference_steps": 3, "temperature": 1.0, "top_k": 30},
        {"gen_length": 16, "block_length": 16, "num_inference_steps": 9, "temperature": 0.0, "editing_threshold": None},
    ]
    return [
        DiffusionRequest(prompt, seed=7 + i, request_id=f"r{i}", **varied[i], **common)
        for i, prompt in enumerate(PROMPTS)
    ]


def gemma_requests(**common: Any) -> list[DiffusionRequest]:
    varied = [
        {"gen_length": 16, "num_inference_steps": 4, "temperature": 1.0},
        {"gen_length": 24, "num_inference_steps": 3, "temperature": 0.0},
        {"gen_length": 8, "num_inference_steps": 6, "temperature": 1.0},
        {"gen_length": 13, "num_inference_steps": 5, "temperature": 0.0, "confidence_threshold": None},
    ]
    return [
        DiffusionRequest(prompt, seed=7 + i, request_id=f"r{i}", **varied[i], **common)
        for i, prompt in enumerate(PROMPTS)
    ]


def gemma_eager() -> Any:
    pipe = tiny_language.gemma(DiscreteDDIMScheduler())
    pipe.model.set_attn_implementation("eager")
    return pipe


class Spy:
    """How many rows each forward of the real module had."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows.append((args[0] if args else kwargs["decoder_input_ids"]).shape[0])


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def together(pipe: Any, requests: list[DiffusionRequest]) -> tuple[dict[str, Any], float]:
    """The outputs by id, and which share of the forwards made while all ran carried all. The second time counts."""
    driver = Driver(Runner.from_pipeline(pipe, EngineConfig()))
    driver.drain(requests)
    spy = Spy(pipe.model)
    driver.tick(requests)
    while len(driver.running) == len(requests):
        seen = len(spy.rows)
        driver.tick()
    carried = spy.rows[:seen]
    driver.drain()
    assert all(report.error is None for report in driver.finished.values())
    rows = sum(len(request.prompt) if isinstance(request.prompt, list) else 1 for request in requests)
    return {name: report.output for name, report in driver.finished.items()}, carried.count(rows) / len(carried)


@pytest.mark.parametrize(
    ("build", "ask"),
    [
        (tiny_language.llada, llada_requests),
        (tiny_language.gemma, gemma_requests),
        (lambda: tiny_language.gemma(EntropyBoundScheduler()), gemma_requests),
        (gemma_eager, gemma_requests),
    ],
    ids=["llada", "gemma", "gemma-entropy", "gemma-eager"],
)
def test_tokens_are_those_of_the_pipeline_alone(build: Callable[[], Any], ask: Callable[..., Any]) -> None:
    pipe = quiet(build())
    requests = ask()
    alone = [run_alone(pipe, request) for request in requests]
    others = [run_alone(pipe, DiffusionRequest(r.prompt, seed=99, **r.params)) for r in requests]
    sampled = [i for i, r in enumerate(requests) if r.params["temperature"]]
    assert all(not torch.equal(alone[i].sequences, others[i].sequences) for i in sampled), "the seed must matter"
    assert len({out.texts[0] for out in alone}) == len(alone)
    outputs, share = together(pipe, requests)
    for request, expected in zip(requests, alone, strict=True):
        output = outputs[request.request_id]
        assert torch.equal(output.sequences, expected.sequences)
        assert output.texts == expected.texts
    assert share >= 0.8


def test_rows_of_one_request_share_with_others() -> None:
    """Two prompts of different lengths in one request: its own padding, hidden by its own mask."""
    pipe = quiet(tiny_language.llada())
    plain = {"use_chat_template": False, "gen_length": 16, "block_length": 8, "num_inference_steps": 4}
    requests = [
        DiffusionRequest(["a red circle", "x"], seed=1, request_id="two", temperature=1.0, **plain),
        DiffusionRequest("old house", seed=2, request_id="one", temperature=1.0, **plain),
    ]
    alone = [run_alone(pipe, request) for request in requests]
    outputs, share = together(pipe, requests)
    for request, expected in zip(requests, alone, strict=True):
        assert torch.equal(outputs[request.request_id].sequences, expected.sequences)
    assert share >= 0.8


@pytest.mark.parametrize(("given", "shares"), [({}, True), ({"cache_implementation": "static"}, False)])
def test_corrector_sweeps_share_and_static_caches_do_not(given: dict[str, Any], shares: bool) -> None:
    """A sweep is a further call in the same step; a cache of fixed size keeps its place for the canvas elsewhere."""
    pipe = quiet(tiny_language.gemma(DiscreteDDIMScheduler(corrector_steps=1)))
    requests = [
        DiffusionRequest(prompt, seed=i, request_id=f"r{i}", gen_length=8, num_inference_steps=4 + i, **given)
        for i, prompt in enumerate(PROMPTS[:2])
    ]
    alone = [run_alone(pipe, request) for request in requests]
    outputs, share = together(pipe, requests)
    for request, expected in zip(requests, alone, strict=True):
        assert torch.equal(outputs[request.request_id].sequences, expected.sequences)
    assert (share >= 0.8) is shares


def test_padded_prompts_keep_their_masks() -> None:
    """DiffusionGemma's processor pads the prompts of one request: its masks meet requests that have none."""
    pipe = quiet(tiny_language.gemma())
    steps = {"gen_length": 16, "num_inference_steps": 4}
    requests = [
        DiffusionRequest("a red circle", seed=1, request_id="one", **steps),
        DiffusionRequest(["old house", "two boats at sea"], seed=2, request_id="two", **steps),
    ]
    template = pipe.processor.apply_chat_template
    pipe.processor.padding_side = "left"
    pipe.processor.apply_chat_template = lambda *a, **k: template(*a, **k, padding=True)
    alone = [run_alone(pipe, request) for request in requests]
    outputs, share = together(pipe, requests)
    for request, expected in zip(requests, alone, strict=True):
        assert torch.equal(outputs[request.request_id].sequences, expected.sequences)
    assert share >= 0.8


class Unmasked(torch.nn.Module):
    """A bidirectional model that ignores its mask, whose result is a plain object: padding would leak."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(260, 260)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        hidden = self.table(input_ids)
        mean = hidden.mean(1, keepdim=True) if self.leaks else (hidden * attention_mask[..., None]).sum(1, keepdim=True)
        return SimpleNamespace(logits=hidden + 3 * mean, past_key_values=object())

    leaks = True


@pytest.mark.parametrize("leaks", [True, False])
def test_a_model_that_ignores_its_mask_is_not_padded(leaks: bool) -> None:
    base = tiny_language.llada()
    torch.manual_seed(0)
    model = Unmasked()
    model.leaks = leaks
    pipe = quiet(LLaDA2Pipeline(model, base.scheduler, base.tokenizer))
    requests = llada_requests()
    alone = [run_alone(pipe, request) for request in requests]
    outputs, share = together(pipe, requests)
    for request, expected in zip(requests, alone, strict=True):
        assert torch.equal(outputs[request.request_id].sequences, expected.sequences)
    assert (share >= 0.8) is not leaks
