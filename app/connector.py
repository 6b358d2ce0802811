"""Procrastinate on asyncpg: one driver and one pool for the whole service.

Procrastinate speaks psycopg's dialect (`%(name)s`) through a small connector interface. This is
that interface on asyncpg, so that a ticket can be deferred on the very connection whose
transaction inserts the job. The one rule: a statement on the caller's connection is neither
retried nor committed here; it belongs to the caller's transaction.

The codecs live here as well, because every pool of the service has to use the same ones.
"""

import asyncio
import logging
import random
import re
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import asyncpg
import orjson
from asyncpg.pool import PoolConnectionProxy
from procrastinate import connector, exceptions, manager, sql

log = logging.getLogger("baton.queue")
T = TypeVar("T")

AnyConnection = asyncpg.Connection | PoolConnectionProxy  # one's own, or one lent by a pool

ACQUIRE_TIMEOUT = 1.0  # seconds to wait for a pooled connection before the database counts as away
LISTEN_PING = 5.0  # seconds between pings of an idle listener; TCP alone notices a dead peer late
RECONNECT_DELAY = (0.1, 5.0)  # seconds, first and longest wait before listening again
RETRY_DELAY = (0.05, 2.0)  # seconds, first and longest wait before a query is tried again

_PARAMETER = re.compile(r"%\((\w+)\)s")
# Three queries build an interval from text: `(%(x)s || ' SECOND')::INTERVAL`. asyncpg asks the
# server for the parameter's type, gets text, and refuses the number that Procrastinate passes.
_INTERVAL = re.compile(r"\(%\((\w+)\)s \|\| '\s*(SECOND|HOUR)'\)::INTERVAL")

# Not about the statement but about reaching the server, or about being in somebody's way.
TRANSIENT = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,  # the connection or the pool is closed
    asyncpg.InternalClientError,  # used in the moment in which the server ends the connection
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, cancelled by a timeout
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
)
# A commit whose answer was lost may have happened; deferring again would make a second ticket.
_NEVER_RETRIED = frozenset({sql.queries["defer_jobs"], sql.queries["defer_periodic_job"]})
_PING = sql.queries["check_connection"]
# "There are tickets", in Procrastinate's words. Also told to it on every (re)connection, so that
# a ticket inserted in the gap is not missed.
WAKE_UP = '{"type":"job_inserted","job_id":0}'


async def init_connection(connection: asyncpg.Connection) -> None:
    """Give a new connection of any pool the service's codecs.

    `jsonb` is binary because Procrastinate passes it inside a composite array, where a text codec
    is refused. UUIDs travel as strings: asyncpg's own UUID type is not the one orjson can write,
    and ids are opaque text everywhere else.
    """
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: b"\x01" + orjson.dumps(value),
        decoder=lambda data: orjson.loads(memoryview(data)[1:]),
    )
    await connection.set_type_codec(
        "json",
        schema="pg_catalog",
        encoder=lambda value: orjson.dumps(value).decode(),
        decoder=orjson.loads,
    )
    await connection.set_type_codec(
        "uuid",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: uuid.UUID(value).bytes,
        decoder=lambda data: str(uuid.UUID(bytes=bytes(data))),
    )


async def connect(*args: Any, **options: Any) -> asyncpg.Connection:
    """What asyncpg's `connect` does, with a sentence when the role is the trouble that the session
    is to take on (`server_settings` has it).

    Raises:
        asyncpg.PostgresError: there is no such role, or the login may not take it on, for example.
    """
    try:
        connection: asyncpg.Connection = await asyncpg.connect(*args, **options)
    except (asyncpg.InvalidParameterValueError, asyncpg.InsufficientPrivilegeError) as error:
        role = options["server_settings"].get("role")
        if role is None or f'role "{role}"' not in str(error):
            raise
        missing = isinstance(error, asyncpg.InvalidParameterValueError)
        raise type(error)(
            f"There is no role {role} yet; run: baton migrate"
            if missing
            else f"The login of this process may not take on the role {role}; let an administrator "
            f"run: grant {role} to the login; ({error})"
        ) from error
    return connection


