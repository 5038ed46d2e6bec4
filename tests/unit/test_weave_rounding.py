"""A mixture of experts rounds otherwise in any other company, which is no crosstalk; crosstalk beneath it is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear, silu

from steploom.weave.axes import Axes
from steploom.weave.batching.fixed import sized_by_values
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall
from steploom.weave.verifying.differences import LOOSE, far_apart, largest_difference
from steploom.weave.verifying.precision import NotExact, compute_dtype, exactly, rounded_otherwise
from steploom.weave.verifying.verify import check

WIDTH, EXPERTS, TOKENS, REQUESTS = 32, 16, 12, 3
Leak = Callable[[torch.Tensor], torch.Tensor]


class Target:
    """Stands for a shared module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = self.invoke = module
        self.name, self.key, self.method = "transformer", "own", "forward"
        self.group, self.ragged, self.language, self.adapted = "own", None, None, None


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Summed in an order that goes by the number of rows, as kernels do, each on its own processor."""
    if len(rows) % 2:
        return linear(rows, weight)
    return linear(rows[:, ::2], weight[:, ::2]) + linear(rows[:, 1::2], weight[:, 1::2])


class Experts(nn.Module):
    """A layer of routed experts, each a product of as many rows as it has tokens."""

    def __init__(self, apart: float = 1.0) -> None:
        super().__init__()
        gate = torch.randn(EXPERTS, WIDTH)
        gate[1::2] = gate[::2] + apart * gate[1::2]  # in pairs, of which one may hardly be preferred to the other
        self.gate = nn.Parameter(gate)
        self.up = nn.Parameter(torch.randn(EXPERTS, 4 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 4 * WIDTH) / (4 * WIDTH) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = linear(tokens, self.gate).softmax(-1, dtype=torch.float32).topk(1, -1)
        out = torch.zeros_like(tokens)
        for i in range(EXPERTS):
            places, rank = (chosen == i).nonzero(as_tuple=True)
            mine = product(silu(product(tokens[places], self.up[i])), self.down[i])
            out.index_add_(0, places, (mine * (0.5 + weights[places, rank, None])).to(out.dtype))
        return x + out.view_as(x)


def none(x: torch.Tensor) -> torch.Tensor:
    return x


class Model(nn.Module):
    """Two layers of experts, and a leak between them."""

    def __init__(self, leak: Leak = none, *, apart: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = Experts(), Experts(apart)
        self.leak = leak

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.layer_norm(self.first(x), (WIDTH,))
        return self.second(self.leak(hidden)).float()


def merged_call(model: nn.Module, seed: int = 0, tokens: int = TOKENS) -> MergedCall:
    noise = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    target: Any = Target(model.requires_grad_(False))
    inputs = [torch.randn(1, tokens, WIDTH, generator=noise).to(dtype) for _ in range(REQUESTS)]
    return MergedCall([ModuleCall(target, (x,), {}) for x in inputs], Axes((0,), (0,)))


def verdict(model: nn.Module, seed: int = 0, tokens: int = TOKENS) -> str | None:
    merged = merged_call(model, seed, tokens)
    return check(merged, merged.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_experts_may_round_otherwise(dtype: torch.dtype) -> None:
    assert [verdict(Model(seed=seed).to(dtype), seed) for seed in range(6)] == [None] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_may_go_to_the_other_expert(dtype: torch.dtype) -> None:
    """Where experts are equal but for the last bits, rounding decides, and a token's result is another one."""
    flipped = 0
    for seed in range(2):
        model = Model(apart=torch.finfo(dtype).eps, seed=seed).to(dtype)
        merged = merged_call(model, seed, tokens=64)
        results = merged.run()
        flipped += largest_difference(merged.calls[0].run(), results[0]) > 0.3
        assert check(merged, results) is None
    assert flipped, "no token went elsewhere: this shows nothing"


def adds_the_mean(share: float) -> Leak:
    return lambda x: x + share * x.mean(0, keepdim=True)


