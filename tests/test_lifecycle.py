"""The life of a job, end to end: over HTTP, through the worker, and back."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import asyncpg
from conftest import Caller

Drain = Callable[..., Awaitable[None]]


async def test_a_handoff_is_made_of_the_events_that_were_sent(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    await caller.ingest(
        {"title": "feat(cache): switch to an LRU", "content": "We decided to drop the TTL map."}
    )
    job_id = await caller.submit()
    assert (await caller.job(job_id))["job"]["status"] == "pending"

    await drain()

    ended = await caller.job(job_id)
    assert ended["job"]["status"] == "completed"
    assert ended["job"]["result_kind"] == "handoff"
    assert ended["result"]["id"] == ended["job"]["result_id"]
    assert "LRU" in ended["result"]["markdown"]
    assert any("drop the TTL map" in line for line in ended["result"]["decisions"])
    [event] = (await caller.http.get("/events")).json()["events"]
    assert ended["result"]["related_event_ids"] == [event["id"]]
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sql.fetchval("select count(*) from leases") == 0
    assert await sql.fetchval("select sum(credits) from charges") == 1


async def test_an_empty_project_fails_with_no_result_and_says_why(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    await drain()
    ended = await caller.job(job_id)
    assert ended["result"] is None
    assert ended["job"]["status"] == "failed"
    assert ended["job"]["error_code"] == "no_result"
    assert ended["job"]["error"].startswith("There were no events in scope")
    assert await sql.fetchval("select count(*) from charges") == 0


async def test_an_empty_period_says_when_something_last_happened(
    caller: Caller, drain: Drain
) -> None:
    await caller.ingest({"title": "Old", "occurred_at": "2026-01-02T03:04:05Z"})
    job_id = await caller.submit()
    await drain()
    assert "2026-01-02 03:04 UTC" in (await caller.job(job_id))["job"]["error"]


async def test_until_moves_the_end_of_the_period_into_the_past(
    caller: Caller, drain: Drain
) -> None:
    await caller.ingest(
        {"title": "feat: inside", "occurred_at": "2026-01-02T03:04:05Z"},
        {"title": "feat: after it", "occurred_at": "2026-01-04T00:00:00Z"},
    )
    job_id = await caller.submit(until="2026-01-03T00:00:00Z")
    await drain()
    result = (await caller.job(job_id))["result"]
    assert "inside" in result["markdown"].lower()
    assert "after it" not in result["markdown"].lower()
    assert result["period_end"] == "2026-01-03T00:00:00Z"


async def test_a_handoff_begins_where_the_previous_one_of_the_same_scope_ended(
    caller: Caller, drain: Drain
) -> None:
    now = datetime.now(UTC)
    await caller.ingest(
        {"title": "feat: one", "occurred_at": (now - timedelta(days=6)).isoformat()}
    )
    earlier = now - timedelta(days=5)
    await caller.submit(until=earlier.isoformat())
    await drain()
    await caller.ingest(
        {"title": "feat: two", "occurred_at": (now - timedelta(days=1)).isoformat()}
    )
    same, other = await caller.submit(), await caller.submit(sources=["github"])
    await drain()
    result = (await caller.job(same))["result"]
    assert datetime.fromisoformat(result["period_start"]) == earlier
    other_start = datetime.fromisoformat((await caller.job(other))["result"]["period_start"])
    assert now - other_start > timedelta(days=13)


async def test_an_artifact_says_when_older_events_did_not_fit(caller: Caller, drain: Drain) -> None:
    files = {"metadata": {"files": ["app/cache.py"]}, "author": "Ada"}
    titles = ("Add a cache", "Fix the eviction of the cache", "Speed up the cache")
    await caller.ingest(*({"title": title, **files} for title in titles))
    path = f"/projects/{caller.project_id}/insights/onboarding"
    cut, whole = await caller.submit(path, maxEvents=2), await caller.submit(path, maxEvents=3)
    await drain()
    left_out = "older ones in the period were left out"
    assert left_out in (await caller.job(cut))["result"]["markdown"]
    assert left_out not in (await caller.job(whole))["result"]["markdown"]
