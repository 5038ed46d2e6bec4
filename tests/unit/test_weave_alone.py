"""Why a call runs alone is told by the arguments that keep it apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steploom.weave.axes import Axes
from steploom.weave.batching.merge_keys import Contents
from steploom.weave.batching.unlike import ONLY_ONE, OWN_OBJECT, UNLIKE, why_alone
from steploom.weave.calls import ModuleCall
from steploom.weave.ragged.text import RaggedText

IDS = torch.arange(4)
AXES = Axes((0, None, 0), (0,))


class Module:
    """Stands for a shared module."""

    def __init__(self, key: str = "own", ragged: Any = None) -> None:
        self.name, self.key, self.method, self.module = "transformer", key, "forward", self
        self.group, self.ragged, self.language, self.adapted = key, ragged, None, None


def call(target: Any = None, text: int = 5, **changes: Any) -> ModuleCall:
    arguments = {"ids": IDS, "text": torch.ones(1, text, 4), "scale": 1.0, **changes}
    return ModuleCall(target or Module(), (torch.ones(1, 2),), arguments)


def why(one: ModuleCall, *mates: ModuleCall, axes: Axes = AXES) -> str:
    return why_alone(one, mates, axes, Contents().token)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text": 9}, "text has another size"),
        ({"scale": 2.0}, "scale has another value"),
        ({"scale": None}, "scale is given to one only"),
        ({"extra": 1}, "extra is given to one only"),
        ({"ids": IDS + 1}, "ids differs, and all rows share it"),
        ({"text": 9, "scale": 2.0}, "text has another size; scale has another value"),
        ({"target": Module("other")}, "the module has processors, adapters or a dtype of its own"),
    ],
    ids=["size", "value", "given", "extra", "shared", "two", "module"],
)
def test_the_argument_is_named(changes: dict[str, Any], told: str) -> None:
    assert why(call(), call(**changes)) == f"{UNLIKE}: {told}"


def test_what_may_differ_between_rows_is_not_named() -> None:
    other = ModuleCall(Module(), (torch.zeros(3, 2),), {"ids": IDS.clone(), "text": torch.zeros(3, 5, 4), "scale": 1.0})
    assert why(call(), other) == UNLIKE


def test_positional_arguments_are_counted() -> None:
    other = ModuleCall(Module(), (torch.ones(1, 3),), call().arguments[1])
    assert why(call(), other) == f"{UNLIKE}: argument 1 has another size"


def test_the_likest_mate_is_told_of() -> None:
    assert why(call(), call(text=9, scale=2.0, ids=IDS + 1), call(scale=2.0)) == f"{UNLIKE}: scale has another value"


def test_text_that_would_be_padded_is_not_named() -> None:
    target = Module(ragged=RaggedText("text", "mask"))
    mask = {"mask": torch.ones(1, 9)}
    assert why(call(target), call(target, text=9, scale=2.0, **mask)) == f"{UNLIKE}: scale has another value"


def test_lists_with_an_entry_per_row_are_not_named_where_the_entries_are_one() -> None:
    axes = Axes((0, None, 0), (0,), listed=frozenset({(1, 3)}))
    one, two, other = (call(sizes=sizes) for sizes in ([(1, 2)], [(1, 2), (1, 2)], [(2, 1)]))
    assert why(one, two, axes=axes) == UNLIKE
    assert why(one, other, axes=axes) == f"{UNLIKE}: sizes has another value"
    assert why(one, two) == f"{UNLIKE}: sizes has another value"


def test_shared_entries_of_lists_are_compared() -> None:
    axes = Axes((0, None, 0, (None,)), (0,))
    one, other = call(tables=[torch.ones(3)]), call(tables=[torch.zeros(3)])
    assert why(one, other, axes=axes) == f"{UNLIKE}: tables differs, and all rows share it"


def test_nobody_there_and_objects_of_their_own() -> None:
    assert why(call()) == ONLY_ONE
    assert why(call(cache=object()), call(cache=object())) == OWN_OBJECT


def test_what_cannot_be_compared_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: torch.Tensor) -> str:
        raise RuntimeError("no contents")

    with caplog.at_level("INFO"):
        assert why_alone(call(), [call(ids=IDS.clone())], AXES, broken) == UNLIKE
    assert "no contents" in caplog.text
