"""The worker: wakes at once, stops in order, owes no ticket, and ends every job exactly once."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from conftest import Workers

from app import __version__
from app.db import Database, Unavailable
from app.jobs import submit
from app.queue import Bell
from app.schemas import HandoffDraft, HandoffRequest
from tasks import worker as worker_module
from tasks.breaker import FAILURES
from tasks.calls import Calls
from tasks.context import Context
from tasks.executor import Executor
from tasks.generate import ClaimedJob
from tasks.providers import Completion
from tasks.worker import FETCHERS, RETURN_AFTER, TicketWorker

NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


class Gate:
    """A provider that lets attempts through when it is opened, and counts them."""

    def __init__(self, *, opened: bool = False) -> None:
        self.opened = asyncio.Event()
        self.changed = asyncio.Condition()
        self.inside = self.peak = self.total = 0
        if opened:
            self.opened.set()

    async def complete(self, context: Context, calls: Calls) -> Completion:
        await self._count(1)
        try:
            await self.opened.wait()
        finally:
            await self._count(-1)
        said = {"text": "It happened.", "event_ids": [e.id for e in context.events]}
        lists = {name: [said] for name in HandoffDraft.model_fields if name != "title"}
        draft = HandoffDraft.model_validate({"title": "T", **lists, "summary": said})
        return Completion(draft=draft, model="m")

    async def _count(self, change: int) -> None:
        async with self.changed:
            self.inside += change
            self.total += change == 1
            self.peak = max(self.peak, self.inside)
            self.changed.notify_all()

    async def holds(self, number: int) -> None:
        """Wait until that many attempts are inside."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: self.inside == number)


class Shop:
    """Submits jobs of one project with an event, and looks at them."""

    def __init__(self, api: Database, sql: asyncpg.Connection, user: str, project: str) -> None:
        self.api, self.sql, self.user, self.project = api, sql, user, project

    async def submit(self) -> str:
        job = await submit(
            self.api, user_id=self.user, project_id=self.project,
            kind="handoff", sources=None, body=HandoffRequest(project_id=self.project),
        )  # fmt: skip
        return str(job["id"])

    async def ticket(self, job_id: str) -> int:
        return int(await self.sql.fetchval("select defer_ticket($1)", job_id))

    async def status(self, job_id: str) -> str:
        row = await self.api.row("read_job", self.user, job_id)
        assert row
        return str(row["status"])

    async def until(self, condition: str, *args: Any) -> None:
        """Until a query answers true; there is no signal for what others commit."""
        async with asyncio.timeout(15):
            while not await self.sql.fetchval(f"select {condition}", *args):
                await asyncio.sleep(0.01)


@pytest.fixture
async def shop(api: Database, ops: asyncpg.Connection, sql: asyncpg.Connection) -> Shop:
    user = str(await ops.fetchval("select ops.create_user('ada@example.com')"))
    project = str(await ops.fetchval("select ops.create_project('Demo', $1)", user))
    event = {"source": "github", "event_type": "commit", "title": "feat: add a cache"}
    await api.row("ingest_events", user, project, [event])
    return Shop(api, sql, user, project)


