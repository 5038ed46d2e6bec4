"""``steploom verify``: what it reports, its exit code, and the two requests that it makes."""

from __future__ import annotations

import numpy as np
import pytest

from steploom import InvalidRequest
from steploom.cli import main, verify
from steploom.protocol import Parameter, PipelineInfo
from steploom.worker.models import loading
from steploom.worker.trials import candidates, trial
from steploom.worker.trials.trial import TOLERANCE, Verdict


def verdict(**changes) -> Verdict:
    values = {"distances": (1e-6, 2e-6), "share": 1.0, "reasons": {}, "alone_s": 2.0, "together_s": 1.0}
    return Verdict(**{**values, **changes})


def test_equal_and_batched() -> None:
    first, second, third = verify.report("Pipe", verdict())
    assert first.endswith(f"equal to pipe(...) alone: 2.0e-06 of the scale, {TOLERANCE:.0e} allowed")
    assert "NOT" not in first
    assert "✓" in first
    assert "batched: 100% of the denoiser calls carried both requests" in second
    assert "not batched" not in second
    assert third.endswith("1.00 s together: 2.00x")


@pytest.mark.parametrize("distances", [(1e-6, 0.5), (float("inf"), 0.0), (1.01e-4, 0.0), (float("nan"), 0.0)])
def test_too_large_distances_are_not_equal(distances: tuple[float, ...]) -> None:
    found = verdict(distances=distances)
    assert not found.equal
    first = verify.report("Pipe", found)[0]
    assert "✗" in first
    assert "NOT equal to pipe(...) alone" in first


def test_what_did_not_share_says_why() -> None:
    lines = verify.report("Pipe", verdict(share=0.25, reasons={"only one": 3, "shapes differ": 7}))
    assert any("not batched: 25% of the denoiser calls" in line for line in lines)
    assert "  why not: shapes differ (7 calls)" in lines
    assert not any("only one" in line for line in lines)


def test_a_failure_together_shows_its_error() -> None:
    found = verdict(error="RuntimeError: mixed up")
    assert not found.equal
    first, second = verify.report("Pipe", found)
    assert "✗" in first
    assert "failed together, though not alone" in first
    assert second == "RuntimeError: mixed up"


class Pipe:
    """As much of a pipeline as ``verify`` looks at."""

    def set_progress_bar_config(self, **_: object) -> None: ...

    def __call__(self, prompt, width=None, height=None, num_inference_steps=9, guidance_scale=4.0, output_type=""): ...


@pytest.fixture
def asked(monkeypatch) -> list:
    """The requests of the trial, which finds what the test puts into ``asked``'s place."""
    requests: list = []
    monkeypatch.setattr(loading, "load", lambda config, progress: Pipe())
    monkeypatch.setattr(
        loading,
        "describe",
        lambda pipe, in_process: PipelineInfo(pipeline_class="Pipe", default_size=(1024, 1024), size_multiple=8),
    )
    monkeypatch.setattr(trial, "tolerance_of", lambda pipe: TOLERANCE)
    return requests


@pytest.mark.parametrize(("distance", "code", "word"), [(1e-6, 0, "equal to"), (0.5, 1, "NOT equal to")])
def test_the_exit_code_says_whether_it_is_equal(
    asked: list, distance: float, code: int, word: str, monkeypatch, capsys
) -> None:
    def answer(pipe, requests, tolerance):
        asked.extend(requests)
        return verdict(distances=(distance, 0.0))

    monkeypatch.setattr(trial, "trial", answer)
    assert main.main(["verify", "demo", "--steps", "4", "--prompt", "mine", "--set", "guidance_scale=3"]) == code
    out = capsys.readouterr().out
    assert f"{word} pipe(...) alone" in out
    assert "asked for: 256x256, num_inference_steps=4, guidance_scale=3, output_type=latent" in out
    assert [request.prompt for request in asked] == ["mine", verify.PROMPTS[1]]
    assert [request.seed for request in asked] == [0, 1]
    assert [request.params["num_inference_steps"] for request in asked] == [4, 5]
    assert {request.params["width"] for request in asked} == {256}
    assert {request.params["guidance_scale"] for request in asked} == {3}
    assert {request.output_type for request in asked} == {"latent"}


