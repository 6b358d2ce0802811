"""How long things are kept: what goes, what stays, what clients see of it, and what it costs."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
from conftest import Caller, Workers
from test_backup import working
from test_jobs import Drain
from test_schema import LOST, ROW
from test_worker import Gate

from app import retention
from app.db import Unavailable
from app.migration import migrate
from app.retention import apply_retention
from bench.bloat import ASK, LIVES

NAMES = (
    *("jobs", "handoffs", "insights", "events", "provider_calls", "charges"),
    *("webhook_deliveries", "deleted_jobs", "idempotency_keys", "hook_deliveries"),
    *("untracked_events", "search_entries", "audit"),
)
BATCH = "select apply_retention($1)"


@pytest.fixture
async def ada(sql: asyncpg.Connection) -> Any:
    return await sql.fetchval("select ops.create_user('ada@example.com')")


@pytest.fixture
async def project(sql: asyncpg.Connection, ada: Any) -> Any:
    return await sql.fetchval("select ops.create_project('Demo', $1)", ada)


@pytest.fixture
async def other(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's connection."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def at(sql: asyncpg.Connection, offset: str) -> None:
    """Move the clock of this session."""
    await sql.execute(f"set baton.clock_offset = '{offset}'")


async def made(sql: asyncpg.Connection, project: Any, count: int, offset: str = "0") -> None:
    """Rows in every table that has a retention, `count` in each, as of a time."""
    await at(sql, offset)
    old_id = (
        "overlay(uuid_at(baton_now() + n * interval '1 ms')::text "
        "placing right(gen_random_uuid()::text, 21) from 16)::uuid"
    )
    these = "from jobs where completed_at = baton_now() and kind = 'handoff'"
    artifacts = [
        LOST.format(table, ROW.replace("}", ', "status": "active"}'))
        + f" where j.completed_at = baton_now() and j.result_kind = '{kind}'"
        for table, kind in (("handoffs", "handoff"), ("insights", "insight"))
    ]
    async with sql.transaction():  # so that all is of one time
        await sql.execute(
            "insert into jobs (id, user_id, project_id, kind, input, credits, status, outcome, "
            f"result_kind, result_id, completed_at) select {old_id}, owner_id, p.id, "
            "case n % 2 when 0 then 'handoff' else 'onboarding_brief' end, '{}', 1, 'completed', "
            "'succeeded', case n % 2 when 0 then 'handoff' else 'insight' end, uuidv7(), "
            "baton_now() from projects p, generate_series(1, 2 * $2::int) n where p.id = $1",
            project,
            count,
        )
        for statement in (
            *artifacts,
            "insert into charges (job_id, user_id, project_id, payer_id, kind, credits, "
            f"from_grants) select id, user_id, project_id, user_id, kind, 1, 1 {these}",
            "insert into webhook_deliveries (id, job_id, project_id, url, type, payload, state, "
            "ended_at, next_attempt_at) select 'msg_' || replace(id::text, '-', ''), id, "
            f"project_id, 'http://a', 'job.failed', '{{}}', 'delivered', baton_now(), null {these}",
            "insert into provider_calls (job_id, attempt, user_id, project_id, kind, model, "
            "purpose, outcome, prompt_tokens, completion_tokens, seconds) select id, 1, user_id, "
            f"project_id, kind, 'm', 'draft', 'ok', 1, 1, 1 {these}",
            "insert into deleted_jobs (id, project_id) "
            f"select gen_random_uuid(), project_id {these}",
            "insert into idempotency_keys (user_id, route, key, fingerprint, job_id) "
            f"select user_id, 'r', id::text, sha256('x'), id {these}",
            "insert into events (id, user_id, project_id, source, event_type, title, occurred_at) "
            f"select id, user_id, project_id, 'github', 'commit', '-', baton_now() {these}",
            f"insert into ops.audit (what) select 'test' {these}",
            "insert into integrations (id, source, user_id, workspace_name) select id, 'github', "
            f"owner_id, name from projects where id = '{project}' on conflict do nothing",
            "insert into resources (integration_id, id, name, type) "
            f"values ('{project}', 'r', 'r', 'repository') on conflict do nothing",
            "insert into hook_deliveries (integration_id, delivery_id) "
            f"select project_id, id::text {these}",
            "insert into untracked_events (id, integration_id, resource_id, event) "
            f"select id, project_id, 'r', '{{}}' {these}",
        ):
            await sql.execute(statement)
    await at(sql, "0")


async def counted(sql: asyncpg.Connection) -> dict[str, int]:
    """How many rows the tables of NAMES have."""
    return {
        name: await sql.fetchval(f"select count(*) from {'ops.' * (name == 'audit')}{name}")
        for name in NAMES
    }


# --- What clients see ----------------------------------------------------------------------


async def test_a_job_says_until_when_it_is_kept_once_it_has_ended(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    assert (await caller.job(job_id))["job"]["expires_at"] is None
    await drain()
    job = (await caller.job(job_id))["job"]
    kept = datetime.fromisoformat(job["expires_at"]) - datetime.fromisoformat(job["completed_at"])
    assert (kept, job["data_removed"]) == (timedelta(days=30), False)
    await sql.execute("select ops.set_retention('jobs', null)")
    assert (await caller.job(job_id))["job"]["expires_at"] is None


@pytest.mark.parametrize("kind", ["handoffs", "insights"])
async def test_a_job_outlives_its_artifact_and_says_so(
    caller: Caller, drain: Drain, sql: asyncpg.Connection, kind: str
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    path = f"/projects/{caller.project_id}/insights"
    job_id = await caller.submit("/handoffs" if kind == "handoffs" else f"{path}/release_notes")
    await drain()
    before = await caller.http.get(f"/jobs/{job_id}")
    await at(sql, "2 days")
    assert await sql.fetchval("select removed from ops.purge('1 day', $1)", kind) == 1
    answer = await caller.http.get(
        f"/jobs/{job_id}", headers={"If-None-Match": before.headers["etag"]}
    )
    assert answer.status_code == 200
    job, result = answer.json()["job"], answer.json()["result"]
    assert (job["status"], job["data_removed"], result) == ("completed", True, None)
    assert job["result_id"] == before.json()["job"]["result_id"]
    listed = "/handoffs" if kind == "handoffs" else path
    assert (await caller.http.get(listed)).json()[kind] == []


async def test_an_artifact_outlives_its_job_which_is_gone_and_not_unknown(
    caller: Caller, stranger: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    asked: dict[str, Any] = {
        "json": {"project_id": caller.project_id},
        "headers": {"Idempotency-Key": "k"},
    }
    job_id = (await caller.http.post("/handoffs", **asked)).json()["jobId"]
    await drain()
    result = (await caller.job(job_id))["result"]
    await at(sql, "31 days")
    assert await sql.fetchval("select ops.purge('30 days')") == (1, False)
    for method, path in (
        *(("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry"), ("DELETE", "")),
    ):
        answer = await caller.http.request(method, f"/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["code"]) == (410, "gone"), path
    unknown = await stranger.http.get(f"/jobs/{job_id}")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    assert (await caller.http.post("/handoffs", **asked)).status_code == 410
    assert (await caller.http.get(f"/handoffs/{result['id']}")).json()["handoff"] == result
    assert await sql.fetchval("select count(*) from job_events") == 0
    assert await sql.fetchval("select count(*) from charges") == 1


# --- What goes and what stays --------------------------------------------------------------


async def test_only_what_is_older_goes_from_every_table(
    sql: asyncpg.Connection, project: Any
) -> None:
    for name in NAMES:
        await sql.execute("select ops.set_retention($1, '100 days')", name)
    await sql.execute("delete from ops.audit")
    await made(sql, project, 3, "-101 days")
    await made(sql, project, 2, "-99 days")
    days = timedelta(days=100)
    # What goes with a job or comes of its going, is looked at first.
    for name in reversed(NAMES):
        before = await counted(sql)
        removed = await sql.fetchval(
            "select removed from remove_old($1, now() - $2::interval, null, 100)", name, days
        )
        after = await counted(sql)
        old = 6 if name == "jobs" else 3
        assert (removed, before[name] - after[name]) == (old, old), name
        noted = {"deleted_jobs": -6} if name == "jobs" else {}
        assert {n: before[n] - after[n] for n in NAMES if n != name and before[n] != after[n]} == (
            noted
        )


async def test_what_is_not_over_stays_however_old_it_is(
    sql: asyncpg.Connection, ada: Any, project: Any
) -> None:
    await made(sql, project, 1, "-50 days")
    waiting = await sql.fetchval("select id from jobs where kind = 'handoff'")
    await sql.execute(
        "update webhook_deliveries set state = 'waiting', ended_at = null, next_attempt_at = now()"
    )
    pending = await sql.fetchval(
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')", ada, project
    )
    await at(sql, "50 days")
    purge = "select removed from ops.purge('2 days', $1)"
    assert await sql.fetchval(purge, "webhook_deliveries") == 0
    assert await sql.fetchval(purge, "jobs") == 1
    left = await sql.fetchval("select array_agg(id order by id) from jobs")
    assert left == [waiting, pending]
    # Nobody will try that again: its endpoint is disabled.
    await sql.execute("update webhook_deliveries set next_attempt_at = null")
    assert await sql.fetchval(purge, "jobs") == 1


async def test_what_grants_have_paid_stays_paid(
    sql: asyncpg.Connection, ada: Any, project: Any
) -> None:
    await sql.execute("select ops.create_plan('small', 0)")
    await sql.execute("select ops.set_plan($1, 'small')", ada)
    await sql.execute("select ops.add_credits($1, 10, 'welcome')", ada)
    await made(sql, project, 4, "-90 days")
    left = "select grants_left from balances"
    assert await sql.fetchval(left) == 6
    assert await sql.fetchval("select removed from ops.purge('80 days', 'charges')") == 4
    assert await sql.fetchval(left) == 6
    assert await sql.fetchval("select count(*) from credit_grants") == 2


# --- How it is applied ---------------------------------------------------------------------


async def test_a_backlog_goes_in_batches_from_where_the_last_one_stopped(
    sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 12, "-31 days")  # 24 jobs
    await sql.execute("update retention set due_at = 'infinity' where name <> 'jobs'")
    seen = []
    for _ in range(3):
        await sql.execute("update retention set rest_until = null")
        await sql.fetchval(BATCH, 10)
        [row] = await sql.fetch(
            "select removed, reached is null, due_at <= now() from retention where name = 'jobs'"
        )
        seen.append(tuple(row))
    assert seen == [(10, False, True), (20, False, True), (24, True, False)]
    hour = "select due_at - done_at = '1 hour' from retention where name = 'jobs'"
    assert await sql.fetchval(hour)


async def test_a_batch_begins_where_it_is_told_to(sql: asyncpg.Connection, project: Any) -> None:
    await made(sql, project, 3, "-500 days")
    batch = "select removed, reached from remove_old($1, now() - interval '400 days', $2, 2)"
    for name in reversed(NAMES):
        await sql.execute("begin")
        [first] = await sql.fetch(batch, name, None)
        await sql.execute("rollback")
        left = 6 if name == "jobs" else 3
        [second] = await sql.fetch(batch, name, first["reached"])
        [rest] = await sql.fetch(batch.replace(", 2)", ", 100)"), name, first["reached"])
        # The key that was reached is looked at again: others may have the same.
        skipped = left - second["removed"] - rest["removed"]
        one_time = name in (
            *("provider_calls", "deleted_jobs", "idempotency_keys", "hook_deliveries", "audit"),
        )
        assert (first["removed"], skipped) == (2, 0 if one_time else 1), name


async def test_a_delivery_that_waits_to_be_mapped_is_remembered_however_old(
    sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 2, "-40 days")
    await sql.execute(
        "insert into waiting_deliveries (integration_id, delivery_id, headers, body, size) "
        "select integration_id, delivery_id, '{}', '', 0 from hook_deliveries limit 1"
    )
    purge = "select removed from ops.purge('30 days', 'hook_deliveries')"
    assert await sql.fetchval(purge) == 1
    await sql.execute("delete from waiting_deliveries")
    assert await sql.fetchval(purge) == 1


async def test_all_workers_together_rest_three_times_as_long_as_a_batch_took(
    sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 20, "-31 days")
    await sql.execute(
        "create function slowly() returns trigger language plpgsql as "
        "$$ begin perform pg_sleep(0.05); return null; end $$;"
        "create trigger slowly after delete on jobs execute function slowly();"
        "update retention set due_at = 'infinity' where name <> 'jobs'"
    )
    began = time.monotonic()
    rest = await sql.fetchval(BATCH, 1)
    assert 3 * 0.05 <= rest <= 3 * (time.monotonic() - began)
    left = await sql.fetchval(
        "select extract(epoch from rest_until - now())::float8 from retention where name = 'jobs'"
    )
    assert rest - left < time.monotonic() - began
    await sql.execute("update retention set rest_until = now() + interval '1 minute'")
    before = await counted(sql)
    assert await sql.fetchval(BATCH, 1000) == 1
    assert await counted(sql) == before


async def test_a_copy_that_is_held_keeps_what_it_has(sql: asyncpg.Connection, project: Any) -> None:
    await made(sql, project, 1, "-500 days")
    await sql.execute("select ops.hold('We look for what was there.')")
    before = await counted(sql)
    assert await sql.fetchval(BATCH, 1000) == 10
    assert await counted(sql) == before
    await sql.execute("update retention set due_at = 'infinity' where name <> 'jobs'")
    await sql.execute("select ops.go_live()")
    await sql.fetchval(BATCH, 1000)
    assert (await counted(sql))["jobs"] == 0


async def test_one_batch_runs_at_a_time(
    other: asyncpg.Connection, sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 2, "-31 days")
    async with other.transaction():
        await other.fetchval(BATCH, 1000)
        before = await counted(sql)
        assert await sql.fetchval(BATCH, 1000) == 1
        assert await counted(sql) == before


async def test_a_table_that_cannot_be_cleaned_up_is_not_in_the_way_of_the_others(
    other: asyncpg.Connection, sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 1, "-500 days")
    async with other.transaction():
        await other.execute("lock table provider_calls in exclusive mode")
        await sql.execute("set lock_timeout = '20ms'")
        for _ in NAMES:
            await sql.execute("update retention set rest_until = null")
            await sql.fetchval(BATCH, 1000)
        said = await sql.fetch("select name, error from ops.retention where error is not null")
        assert [row["name"] for row in said] == ["provider_calls"]
        assert "lock timeout" in said[0]["error"]
    left = await counted(sql)
    assert (left["provider_calls"], left["jobs"], left["idempotency_keys"]) == (1, 0, 0)
    await at(sql, "11 minutes")
    await sql.fetchval(BATCH, 1000)
    assert (await counted(sql))["provider_calls"] == 0
    assert await sql.fetchval("select count(error) from ops.retention") == 0


async def test_a_removal_blocks_nobody_who_writes(
    other: asyncpg.Connection, sql: asyncpg.Connection, ada: Any, project: Any
) -> None:
    await made(sql, project, 5, "-500 days")
    submit = "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')"
    running = await sql.fetchval(submit, ada, project)
    claimed = await sql.fetchrow("select * from claim_job($1, 1, 'w', 15)", running)
    assert claimed
    async with other.transaction():
        for name in NAMES:
            await other.execute(
                "select remove_old($1, now() - interval '400 days', null, 100)", name
            )
        await sql.execute("set lock_timeout = '50ms'")
        await sql.execute(submit, ada, project)
        artifact = json.dumps({**json.loads(ROW), "period_start": "2026-01-01Z",
                               "period_end": "2026-01-01Z", "token_usage": {}})  # fmt: skip
        await sql.execute(
            "select complete_job($1, $2, $3)", running, claimed["lease_token"], artifact
        )
        event = json.dumps([{"source": "github", "event_type": "commit", "title": "-"}])
        await sql.execute("select ingest_events($1, $2, $3)", ada, project, event)
        await sql.execute("select ops.create_api_key($1)", ada)


async def test_a_batch_finds_its_rows_by_an_index(sql: asyncpg.Connection, project: Any) -> None:
    await made(sql, project, 40, "-500 days")
    await made(sql, project, 1000)
    for name in (*NAMES[:-1], "ops.audit", "webhook_attempts", "job_events"):
        await sql.execute(f"analyze {name}")
    read = "select relname, seq_tup_read from pg_stat_xact_user_tables"
    for name in reversed(NAMES):
        async with sql.transaction():
            before = {row[0]: row[1] for row in await sql.fetch(read)}
            for _ in range(7):  # the sixth time the plan is one for any values
                await sql.execute(
                    "select remove_old($1, now() - interval '400 days', null, 5)", name
                )
            after = {row[0]: row[1] for row in await sql.fetch(read)}
            assert {t: n for t, n in after.items() if n - before.get(t, 0) > 500} == {}, name


async def test_the_loop_takes_smaller_batches_when_they_are_too_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "IDLE", 0.0)
    asked: list[int] = []

    class Slow:
        async def value(self, name: str, rows: int) -> float:
            assert name == "apply_retention"
            asked.append(rows)
            if len(asked) == 12:
                raise asyncio.CancelledError
            if len(asked) <= 6:
                raise Unavailable("canceling statement due to statement timeout")
            return 0.0

    with pytest.raises(asyncio.CancelledError):
        await apply_retention(Slow())  # type: ignore[arg-type]
    assert asked == [1000, 500, 250, 125, 62, 50, 50, 100, 200, 400, 800, 1000]


async def test_a_worker_removes_what_is_too_old_by_itself(
    dsn: str, sql: asyncpg.Connection, project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(sql, project, 3, "-500 days")
    async with working(dsn, Gate(opened=True), monkeypatch):
        while (await counted(sql))["jobs"]:
            await asyncio.sleep(0.01)


# --- What operators do ---------------------------------------------------------------------


async def test_an_operator_says_how_long_things_are_kept(
    sql: asyncpg.Connection, project: Any
) -> None:
    await sql.execute("select ops.set_retention('events', '1 year')")
    row = await sql.fetchrow("select keep::text, behind from ops.retention where name = 'events'")
    assert row and tuple(row) == ("1 year", False)
    await sql.execute("select * from ops.purge('1 year', 'events', 5)")
    said = await sql.fetch("select what, detail from ops.audit order by id desc limit 2")
    assert [(row["what"], json.loads(row["detail"])) for row in said] == [
        ("purge", {"name": "events", "older_than": "1 year", "max": 5, "removed": 0}),
        ("set_retention", {"name": "events", "keep": "1 year"}),
    ]


WRONG = [
    ("set_retention('users', '1 year')", "BT404", 'name: there is no retention of "users"'),
    ("set_retention(null, '1 year')", "BT404", "name: "),
    ("set_retention('idempotency_keys', '1 day')", "BT400",
     "keep: idempotency_keys are kept for at least 2 days."),
    ("set_retention('charges', '1 month')", "BT400",
     "keep: charges are kept for at least 62 days."),
    ("set_retention('jobs', '-1 day')", "BT400", "keep: "),
    ("set_retention('jobs', '101 years')", "BT400", "keep: must be 100 years at most"),
    ("purge(null)", "BT400", "older_than: must be an interval"),
    ("purge('1 hour')", "BT400", "older_than: jobs are kept for at least 1 day."),
    ("purge('30 days', 'nothing')", "BT404", "name: "),
    ("purge('30 days', max => 0)", "BT400", "max: must be 1 to 10000"),
    ("purge('30 days', max => 10001)", "BT400", "max: "),
    ("purge('30 days', max => null)", "BT400", "max: "),
]  # fmt: skip


async def test_an_interval_that_lies_in_the_future_is_too_short(sql: asyncpg.Connection) -> None:
    """It compares as a day, but from the 24th of March a month back is 28 days."""
    await sql.execute(
        "select set_config('baton.clock_offset', (timestamptz '2031-03-24' - now())::text, false)"
    )
    with pytest.raises(asyncpg.PostgresError, match="keep: jobs are kept for at least 1 day"):
        await sql.execute("select ops.set_retention('jobs', '1 mon -29 days')")


async def test_what_clients_were_promised_cannot_be_cut_short(sql: asyncpg.Connection) -> None:
    before = await sql.fetch("select name, keep from retention order by name")
    for call, sqlstate, begins in WRONG:
        with pytest.raises(asyncpg.PostgresError) as caught:
            await sql.execute(f"select ops.{call}")
        assert (caught.value.sqlstate, str(caught.value)[-1]) == (sqlstate, "."), call
        assert str(caught.value).startswith(begins), call
    assert await sql.fetch("select name, keep from retention order by name") == before


async def test_a_purge_by_hand_removes_at_most_so_many_and_says_if_there_are_more(
    sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 3, "-31 days")  # 6 jobs
    purge = "select ops.purge('30 days', max => 4)"
    said = [await sql.fetchval(purge) for _ in range(3)]
    assert said == [(4, True), (2, False), (0, False)]
    assert await sql.fetchval("select removed from ops.retention where name = 'jobs'") == 6


async def test_the_view_shows_how_far_retention_is_behind(
    sql: asyncpg.Connection, project: Any
) -> None:
    await made(sql, project, 2, "-31 days")
    await sql.execute("update retention set done_at = now() - interval '25 hours'")
    rows = await sql.fetch("select * from ops.retention")
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == set(NAMES)
    assert {name for name in NAMES if by_name[name]["behind"]} == {
        name for name in NAMES if by_name[name]["keep"]
    }
    age = await sql.fetchval("select now() - $1::timestamptz", by_name["jobs"]["oldest"])
    assert timedelta(days=30.9) < age < timedelta(days=31.1)
    assert all(row["oldest"] and row["bytes"] > 0 for row in rows)


async def test_what_an_operator_has_set_survives_an_upgrade(
    dsn: str, sql: asyncpg.Connection
) -> None:
    await sql.execute("select ops.set_retention('jobs', '7 days')")
    await sql.execute(
        "alter table handoffs add constraint handoffs_job_id_fkey foreign key (job_id) "
        "references jobs on delete cascade; alter table insights add constraint "
        "insights_job_id_fkey foreign key (job_id) references jobs on delete cascade"
    )  # of version 2
    await migrate(dsn)
    assert await sql.fetchval("select keep from retention where name = 'jobs'") == timedelta(days=7)
    left = "select count(*) from pg_constraint where conname ~ '(handoffs|insights)_job_id_fkey'"
    assert await sql.fetchval(left) == 0


# --- Size ----------------------------------------------------------------------------------


async def test_the_queue_is_no_larger_after_many_jobs_than_after_a_few(
    sql: asyncpg.Connection, ada: Any, project: Any
) -> None:
    await sql.execute("set synchronous_commit = off")
    await sql.execute(ASK + LIVES)
    worker = await sql.fetchval("select worker_id from procrastinate_register_worker_v1()")
    queue = ("procrastinate_jobs", "leases", "job_due", "procrastinate_events")
    sizes = []
    for _ in range(4):
        await sql.execute(f"call pg_temp.lives('{ada}', '{project}', {worker}, 80)")
        for name in queue:
            await sql.execute(f"vacuum {name}")  # which autovacuum does by itself
        sizes.append(
            await sql.fetchval(
                "select sum(pg_total_relation_size(q::regclass)) from unnest($1::text[]) q", queue
            )
        )
    assert await sql.fetchval("select count(*) from jobs where status = 'completed'") == 320
    assert max(sizes) < 2 * sizes[0]
    assert sizes[-1] == sizes[-2]
    for name in queue:
        assert await sql.fetchval(f"select count(*) from {name}") == 0, name


async def test_nobody_writes_the_log_of_tickets(
    caller: Caller, worker: Workers, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.submit()
    await drain()
    assert await sql.fetchval("select nextval('procrastinate_events_id_seq')") == 1


@pytest.mark.parametrize("name", ["procrastinate_jobs", "leases", "job_due"])
async def test_the_tables_of_the_queue_are_vacuumed_early_and_at_full_speed(
    sql: asyncpg.Connection, name: str
) -> None:
    options = await sql.fetchval("select reloptions from pg_class where relname = $1", name)
    assert set(options) >= {
        "autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=500",
        "autovacuum_vacuum_cost_delay=0",
    }  # fmt: skip
