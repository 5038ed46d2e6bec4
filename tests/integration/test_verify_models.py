"""``steploom verify`` has a verdict for whatever loads: text, sound, video, cascades, and what needs pictures."""

from __future__ import annotations

import sys
import types

import conformance.families  # noqa: F401 - registers the cases
import pytest
import torch
from conformance.case import CASES

from steploom.cli import main
from steploom.worker.trials import candidates, trial


def verify(name: str, monkeypatch, capsys, *options: str) -> tuple[int, str]:
    """Exit code and report for a pipeline of the suite, loaded as a user's factory is."""

    def make():
        torch.manual_seed(0)
        return CASES[name].build()

    monkeypatch.setitem(sys.modules, "own_models", types.SimpleNamespace(make=make))
    code = main.main(["verify", "own_models:make", "--device", "cpu", "--steps", "2", *options])
    return code, capsys.readouterr().out


def assert_told(code: int, report: str) -> None:
    assert code == 0, report
    assert "equal to pipe(...) alone" in report
    assert "batched: 100% of the denoiser calls carried both requests" in report
    assert " s together: " in report


@pytest.mark.parametrize("name", ["LLaDA2Pipeline", "StableAudioPipeline"])
def test_text_and_sound(name: str, monkeypatch, capsys) -> None:
    assert_told(*verify(name, monkeypatch, capsys))


def test_tokens_that_are_picked_from_nan_are_not_called_equal() -> None:
    case = CASES["LLaDA2Pipeline"]
    pipeline = case.build()
    next(pipeline.model.parameters()).data.fill_(float("nan"))
    verdict = trial.trial(pipeline, [case.request(i) for i in range(2)])
    assert verdict.not_finite
    assert not verdict.equal


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "DiffusionGemmaPipeline",
        "AnimateDiffVideoToVideoPipeline",  # which asks for a video
        "KandinskyV22CombinedPipeline",
        "StableDiffusionInpaintPipeline",
        "AuraFlowPipeline",  # whose positions end at 32 pixels
        "AudioLDM2Pipeline",
        "WanPipeline",
    ],
)
def test_every_kind(name: str, monkeypatch, capsys) -> None:
    assert_told(*verify(name, monkeypatch, capsys))


@pytest.mark.slow
def test_what_asks_for_embeddings_gets_some(monkeypatch, capsys) -> None:
    """Of another shape than a row: the small latents of the cascade's stage before."""
    code, report = verify("StableCascadeDecoderPipeline", monkeypatch, capsys)
    assert code == 0, report
    assert "equal to pipe(...) alone" in report


def test_a_picture_is_not_made_a_megapixel(monkeypatch, capsys) -> None:
    code, report = verify("FluxKontextPipeline", monkeypatch, capsys)
    assert_told(code, report)
    assert "asked for: 64x64, max_area=4096, _auto_resize=False" in report


def test_a_picture_has_the_size_that_is_asked_for_where_a_pipeline_has_none_of_its_own(monkeypatch, capsys) -> None:
    code, report = verify("MarigoldDepthPipeline", monkeypatch, capsys)
    assert code == 0, report
    assert "processing_resolution=" in report


@pytest.mark.slow
def test_a_pipelines_own_strength_may_leave_no_step(monkeypatch, capsys) -> None:
    code, report = verify("StableDiffusionXLImg2ImgPipeline", monkeypatch, capsys)
    assert_told(code, report)
    assert "strength=0.8" in report


@pytest.mark.slow
def test_sizes_go_by_the_latents_of_every_vae(monkeypatch, capsys) -> None:
    code, report = verify("LTX2Pipeline", monkeypatch, capsys)
    assert_told(code, report)
    assert "asked for: 32x32" in report


def test_what_does_not_share_says_why(monkeypatch, capsys) -> None:
    code, report = verify("AceStepPipeline", monkeypatch, capsys)
    assert code == 0
    assert "not batched: 0%" in report
    assert "why not: nothing alike to share with" in report


def test_what_a_pipeline_would_draw_without_a_seed_is_given(monkeypatch, capsys) -> None:
    """Consistency models draw class labels from the global generator."""
    assert_told(*verify("ConsistencyModelPipeline", monkeypatch, capsys))


def test_a_pipeline_that_does_not_repeat_is_not_accused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(candidates, "_DRAWN", ())
    code, report = verify("ConsistencyModelPipeline", monkeypatch, capsys)
    assert code == 1
    assert "NOT equal" not in report
    assert "not comparable: the pipeline itself does not repeat with the same seed" in report


def test_a_model_that_computes_no_numbers_is_told_as_such(monkeypatch, capsys) -> None:
    build = CASES["StableDiffusionPipeline"].build

    def broken():
        pipe = build()
        pipe.unet.conv_in.weight.data.fill_(float("nan"))
        return pipe

    monkeypatch.setitem(CASES, "broken", types.SimpleNamespace(build=broken))
    code, report = verify("broken", monkeypatch, capsys)
    assert code == 1
    assert "the model itself computes NaN or infinity" in report
    assert "not repeat" not in report
