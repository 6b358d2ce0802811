"""Held back: a paused kind, a project with a limit; who is first; and nothing stays behind."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from conftest import Caller, Workers
from test_transitions import ARTIFACT
from test_worker import Gate, running

from app.db import Database

Drain = Callable[..., Awaitable[None]]
SUBMIT = "select (job).id::text from submit_job($1, $2, $3, '{github}', null, null, '{}', $4)"
TICKETS = (
    "select array_agg(args ->> 'job_id' order by priority desc, id) from procrastinate_jobs "
    "where status = 'todo'"
)


class Desk:
    """Jobs of one project, and the verbs of the worker."""

    def __init__(self, sql: asyncpg.Connection, user: Any, project: Any) -> None:
        self.sql, self.user, self.project = sql, user, project

    async def submit(self, kind: str = "handoff", priority: str = "normal") -> str:
        job = json.dumps({"priority": priority})
        return str(await self.sql.fetchval(SUBMIT, self.user, self.project, kind, job))

    async def claim(self, job_id: str) -> Any:
        """The token; None: it may not run."""
        return await self.sql.fetchval(
            "select lease_token from claim_job($1, (select ticket_id from jobs where id = $1), "
            "'w', 15)",
            job_id,
        )

    async def complete(self, job_id: str, token: Any) -> None:
        await self.sql.execute(
            "select complete_job($1, $2, $3)", job_id, token, json.dumps(ARTIFACT)
        )

    async def tickets(self) -> list[str]:
        """The jobs that a worker would take, in that order."""
        return await self.sql.fetchval(TICKETS) or []

    async def wake(self, limit: int = 100) -> int:
        return int(await self.sql.fetchval("select wake_held($1)", limit))

    async def limit(self, concurrency: int | None) -> None:
        await self.sql.execute("select ops.set_concurrency($1, $2)", self.project, concurrency)

    async def status(self, job_id: str) -> str:
        return str(await self.sql.fetchval("select status from jobs where id = $1", job_id))


async def desk_of(sql: asyncpg.Connection, name: str) -> Desk:
    user = await sql.fetchval("select ops.create_user($1)", f"{name}@example.com")
    project = await sql.fetchval("select ops.create_project($1, $2)", name, user)
    return Desk(sql, user, project)


@pytest.fixture
async def desk(sql: asyncpg.Connection) -> Desk:
    return await desk_of(sql, "ada")


# --- Pausing --------------------------------------------------------------------------------


async def test_a_paused_kind_is_accepted_and_waits_and_its_client_can_see_that(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    before = await caller.submit()
    await sql.execute("select ops.pause('handoff', 'the provider is down')")
    after = await caller.submit()
    await drain()
    for job_id in (before, after):
        job = (await caller.job(job_id))["job"]
        assert (job["status"], job["eta"], job["queue"]["paused"]) == ("pending", None, True)
        assert job["queue"]["position"] >= 1
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sql.fetchval("select ops.resume('handoff')") is True
    await sql.execute("select wake_held(100)")
    assert (await caller.job(after))["job"]["queue"]["paused"] is False
    await drain()
    assert [(await caller.job(id))["job"]["done"] for id in (before, after)] == [True, True]


@pytest.mark.parametrize(
    ("held", "let_go"),
    [
        ("select ops.hold('We look at it.')", "select ops.go_live()"),
        ("select ops.set_concurrency($1, 0)", "select ops.set_concurrency($1, null)"),
    ],
)
async def test_no_time_is_promised_to_who_waits_for_an_operator(
    caller: Caller, sql: asyncpg.Connection, drain: Drain, held: str, let_go: str
) -> None:
    await caller.submit()
    await drain()  # so that there is experience to promise from
    project = [caller.project_id] * ("$1" in held)
    job_id = await caller.submit("/handoffs", until="2026-01-01T00:00:00Z")
    assert (await caller.job(job_id))["job"]["queue"]["paused"] is False
    await sql.execute(held, *project)
    job = (await caller.job(job_id))["job"]
    assert (job["eta"], job["queue"]["paused"]) == (None, True)
    await sql.execute(let_go, *project)
    assert (await caller.job(job_id))["job"]["queue"]["paused"] is False


async def test_a_running_attempt_outlives_the_pause_of_its_kind_and_other_kinds_run(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    first, second = await desk.submit(), await desk.submit()
    other = await desk.submit("onboarding_brief")
    token = await desk.claim(first)
    await sql.execute("select ops.pause('handoff')")
    assert await desk.claim(second) is None
    assert await desk.claim(other) is not None
    await desk.complete(first, token)
    assert await desk.status(first) == "completed"
    assert await desk.tickets() == [other]  # not fetched here, only claimed
    await sql.execute("select ops.pause()")
    third = await desk.submit("release_notes")
    assert third not in await desk.tickets()
    with pytest.raises(asyncpg.PostgresError, match="all kinds are paused"):
        await sql.execute("select ops.resume('handoff')")
    assert [await sql.fetchval("select ops.resume()") for _ in range(2)] == [True, False]
    assert await desk.wake() == 2
    assert await desk.tickets() == [other, second, third]


async def test_what_becomes_due_during_a_pause_waits_for_its_end_and_deadlines_count(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    parked, late = await desk.submit(), await desk.submit()
    token = await desk.claim(parked)
    await sql.execute("select park_job($1, $2, 1, 'timeout', 'Late.', '{}')", parked, token)
    await sql.execute("select ops.pause()")
    await sql.execute("set baton.clock_offset = '1 min'")
    assert await sql.fetchval("select wake_due(10)") == 1
    assert [await desk.wake() for _ in range(2)] == [1, 0]
    assert await sql.fetchval("select reconcile_jobs(10)") == 0
    assert await desk.tickets() == []
    await sql.execute("set baton.clock_offset = '25 hours'")
    assert await sql.fetchval("select sweep_job($1)", late) == "failed"
    assert await sql.fetchval("select count(*) from job_due") == 1


async def test_a_resumed_kind_comes_back_by_priority_and_age_in_small_steps(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await sql.execute("select ops.pause()")
    low = await desk.submit(priority="low")
    normal = [await desk.submit() for _ in range(3)]
    high, first = await desk.submit(priority="high"), await desk.submit()
    assert await sql.fetchval("select ops.prioritize($1)", first) is True
    await sql.execute("select ops.resume()")
    assert await desk.wake(2) == 2
    assert await desk.tickets() == [first, high]
    assert [await desk.wake(2) for _ in range(3)] == [2, 2, 0]
    assert await desk.tickets() == [first, high, *normal, low]


# --- Concurrency of a project ----------------------------------------------------------------


async def test_a_project_with_a_limit_has_no_more_tickets_than_room(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await desk.limit(2)
    jobs = [await desk.submit() for _ in range(4)]
    high = await desk.submit(priority="high")
    other = await desk_of(sql, "bob")
    theirs = await other.submit()
    assert await desk.tickets() == [*jobs[:2], theirs]
    tokens = [await desk.claim(job_id) for job_id in jobs]
    assert [token is None for token in tokens] == [False, False, True, True]
    await sql.execute("delete from procrastinate_jobs where args ->> 'job_id' = any ($1)", jobs)
    await desk.complete(jobs[0], tokens[0])
    assert await desk.tickets() == [high, theirs] or await desk.tickets() == [theirs, high]
    await desk.complete(jobs[1], tokens[1])
    assert set(await desk.tickets()) == {high, theirs, jobs[2]}


ENDS = [
    "complete_job($1, $2, $3)",
    "fail_job($1, $2, 'no_result', 'Nothing.', '{}')",
    "park_job($1, $2, 20, 'timeout', 'Late.', '{}')",
    "hold_job($1, $2, 20)",
    "crash_job($1, $2, 'It died.', '{}')",
    "release_job($1, $2)",
    "ops.cancel_job($1, 'enough')",
    "ops.cancel_project((select project_id from jobs where id = $1), max => 1)",
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.partition("(")[0])
async def test_every_end_of_an_attempt_makes_room_for_the_next(
    desk: Desk, sql: asyncpg.Connection, end: str
) -> None:
    await desk.limit(1)
    first = await desk.submit()
    token = await desk.claim(first)
    await sql.execute("delete from procrastinate_jobs")
    second = await desk.submit()
    if "project" in end:  # those that wait come first
        await sql.execute(f"select {end}", first)
        assert (await desk.status(first), await desk.status(second)) == ("processing", "failed")
        return
    assert await desk.tickets() == []
    given = [first, token, json.dumps(ARTIFACT)][: 1 + ("$2" in end) + ("$3" in end)]
    await sql.execute(f"select {end}", *given)
    assert second in await desk.tickets()
    assert await desk.claim(second) is not None


async def test_a_dead_worker_keeps_its_place_until_the_sweep_and_then_it_is_free(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await desk.limit(1)
    first, second = await desk.submit(), await desk.submit()
    await desk.claim(first)
    await sql.execute("delete from procrastinate_jobs")
    await sql.execute("set baton.clock_offset = '20 s'")
    assert await desk.wake() == 0 and await desk.claim(second) is None
    assert await sql.fetchval("select sweep_job($1)", first) == "pending"
    assert await desk.tickets() == [second]
    assert await desk.claim(second) is not None
    assert await desk.wake() == 0
    assert await desk.status(first) == "pending"


async def test_the_limit_is_exact_and_nothing_waits_without_need_however_many_claim(
    desk: Desk, sql: asyncpg.Connection, dsn: str
) -> None:
    limit, jobs, workers = 3, 60, 8
    await desk.limit(limit)
    for _ in range(jobs):
        await desk.submit()
    inside = peak = 0
    ended = asyncio.Event()

    async def work() -> None:
        nonlocal inside, peak
        connection = await asyncpg.connect(dsn)
        mine = Desk(connection, desk.user, desk.project)
        while not ended.is_set():
            # Not the tickets alone: all that wait, as if each had ten of them.
            job_id = await connection.fetchval(
                "select id::text from jobs where status = 'pending' order by random() limit 1"
            )
            if job_id is None:
                break
            token = await mine.claim(job_id)
            if token is None:
                continue
            inside += 1
            peak = max(peak, inside)
            await asyncio.sleep(0.002)
            inside -= 1  # before the end of the lease, or the next could be inside already
            await mine.complete(job_id, token)
        await connection.close()

    async with asyncio.timeout(30):
        await asyncio.gather(*(work() for _ in range(workers)))
    assert peak == limit
    assert await sql.fetchval("select count(*) from jobs where status = 'completed'") == jobs
    assert await sql.fetchval("select count(*) from job_due") == 0


async def test_two_claims_of_the_last_place_take_turns(
    desk: Desk, sql: asyncpg.Connection, dsn: str
) -> None:
    first, second = await desk.submit(), await desk.submit()
    await desk.limit(1)
    connection = await asyncpg.connect(dsn)
    other = Desk(connection, desk.user, desk.project)
    async with sql.transaction():
        assert await desk.claim(first) is not None
        claiming = asyncio.create_task(other.claim(second))
        async with asyncio.timeout(5):
            while not await sql.fetchval("select count(*) from pg_locks where not granted"):
                assert not claiming.done()
                await asyncio.sleep(0.01)
    assert await claiming is None
    await connection.close()


async def test_the_ends_alone_keep_a_project_with_a_limit_going(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await desk.limit(2)
    for _ in range(10):
        await desk.submit()
    done = 0
    while tickets := await desk.tickets():  # no wake_held anywhere
        assert len(tickets) <= 2
        for job_id in tickets:
            token = await desk.claim(job_id)
            await desk.complete(job_id, token)
            done += 1
    assert done == 10


async def test_a_flood_that_is_there_already_is_moved_out_of_the_way_and_let_go_again(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    flood = [await desk.submit() for _ in range(6)]
    other = await desk_of(sql, "bob")
    theirs = await other.submit()
    await desk.limit(0)
    assert [await desk.wake(4) for _ in range(3)] == [4, 2, 0]
    assert await desk.tickets() == [theirs]
    await desk.limit(2)
    assert await desk.wake() == 2
    assert await desk.tickets() == [theirs, *flood[:2]]
    assert await desk.wake() == 0
    await desk.limit(None)
    assert [await desk.wake(3) for _ in range(2)] == [3, 1]
    assert (await desk.tickets())[:1] == [theirs]
    assert len(await desk.tickets()) == 7
    assert await desk.wake() == 0


async def test_a_ticket_that_is_lost_strands_no_job_of_a_project_with_a_limit(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await desk.limit(1)
    first, second = await desk.submit(), await desk.submit()
    await sql.execute("delete from procrastinate_jobs")
    await sql.execute("set baton.clock_offset = '1 min'")
    assert await desk.wake() == 0  # it counts as admitted
    assert await sql.fetchval("select reconcile_jobs(10)") == 1
    assert await desk.wake() == 1
    assert await desk.tickets() == [first]
    assert second not in await desk.tickets()


async def test_a_paused_job_of_a_project_with_a_limit_does_not_block_the_others(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await desk.limit(1)
    running_one = await desk.submit("release_notes")
    token = await desk.claim(running_one)
    await sql.execute("delete from procrastinate_jobs")
    paused, other = await desk.submit(), await desk.submit("onboarding_brief")
    await sql.execute("select ops.pause('handoff')")
    await desk.complete(running_one, token)
    await desk.wake()
    assert await desk.tickets() == [other]
    await sql.execute("select ops.resume()")
    token = await desk.claim(other)
    await sql.execute("delete from procrastinate_jobs")
    await desk.wake()
    assert await desk.tickets() == []  # its turn has not come
    await desk.complete(other, token)
    assert await desk.tickets() == [paused]


async def test_an_operator_sees_what_is_held_back_and_how_much_waits(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    await desk.limit(1)
    first = await desk.submit()
    await desk.claim(first)
    for _ in range(2):
        await desk.submit()
    await sql.execute("select ops.pause('release_notes', 'under repair')")
    await (await desk_of(sql, "bob")).submit("release_notes")
    rows = await sql.fetch("select * from ops.holds order by hold")
    assert [
        (row["hold"], row["kind"], row["project"], row["concurrency"], row["running"])
        for row in rows
    ] == [("concurrency", None, "ada", 1, 1), ("pause", "release_notes", None, None, None)]
    assert [(row["waiting"], row["reason"]) for row in rows] == [(2, None), (1, "under repair")]
    await sql.execute("select ops.resume()")
    await desk.limit(None)
    assert await sql.fetch("select * from ops.holds") == []


# --- To the front ----------------------------------------------------------------------------


async def test_a_job_is_put_before_all_others_wherever_it_waits(
    desk: Desk, sql: asyncpg.Connection
) -> None:
    high, ticketed, parked = [
        await desk.submit(priority=priority) for priority in ("high", "low", "normal")
    ]
    token = await desk.claim(parked)
    await sql.execute("select park_job($1, $2, 900, 'timeout', 'Late.', '{}')", parked, token)
    await desk.limit(0)
    held = await desk.submit()
    await sql.execute("select ops.set_concurrency($1, null)", desk.project)
    for job_id in (ticketed, parked, held):
        assert await sql.fetchval("select ops.prioritize($1)", job_id) is True
    assert await desk.tickets() == [ticketed, high]
    assert await sql.fetchval("select wake_due(10)") == 1
    assert await desk.wake() == 1
    assert await desk.tickets() == [ticketed, parked, held, high]
    await desk.claim(held)
    assert await sql.fetchval("select ops.prioritize($1)", held) is False


# --- With workers ----------------------------------------------------------------------------


async def test_workers_leave_a_limited_project_to_wait_and_serve_the_others(
    desk: Desk, sql: asyncpg.Connection, worker: Workers, database: Database
) -> None:
    other = await desk_of(sql, "bob")
    for each in (desk, other):
        await sql.execute(
            "select ingest_events($1, $2, $3)", each.user, each.project,
            json.dumps([{"source": "github", "event_type": "commit", "title": "-"}]),
        )  # fmt: skip
    flood = [await desk.submit() for _ in range(8)]
    await desk.limit(1)
    theirs = [await other.submit() for _ in range(2)]
    gate = Gate()
    made, _ = worker(gate)
    async with running(made):
        await gate.holds(3)
        states = [await desk.status(job_id) for job_id in (*flood, *theirs)]
        assert sorted(states[:8]) == ["pending"] * 7 + ["processing"]
        assert states[8:] == ["processing"] * 2
        gate.opened.set()
        async with asyncio.timeout(20):
            while await sql.fetchval("select count(*) from jobs where status <> 'completed'"):
                await desk.wake()
                await asyncio.sleep(0.01)
