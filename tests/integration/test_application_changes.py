"""What the application changes about its pipeline between two requests is taken up: the oracle is the pipeline now."""

from __future__ import annotations

import copy
import pathlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import lora_files
import pytest
import tiny
import torch
from conformance.case import CASES
from driving import Driver, alone, config, distance, request
from tokenizers import normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from steploom.weave.modules import tokenizers
from steploom.worker.runner import Runner

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
TEXT = {**SMALL, "max_sequence_length": 16}
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sdxl": (tiny.sdxl, SMALL),
    "sd3": (tiny.sd3, TEXT),
    "flux": (tiny.flux, TEXT),
}


def _denoiser(pipe: Any) -> Any:
    return lora_files.denoiser(pipe)[1]


def _named(module: Any, *endings: str) -> Any:
    return next(part for name, part in module.named_modules() if name.endswith(endings))


def _halve(module: Any) -> None:
    forward = module.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

    module.forward = halved


def processors(pipe: Any) -> None:
    base: Any = type(next(iter(_denoiser(pipe).attn_processors.values())))

    class Halved(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

    _denoiser(pipe).set_attn_processor(Halved())


def part_forward(pipe: Any) -> None:
    _halve(_named(_denoiser(pipe), ".attn", ".attn1"))


def number(pipe: Any) -> None:
    for part in _denoiser(pipe).modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 0.5


def free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.2, s2=0.2, b1=1.9, b2=1.9)


def parameter(pipe: Any) -> None:
    linear = next(part for part in _denoiser(pipe).modules() if isinstance(part, torch.nn.Linear))
    linear.weight = torch.nn.Parameter(linear.weight.data * 2)


def activation(pipe: Any) -> None:
    _named(pipe.text_encoder, ".mlp").activation_fn = torch.nn.Tanh()


def text_number(pipe: Any) -> None:
    for part in pipe.text_encoder.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 0.5


def scale(pipe: Any) -> None:
    _named(pipe.text_encoder, ".self_attn").scale *= 9


def text_class(pipe: Any) -> None:
    part = _named(pipe.text_encoder, ".mlp")
    kind: Any = type(part)
    part.__class__ = type("Negated", (kind,), {"forward": lambda self, states: -kind.forward(self, states)})


def text_forward(pipe: Any) -> None:
    _halve(_named(pipe.text_encoder, ".self_attn"))


DENOISER, ENCODER = [processors, part_forward, number, parameter], [activation, text_number, text_class, text_forward]
CHANGES = [(family, change) for family in FAMILIES for change in (*DENOISER, *ENCODER)]
CHANGES += [("sdxl", free_u), ("flux", scale)]
FAST = ("sd3", part_forward)


@pytest.mark.parametrize(
    ("family", "change"),
    [pytest.param(*one, marks=() if one == FAST else pytest.mark.slow) for one in CHANGES],
    ids=[f"{family}-{change.__name__}" for family, change in CHANGES],
)
def test_a_change_between_two_requests_is_taken_up(family: str, change: Callable[[Any], None]) -> None:
    build, common = FAMILIES[family]
    pipe = build()
    if change in (text_number, scale):  # no more than a nuance of random weights, unless it is what counts
        for part in pipe.text_encoder.parameters():
            part.data *= 2
    driver = Driver(Runner.from_pipeline(pipe, config()))
    before = alone(pipe, request("before", "a cat", 1, **common))
    assert distance(_served(driver, request("first", "a cat", 1, **common)), before) <= 1e-4
    change(pipe)
    for name in ("second", "third"):
        asked = request(name, "a cat", 1, **common)
        now = alone(pipe, asked)
        assert distance(now, before) > 5e-4, "the model does not care"
        assert distance(_served(driver, asked), now) <= 1e-4


