"""Adapters are loaded once and dropped when idle; a bad one hurts its request alone; the pipeline stays as it was."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
from typing import Any

import lora_files
import pytest
import tiny
import torch
from driving import Driver, alone, config, distance, request
from safetensors.torch import save_file

from steploom import ConfigError
from steploom.worker.runner import Runner

TEXT: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("loras")
    return {name: lora_files.save(tiny.sd3, root / name, seed) for seed, name in enumerate("abc")}


def test_adapters_are_loaded_once_and_dropped_when_idle(files: dict[str, str]):
    runner = Runner.from_pipeline(tiny.sd3(), config(loras=files, max_loras=2))
    driver = Driver(runner)
    driver.drain([request("1", "x", 1, lora="a", **TEXT), request("2", "x", 1, lora=[("a", 0.5)], **TEXT)])
    assert (runner.stats().loras, runner.stats().lora_loads) == (["a"], 1)
    driver.tick([request(n, "x", 1, lora=n, **TEXT) for n in "abc"])
    assert runner.stats().loras == ["a", "b", "c"], "what resident requests use stays, beyond the bound"
    driver.cancel("a")
    driver.tick()
    assert runner.stats().loras == ["b", "c"]
    driver.drain()
    driver.drain([request("3", "x", 1, lora=files["b"], **TEXT), request("4", "x", 1, lora="a", **TEXT)])
    assert runner.stats().loras == ["b", "a"], "the least recently used went"
    assert (runner.stats().lora_loads, runner.stats().lora_evictions) == (4, 2)
    assert not runner._selections


def test_a_stack_that_is_refused_leaves_no_more_than_the_bound(files: dict[str, str], tmp_path: pathlib.Path):
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 50)
    runner = Runner.from_pipeline(tiny.sd3(), config(loras=files, max_loras=1))
    driver = Driver(runner)
    driver.drain([request("1", "x", 1, lora=[*"abc", str(tmp_path / "bad.safetensors")], **TEXT)])
    assert "bad.safetensors" in str(driver.finished["1"].error)
    assert len(runner.stats().loras) == 1


def test_a_control_lora_changes_the_settings_of_its_own_model(tmp_path: pathlib.Path):
    """diffusers sets ``transformer.config.in_channels``, although the settings are frozen."""
    pipe, noise = tiny.flux(), torch.Generator().manual_seed(1)
    out, channels = pipe.transformer.x_embedder.weight.shape
    matrices = {"A": (4, 2 * channels), "B": (out, 4)}
    made = {name: torch.randn(*size, generator=noise) for name, size in matrices.items()}
    save_file({f"transformer.x_embedder.lora_{n}.weight": m for n, m in made.items()}, tmp_path / "control.safetensors")
    plain, driver = request("1", "x", 1, **TEXT), Driver(Runner.from_pipeline(pipe, config()))
    driver.drain([request("control", "x", 1, lora=str(tmp_path), **TEXT)])
    assert driver.finished["control"].error is not None, "it brings more channels than the pipeline makes"
    driver.drain([plain])
    assert pipe.transformer.config.in_channels == channels
    assert distance(driver.finished["1"].output, alone(pipe, plain)) < 1e-5


def test_a_file_that_was_replaced_is_loaded_again(files: dict[str, str], tmp_path: pathlib.Path):
    folder = tmp_path / "style"
    shutil.copytree(files["a"], folder)
    driver = Driver(Runner.from_pipeline(tiny.sd3(), config()))
    file = next(folder.iterdir())
    before = request("before", "x", 1, lora=file, **TEXT)
    first = driver.drain([before])["before"].output
    old = file.stat()
    file.unlink()
    shutil.copy(next(pathlib.Path(files["b"]).iterdir()), file)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))  # as `cp -p` does
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    after = request("after", "x", 1, lora=str(file), **TEXT)
    second = driver.drain([after])["after"].output
    assert distance(second, first) > 1e-2
    assert distance(second, lora_files.alone_with_lora(tiny.sd3, after)) <= 1e-4


def test_a_bad_file_hurts_its_request_alone(files: dict[str, str], tmp_path: pathlib.Path):
    bad = {name: tmp_path / name for name in ("noise", "other", "shapes", "empty", "text.safetensors")}
    for name in ("noise", "other", "shapes", "empty"):
        bad[name].mkdir()
    bad["text.safetensors"].write_text("no weights")
    (bad["noise"] / "pytorch_lora_weights.safetensors").write_bytes(b"\0" * 100)
    save_file({"unet.nothing.lora_A.weight": torch.ones(4, 8), "unet.nothing.lora_B.weight": torch.ones(8, 4)},
              str(bad["other"] / "pytorch_lora_weights.safetensors"))  # fmt: skip
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(4, 7), f"{layer}.lora_B.weight": torch.ones(7, 4)},
              str(bad["shapes"] / "pytorch_lora_weights.safetensors"))  # fmt: skip
    pipe = tiny.sd3()
    good = [request("good", "a cat", 1, lora=files["a"], **TEXT), request("none", "a cat", 1, **TEXT)]
    expected = {r.request_id: lora_files.alone_with_lora(tiny.sd3, r) for r in good}
    gone = tmp_path / "gone.safetensors"
    gone.touch()
    runner = Runner.from_pipeline(pipe, config(loras={"missing": str(gone)}))
    gone.unlink()
    requests = [request(name, "x", 1, lora=path, **TEXT) for name, path in bad.items()]
    requests += [request("missing", "x", 1, lora="missing", **TEXT), request("typo", "x", 1, lora="mising", **TEXT)]
    requests += [request("stack", "x", 1, lora=[files["a"], bad["shapes"]], **TEXT)]
    finished = Driver(runner).drain([good[0], *requests, good[1]])
    for r in requests:
        error = finished[r.request_id].error
        assert error is not None, r.request_id
        assert (error.kind, error.field) == ("InvalidRequest", "lora"), (r.request_id, error.traceback)
        assert error.message.startswith("lora=")
        assert r.adapters[-1][0] in error.message
    assert "did you mean 'missing'" in finished["typo"].error.message
    for r in good:
        assert distance(finished[r.request_id].output, expected[r.request_id]) <= 1e-4
    assert runner.stats().loras == [files["a"]]
    assert not runner._selections


def test_a_name_for_nothing_is_refused_at_the_start(files: dict[str, str], tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match=r"^loras\['b'\]='.*/gone': is no file or folder here"):
        Runner.from_pipeline(tiny.sd3(), config(loras={"a": files["a"], "b": str(tmp_path / "gone")}))


def test_one_file_under_two_names_is_stacked_as_diffusers_stacks_it(tmp_path: pathlib.Path):
    """With DoRA two at 0.4 and 0.6 are not the same as one at 1."""
    file = lora_files.save(tiny.sd3, tmp_path / "dora", 7, dora=True)
    named = {"x": file, "y": file}
    stacked = request("both", "a cat", 1, lora=[("x", 0.4), ("y", 0.6)], **TEXT)
    single = request("one", "a cat", 1, lora="y", **TEXT)
    driver = Driver(Runner.from_pipeline(tiny.sd3(), config(loras=named, max_loras=1)))
    finished = driver.drain([stacked, single])
    expected = {
        "both": alone(lora_files.adapted(tiny.sd3(), ((file, 0.4), (file, 0.6))), stacked),
        "one": alone(lora_files.adapted(tiny.sd3(), ((file, 1.0),)), single),
    }
    assert distance(expected["both"], expected["one"]) > 2e-3
    for name, output in expected.items():
        assert finished[name].error is None, finished[name].error
        assert distance(finished[name].output, output) <= 1e-4
    assert driver.runner.stats().lora_loads == 2
    assert len(driver.runner.stats().loras) == 1


def state(pipe: Any) -> Any:
    """All that could change in the application's denoiser."""
    module = pipe.transformer
    return (
        {name: (id(p), p._version, p.requires_grad) for name, p in module.named_parameters()},
        [(name, type(part), id(part), len(part._forward_pre_hooks)) for name, part in module.named_modules()],
        hasattr(module, "peft_config"),
    )


