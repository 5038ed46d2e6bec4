"""Which way a call of a shared transformer takes, and what is refused: without ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steploom.config import EngineConfig
from steploom.errors import ConfigError, EngineError
from steploom.worker.ranks.parallel import Sharing, around, refuse, share

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Model(SimpleNamespace):
    pass


def model(heads: int = 4, **plans: Any) -> Any:
    return Model(config=SimpleNamespace(num_attention_heads=heads), **plans)


@pytest.mark.parametrize(
    ("settings", "device", "one", "said"),
    [
        ({"ulysses_degree": 2}, CPU, model(), "Model .pipe.transformer. has no _cp_plan"),
        ({"tensor_parallel_size": 2}, GPU, model(_cp_plan={}), "has no _tp_plan"),
        ({"ring_degree": 2}, CPU, model(_cp_plan={}), "GPUs only.*use ulysses_degree"),
        ({"tensor_parallel_size": 2}, torch.device("mps"), model(_tp_plan={}), "GPUs only.*use CUDA"),
        ({"ulysses_degree": 2}, CPU, model(3, _cp_plan={}), "3 attention heads"),
        ({"ulysses_degree": 2, "ring_degree": 2}, GPU, model(3, _cp_plan={}), "3 attention heads"),
        ({"tensor_parallel_size": 3}, GPU, model(_tp_plan={}), "4 attention heads"),
        ({"ulysses_degree": 2}, CPU, None, "has no denoiser"),
    ],
)
def test_what_ranks_cannot_share_is_refused(settings: Any, device: torch.device, one: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse(EngineConfig(**settings), device, {} if one is None else {"transformer": one}, "pipe")


def test_what_ranks_can_share_is_not() -> None:
    for settings, device, one in (
        ({"ulysses_degree": 2}, CPU, model(_cp_plan={})),
        ({"ulysses_degree": 2}, GPU, model(3, _cp_plan={})),
        ({"ring_degree": 2}, GPU, model(3, _cp_plan={})),
        ({"tensor_parallel_size": 2}, GPU, model(_tp_plan={})),
    ):
        refuse(EngineConfig(**settings), device, {"transformer": one}, "pipe")


def run_with(unevenly: str | None, lengths: list[int]) -> tuple[list[Any], SimpleNamespace]:
    """What calls of such lengths came to: how they were shared, or what they raised."""
    config = SimpleNamespace(ulysses_anything=False)

    def shared(length: int) -> Any:
        if length < 0:
            raise AssertionError("the model's own")
        assert config.ulysses_anything or length % 2 == 0, "must be divisible by mesh size"
        return "unevenly" if config.ulysses_anything else "evenly"

    sharing = Sharing(config, lambda length: "whole", unevenly)
    call = around(SimpleNamespace(_steploom_sharing=sharing), shared)
    return [call(length) for length in lengths], config


def test_only_uneven_lengths_are_shared_unevenly() -> None:
    outcomes, config = run_with("ulysses_anything", [4, 3, 4])
    assert outcomes == ["evenly", "unevenly", "evenly"]
    assert config.ulysses_anything is False


def test_what_cannot_be_shared_at_all_is_computed_by_each() -> None:
    assert run_with(None, [4, 3, 4])[0] == ["evenly", "whole", "evenly"]


def test_a_models_own_assertion_is_its_own() -> None:
    with pytest.raises(AssertionError, match="own"):
        run_with(None, [-1])


def test_a_model_that_shares_nothing_is_called_as_it_is() -> None:
    assert around(SimpleNamespace(), len) is len


class Lonely:
    """A rank whose other one never comes to where torch's processes meet."""

    index, size = 0, 2

    def __init__(self, store: str) -> None:
        self.store = store

    def meet(self) -> None:
        pass


def test_ranks_that_do_not_come_are_waited_for_as_long_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    lonely: Any = Lonely(str(tmp_path / "store"))
    with pytest.raises(EngineError, match=r"ranks_meet_timeout_s=0\.2: the ranks have not found each other"):
        share(EngineConfig(ulysses_degree=2, ranks_meet_timeout_s=0.2), lonely, CPU, {})
