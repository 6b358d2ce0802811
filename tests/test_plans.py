"""Hot statements read what they answer, not what there is: no scan of a big table, few pages.

One database with a million events and 200,000 jobs is generated for this file. What is bounded is
pages and scans, never time.
"""

import asyncio
import hashlib
import json
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from conftest import with_database

from app.connector import init_connection
from app.db import SETTINGS, queries

pytestmark = pytest.mark.timeout(240)  # the rows are made in the setup of the first test

SETTLED = 6  # executions; from the sixth on PostgreSQL may keep one plan for all arguments
PROJECTS, EVENTS, JOBS, ARTIFACTS = 50, 1_000_000, 200_000, 20_000
ENTRIES = 50_000  # of the newest events: 1,000 of each project, in 9 days
# Tables that grow with use. Seven in ten events of a project are commits of GitHub, two in ten
# come from Slack, one from Linear; one in 100,000 from Sentry; the first of a thousand is a tag.
BIG = ["events", "jobs", "handoffs", "insights", "charges", "procrastinate_jobs", "job_due"]
BIG += ["provider_calls", "webhook_deliveries", "webhook_attempts", "search_entries"]

GENERATE = f"""
set session_replication_role = replica;
set synchronous_commit = off;
set maintenance_work_mem = '256MB';
insert into users (id, email, name)
  select md5('u' || n)::uuid, 'u' || n || '@example.com', 'U' from generate_series(0, 19) n;
insert into projects (id, name, slug, owner_id)
  select md5('p' || n)::uuid, 'P', 'p-' || n, md5('u' || n % 20)::uuid
  from generate_series(0, {PROJECTS - 1}) n;
insert into api_keys (user_id, prefix, digest)
  select md5('u' || n % 20)::uuid, 'k' || n, sha256(n::text::bytea) from generate_series(0, 4999) n;
insert into event_facets
  select p.id, s, 'eventTypes', '', s || n
  from projects p, unnest('{{github,slack,linear,sentry}}'::text[]) s, generate_series(1, 40) n;
insert into events (id, user_id, project_id, source, event_type, title, resource, occurred_at)
  select
    uuidv7(), md5('u' || n % {PROJECTS} % 20)::uuid, md5('p' || n % {PROJECTS})::uuid,
    case when n % 100003 < {PROJECTS} then 'sentry' when k % 10 < 7 then 'github'
      when k % 10 < 9 then 'slack' else 'linear' end,
    case when k % 1000 = 0 then 'tag' else 'commit' end,
    'An event of some ordinary length ' || n, 'acme/r' || k % 5,
    timestamptz '2026-01-01' + n * interval '16 seconds'
  from generate_series(0, {EVENTS - 1}) n, lateral (select n / {PROJECTS} as k) t;
insert into jobs (id, user_id, project_id, kind, input, credits, status, outcome, lease_token,
    result_kind, result_id, completed_at)
  select md5('j' || n)::uuid, md5('u' || n % {PROJECTS} % 20)::uuid,
    md5('p' || n % {PROJECTS})::uuid, 'handoff', '{{}}', 1,
    case when n < 100 then 'pending' else 'completed' end,
    case when n >= 100 then 'succeeded' end, case when n >= 100 then md5('t' || n)::uuid end,
    case when n >= 100 then 'handoff' end, case when n >= 100 then md5('h' || n)::uuid end,
    case when n >= 100 then now() - n * interval '20 seconds' end
  from generate_series(0, {JOBS - 1}) n;
insert into handoffs (job_id, lease_token, user_id, project_id, title, summary, sources,
    key_changes, decisions, open_questions, next_steps, data, related_event_ids, markdown, scope,
    period_start, period_end, model_used, token_usage, created_at, id)
  select id, id, user_id, project_id, 'T', 'S', '[]', '[]', '[]', '[]', '[]', '{{}}', '[]', 'M',
    '{{"sources": null, "filters": {{}}}}', now(), now() - interval '1 day', 'm', '{{}}',
    now() - random() * interval '90 days', result_id
  from jobs where result_id is not null limit {ARTIFACTS};
insert into insights (job_id, lease_token, requested_by, project_id, kind, title, summary, data,
    related_event_ids, markdown, period_start, period_end, model_used, token_usage, created_at)
  select id, id, user_id, project_id, 'onboarding_brief', 'T', 'S', '{{}}', '[]', 'M', now(), now(),
    'm', '{{}}', now() - random() * interval '90 days'
  from jobs where result_id is not null limit {ARTIFACTS};
insert into procrastinate_jobs (queue_name, task_name, args)
  select 'jobs', 't', jsonb_build_object('job_id', n) from generate_series(1, 10000) n;
insert into charges (job_id, user_id, project_id, payer_id, kind, credits, created_at)
  select id, user_id, project_id, user_id, kind, 1, completed_at
  from jobs where result_id is not null limit {2 * ARTIFACTS};
insert into provider_calls (job_id, attempt, user_id, project_id, kind, model, purpose, outcome,
    prompt_tokens, completion_tokens, seconds, created_at)
  select id, 1, user_id, project_id, kind, 'm', 'draft', 'ok', 900, 90, 1, completed_at
  from jobs where result_id is not null limit {2 * ARTIFACTS};
insert into usage_counted (until) values (now() - interval '10 minutes');
insert into usage_by_day (day, user_id, project_id, payer_id, completed_jobs, credits)
  select (created_at at time zone 'UTC')::date, user_id, project_id, payer_id, count(*), count(*)
  from charges group by 1, 2, 3, 4 order by 1; -- they come day after day
insert into webhook_deliveries (job_id, project_id, url, type, payload, state, next_attempt_at,
    ended_at)
  select id, project_id, 'https://h' || n % 20 || '.example.com/', 'job.completed',
    repeat('x', 900), case when n % 10 = 0 then 'waiting' else 'delivered' end,
    case when n % 10 = 0 then now() end, case when n % 10 <> 0 then now() end
  from (
    select id, project_id, row_number() over () as n
    from jobs where result_id is not null limit {ARTIFACTS}
  ) j;
insert into webhook_attempts (delivery_id, at, ms) select id, now(), 1 from webhook_deliveries;
insert into search_entries (id, project_id, source, at, words, terms)
  select id, project_id, source, occurred_at, 5, array[
    k || 'Aevent', k || 'Aord' || n % 7, k || 'Alength', k || 'Bacme/web', k || 'C' || n / 500]
  from (
    select *, search_key(project_id) as k, row_number() over (order by occurred_at desc) as n
    from events order by occurred_at desc limit {ENTRIES}
  ) e;
"""


