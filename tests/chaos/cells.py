"""The nine cells: throughput after a fault over throughput before it, in one and the same run.

Two workers are kept busy: the meter sees to it that a number of jobs is always pending, so that
jobs which hang in a fault take no place away from others. A phase's rate is the median of the
completions in windows of two seconds, by the database's own clock. 1.0 means recovered in full.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import asyncpg

from .client import NoAnswer
from .driver import Job, NotPrepared
from .lab import Lab, median, scenario
from .postgres import in_thread
from .stack import Process

WINDOW = 2.0  # seconds
PHASE = 10.0  # seconds of baseline, of fault and of recovery
SCRIPT = "sleep=0.25"
SLOTS = 8  # attempts at a time in one worker: two of them use about half of a small machine
DEPTH = 30  # jobs that wait at any time
POLLED = 25  # one job of so many is polled
ENOUGH = 0.95  # recovery rate / baseline rate
AWAY = (  # what a client of a database in trouble gets to see
    NoAnswer,
    NotPrepared,
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class Meter:
    """Keeps jobs pending, and tells how many were completed when."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.depth = DEPTH
        self._fresh: list[Job] = []
        self._lock = asyncio.Lock()
        self._submitted = 0
        self._sql: asyncpg.Connection | None = None

    async def run(self) -> None:
        """Feed for ever; an outage is waited out."""
        try:
            while True:
                try:
                    await self._top_up()
                except AWAY:
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.03)
        finally:
            if self._sql is not None:
                self._sql.terminate()

    async def drained(self) -> None:
        """Wait until no more jobs wait than in the baseline."""
        while await self._waiting() > DEPTH:
            await asyncio.sleep(0.2)

    async def _waiting(self) -> int:
        if self._sql is None or self._sql.is_closed():
            self._sql = await self._lab.stack.connect()
        async with self._lock:
            waiting = await self._sql.fetchval("select count(*) from jobs where status = 'pending'")
        return int(waiting)

    async def _top_up(self) -> None:
        if len(self._fresh) < 200:
            self._fresh += await self._lab.driver.prepare([SCRIPT] * 300)
        wanted = min(self.depth - await self._waiting(), len(self._fresh))
        if wanted > 0:
            batch = [self._fresh.pop() for _ in range(wanted)]
            for start in range(0, len(batch), 8):
                await asyncio.gather(*(self._submit(job) for job in batch[start : start + 8]))

    async def _submit(self, job: Job) -> None:
        self._submitted += 1
        await self._lab.driver.submit_prepared(job, poll=self._submitted % POLLED == 0)

    async def rate(self, seconds: float) -> tuple[float, float]:
        """Let a phase pass; answers when it began and ended."""
        begun = time.time()
        await asyncio.sleep(seconds)
        return begun, time.time()

    async def completions(self, begun: float, ended: float) -> float:
        """Completed jobs a second: the median of the windows of a phase."""
        rows = await (await self._lab.stack.sql()).fetch(
            "select extract(epoch from completed_at)::float8 from jobs"
            " where completed_at between to_timestamp($1) and to_timestamp($2)",
            begun,
            ended,
        )
        count = max(1, int((ended - begun) / WINDOW))
        windows = [0] * count
        for row in rows:
            index = int((row[0] - begun) / WINDOW)
            if index < count:
                windows[index] += 1
        return median([n / WINDOW for n in windows])


async def measure(
    lab: Lab,
    fault: Callable[[float, Meter], Awaitable[None]],
    *,
    settle: float = 3.0,
    start: bool = True,
) -> None:
    """Baseline, fault, recovery.

    Args:
        fault: breaks things for about that many seconds.
        settle: seconds from the end of the fault until recovery is measured.
    """
    phase = PHASE * lab.scale
    if start:
        await lab.start({"BATON_CONCURRENCY": str(SLOTS)})
    meter = Meter(lab)
    feeding = asyncio.create_task(meter.run())
    try:
        await asyncio.sleep(4)
        before = await meter.rate(phase)
        begun = time.time()
        await fault(phase, meter)
        during = (begun, time.time())
        await asyncio.sleep(settle)
        after = await meter.rate(phase)
    finally:
        lab.expect(not feeding.done(), f"the driver broke: {feeding}")
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
    baseline, recovery = await meter.completions(*before), await meter.completions(*after)
    under = await meter.completions(*during)
    lab.ratio = recovery / baseline if baseline else 0.0
    lab.expect(lab.ratio >= ENOUGH, f"recovery is {lab.ratio:.2f} of the baseline")
    lab.note(f"{baseline:.0f} jobs/s before, {under:.0f} during, {recovery:.0f} after")
    lab.truth = 0.0


@scenario("postgres_restart", "cell: PostgreSQL restarted", cluster="own", alone=True)
async def postgres_restart(lab: Lab) -> None:
    async def fault(seconds: float, _: Meter) -> None:
        await in_thread(lab.postgres.restart, "fast")
        await asyncio.sleep(seconds / 2)
        await in_thread(lab.postgres.restart, "immediate")
        await asyncio.sleep(seconds / 2)

    lab.calls_allowed = 2
    await measure(lab, fault)


