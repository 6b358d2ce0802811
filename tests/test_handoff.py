"""Handoffs. The subjects of HTTPX are real commit messages."""

import pytest
from stories import HTTPX, REVERTED, chat, event, handoff, texts, ticket

from tasks.context import Event
from tasks.extractive import NothingToSay


def test_a_handoff_ranks_what_matters_and_folds_bumps_into_one_line() -> None:
    draft = handoff(*HTTPX)
    assert texts(draft.key_changes) == [
        "Add the 'proxy' parameter and deprecate 'proxies' (#2879)",
        "Fix environment proxies (#2741)",
        "Fixed `iter_text` adding an empty string (#2998)",
        "Enabling `ruff` C416 (#3001)",
        "Reorganise tests in 'test_url.py' (#2981)",
        "Updated 2 dependencies: ruff, uvicorn",
    ]
    assert draft.title.startswith("web: Add the 'proxy' parameter")
    assert draft.summary.text.startswith("7 changes by 1 person mostly in ")
    assert "2 Mar 2026" in draft.summary.text


def test_noise_is_dropped_unless_there_is_nothing_at_all() -> None:
    assert texts(handoff(event("wip"), event("Fix login", hour=1)).key_changes) == ["Fix login"]
    with pytest.raises(NothingToSay):
        handoff(event("wip"), chat("lol"), chat("+1", hour=1), event("Version 1.2.3", hour=2))


def test_what_people_say_is_quoted_with_who_said_it() -> None:
    draft = handoff(
        event("Fix login"),
        chat("We decided to set SameSite=Lax instead of None.", hour=1, author="Ada"),
        chat("Should we keep Redis for rate limits?", hour=2, author="Linus"),
        chat("Next: roll out to beta customers.", hour=3, author="Grace"),
        chat("thanks!", hour=4),
    )
    assert texts(draft.decisions) == [
        "We decided to set SameSite=Lax instead of None \u2014 Ada Lovelace in #backend"
    ]
    assert texts(draft.open_questions) == [
        "Should we keep Redis for rate limits? \u2014 Linus in #backend"
    ]
    assert texts(draft.next_steps) == ["Next: roll out to beta customers \u2014 Grace in #backend"]


def test_a_question_that_its_thread_decided_is_not_open() -> None:
    thread = {"metadata": {"thread_ts": "17.4"}}
    draft = handoff(
        chat("Should we keep Redis for rate limits?", hour=1, **thread),
        chat("We decided to keep it.", hour=2, **thread),
    )
    assert draft.open_questions == []


def test_open_work_is_listed_urgent_first_and_closed_work_is_not() -> None:
    draft = handoff(
        event("Fix the redirect", "Fixes ENG-1", hour=5),
        ticket("Login loops", hour=1, external_id="ENG-1", priority="urgent"),
        ticket("Wrong price", hour=2, external_id="ENG-2"),
        ticket("Slow search", hour=2, external_id="ENG-3"),
        ticket("Slow search", hour=3, external_id="ENG-3", event_type="issue.closed"),
        event(
            "Checkout is down", hour=4, source="pagerduty", event_type="incident.triggered",
            priority="P1",
        ),
    )  # fmt: skip
    assert texts(draft.next_steps) == [
        "Unresolved: Checkout is down (priority P1)",
        "Open: Wrong price (ENG-2)",
    ]
    assert "Closed: Slow search (ENG-3)" in texts(draft.key_changes)


def test_a_task_that_is_ticked_later_is_not_a_next_step() -> None:
    url = "https://github.com/acme/web/pull/12"
    opened = {"event_type": "pull_request.opened", "url": url}
    draft = handoff(
        event("Move sessions", "- [ ] migration\n- [ ] docs", hour=1, **opened),
        event("More", "- [x] migration", hour=2),
    )
    assert texts(draft.next_steps) == ["Docs", "Open pull request: Move sessions (#12)"]


def test_a_decision_that_is_the_subject_of_a_key_change_is_not_told_twice() -> None:
    draft = handoff(
        event("Switch the queue from Redis to Postgres (#4)", hour=1),
        event("Add seats", "We decided to charge per seat.", hour=2),
    )
    assert "Switch the queue from Redis to Postgres (#4)" in texts(draft.key_changes)
    assert texts(draft.decisions) == [
        "We decided to charge per seat \u2014 in \u201cAdd seats\u201d"
    ]


def test_without_changes_what_was_decided_is_told_as_a_decision_only() -> None:
    draft = handoff(
        chat("We decided to charge per seat.", hour=1, author="Ada"),
        chat("The invoices went out this morning.", hour=2, author="Ada"),
    )
    assert texts(draft.decisions) == ["We decided to charge per seat \u2014 Ada in #backend"]
    assert draft.key_changes == []


def test_what_was_reverted_is_in_no_title() -> None:
    draft = handoff(*REVERTED)
    assert texts(draft.key_changes) == ["Reverted: add the great big lookup cache"]
    assert draft.title == "web: 1 change by 1 person in app/cache, 2 Mar 2026"
    assert "great" not in draft.summary.text


def alert(text: str, **given: object) -> Event:
    fields = {"source": "pagerduty", "event_type": "incident.triggered", "author": "alerts[bot]"}
    return event(text, **(fields | given))  # type: ignore[arg-type]


def test_an_incident_that_a_program_filed_is_open() -> None:
    draft = handoff(event("Fix login"), alert("Checkout is down"))
    assert texts(draft.next_steps) == ["Unresolved: Checkout is down"]


def test_an_incident_is_over_when_the_same_address_says_so() -> None:
    url = "https://acme.pagerduty.com/incidents/Q1"
    draft = handoff(
        event("Fix login"),
        alert("Checkout is down", hour=1, url=url, author="Ada"),
        alert("Recovered", hour=2, url=url, author="Ada", event_type="incident.resolved"),
    )
    assert draft.next_steps == []


def test_a_pull_request_that_a_commit_brought_in_is_not_open() -> None:
    url = "https://github.com/acme/web/pull/12"
    draft = handoff(
        event("Keep the session", hour=1, event_type="pull_request.opened", url=url),
        event("Keep the session for a day (#12)", hour=2),
    )
    assert draft.next_steps == []


def test_a_remark_is_no_key_change_where_there_is_more_to_tell() -> None:
    remark = chat("The weather in Lisbon is fine", hour=1)
    decided = chat("We decided to charge per seat.", hour=2)
    assert handoff(remark, decided).key_changes == []
    assert len(handoff(remark).key_changes) == 1


def test_a_source_is_no_person() -> None:
    draft = handoff(event("Fix login"), event("Add seats", hour=1, author="GitHub"))
    assert draft.summary.text.startswith("2 changes by 1 person")


def test_what_users_cannot_see_fills_a_short_list_only() -> None:
    seen = [event(f"Add {word} to the invoice", hour=n) for n, word in enumerate(
        ("taxes", "dates", "names", "totals", "logos", "links"))]  # fmt: skip
    unseen = event("Refactor the billing module", hour=9)
    assert "Refactor the billing module" in texts(handoff(*seen[:5], unseen).key_changes)
    assert len(handoff(*seen, unseen).key_changes) == 6
