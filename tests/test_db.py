"""Errors by meaning, transactions that keep their word, and a schema that can be applied again."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from app import db
from app.connector import ACQUIRE_TIMEOUT
from app.db import Database, applied_version, current_version, open_database, queries
from app.migration import migrate

MEANINGS: list[tuple[str, type[Exception]]] = [
    ("BT400", db.InvalidRequest),
    ("BT404", db.NotFound),
    ("BT409", db.Conflict),
    ("BT410", db.LeaseLost),
    ("40001", db.Unavailable),
    ("40P01", db.Unavailable),
    ("55P03", db.Unavailable),
    ("57014", db.Unavailable),
    ("57P01", db.Unavailable),
    ("53300", db.Unavailable),
]


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """As the commands of an operator have it, whose role may read the most."""
    async with open_database(
        dsn, application_name="baton test", role="baton_ops", size=10
    ) as database:
        yield database


INSERT = "insert into users (email, name) values ('ada@example.com', 'Ada')"


async def test_a_sqlstate_is_raised_as_what_it_means(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, meaning in MEANINGS:
        raising = f"do $$ begin raise 'A word for %.', 'people' using errcode = '{code}'; end $$"
        monkeypatch.setitem(queries(), "has_key", raising)
        for ask in (database.rows, database.row, database.value):
            with pytest.raises(meaning) as caught:
                await ask("has_key")
            assert type(caught.value) is meaning, code
            assert str(caught.value) == "A word for people."
            assert isinstance(caught.value.__cause__, asyncpg.PostgresError)


async def test_an_error_without_a_meaning_is_refused_and_keeps_its_cause(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(queries(), "has_key", "select 1/0")
    with pytest.raises(db.Refused, match="division by zero") as refused:
        await database.value("has_key")
    assert isinstance(refused.value.__cause__, asyncpg.DivisionByZeroError)


async def test_rows_row_and_value_answer_what_they_say(database: Database) -> None:
    assert await database.value("has_key") is False
    assert [tuple(row) for row in await database.rows("has_key")] == [(False,)]
    assert tuple(await database.row("has_key") or ()) == (False,)
    nobody = "01890a5d-ac96-774b-bcce-b302099a8057"
    assert await database.rows("list_projects", nobody) == []
    assert await database.row("read_job", nobody, nobody) is None
    assert await database.value("sole_user") is None


async def test_a_transaction_whose_body_raises_leaves_nothing(
    database: Database, sql: asyncpg.Connection
) -> None:
    with pytest.raises(KeyError):
        async with database.transaction() as connection:
            await connection.value("create_user", "ada@example.com")
            raise KeyError
    assert await sql.fetchval("select count(*) from users") == 0
    async with database.transaction() as connection:
        await connection.value("create_user", "ada@example.com")
    assert await sql.fetchval("select count(*) from users") == 1


async def test_a_terminated_backend_is_unavailable_and_the_pool_recovers(
    database: Database, sql: asyncpg.Connection
) -> None:
    with pytest.raises(db.Unavailable):
        async with database.transaction() as connection:
            await connection.value("create_user", "ada@example.com")
            pid = connection.raw.get_server_pid()
            await sql.fetchval("select pg_terminate_backend($1, 5000)", pid)
            await connection.value("has_key")
    assert await database.value("has_key") is False
    assert await sql.fetchval("select count(*) from users") == 0


async def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    started = time.monotonic()
    for dsn in ("postgresql://u@127.0.0.1:9/nothing", f"postgresql://u@/x?host={tmp_path}"):
        with pytest.raises(db.Unavailable):
            async with open_database(dsn, application_name="baton test", size=1) as away:
                await away.value("has_key")
        with pytest.raises(db.Unavailable):
            await migrate(dsn)
    assert time.monotonic() - started < 4 * ACQUIRE_TIMEOUT + 1


async def test_a_server_that_accepts_and_says_nothing_is_unavailable_in_time() -> None:
    silent = asyncio.Event()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = time.monotonic()
    with pytest.raises(db.Unavailable):
        async with open_database(
            f"postgresql://u@127.0.0.1:{port}/x?sslmode=disable", application_name="t", size=1
        ) as silent_database:
            await silent_database.value("has_key")
    assert time.monotonic() - started < ACQUIRE_TIMEOUT + 1
    silent.set()
    server.close()
    await server.wait_closed()


async def test_an_exhausted_pool_is_unavailable_in_time(dsn: str) -> None:
    async with (
        open_database(dsn, application_name="baton test", size=1) as small,
        small.connection(),
    ):
        started = time.monotonic()
        with pytest.raises(db.Unavailable):
            await small.value("has_key")
        assert ACQUIRE_TIMEOUT - 0.1 < time.monotonic() - started < ACQUIRE_TIMEOUT + 1


async def test_every_connection_has_the_limits_of_the_service(database: Database) -> None:
    async with database.connection() as connection:
        for name, value in {**db.SETTINGS, "application_name": "baton test"}.items():
            assert await connection.raw.fetchval("select current_setting($1)", name) == value


def test_no_two_queries_have_one_name_and_none_is_empty() -> None:
    assert len(queries()) > 30
    assert all(text.endswith(";") and text.count(";") == 1 for text in queries().values())


async def test_the_version_in_the_database_is_the_one_the_code_needs(
    empty_dsn: str, database: Database
) -> None:
    assert await applied_version(database) == current_version() >= 1
    async with open_database(empty_dsn, application_name="baton test", size=1) as empty:
        assert await applied_version(empty) is None


async def test_who_waits_in_a_patient_line_does_not_take_a_busy_pool_for_an_outage(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.db.ACQUIRE_TIMEOUT", 0.2)
    for patient in (True, False):
        async with open_database(dsn, application_name="t", size=1, patient=patient) as database:
            async with database.connection():
                waiting = asyncio.create_task(database.value("server_version"))
                await asyncio.wait([waiting], timeout=0.5)
                assert waiting.done() is not patient
            if patient:
                assert await waiting
            else:
                with pytest.raises(db.Unavailable):
                    await waiting
