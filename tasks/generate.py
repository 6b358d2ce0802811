"""The artifact of a job: load events, build the context, ask the provider, ground, render.

It knows nothing of leases. The one rule: what it returns can be traced, and does nothing; a
statement whose events are not in the context is dropped before anybody sees it, and all texts are
plain ones. It holds for every provider, so none has to be trusted.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from app.db import Database
from app.schemas import AnyDraft, HandoffDraft, QuestionDraft, Statement, rfc3339
from app.tracing import span
from tasks.calls import Calls
from tasks.context import Context, Event, Thread, Weighed, fold
from tasks.entering import BATCH
from tasks.outcomes import NoResult
from tasks.plain import plain
from tasks.providers import Provider
from tasks.question import searched
from tasks.render import render
from tasks.selection import choose

# A handoff covers the time since the previous one, but is never emptier than a day and never
# longer than people can be away without asking for something else.
HANDOFF_LOOKBACK = (timedelta(hours=24), timedelta(days=14))
HANDOFF_EVENTS = 500
# Release notes go back to the previous release; without one, this far.
NOTES_LOOKBACK = timedelta(days=30)
NOTES_EVENTS = 1_000
# A question is about now. What is told of it fits a small model, and few answers stand on more.
QUESTION_DAYS = 14
QUESTION_EVENTS = 60
ENTERED_LATE = 5_000  # events that are entered for a question: some seconds
POOL = 500  # events at most that are weighed beyond as many as may be used

AROUND = ("summary", "contributors")  # parts that are no artifact alone

# What is longer is a provider that runs away; none of Baton's own comes near.
NAME_MAX = 300  # characters of titles, names and headings
TEXT_MAX = 4_000  # characters of a statement
LIST_MAX = 200  # entries of a list
ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")  # of a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job that an attempt owns; the field names are the columns of the query `claim_job`."""

    id: str
    user_id: str
    project_id: str
    project_name: str
    kind: str
    input: Mapping[str, Any]
    attempt: int
    crashes: int
    provider_errors: int
    lease_token: str
    claimed_at: datetime
    created_at: datetime | None = None
    request_id: str | None = None  # of the request for it, as the API's log has it
    traceparent: str | None = None  # what an attempt is traced as part of
    plan: str = ""  # of the one who pays
    models: Sequence[str] | None = None  # that the plan includes; None for all

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ClaimedJob":
        """The job as another process wrote it."""
        times = {
            name: datetime.fromisoformat(fields[name])
            for name in ("claimed_at", "created_at")
            if fields.get(name)
        }
        return cls(**{**fields, **times})

    @property
    def told(self) -> dict[str, Any]:
        """What every line of the log about an attempt says."""
        return {"job_id": self.id, "kind": self.kind, "attempt": self.attempt}

    @property
    def age(self) -> float:
        """Seconds between the request and the claim, by the database's clock."""
        return (self.claimed_at - (self.created_at or self.claimed_at)).total_seconds()


@dataclass(frozen=True, slots=True)
class Scope:
    """Which events a job is about."""

    sources: list[str] | None
    filters: Mapping[str, Any]
    repo: str | None
    since: datetime
    until: datetime
    limit: int  # events, with their duplicates, that the artifact may use


async def generate(
    database: Database, provider: Provider, job: ClaimedJob, calls: Calls
) -> dict[str, Any]:
    """Make the artifact of a job: the columns of `handoffs` or `insights` that a worker fills.

    Args:
        calls: told what this is at, and of every call of a model.

    Raises:
        tasks.outcomes.Failed: there is nothing to make it from, or the provider failed for good.
        tasks.outcomes.Retry: the provider failed in a way that may pass.
        db.Unavailable: the database went away.
    """
    calls.report(0.1, "reading")
    with span("context") as reading:
        scope, context = await find_context(database, job)
        events = sum(len(event.ids) for event in context.events)
        reading.set("baton.events", events)
    calls.report(0.2, "generating", f"from {events} events")
    with span("complete"):
        completion = await provider.complete(context, calls)
    calls.report(0.9, "rendering")
    draft = ground(completion.draft, context)
    return {
        **_content(job.kind, draft, context),
        "sources": scope.sources or sorted({event.source for event in context.events}),
        "period_start": rfc3339(scope.since),
        "period_end": rfc3339(scope.until),
        "model_used": plain(completion.model, NAME_MAX),
        "prompt_version": completion.prompt_version,
        "token_usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
            **({"estimated": True} if completion.estimated else {}),
        },
    }


async def find_context(database: Database, job: ClaimedJob) -> tuple[Scope, Context]:
    """What the job is about, and the events that its artifact may use.

    Raises:
        NoResult: nothing happened in the scope.
        db.Unavailable: the database went away.
    """
    scope = await find_scope(database, job)
    if job.kind == "question" and (asked := searched(str(job.input["options"]["question"]))):
        return scope, await search(database, job, scope, asked)
    events = await load_events(database, job, scope)
    # A thousand events take a tenth of a second; leases are renewed meanwhile.
    return scope, await asyncio.to_thread(_context, job, scope, events)