@scenario("18", "cell pg_backend_kill: all backends killed each second", alone=True)
async def pg_backend_kill(lab: Lab) -> None:
    async def fault(seconds: float, _: Meter) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await lab.stack.cut("baton worker", "baton serve", "baton listen")
            await asyncio.sleep(1)

    lab.calls_allowed = 2
    await measure(lab, fault)


@scenario("pool_exhaustion", "cell: every connection is taken", cluster="own", alone=True)
async def pool_exhaustion(lab: Lab) -> None:
    async def fault(seconds: float, _: Meter) -> None:
        taken: list[asyncpg.Connection] = []
        until = time.monotonic() + seconds
        dsn = lab.postgres.dsn(lab.stack.name)
        # Those of Baton are killed, so that it has to ask for new ones, and there are none.
        while time.monotonic() < until:
            with suppress(asyncpg.PostgresError, OSError, TimeoutError):
                while len(taken) < 300:
                    taken.append(await asyncpg.connect(dsn, timeout=2))
            with suppress(asyncpg.PostgresError):
                await taken[0].execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where application_name like 'baton %'"
                )
            await asyncio.sleep(0.2)
        lab.note(f"{len(taken)} connections taken")
        for connection in taken:
            connection.terminate()

    lab.calls_allowed = 2
    await measure(lab, fault)


@scenario("crash_recovery", "cell: all workers killed, restarted after 3 s", alone=True)
async def crash_recovery(lab: Lab) -> None:
    async def fault(_: float, __: Meter) -> None:
        for process in lab.stack.processes:
            if process.name.startswith("worker"):
                process.kill()
        await asyncio.sleep(3)
        settings = {"BATON_CONCURRENCY": str(SLOTS)}
        await asyncio.gather(*(lab.stack.worker(settings) for _ in range(2)))

    lab.calls_allowed = 2
    await measure(lab, fault)


@scenario("9", "cell repeated_kills: 2 of 3 workers killed every 2 s", alone=True)
async def repeated_kills(lab: Lab) -> None:
    settings = {"BATON_CONCURRENCY": str(SLOTS * 2 // 3)}
    await lab.start(settings, workers=3)
    workers = [p for p in lab.stack.processes if p.name.startswith("worker")]

    async def fault(seconds: float, _: Meter) -> None:
        victims: list[Process] = workers[:2]
        until = time.monotonic() + seconds * 2
        while time.monotonic() < until:
            await asyncio.sleep(2)
            for victim in victims:
                victim.kill()
            victims = list(await asyncio.gather(*(lab.stack.worker(settings) for _ in victims)))
        lost = await (await lab.stack.sql()).fetchval(
            "select count(*) from jobs where error_code = 'worker_lost'"
        )
        lab.expect(lost == 0, f"{lost} jobs failed for what they did not do")

    lab.calls_allowed = 10
    await measure(lab, fault, start=False)


@asynccontextmanager
async def held(lab: Lab, count: int, statement: str) -> AsyncIterator[list[asyncpg.Connection]]:
    """Connections with an open transaction that keeps its snapshot."""
    connections = []
    for _ in range(count):
        connection = await asyncpg.connect(lab.postgres.dsn(lab.stack.name))
        await connection.execute("begin isolation level repeatable read")
        await connection.execute(statement)
        connections.append(connection)
    try:
        yield connections
    finally:
        for connection in connections:
            connection.terminate()


@scenario("35", "cell idle_in_tx: a transaction that stays open", alone=True)
async def idle_in_tx(lab: Lab) -> None:
    async def fault(seconds: float, _: Meter) -> None:
        async with held(lab, 1, "select pg_current_xact_id(), count(*) from jobs"):
            await asyncio.sleep(seconds * 2)

    await measure(lab, fault)


@scenario("sustained_high_load", "cell: 800 jobs waiting at any time", alone=True)
async def sustained_high_load(lab: Lab) -> None:
    async def fault(seconds: float, meter: Meter) -> None:
        meter.depth = 800
        await asyncio.sleep(seconds * 1.5)
        meter.depth = DEPTH
        await meter.drained()

    await measure(lab, fault)


@scenario("36", "cell active_readers: 3 overlapping long reading transactions", alone=True)
async def active_readers(lab: Lab) -> None:
    async def fault(seconds: float, _: Meter) -> None:
        async def reading(connection: asyncpg.Connection) -> None:
            while True:
                await connection.fetchval("select count(*) from jobs, pg_sleep(0.2)")

        async with held(lab, 3, "select count(*) from jobs") as connections:
            readers = [asyncio.create_task(reading(one)) for one in connections]
            await asyncio.sleep(seconds * 1.5)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    await measure(lab, fault)


@scenario("37", "cell event_burst: bursts of submits and events", alone=True)
async def event_burst(lab: Lab) -> None:
    async def fault(seconds: float, meter: Meter) -> None:
        until = time.monotonic() + seconds
        lab.driver.slowest = 0.0
        while time.monotonic() < until:
            burst = await lab.driver.prepare(["sleep=0.25"] * 200)  # their events count as well
            await asyncio.gather(
                *(lab.driver.submit_prepared(job, poll=False) for job in burst[:100])
            )
            await asyncio.sleep(1)
        lab.note(f"slowest answer {lab.driver.slowest:.2f} s")
        await meter.drained()

    await measure(lab, fault)
    lab.note("no cap on what is accepted yet: a 429 needs quotas")
