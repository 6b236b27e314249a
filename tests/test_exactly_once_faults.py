"""The kills of test_exactly_once, twenty times at each point: minutes on a real broker."""

import crashing
import pytest
from crashing import POINTS
from test_exactly_once import crash, instance, kill_and_retry

pytestmark = pytest.mark.faults
__all__ = ["crash", "instance"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("attempt", range(20))
def test_killed_twenty_times(attempt, point, instance, crash, kafka_bootstrap_servers):
    kill_and_retry(crashing.crashing_job, "crashing", point, instance, crash, kafka_bootstrap_servers)