@pytest.fixture(scope="module")
def big(cluster: str, template: str) -> Iterator[str]:
    """A DSN of a database with a lot in it."""
    name = f"baton_plans_{secrets.token_hex(6)}"

    async def generate() -> None:
        connection = await asyncpg.connect(cluster)
        await connection.execute(f"create database {name} template {template}")
        await connection.close()
        connection = await asyncpg.connect(with_database(cluster, name))
        # Indexes of the biggest table are built once, at the end, rather than kept up.
        indexes = await connection.fetch(
            "select indexrelid::regclass::text as name, pg_get_indexdef(indexrelid) as text "
            "from pg_index where indrelid = any ('{events,search_entries}'::regclass[]) "
            "and not indisprimary"
        )
        await connection.execute("".join(f"drop index {index['name']};" for index in indexes))
        await connection.execute(GENERATE)
        await connection.execute(";".join(index["text"] for index in indexes))
        await connection.execute("vacuum analyze")
        await connection.close()

    async def drop() -> None:
        connection = await asyncpg.connect(cluster)
        await connection.execute(f"drop database {name} with (force)")
        await connection.close()

    asyncio.run(generate())
    yield with_database(cluster, name)
    asyncio.run(drop())


@pytest.fixture
async def conn(big: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the service has it, in a transaction that is rolled back."""
    connection = await asyncpg.connect(big, server_settings={"jit": SETTINGS["jit"]})
    await init_connection(connection)
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


def literal(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bytes():
            return f"'\\x{value.hex()}'"
        case list():
            return "array[" + ", ".join(map(literal, value)) + "]"
        case dict():
            return f"'{json.dumps(value)}'"
        case int():
            return str(value)
    return f"'{value}'"


async def measured(
    conn: asyncpg.Connection, statement: str, arguments: tuple[Any, ...]
) -> tuple[int, int, str]:
    """Pages read, rows of big tables read by scans, and the plan, of a prepared statement that has
    been asked so often that the server may have settled on a plan for any arguments."""
    await conn.execute(f"prepare q as {statement}")
    execute = "execute q" + (f"({', '.join(map(literal, arguments))})" if arguments else "")
    for _ in range(SETTLED):
        await conn.execute(f"savepoint s; {execute}; rollback to savepoint s")
    scans = "select sum(seq_tup_read)::int from pg_stat_xact_user_tables where relname = any ($1)"
    before = await conn.fetchval(scans, BIG) or 0
    [plan] = await conn.fetchval(f"explain (analyze, buffers, format json) {execute}")
    scanned = (await conn.fetchval(scans, BIG) or 0) - before
    top = plan["Plan"]
    return top["Shared Hit Blocks"] + top["Shared Read Blocks"], scanned, json.dumps(top)


def id_of(kind: str, n: int) -> str:
    return str(uuid.UUID(hashlib.md5(f"{kind}{n}".encode()).hexdigest()))


U, P = id_of("u", 3), id_of("p", 3)
LATE, EARLY = "2026-07-05 12:00:00Z", "2026-07-04 12:00:00Z"  # near the end; an hour is 225 events
LONG_AGO = "2025-12-01 00:00:00Z"
NO_FILTER: dict[str, Any] = {}
FILTER = {"github": {"projects": ["acme/r1"], "eventTypes": ["commit"]}}
SCOPE: dict[str, Any] = {"sources": None, "filters": {}}
FEATURES = ["github", "slack"]
HOT: list[tuple[str, str, tuple[Any, ...], str, int]] = [
    # case, query, arguments, the index that it lives on, pages
    ("", "admit", (hashlib.sha256(b"7").digest(), ["default", "generate"], [60, 10]), "", 40),
    ("", "read_job", (U, id_of("j", 1003)), "jobs_pkey", 20),
    ("", "read_handoff", (U, f"{{{id_of('h', 1003)}}}"), "handoffs_pkey", 20),
    ("", "assert_project", (U, P), "", 30),
    ("", "submit_job", (U, P, "handoff", None, None, None, {}, {}, None, None, 200), "", 90),
    ("pending", "read_job", (U, id_of("j", 3)), "jobs_pkey", 60),
    ("all", "list_jobs", (U, *[None] * 10, 51), "jobs_recent", 1_200),
    ("project", "list_jobs", (U, P, *[None] * 9, 51), "jobs_recent", 400),
    ("failed", "list_jobs", (U, P, None, "failed", *[None] * 7, 51), "", 200),
    ("pair", "list_jobs", (U, P, *[None] * 5, {"a": "b"}, *[None] * 3, 51), "", 200),
    ("key", "list_jobs", (U, P, *[None] * 6, "k", None, None, 51), "", 200),
    ("", "pace", (), "jobs_pace", 600),
    ("", "claim_job", (id_of("j", 3), 5, "w", 15), "", 60),
    ("", "wake_held", (500,), "", 40),
    ("all", "list_events", (U, None, None, 100), "events_recent", 600),
    ("project", "list_events", (U, P, None, 100), "events_recent", 200),
    ("source", "list_events", (U, P, "slack", 100), "events_recent_by_source", 200),
    ("rare source", "list_events", (U, P, "sentry", 100), "events_recent_by_source", 40),
    ("all", "list_handoffs", (U, None, "active", 20), "handoffs_recent", 150),
    ("project", "list_handoffs", (U, P, None, 20), "handoffs_recent", 50),
    ("", "list_insights", (U, P, "onboarding_brief", None, 20), "insights_recent", 50),
    ("", "list_facets", (U, None), "event_facets_pkey", 60),
    ("", "list_projects", (U,), "", 60),
    ("day", "events_in_scope", (P, None, NO_FILTER, EARLY, LATE, None, 1001), "", 200),
    ("sources", "events_in_scope", (P, FEATURES, NO_FILTER, EARLY, LATE, None, 1001), "", 200),
    ("filter", "events_in_scope", (P, ["github"], FILTER, EARLY, LATE, None, 1001), "", 200),
    ("rare", "events_in_scope", (P, ["sentry"], NO_FILTER, EARLY, LATE, None, 1001), "", 200),
    ("rare, long", "events_in_scope", (P, ["sentry"], {}, LONG_AGO, LATE, None, 401), "", 200),
    # At most the limit for each of the four sources, however many events there are.
    ("common, long", "events_in_scope", (P, None, {}, LONG_AGO, LATE, None, 801), "", 3200),
    ("repo", "events_in_scope", (P, ["github"], {}, EARLY, LATE, "acme/r1", 1), "", 40),
    ("", "release_bounds", (P, "github", None, LATE), "events_releases", 30),
    ("repo", "release_bounds", (P, "github", "acme/none", LATE), "events_releases", 60),
    ("all", "newest_event", (P, None, LATE), "events_recent_by_source", 60),
    ("sources", "newest_event", (P, ["sentry"], LATE), "events_recent_by_source", 60),
    ("", "previous_handoff_end", (P, SCOPE, LATE), "handoffs_recent", 300),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "index", "pages"),
    [pytest.param(*case[1:], id=f"{case[1]} {case[0]}".strip()) for case in HOT],
)
async def test_a_hot_query_reads_little(
    conn: asyncpg.Connection, name: str, arguments: tuple[Any, ...], index: str, pages: int
) -> None:
    read, scanned, plan = await measured(conn, queries()[name].rstrip(";"), arguments)
    assert scanned == 0, plan
    assert read <= pages, plan
    assert f'"Index Name": "{index}"' in plan or not index


# What is counted is read from an index, with a hundred rows in a page; help reads the catalog.
VIEWS = {"help": 800}


async def test_no_view_for_operators_reads_what_is_over(conn: asyncpg.Connection) -> None:
    names = await conn.fetch(
        "select relname from pg_class where relnamespace = 'ops'::regnamespace and relkind = 'v'"
    )
    assert len(names) > 12
    for (name,) in names:
        read, scanned, plan = await measured(conn, f'select * from ops."{name}"', ())
        await conn.execute("deallocate q")
        assert scanned == 0, f"{name}: {plan}"
        assert read <= VIEWS.get(name, 300), f"{name}: {read}"


async def test_a_job_that_does_not_wait_counts_no_queue(conn: asyncpg.Connection) -> None:
    await conn.execute(
        "insert into jobs (user_id, project_id, kind, input, credits, created_at) "
        "select $1, $2, 'handoff', '{}', 1, now() - interval '1 day' from generate_series(1, 1000)",
        U,
        P,
    )
    read, _, plan = await measured(conn, queries()["read_job"].rstrip(";"), (U, id_of("j", 1003)))
    assert read <= 20, plan


async def test_fetching_a_ticket_reads_little(conn: asyncpg.Connection) -> None:
    """Also when ten thousand wait: the function's own statement, as it stands in the database."""
    source = await conn.fetchval(
        "select prosrc from pg_proc where proname = 'procrastinate_fetch_job_v2'"
    )
    found = re.search(r"WITH candidate.*RETURNING procrastinate_jobs\.\*", source, re.DOTALL)
    assert found
    statement = found[0].replace("target_queue_names", "'{jobs}'::varchar[]")
    statement = statement.replace("p_worker_id", "null")
    read, scanned, plan = await measured(conn, statement, ())
    assert scanned == 0 and read <= 100, plan
    assert '"Index Name": "procrastinate_jobs_priority_idx_v1"' in plan


LINE = f"""
insert into project_concurrency values ('{id_of("p", 4)}', 2);
insert into job_due (job_id, not_before, reason, line, rank, created_at)
  select id, 'infinity', 'concurrency', '{id_of("p", 4)}', 0, created_at from jobs limit 50000;
analyze job_due;
"""


@pytest.mark.parametrize(
    ("name", "arguments", "pages"),
    [
        ("claim_job", (id_of("j", 3), 5, "w", 15), 80),  # of another project
        ("claim_job", (id_of("j", 4), 5, "w", 15), 80),
        ("submit_job", (U, P, "handoff", None, None, None, {}, {}, None, None, 200), 110),
        ("read_job", (U, id_of("j", 3)), 70),
    ],
)
async def test_a_long_line_of_one_project_is_not_read_to_serve_a_job(
    conn: asyncpg.Connection, name: str, arguments: tuple[Any, ...], pages: int
) -> None:
    await conn.execute(LINE)
    read, scanned, plan = await measured(conn, queries()[name].rstrip(";"), arguments)
    assert scanned == 0 and read <= pages, plan


async def fetched(conn: asyncpg.Connection, statement: str, arguments: tuple[Any, ...]) -> int:
    """Rows of search_entries that a settled statement reads by an index; none by a scan."""
    await conn.execute(f"prepare q as {statement}")
    once = f"savepoint s; execute q({', '.join(map(literal, arguments))}); rollback to savepoint s"
    for _ in range(SETTLED):
        await conn.execute(once)
    counted = (
        "select idx_tup_fetch::int as fetched, seq_tup_read::int as scanned "
        "from pg_stat_xact_user_tables where relname = 'search_entries'"
    )
    before = await conn.fetchrow(counted)
    await conn.execute(f"{once}; deallocate q")
    after = await conn.fetchrow(counted)
    assert before is not None and after is not None
    assert after["scanned"] == before["scanned"]
    return int(after["fetched"] - before["fetched"])


@pytest.mark.parametrize(
    ("question", "own"),
    [
        ("43", 10),  # which stands in as many entries of each of the others
        ("zebra", 0),
        ("event", 1_000),
        ("43 event zebra length", 2 * 1_000 + 10),
    ],
)
async def test_a_question_reads_the_entries_of_its_own_project_that_have_its_words(
    conn: asyncpg.Connection, question: str, own: int
) -> None:
    since = "2026-06-21 12:00:00Z"
    arguments = (P, question, None, NO_FILTER, since, LATE, 60)
    rows = await fetched(conn, queries()["events_about"].rstrip(";"), arguments)
    # The entries of these 14 days are counted, by another index.
    assert own <= rows <= own + 1_000 + 20


WAITING = f"""
update search_entries set terms = null where ctid in (
  select ctid from search_entries where project_id <> '{P}' limit 5000);
update search_entries set terms = null where ctid in (
  select ctid from search_entries where project_id = '{P}' limit 100);
"""


async def test_entering_reads_what_waits_and_of_a_project_only_its_own(
    conn: asyncpg.Connection,
) -> None:
    enter = queries()["enter_events"].rstrip(";")
    assert await fetched(conn, enter, (None, 250)) == 0
    assert await fetched(conn, enter, (P, 250)) == 0
    await conn.execute(WAITING)
    # Each is read, locked and written.
    assert 100 <= await fetched(conn, enter, (P, 250)) <= 400
    assert 250 <= await fetched(conn, enter, (None, 250)) <= 1_000
