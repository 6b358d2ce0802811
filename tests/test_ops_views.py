"""What the on-call sees by SQL: each check of ops.health, each cause in ops.stuck, made and mended.

Conditions are made by what makes them in life as far as that is quick: real tickets, leases and
functions, with a time moved back.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from conftest import Caller

from app.__main__ import cli
from app.migration import migrate


class Site:
    """A healthy installation: one worker is alive, and everything can be had by SQL."""

    def __init__(self, sql: asyncpg.Connection, dsn: str) -> None:
        self.sql, self.dsn = sql, dsn
        self.user = self.project = ""

    async def open(self) -> None:
        self.user = await self.sql.fetchval("select ops.create_user('site@example.com')")
        self.project = await self.sql.fetchval("select ops.create_project('Demo', $1)", self.user)
        await self.sql.execute(
            "insert into procrastinate_workers default values;"
            "insert into workers (id, name, host, version, concurrency, provider)"
            " select id, 'host:7', 'host', '0', 10, 'extractive' from procrastinate_workers"
        )

    async def failing(self) -> list[str]:
        row = await self.sql.fetchrow("select * from ops.health")
        checks = await self.sql.fetch("select * from ops.checks")
        assert row is not None
        names = [check["name"] for check in checks if not check["ok"]]
        assert (row["ok"], sorted(row["failing"])) == (not names, sorted(names))
        for check in checks:  # the two say the same
            assert row[f"{check['name']}_ok"] is check["ok"], check
        return sorted(names)

    async def stuck(self) -> list[tuple[str, str]]:
        rows = await self.sql.fetch("select job_id, why, what_to_do from ops.stuck")
        assert all(row["what_to_do"] for row in rows)
        return [(str(row["job_id"]), row["why"]) for row in rows]

    async def submit(self) -> str:
        job = "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')"
        return str(await self.sql.fetchval(job, self.user, self.project))

    async def claim(self, job_id: str, seconds: float = 3600) -> Any:
        return await self.sql.fetchval(
            "select lease_token from claim_job("
            "$1, (select ticket_id from jobs where id = $1), 'host:7', $2)",
            job_id,
            seconds,
        )

    async def running(self) -> str:
        job_id = await self.submit()
        assert await self.claim(job_id)
        return job_id

    async def cancel(self, job_id: str) -> None:
        await self.sql.execute("select changed from cancel_job($1, $2)", self.user, job_id)

    async def parked(self) -> str:
        job_id = await self.submit()
        token = await self.claim(job_id)
        park = "select park_job($1, $2, 60, 'generation_failed', 'It failed.', '{}')"
        await self.sql.execute(park, job_id, token)
        return job_id

    async def calls(self, outcome: str) -> None:
        call = {
            "job_id": str(self.project), "attempt": 1, "user_id": str(self.user),
            "project_id": str(self.project), "kind": "handoff", "model": "m", "purpose": "draft",
            "outcome": outcome, "prompt_tokens": 1, "completion_tokens": 1, "seconds": 1,
        }  # fmt: skip
        await self.sql.execute("select record_calls($1)", json.dumps([call] * 20))

    async def ended(self, bad: int, good: int) -> None:
        await self.sql.execute(
            "insert into jobs (user_id, project_id, kind, input, credits, status, outcome, error,"
            " error_code, result_kind, result_id, completed_at, started_at)"
            " select $1, $2, 'handoff', '{}', 1, case when bad then 'failed' else 'completed' end,"
            " case when bad then 'failed' else 'succeeded' end,"
            " case when bad then 'It failed.' end,"
            " case when bad then 'generation_failed' end, case when not bad then 'handoff' end,"
            " case when not bad then gen_random_uuid() end, baton_now(), baton_now()"
            " from (select n <= $3::int as bad from generate_series(1, $3::int + $4::int) n) n",
            self.user, self.project, bad, good,
        )  # fmt: skip

    async def delivery(self) -> None:
        await self.sql.execute(
            "insert into webhook_deliveries (job_id, project_id, url, type, payload)"
            " values ($1, $2, 'https://h.example.com/t0k', 'job.failed', 'p4yload')",
            await self.running(),
            self.project,
        )

    async def threshold(self, name: str, value: float | None) -> None:
        await self.sql.execute("select ops.set_threshold($1, $2)", name, value)

    async def value(self, name: str) -> Any:
        return await self.sql.fetchval("select value from ops.checks where name = $1", name)


@pytest.fixture
async def site(sql: asyncpg.Connection, dsn: str) -> Site:
    site = Site(sql, dsn)
    await site.open()
    return site


async def test_a_new_installation_with_a_worker_is_well(site: Site) -> None:
    assert await site.failing() == []
    assert await site.stuck() == []
    row = await site.sql.fetchrow("select * from ops.health")
    assert row and row["workers_alive"] == 1 and row["at"] and row["schema_version"] >= 3


async def test_a_worker_that_is_replaced_in_order_is_no_alarm(site: Site) -> None:
    """A new one takes a second or two to start."""
    await site.sql.execute("select stop_worker(id) from procrastinate_workers")
    await site.sql.execute("delete from procrastinate_workers")
    assert await site.failing() == []
    await site.sql.execute("update workers set seen_at = seen_at - interval '31 seconds'")
    assert await site.failing() == ["worker_seen"]


# --- Each condition, made and mended -------------------------------------------------------


@asynccontextmanager
async def silent_worker(site: Site) -> AsyncIterator[None]:
    beat = "update procrastinate_workers set last_heartbeat = now() - $1 * interval '1 second'"
    await site.sql.execute(beat, 31)
    yield
    await site.sql.execute(beat, 1)


@asynccontextmanager
async def no_worker(site: Site) -> AsyncIterator[None]:
    await site.sql.execute(
        "delete from procrastinate_workers;"
        " update workers set state = 'stopped', seen_at = seen_at - interval '31 seconds'"
    )
    yield
    await site.sql.execute("insert into procrastinate_workers default values")


@asynccontextmanager
async def dead_worker(site: Site) -> AsyncIterator[None]:
    seen = "update workers set state = 'lost', seen_at = baton_now() - $1 * interval '1 second'"
    await site.sql.execute(seen, 60)
    yield
    await site.sql.execute(seen, 901)


@asynccontextmanager
async def open_breaker(site: Site) -> AsyncIterator[None]:
    await site.sql.execute("update workers set breaker_until = baton_now()")
    yield
    await site.sql.execute("update workers set breaker_until = null")


@asynccontextmanager
async def waiting_job(site: Site) -> AsyncIterator[None]:
    job_id = await site.submit()
    await site.sql.execute("update jobs set updated_at = updated_at - interval '6 minutes'")
    yield
    await site.claim(job_id)


@asynccontextmanager
async def expired_lease(site: Site) -> AsyncIterator[None]:
    job_id = await site.running()
    await site.sql.execute("update leases set expires_at = baton_now() - interval '31 seconds'")
    yield
    assert await site.sql.fetchval("select sweep_job($1)", job_id) == "pending"


@asynccontextmanager
async def overdue_retry(site: Site) -> AsyncIterator[None]:
    await site.parked()
    await site.sql.execute("update job_due set not_before = baton_now() - interval '31 seconds'")
    yield
    assert await site.sql.fetchval("select wake_due(10)") == 1


@asynccontextmanager
async def past_deadline(site: Site) -> AsyncIterator[None]:
    job_id = await site.submit()
    await site.sql.execute("update jobs set deadline_at = baton_now() - interval '61 seconds'")
    yield
    assert await site.sql.fetchval("select sweep_job($1)", job_id) == "failed"


@asynccontextmanager
async def past_start_deadline(site: Site) -> AsyncIterator[None]:
    job_id = await site.submit()
    await site.sql.execute("update jobs set start_deadline_at = baton_now() - interval '1 second'")
    yield
    assert await site.sql.fetchval("select sweep_job($1)", job_id) == "failed"


@asynccontextmanager
async def long_attempt(site: Site) -> AsyncIterator[None]:
    job_id = await site.running()
    await site.sql.execute("update leases set claimed_at = claimed_at - interval '16 minutes'")
    yield
    await site.cancel(job_id)


@asynccontextmanager
async def job_without_ticket(site: Site) -> AsyncIterator[None]:
    await site.submit()
    await site.sql.execute(
        "delete from procrastinate_jobs;"
        "update jobs set updated_at = updated_at - interval '2 minutes'"
    )
    yield
    assert await site.sql.fetchval("select reconcile_jobs(10)") == 1


@asynccontextmanager
async def job_without_lease(site: Site) -> AsyncIterator[None]:
    await site.running()
    await site.sql.execute(
        "delete from leases; update jobs set updated_at = updated_at - interval '2 minutes'"
    )
    yield
    await site.sql.execute("select reconcile_jobs(10)")
    assert await site.sql.fetchval("select sweep_job(id) from jobs") == "pending"


@asynccontextmanager
async def lost_ticket(site: Site) -> AsyncIterator[None]:
    await site.submit()
    await site.sql.execute(
        "update procrastinate_jobs set status = 'doing', worker_id = null;"
        "update jobs set updated_at = updated_at - interval '2 minutes'"
    )
    yield
    assert await site.sql.fetchval("select reconcile_tickets(30)") == 1


@asynccontextmanager
async def crashing_job(site: Site) -> AsyncIterator[None]:
    job_id = await site.running()
    await site.sql.execute("update jobs set crashes = 2")
    yield
    await site.cancel(job_id)


@asynccontextmanager
async def job_held_by_breaker(site: Site) -> AsyncIterator[None]:
    job_id = await site.submit()
    token = await site.claim(job_id)
    await site.sql.execute("select hold_job($1, $2, 60)", job_id, token)
    yield
    await site.sql.execute("update job_due set not_before = baton_now()")
    assert await site.sql.fetchval("select wake_due(10)") == 1


@asynccontextmanager
async def job_that_the_provider_fails(site: Site) -> AsyncIterator[None]:
    job_id = await site.parked()
    await site.sql.execute("update jobs set provider_errors = 3")
    yield
    await site.cancel(job_id)


@asynccontextmanager
async def failing_provider(site: Site) -> AsyncIterator[None]:
    await site.calls("timeout")
    yield
    await site.calls("ok")


@asynccontextmanager
async def failing_kind(site: Site) -> AsyncIterator[None]:
    await site.ended(bad=9, good=0)
    assert await site.failing() == []  # too few to tell
    await site.ended(bad=1, good=0)
    yield
    await site.ended(bad=0, good=10)


@asynccontextmanager
async def flood(site: Site) -> AsyncIterator[None]:
    await site.threshold("pending_of_a_project", 1)
    jobs = [await site.submit() for _ in range(2)]
    yield
    await site.cancel(jobs[0])


@asynccontextmanager
async def held(site: Site) -> AsyncIterator[None]:
    await site.sql.execute("select ops.hold('We move house.')")
    yield
    await site.sql.execute("select ops.go_live()")


@asynccontextmanager
async def unsent_webhook(site: Site) -> AsyncIterator[None]:
    await site.delivery()
    await site.sql.execute(
        "update webhook_deliveries set next_attempt_at = baton_now() - interval '6 minutes'"
    )
    yield
    assert await site.sql.fetch("select * from claim_webhooks(10, 10, '{}', '{}', 60)")


@asynccontextmanager
async def many_webhooks(site: Site) -> AsyncIterator[None]:
    await site.threshold("webhook_backlog", 0)
    await site.delivery()
    yield
    await site.sql.execute("delete from webhook_deliveries")


async def integration(site: Site) -> str:
    """One of the site's user."""
    return str(
        await site.sql.fetchval(
            "insert into integrations (source, user_id, workspace_name) "
            "values ('github', $1, 'acme') returning id",
            site.user,
        )
    )


