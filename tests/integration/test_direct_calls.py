"""The application calls its pipeline itself while requests run, and has it as it was once the engine is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from driving import Driver, alone, config, distance, request

from steploom.weave.modules.kept import holders
from steploom.worker.runner import Runner

SMALL = {"height": 32, "width": 32, "num_inference_steps": 1}
VIDEO = {**SMALL, "num_frames": 9}
AUTOENCODERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (tiny.wan, VIDEO),
    "qwen_image": (tiny.qwen_image, SMALL),
}


def _in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(60)
    return results[0]


def test_an_autoencoder_that_keeps_frames_on_itself_decodes_for_both_at_once() -> None:
    """Within the second chunk of a request's decode, another thread calls the pipeline from start to end."""
    pipe = tiny.wan()
    asked = {seed: request(f"r{seed}", "a cat", seed, "pt", **VIDEO) for seed in (1, 2)}
    expected = {seed: alone(pipe, one) for seed, one in asked.items()}
    here, chunks, direct = threading.current_thread(), iter(range(100)), list[Any]()

    def within(*_: Any) -> None:
        if threading.current_thread() is here and next(chunks) == 1:
            direct.append(_in_thread(lambda: alone(pipe, asked[2])))

    driver = Driver(Runner.from_pipeline(pipe, config(aside="off")))
    pipe.vae.decoder.mid_block.register_forward_hook(within)  # it knows the pipeline, which is refused at the start
    report = driver.drain([asked[1]])["r1"]
    assert report.error is None, report.error.traceback
    assert distance(report.output, expected[1]) <= 1e-4
    assert distance(direct[0], expected[2]) <= 1e-6


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_an_autoencoder_is_exactly_as_it_was(name: str) -> None:
    """Down to the very objects in its lists, also where its names begin with an underscore."""
    build, sizes = AUTOENCODERS[name]
    pipe = build()
    alone(pipe, request("direct", "a cat", 1, "pt", **sizes))
    were = [(holder, holder.copy()) for part in pipe.vae.modules() for holder in holders(part)]
    runner = Runner.from_pipeline(pipe, config())
    assert Driver(runner).drain([request("r1", "a cat", 1, "pt", **sizes)])["r1"].error is None
    runner.close()
    for holder, was in were:
        assert list(map(id, _values(holder))) == list(map(id, _values(was)))


def _values(holder: Any) -> list[Any]:
    return [*holder.keys(), *holder.values()] if isinstance(holder, dict) else list(holder)
