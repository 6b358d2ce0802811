"""Brings a database to this program's schema while others work with it.

It hides what is applied in which order, and how the locks stay short. The one rule: nobody waits
longer for a migration than a request may take; it gives up, lets them pass and tries again.

1. Those that migrate at once take turns. The lock is asked for again and again: a statement that
   waited for it would be in the way of the indexes that its holder builds.
2. A database of a newer program is refused.
3. Of Procrastinate's own migrations those that are missing, each in a transaction of its own.
4. schema.sql in one transaction, which takes a few hundredths of a second. It leaves out what
   takes as long as a table is big: indexes of tables that were there before, and statements
   after a comment `-- later`.
5. Those one after the other, beside everybody's work: indexes `concurrently`.
6. The version, last: until then the new program is not ready, and all of this can be repeated.

docs/upgrading.md says what that demands of a change of schema.sql.
"""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from procrastinate.schema import SchemaManager

from app.db import (
    COMMAND_TIMEOUT,
    Connection,
    Refused,
    Unavailable,
    current_version,
    mapped_errors,
    schema,
)

log = logging.getLogger("baton.migration")

TURN = 300.0  # seconds to wait for another that migrates
PATIENCE = 120.0  # seconds to try for locks that others hold
LOCK_TIMEOUT = 300  # milliseconds; below deadlock_timeout, so that no request is the victim
TRY = (0.8, 10.0)  # seconds that a transaction may hold locks: at first, and at most
PAUSE = (0.1, 2.0)  # seconds between tries, first and longest: those who waited get through
ASK_EVERY = 0.1  # seconds between looks whether it is our turn
SETTINGS = {
    "application_name": "baton migrate",
    "timezone": "UTC",
    "statement_timeout": "0",
    "lock_timeout": str(LOCK_TIMEOUT),
    "idle_in_transaction_session_timeout": "0",
}
# What versions 1 and 2 of Baton, which kept no record, made their databases with.
BASELINE = "03.04.00_50_post_add_retry_failed_job_procedure"
# Of the transaction that others wait for: the version that is noted later makes it last.
_ASYNC = "set local synchronous_commit = off;"
RECORD = "create table if not exists procrastinate_migrations"

_TOKEN = re.compile(
    r"--[^\n]*\n|/\*.*?\*/|'(?:[^']|'')*'|\"[^\"]*\"|(\$\w*\$).*?\1|;|[^-/'\"$;]+|.", re.DOTALL
)
_COMMENTS = re.compile(r"\A(?:\s+|--[^\n]*\n|/\*.*?\*/)*", re.DOTALL)
_LATER = re.compile(r"^-- later\b", re.MULTILINE)
_INDEX = re.compile(
    r"create (?:unique )?index (?P<again>if not exists )(?P<name>\w+)\s+on (?P<table>[\w.]+)"
)
_MADE = re.compile(
    r"^ *create (?:or replace |unlogged )?(?:table|view|function) (?:if not exists )?(\w+)\b(?!\.)",
    re.MULTILINE,
)


@dataclass
class Migrated:
    """What a migration did."""

    before: int | None  # the version that it found; None in a database without any
    version: int
    applied: bool = False  # False: there was nothing to do
    indexes: list[str] = field(default_factory=list)  # built beside everybody's work
    procrastinate: list[str] = field(default_factory=list)  # its migrations
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.applied:
            return f"The schema is at version {self.before}; nothing to do."
        if self.before is None:
            line = f"The schema is at version {self.version}, made"
        elif self.before == self.version:
            line = f"The schema is at version {self.version}, applied again"
        else:
            line = f"The schema went from version {self.before} to version {self.version}"
        line += f" in {self.seconds:.1f} s"
        if self.procrastinate:
            line += f"; {len(self.procrastinate)} migrations of Procrastinate"
        if self.indexes:
            line += f"; {len(self.indexes)} indexes built"
        return line + "."


