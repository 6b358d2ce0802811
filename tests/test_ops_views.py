"""What the on-call sees by SQL: each check of ops.health and each cause in ops.stuck, made and mended.

Conditions are made by what makes them in life as far as that is quick: real tickets, leases and
functions, with a time moved back.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from conftest import Caller

from app.__main__ import cli
from app.db import Database


class Site:
    """A healthy installation: one worker is alive, and everything can be had by SQL."""

    def __init__(self, sql: asyncpg.Connection, dsn: str) -> None:
        self.sql, self.dsn = sql, dsn
        self.user = self.project = ""

    async def open(self) -> None:
        self.user = await self.sql.fetchval("select ops.create_user('ada@example.com')")
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
            " case when bad then 'failed' else 'succeeded' end, case when bad then 'It failed.' end,"
            " case when bad then 'generation_failed' end, case when not bad then 'handoff' end,"
            " case when not bad then $1 end, baton_now(), baton_now()"
            " from (select n <= $3 as bad from generate_series(1, $3 + $4) n) n",
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
        "update workers set state = 'stopped'; delete from procrastinate_workers"
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
    await site.sql.execute("select cancel_job($1, $2)", site.user, job_id)


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
        "update procrastinate_events set at = at - interval '2 minutes'"
    )
    yield
    assert await site.sql.fetchval("select reconcile_tickets(30)") == 1


@asynccontextmanager
async def crashing_job(site: Site) -> AsyncIterator[None]:
    job_id = await site.running()
    await site.sql.execute("update jobs set crashes = 2")
    yield
    await site.sql.execute("select cancel_job($1, $2)", site.user, job_id)


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
    await site.sql.execute("select cancel_job($1, $2)", site.user, job_id)


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
    await site.sql.execute("select cancel_job($1, $2)", site.user, jobs[0])


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
    await site.sql.execute("select cancel_job($1, $2)", site.user, job_id)
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
    (unsent_webhook, "oldest_webhook", ""),
    (many_webhooks, "webhook_backlog", ""),
    (open_transaction, "oldest_transaction", ""),
    (open_snapshot, "oldest_xmin", ""),
    (dead_rows, "dead_tuples", ""),
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
