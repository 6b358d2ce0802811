"""What each role may do, all of it, and that production runs as these roles."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from conftest import new_folder, with_database
from test_queries import CALLS, ROOT, chosen_in

from app import embedded
from app.db import (
    Refused,
    Unavailable,
    applied_version,
    current_version,
    open_database,
    queries,
)
from app.embedded import EmbeddedPostgres
from app.migration import migrate

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
    "github.py": (OPS,),
    "connect.py": (OPS,),
    "demo.py": (OPS,),
    "__main__.py": (OPS,),
    "events.py": (API, OPS),  # `baton import` stores as the API does
}
MIGRATES = {
    *("has_table", "schema_digest", "record_schema", "try_lock_migration", "index_is_valid"),
    *("procrastinate_record", "record_procrastinate", "oldest_transaction"),
    "lacking_membership",
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
    """A login for each role; the cluster is this test process's own."""
    names = [f"test_{role}" for role in ROLES]
    for name in names:
        await sql.execute(f"create role {name} login")
    for role in ROLES:
        await sql.execute(f"grant {role} to test_{role}")
    yield
    for name in names:
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
            except asyncpg.PostgresError:  # it got further than it should
                pass
            allowed.append((role, statement))
        await connection.close()
    assert allowed == []


async def test_no_login_can_move_the_clock_by_which_things_get_old(
    dsn: str, logins: None, sql: asyncpg.Connection
) -> None:
    asked = "select extract(epoch from baton_now() - now())"
    await sql.execute("set baton.clock_offset = '1 hour'")  # only a superuser's test
    assert await sql.fetchval(asked) == 3600
    for role in ROLES:
        connection = await asyncpg.connect(
            as_login(dsn, f"test_{role}"), server_settings={"role": role}
        )
        await connection.execute("set baton.clock_offset = '10 years'")
        assert await connection.fetchval(asked) == 0
        await connection.close()