@asynccontextmanager
async def running(*workers: TicketWorker) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Workers that run until the end of the block."""
    tasks = [asyncio.create_task(w.run()) for w in workers]  # type: ignore[no-untyped-call]
    try:
        yield tasks
    finally:
        for worker in workers:
            stop(worker)
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)


def stop(worker: TicketWorker) -> None:
    """What SIGTERM does."""
    worker.stop()


NO_TICKET = "not exists (select from procrastinate_jobs)"
LISTENS = (
    "exists (select from pg_stat_activity where application_name = 'baton listen' "
    "and datname = current_database() and query <> '' and state = 'idle')"
)


async def test_a_notification_wakes_the_worker_long_before_it_polls(
    shop: Shop, worker: Workers, bell: Bell
) -> None:
    gate = Gate(opened=True)
    ticket_worker, _ = worker(gate)
    ticket_worker.fetch_job_polling_interval = 600.0
    async with running(ticket_worker):
        await shop.until(LISTENS)
        await shop.submit()
        bell.ring()
        await shop.until(NO_TICKET)
        first = gate.total
        await shop.submit()
        bell.ring()
        await shop.until(NO_TICKET)
        assert (first, gate.total) == (1, 2)


async def test_without_a_notification_the_worker_polls(shop: Shop, worker: Workers) -> None:
    gate = Gate(opened=True)
    ticket_worker, _ = worker(gate)
    ticket_worker.listen_notify = False
    assert ticket_worker.fetch_job_polling_interval <= 1.0
    ticket_worker.fetch_job_polling_interval = 0.05
    async with running(ticket_worker):
        job_id = await shop.submit()
        await shop.until("status = 'completed' from jobs where id = $1", job_id)


async def test_a_worker_that_is_told_to_stop_lets_a_running_attempt_finish(
    shop: Shop, worker: Workers
) -> None:
    gate = Gate()
    ticket_worker, executor = worker(gate)
    async with running(ticket_worker) as [task]:
        await shop.until(LISTENS)
        job_id = await shop.submit()
        await gate.holds(1)
        stop(ticket_worker)
        await shop.until(f"not {LISTENS}")  # it takes no more tickets
        waiting = await shop.submit()
        assert not task.done() and await executor.renew_once() == 1
        gate.opened.set()
        async with asyncio.timeout(5):
            await task
    assert (await shop.status(job_id), await shop.status(waiting)) == ("completed", "pending")
    row = await shop.sql.fetchrow("select args ->> 'job_id', status from procrastinate_jobs")
    assert row and tuple(row) == (waiting, "todo")
    assert await shop.sql.fetchval("select count(*) from procrastinate_workers") == 0


async def test_an_attempt_that_outlives_the_grace_gives_its_job_to_the_next_worker(
    shop: Shop, worker: Workers
) -> None:
    gate = Gate()
    first, _ = worker(gate)
    first.shutdown_graceful_timeout = 0.05
    async with running(first) as [task]:
        job_id = await shop.submit()
        await gate.holds(1)
        stop(first)
        async with asyncio.timeout(5):
            await task
    assert await shop.status(job_id) == "pending"
    gate.opened.set()
    async with running(worker(gate)[0]):
        await shop.until("status = 'completed' and attempt = 2 from jobs where id = $1", job_id)
    assert await shop.sql.fetchval("select count(*) from charges") == 1


async def test_a_ticket_of_an_unknown_or_ended_job_is_dropped(shop: Shop, worker: Workers) -> None:
    gate = Gate(opened=True)
    async with running(worker(gate)[0]):
        job_id = await shop.submit()
        await shop.until(NO_TICKET)
        for spent in (job_id, NOBODY):
            await shop.ticket(spent)
            await shop.until(NO_TICKET)
    assert gate.total == 1 and await shop.status(job_id) == "completed"


async def test_a_second_ticket_of_a_running_job_is_dropped(shop: Shop, worker: Workers) -> None:
    gate = Gate()
    async with running(worker(gate)[0]):
        job_id = await shop.submit()
        await gate.holds(1)
        second = await shop.ticket(job_id)
        await shop.until("not exists (select from procrastinate_jobs where id = $1)", second)
        assert await shop.sql.fetchval("select count(*) from procrastinate_jobs") == 1
        gate.opened.set()
        await shop.until(NO_TICKET)
    assert gate.total == 1 and await shop.status(job_id) == "completed"


async def test_a_broken_claim_returns_the_ticket_to_be_tried_later(
    shop: Shop, worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> None:
        raise Unavailable("away")

    monkeypatch.setattr(Executor, "_claim", away)
    job_id = await shop.submit()
    async with running(worker(Gate())[0]):
        await shop.until("exists (select from procrastinate_jobs where scheduled_at is not null)")
    row = await shop.sql.fetchrow("select *, scheduled_at - now() as wait from procrastinate_jobs")
    assert row and (row["status"], row["worker_id"]) == ("todo", None)
    assert RETURN_AFTER - 1 < row["wait"].total_seconds() <= RETURN_AFTER
    monkeypatch.undo()
    await shop.sql.execute("update procrastinate_jobs set scheduled_at = now()")
    async with running(worker(Gate(opened=True))[0]):
        await shop.until("status = 'completed' from jobs where id = $1", job_id)


async def test_a_job_whose_result_could_not_be_stored_in_time_still_ends(
    shop: Shop, worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Executor._keep
    outages = iter([True])

    async def flaky(self: Executor, job: ClaimedJob, name: str, *args: Any) -> Any:
        if name == "complete_job" and next(outages, False):
            raise Unavailable("away for longer than an outcome is kept")
        return await stored(self, job, name, *args)

    monkeypatch.setattr(Executor, "_keep", flaky)
    monkeypatch.setattr("tasks.worker.RETURN_AFTER", 0.0)
    async with running(worker(Gate(opened=True))[0]):
        job_id = await shop.submit()
        await shop.until(NO_TICKET)
        assert await shop.status(job_id) == "processing"
        await shop.sql.execute("update leases set expires_at = now() - interval '1 second'")
        await shop.sql.execute("select sweep_job($1)", job_id)
        await shop.until("status = 'completed' from jobs where id = $1", job_id)


@pytest.mark.parametrize("name", ["_update_heartbeat", "_poll_jobs_to_abort"])
async def test_the_death_of_a_side_task_stops_the_worker(
    worker: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    die = asyncio.Event()

    async def dying(_: TicketWorker) -> None:
        await die.wait()
        raise ZeroDivisionError

    monkeypatch.setattr(TicketWorker, name, dying)
    async with running(worker(Gate())[0]) as [task]:
        die.set()
        async with asyncio.timeout(5):
            await task
    [record] = [r for r in caplog.records if r.msg == "worker broken"]
    assert "ZeroDivisionError" in vars(record)["reason"]


async def test_no_more_attempts_run_at_once_than_allowed(shop: Shop, worker: Workers) -> None:
    gate = Gate()
    async with running(worker(gate, concurrency=3)[0]):
        for _ in range(8):
            await shop.submit()
        await gate.holds(3)
        waiting = "count(*) filter (where status = 'todo') = 5 from procrastinate_jobs"
        assert await shop.sql.fetchval(f"select {waiting}")
        gate.opened.set()
        await shop.until(NO_TICKET)
    assert (gate.peak, gate.total) == (3, 8)


async def test_200_jobs_over_three_workers_end_exactly_once_each(
    shop: Shop, worker: Workers
) -> None:
    gate = Gate(opened=True)
    ids = await asyncio.gather(*(shop.submit() for _ in range(200)))
    for job_id in ids[:50]:  # tickets that come twice change nothing
        await shop.ticket(job_id)
    async with running(*(worker(gate, concurrency=20)[0] for _ in range(3))):
        await shop.until(NO_TICKET)
    rows = await shop.sql.fetch("select id::text as id, status, attempt from jobs")
    assert {row["id"] for row in rows} == set(ids)
    assert {(row["status"], row["attempt"]) for row in rows} == {("completed", 1)}
    for table in ("handoffs", "charges"):
        assert await shop.sql.fetchval(f"select count(distinct job_id) from {table}") == 200
    assert gate.total == 200 and await shop.sql.fetchval("select count(*) from leases") == 0


async def test_a_backlog_is_taken_by_several_fetchers_at_once(
    shop: Shop, worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*(shop.submit() for _ in range(20)))
    gate, all_fetching, fetching = Gate(), asyncio.Event(), 0
    backlogged, _ = worker(gate, concurrency=20)
    fetch = backlogged.app.job_manager.fetch_job

    async def slow(**options: Any) -> Any:
        nonlocal fetching
        fetching += 1
        if fetching == FETCHERS:
            all_fetching.set()
        await all_fetching.wait()
        return await fetch(**options)

    monkeypatch.setattr(backlogged.app.job_manager, "fetch_job", slow)
    async with running(backlogged):
        await gate.holds(20)
        gate.opened.set()
        await shop.until(NO_TICKET)
    assert gate.total == 20


# --- Its row ---------------------------------------------------------------------------------


async def row_of(sql: asyncpg.Connection, state: str) -> asyncpg.Record:
    """The row of the one worker, once it is in that state."""
    async with asyncio.timeout(10):
        while (row := await sql.fetchrow("select * from workers")) is None or row["state"] != state:
            await asyncio.sleep(0.01)
    return row


async def test_a_worker_says_who_it_is_and_that_it_has_stopped(
    worker: Workers, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_EVERY", 0.02)
    made, executor = worker(provider_name="openai", concurrency=7)
    async with running(made):
        row = await row_of(sql, "running")
        assert row["id"] == await sql.fetchval("select id from procrastinate_workers")
        assert row["name"] == f"{row['host']}:{os.getpid()}"
        assert (row["version"], row["provider"]) == (__version__, "openai")
        assert (row["concurrency"], row["breaker_until"]) == (7, None)
        for n in range(FAILURES):
            made._breaker.fail(f"job {n % 2}")
        async with asyncio.timeout(10):
            while (row := await row_of(sql, "running"))["breaker_until"] is None:
                pass
        assert row["breaker_until"] > row["seen_at"] > row["started_at"]
    await row_of(sql, "stopped")


async def test_a_worker_that_is_not_heard_of_is_lost_and_later_forgotten(
    database: Database, sql: asyncpg.Connection
) -> None:
    who = {"name": "w", "host": "h", "version": "1", "concurrency": 1, "provider": "p"}
    ids = [await sql.fetchval("select procrastinate_register_worker_v1()") for _ in range(3)]
    for worker_id in ids:
        assert await database.value("beat", worker_id, who, None) == "running"
    await database.value("stop_worker", ids[2])
    age = "update procrastinate_workers set last_heartbeat = now() - interval '1 min' where id = $1"
    await sql.execute(age, ids[0])
    await database.value("reconcile_tickets", 30.0)
    states = "select array_agg(state order by id) from workers"
    assert await sql.fetchval(states) == ["lost", "running", "stopped"]
    assert await database.value("beat", ids[0], who, None) is None
    await database.value("stop_worker", ids[0])
    assert await sql.fetchval(states) == ["lost", "running", "stopped"]
    await sql.execute("update workers set seen_at = now() - interval '25 hours'")
    await database.value("reconcile_tickets", 30.0)
    assert await sql.fetchval("select array_agg(id) from workers") == [ids[1]]
