"""What a callback changes is its request's alone: as in ``pipe(...)`` with it, and nobody else's, now or later."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import lora_files
import pytest
import tiny
import torch
from conformance.case import CASES
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from driving import Driver, alone, config, distance, request

from steploom.worker.runner import Runner

import conformance.families  # noqa: F401  # isort: skip - fills CASES

SMALL = {"height": 32, "width": 32}
Change = Callable[[Any], Any]


def at_step_one(change: Change) -> Any:
    """A callback that makes the change once."""

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            change(pipe)
        return values

    return callback


def look(pipe: Any) -> None:
    """Changes nothing, but sees parts."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert [name for name, _ in denoiser.named_children()]
    assert getattr(denoiser, next(iter(denoiser._modules))) is not None


def fingerprint(pipe: Any) -> dict[Any, Any]:
    """Everything on the modules that a request could have set, with tables, lists and dicts by their items."""
    found: dict[Any, Any] = {}
    for name, module in pipe.components.items():
        for path, part in module.named_modules() if isinstance(module, torch.nn.Module) else ():
            held = {**vars(part), **{("processor", n): v for n, v in vars(vars(part).get("processor", part)).items()}}
            found[name, path] = {
                n: [*map(repr, v), *map(id, v.values() if isinstance(v, dict) else ())] if type(v) in (list, dict) else
                list(v) if isinstance(v, dict) else id(v)
                for n, v in held.items() if not isinstance(v, torch.nn.Module)
            }  # fmt: skip
    return found


def fresh(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def check(build: Callable[[], Any], own: dict[str, Any], other: dict[str, Any], callback: Any) -> Driver:
    """Own request and neighbours as alone; so are the next request, and a call of the pipeline when all is over."""
    changing = request("own", seed=1, callback_on_step_end=callback(), **own)
    plain = [request(name, seed=2, **other) for name in ("before", "beside", "next", "after")]
    looking = request("looking", seed=1, callback_on_step_end=at_step_one(look), **own)
    unchanged = alone(fresh(build), request("unchanged", seed=1, **own))
    expected = {"own": alone(fresh(build), changing), "looking": unchanged}
    assert distance(expected["own"], unchanged) > 2e-3, "the change changes nothing"
    pipe = fresh(build)
    expected |= dict.fromkeys([one.request_id for one in plain], alone(pipe, plain[0]))
    was = fingerprint(pipe)
    runner = Runner.from_pipeline(pipe, config())
    driver = Driver(runner)
    driver.drain([plain[0]])
    driver.drain([changing, plain[1], looking])
    driver.drain([plain[2]])
    runner.close()
    for name, report in driver.finished.items():
        assert report.error is None, report.error.traceback
        assert distance(report.output, expected[name]) <= 1e-4, name
    assert fingerprint(pipe) == was
    assert distance(alone(pipe, plain[3]), expected["after"]) == 0.0
    return driver


def ip_flux() -> Any:
    """FLUX.1 with an IP-Adapter, whose processors are modules."""
    pipe = tiny.flux()
    noise = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise)

    layers = {f"{i}.to_{k}_ip.{what}": random(*((32, 32) if what == "weight" else (32,)))
              for i in range(2) for k in "kv" for what in ("weight", "bias")}  # fmt: skip
    projection = {"proj.weight": random(4 * 32, 32), "proj.bias": random(4 * 32), "norm.weight": torch.ones(32),
                  "norm.bias": torch.zeros(32)}  # fmt: skip
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], False)
    pipe.set_ip_adapter_scale(1.0)
    return pipe


def ip_case(i: int) -> dict[str, Any]:
    return {**CASES["StableDiffusionPipeline-ip-adapter"].inputs(i), "num_inference_steps": 4}


def scale_off(pipe: Any) -> None:
    pipe.set_ip_adapter_scale(0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "callback",
    [
        lambda: at_step_one(scale_off),
        lambda: IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
        pytest.param(lambda: at_step_one(lambda pipe: pipe.set_ip_adapter_scale({"up": 0.5})), marks=pytest.mark.slow),
    ],
    ids=["scale", "cutoff", "by-block"],
)
def test_the_scale_of_an_ip_adapter(callback: Any):
    own, other = ip_case(0), ip_case(1)
    driver = check(CASES["StableDiffusionPipeline-ip-adapter"].build, own, other, callback)
    assert driver.sharing("own")[:2] == [3, 3]
    assert driver.sharing("own")[2:] == [1, 1]
    assert driver.sharing("beside") == driver.sharing("looking") == [3, 3, 2, 2]


@pytest.mark.slow
def test_the_scale_of_an_ip_adapter_of_flux():
    def inputs(i: int) -> dict[str, Any]:
        images = torch.randn((2, 1, 1, 32), generator=torch.Generator().manual_seed(i))
        embeds = {"ip_adapter_image_embeds": [images[0]], "negative_ip_adapter_image_embeds": [images[1]]}
        return {"prompt": f"a cat {i}", "num_inference_steps": 4, "max_sequence_length": 16, **embeds, **SMALL}

    driver = check(ip_flux, inputs(0), inputs(1), lambda: at_step_one(scale_off))
    assert driver.sharing("own")[2:] == [1, 1]