@lru_cache(maxsize=256)
def translate(query: str) -> tuple[str, tuple[str, ...]]:
    """Turn psycopg's named parameters into `$n`; answer the SQL and the names in order."""
    names: list[str] = []

    def number(name: str) -> str:
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    query = _INTERVAL.sub(
        lambda m: f"({number(m[1])}::float8 * interval '1 {m[2].lower()}')", query
    )
    query = _PARAMETER.sub(lambda m: number(m[1]), query)
    return query.replace("%%", "%"), tuple(names)


@contextmanager
def sound_session(connection: AnyConnection) -> Iterator[None]:
    """Statements on a connection that the server may be ending just now.

    Between the server's last word and the end of the stream asyncpg takes statements and fails on
    them with errors of its own inside (a TypeError among them; a wrong argument is a DataError).
    """
    try:
        yield
    except (asyncpg.InternalClientError, TypeError) as error:
        connection.terminate()
        raise asyncpg.ConnectionDoesNotExistError("The server ended the session.") from error


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Turn what asyncpg raises into what Procrastinate catches; nothing else may do so."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        queueing_lock = None
        if error.constraint_name == manager.QUEUEING_LOCK_CONSTRAINT:
            found = re.search(r"\(queueing_lock\)=\((.*)\)", error.detail or "")
            queueing_lock = found[1] if found else None
        raise exceptions.UniqueViolation(
            constraint_name=error.constraint_name or "", queueing_lock=queueing_lock
        ) from error
    except (asyncpg.PostgresError, *TRANSIENT) as error:
        raise exceptions.ConnectorException from error


class AsyncpgConnector(connector.BaseAsyncConnector):
    """A Procrastinate connector over a pool that somebody else opens and closes.

    Args:
        pool: made with `init_connection`.
        dsn, role: for the listener, which needs a connection of its own (LISTEN belongs to a
            session, and a pool would hand the session to somebody else).
        retry_for: seconds for which a query on a pooled connection is tried again while the
            database is away. All of Procrastinate's queries may be repeated except deferring; a
            claim whose answer was lost is found by the worker (`unknown_tickets`).
    """

    def __init__(
        self, pool: asyncpg.Pool, dsn: str, *, role: str | None = None, retry_for: float = 0.0
    ) -> None:
        self._pool = pool
        self._dsn = dsn
        self._role = role
        self._retry_for = retry_for

    def stop_retrying(self) -> None:
        """Fail at once from now on: whoever stops does not wait for a database that is away."""
        self._retry_for = 0.0

    async def open_async(self, pool: asyncpg.Pool | None = None) -> None:
        """Nothing to open; the pool is there from the start."""

    async def close_async(self) -> None:
        """Nothing to close; the pool is not ours."""

    def get_sync_connector(self) -> connector.BaseConnector:
        """Refuse: the base class would run the pool on another event loop."""
        raise exceptions.SyncConnectorConfigurationError

    async def execute_query_async(self, query: str, **arguments: Any) -> None:
        """Run a statement whose rows nobody wants; several statements when it has no parameters."""
        translated, names = translate(query)

        async def execute(connection: AnyConnection) -> None:
            await connection.execute(translated, *(arguments[name] for name in names))

        await self._retrying(query, execute)

    async def execute_query_all_async(self, query: str, **arguments: Any) -> list[dict[str, Any]]:
        """Run a query on a pooled connection."""

        async def fetch(connection: AnyConnection) -> list[dict[str, Any]]:
            return await _fetch(connection, query, arguments)

        return await self._retrying(query, fetch)

    async def execute_query_one_async(self, query: str, **arguments: Any) -> dict[str, Any]:
        """Run a query on a pooled connection; `NoResult` when it answers no row."""
        return _first(await self.execute_query_all_async(query, **arguments))

    async def _retrying(self, query: str, run: Callable[[AnyConnection], Awaitable[T]]) -> T:
        started, delay = time.monotonic(), RETRY_DELAY[0]
        while True:
            try:
                with mapped_errors():
                    async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT) as connection:
                        with sound_session(connection):
                            return await run(connection)
            except exceptions.ConnectorException as error:
                elapsed = time.monotonic() - started
                if (
                    query in _NEVER_RETRIED
                    or elapsed >= self._retry_for
                    or not isinstance(error.__cause__, TRANSIENT)
                ):
                    raise
                log.warning("query retried", extra={"cause": repr(error.__cause__)})
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
            delay = min(delay * 2, RETRY_DELAY[1])

    async def execute_query_all_async_with_connection(
        self, connection: AnyConnection, query: str, **arguments: Any
    ) -> list[dict[str, Any]]:
        """Run a query in the caller's transaction."""
        with mapped_errors():
            return await _fetch(connection, query, arguments)

    async def execute_query_one_async_with_connection(
        self, connection: AnyConnection, query: str, **arguments: Any
    ) -> dict[str, Any]:
        """Run a query in the caller's transaction; `NoResult` when it answers no row."""
        rows = await self.execute_query_all_async_with_connection(connection, query, **arguments)
        return _first(rows)

    async def listen_notify(
        self, on_notification: connector.Notify, channels: Iterable[str]
    ) -> None:
        """Pass notifications on for ever; see `listen`."""
        await listen(self._dsn, list(channels), on_notification, role=self._role)


