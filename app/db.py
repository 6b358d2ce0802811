"""The way to PostgreSQL: one pool, queries by name, errors by meaning.

It hides asyncpg and the SQLSTATEs of schema.sql. The one rule: SQL is written in `queries.sql` and
`schema.sql` only, and is called here by its name.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg
from procrastinate.schema import SchemaManager

from app.connector import ACQUIRE_TIMEOUT, AnyConnection, init_connection

COMMAND_TIMEOUT = 10.0  # seconds until a statement without an answer counts as lost
MIGRATE_TIMEOUT = 300.0  # seconds for all of the schema, waiting for another migration included
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
    ├── NotFound         BT404: not there, or not visible to the caller
    ├── Conflict         BT409: the job is not in a status that allows this
    ├── LeaseLost        BT410: another attempt owns the job, or it has ended
    └── Unavailable      the database is away, or too slow to wait for; nothing is known
    """


class InvalidRequest(DatabaseError):
    """BT400."""


class NotFound(DatabaseError):
    """BT404."""


class Conflict(DatabaseError):
    """BT409."""


class LeaseLost(DatabaseError):
    """BT410."""


class Unavailable(DatabaseError):
    """The database cannot be reached or does not answer in time."""


BY_SQLSTATE: dict[str, type[DatabaseError]] = {
    "BT400": InvalidRequest,
    "BT404": NotFound,
    "BT409": Conflict,
    "BT410": LeaseLost,
}

# What asyncpg raises when it is not about the statement but about reaching the server.
_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, cancelled by a timeout
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
)


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Turn asyncpg's errors into ours; every statement of this module runs inside."""
    try:
        yield
    except _AWAY as error:
        raise Unavailable(str(error) or type(error).__name__) from error
    except asyncpg.PostgresError as error:
        meaning = BY_SQLSTATE.get(error.sqlstate or "")
        if meaning is None:
            raise
        raise meaning(error.message) from error
    except asyncpg.InterfaceError as error:  # the connection or the pool is closed
        raise Unavailable(str(error)) from error


class Connection:
    """Queries by name on one connection, inside `Database.transaction`."""

    def __init__(self, raw: AnyConnection) -> None:
        self.raw = raw

    async def rows(self, name: str, *args: Any) -> list[asyncpg.Record]:
        """All rows of a named query."""
        with mapped_errors():
            return await self.raw.fetch(queries()[name], *args)

    async def row(self, name: str, *args: Any) -> asyncpg.Record | None:
        """The first row of a named query, or None."""
        with mapped_errors():
            return await self.raw.fetchrow(queries()[name], *args)

    async def value(self, name: str, *args: Any) -> Any:
        """The first column of the first row of a named query, or None."""
        with mapped_errors():
            return await self.raw.fetchval(queries()[name], *args)


class Database:
    """The pool of one process.

    Each of `rows`, `row` and `value` is one statement and so one transaction of its own;
    `transaction` is for several that must agree.
    """

    def __init__(self, pool: asyncpg.Pool, dsn: str) -> None:
        self.pool = pool
        self.dsn = dsn

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A pooled connection; `Unavailable` when none comes free in `ACQUIRE_TIMEOUT`."""
        with mapped_errors():
            async with self.pool.acquire(timeout=ACQUIRE_TIMEOUT) as raw:
                yield Connection(raw)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Statements that commit together, or not at all when the body raises."""
        async with self.connection() as connection, connection.raw.transaction():
            yield connection

    async def rows(self, name: str, *args: Any) -> list[asyncpg.Record]:
        """All rows of a named query."""
        async with self.connection() as connection:
            return await connection.rows(name, *args)

    async def row(self, name: str, *args: Any) -> asyncpg.Record | None:
        """The first row of a named query, or None."""
        async with self.connection() as connection:
            return await connection.row(name, *args)

    async def value(self, name: str, *args: Any) -> Any:
        """The first column of the first row of a named query, or None."""
        async with self.connection() as connection:
            return await connection.value(name, *args)


@asynccontextmanager
async def open_database(dsn: str, *, application_name: str, size: int) -> AsyncIterator[Database]:
    """Open a pool of at most `size` connections and close it at the end.

    Raises:
        Unavailable: when the server cannot be reached now.
    """
    with mapped_errors():
        pool = await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=size,
            init=init_connection,
            reset=_keep,
            timeout=ACQUIRE_TIMEOUT,
            command_timeout=COMMAND_TIMEOUT,
            server_settings={**SETTINGS, "application_name": application_name},
        )
    try:
        yield Database(pool, dsn)
    finally:
        pool.terminate()


async def _keep(_: asyncpg.Connection) -> None:
    """Skip asyncpg's reset on release: nothing here changes a session, and it is a round trip."""


async def migrate(dsn: str) -> int:
    """Bring the schema up to date and answer its version. Safe to run twice, and at once.

    One transaction under an advisory lock: another process that migrates waits, then finds the
    work done. Procrastinate's schema is not re-runnable, so it is applied only where it is missing.
    """
    with mapped_errors():
        raw = await asyncpg.connect(
            dsn, timeout=COMMAND_TIMEOUT, server_settings={"application_name": "baton migrate"}
        )
    try:
        connection = Connection(raw)
        with mapped_errors():
            async with raw.transaction():
                async with asyncio.timeout(MIGRATE_TIMEOUT):
                    await raw.execute(queries()["lock_migration"])
                    if not await connection.value("has_table", "procrastinate_jobs"):
                        await raw.execute(SchemaManager.get_schema())
                    await raw.execute(schema())
        return current_version()
    finally:
        await raw.close(timeout=COMMAND_TIMEOUT)


async def applied_version(database: Database) -> int | None:
    """The schema version that the database has; None when it has none of ours."""
    if not await database.value("has_table", "schema_version"):
        return None
    version: int | None = await database.value("schema_version")
    return version


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
