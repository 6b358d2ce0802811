"""Tickets: the rows of Procrastinate that wake a worker for a job.

It hides how Procrastinate is set up and how workers hear of new tickets. The one rule: a ticket
carries the job's id and nothing else, and losing, repeating or duplicating one is harmless,
because the row in `jobs` is the truth.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import procrastinate

from app.background import background
from app.connector import WAKE_UP, AsyncpgConnector
from app.db import Database, DatabaseError

log = logging.getLogger("baton.queue")

# Both are also named in schema.sql, whose functions defer tickets.
GENERATE = "baton.generate"
QUEUE = "jobs"  # at most 40 bytes: Procrastinate puts it into the name of a channel

QUIET = 0.02  # seconds between two notifications of a process; the first one goes at once
_CHANNEL = f"procrastinate_queue_v1#{QUEUE}"


def make_queue(database: Database, *, retry_for: float = 0.0) -> procrastinate.App:
    """Procrastinate over the pool of this process.

    Args:
        retry_for: seconds for which a query is tried again while the database is away; a worker
            outlives an outage, a request does not wait for it.
    """
    return procrastinate.App(
        connector=AsyncpgConnector(database.pool, database.dsn, retry_for=retry_for)
    )


class Bell:
    """Tells the workers that there are tickets, after the commit that stored them.

    A NOTIFY inside the storing transaction would hold a lock of the whole cluster through its
    commit. So it is a statement of its own, and a burst of submits rings once per `QUIET`. A ring
    that gets lost costs a worker's poll interval, nothing more.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._wanted = asyncio.Event()

    def ring(self) -> None:
        """Say that a ticket has been committed; returns at once."""
        self._wanted.set()

    async def run(self) -> None:
        """Notify whenever somebody has rung, for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._database.value("notify", _CHANNEL, WAKE_UP)
            except DatabaseError as error:  # away, or its notification queue is full
                log.warning("bell not heard", extra={"cause": str(error)})
            await asyncio.sleep(QUIET)


@asynccontextmanager
async def hung_bell(database: Database) -> AsyncIterator[Bell]:
    """A bell that works for as long as the body runs."""
    bell = Bell(database)
    async with background(bell.run()):
        yield bell