async def migrate(dsn: str, *, anew: bool = True, ahead: int = 0) -> Migrated:
    """Bring the schema up to date. Safe to run twice, at once, and while Baton works.

    Args:
        dsn: of the server itself; a pooler that changes sessions cannot hold the lock.
        anew: apply a schema that is there already once more, which also mends what somebody has
            changed by hand. A start leaves it alone and so takes no lock on any table.
        ahead: leave a database alone that is at most so many versions newer than this program.

    Raises:
        Refused: the database is newer, or a statement failed; what it names is to be mended.
        Unavailable: the database is away, or another holds a lock for too long. Try again.
    """
    started = time.monotonic()
    with mapped_errors():
        raw = await asyncpg.connect(dsn, timeout=COMMAND_TIMEOUT, server_settings=SETTINGS)
    try:
        async with _turn(Connection(raw)) as connection:
            done = await _migrate(connection, anew, ahead)
    except Refused as error:
        if isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError):
            await _tell_what_is_lacking(Connection(raw), error)
        raise
    finally:
        raw.terminate()
    done.seconds = time.monotonic() - started
    return done


@asynccontextmanager
async def _turn(connection: Connection) -> AsyncIterator[Connection]:
    """Wait until nobody else migrates this database. The lock ends with the session."""
    deadline = time.monotonic() + TURN
    while not await connection.value("try_lock_migration"):
        if time.monotonic() > deadline:
            raise Unavailable(f"Another process has been migrating this database for {TURN:.0f} s.")
        await asyncio.sleep(ASK_EVERY)
    yield connection


async def _tell_what_is_lacking(connection: Connection, error: Refused) -> None:
    """PostgreSQL names the statement that it refused; what helps is the membership."""
    if lacking := await connection.row("lacking_membership"):
        login, role = lacking
        raise Refused(
            f"The login {login} may not migrate this database; let an administrator run: "
            f"grant {role} to {login}; ({error})"
        ) from error


async def _migrate(connection: Connection, anew: bool, ahead: int) -> Migrated:
    version, digest = current_version(), hashlib.sha256(schema().encode()).hexdigest()
    before, found = None, None
    if await connection.value("has_table", "schema_version"):
        before = await connection.value("schema_version")
        found = await connection.value("schema_digest", version)
    done = Migrated(before, version)
    if before is not None and before > version:
        if before > version + ahead:
            raise Refused(
                f"The database is at version {before} of the schema, newer than this program's"
                f" version {version}: use the newer program."
            )
    elif before is None:
        await _make(connection, version, digest)
        done.applied = True
    elif anew or (before, found) != (version, digest):
        await _upgrade(connection, version, digest, done)
        done.applied = True
    return done


async def _make(connection: Connection, version: int, digest: str) -> None:
    """All of it in one transaction: nobody works with a database that has no version."""
    with mapped_errors():
        async with connection.raw.transaction():
            if bare := not await connection.value("has_table", "procrastinate_jobs"):
                await connection.raw.execute(SchemaManager.get_schema())
            await connection.value("tell_made", _MADE.findall(schema()))
            await connection.raw.execute(schema())
            for name in procrastinate_migrations():
                if bare or name <= BASELINE:
                    await connection.value("record_procrastinate", name, version, True)
            await connection.value("record_schema", version, digest)


async def _upgrade(connection: Connection, version: int, digest: str, done: Migrated) -> None:
    now, later = await _divided(connection)
    await _patiently(connection, _execute(connection, *[s for s in now if RECORD in s]))
    await _upgrade_procrastinate(connection, version, done)
    await _patiently(connection, _execute(connection, *now, _ASYNC, cancel=True))
    for statement in later:
        if index := _INDEX.search(statement):
            await _build(connection, statement, index, done)
        else:
            await _patiently(connection, _execute_alone(connection, statement))
    await connection.value("record_schema", version, digest)


async def _divided(connection: Connection) -> tuple[list[str], list[str]]:
    """The statements of schema.sql for the one transaction, and those for later."""
    now: list[str] = []
    later: list[str] = []
    for statement in statements(schema()):
        index = _INDEX.search(statement)
        old_table = index and await connection.value("has_table", index["table"])
        (later if old_table or is_later(statement) else now).append(statement)
    return now, later


