"""What a job is about, what a provider gets to see, and what of its answer is kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from app.db import Database
from app.schemas import CorrelationDraft, HandoffDraft, ReleaseNotesDraft
from tasks.briefs import write_briefs
from tasks.calls import Calls
from tasks.context import Context, Event
from tasks.generate import ClaimedJob, find_context, find_scope, generate, ground, load_events
from tasks.outcomes import NoResult
from tasks.providers import Completion

NOW = datetime(2026, 6, 15, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def a_job(
    project_id: str = "",
    kind: str = "handoff",
    options: Mapping[str, Any] | None = None,
    sources: list[str] | None = None,
    filters: Mapping[str, Any] | None = None,
    until: datetime | None = None,
) -> ClaimedJob:
    """A job as a worker has claimed it."""
    return ClaimedJob(
        id="",
        user_id="",
        project_id=project_id,
        project_name="Demo",
        kind=kind,
        input={
            "sources": sources,
            "filters": filters or {},
            "until": until.isoformat() if until else None,
            "options": options or {},
        },
        attempt=1,
        crashes=0,
        provider_errors=0,
        lease_token="",
        claimed_at=NOW,
    )


class Project:
    """A project that can be filled with events and handoffs."""

    def __init__(self, database: Database, api: Database, user_id: str, id: str) -> None:
        self.database, self.api, self.user_id, self.id = database, api, user_id, id

    async def happens(self, ago: timedelta, title: str = "feat: a thing", **given: Any) -> None:
        event = {"source": "github", "event_type": "commit", "title": title,
                 "occurred_at": (NOW - ago).isoformat(), **given}  # fmt: skip
        await self.api.row("ingest_events", self.user_id, self.id, [event])

    async def handed_off(self, ago: timedelta, *, archived: bool = False, **scope: Any) -> None:
        """A handoff of the scope, made through the job's life, whose period ended then."""
        job = await self.api.row(
            "submit_job", self.user_id, self.id, "handoff", scope.get("sources"),
            scope.get("filters"), None, {}, {}, None, None, 0,
        )  # fmt: skip
        assert job
        claimed = await self.database.row("claim_job", job["id"], 0, "w", 15.0)
        assert claimed
        lists = ("key_changes", "decisions", "open_questions", "next_steps", "related_event_ids")
        artifact = {
            "title": "T", "summary": "S", "markdown": "M", "model_used": "m", "token_usage": {},
            "sources": [], "data": {}, "period_start": (NOW - 99 * DAY).isoformat(),
            "period_end": (NOW - ago).isoformat(), **{name: [] for name in lists},
        }  # fmt: skip
        await self.database.row("complete_job", job["id"], claimed["lease_token"], artifact)
        if archived:
            done = await self.api.row("read_job", self.user_id, job["id"])
            assert done
            status = (self.user_id, done["result_id"], "archived")
            await self.api.row("set_handoff_status", *status)


@pytest.fixture
async def project(database: Database, api: Database, ops: asyncpg.Connection) -> Project:
    user = str(await ops.fetchval("select ops.create_user('ada@example.com')"))
    id = str(await ops.fetchval("select ops.create_project('Demo', $1)", user))
    return Project(database, api, user, id)


async def period(project: Project, **given: Any) -> tuple[timedelta, timedelta]:
    """How long before NOW the period of a job starts and ends."""
    scope = await find_scope(project.database, a_job(project.id, **given))
    return NOW - scope.since, NOW - scope.until


# --- Periods -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "length", "limit"),
    [
        ("cross_source_correlation", {"lookbackHours": 168, "maxEvents": 150}, 168 * HOUR, 150),
        ("onboarding_brief", {"lookbackDays": 30, "maxEvents": 7}, 30 * DAY, 7),
        ("architecture_insight", {"lookbackDays": 14, "maxEvents": 250}, 14 * DAY, 250),
    ],
)
async def test_an_insight_looks_back_as_far_as_was_asked(
    project: Project, kind: str, options: dict[str, Any], length: timedelta, limit: int
) -> None:
    until = NOW - 9 * DAY
    job = a_job(project.id, kind, options, ["github"], {"github": {}}, until)
    scope = await find_scope(project.database, job)
    assert (scope.since, scope.until, scope.limit) == (until - length, until, limit)
    assert (scope.sources, scope.filters, scope.repo) == (["github"], {"github": {}}, None)


