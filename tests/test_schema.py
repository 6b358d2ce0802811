"""What the schema itself refuses and answers: checks, ids, scopes, access, operators' functions.

The last test does the main job on PostgreSQL 15, the oldest that Baton promises to work on.
"""

import base64
import hashlib
import json
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.db import Database, open_database, schema
from app.jobs import submit
from app.migration import migrate
from app.queue import hung_bell
from app.schemas import HandoffRequest
from tasks.providers import Extractive
from tasks.worker import make_worker

OLDEST = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
async def ada(sql: asyncpg.Connection) -> Any:
    return await sql.fetchval("select ops.create_user('ada@example.com')")


@pytest.fixture
async def project(sql: asyncpg.Connection, ada: Any) -> Any:
    return await sql.fetchval("select ops.create_project('Demo', $1)", ada)


@pytest.fixture
async def job(sql: asyncpg.Connection, ada: Any, project: Any) -> Any:
    return await sql.fetchval(
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')", ada, project
    )


# --- The essay and the comments ------------------------------------------------------------


async def test_the_essay_names_every_table(sql: asyncpg.Connection) -> None:
    essay = schema()[: schema().index("create ")]
    tables = await sql.fetch(
        "select c.relname from pg_class c where relkind in ('r', 'v') "
        "and relnamespace = 'public'::regnamespace and relname !~ '^procrastinate_'"
    )
    missing = [t[0] for t in tables if not re.search(rf"\b{t[0]}\b", essay)]
    assert len(tables) > 15 and missing == []


async def test_every_function_for_operators_has_a_comment(sql: asyncpg.Connection) -> None:
    rows = await sql.fetch(
        "select proname, obj_description(oid, 'pg_proc') as said from pg_proc "
        "where pronamespace = 'ops'::regnamespace"
    )
    assert len(rows) >= 6
    assert [row["proname"] for row in rows if not row["said"]] == []


# --- Ids -----------------------------------------------------------------------------------


@pytest.fixture
async def own_uuidv7(sql: asyncpg.Connection) -> str:
    """The function that servers before 18 get, under a name of its own."""
    found = re.search(r"create or replace function uuidv7\(\).*?\$uuid\$;", schema(), re.DOTALL)
    assert found
    await sql.execute(found[0].replace("function uuidv7()", "function uuidv7_before_18()"))
    return "uuidv7_before_18"


@pytest.mark.parametrize("ours", [False, True])
async def test_ids_are_version_7_and_carry_their_time(
    sql: asyncpg.Connection, own_uuidv7: str, ours: bool
) -> None:
    name = own_uuidv7 if ours else "uuidv7"
    before = datetime.now(UTC).timestamp()
    rows = await sql.fetch(f"select {name}() as id from generate_series(1, 300)")
    after = datetime.now(UTC).timestamp()
    ids = [uuid.UUID(str(row["id"])) for row in rows]
    assert {(each.version, each.variant) for each in ids} == {(7, uuid.RFC_4122)}
    assert len(set(ids)) == 300
    millis = [each.int >> 80 for each in ids]
    assert int(before * 1000) - 2 <= min(millis) and max(millis) <= after * 1000 + 2
    assert millis == sorted(millis)
    later = uuid.UUID(str(await sql.fetchval(f"select {name}() from pg_sleep(0.003)")))
    assert later > max(ids)


# --- Rows that are refused -----------------------------------------------------------------

