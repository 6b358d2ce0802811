"""What integrations have sent becomes events.

Every worker runs this loop. Each round takes a few deliveries of each integration in turn, so that
the many of one are not in the way of another's. The one rule: the transaction that takes deliveries
also stores their events and forgets them, so a crash at any point leaves them as they were. What
cannot be mapped or stored is told and put aside, never tried for ever and in nobody's way.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import asyncpg

from app import metrics
from app.connector import listen
from app.db import Connection, Database, DatabaseError, Unavailable
from app.logs import trace
from app.queue import DELIVERIES
from tasks.mapping import generic, map_delivery, read
from tasks.sources.event import Delivery

log = logging.getLogger("baton.worker")

POLL_EVERY = 1.0  # seconds between looks; a notification is usually faster
QUIET = 0.02  # seconds at least between two rounds
INTEGRATIONS = 100  # of which a round maps some
EACH = 50  # deliveries of an integration in a round
EACH_BYTES = 1024 * 1024  # of their bodies, but for the first
OFF_LOOP = 64 * 1024  # bytes from which bodies are mapped in a thread
BATCH = 1_000  # events that are stored at once
TRIES = 10  # of an integration's oldest delivery, until it is taken for what makes them fail
FIRST = "00000000-0000-0000-0000-000000000000"


class Mapper:
    """Maps what one worker takes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._wanted = asyncio.Event()
        self._after = FIRST  # the integration with which the last round ended
        self._failed: dict[str, int] = {}  # tries of integrations that have failed lately

    def wake(self) -> None:
        """Look for deliveries now; returns at once."""
        self._wanted.set()

    async def run(self) -> None:
        """Map for ever; an outage of the database, or of its schema, is waited out."""
        async with asyncio.TaskGroup() as tasks:
            database = self._database
            tasks.create_task(listen(database.dsn, [DELIVERIES], self._heard, role=database.role))
            tasks.create_task(self._map_forever())

    async def map_round(self) -> int:
        """Map a few deliveries of each integration that has some; answers how many.

        Raises:
            DatabaseError: the database is away, or has another schema.
        """
        found = [
            row["id"]
            for row in await self._database.rows("waiting_integrations", self._after, INTEGRATIONS)
        ]
        self._after = found[-1] if len(found) == INTEGRATIONS else FIRST
        mapped = 0
        for integration_id in found:
            try:
                mapped += await self._map_some(integration_id)
            except Exception as error:  # whatever it is, the others have their turn
                if not _passes(error):
                    self._failed[integration_id] = self._failed.get(integration_id, 0) + 1
                told = {"integration_id": integration_id, "trace": trace(error)}
                log.warning("deliveries not mapped", extra=told)
            else:
                self._failed.pop(integration_id, None)
        return mapped

    async def drain(self) -> None:
        """Until nothing waits."""
        while await self.map_round():
            pass

    async def _heard(self, *, channel: str, payload: str) -> None:
        self.wake()

    async def _map_forever(self) -> None:
        while True:
            self._wanted.clear()
            started = time.monotonic()
            mapped = 0
            try:
                mapped = await self.map_round()
            except DatabaseError as error:
                log.warning("mapping paused", extra={"cause": type(error).__name__})
            # Half of the time is for the attempts, however much there is.
            await asyncio.sleep(max(QUIET, time.monotonic() - started))
            if not mapped:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_EVERY):
                        await self._wanted.wait()

    async def _map_some(self, integration_id: str) -> int:
        """One transaction; the more often it has failed, the less of it."""
        failed = self._failed.get(integration_id, 0)
        async with self._database.transaction() as connection:
            taken = await connection.rows(
                "take_deliveries", integration_id, max(1, EACH >> (2 * failed)), EACH_BYTES
            )
            if not taken:
                return 0
            if failed >= TRIES:
                await _put_aside(connection, integration_id, taken[0])
            elif failed == TRIES - 1:
                await _end(connection, integration_id, [taken[0]["seq"]], _generic(taken[0]))
                _count(taken[0], "generic")
            else:
                await _map_all(connection, integration_id, taken)
        return len(taken)


