"""Reading one event."""

import pytest
from stories import chat, signal

from tasks.signals import read

PROXIES = "Co-authored-by: Karen <k@example.com>\n\n* Add red test\n* Lint"


def test_a_merge_takes_its_title_and_branch_from_what_it_merges() -> None:
    merge = signal("Merge pull request #12 from ada/eng-42-login", "Keep the session\n\nMore.")
    assert (merge.text, merge.pull, merge.head) == (
        "Keep the session",
        "acme/web#12",
        "eng-42-login",
    )
    assert signal("Merge pull request #12 from ada/x").kind == "noise"


def test_a_breaking_footer_and_a_bang_both_break() -> None:
    assert signal("feat!: new prices").breaking == "new prices"
    assert signal("Prices", "BREAKING CHANGE: no `id` any more.").breaking == "no `id` any more."
    assert signal("Prices").breaking == ""


def test_a_revert_knows_what_it_reverts() -> None:
    once = signal('Revert "Cache the lookup (#1)" (#2)', "This reverts commit c1b2c3d4e5f6071.")
    twice = signal('Revert "Revert "Cache the lookup (#1)" (#2)" (#3)')
    assert (once.base, once.reverts, once.reverted_sha) == ("Cache the lookup", 1, "c1b2c3d")
    assert (twice.base, twice.reverts) == ("Cache the lookup", 2)


@pytest.mark.parametrize(
    ("source", "event_type", "metadata", "role", "state"),
    [
        ("github", "pull_request.opened", {}, "pull", "open"),
        ("github", "pull_request.closed", {"merged": True}, "change", "closed"),
        ("github", "issue_comment.created", {}, "chat", ""),
        ("github", "pull_request.review_requested", {}, "pull", ""),
        ("gitlab", "merge_request.ready_for_review", {}, "pull", ""),
        ("github", "review.submitted", {"state": "changes_requested"}, "chat", ""),
        ("linear", "issue.created", {}, "ticket", "open"),
        ("linear", "issue.updated", {"state": "Done"}, "ticket", "closed"),
        ("linear", "document.created", {}, "other", "open"),
        ("jira", "sprint.closed", {}, "other", "closed"),
        ("sentry", "issue.created", {}, "incident", "open"),
        ("pagerduty", "incident.resolved", {}, "incident", "closed"),
        ("sentry", "issue.archived", {"status": "ignored"}, "incident", "closed"),
        ("pagerduty", "service.updated", {}, "other", ""),
        ("incident_io", "task.created", {"status": "outstanding"}, "ticket", "open"),
        ("slack", "message", {}, "chat", ""),
        ("github", "tag", {}, "release", ""),
    ],
)
def test_an_event_type_tells_role_and_state(
    source: str, event_type: str, metadata: dict[str, object], role: str, state: str
) -> None:
    read = signal("Login loops", source=source, event_type=event_type, metadata=metadata)
    assert (read.role, read.state) == (role, state)


def test_who_has_no_name_is_not_called_by_a_number() -> None:
    for account in ("U2147483697", "53908099506183680", "c7c11cca-1d73-471d-9b6e-bdef51470190"):
        assert signal("Fix x", author=account).author == ""
    assert signal("Fix x", author="Ursula").author == "Ursula"


def test_bots_are_told_from_people() -> None:
    assert signal("Bump x", author="dependabot[bot]").bot
    assert not signal("Fix x", author="Abbot Lovelace").bot
    assert signal("Fix proxies", PROXIES).coauthors == ("Karen",)


@pytest.mark.parametrize(
    "metadata", [{"files": None}, {"files": "x"}, {"files": [1, None, {"name": 3}]}, {"labels": 3}]
)
def test_metadata_of_any_shape_is_survived(metadata: dict[str, object]) -> None:
    assert signal("Fix it", metadata=metadata).files == ()


def test_events_of_one_thing_say_so() -> None:
    def said(title: str) -> str:
        return read(chat(title, more={"thread": "C1:1"})).thing

    def paged(title: str) -> str:
        return signal(
            title, source="pagerduty", url="https://acme.pagerduty.com/incidents/Q2"
        ).thing

    assert said("One") == said("Two") != signal("One").thing
    assert paged("One") == paged("Two") != said("One")
    assert signal("Fix x", external_id="ENG-4", source="linear").thing == "ENG-4"
    assert read(chat("One")).thing != read(chat("Two")).thing