async def _upgrade_procrastinate(connection: Connection, version: int, done: Migrated) -> None:
    """Its migrations in the order of their names. One called `post` takes away what the workers of
    the Baton before still use, so it waits for the Baton after."""
    rows = await connection.rows("procrastinate_record")
    applied = {row["name"] for row in rows if row["applied_at"]}
    brought = {row["name"]: row["version"] for row in rows}
    for name, text in procrastinate_migrations().items():
        if name in applied:
            continue
        if not rows and name <= BASELINE:
            await connection.value("record_procrastinate", name, version, True)
        elif "_post_" in name and brought.get(name, version) >= version:
            await connection.value("record_procrastinate", name, version, False)
        else:
            await _patiently(connection, _apply_procrastinate(connection, name, text, version))
            done.procrastinate.append(name)


def _apply_procrastinate(
    connection: Connection, name: str, text: str, version: int
) -> Callable[[float], Awaitable[None]]:
    async def run(seconds: float) -> None:
        async with connection.raw.transaction():
            await connection.raw.execute(text, timeout=seconds)
            await connection.value("record_procrastinate", name, version, True)

    return run


def _execute(
    connection: Connection, *texts: str, cancel: bool = False
) -> Callable[[float], Awaitable[None]]:
    """In one transaction. With `cancel`, who waits for it is told to try again: a function that has
    begun and answers rows of a table which now has more columns would fail for good."""

    async def run(seconds: float) -> None:
        async with connection.raw.transaction():
            await connection.value("tell_made", _MADE.findall(schema()))
            await connection.raw.execute("\n".join(texts), timeout=seconds)
            if cancel:
                await connection.value("cancel_waiting")

    return run


def _execute_alone(connection: Connection, text: str) -> Callable[[float], Awaitable[None]]:
    """Outside a transaction, so that the statement may commit what it does piece by piece."""

    async def run(_: float) -> None:
        await connection.raw.execute(text)

    return run


async def _patiently(connection: Connection, run: Callable[[float], Awaitable[None]]) -> None:
    """Try until the locks are free. A try that waits has others waiting behind it."""
    seconds, pause, deadline = TRY[0], PAUSE[0], time.monotonic() + PATIENCE
    while True:
        try:
            with mapped_errors():
                return await run(seconds)
        except Unavailable as error:
            cause = error.__cause__
            if not isinstance(
                cause, asyncpg.LockNotAvailableError | asyncpg.DeadlockDetectedError | TimeoutError
            ):
                raise
            holder = await connection.row("oldest_transaction")
            told = (
                f"{holder['who']}, open for {holder['seconds']:.0f} s" if holder else "gone by now"
            )
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"Others held locks for {PATIENCE:.0f} s; the oldest transaction is {told}."
                ) from cause
            log.warning("migration waits", extra={"oldest_transaction": told})
            if isinstance(cause, TimeoutError):  # the machine is slow, perhaps
                seconds = min(seconds * 2, TRY[1])
        await asyncio.sleep(pause)
        pause = min(pause * 2, PAUSE[1])


async def _build(
    connection: Connection, statement: str, index: re.Match[str], done: Migrated
) -> None:
    """Build an index that is missing, however long that takes; nobody waits for it."""
    name = index["name"]
    schema_name = index["table"].rpartition(".")[0] or "public"
    valid = await connection.value("index_is_valid", f"{schema_name}.{name}")
    if valid:
        return
    with mapped_errors():
        await connection.raw.execute("set lock_timeout = 0")
        if valid is False:  # the leftover of a build that was interrupted
            await connection.raw.execute(f"drop index concurrently {schema_name}.{name}")
        at = index.start("again")
        await connection.raw.execute(f"{statement[:at]}concurrently {statement[at:]}")
        await connection.raw.execute(f"set lock_timeout = {LOCK_TIMEOUT}")
    done.indexes.append(name)


def statements(text: str) -> list[str]:
    """The statements of a file, each with the comments before it; their sum is the file."""
    found, start = [], 0
    for token in _TOKEN.finditer(text):
        if token[0] == ";":
            found.append(text[start : token.end()])
            start = token.end()
    return found


def is_later(statement: str) -> bool:
    """A comment before the statement begins with `-- later`."""
    comments = _COMMENTS.match(statement)
    return bool(comments and _LATER.search(comments[0]))


def procrastinate_migrations() -> dict[str, str]:
    """What the installed Procrastinate brings, by name, in order."""
    return {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    }
