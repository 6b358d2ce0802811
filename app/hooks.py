"""What sources send by themselves: verified, stored once, answered in milliseconds.

It hides how a delivery gets into the database: who may send is known for a second at a time, and
all that comes in one tick is stored by one statement. The one rule: a 202 is sent only after the
transaction has been committed that stored the delivery, so a sender that repeats what was not
answered loses nothing, and its delivery id keeps anything from being there twice. What a delivery
means is found out by a worker (tasks/intake.py).
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from app import metrics
from app.cipher import Cipher, CipherError
from app.db import Database, DatabaseError, Refused
from app.errors import (
    ApiError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    Unauthorized,
    Unavailable,
)
from app.queue import Bell
from app.sources import Challenge, Checked, Incoming, Malformed, Sender, Unverified, sender
from app.waits import Together
from app.wire import OFF_LOOP, is_id, json_response, read_body

log = logging.getLogger("baton.api")

KNOWN_FOR = 1.0  # seconds for which it is taken as true what an integration is
KNOWN = 10_000  # integrations that are known at once
WAITING = 20_000  # deliveries of an integration that may wait to be mapped
WAITING_BYTES = 512 * 1024 * 1024  # of their bodies
BATCH = 200  # deliveries in one statement
BATCH_BYTES = 2 * 1024 * 1024  # of their bodies, but for the first
ROOM = 2_000  # deliveries that wait to be stored
ROOM_BYTES = 64 * 1024 * 1024  # of their bodies
SHARE = 4  # of the room one integration gets a quarter
WRITERS = 2  # statements at once: one is made while the disk writes the other
PATIENCE = 2.5  # seconds; sources give up after three
LARGE = 1024 * 1024  # bytes from which a body counts as large
LARGE_AT_ONCE = 8  # that are read at once
LARGE_TIMEOUT = 8.0  # seconds to store one
COUNT_EVERY = 2.0  # seconds between writes of what was counted

Result = Literal["accepted", "duplicate", "unknown"]


@dataclass(frozen=True, slots=True)
class Integration:
    """One that is there and enabled, as it was a moment ago."""

    id: str
    source: str
    encrypted: tuple[bytes, ...]
    secrets: tuple[str, ...] = field(repr=False)
    room: bool  # may more of it wait?
    read_at: float  # of the monotonic clock


class Integrations:
    """Which integrations there are, with their secrets; each is known for `KNOWN_FOR`."""

    def __init__(self, database: Database, cipher: Cipher) -> None:
        self._database = database
        self._cipher = cipher
        self._known: OrderedDict[str, Integration] = OrderedDict()
        self._reads: Together[str, Integration] = Together(self._read)

    async def get(self, integration_id: str) -> Integration | None:
        """The integration; None when there is none, or it is disabled.

        Raises:
            db.Unavailable: nobody knows.
        """
        known = self._known.get(integration_id)
        if known and time.monotonic() - known.read_at < KNOWN_FOR:
            return known
        return await self._reads.get(integration_id)

    async def keep_secret(self, integration: Integration, secret: str) -> bool:
        """Keep the secret that a source brings; False when there is one already."""
        kept: bool = await self._database.value(
            "keep_first_secret", integration.id, self._cipher.encrypt(secret)
        )
        self._known.pop(integration.id, None)
        return kept

    async def _read(self, ids: Collection[str]) -> Mapping[str, Integration]:
        now = time.monotonic()
        found = {}
        for row in await self._database.rows("hook_integrations", list(ids), WAITING):
            encrypted, before = tuple(row["secrets"]), self._known.get(row["id"])
            secrets = (
                before.secrets
                if before and before.encrypted == encrypted
                else self._decrypted(row["id"], encrypted)
            )
            room = row["waiting"] < WAITING and row["waiting_bytes"] < WAITING_BYTES
            found[row["id"]] = Integration(row["id"], row["source"], encrypted, secrets, room, now)
        for integration_id in ids:
            self._known.pop(integration_id, None)
        self._known.update(found)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return found

    def _decrypted(self, integration_id: str, encrypted: tuple[bytes, ...]) -> tuple[str, ...]:
        """Those that a key opens; one that none opens is no fault of the others."""
        secrets = []
        for value in encrypted:
            try:
                secrets.append(self._cipher.decrypt(value))
            except CipherError as error:
                told = {"integration_id": integration_id, "cause": str(error)}
                log.error("secret not decrypted", extra=told)
        return tuple(secrets)


@dataclass(slots=True, eq=False)
class _Stored:
    """A delivery on its way into the database."""

    integration_id: str
    checked: Checked
    body: bytes
    result: asyncio.Future[Result]
    until: float  # of the monotonic clock; its sender has given up then


class Store:
    """Stores deliveries, many with one statement.

    Each integration has a line of its own, of which a statement takes one after the other: one that
    sends much fills the statement only as far as the others leave room.
    """

    def __init__(self, database: Database, bell: Bell) -> None:
        self._database = database
        self._bell = bell
        self._lines: OrderedDict[str, OrderedDict[str, _Stored]] = OrderedDict()
        self.waiting = 0  # deliveries in the lines
        self.writing = 0  # statements on their way
        self._bytes = 0
        self._wanted = asyncio.Event()

    async def add(self, integration_id: str, checked: Checked, body: bytes) -> Result:
        """Store a delivery; answers when it is committed.

        Raises:
            db.DatabaseError: it may be stored or not; the sender is to repeat it.
            Unavailable, QueueFull: it has not been stored.
        """
        line = self._lines.get(integration_id, OrderedDict[str, _Stored]())
        if same := line.get(checked.delivery_id):
            result = await asyncio.shield(same.result)
            return "duplicate" if result == "accepted" else result
        self._assert_room(len(line), len(body))
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        stored = _Stored(integration_id, checked, body, future, time.monotonic() + PATIENCE)
        self._lines.setdefault(integration_id, OrderedDict())[checked.delivery_id] = stored
        self.waiting += 1
        self._bytes += len(body)
        self._wanted.set()
        return await future

    async def run(self) -> None:
        """Store for ever."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WRITERS):
                tasks.create_task(self._write_forever())

    def _assert_room(self, own: int, size: int) -> None:
        if self.waiting and self._bytes + size > ROOM_BYTES or self.waiting >= ROOM:
            raise Unavailable("More is sent than can be stored right now. Send it again shortly.")
        if own >= ROOM // SHARE:
            raise QueueFull("This integration sends more than is its share. Send it again shortly.")

    async def _write_forever(self) -> None:
        while True:
            await self._wanted.wait()
            batch = self._take()
            if not self._lines:
                self._wanted.clear()
            if batch:
                self.writing += 1
                await self._write(batch)
                self.writing -= 1

    def _take(self) -> list[_Stored]:
        """The next of each line in turn. Those whose sender has given up are not worth storing; it
        will send them again."""
        batch: list[_Stored] = []
        late: list[_Stored] = []
        size, now = 0, time.monotonic()
        while self._lines and len(batch) < BATCH:
            integration_id, line = next(iter(self._lines.items()))
            delivery_id, stored = next(iter(line.items()))
            if batch and size + len(stored.body) > BATCH_BYTES:
                break
            del line[delivery_id]
            del self._lines[integration_id]
            if line:
                self._lines[integration_id] = line  # behind the others
            self.waiting -= 1
            self._bytes -= len(stored.body)
            if stored.until < now:
                late.append(stored)
            else:
                size += len(stored.body)
                batch.append(stored)
        if late:
            _fail(late, Unavailable("The database is too slow right now. Send it again."))
        return batch

    async def _write(self, batch: list[_Stored]) -> None:
        try:
            results = await self._store(batch)
        except Refused as error:
            if len(batch) > 1:  # it is the fault of one, and no other is to suffer for it
                for stored in batch:
                    await self._write([stored])
                return
            _fail(batch, error)
        except Exception as error:
            _fail(batch, error)
        else:
            if "accepted" in results:
                self._bell.deliver()
            for stored, result in zip(batch, results, strict=True):
                if not stored.result.done():
                    stored.result.set_result(result)

    async def _store(self, batch: list[_Stored]) -> list[Result]:
        columns = (
            [each.integration_id for each in batch],
            [each.checked.delivery_id for each in batch],
            [dict(each.checked.headers) for each in batch],
            [each.body for each in batch],
        )
        results: list[Result]
        if not any(_large(each.body) for each in batch):
            results = await self._database.value("store_hook_deliveries", *columns)
            return results
        async with self._database.transaction() as connection:
            await connection.value("allow_time", f"{LARGE_TIMEOUT - 1:.0f}s")
            results = await connection.value(
                "store_hook_deliveries", *columns, timeout=LARGE_TIMEOUT
            )
        return results