def test_a_pipeline_that_fails_alone_is_one_line(asked: list, monkeypatch, capsys) -> None:
    def fail(self, prompt, width=None, height=None, output_type=""):
        raise KeyError("the prompt\nis odd")

    monkeypatch.setattr(Pipe, "__call__", fail)
    assert main.main(["verify", "demo"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("steploom: Pipe alone, without steploom, takes none of ")
    assert "KeyError: 'the prompt\\nis odd'" in last
    assert "--set NAME=VALUE" in last


def test_what_only_the_second_request_cannot_do_is_told_as_the_pipelines_own(asked: list, monkeypatch, capsys) -> None:
    def fail(self, prompt, width=None, height=None, num_inference_steps=9, generator=None):
        if num_inference_steps == 4:
            raise IndexError("out of range")

    monkeypatch.setattr(Pipe, "__call__", fail)
    assert main.main(["verify", "demo"]) == 1
    assert "Pipe alone, without steploom: IndexError: out of range" in capsys.readouterr().err


def asked_of(call, check=lambda request: None, told=None, size=None) -> dict:
    """The arguments of the first request that a pipeline with this ``__call__`` can do."""
    pipe = type("Pipe", (), {"__call__": call})()
    wishes = candidates.Wishes(2, size, ("a", "b"), {})
    return dict(candidates.two_requests(pipe, wishes, check, ([] if told is None else told).append)[0].params)


def test_pictures_are_given_to_those_who_need_them(asked: list) -> None:
    def call(self, prompt, image=None, mask_image=None, strength=0.8):
        if image is None or mask_image is None:
            raise ValueError("image and mask")

    assert set(asked_of(call)) == {"image", "mask_image"}


def test_sizes_lengths_and_kinds_are_found_by_asking(asked: list) -> None:
    def call(self, prompt, height=None, width=None, num_frames=81, output_type="pil"):
        if height > 64 or output_type == "latent":
            raise IndexError("too large, or unknown")

    found = asked_of(call)
    assert (found["height"], found["width"], found["num_frames"]) == (64, 64, 9)


def test_what_chooses_a_megapixel_for_a_picture_is_kept_small(asked: list) -> None:
    def call(
        self, image, prompt, height=None, width=None, max_area=1024**2, _auto_resize=True, max_sequence_length=512
    ):
        assert not _auto_resize

    found = asked_of(call)
    assert found["max_area"] == found["width"] * found["height"] == 256**2
    assert found["max_sequence_length"] == 64


def test_each_way_of_asking_is_told(asked: list) -> None:
    def call(self, prompt, height=None, width=None, eta=0.0, output_type="pil"):
        if height > 128 or output_type != "pil":
            raise IndexError("too large")

    told: list[str] = []
    asked_of(call, told=told)
    assert told[0] == "what it takes, alone: 256x256, output_type=latent"
    assert told[-1] == "what it takes, alone: 64x64"


def refusing(field: str, least: int):
    def check(request) -> None:
        if request.params.get(field, 0) < least:
            raise InvalidRequest(f"{field} is below {least}", field=field)

    return check


def test_what_the_engine_would_refuse_is_not_asked_for(asked: list) -> None:
    def call(self, prompt, width=None, height=None, num_inference_steps=9, video=None):
        assert video is not None

    assert "video" in asked_of(call, refusing("num_inference_steps", 2))
    with pytest.raises(InvalidRequest, match="width is below 64"):
        asked_of(call, refusing("width", 64), size=32)
    with pytest.raises(InvalidRequest, match="num_inference_steps is below 4"):  # the second has 3
        asked_of(call, refusing("num_inference_steps", 4))


def test_sizes_of_our_own_that_the_engine_would_refuse_are_left_out(asked: list) -> None:
    def call(self, prompt, width=None, height=None): ...

    def check(request) -> None:
        if request.params.get("width", 64) != 64:
            raise InvalidRequest("only 64", field="width")

    assert asked_of(call, check)["width"] == 64


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--set", "guidance_scal=3"), "guidance_scal: Pipe has no such argument; did you mean guidance_scale"),
        (("--size", "33"), "width=33: Pipe takes multiples of 8; the nearest is 32 or 40"),
        (("--steps", "1000"), "num_inference_steps=1001: at most 1000"),
    ],
)
def test_what_the_engine_would_refuse_is_one_line(asked: list, options, told: str, monkeypatch, capsys) -> None:
    names = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "output_type")
    info = PipelineInfo(pipeline_class="Pipe", parameters=[Parameter(name) for name in names], size_multiple=8)
    monkeypatch.setattr(loading, "describe", lambda pipe, in_process: info)
    assert main.main(["verify", "demo", *options]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"steploom: {told}")


