"""What keeps the database from growing for ever: removes what is older than an operator wants it.

Every worker runs this loop. What is old, how much of it goes at once and how long all of them rest
after that is said by the database (`apply_retention` in schema.sql), so that any number of workers
together remove as gently as one. A plain loop and never a queue task, for the sweeper's reason: a
queue that is stuck because a disk is full must not keep the disk full.
"""

import asyncio
import logging

from app.db import Database, Refused, Unavailable

log = logging.getLogger("baton.retention")

BATCH = 1_000  # rows in one transaction: some 50 ms
SMALLEST = 50  # rows, after a batch that took too long, and another, and another
IDLE = 10.0  # seconds after a failure


async def apply_retention(database: Database) -> None:
    """Remove for ever; an outage of the database, or of its schema, is waited out."""
    batch = BATCH
    while True:
        try:
            pause: float = await database.value("apply_retention", batch)
            batch = min(BATCH, batch * 2)
        except Unavailable as error:  # away, or it took too long
            log.warning("retention failed", extra={"cause": str(error), "rows": batch})
            batch, pause = max(SMALLEST, batch // 2), IDLE
        except Refused as error:  # no schema yet, or one that is being upgraded
            log.error("retention refused", extra={"cause": str(error)})
            pause = IDLE
        await asyncio.sleep(pause)
