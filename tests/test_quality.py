"""The judge of `make quality`, and the built-in provider before it.

The sample is two releases of encode/httpx (BSD-3-Clause): the first lines and files of their
commits, and the changelog items that its maintainers wrote.
"""

from pathlib import Path

import pytest

from bench.quality.__main__ import BUILT_IN, KINDS, main, measured, table
from bench.quality.releases import load
from bench.quality.rule import assigned, matches, scores, supported
from bench.quality.ways import BASELINES, grouped
from tasks.calls import Calls
from tasks.context import Context
from tasks.outcomes import NoResult
from tasks.providers import Completion, Extractive, Provider

SAMPLE = Path(__file__).parent / "changelog_sample.jsonl"


@pytest.mark.parametrize(
    ("item", "human", "same"),
    [
        ("Keep the session (#12)", "Sessions survive a restart. (#12)", True),
        ("Keep the session (#12)", "Prices are per seat now. (#12)", False),
        ("Keep the session (#12)", "Sessions survive a restart. (#13)", False),
        ("Keep sessions, closes #13", "Sessions survive a restart. (12, 13)", True),
        ("Fix login redirects on Safari", "Redirects after login work on Safari", True),
        ("Fix login", "Fix logout", False),
        ("Add support for seats", "Add support for plans", False),  # "add support" proves nothing
        ("Validate login forms in Safari", "Validate login tokens of bots", False),
        ("Upgrade to Django 6.0", "Upgrade to Django 6.0", True),
    ],
)
def test_items_match_by_a_number_and_a_word_or_by_most_words(
    item: str, human: str, same: bool
) -> None:
    assert matches(item, human) == matches(human, item) == same


def test_one_item_covers_one_human_item_and_the_other_way_round() -> None:
    one, five = ["Login redirects on Safari (#1)"], ["Login redirects on Safari (#1)"] * 5
    assert assigned(one, five) == assigned(five, one) == 1
    assert (scores(one, five).recall, scores(five, one).precision) == (0.2, 0.2)
    assert scores(five, one).redundancy == 0.8


def test_the_assignment_is_the_largest_whatever_the_order() -> None:
    both, first = "Login redirects (#1), session cookies (#2)", "Login redirects (#1)"
    human = ["Redirects after login (#1)", "Cookies of sessions (#2)"]
    for items in ([both, first], [first, both]):
        assert assigned(items, human) == assigned(items, human[::-1]) == 2


def test_a_statement_is_grounded_in_events_that_exist_and_say_it() -> None:
    events = {"a": "Keep the session for a day", "b": "Charge per seat"}
    assert supported("Keep the session", ["a"], events)
    assert not supported("Keep the session", ["b"], events)
    assert not supported("Keep the session", ["a", "gone"], events)
    assert not supported("Keep the session", [], events)


def test_the_conventional_baseline_groups_by_type_and_leaves_chores_out() -> None:
    [release, *_] = load(SAMPLE)
    titles = ("fix(api): b", "chore: c", "Plain", "feat!: a", "ci: d")
    events = tuple(
        type(release.events[0])(
            id=title, source="github", event_type="commit", title=title,
            occurred_at=release.events[0].occurred_at,
        )
        for title in titles
    )  # fmt: skip
    made = type(release)(repo="a/b", version="1", events=events, human=())
    assert grouped(made, 0) == ["a", "(api) b", "Plain"]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_built_in_provider_beats_every_baseline_on_the_sample(kind: str) -> None:
    found = await measured(kind, load(SAMPLE), {BUILT_IN: Extractive()})
    ours = found[BUILT_IN]
    assert {way for way in BASELINES if found[way].f1 >= ours.f1} == set()
    assert ours.f1 > 0.7 and ours.grounding == 1
    assert BUILT_IN in table(kind, {"httpx": found})


class Mute:
    """A provider that never has anything to say."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        raise NoResult("Nothing.")


async def test_another_provider_is_measured_beside_the_built_in() -> None:
    providers: dict[str, Provider] = {BUILT_IN: Extractive(), "mute": Mute()}
    found = await measured("handoff", load(SAMPLE), providers)
    assert found["mute"].items == 0 and found["mute"].human == found[BUILT_IN].human == 16


def test_without_the_data_it_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"no data: {tmp_path} lacks httpx")