# --- Who may migrate -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_cluster() -> Iterator[str]:
    """A DSN of a server that has never seen Baton: roles are of the whole server."""
    with new_folder("baton-roles-") as folder:
        server = EmbeddedPostgres(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(embedded.SETTINGS, "fsync", "off")
            started = server.start()
        try:
            yield started
        finally:
            server.stop()


@pytest.fixture
async def admin(bare_cluster: str) -> AsyncIterator[asyncpg.Connection]:
    """The superuser of a server without any of Baton's roles, databases and logins."""
    connection = await asyncpg.connect(bare_cluster)
    yield connection
    for (name,) in await connection.fetch("select datname from pg_database where datname ~ '^own'"):
        await connection.execute(f"drop database {name} with (force)")
    for (name,) in await connection.fetch(
        "select rolname from pg_roles where rolname ~ '^(baton_|login_)' order by rolname"
    ):
        await connection.execute(f"drop owned by {name} cascade")
        await connection.execute(f"drop role {name}")
    await connection.close()


async def taken_on(dsn: str, role: str) -> str:
    """Which login has taken on which role, as a process asks for it."""
    async with open_database(dsn, application_name="baton test", role=role, size=1) as database:
        assert await applied_version(database) == current_version()
        async with database.connection() as connection:
            return str(await connection.raw.fetchval("select session_user || ' as ' || user"))


@pytest.mark.parametrize("login", ["postgres", "login_maker", "login_member"])
async def test_who_migrates_may_take_on_every_role(
    bare_cluster: str, admin: asyncpg.Connection, login: str
) -> None:
    """A superuser; an owner of the database who may make roles; a member of baton_migrate."""
    if login == "login_maker":
        await admin.execute("create role login_maker login createrole")
        await admin.execute("create database own owner login_maker")
    elif login == "login_member":
        for role in (*ROLES, "baton_migrate in role baton_api, baton_worker, baton_ops",
                     "login_member login in role baton_migrate"):  # fmt: skip
            await admin.execute(f"create role {role}")
        await admin.execute("create database own owner baton_migrate")
    else:
        await admin.execute("create database own")
    dsn = as_login(with_database(bare_cluster, "own"), login)
    for _ in range(2):
        assert (await migrate(dsn)).applied
    for role in (*ROLES, "baton_migrate"):
        assert await taken_on(dsn, role) == f"{login} as {role}"
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval(
        "select array_agg(distinct relowner::regrole::text) from pg_class "
        "where relnamespace in ('public'::regnamespace, 'ops'::regnamespace)"
    ) == ["baton_migrate"]
    await connection.close()


async def test_a_database_of_another_login_is_handed_over(
    bare_cluster: str, admin: asyncpg.Connection
) -> None:
    """As versions 1 and 2 left it; what belongs to neither stays as it is."""
    await admin.execute("create role login_old login")
    await admin.execute("create role login_else login")
    await admin.execute("create database own owner login_old")
    dsn = with_database(bare_cluster, "own")
    connection = await asyncpg.connect(dsn)
    await migrate(dsn)
    await connection.execute("grant create on schema public to login_else")
    await connection.execute("set role login_else; create table theirs (); reset role")
    function = "hold_reason(name text) returns text language sql return name"  # one of ours by name
    await connection.execute(f"set role login_else; create function {function}; reset role")
    await connection.execute("reassign owned by baton_migrate to login_old")
    await migrate(dsn)
    rows = await connection.fetch(
        "select relname, relowner::regrole::text as owner from pg_class where relkind = 'r' "
        "and relnamespace = 'public'::regnamespace"
    )
    owners = {row["relname"]: row["owner"] for row in rows}
    theirs = await connection.fetchrow(
        "select prosecdef, proacl from pg_proc where proowner = 'login_else'::regrole"
    )
    await connection.close()
    assert theirs is not None and tuple(theirs) == (False, None)
    assert owners.pop("theirs") == "login_else"
    assert len(owners) > 20 and set(owners.values()) == {"baton_migrate"}


async def test_four_databases_of_one_server_are_migrated_at_once(
    bare_cluster: str, admin: asyncpg.Connection
) -> None:
    names = [f"own_{n}" for n in range(4)]
    for name in names:
        await admin.execute(f"create database {name}")
    done = await asyncio.gather(*(migrate(with_database(bare_cluster, name)) for name in names))
    assert all(each.applied for each in done)


async def test_who_may_not_make_the_roles_is_told_what_to_run_and_can_then_go_on(
    bare_cluster: str, admin: asyncpg.Connection
) -> None:
    await admin.execute("create role login_plain login")
    await admin.execute("create database own owner login_plain")
    dsn = as_login(with_database(bare_cluster, "own"), "login_plain")
    with pytest.raises(Refused, match='needs four roles, which "login_plain" may not make') as told:
        await migrate(dsn)
    await admin.execute(str(told.value).partition("run: ")[2])
    assert (await migrate(dsn)).applied
    assert await taken_on(dsn, API) == "login_plain as baton_api"


async def test_a_login_that_may_not_take_the_role_on_is_told_which(
    bare_cluster: str, admin: asyncpg.Connection
) -> None:
    await admin.execute("create role login_plain login")
    await admin.execute("create database own")
    own = with_database(bare_cluster, "own")
    with pytest.raises(Unavailable, match="There is no role baton_api yet; run: baton migrate"):
        await taken_on(as_login(own, "login_plain"), API)
    await migrate(own)
    with pytest.raises(Unavailable, match="may not take on the role baton_api; .*grant baton_api"):
        await taken_on(as_login(own, "login_plain"), API)
    await admin.execute("grant baton_api to login_plain")
    assert await taken_on(as_login(own, "login_plain"), API) == "login_plain as baton_api"


async def test_what_somebody_else_keeps_in_the_database_stays_as_it_is(empty_dsn: str) -> None:
    """Though the login that migrates owns it too."""
    connection = await asyncpg.connect(empty_dsn)
    await connection.execute(
        "create table customers (id bigint generated always as identity, name text);"
        "create view names as select name from customers; grant select on names to public;"
        "create function price() returns int language sql return 1; create type mood as enum ('ok')"
    )
    theirs = (
        "select relname, relowner::regrole::text, relacl::text from pg_class"
        " where relname in ('customers', 'customers_id_seq', 'names')"
        " union all select proname, proowner::regrole::text, proacl::text from pg_proc"
        " where proname = 'price'"
        " union all select typname, typowner::regrole::text, null from pg_type"
        " where typname = 'mood' order by 1"
    )
    before = await connection.fetch(theirs)
    assert len(before) == 5
    for _ in range(2):  # made, and applied again
        await migrate(empty_dsn)
        assert await connection.fetch(theirs) == before
    assert not await connection.fetchval(
        "select has_table_privilege('baton_ops', 'customers', 'select')"
    )
    await connection.close()
