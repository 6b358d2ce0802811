"""Scenarios in which PostgreSQL, or the way to it, is away, slow, full or confused."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import asyncpg

from .client import NoAnswer
from .lab import Lab, Skip, scenario
from .postgres import in_thread

PATIENCE = 2.5  # seconds: an answer within 2, and the driver's own share on a busy machine


async def restarted(lab: Lab, mode: str) -> None:
    """`pg_ctl restart` under load."""
    await lab.start()
    async with lab.load("sleep=1", 0.1) as jobs:
        await asyncio.sleep(2)
        down = await in_thread(lab.postgres.restart, mode)
        back = time.monotonic()
        await asyncio.sleep(4)
    await lab.ended(seconds=40)
    lab.completed([job for job in jobs if job.id])
    lab.truth = max([0.0, *(at - back for at in lab.driver.unavailable_at)])
    lab.note(f"down {down:.1f} s, {lab.driver.statuses[503]} answers were 503")


@scenario("16", "pg_ctl restart -m fast under load", limit=5, cluster="own")
async def restart_fast(lab: Lab) -> None:
    await restarted(lab, "fast")


@scenario("17", "pg_ctl restart -m immediate under load", limit=5, cluster="own", short=True)
async def restart_immediate(lab: Lab) -> None:
    await restarted(lab, "immediate")


@scenario("17-down", "pg_ctl stop -m immediate, back after 7 s", limit=5, cluster="own")
async def down_seven(lab: Lab) -> None:
    await lab.start()
    jobs = await lab.run(*["sleep=3"] * 6)
    async with lab.load("sleep=1", 0.2) as more:
        await in_thread(lab.postgres.stop, "immediate")
        await asyncio.sleep(7)
        await in_thread(lab.postgres.start)
        back = time.monotonic()
        await asyncio.sleep(4)
    await lab.ended(seconds=40)
    lab.completed([*jobs, *(job for job in more if job.id)])
    lab.truth = max(0.0, *(at - back for at in lab.driver.unavailable_at))
    stored = max(job.ended_at for job in jobs) - back
    lab.note(f"results made in the outage were stored {stored:.1f} s after it")


async def away(
    lab: Lab, leave: Callable[[], Awaitable[object]], back: Callable[[], Awaitable[object]]
) -> None:
    """The database is away for 10 s; whoever asks is told so, soon."""
    await lab.start(workers=1)
    running = await lab.run(*["sleep=2"] * 5)
    waiting = await lab.driver.prepare(["sleep=0.2"] * 40)
    await leave()
    left = time.monotonic()
    lab.driver.slowest = 0.0
    told: list[int] = []

    async def ask(number: int) -> None:
        with suppress(NoAnswer):
            answer = await lab.driver.ask("GET", f"/jobs/{running[0].id}")
            told.append(answer.status)
        await lab.driver.submit_prepared(waiting[number])

    asking: list[asyncio.Task[None]] = []
    while time.monotonic() < left + 10:
        asking.append(asyncio.create_task(ask(len(asking))))
        await asyncio.sleep(0.3)
    accepted = [job for job in waiting if job.id]
    await back()
    returned = time.monotonic()
    await asyncio.gather(*asking)
    slowest = lab.driver.slowest
    lab.expect(not accepted, f"{len(accepted)} jobs accepted by nobody")
    lab.expect(set(told) <= {503, 200}, f"answers: {sorted(set(told))}")
    lab.expect(slowest < PATIENCE, f"a request hung for {slowest:.1f} s")
    lab.expect(lab.driver.unanswered == 0, f"{lab.driver.unanswered} submits without an answer")
    again = await lab.submit("sleep=0.2")
    await lab.ended(seconds=40)
    lab.completed([*running, *(job for job in again if job.id)])
    lab.truth = max(0.0, *(at - returned for at in lab.driver.unavailable_at))
    lab.note(f"{lab.driver.statuses[503]} answers were 503, the slowest after {slowest:.1f} s")


@scenario("away-refused", "database away for 10 s: refused", limit=5, cluster="own", short=True)
async def refused(lab: Lab) -> None:
    await away(
        lab,
        lambda: in_thread(lab.postgres.stop, "fast"),
        lambda: in_thread(lab.postgres.start),
    )


@scenario("away-frozen", "database away for 10 s: frozen", limit=5, cluster="own")
async def frozen(lab: Lab) -> None:
    pids: list[int] = []

    async def freeze() -> None:
        pids.extend(lab.postgres.freeze())

    async def thaw() -> None:
        lab.postgres.thaw(pids)

    try:
        await away(lab, freeze, thaw)
    finally:
        lab.postgres.thaw(pids)


@scenario("frozen-long", "database frozen for 30 s with running jobs", limit=5, cluster="own")
async def frozen_long(lab: Lab) -> None:
    lab.calls_allowed = 2
    await lab.start()
    jobs = await lab.run(*["sleep=10"] * 10)
    pids = lab.postgres.freeze()
    try:
        await asyncio.sleep(30)
    finally:
        lab.postgres.thaw(pids)
    back = time.monotonic()
    await lab.ended(seconds=60)
    lab.completed(jobs)
    lab.truth = max(0.0, *(at - back for at in lab.driver.unavailable_at))
    twice = sum(len(calls) > 1 for calls in lab.stack.calls().values())
    lab.note(f"{twice} of 10 called twice")


@scenario("28", "the database's clock jumps an hour ahead", limit=40)
async def clock_ahead(lab: Lab) -> None:
    await lab.start()
    jobs = await lab.run(*["sleep=20"] * 12)
    await asyncio.sleep(6)  # every sweeper has looked at the clock once
    await jump(lab, "1 hour")
    await lab.ended()
    lab.completed(jobs)
    braked = [p.name for p in lab.stack.processes if p.said("brake")]
    lab.note(f"brake in {', '.join(braked) or 'no process'}")


async def jump(lab: Lab, offset: str) -> None:
    """Move the database's clock for everybody at once."""
    sql = await lab.stack.sql()
    await sql.execute(f"alter database {lab.stack.name} set baton.clock_offset = '{offset}'")
    await lab.stack.cut("baton serve", "baton worker", "baton isolated")


