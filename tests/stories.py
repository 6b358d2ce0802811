"""Events and contexts for the tests of the built-in provider; a story reads like a history."""

from datetime import UTC, datetime, timedelta
from typing import Any

from app.schemas import CorrelationDraft, HandoffDraft, ReleaseNotesDraft, Statement
from tasks.context import Context, Event, fold
from tasks.extractive import extract
from tasks.signals import Signal, read

START = datetime(2026, 3, 2, 9, tzinfo=UTC)


KINDS = (
    "handoff",
    "cross_source_correlation",
    "onboarding_brief",
    "architecture_insight",
    "release_notes",
)


def event(title: str, content: str | None = None, *, hour: float = 0, **given: Any) -> Event:
    """A commit by Ada in acme/web, `hour` hours after the start."""
    if "files" in given or "more" in given:
        given["metadata"] = {"files": given.pop("files", []), **given.pop("more", {})}
    fields: dict[str, Any] = {
        "id": f"e-{title[:20]}-{hour}",
        "source": "github",
        "event_type": "commit",
        "resource": "acme/web",
        "author": "Ada Lovelace",
        "occurred_at": START + timedelta(hours=hour),
    }
    return Event(**(fields | given), title=title, content=content)


def chat(text: str, *, hour: float = 0, **given: Any) -> Event:
    given = {"source": "slack", "event_type": "message", "resource": "backend"} | given
    return event(text, hour=hour, **given)


def ticket(text: str, *, hour: float = 0, **given: Any) -> Event:
    given = {"source": "linear", "event_type": "issue.created", "resource": "Engineering"} | given
    return event(text, hour=hour, **given)


def context(kind: str, *events: Event, **options: Any) -> Context:
    newest_first = sorted(events, key=lambda event: event.occurred_at, reverse=True)
    return Context(
        kind=kind,
        project_name="web",
        since=START,
        until=START + timedelta(days=9),
        events=fold(newest_first),
        options=options,
    )


def handoff(*events: Event) -> HandoffDraft:
    draft = extract(context("handoff", *events))
    assert isinstance(draft, HandoffDraft)
    return draft


def notes(*events: Event, **options: Any) -> ReleaseNotesDraft:
    draft = extract(context("release_notes", *events, **options))
    assert isinstance(draft, ReleaseNotesDraft)
    return draft


def correlations(*events: Event) -> CorrelationDraft:
    draft = extract(context("cross_source_correlation", *events))
    assert isinstance(draft, CorrelationDraft)
    return draft


def texts(statements: list[Statement]) -> list[str]:
    return [statement.text for statement in statements]


def sections(draft: ReleaseNotesDraft) -> dict[str, list[str]]:
    return {section.heading: texts(section.items) for section in draft.sections}


# encode/httpx 0.26.0
HTTPX = [
    event("Version 0.26.0 (#3009)", hour=9, files=["CHANGELOG.md", "httpx/__version__.py"]),
    event("Fix environment proxies (#2741)", hour=8, files=["CHANGELOG.md", "httpx/_utils.py"]),
    event("Enabling `ruff` C416 (#3001)", hour=7, files=["httpx/_content.py", "httpx/_utils.py"]),
    event("Update CHANGELOG.md (#3000)", hour=6, files=["CHANGELOG.md"]),
    event("Fixed `iter_text` adding an empty string (#2998)", hour=5, files=["httpx/_models.py"]),
    event(
        "Add the 'proxy' parameter and deprecate 'proxies'. (#2879)",
        hour=4,
        files=["CHANGELOG.md", "httpx/_client.py", "httpx/_api.py"],
    ),
    event("Reorganise tests in 'test_url.py' (#2981)", hour=3, files=["tests/test_url.py"]),
    event(
        "Bump uvicorn from 0.22.0 to 0.24.0.post1 (#2972)", hour=2, author="dependabot[bot]",
        files=["requirements.txt"],
    ),
    event(
        "Bump ruff from 0.1.3 to 0.1.6 (#2974)", hour=1, author="dependabot[bot]",
        files=["requirements.txt"],
    ),
]  # fmt: skip


WORK = [
    event("Add sessions", hour=1, files=["app/auth/session.py", "app/db/models.py"]),
    event("Fix sessions on Safari", hour=2, files=["app/auth/session.py"]),
    event("Fix the expiry of tokens", hour=3, files=["app/auth/session.py", "app/db/models.py"]),
    event("Fix logout when offline", hour=4, files=["app/auth/session.py"]),
    event("Add a colour theme", hour=5, files=["static/css/theme.css"], author="grace@acme.dev"),
    event("Explain the setup", hour=6, files=["README.md"], author="Grace Hopper"),
    ticket("Typo on the pricing page", hour=7, external_id="ENG-9", author="Linus"),
]


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


# The largest change of all, and its end.
REVERTED = [
    event("Add the great big lookup cache", hour=11, files=[f"app/cache/{n}.py" for n in "abcd"]),
    event('Revert "Add the great big lookup cache"', hour=12, files=["app/cache/a.py"]),
]
