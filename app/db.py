"""The way to PostgreSQL: one pool, queries by name, errors by meaning.

It hides asyncpg and the SQLSTATEs of schema.sql. The one rule: SQL is written in `queries.sql` and
`schema.sql` only, and is called here by its name.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg

from app import metrics
from app.connector import (
    ACQUIRE_TIMEOUT,
    TRANSIENT,
    AnyConnection,
    connect,
    init_connection,
    sound_session,
)

COMMAND_TIMEOUT = 10.0  # seconds until a statement without an answer counts as lost, by default
AHEAD = 1  # versions that the schema may be newer than the program; see docs/upgrading.md
SETTINGS = {
    "jit": "off",  # all statements are short; compiling them costs more than running them
    "timezone": "UTC",
    "statement_timeout": "8s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
}


class DatabaseError(Exception):
    """What the database refused or could not do.

    DatabaseError
    ├── InvalidRequest   BT400: the message is a sentence that names the field
    ├── Forbidden        BT403: visible, but the caller's role does not allow this
    ├── NotFound         BT404: not there, or not visible to the caller
    ├── Conflict         BT409: the job is not in a status that allows this
    ├── LeaseLost        BT410: another attempt owns the job, or it has ended
    ├── Gone             BT411: it was there and has been deleted
    ├── KeyReuse         BT422: the idempotency key was used for another request
    ├── QueueFull        BT429: the project has as many pending jobs as it may
    ├── Refused          anything else: a value it cannot hold, a constraint, a wrong statement
    └── Unavailable      the database is away, or too slow to wait for; nothing is known
    """


class InvalidRequest(DatabaseError):
    """BT400."""


class Forbidden(DatabaseError):
    """BT403."""


class NotFound(DatabaseError):
    """BT404."""


class Conflict(DatabaseError):
    """BT409."""


class LeaseLost(DatabaseError):
    """BT410."""


class Gone(DatabaseError):
    """BT411."""


class KeyReuse(DatabaseError):
    """BT422."""


class QueueFull(DatabaseError):
    """BT429."""


class Refused(DatabaseError):
    """The database will not do this, however often it is asked."""


class Unavailable(DatabaseError):
    """The database cannot be reached or does not answer in time."""


BY_SQLSTATE: dict[str, type[DatabaseError]] = {
    "BT400": InvalidRequest,
    "BT403": Forbidden,
    "BT404": NotFound,
    "BT409": Conflict,
    "BT410": LeaseLost,
    "BT411": Gone,
    "BT422": KeyReuse,
    "BT429": QueueFull,
}


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Turn asyncpg's errors into ours; every statement of this module runs inside."""
    try:
        yield
    except TRANSIENT as error:
        raise Unavailable(str(error) or type(error).__name__) from error
    except asyncpg.PostgresError as error:
        meaning = BY_SQLSTATE.get(error.sqlstate or "", Refused)
        raise meaning(str(error)) from error


