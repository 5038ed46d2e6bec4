"""The codec: what travels arrives as it was, what cannot travel is named, damage is a ProtocolError and no other."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from steploom import codec
from steploom.errors import InvalidRequest, ProtocolError, QueueFull, RequestCancelled
from steploom.protocol import (
    ErrorInfo,
    NewRequest,
    RequestReport,
    RunnerOutput,
    SchedulerOutput,
    WorkerStats,
)
from steploom.requests import DiffusionOutput, DiffusionRequest, Timings


def travel(value: Any, kind: Any = Any, **options: Any) -> Any:
    """``value`` on the other side, from writable frames as ZMQ gives them."""
    frames = codec.encode(value, **options)
    return codec.decode([bytearray(frame) for frame in frames], kind, **options)


def same(one: Any, other: Any) -> bool:
    """Deep equality, of types too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
        )
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, PIL.Image.Image):
        return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float | complex):
        return repr(one) == repr(other)
    return bool(one == other)


ARRAYS = npst.arrays(
    npst.boolean_dtypes() | npst.integer_dtypes() | npst.floating_dtypes() | npst.complex_number_dtypes()
    | npst.datetime64_dtypes() | npst.unicode_string_dtypes(min_len=1) | npst.byte_string_dtypes(min_len=1),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)  # fmt: skip
TENSORS = npst.arrays(
    npst.integer_dtypes(endianness="=", sizes=(8, 32, 64)) | npst.floating_dtypes(endianness="=", sizes=(16, 32)),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
).map(torch.from_numpy)
IMAGES = st.builds(
    lambda mode, width, height, colour: PIL.Image.new(mode, (width, height), colour),
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([0, 1]),
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=2000)
    | st.complex_numbers() | st.frozensets(st.integers())
)  # fmt: skip
VALUES = st.recursive(
    SCALARS | ARRAYS | TENSORS | IMAGES,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers(-(2**63), 2**63 - 1), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
@settings(max_examples=100)
def test_values_arrive_as_they_were(value: Any) -> None:
    assert same(travel(value), value)


@given(VALUES, st.data())
@settings(max_examples=200)
def test_damaged_frames_raise_a_protocol_error_or_nothing(value: Any, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in codec.encode(value)]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1) if len(frames) > 1 else st.just(0))]
        match data.draw(st.sampled_from(["flip", "cut", "grow", "lose", "swap"])):
            case "flip" if frame:
                frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
            case "cut":
                del frame[data.draw(st.integers(0, len(frame))) :]
            case "grow":
                frame += data.draw(st.binary(min_size=1, max_size=8))
            case "lose" if len(frames) > 1:
                frames.pop()
            case _:
                frames.reverse()
    with contextlib.suppress(ProtocolError):
        codec.decode(frames, Any)


@given(st.binary(max_size=200), st.lists(st.binary(max_size=20), max_size=2))
@settings(max_examples=200)
def test_noise_raises_a_protocol_error_or_nothing(header: bytes, frames: list[bytes]) -> None:
    for kind in (Any, SchedulerOutput, RunnerOutput):
        with contextlib.suppress(ProtocolError):
            codec.decode([header, *frames], kind)


DTYPES = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]


@pytest.mark.parametrize("name", [n for n in DTYPES if not n.startswith(("q", "bits"))])
def test_every_dtype_of_torch_travels(name: str) -> None:
    dtype = getattr(torch, name)
    raw = torch.arange(16 * dtype.itemsize, dtype=torch.uint8) % 2
    value = raw.view(dtype)
    arrived = travel(value)
    assert (arrived.dtype, arrived.shape) == (dtype, value.shape)
    assert torch.equal(arrived.view(torch.uint8), raw)
    assert travel(dtype) is dtype


def test_tensors_of_every_shape_travel() -> None:
    base = torch.randn(4, 6)
    for value in (base.t(), base[::2, 1:3], base[0, 0], torch.empty(0, 3), base.expand(2, 4, 6), base.conj()):
        arrived = travel(value)
        assert torch.equal(arrived, value)
        arrived += 1  # writable, and its own memory
    assert not torch.equal(travel(base), travel(base) + 1)
    complex_ = torch.randn(3, dtype=torch.complex64).conj()
    assert torch.equal(travel(complex_), complex_.resolve_conj())
    assert torch.equal(travel(torch.nn.Parameter(base)), base)


def test_payloads_are_not_copied() -> None:
    tensor, array = torch.zeros(1000), np.zeros(1000)
    _, first, second = codec.encode([tensor, array])
    tensor[0], array[0] = 1, 1
    assert memoryview(first).cast("B").cast("f")[0] == 1.0
    assert memoryview(second).cast("B").cast("d")[0] == 1.0
    frames = [bytearray(frame) for frame in codec.encode([tensor, array])]
    one, other = codec.decode(frames, Any)
    frames[1][:4], frames[2][:8] = bytes(4), bytes(8)
    assert (one[0], other[0]) == (0.0, 0.0)


