"""What an operator does by SQL: every call is checked, guarded, true everywhere, and audited."""

import asyncio
import json
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from conftest import Caller, Workers
from test_worker import Gate, row_of, running

from app.__main__ import cli
from app.queue import CHANGES
from tasks import worker as worker_module

SUBMIT = "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')"
FAIL = "select fail_job($1, $2, $3, 'It failed.', '{}')"
NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def ada(sql: asyncpg.Connection) -> Any:
    return await sql.fetchval("select ops.create_user('ada@example.com')")


@pytest.fixture
async def org(sql: asyncpg.Connection) -> Any:
    return await sql.fetchval("select ops.create_organization('Acme')")


async def audited(sql: asyncpg.Connection) -> list[tuple[str, dict[str, Any]]]:
    """What was done, with its details."""
    rows = await sql.fetch("select what, detail from ops.audit order by id")
    return [(row["what"], json.loads(row["detail"])) for row in rows]


# --- Arguments ------------------------------------------------------------------------------

WRONG = [  # call, SQLSTATE, how the sentence begins; $ada and $org are there, $nobody is not
    ("create_user('')", "BT400", "email: must be an address"),
    ("create_user(null)", "BT400", "email: must be an address"),
    ("create_user('no at sign')", "BT400", "email: must be an address"),
    ("create_user(repeat('a', 320) || '@b')", "BT400", "email: must be an address"),
    ("create_user('ADA@example.com')", "BT400", "email: there is already a user"),
    ("create_user('a@b', name => ' ')", "BT400", "name: must have 1 to 300"),
    ("create_user('a@b', plan => 'gold')", "BT400", 'plan: there is no plan named "gold"'),
    ("create_organization('')", "BT400", "name: must have 1 to 300"),
    ("create_organization('A', 'a b')", "BT400", "slug: must be lower case"),
    ("create_organization('acme')", "BT400", 'slug: there is already an organization "acme"'),
    ("add_member($nobody, $ada)", "BT404", "organization: there is no organization"),
    ("add_member($org, $nobody)", "BT404", "member: there is no user"),
    ("add_member($org, $ada, 'owner')", "BT400", "role: must be admin or member"),
    ("create_project('', $ada)", "BT400", "name: must have 1 to 300"),
    ("create_project('P', $nobody)", "BT404", "owner: there is no user"),
    ("create_project('P', null)", "BT404", "owner: there is no user"),
    ("create_project('P', $ada, $nobody)", "BT404", "organization: there is no organization"),
    ("create_project('P', $ada, $org)", "BT400", "owner: the user is no member"),
    ("create_api_key($nobody)", "BT404", "user_id: there is no user"),
    ("create_api_key($ada, repeat('x', 301))", "BT400", "label: must have at most 300"),
    ("revoke_api_key('fr_')", "BT400", "prefix: must be the first 11 characters"),
    ("revoke_api_key(null)", "BT400", "prefix: must be the first 11 characters"),
    ("revoke_user_keys($nobody)", "BT404", "user_id: there is no user"),
    ("create_plan('')", "BT400", "name: must have 1 to 300"),
    ("create_plan('x', -1)", "BT400", "monthly_credits: must be 0 or more"),
    ("create_plan('x', overage => null)", "BT400", "overage: must be true or false"),
    ("create_plan('x', flows => '{poem}')", "BT400", 'flows: there is no job kind named "poem"'),
    ("set_plan($ada, 'gold')", "BT400", 'plan: there is no plan named "gold"'),
    ("set_plan($nobody, 'self_hosted')", "BT404", "user_id: there is no user"),
    ("add_credits($nobody, 1, 'x')", "BT404", "user_id: there is no user"),
    ("add_credits($ada, 0, 'x')", "BT400", "credits: must be a number other than 0"),
    ("add_credits($ada, 1, '')", "BT400", "reason: must have 1 to 300"),
    ("set_price('', 1, 1)", "BT400", "model: must have 1 to 300"),
    ("set_price('m', -1, 1)", "BT400", "prompt: must be 0 or more"),
    ("set_price('m', 1, null)", "BT400", "completion: must be 0 or more"),
    ("set_price('m', 1e9 + 1, 1)", "BT400", "prompt: must be 0 or more"),
    ("set_price('m', 1, 'NaN')", "BT400", "completion: must be 0 or more"),
    ("set_kind_credits('poem', 1)", "BT400", 'kind: there is no job kind named "poem"'),
    ("set_kind_credits('handoff', null)", "BT400", "credits: must be 0 to 1000000"),
    ("set_kind_credits('handoff', 1000001)", "BT400", "credits: must be 0 to 1000000"),
    ("set_limit($nobody, 'poll', 1)", "BT404", "user_id: there is no user"),
    ("set_limit($ada, 'burst', 1)", "BT400", "policy: must be default, poll"),
    ("set_limit($ada, 'poll', -1)", "BT400", "quota: must be 0 to 1000000"),
    ("retry_job($nobody)", "BT404", "id: there is no job"),
    ("retry_job($job)", "BT409", "id: the job is pending; only a failed one"),
    ("retry_failed('oops')", "BT400", 'error_code: there is no error code "oops"'),
    ("retry_failed('timeout', '-1 h')", "BT400", "since: must be a time to look back"),
    ("retry_failed('timeout', '300000 y')", "BT400", "since: must be a time to look back"),
    ("retry_failed('timeout', max => 0)", "BT400", "max: must be 1 to 10000"),
    ("retry_failed('timeout', kind => 'poem')", "BT400", 'kind: there is no job kind named "poem"'),
    ("cancel_job($nobody, 'x')", "BT404", "id: there is no job"),
    ("cancel_job($job, ' ')", "BT400", "reason: must have 1 to 300"),
    ("cancel_project($nobody)", "BT404", "project_id: there is no project"),
    ("cancel_project($project, max => 10001)", "BT400", "max: must be 1 to 10000"),
    ("cancel_project($project, '')", "BT400", "reason: must have 1 to 300"),
    ("pause('poem')", "BT400", 'kind: there is no job kind named "poem"'),
    ("pause(reason => repeat('x', 301))", "BT400", "reason: must have 1 to 300"),
    ("resume('poem')", "BT400", 'kind: there is no job kind named "poem"'),
    ("set_concurrency($nobody, 1)", "BT404", "project_id: there is no project"),
    ("set_concurrency($project, -1)", "BT400", "concurrency: must be 0 to 10000"),
    ("prioritize($nobody)", "BT404", "id: there is no job"),
    ("drain_worker(1)", "BT404", "id: there is no worker"),
]


