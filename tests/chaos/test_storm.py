"""A storm of accidents over a real pipeline in real processes; ``nox -s chaos`` has one of nine minutes."""

import os
import random

import pytest
from storm import HANG_S, SIGNS, storm
from storm_wire import AGAIN

SECONDS = float(os.environ.get("STORM_SECONDS", "0"))
"""For how long it goes on once each accident has happened in its turn."""
SEED = int(os.environ.get("STORM_SEED", random.randrange(10**6)))


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.timeout(SECONDS + (len(SIGNS) + 3) * HANG_S)
async def test_each_request_has_one_outcome_and_nothing_is_left() -> None:
    found = await storm(SECONDS, SEED)
    print(f"STORM_SEED={SEED}: {dict(found.seen)}; accidents: {dict(found.met)}")
    assert not found.wrong, f"STORM_SEED={SEED}: {found.wrong}"
    assert set(found.met) == set(SIGNS)
    assert found.seen[AGAIN]
