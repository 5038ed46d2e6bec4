"""The driver that runs one workload on several engines (``benchmarks/peers``)."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"

PROTOCOL_TEST_PEER = '''
import asyncio, os, sys

class Driver:
    """No engine: it answers as one would, so that what is said to a process can be tested."""
    async def start(self, checkpoint, settings):
        print("a library that prints on stdout")
        if checkpoint == "nowhere":
            raise FileNotFoundError(checkpoint)
        return {"checkpoint": checkpoint, "batch": str(settings["max_batch"]), "path": os.environ["PYTHONPATH"]}
    async def generate(self, item):
        if item["seed"] == 1:
            raise ValueError("no odd seeds here")
        if item["seed"] == 99:
            os._exit(3)
        await asyncio.sleep(0)
        import numpy
        return numpy.full((1, 2), float(item["seed"]))
    async def stop(self):
        pass
'''

STAND_IN_FOR_VLLM_OMNI = """
import dataclasses, types, torch

@dataclasses.dataclass
class OmniDiffusionSamplingParams:
    num_inference_steps: int = 50
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    generator: object = None
    output_type: str = "pil"
    true_cfg_scale: float | None = None

class AsyncOmni:
    def __init__(self, *, model, dtype, step_execution, max_num_seqs, enforce_eager):
        assert (step_execution, max_num_seqs, enforce_eager) == (True, 4, True)
    async def generate(self, prompt, request_id, sampling_params_list):
        (one,) = sampling_params_list
        assert prompt == {"prompt": "a tram", "negative_prompt": "fog"} and one.output_type == "latent"
        yield types.SimpleNamespace(error=None, latents=None, images=[])
        latents = torch.randn(1, 3, generator=one.generator)
        yield types.SimpleNamespace(error="too odd" if one.seed == 1 else None, latents=None, images=[latents])
    def shutdown(self):
        pass
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers.__main__
    import peers.comparing
    import peers.peer
    import peers.workload

    return peers


def test_protocol_with_an_interpreter_of_its_own(peers, tmp_path, monkeypatch):
    (tmp_path / "protocol_test_peer.py").write_text(PROTOCOL_TEST_PEER)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    requests = [vars(item) for item in peers.workload.make(3, steps=2, sizes=[8])]
    log = tmp_path / "log"
    with peers.peer.Peer("toy", "protocol_test_peer", sys.executable, (str(tmp_path),), log) as toy:
        with pytest.raises(peers.peer.PeerError, match="toy: 'start' failed: FileNotFoundError: nowhere"):
            toy.start("nowhere", {"max_batch": 4})
        toy.start("somewhere", {"max_batch": 4})
        assert toy.versions["batch"] == "4"
        assert "/ours" not in toy.versions["path"], "our packages must not mix with theirs"
        results = toy.run(requests, tmp_path)
        assert [one["error"] for one in results] == [None, "ValueError: no odd seeds here", None]
        assert [one["latents"] is None for one in results] == [False, True, False]
        assert numpy.load(results[2]["latents"]).tolist() == [[2.0, 2.0]]
        assert all(one["ended_s"] >= one["due_s"] >= 0 for one in results)
        with pytest.raises(peers.peer.PeerError, match="ended with status 3 during 'run'"):
            toy.run([{**requests[0], "seed": 99}])
    assert "a library that prints on stdout" in log.read_text()


