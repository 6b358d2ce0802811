"""How long a job waits after a provider error, and how outcomes travel between processes."""

import pytest

from tasks.outcomes import (
    RETRY_AFTER_LONGEST,
    Failed,
    GenerationFailed,
    NoResult,
    Retry,
    from_json,
    to_json,
)


def test_the_wait_doubles_with_each_failure_and_is_jittered() -> None:
    for failures, middle in ((1, 2), (2, 4), (3, 8), (4, 16), (10, 60)):
        delays = [Retry("busy").delay(failures) for _ in range(200)]
        assert middle * 0.5 <= min(delays) < max(delays) <= middle * 1.5
        assert len(set(delays)) > 100


def test_the_wait_is_never_shorter_than_the_provider_asked_for() -> None:
    assert all(Retry("busy", after=100).delay(1) == 100 for _ in range(20))


def test_a_provider_cannot_ask_for_more_than_an_hour() -> None:
    assert Retry("busy", after=1e9).delay(1) == RETRY_AFTER_LONGEST


@pytest.mark.parametrize(
    "outcome",
    [
        Retry("Busy.", code="timeout", after=3.0, meta={"provider_status": 429}),
        NoResult("Nothing.", stage="context"),
        GenerationFailed("Broken."),
    ],
)
def test_an_outcome_survives_the_way_between_two_processes(outcome: Retry | Failed) -> None:
    arrived = from_json(to_json(outcome))
    assert type(arrived) is type(outcome)
    assert vars(arrived) == vars(outcome)