def _large(body: bytes) -> bool:
    return len(body) >= LARGE


def _fail(batch: list[_Stored], error: Exception) -> None:
    for stored in batch:
        if not stored.result.done():
            stored.result.set_exception(error)
            stored.result.exception()  # nobody may be left to take it


class Intake:
    """The way of a request of a source; one for a process."""

    def __init__(self, database: Database, bell: Bell, cipher: Cipher) -> None:
        self._database = database
        self._integrations = Integrations(database, cipher)
        self.store = Store(database, bell)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._counts: Counter[tuple[str, str]] = Counter()

    async def run(self) -> None:
        """Store and count, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.store.run())
            tasks.create_task(self._count_forever())

    async def receive(self, request: Request) -> Response:
        """Answer one request."""
        integration = await self._known(request.path_params["integration_id"])
        way = sender(integration.source)
        try:
            raw = await self._read(request, way.limit)
            incoming = Incoming(
                headers=request.headers,
                raw=raw,
                query=request.query_params,
                secrets=integration.secrets,
                now=time.time(),
            )
            if len(raw) < OFF_LOOP:
                checked = _check(way, incoming)
            else:
                checked = await asyncio.to_thread(_check, way, incoming)
            if isinstance(checked, Challenge):
                return await self._meet(integration, checked)
            if not integration.room:
                raise QueueFull("Too much of this integration waits already. Send it again later.")
            result = await self.store.add(integration.id, checked, raw)
        except ApiError as error:
            if error.code in _COUNTED:
                self._count(integration, _COUNTED[error.code])
            raise
        if result == "unknown":
            raise _unknown()
        self._count(integration, result)
        if way.empty_answer:
            return Response(status_code=204)
        return json_response({"status": result}, status=202 if result == "accepted" else 200)

    async def _known(self, integration_id: str) -> Integration:
        if not is_id(integration_id):
            raise _unknown()
        integration = await self._integrations.get(integration_id)
        if integration is None:
            raise _unknown()
        if integration.encrypted and not integration.secrets:
            raise Unavailable("This server cannot verify anything of this integration right now.")
        return integration

    async def _read(self, request: Request, limit: int) -> bytes:
        """The body. Of large ones few at once: what they hold of the memory is bounded."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) < LARGE or limit <= LARGE:
            return await read_body(request, limit)
        if self._large.locked():
            raise Unavailable("Too many large deliveries at once. Send it again shortly.")
        async with self._large:
            return await read_body(request, limit)

    async def _meet(self, integration: Integration, challenge: Challenge) -> Response:
        """Answer a handshake, and keep the secret that it brings."""
        brought = challenge.secret
        if (
            brought is not None
            and brought not in integration.secrets
            and not await self._integrations.keep_secret(integration, brought)
        ):
            raise Unauthorized("This integration has a secret already; rotate it first.")
        return Response(
            challenge.body,
            status_code=challenge.status,
            headers=dict(challenge.headers),
            media_type=challenge.media_type,
        )

    def _count(self, integration: Integration, result: str) -> None:
        self._counts[integration.id, result] += 1
        metrics.hook_deliveries.labels(metrics.SOURCES(integration.source), result).inc()

    async def _count_forever(self) -> None:
        try:
            while True:
                await asyncio.sleep(COUNT_EVERY)
                await self.count_once()
        finally:
            await self.count_once()

    async def count_once(self) -> None:
        """Write what was counted; what cannot be written is written later."""
        counts, self._counts = self._counts, Counter()
        if not counts:
            return
        ids, results = zip(*counts, strict=True)
        try:
            await self._database.value("count_hooks", ids, results, list(counts.values()))
        except DatabaseError as error:
            log.warning("hooks not counted", extra={"cause": str(error)})
            self._counts.update(counts)


# By the code of an error; the others say nothing about who sends.
_COUNTED = {
    Unauthorized.code: "unverified",
    InvalidRequest.code: "malformed",
    PayloadTooLarge.code: "too_large",
    QueueFull.code: "full",
}


def _check(way: Sender, incoming: Incoming) -> Checked | Challenge:
    """What a verified body is; or the answer to a handshake."""
    try:
        if (challenge := way.challenge(incoming)) is not None:
            return challenge
        way.verify(incoming)
        return way.delivery(incoming)
    except Unverified as error:
        raise Unauthorized(str(error)) from None
    except Malformed as error:
        raise InvalidRequest(str(error)) from None


def _unknown() -> NotFound:
    return NotFound("integration_id: there is no such integration, or it is disabled.")


async def receive_delivery(request: Request) -> Response:
    """Take what a source sends by itself; see `Intake`."""
    intake: Intake = request.app.state.intake
    return await intake.receive(request)
