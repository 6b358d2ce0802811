"""The short selection of the fault suite; `make chaos` runs all of it.

The scenarios run side by side once, and each test judges one of them: most of their time is spent
waiting for a lease to expire, and together they take as long as the longest.
"""

from collections.abc import Iterator

import pytest
from chaos.lab import Result
from chaos.runner import run, selected
from conftest import new_folder

SHORT = selected(None, short=True)

pytestmark = pytest.mark.timeout(150)  # the first test waits for all of them


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Result]]:
    """What became of the scenarios, by id."""
    with new_folder("baton-chaos-") as folder:
        folder.chmod(0o711)
        yield {result.scenario.id: result for result in run(SHORT, folder, lanes=len(SHORT))}


@pytest.mark.parametrize("id", [scenario.id for scenario in SHORT])
def test_nothing_is_lost_and_nothing_happens_twice(id: str, results: dict[str, Result]) -> None:
    assert results[id].verdict.examples == []
    assert results[id].accepted or results[id].skipped
