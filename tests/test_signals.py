"""Reading one event. Subjects marked with a repository are real commit messages from there."""

from datetime import UTC, datetime

import pytest

from tasks.context import Event
from tasks.signals import Signal, line, read, sentences_of, words

PROXIES = "Co-authored-by: Karen <k@example.com>\n\n* Add red test\n* Lint"


def signal(title: str, content: str | None = None, **given: object) -> Signal:
    fields: dict[str, object] = {
        "id": "e1",
        "source": "github",
        "event_type": "commit",
        "resource": "acme/web",
        "occurred_at": datetime(2026, 3, 2, tzinfo=UTC),
    }
    files = given.pop("files", None)
    if files is not None:
        given["metadata"] = {"files": files}
    return read(Event(**(fields | given), title=title, content=content))  # type: ignore[arg-type]


def labels(read: Signal) -> list[tuple[str, str]]:
    return [(sentence.label, sentence.text) for sentence in read.sentences]


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("feat(auth)!: sign in with a passkey", "feature"),
        ("fix: keep the session on redirect", "fix"),
        ("perf(db): fewer round trips", "performance"),
        ("refactor: split the client", "refactor"),
        ("docs: explain seats", "docs"),
        ("chore(deps): bump cryptography from 41.0.6 to 41.0.7", "dependency"),
        ("Add the 'proxy' parameter and deprecate 'proxies'. (#2879)", "feature"),  # encode/httpx
        ("Fix environment proxies (#2741)", "fix"),  # encode/httpx
        ("Fixed `iter_text` adding an empty string (#2998)", "fix"),  # encode/httpx
        ("Drop support for Python 3.7 (#2813)", "removal"),  # encode/httpx
        ("Bump uvicorn from 0.22.0 to 0.24.0.post1 (#2972)", "dependency"),  # encode/httpx
        ("Version 0.26.0 (#3009)", "noise"),  # encode/httpx
        ("Update CHANGELOG.md (#3000)", "noise"),  # encode/httpx
        ("Remove unused curio check (#3010)", "refactor"),  # encode/httpx
        ("Refactor tests a bit", "refactor"),  # simonw/datasette
        ("Release 1.0a31", "noise"),  # simonw/datasette
        ("Upgrade to Django 6.0", "change"),  # healthchecks/healthchecks
        ("Fix CVE-2026-1234 in the upload form", "security"),
        ("Deprecate the v1 endpoints", "deprecation"),
        ("fix typo", "noise"),
        ("wip", "noise"),
        ("fixup! Fix environment proxies", "noise"),
        ("Merge branch 'main' into feature", "noise"),
        ("\u4fee\u590d\u767b\u5f55\u5faa\u73af", "change"),
    ],
)
def test_a_subject_tells_the_kind_of_change(title: str, kind: str) -> None:
    assert signal(title).kind == kind


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["docs/index.md", "README.md"], "docs"),
        (["tests/test_url.py"], "test"),
        ([".github/workflows/ci.yml"], "ci"),
        (["CHANGELOG.md", "httpx/__version__.py"], "noise"),
        (["requirements.txt"], "build"),
        (["app/auth.py", "tests/test_auth.py"], "feature"),
    ],
)
def test_what_was_touched_says_more_than_the_verb(files: list[str], kind: str) -> None:
    assert signal("Add more of it", files=files).kind == kind


def test_the_text_has_no_prefix_and_no_trailing_references() -> None:
    assert signal("feat(auth): sign in with a passkey (#12)").text == "sign in with a passkey"
    assert signal("Expanded analysis of SQL operations, refs #2748").text == (
        "Expanded analysis of SQL operations"  # simonw/datasette
    )


def test_a_merge_takes_its_title_and_branch_from_what_it_merges() -> None:
    merge = signal("Merge pull request #12 from ada/eng-42-login", "Keep the session\n\nMore.")
    assert (merge.text, merge.pull, merge.head) == (
        "Keep the session",
        "acme/web#12",
        "eng-42-login",
    )
    assert signal("Merge pull request #12 from ada/x").kind == "noise"


