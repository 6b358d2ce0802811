"""What keeps questions quick: enters events by their words as they come.

Every worker runs this loop. A batch takes a fraction of a second, and after it the loop rests for
three times as long, so a flood of events is stored at full speed and entered when it has passed. A
question enters what its own project has waiting, whatever this loop is at.
"""

import asyncio
import logging
import time

from app.db import Database, Refused, Unavailable

log = logging.getLogger("baton.worker")

BATCH = 250  # events in one transaction
IDLE = 2.0  # seconds between two looks when nothing waits, and after a failure


async def enter_events(database: Database) -> None:
    """Enter for ever; an outage of the database, or of its schema, is waited out."""
    while True:
        started = time.monotonic()
        pause = IDLE
        try:
            if await database.value("enter_events", None, BATCH):
                pause = 3 * (time.monotonic() - started)
        except Unavailable as error:
            log.warning("events not entered", extra={"cause": str(error)})
        except Refused as error:  # no schema yet, or one that is being upgraded
            log.error("events not entered", extra={"cause": str(error)})
        await asyncio.sleep(pause)
