"""Ascending, against a sorted list."""

from hypothesis import given
from hypothesis import strategies as st

from steploom.sched.ascending import Ascending

Steps = st.lists(st.one_of(st.integers(-20, 20), st.sampled_from(["drop", "keep"])))


@given(Steps)
def test_the_least_is_first_whatever_order_they_come_in(steps: list[int | str]) -> None:
    queue: Ascending[tuple[int, int]] = Ascending()
    model: list[tuple[int, int]] = []
    for came, step in enumerate(steps):
        if isinstance(step, int):
            queue.push((step, came))
            model = sorted([*model, (step, came)])
        elif step == "drop" and model:
            queue.drop()
            del model[0]
        elif step == "keep":
            queue.keep(lambda entry: entry[0] % 3 == 0)
            model = [entry for entry in model if entry[0] % 3 == 0]
        assert len(queue) == len(model)
        assert queue.first() == (model[0] if model else None)
