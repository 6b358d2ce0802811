"""Release notes and pull request texts."""

import pytest
from stories import HTTPX, REVERTED, event, notes, sections


def test_release_notes_are_grouped_and_leave_internals_out() -> None:
    draft = notes(*HTTPX)
    assert sections(draft) == {
        "Added": ["Add the 'proxy' parameter and deprecate 'proxies' (#2879)"],
        "Fixed": [
            "Fix environment proxies (#2741)",
            "Fixed `iter_text` adding an empty string (#2998)",
        ],
    }
    assert (draft.version, draft.title) == ("0.26.0", "web 0.26.0")
    [contributor] = draft.contributors
    assert (contributor.name, len(contributor.event_ids)) == ("Ada Lovelace", 7)


def test_internals_are_told_when_nothing_else_is_left() -> None:
    assert sections(notes(event("Refactor the client"))) == {"Internal": ["Refactor the client"]}


def test_breaking_changes_come_first() -> None:
    draft = notes(
        event("fix: keep the session"), event("feat(billing)!: charge per seat (#119)", hour=1)
    )
    assert list(sections(draft).items()) == [
        ("Breaking changes", ["Charge per seat (#119)"]),
        ("Fixed", ["Keep the session"]),
    ]


def test_a_revert_and_what_it_reverts_cancel_in_release_notes() -> None:
    kept = event("Add seats", hour=9)
    change = event("Cache the lookup (#1)", hour=1)
    revert = event('Revert "Cache the lookup (#1)" (#2)', hour=2)
    again = event('Revert "Revert "Cache the lookup (#1)" (#2)" (#3)', hour=3)
    assert sections(notes(kept, change, revert)) == {"Added": ["Add seats"]}
    assert sections(notes(kept, revert)) == {
        "Added": ["Add seats"],
        "Changed": ["Reverted: cache the lookup (#2)"],
    }
    restored = sections(notes(kept, change, revert, again))
    assert restored["Performance"] == ["Cache the lookup (#1)"]


def test_the_newest_tag_names_the_version_and_ends_its_range() -> None:
    tags = [
        event(name, hour=hour, event_type="tag", more={"tag": name})
        for name, hour in (("v1.0.0", 2), ("v1.1.0", 4))
    ]
    old, new = event("Add old", hour=1), event("Add new", hour=3)
    draft = notes(*tags, old, new)
    assert (draft.version, sections(draft)) == ("v1.1.0", {"Added": ["Add new"]})
    later = notes(tags[0], event("Add later", hour=5))
    assert (later.version, later.title) == (None, "web: unreleased changes")


@pytest.mark.parametrize("said", ["Version 4.1", "v4.1", "Update changelog for v4.1 release"])
def test_without_tags_a_commit_of_a_release_names_the_version(said: str) -> None:
    change, release = event("Add seats"), event(said, hour=1, files=["CHANGELOG.md"])
    assert (notes(change, release).version or "").lstrip("v") == "4.1"
    assert notes(change, release, event("Fix seats", hour=2)).version is None


def test_a_busy_release_is_cut_to_the_most_notable_changes() -> None:
    many = [event(f"Add feature number {word}", hour=1) for word in map(chr, range(0x4E00, 0x4E40))]
    draft = notes(*many)
    assert len(draft.sections[0].items) == 20
    assert draft.summary.text.startswith("The 20 most notable of 64 changes: 20 added.")


def test_where_people_keep_a_changelog_it_says_what_matters() -> None:
    logged = [
        event(f"Add {word} to the invoice", hour=n, files=["CHANGELOG.md", "app/billing.py"])
        for n, word in enumerate(("taxes", "dates", "names"))
    ]
    others = [event(f"Fix the {word} of invoices", hour=n) for n, word in enumerate(
        ("margin", "order", "sum", "font"), 5)]  # fmt: skip
    told = sections(notes(*logged, *others))
    assert (len(told["Added"]), len(told["Fixed"])) == (3, 1)
    assert len(sections(notes(*others))["Fixed"]) == 4
    breaking = event("feat!: charge per seat", hour=9)
    assert "Breaking changes" in sections(notes(*logged, *others, breaking))


def test_a_commit_to_the_changelog_notes_the_requests_that_it_names() -> None:
    changes = [event(f"Fix part {n} of the invoice (#{n})", hour=n) for n in range(1, 9)]
    log = event("Changelog for #1, #2, #3", hour=9, files=["docs/changelog.rst"])
    told = sections(notes(*changes, log))["Fixed"]
    assert len(told) == 4 and {f"Fix part {n} of the invoice (#{n})" for n in (1, 2, 3)} < {*told}


def test_a_named_repository_narrows_the_notes() -> None:
    draft = notes(event("Add a"), event("Add b", resource="acme/api"), repo="acme/api")
    assert sections(draft) == {"Added": ["Add b"]}
    assert draft.title == "acme/api: unreleased changes"


def test_a_pull_request_text_has_reasons_and_notes_for_reviewers() -> None:
    draft = notes(
        event(
            "feat!: charge per seat",
            "Prices per project surprised our customers.\n\nBREAKING CHANGE: no `project_id`.",
            files=["app/billing.py", "migrations/0042.sql", "tests/test_billing.py"],
        ),
        style="pr_description",
    )
    assert sections(draft) == {
        "What changed": ["Charge per seat"],
        "Why": ["Prices per project surprised our customers."],
        "Notes for reviewers": [
            "Breaking: No `project_id`.",
            "Touches the schema: migrations/0042.sql",
        ],
        "Testing": ["`tests/test_billing.py`"],
    }


@pytest.mark.parametrize("style", [None, "pr_description"])
def test_what_was_reverted_is_no_title_and_no_highlight(style: str | None) -> None:
    draft = notes(event("Fix one lookup", hour=10), *REVERTED, style=style)
    assert "great" not in draft.title + draft.summary.text
    assert "Fix one lookup" in draft.title + draft.summary.text
