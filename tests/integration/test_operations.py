"""Pause, drain and another model over real workers: some are killed meanwhile; the outputs are diffusers'."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from mortal_site import Site, asking, expected
from scripted_runner import Gate

from steploom import (
    AsyncDiffusionEngine,
    EngineError,
    EngineNotRunning,
    RequestCancelled,
    StepEvent,
    WorkerDied,
)

pytestmark = pytest.mark.usefixtures("temporary")


@contextlib.asynccontextmanager
async def paused_at(site: Site, gate: Gate, **config: Any) -> Any:
    """An engine that is paused after the third step of five requests."""
    async with site.engine(**config) as engine, asking(engine) as asked, anyio.create_task_group() as group:
        asked.ask("gated", gate=str(gate.path), at=3, num_inference_steps=8)
        for i in range(4):
            asked.ask(f"r{i}", num_inference_steps=8)
        await gate.reached()
        group.start_soon(engine.pause)
        await anyio.wait_all_tasks_blocked()
        gate.close()
        while not engine._operations._paused:
            await anyio.lowlevel.checkpoint()
        held = (await engine.collective_rpc("held"))[0]
        assert len(held) == 5
        yield engine, asked, held
        await engine.resume()


def right(asked: Any, *but: str) -> None:
    for name, outcome in asked.outcomes.items():
        assert name in but or outcome == expected(name, 8), name


async def test_who_ends_while_paused_is_forgotten_by_the_worker_and_the_others_stay_where_they_are(
    site: Site, gate: Gate
) -> None:
    async with paused_at(site, gate) as (engine, asked, held):
        assert await engine.abort("r2")
        del held["r2"]
        while await engine.collective_rpc("held") != [held]:
            pass
        asked.ask("new", num_inference_steps=8)
        await anyio.wait_all_tasks_blocked()
        assert await engine.collective_rpc("held") == [held]
    right(asked, "r2")
    assert len(asked.outcomes) == 6
    assert isinstance(asked.outcomes["r2"], RequestCancelled)


async def test_a_worker_that_is_killed_while_paused_is_replaced_and_nobody_is_lost(site: Site, gate: Gate) -> None:
    async with paused_at(site, gate) as (engine, asked, _):
        site.kill()
        await site.witness.done.wait()
        await engine.check_health()
        assert engine.paused
        assert await engine.collective_rpc("held") == [{}], "nothing is replayed before it goes on"
        assert engine.num_waiting == 5
    right(asked)
    assert len(asked.outcomes) == 5
    assert len(site.loads) == 2


async def test_a_worker_that_is_killed_while_it_is_to_pause_is_no_reason_to_wait(site: Site, gate: Gate) -> None:
    async with site.engine() as engine, asking(engine) as asked:
        asked.ask("gated", gate=str(gate.path), at=3, num_inference_steps=8)
        await gate.reached()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.pause)
            await anyio.wait_all_tasks_blocked()
            site.kill()
        assert engine.paused
        gate.close()
        await engine.resume()
    right(asked)


async def test_a_drain_outlasts_the_death_of_the_worker(site: Site, gate: Gate) -> None:
    async with site.engine() as engine, asking(engine) as asked:
        for i in range(4):
            asked.ask(f"r{i}", num_inference_steps=8)
        asked.ask("gated", gate=str(gate.path), at=3, num_inference_steps=8)
        await gate.reached()
        ended: list[int] = []

        async def drain() -> None:
            ended.append(await engine.drain(60.0))

        async with anyio.create_task_group() as group:
            group.start_soon(drain)
            await anyio.wait_all_tasks_blocked()
            site.kill()
            gate.close()
        assert ended == [0]
        with pytest.raises(EngineNotRunning, match="drains"):
            await engine.generate("new")
    right(asked)
    assert len(asked.outcomes) == 5


async def test_what_a_drain_has_ended_its_worker_forgets(site: Site, gate: Gate) -> None:
    async with site.engine() as engine, asking(engine) as asked:
        asked.ask("gated", gate=str(gate.path), at=3, num_inference_steps=8)
        await gate.reached()
        assert await engine.drain(0.01) == 1
        gate.close()
        while await engine.collective_rpc("held") != [{}]:
            pass
    assert isinstance(asked.outcomes["gated"], RequestCancelled)


@contextlib.asynccontextmanager
async def one_each(site: Site, gate: Gate) -> Any:
    """An engine with a request that runs and one that waits."""
    async with site.engine(max_batch=1, max_resident=1) as engine, asking(engine) as asked:
        asked.ask("runs", gate=str(gate.path), at=3, num_inference_steps=8)
        await gate.reached()
        asked.ask("waits", num_inference_steps=8)
        await anyio.wait_all_tasks_blocked()
        yield engine, asked
    assert len(asked.outcomes) == 2
    right(asked)


@pytest.mark.parametrize("plan", ["fail", "die"])
async def test_a_model_that_cannot_be_loaded_changes_nothing(site: Site, gate: Gate, plan: str) -> None:
    broken = site.folder / "broken"
    broken.write_text(plan)
    async with one_each(site, gate) as (engine, _):
        kind, words = (EngineError, "no such weights") if plan == "fail" else (WorkerDied, "exit code -9")
        with pytest.raises(kind, match=words) as caught:
            await engine.reload(model=str(broken))
        assert type(caught.value) is kind, "EngineDead would say that this engine is"
        assert engine.config.model == str(site.model)
        gate.close()
        assert len(site.workers()) == 1


async def test_a_load_that_takes_too_long_changes_nothing(site: Site, gate: Gate, tmp_path: Path) -> None:
    slow, stuck = site.folder / "slow", Gate(tmp_path / "stuck")
    slow.write_text(f"gate {stuck.path}")
    async with one_each(site, gate) as (engine, _):
        with pytest.raises(EngineError, match="was not loaded in time") as caught:
            await engine.reload(model=str(slow), start_timeout_s=1.5)
        assert type(caught.value) is EngineError
        stuck.close()
        gate.close()


async def test_a_worker_of_the_old_model_that_is_killed_is_replaced_as_long_as_it_is_needed(
    site: Site, gate: Gate
) -> None:
    other = site.folder / "other"
    other.write_text("other")
    async with one_each(site, gate) as (engine, asked), anyio.create_task_group() as group:
        group.start_soon(lambda: engine.reload(model=str(other)))
        while "waits" not in asked.outcomes:
            await anyio.lowlevel.checkpoint()
        assert engine.info.pipeline_class == "Other"
        site.kill()
        gate.close()
        await site.witness.done.wait()
    assert len(site.loads) == 2


async def test_closed_while_two_models_are_there_nothing_is_left(site: Site, gate: Gate) -> None:
    other = site.folder / "other"
    other.write_text("other")
    async with site.engine(max_batch=1, max_resident=1) as engine, asking(engine) as asked:
        asked.ask("runs", gate=str(gate.path), at=3, num_inference_steps=8)
        await gate.reached()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: engine.reload(model=str(other)))
                while engine.info.pipeline_class != "Other":
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
        assert len(site.workers()) == 2
        await engine.generate("served meanwhile", seed=1)
        gate.close()
        await engine.close()
    assert isinstance(asked.outcomes["runs"], RequestCancelled)


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one kind with other weights, in all of their parts."""
    import tiny
    import torch

    other, pipe = tmp_path_factory.mktemp("other-sd3"), tiny.sd3()
    with torch.no_grad():
        for part in pipe.components.values():
            for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
                weight += 0.1 * weight.flip(0)
    pipe.save_pretrained(other)
    return tiny_model, other