async def test_a_first_handoff_looks_back_14_days(project: Project) -> None:
    assert await period(project) == (14 * DAY, 0 * DAY)
    assert await period(project, until=NOW - 5 * DAY) == (19 * DAY, 5 * DAY)


@pytest.mark.parametrize(
    ("ago", "since"),
    [(HOUR, 24 * HOUR), (25 * HOUR, 25 * HOUR), (13 * DAY, 13 * DAY), (15 * DAY, 14 * DAY)],
)
async def test_a_handoff_goes_on_where_the_last_one_ended_within_a_day_and_14(
    project: Project, ago: timedelta, since: timedelta
) -> None:
    await project.handed_off(20 * DAY)
    await project.handed_off(ago)
    assert (await period(project))[0] == since


async def test_archived_handoffs_and_those_of_another_scope_do_not_count(project: Project) -> None:
    await project.handed_off(10 * DAY)
    await project.handed_off(2 * DAY, archived=True)
    await project.handed_off(3 * DAY, sources=["github"])
    await project.handed_off(4 * DAY, filters={"github": {"projects": ["a"]}})
    assert (await period(project))[0] == 10 * DAY
    assert (await period(project, sources=["github"]))[0] == 3 * DAY
    assert (await period(project, sources=["github"], filters={"github": {"projects": ["a"]}}))[
        0
    ] == 4 * DAY
    assert (await period(project, sources=["slack"]))[0] == 14 * DAY


async def test_a_handoff_that_ends_later_is_no_predecessor(project: Project) -> None:
    await project.handed_off(2 * DAY)
    await project.handed_off(8 * DAY)
    assert (await period(project, until=NOW - 5 * DAY))[0] == 8 * DAY


async def test_the_same_sources_in_another_order_are_the_same_scope(project: Project) -> None:
    await project.handed_off(3 * DAY, sources=["slack", "github"])
    submitted = await project.api.row(
        "submit_job",
        project.user_id,
        project.id,
        "handoff",
        ["github", "slack"],
        None,
        None,
        {},
        {},
        None,
        None,
        0,
    )
    assert submitted
    job = await project.database.row("claim_job", submitted["id"], 0, "w", 15.0)
    assert job
    again = a_job(project.id, sources=job["input"]["sources"])
    assert NOW - (await find_scope(project.database, again)).since == 3 * DAY


# --- Release notes -------------------------------------------------------------------------


async def notes_period(project: Project, **given: Any) -> tuple[timedelta, timedelta]:
    return await period(project, **{"kind": "release_notes", "sources": ["github"]} | given)


async def test_release_notes_without_a_release_go_back_30_days(project: Project) -> None:
    await project.happens(40 * DAY)
    assert await notes_period(project) == (30 * DAY, 0 * DAY)


async def test_release_notes_cover_what_came_after_the_last_release(project: Project) -> None:
    for event_type, ago in (("tag", 9 * DAY), ("release", 5 * DAY), ("commit", 2 * DAY)):
        await project.happens(ago, event_type=event_type)
    assert await notes_period(project) == (5 * DAY, 0 * DAY)


async def test_release_notes_are_of_the_last_release_when_nothing_came_after(
    project: Project,
) -> None:
    for event_type, ago in (("tag", 9 * DAY), ("release.published", 5 * DAY), ("commit", 7 * DAY)):
        await project.happens(ago, event_type=event_type)
    assert await notes_period(project) == (9 * DAY, 5 * DAY)
    assert await notes_period(project, until=NOW - 8 * DAY) == (39 * DAY, 9 * DAY)
    assert await notes_period(project, until=NOW - 6 * DAY) == (9 * DAY, 6 * DAY)


async def test_a_tag_and_what_was_published_under_it_are_one_release(project: Project) -> None:
    v1, v2 = {"tag": "v1"}, {"tag": "v2"}
    await project.happens(9 * DAY, event_type="tag", metadata=v1)
    await project.happens(7 * DAY, event_type="commit")
    await project.happens(5 * DAY, event_type="tag", metadata=v2)
    await project.happens(4 * DAY, event_type="release.published", metadata=v2)
    assert await notes_period(project) == (9 * DAY, 4 * DAY)


