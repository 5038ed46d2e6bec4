"""Compiled code under the hub: counted, told, bounded, and at worst left out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from steploom.weave.modules.compiled import Compilation, is_compiled
from steploom.weave.modules.shared import SharedModule, clone_tree, isolate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """Two repeated blocks, and processors as diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def set_attn_processor(self, processor: Any) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3:
            raise ValueError("three dimensions, please")
        for block in self.blocks:
            x = block(x)
        return x


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("this compiler is out of order")


def model(backend: Any = "eager", **arguments: Any) -> Model:
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = Model().eval()
    for block in made.blocks:
        block.compile(backend=backend, **{"dynamic": True, **arguments})
    return made


def inputs(rows: int, tokens: int = 9) -> torch.Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_few_compilations_serve_all_rows_and_sizes_and_each_is_told():
    lines: list[str] = []
    own = model()
    plain = clone_tree(own)
    compilation = Compilation(lines.append, 8)
    run = compilation.around("transformer", own)
    for rows in (*range(1, 17), 3, 1):
        assert torch.allclose(run(inputs(rows)), plain(inputs(rows)), atol=1e-6)
    assert torch.allclose(run(inputs(4, 13)), plain(inputs(4, 13)), atol=1e-6)
    assert 1 <= compilation.count <= 3
    assert len(lines) == compilation.count
    assert lines[0] == "compiling transformer, compilation 1 of at most 8"
    assert 0 < compilation.seconds < 300
    assert compilation.uncompiled is None


class Timed(nn.Module):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x * timestep[:, None]


@pytest.mark.parametrize("rows", [1, 4])
def test_an_expanded_timestep_needs_no_code_of_its_own(rows: int):
    torch._dynamo.reset()
    compilation = Compilation(limit=8)
    run = compilation.around("transformer", torch.compile(Timed(), backend="eager", dynamic=True))
    x, t = torch.ones(rows, 3), torch.tensor(2.0)
    first = run(x, t.expand(rows))
    assert torch.equal(first, run(x, timestep=torch.full((rows,), 2.0)))
    assert torch.equal(first, 2 * x)
    assert torch.equal(first, run(x, timestep=t.expand(rows)))
    assert compilation.count == 1


def test_past_its_limit_nothing_is_compiled_and_all_is_right(caplog: pytest.LogCaptureFixture):
    lines: list[str] = []
    own = model(dynamic=False)
    plain = clone_tree(own)
    compilation = Compilation(lines.append, 2)
    run = compilation.around("transformer", own)
    with caplog.at_level(logging.WARNING):
        for rows in (2, 3, 4, 5, 3, 6):
            assert torch.allclose(run(inputs(rows)), plain(inputs(rows)), atol=1e-6)
    assert compilation.count == 2
    assert compilation.uncompiled is not None
    assert "max_compilations=2" in compilation.uncompiled
    assert caplog.text.count("runs uncompiled") == 1
    assert lines[-1] == compilation.uncompiled


def test_what_cannot_be_compiled_runs_uncompiled(caplog: pytest.LogCaptureFixture):
    own = model(failing)
    plain = clone_tree(own)
    compilation = Compilation(limit=8)
    run = compilation.around("transformer", own)
    with caplog.at_level(logging.WARNING):
        for rows in (2, 3):
            assert torch.equal(run(inputs(rows)), plain(inputs(rows)))
    assert "out of order" in str(compilation.uncompiled)
    assert caplog.text.count("could not be compiled") == 1


def test_a_fault_of_the_module_is_no_fault_of_the_compiler():
    compilation = Compilation(limit=8)
    run = compilation.around("transformer", model())
    with pytest.raises(ValueError, match="three dimensions"):
        run(torch.ones(2, 2))
    run(inputs(2))
    with pytest.raises(RuntimeError):
        run(torch.ones(2, 9, 5))  # within a block: compiled in vain
    assert compilation.uncompiled is None
    run(inputs(3))


def short_of_memory(graph: Any, inputs: Any) -> Any:
    def run(*args: Any) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    return run


def test_a_lack_of_memory_is_no_fault_of_the_compiler():
    compilation = Compilation(limit=8)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        compilation.around("transformer", model(short_of_memory))(inputs(2))
    assert compilation.count
    assert compilation.uncompiled is None


def test_others_who_compile_are_not_counted():
    compilation = Compilation(limit=8)
    compilation.around("transformer", model())(inputs(2))
    before = compilation.count
    assert torch.compile(torch.sin, backend="eager")(torch.ones(3)).shape == (3,)
    assert compilation.count == before


def test_a_part_that_is_compiled_is_found_and_a_module_with_it_stays_as_it_is():
    own, plain = model(), Model()
    assert is_compiled(own)
    assert is_compiled(torch.compile(plain, backend="eager"))
    assert not is_compiled(plain)
    assert not is_compiled(None)
    assert isolate(own) is own
    assert isolate(plain) is not plain
    assert not is_compiled(clone_tree(own)), "hooks and processors that a program sets are not seen by compiled code"


def test_a_target_runs_through_what_is_put_around_it():
    shared = SharedModule("transformer", model())
    compilation = Compilation(limit=8)
    shared.targets["forward"].wrap(compilation.around)
    assert shared.targets["forward"].invoke(inputs(2)).shape == (2, 9, 6)
    assert compilation.count
