"""Workers of several ranks: which settings go together, and which devices they take."""

from __future__ import annotations

from typing import Any

import pytest

from steploom.config import EngineConfig, keep_to_this_machine
from steploom.errors import ConfigError
from steploom.worker.messages import Configure
from steploom.worker.ranks.group import shifted


def test_ranks_are_what_the_degrees_multiply_to() -> None:
    assert EngineConfig().ranks == 1
    assert EngineConfig(ulysses_degree=2, ring_degree=3).ranks == 6
    assert EngineConfig(tensor_parallel_size=4).ranks == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ulysses_degree": 0}, "ulysses_degree=0"),
        ({"ulysses_degree": 2, "tensor_parallel_size": 2}, "ulysses_degree=2, tensor_parallel_size=2.*leave one"),
        ({"ulysses_degree": 2, "distributed_executor_backend": "inproc"}, "ulysses_degree=2 with .*use 'mp'"),
        ({"ring_degree": 2, "distributed_executor_backend": "ray"}, "ring_degree=2 with .*use 'mp'"),
        ({"ulysses_degree": 2, "aside": "auto"}, "aside='auto'.*leave it 'off'"),
        ({"ulysses_degree": 2, "compile": True}, "compile=True"),
        ({"tensor_parallel_size": 2, "cuda_graphs": True}, "cuda_graphs=True"),
        ({"ulysses_degree": 2, "group_offload": "leaf_level"}, "group_offload='leaf_level'"),
        ({"ulysses_degree": 2, "loras": {"ink": "./ink"}}, "loras="),
        ({"tensor_parallel_size": 2, "quantization_config": {"quant_backend": "x"}}, "quantization_config"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**settings)


def test_each_rank_has_the_next_device_and_each_worker_the_next_ranks() -> None:
    assert [shifted("auto", i) for i in (1, 2)] == ["auto:1", "auto:2"]
    assert shifted("cuda:2", 1) == "cuda:3"
    assert shifted("cpu", 1) == "cpu"
    config = EngineConfig(ulysses_degree=2, data_parallel_size=2)
    assert Configure.of(config, 0).config["device"] == "auto"
    assert Configure.of(config, 1).config["device"] == "auto:2"


def test_ranks_are_heard_on_this_machine_alone_unless_the_user_says_where() -> None:
    nowhere: dict[str, str] = {}
    keep_to_this_machine(nowhere)
    assert set(nowhere) == {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert set(nowhere.values()) in ({"lo"}, {"lo0"})
    chosen = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth2"}
    keep_to_this_machine(chosen)
    assert chosen == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth2"}
