"""Folding: one fact once, and no id is lost."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tasks.context import Event, fold

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


def event(id: str, **given: Any) -> Event:
    made: dict[str, Any] = {
        "source": "github",
        "event_type": "deploy",
        "title": "Deploy web",
        "content": "v1",
        "resource": "acme/web",
        "author": "ada",
        "occurred_at": NOON,
    }
    return Event(id=id, **made | given)


def test_events_that_say_the_same_fold_into_the_newest_and_leave_their_ids() -> None:
    times = [
        {"occurred_at": NOON - timedelta(minutes=n), "url": f"https://x/{n}"} for n in range(3)
    ]
    [kept] = fold([event("a", **times[0]), event("b", **times[1]), event("c", **times[2])])
    assert kept.id == "a" and kept.folded == ("b", "c") and kept.ids == ("a", "b", "c")
    assert (kept.occurred_at, kept.url) == (NOON, "https://x/0")


def test_what_was_folded_before_is_kept_when_folding_again() -> None:
    once = fold([event("a"), event("b")])
    [kept] = fold([event("z"), *once])
    assert kept.ids == ("z", "a", "b")
    assert fold(once) == once


@pytest.mark.parametrize(
    "other",
    [
        {"source": "gitlab"},
        {"resource": "acme/api"},
        {"resource": None},
        {"event_type": "rollback"},
        {"author": "bob"},
        {"title": "Deploy api"},
        {"content": "v2"},
        {"content": None},
    ],
)
def test_events_that_differ_in_what_they_say_stay_apart(other: dict[str, Any]) -> None:
    assert [e.ids for e in fold([event("a"), event("b", **other)])] == [("a",), ("b",)]


@pytest.mark.parametrize(
    "other",
    [
        {"title": "  deploy   WEB "},
        {"content": "V1\n"},
        {"branch": "main"},
        {"priority": "P1"},
        {"external_id": "7"},
        {"metadata": {"n": 1}},
    ],
)
def test_spaces_and_case_and_circumstances_make_no_difference(other: dict[str, Any]) -> None:
    assert [e.ids for e in fold([event("a"), event("b", **other)])] == [("a", "b")]


def test_no_content_and_an_empty_content_are_the_same() -> None:
    assert len(fold([event("a", content=None), event("b", content=" ")])) == 1


def test_the_order_of_what_is_kept_stays() -> None:
    titles = ["One", "Two", "One", "Three", "Two", "One"]
    kept = fold(event(str(n), title=title) for n, title in enumerate(titles))
    assert [e.ids for e in kept] == [("0", "2", "5"), ("1", "4"), ("3",)]
    assert fold([]) == ()
