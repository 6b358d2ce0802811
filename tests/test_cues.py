"""Which sentences of an event matter."""

import pytest
from stories import labels, signal


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("We decided to keep Redis.", "decision"),
        ("Decision: sessions live in Postgres.", "decision"),
        ("We're going with seats.", "decision"),
        ("Should we keep Redis for rate limits?", "question"),
        ("Not sure whether Safari is to blame.", "question"),
        ("TODO: add an end-to-end test.", "next"),
        ("The rollout is blocked by the audit.", "next"),
        ("I'll do the migration tomorrow.", "next"),
        ("There is a risk of data loss here.", "risk"),
    ],
)
def test_a_cue_marks_the_sentence_it_stands_in(said: str, label: str) -> None:
    read = signal("Sessions", f"Some plain prose first. {said} And more after it.")
    assert labels(read) == [(label, said)]


@pytest.mark.parametrize(
    "body",
    [
        "```\nWe decided to keep this.\n```",
        "> We decided to keep this.",
        "    should_we = keep(this)  # TODO: next",
        "| TODO: x | should we keep this? |",
        "See https://host/a?should+we+decide=1",
        "On Monday, Ada wrote:\nshould we keep this around?",
        "## We decided to keep this",
        "Perhaps we decided to keep this, maybe not.",
    ],
)
def test_code_quotes_tables_headings_and_guesses_say_nothing(body: str) -> None:
    assert labels(signal("Sessions", body)) == []


def test_task_lists_keep_what_is_done_and_what_is_not() -> None:
    read = signal("Sessions", "- [x] schema\n- [ ] migration\n* [ ] docs")
    assert read.tasks == ((True, "schema"), (False, "migration"), (False, "docs"))


DECIDED = [
    "We decided to brake on evidence instead of on numbers: only if a clock could not be asked.",
    "Decision: sessions stay in Postgres, although Redis might be faster.",
    "We agreed to keep one region, which would have been our choice anyway.",
]


@pytest.mark.parametrize("said", DECIDED)
def test_a_decision_may_go_on_with_a_guess(said: str) -> None:
    assert labels(signal("Sessions", said)) == [("decision", said)]


@pytest.mark.parametrize(
    "said",
    [
        "We have not decided to keep Redis.",
        "We haven't decided on a name.",
        "We have not yet agreed on a region.",
        "The name is undecided.",
        "Should we go with Redis?",
        "If we decided to keep Redis, sessions would survive.",
        "If we decide to keep Redis, sessions stay.",
        "Maybe we decided to keep Redis.",
    ],
)
def test_what_is_not_decided_is_no_decision(said: str) -> None:
    assert "decision" not in {label for label, _ in labels(signal("Sessions", said))}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("We decided to keep Redis. cc #124", "We decided to keep Redis."),
        ("We decided to keep Redis (#12, #13).", "We decided to keep Redis."),
        ("We decided to keep Redis, see acme/api#3.", "We decided to keep Redis."),
        ("We decided to keep Redis cc @ada and @linus", "We decided to keep Redis"),
        ("We decided to keep Redis. Refs ENG-4", "We decided to keep Redis."),
        ("Should we keep Redis for sessions? cc @ada", "Should we keep Redis for sessions?"),
        ("We decided to encode it as text (UTF-8).", "We decided to encode it as text (UTF-8)."),
        ("The rollout is blocked by #12", "The rollout is blocked by #12"),
        ("TODO: fix #12 before the launch", "TODO: fix #12 before the launch"),
    ],
)
def test_references_on_the_end_are_no_part_of_a_sentence(said: str, kept: str) -> None:
    assert [text for _, text in labels(signal("Sessions", said))] == [kept]


@pytest.mark.parametrize(
    "said", ["Follow-up to #2741.", "TODO: see #12 and ENG-4", "Next: #12, #13"]
)
def test_a_sentence_that_only_points_elsewhere_says_nothing(said: str) -> None:
    assert labels(signal("Sessions", said)) == []


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Decided: sessions stay in Postgres.", "decision"),
        ("ACTION: rotate the keys on Friday.", "next"),
        ("@bo please rotate the keys on Friday.", "next"),
        ("@bo, can you please rotate the keys?", "question"),
    ],
)
def test_short_forms_of_chats_are_cues(said: str, label: str) -> None:
    read = signal("Sessions", said, source="slack", event_type="message")
    assert labels(read) == [(label, said)]


@pytest.mark.parametrize("trailer", ["Closes #12.", "Fixes ENG-4, ENG-5.", "Refs https://h/a/1."])
def test_a_sentence_behind_a_trailer_counts(trailer: str) -> None:
    body = f"{trailer} We decided to keep Redis."
    assert labels(signal("Sessions", body)) == [("decision", "We decided to keep Redis.")]


def test_a_message_that_begins_with_its_title_is_read_once() -> None:
    said = "We decided to set SameSite=Lax instead of None, because Safari needs it."
    read = signal(f"{said[:40]}\u2026", said, source="slack", event_type="message")
    assert labels(read) == [("decision", said)]