LOST = (
    "insert into {0} select r.* from jobs j, jsonb_populate_record(null::{0}, to_jsonb(j) || "
    "jsonb_build_object('job_id', id, 'lease_token', id, 'requested_by', user_id, "
    "'period_start', now(), 'period_end', now()) || '{1}') r"
)
TEXTS = {name: "x" for name in ("title", "summary", "markdown", "model_used")}
LISTS = "sources key_changes decisions open_questions next_steps data related_event_ids scope"
ROW = json.dumps(TEXTS | {name: [] for name in (LISTS + " token_usage").split()})
INTEGRATED = (
    "with i as (insert into integrations (source, user_id, workspace_name) "
    "select 'github', id, 'w' from users returning id) "
)
REFUSED = [
    ("digest_channels", "channel_id", "insert into digest_channels "
     "values (uuidv7(), uuidv7(), '')"),
    ("chat_messages", "state", "insert into chat_messages (insight_id, project_id, integration_id, "
     "channel_id, state, next_attempt_at, ended_at) "
     "values (uuidv7(), uuidv7(), uuidv7(), 'C1', 'sent', null, now())"),
    ("chat_messages", "ended", "insert into chat_messages (insight_id, project_id, integration_id, "
     "channel_id, state) values (uuidv7(), uuidv7(), uuidv7(), 'C1', 'posted')"),
    ("digest_schedules", "forward", "insert into digest_schedules (project_id, user_id, cron, "
     "time_zone, covered_until, next_at) select id, owner_id, '0 9 * * *', 'UTC', now(), now() "
     "from projects"),
    ("users", "email", "update users set email = 'no at sign'"),
    ("users", "email", "update users set email = 'a@b c'"),
    ("users", "email", "update users set email = repeat('a', 320) || '@b'"),
    ("users", "name", "update users set name = ''"),
    ("users", "name", "update users set name = repeat('x', 301)"),
    ("organizations", "name", "insert into organizations (name, slug) values ('', 'a')"),
    ("organizations", "slug", "insert into organizations (name, slug) values ('A', 'a b')"),
    ("organizations", "slug", "insert into organizations (name, slug) values ('A', '-a')"),
    ("usage_counted", "one", "insert into usage_counted values (false, now())"),
    ("members", "role", "insert into members select o.id, u.id, 'owner' from users u, "
     "(select ops.create_organization('A') as id) o"),
    ("projects", "name", "update projects set name = ''"),
    ("projects", "slug", "update projects set slug = 'A'"),
    *(("projects", "scope", f"update projects set scope = '{scope}'")
      for scope in ("[]", '"github"', '{"sources": "github"}', '{"filters": []}')),
    ("projects", "slug", "update projects set slug = 'a--b'"),
    ("api_keys", "digest", "insert into api_keys (user_id, prefix, digest) "
     "select id, 'p', 'short' from users"),
    ("api_keys", "label", "insert into api_keys (user_id, prefix, digest, label) "
     "select id, 'p', sha256('x'), repeat('x', 301) from users"),
    ("limits", "policy", "insert into limits select id, 'burst', 1 from users"),
    ("limits", "quota", "insert into limits select id, 'poll', -1 from users"),
    ("sources", "name", "insert into sources (name, label) values ('Git Hub', 'x')"),
    ("flows", "credits", "update flows set credits = -1"),
    ("event_facets", "dimension", "insert into event_facets (project_id, source, dimension, value) "
     "select id, 'github', 'colours', 'red' from projects"),
    ("jobs", "credits", "update jobs set credits = -1"),
    ("jobs", "status", "update jobs set status = 'queued'"),
    ("jobs", "outcome", "update jobs set outcome = 'great'"),
    ("jobs", "result_kind", "update jobs set status = 'completed', outcome = 'succeeded', "
     "completed_at = now(), result_id = id, result_kind = 'poem'"),
    ("jobs", "error_code", "update jobs set status = 'failed', outcome = 'failed', "
     "completed_at = now(), error = 'x', error_code = 'oops'"),
    ("jobs", "running", "update jobs set status = 'processing'"),
    ("jobs", "ended", "update jobs set completed_at = now()"),
    ("jobs", "outcome", "update jobs set outcome = 'failed'"),
    ("jobs", "succeeded", "update jobs set status = 'failed', outcome = 'succeeded', error = 'x', "
     "error_code = 'timeout', completed_at = now()"),
    ("jobs", "result", "update jobs set status = 'completed', outcome = 'succeeded', "
     "completed_at = now()"),
    ("jobs", "result", "update jobs set result_id = id"),
    ("jobs", "error", "update jobs set status = 'failed', outcome = 'failed', "
     "completed_at = now()"),
    ("jobs", "error", "update jobs set status = 'failed', outcome = 'failed', "
     "completed_at = now(), error_code = 'timeout'"),
    ("jobs", "error", "update jobs set error = 'x'"),
    ("jobs", "priority", "update jobs set priority = 'urgent'"),
    ("idempotency_keys", "key", "insert into idempotency_keys select user_id, 'r', '', "
     "sha256('x'), id from jobs"),
    ("idempotency_keys", "fingerprint", "insert into idempotency_keys select user_id, 'r', 'k', "
     "'short', id from jobs"),
    *(("charges", about, "insert into charges (job_id, user_id, project_id, payer_id, kind, "
       f"credits, from_grants) select id, user_id, project_id, user_id, kind, {values} from jobs")
      for about, values in (("credits", "-1, 0"), ("from_grants", "1, -1"))),
    ("plans", "monthly_credits", "update plans set monthly_credits = -1"),
    ("credit_grants", "credits", "insert into credit_grants (user_id, credits, reason) "
     "select id, 0, 'x' from users"),
    ("jobs", "from_grants", "update jobs set from_grants = -1"),
    ("retention", "keep", "update retention set keep = least - interval '1 second'"),
    ("model_prices", "prompt", "insert into model_prices values ('m', -1, 0)"),
    ("model_prices", "completion", "insert into model_prices values ('m', 0, -1)"),
    *(("webhook_endpoints", about, "insert into webhook_endpoints (project_id, url, types) "
       f"select id, {values} from projects")
      for about, values in (
          ("url", "'http://', '{job.failed}'"), ("types", "'http://a', '{}'"),
          ("types", "'http://a', '{job.lost}'"))),
    ("webhook_secrets", "secret", "insert into webhook_secrets (project_id, secret) "
     "select id, 'whsec_c2hvcnQ=' from projects"),
    *(("webhook_deliveries", about, "insert into webhook_deliveries (job_id, project_id, url, "
       "next_attempt_at, type, payload, state, ended_at) "
       f"select id, project_id, 'http://a', null, {values} from jobs")
      for about, values in (
          ("type", "'job.lost', '{}', 'waiting', null"),
          ("payload", "'job.failed', repeat('x', 20000), 'waiting', null"),
          ("state", "'job.failed', '{}', 'lost', now()"),
          ("ended", "'job.failed', '{}', 'waiting', now()"),
          ("ended", "'job.failed', '{}', 'dead', null"))),
    ("webhook_attempts", "ms", "with d as (insert into webhook_deliveries (job_id, project_id, "
     "url, type, payload) select id, project_id, 'http://a', 'job.failed', '{}' from jobs "
     "returning id) insert into webhook_attempts (delivery_id, at, ms) "
     "select id, now(), -1 from d"),
    ("workers", "state", "insert into workers (id, name, host, version, concurrency, provider, "
     "state) values (1, 'w', 'h', '1', 1, 'p', 'tired')"),
    ("installation", "one", "insert into installation values (false, '1/2')"),
    ("installation", "held", "insert into installation values (true, '1/2', 'Copied.', null)"),
    ("job_due", "reason", "insert into job_due (job_id, not_before, reason) "
     "select id, now(), 'bored' from jobs"),
    ("project_concurrency", "concurrency", "insert into project_concurrency select id, -1 "
     "from projects"),
    *(("integrations", about, "insert into integrations (source, user_id, workspace_name, "
       f"workspace_id) select 'github', id, {values} from users")
      for about, values in (
          ("workspace_name", "'', null"), ("workspace_id", "'w', repeat('x', 301)"))),
    ("integration_secrets", "name", INTEGRATED + "insert into integration_secrets "
     "(integration_id, name, value) select id, 'key', 'x' from i"),
    *(("resources", about, INTEGRATED + "insert into resources (integration_id, id, name, type, "
       f"default_branch) select id, {values} from i")
      for about, values in (
          ("id", "'', 'n', 't', null"), ("name", "'r', '', 't', null"),
          ("type", "'r', 'n', '', null"), ("default_branch", "'r', 'n', 't', ''"))),
    *(("people", about, INTEGRATED + "insert into people (integration_id, id, name) "
       f"select id, {values} from i")
      for about, values in (("id", "'', 'n'"), ("name", "'U1', ''"))),
    ("hook_deliveries", "delivery_id", INTEGRATED + "insert into hook_deliveries "
     "(integration_id, delivery_id) select id, '' from i"),
    ("hook_counts", "result", INTEGRATED + "insert into hook_counts select id, 'lost', now(), 1, "
     "now() from i"),
    *(("import_cursors", about, "insert into import_cursors (project_id, source, resource, stream, "
       f"cursor, etag) select id, 'github', {values} from projects")
      for about, values in (
          ("resource", "'', 's', null, null"), ("stream", "'r', '', null, null"),
          ("cursor", "'r', 's', repeat('x', 301), null"),
          ("etag", "'r', 's', null, repeat('x', 301)"))),
    *((table, "status", LOST.format(table, ROW.replace("}", ', "status": "lost"}')))
      for table in ("handoffs", "insights")),
]  # fmt: skip


