"""The runbook: each line of SQL in it runs as the on-call, and shows what it is said to show.

For every section the situation is made that it is for. A statement that fails, or shows nothing,
fails the test, and so do a check or an error code without a section, and a section about nothing.
"""

import ast
import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest
from chaos import drill
from chaos.runbook import RUNBOOK, Statement, beginning, chapters, parts, sections, statements
from test_ops_views import CONDITIONS, SERVERS, Site, crashing_job

from app import errors
from app.errors import ApiError
from app.schemas import ErrorCode

# What the actions of a section mend at once; the others take a process, or a person.
MENDED = {
    "held",
    "longest_attempt",
    "pending_of_a_project",
    "oldest_transaction",
    "slot_xmin",
    "dead_tuples",
}
# Whose actions are not for the psql at hand: they are the client's, or another program's.
WITHOUT_SQL = {
    "invalid_request",
    "method_not_allowed",
    "request_timeout",
    "payload_too_large",
    "uri_too_long",
    "unsupported_media_type",
    "headers_too_large",
    "internal_error",
}


CHAPTERS = chapters()
SECTIONS = sections()


class OnCall:
    """Somebody with psql, and the situation that they are called for."""

    def __init__(self, site: Site, psql: asyncpg.Connection) -> None:
        self.site, self.psql, self.sql = site, psql, site.sql
        self.values: dict[str, Any] = {
            "user": site.user, "project": site.project, "kind": "handoff",
            "error_code": "generation_failed", "table": "jobs",
        }  # fmt: skip

    async def fails(self, name: str) -> bool:
        """Is a check not ok?"""
        return bool(await self.psql.fetchval("select not ok from ops.checks where name = $1", name))

    async def follow(self, lines: list[Statement]) -> None:
        """Type the lines of a section."""
        for line in lines:
            session = self.sql if line.as_administrator else self.psql
            text = line.filled(self.values)
            try:
                shown = await session.fetch(text)
            except asyncpg.PostgresError as error:
                raise AssertionError(f"{error}\n{text}") from error
            assert shown or not text.startswith("select"), f"shows nothing:\n{text}"


@pytest.fixture
async def oncall(sql: asyncpg.Connection, dsn: str) -> AsyncIterator[OnCall]:
    site = Site(sql, dsn)
    await site.open()
    await sql.execute("select ops.go_live()")
    worker = await sql.fetchval("select id from workers")
    settings = {"role": "baton_ops", "application_name": "psql"}
    psql = await asyncpg.connect(dsn, server_settings=settings)
    process = await asyncpg.connect(dsn, server_settings={"application_name": "baton serve"})
    oncall = OnCall(site, psql)
    oncall.values["worker"] = worker
    yield oncall
    await process.close()
    await psql.close()


# --- What there is a section for -----------------------------------------------------------


async def test_each_check_has_a_section_and_each_section_a_check(sql: asyncpg.Connection) -> None:
    names = {row[0] for row in await sql.fetch("select name from ops.checks")}
    assert set(parts(CHAPTERS["Checks"], "###")) == names


def test_each_error_code_has_a_section_and_each_section_a_code() -> None:
    raised = {
        one.code
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, ApiError)
    }
    of_jobs = set(get_args(ErrorCode))  # which a question may be answered with too
    told = set(parts(CHAPTERS["Error codes of requests"], "###"))
    assert told == (raised - of_jobs) | {"method_not_allowed"}
    assert set(parts(CHAPTERS["Error codes of jobs"], "###")) == of_jobs


def test_each_link_leads_to_a_section() -> None:
    text = RUNBOOK.read_text()
    anchors = {
        re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text)
    assert {anchor for file, anchor in links if not file} <= anchors
    files = {file for file, _ in links if file}
    assert files and all((RUNBOOK.parent / file).is_file() for file in files)


def test_every_section_with_sql_is_followed_by_a_test() -> None:
    tested = set(BY_CHECK) | set(SITUATIONS)
    assert {title for title, lines in SECTIONS.items() if lines} <= tested
    assert {title for title, lines in SECTIONS.items() if not lines} == WITHOUT_SQL


