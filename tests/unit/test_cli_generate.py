"""``steploom generate`` against an engine that is scripted: which requests it makes, what it writes, what it says."""

from __future__ import annotations

import pathlib
import types
from typing import Any

import pytest
from PIL import Image

import steploom
from steploom.cli import main
from steploom.errors import EngineDead, GenerationFailed, InvalidRequest
from steploom.media import images
from steploom.requests import Commit, DiffusionOutput, Draft, Queued, Restarted, StepEvent, Timings

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


class ScriptedStream:
    """Three steps, then an image; seeds in ``failing`` fail instead."""

    def __init__(self, engine: ScriptedEngine, seed: int, preview_every: int) -> None:
        self._engine, self._seed, self._previews = engine, seed, preview_every

    async def __aenter__(self) -> ScriptedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def __aiter__(self):
        yield Queued(request_id="r")
        for step in (1, 2, 3):
            preview = BLUE if self._previews else None
            yield StepEvent(request_id="r", step=step, total_steps=3, sigma=1 - step / 3, preview=preview)

    async def result(self) -> DiffusionOutput:
        if self._seed in self._engine.failing:
            raise self._engine.failing[self._seed]
        timings = Timings(total_s=0.5, steps=3, mean_batch_requests=2.0)
        return DiffusionOutput(request_id="r", seed=self._seed, output=self._engine.output, timings=timings)


class ScriptedEngine:
    failing: dict[int, Exception] = {}  # noqa: RUF012 - one script per test, set by it
    output: Any = types.SimpleNamespace(images=[RED])
    asked: list[tuple[str, int, dict[str, Any]]]
    closed = False

    def __init__(self, config: steploom.EngineConfig) -> None:
        self.config = config
        type(self).asked = []

    async def start(self, on_progress) -> None:
        on_progress("loading the script")

    async def close(self) -> None:
        type(self).closed = True

    def stream(self, prompt: str, *, seed: int, preview_every: int, **parameters: Any) -> ScriptedStream:
        self.asked.append((prompt, seed, parameters))
        return ScriptedStream(self, seed, preview_every)


@pytest.fixture
def engine(monkeypatch, tmp_path: pathlib.Path) -> type[ScriptedEngine]:
    monkeypatch.chdir(tmp_path)
    kind = type("Engine", (ScriptedEngine,), {})
    monkeypatch.setattr(steploom, "AsyncDiffusionEngine", kind, raising=False)
    return kind


def test_options_become_the_pipelines_own_arguments(engine: type[ScriptedEngine]) -> None:
    argv = ["--steps", "9", "--guidance", "2.5", "--negative-prompt", "mud", "--width", "32", "--height", "48"]
    assert main.main(["generate", "a cat", "--seed", "5", *argv, "--set", "max_sequence_length=16"]) == 0
    named = {"num_inference_steps": 9, "guidance_scale": 2.5, "negative_prompt": "mud", "width": 32, "height": 48}
    assert engine.asked == [("a cat", 5, {**named, "max_sequence_length": 16})]


def test_other_tasks_take_their_images_from_files(engine: type[ScriptedEngine], capsys) -> None:
    for name in ("in.png", "mask.png", "edges.png"):
        RED.save(name)
    argv = ["--task", "inpainting", "--image", "in.png", "--mask-image", "mask.png", "--control-image", "edges.png"]
    assert main.main(["generate", "a cat", "--seed", "5", *argv, "--strength", "0.6"]) == 0
    files = {"image": "in.png", "mask_image": "mask.png", "control_image": "edges.png"}
    expected = {"task": "inpainting", "strength": 0.6, **{name: pathlib.Path(file) for name, file in files.items()}}
    assert engine.asked == [("a cat", 5, expected)]
    assert main.main(["generate", "a cat", "--image", "missing.png"]) == 1
    assert "--image missing.png: there is no such file" in capsys.readouterr().err


def test_adapters_are_given_with_their_scales(engine: type[ScriptedEngine], tmp_path: pathlib.Path, capsys) -> None:
    (tmp_path / "a=b").mkdir()
    argv = ["--lora", "someone/ink", "--lora", "./a=b", "--lora", "./a=b=-0.5"]
    assert main.main(["generate", "a cat", *argv[:4]]) == 0
    assert engine.asked[-1][2] == {"lora": [("someone/ink", 1.0), ("./a=b", 1.0)]}
    assert main.main(["generate", "a cat", *argv[4:]]) == 0
    assert engine.asked[-1][2] == {"lora": [("./a=b", -0.5)]}
    assert main.main(["generate", "a cat", *argv]) == 1
    assert "'./a=b' is listed twice" in capsys.readouterr().err
    assert main.main(["generate", "a cat", "--lora", "./gone"]) == 1
    assert "lora='./gone': neither a name" in capsys.readouterr().err
    assert engine.asked[-1][2] == {"lora": [("./a=b", -0.5)]}, "what is refused asks for nothing"