def test_references_name_their_repository() -> None:
    read = signal(
        "Keep the session (#12)",
        "Fixes ENG-42, see https://github.com/acme/api/issues/7 and acme/cli#3.\nUses UTF-8, #5.",
    )
    assert read.pull == "acme/web#12"
    assert set(read.references) == {
        "acme/web#12",
        "acme/api#7",
        "acme/cli#3",
        "acme/web#5",
        "ENG-42",
    }
    assert read.closes == ("ENG-42",)


def test_a_bare_number_in_a_chat_belongs_to_no_repository_yet() -> None:
    read = signal("look at #12", source="slack", event_type="message", resource="backend")
    assert read.references == ()
    assert read.unresolved == ("#12",)


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


@pytest.mark.parametrize(
    ("source", "event_type", "metadata", "role", "state"),
    [
        ("github", "pull_request.opened", {}, "pull", "open"),
        ("github", "pull_request.closed", {"merged": True}, "change", "closed"),
        ("github", "issue_comment.created", {}, "chat", ""),
        ("linear", "issue.created", {}, "ticket", "open"),
        ("linear", "issue.updated", {"state": "Done"}, "ticket", "closed"),
        ("sentry", "issue.created", {}, "incident", "open"),
        ("pagerduty", "incident.resolved", {}, "incident", "closed"),
        ("slack", "message", {}, "chat", ""),
        ("github", "tag", {}, "release", ""),
    ],
)
def test_an_event_type_tells_role_and_state(
    source: str, event_type: str, metadata: dict[str, object], role: str, state: str
) -> None:
    read = signal("Login loops", source=source, event_type=event_type, metadata=metadata)
    assert (read.role, read.state) == (role, state)


def test_bots_are_told_from_people() -> None:
    assert signal("Bump x", author="dependabot[bot]").bot
    assert not signal("Fix x", author="Abbot Lovelace").bot
    assert signal("Fix proxies", PROXIES).coauthors == ("Karen",)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("## **Bold** title", "Bold title"),
        ("- [ ] task", "task"),
        ("\x1b[31mred\x1b[0m alert\u202e", "red alert"),
        ("[docs](https://host/x) for <b>all</b>", "docs for all"),
        ("see https://github.com/acme/web/pull/12/files", "see acme/web#12"),
        ("mail ada@example.com", "mail ada"),
        ("#12 is broken", "(#12) is broken"),
        ("<@U123> look at <https://host/x|the log>", "look at the log"),
        ("an ` odd tick", "an odd tick"),
        ("/<database>/-/query stays", "/<database>/-/query stays"),
        ("<!-- template", ""),
        ("A" * 300, ""),
    ],
)
def test_a_line_is_plain_text(raw: str, clean: str) -> None:
    assert " ".join(line(raw).split()) == clean


def test_a_long_line_is_cut_at_a_word() -> None:
    cut = line("word " * 100)
    assert len(cut) <= 240
    assert cut.endswith("word\u2026")


def test_sentences_split_also_without_spaces_after_the_stop() -> None:
    assert sentences_of("One is 1.5. Two? Three") == ["One is 1.5.", "Two?", "Three"]
    assert (
        len(sentences_of("\u6211\u4eec\u51b3\u5b9a\u4e86\u3002\u660e\u5929\u53d1\u5e03\u3002")) == 2
    )


def test_words_are_compared_without_endings_and_fillers() -> None:
    assert words("Fixed the proxies") == words("fixes proxies")


@pytest.mark.parametrize(
    "metadata", [{"files": None}, {"files": "x"}, {"files": [1, None, {"name": 3}]}, {"labels": 3}]
)
def test_metadata_of_any_shape_is_survived(metadata: dict[str, object]) -> None:
    assert signal("Fix it", metadata=metadata).files == ()