@asynccontextmanager
async def unmapped_delivery(site: Site) -> AsyncIterator[None]:
    integration_id = await integration(site)
    for _ in range(2):  # from one integration to the next
        await site.sql.execute(
            "select store_hook_deliveries(array[$1::uuid], '{d}', array['{}'::jsonb], '{s3cret}')",
            await integration(site),
        )
    await site.sql.execute(
        "update waiting_deliveries set received_at = baton_now() - interval '6 minutes' "
        "where integration_id = (select max(integration_id::text)::uuid from waiting_deliveries)"
    )
    yield
    await site.sql.execute("delete from integrations where id <> $1", integration_id)


@asynccontextmanager
async def failed_delivery(site: Site) -> AsyncIterator[None]:
    await site.sql.execute(
        "insert into hook_deliveries (integration_id, delivery_id, error) values ($1, 'd', 'No.')",
        await integration(site),
    )
    yield
    await site.sql.execute("update hook_deliveries set received_at = now() - interval '25 hours'")


@asynccontextmanager
async def refused_deliveries(site: Site) -> AsyncIterator[None]:
    ids = [await integration(site) for _ in range(2)]
    count = "select count_hooks($1::uuid[], $2, $3)"
    await site.sql.execute(count, ids, ["malformed", "unverified"], [60, 60])
    assert await site.failing() == []  # each has its own
    await site.sql.execute(count, ids[:1], ["unverified"], [60])
    yield
    await site.sql.execute("update hook_counts set hour = hour - interval '2 hours'")