def test_what_is_not_given_is_left_to_the_pipeline(engine: type[ScriptedEngine]) -> None:
    assert main.main(["generate", "a cat"]) == 0
    ((_, _, parameters),) = engine.asked
    assert parameters == {}


def test_one_image_goes_where_it_should_and_a_line_says_so(engine: type[ScriptedEngine], capsys) -> None:
    assert main.main(["generate", "a cat", "-o", "cat.png", "--seed", "5"]) == 0
    with Image.open("cat.png") as image:
        assert image.size == (8, 8)
    assert engine.closed
    assert capsys.readouterr().out == "cat.png  8x8, seed 5, 3 steps in 0.50 s, 2.0 requests a forward\n"


def test_several_images_count_seeds_up_and_are_numbered(engine: type[ScriptedEngine]) -> None:
    assert main.main(["generate", "a cat", "-o", "cat.png", "-n", "3", "--seed", "5"]) == 0
    assert sorted(seed for _, seed, _ in engine.asked) == [5, 6, 7]
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["cat-1.png", "cat-2.png", "cat-3.png"]


def test_save_steps_leaves_a_sheet_of_all_steps_and_the_result(engine: type[ScriptedEngine], capsys) -> None:
    assert main.main(["generate", "a cat", "-o", "cat.png", "--save-steps"]) == 0
    with Image.open("cat-steps.png") as sheet:
        counts = {color: count for count, color in sheet.getcolors(maxcolors=1 << 20)}
    assert counts[(0, 0, 255)] == 3 * counts[(255, 0, 0)] > 0
    assert "cat-steps.png  3 steps" in capsys.readouterr().out


def test_a_prompt_of_several_lines_is_one_on_the_sheet(engine: type[ScriptedEngine], capsys) -> None:
    assert main.main(["generate", "a red\ncircle", "-o", "broken.png", "--save-steps"]) == 0
    assert main.main(["generate", "a red circle", "-o", "whole.png", "--save-steps", "--seed", "1"]) == 0
    assert capsys.readouterr().err == ""
    first, second = (Image.open(f"{name}-steps.png").crop((0, 0, 400, 60)) for name in ("broken", "whole"))
    assert first.tobytes() == second.tobytes()


def test_a_failed_request_does_not_cost_the_others_their_images(engine: type[ScriptedEngine], capsys) -> None:
    engine.failing = {6: GenerationFailed("the pipeline raised")}
    assert main.main(["generate", "a cat", "-o", "cat.png", "-n", "3", "--seed", "5"]) == 1
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["cat-1.png", "cat-3.png"]
    assert capsys.readouterr().err == "steploom: the pipeline raised\n"


def test_a_file_that_cannot_be_written_is_named_and_does_not_cost_the_others(
    engine: type[ScriptedEngine], monkeypatch, capsys
) -> None:
    save = images._save

    def filling_up(image: Any, path: pathlib.Path, **options: Any) -> None:
        if path.name == "cat-1.png":
            raise OSError(28, "No space left on device", str(path))
        save(image, path, **options)

    monkeypatch.setattr(images, "_save", filling_up)
    assert main.main(["generate", "a cat", "-o", "cat.png", "-n", "2"]) == 1
    assert [path.name for path in pathlib.Path().iterdir()] == ["cat-2.png"]
    assert capsys.readouterr().err == "steploom: [Errno 28] No space left on device: 'cat-1.png'\n"


@pytest.mark.parametrize("error", [InvalidRequest("steps=0: too few"), EngineDead("steps=0: too few")])
def test_several_failures_are_one_line(engine: type[ScriptedEngine], error: Exception, capsys) -> None:
    engine.failing = {5: error, 6: error}
    assert main.main(["generate", "a cat", "-n", "2", "--seed", "5"]) == 1
    assert capsys.readouterr().err == "steploom: steps=0: too few\n"


def test_frames_become_an_animation(engine: type[ScriptedEngine], capsys) -> None:
    engine.output = types.SimpleNamespace(frames=[[RED, BLUE, RED]])
    assert main.main(["generate", "a cat", "-o", "cat.gif"]) == 0
    with Image.open("cat.gif") as animation:
        assert animation.n_frames == 3
    assert main.main(["generate", "a cat", "-o", "cat.png"]) == 1
    assert "3 frames; use .mp4, .webm, .gif or .webp (this time they were kept as cat.webp)" in capsys.readouterr().err
    with Image.open("cat.webp") as animation:
        assert animation.n_frames == 3


def test_several_videos_are_several_files(engine: type[ScriptedEngine]) -> None:
    engine.output = types.SimpleNamespace(frames=[[RED, BLUE], [BLUE, RED]])
    assert main.main(["generate", "a cat", "-o", "cat.gif"]) == 0
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["cat-1.gif", "cat-2.gif"]


def test_a_video_of_one_frame_is_an_image(engine: type[ScriptedEngine]) -> None:
    engine.output = types.SimpleNamespace(frames=[[RED]])
    assert main.main(["generate", "a cat", "-o", "cat.png"]) == 0
    with Image.open("cat.png") as image:
        assert image.size == (8, 8)