def _passes(error: Exception) -> bool:
    """Is it the database's trouble and not the delivery's? A statement that takes too long may be
    either; when it does so again and again, while others do not, it is the delivery's."""
    return isinstance(error, Unavailable) and not isinstance(
        error.__cause__, asyncpg.QueryCanceledError
    )


async def _map_all(
    connection: Connection, integration_id: str, taken: list[asyncpg.Record]
) -> None:
    if sum(len(delivery["body"]) for delivery in taken) < OFF_LOOP:
        made = [_rows(delivery) for delivery in taken]
    else:
        made = await asyncio.to_thread(lambda: [_rows(delivery) for delivery in taken])
    for part in _parts(taken, made):
        events = [event for _, each in part for event in each]
        seqs = [delivery["seq"] for delivery, _ in part]
        if len(events) <= BATCH and await _end(connection, integration_id, seqs, events) is None:
            for delivery, _ in part:
                _count(delivery, "ok")
            continue
        for delivery, each in part:  # one of them is to blame, or has very many
            await _map_alone(connection, integration_id, delivery, each)


def _parts(
    taken: list[asyncpg.Record], made: list[list[dict[str, Any]]]
) -> Iterator[list[tuple[asyncpg.Record, list[dict[str, Any]]]]]:
    """Deliveries with their events, as many as are stored at once."""
    part: list[tuple[asyncpg.Record, list[dict[str, Any]]]] = []
    size = 0
    for delivery, events in zip(taken, made, strict=True):
        if part and size + len(events) > BATCH:
            yield part
            part, size = [], 0
        part.append((delivery, events))
        size += len(events)
    yield part


async def _map_alone(
    connection: Connection,
    integration_id: str,
    delivery: asyncpg.Record,
    events: list[dict[str, Any]],
) -> None:
    """As it is mapped; else as one event that says that it came; else not at all."""
    seqs = [delivery["seq"]]
    refused = None
    while len(events) > BATCH and refused is None:
        refused = await _end(connection, integration_id, [], events[:BATCH])
        events = events[BATCH:]
    if refused is None:
        refused = await _end(connection, integration_id, seqs, events)
    if refused is None:
        _count(delivery, "ok")
        return
    log.error("events refused", extra={"integration_id": integration_id, "sqlstate": refused})
    if await _end(connection, integration_id, seqs, _generic(delivery)) is None:
        _count(delivery, "generic")
        return
    await _put_aside(connection, integration_id, delivery, refused)


async def _put_aside(
    connection: Connection, integration_id: str, delivery: asyncpg.Record, refused: str = ""
) -> None:
    """Take it for mapped, and say in ops.integrations that it was not."""
    log.error(
        "delivery failed",
        extra={"integration_id": integration_id, "delivery_id": delivery["delivery_id"]},
    )
    why = (
        f"The database refused its events ({refused})."
        if refused
        else ("Its events could not be stored in time, again and again.")
    )
    await _end(connection, integration_id, [delivery["seq"]], [], why)
    _count(delivery, "failed")


async def _end(
    connection: Connection,
    integration_id: str,
    seqs: list[int],
    events: list[dict[str, Any]],
    error: str | None = None,
) -> str | None:
    """Store events, and wait for these deliveries no more; a SQLSTATE when that is refused."""
    refused: str | None = await connection.value(
        "end_deliveries", integration_id, seqs, events, error
    )
    return refused


def _rows(delivery: asyncpg.Record) -> list[dict[str, Any]]:
    return map_delivery(delivery["source"], _read(delivery))


def _generic(delivery: asyncpg.Record) -> list[dict[str, Any]]:
    return generic(delivery["source"], _read(delivery))


def _read(delivery: asyncpg.Record) -> Delivery:
    return read(delivery["headers"], delivery["body"], delivery["received_at"])


def _count(delivery: asyncpg.Record, result: str) -> None:
    metrics.mapped.labels(metrics.SOURCES(delivery["source"]), result).inc()
    waited = (datetime.now(UTC) - delivery["received_at"]).total_seconds()
    metrics.mapped_seconds.observe(max(0.0, waited))