async def listen(
    dsn: str, channels: Sequence[str], on_notification: connector.Notify, *, role: str | None = None
) -> None:
    """Pass notifications on for ever; reconnect when the connection is lost.

    After every (re)connection it passes on a `WAKE_UP`, because a notification that was sent while
    nobody listened is gone.
    """
    delay = RECONNECT_DELAY[0]
    while True:
        try:
            async with _listening(dsn, channels, role) as inbox:
                delay = RECONNECT_DELAY[0]
                await on_notification(channel=channels[0], payload=WAKE_UP)
                async for channel, payload in inbox:
                    await on_notification(channel=channel, payload=payload)
        except (asyncpg.PostgresError, *TRANSIENT) as error:
            log.warning("listener lost", extra={"cause": repr(error)})
        await asyncio.sleep(delay * random.uniform(0.5, 1.5))
        delay = min(delay * 2, RECONNECT_DELAY[1])


async def _fetch(
    connection: AnyConnection, query: str, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    translated, names = translate(query)
    rows = await connection.fetch(translated, *(arguments[name] for name in names))
    return [dict(row) for row in rows]


def _first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        raise exceptions.NoResult
    return rows[0]


@asynccontextmanager
async def _listening(
    dsn: str, channels: Sequence[str], role: str | None
) -> AsyncIterator[AsyncIterator[tuple[str, str]]]:
    """One connection that listens; the iterator ends when the connection is gone."""
    inbox: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()
    settings = {"application_name": "baton listen"} | ({"role": role} if role else {})
    connection = await connect(dsn, timeout=ACQUIRE_TIMEOUT, server_settings=settings)

    async def arrivals() -> AsyncIterator[tuple[str, str]]:
        while True:
            try:
                async with asyncio.timeout(LISTEN_PING):
                    arrived = await inbox.get()
            except TimeoutError:
                await connection.execute(_PING, timeout=ACQUIRE_TIMEOUT)
                continue
            if arrived is None:
                return
            yield arrived

    try:
        connection.add_termination_listener(lambda _: inbox.put_nowait(None))
        for channel in channels:
            await connection.add_listener(
                channel, lambda _c, _pid, name, payload: inbox.put_nowait((name, payload))
            )
        yield arrivals()
    finally:
        connection.terminate()
