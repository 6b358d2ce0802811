"""What a stock worker of Procrastinate would lose, and Baton's does not.

These tests are the gate for raising Procrastinate's version.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import Caller, Workers

from app.db import Database, Unavailable
from app.queue import QUEUE, Bell
from tasks import worker as worker_module
from tasks.calls import Calls
from tasks.context import Context
from tasks.outcomes import Retry
from tasks.providers import Completion, Extractive
from tasks.worker import TicketWorker

Drain = Callable[..., Awaitable[None]]
BEATS = "select count(*) from procrastinate_workers where last_heartbeat > $1"
LISTENING = (
    "select count(*) from pg_stat_activity "
    "where application_name = 'baton listen' and datname = current_database()"
)


class Gate(Extractive):
    """Holds every attempt until the test lets it go."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.open = asyncio.Event()
        self.calls = 0

    async def complete(self, context: Context, calls: Calls) -> Completion:
        self.calls += 1
        self.started.set()
        await self.open.wait()
        return await super().complete(context, calls)


@asynccontextmanager
async def running(worker: TicketWorker) -> AsyncIterator[asyncio.Task[None]]:
    """The worker at work; told to stop at the end, unless it has stopped."""
    task: asyncio.Task[None] = asyncio.create_task(worker.run())  # type: ignore[no-untyped-call]
    try:
        yield task
    finally:
        worker.stop()
        async with asyncio.timeout(20):
            await task


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    """What the condition answers once it is true; for states that send no signal."""
    async with asyncio.timeout(seconds):
        while not (answer := await condition()):
            await asyncio.sleep(0.01)
        return answer


async def submitted(caller: Caller) -> str:
    await caller.ingest({"title": "feat: one"})
    return await caller.submit()