def test_the_drill_types_nothing_but_lines_of_the_runbook() -> None:
    typed = [
        [str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)]
        for call in ast.walk(ast.parse(Path(drill.__file__).read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "type"
    ]
    assert len(typed) > 10
    for section, *lines in typed:
        known = SECTIONS[section] if section else beginning()
        assert all(any(one.text.startswith(line) for one in known) for line in lines), lines


# --- Checks --------------------------------------------------------------------------------


MADE = [*((condition, check) for condition, check, _ in CONDITIONS), *(one[2:] for one in SERVERS)]
BY_CHECK = {check: condition for condition, check in reversed(MADE) if check}


@pytest.mark.parametrize("name", BY_CHECK)
async def test_the_section_of_a_check_leads_on_while_it_fails(oncall: OnCall, name: str) -> None:
    site = oncall.site
    # The condition ends what an action may have ended already.
    with suppress(asyncpg.UndefinedObjectError):
        async with AsyncExitStack() as stack:
            if name in ("dead_workers", "open_breakers"):
                await stack.enter_async_context(crashing_job(site))
            if name == "open_breakers":
                await site.calls("timeout")
            if name == "oldest_pending":
                await site.sql.execute("select ops.pause('release_notes')")
            await stack.enter_async_context(BY_CHECK[name](site))
            assert await oncall.fails(name)
            oncall.values |= {
                "job": await site.sql.fetchval(
                    "select id from jobs order by completed_at desc limit 1"),  # none: first
                "pid": await site.sql.fetchval(
                    "select pid from pg_stat_activity where state = 'idle in transaction' "
                    "and datname = current_database()"),
                "slot": "gone",
            }  # fmt: skip
            await oncall.follow(SECTIONS[name])
            async with asyncio.timeout(10):  # a session that is told to end takes a moment
                while name in MENDED and await oncall.fails(name):
                    await site.sql.execute("select pg_stat_force_next_flush()")


# --- Error codes, and the rest -------------------------------------------------------------

SITUATIONS: dict[str, Callable[[OnCall], Awaitable[None]]] = {}


def situation(title: str) -> Callable[[Callable[[OnCall], Awaitable[None]]], None]:
    """Declares what a section is for."""

    def declare(make: Callable[[OnCall], Awaitable[None]]) -> None:
        SITUATIONS[title] = make

    return declare


@situation("plan_violation")
async def _(oncall: OnCall) -> None:
    await oncall.sql.execute("select ops.create_plan('small', flows => '{release_notes}')")
    await oncall.sql.execute("select ops.set_plan($1, 'small')", oncall.site.user)
    await failed(oncall, await oncall.site.submit(), "plan_violation")


@situation("quota_exceeded")
async def _(oncall: OnCall) -> None:
    await oncall.sql.execute("select ops.create_plan('small', 0)")
    await oncall.sql.execute("select ops.set_plan($1, 'small')", oncall.site.user)
    await failed(oncall, await oncall.site.submit(), "quota_exceeded")


@situation("generation_failed")
async def _(oncall: OnCall) -> None:
    job = await oncall.site.running()
    await oncall.site.calls("timeout")
    await oncall.sql.execute("update provider_calls set job_id = $1", job)
    await fail(oncall, job, "generation_failed")


@situation("no_result")
async def _(oncall: OnCall) -> None:
    event = {"source": "slack", "event_type": "message", "title": "Hello"}
    await oncall.sql.execute(
        "select * from ingest_events($1, $2, $3)",
        oncall.site.user, oncall.site.project, json.dumps([event]),
    )  # fmt: skip
    await fail(oncall, await oncall.site.running(), "no_result")


@situation("cancelled")
async def _(oncall: OnCall) -> None:
    job = await oncall.site.submit()
    await oncall.sql.execute("select ops.cancel_job($1, 'Nobody wants it.')", job)
    await failed(oncall, job, "cancelled")


@situation("timeout")
async def _(oncall: OnCall) -> None:
    await oncall.site.ended(bad=0, good=1)
    job = await oncall.site.submit()
    await oncall.sql.execute("update jobs set deadline_at = baton_now() where id = $1", job)
    await oncall.sql.execute("select sweep_job($1)", job)
    await failed(oncall, job, "timeout")


@situation("worker_lost")
async def _(oncall: OnCall) -> None:
    job = await oncall.site.submit()
    for _ in range(3):
        token = await oncall.site.claim(job)
        await oncall.sql.execute("select crash_job($1, $2, 'Lost.', '{\"signal\": 9}')", job, token)
    await failed(oncall, job, "worker_lost")


async def fail(oncall: OnCall, job: str, code: str) -> None:
    await oncall.sql.execute(
        "select fail_job(id, lease_token, $2, 'Sorry.', '{}') from jobs where id = $1", job, code
    )
    await failed(oncall, job, code)


async def failed(oncall: OnCall, job: str, code: str) -> None:
    """The job that somebody reports."""
    assert await oncall.sql.fetchval("select error_code from jobs where id = $1", job) == code
    oncall.values |= {"job": job, "error_code": code}


@situation("unauthorized")
async def _(oncall: OnCall) -> None:
    key = await oncall.sql.fetchval("select ops.create_api_key($1, 'laptop')", oncall.site.user)
    await oncall.sql.execute("select ops.revoke_api_key($1)", key[:11])
    oncall.values["prefix"] = key


@situation("forbidden")
async def _(oncall: OnCall) -> None:
    organization = await oncall.sql.fetchval("select ops.create_organization('Acme')")
    await oncall.sql.execute("select ops.add_member($1, $2)", organization, oncall.site.user)
    oncall.values["organization"] = organization


@situation("not_found")
async def _(oncall: OnCall) -> None:
    oncall.values["job"] = await oncall.site.submit()


@situation("conflict")
async def _(oncall: OnCall) -> None:
    oncall.values["job"] = await oncall.site.submit()


@situation("gone")
async def _(oncall: OnCall) -> None:
    job = await oncall.site.running()
    await fail(oncall, job, "no_result")
    await oncall.sql.execute("select delete_job($1, $2)", oncall.site.user, job)
    oncall.values["deleted_job"] = job


@situation("idempotency_key_reuse")
async def _(oncall: OnCall) -> None:
    await oncall.sql.execute(
        "insert into idempotency_keys (user_id, route, key, fingerprint, job_id) "
        "values ($1, 'handoff', 'k', sha256(''), $2)", oncall.site.user, await oncall.site.submit(),
    )  # fmt: skip


@situation("rate_limited")
async def _(oncall: OnCall) -> None:
    await oncall.sql.execute("select ops.set_limit($1, 'default', 1)", oncall.site.user)


@situation("too_many_waits")
async def _(oncall: OnCall) -> None:
    await oncall.sql.execute("select ops.create_api_key($1)", oncall.site.user)
    await oncall.sql.execute(
        "select t.* from api_keys k, take_wait_slot(k.user_id, k.id, 20, 60, '{}') t"
    )


@situation("queue_full")
async def _(oncall: OnCall) -> None:
    await oncall.site.submit()


@situation("unavailable")
async def _(oncall: OnCall) -> None:
    """Whatever is the matter: the one who asks is a session, too."""


@situation("A key has leaked")
async def _(oncall: OnCall) -> None:
    key = await oncall.sql.fetchval("select ops.create_api_key($1, 'laptop')", oncall.site.user)
    await oncall.site.submit()
    oncall.values["prefix"] = key[:11]


@situation("A table has grown")
async def _(oncall: OnCall) -> None:
    await oncall.site.ended(bad=1, good=1)


@pytest.mark.parametrize("title", SITUATIONS)
async def test_the_section_of_a_report_leads_on(oncall: OnCall, title: str) -> None:
    await SITUATIONS[title](oncall)
    await oncall.follow(SECTIONS[title])


async def test_every_view_answers_the_on_call(oncall: OnCall) -> None:
    calls = await oncall.psql.fetch("select call from ops.help where what = 'view'")
    assert len(calls) > 10
    for call in calls:
        await oncall.psql.fetch(call[0])


async def test_the_lines_of_the_page_on_backups_lead_on(oncall: OnCall) -> None:
    await oncall.site.delivery()
    await oncall.sql.execute("select ops.hold('A copy.')")
    await oncall.follow(statements((RUNBOOK.parent / "backup.md").read_text()))


async def test_what_comes_before_the_sections_leads_on(oncall: OnCall) -> None:
    await oncall.site.ended(bad=10, good=0)
    await crashing_job(oncall.site).__aenter__()
    failures = await oncall.sql.fetch("select id from jobs where status = 'failed' limit 1")
    oncall.values["job"] = failures[0]["id"]
    await oncall.follow(beginning())
    for chapter in CHAPTERS.values():
        await oncall.follow(statements(chapter.partition("\n### ")[0]))
