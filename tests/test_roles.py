"""What each role may do, all of it, and that production runs as these roles."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from test_queries import CALLS, ROOT, chosen_in

from app.db import queries

API, WORKER, OPS = "baton_api", "baton_worker", "baton_ops"
ROLES = (API, WORKER, OPS)
# Whose role asks the queries that a file names. What is not in app/ is the worker's.
ASKED_BY = {
    "db.py": ROLES,
    "queue.py": (API, WORKER),
    "retention.py": (WORKER,),
    "sweeper.py": (API, WORKER),
    "terminal.py": (OPS,),
    "operator.py": (OPS,),
    "demo.py": (OPS,),
    "__main__.py": (OPS,),
    "events.py": (API, OPS),  # `baton import` stores as the API does
}
MIGRATES = {
    *("has_table", "schema_digest", "record_schema", "try_lock_migration", "index_is_valid"),
    *("procrastinate_record", "record_procrastinate", "oldest_transaction"),
}

# Tables and columns of the schema public, by what a role may do with them. A function's rights are
# those of all functions of its name.
PRIVILEGES = """
  select c.oid::regclass || coalesce('.' || attname, '') as object, privilege
  from pg_class c
  cross join unnest('{select, insert, update, delete, truncate, references, trigger}'::text[])
    as privilege
  left join pg_attribute a
    on attrelid = c.oid and attnum > 0 and not attisdropped
    and privilege = any ('{select, insert, update, references}')
    and not has_table_privilege($1, c.oid, privilege)
  where relkind in ('r', 'v', 'p') and relnamespace in ('public'::regnamespace, 'ops'::regnamespace)
    and case when attname is null then has_table_privilege($1, c.oid, privilege)
      else has_column_privilege($1, c.oid, attnum, privilege) end
  union all
  select c.oid::regclass::text, privilege
  from pg_class c
  cross join unnest('{usage, select, update}'::text[]) as privilege
  where relkind = 'S' and relnamespace in ('public'::regnamespace, 'ops'::regnamespace)
    and has_sequence_privilege($1, c.oid, privilege)
  union all
  select distinct (case when pronamespace = 'ops'::regnamespace then 'ops.' else '' end) || proname,
    'execute'
  from pg_proc
  where pronamespace in ('public'::regnamespace, 'ops'::regnamespace)
    and has_function_privilege($1, oid, 'execute')
  union all
  select nspname, privilege
  from pg_namespace
  cross join unnest('{usage, create}'::text[]) as privilege
  where nspname in ('public', 'ops') and has_schema_privilege($1, oid, privilege)
  union all
  select 'the database', 'create' where has_database_privilege($1, current_database(), 'create')
  order by 1, 2
"""


async def privileges(sql: asyncpg.Connection, role: str) -> list[str]:
    """All that a role may do, a line each; what a person may do in the schema ops in two."""
    rows = [tuple(row) for row in await sql.fetch(PRIVILEGES, role)]
    groups = [("execute", "procrastinate_")]
    if role == OPS:
        groups += [("execute", "ops."), ("select", "ops.")]
    return sorted({
        next((f"{verb} {g[1]}*" for g in groups if verb == g[0] and name.startswith(g[1])),
             f"{verb} {name}")
        for name, verb in rows
    })  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_do_what_the_table_says_and_nothing_else(
    sql: asyncpg.Connection, role: str
) -> None:
    """After a deliberate change, write the left side into privileges.txt."""
    text = (Path(__file__).parent / "privileges.txt").read_text()
    stated = re.findall(rf"^{role} (.+)$", text, re.MULTILINE)
    may = await privileges(sql, role)
    if role == OPS:  # it reads everything but what is stated
        readable = {line for line in may if line.startswith("select ") and line != "select ops.*"}
        tables = await sql.fetch(
            "select attrelid::regclass || '.' || attname, attrelid::regclass::text "
            "from pg_attribute join pg_class c on c.oid = attrelid where attnum > 0 "
            "and not attisdropped and relkind in ('r', 'v', 'p') "
            "and relnamespace = 'public'::regnamespace"
        )
        hidden = [
            f"not select {column}"
            for column, table in tables
            if not readable & {f"select {column}", f"select {table}"}
        ]
        may = sorted(set(may) - readable) + sorted(hidden)
    assert may == sorted(stated, key=lambda line: (line.startswith("not "), line))


async def test_the_public_may_do_nothing(sql: asyncpg.Connection) -> None:
    assert await privileges(sql, "public") == ["usage public"]


async def test_everything_is_owned_by_the_role_that_migrates(sql: asyncpg.Connection) -> None:
    owners = await sql.fetch(
        "select relname, relowner::regrole::text from pg_class "
        "where relnamespace in ('public'::regnamespace, 'ops'::regnamespace) "
        "union all select proname, proowner::regrole::text from pg_proc "
        "where pronamespace in ('public'::regnamespace, 'ops'::regnamespace) "
        "union all select typname, typowner::regrole::text from pg_type "
        "where typnamespace in ('public'::regnamespace, 'ops'::regnamespace) "
        "union all select nspname, nspowner::regrole::text from pg_namespace where nspname = 'ops'"
    )
    assert len(owners) > 200
    assert {tuple(row) for row in owners if row[1] != "baton_migrate"} == set()


async def test_what_runs_with_its_owner_s_rights_has_a_search_path_of_its_own(
    sql: asyncpg.Connection,
) -> None:
    definers = await sql.fetch(
        "select oid::regprocedure::text, proconfig from pg_proc where prosecdef "
        "and pronamespace in ('public'::regnamespace, 'ops'::regnamespace)"
    )
    assert len(definers) > 40
    path = "search_path=public, pg_temp"
    assert [name for name, config in definers if path not in (config or [])] == []
    assert not await sql.fetchval("select has_schema_privilege('public', 'public', 'create')")


def asked_by(file: str) -> tuple[str, ...]:
    """The roles as which a file's queries are asked."""
    if (ROOT / "tasks" / file).exists() and not (ROOT / "app" / file).exists():
        return (WORKER,)
    return ASKED_BY.get(file, (API,))