async def test_a_wrong_argument_is_named_in_one_sentence_and_changes_nothing(
    sql: asyncpg.Connection, ada: Any, org: Any
) -> None:
    project = await sql.fetchval("select ops.create_project('P', $1)", ada)
    named = {"ada": ada, "org": org, "nobody": NOBODY, "project": project}
    named["job"] = await sql.fetchval(SUBMIT, ada, project)
    before = await audited(sql)
    for call, sqlstate, begins in WRONG:
        for name, value in named.items():
            call = call.replace(f"${name}", f"'{value}'")
        with pytest.raises(asyncpg.PostgresError) as caught:
            await sql.execute(f"select ops.{call}")
        error = caught.value
        assert (error.sqlstate, error.detail) == (sqlstate, None), (call, error)
        assert str(error).startswith(begins) and str(error).endswith("."), call
    assert await audited(sql) == before


async def test_nobody_can_date_back_or_remove_what_the_audit_says(ops: asyncpg.Connection) -> None:
    """Retention would remove at once what is old."""
    await ops.execute("set baton.clock_offset = '-500 days'")
    await ops.execute("select ops.create_user('eve@example.com')")
    assert await ops.fetchval("select max(at) > now() - interval '1 day' from ops.audit")
    await ops.execute("set baton.clock_offset = '500 days'")
    assert await ops.fetchval("select removed from ops.purge('90 days', 'audit')") == 0


async def test_every_change_is_in_the_audit_and_no_key_is(
    sql: asyncpg.Connection, ada: Any, org: Any
) -> None:
    await sql.execute("delete from ops.audit")
    await sql.execute("set application_name = 'the night shift'")
    await sql.execute("select ops.add_member($1, $2, 'admin')", org, ada)
    await sql.execute("select ops.create_project('P', $1, $2)", ada, org)
    key = await sql.fetchval("select ops.create_api_key($1, 'ci')", ada)
    await sql.execute("select ops.create_plan('small', 5)")
    await sql.execute("select ops.set_plan($1, 'small')", ada)
    await sql.execute("select ops.add_credits($1, 3, 'sorry')", ada)
    await sql.execute("select ops.set_price('m', 1, 2)")
    await sql.execute("select ops.set_kind_credits('handoff', 2)")
    await sql.execute("select ops.set_limit($1, 'poll', 9)", ada)
    await sql.execute("select ops.revoke_api_key($1)", key[:11])
    done = await audited(sql)
    assert [what for what, _ in done] == [
        *("add_member", "create_project", "create_api_key", "create_plan", "set_plan"),
        *("add_credits", "set_price", "set_kind_credits", "set_limit", "revoke_api_key"),
    ]
    details = dict(done)
    assert details["create_api_key"] == {"user_id": str(ada), "label": "ci", "prefix": key[:11]}
    assert details["set_limit"] == {"user_id": str(ada), "policy": "poll", "quota": 9}
    assert key[11:] not in str(done)
    whole = await sql.fetch("select distinct who = session_user, application from ops.audit")
    assert [tuple(row) for row in whole] == [(True, "the night shift")]


