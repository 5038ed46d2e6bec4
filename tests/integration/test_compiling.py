"""Compiled denoisers under the engine give what ``pipe(...)`` alone gives uncompiled, and compile a bounded number."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import shallow
import torch
from driving import LATENT_TOLERANCE, Driver, alone, assert_cares, distance, request

from steploom import AsyncDiffusionEngine, ConfigError, EngineConfig
from steploom.weave.modules.compiled import is_compiled
from steploom.worker import runner as runners
from steploom.worker.models import compiling
from steploom.worker.runner import Runner

OTHERS = ("sd3", "flux", "qwen_image", "wan")
PIXELS = 48 * 48
EAGER = {"backend": "eager"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled code of an earlier run, and none left in the user's folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    torch._dynamo.reset()


def load(model: str, compiler: Any, **settings: Any) -> tuple[Runner, list[str]]:
    lines: list[str] = []
    config = EngineConfig(model=model, device="cpu", compile=compiler, max_pixels=PIXELS, **settings)
    return Runner.load(config, lines.append), lines


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Runner.load(EngineConfig(**{"device": "cpu", **settings}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "compiler", "words"),
    [
        ("flux", {"backend": "eager"}, "compiling FluxTransformerBlock and FluxSingleTransformerBlock at"),
        ("flux", {"backend": "eager", "regional": False}, "compiling FluxTransformer2DModel as a whole at"),
        ("sd3", {"backend": "eager"}, "compiling SD3Transformer2DModel as a whole at"),
    ],
)
def test_blocks_are_compiled_where_a_model_names_some(
    model: str, compiler: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr(runners, "warm_up", lambda *about: warmed.append(about))
    runner, lines = load(f"shallow:{model}", compiler)
    transformer = runner.pipeline.transformer
    assert is_compiled(transformer)
    assert (transformer._compiled_call_impl is None) == ("as a whole" not in words)
    assert [line for line in lines if f"transformer: {words} the first calls" in line]
    assert len(warmed) == 1


def mixed(name: str, count: int, round_: str) -> list[Any]:
    """Requests of unlike steps, guidance, text and size."""
    small: dict[str, Any] = {"height": 32, "width": 32}
    if name == "wan":
        small["num_frames"] = 5
    guidance = "true_cfg_scale" if name == "qwen_image" else "guidance_scale"
    negative = {"negative_prompt": "blue"} if name == "qwen_image" else {}
    return [
        request(f"{round_}-{i}", "a red cat" + ", and dogs" * (i % 3), i, num_inference_steps=2 + i % 3,
                **{guidance: (1.0, 4.0, 2.5)[i % 3]}, **(negative if i % 3 else {}), **small)
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("sdxl", EAGER),
        *[pytest.param(name, EAGER, marks=pytest.mark.thorough) for name in OTHERS],
        pytest.param("flux", True, marks=pytest.mark.thorough, id="flux-inductor"),
    ],
)
def test_outputs_are_equal_and_compilations_bounded_while_rows_change(name: str, compiler: Any) -> None:
    runner, lines = load(f"shallow:{name}", compiler)
    warmed = runner.stats()
    assert warmed.compilations > 0
    assert (warmed.ticks, warmed.alone_calls) == (0, {})
    assert sum("compiling transformer, " in line or "compiling unet, " in line for line in lines) >= 1
    pipe = getattr(shallow, name)()
    requests = mixed(name, 7, "first")
    expected = {one.request_id: alone(pipe, one) for one in requests}
    assert_cares({one.request_id: expected[one.request_id] for one in requests[:3]}, LATENT_TOLERANCE)
    driver = Driver(runner)
    finished = driver.drain(requests, joining=2)  # rows change from tick to tick
    for one in requests:
        report = finished[one.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[one.request_id]) <= LATENT_TOLERANCE
    before = runner.stats().compilations
    for count in (1, 3, 6, 11, 16):
        driver.drain(mixed(name, count, f"round-{count}"))
    stats = runner.stats()
    assert stats.compilations <= before + 2
    assert stats.compilations <= 16
    assert stats.uncompiled is None


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
async def test_the_first_request_waits_for_no_compilation_and_metrics_count_them() -> None:
    config = EngineConfig(model="shallow:flux", device="cpu", compile={"backend": "aot_eager"}, max_pixels=PIXELS,
                          distributed_executor_backend="inproc", tick_timeout_s=120)  # fmt: skip
    lines: list[str] = []
    engine = AsyncDiffusionEngine(config)
    await engine.start(lines.append)
    try:
        (before,) = await engine.collective_rpc("stats")
        outputs = await asyncio.gather(
            *(engine.generate("a cat", seed=i, num_inference_steps=2, height=32, width=32) for i in range(2))
        )
        (after,) = await engine.collective_rpc("stats")
    finally:
        await engine.close()
    assert len(outputs) == 2
    assert before.compilations > 0
    assert after.compilations == before.compilations
    assert any(line.startswith("warmed up in ") for line in lines)


def test_what_cannot_be_compiled_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no such argument; give mode, backend" in _config_refusal(compile={"mod": "default"})
    assert "compile['fullgraph']=1: must be True or False" in _config_refusal(compile={"fullgraph": 1})
    assert "torch has no backend 'nonsense'; give one of" in refusal(compile={"backend": "nonsense"})
    assert "torch has no mode 'fast'; give one of default, " in refusal(compile={"mode": "fast"})
    assert "cuda_graphs=True" in refusal(compile={"options": {"triton.cudagraphs": True}})
    monkeypatch.setattr(compiling, "_lacking", lambda device: "no compiler here; install g++")
    message = refusal(compile=True)
    assert message.startswith("compile=True: no compiler here; install g++, or leave compile False")


def _config_refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    return str(caught.value)


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def missing() -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "install g++, or set CXX" in refusal(compile=True)


def test_torchs_own_graphs_are_refused_on_cuda() -> None:
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(ConfigError, match="mode='max-autotune-no-cudagraphs'"):
            compiling.refuse(EngineConfig(compile={"mode": mode}), torch.device("cuda"))


def test_graphs_need_cuda(tiny_flux: Any) -> None:
    words = "cuda_graphs=True: needs a CUDA device, and this is 'cpu'; leave it False (compile=True is for any device)"
    assert refusal(cuda_graphs=True) == words
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        Runner.from_pipeline(tiny_flux, EngineConfig(cuda_graphs=True))
    assert "a graph replays on the memory where" in _config_refusal(cuda_graphs=True, group_offload="leaf_level")


@pytest.fixture(scope="module")
def tiny_flux() -> Any:
    return shallow.flux()


def test_a_given_pipeline_stays_as_it_is(tiny_flux: Any) -> None:
    with pytest.raises(ConfigError, match=r"pipe\.transformer\.compile_repeated_blocks\(dynamic=True\)"):
        Runner.from_pipeline(tiny_flux, EngineConfig(compile=True))
    pipe = shallow.flux()
    pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True)
    before = [block._compiled_call_impl for block in pipe.transformer.transformer_blocks]
    runner = Runner.from_pipeline(pipe, EngineConfig())
    assert runner._loom.shared["transformer"].base is pipe.transformer, "a clone would run uncompiled"
    assert [block._compiled_call_impl for block in pipe.transformer.transformer_blocks] == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cache_on_disk_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(runners, "warm_up", lambda *about: None)
    _, lines = load("shallow:qwen_image", {"backend": "eager"})
    assert f"compiled code is kept in {tmp_path / 'steploom' / 'compile'}" in lines