async def test_releases_of_other_repositories_and_sources_are_no_bounds(project: Project) -> None:
    await project.happens(9 * DAY, event_type="tag", resource="acme/web")
    await project.happens(4 * DAY, event_type="tag", resource="acme/api")
    await project.happens(3 * DAY, event_type="tag", source="gitlab")
    await project.happens(2 * DAY, resource="acme/web")
    job = a_job(project.id, "release_notes", {"repo": "acme/web"}, ["github"])
    scope = await find_scope(project.database, job)
    assert (NOW - scope.since, scope.repo, scope.limit) == (9 * DAY, "acme/web", 1000)
    # Nobody asked for one: the notes are those of the last release, of its repository alone.
    assert await notes_period(project) == (34 * DAY, 4 * DAY)
    assert (
        await find_scope(project.database, a_job(project.id, "release_notes", {}, ["github"]))
    ).repo == "acme/api"


# --- Loading -------------------------------------------------------------------------------


async def titles(project: Project, **given: Any) -> list[str]:
    job = a_job(project.id, **given)
    scope = await find_scope(project.database, job)
    return [event.title for event in await load_events(project.database, job, scope)]


async def test_events_come_newest_first_and_only_from_the_period(project: Project) -> None:
    for ago in (15 * DAY, 14 * DAY, 13 * DAY, HOUR, 0 * DAY, -HOUR):
        await project.happens(ago, f"{ago / HOUR:.0f}")
    assert await titles(project) == ["0", "1", "312"]  # the start is exclusive, the end is not


FILTERED = [
    ("projects", "resource", "acme/web", "github"),
    ("eventTypes", "event_type", "release", "github"),
    ("branches", "branch", "main", "github"),
    ("priorities", "priority", "P1", "linear"),
]


@pytest.mark.parametrize(("dimension", "column", "value", "source"), FILTERED)
async def test_a_filter_narrows_its_source_and_no_other(
    project: Project, dimension: str, column: str, value: str, source: str
) -> None:
    await project.happens(3 * HOUR, "in", source=source, **{column: value})
    await project.happens(2 * HOUR, "out", source=source, **{column: "other"})
    await project.happens(1 * HOUR, "without", source=source)
    await project.happens(0 * HOUR, "foreign", source="slack")
    assert await titles(project, filters={source: {dimension: [value]}}) == ["foreign", "in"]
    both = {source: {dimension: [value, "other"]}}
    assert await titles(project, filters=both) == ["foreign", "out", "in"]
    assert await titles(project, sources=[source], filters=both) == ["out", "in"]
    assert await titles(project, filters={source: {dimension: []}}) == ["foreign"]


async def test_dimensions_of_a_filter_are_combined_with_and(project: Project) -> None:
    await project.happens(2 * HOUR, "both", resource="a", branch="main")
    await project.happens(1 * HOUR, "one", resource="a", branch="dev")
    filters = {"github": {"projects": ["a"], "branches": ["main"]}}
    assert await titles(project, filters=filters) == ["both"]


async def test_nothing_in_scope_is_no_result_and_says_when_something_last_happened(
    project: Project,
) -> None:
    with pytest.raises(NoResult) as caught:
        await titles(project)
    assert "newest" not in caught.value.sentence
    await project.happens(20 * DAY)
    await project.happens(18 * DAY, source="slack")
    with pytest.raises(NoResult, match="2026-05-26 12:00 UTC") as caught:
        await titles(project, sources=["github"])
    assert "between 2026-06-01 12:00 and 2026-06-15 12:00 UTC" in caught.value.sentence
    assert caught.value.meta == {"stage": "context"}


async def test_of_every_source_the_newest_events_are_loaded_whatever_the_others_do(
    project: Project,
) -> None:
    for n in range(40):
        await project.happens(n * HOUR, f"commit {n}")
    for n in range(3):
        await project.happens(5 * DAY + n * HOUR, f"message {n}", source="slack")
    job = a_job(project.id, "onboarding_brief", {"lookbackDays": 30, "maxEvents": 16})
    events = await load_events(project.database, job, await find_scope(project.database, job))
    assert len(events) == 33  # as many again to choose from, and one that tells of more
    assert [event.title for event in events[-3:]] == [f"message {n}" for n in range(3)]
    assert events == sorted(events, key=lambda event: event.occurred_at, reverse=True)
    _, context = await find_context(project.database, job)
    assert len(context.events) == 16 and context.omitted == 17
    assert {event.source for event in context.events} == {"github", "slack"}