def test_all_images_of_a_request_are_saved_and_numbered(engine: type[ScriptedEngine], capsys) -> None:
    engine.output = types.SimpleNamespace(images=[RED, BLUE, RED, BLUE])
    argv = ["generate", "a cat", "-o", "cat.png", "--seed", "5", "--set", "num_images_per_prompt=4"]
    assert main.main(argv) == 0
    names = [f"cat-{place}.png" for place in (1, 2, 3, 4)]
    assert sorted(path.name for path in pathlib.Path().iterdir()) == names
    colors = []
    for name in names:
        with Image.open(name) as image:
            colors.append(image.getpixel((0, 0)))
    assert colors == [(255, 0, 0), (0, 0, 255)] * 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == names
    assert "seed 5, image 2 of 4, 3 steps" in lines[1]
    assert main.main([*argv, "-n", "2"]) == 0
    assert pathlib.Path("cat-2-4.png").is_file()


def test_what_holds_no_transparency_gets_none(engine: type[ScriptedEngine]) -> None:
    engine.output = types.SimpleNamespace(images=[RED.convert("RGBA")])
    assert main.main(["generate", "a cat", "-o", "cat.jpg"]) == 0
    with Image.open("cat.jpg") as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (types.SimpleNamespace(audios=[1]), "made no images"),
        (types.SimpleNamespace(images=[]), "made no image"),
        (types.SimpleNamespace(frames=[[]]), "made no frames"),
        (types.SimpleNamespace(images=[b"raw"]), "made bytes where an image was expected"),
    ],
)
def test_what_is_no_image_is_one_line(engine: type[ScriptedEngine], output: Any, words: str, capsys) -> None:
    engine.output = output
    assert main.main(["generate", "a cat", "-o", "cat.png"]) == 1
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1


def test_as_many_images_as_asked_for_may_wait(engine: type[ScriptedEngine], monkeypatch) -> None:
    monkeypatch.setenv("STEPLOOM_MAX_WAITING", "2")
    limits = []
    monkeypatch.setattr(engine, "close", lambda self: limits.append(self.config.max_waiting) or _nothing())
    assert main.main(["generate", "a cat", "-o", "cat.png", "-n", "3"]) == 0
    assert limits == [3]


async def _nothing() -> None:
    pass


def test_a_name_that_the_terminal_cannot_show_is_no_traceback(engine: type[ScriptedEngine], capfdbinary) -> None:
    assert main.main(["generate", "a cat", "-o", "cat\udcff.png"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"cat?.png  8x8")


def speaking(
    monkeypatch: pytest.MonkeyPatch, engine: type[ScriptedEngine], *, terminal: bool, lost: bool = False
) -> None:
    """The engine is a language model's; standard output is a terminal or not."""
    import sys

    async def events(_: object):
        yield Commit(request_id="r", text="It is ", tokens=[1])
        if lost:
            yield Restarted(request_id="r", attempt=1)
            yield Commit(request_id="r", text="It is ", tokens=[1])
        yield Draft(request_id="r", text="green", tokens=[2])
        yield Commit(request_id="r", text="blue", tokens=[2])

    monkeypatch.setattr(ScriptedStream, "__aiter__", events)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    engine.output = types.SimpleNamespace(texts=["It is blue."])
    engine.info = types.SimpleNamespace(makes=["text"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_text_grows_on_a_terminal_and_comes_at_once_in_a_pipe(
    engine: type[ScriptedEngine], monkeypatch: pytest.MonkeyPatch, capsys: Any, terminal: bool
) -> None:
    speaking(monkeypatch, engine, terminal=terminal)
    written: list[str] = []
    import sys

    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text) or write(text))
    assert main.main(["generate", "why is the sky blue?", "--model", "m"]) == 0
    assert written == (["It is ", "blue", ".\n"] if terminal else ["It is blue.\n"])
    assert capsys.readouterr().out == "It is blue.\n"


def test_text_that_is_replayed_starts_on_a_line_of_its_own(
    engine: type[ScriptedEngine], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    speaking(monkeypatch, engine, terminal=True, lost=True)
    assert main.main(["generate", "why is the sky blue?", "--model", "m"]) == 0
    assert capsys.readouterr().out == "It is \nIt is blue.\n"


def test_several_texts_do_not_mix(engine: type[ScriptedEngine], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    speaking(monkeypatch, engine, terminal=True)
    assert main.main(["generate", "why?", "--model", "m", "-n", "2"]) == 0
    assert capsys.readouterr().out == "It is blue.\n" * 2


def test_text_goes_into_a_file_of_text(
    engine: type[ScriptedEngine], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    speaking(monkeypatch, engine, terminal=True)
    assert main.main(["generate", "why?", "--model", "m", "-o", "answer.txt"]) == 0
    assert pathlib.Path("answer.txt").read_text(encoding="utf-8") == "It is blue.\n"
    assert capsys.readouterr().out.startswith("answer.txt")
