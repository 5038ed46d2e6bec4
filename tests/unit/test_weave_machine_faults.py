"""What counts as a lack of memory, and what of a failed forward is freed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from steploom.weave import machine_faults
from steploom.weave.machine_faults import is_of_machine, is_out_of_memory, make_room

SAID = [
    torch.OutOfMemoryError("Tried to allocate"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 2 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 5 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: 5 bytes"),
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
]

OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ValueError("prompt='out of memory': not allowed"),
    OSError(2, "No such file or directory"),
]


@pytest.mark.parametrize("fault", SAID, ids=lambda fault: f"{type(fault).__name__} {str(fault)[:30]}")
def test_a_lack_of_memory_is_known_by_its_type_or_its_words(fault: Exception) -> None:
    assert is_out_of_memory(fault)


@pytest.mark.parametrize("fault", OTHERS, ids=lambda fault: f"{type(fault).__name__} {str(fault)[:30]}")
def test_other_faults_are_none(fault: Exception) -> None:
    assert not is_out_of_memory(fault)


@pytest.mark.parametrize(
    ("fault", "is_one"),
    [
        *((fault, True) for fault in SAID),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
        (AssertionError("Torch not compiled with CUDA enabled"), True),
        (RuntimeError("HIP error: invalid device function"), True),
        (ValueError("prompt='a rose hip': not allowed"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("`height` has to be divisible by 8"), False),
    ],
)
def test_faults_of_the_machine(fault: Exception, is_one: bool) -> None:
    assert is_of_machine(fault) is is_one


class Forward:
    """Fails with a tensor in hand, after something else has failed with another one."""

    def __init__(self, fault: Exception) -> None:
        self.held: list[weakref.ref[torch.Tensor]] = []
        try:
            self._run(fault)
        except RuntimeError as raised:
            self.fault = raised

    def _run(self, fault: Exception) -> Any:
        try:
            self._hold(RuntimeError("first"))
        except RuntimeError:
            self._hold(fault)

    def _hold(self, fault: Exception) -> None:
        activations = torch.zeros(10)
        self.held.append(weakref.ref(activations))
        raise fault


def test_what_a_forward_held_that_ran_out_of_memory_is_freed() -> None:
    forward = Forward(torch.OutOfMemoryError("out of memory"))
    assert all(held() is not None for held in forward.held)
    make_room(forward.fault)
    assert [held() for held in forward.held] == [None, None]
    assert forward.fault.__traceback__ is not None, "its lines are told all the same"


def test_what_others_held_stays() -> None:
    forward = Forward(RuntimeError("another fault"))
    make_room(forward.fault)
    assert all(held() is not None for held in forward.held)


def test_all_objects_are_looked_through_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time no other thread runs for tenths of a second; the young ones take no time."""
    now, looked_at = 100.0, list[int]()
    monkeypatch.setattr(machine_faults.time, "monotonic", lambda: now)
    monkeypatch.setattr(machine_faults.gc, "collect", looked_at.append)
    monkeypatch.setattr(machine_faults, "_sweeps", machine_faults._Sweeps())
    for seconds in (0, 0, 9.9, 0.2, 1):
        now += seconds
        make_room(MemoryError())
    assert looked_at == [2, 1, 1, 2, 1]