@asynccontextmanager
async def open_transaction(site: Site) -> AsyncIterator[None]:
    await site.threshold("oldest_transaction", 0)
    other = await asyncpg.connect(site.dsn)
    await other.execute("begin; select 1")
    while not await site.value("oldest_transaction"):  # told in tenths of a second
        await asyncio.sleep(0.01)
    yield
    await other.close()


@asynccontextmanager
async def open_snapshot(site: Site) -> AsyncIterator[None]:
    await site.threshold("oldest_xmin", 1)
    other = await asyncpg.connect(site.dsn)
    await other.execute("begin isolation level repeatable read; select 1")
    for _ in range(3):
        await site.sql.execute("update users set name = 'Ada'")
    yield
    await other.close()


@asynccontextmanager
async def dead_rows(site: Site) -> AsyncIterator[None]:
    await site.threshold("dead_tuples", 0)
    job_id = await site.submit()
    await site.cancel(job_id)
    await site.sql.execute("select pg_stat_force_next_flush()")
    yield
    for table in ("procrastinate_jobs", "procrastinate_events", "leases", "job_due"):
        await site.sql.execute(f"vacuum {table}")
    await site.sql.execute("select pg_stat_force_next_flush()")


@asynccontextmanager
async def deaf_listener(site: Site) -> AsyncIterator[None]:
    await site.threshold("notification_queue", await site.value("notification_queue"))
    other = await asyncpg.connect(site.dsn)
    await other.execute("listen deaf")
    await other.execute("begin; select 1")
    for _ in range(10):
        await site.sql.execute("select pg_notify('deaf', repeat('x', 7000))")
    yield
    await other.close()
    for _ in range(10):  # the tail of the queue moves on with the next ones
        await site.sql.execute("select pg_notify('deaf', repeat('x', 7000))")
    await site.threshold("notification_queue", await site.value("notification_queue"))


@asynccontextmanager
async def many_connections(site: Site) -> AsyncIterator[None]:
    await site.threshold("connections", float(await site.value("connections")) + 0.03)
    others = [await asyncpg.connect(site.dsn) for _ in range(10)]
    yield
    for other in others:
        await other.close()
    await site.threshold("connections", None)


@asynccontextmanager
async def old_rows(site: Site) -> AsyncIterator[None]:
    await site.threshold("transaction_ids", 0)
    yield
    await site.threshold("transaction_ids", None)


@asynccontextmanager
async def old_retention(site: Site) -> AsyncIterator[None]:
    await site.sql.execute(
        "update retention set done_at = baton_now() - interval '25 hours' "
        "where name in ('jobs', 'events')"  # events are kept for ever
    )
    yield
    for _ in range(10):
        await site.sql.execute("update retention set rest_until = null")
        await site.sql.execute("select apply_retention(10)")