class Connection:
    """Queries by name on one connection, inside `Database.transaction`.

    `timeout` in seconds is for the statement that may take longer than the pool's others.
    """

    def __init__(self, raw: AnyConnection) -> None:
        self.raw = raw

    async def rows(
        self, name: str, *args: Any, timeout: float | None = None
    ) -> list[asyncpg.Record]:
        """All rows of a named query."""
        with mapped_errors(), sound_session(self.raw):
            return await self.raw.fetch(queries()[name], *args, timeout=timeout)

    async def row(
        self, name: str, *args: Any, timeout: float | None = None
    ) -> asyncpg.Record | None:
        """The first row of a named query, or None."""
        with mapped_errors(), sound_session(self.raw):
            return await self.raw.fetchrow(queries()[name], *args, timeout=timeout)

    async def value(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """The first column of the first row of a named query, or None."""
        with mapped_errors(), sound_session(self.raw):
            return await self.raw.fetchval(queries()[name], *args, timeout=timeout)


class Database:
    """The pool of one process.

    Each of `rows`, `row` and `value` is one statement and so one transaction of its own;
    `transaction` is for several that must agree.

    Args:
        dsn, role: of the pool, for connections beside it.
        line: who waits here does not take a busy pool for a database that is away.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        dsn: str,
        role: str | None = None,
        line: asyncio.Semaphore | None = None,
    ) -> None:
        self.pool = pool
        self.dsn = dsn
        self.role = role
        self._line: AbstractAsyncContextManager[None] = line or nullcontext()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A pooled connection; `Unavailable` when none comes free in `ACQUIRE_TIMEOUT`."""
        async with self._line, self._acquired() as connection:
            yield connection

    @asynccontextmanager
    async def _acquired(self) -> AsyncIterator[Connection]:
        try:
            with mapped_errors():
                raw = await self.pool.acquire(timeout=ACQUIRE_TIMEOUT)
        except Unavailable:
            metrics.pool_exhausted.inc()
            raise
        except Refused as error:  # it lets nobody in: a wrong password, too many clients
            raise Unavailable(str(error)) from error.__cause__
        try:
            yield Connection(raw)
        except Unavailable as error:
            if isinstance(error.__cause__, TimeoutError):
                raw.terminate()  # or its release would wait for the silent server again
            raise
        finally:
            with mapped_errors():
                await self.pool.release(raw, timeout=ACQUIRE_TIMEOUT)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Statements that commit together, or not at all when the body raises."""
        async with self.connection() as connection:
            with mapped_errors():
                async with connection.raw.transaction():
                    yield connection

    async def rows(
        self, name: str, *args: Any, timeout: float | None = None
    ) -> list[asyncpg.Record]:
        """All rows of a named query."""
        async with self.connection() as connection:
            return await connection.rows(name, *args, timeout=timeout)

    async def row(
        self, name: str, *args: Any, timeout: float | None = None
    ) -> asyncpg.Record | None:
        """The first row of a named query, or None."""
        async with self.connection() as connection:
            return await connection.row(name, *args, timeout=timeout)

    async def value(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """The first column of the first row of a named query, or None."""
        async with self.connection() as connection:
            return await connection.value(name, *args, timeout=timeout)


@asynccontextmanager
async def open_database(
    dsn: str,
    *,
    application_name: str,
    size: int,
    role: str | None = None,
    patient: bool = False,
    command_timeout: float = COMMAND_TIMEOUT,
    **settings: str,
) -> AsyncIterator[Database]:
    """Open a pool of at most `size` connections and close it at the end. They take on `role`, which
    says what they may do (schema.sql), or without one have the rights of the login. `settings` are
    session settings that differ from `SETTINGS`. With `patient`, many may wait for few connections.

    The server need not be there: the first connection is made for the first query, so that a
    process can start, say that it is not ready, and become ready by itself.
    """
    with mapped_errors():
        pool = await asyncpg.create_pool(
            dsn,
            connect=connect,
            min_size=0,
            max_size=size,
            init=init_connection,
            reset=_keep,
            timeout=ACQUIRE_TIMEOUT,
            command_timeout=command_timeout,
            server_settings=SETTINGS
            | settings
            | {"application_name": application_name}
            | ({"role": role} if role else {}),
        )
    try:
        yield Database(pool, dsn, role, asyncio.Semaphore(size) if patient else None)
    finally:
        pool.terminate()


async def _keep(_: asyncpg.Connection) -> None:
    """Skip asyncpg's reset on release: nothing here changes a session, and it is a round trip."""


async def applied_version(database: Database) -> int | None:
    """The schema version that the database has; None when it has none of ours."""
    if not await database.value("may_read", "schema_version"):
        return None
    version: int | None = await database.value("schema_version")
    return version


def schema_fault(applied: int | None) -> str | None:
    """Why this program cannot work with a database of that version, as a sentence; else None."""
    needed = current_version()
    if applied is None or applied < needed:
        return "The schema is not current; run: baton migrate."
    if applied > needed + AHEAD:
        return (
            f"The schema is at version {applied}, too new for this program of version {needed}:"
            " use the newer program."
        )
    return None


@cache
def schema() -> str:
    """The text of schema.sql: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).parent
    checkout = here.parent / "schema.sql"
    return (checkout if checkout.exists() else here / "schema.sql").read_text(encoding="utf-8")


@cache
def current_version() -> int:
    """The version that this code needs, from the first line with `version: n` of schema.sql."""
    found = re.search(r"^--.*\bversion: (\d+)$", schema(), re.MULTILINE)
    assert found, "schema.sql states its version"
    return int(found[1])


@cache
def queries() -> dict[str, str]:
    """The statements of queries.sql by name."""
    text = (Path(__file__).parent / "queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    names, bodies = parts[1::2], parts[2::2]
    assert len(names) == len(set(names)), "a query's name is unique"
    return {
        name: re.sub(r"^--.*\n", "", body, flags=re.MULTILINE).strip()
        for name, body in zip(names, bodies, strict=True)
    }