async def test_a_check_refuses_a_bad_row(sql: asyncpg.Connection, job: Any) -> None:
    for table, about, statement in REFUSED:
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await sql.execute(statement)
        assert caught.value.table_name == table, statement
        assert about in (caught.value.constraint_name or ""), statement


async def test_every_check_of_ours_has_a_row_that_it_refuses(sql: asyncpg.Connection) -> None:
    checks = await sql.fetch(
        "select conrelid::regclass::text as table, conname from pg_constraint where contype = 'c' "
        "and connamespace = 'public'::regnamespace and conname !~ 'procrastinate|check_not_todo'"
    )
    shown = {(table, about) for table, about, _ in REFUSED}
    missing = [
        tuple(check)
        for check in checks
        if not any(check["table"] == t and about in check["conname"] for t, about in shown)
    ]
    assert missing == []


async def test_an_ended_job_cannot_change(sql: asyncpg.Connection, job: Any) -> None:
    token = await sql.fetchval("select lease_token from claim_job($1, 1, 'w', 15)", job)
    await sql.execute("select fail_job($1, $2, 'timeout', 'Late.', '{}')", job, token)
    for change in (
        "status = 'pending', outcome = null, completed_at = null, error = null, error_code = null",
        "status = 'completed', outcome = 'succeeded', result_kind = 'handoff', result_id = id, "
        "error = null, error_code = null",
        "error_code = 'no_result'",
    ):
        with pytest.raises(asyncpg.PostgresError) as caught:
            await sql.execute(f"update jobs set {change}")
        assert caught.value.sqlstate == "BT409"
    assert await sql.fetchval("select status from jobs") == "failed"


