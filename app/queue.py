"""Tickets: the rows of Procrastinate that wake a worker for a job.

It hides how Procrastinate is set up. The one rule: a ticket carries the job's id and nothing
else, and losing, repeating or duplicating one is harmless, because the row in `jobs` is the truth.
"""

import procrastinate

from app.connector import AsyncpgConnector
from app.db import Connection, Database

# One generic task, so that an API and a worker of different versions understand each other.
GENERATE = "baton.generate"
QUEUE = "jobs"  # at most 40 bytes: Procrastinate puts it into the name of a channel


def make_queue(database: Database) -> procrastinate.App:
    """Procrastinate over the pool of this process; deferring needs no task to be registered."""
    return procrastinate.App(connector=AsyncpgConnector(database.pool, database.dsn))


async def defer(queue: procrastinate.App, connection: Connection, job_id: str) -> int:
    """Defer a job's ticket in the caller's transaction; answer the ticket's id."""
    task = queue.configure_task(GENERATE, queue=QUEUE, connection=connection.raw)
    return await task.defer_async(job_id=job_id)