def adds_one_number(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-6 * x.abs().mean()


def adds_the_largest(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-6 * x.amax(0, keepdim=True)


def adds_to_one_place(x: torch.Tensor) -> torch.Tensor:
    leak = torch.zeros_like(x)
    leak[:, 0, 0] = 1e-6 * x[:, 0, 0].sum()
    return x + leak


def normalizes_over_the_batch(x: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, nn.functional.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2), 1e-5)


def quantizes_with_one_scale(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax() / 127
    return (x / scale).round().to(torch.int8).to(x.dtype) * scale


def softmax_over_the_batch(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-5 * x.softmax(0)


def neighbours(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-6 * x.roll(1, 0)


class Dense(nn.Module):
    """The same product for all tokens."""

    def __init__(self, wide: nn.Module) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x).relu() + x


class Grouped(nn.Module):
    """Experts as one product of groups of rows, whose sizes nobody sees from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, WIDTH, WIDTH, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        order = (tokens[:, 0] > 0).int().argsort()
        ends = torch.stack([(tokens[:, 0] <= 0).sum(), torch.tensor(len(tokens))]).int()
        return grouped_mm(tokens[order], self.weights, offs=ends)[order.argsort()].view_as(x)


@pytest.mark.parametrize(
    ("build", "found"),
    [(Model, True), (Grouped, True), (lambda: Dense(nn.Linear(WIDTH, WIDTH)), False)],
    ids=["routed", "grouped", "dense"],
)
def test_sizes_that_go_by_what_rows_hold_are_found(build: Callable[[], nn.Module], found: bool) -> None:
    torch.manual_seed(0)
    own = merged_call(build()).calls[0]
    faults: list[Exception] = []
    assert sized_by_values(MergedCall([own] * REQUESTS, Axes((0,), (0,))), faults.append) is found
    assert not faults


LEAKS = {
    "1e-5 of the mean": adds_the_mean(1e-5), "1e-6 of the mean": adds_the_mean(1e-6),
    "one number": adds_one_number, "the largest": adds_the_largest, "one place": adds_to_one_place,
    "batch norm": normalizes_over_the_batch, "one int8 scale": quantizes_with_one_scale,
    "softmax": softmax_over_the_batch, "neighbours": neighbours,
}  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_leak_beneath_rounding_is_found(leak: Leak) -> None:
    """After a norm, so that it would not grow with the mates' values."""
    reasons = [verdict(Model(leak, seed=seed), seed) for seed in range(3)]
    assert all(reason is not None and ("mates" in reason or "differs" in reason) for reason in reasons), reasons


@pytest.mark.parametrize("leak", [adds_the_mean(1e-2), lambda x: x + 0.1 * x.softmax(0), quantizes_with_one_scale])
def test_a_leak_in_half_precision_is_found(leak: Leak) -> None:
    assert verdict(Model(leak).to(torch.bfloat16)) is not None


def test_a_leak_that_float64_does_not_have_is_found() -> None:
    """A module may take another way in its own dtype."""

    def leak(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float64 else x + 1e-3 * x.mean(0, keepdim=True)

    assert verdict(Model(leak)) is not None


def test_what_does_not_run_in_float64_is_refused_with_the_reason() -> None:
    def leak(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("knows no float64")
        return x

    reason = verdict(Model(leak))
    assert reason is not None
    assert "does not run in float64: RuntimeError: knows no float64" in reason


class Remembers(nn.Module):
    """Keeps what it has computed, as models keep tables of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("table", torch.ones(3))
        self.kept: torch.Tensor | None = None
        self.by_length: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = self.table + 0 * x.sum()
        self.kept = self.by_length[len(x)] = x.float() * self.weight
        self.new = self.kept.bfloat16()
        return self.kept + self.table


def test_nothing_of_float64_stays() -> None:
    module = Remembers()
    module(torch.ones(3))
    before = [module.table, module.kept, module.by_length[3], module.new]
    del module.new
    with exactly(module):
        assert module(torch.ones(3)).dtype == torch.float64
        assert module.kept.dtype == module.new.dtype == torch.float64
    assert all(now is then for now, then in zip([module.table, module.kept, module.by_length[3]], before, strict=False))
    assert not hasattr(module, "new")
    assert module(torch.ones(3)).dtype == torch.float32


def test_weights_are_not_written_in_float64() -> None:
    weight = torch.ones(3)
    with pytest.raises(NotExact, match="writes"), exactly(None):
        weight.add_(1)
    with pytest.raises(NotExact, match="bits"), exactly(None):
        weight.view(torch.int32)
    assert torch.equal(weight, torch.ones(3))


def test_attention_and_groups_in_float64() -> None:
    noise = torch.Generator().manual_seed(0)
    q, mask = torch.randn(1, 2, 4, 8, generator=noise), torch.randn(4, 4, generator=noise)
    rows, weights = torch.randn(16, 16, generator=noise).bfloat16(), torch.randn(2, 16, 16, generator=noise).bfloat16()
    ends = torch.tensor([5, 16], dtype=torch.int32)
    with exactly(None):
        attended = torch.nn.functional.scaled_dot_product_attention(q.double(), q, q, attn_mask=mask)
        grouped = grouped_mm(rows, weights, offs=ends)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), q.double(), q.double(), attn_mask=mask.double()
    )
    assert torch.equal(attended, expected)
    by_hand = torch.cat([rows[:5].double() @ weights[0].double(), rows[5:].double() @ weights[1].double()])
    assert torch.allclose(grouped, by_hand, rtol=1e-14)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_in_float64(dims: int, transposed: bool) -> None:
    """They compare their bias with their input before anything is computed: SDXL's denoiser begins with one."""
    kind = getattr(nn, f"ConvTranspose{dims}d" if transposed else f"Conv{dims}d")
    module, x = kind(2, 3, 3).requires_grad_(False), torch.randn(1, 2, *[5] * dims)
    with exactly(module):
        wide = module(module(x)[:, :2])
    double = module.double()
    assert torch.allclose(wide, double(double(x.double())[:, :2]), rtol=1e-12)


def test_shaking_is_in_the_last_bits() -> None:
    model, x = Model().requires_grad_(False), torch.randn(1, TOKENS, WIDTH)
    with rounded_otherwise(0):
        shaken = model(x)
    assert 1e-7 < largest_difference(model(x), shaken) < 1e-4


def test_the_tolerance_goes_by_what_most_weights_are() -> None:
    """A model in bfloat16 hands out float32; one in float32 with a buffer in bfloat16 is as exact as any."""
    model = Model()
    model.register_buffer("places", torch.ones(99, dtype=torch.bfloat16))
    assert compute_dtype(model) == torch.float32
    model.to(torch.bfloat16)
    model.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(9))
    assert compute_dtype(model) == torch.bfloat16
    assert compute_dtype(nn.ReLU()) is None
    one = torch.ones(4)
    assert far_apart(one, one * 1.01, LOOSE, torch.bfloat16) is None
    assert far_apart(one, one * 1.01, LOOSE, torch.float32) is not None
    assert far_apart(one, one * 1.01, LOOSE, None) is not None
    assert far_apart(one.bfloat16(), one.bfloat16() * 1.01, LOOSE, torch.float32) is None