def test_no_room_for_the_model_is_one_line(monkeypatch, capsys) -> None:
    def fail(config, progress):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(loading, "load", fail)
    assert main.main(["verify", "demo"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("model='demo': CUDA out of memory. Tried to allocate")


def test_brackets_in_an_error_are_shown_as_they_are() -> None:
    from rich.text import Text

    lines = verify.report("Pipe", verdict(error="RuntimeError: shape [/red] of [bold]"))
    assert Text.from_markup(lines[1]).plain == "RuntimeError: shape [/red] of [bold]"
    lines = verify.report("Pipe", verdict(share=0.0, reasons={"alone [red]": 3}))
    assert any("alone [red]" in Text.from_markup(line).plain for line in lines)


def test_the_most_frequent_reason_comes_first() -> None:
    found = verdict(share=0.0, reasons={"only one": 9, "shapes differ": 2, "other text": 5})
    assert found.why_not == [("other text", 5), ("shapes differ", 2)]


def test_a_model_that_never_meets_itself_says_so() -> None:
    lines = verify.report("Pipe", verdict(share=0.0, reasons={"only one": 3}))
    assert any("why not: they were not at the same network at once" in line for line in lines)


def test_batched_needs_no_reasons() -> None:
    assert not any("why not" in line for line in verify.report("Pipe", verdict(reasons={"shapes differ": 1})))


def test_unequal_says_what_to_do() -> None:
    lines = verify.report("Pipe", verdict(distances=(float("inf"), 0.0)))
    assert "another text, shape or kind of output" in lines[0]
    assert "--dtype float32" in lines[1]


def test_pictures_of_bytes_may_differ_by_one_level() -> None:
    one = np.full((2, 2, 3), 7, np.uint8)
    assert trial.distance([one + 1], [one]) == 0.0
    assert trial.distance([one + 2], [one]) > TOLERANCE
    assert trial.distance([np.array([1])], [np.array([2])]) == float("inf")


@pytest.mark.parametrize(("apart", "told"), [(0.5, "from itself by 5.0e-01 of the scale"), (float("inf"), "in kind")])
def test_what_does_not_repeat_alone_is_not_called_unequal(apart: float, told: str) -> None:
    first, second, *_ = verify.report("Pipe", verdict(distances=(0.5, 0.5), unrepeatable=apart))
    assert "NOT equal" not in first
    assert told in first
    assert "--set" in second


def test_what_computes_no_numbers_is_told_as_such() -> None:
    first, second, *_ = verify.report("Pipe", verdict(distances=(float("inf"), 0.0), not_finite=True))
    assert "the model itself computes NaN or infinity" in first
    assert "--dtype" in second


def test_a_third_prompt_is_refused(asked: list, capsys) -> None:
    assert main.main(["verify", "demo", "--prompt", "a", "--prompt", "b", "--prompt", "c"]) == 1
    assert "--prompt: given 3 times; there are two requests" in capsys.readouterr().err
    assert not asked
