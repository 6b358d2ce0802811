"""What keeps the promise of a 202 when workers die: sweep, wake, reconcile.

Every process, API or worker, runs one sweeper, so that deadlines hold and crashed jobs come back
with no worker alive. A plain loop and never a queue task: a stalled queue cannot rescue itself.
The one rule: one job per transaction, looked at again under its lock, so any number of sweepers
may run at once. In a database that is held, such as a restored copy, it does nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from app import metrics
from app.db import Database, Refused, Unavailable
from app.queue import Bell

log = logging.getLogger("baton.sweeper")

TICK = 1.0  # seconds between looks for parked jobs that are due
SWEEP_TICKS = 5  # expired leases and deadlines; with a lease of 15 s, 20 s to the truth
RECONCILE_TICKS = 30  # jobs without tickets, tickets without jobs
PULLED = 200  # events that one statement takes out of those that have waited for a project
BATCH = 200  # jobs a tick; more are left to the next one, and to the other processes
HELD_BATCH = 500  # jobs that are let go or held back in one transaction
HELD_FOR = 0.5  # seconds a tick for such transactions when there are many such jobs
COUNT = 20_000  # charges, and calls, that a reconciliation adds to what is known of each day
DEAD_AFTER = 30.0  # seconds without a heartbeat; a worker beats every 5
LEASE = 15.0  # seconds that a claim or a renewal of tasks/executor.py counts
# The brake. Expired leases mean dead workers, or that nobody could renew: the database's clock has
# jumped, or the database was away. Only the second case leaves a trace here, and then live workers
# get one more lease to renew before their jobs are run again.
BRAKE_DRIFT = 5.0  # seconds by which the database's clock may run ahead of ours between two looks
BRAKE_GAP = 10.0  # seconds between two looks after which something was in the way


class Sweeper:
    """The sweep of one process.

    Args:
        clock: seconds that only go forward, whatever happens to the database's clock.
    """

    def __init__(
        self, database: Database, bell: Bell, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._database = database
        self._bell = bell
        self._last_look: tuple[float, float] | None = None  # our clock, the database's
        self._braked_until = 0.0
        self.hold_reason: str | None = None  # at the last look

    async def run(self) -> None:
        """Sweep for ever; an outage of the database, or of its schema, is waited out."""
        tick = 0
        while True:
            try:
                if not await self.held():
                    await self.wake_once()
                    await self.wake_held_once()
                    if tick % SWEEP_TICKS == 0:
                        await self.sweep_once()
                        await self.pull_once()
                    if tick % RECONCILE_TICKS == RECONCILE_TICKS - 1:
                        await self.reconcile_once()
            except Unavailable as error:
                metrics.sweeps.labels("unavailable").inc()
                log.warning("sweep failed", extra={"cause": str(error)})
            except Refused as error:  # no schema yet, or one that is being upgraded
                metrics.sweeps.labels("refused").inc()
                log.error("sweep refused", extra={"cause": str(error)})
            tick += 1
            await asyncio.sleep(TICK)

    async def held(self) -> bool:
        """Does the database have to stand still until an operator calls `ops.go_live()`?"""
        reason: str | None = await self._database.value("hold_reason")
        if reason and reason != self.hold_reason:
            log.warning("held", extra={"reason": reason})
        elif self.hold_reason and not reason:
            log.info("live")
        self.hold_reason = reason
        return reason is not None

    async def wake_once(self) -> int:
        """Give tickets to the parked jobs that are due; answers how many."""
        woken: int = await self._database.value("wake_due", BATCH)
        if woken:
            metrics.woken.inc(woken)
            log.info("wake", extra={"jobs": woken})
            self._bell.ring()
        return woken

    async def wake_held_once(self) -> int:
        """Let jobs go that are held back no more, and hold back those that should be; answers how
        many. A hundred thousand take minutes; the sweep has its turn between them."""
        until = time.monotonic() + HELD_FOR
        total = 0
        while True:
            count: int = await self._database.value("wake_held", HELD_BATCH)
            total += count
            if count < HELD_BATCH or time.monotonic() > until:
                break
        if total:
            log.info("wake held", extra={"jobs": total})
            self._bell.ring()
        return total

    async def sweep_once(self) -> int:
        """Bring back the jobs of dead workers, end those past their deadline; answers how many."""
        if await self._braked():
            metrics.sweeps.labels("braked").inc()
            return 0
        swept = 0
        for row in await self._database.rows("sweepable", BATCH):
            status = await self._database.value("sweep_job", row[0])
            if status is not None:
                swept += 1
                self._bell.announce(row[0])
                await self._count(row[0], status)
        metrics.sweeps.labels("ok").inc()
        if swept:
            self._bell.ring()
        return swept

    async def pull_once(self) -> int:
        """Store what has waited for a project, where whoever gave it one has not come to that;
        answers how many events. Of a long line the rest has its turn at the next sweep."""
        until = time.monotonic() + HELD_FOR
        total = 0
        while time.monotonic() < until:
            taken: int | None = await self._database.value("pull_events", None, PULLED)
            if taken is None:
                break
            total += taken
        if total:
            log.info("pull", extra={"events": total})
        return total

    async def _count(self, job_id: str, status: str) -> None:
        """Tell of a job that was swept."""
        job = await self._database.row("swept_job", job_id)
        log.warning("sweep", extra={"job_id": job_id, "status": status, **dict(job or {})})
        if job is None:  # deleted since
            return
        metrics.job_transitions.labels(job["kind"], "sweep").inc()
        if status == "failed":
            metrics.jobs_ended.labels(job["kind"], job["outcome"], job["error_code"]).inc()

    async def reconcile_once(self) -> int:
        """Mend what crashes between two systems leave behind; answers how many."""
        jobs = 0
        while mended := await self._database.value("reconcile_jobs", BATCH):
            jobs += mended  # batch after batch: a table of tickets that was lost is many of them
            if mended < BATCH:
                break
        tickets: int = await self._database.value("reconcile_tickets", DEAD_AFTER)
        await self._database.value("count_usage", COUNT)
        metrics.reconciled.labels("jobs").inc(jobs)
        metrics.reconciled.labels("tickets").inc(tickets)
        if jobs or tickets:
            log.warning("reconcile", extra={"jobs": jobs, "tickets": tickets})
            self._bell.ring()
        return jobs + tickets

    async def _braked(self) -> bool:
        """Is an expiry to be waited out because renewals may have been impossible?"""
        row = await self._database.row("lease_counts")
        assert row is not None
        now = self._clock()
        hindered = False
        if self._last_look is not None:
            ours, theirs = now - self._last_look[0], row["clock"] - self._last_look[1]
            hindered = ours > BRAKE_GAP or theirs - ours > BRAKE_DRIFT
        self._last_look = (now, row["clock"])
        if hindered and row["expired"]:
            self._braked_until = now + LEASE
            log.error("brake", extra={"expired": row["expired"], "held": row["held"]})
        return now < self._braked_until
