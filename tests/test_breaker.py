"""While the provider is down, jobs wait: they use up no tries, and one at a time asks again."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from conftest import Caller, Workers

from app.db import Database
from app.queue import Bell
from tasks.breaker import FAILURES, REST, Breaker
from tasks.calls import Calls
from tasks.context import Context
from tasks.executor import Executor
from tasks.outcomes import GenerationFailed, NoResult, PlanViolation, Retry
from tasks.providers import Completion, Extractive

Drain = Callable[..., Awaitable[None]]


class Clock:
    """Seconds that pass when a test says so."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock=clock)


def opened(breaker: Breaker) -> Breaker:
    for n in range(FAILURES):
        breaker.fail(f"job {n % 2}")
    assert not breaker.admits([])
    return breaker


# --- By itself -----------------------------------------------------------------------------


def test_it_opens_at_the_fifth_failure_in_a_row(breaker: Breaker) -> None:
    assert [breaker.fail(f"job {n % 2}") for n in range(FAILURES - 1)] == [None] * (FAILURES - 1)
    assert breaker.admits([])
    assert breaker.fail("job 0") is not None
    assert not breaker.admits([])


def test_a_success_in_between_starts_the_count_anew(breaker: Breaker) -> None:
    for _ in range(3):
        for n in range(FAILURES - 1):
            assert breaker.fail(f"job {n}") is None
        breaker.succeed()
    assert breaker.admits([])


def test_one_job_alone_does_not_open_it(breaker: Breaker) -> None:
    for _ in range(3 * FAILURES):
        assert breaker.fail("job 0") is None
    assert breaker.admits([])
    assert breaker.fail("job 1") is not None


