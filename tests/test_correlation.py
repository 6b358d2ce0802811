"""What belongs together across sources."""

from typing import Any

import pytest
from stories import chat, correlations, event, ticket

from tasks.context import Event
from tasks.extractive import NothingToSay


def test_a_shared_key_ties_sources_and_is_told_in_order_of_time() -> None:
    draft = correlations(
        ticket("Login loops on Safari", hour=1, external_id="ENG-42"),
        chat("Anyone looking at ENG-42?", hour=2),
        event("Set SameSite=Lax (#12)", "Fixes ENG-42", hour=3),
        chat("Lunch anyone at noon", hour=4),
    )
    [found] = draft.correlations
    assert found.references == ["ENG-42"]
    assert found.sources == ["linear", "slack", "github"]
    assert found.text == (
        "ENG-42 was opened in linear on 2 Mar, discussed in slack (backend) on 2 Mar and "
        "fixed by acme/web#12 on 2 Mar. Tied by ENG-42"
    )
    assert len(found.event_ids) == 3


def test_replies_belong_to_what_their_thread_is_about() -> None:
    talk = {"more": {"thread": "backend:1"}}
    draft = correlations(
        ticket("Login loops on Safari", hour=1, external_id="ENG-42"),
        chat("Anyone looking at ENG-42?", hour=2, **talk),
        chat("It is the cookie, we should set SameSite", hour=3, **talk),
        chat("Lunch anyone at noon", hour=4, more={"thread": "backend:4"}),
        event("Set SameSite=Lax (#12)", "Fixes ENG-42", hour=5),
    )
    [found] = draft.correlations
    assert "discussed in slack (backend) on 2 Mar (2 times)" in found.text
    assert len(found.event_ids) == 4


def test_a_branch_that_holds_a_key_ties_its_commit() -> None:
    draft = correlations(
        ticket("Login loops on Safari", external_id="ENG-42"),
        event("Set the cookie", hour=1, branch="ada/eng-42-cookie"),
    )
    assert draft.correlations[0].references == ["ENG-42"]


def test_the_same_number_of_two_repositories_ties_nothing() -> None:
    with pytest.raises(NothingToSay):
        correlations(
            event("Add seats (#12)"),
            event("Add plans (#12)", hour=1, source="gitlab", resource="acme/api"),
        )


def test_a_bare_number_in_a_chat_needs_one_repository_or_its_name() -> None:
    web, api = event("Add seats (#12)"), event("Add plans (#12)", hour=1, resource="acme/api")
    said = chat("Is #12 the cause of the outage?", hour=2)
    assert correlations(web, said).correlations[0].references == ["acme/web#12"]
    with pytest.raises(NothingToSay):
        correlations(web, api, said)
    named = chat("Is #12 of api the cause of the outage?", hour=2)
    assert correlations(web, api, named).correlations[0].references == ["acme/api#12"]


def test_similar_titles_close_in_time_are_weaker_evidence() -> None:
    crash = "TypeError in checkout permissions lookup"
    near = [
        event(crash, hour=1, source="sentry", event_type="issue.created"),
        ticket(f"{crash} crashes", hour=3),
    ]
    [found] = correlations(*near).correlations
    assert "weaker evidence" in found.text
    with pytest.raises(NothingToSay):
        correlations(near[0], ticket(f"{crash} crashes", hour=200))


def test_one_source_alone_is_tied_within_itself() -> None:
    draft = correlations(event("Add seats, see ENG-4"), event("Fix seats for ENG-4", hour=1))
    assert draft.correlations[0].sources == ["github"]


def test_a_thread_that_two_references_name_is_told_once() -> None:
    draft = correlations(
        ticket("Login loops on Safari", hour=1, external_id="ENG-42"),
        event("Set SameSite=Lax (#12)", "Fixes ENG-42", hour=2),
        chat("#12 is on staging", hour=3),
    )
    [found] = draft.correlations
    assert found.references == ["ENG-42", "acme/web#12"]
    assert len(found.event_ids) == 3


def test_a_list_of_everything_ties_no_threads_together() -> None:
    numbers = range(1, 7)
    merged = [event(f"Change {n} of many (#{n})", hour=n) for n in numbers]
    released = chat("Live: " + ", ".join(f"#{n}" for n in numbers), hour=9)
    assert len(correlations(*merged, released).correlations) == len(numbers)


PAGE = "https://acme.pagerduty.com/incidents/Q2"
RUNBOOK = "https://wiki.acme.dev/runbooks/checkout"


def said(text: str, *, hour: float, thread: str = "C1:1", **given: Any) -> Event:
    return chat(text, hour=hour, more={"thread": thread}, **given)


def page(kind: str, *, hour: float) -> Event:
    given = {"source": "pagerduty", "event_type": f"incident.{kind}", "url": PAGE}
    return event("Checkouts fail", hour=hour, **given)


def alert(kind: str, *, hour: float, name: str = "ErrorRate") -> Event:
    return event(
        name, f"Runbook: {RUNBOOK}", hour=hour, source="alertmanager",
        event_type=f"alert.{kind}", author=None, more={"thread": name},
    )  # fmt: skip


def test_the_alert_the_page_and_the_thread_are_one_story_with_the_ticket() -> None:
    story = [
        alert("firing", hour=1),
        page("triggered", hour=2),
        page("acknowledged", hour=3),
        said(f"We are paged, {PAGE}", hour=4),
        said(f"{RUNBOOK} does not help", hour=5),
        ticket("Vouchers count twice", hour=6, external_id="ENG-42"),
        said("Tracked in ENG-42", hour=7),
        event("Count a voucher once (#12)", "Fixes ENG-42", hour=8),
        page("resolved", hour=9),
        alert("resolved", hour=10),
        said("All good again", hour=11),
        event("Page edited", hour=12, source="notion", event_type="page.updated", url=RUNBOOK),
    ]
    [found] = correlations(*story, chat("Ramen at noon", hour=5.5)).correlations
    assert found.event_ids == [event.id for event in story]
    assert found.title == "ENG-42: Vouchers count twice"
    for step in ("reported by alertmanager", "discussed in slack", "opened in linear", "fixed by"):
        assert step in found.text


def test_a_page_that_two_stories_refer_to_makes_them_no_single_one() -> None:
    two = [
        ticket("Vouchers count twice", hour=1, external_id="ENG-42"),
        said(f"ENG-42, see {RUNBOOK}", hour=2),
        ticket("Seats are lost", hour=3, external_id="ENG-43"),
        said(f"ENG-43, see {RUNBOOK}", hour=4, thread="C1:9"),
        event("Runbook edited", hour=5, source="notion", event_type="page.updated", url=RUNBOOK),
    ]
    found = {each.references[0]: each for each in correlations(*two).correlations}
    assert found["ENG-42"].event_ids == [two[0].id, two[1].id]
    assert found["ENG-43"].event_ids == [two[2].id, two[3].id]


def test_an_address_is_no_headline() -> None:
    [found] = correlations(page("triggered", hour=1), said(f"Look: {PAGE}", hour=2)).correlations
    assert found.title == "Checkouts fail"