def _served(driver: Driver, asked: Any) -> Any:
    report = driver.drain([asked])[asked.request_id]
    assert report.error is None, report.error
    return report.output


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("fused", [False, True], ids=["fuse", "unfuse"])
def test_adapters_that_are_fused_or_no_longer(family: str, fused: bool, tmp_path: pathlib.Path) -> None:
    build, common = FAMILIES[family]
    pipe, file = build(), lora_files.save(build, tmp_path, 1)
    pipe.load_lora_weights(file, adapter_name="ink")
    if fused:
        pipe.fuse_lora()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain([request("first", "a cat", 1, **common)])
    pipe.unfuse_lora() if fused else pipe.fuse_lora()
    asked = request("second", "a cat", 1, **common)
    assert distance(_served(driver, asked), alone(pipe, asked)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("change", ["disable_lora", "set_adapters"])
def test_adapters_that_are_switched(change: str, tmp_path: pathlib.Path) -> None:
    pipe = tiny.sdxl()
    for seed, name in enumerate(("ink", "fog")):
        pipe.load_lora_weights(lora_files.save(tiny.sdxl, tmp_path / name, seed), adapter_name=name)
    pipe.set_adapters(["ink"], [1.0])
    driver = Driver(Runner.from_pipeline(pipe, config()))
    before = _served(driver, request("first", "a cat", 1, **SMALL))
    getattr(pipe, change)(*([["fog"], [1.0]] if change == "set_adapters" else []))
    asked = request("second", "a cat", 1, **SMALL)
    now = alone(pipe, asked)
    assert distance(now, before) > 2e-3
    assert distance(_served(driver, asked), now) <= 1e-4


def _halved_by_hook(module: Any) -> Any:
    return module.register_forward_hook(lambda own, args, output: output * -0.5)


def text_parameter(pipe: Any) -> None:
    part = _named(pipe.text_encoder, ".fc1")
    part.weight = torch.nn.Parameter(part.weight.detach() * -2)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    text_parameter, lambda pipe: _halved_by_hook(_named(pipe.text_encoder, ".mlp")),
], ids=["parameter", "hook"])  # fmt: skip
def test_what_adapters_were_put_on_is_made_anew(change: Callable[[Any], Any], tmp_path: pathlib.Path) -> None:
    """Of text encoders, too, which nobody clones where there are no adapters."""
    pipe, file = tiny.sdxl(), lora_files.save(tiny.sdxl, tmp_path, 1, text=True)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    before = _served(driver, request("first", "a cat", 1, lora=file, **SMALL))
    hook = change(pipe)
    asked = request("second", "a cat", 1, lora=file, **SMALL)
    oracle = tiny.sdxl()
    change(oracle)
    now = alone(lora_files.adapted(oracle, asked.adapters), asked)
    assert distance(now, before) > 1e-2
    assert distance(_served(driver, asked), now) <= 1e-4
    if hook is not None:
        hook.remove()
        assert distance(_served(driver, request("third", "a cat", 1, lora=file, **SMALL)), before) <= 1e-5


def test_a_model_in_another_dtype_is_made_anew() -> None:
    """SDXL's VAE, which decodes in float32."""
    pipe = tiny.sdxl_half_vae()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    asked = [request(name, "a cat", 1, output_type="pt", **SMALL) for name in ("first", "second", "third")]
    before = _served(driver, asked[0])
    hook = _halved_by_hook(_named(pipe.vae, "decoder.mid_block"))
    now = alone(pipe, asked[1])
    assert distance(now, before) > 1e-2
    assert distance(_served(driver, asked[1]), now) <= 1e-3
    hook.remove()
    assert distance(_served(driver, asked[2]), before) <= 1e-5


def test_a_method_set_while_requests_run_hurts_nobody() -> None:
    pipe = tiny.flux()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.tick([request("first", "a cat", 1, **TEXT)])
    text_forward(pipe)
    late = request("late", "dogs", 2, **TEXT)
    assert distance(_served(driver, late), alone(pipe, late)) <= 1e-4
    assert driver.finished["first"].error is None