# --- Scopes --------------------------------------------------------------------------------


def of(source: str, dimension: str) -> str:
    return json.dumps({source: {dimension: ["x"]}})


SCOPES: list[tuple[str, list[str] | None, str | None, str | None]] = [
    ("handoff", None, None, None),
    ("handoff", ["github", "slack"], "{}", None),
    ("handoff", ["github"], of("github", "branches"), None),
    ("handoff", None, of("linear", "priorities"), None),
    ("handoff", ["slack"], of("slack", "eventTypes"), None),
    ("handoff", ["github", "icq"], None, 'sources: there is no source named "icq".'),
    ("handoff", None, of("icq", "projects"), 'filters.icq: there is no source named "icq".'),
    (
        "handoff",
        None,
        of("slack", "branches"),
        "filters.slack.branches: Slack has no branches.",
    ),
    ("handoff", None, of("jira", "branches"), "filters.jira.branches: Jira has no branches."),
    (
        "handoff",
        None,
        of("gitlab", "priorities"),
        "filters.gitlab.priorities: GitLab has no priorities.",
    ),
    ("architecture_insight", None, None, None),
    ("architecture_insight", ["slack", "gitlab"], None, None),
    ("architecture_insight", ["slack"], None, "sources: this artifact needs a code source"),
    ("release_notes", ["bitbucket"], None, None),
    ("release_notes", ["jira"], None, "source: this artifact needs a code source"),
]