@scenario("29", "the database's clock jumps an hour back", limit=0)
async def clock_back(lab: Lab) -> None:
    await lab.start({"BATON_ATTEMPT_TIMEOUT": "12"})
    jobs = await lab.run(*["sleep=8"] * 6)
    await jump(lab, "-1 hour")
    await asyncio.sleep(1)
    hung = await lab.submit("hang@1 sleep=0.1")
    lab.calls_allowed = {job.tag: 2 for job in hung}
    await lab.ended()
    lab.completed([*jobs, *hung])
    lab.note("a job past its attempt's time is counted by the worker's own clock")


@scenario("31", "the database's disk is full", limit=10, cluster="disk")
async def disk_full(lab: Lab) -> None:
    if os.geteuid() != 0:
        raise Skip("not root")
    await lab.start(workers=1)
    jobs = await lab.run(*["sleep=4"] * 5)
    place = lab.folder.parent / "31-pg"
    ballast = place / "ballast"
    more = await lab.driver.prepare(["sleep=0.2"] * 200)
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)
    full = time.monotonic()
    while time.monotonic() < full + 12:
        if more:
            await lab.driver.submit_prepared(more.pop())
        await asyncio.sleep(0.05)
    refused = lab.driver.statuses[503]
    ballast.unlink()
    freed = time.monotonic()
    await asyncio.sleep(1)
    if not _running(place / "data"):
        await in_thread(lab.postgres.start)  # it panics when no WAL can be written
        freed = time.monotonic()
        lab.note("PostgreSQL itself panicked and was started again")
    again = await lab.submit("sleep=0.2")
    await lab.ended(seconds=60)
    lab.completed([*jobs, *(job for job in again if job.id)])
    lab.truth = max(0.0, *(at - freed for at in lab.driver.unavailable_at))
    lab.note(f"{refused} answers were 503")
    lab.expect(refused, "the disk was never full")


def _running(data: Path) -> bool:
    with suppress(OSError, ValueError):
        os.kill(int((data / "postmaster.pid").read_text().split("\n")[0]), 0)
        return True
    return False


@scenario("32", "the API's role may have three connections", limit=5)
async def connection_limit(lab: Lab) -> None:
    sql = await lab.stack.sql()
    role = "chaos_limited"
    with suppress(asyncpg.DuplicateObjectError):
        await sql.execute(f"create role {role} login")
    await sql.execute(f"grant baton_api to {role}")  # as a login of its own has it
    await lab.start(apis=0)
    [api] = (await lab.start({"CHAOS_ROLE": role}, workers=0))[0]
    await sql.execute(f"alter role {role} connection limit 3")
    jobs = await lab.submit(*["sleep=1"] * 3)
    found: list[int] = []

    async def many() -> None:
        for _ in range(20):
            answer = await lab.driver.ask("GET", f"/jobs/{jobs[0].id}")
            found.append(answer.status)

    await asyncio.gather(*(many() for _ in range(30)))
    limited = time.monotonic()
    await sql.execute(f"alter role {role} connection limit -1")
    more = await lab.submit("sleep=0.2")
    await lab.ended()
    lab.completed([*jobs, *more])
    lab.expect(api.child.poll() is None, "the API died")
    lab.expect(lab.driver.slowest < PATIENCE, f"a request hung for {lab.driver.slowest:.1f} s")
    lab.truth = max(0.0, *(at - limited for at in (0.0, *lab.driver.unavailable_at)))
    lab.note(f"{found.count(503)} of {len(found)} answers were 503")


