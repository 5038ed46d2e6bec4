"""A storm of accidents over a real pipeline in real processes; ``nox -s chaos`` has one of nine minutes."""

import os
import random

import pytest
from storm import storm

SECONDS = float(os.environ.get("STORM_SECONDS", "25"))
SEED = int(os.environ.get("STORM_SEED", random.randrange(10**6)))


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.timeout(SECONDS + 300)
async def test_each_request_has_one_outcome_and_nothing_is_left() -> None:
    found, faults = await storm(SECONDS, SEED)
    print(f"STORM_SEED={SEED}: {dict(found.outcomes)}; workers lost: {dict(faults)}")
    assert not found.wrong, f"STORM_SEED={SEED}: {found.wrong}"
    assert found.outcomes["done"] > SECONDS
    assert found.outcomes["left"], "clients have left"
    assert faults, "workers were lost"