def test_the_pipeline_stays_as_it_was_and_can_be_called_meanwhile(files: dict[str, str]):
    pipe = tiny.sd3()
    plain = request("plain", "a cat", 1, **TEXT)
    expected = alone(pipe, plain)
    before = state(pipe)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    requests = [request("a", "a cat", 1, lora=files["a"], **TEXT), request("b", "x", 1, lora=files["b"], **TEXT)]
    driver.tick(requests)
    assert distance(alone(pipe, plain), expected) == 0
    driver.drain()
    assert state(pipe) == before
    driver.runner.close()
    assert state(pipe) == before
    assert distance(alone(pipe, plain), expected) == 0


def test_adapters_of_the_application_are_used_by_name(files: dict[str, str]):
    pipe = lora_files.adapted(tiny.sd3(), ((files["a"], 0.5),))
    requests = [
        request("as it is", "a cat", 1, **TEXT),
        request("own", "a cat", 1, lora=[("adapter_0", 0.9)], **TEXT),
        request("other", "a cat", 1, lora=[(files["b"], 0.8)], **TEXT),
        request("both", "a cat", 1, lora=[("adapter_0", 0.5), (files["b"], 0.8)], **TEXT),
    ]
    chosen = [((files["a"], 0.5),), ((files["a"], 0.9),), ((files["b"], 0.8),), ((files["a"], 0.5), (files["b"], 0.8))]
    finished = Driver(Runner.from_pipeline(pipe, config())).drain(requests)
    for r, own in zip(requests, chosen, strict=True):
        assert finished[r.request_id].error is None, finished[r.request_id].error.traceback
        expected = alone(lora_files.adapted(tiny.sd3(), own), r)
        assert distance(finished[r.request_id].output, expected) <= 1e-4, r.request_id
    assert pipe.get_active_adapters() == ["adapter_0"]


