"""What a policy remembers of its groups is what it would find if it asked anew."""

from __future__ import annotations

from typing import Any


def check_remembered(policy: Any) -> None:
    """Seconds of a tick, the best class, the order by deadline and who is too late, of all groups."""
    for group in policy._groups.active.values():
        seconds, version, order, priority = group.seconds, group.version, group.order, group.priority
        assert priority == min([state.priority for state in group.residents.values()] + lines(group))
        if order is not None:
            states = [state for run, state in group.residents.items() if run not in group.paused]
            states = states or list(group.residents.values())
            assert order == sorted(states, key=lambda state: state.deadline)
        group.version = -1
        assert policy._tick_s(group) == seconds or version != policy.demands.version
        now, seconds = policy.clock(), policy._tick_s(group)
        lost = group.watch.lost(policy, group.residents, now, seconds, policy.demands.version)
        assert lost == {state for state in group.residents.values() if policy.lost(state, now, seconds)}


def lines(group: Any) -> list[int]:
    """The class that is next, if anybody waits."""
    return [group.line.priority] if len(group.line) else []
