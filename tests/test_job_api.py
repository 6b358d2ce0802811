"""What a client can do with a job beside polling it: cancel, retry, delete, list, ask safely twice.

What must not happen here is what users of other job APIs complain about: a cancelled job that
completes, a retried request that costs twice, an expired one that looks like an unknown one.
"""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from conftest import Caller, Workers
from starlette.applications import Starlette

from app import db
from app.db import Database
from app.migration import migrate
from tasks.calls import Calls
from tasks.context import Context
from tasks.executor import Executor
from tasks.outcomes import Retry
from tasks.providers import Completion, Extractive

Drain = Callable[..., Awaitable[None]]
LEASE = 15.0


class Waiting:
    """A provider that does not answer, and says when it was asked and when it was stopped."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.stopped = asyncio.Event()

    async def complete(self, context: Context, calls: Calls) -> Completion:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()
        raise AssertionError


async def processing(caller: Caller, sql: asyncpg.Connection) -> tuple[str, Any]:
    """A job that some worker runs, and the token of its lease."""
    job_id = await caller.submit()
    ticket = await sql.fetchval("select ticket_id from jobs where id = $1", job_id)
    row = await sql.fetchrow("select * from claim_job($1, $2, 'w', 60)", job_id, ticket)
    assert row
    return job_id, row["lease_token"]


async def failed(caller: Caller, **body: Any) -> str:
    """A job that has been cancelled."""
    job_id = await caller.submit(**body)
    assert (await caller.http.post(f"/jobs/{job_id}/cancel")).status_code == 200
    return job_id


# --- What a job says of itself -------------------------------------------------------------


async def test_a_waiting_job_says_where_in_the_queue_it_stands(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    await stranger.submit()
    first, second = await caller.submit(), await caller.submit()
    urgent = await caller.submit(job={"priority": "high"})
    late = await caller.submit(job={"priority": "low"})
    places = {}
    for job_id in (first, second, urgent, late):
        queue = (await caller.job(job_id))["job"]["queue"]
        assert queue["capped"] is False
        places[job_id] = (queue["position"], queue["ahead_in_project"])
    assert places == {first: (3, 0), second: (4, 1), urgent: (1, 2), late: (5, 3)}

    ticket = await sql.fetchval("select ticket_id from jobs where id = $1", first)
    await sql.execute("update procrastinate_jobs set status = 'doing' where id = $1", ticket)
    await sql.execute("select claim_job($1, $2, 'w', 60)", first, ticket)
    assert (await caller.job(first))["job"]["queue"] is None
    assert (await caller.job(second))["job"]["queue"]["position"] == 3


async def test_a_position_is_counted_to_a_thousand_and_no_further(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await sql.execute("select defer_ticket(uuidv7()) from generate_series(1, 1100)")
    queue = (await caller.job(await caller.submit()))["job"]["queue"]
    assert (queue["position"], queue["capped"]) == (1001, True)


async def test_an_estimate_comes_from_how_long_the_last_jobs_took(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    first = await caller.submit()
    assert (await caller.job(first))["job"]["eta"] is None, "nothing is known yet"
    await drain()
    await sql.execute(
        "update jobs set created_at = completed_at - interval '50 s', "
        "started_at = completed_at - interval '30 s'"
    )
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert answer.json()["job"]["eta"] is None, "what was measured is current for a while"
    ended = (await caller.job(first))["job"]
    assert ended["eta"] is None
    assert ended["timings"] == {"queue_ms": 20_000, "run_ms": 30_000, "total_ms": 50_000}


async def test_the_estimate_of_a_new_process_is_right_from_its_first_request(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    answer = await caller.http.post("/handoffs/", json={})  # warms nothing
    assert answer.status_code == 404
    await sql.execute(
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')",
        caller.user_id, caller.project_id,
    )  # fmt: skip
    await drain()
    await sql.execute(
        "update jobs set created_at = completed_at - interval '50 s', "
        "started_at = completed_at - interval '30 s'"
    )
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    job = answer.json()["job"]
    start, done, created = (
        datetime.fromisoformat(text)
        for text in (job["eta"]["start_at"], job["eta"]["done_at"], job["created_at"])
    )
    assert job["eta"]["basis"] == "p50_last_200"
    assert start - created == timedelta(seconds=20)
    assert done - start == timedelta(seconds=30)
    assert answer.headers["retry-after"] == "15", "never longer than SDKs accept"


async def test_nobody_is_told_to_poll_a_parked_job_before_it_is_due(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id, token = await processing(caller, sql)
    await sql.execute(
        "select park_job($1, $2, 3600, 'generation_failed', 'x', '{}')", job_id, token
    )
    answer = await caller.http.get(f"/jobs/{job_id}")
    assert answer.json()["job"]["eta"] is None, "nothing is known of how long jobs take"
    assert answer.headers["retry-after"] == "15", "an hour, but never longer than SDKs accept"


async def test_a_job_that_has_to_start_once_more_is_estimated_from_now(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    await sql.execute(
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')",
        caller.user_id, caller.project_id,
    )  # fmt: skip
    await drain()
    await sql.execute("update jobs set started_at = completed_at - interval '30 s'")
    job_id, token = await processing(caller, sql)
    await sql.execute(
        "update jobs set started_at = started_at - interval '1 hour' where id = $1", job_id
    )
    before = datetime.now(UTC)
    await sql.execute("select release_job($1, $2)", job_id, token)
    eta = (await caller.job(job_id))["job"]["eta"]
    start, done = (datetime.fromisoformat(eta[name]) for name in ("start_at", "done_at"))
    assert start >= before and done - start == timedelta(seconds=30)


async def test_an_estimate_that_fails_does_not_hide_that_the_job_is_stored(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await sql.execute("alter table jobs rename column started_at to begun_at")
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert (answer.status_code, answer.json()["job"]["eta"]) == (202, None)


async def test_a_completed_job_says_what_it_took_and_used(caller: Caller, drain: Drain) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit(job={"metadata": {"ticket": "A-12"}})
    await drain()
    answer = await caller.http.get(f"/jobs/{job_id}")
    job = answer.json()["job"]
    assert (job["done"], job["outcome"], job["attempt"]) == (True, "succeeded", 1)
    assert job["progress"] == {"value": 1, "step": "completed", "message": None}
    assert job["usage"] == {
        "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "credits": 1
    }  # fmt: skip
    assert job["metadata"] == {"ticket": "A-12"}
    assert job["started_at"] <= job["completed_at"] <= job["deadline_at"]
    timings = job["timings"]
    assert abs(timings["queue_ms"] + timings["run_ms"] - timings["total_ms"]) <= 1
    assert answer.headers["server-timing"] == (
        f"queue;dur={timings['queue_ms']}, run;dur={timings['run_ms']}"
    )
    assert "location" not in answer.headers


async def test_a_job_of_version_1_says_what_it_used_as_well(
    caller: Caller, dsn: str, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    await drain()
    before = await caller.job(job_id)
    await sql.execute("alter table charges drop column payer_id cascade")  # as it was then
    await sql.execute("update jobs set usage = null")
    await migrate(dsn)
    assert before["job"]["usage"]["credits"] == 1
    assert await caller.job(job_id) == before


async def test_progress_is_what_the_running_attempt_said_last(
    caller: Caller, worker: Workers
) -> None:
    await caller.ingest({"title": "feat: a thing"}, {"title": "fix: another"})
    provider = Waiting()
    running, executor = worker(provider)
    running.shutdown_graceful_timeout = 0.05
    working = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
    job_id = await caller.submit()
    await provider.asked.wait()
    before = await caller.http.get(f"/jobs/{job_id}")
    assert before.json()["job"]["progress"] == {"value": None, "step": "starting", "message": None}
    await executor.report_once()
    after = await caller.http.get(f"/jobs/{job_id}")
    assert after.json()["job"]["progress"] == {
        "value": 0.2, "step": "generating", "message": "from 2 events"
    }  # fmt: skip
    assert after.headers["etag"] != before.headers["etag"]
    running.stop()
    await working
    assert (await caller.job(job_id))["job"]["progress"]["step"] == "queued"


async def test_late_progress_cannot_revive_a_job(
    caller: Caller, database: Database, sql: asyncpg.Connection
) -> None:
    job_id, token = await processing(caller, sql)
    await caller.http.post(f"/jobs/{job_id}/cancel")
    before = await sql.fetchrow("select * from jobs where id = $1", job_id)
    progress = [{"value": 0.5, "step": "generating", "message": None}]
    rows = await database.rows("report_progress", [job_id], [str(token)], progress)
    assert rows == []
    assert await sql.fetchrow("select * from jobs where id = $1", job_id) == before


async def test_a_client_is_told_to_come_back_less_often_the_older_its_job_gets(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    seen = []
    for age in (0, 60, 3600):
        await sql.execute("update jobs set created_at = now() - $1 * interval '1 s'", age)
        headers = (await caller.http.get(f"/jobs/{job_id}")).headers
        seen.append(int(headers["retry-after"]))
        assert 0 <= int(headers["retry-after"]) * 1000 - int(headers["retry-after-ms"]) < 1000
    assert seen[0] == 1 and 6 <= seen[1] <= 7 and seen[2] == 15


async def test_an_unchanged_job_is_a_304_and_a_changed_one_is_not(
    caller: Caller, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    path = f"/jobs/{job_id}"
    tag = (await caller.http.get(path)).headers["etag"]
    same = await caller.http.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (same.status_code, same.content) == (304, b"")
    assert same.headers["etag"] == tag and same.headers["retry-after"] == "1"
    await drain()
    changed = await caller.http.get(path, headers={"If-None-Match": tag})
    assert changed.status_code == 200 and changed.json()["result"]
    tag = changed.headers["etag"]
    assert (await caller.http.get(path, headers={"If-None-Match": tag})).status_code == 304
    handoff_id = changed.json()["job"]["result_id"]
    await caller.http.patch(f"/handoffs/{handoff_id}", json={"status": "archived"})
    archived = await caller.http.get(path, headers={"If-None-Match": tag})
    assert archived.json()["result"]["status"] == "archived"


async def test_a_202_has_the_etag_of_a_job_that_has_not_ended_and_of_no_other(
    caller: Caller,
) -> None:
    body, key = {"project_id": caller.project_id}, {"Idempotency-Key": "abc"}
    for prefer in ({}, {"Prefer": "wait=0"}):
        accepted = await caller.http.post("/handoffs", json=body, headers={**key, **prefer})
        path = accepted.headers["location"].removeprefix("/api/v1")
        seen = {"If-None-Match": accepted.headers["etag"]}
        assert (await caller.http.get(path, headers=seen)).status_code == 304
    await caller.http.post(f"{path}/cancel")
    assert (await caller.http.get(path, headers=seen)).status_code == 200
    ended = await caller.http.post("/handoffs", json=body, headers=key)
    assert ended.status_code == 202
    assert "etag" not in ended.headers, "a 304 would keep the result from whoever sent it"


async def test_a_clock_that_was_set_back_makes_no_time_negative_and_no_change_unseen(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    await sql.execute("update jobs set created_at = created_at + interval '1 hour'")
    await drain()
    await sql.execute("update handoffs set created_at = now() + interval '1 hour'")
    await sql.execute("update handoffs set updated_at = created_at")
    before = await caller.http.get(f"/jobs/{job_id}")
    timings = before.json()["job"]["timings"]
    assert timings["queue_ms"] == timings["total_ms"] == 0 <= timings["run_ms"]
    assert "=-" not in before.headers["server-timing"]
    handoff_id = before.json()["job"]["result_id"]
    await caller.http.patch(f"/handoffs/{handoff_id}", json={"status": "archived"})
    seen = {"If-None-Match": before.headers["etag"]}
    assert (await caller.http.get(f"/jobs/{job_id}", headers=seen)).status_code == 200


async def test_a_lease_that_runs_out_changes_the_etag(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id, _ = await processing(caller, sql)
    tag = (await caller.http.get(f"/jobs/{job_id}")).headers["etag"]
    await sql.execute("update leases set expires_at = now() - interval '1 s'")
    answer = await caller.http.get(f"/jobs/{job_id}", headers={"If-None-Match": tag})
    assert answer.status_code == 200 and answer.json()["job"]["recovering"] is True


async def test_every_answer_about_jobs_varies_by_preference_and_is_not_cached(
    caller: Caller,
) -> None:
    answers = [await caller.http.post("/handoffs", json={"project_id": caller.project_id})]
    job_id = answers[0].json()["jobId"]
    paths = (f"/jobs/{job_id}", "/jobs", f"/jobs?ids={job_id}")
    answers += [await caller.http.get(path) for path in paths]
    answers.append(await caller.http.post(f"/jobs/{job_id}/cancel"))
    for answer in answers:
        assert answer.headers["vary"] == "Prefer, Authorization", answer.url
        assert answer.headers["cache-control"] == "no-store", answer.url
    assert answers[0].headers["operation-location"] == str(
        answers[0].request.url.join(answers[0].headers["location"])
    )
    urls = answers[0].json()["urls"]
    assert urls == answers[0].json()["job"]["urls"]
    assert all(url.startswith(f"/api/v1/jobs/{job_id}") for url in urls.values())


# --- Cancelling ----------------------------------------------------------------------------


async def test_cancelling_a_waiting_job_ends_it_and_takes_its_ticket(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    answer = await caller.http.post(f"/jobs/{job_id}/cancel")
    job = answer.json()["job"]
    assert answer.status_code == 200 and answer.json()["result"] is None
    assert (job["status"], job["outcome"], job["error_code"]) == (
        "failed",
        "cancelled",
        "cancelled",
    )
    assert job["error"] == "Cancelled by the caller."
    assert job["error_meta"] == {"retryable": True, "stage": "queued", "attempts": 0}
    assert job["cancel_requested_at"] == job["completed_at"] is not None
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    await drain()
    assert (await caller.job(job_id))["job"] == job
    assert await sql.fetchval("select count(*) from charges") == 0


async def test_cancelling_a_running_job_aborts_the_call_of_the_model(
    caller: Caller, worker: Workers, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    provider = Waiting()
    running, _ = worker(provider)
    working = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
    job_id = await caller.submit()
    await provider.asked.wait()
    answer = await caller.http.post(f"/jobs/{job_id}/cancel")
    job = answer.json()["job"]
    assert (job["status"], job["error_code"]) == ("failed", "cancelled")
    assert job["error_meta"]["stage"] == "generating"
    # Renewals, which would notice as well, are not running here: the message has to arrive.
    async with asyncio.timeout(10):
        await provider.stopped.wait()
    running.stop()
    await working
    assert (await caller.job(job_id))["job"] == job
    assert await sql.fetchval("select count(*) from leases") == 0
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0


async def test_cancelling_is_idempotent_and_never_changes_an_ended_job(
    caller: Caller, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    completed = await caller.submit()
    await drain()
    cancelled = await failed(caller)
    for job_id in (completed, cancelled):
        before = await caller.http.get(f"/jobs/{job_id}")
        answer = await caller.http.post(f"/jobs/{job_id}/cancel")
        assert answer.status_code == 200
        assert answer.json()["job"] == before.json()["job"]
        after = await caller.http.get(f"/jobs/{job_id}")
        assert after.headers["etag"] == before.headers["etag"]


async def test_a_job_is_either_cancelled_or_completed_whoever_is_first(
    caller: Caller, database: Database, sql: asyncpg.Connection
) -> None:
    from test_transitions import ARTIFACT

    outcomes = set()
    for turn in range(20):
        job_id, token = await processing(caller, sql)
        complete = database.row("complete_job", job_id, str(token), ARTIFACT)
        cancel = caller.http.post(f"/jobs/{job_id}/cancel")
        calls: list[Awaitable[Any]] = [complete, cancel] if turn % 2 else [cancel, complete]
        await asyncio.gather(*calls, return_exceptions=True)
        job = (await caller.job(job_id))["job"]
        charged = await sql.fetchval("select count(*) from charges where job_id = $1", job_id)
        assert (job["status"], charged) in {("completed", 1), ("failed", 0)}
        outcomes.add(job["outcome"])
    assert outcomes <= {"succeeded", "cancelled"}


# --- Trying again --------------------------------------------------------------------------


async def test_a_retry_is_a_new_job_for_the_same_request(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing", "resource": "acme/web"})
    options = {"priority": "high", "metadata": {"a": "b"}, "timeout_s": 600, "start_timeout_s": 60}
    first = await failed(caller, sources=["github"], job=options)
    before = (await caller.job(first))["job"]
    answer = await caller.http.post(f"/jobs/{first}/retry")
    assert answer.status_code == 202
    job = answer.json()["job"]
    assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}"
    assert job["id"] != first and job["retry_of"] == first
    assert (job["status"], job["priority"], job["metadata"]) == ("pending", "high", {"a": "b"})
    lasts = {
        name: datetime.fromisoformat(job[name]) - datetime.fromisoformat(job["created_at"])
        for name in ("deadline_at", "start_deadline_at")
    }
    assert lasts == {
        "deadline_at": timedelta(seconds=600), "start_deadline_at": timedelta(seconds=60)
    }  # fmt: skip
    assert await sql.fetchval("select count(distinct input) from jobs") == 1
    await drain()
    assert (await caller.job(job["id"]))["job"]["status"] == "completed"
    assert (await caller.job(first))["job"] == before, "history does not change"


async def test_only_a_failed_job_can_be_tried_again(caller: Caller, drain: Drain) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    for status in ("pending", "completed"):
        answer = await caller.http.post(f"/jobs/{job_id}/retry")
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert status in answer.json()["error"]
        await drain()


# --- Deleting ------------------------------------------------------------------------------


async def test_a_deleted_job_is_gone_with_its_artifact_but_not_its_cost(
    caller: Caller, stranger: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    await drain()
    answer = await caller.http.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await caller.http.get("/handoffs")).json() == {"handoffs": []}
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry"),
    ):  # fmt: skip
        gone = await caller.http.request(method, f"/jobs/{job_id}{path}")
        assert (gone.status_code, gone.json()["code"]) == (410, "gone"), (method, path)
        foreign = await stranger.http.request(method, f"/jobs/{job_id}{path}")
        assert foreign.status_code == 404, "whoever could not see it learns nothing"
    assert await sql.fetchval("select count(*) from charges") == 1
    assert (await caller.http.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("headers", [{}, {"Prefer": "wait=1"}])
async def test_a_job_that_is_deleted_while_it_is_read_is_gone_and_not_without_a_result(
    app: Starlette, caller: Caller, drain: Drain, sql: asyncpg.Connection,
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    await drain()

    def deletes_before_the_artifact(ask: Callable[..., Awaitable[Any]]) -> Any:
        async def asked(name: str, *args: Any) -> Any:
            if name == "read_handoff":
                await sql.execute("select delete_job($1, $2)", caller.user_id, job_id)
            return await ask(name, *args)

        return asked

    for name in ("row", "rows"):
        ask = deletes_before_the_artifact(getattr(app.state.database, name))
        monkeypatch.setattr(app.state.database, name, ask)
    answer = await caller.http.get(f"/jobs/{job_id}", headers=headers)
    assert answer.status_code == 410, answer.text


async def test_a_job_that_is_not_done_cannot_be_deleted(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    waiting = await caller.submit()
    running, _ = await processing(caller, sql)
    for job_id in (waiting, running):
        answer = await caller.http.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert (await caller.job(job_id))["job"]["done"] is False


# --- Listing -------------------------------------------------------------------------------


async def test_a_list_pages_through_all_jobs_newest_first(caller: Caller) -> None:
    made = [await caller.submit() for _ in range(7)]
    seen: list[str] = []
    url = "/jobs?limit=3"
    while url:
        answer = await caller.http.get(url)
        page = answer.json()
        seen += [job["id"] for job in page["jobs"]]
        await caller.submit()  # what comes meanwhile moves no page
        link = answer.headers.get("link", "")
        assert bool(link) is bool(page["next_cursor"])
        url = link.partition(">")[0].removeprefix("<")
    assert seen == made[::-1]


async def test_a_list_is_narrowed_by_each_of_its_filters(
    caller: Caller, stranger: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    key = {"Idempotency-Key": "abc"}
    completed = (
        await caller.http.post(
            "/handoffs",
            json={
                "project_id": caller.project_id,
                "job": {"metadata": {"ticket": "A-1", "x": "y"}},
            },
            headers=key,
        )
    ).json()["jobId"]
    await drain()
    await sql.execute("update jobs set created_at = created_at - interval '1 day'")
    cancelled = await failed(caller, job={"metadata": {"ticket": "A-2"}})
    waiting = await caller.submit(f"/projects/{caller.project_id}/insights/onboarding")
    await stranger.submit()
    yesterday = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    for params, expected in (
        ({}, [waiting, cancelled, completed]),
        ({"project_id": caller.project_id}, [waiting, cancelled, completed]),
        ({"kind": "onboarding_brief"}, [waiting]),
        ({"status": "completed"}, [completed]),
        ({"status": "pending", "kind": "handoff"}, []),
        ({"error_code": "cancelled"}, [cancelled]),
        ({"created_after": yesterday}, [waiting, cancelled]),
        ({"created_before": yesterday}, [completed]),
        ({"metadata[ticket]": "A-2"}, [cancelled]),
        ({"metadata[ticket]": "A-1", "metadata[x]": "y"}, [completed]),
        ({"metadata[ticket]": "A-1", "metadata[x]": "z"}, []),
        ({"idempotency_key": "abc"}, [completed]),
        ({"ids": f"{waiting},{completed},{waiting},nonsense"}, [waiting, completed]),
    ):
        answer = await caller.http.get("/jobs", params=params)
        assert answer.status_code == 200, (params, answer.text)
        assert [job["id"] for job in answer.json()["jobs"]] == expected, params
    assert "result" not in answer.json()["jobs"][0]


async def test_a_list_shows_nothing_of_strangers(caller: Caller, stranger: Caller) -> None:
    job_id = await caller.submit()
    assert (await stranger.http.get("/jobs")).json()["jobs"] == []
    assert (await stranger.http.get(f"/jobs?ids={job_id}")).json()["jobs"] == []
    answer = await stranger.http.get(f"/jobs?project_id={caller.project_id}")
    assert answer.status_code == 404
    for method, path in (("POST", "/cancel"), ("POST", "/retry"), ("DELETE", ""), ("GET", "")):
        answer = await stranger.http.request(method, f"/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert (await caller.job(job_id))["job"]["status"] == "pending"


def cursor(created_at: str) -> str:
    """One that was never answered but looks as if it had been."""
    return base64.urlsafe_b64encode(f"{created_at} {uuid4()}".encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"cursor": "nonsense"}, "cursor"),
        ({"cursor": "Zm9vIGJhcg"}, "cursor"),
        ({"cursor": cursor("0001-01-01T00:00:00+14:00")}, "cursor"),
        ({"cursor": cursor("9999-12-31T23:59:59-14:00")}, "cursor"),
        ({"limit": "0"}, "limit"),
        ({"status": "cancelled"}, "status"),
        ({"created_after": "yesterday"}, "created_after"),
        ({"ids": ","}, "ids"),
        ({"ids": ",".join(["a" * 36] * 1 + [f"{n}" for n in range(101)])}, "ids"),
        ({"metadata[a]": "b\0"}, "metadata"),
    ],
)
async def test_a_wrong_list_parameter_is_named(
    caller: Caller, params: dict[str, str], field: str
) -> None:
    answer = await caller.http.get("/jobs", params=params)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert answer.json()["error"].startswith(f"{field}: ")


async def test_the_etag_of_several_jobs_changes_when_one_does(caller: Caller) -> None:
    first, second = await caller.submit(), await caller.submit()
    path = f"/jobs?ids={first},{second}"
    tag = (await caller.http.get(path)).headers["etag"]
    again = await caller.http.get(path, headers={"If-None-Match": tag})
    assert again.status_code == 304
    await caller.http.post(f"/jobs/{second}/cancel")
    changed = await caller.http.get(path, headers={"If-None-Match": tag})
    assert [job["status"] for job in changed.json()["jobs"]] == ["pending", "failed"]
    assert "retry-after" in changed.headers


# --- Asking safely -------------------------------------------------------------------------


async def test_two_hundred_identical_requests_at_once_make_one_job(
    caller: Caller, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "ACQUIRE_TIMEOUT", 20.0)  # on a busy machine they take long, all in all
    body = {"project_id": caller.project_id, "sources": ["github"]}

    async def ask() -> httpx.Response:
        """As a client does: whatever is unavailable is asked for again, under the same key."""
        while True:
            answer = await caller.http.post(
                "/handoffs", json=body, headers={"Idempotency-Key": '"8e03978e"'}, timeout=60
            )
            if answer.status_code != 503:
                return answer

    answers = await asyncio.gather(*(ask() for _ in range(200)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["jobId"] for answer in answers}) == 1
    replayed = [answer.headers.get("idempotent-replayed") for answer in answers]
    assert sorted(map(str, replayed)) == ["None"] + ["true"] * 199
    assert await sql.fetchval("select count(*) from jobs") == 1
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 1


async def test_a_202_says_where_to_poll_also_for_a_job_that_has_ended(caller: Caller) -> None:
    body, key = {"project_id": caller.project_id}, {"Idempotency-Key": "ended"}
    first = await caller.http.post("/handoffs", json=body, headers=key)
    await caller.http.post(f"{first.headers['location'].removeprefix('/api/v1')}/cancel")
    again = await caller.http.post("/handoffs", json=body, headers=key)
    assert (again.status_code, again.json()["job"]["done"]) == (202, True)
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["retry-after"] == "0"


async def test_a_key_that_is_used_for_another_request_is_refused(caller: Caller) -> None:
    key = {"Idempotency-Key": "abc"}
    body: dict[str, Any] = {
        "project_id": caller.project_id,
        "job": {"metadata": {"a": "1", "b": "2"}},
    }
    first = await caller.http.post("/handoffs", json=body, headers=key)
    same = {"job": {"metadata": {"b": "2", "a": "1"}}, "project_id": caller.project_id}
    again = await caller.http.post("/handoffs", json=same, headers={"idempotency-key": '"abc"'})
    assert again.json()["jobId"] == first.json()["jobId"], "the order of fields says nothing"
    for change in ({"sources": ["github"]}, {"job": {"priority": "high"}}):
        other = await caller.http.post("/handoffs", json={**body, **change}, headers=key)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reuse")
        assert other.json()["error"].startswith("Idempotency-Key: ")


async def test_a_key_counts_for_its_user_and_its_route_only(
    caller: Caller, stranger: Caller
) -> None:
    key = {"Idempotency-Key": "abc"}
    made = []
    for each in (caller, stranger):
        for path in ("/handoffs", f"/projects/{each.project_id}/insights/onboarding"):
            body = {"project_id": each.project_id} if path == "/handoffs" else {}
            answer = await each.http.post(path, json=body, headers=key)
            assert answer.status_code == 202, answer.text
            made.append(answer.json()["jobId"])
    assert len(set(made)) == 4


async def test_a_replay_tells_what_has_become_of_the_job(caller: Caller, drain: Drain) -> None:
    await caller.ingest({"title": "feat: a thing"})
    key = {"Idempotency-Key": "abc"}
    body = {"project_id": caller.project_id}
    first = (await caller.http.post("/handoffs", json=body, headers=key)).json()["jobId"]
    await drain()
    again = await caller.http.post("/handoffs", json=body, headers=key)
    assert again.status_code == 202
    assert (again.json()["jobId"], again.json()["job"]["status"]) == (first, "completed")
    assert again.headers["retry-after"] == "0", "it can be read at once"


async def test_a_refused_request_does_not_use_up_its_key(caller: Caller) -> None:
    key = {"Idempotency-Key": "abc"}
    wrong = {"project_id": caller.project_id, "sources": ["icq"]}
    assert (await caller.http.post("/handoffs", json=wrong, headers=key)).status_code == 400
    right = {"project_id": caller.project_id, "sources": ["github"]}
    assert (await caller.http.post("/handoffs", json=right, headers=key)).status_code == 202


async def test_the_key_of_a_deleted_job_makes_no_other_job(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    first, key = await failed(caller), {"Idempotency-Key": "abc"}
    paths = {
        "/handoffs": {"project_id": caller.project_id},
        f"/projects/{caller.project_id}/insights/onboarding": {},
        f"/jobs/{first}/retry": None,
    }
    for path, body in paths.items():
        made = (await caller.http.post(path, json=body, headers=key)).json()["jobId"]
        await caller.http.post(f"/jobs/{made}/cancel")
        assert (await caller.http.delete(f"/jobs/{made}")).status_code == 204
        late = await caller.http.post(path, json=body, headers=key)
        assert (late.status_code, late.json()["code"]) == (410, "gone"), path
        assert late.json()["error"].startswith("Idempotency-Key: ")
    other = await caller.http.post(
        "/handoffs", json={"project_id": caller.project_id, "sources": ["github"]}, headers=key
    )
    assert other.status_code == 422, "it is still known for what it was"
    assert await sql.fetchval("select count(*) from jobs") == 1


async def test_a_retry_with_the_same_key_is_one_retry(caller: Caller) -> None:
    first = await failed(caller)
    key = {"Idempotency-Key": "again"}
    retry = f"/jobs/{first}/retry"
    answers = [await caller.http.post(retry, headers=key) for _ in range(2)]
    assert len({answer.json()["jobId"] for answer in answers}) == 1
    other = await caller.http.post(f"/jobs/{await failed(caller)}/retry", headers=key)
    assert other.status_code == 422


@pytest.mark.parametrize("key", ["", '""', '"open', 'a"b', "a" * 256, "schlüssel"])
async def test_a_key_that_is_none_is_named(caller: Caller, key: str) -> None:
    answer = await caller.http.post(
        "/handoffs",
        json={"project_id": caller.project_id},
        headers=[(b"Idempotency-Key", key.encode())],
    )
    expected = 202 if key == 'a"b' else 400
    assert answer.status_code == expected, answer.text
    if expected == 400:
        assert answer.json()["error"].startswith("Idempotency-Key: ")


async def test_a_request_can_join_the_running_job_of_the_same_request(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job = {"dedupe": "in_flight"}
    first = await caller.submit(sources=["github", "slack"])
    asking = [
        caller.http.post(
            "/handoffs",
            json={"project_id": caller.project_id, "sources": ["slack", "github"], "job": job},
        )
        for _ in range(20)
    ]
    for answer in await asyncio.gather(*asking):
        assert (answer.json()["jobId"], answer.json()["deduplicated"]) == (first, True)
    other = await caller.http.post(
        "/handoffs", json={"project_id": caller.project_id, "sources": ["slack"], "job": job}
    )
    assert other.json()["deduplicated"] is False
    await caller.http.post(f"/jobs/{first}/cancel")
    again = await caller.submit(sources=["slack", "github"], job=job)
    assert again != first, "an ended job is not in flight"


async def test_many_at_once_that_would_join_make_one_job(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    asking = [caller.submit(job={"dedupe": "in_flight"}) for _ in range(30)]
    assert len(set(await asyncio.gather(*asking))) == 1
    assert await sql.fetchval("select count(*) from jobs") == 1


# --- Time-outs -----------------------------------------------------------------------------


async def test_a_job_that_does_not_start_in_time_expires(
    caller: Caller, database: Database, sql: asyncpg.Connection
) -> None:
    late = await caller.submit(job={"start_timeout_s": 60})
    started, token = await processing(caller, sql)
    await sql.execute("update jobs set start_deadline_at = created_at + interval '60 s'")
    await sql.execute("update jobs set start_deadline_at = start_deadline_at - interval '2 min'")
    await sql.execute("select release_job($1, $2)", started, token)
    for row in await database.rows("sweepable", 100):
        await database.value("sweep_job", row[0])
    job = (await caller.job(late))["job"]
    assert (job["status"], job["outcome"], job["error_code"]) == ("failed", "expired", "timeout")
    assert (await caller.job(started))["job"]["status"] == "pending", "it had been started in time"


async def test_a_job_that_is_not_done_in_time_times_out(
    caller: Caller, database: Database, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit(job={"timeout_s": 300})
    job = (await caller.job(job_id))["job"]
    lasts = datetime.fromisoformat(job["deadline_at"]) - datetime.fromisoformat(job["created_at"])
    assert lasts == timedelta(seconds=300)
    ticket = await sql.fetchval("select ticket_id from jobs")
    await sql.execute("select claim_job($1, $2, 'w', 60)", job_id, ticket)
    await sql.execute("update jobs set deadline_at = now() - interval '1 s'")
    for row in await database.rows("sweepable", 100):
        await database.value("sweep_job", row[0])
    job = (await caller.job(job_id))["job"]
    assert (job["outcome"], job["error_code"]) == ("timed_out", "timeout")
    assert job["error_meta"]["stage"] == "generating"


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ({"timeout_s": 0}, "job.timeout_s"),
        ({"start_timeout_s": 86_401}, "job.start_timeout_s"),
        ({"timeout_s": "60"}, "job.timeout_s"),
        ({"priority": "urgent"}, "job.priority"),
        ({"dedupe": True}, "job.dedupe"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "job.metadata"),
        ({"metadata": {"a": "x" * 513}}, "job.metadata"),
        ({"metadata": {"a" * 65: "x"}}, "job.metadata"),
        ({"metadata": {"a": 1}}, "job.metadata"),
        ({"colour": "red"}, "job.colour"),
    ],
)
async def test_a_wrong_option_of_a_job_is_named(
    caller: Caller, job: dict[str, Any], field: str
) -> None:
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id, "job": job})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert answer.json()["error"].startswith(field), answer.text


async def test_a_parked_job_keeps_its_priority(
    caller: Caller, worker: Workers, database: Database, sql: asyncpg.Connection
) -> None:
    class Busy(Extractive):
        async def complete(self, context: Context, calls: Calls) -> Completion:
            raise Retry("Busy.", code="generation_failed", after=3600.0)

    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit(job={"priority": "high"})
    executor: Executor
    _, executor = worker(Busy())
    ticket = await sql.fetchval("update procrastinate_jobs set status = 'doing' returning id")
    await executor.run(job_id, ticket)
    parked = await caller.http.get(f"/jobs/{job_id}")
    assert parked.json()["job"]["queue"] is None, "it waits for its time, not for a worker"
    await sql.execute("update job_due set not_before = now()")
    assert await database.value("wake_due", 10) == 1
    assert await sql.fetchval("select priority from procrastinate_jobs") == 10


def test_the_client_library_sends_what_the_tests_send() -> None:
    """The last key of the parametrized ones must reach the server as bytes that are not ASCII."""
    request = httpx.Request("GET", "http://x", headers=[(b"Idempotency-Key", "ü".encode())])
    assert (b"Idempotency-Key", "ü".encode()) in request.headers.raw