def _context(job: ClaimedJob, scope: Scope, events: list[Event]) -> Context:
    """At most as many of the events as the artifact may use, without duplicates."""
    options = job.input["options"] | ({"repo": scope.repo} if scope.repo else {})
    folded = fold(events)
    threads: tuple[Thread, ...] = ()
    if len(events) > scope.limit:
        threads = tuple(choose(job.kind, options, folded, scope.limit))
        chosen = {m.event.id: m.event for thread in threads for m in thread.members}
        folded = tuple(chosen[event.id] for event in folded if event.id in chosen)
    return Context(
        kind=job.kind,
        project_name=job.project_name,
        since=scope.since,
        until=scope.until,
        events=folded,
        omitted=len(events) - sum(len(event.ids) for event in folded),
        options=options,
        threads=threads,
    )


async def search(database: Database, job: ClaimedJob, scope: Scope, asked: str) -> Context:
    """The events that speak about what was asked, in threads of one, the best first.

    Raises:
        NoResult: none does.
        db.Unavailable: the database went away.
    """
    for _ in range(ENTERED_LATE // BATCH):  # what workers have not come to yet
        if await database.value("enter_events", job.project_id, BATCH) < BATCH:
            break
    rows = await database.rows(
        "events_about",
        job.project_id,
        asked,
        scope.sources,
        scope.filters,
        scope.since,
        scope.until,
        scope.limit,
    )
    if not rows:
        raise NoResult(
            f"Nothing in the last {QUESTION_DAYS} days speaks about this.", stage="context"
        )
    scores = {row["id"]: row["score"] for row in rows}
    columns = [name for name in rows[0].keys() if name != "score"]  # noqa: SIM118
    found = fold(
        sorted(
            (Event(**{name: row[name] for name in columns}) for row in rows),
            key=lambda event: (event.occurred_at, event.id),
            reverse=True,
        )
    )
    best = max(scores.values())
    weighed = [
        # From 1, below which it would be a trifle, to 2.
        Weighed(event, 1 + max(scores[id] for id in event.ids) / best, (event.source, ""), ())
        for event in found
    ]
    weighed.sort(key=lambda each: -each.weight)
    return Context(
        kind=job.kind,
        project_name=job.project_name,
        since=scope.since,
        until=scope.until,
        events=found,
        options=job.input["options"],
        threads=tuple(Thread((each,), ()) for each in weighed),
    )


async def find_scope(database: Database, job: ClaimedJob) -> Scope:
    """The sources, filters and period that the job's request stands for."""
    asked = job.input
    options: Mapping[str, Any] = asked["options"]
    repo = options.get("repo")
    until = datetime.fromisoformat(asked["until"]) if asked["until"] else job.claimed_at
    limit = int(options.get("maxEvents", HANDOFF_EVENTS))
    match job.kind:
        case "handoff":
            shortest, longest = HANDOFF_LOOKBACK
            scope = {"sources": asked["sources"], "filters": asked["filters"]}
            previous = await database.value("previous_handoff_end", job.project_id, scope, until)
            since = max(until - longest, min(previous or until - longest, until - shortest))
        case "release_notes":
            since, until, repo = await _release_period(database, job, until)
            limit = NOTES_EVENTS
        case "question":
            since, limit = until - timedelta(days=QUESTION_DAYS), QUESTION_EVENTS
        case "digest":
            since = datetime.fromisoformat(options["since"])
        case "cross_source_correlation":
            since = until - timedelta(hours=options["lookbackHours"])
        case _:
            since = until - timedelta(days=options["lookbackDays"])
    return Scope(
        sources=asked["sources"],
        filters=asked["filters"],
        repo=repo,
        since=since,
        until=until,
        limit=limit,
    )


async def load_events(database: Database, job: ClaimedJob, scope: Scope) -> list[Event]:
    """The events in scope, newest first: more than the artifact may use, so that it can choose.

    A content is cut where reading so many would stop anyway, and of every source the newest events
    are there, whatever the others do.

    Raises:
        NoResult: there is none; the sentence says when something last happened.
    """
    rows = await database.rows(
        "events_in_scope",
        job.project_id,
        scope.sources,
        scope.filters,
        scope.since,
        scope.until,
        scope.repo,
        scope.limit + min(scope.limit, POOL) + 1,
    )
    if rows:
        return [Event(**row) for row in rows]
    newest = await database.value("newest_event", job.project_id, scope.sources, scope.until)
    last = ""
    if newest and newest <= scope.since:
        last = f" The newest event before that is of {newest:%Y-%m-%d %H:%M} UTC."
    elif newest:
        last = " There are events in that time, but no filter lets them through."
    raise NoResult(
        f"There were no events in scope between {scope.since:%Y-%m-%d %H:%M} "
        f"and {scope.until:%Y-%m-%d %H:%M} UTC.{last}",
        stage="context",
    )


def ground(draft: AnyDraft, context: Context) -> AnyDraft:
    """Keep to what the context can prove, said in plain text.

    Foreign ids go, and with its last id a statement goes. Texts are made inert and cut, a statement
    without a text goes too. What names no events of its own (title, summary, names) is kept.

    Raises:
        NoResult: nothing is left.
    """
    known = {id for event in context.events for id in event.ids}
    grounded = _grounded(draft.model_dump(), known)
    if not grounded["title"]:
        grounded["title"] = plain(context.project_name, NAME_MAX)
    if not any(_event_ids(part) for name, part in grounded.items() if name not in AROUND):
        sentence = "Nothing in the provider's answer could be traced to an event."
        if context.kind == "question":
            sentence = f"Nothing in the last {QUESTION_DAYS} days answers this."
        raise NoResult(sentence, stage="grounding")
    return type(draft).model_validate(grounded)


def _grounded(value: Any, known: set[str], name: str = "") -> Any:
    """The value of a field with its unknown event ids removed, what is left without any or says
    nothing dropped, and its texts plain: a NUL could not even be stored."""
    if isinstance(value, str):
        return plain(value, TEXT_MAX if name == "text" else NAME_MAX)
    if isinstance(value, list):
        if name == "event_ids":
            return [id for id in dict.fromkeys(value) if id in known]
        kept = (_grounded(item, known, name) for item in value)
        return list(islice((item for item in kept if not _is_empty(item)), LIST_MAX))
    if isinstance(value, dict):
        return {key: _grounded(part, known, key) for key, part in value.items()}
    return value


def _is_empty(item: Any) -> bool:
    """Whether an entry of a list proves or says nothing."""
    if isinstance(item, dict):
        return [] in (item.get("event_ids"), item.get("items")) or "" in item.values()
    return bool(item == "")


def _event_ids(value: Any) -> list[str]:
    """All event ids under a value, in order of appearance, each once."""
    found: dict[str, None] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found.update(dict.fromkeys(item.get("event_ids", ())))
            stack.extend(reversed([part for name, part in item.items() if name != "event_ids"]))
        elif isinstance(item, list):
            stack.extend(reversed(item))
    return list(found)


def _content(kind: str, draft: AnyDraft, context: Context) -> dict[str, Any]:
    """The columns that hold what the draft says."""
    data = draft.model_dump(exclude={"title"})
    by_id = {id: event for event in context.events for id in event.ids}
    if isinstance(draft, QuestionDraft):
        summary = _prose(draft.statements)
        question = plain(str(context.options["question"]), TEXT_MAX)
        data = {"question": question, "answer": summary, **data}
    else:
        summary = draft.summary.text
    content: dict[str, Any] = {
        "title": draft.title,
        "summary": summary,
        "data": data,
        "related_event_ids": _event_ids(data),
        "markdown": render(kind, draft, by_id, cut=context.omitted > 0),
    }
    if isinstance(draft, HandoffDraft):
        for name in ("key_changes", "decisions", "open_questions", "next_steps"):
            content[name] = [statement["text"] for statement in data[name]]
    return content


def _prose(statements: Sequence[Statement]) -> str:
    """The statements as sentences on one line, as plain together as each is alone."""
    texts = (statement.text for statement in statements)
    sentences = (text if text.endswith(ENDS) else f"{text}." for text in texts)
    return plain(" ".join(sentences), LIST_MAX * TEXT_MAX)


async def _release_period(
    database: Database, job: ClaimedJob, until: datetime
) -> tuple[datetime, datetime, str | None]:
    """From the last release to now; when nothing came after it, the last release itself.

    A version is one repository's: of several, unless one is asked for, that of the last release.
    """
    repo: str | None = job.input["options"].get("repo")
    source = job.input["sources"][0]
    rows = await database.rows("release_bounds", job.project_id, source, repo, until)
    if repo is None and rows and rows[0]["several"] and rows[0]["resource"]:
        repo = rows[0]["resource"]
        rows = await database.rows("release_bounds", job.project_id, source, repo, until)
    releases = [row["occurred_at"] for row in rows]
    if not releases:
        return until - NOTES_LOOKBACK, until, repo
    after = await database.rows(
        "events_in_scope",
        job.project_id,
        [source],
        job.input["filters"],
        releases[0],
        until,
        repo,
        1,
    )
    if after:
        return releases[0], until, repo
    return (releases[1] if len(releases) > 1 else releases[0] - NOTES_LOOKBACK), releases[0], repo