@asynccontextmanager
async def overdue_digest(site: Site) -> AsyncIterator[None]:
    await site.sql.execute("select ops.set_digest($1, '0 9 * * *')", site.project)
    await site.sql.execute(
        "update digest_schedules set covered_until = baton_now() - interval '1 day', "
        "next_at = baton_now() - interval '15 minutes'"
    )
    yield
    await site.sql.execute("select ops.remove_digest($1)", site.project)


@asynccontextmanager
async def invalid_index(site: Site) -> AsyncIterator[None]:
    await site.sql.execute("create table t as select 1 as a from generate_series(1, 2)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await site.sql.execute("create unique index concurrently t_a on t (a)")
    yield
    await site.sql.execute("drop table t")


CONDITIONS: list[tuple[Any, str, str]] = [  # what is done, the check, and a cause in ops.stuck
    (silent_worker, "worker_seen", ""),
    (no_worker, "worker_seen", ""),
    (dead_worker, "dead_workers", ""),
    (open_breaker, "open_breakers", ""),
    (waiting_job, "oldest_pending", "waits for a worker for longer"),
    (expired_lease, "oldest_expired_lease", "lease of worker host:7 has expired"),
    (overdue_retry, "oldest_overdue_retry", "its next try is overdue"),
    (past_deadline, "oldest_past_deadline", "past its deadline"),
    (past_start_deadline, "", "not started by the time"),
    (long_attempt, "longest_attempt", "longer than any should, on worker host:7"),
    (job_without_ticket, "lost_jobs", "pending without a ticket"),
    (job_without_lease, "lost_jobs", "processing without a lease"),
    (lost_ticket, "lost_tickets", r"ticket \d+ is in the hands of a dead worker"),
    (crashing_job, "", "2 of its attempts took their worker"),
    (job_held_by_breaker, "", "the provider is down"),
    (job_that_the_provider_fails, "", "has failed 3 of its attempts"),
    (failing_provider, "provider_failures", ""),
    (failing_kind, "failing_kinds", ""),
    (flood, "pending_of_a_project", ""),
    (held, "held", ""),
    (unsent_webhook, "oldest_webhook", ""),
    (many_webhooks, "webhook_backlog", ""),
    (unmapped_delivery, "oldest_delivery", ""),
    (failed_delivery, "failed_deliveries", ""),
    (refused_deliveries, "refused_deliveries", ""),
    (open_transaction, "oldest_transaction", ""),
    (open_snapshot, "oldest_xmin", ""),
    (dead_rows, "dead_tuples", ""),
    (overdue_digest, "overdue_digest", ""),
    (old_retention, "retention_behind", ""),
    (deaf_listener, "notification_queue", ""),
    (many_connections, "connections", ""),
    (old_rows, "transaction_ids", ""),
    (invalid_index, "invalid_indexes", ""),
]


@pytest.mark.parametrize(
    ("condition", "check", "why"), [pytest.param(*c, id=c[0].__name__) for c in CONDITIONS]
)
async def test_what_is_wrong_is_told_while_it_is(
    site: Site, condition: Any, check: str, why: str
) -> None:
    assert await site.failing() == [] and await site.stuck() == []
    async with condition(site):
        assert await site.failing() == ([check] if check else [])
        stuck = await site.stuck()
        assert len(stuck) == (1 if why else 0) and re.search(why, stuck[0][1] if stuck else "")
    assert await site.failing() == []
    assert await site.stuck() == []


@asynccontextmanager
async def prepared_transaction(site: Site) -> AsyncIterator[None]:
    await site.threshold("oldest_prepared", 0)
    await site.sql.execute("begin; update users set name = 'Ada'; prepare transaction 'p'")
    while not await site.value("oldest_prepared"):
        await asyncio.sleep(0.01)
    yield
    await site.sql.execute("rollback prepared 'p'")


@asynccontextmanager
async def slot_without_replica(site: Site) -> AsyncIterator[None]:
    await site.threshold("slot_wal", 0)
    await site.sql.execute("select pg_create_physical_replication_slot('gone', true)")
    yield
    await site.sql.execute("select pg_drop_replication_slot('gone')")


@asynccontextmanager
async def slot_that_keeps_rows(site: Site) -> AsyncIterator[None]:
    await site.threshold("slot_xmin", 0)
    await site.sql.execute("select pg_create_logical_replication_slot('gone', 'pgoutput')")
    await site.sql.execute("update users set name = 'Ada'")
    yield
    await site.sql.execute("select pg_drop_replication_slot('gone')")


SERVERS = [  # which setting a server has to have for the condition to be possible
    ("max_prepared_transactions", "0", prepared_transaction, "oldest_prepared"),
    ("max_replication_slots", "0", slot_without_replica, "slot_wal"),
    ("wal_level", "replica", slot_that_keeps_rows, "slot_xmin"),
]


async def test_what_the_server_keeps_for_others_is_told_while_it_does(site: Site) -> None:
    for setting, impossible, condition, check in SERVERS:
        if await site.sql.fetchval(f"show {setting}") == impossible:
            continue  # a server that was given
        async with condition(site):
            assert await site.failing() == [check]
        assert await site.failing() == []
        await site.threshold(check, None)


async def test_no_check_is_left_out_here(site: Site) -> None:
    checks = {row["name"] for row in await site.sql.fetch("select name from ops.checks")}
    made = {check for _, check, _ in CONDITIONS if check} | {check for *_, check in SERVERS}
    assert checks == made


async def test_a_check_says_what_it_means_and_what_to_do(site: Site) -> None:
    for row in await site.sql.fetch("select * from ops.checks"):
        assert row["meaning"].endswith(".") and len(row["advice"]) > 15, row["name"]
    columns = await site.sql.fetchrow("select * from ops.health")
    assert columns is not None
    for row in await site.sql.fetch("select name, threshold, unit from ops.checks"):
        told = columns[f"{row['name']}_threshold"]
        told = told.total_seconds() if row["unit"] == "seconds" else told
        assert float(told) == float(row["threshold"])


async def test_nobody_waits_for_a_worker_that_is_not_there_without_being_told(site: Site) -> None:
    await site.submit()
    await site.sql.execute("update jobs set updated_at = updated_at - interval '6 minutes'")
    async with no_worker(site):
        assert await site.failing() == ["oldest_pending", "worker_seen"]
        [(_, why)] = await site.stuck()
        assert why == "no worker is alive"


async def test_a_project_where_nothing_happens_does_not_make_its_kind_fail(site: Site) -> None:
    """It may be asked about every few minutes all night."""
    for stage, failing in (("context", []), ("answer", ["failing_kinds"])):
        await site.sql.execute(
            "insert into jobs (user_id, project_id, kind, input, credits, status, outcome, error,"
            " error_code, error_meta, completed_at)"
            " select $1, $2, 'handoff', '{}', 1, 'failed', 'failed', 'Nothing.', 'no_result',"
            " jsonb_build_object('stage', $3::text), baton_now() from generate_series(1, 10)",
            site.user, site.project, stage,
        )  # fmt: skip
        assert await site.failing() == failing


# --- Thresholds ----------------------------------------------------------------------------


async def test_a_threshold_is_set_put_back_and_audited(site: Site) -> None:
    read = "select value from ops.thresholds where name = 'oldest_pending'"
    await site.threshold("oldest_pending", 7.5)
    assert float(await site.sql.fetchval(read)) == 7.5
    await site.threshold("oldest_pending", None)
    assert await site.sql.fetchval(read) == 300
    rows = await site.sql.fetch("select detail from ops.audit where what = 'set_threshold'")
    told = [json.loads(row["detail"]) for row in rows]
    assert told == [
        {"name": "oldest_pending", "value": 7.5, "before": 300},
        {"name": "oldest_pending", "value": None, "before": 7.5},
    ]


async def test_health_shows_whatever_a_threshold_can_be_set_to(site: Site) -> None:
    names = [row[0] for row in await site.sql.fetch("select name from ops.thresholds")]
    for value in ("1000000000000", "5.0", "1e-300"):
        whole = "select trunc(value) from ops.thresholds where name = $1"
        for name in names:
            set_it = f"select ops.set_threshold($1, {value})"
            with suppress(asyncpg.PostgresError):  # a count is whole
                await site.sql.execute(set_it, name)
        assert await site.sql.fetchval(whole, "oldest_pending") == int(float(value))
        await site.sql.fetch("select * from ops.health")
        await site.sql.fetch("select * from ops.stuck")


@pytest.mark.parametrize(
    ("name", "value", "sqlstate", "said"),
    [
        ("oldest", 1, "BT404", 'name: there is no threshold named "oldest"; see ops.thresholds.'),
        ("oldest_pending", -1, "BT400", "value: a threshold is a number from 0 on"),
        ("oldest_pending", float("nan"), "BT400", "value: a threshold is a number from 0 on"),
        ("oldest_pending", float("inf"), "BT400", "value: a threshold is a number from 0 on"),
        ("oldest_pending", 1e13, "BT400", "value: a threshold is a number from 0 on"),
        ("lost_jobs", 0.5, "BT400", "value: must be a whole number, as the unit of lost_jobs is"),
    ],
)
async def test_a_wrong_threshold_is_refused(
    site: Site, name: str, value: float, sqlstate: str, said: str
) -> None:
    with pytest.raises(asyncpg.PostgresError, match=re.escape(said)) as caught:
        await site.threshold(name, value)
    assert caught.value.sqlstate == sqlstate
    assert not await site.sql.fetchval("select count(*) from ops.thresholds where chosen >= 0")


async def test_a_threshold_survives_a_migration(site: Site, dsn: str) -> None:
    await site.threshold("oldest_pending", 42)
    await migrate(dsn)
    read = "select value from ops.thresholds where name = 'oldest_pending'"
    assert await site.sql.fetchval(read) == 42


# --- The other views -----------------------------------------------------------------------


async def test_the_depth_of_the_queue_tells_apart_why_jobs_wait(site: Site) -> None:
    await site.running()
    await site.parked()
    ready = await site.submit()
    await site.sql.execute("update jobs set priority = 'high' where id = $1", ready)
    mine = site.project
    site.project = await site.sql.fetchval("select ops.create_project('Other', $1)", site.user)
    await site.sql.execute("select ops.set_concurrency($1, 1)", site.project)
    for _ in range(2):  # of which one is let go
        await site.submit()
    await site.sql.execute("select ops.pause('handoff')")
    site.project = mine
    await site.submit()
    rows = await site.sql.fetch("select * from ops.queue_depth")
    told = [tuple(row.values())[:7] for row in rows]
    assert told == [("handoff", "high", 1, 0, 0, 0, 0), ("handoff", "normal", 1, 1, 1, 1, 1)]
    assert rows[0]["oldest_ready"] is not None and rows[1]["oldest"] is not None
    assert await site.sql.fetchval("select paused from ops.health") == ["handoff"]
    assert await site.failing() == []


async def test_a_job_that_was_in_line_has_not_waited_for_a_worker(site: Site) -> None:
    await site.sql.execute("select ops.set_concurrency($1, 1)", site.project)
    running = await site.submit()
    assert await site.claim(running)
    await site.submit()
    await site.sql.execute("update jobs set updated_at = updated_at - interval '6 minutes'")
    assert await site.failing() == [] and await site.stuck() == []
    await site.cancel(running)
    assert await site.sql.fetchval("select ready from ops.queue_depth") == 1
    assert await site.failing() == [] and await site.stuck() == []


async def test_the_fullest_projects_come_first(site: Site) -> None:
    other = await site.sql.fetchval("select ops.create_project('Other', $1)", site.user)
    await site.running()
    mine, site.project = site.project, other
    for _ in range(3):
        await site.submit()
    rows = await site.sql.fetch("select * from ops.queue_by_project")
    assert [(r["project_id"], r["unfinished"], r["running"], float(r["share"])) for r in rows] == [
        (other, 3, 0, 0.75),
        (mine, 1, 1, 0.25),
    ]
    assert rows[0]["project"] == "Other" and rows[0]["owner"] == "site@example.com"


async def test_a_running_attempt_is_told_with_whose_it_is_and_where(site: Site) -> None:
    job_id = await site.running()
    token = await site.sql.fetchval("select lease_token from leases")
    await site.sql.execute(
        "select report_progress(array[$1::uuid], array[$2::uuid], array[$3::jsonb])",
        job_id, token, json.dumps({"value": 0.5, "step": "drafting", "message": "m3ssage"}),
    )  # fmt: skip
    await site.sql.execute("update leases set claimed_at = claimed_at - interval '1 minute'")
    row = await site.sql.fetchrow("select * from ops.running")
    assert row is not None
    assert (str(row["job_id"]), row["kind"], row["attempt"]) == (job_id, "handoff", 1)
    assert (row["project"], row["user_email"]) == ("Demo", "site@example.com")
    worker_id = await site.sql.fetchval("select id from workers")
    assert (row["worker"], row["worker_id"]) == ("host:7", worker_id)
    assert (row["step"], float(row["progress"])) == ("drafting", 0.5)
    assert row["running_for"].total_seconds() >= 60 > row["asked_for"].total_seconds()
    assert 0 < row["lease_left"].total_seconds() <= 3600


async def test_workers_are_told_with_what_they_do(site: Site) -> None:
    await site.running()
    row = await site.sql.fetchrow("select * from ops.workers")
    assert row and (row["name"], row["state"], row["running"]) == ("host:7", "running", 1)
    assert row["provider_down"] is False and row["last_seen"].total_seconds() < 30
    async with open_breaker(site):
        assert await site.sql.fetchval("select provider_down from ops.workers")
    async with silent_worker(site):
        assert await site.sql.fetchval("select state from ops.workers") == "lost"
    await site.sql.execute("insert into procrastinate_workers default values")  # of version 2
    rows = await site.sql.fetch("select name, state from ops.workers")
    assert [tuple(row) for row in rows] == [("host:7", "running"), (None, "running")]


async def test_failures_are_counted_by_kind_and_code_for_a_day(site: Site) -> None:
    await site.ended(bad=3, good=1)
    await site.sql.execute(
        "update jobs set error = 'It was the latest.', error_meta = '{\"retryable\": true}',"
        " completed_at = completed_at + interval '1 second'"
        " where id = (select id from jobs where status = 'failed' limit 1)"
    )
    old = "update jobs set completed_at = completed_at - interval '2 days' where id = $1"
    ids = await site.sql.fetch("select id from jobs where error = 'It failed.'")
    await site.sql.execute(old, ids[0]["id"])
    [row] = await site.sql.fetch("select * from ops.failures")
    assert (row["kind"], row["error_code"]) == ("handoff", "generation_failed")
    assert (row["failures"], row["latest_error"], row["retryable"]) == (
        2,
        "It was the latest.",
        True,
    )


async def test_throughput_counts_each_step_in_its_minute(site: Site) -> None:
    await site.sql.execute("set baton.clock_offset = '-10 minutes'")
    await site.submit()
    await site.running()
    await site.sql.execute("set baton.clock_offset = '0'")
    await site.ended(bad=1, good=2)
    rows = await site.sql.fetch("select * from ops.throughput")
    assert len(rows) == 60 and rows[0]["minute"] > rows[-1]["minute"]
    totals = [sum(row[c] for row in rows) for c in ("submitted", "started", "completed", "failed")]
    assert totals == [5, 4, 2, 1]
    earlier = [row for row in rows[5:] if row["submitted"]]  # both can be in one minute, or not
    assert sum(row["submitted"] for row in earlier) == 2
    await site.sql.execute("set baton.clock_offset = '2 hours'")
    assert not await site.sql.fetchval("select sum(submitted + completed) from ops.throughput")


async def test_slow_kinds_are_told_from_the_latest_thousand(site: Site) -> None:
    await site.ended(bad=0, good=1100)
    await site.sql.execute(
        "update jobs set created_at = started_at - interval '2 seconds',"
        " completed_at = started_at + n * interval '1 second'"
        " from (select id, row_number() over (order by id) as n from jobs) n where n.id = jobs.id"
    )
    [row] = await site.sql.fetch("select * from ops.slow_kinds")
    assert (row["kind"], row["sample"]) == ("handoff", 1000)
    assert {row[f"wait_p{p}"].total_seconds() for p in (50, 95, 99)} == {2}
    assert [row[f"run_p{p}"].total_seconds() for p in (50, 95, 99)] == [600, 1050, 1090]


async def test_an_integration_tells_what_came_of_what_was_sent(site: Site) -> None:
    integration_id = await integration(site)
    store = "select store_hook_deliveries(array[$1::uuid], array[$2], array[$3::jsonb], '{s3cret}')"
    for delivery_id in ("a", "b"):
        await site.sql.execute(store, integration_id, delivery_id, "{}")
    results = ["accepted", "duplicate", "unverified", "malformed", "full"]
    await site.sql.execute(
        "select count_hooks(array_fill($1::uuid, '{5}'), $2, '{2, 1, 3, 4, 5}')",
        integration_id,
        results,
    )
    await site.sql.execute("update hook_deliveries set error = 'No.' where delivery_id = 'a'")
    for name, project in (("one", site.project), ("two", None)):
        await site.sql.execute(
            "insert into resources (integration_id, id, name, type, project_id) "
            "values ($1, $2, $2, 'repository', $3)",
            integration_id,
            name,
            project,
        )
    row = await site.sql.fetchrow("select * from ops.integrations")
    assert row is not None
    assert (row["source"], row["workspace"], row["owner"]) == ("github", "acme", "site@example.com")
    assert row["last_delivery"] and row["waiting"] == 2 and row["too_large"] is None
    counts = ("accepted", "duplicates", "unverified", "malformed", "full")
    assert [row[name] for name in counts] == [2, 1, 3, 4, 5]
    assert (row["failed"], row["last_error"]) == (1, "No.")
    assert (row["resources"], row["untracked"]) == (2, 1)
    assert "s3cret" not in str(dict(row))
    await site.sql.execute("update hook_counts set hour = hour - interval '3 days'")
    await site.sql.execute(
        "select count_hooks(array[$1::uuid], '{unverified}', '{1}')", integration_id
    )
    row = await site.sql.fetchrow("select * from ops.integrations")
    assert row and row["last_delivery"] and (row["accepted"], row["unverified"]) == (None, 1)
    assert await site.sql.fetchval("select count(*) from hook_counts") == len(results)


async def test_the_views_answer_whatever_the_search_path(site: Site) -> None:
    """A login of a monitor may have one of its own."""
    await site.running()
    await site.submit()
    views = await site.sql.fetch(
        "select oid::regclass::text from pg_class"
        " where relnamespace = 'ops'::regnamespace and relkind = 'v'"
    )
    assert len(views) > 10
    await site.sql.execute("set role baton_ops; set search_path = ''")
    for (view,) in views:
        await site.sql.fetch(f"select * from {view}")


async def test_help_names_all_that_there_is(site: Site) -> None:
    rows = await site.sql.fetch("select * from ops.help")
    told = " ".join(row["call"] for row in rows)
    for name in ("ops.health;", "ops.stuck;", "ops.set_threshold(name text, value numeric DEFAULT"):
        assert name in told
    assert [row["call"] for row in rows if not row["about"]] == []
    [health] = [row["about"] for row in rows if row["call"] == "select * from ops.health;"]
    assert len(health) < 100
    there = await site.sql.fetchval(
        "select (select count(*) from pg_proc where pronamespace = 'ops'::regnamespace)"
        " + (select count(*) from pg_class where relnamespace = 'ops'::regnamespace"
        "    and relkind in ('v', 'r'))"
    )
    assert len(rows) == there
    said = await site.sql.fetchval("select obj_description('ops'::regnamespace)")
    assert "ops.health" in said and "ops.help" in said


async def test_no_view_of_ops_shows_a_secret_or_content(site: Site, caller: Caller) -> None:
    site.user, site.project = caller.user_id, caller.project_id
    await caller.ingest({"title": "s3cret title", "content": "s3cret content"})
    await caller.http.post(
        f"/projects/{caller.project_id}/webhooks",
        json={"url": "https://h.example.com/s3cret?t=s3cret", "types": ["job.failed"]},
    )
    job = {"metadata": {"k": "s3cret"}, "webhook_url": "https://h.example.com/s3cret"}
    for _ in range(3):
        job_id = await caller.submit(job=job)
        token = await site.claim(job_id)
        fail = "select fail_job($1, $2, 'generation_failed', 'It failed.', '{\"a\": \"s3cret\"}')"
        await site.sql.fetch(f"select (f).id from ({fail} as f) f", job_id, token)
    await site.sql.execute(
        "update jobs set input = input where false;insert into procrastinate_workers default values"
    )
    running = await caller.submit(job=job)
    await site.claim(running)
    await site.sql.execute("update leases set expires_at = baton_now() - interval '1 minute'")
    await site.sql.execute("select ops.revoke_api_key($1)", caller.key[:11])
    names = await site.sql.fetch(
        "select relname from pg_class"
        " where relnamespace = 'ops'::regnamespace and relkind in ('v', 'r')"
    )
    seen = ""
    for (name,) in names:
        seen += repr([tuple(r) for r in await site.sql.fetch(f'select * from ops."{name}"')])
    assert running in seen and "h.example.com" in seen and "generation_failed" in seen
    digest = await site.sql.fetchval("select encode(digest, 'hex') from api_keys limit 1")
    secrets = await site.sql.fetch("select secret from webhook_secrets")
    assert secrets
    for hidden in ("s3cret", caller.key, caller.key[11:], digest, *(row[0] for row in secrets)):
        assert hidden not in seen


# --- baton doctor --------------------------------------------------------------------------


async def doctor(dsn: str) -> tuple[int, dict[str, str]]:
    """Its exit code, and its lines by the name of what they are about."""
    env = {"DATABASE_URL": dsn, "BATON_PROVIDER": "extractive"}
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["doctor"], env=env)
    lines = result.output.splitlines()
    assert all(line.startswith(("ok    ", "FAIL  ")) for line in lines), result.output
    return result.exit_code, {line.split()[1]: line for line in lines}


