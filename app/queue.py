"""Tickets: the rows of Procrastinate that wake a worker for a job; and how processes hear of news.

It hides how Procrastinate is set up, how workers hear of new tickets and API processes of jobs that
changed. The one rule: a ticket carries the job's id and nothing else, and losing, repeating or
duplicating one is harmless, because the row in `jobs` is the truth.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import orjson
import procrastinate

from app.background import background
from app.connector import WAKE_UP, AsyncpgConnector
from app.db import Database, DatabaseError

log = logging.getLogger("baton.queue")

# All are also named in schema.sql, whose functions defer tickets.
GENERATE = "baton.generate"
QUEUE = "jobs"  # at most 40 bytes: Procrastinate puts it into the name of a channel
NEWER = "jobs_4"  # what workers before version 4 could not make; nobody is notified of it
DIGESTS = "baton.digests"  # the task of each minute that asks for what is due; it names no job

QUIET = 0.02  # seconds between two notifications of a process; the first one goes at once
_TICKETS = f"procrastinate_queue_v1#{QUEUE}"
CHANGES = "baton_jobs"  # the channel of changed jobs; a payload is ids with spaces between them
DELIVERIES = "baton_hooks"  # the channel of deliveries of sources; a payload says nothing
_IDS = 200  # in a payload, which PostgreSQL limits to 8000 bytes


def make_queue(database: Database, *, retry_for: float = 0.0) -> procrastinate.App:
    """Procrastinate over the pool of this process.

    Args:
        retry_for: seconds for which a query is tried again while the database is away; a worker
            outlives an outage, a request does not wait for it.
    """
    return procrastinate.App(
        connector=AsyncpgConnector(
            database.pool, database.dsn, role=database.role, retry_for=retry_for
        )
    )


class Bell:
    """Tells the workers that there are tickets or deliveries, and the API processes which jobs have
    changed.

    A NOTIFY inside the storing transaction would hold a lock of the whole cluster through its
    commit. So it is a statement of its own, and a burst rings once per `QUIET`. A ring that gets
    lost costs a worker's poll interval, or that of a waiting request (app/waits.py), nothing more.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tickets = self._deliveries = False
        self._changed: set[str] = set()
        self._wanted = asyncio.Event()
        self._stops: list[int] = []

    def ring(self) -> None:
        """Say that a ticket has been committed; returns at once."""
        self._tickets = True
        self._wanted.set()

    def deliver(self) -> None:
        """Say that a delivery of a source has been committed; returns at once."""
        self._deliveries = True
        self._wanted.set()

    def announce(self, job_id: str) -> None:
        """Say that a change of a job which a client can see has been committed; returns at once."""
        self._changed.add(job_id)
        self._wanted.set()

    def stop(self, ticket_id: int) -> None:
        """Say that what runs for a ticket need not go on; returns at once. Its lease is gone
        already, so a worker that does not hear of it stops at its next renewal."""
        self._stops.append(ticket_id)
        self._wanted.set()

    async def run(self) -> None:
        """Notify whenever there is something to tell, for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            news = list(self._take())
            try:
                await self._database.value("notify", [n[0] for n in news], [n[1] for n in news])
            except DatabaseError as error:  # away, or its notification queue is full
                log.warning("bell not heard", extra={"cause": str(error)})
            await asyncio.sleep(QUIET)

    def _take(self) -> Iterator[tuple[str, str]]:
        """What there is to tell: channels and payloads."""
        if self._tickets:
            yield _TICKETS, WAKE_UP
        if self._deliveries:
            yield DELIVERIES, ""
        self._tickets = self._deliveries = False
        changed, self._changed = list(self._changed), set()
        stops, self._stops = self._stops, []
        for ticket_id in stops:
            payload = {"type": "abort_job_requested", "job_id": ticket_id}
            yield _TICKETS, orjson.dumps(payload).decode()
        for first in range(0, len(changed), _IDS):
            yield CHANGES, " ".join(changed[first : first + _IDS])


@asynccontextmanager
async def hung_bell(database: Database) -> AsyncIterator[Bell]:
    """A bell that works for as long as the body runs."""
    bell = Bell(database)
    async with background(bell.run()):
        yield bell