async def test_a_scope_is_right_or_its_fault_names_the_field(
    sql: asyncpg.Connection, project: Any
) -> None:
    for kind, sources, filters, fault in SCOPES:
        answer = await sql.fetchval(
            "select scope_fault($1, $2, $3, $4)", project, kind, sources, filters
        )
        assert answer == fault if fault is None else str(answer).startswith(fault), answer


async def test_a_wrong_scope_stores_no_job(sql: asyncpg.Connection, ada: Any, project: Any) -> None:
    with pytest.raises(asyncpg.PostgresError, match="icq") as caught:
        await sql.execute(
            "select submit_job($1, $2, 'handoff', '{icq}', null, null, '{}')", ada, project
        )
    assert caught.value.sqlstate == "BT400"
    assert await sql.fetchval("select count(*) from jobs") == 0


@pytest.mark.parametrize(
    ("scope", "sources", "filters", "stored"),
    [
        (None, None, None, {"sources": None, "filters": {}}),
        ({"sources": ["slack"]}, None, None, {"sources": ["slack"], "filters": {}}),
        ({"sources": ["slack"]}, ["github"], None, {"sources": ["github"], "filters": {}}),
        ({"sources": ["slack"]}, None, {"github": {}}, {"sources": ["github"]}),
        ({"filters": {"slack": {}}}, None, None, {"sources": ["slack"], "filters": {"slack": {}}}),
        ({"sources": None, "filters": None}, None, None, {"sources": None, "filters": {}}),
    ],
)
async def test_the_saved_scope_is_taken_when_a_request_names_none(
    sql: asyncpg.Connection, ada: Any, project: Any, scope: Any, sources: Any, filters: Any,
    stored: dict[str, Any],
) -> None:  # fmt: skip
    saved, asked = (json.dumps(each) if each is not None else None for each in (scope, filters))
    await sql.execute("update projects set scope = $1", saved)
    job_id = await sql.fetchval(
        "select (job).id from submit_job($1, $2, 'handoff', $3, $4, null, '{}')",
        ada, project, sources, asked,
    )  # fmt: skip
    row = await sql.fetchval("select input from jobs where id = $1", job_id)
    made = json.loads(row)
    assert {name: made[name] for name in stored} == stored


# --- What an operator does -----------------------------------------------------------------


async def test_an_e_mail_address_is_taken_in_any_case(sql: asyncpg.Connection, ada: Any) -> None:
    with pytest.raises(asyncpg.PostgresError, match="^email: there is already a user"):
        await sql.execute("select ops.create_user('ADA@Example.com')")
    assert await sql.fetchval("select name from users") == "ada"


async def test_a_slug_is_free_and_the_first_free_one(sql: asyncpg.Connection, ada: Any) -> None:
    async def make(name: str, owner: Any = ada) -> str:
        project_id = await sql.fetchval("select ops.create_project($1, $2)", name, owner)
        return str(await sql.fetchval("select slug from projects where id = $1", project_id))

    assert [await make(name) for name in ("Demo", "demo", " DEMO! ")] == [
        "demo",
        "demo-2",
        "demo-3",
    ]
    await sql.execute("delete from projects where slug = 'demo-2'")
    assert await make("Demo") == "demo-2"
    assert [await make(name) for name in ("プロジェクト", "Ünï 7", "!!!")] == [
        "project",
        "n-7",
        "project-2",
    ]
    bob = await sql.fetchval("select ops.create_user('bob@example.com')")
    assert await make("Demo", bob) == "demo"