def asking() -> set[tuple[str, str]]:
    """Every query with every role that asks it."""
    named = {(path.name, name) for path, name in chosen_in()}
    named |= {(file, name) for file, name, _ in CALLS}
    return {(role, name) for file, name in named if name not in MIGRATES for role in asked_by(file)}


async def test_every_query_is_allowed_to_the_roles_that_ask_it(sql: asyncpg.Connection) -> None:
    pairs = asking()
    assert {name for _, name in pairs} == set(queries()) - MIGRATES
    refused = []
    for role, name in sorted(pairs):
        await sql.execute(f"set role {role}")
        text = queries()[name]
        arguments = [None] * len(set(re.findall(r"\$\d+", text)))
        try:
            await sql.fetch(f"explain {text}", *arguments)
        except asyncpg.InsufficientPrivilegeError as error:
            refused.append((role, name, str(error)))
        await sql.execute("reset role")
    assert refused == []


async def test_a_person_may_read_every_view(ops: asyncpg.Connection) -> None:
    """A view reads tables with its owner's rights, but calls functions with the reader's."""
    refused = []
    for (view,) in await ops.fetch(
        "select oid::regclass::text from pg_class where relkind = 'v' "
        "and relnamespace in ('public'::regnamespace, 'ops'::regnamespace)"
    ):
        try:
            await ops.execute(f"explain select * from {view}")
        except asyncpg.InsufficientPrivilegeError as error:
            refused.append((view, str(error)))
    assert refused == []


# --- What they may not ---------------------------------------------------------------------

REFUSED = {
    API: [
        "select digest from api_keys",
        "select * from api_keys",
        "select secret from webhook_secrets",
        "select * from users",
        "select fingerprint from idempotency_keys",
        "select ops.create_api_key(gen_random_uuid())",
        "select * from ops.audit",
        "insert into api_keys (user_id, prefix, digest) select id, 'p', sha256('') from users",
        "insert into jobs (user_id, project_id, kind, input, credits) values "
        "(gen_random_uuid(), gen_random_uuid(), 'handoff', '{}', 0)",
        "update jobs set status = 'completed'",
        "update handoffs set title = 'x'",
        "delete from events",
        "truncate jobs",
        "select complete_job(gen_random_uuid(), gen_random_uuid(), '{}')",
        "select claim_webhooks(1, 1, '{}', '{}', 1)",
        "select * from procrastinate_jobs",
        "create table mine ()",
        "create schema mine",
        "alter table jobs add column mine int",
        "set role baton_migrate",
    ],
    WORKER: [
        "select * from api_keys",
        "select email from users",
        "select secret from webhook_secrets",
        "select * from jobs",
        "select markdown from handoffs",
        "select ops.create_api_key(gen_random_uuid())",
        "select admit('', '{}', '{}')",
        "insert into api_keys (user_id, prefix, digest) select id, 'p', sha256('') from users",
        "update users set plan = 'gold'",
        "update plans set monthly_credits = null",
        "delete from limits",
        "update projects set owner_id = id",
        "insert into charges (job_id) values (gen_random_uuid())",
        "select submit_job(null, null, null, null, null, null, null)",
        "create table mine ()",
        "set role baton_migrate",
    ],
    OPS: [
        "select digest from api_keys",
        "select * from api_keys",
        "select secret from webhook_secrets",
        "insert into api_keys (user_id, prefix, digest) select id, 'p', sha256('') from users",
        "update users set plan = 'gold'",
        "delete from jobs",
        "delete from ops.audit",
        "insert into ops.audit (what) values ('nothing')",
        "select audit('nothing')",
        "select complete_job(gen_random_uuid(), gen_random_uuid(), '{}')",
        "select read_webhook_secret(gen_random_uuid(), gen_random_uuid())",
        "create table mine ()",
        "create function ops.mine() returns int language sql as 'select 1'",
        "set role baton_migrate",
    ],
}


@pytest.fixture
async def logins(sql: asyncpg.Connection) -> AsyncIterator[None]:
    """A login for each role, and one without any; the cluster is this test process's own."""
    names = [*(f"test_{role}" for role in ROLES), "test_nobody", "test_plain", "test_maker"]
    for name in names:
        await sql.execute(f"create role {name} login")
    for role in ROLES:
        await sql.execute(f"grant {role} to test_{role}")
    yield
    for name in names:
        for database in await sql.fetch(
            "select datname from pg_database where datdba = $1::regrole", name
        ):
            await sql.execute(f"drop database {database[0]} with (force)")
        await sql.execute(f"drop owned by {name} cascade")
        await sql.execute(f"drop role {name}")


def as_login(dsn: str, name: str) -> str:
    """The same database as another login; the laboratory's server trusts every name."""
    return re.sub(r"//[^@]*@", f"//{name}@", dsn)


async def test_what_a_role_has_no_need_for_is_refused(dsn: str, logins: None) -> None:
    """Asked with a login of its own, which cannot be anything else."""
    allowed = []
    for role, statements in REFUSED.items():
        connection = await asyncpg.connect(
            as_login(dsn, f"test_{role}"), server_settings={"role": role}
        )
        for statement in statements:
            try:
                await connection.execute(statement)
            except asyncpg.InsufficientPrivilegeError:
                continue
            allowed.append((role, statement))
        await connection.close()
    assert allowed == []