PARAMS: dict[str, Any] = {"seed": 3, "num_inference_steps": 6, "output_type": "latent"}


def alone(model: Path, prompt: str) -> np.ndarray:
    """What stock diffusers says."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    return pipe(prompt, generator=generator, num_inference_steps=6, output_type="latent").images.numpy()


async def loaded_while_paused(engine: Any, model: Path, victim: int | None) -> None:
    """Begins to reload, pauses until the other model is there, so that those that wait are still waiting then.

    A ``victim`` of the old model is killed meanwhile: another one may be loaded by then, or not.
    """
    await engine.resume()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: engine.reload(model=str(model)))
        await anyio.lowlevel.checkpoint()
        await engine.pause()
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        while engine.config.model != str(model):
            await anyio.lowlevel.checkpoint()
        await engine.resume()


@pytest.mark.parametrize(
    ("backend", "killed"),
    [
        pytest.param("mp", False, marks=pytest.mark.slow),
        pytest.param("mp", True, marks=pytest.mark.slow),
        ("inproc", False),
    ],
)
async def test_outputs_are_those_of_the_model_that_made_them_whoever_pauses_or_dies(
    models: tuple[Path, Path], backend: str, killed: bool
) -> None:
    first, second = models
    config: dict[str, Any] = {"distributed_executor_backend": backend, "max_batch": 2, "max_resident": 2}
    if killed:
        config["worker_extension"] = "worker_pid.Pid"
    outs: dict[str, np.ndarray] = {}
    async with AsyncDiffusionEngine(model=str(first), torch_threads=1, costs_file=None, **config) as engine:

        async def one(name: str, prompt: str) -> None:
            out = (await engine.generate(prompt, request_id=name, **PARAMS)).output.images
            outs[name] = np.asarray(out)

        async with anyio.create_task_group() as group, engine.stream("a cat", request_id="runs", **PARAMS) as run:
            group.start_soon(one, "runs too", "a dog")
            while not isinstance(await anext(run), StepEvent):
                pass
            await engine.pause()
            group.start_soon(one, "waits", "a cat")
            group.start_soon(one, "waits too", "a dog")
            await anyio.wait_all_tasks_blocked()
            assert (engine.num_running, engine.num_waiting) == (2, 2)
            victim = await engine.collective_rpc("pid", unique_reply_rank=0) if killed else None
            group.start_soon(loaded_while_paused, engine, second, victim)
            outs["runs"] = np.asarray((await run.result()).output.images)
        outs["new"] = np.asarray((await engine.generate("a cat", **PARAMS)).output.images)
        assert engine.config.model == str(second)
    cat, dog, other = alone(first, "a cat"), alone(first, "a dog"), alone(second, "a cat")
    assert np.abs(cat - other).max() > 20 * 1e-4, "the weights matter"
    assert np.abs(outs["runs"] - cat).max() < 1e-4
    assert np.abs(outs["runs too"] - dog).max() < 1e-4
    assert np.abs(outs["new"] - other).max() < 1e-4
    assert np.abs(outs["waits"] - other).max() < 1e-4
    assert np.abs(outs["waits too"] - alone(second, "a dog")).max() < 1e-4