async def test_contents_are_cut_so_that_no_context_fills_the_memory(project: Project) -> None:
    await project.happens(HOUR, "long", content="\u6f22" * 100_000)
    [event] = (await find_context(project.database, a_job(project.id)))[1].events
    assert event.content == "\u6f22" * 20_000
    wide = {"title": "long", "content": "x" * 5_000, "source": "slack", "event_type": "message"}
    many = [{**wide, "occurred_at": (NOW - n * HOUR / 9).isoformat()} for n in range(900)]
    for first in range(0, 900, 180):
        batch = (project.user_id, project.id, many[first : first + 180])
        await project.api.row("ingest_events", *batch)
    job = a_job(project.id)
    events = await load_events(project.database, job, await find_scope(project.database, job))
    assert {len(event.content or "") for event in events} == {2_000_000 // 901}


async def test_metadata_that_nobody_means_stays_out(project: Project) -> None:
    noise = {f"k{n}": hashlib.sha256(str(n).encode()).hexdigest() for n in range(900)}
    await project.happens(HOUR, "noise", metadata=noise)
    await project.happens(2 * HOUR, "sense", metadata={"files": ["a.py"] * 200})
    noisy, sensible = (await find_context(project.database, a_job(project.id)))[1].events
    assert (noisy.metadata, len(sensible.metadata["files"])) == ({}, 200)


KINDS: list[tuple[str, dict[str, Any], list[str] | None]] = [
    ("handoff", {}, None),
    ("cross_source_correlation", {"lookbackHours": 999, "maxEvents": 50}, None),
    ("onboarding_brief", {"lookbackDays": 99, "maxEvents": 50}, ["github", "slack"]),
    ("architecture_insight", {"lookbackDays": 99, "maxEvents": 1000}, ["github"]),
    ("release_notes", {}, ["github"]),
    ("release_notes", {"repo": "acme/web"}, ["github"]),
]


@pytest.mark.parametrize(("kind", "options", "sources"), KINDS)
async def test_nothing_of_another_project_gets_into_a_context(
    project: Project,
    ops: asyncpg.Connection,
    kind: str,
    options: dict[str, Any],
    sources: list[str] | None,
) -> None:
    """Not of the same user, though it is alike in everything, and whatever a filter names."""
    other = str(await ops.fetchval("select ops.create_project('B', $1)", project.user_id))
    secret = Project(project.database, project.api, project.user_id, other)
    for n in range(3):
        alike = {"resource": "acme/web", "external_id": f"{n:040x}", "branch": "main"}
        await project.happens(n * HOUR, f"ours {n}", **alike)
        await secret.happens(n * HOUR, f"SECRET {n}", **alike)
        await secret.happens(n * HOUR, f"SECRET {n}", source="slack", resource="acme/secret")
    await secret.happens(HOUR, "SECRET", event_type="tag", resource="acme/web")
    filters: dict[str, Any]
    for filters in ({}, {"github": {"projects": ["acme/web", "acme/secret"]}}):
        job = a_job(project.id, kind, options, sources, filters)
        scope, context = await find_context(project.database, job)
        assert [event.title for event in context.events] == ["ours 0", "ours 1", "ours 2"]
        theirs = await load_events(project.database, replace(job, project_id=secret.id), scope)
        assert len(theirs) > 3 or sources == ["github"]
        for brief in write_briefs(context, 5_000):
            assert "ours 0" in brief.text and "SECRET" not in brief.text
            assert [id for ids in brief.ids.values() for id in ids] == [
                event.id for event in context.events
            ]


# --- The provider and its answer -----------------------------------------------------------


class Looking:
    """A provider that keeps what it was given, and makes nothing of it."""

    context: Context | None = None

    async def complete(self, context: Context, calls: Calls) -> Completion:
        self.context = context
        raise NoResult("Enough.")


class Quoting:
    """A provider that makes one key change of each event."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        draft = {
            "title": "T", "summary": said("S"), "decisions": [], "open_questions": [],
            "next_steps": [], "key_changes": [said(e.title, *e.ids) for e in context.events],
        }  # fmt: skip
        return Completion(
            draft=HandoffDraft.model_validate(draft), model="m", prompt_tokens=5,
            completion_tokens=2,
        )  # fmt: skip


def said(text: str, *ids: str) -> dict[str, Any]:
    return {"text": text, "event_ids": list(ids)}


async def test_a_provider_sees_at_most_the_limit_and_is_told_that_there_is_more(
    project: Project,
) -> None:
    provider = Looking()
    job = a_job(project.id, "architecture_insight", {"lookbackDays": 14, "maxEvents": 3})
    for n, omitted in ((3, 0), (1, 1)):
        for k in range(n):
            await project.happens(HOUR * (10 * n + k), f"{n}-{k}")
        with pytest.raises(NoResult, match="Enough"):
            await generate(project.database, provider, job, Calls())
        assert provider.context and provider.context.omitted == omitted
        assert len(provider.context.events) == 3
        assert provider.context.events[0].title == f"{n}-0"


async def test_an_artifact_carries_what_the_draft_says_and_where_it_comes_from(
    project: Project,
) -> None:
    await project.happens(2 * HOUR, "The same", source="slack")
    await project.happens(1 * HOUR, "The same", source="slack")
    await project.happens(0 * HOUR, "Another")
    made = await generate(project.database, Quoting(), a_job(project.id), Calls())
    events = await project.api.rows("list_events", project.user_id, None, None, 9)
    ids = [row["id"] for row in events]
    assert made["key_changes"] == ["Another", "The same"]
    assert made["related_event_ids"] == ids
    assert made["data"]["key_changes"][1] == said("The same", *ids[1:])
    assert made["sources"] == ["github", "slack"]
    assert (made["period_start"], made["period_end"]) == (
        "2026-06-01T12:00:00Z",
        "2026-06-15T12:00:00Z",
    )
    assert made["token_usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert made["model_used"] == "m" and "Another" in made["markdown"]


def grounding(*ids: str) -> Context:
    events = tuple(
        Event(
            id=id, source="github", event_type="c", title="t", occurred_at=NOW, folded=(f"{id}f",)
        )
        for id in ids
    )
    return Context(kind="handoff", project_name="P", since=NOW, until=NOW, events=events)


def handoff(**lists: list[dict[str, Any]]) -> HandoffDraft:
    empty: dict[str, Any] = dict.fromkeys(
        ("key_changes", "decisions", "open_questions", "next_steps"), ()
    )
    parts = {name: list(items) for name, items in (empty | lists).items()}
    return HandoffDraft(title="T", summary=said("S", "a", "x"), **parts)  # type: ignore[arg-type]


def test_foreign_ids_go_and_with_its_last_id_a_statement_goes() -> None:
    draft = handoff(
        key_changes=[said("kept", "x", "a", "bf"), said("foreign", "x"), said("none")],
        decisions=[said("foreign", "y")],
    )
    kept = ground(draft, grounding("a", "b"))
    assert isinstance(kept, HandoffDraft)
    assert [s.model_dump() for s in kept.key_changes] == [said("kept", "a", "bf")]
    assert kept.decisions == [] and kept.summary.event_ids == ["a"]
    assert ground(kept, grounding("a", "b")) == kept


def test_a_draft_of_which_nothing_is_left_is_no_result() -> None:
    for draft in (handoff(), handoff(next_steps=[said("foreign", "x"), said("none")])):
        with pytest.raises(NoResult):
            ground(draft, grounding("a"))


def test_an_emptied_section_of_notes_goes() -> None:
    sections = [
        {"heading": "Fixed", "items": [said("foreign", "x")]},
        {"heading": "Added", "items": [said("real", "a"), said("foreign", "x")]},
        {"heading": "Removed", "items": []},
    ]
    people = [{"name": "Ada", "event_ids": ["a", "x"]}, {"name": "Eve", "event_ids": ["x"]}]
    draft = ReleaseNotesDraft.model_validate(
        {"title": "T", "version": None, "summary": said("S"), "sections": sections,
         "contributors": people}
    )  # fmt: skip
    kept = ground(draft, grounding("a"))
    assert isinstance(kept, ReleaseNotesDraft)
    assert [(s.heading, [i.text for i in s.items]) for s in kept.sections] == [("Added", ["real"])]
    assert [(c.name, c.event_ids) for c in kept.contributors] == [("Ada", ["a"])]


def test_lists_that_hold_no_event_ids_are_left_alone() -> None:
    item = {"title": "C", "text": "t", "references": ["x", "ENG-4"], "sources": ["x"],
            "event_ids": ["a", "x"]}  # fmt: skip
    draft = CorrelationDraft.model_validate(
        {"title": "T", "summary": said("S"), "correlations": [item, item | {"event_ids": ["x"]}]}
    )
    kept = ground(draft, grounding("a"))
    assert isinstance(kept, CorrelationDraft)
    assert [c.model_dump() for c in kept.correlations] == [item | {"event_ids": ["a"]}]
