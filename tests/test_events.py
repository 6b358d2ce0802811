"""Activity in, and out again: whole batches, each external id once, newest first."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import pytest
from conftest import Caller

EVENT = {"source": "github", "event_type": "push", "title": "t"}
FULL = {
    "source": "linear",
    "event_type": "issue.updated",
    "title": "ENG-4: a title – with ünïcode 🚀",
    "content": "First line.\n\tSecond \u2028 line.",
    "external_id": "eng-4/7",
    "resource": "ENG",
    "branch": "main",
    "priority": "2",
    "author": "Ada",
    "url": "https://linear.app/acme/issue/ENG-4",
    "metadata": {"a": [1, 2.5, None, True, {"b": "c"}], "": "", "n": None, "big": 2**60},
    "occurred_at": "2026-03-01T12:30:00.123456+02:00",
}
FIELDS = {
    *("id", "user_id", "project_id", "source", "event_type", "title", "content", "external_id"),
    *("resource", "branch", "priority", "author", "url", "metadata", "occurred_at", "created_at"),
}


async def listed(caller: Caller, query: str = "") -> list[dict[str, Any]]:
    response = await caller.http.get(f"/events{query}")
    assert response.status_code == 200, response.text
    return list(response.json()["events"])


async def test_an_event_comes_back_as_it_was_sent(caller: Caller) -> None:
    assert await caller.ingest(FULL) == {"accepted": 1, "duplicates": 0}
    [event] = await listed(caller)
    assert set(event) == FIELDS
    assert {name: event[name] for name in FULL} == FULL | {
        "occurred_at": "2026-03-01T10:30:00.123456Z"
    }
    assert (event["user_id"], event["project_id"]) == (caller.user_id, caller.project_id)
    assert event["created_at"].endswith("Z")
    age = datetime.now(UTC) - datetime.fromisoformat(event["created_at"])
    assert abs(age) < timedelta(minutes=1)


async def test_what_an_event_does_not_say_is_null_and_happened_now(caller: Caller) -> None:
    await caller.ingest(EVENT)
    [event] = await listed(caller)
    assert event["occurred_at"] == event["created_at"]
    assert event["metadata"] == {}
    absent = ("content", "external_id", "resource", "branch", "priority", "author", "url")
    assert {name: event[name] for name in absent} == dict.fromkeys(absent)


async def test_the_longest_texts_and_smallest_batches_are_taken(caller: Caller) -> None:
    line = "🚀" * 300
    names = ("event_type", "external_id", "resource", "branch", "priority", "author")
    longest = {
        **EVENT,
        **dict.fromkeys(names, line),
        "title": "🚀" * 1000,
        "content": "x" * 100_000,
    }
    assert await caller.ingest(longest) == {"accepted": 1, "duplicates": 0}
    [event] = await listed(caller)
    assert {name: event[name] for name in longest} == longest


async def test_an_external_id_is_stored_once_within_and_across_batches(caller: Caller) -> None:
    one, two = ({**EVENT, "external_id": e} for e in ("1", "2"))
    assert await caller.ingest(one, two, one) == {"accepted": 2, "duplicates": 1}
    changed = {**one, "title": "another title"}
    assert await caller.ingest(changed, {**EVENT, "external_id": "3"}) == {
        "accepted": 1,
        "duplicates": 1,
    }
    events = await listed(caller)
    assert sorted(e["external_id"] for e in events) == ["1", "2", "3"]
    assert {e["title"] for e in events} == {"t"}


async def test_the_same_external_id_of_another_source_is_another_event(caller: Caller) -> None:
    batch = [{**EVENT, "external_id": "1", "source": s} for s in ("github", "gitlab", "slack")]
    assert await caller.ingest(*batch) == {"accepted": 3, "duplicates": 0}


async def test_events_without_an_external_id_are_never_duplicates(caller: Caller) -> None:
    assert await caller.ingest(EVENT, EVENT) == {"accepted": 2, "duplicates": 0}
    assert await caller.ingest({**EVENT, "external_id": None}) == {"accepted": 1, "duplicates": 0}


async def test_identical_batches_at_once_are_stored_once_and_none_fails(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    batch = [
        {**EVENT, "external_id": f"{n}", "resource": f"r{n % 7}", "branch": f"b{n % 5}"}
        for n in range(200)
    ]
    answers = await asyncio.gather(
        *(caller.ingest(*(batch if n % 2 else reversed(batch))) for n in range(10))
    )
    assert sum(a["accepted"] for a in answers) == 200
    assert all(a["accepted"] + a["duplicates"] == 200 for a in answers)
    assert await sql.fetchval("select count(*) from events") == 200


async def test_one_bad_event_refuses_the_whole_batch(caller: Caller) -> None:
    events = [EVENT, {**EVENT, "source": "myspace"}]
    body = {"project_id": caller.project_id, "events": events}
    response = await caller.http.post("/events", json=body)
    assert response.status_code == 400
    assert response.json()["error"].startswith("events[1].source: ")
    assert await listed(caller) == []


async def test_a_batch_may_hold_a_thousand_events(caller: Caller) -> None:
    batch = [{**EVENT, "external_id": str(n)} for n in range(1000)]
    assert await caller.ingest(*batch) == {"accepted": 1000, "duplicates": 0}


async def test_the_list_is_newest_first_by_when_it_happened(caller: Caller) -> None:
    days = (3, 1, 28, 2, 15)
    await caller.ingest(
        *({**EVENT, "title": str(d), "occurred_at": f"2026-02-{d:02}T00:00:00Z"} for d in days)
    )
    assert [e["title"] for e in await listed(caller)] == ["28", "15", "3", "2", "1"]
    assert [e["title"] for e in await listed(caller, "?limit=2")] == ["28", "15"]


async def test_the_list_has_twenty_events_unless_told_and_never_over_a_hundred(
    caller: Caller,
) -> None:
    await caller.ingest(*[EVENT] * 120)
    assert len(await listed(caller)) == 20
    assert len(await listed(caller, "?limit=100")) == 100
    assert len(await listed(caller, "?limit=1")) == 1


async def test_the_list_is_narrowed_by_source_and_project(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    other = str(await sql.fetchval("select ops.create_project('two', $1)", caller.user_id))
    await caller.ingest({**EVENT, "title": "a"}, {**EVENT, "title": "b", "source": "slack"})
    body = {"project_id": other, "events": [{**EVENT, "title": "c"}]}
    assert (await caller.http.post("/events", json=body)).status_code == 200

    async def titles(query: str) -> list[str]:
        return sorted(e["title"] for e in await listed(caller, query))

    assert await titles("") == ["a", "b", "c"]
    assert await titles("?source=slack") == ["b"]
    assert await titles("?source=github") == ["a", "c"]
    assert await titles(f"?project_id={other}") == ["c"]
    assert await titles(f"?project_id={other}&source=slack") == []
    assert await titles("?source=jira") == []  # known, and silent


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \n"])
async def test_lines_are_the_same_as_a_batch(caller: Caller, end: bytes) -> None:
    second = {**EVENT, "external_id": "2"}
    lines = end.join([orjson.dumps(FULL), orjson.dumps(second)]) + end
    response = await caller.http.post(
        f"/events?project_id={caller.project_id}",
        content=lines,
        headers={"Content-Type": "application/x-ndjson; charset=utf-8"},
    )
    assert response.json() == {"accepted": 2, "duplicates": 0}
    assert await caller.ingest(FULL, second) == {"accepted": 0, "duplicates": 2}
    [stored] = await listed(caller, "?source=linear")
    assert {name: stored[name] for name in FULL} == FULL | {
        "occurred_at": "2026-03-01T10:30:00.123456Z"
    }


async def test_lines_may_name_their_project_themselves(caller: Caller) -> None:
    line = orjson.dumps({**EVENT, "project_id": caller.project_id})
    headers = {"Content-Type": "application/x-ndjson"}
    response = await caller.http.post("/events", content=line + b"\n" + line, headers=headers)
    assert response.json() == {"accepted": 2, "duplicates": 0}


async def test_what_is_stored_is_what_an_artifact_is_made_of(
    caller: Caller, drain: Callable[..., Awaitable[None]]
) -> None:
    await caller.ingest({**EVENT, "title": "feat: a thing", "metadata": {"merge": False}})
    job_id = await caller.submit()
    await drain()
    [event] = await listed(caller)
    assert (await caller.job(job_id))["result"]["related_event_ids"] == [event["id"]]
