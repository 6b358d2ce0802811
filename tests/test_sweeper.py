"""The sweep: what it brings back, what it ends, what it leaves alone, and when it holds still."""

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from conftest import Caller

from app.db import Database
from app.queue import Bell
from app.sweeper import DEAD_AFTER, Sweeper

Drain = Callable[..., Awaitable[None]]
LEASE = 15.0


@pytest.fixture
def sweeper(database: Database, bell: Bell) -> Sweeper:
    return Sweeper(database, bell)


async def claim(sql: asyncpg.Connection, job_id: str) -> str:
    """Take a job as a worker does, and fall silent; answers the token."""
    row = await sql.fetchrow(
        "update procrastinate_jobs set status = 'doing' where args ->> 'job_id' = $1 returning id",
        job_id,
    )
    assert row is not None
    claimed = await sql.fetchrow("select * from claim_job($1, $2, 'w', $3)", job_id, row[0], LEASE)
    assert claimed is not None
    return str(claimed["lease_token"])


async def expire(sql: asyncpg.Connection, *job_ids: str) -> None:
    """Let the leases run out without waiting for it."""
    await sql.execute(
        "update leases set expires_at = baton_now() - interval '1 second' where job_id = any($1)",
        list(job_ids),
    )


@pytest.mark.parametrize("deadline", ["start_deadline_at", "deadline_at"])
async def test_a_job_past_its_deadline_is_not_started_before_the_sweep_comes(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper, drain: Drain, deadline: str
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    await sql.execute(f"update jobs set {deadline} = baton_now() - interval '1 second'")
    await drain()
    assert (await caller.job(job_id))["job"]["attempt"] == 0
    await sweeper.sweep_once()
    assert (await caller.job(job_id))["job"]["outcome"] == "expired"


async def test_a_job_of_a_dead_worker_goes_back_with_a_new_ticket(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    await claim(sql, job_id)
    old = await sql.fetchval("select ticket_id from jobs")
    await expire(sql, job_id)
    assert (await caller.job(job_id))["job"]["recovering"] is True

    assert await sweeper.sweep_once() == 1

    job = await sql.fetchrow("select * from jobs")
    assert job
    assert (job["status"], job["crashes"], job["lease_token"]) == ("pending", 1, None)
    assert await sql.fetchval("select count(*) from leases") == 0
    [ticket] = await sql.fetch("select * from procrastinate_jobs")
    assert (ticket["id"], ticket["status"]) == (job["ticket_id"], "todo")
    assert ticket["id"] != old
    assert (await caller.job(job_id))["job"]["recovering"] is False


async def test_a_lease_that_was_renewed_meanwhile_is_left_alone(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    token = await claim(sql, job_id)
    await expire(sql, job_id)
    await sql.fetch("select renew_leases($1, $2, 15)", [job_id], [token])
    assert await sql.fetchval("select sweep_job($1)", job_id) is None
    assert await sql.fetchval("select status from jobs") == "processing"


async def test_a_result_under_a_swept_lease_is_refused(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    token = await claim(sql, job_id)
    await expire(sql, job_id)
    await sweeper.sweep_once()
    with pytest.raises(asyncpg.PostgresError) as refused:
        await sql.fetch("select complete_job($1, $2, '{}')", job_id, token)
    assert refused.value.sqlstate == "BT410"


async def test_many_sweepers_at_once_sweep_each_job_once(
    caller: Caller, sql: asyncpg.Connection, database: Database, bell: Bell
) -> None:
    job_ids = [await caller.submit() for _ in range(5)]
    for job_id in job_ids:
        await claim(sql, job_id)
    await expire(sql, *job_ids)
    swept = await asyncio.gather(*(Sweeper(database, bell).sweep_once() for _ in range(6)))
    assert sum(swept) == 5
    assert [row[0] for row in await sql.fetch("select crashes from jobs")] == [1] * 5
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 5


async def test_lost_workers_count_twice_at_most_and_ten_attempts_are_the_end(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    for attempt in range(1, 11):
        await claim(sql, job_id)
        await expire(sql, job_id)
        await sweeper.sweep_once()
        job = (await caller.job(job_id))["job"]
        assert job["status"] == ("pending" if attempt < 10 else "failed")
        assert await sql.fetchval("select crashes from jobs") == min(attempt, 2)
    assert job["error_code"] == "worker_lost"
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0


async def test_a_job_past_its_deadline_fails_with_timeout_and_its_lease_is_gone(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    waiting, running = await caller.submit(), await caller.submit()
    token = await claim(sql, running)
    await sql.execute("update jobs set deadline_at = baton_now() - interval '1 second'")

    assert await sweeper.sweep_once() == 2

    for job_id in (waiting, running):
        job = (await caller.job(job_id))["job"]
        assert (job["status"], job["error_code"]) == ("failed", "timeout")
    outcomes = await sql.fetch("select outcome from jobs order by id")
    assert [row[0] for row in outcomes] == ["expired", "timed_out"]
    assert await sql.fetch("select renew_leases($1, $2, 15)", [running], [token]) == []


async def test_a_parked_job_waits_without_a_ticket_and_comes_back_when_due(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    token = await claim(sql, job_id)
    status = await sql.fetchval(
        "select park_job($1, $2, 60, 'generation_failed', 'busy', '{}')", job_id, token
    )
    assert status == "pending"
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sweeper.wake_once() == 0
    assert await sweeper.reconcile_once() == 0

    await sql.execute("update job_due set not_before = baton_now()")

    assert await sweeper.wake_once() == 1
    assert await sql.fetchval("select count(*) from job_due") == 0
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 1


async def test_the_fifth_provider_error_is_final(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    for error in range(1, 6):
        token = await claim(sql, job_id)
        status = await sql.fetchval(
            "select park_job($1, $2, 0, 'timeout', 'Too slow.', '{}')", job_id, token
        )
        assert status == ("pending" if error < 5 else "failed")
        await sweeper.wake_once()
    job = (await caller.job(job_id))["job"]
    assert (job["error_code"], job["error"]) == ("timeout", "Too slow.")
    assert await sql.fetchval("select outcome from jobs") == "timed_out"


async def test_a_retry_after_the_deadline_is_not_waited_for(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    token = await claim(sql, job_id)
    status = await sql.fetchval(
        "select park_job($1, $2, 90000, 'generation_failed', 'Busy.', '{}')", job_id, token
    )
    assert status == "failed"


async def test_the_third_crash_of_its_own_process_is_final(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    for crash in range(1, 4):
        token = await claim(sql, job_id)
        status = await sql.fetchval("select crash_job($1, $2, 'It died.', '{}')", job_id, token)
        assert status == ("pending" if crash < 3 else "failed")
    assert (await caller.job(job_id))["job"]["error_code"] == "worker_lost"


async def test_any_number_of_lost_tickets_is_made_up_at_once(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.sweeper.BATCH", 2)
    for _ in range(5):
        await caller.submit()
    await sql.execute("delete from procrastinate_jobs")
    await sql.execute("update jobs set updated_at = updated_at - interval '1 minute'")
    assert await sweeper.reconcile_once() == 5
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 5


async def test_a_pending_job_whose_ticket_was_deleted_gets_a_new_one(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: one"})
    job_id = await caller.submit()
    await sql.execute("delete from procrastinate_jobs")
    assert await sweeper.reconcile_once() == 0  # too young: its ticket may be on its way
    await sql.execute("update jobs set updated_at = updated_at - interval '1 minute'")
    assert await sweeper.reconcile_once() == 1
    await drain()
    assert (await caller.job(job_id))["job"]["status"] == "completed"


async def test_tickets_of_dead_workers_return_or_go(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    waiting, ended = await caller.submit(), await caller.submit()
    await sql.execute(
        "update jobs set deadline_at = baton_now() - interval '1 s' where id=$1", ended
    )
    worker_id = await sql.fetchval("select procrastinate_register_worker_v1()")
    taken = "update procrastinate_jobs set status = 'doing', worker_id = $1"
    await sql.execute(taken, worker_id)
    await sweeper.sweep_once()  # ends the second job, and its ticket with it
    orphan = await sql.fetchval("select defer_ticket($1)", ended)
    await sql.execute(f"{taken} where id = $2", worker_id, orphan)

    assert await sweeper.reconcile_once() == 0  # the worker is alive

    silence = "update procrastinate_workers set last_heartbeat = now() - $1 * interval '1 second'"
    await sql.execute(silence, DEAD_AFTER + 1)
    assert await sweeper.reconcile_once() == 2
    [ticket] = await sql.fetch("select * from procrastinate_jobs")
    assert (ticket["args"], ticket["status"]) == (f'{{"job_id": "{waiting}"}}', "todo")


async def test_a_processing_job_without_a_lease_is_found(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    job_id = await caller.submit()
    await claim(sql, job_id)
    await sql.execute("delete from leases")
    await sweeper.reconcile_once()
    assert await sweeper.sweep_once() == 1
    assert (await caller.job(job_id))["job"]["status"] == "pending"


async def many_expired(caller: Caller, sql: asyncpg.Connection) -> list[str]:
    job_ids = [await caller.submit() for _ in range(6)]
    for job_id in job_ids:
        await claim(sql, job_id)
    await expire(sql, *job_ids)
    return job_ids


class Clock:
    """Seconds that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_mass_expiry_after_a_jump_of_the_clock_is_waited_out_for_one_lease(
    caller: Caller, sql: asyncpg.Connection, database: Database, bell: Bell
) -> None:
    clock = Clock()
    sweeper = Sweeper(database, bell, clock=clock)
    await sweeper.sweep_once()
    await many_expired(caller, sql)
    assert sweeper._last_look is not None
    # As if the database's clock had been an hour behind when we looked last.
    sweeper._last_look = (clock.now, sweeper._last_look[1] - 3600)
    for _ in range(3):
        assert await sweeper.sweep_once() == 0
        clock.now += LEASE / 3
    assert await sweeper.sweep_once() == 6


async def test_a_mass_expiry_after_an_outage_is_waited_out_for_one_lease(
    caller: Caller, sql: asyncpg.Connection, database: Database, bell: Bell
) -> None:
    clock = Clock()
    sweeper = Sweeper(database, bell, clock=clock)
    await sweeper.sweep_once()
    await many_expired(caller, sql)
    clock.now += 60
    for _ in range(3):
        assert await sweeper.sweep_once() == 0
        clock.now += LEASE / 3
    assert await sweeper.sweep_once() == 6


async def test_a_mass_expiry_with_a_steady_clock_means_dead_workers(
    caller: Caller, sql: asyncpg.Connection, sweeper: Sweeper
) -> None:
    await sweeper.sweep_once()
    await many_expired(caller, sql)
    assert await sweeper.sweep_once() == 6