async def test_the_doctor_tells_what_is_wrong_and_what_to_do(site: Site, dsn: str) -> None:
    code, told = await doctor(dsn)
    assert code == 0, told
    assert told["worker"].startswith("ok    worker         1 alive, last sign 0 s ago")
    async with expired_lease(site), job_without_ticket(site):
        code, told = await doctor(dsn)
    assert code == 1
    failed = {name for name, line in told.items() if line.startswith("FAIL")}
    assert failed == {"oldest_expired_lease", "lost_jobs"}
    assert "is more than 30 seconds" in told["oldest_expired_lease"]
    advice = "select advice from ops.checks where name = 'oldest_expired_lease'"
    assert told["oldest_expired_lease"].endswith(await site.sql.fetchval(advice))


async def test_the_doctor_says_once_that_no_worker_is_alive(site: Site, dsn: str) -> None:
    async with silent_worker(site):
        code, told = await doctor(dsn)
    assert code == 1 and "no worker alive, last sign 31 s ago" in told["worker"]
    async with no_worker(site):
        code, told = await doctor(dsn)
    assert code == 1 and told["worker"] == "FAIL  worker         no worker alive"
    assert "worker_seen" not in told


async def test_the_doctor_examines_an_older_schema_too(site: Site, dsn: str) -> None:
    await site.sql.execute(
        "drop view ops.health; drop view ops.checks; update schema_version set version = 2"
    )
    code, told = await doctor(dsn)
    assert code == 1 and told["schema"].startswith("FAIL") and told["worker"].startswith("ok")