async def test_all_keys_of_a_user_are_revoked_at_once(sql: asyncpg.Connection, ada: Any) -> None:
    bob = await sql.fetchval("select ops.create_user('bob@example.com')")
    for user in (ada, ada, bob):
        await sql.execute("select ops.create_api_key($1)", user)
    revoke = "select ops.revoke_user_keys($1)"
    assert [await sql.fetchval(revoke, ada) for _ in range(2)] == [2, 0]
    live = "select array_agg(user_id) from api_keys where revoked_at is null"
    assert await sql.fetchval(live) == [bob]


async def test_whatever_changes_something_is_safe_to_call_from_any_session(
    sql: asyncpg.Connection,
) -> None:
    rows = await sql.fetch(
        "select proname, prosecdef, proconfig from pg_proc "
        "where pronamespace = 'ops'::regnamespace and prosrc ~ '\\maudit\\('"
    )
    assert len(rows) >= 21
    wrong = [
        row["proname"]
        for row in rows
        if not row["prosecdef"]
        or set(row["proconfig"] or []) < {"search_path=public, pg_temp", "lock_timeout=2s"}
    ]
    assert wrong == []


async def test_a_project_of_an_organization_needs_no_owner_when_only_one_can_be_meant(
    sql: asyncpg.Connection, dsn: str, ada: Any, org: Any
) -> None:
    async def create() -> tuple[int, str]:
        arguments = ["project", "create", "P", "--org", "acme"]
        invoke = CliRunner(env={"DATABASE_URL": dsn}).invoke
        done = await asyncio.to_thread(invoke, cli, arguments)
        return done.exit_code, done.output

    bob = await sql.fetchval("select ops.create_user('bob@example.com')")
    outcomes = [await create()]
    for member, role in ((ada, "member"), (bob, "member"), (bob, "admin"), (ada, "admin")):
        await sql.execute("select ops.add_member($1, $2, $3)", org, member, role)
        outcomes.append(await create())
    assert [code for code, _ in outcomes] == [1, 0, 1, 0, 1]
    assert "--user: say whose; acme has not just one member or admin." in outcomes[0][1]
    owners = await sql.fetch("select owner_id from projects order by created_at")
    assert [row[0] for row in owners] == [ada, bob]


# --- Jobs -----------------------------------------------------------------------------------


async def failed(sql: asyncpg.Connection, caller: Caller, error_code: str = "timeout") -> str:
    """A job that has failed."""
    job_id = await caller.submit()
    token = await sql.fetchval("select lease_token from claim_job($1, 1, 'w', 15)", job_id)
    await sql.execute(FAIL, job_id, token, error_code)
    return job_id