async def test_the_owner_of_an_organization_s_project_is_a_member(
    sql: asyncpg.Connection, ada: Any
) -> None:
    org = await sql.fetchval("select ops.create_organization('Acme Corp.')")
    assert await sql.fetchval("select slug from organizations") == "acme-corp"
    with pytest.raises(asyncpg.PostgresError, match="owner") as caught:
        await sql.execute("select ops.create_project('P', $1, $2)", ada, org)
    assert caught.value.sqlstate == "BT400"
    await sql.execute("select ops.add_member($1, $2)", org, ada)
    await sql.execute("select ops.create_project('P', $1, $2)", ada, org)
    await sql.execute("select ops.create_project('P', $1)", ada)
    slugs = await sql.fetch("select slug from projects order by organization_id nulls last")
    assert [row[0] for row in slugs] == ["p", "p"]


async def test_adding_a_member_again_changes_the_role(sql: asyncpg.Connection, ada: Any) -> None:
    org = await sql.fetchval("select ops.create_organization('Acme', 'acme')")
    until = datetime(2040, 1, 1, tzinfo=UTC)
    for role, admin_until in (("member", until), ("admin", None), ("member", None)):
        await sql.execute("select ops.add_member($1, $2, $3, $4)", org, ada, role, admin_until)
        [row] = await sql.fetch("select role, admin_until from members")
        assert tuple(row) == (role, admin_until)


async def test_a_key_is_32_random_bytes_and_only_its_digest_is_stored(
    sql: asyncpg.Connection, ada: Any
) -> None:
    keys = [await sql.fetchval("select ops.create_api_key($1, 'l')", ada) for _ in range(20)]
    assert len(set(keys)) == 20
    for key in keys:
        assert re.fullmatch(r"fr_[A-Za-z0-9_-]{43}", key)
        assert len(base64.urlsafe_b64decode(key[3:] + "=")) == 32
        row = await sql.fetchrow("select * from api_keys where prefix = $1", key[:11])
        assert row is not None
        assert row["digest"] == hashlib.sha256(key.encode()).digest()
        assert key[11:] not in str(dict(row))


async def test_a_key_is_revoked_once(sql: asyncpg.Connection, ada: Any) -> None:
    key, other = [await sql.fetchval("select ops.create_api_key($1)", ada) for _ in range(2)]
    revoke = "select ops.revoke_api_key($1)"
    assert [await sql.fetchval(revoke, key[:11]) for _ in range(2)] == [True, False]
    assert await sql.fetchval(revoke, "fr_unknown1") is False
    assert await sql.fetchval("select prefix from api_keys where revoked_at is null") == other[:11]


async def test_who_may_see_a_project_follows_from_owner_and_membership(
    sql: asyncpg.Connection, ada: Any, project: Any
) -> None:
    org = await sql.fetchval("select ops.create_organization('Acme')")
    ids = {"ada": ada}
    for name in ("owner", "admin", "member", "temp", "past", "gone", "out"):
        ids[name] = await sql.fetchval("select ops.create_user($1 || '@x.org')", name)
    for name, role, until in (
        ("owner", "member", None), ("admin", "admin", None), ("member", "member", None),
        ("temp", "member", datetime(2100, 1, 1, tzinfo=UTC)), ("gone", "admin", None),
        ("past", "member", datetime(2020, 1, 1, tzinfo=UTC)),
    ):  # fmt: skip
        await sql.execute("select ops.add_member($1, $2, $3, $4)", org, ids[name], role, until)
    shared = await sql.fetchval("select ops.create_project('S', $1, $2)", ids["owner"], org)
    await sql.execute("delete from members where user_id = $1", ids["gone"])

    async def access(project_id: Any) -> dict[str, str]:
        rows = await sql.fetch("select * from project_access where project_id = $1", project_id)
        names = {value: name for name, value in ids.items()}
        return {names[row["user_id"]]: row["access_role"] for row in rows}

    assert await access(project) == {"ada": "owner"}
    everyone = {
        "owner": "owner", "admin": "admin", "member": "member", "temp": "admin", "past": "member",
    }  # fmt: skip
    assert await access(shared) == everyone
    await sql.execute("delete from members where user_id = $1", ids["owner"])
    everyone.pop("owner")
    assert await access(shared) == everyone


