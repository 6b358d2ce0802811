"""Which events are one change."""

from typing import Any

from stories import event, handoff, texts

from tasks.context import Event


def test_a_merge_and_its_commits_are_one_change() -> None:
    merge = event("Merge pull request #12 from ada/login", "Keep the session", hour=3)
    draft = handoff(
        merge,
        event("Store it in a cookie", hour=2, branch="login", files=["app/auth.py"]),
        event("Refs https://github.com/acme/web/pull/12 and more", hour=1),
    )
    assert texts(draft.key_changes) == ["Keep the session (#12)"]
    assert len(draft.key_changes[0].event_ids) == 3


def test_parents_tell_which_commits_a_merge_brought_in() -> None:
    def commit(number: int, title: str, *parents: int, **given: Any) -> Event:
        sha = f"{number:x}".rjust(40, "a")
        above = [f"{parent:x}".rjust(40, "a") for parent in parents]
        sha, *above = (f"{name[33:]}{name[:33]}" for name in (sha, *above))
        return event(title, hour=number, external_id=sha, more={"parents": above}, **given)

    draft = handoff(
        commit(1, "Add the start"),
        commit(2, "Add a field", 1),
        commit(3, "Fix the field", 2),
        commit(4, "Add seat billing", 1, 3, event_type="merge"),
    )
    assert texts(draft.key_changes) == ["Add seat billing", "Add the start"]
    assert len(draft.key_changes[0].event_ids) == 3


def test_a_webhook_of_a_merge_and_the_squashed_commit_are_one_change() -> None:
    url = "https://github.com/acme/web/pull/12"
    draft = handoff(
        event("Keep the session", event_type="pull_request.merged", url=url, hour=2),
        event("Keep the session (#12)", hour=1),
        event("Keep the session", event_type="pull_request.opened", url=url),
    )
    assert texts(draft.key_changes) == ["Keep the session (#12)"]
    assert draft.next_steps == []


def test_a_revert_and_its_change_are_one_line_in_a_handoff() -> None:
    draft = handoff(
        event("Cache the lookup (#1)", "We decided to cache in memory.", hour=1),
        event('Revert "Cache the lookup (#1)" (#2)', hour=2),
    )
    assert texts(draft.key_changes) == ["Reverted: cache the lookup (#1)"]
    assert draft.decisions == []


def test_near_duplicates_are_merged_with_the_ids_of_both() -> None:
    draft = handoff(
        event("Fix the login redirect loop on Safari", hour=1),
        event("Fix login redirect loop on mobile Safari", hour=2),
    )
    [change] = draft.key_changes
    assert len(change.event_ids) == 2


def test_lines_that_differ_in_a_number_are_not_duplicates() -> None:
    titles = [
        f"Move billing, user, search, mail and audit services to version {n} of the queue"
        for n in (1, 2)
    ]
    assert len(handoff(*(event(title) for title in titles)).key_changes) == 2


def test_a_merge_from_the_trunk_swallows_nothing() -> None:
    draft = handoff(
        event("Merge branch 'master' into seats", "More\n", hour=3, branch="master"),
        event("Merge pull request #12 from bob/master", "Keep the session", hour=2, branch="main"),
        event("Add seats", hour=1, branch="master"),
    )
    assert "Add seats" in texts(draft.key_changes)


def test_the_same_words_in_two_repositories_are_two_changes() -> None:
    one = event("Fix the login redirect loop on Safari", hour=1)
    other = event("Fix the login redirect loop on Safari", hour=2, resource="acme/api")
    assert len(handoff(one, other).key_changes) == 2


def test_folded_duplicates_are_cited_too() -> None:
    twice = [event("Fix the login", hour=hour, id=f"id{hour}") for hour in (1, 2)]
    assert handoff(*twice).key_changes[0].event_ids == ["id2", "id1"]