async def test_a_failed_job_is_retried_as_a_new_one_of_its_user(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await failed(sql, caller)
    new_id = await sql.fetchval("select ops.retry_job($1)", job_id)
    job = (await caller.job(str(new_id)))["job"]
    assert (job["status"], job["retry_of"]) == ("pending", job_id)
    assert await sql.fetchval("select user_id from jobs where id = $1", new_id) is not None
    assert (await audited(sql))[-1] == (
        "retry_job", {"job_id": job_id, "new_job_id": str(new_id)}
    )  # fmt: skip


async def test_failed_jobs_are_retried_once_by_code_time_kind_and_number(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    wanted = [await failed(sql, caller) for _ in range(3)]
    await failed(sql, caller, "no_result")
    await sql.execute("select ops.retry_job($1)", wanted[0])
    retry = "select ops.retry_failed('timeout', max => $1, kind => $2)"
    assert await sql.fetchval(retry, 10, "release_notes") == 0
    assert await sql.fetchval("select ops.retry_failed('timeout', '1 microsecond')") == 0
    assert [await sql.fetchval(retry, 1, "handoff") for _ in range(3)] == [1, 1, 0]
    retried = await sql.fetch("select retry_of::text from jobs where retry_of is not null")
    assert sorted(row[0] for row in retried) == sorted(wanted)


async def test_a_call_that_retries_many_ends_after_a_second_and_the_next_goes_on(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    """Until it ends, nobody can spend the same credits."""
    failures = [await failed(sql, caller) for _ in range(4)]
    await sql.execute(
        "create function slow() returns trigger language plpgsql as"
        " 'begin perform pg_sleep(0.4); return new; end';"
        "create trigger slow before insert on jobs for each row execute function slow()"
    )
    first = await sql.fetchval("select ops.retry_failed('timeout')")
    assert 1 <= first < 4
    await sql.execute("drop trigger slow on jobs")
    assert await sql.fetchval("select ops.retry_failed('timeout')") == 4 - first
    assert await sql.fetchval("select ops.retry_failed('timeout')") == 0
    retried = await sql.fetch("select retry_of::text from jobs where retry_of is not null")
    assert sorted(row[0] for row in retried) == sorted(failures)


async def test_two_operators_at_once_retry_a_failed_job_once(
    caller: Caller, sql: asyncpg.Connection, dsn: str
) -> None:
    for _ in range(5):
        await failed(sql, caller)
    other = await asyncpg.connect(dsn)
    async with sql.transaction():
        assert await sql.fetchval("select ops.retry_failed('timeout')") == 5
        second = asyncio.create_task(other.fetchval("select ops.retry_failed('timeout')"))
        async with asyncio.timeout(5):  # it waits for the first one
            while not await sql.fetchval("select count(*) from pg_locks where not granted"):
                await asyncio.sleep(0.01)
    assert await second == 0
    await other.close()


async def test_a_cancelled_job_says_why_and_its_worker_and_its_client_hear_of_it(
    caller: Caller, sql: asyncpg.Connection, worker: Workers
) -> None:
    await caller.ingest({})
    job_id, gate = await caller.submit(), Gate()
    inbox: asyncio.Queue[str] = asyncio.Queue()
    await sql.add_listener(CHANGES, lambda *a: inbox.put_nowait(a[3]))
    made, _ = worker(gate)
    async with running(made):
        await gate.holds(1)
        assert await sql.fetchval("select ops.cancel_job($1, 'it loops.')", job_id) is True
        await gate.holds(0)  # it was told, and did not wait for its lease
    async with asyncio.timeout(5):
        while job_id not in await inbox.get():
            pass
    job = (await caller.job(job_id))["job"]
    assert (job["status"], job["error_code"]) == ("failed", "cancelled")
    assert job["error"] == "Cancelled by the operator: it loops."
    assert await sql.fetchval("select ops.cancel_job($1, 'x')", job_id) is False
    assert await sql.fetchval("select count(*) from charges") == 0


async def test_the_jobs_of_a_project_are_cancelled_in_steps_and_no_others(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    running_one, *waiting = [await caller.submit() for _ in range(4)]
    theirs = await stranger.submit()
    await sql.execute("select claim_job($1, 1, 'w', 15)", running_one)
    cancel = "select ops.cancel_project($1, 'a flood', $2)"
    assert await sql.fetchval(cancel, caller.project_id, 3) == 3
    assert (await caller.job(running_one))["job"]["status"] == "processing"
    assert [await sql.fetchval(cancel, caller.project_id, 3) for _ in range(2)] == [1, 0]
    assert {(await caller.job(id))["job"]["error"] for id in (running_one, *waiting)} == {
        "Cancelled by the operator: a flood."
    }
    assert (await stranger.job(theirs))["job"]["status"] == "pending"
    assert await sql.fetchval("select count(*) from leases") == 0


# --- Workers --------------------------------------------------------------------------------


async def test_a_drained_worker_finishes_what_it_has_and_ends_by_itself(
    caller: Caller, sql: asyncpg.Connection, worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_EVERY", 0.02)
    await caller.ingest({})
    first, gate = await caller.submit(), Gate()
    made, _ = worker(gate)
    async with running(made) as [task]:
        await gate.holds(1)
        row = await row_of(sql, "running")
        drain = "select ops.drain_worker($1)"
        assert [await sql.fetchval(drain, row["id"]) for _ in range(2)] == [True, False]
        async with asyncio.timeout(10):
            while not made.stopping:
                await asyncio.sleep(0.01)
        second = await caller.submit()
        gate.opened.set()
        async with asyncio.timeout(10):
            await task
        assert made.broken is None
    await row_of(sql, "stopped")
    statuses = [(await caller.job(job_id))["job"]["status"] for job_id in (first, second)]
    assert statuses == ["completed", "pending"]
    assert await sql.fetchval(drain, row["id"]) is False
