"""From nothing or an older schema to this one: once, in order, and out of everybody's way."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import asyncpg
import pytest
from conftest import connected
from procrastinate.schema import SchemaManager

from app import db, migration
from app.db import current_version
from app.embedded import program
from app.migration import Migrated, migrate, procrastinate_migrations, statements

INSERT = "insert into users (email, name) values ('ada@example.com', 'Ada')"


async def test_migrating_again_changes_nothing(empty_dsn: str) -> None:
    assert (await migrate(empty_dsn)).version == current_version()
    before = dump(empty_dsn)
    assert (await migrate(empty_dsn)).version == current_version()
    assert dump(empty_dsn) == before


async def test_two_that_migrate_an_empty_database_at_once_both_succeed(empty_dsn: str) -> None:
    for _ in range(3):
        done = await asyncio.gather(migrate(empty_dsn), migrate(empty_dsn))
        assert {each.version for each in done} == {current_version()}
        async with connected(empty_dsn) as connection:
            assert await connection.fetchval("select count(*) from sources") > 50
            await connection.execute("drop schema public, ops cascade; create schema public")


async def test_a_migration_works_on_top_of_procrastinate_s_schema_alone(empty_dsn: str) -> None:
    async with connected(empty_dsn) as connection:
        await connection.execute(SchemaManager.get_schema())
        await connection.execute(
            "insert into procrastinate_jobs (queue_name, task_name) values ('q', 't')"
        )
        await migrate(empty_dsn)
        assert await connection.fetchval("select count(*) from procrastinate_jobs") == 1


async def test_a_migration_keeps_rows_and_what_the_operator_changed(
    dsn: str, sql: asyncpg.Connection
) -> None:
    before = dump(dsn)
    await sql.execute(INSERT)
    await sql.execute("update flows set credits = 9 where kind = 'handoff'")
    await sql.execute("insert into sources (name, label) values ('ours', 'Ours')")
    await sql.execute("create or replace function slug_of(p_name text) returns text "
                      "language sql immutable as $$ select 'broken' $$")  # fmt: skip
    await sql.execute("drop index events_recent; drop view project_access")
    await migrate(dsn)
    assert dump(dsn) == before
    assert await sql.fetchval("select name from users") == "Ada"
    assert await sql.fetchval("select credits from flows where kind = 'handoff'") == 9
    assert await sql.fetchval("select label from sources where name = 'ours'") == "Ours"


async def test_a_migration_that_fails_changes_nothing(
    empty_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = db.schema()
    monkeypatch.setattr(migration, "schema", lambda: text + "\nselect 1/0;")
    with pytest.raises(db.Refused):
        await migrate(empty_dsn)
    async with connected(empty_dsn) as connection:
        assert await connection.fetchval("select to_regclass('procrastinate_jobs')") is None


async def test_who_may_not_migrate_is_told_which_role_to_grant(
    dsn: str, sql: asyncpg.Connection
) -> None:
    await sql.execute("create role login_of_a_test login")
    login = re.sub(r"//[^@]*@", "//login_of_a_test@", dsn)
    try:
        with pytest.raises(db.Refused, match="run: grant baton_migrate to login_of_a_test; "):
            await migrate(login)
        await sql.execute("grant baton_migrate to login_of_a_test")
        # Before there were roles, all of it was the login's that had made it.
        await sql.execute("alter table schema_version owner to current_user")
        with pytest.raises(db.Refused, match=r"run: grant \w+ to login_of_a_test; "):
            await migrate(login)
        await migrate(dsn)
        assert (await migrate(login)).applied
    finally:
        await sql.execute("drop role login_of_a_test")


# --- Newer than the program ----------------------------------------------------------------


async def test_a_newer_database_is_refused_in_one_sentence_and_left_alone(
    dsn: str, sql: asyncpg.Connection
) -> None:
    newer = current_version() + 1
    await sql.execute("insert into schema_version (version, digest) values ($1, '-')", newer)
    before = dump(dsn)
    for anew in (True, False):
        with pytest.raises(db.Refused) as caught:
            await migrate(dsn, anew=anew)
        assert str(caught.value) == (
            f"The database is at version {newer} of the schema, newer than this program's version"
            f" {current_version()}: use the newer program."
        )
    assert dump(dsn) == before


async def test_a_start_leaves_a_database_alone_that_is_one_version_newer(
    dsn: str, sql: asyncpg.Connection
) -> None:
    for ahead in (1, 2):
        newer = current_version() + ahead
        await sql.execute("insert into schema_version (version, digest) values ($1, '-')", newer)
        if ahead == 1:
            assert not (await migrate(dsn, anew=False, ahead=db.AHEAD)).applied
        else:
            with pytest.raises(db.Refused, match="use the newer program"):
                await migrate(dsn, anew=False, ahead=db.AHEAD)


async def test_an_older_program_cannot_put_its_schema_over_a_newer_one(
    dsn: str, sql: asyncpg.Connection
) -> None:
    older = current_version() - 1
    record = db.queries()["record_schema"]  # the last thing that programs of version 2 do as well
    with pytest.raises(asyncpg.PostgresError, match="use the newer program"):
        await sql.execute(record, older, "-")


async def test_the_api_and_the_worker_say_so_and_end(dsn: str, sql: asyncpg.Connection) -> None:
    """With logins that may be nothing else."""
    roles = {"serve": "baton_api", "worker": "baton_worker"}
    newer = current_version() + db.AHEAD + 1
    await sql.execute(db.queries()["record_schema"], newer, "-")
    for command, role in roles.items():
        await sql.execute(f"create role {command}_of_a_test login in role {role}")
    try:
        done = await asyncio.gather(*(
            baton(command, DATABASE_URL=re.sub(r"//[^@]*@", f"//{command}_of_a_test@", dsn))
            for command in roles
        ))  # fmt: skip
    finally:
        for command in roles:
            await sql.execute(f"drop role {command}_of_a_test")
    for command, (code, out, err) in zip(roles, done, strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), (command, err)
        assert f"version {newer}" in err and "use the newer program" in err, (command, err)


async def test_a_worker_without_a_schema_or_its_role_says_what_to_run_and_ends(
    dsn: str, empty_dsn: str, sql: asyncpg.Connection
) -> None:
    code, _, err = await baton("worker", DATABASE_URL=empty_dsn)
    assert (code, err) == (1, "Error: The schema is not current; run: baton migrate.\n")
    await sql.execute("create role login_of_a_test login")
    try:
        login = re.sub(r"//[^@]*@", "//login_of_a_test@", dsn)
        code, _, err = await baton("worker", DATABASE_URL=login)
    finally:
        await sql.execute("drop role login_of_a_test")
    assert code == 1 and err.count("\n") == 1 and "grant baton_worker to the login" in err


async def baton(*arguments: str, **environment: str) -> tuple[int | None, str, str]:
    """A command of the program: its exit code, what it prints and what it complains."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *arguments,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await child.communicate()
    return child.returncode, out.decode(), err.decode()