def test_sleep_drops_them_and_requests_load_them_again(files: dict[str, str]):
    runner = Runner.from_pipeline(tiny.sd3(), config(loras=files))
    driver = Driver(runner)
    first = driver.drain([request("1", "a cat", 1, lora="a", **TEXT)])["1"].output
    runner.sleep()
    assert runner.stats().loras == []
    runner.wake_up()
    assert distance(driver.drain([request("2", "a cat", 1, lora="a", **TEXT)])["2"].output, first) == 0


@pytest.mark.slow
def test_a_compiled_denoiser_runs_requests_with_adapters_uncompiled(files: dict[str, str]):
    pipe = tiny.sd3()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    requests = [request("a", "a cat", 1, lora=files["a"], **TEXT), request("none", "a cat", 1, **TEXT)]
    finished = Driver(Runner.from_pipeline(pipe, config())).drain(requests)
    for r in requests:
        assert finished[r.request_id].error is None, finished[r.request_id].error.traceback
        assert distance(finished[r.request_id].output, lora_files.alone_with_lora(tiny.sd3, r)) <= 1e-4


def test_weights_with_fused_adapters_are_left_alone(files: dict[str, str]):
    """PEFT takes fused adapters out of the weights, in place, when another is loaded beside them."""
    pipe = lora_files.adapted(tiny.sd3(), ((files["a"], 1.0),))
    pipe.fuse_lora()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    driver = Driver(Runner.from_pipeline(pipe, config()))
    refused = driver.drain([request("fused", "x", 1, lora=files["b"], **TEXT)])["fused"].error
    assert refused is not None
    assert refused.kind == "InvalidRequest"
    assert "pipe.unload_lora_weights()" in refused.message
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    pipe.unload_lora_weights()
    wanted = request("unloaded", "x", 1, lora=files["b"], **TEXT)
    expected = alone(lora_files.adapted(pipe, wanted.adapters), wanted)
    pipe.unload_lora_weights()
    assert distance(driver.drain([wanted])["unloaded"].output, expected) <= 1e-4


def test_the_hub_is_asked_for_adapters_once_or_never(monkeypatch: pytest.MonkeyPatch):
    """A request for an adapter keeps the others waiting: no second try where the hub is away, no try offline."""
    tries: list[Any] = []

    def away(*address: Any, **options: Any) -> Any:
        tries.append(address)
        raise socket.gaierror(socket.EAI_NONAME, "no network here")

    monkeypatch.setattr(socket, "getaddrinfo", away)
    for offline, bound in ((True, 0), (False, 4)):
        tries.clear()
        driver = Driver(Runner.from_pipeline(tiny.sd3(), config(local_files_only=offline)))
        names = ("someone/style", "someone/style/ink.safetensors")
        finished = driver.drain([request(name, "x", 1, lora=name, **TEXT) for name in names])
        for name in names:
            error = finished[name].error
            assert error is not None
            assert (error.kind, error.field) == ("InvalidRequest", "lora")
            assert ("local_files_only=True" if offline else "the hub cannot be reached") in error.message
        assert len(tries) <= bound, "the client itself tries six times"