def test_frames_that_are_not_aligned_are_copied() -> None:
    header, payload = codec.encode(torch.arange(4.0, dtype=torch.float64))
    moved = memoryview(bytearray(b"x" + bytes(payload)))[1:]
    assert codec.decode([header, moved], Any).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_read_only_frames_give_writable_values() -> None:
    frames = [bytes(frame) for frame in codec.encode([torch.zeros(2), np.zeros(2)])]
    tensor, array = codec.decode(frames, Any)
    tensor += 1
    array += 1


def test_palettes_travel() -> None:
    image = PIL.Image.effect_mandelbrot((8, 8), (-2, -1, 1, 1), 9).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    assert travel(image).convert("RGB").tobytes() == image.convert("RGB").tobytes()


class Colour(enum.StrEnum):
    RED = "red"


def test_subclasses_of_plain_types_travel_as_the_plain_type() -> None:
    assert same(travel(OrderedDict(a=Colour.RED)), {"a": "red"})
    assert same(travel(torch.Size([1, 2])), (1, 2))
    assert same(travel(np.float64(1.5)), np.float64(1.5))
    assert same(travel([bytearray(b"a"), memoryview(b"b")]), [b"a", b"b"])
    assert travel(torch.device("cuda:1")) == torch.device("cuda", 1)


def test_structs_and_errors_travel_where_anything_may_stand() -> None:
    stats = WorkerStats(ticks=3, alone_calls={"only one": 2})
    assert travel([stats, (stats,)]) == [stats, (stats,)]
    error, *ended = travel([QueueFull("full"), RequestCancelled("late", drained=True), RequestCancelled("late")])
    assert (type(error), str(error)) == (QueueFull, "full")
    assert [(type(one), one.drained) for one in ended] == [(RequestCancelled, True), (RequestCancelled, False)]
    request = DiffusionRequest("a", seed=1, image=(1, 2))
    assert travel([request]) == [request]


def test_the_structs_of_a_tick_travel() -> None:
    request = DiffusionRequest(["a", "b"], seed=2**64 - 1, noise_scheduler={"class": "X", "shape": (1, 2)}, timeout=3,
                               sizes=((1, 2), [3]), image=PIL.Image.new("RGB", (2, 2)), nothing=None)  # fmt: skip
    output = SchedulerOutput(3, [NewRequest("a#0", request)], ["b#0"], ["c#1"], "key")
    arrived = travel(output, SchedulerOutput)
    assert dataclasses.asdict(arrived.scheduled_new_reqs[0].request).keys() == dataclasses.asdict(request).keys()
    assert same(dict(arrived.scheduled_new_reqs[0].request.params), dict(request.params))
    assert arrived.scheduled_new_reqs[0].request.noise_scheduler == {"class": "X", "shape": (1, 2)}
    assert (arrived.run_ids, arrived.finished_req_ids, arrived.batch_key) == (["b#0", "a#0"], ["c#1"], "key")

    report = RequestReport(
        run_id="a#0", sigma=0.5, latents=torch.ones(2), output={"images": [PIL.Image.new("L", (1, 1))]}
    )
    failed = RequestReport(run_id="b#0", finished=True, error=ErrorInfo("GenerationFailed", "x"))
    arrived = travel(RunnerOutput(tick=3, reports=[report, failed]), RunnerOutput)
    assert torch.equal(arrived.reports[0].latents, torch.ones(2))
    assert arrived.reports[0].output["images"][0].size == (1, 1)
    assert arrived.reports[1] == failed


def test_whole_outputs_travel() -> None:
    output = DiffusionOutput(request_id="a", seed=1, output=(1,), timings=Timings(steps=3), error=QueueFull("full"))
    arrived = travel([output])[0]
    assert (arrived.output, arrived.timings, type(arrived.error)) == ((1,), output.timings, QueueFull)
    assert type(travel(output, DiffusionOutput).error) is QueueFull


def test_outputs_of_diffusers_travel_as_themselves() -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput as Output

    arrived = travel(Output(images=[PIL.Image.new("RGB", (2, 2))]))
    assert type(arrived) is Output
    assert arrived["images"][0].size == (2, 2)
    unknown = bytes(codec.encode(Output(images=[1]))[0]).replace(b"pipeline_output", b"pipeline_0utput")
    assert codec.decode([unknown], Any).images == [1], "a module that only the worker has"


