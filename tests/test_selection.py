"""Which events an artifact gets when there are too many: the ones it can least do without."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from stories import KINDS, chat, context, event, ticket
from test_extractive import junk

from tasks.context import Event, fold
from tasks.selection import HUB, THREAD_MAX, choose, ranked_threads


def newest_first(*events: Event) -> tuple[Event, ...]:
    return context("handoff", *events).events


def titles(kind: str, *events: Event, limit: int, **options: Any) -> set[str]:
    chosen = choose(kind, options, newest_first(*events), limit)
    return {member.event.title for thread in chosen for member in thread.members}


WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
PLAIN = [event(f"Change {word} {n}", hour=40 + n) for n in range(8) for word in WORDS]


@pytest.mark.parametrize("kind", KINDS)
def test_all_events_are_in_one_thread_each_whatever_they_say(kind: str) -> None:
    for seed in range(8):
        events = fold(junk(seed))
        threads = ranked_threads(kind, {"focusArea": "auth"}, events)
        members = [member.event for thread in threads for member in thread.members]
        assert Counter(event.ids for event in members) == Counter(event.ids for event in events)
        assert threads == ranked_threads(kind, {"focusArea": "auth"}, events)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_chosen_is_bounded_with_its_duplicates(kind: str) -> None:
    rng = random.Random(kind)
    deploys = [event("Deploy", hour=n) for n in range(30)]
    events = newest_first(*PLAIN, *deploys, *(chat(f"Talk about {n}", hour=n) for n in range(30)))
    for limit in (1, 5, rng.randrange(6, 130)):
        chosen = choose(kind, {}, events, limit)
        ids = [id for thread in chosen for member in thread.members for id in member.event.ids]
        assert len(ids) == len(set(ids)) == limit
        assert all(thread.members for thread in chosen)
    assert choose(kind, {}, events, 1_000) == ranked_threads(kind, {}, events)


def test_a_rare_source_is_heard_in_every_artifact() -> None:
    rare = [ticket("Login fails", hour=1), chat("See the plan", hour=2)]
    for kind in KINDS:
        assert titles(kind, *PLAIN, *rare, limit=10) >= {"Login fails", "See the plan"}


def test_a_handoff_prefers_what_presses_what_was_decided_and_what_is_new() -> None:
    old = [
        ticket("Payments fail", hour=1, priority="urgent"),
        event("Drop the cache", "We decided to do without.", hour=2),
        event("Change the oldest thing", hour=3),
    ]
    found = titles("handoff", *old, *PLAIN, limit=40)
    assert {"Payments fail", "Drop the cache"} <= found and "Change the oldest thing" not in found
    newest = {event.title for event in PLAIN[-10:]}
    assert len(found & newest) > 8


def test_trifles_come_last() -> None:
    bumps = [event(f"Bump ruff from 1.{n} to 1.{n + 1}", hour=200 + n) for n in range(30)]
    bots = [event(f"Sync {word}", hour=300, author="renovate[bot]") for word in WORDS]
    kept = titles("handoff", *bumps, *bots, *PLAIN, limit=len(PLAIN))
    assert kept == {event.title for event in PLAIN}


def test_an_architecture_insight_prefers_changes_of_the_structure() -> None:
    moved = event("Split the worker into a package", hour=1)
    schema = event("Let jobs have a priority", hour=2, files=["db/schema.sql"])
    assert titles("architecture_insight", moved, schema, *PLAIN, limit=8) >= {
        moved.title,
        schema.title,
    }


def test_what_was_asked_about_comes_first() -> None:
    asked = event("Keep tokens in Redis", hour=1, files=["app/auth/store.py"])
    for kind, options in (
        ("onboarding_brief", {"focusArea": "auth"}),
        ("architecture_insight", {"focusQuestion": "How do we keep tokens?"}),
    ):
        assert asked.title in titles(kind, asked, *PLAIN, limit=3, **options)
        assert asked.title not in titles(kind, asked, *PLAIN, limit=3)


def test_a_correlation_prefers_threads_that_cross_sources() -> None:
    thread = [
        ticket("Login fails", hour=1, external_id="ENG-42"),
        chat("ENG-42 again", hour=2),
        event("Keep the session", "Closes ENG-42", hour=3),
    ]
    others = [chat(f"Talk about {word} {n}", hour=n) for n in range(5) for word in WORDS]
    found = titles("cross_source_correlation", *thread, *others, *PLAIN, limit=8)
    assert found >= {event.title for event in thread}


@pytest.mark.parametrize(
    "events",
    [
        [event("Keep it (#7)"), event("Merge pull request #7 from ada/x", hour=1)],
        [event("Keep it", branch="ada/login"), event("Test it", branch="ada/login", hour=1)],
        [
            event("Keep it", branch="login"),
            event("Login", hour=1, more={"pull_request": 7, "merged_branch": "login"}),
        ],
        [chat("Why?", more={"thread_ts": "1.2"}), chat("So.", hour=1, more={"thread_ts": "1.2"})],
        [ticket("Login fails", external_id="ENG-42"), event("Work", branch="ada/eng-42-login")],
    ],
)
def test_events_that_name_each_other_are_one_thread(events: list[Event]) -> None:
    found = ranked_threads("handoff", {}, newest_first(*events, event("Else", hour=2)))
    assert sorted(len(thread.members) for thread in found) == [1, 2]
    assert {member.event.title for thread in found if thread.keys for member in thread.members} == {
        event.title for event in events
    }


def test_a_reference_that_everybody_uses_and_an_endless_chain_tie_no_giant_thread() -> None:
    hub = [event(f"Change {n} for ENG-1", hour=n) for n in range(HUB + 1)]
    assert all(len(t.members) == 1 for t in ranked_threads("handoff", {}, newest_first(*hub)))
    chain = [event(f"After ENG-{n} comes ENG-{n + 1}", hour=n) for n in range(1, 200)]
    sizes = [len(t.members) for t in ranked_threads("handoff", {}, newest_first(*chain))]
    assert 1 < max(sizes) <= THREAD_MAX


def test_a_trunk_is_no_thread() -> None:
    events = [replace(event, branch="main") for event in PLAIN[:5]]
    assert len(ranked_threads("handoff", {}, newest_first(*events))) == 5