async def test_a_ticket_announced_during_an_empty_fetch_is_picked_up_at_once(
    caller: Caller, worker: Workers, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.ingest({"title": "feat: one"})
    gate = Gate()
    made, _ = worker(gate)
    made.fetch_job_polling_interval = 60
    fetch = made.app.job_manager.fetch_job
    announced = asyncio.Event()

    async def fetch_while_a_ticket_arrives(**options: Any) -> Any:
        fetched = await fetch(**options)
        if fetched is None and made.worker_id and listening.is_set() and not announced.is_set():
            await caller.submit()
            # What the notification does when it arrives just now.
            made._new_job_event.set()
            announced.set()
        return fetched

    monkeypatch.setattr(made.app.job_manager, "fetch_job", fetch_while_a_ticket_arrives)
    listening = asyncio.Event()
    async with running(made):
        await until(lambda: sql.fetchval(LISTENING))
        listening.set()
        made._new_job_event.set()
        async with asyncio.timeout(10):
            await gate.started.wait()
        gate.open.set()


async def test_a_submit_wakes_an_idle_worker_long_before_its_poll(
    caller: Caller, worker: Workers, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: one"})
    gate = Gate()
    made, _ = worker(gate)
    made.fetch_job_polling_interval = 60
    async with running(made):
        await until(lambda: sql.fetchval(LISTENING))
        await caller.submit()
        async with asyncio.timeout(10):
            await gate.started.wait()
        gate.open.set()


async def test_a_burst_of_submits_is_announced_after_the_commit_and_not_one_by_one(
    caller: Caller, dsn: str, sql: asyncpg.Connection
) -> None:
    heard: asyncio.Queue[int] = asyncio.Queue()
    listener = await asyncpg.connect(dsn)
    await listener.add_listener(f"procrastinate_queue_v1#{QUEUE}", lambda *_: heard.put_nowait(1))
    await asyncio.gather(*(caller.submit() for _ in range(30)))
    async with asyncio.timeout(5):
        await heard.get()
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 30
    assert heard.qsize() < 15
    triggers = "select count(*) from pg_trigger where tgname like '%job_inserted%'"
    assert await sql.fetchval(triggers) == 0
    await listener.close()


async def test_a_pruned_worker_stops_itself(
    worker: Workers, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_EVERY", 0.02)
    made, _ = worker()
    async with running(made) as task:
        await until(lambda: sql.fetchval("select id from procrastinate_workers"))
        await sql.execute("delete from procrastinate_workers")
        async with asyncio.timeout(10):
            await task
    assert made.broken and "taken it for dead" in made.broken


async def test_a_failed_heartbeat_is_made_up_by_the_next(
    worker: Workers, sql: asyncpg.Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_EVERY", 0.02)
    value, failures = database.value, iter([True, True])

    async def failing_at_first(name: str, *args: Any, **options: Any) -> Any:
        if name == "beat" and next(failures, False):
            raise Unavailable("away")
        return await value(name, *args, **options)

    monkeypatch.setattr(database, "value", failing_at_first)
    made, _ = worker()
    async with running(made) as task:
        start = await until(
            lambda: sql.fetchval("select last_heartbeat from procrastinate_workers")
        )
        await until(lambda: sql.fetchval(BEATS, start))
        assert not task.done()
    assert made.broken is None


async def test_the_heart_beats_until_the_last_attempt_has_drained(
    caller: Caller, worker: Workers, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_EVERY", 0.02)
    job_id = await submitted(caller)
    gate = Gate()
    made, _ = worker(gate)
    async with running(made) as task:
        await gate.started.wait()
        made.stop()
        for _ in range(2):
            at = await sql.fetchval("select last_heartbeat from procrastinate_workers")
            await until(partial(sql.fetchval, BEATS, at))
        assert not task.done()
        gate.open.set()
        await task
    assert (await caller.job(job_id))["job"]["status"] == "completed"
    assert await sql.fetchval("select count(*) from procrastinate_workers") == 0


async def test_what_has_not_finished_within_the_grace_is_given_back_and_is_no_crash(
    caller: Caller, worker: Workers, sql: asyncpg.Connection
) -> None:
    job_id = await submitted(caller)
    gate = Gate()
    made, _ = worker(gate)
    made.shutdown_graceful_timeout = 0.1
    async with running(made) as task:
        await gate.started.wait()
        made.stop()
        await task
    job = await sql.fetchrow("select * from jobs")
    assert job and (job["status"], job["crashes"], job["provider_errors"]) == ("pending", 0, 0)
    assert await sql.fetchval("select status::text from procrastinate_jobs") == "todo"
    assert await sql.fetchval("select count(*) from leases") == 0
    assert (await caller.job(job_id))["job"]["status"] == "pending"


async def test_a_result_is_kept_while_the_database_is_away(
    caller: Caller,
    drain: Drain,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = await submitted(caller)
    value, failures, gate = database.value, iter([True] * 3), Gate()
    gate.open.set()

    async def away_at_the_end(name: str, *args: Any, **options: Any) -> Any:
        if name == "complete_job" and next(failures, False):
            raise Unavailable("away")
        return await value(name, *args, **options)

    monkeypatch.setattr(database, "value", away_at_the_end)
    await drain(gate)
    assert (await caller.job(job_id))["job"]["status"] == "completed"
    assert gate.calls == 1


async def test_a_result_whose_answer_was_lost_is_stored_once(
    caller: Caller,
    drain: Drain,
    database: Database,
    sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = await submitted(caller)
    value, failures = database.value, iter([True])

    async def answer_lost(name: str, *args: Any, **options: Any) -> Any:
        answer = await value(name, *args, **options)
        if name == "complete_job" and next(failures, False):
            raise Unavailable("the answer was lost")
        return answer

    monkeypatch.setattr(database, "value", answer_lost)
    await drain()
    assert (await caller.job(job_id))["job"]["status"] == "completed"
    assert await sql.fetchval("select count(*) from handoffs") == 1
    assert await sql.fetchval("select count(*) from charges") == 1


async def test_a_worker_outlives_the_loss_of_all_its_connections(
    caller: Caller, worker: Workers, sql: asyncpg.Connection
) -> None:
    job_id = await submitted(caller)
    gate = Gate()
    made, _ = worker(gate, retry_for=30.0)
    async with running(made) as task:
        await gate.started.wait()
        await sql.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and application_name like 'baton%'"
        )
        gate.open.set()

        async def completed() -> bool:
            return bool(await sql.fetchval("select status = 'completed' from jobs"))

        await until(completed)
        later = await submitted(caller)

        async def both() -> bool:
            return await sql.fetchval("select bool_and(status = 'completed') from jobs") is True

        await until(both)
        assert not task.done()
    assert {job_id, later} == {str(r[0]) for r in await sql.fetch("select job_id from handoffs")}


async def test_a_ticket_that_is_ours_in_the_table_only_is_given_back(
    caller: Caller, worker: Workers, sql: asyncpg.Connection
) -> None:
    gate = Gate()
    made, _ = worker(gate)
    async with running(made):
        worker_id = await until(lambda: sql.fetchval("select id from procrastinate_workers"))
        # As if the answer to a claim had been lost on the way.
        ticket = await sql.fetchval(
            "insert into procrastinate_jobs (queue_name, task_name, status, worker_id) "
            "values ('elsewhere', 't', 'doing', $1) returning id",
            worker_id,
        )
        suspects = await made.audit_once(set())
        assert ticket in suspects
        read = "select status::text, worker_id from procrastinate_jobs where id = $1"
        assert await sql.fetchval(read, ticket) == "doing"
        await made.audit_once({ticket})
        row = await sql.fetchrow(read, ticket)
        assert row and tuple(row) == ("todo", None)


async def test_a_worker_that_cannot_renew_starts_nothing(
    caller: Caller, worker: Workers, drain: Drain, sql: asyncpg.Connection
) -> None:
    job_id = await submitted(caller)
    gate = Gate()
    _, executor = worker(gate)
    executor._renewed = time.monotonic() - 60
    with pytest.raises(Unavailable):
        await executor.run(job_id, 1)
    assert gate.calls == 0
    await executor.renew_once()
    gate.open.set()
    await executor.run(job_id, 1)
    assert gate.calls == 1


class Busy(Extractive):
    """Asks to be left alone for seven seconds."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        raise Retry("The provider is busy.", after=7.0, meta={"provider_status": 429})


async def test_a_provider_that_asks_to_wait_is_waited_for(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    job_id = await submitted(caller)
    await drain(Busy())
    assert (await caller.job(job_id))["job"]["status"] == "pending"
    wait = "select extract(epoch from not_before - baton_now())::float8 from job_due"
    assert 5 < await sql.fetchval(wait) <= 7
    assert await sql.fetchval("select provider_errors from jobs") == 1


async def test_a_hung_attempt_is_cancelled_and_counted(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await submitted(caller)
    gate = Gate()
    await drain(gate, attempt_timeout=0.2)
    row = await sql.fetchrow("select status, provider_errors from jobs")
    assert row and tuple(row) == ("pending", 1)
    assert await sql.fetchval("select count(*) from job_due") == 1


async def test_a_job_that_lost_two_workers_cannot_take_a_third(
    caller: Caller, drain: Drain, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_PROVIDER", "scripted:Scripted")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    await caller.ingest({"title": "exit"})
    poison = await caller.submit()
    await sql.execute("update jobs set crashes = 2")
    neighbour = await caller.submit()
    await drain()
    job = (await caller.job(poison))["job"]
    assert (job["status"], job["error_code"]) == ("failed", "worker_lost")
    assert "exit status 9" in job["error"]
    assert (await caller.job(neighbour))["job"]["status"] == "completed"


async def test_a_lost_ring_costs_a_poll_and_nothing_else(
    caller: Caller, worker: Workers, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bell, "ring", lambda self: None)
    await caller.ingest({"title": "feat: one"})
    gate = Gate()
    gate.open.set()
    made, _ = worker(gate)
    made.fetch_job_polling_interval = 0.1
    async with running(made):
        await caller.submit()
        async with asyncio.timeout(10):
            await gate.started.wait()