def test_when_it_has_rested_it_admits_one_ticket_at_a_time(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now += REST[0] * 0.7
    assert not breaker.admits([])
    clock.now += REST[0] * 0.6
    assert breaker.admits([7])  # of before: it may hang
    breaker.take(8)
    assert not breaker.admits([7, 8])
    assert breaker.admits([7])  # it has told nothing: the next one
    breaker.succeed()
    assert breaker.admits([7, 8, 9])


def test_each_failed_try_makes_it_rest_longer_up_to_a_minute(
    breaker: Breaker, clock: Clock
) -> None:
    opened(breaker)
    rests = []
    for _ in range(8):
        clock.now += 1.2 * REST[1]
        wait = breaker.fail("job 0")
        assert wait is not None
        rests.append(wait)
        assert breaker.fail("job 1") == wait  # it came in late: that is no other try
    assert rests[0] < 1.2 * 2 * REST[0]
    assert all(0.8 * REST[1] <= rest <= 1.2 * REST[1] for rest in rests[3:])
    breaker.succeed()
    assert 0.8 * REST[0] <= (opened(breaker).fail("job 0") or 0) <= 1.2 * REST[0]


# --- What becomes of jobs ------------------------------------------------------------------


class Down(Extractive):
    """A provider that fails as it is told, or answers."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0

    async def complete(self, context: Context, calls: Calls) -> Completion:
        self.asked += 1
        if self.error:
            raise self.error
        return await super().complete(context, calls)


def executor(database: Database, provider: Down, breaker: Breaker) -> Executor:
    return Executor(
        database, provider, name="w", attempt_timeout=20.0, bell=Bell(database), breaker=breaker
    )


async def run(executor: Executor, sql: asyncpg.Connection, *job_ids: str) -> None:
    for job_id in job_ids:
        ticket = await sql.fetchval(
            "update procrastinate_jobs set status = 'doing' "
            "where args ->> 'job_id' = $1 returning id",
            job_id,
        )
        await executor.run(job_id, ticket)


async def test_while_the_provider_is_down_a_job_waits_and_that_counts_for_nothing(
    caller: Caller, database: Database, sql: asyncpg.Connection, breaker: Breaker, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await sql.execute(  # not over HTTP: then the absence of an estimate would be remembered
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')",
        caller.user_id,
        caller.project_id,
    )
    await drain()
    down = executor(database, Down(Retry("Busy.")), breaker)
    *parked, held = [await caller.submit() for _ in range(FAILURES)]
    await run(down, sql, *parked, held)
    counts = "select provider_errors, releases from jobs where id = $1"
    assert [tuple(await sql.fetchrow(counts, id) or ()) for id in (parked[0], held)] == [
        (1, 0),
        (0, 1),
    ]
    job = (await caller.job(held))["job"]
    assert (job["status"], job["progress"]["step"], job["queue"]) == ("pending", "waiting", None)
    not_before = await sql.fetchval("select not_before from job_due where job_id = $1", held)
    assert not_before > datetime.now(UTC)
    assert datetime.fromisoformat(job["eta"]["start_at"]) >= not_before - timedelta(milliseconds=1)

    for _ in range(12):  # more often than any budget allows
        await sql.execute("update job_due set not_before = now() where job_id = $1", held)
        await database.value("wake_due", 10)
        await run(down, sql, held)
    assert tuple(await sql.fetchrow(counts, held) or ()) == (0, 13)

    await sql.execute("update jobs set deadline_at = now() - interval '1 s' where id = $1", held)
    assert await database.value("sweep_job", held) == "failed"
    job = (await caller.job(held))["job"]
    assert (job["error_code"], job["outcome"]) == ("timeout", "timed_out")
    assert await sql.fetchval("select count(*) from job_due where job_id = $1", held) == 0


async def test_a_held_job_runs_when_the_provider_is_back(
    caller: Caller, database: Database, sql: asyncpg.Connection, breaker: Breaker
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    job_id = await caller.submit()
    opened(breaker)
    provider = Down(Retry("Busy.", after=77.0))
    await run(executor(database, provider, breaker), sql, job_id)
    wait = "select extract(epoch from not_before - baton_now()) from job_due"
    assert 70 < await sql.fetchval(wait) <= 77, "what the provider asked for"
    provider.error = None
    await sql.execute("update job_due set not_before = now()")
    await database.value("wake_due", 10)
    await run(executor(database, provider, breaker), sql, job_id)
    job = (await caller.job(job_id))["job"]
    assert (job["status"], job["progress"]["step"], job["attempt"]) == (
        "completed", "completed", 2,
    )  # fmt: skip
    assert breaker.admits([])


@pytest.mark.parametrize(
    ("error", "closes"),
    [
        (None, True),
        (NoResult("A refusal.", stage="answer"), True),
        (GenerationFailed("The key is wrong.", stage="provider"), True),
        (NoResult("No events.", stage="context"), False),
        (PlanViolation("Not in the plan."), False),
        (KeyError("?"), False),
    ],
)
async def test_only_an_answer_of_the_provider_closes_it(
    caller: Caller, database: Database, sql: asyncpg.Connection, breaker: Breaker,
    error: Exception | None, closes: bool,
) -> None:  # fmt: skip
    await caller.ingest({"title": "feat: a cache"})
    await run(executor(database, Down(error), opened(breaker)), sql, await caller.submit())
    assert breaker.admits([]) is closes


async def test_a_worker_leaves_the_tickets_alone_until_one_try_has_gone_well(
    caller: Caller, worker: Workers, sql: asyncpg.Connection, breaker: Breaker, clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Slow(Down):
        go = asyncio.Event()

        async def complete(self, context: Context, calls: Calls) -> Completion:
            made = await super().complete(context, calls)
            await self.go.wait()
            return made

    provider = Slow()
    await caller.ingest({"title": "feat: a cache"})
    jobs = [await caller.submit() for _ in range(3)]
    working, _ = worker(provider, breaker=opened(breaker))
    working.fetch_job_polling_interval = 0.01
    looks = 0
    admits = breaker.admits

    def looked(held: Any) -> bool:
        nonlocal looks
        looks += 1
        return admits(held)

    monkeypatch.setattr(breaker, "admits", looked)

    async def look() -> None:
        before = looks
        while looks < before + 3:
            await asyncio.sleep(0.001)

    tickets = "select count(*) from procrastinate_jobs where status = 'todo'"
    tickets += " and queue_name = 'jobs'"
    async with asyncio.timeout(10):
        running = asyncio.create_task(working.run())  # type: ignore[no-untyped-call]
        await look()
        assert (provider.asked, await sql.fetchval(tickets)) == (0, 3)
        clock.now += 2 * REST[0]
        while not provider.asked:
            await asyncio.sleep(0.001)
        await look()
        assert (provider.asked, await sql.fetchval(tickets)) == (1, 2)
        provider.go.set()
        for job_id in jobs:
            while (await caller.job(job_id))["job"]["status"] != "completed":
                await asyncio.sleep(0.01)
        working.stop()
        await running
