"""Asking for an artifact and reading the job: the promise of a 202, and what a client reads."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import asyncpg
import orjson
import pytest
from conftest import Caller
from test_error_shape import Gate, send, serving

from app.db import Connection
from app.main import COMMAND_TIMEOUT

Drain = Callable[..., Awaitable[None]]
CONTRACT = {
    *("id", "project_id", "kind", "status", "result_kind", "result_id", "error", "error_code"),
    *("error_meta", "created_at", "updated_at"),
}
ADDITIONS = {
    *("done", "outcome", "attempt", "retry_of", "started_at", "completed_at", "deadline_at"),
    *("cancel_requested_at", "start_deadline_at", "progress", "queue", "eta", "timings", "usage"),
    *("priority", "metadata", "recovering", "expires_at", "data_removed", "urls"),
}
KINDS = {
    "correlation": "cross_source_correlation",
    "onboarding": "onboarding_brief",
    "architecture": "architecture_insight",
    "release_notes": "release_notes",
}


async def stored(sql: asyncpg.Connection, job_id: str) -> dict[str, Any]:
    """The scope of a job, as submitted."""
    value = await sql.fetchval("select input from jobs where id = $1", job_id)
    return dict(orjson.loads(value))


async def counts(sql: asyncpg.Connection) -> tuple[int, int]:
    """How many jobs and how many tickets there are."""
    row = await sql.fetchrow(
        "select (select count(*) from jobs), (select count(*) from procrastinate_jobs)"
    )
    assert row
    return row[0], row[1]


async def test_a_202_names_the_job_and_says_where_and_when_to_ask(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert answer.status_code == 202
    body = answer.json()
    assert set(body) == {"jobId", "status", "job", "urls", "deduplicated"}
    assert body["status"] == "pending"
    assert answer.headers["location"] == f"/api/v1/jobs/{body['jobId']}"
    assert 1 <= int(answer.headers["retry-after"]) <= 15
    assert answer.headers["cache-control"] == "no-store"

    followed = await caller.http.get(str(answer.request.url.join(answer.headers["location"])))
    assert followed.json()["job"]["id"] == body["jobId"]
    ticket = await sql.fetchval("select args ->> 'job_id' from procrastinate_jobs")
    assert ticket == body["jobId"]
    assert await counts(sql) == (1, 1)


async def test_a_job_is_read_through_its_whole_life(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    for status in ("pending", "processing"):
        if status == "processing":
            ticket = await sql.fetchval("select ticket_id from jobs")
            await sql.execute("select claim_job($1, $2, 'w', 60)", job_id, ticket)
        answer = await caller.http.get(f"/jobs/{job_id}")
        body = answer.json()
        assert set(body) == {"job", "result"} and body["result"] is None
        assert set(body["job"]) == CONTRACT | ADDITIONS
        ended = ("result_kind", "result_id", "error", "error_code")
        assert {name: body["job"][name] for name in ended} == dict.fromkeys(ended)
        assert body["job"]["status"] == status
        assert body["job"]["error_meta"] == {}
        assert 1 <= int(answer.headers["retry-after"]) <= 15
        assert answer.headers["cache-control"] == "no-store"

    token = await sql.fetchval("select lease_token from jobs")
    await sql.execute("select release_job($1, $2)", job_id, token)
    await drain()

    answer = await caller.http.get(f"/jobs/{job_id}")
    body = answer.json()
    assert set(body["job"]) == CONTRACT | ADDITIONS
    assert (body["job"]["status"], body["job"]["result_kind"]) == ("completed", "handoff")
    assert body["result"]["id"] == body["job"]["result_id"]
    assert "retry-after" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    [listed] = (await caller.http.get("/handoffs")).json()["handoffs"]
    assert listed == body["result"]


async def test_a_failed_job_says_why_and_has_no_result(caller: Caller, drain: Drain) -> None:
    job_id = await caller.submit()
    await drain()
    answer = await caller.http.get(f"/jobs/{job_id}")
    job = answer.json()["job"]
    assert answer.json()["result"] is None
    assert (job["status"], job["error_code"]) == ("failed", "no_result")
    assert isinstance(job["error"], str) and isinstance(job["error_meta"], dict)
    assert (job["result_kind"], job["result_id"]) == (None, None)
    assert "retry-after" not in answer.headers


async def test_times_and_ids_of_a_job_are_of_the_agreed_form(caller: Caller) -> None:
    job = (await caller.job(await caller.submit()))["job"]
    for name in ("created_at", "updated_at"):
        assert job[name].endswith("Z") and datetime.fromisoformat(job[name])
    assert job["id"][14] == "7" and job["id"] == job["id"].lower()  # UUIDv7


async def test_a_job_whose_lease_ran_out_is_shown_as_recovering(
    dsn: str, caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    ticket = await sql.fetchval("select ticket_id from jobs")
    await sql.execute("select claim_job($1, $2, 'w', 3600)", job_id, ticket)
    assert (await caller.job(job_id))["job"]["recovering"] is False
    async with sql.transaction():  # holds the job's lock, so that no sweep comes first
        await sql.execute("select from jobs for update")
        other = await asyncpg.connect(dsn)
        await other.execute("update leases set expires_at = now() - interval '1 second'")
        await other.close()
        job = (await caller.job(job_id))["job"]
        assert (job["status"], job["recovering"]) == ("processing", True)


@pytest.mark.parametrize("path", KINDS)
async def test_each_kind_in_the_path_has_its_job_kind_and_insight_kind(
    path: str, caller: Caller, drain: Drain
) -> None:
    await caller.ingest(
        {"title": "fix(cart): ENG-4 total is wrong", "author": "Ada", "resource": "acme/web"},
        {"title": "ENG-4 is fixed", "source": "slack", "author": "Bo", "event_type": "message"},
        {"title": "v1.0", "event_type": "tag", "resource": "acme/web"},
    )
    job_id = await caller.submit(f"/projects/{caller.project_id}/insights/{path}")
    await drain()
    ended = await caller.job(job_id)
    assert ended["job"]["kind"] == KINDS[path]
    assert ended["job"]["status"] == "completed", ended
    assert ended["job"]["result_kind"] == "insight"
    assert ended["result"]["kind"] == KINDS[path]
    assert ended["result"]["requested_by"] == caller.user_id


async def test_the_options_of_a_kind_are_stored_with_their_defaults(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    expected = {
        "correlation": {"lookbackHours": 168, "maxEvents": 150},
        "onboarding": {"lookbackDays": 30, "maxEvents": 400},
        "architecture": {"lookbackDays": 14, "maxEvents": 250},
        "release_notes": {"style": "release_notes"},
    }
    for path, options in expected.items():
        job_id = await caller.submit(f"/projects/{caller.project_id}/insights/{path}")
        assert (await stored(sql, job_id))["options"] == options
    assert (await stored(sql, await caller.submit()))["options"] == {}


async def test_every_option_is_taken_up_to_its_limits(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    given: dict[str, dict[str, Any]] = {
        "correlation": {"lookbackHours": 2160, "maxEvents": 1},
        "onboarding": {
            "newMemberRole": "backend",
            "focusArea": "cache",
            "lookbackDays": 365,
            "maxEvents": 1000,
        },
        "architecture": {"focusQuestion": "x" * 2000, "lookbackDays": 1, "maxEvents": 1000},
        "release_notes": {"repo": "acme/web", "style": "pr_description"},
    }
    for path, options in given.items():
        job_id = await caller.submit(f"/projects/{caller.project_id}/insights/{path}", **options)
        assert (await stored(sql, job_id))["options"] == options


async def test_release_notes_take_one_source_and_it_is_github_unless_said(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    path = f"/projects/{caller.project_id}/insights/release_notes"
    assert (await stored(sql, await caller.submit(path)))["sources"] == ["github"]
    job_id = await caller.submit(path, source="gitlab", filters={"gitlab": {"branches": ["x"]}})
    scope = await stored(sql, job_id)
    assert scope["sources"] == ["gitlab"]
    assert scope["filters"] == {"gitlab": {"branches": ["x"]}}


async def test_filters_alone_name_their_sources(caller: Caller, sql: asyncpg.Connection) -> None:
    filters: dict[str, Any] = {"slack": {}, "github": {"projects": ["acme/web"]}}
    scope = await stored(sql, await caller.submit(filters=filters))
    assert sorted(scope["sources"]) == ["github", "slack"]
    assert scope["filters"] == filters


async def test_empty_and_unknown_values_of_filters_are_no_error(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing", "resource": "acme/web"})
    filters: dict[str, Any]
    for filters in ({}, {"github": {}}, {"github": {"projects": ["acme/web"]}}):
        job_id = await caller.submit(filters=filters)
        await drain()
        assert (await caller.job(job_id))["job"]["status"] == "completed", filters
    for filters in (
        {"github": {"projects": ["nobody/nothing"]}},
        {"github": {"eventTypes": ["x"], "branches": ["y"], "priorities": ["z"]}},
        {"github": {"projects": []}},
    ):
        job_id = await caller.submit(filters=filters)
        await drain()
        assert (await caller.job(job_id))["job"]["error_code"] == "no_result", filters


async def test_the_saved_scope_counts_when_neither_sources_nor_filters_are_given(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    saved = {"sources": ["slack"], "filters": {"slack": {"projects": ["general"]}}}
    await sql.execute("update projects set scope = $1", orjson.dumps(saved).decode())
    await caller.ingest(
        {"title": "We decided to ship on Friday.", "source": "slack", "resource": "general"},
        {"title": "We decided to wait.", "source": "slack", "resource": "random"},
        {"title": "feat: a thing"},
    )
    bodies: list[dict[str, Any]] = [{}, {"sources": None, "filters": None}]
    for body in bodies:
        scope = await stored(sql, await caller.submit(**body))
        assert (scope["sources"], scope["filters"]) == (saved["sources"], saved["filters"])
    named = await stored(sql, await caller.submit(sources=["github"]))
    assert (named["sources"], named["filters"]) == (["github"], {})

    job_id = await caller.submit()
    await drain()
    result = (await caller.job(job_id))["result"]
    assert "ship on Friday" in result["markdown"]
    assert "wait" not in result["markdown"] and "a thing" not in result["markdown"]


async def test_a_saved_scope_without_code_is_not_enough_for_an_architecture_insight(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await sql.execute("""update projects set scope = '{"sources": ["slack"]}'""")
    path = f"/projects/{caller.project_id}/insights/architecture"
    answer = await caller.http.post(path, json={})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("sources: ")
    assert (await caller.http.post(path, json={"sources": ["gitlab"]})).status_code == 202
    assert await counts(sql) == (1, 1)


async def test_without_a_ticket_there_is_no_job_and_no_202(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await sql.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        " raise 'no tickets today'; end $$;"
        "create trigger refuse before insert on procrastinate_jobs"
        " for each row execute function refuse()"
    )
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert answer.status_code == 500
    assert "tickets" not in answer.json()["error"]
    assert await counts(sql) == (0, 0)


async def test_a_ticket_that_cannot_be_had_in_time_is_503_and_no_job(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    async with sql.transaction():
        await sql.execute("lock table procrastinate_jobs in access exclusive mode")
        answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert await counts(sql) == (0, 0)


async def test_the_database_gives_up_on_a_statement_before_the_api_does(dsn: str) -> None:
    """Else a 503 is answered while the job is still on its way into the table."""
    async with serving(dsn) as (_, app):
        for name in ("lock_timeout", "statement_timeout"):
            query = "select setting::int / 1000.0 from pg_settings where name = $1"
            seconds = await app.state.database.pool.fetchval(query, name)
            assert 0 < seconds < COMMAND_TIMEOUT, name


async def test_a_database_that_goes_away_before_the_answer_is_no_202(
    dsn: str, caller: Caller, monkeypatch: pytest.MonkeyPatch, sql: asyncpg.Connection
) -> None:
    gate = Gate(dsn)
    await gate.open()
    original = Connection.row

    async def cut(self: Connection, name: str, *args: Any, **options: Any) -> Any:
        if name == "submit_job":
            gate.shut()
        return await original(self, name, *args, **options)

    monkeypatch.setattr(Connection, "row", cut)
    body = orjson.dumps({"project_id": caller.project_id})
    async with serving(gate.dsn) as (base_url, _):
        head = ["POST /api/v1/handoffs HTTP/1.1", f"Authorization: Bearer {caller.key}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        answer = await send(base_url, head, body)
    assert answer.status == 503
    jobs, tickets = await counts(sql)
    assert jobs == tickets