@scenario("33", "the row of a running job is locked for 8 s", limit=20)
async def locked_row(lab: Lab) -> None:
    await lab.start()
    jobs = await lab.run(*["sleep=1"] * 3)
    sql = await lab.stack.sql()
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("select from jobs where id = $1 for update", jobs[0].id)
    await asyncio.sleep(8)
    lab.expect(all(job.ended for job in jobs[1:]), "the others waited for the locked one")
    await transaction.rollback()
    freed = time.monotonic()
    await lab.ended()
    lab.completed(jobs)
    lab.truth = jobs[0].ended_at - freed


@scenario("33-table", "ALTER TABLE jobs waits and holds for 6 s", limit=20)
async def locked_table(lab: Lab) -> None:
    await lab.start()
    jobs = await lab.run(*["sleep=1"] * 3)
    sql = await lab.stack.sql()
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("lock table jobs in access exclusive mode")
    lab.driver.slowest = 0.0
    await asyncio.sleep(6)
    await transaction.rollback()
    freed = time.monotonic()
    await lab.ended()
    lab.completed(jobs)
    lab.expect(lab.driver.slowest < PATIENCE, f"a request hung for {lab.driver.slowest:.1f} s")
    lab.truth = max(0.0, *(at - freed for at in (0.0, *lab.driver.unavailable_at)))
    lab.note(f"{lab.driver.statuses[503]} answers were 503")


@scenario("34", "a finish is the victim of a deadlock", limit=2)
async def deadlock(lab: Lab) -> None:
    lab.deadlocks_allowed = 1
    await lab.start(workers=1)
    jobs = await lab.run("sleep=2")
    sql = await lab.stack.sql()
    transaction = sql.transaction()
    await transaction.start()
    # The finish locks the job, then waits for its lease; whoever waited first is the victim.
    await sql.execute("select from leases where job_id = $1 for update", jobs[0].id)
    while not await sql.fetchval(
        "select count(*) from pg_locks where not granted"
        " and pid in (select pid from pg_stat_activity where datname = current_database())"
    ):
        await asyncio.sleep(0.02)
    started = time.monotonic()
    with suppress(asyncpg.DeadlockDetectedError):
        await sql.execute("select from jobs where id = $1 for update", jobs[0].id)
    await transaction.rollback()
    freed = time.monotonic()
    await lab.ended()
    lab.completed(jobs)
    lab.truth = jobs[0].ended_at - freed
    dead = await sql.fetchval(
        "select deadlocks from pg_stat_database where datname = current_database()"
    )
    lab.note(f"{dead} deadlock after {freed - started:.1f} s")


@scenario("38", "100,000 delayed retries are waiting", limit=0, alone=True)
async def many_delayed(lab: Lab) -> None:
    await lab.start(workers=1)
    sql = await lab.stack.sql()
    await sql.execute(
        """
        with made as (
          insert into jobs (user_id, project_id, kind, input, credits)
          select $1, $2, 'handoff',
            '{"sources": null, "filters": {}, "until": null, "options": {}}', 1
          from generate_series(1, 100000)
          returning id)
        insert into job_due (job_id, not_before) select id, now() + interval '1 hour' from made
        """,
        lab.stack.user_id,
        lab.stack.project_id,
        timeout=60,
    )
    await sql.execute("analyze jobs")
    await sql.execute("analyze job_due")
    jobs = []
    for _ in range(20):
        jobs += await lab.submit("sleep=0.1")
        await asyncio.sleep(0.2)
    await lab.ended()
    lab.completed(jobs)
    waits = await sql.fetch(
        "select extract(epoch from started_at - created_at)::float8 * 1000 from jobs"
        " where started_at is not null order by 1"
    )
    times = {}
    for name, statement in (
        ("fetch", "select * from procrastinate_fetch_job_v2(array['jobs'], 1)"),
        ("wake", "select wake_due(200)"),
        ("sweepable", "select sweepable(200)"),
        ("reconcile", "select reconcile_jobs(200)"),
    ):
        started = time.monotonic()
        for _ in range(5):
            await sql.fetch(statement)
        times[name] = (time.monotonic() - started) / 5 * 1000
    lab.expect(times["fetch"] < 5, f"a fetch takes {times['fetch']:.1f} ms")
    lab.note(f"pickup median {waits[len(waits) // 2][0]:.0f} ms")
    lab.note(", ".join(f"{name} {took:.1f} ms" for name, took in times.items()))
    await sql.execute("delete from jobs where started_at is null", timeout=60)