def test_equal_scales_share_forwards():
    case = CASES["StableDiffusionPipeline-ip-adapter"]
    requests = [request(f"r{i}", seed=i, callback_on_step_end=at_step_one(scale_off), **ip_case(i)) for i in range(2)]
    expected = {one.request_id: alone(fresh(case.build), one) for one in requests}
    driver = Driver(Runner.from_pipeline(fresh(case.build), config()))
    driver.drain(requests)
    for name, output in expected.items():
        assert distance(driver.finished[name].output, output) <= 1e-4
    assert driver.sharing("r0") == [2, 2, 2, 2]


def sdxl_inputs(i: int) -> dict[str, Any]:
    return {"prompt": f"a cat {i}", "num_inference_steps": 4, **SMALL}


def attention(pipe: Any) -> Any:
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1


def set_attributes(pipe: Any) -> None:
    for block in pipe.unet.up_blocks:
        for part in block.resnets:
            part.output_scale_factor = 2.0


def set_processor(pipe: Any) -> None:
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    attention(pipe).set_processor(PAGIdentitySelfAttnProcessor2_0())


def set_function(pipe: Any) -> None:
    part = attention(pipe)
    forward = part.forward
    part.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.0


def set_hook(pipe: Any) -> None:
    def halve(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        assert len(output) == 2, "it sees the rows of its own request"
        return output * 0.5

    pipe.unet.mid_block.register_forward_hook(halve)


def set_weight(pipe: Any) -> None:
    pipe.unet.conv_out.weight = torch.nn.Parameter(pipe.unet.conv_out.weight * 0.5)


def set_child(pipe: Any) -> None:
    pipe.unet.conv_act = torch.nn.ReLU()
    pipe.unet.up_blocks[0].resnets[0].nonlinearity = torch.nn.ReLU()


def set_tensor(pipe: Any) -> None:
    pipe.unet.conv_norm_out.eps = torch.tensor(0.5).item()
    pipe.unet.mid_block.resnets[0].output_scale_factor = torch.tensor(2.0)


CHANGES = [set_attributes, set_hook]
MORE = [set_processor, set_function, set_weight, set_child, set_tensor]


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)])
def test_a_change_to_a_part(change: Change):
    driver = check(tiny.sdxl, sdxl_inputs(0), sdxl_inputs(1), lambda: at_step_one(change))
    assert driver.sharing("own")[2:] == [1, 1]
    assert driver.sharing("looking")[-2:] == driver.sharing("beside")[-2:] == [2, 2]


@pytest.mark.slow
def test_a_part_that_was_seen_before_may_be_changed_later():
    def callback() -> Any:
        seen: list[Any] = []

        def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                seen[:] = [pipe.unet.up_blocks]
            elif step == 1:
                seen[0][0].resnets[0].output_scale_factor = 2.0
            return values

        return keep

    driver = check(tiny.sdxl, sdxl_inputs(0), sdxl_inputs(1), callback)
    assert driver.sharing("own")[2:] == [1, 1]


def test_a_callback_of_diffusers_own_kind_keeps_its_attributes():
    from diffusers.callbacks import PipelineCallback

    class Halving(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            self.calls = getattr(self, "calls", 0) + 1
            if step == 1:
                set_attributes(pipe)
            return values

    made: list[Halving] = []

    def callback() -> Halving:
        made.append(Halving())
        return made[-1]

    check(tiny.sdxl, sdxl_inputs(0), sdxl_inputs(1), callback)
    assert made[-1].calls == 8, "four steps alone, four served"


def test_only_callbacks_take_clones():
    """Pipelines read parts as well, at each request: that must not cost anything."""
    from steploom.weave.copies import Woven

    clones: list[str] = []
    taken = Woven.privatize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Woven, "privatize", lambda self: clones.append(self.shared.name) or taken(self))
        runner = Runner.from_pipeline(tiny.sdxl(), config())
        Driver(runner).drain([request("a", seed=1, **sdxl_inputs(0))])
        plain = clones.copy()
        Driver(runner).drain([request("b", seed=1, callback_on_step_end=at_step_one(look), **sdxl_inputs(0))])
    assert "unet" not in plain
    assert "unet" in clones


@pytest.mark.slow
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_adapters_are_fused_into_weights_of_its_own(component: str, tmp_path: pathlib.Path) -> None:
    """PEFT adds them to the weights in place; what is left of the request's steps is computed with their sum."""
    file = lora_files.save(tiny.sdxl, tmp_path, 1, text=True)

    def build() -> Any:
        pipe = tiny.sdxl()
        pipe.load_lora_weights(file, adapter_name="ink")
        return pipe

    def fuse(pipe: Any) -> None:
        pipe.fuse_lora(components=[component], lora_scale=0.5)
        pipe._guidance_scale = 1.5  # a change that shows; the sum alone is what it was

    settings = {**SMALL, "prompt": "a cat", "num_inference_steps": 3}
    check(build, settings, settings, lambda: at_step_one(fuse))
