"""Plans and credits: what may be asked for, who pays, and that nobody gets more than is there."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import Caller

from app.db import Database
from app.migration import migrate
from tasks.calls import Calls
from tasks.context import Context
from tasks.extractive import MODEL
from tasks.providers import Completion, Extractive

Drain = Callable[..., Awaitable[None]]


async def give(sql: asyncpg.Connection, caller: Caller, *plan: Any, **named: Any) -> None:
    """Put the caller on a plan of their own."""
    given = dict(zip(("monthly_credits", "overage"), plan, strict=False)) | named
    arguments = ", ".join(f"{name} => ${n}" for n, name in enumerate(given, 1))
    await sql.execute(f"select ops.create_plan('team', {arguments})", *given.values())
    await sql.execute("select ops.set_plan($1, 'team')", caller.user_id)


async def balance(sql: asyncpg.Connection, caller: Caller) -> tuple[int, int, int | None]:
    """Used, reserved, remaining."""
    row = await sql.fetchrow(
        "select used, reserved, remaining from ops.balances where user_id = $1", caller.user_id
    )
    assert row
    return tuple(row)


async def ask(caller: Caller, kind: str | None = None) -> dict[str, Any]:
    """The job as the 202 shows it."""
    if kind:
        answer = await caller.http.post(f"/projects/{caller.project_id}/insights/{kind}", json={})
    else:
        answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] == answer.json()["job"]["status"]
    return dict(answer.json()["job"])


# --- Plans ---------------------------------------------------------------------------------


async def test_the_plan_of_an_own_install_includes_everything_and_locks_nothing(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    for kind in (None, "correlation", "onboarding", "architecture", "release_notes"):
        assert (await ask(caller, kind))["status"] == "pending"
    locks = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
    async with sql.transaction():
        await sql.execute(
            "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')",
            caller.user_id,
            caller.project_id,
        )
        assert await sql.fetchval(locks) == 0
    assert await balance(sql, caller) == (0, 14, None)
    await drain()
    used, reserved, _ = await balance(sql, caller)
    assert (used, reserved) == (await sql.fetchval("select sum(credits) from charges"), 0)


async def test_what_the_plan_lacks_is_a_failed_job_from_the_start(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await give(sql, caller, flows=["handoff"])
    job = await ask(caller, "architecture")
    assert (job["status"], job["outcome"], job["done"]) == ("failed", "failed", True)
    assert job["error_code"] == "plan_violation"
    assert job["error"] == (
        'The plan "team" does not include artifacts of this kind (architecture_insight).'
    )
    assert job["error_meta"] == {
        "flow": "architecture_insight",
        "plan": "team",
        "retryable": False,
    }
    assert (job["attempt"], job["queue"], job["usage"]["credits"]) == (0, None, 0)
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert (await caller.job(job["id"]))["job"]["error_code"] == "plan_violation"
    log = await caller.http.get(f"/jobs/{job['id']}/events")
    assert [event["type"] for event in log.json()["events"]] == ["job.failed"]
    assert (await ask(caller))["status"] == "pending"


async def test_a_model_that_the_plan_lacks_fails_the_job_and_costs_nothing(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    class Asking(Extractive):
        asked = 0

        async def complete(self, context: Context, calls: Calls) -> Completion:
            calls.use("large-1")
            self.asked += 1
            return await super().complete(context, calls)

    provider = Asking()
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 5, models=["small-1"])
    for made in (provider, Extractive()):
        job_id = await caller.submit()
        await drain(made)
        job = (await caller.job(job_id))["job"]
        model = "large-1" if made is provider else MODEL
        assert job["error"] == f'The plan "team" does not include the model {model}.'
        assert job["error_code"] == "plan_violation"
        assert job["error_meta"] == {
            "flow": "handoff",
            "plan": "team",
            "model": model,
            "retryable": False,
            "attempts": 1,
        }
    assert provider.asked == 0
    await sql.execute("select ops.create_plan('team', 5, models => '{large-1,extractive-1}')")
    job_id = await caller.submit()
    await drain(provider)
    assert (await caller.job(job_id))["job"]["status"] == "completed"
    assert await balance(sql, caller) == (1, 0, 4)


async def test_a_plan_that_is_not_there_and_a_kind_that_is_not_there_are_told(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    for statement, sentence in (
        (f"ops.set_plan('{caller.user_id}', 'gold')", 'plan: there is no plan named "gold"'),
        ("ops.create_plan('x', flows => '{poem}')", 'flows: there is no job kind named "poem"'),
        ("ops.set_plan(gen_random_uuid(), 'self_hosted')", "user_id: there is no user"),
    ):
        with pytest.raises(asyncpg.PostgresError, match=sentence):
            await sql.execute(f"select {statement}")


# --- Credits -------------------------------------------------------------------------------


async def test_without_credits_left_a_job_fails_and_says_what_a_client_can_act_on(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 3)
    done = await caller.submit()
    await drain()
    assert (await caller.job(done))["job"]["usage"]["credits"] == 1
    waiting = await caller.submit()
    assert await balance(sql, caller) == (1, 1, 1)

    job = await ask(caller, "architecture")
    resets = await sql.fetchval("select resets_at from ops.balances")
    assert (resets.day, resets.hour, resets > datetime.now(UTC)) == (1, 0, True)
    assert (job["status"], job["error_code"]) == ("failed", "quota_exceeded")
    assert job["error"] == (
        'This costs 5 credit(s), and 1 are left. The plan "team" has 3 a month; the next month '
        f"begins on {resets:%Y-%m-%d} (UTC)."
    )
    assert job["error_meta"] == {
        "flow": "architecture_insight",
        "plan": "team",
        "required_credits": 5,
        "remaining_credits": 1,
        "resets_at": f"{resets:%Y-%m-%dT%H:%M:%S.%fZ}",
        "retryable": False,
    }
    assert job["usage"]["credits"] == 0
    await caller.http.post(f"/jobs/{waiting}/cancel")
    assert await balance(sql, caller) == (1, 0, 2)


async def test_of_two_requests_at_once_for_the_last_credit_one_runs(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 1)
    jobs = await asyncio.gather(*(ask(caller) for _ in range(8)))
    assert sorted(job["status"] for job in jobs) == ["failed"] * 7 + ["pending"]
    assert {job["error_code"] for job in jobs} == {None, "quota_exceeded"}
    await drain()
    assert await balance(sql, caller) == (1, 0, 0)
    assert await sql.fetchval("select sum(credits) from charges") == 1


async def test_a_submit_waits_for_another_that_may_take_the_last_credit(
    caller: Caller, sql: asyncpg.Connection, dsn: str
) -> None:
    await give(sql, caller, 1)
    submit = "select (job).status from submit_job($1, $2, 'handoff', null, null, null, '{}')"
    other = await asyncpg.connect(dsn)
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    async with asyncio.timeout(10):
        async with sql.transaction():
            assert await sql.fetchval(submit, caller.user_id, caller.project_id) == "pending"
            second = asyncio.create_task(other.fetchval(submit, caller.user_id, caller.project_id))
            while not (second.done() or await sql.fetchval(waiting)):
                await asyncio.sleep(0.001)
        assert await second == "failed"
    await other.close()


@pytest.mark.parametrize("how", ["cancelled", "failed", "expired", "deleted"])
async def test_a_job_that_ends_badly_sets_its_credits_free(
    caller: Caller, sql: asyncpg.Connection, database: Database, drain: Drain, how: str
) -> None:
    await give(sql, caller, 1)
    job_id = await caller.submit()
    assert await balance(sql, caller) == (0, 1, 0)
    match how:
        case "cancelled" | "deleted":
            await caller.http.post(f"/jobs/{job_id}/cancel")
        case "failed":
            await drain()  # there is no event in scope
        case "expired":
            await sql.execute("update jobs set deadline_at = now() - interval '1 s'")
            await database.value("sweep_job", job_id)
    if how == "deleted":
        await caller.http.delete(f"/jobs/{job_id}")
    assert await balance(sql, caller) == (0, 0, 1)
    assert (await ask(caller))["status"] == "pending"


async def test_trying_again_needs_credits_too(caller: Caller, sql: asyncpg.Connection) -> None:
    await give(sql, caller, 0)
    refused = await ask(caller)
    again = (await caller.http.post(f"/jobs/{refused['id']}/retry")).json()["job"]
    assert (again["status"], again["error_code"]) == ("failed", "quota_exceeded")
    assert again["retry_of"] == refused["id"]
    await sql.execute("select ops.add_credits($1, 1, 'sorry')", caller.user_id)
    retries = [caller.http.post(f"/jobs/{job['id']}/retry") for job in (refused, again)]
    answers = [answer.json()["job"]["status"] for answer in await asyncio.gather(*retries)]
    assert sorted(answers) == ["failed", "pending"]


async def test_with_overage_a_job_runs_and_is_charged_all_the_same(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 1, True)
    for _ in range(3):
        await caller.submit()
    await drain()
    assert await balance(sql, caller) == (3, 0, 0)


async def test_grants_are_used_after_the_month_and_outlive_it(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 1)
    await sql.execute("select ops.add_credits($1, 2, 'welcome')", caller.user_id)
    for _ in range(2):
        await caller.submit()
    await drain()
    assert await balance(sql, caller) == (2, 0, 1)
    await give(sql, caller, 3)  # of which one is used: the other charge was the grants'
    assert await balance(sql, caller) == (2, 0, 3)
    await give(sql, caller, 1)
    # A month later the plan's credit is there again, and of the grants one is left.
    await sql.execute("update charges set created_at = created_at - interval '32 days'")
    assert await balance(sql, caller) == (0, 0, 2)
    assert [(await ask(caller))["status"] for _ in range(3)] == ["pending", "pending", "failed"]
    await sql.execute("select ops.add_credits($1, -1, 'a mistake')", caller.user_id)
    assert await balance(sql, caller) == (0, 2, 0)


async def test_what_was_asked_for_in_one_month_and_made_in_the_next_overdraws_neither(
    caller: Caller, sql: asyncpg.Connection, database: Database
) -> None:
    """The clock of the sessions is moved; a submit sees what earlier months still have open."""
    await give(sql, caller, 1)
    submit = "select (job).status from submit_job($1, $2, 'handoff', null, null, null, '{}')"
    whose = (caller.user_id, caller.project_id)
    assert await sql.fetchval(submit, *whose) == "pending"
    await sql.execute("set baton.clock_offset = '32 days'")
    assert await sql.fetchval(submit, *whose) == "failed"
    assert await balance(sql, caller) == (0, 1, 0)


async def test_the_owner_of_a_project_pays_for_whoever_asks(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    acme = await sql.fetchval("select ops.create_organization('Acme')")
    await sql.execute(
        "update projects set organization_id = $1 where id = $2", acme, caller.project_id
    )
    for user_id in (caller.user_id, stranger.user_id):
        await sql.execute("select ops.add_member($1, $2)", acme, user_id)
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 1)
    body = {"project_id": caller.project_id}
    first = (await stranger.http.post("/handoffs", json=body)).json()
    second = (await stranger.http.post("/handoffs", json=body)).json()
    assert (first["status"], second["job"]["error_code"]) == ("pending", "quota_exceeded")
    await drain()
    assert await balance(sql, caller) == (1, 0, 0)
    assert await balance(sql, stranger) == (0, 0, None)


async def test_what_was_used_stays_when_the_job_or_its_project_is_deleted(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await give(sql, caller, 2)
    job_id = await caller.submit()
    await drain()
    await caller.http.delete(f"/jobs/{job_id}")
    await sql.execute("delete from projects where id = $1", caller.project_id)
    assert await balance(sql, caller) == (1, 0, 1)


async def test_usage_counts_credits_calls_and_tokens_by_day_user_and_project(
    caller: Caller, sql: asyncpg.Connection, drain: Drain, database: Database
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    for _ in range(2):
        await caller.submit()
    await drain()
    await sql.execute("select ops.set_price('m', 1, 5)")
    call = {
        "job_id": caller.project_id, "attempt": 1, "user_id": caller.user_id,
        "project_id": caller.project_id, "kind": "handoff", "model": "m", "purpose": "draft",
        "outcome": "ok", "prompt_tokens": 1_000_000, "completion_tokens": 100_000, "seconds": 2.0,
        "request_id": None, "status": 200,
    }  # fmt: skip
    await database.value("record_calls", [call, call | {"model": "n", "outcome": "timeout"}])
    rows = await sql.fetch("select * from ops.usage")
    assert [(row["email"], row["project"]) for row in rows] == [("ada@example.com", "ada")]
    assert (rows[0]["completed_jobs"], rows[0]["credits"]) == (2, 2)
    assert (rows[0]["calls"], rows[0]["prompt_tokens"]) == (2, 2_000_000)
    assert (rows[0]["completion_tokens"], float(rows[0]["cost"])) == (200_000, 1.5)


async def test_what_the_documents_tell_an_operator_works(
    caller: Caller, sql: asyncpg.Connection, root: Path
) -> None:
    blocks = re.findall(r"```sql\n(.*?)```", (root / "docs" / "plans.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if "ops.create_plan" in block]
    await sql.execute(f"set role baton_ops; {block}; reset role")
    assert await balance(sql, caller) == (0, 0, 120)
    assert await sql.fetchval("select credits from flows where kind = 'architecture_insight'") == 4
    assert (await ask(caller, "architecture"))["error_code"] == "plan_violation"


async def test_a_database_of_before_plans_keeps_its_users_and_what_they_used(
    caller: Caller, sql: asyncpg.Connection, drain: Drain, dsn: str
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await caller.submit()
    await drain()
    await sql.execute(
        "drop view ops.balances, balances; alter table users drop constraint users_plan_fkey;"
        "drop function assess; drop table plans, credit_grants;"
        "alter table charges drop column payer_id cascade, drop column from_grants;"
        "alter table jobs drop column from_grants; update users set plan = 'A plan of 2019'"
    )
    for _ in range(2):
        await migrate(dsn)
    assert await balance(sql, caller) == (1, 0, None)
    assert await sql.fetchval("select json_agg(name order by name) from plans") == json.dumps(
        ["A plan of 2019", "self_hosted"]
    )
    assert (await ask(caller))["status"] == "pending"