def test_outputs_of_diffusers_stand_in_where_it_is_not_imported() -> None:
    """Without diffusers the output has its fields, imports nothing, and is the real class once that exists."""
    script = """
import sys, typing
from steploom import codec
out = codec.decode([sys.stdin.buffer.read()], typing.Any)
assert not {"torch", "diffusers", "numpy", "PIL"} & set(sys.modules), "imported too much"
assert out.images == [1, (2,)] and out["images"] == out[0] and out.to_tuple() == (out.images,)
assert list(out) == ["images"]
assert out.nsfw_content_detected is None
assert repr(out) == "StableDiffusionPipelineOutput(images=[1, (2,)], nsfw_content_detected=None)"
again = codec.decode(codec.encode(out), typing.Any)
assert type(again) is type(out) and again.images == out.images
sys.modules["diffusers.pipelines.stable_diffusion.pipeline_output"] = module = type(sys)("fake")
module.StableDiffusionPipelineOutput = type("StableDiffusionPipelineOutput", (), {"__module__": type(out).__module__})
assert isinstance(out, module.StableDiffusionPipelineOutput) and isinstance(out, dict)
"""
    from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput as Output

    (header,) = codec.encode(Output(images=[1, (2,)], nsfw_content_detected=None))
    subprocess.run([sys.executable, "-c", script], input=header, check=True)


@dataclasses.dataclass
class Mine:
    """A dataclass of nobody's package."""

    field: Any = 1


def test_dataclasses_travel_by_package() -> None:
    with pytest.raises(InvalidRequest, match=r"an object of type test_codec\.Mine cannot travel"):
        codec.encode(Mine())
    assert travel([Mine((1,))], packages=("test_codec",)) == [Mine((1,))]
    frames = codec.encode(Mine(), packages=("test_codec",))
    with pytest.raises(ProtocolError, match="test_codec has no business here"):
        codec.decode(frames, Any)


def _path_to(value: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        codec.encode(NewRequest("a#0", DiffusionRequest("a", seed=1, some=value)))
    assert caught.value.field == "some"
    return str(caught.value)


def test_what_cannot_travel_is_named() -> None:
    mend = "cannot travel to a worker process; use distributed_executor_backend='inproc'"
    assert _path_to(lambda: None) == f"params['some']: a function {mend}"
    assert _path_to([1, {"a": (2, print)}]) == f"params['some'][1]['a'][1]: a function {mend}"
    assert _path_to(object()) == f"params['some']: an object of type builtins.object {mend}"
    assert _path_to(i for i in ()) == f"params['some']: a Python generator {mend}"
    assert _path_to({1.5: 1}) == f"params['some'][1.5]: an object of type builtins.float as a key {mend}"
    assert "give seed= instead, or use" in _path_to([np.random.default_rng()])
    assert "dtype object" in _path_to(np.array([print]))
    assert "dtype [('a', '<i4')]" in _path_to(np.zeros(1, [("a", "<i4")]))
    assert "masked values" in _path_to(np.ma.array([1]))
    assert "sparse" in _path_to(torch.eye(2).to_sparse())
    assert "meta" in _path_to(torch.empty(1, device="meta"))
    assert "lone surrogate" in _path_to("\ud800")
    assert "lone surrogate" in _path_to({"\ud800": 1})
    cycle: list[Any] = []
    cycle.append(cycle)
    assert "nested deeper than 64 levels" in _path_to(cycle)


def test_fields_of_our_own_are_checked_before_they_are_sent() -> None:
    for field, value in (("priority", "high"), ("prompt", object()), ("user", 3)):
        with pytest.raises(InvalidRequest, match=field) as caught:
            codec.check_request(DiffusionRequest(**{field: value}))
        assert caught.value.field == field


def test_checking_does_not_touch_payloads() -> None:
    image = PIL.Image.new("RGB", (1, 1))
    image.tobytes = image.load = None  # type: ignore[assignment]
    codec.check_request(DiffusionRequest("a", image=image, latents=torch.empty(1)))
    with pytest.raises(InvalidRequest, match="callback"):
        codec.check_request(DiffusionRequest("a", callback=print))


def test_frames_that_nobody_refers_to_are_damage() -> None:
    with pytest.raises(ProtocolError, match="2 payload frames and refers to 1"):
        codec.decode([*codec.encode(torch.zeros(1)), b"more"], Any)


def test_no_size_is_believed() -> None:
    """A damaged size must not allocate what it says."""
    for value in (torch.zeros(3), np.zeros(3), PIL.Image.new("L", (3, 1))):
        header, payload = codec.encode(value)
        huge = (
            bytes(header)
            .replace(b"\x91\x03", b"\x91\xcf" + (2**40).to_bytes(8))
            .replace(b"\x92\x03\x01", b"\x92\xcd\xff\xff\x01")
        )
        assert huge != bytes(header)
        with pytest.raises(ProtocolError):
            codec.decode([huge, payload], Any)


def test_nothing_heavy_is_imported() -> None:
    script = "import sys, steploom.codec as c; c.encode([1, (2,), {'a': b'b'}]); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "PIL", "diffusers", "pickle", "asyncio", "zmq"} & set(modules)


def test_floats_keep_their_bits() -> None:
    assert math.copysign(1, travel(-0.0)) == -1
    assert math.isnan(travel(math.nan))