# --- What was used -------------------------------------------------------------------------


async def test_usage_is_the_same_before_while_and_after_it_is_counted(site: Site) -> None:
    other = await site.sql.fetchval("select ops.create_project('Other', $1)", site.user)
    await site.sql.execute("select ops.create_plan('team', 1000)")
    await site.sql.execute("select ops.set_plan($1, 'team')", site.user)
    await site.sql.execute("select ops.add_credits($1, 40, 'welcome')", site.user)
    charge = (
        "insert into charges (job_id, user_id, project_id, payer_id, kind, credits, from_grants,"
        " created_at) select gen_random_uuid(), $1, $2, $1, 'handoff', 3, n % 2,"
        " baton_now() - n * interval '10 hours' from generate_series(0, 29) n"
    )
    call = (
        "insert into provider_calls (job_id, attempt, user_id, project_id, kind, model, purpose,"
        " outcome, prompt_tokens, completion_tokens, cost, seconds, created_at)"
        " select $1, 1, $1, $2, 'handoff', 'm', 'draft', 'ok', 10, 1,"
        " case when n % 3 = 0 then 0.5 end, 1, baton_now() - n * interval '10 hours'"
        " from generate_series(0, 29) n"
    )
    for project in (site.project, other):
        await site.sql.execute(charge, site.user, project)
        await site.sql.execute(call, site.user, project)
    await site.submit()

    async def told() -> tuple[list[Any], list[Any]]:
        usage = await site.sql.fetch("select * from ops.usage order by day, project")
        left = "used, reserved, grants_left, month_left + grants_left as remaining"
        balances = await site.sql.fetch(f"select {left} from balances")
        mine = await site.sql.fetch(
            "select used, reserved, grants_left, remaining from ops.balances"
        )
        assert mine == balances
        return usage, mine

    before = await told()
    assert sum(row["credits"] for row in before[0]) == 180
    assert sum(row["calls"] for row in before[0]) == 60
    counted: list[int] = []
    while not counted or counted[-1]:
        counted.append(await site.sql.fetchval("select count_usage(8)"))
        assert await told() == before
    assert len(counted) > 5 and sum(counted) == 116  # those of the last ten minutes are not
    await site.sql.execute(
        "delete from provider_calls where created_at < baton_now() - interval '1 hour'"
    )
    assert (await told())[0] == before[0]


async def test_what_was_used_long_ago_is_kept_but_not_listed(site: Site) -> None:
    await site.sql.execute(
        "insert into charges (job_id, user_id, project_id, payer_id, kind, credits, created_at)"
        " values (gen_random_uuid(), $1, $2, $1, 'handoff', 3, baton_now() - interval '93 days')",
        site.user,
        site.project,
    )
    assert await site.sql.fetchval("select count_usage(8)") == 1
    assert not await site.sql.fetch("select * from ops.usage")
    assert await site.sql.fetchval("select sum(credits) from usage_by_day") == 3