@pytest.mark.slow
def test_who_changes_a_module_with_a_method_of_its_own_is_told_of_it() -> None:
    pipe = tiny.sdxl_pag()
    _halve(_named(pipe.unet, ".attn1"))
    pag = request("pag", "a", 2, **SMALL)
    error = Driver(Runner.from_pipeline(pipe, config())).drain([pag])["pag"].error
    assert error is not None
    assert "a forward that was set on an object" in error.message
    assert "offloading" not in error.message


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_what_calls_leave_behind_is_no_change(name: str) -> None:
    """Neither requests nor direct calls make the engine look at the pipeline anew, or encode a text again."""
    case = CASES[name]
    pipe = case.build()
    runner = Runner.from_pipeline(pipe, config())
    driver, loom = Driver(runner), runner._loom
    keys: list[set[Any]] = []
    for i in range(2):
        asked = copy.copy(case.request(0))
        object.__setattr__(asked, "request_id", f"q{i}")
        driver.drain([asked])
        assert not loom.outdated
        keys.append(set(runner._hub.cache._entries))
    assert runner._loom is loom
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_what_a_direct_call_sets_for_a_while_is_no_change() -> None:
    """PAG's processors are on the application's module while it runs; a request that starts then has none of them."""
    pipe, inside, go_on = tiny.sdxl_pag(), threading.Event(), threading.Event()
    plain = request("plain", "a cat", 1, pag_scale=0.0, **SMALL)
    expected = alone(pipe, plain)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    loom = driver.runner._loom

    def wait(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        inside.set()
        assert go_on.wait(60)
        return values

    calling = threading.Thread(
        target=lambda: pipe("dogs", pag_scale=3.0, callback_on_step_end=wait, output_type="latent", **SMALL)
    )
    calling.start()
    try:
        assert inside.wait(60)
        assert distance(_served(driver, plain), expected) <= 1e-4
        assert driver.runner._loom is loom
    finally:
        go_on.set()
        calling.join()
    assert not loom.outdated


def test_another_tokenizer_is_taken_up_though_it_may_lie_where_the_last_one_lay() -> None:
    """As long as ours stands for theirs, theirs lives, and no other one has its id."""
    pipe = tiny.flux()
    driver = Driver(Runner.from_pipeline(pipe, config(max_batch=1)))
    outputs: list[Any] = []
    for turn in range(tokenizers._KEPT + 2):
        asked = request(f"r{turn}", "a cat", 1, **TEXT | {"num_inference_steps": 1})
        driver.drain([asked])
        outputs.append(driver.finished[asked.request_id].output)
        assert distance(outputs[-1], alone(pipe, asked)) < 1e-5
        last = weakref.ref(pipe.tokenizer)
        pipe.tokenizer = tiny.tokenizer(length=16)
        pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x" * (turn + 1))
        assert last() is not None or turn == tokenizers._KEPT - 1
        del last
    assert distance(outputs[0], outputs[1]) > 1e-3, "another text"


def _other_token(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["cat"])


def _truncated(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 4


def _unpadded(pipe: Any) -> None:
    pipe.tokenizer.pad_token = pipe.tokenizer.eos_token


def _normalized(pipe: Any) -> None:
    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("c", "d")


def _split(pipe: Any) -> None:
    pipe.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _framed(pipe: Any) -> None:
    template = TemplateProcessing(single="</s> $A <s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    pipe.tokenizer.backend_tokenizer.post_processor = template


def _subclassed(pipe: Any) -> None:
    class Loud(type(pipe.tokenizer)):
        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            return super().__call__([one.upper() for one in text], *args, **options)

    pipe.tokenizer.__class__ = Loud


@pytest.mark.parametrize("change", [_other_token, _truncated, _unpadded, _normalized, _split, _framed, _subclassed])
def test_a_tokenizer_that_was_changed_is_taken_up(change: Callable[[Any], None]) -> None:
    pipe = tiny.sdxl()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    asked = [request(f"r{i}", "a cat", 1, **SMALL) for i in range(2)]
    before = _served(driver, asked[0])
    change(pipe)
    expected = alone(pipe, asked[1])
    assert distance(before, expected) > 1e-4
    assert distance(_served(driver, asked[1]), expected) <= 1e-5