async def test_a_foreign_project_looks_like_one_that_is_not_there(
    sql: asyncpg.Connection, project: Any
) -> None:
    bob = await sql.fetchval("select ops.create_user('bob@example.com')")
    said = []
    for project_id in (project, "01890a5d-ac96-774b-bcce-b302099a8057"):
        with pytest.raises(asyncpg.PostgresError) as caught:
            await sql.execute("select assert_project($1, $2)", bob, project_id)
        said.append((caught.value.sqlstate, str(caught.value)))
    assert said[0] == said[1] and said[0][0] == "BT404"


# --- The oldest server ---------------------------------------------------------------------


@pytest.fixture
def oldest_dsn() -> Iterator[str]:
    """A server of PostgreSQL 15 on a socket of its own, as an account that it accepts."""
    if not (OLDEST / "initdb").exists():
        pytest.skip(f"there is no PostgreSQL 15 in {OLDEST}")
    root = os.geteuid() == 0
    account = pwd.getpwnam("nobody" if root else pwd.getpwuid(os.geteuid()).pw_name)
    home = Path(tempfile.mkdtemp(prefix="baton-15-"))
    if root:
        os.chown(home, account.pw_uid, account.pw_gid)

    def call(*command: str | Path) -> None:
        subprocess.run(
            command, check=True, capture_output=True, cwd=home, timeout=30,
            user=account.pw_uid if root else None,
        )  # fmt: skip

    data = home / "data"
    try:
        call(OLDEST / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={home} -c fsync=off"
        call(OLDEST / "pg_ctl", "-D", data, "-w", "-l", home / "log", "-o", options, "start")
        yield f"postgresql://postgres@/postgres?host={home}"
        call(OLDEST / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def test_a_handoff_is_made_on_the_oldest_server(oldest_dsn: str) -> None:
    await migrate(oldest_dsn)
    await migrate(oldest_dsn)

    def opened(role: str) -> AbstractAsyncContextManager[Database]:
        return open_database(oldest_dsn, application_name="baton test", role=role, size=5)

    async with (
        opened("baton_ops") as ops,
        opened("baton_api") as api,
        opened("baton_worker") as database,
    ):
        assert str(await ops.value("server_version")).startswith("15.")
        user = await ops.value("create_user", "ada@example.com")
        project = await ops.value("create_project", "Demo", user, None)
        event = {"source": "github", "event_type": "commit", "title": "feat: an LRU cache"}
        await api.row("ingest_events", user, project, [event])
        submitted = await submit(
            api, user_id=user, project_id=project, kind="handoff",
            sources=None, body=HandoffRequest(project_id=project),
        )  # fmt: skip
        job_id = submitted["id"]
        assert uuid.UUID(job_id).version == 7
        async with hung_bell(database) as bell:
            worker, _ = make_worker(database, Extractive(), bell, concurrency=2, attempt_timeout=20)
            worker.install_signal_handlers = worker.wait = False
            await worker.run()  # type: ignore[no-untyped-call]
        job = await api.row("read_job", user, job_id)
        assert job and job["status"] == "completed", job
        assert await api.rows("list_handoffs", user, None, "active", 5)
