"""The GPU benchmarks, tiny on a CPU: that they work where there is a GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import pathlib

import diffusers
import pytest
import torch
import transformers

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = ["--tiny", "--device", "cpu", "--rows", "1,2", "--sizes", "32", "--steps", "3", "--rounds", "1",
         "--repeats", "1"]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark's modules by name; what it changes in this process is changed back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # it adds its folder
    monkeypatch.setenv("GPU_BENCHMARK_MODEL", "")  # and sets this: both are undone
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    verbosity = diffusers.utils.logging.get_verbosity(), transformers.logging.get_verbosity()
    yield lambda name: importlib.import_module(f"gpu.{name}")
    diffusers.utils.logging.set_verbosity(verbosity[0])
    transformers.logging.set_verbosity(verbosity[1])
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


def check(figures, *, mp: bool) -> None:
    """Every figure that the issue asks for is there and can be true."""
    rows = figures["bare"]["rows"]
    assert list(rows) == ["1", "2"]
    assert figures["bare"]["finite"]
    assert figures["bare"]["knee_rows"] in (1, 2)
    assert all(0 < row["mfu"] < 1 and row["step_ms"] > 0 for row in rows.values())
    for count, one in figures["engine"].items():
        assert one["shared"] == int(count), "the engine is measured while all of them share"
        assert one["difference"] < 1e-4
        assert 0 < one["outside_share"] < 1
        assert one["images_per_s"] > 0
        assert one["share_of_ceiling"] == pytest.approx(one["gain"] / one["ceiling"])
        assert 0 < figures["engine_mfu"][count] < 1
    delays = figures["delays"]
    assert delays["join"]["ticks"]["worst"] <= 2, "a request joins the next tick, or the one after if two are under way"
    assert delays["cancel"]["ticks_begun_with_it"]["worst"] <= 1
    for phase in ("quiet", "busy"):
        assert figures["gaps"][phase]["device"]["longest_over_median"] >= 1
        assert figures["gaps"][phase]["engine"]["ticks"] > 0
    assert figures["gaps"]["decode_ms"] > 0
    assert ("worker_process" in figures) == mp
    if mp:
        assert figures["worker_process"]["idle_between_ticks_ms"] >= 0
        assert figures["worker_process"]["delays"]["join"]["ticks"]["worst"] <= 2


def finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.slow
def test_one_model_from_end_to_end(gpu, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    gpu("__main__").main(
        [*QUICK, "--only", "flux", "--no-mp", "--no-encoders", "--attention", "native", "--json", str(path)]
    )
    result = json.loads(path.read_text())
    assert finite(result)
    assert result["left_out"] == []
    assert {"hardware", "versions", "options", "peak", "seconds", "left_out"} <= result.keys()
    model = result["models"]["flux-dev"]
    check(model["sizes"]["32"], mp=False)
    assert "flux-dev 32" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.thorough) for name in ("sdxl", "sd3.5-medium", "wan-1.3b")), "qwen-image"],
)
def test_every_architecture(gpu, tmp_path, name):
    path = tmp_path / "gpu.json"
    mp = [] if name == "qwen-image" else ["--no-mp"]
    rows = ["--rows", "2"] if name.startswith("sd") else []
    gpu("__main__").main([*QUICK, *rows, "--only", name, *mp, "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["left_out"] == []
    figures = result["models"][name]["sizes"]["32"]
    if not rows:
        check(figures, mp=not mp)
    assert all(one["difference"] < 1e-3 for one in figures["engine"].values())
    assert figures["gaps"]["encoded"] == (name != "qwen-image")


def test_published_sizes(gpu):
    sizes = {name: gpu("models").parameters_of(name, False) for name in ("flux-dev", "qwen-image")}
    assert sizes["flux-dev"]["transformer"] == 11_901_408_320
    assert sizes["flux-dev"]["text_encoder_2"] == 4_762_310_656
    assert sizes["qwen-image"]["transformer"] == 20_430_401_088
    tiny = gpu("models").parameters_of("flux-dev", True)
    assert tiny["transformer"] < 10**6


def test_float32_stays_where_diffusers_keeps_it(gpu):
    """Wan's time embedding is float32 in a bfloat16 model, as ``from_pretrained`` leaves it."""
    pipe = gpu("models").build("wan-1.3b", tiny=True, device="cpu", dtype="bfloat16", encoders=False)
    dtypes = {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()}
    assert dtypes["scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert not any(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert not any(buffer.is_meta for buffer in pipe.transformer.buffers())


def test_ctrl_c_keeps_the_figures_so_far(gpu, tmp_path, monkeypatch):
    async def interrupted(case, rows, figures, **_):
        figures["bare"] = {"rows": {}, "knee_rows": 1, "batching_pays": True}
        raise KeyboardInterrupt

    module = gpu("__main__")
    monkeypatch.setattr(module, "measure", interrupted)
    monkeypatch.setattr(module.models, "build", lambda *a, **k: type("Pipe", (), {"transformer": None})())
    path = tmp_path / "gpu.json"
    module.main([*QUICK, "--only", "flux", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["interrupted"]
    assert result["models"]["flux-dev"]["sizes"]["32"]["bare"]["knee_rows"] == 1


@pytest.mark.slow
def test_a_fault_costs_its_case_alone(gpu, tmp_path, monkeypatch, capsys):
    async def failing(case, rows, figures, **_):
        if case.size == 32:
            raise RuntimeError("no such kernel")
        figures["bare"] = {"rows": {}, "knee_rows": 1, "batching_pays": True}

    module = gpu("__main__")
    monkeypatch.setattr(module, "measure", failing)
    monkeypatch.setattr(module.models, "build", lambda *a, **k: type("Pipe", (), {"transformer": None})())
    path = tmp_path / "gpu.json"
    module.main([*QUICK, "--sizes", "32,64", "--only", "flux", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["left_out"][0]["why"] == "RuntimeError: no such kernel"
    assert "bare" in result["models"]["flux-dev"]["sizes"]["64"]


def test_the_budget_leaves_out_what_does_not_fit_and_says_so(gpu, capsys):
    now = [0.0]
    budget = gpu("budget").Budget(100.0, lambda: now[0])
    budget.share(4)
    assert budget.left == 25.0
    assert budget.allows("case", "little", 25.0)
    assert not budget.allows("case", "much", 30.0)
    assert budget.left_out == [
        {"case": "case", "what": "much", "why": "would take about 30.0 s of the 25.0 s left for it"}
    ]
    now[0] = 90.0
    budget.share(1)
    assert budget.left == 10.0
    assert "left out much" in capsys.readouterr().out


def test_no_time_is_no_failure(gpu, tmp_path):
    path = tmp_path / "gpu.json"
    gpu("__main__").main([*QUICK, "--only", "flux", "--no-encoders", "--budget-s", "1e-9", "--json", str(path)])
    left = json.loads(path.read_text())["left_out"]
    assert [one["what"] for one in left] == ["everything"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.2, 8: 2.4, 16: 4.8}, 4),
        ({1: 1.0, 2: 1.96, 4: 3.0}, 1),  # it stops at the first that does not pay
        ({1: 1.0, 2: 1.8, 4: 3.3}, 4),
        ({2: 1.0}, 2),
    ],
)
def test_the_knee(gpu, seconds, expected):
    assert gpu("forwards").knee(seconds) == expected


def test_calls_are_widened_where_they_have_rows(gpu):
    call = ((torch.arange(6.0).reshape(2, 3), torch.tensor(5)), {"ids": torch.ones(7, 3), "sizes": [[1], [2]], "n": 2})
    (sample, timestep), named = gpu("forwards").widened(call, 2, 4)
    assert sample.tolist() == [[0.0, 1.0, 2.0]] * 4
    assert timestep.ndim == 0
    assert named["ids"].shape == (7, 3)
    assert named["sizes"] == [[1]] * 4
    assert named["n"] == 2


def test_operations_are_counted_with_attention_and_grow_with_rows(gpu):
    class Attention(torch.nn.Module):
        def forward(self, hidden_states):
            return torch.nn.functional.scaled_dot_product_attention(*[hidden_states] * 3)

    heads, tokens, width = 2, 8, 4
    call = ((torch.randn(1, heads, tokens, width),), {})
    count = gpu("forwards").flops_of
    assert count(Attention(), call, 1) == 2 * 2 * heads * tokens * tokens * width
    assert count(Attention(), call, 1, rows=3) == 3 * count(Attention(), call, 1)


def test_what_was_asked_for_is_checked(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, message in (
        (["--only", "dalle", "--tiny"], "--only dalle: one of sdxl"),
        (["--device", "cuda"], "sees no CUDA device"),
        (["--device", "cpu"], "add --tiny"),
    ):
        with pytest.raises(SystemExit):
            gpu("__main__").arguments(argv)
        assert message in capsys.readouterr().err


def test_peaks_of_known_and_unknown_devices(gpu, monkeypatch):
    machine = gpu("machine")
    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert [machine.peak("cuda", "bfloat16")["flops"] for _ in range(3)] == [989.4e12, 756.5e12, 312e12]
    measured = machine.peak("cpu", "float32")
    assert measured["flops"] > 0
    assert "measured" in measured["source"]


def test_memory_that_is_not_there_is_a_reason(gpu, tmp_path, monkeypatch):
    module = gpu("__main__")
    monkeypatch.setattr(module.machine, "free_bytes", lambda device: 1000)
    path = tmp_path / "gpu.json"
    module.main([*QUICK, "--only", "flux", "--json", str(path)])
    left = json.loads(path.read_text())["left_out"]
    assert [one["what"] for one in left] == ["text encoders", "everything"]
    assert "GB are free" in left[1]["why"]