def test_protocol_of_vllm_omni_by_a_stand_in(peers, tmp_path):
    for place, text in {
        "vllm_omni/__init__.py": "",
        "vllm_omni/entrypoints/__init__.py": "",
        "vllm_omni/entrypoints/async_omni.py": STAND_IN_FOR_VLLM_OMNI,
        "vllm_omni/inputs/__init__.py": "",
        "vllm_omni/inputs/data.py": STAND_IN_FOR_VLLM_OMNI,
    }.items():
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    item = vars(peers.workload.Item("a", "a tram", 0, 2, 8, 8, negative_prompt="fog"))
    guided = {**item, "id": "b", "arguments": {"true_cfg_scale": 4.0}}
    unknown = {**item, "id": "c", "arguments": {"eta": 1.0}}
    with peers.peer.Peer("omni", "peers.drive_vllm_omni", sys.executable, (str(tmp_path),), tmp_path / "log") as omni:
        omni.start("folder", {"max_batch": 4, "dtype": "float32"})
        results = omni.run([item, guided, unknown, {**item, "id": "d", "seed": 1}], tmp_path)
    import torch

    assert [one["error"] for one in results] == [
        None, None, "ValueError: OmniDiffusionSamplingParams has no eta", "RuntimeError: too odd",
    ]  # fmt: skip
    expected = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).numpy()
    assert numpy.array_equal(numpy.load(results[0]["latents"]), expected)


def test_a_workload_is_a_file_that_any_driver_can_read(peers, tmp_path):
    items = peers.workload.make(5, steps=3, sizes=[32, 64], rate=2.0, arguments={"guidance_scale": 3.0})
    peers.workload.save(items, tmp_path / "w.json")
    assert peers.workload.load(tmp_path / "w.json") == items
    assert [item.width for item in items] == [32, 64, 32, 64, 32]
    assert items == peers.workload.make(5, steps=3, sizes=[32, 64], rate=2.0, arguments={"guidance_scale": 3.0})
    arrivals = [item.arrival_s for item in items]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] > arrivals[0] == 0


def test_figures_of_a_round(peers):
    def result(name, due, ended, error=None):
        return {"id": name, "due_s": due, "ended_s": ended, "error": error, "latents": None}

    one = peers.comparing.figures([result("a", 0.0, 1.0), result("b", 0.0, 4.0), result("c", 0.5, 0.6, "Full: no")])
    assert one == {
        "images_per_s": 0.5, "mean_latency_s": 2.5, "p95_latency_s": 4.0, "done": 2, "refused": {"Full: no": 1},
    }  # fmt: skip
    nobody = peers.comparing.figures([result("c", 0.0, 0.6, "Full: no")])
    assert nobody["images_per_s"] == 0.0
    assert nobody["p95_latency_s"] is None
    both = peers.comparing.medians([one, nobody], [one, one])
    assert both["gain"] == 0.5
    assert both["refused"] == {"Full: no": 2}


def test_latents_of_another_shape_are_not_compared(peers, tmp_path):
    for name, value in {"a": numpy.ones((1, 4)), "b": numpy.full((4,), 1.5), "c": numpy.ones((2, 2))}.items():
        numpy.save(tmp_path / f"{name}.npy", value)
    path = lambda name: [{"id": "x", "latents": str(tmp_path / f"{name}.npy")}]  # noqa: E731
    assert peers.comparing.difference(path("b"), path("a")) == {"compared": 1, "of_other_shape": 0, "worst": 0.5}
    assert peers.comparing.difference(path("c"), path("a")) == {"compared": 0, "of_other_shape": 1, "worst": None}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_steploom_and_pipe_take_turns_and_agree(peers, tiny_model, tmp_path, capsys):
    report = tmp_path / "peers.json"
    peers.__main__.main([
        "--checkpoint", str(tiny_model), "--device", "cpu", "--dtype", "float32", "--torch-threads", "1",
        "--requests", "4", "--steps", "3", "--sizes", "32", "--rounds", "2", "--max-batch", "4",
        "--vllm-omni", str(tmp_path / "no-such-python"), "--logs", str(tmp_path / "logs"), "--json", str(report),
        "--arguments", '{"max_sequence_length": 16}',
    ])  # fmt: skip
    found = json.loads(report.read_text())["peers"]
    assert "no-such-python" in found["vllm-omni"]["failed"]
    for name in ("pipe", "steploom"):
        assert len(found[name]["rounds"]) == 2
        assert found[name]["medians"]["refused"] == {}
        assert found[name]["medians"]["images_per_s"] > 0
    assert found["steploom"]["difference"]["compared"] == 4
    assert found["steploom"]["difference"]["worst"] < 1e-4
    assert "steploom" in capsys.readouterr().out