async def test_a_migration_says_in_a_line_what_it_did(empty_dsn: str) -> None:
    version = current_version()
    assert str(await migrate(empty_dsn)).startswith(f"The schema is at version {version}, made in ")
    again = str(await migrate(empty_dsn))
    assert again.startswith(f"The schema is at version {version}, applied again in ")
    nothing = str(await migrate(empty_dsn, anew=False))
    assert nothing == f"The schema is at version {version}; nothing to do."
    assert str(
        Migrated(2, 3, applied=True, indexes=["a", "b"], procrastinate=["c"], seconds=0.41)
    ) == (
        "The schema went from version 2 to version 3 in 0.4 s; "
        "1 migrations of Procrastinate; 2 indexes built."
    )


# --- Locks ---------------------------------------------------------------------------------


async def test_a_migration_lets_others_pass_until_it_gets_its_locks(
    dsn: str, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    await sql.execute("set application_name = 'a long report'")
    async with sql.transaction():
        await sql.execute("lock table jobs in access share mode")
        migrating = asyncio.create_task(migrate(dsn))
        while not (waits := [r for r in caplog.records if r.message == "migration waits"]):
            await asyncio.sleep(0.01)
        assert "a long report" in vars(waits[0])["oldest_transaction"]
        # It has given up all of its locks, and this one would have to wait for the first of them.
        async with connected(dsn) as other:
            await other.execute("set lock_timeout = '5s'; update users set name = name")
        assert not migrating.done()
    assert (await migrating).applied


async def test_who_waits_for_a_changed_table_is_told_to_try_again(
    dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a function that answers a row of `jobs` fails: it began when the row was shorter."""
    text = db.schema() + "\nalter table jobs add column newest int;\nselect pg_sleep(0.3);"
    monkeypatch.setattr(migration, "schema", lambda: text)
    ask = "select id from complete_job(gen_random_uuid(), gen_random_uuid(), '{}')"
    told = set()
    migrating = asyncio.create_task(migrate(dsn))
    while not migrating.done():
        try:
            await sql.fetch(ask)
        except asyncpg.PostgresError as error:
            told.add(error.sqlstate)
        await asyncio.sleep(0)
    assert (await migrating).applied
    assert told == {"57014", "BT410"}  # cancelled; the lease is not there


async def test_a_migration_that_never_gets_its_locks_names_who_is_in_its_way(
    dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "PATIENCE", 0.0)
    await sql.execute("set application_name = 'a long report'")
    async with sql.transaction():
        await sql.execute("lock table jobs in access share mode")
        with pytest.raises(db.Unavailable, match="the oldest transaction is a long report"):
            await migrate(dsn)


async def test_a_try_that_takes_long_is_given_up_and_the_next_may_take_longer(
    dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "TRY", (0.05, 10.0))
    text = db.schema() + "\nselect pg_sleep(0.1);"
    monkeypatch.setattr(migration, "schema", lambda: text)
    assert (await migrate(dsn)).applied


async def test_who_migrates_waits_for_another_of_any_version_but_not_for_ever(
    dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "TURN", 0.2)
    async with sql.transaction():  # as programs of version 2 do it
        await sql.execute("select pg_advisory_xact_lock(hashtextextended('baton migrate', 0))")
        with pytest.raises(db.Unavailable, match="Another process"):
            await migrate(dsn)
    await migrate(dsn)


async def test_indexes_of_tables_that_are_there_are_built_beside_everybody_s_work(
    dsn: str, sql: asyncpg.Connection
) -> None:
    before = dump(dsn)
    await sql.execute(
        "drop index jobs_recent; drop index ops.audit_recent;"
        # as a build leaves it that was interrupted
        "update pg_index set indisvalid = false where indexrelid = 'jobs_failed'::regclass"
    )
    done = await migrate(dsn)
    assert set(done.indexes) == {"jobs_recent", "jobs_failed", "audit_recent"}
    assert dump(dsn) == before
    assert await sql.fetchval("select count(*) from pg_index where not indisvalid") == 0
    assert (await migrate(dsn)).indexes == []


async def test_what_comes_later_is_outside_the_transaction_and_may_commit(
    dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sql.execute(INSERT)
    text = db.schema() + (
        "\n-- later: in batches\ndo $$ begin update users set name = 'x'; commit; "
        "update users set name = 'Y'; end $$;\nupdate users set name = name || name;"
    )
    monkeypatch.setattr(migration, "schema", lambda: text)
    await migrate(dsn)
    assert await sql.fetchval("select name from users") == "Y"


async def test_the_version_is_noted_last(
    dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sql.execute("update schema_version set version = version - 1")
    text = db.schema()
    monkeypatch.setattr(migration, "schema", lambda: text + "\n-- later\nselect 1/0;")
    with pytest.raises(db.Refused):
        await migrate(dsn)
    assert await sql.fetchval("select max(version) from schema_version") == current_version() - 1
    monkeypatch.undo()
    assert (await migrate(dsn)).before == current_version() - 1
    assert await sql.fetchval("select max(version) from schema_version") == current_version()


def test_the_statements_of_a_file_are_told_apart() -> None:
    text = db.schema()
    found = "".join(statements(text))
    assert text.startswith(found)
    assert all(line.startswith("--") or not line for line in text[len(found) :].splitlines())
    hard = [
        "select ';' as \"a;b\", 'it''s; one' -- a ; comment, and it's long\n, $x$ ; $$ ; $x$;",
        "\n/* ; ' */ do $$ begin raise 'a;b'; end $$;",
        " select 1 - 2 / 3 as $1;",
    ]
    assert statements("".join(hard)) == hard


# --- Procrastinate -------------------------------------------------------------------------


@pytest.fixture
async def sql_of_older(empty_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """On a database with Procrastinate's schema of before its last version with migrations."""
    async with connected(empty_dsn) as connection:
        for name, text in procrastinate_migrations().items():
            if name < LAST:
                await connection.execute(text)
        yield connection


ALL = list(procrastinate_migrations())
LAST = ALL[-1][:8]  # the version that brought the last ones
NEW = [name for name in ALL if name >= LAST]


async def test_procrastinate_s_migrations_are_applied_in_order_and_once(
    empty_dsn: str, sql_of_older: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "BASELINE", ALL[ALL.index(NEW[0]) - 1])
    before = current_version() - 1
    await sql_of_older.execute(db.schema())
    await sql_of_older.execute(db.queries()["record_schema"], before, "-")
    await sql_of_older.execute("drop table procrastinate_migrations")
    pre = [name for name in NEW if "_pre_" in name]
    post = [name for name in NEW if "_post_" in name]
    assert pre and post

    assert (await migrate(empty_dsn)).procrastinate == pre
    assert (await migrate(empty_dsn)).procrastinate == []
    assert await recorded(sql_of_older, applied=False) == post
    retried = (
        "select count(*) from pg_proc where prosrc like '%retried%' "
        "and proname = 'procrastinate_trigger_function_status_events_update_v1'"
    )
    assert await sql_of_older.fetchval(retried) == 0

    newer = current_version() + 1  # now nobody is left who needs what they take away
    monkeypatch.setattr(migration, "current_version", lambda: newer)
    assert (await migrate(empty_dsn)).procrastinate == post
    assert await sql_of_older.fetchval(retried) == 1
    assert await recorded(sql_of_older, applied=True) == ALL
    assert (await migrate(empty_dsn)).procrastinate == []


async def recorded(connection: asyncpg.Connection, *, applied: bool) -> list[str]:
    rows = await connection.fetch(
        "select name from procrastinate_migrations where (applied_at is not null) = $1 "
        "order by name",
        applied,
    )
    return [row["name"] for row in rows]


async def test_a_new_database_has_all_of_procrastinate_s_migrations(
    sql: asyncpg.Connection,
) -> None:
    assert await recorded(sql, applied=True) == ALL


def dump(dsn: str) -> str:
    """The catalog of a database as text: all that `pg_dump --schema-only` sees."""
    text = subprocess.run(
        [program("pg_dump"), "--schema-only", "--no-owner", "--dbname", dsn],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return "\n".join(sorted(line for line in text.splitlines() if "restrict" not in line))
