"""The log of a job: complete, in order, the same for those who ask and those who follow."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from conftest import Caller
from starlette.applications import Starlette
from starlette.types import Message

from app import stream
from app.queue import Bell

SSE = {"Accept": "text/event-stream"}
Drain = Callable[..., Awaitable[None]]


class Followed:
    """A stream as a browser reads it."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.retry: int | None = None
        self.comments: list[str] = []
        self._lines = response.aiter_lines()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """The events, each with the id and the name that the stream gave it."""
        fields: dict[str, str] = {}
        async for line in self._lines:
            name, _, value = line.partition(": ")
            match name:
                case "retry":
                    self.retry = int(value)
                case "" if value:
                    self.comments.append(value)
                case "" if fields:
                    data = json.loads(fields["data"])
                    yield {"id": int(fields["id"]), "event": fields["event"], **data}
                    fields = {}
                case "":
                    pass
                case _:
                    fields[name] = value

    async def all(self) -> list[dict[str, Any]]:
        """Everything until the end of the stream."""
        return [event async for event in self]

    async def first(self, count: int) -> list[dict[str, Any]]:
        """So many events."""
        events = []
        async for event in self:
            events.append(event)
            if len(events) == count:
                break
        return events


@asynccontextmanager
async def follow(caller: Caller, job_id: str, **headers: str) -> AsyncIterator[Followed]:
    """Open the stream of a job."""
    async with (
        asyncio.timeout(20),
        caller.http.stream("GET", f"/jobs/{job_id}/events", headers={**SSE, **headers}) as answer,
    ):
        yield Followed(answer)


async def log_of(caller: Caller, job_id: str, after: int | None = None) -> dict[str, Any]:
    """The log as JSON."""
    params = {} if after is None else {"after": after}
    response = await caller.http.get(f"/jobs/{job_id}/events", params=params)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def change(sql: asyncpg.Connection, job_id: str, times: int = 1) -> None:
    """As many changes, one after the other."""
    for _ in range(times):
        await sql.execute("update jobs set rev = rev + 1 where id = $1", job_id)


async def end(sql: asyncpg.Connection, job_id: str) -> None:
    """The end, as a client sees it."""
    await sql.execute(
        "update jobs set status = 'failed', outcome = 'failed', error = 'E', rev = rev + 1, "
        "error_code = 'no_result', completed_at = now() where id = $1",
        job_id,
    )


# --- The log --------------------------------------------------------------------------------


async def test_the_log_tells_the_course_of_a_job_from_the_first_to_the_last_change(
    caller: Caller, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    job_id = await caller.submit()
    assert (await log_of(caller, job_id))["done"] is False
    await drain()
    log = await log_of(caller, job_id)
    assert log["done"] is True
    assert [e["type"] for e in log["events"]] == ["job.pending", "job.processing", "job.completed"]
    assert [e["seq"] for e in log["events"]] == [1, 2, 3]
    last = log["events"][-1]
    assert last["data"] == {
        "status": "completed",
        "attempt": 1,
        "outcome": "succeeded",
        "error": None,
        "error_code": None,
        "progress": None,
    }
    assert last["at"] == (await caller.job(job_id))["job"]["updated_at"]


async def test_the_log_names_the_cause_of_a_failure(caller: Caller, drain: Drain) -> None:
    job_id = await caller.submit()
    await drain()
    last = (await log_of(caller, job_id))["events"][-1]
    assert last["type"] == "job.failed"
    assert last["data"]["error_code"] == "no_result"
    assert last["data"]["error"].startswith("There were no events in scope")


async def test_a_change_that_is_rolled_back_or_that_no_client_can_see_is_not_in_the_log(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    with pytest.raises(ZeroDivisionError):
        async with sql.transaction():
            await change(sql, job_id)
            raise ZeroDivisionError
    await sql.execute("update jobs set ticket_id = 7 where id = $1", job_id)
    assert [e["seq"] for e in (await log_of(caller, job_id))["events"]] == [1]


async def test_what_changes_after_the_end_is_not_in_the_log(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    await end(sql, job_id)
    await change(sql, job_id)
    log = await log_of(caller, job_id)
    assert [e["type"] for e in log["events"]] == ["job.pending", "job.failed"]
    assert log["done"]


async def test_the_log_goes_with_its_job(caller: Caller, sql: asyncpg.Connection) -> None:
    job_id = await caller.submit()
    await sql.execute("delete from jobs where id = $1", job_id)
    assert await sql.fetchval("select count(*) from job_events") == 0


async def test_reading_after_a_seq_answers_the_rest_and_reading_on_answers_everything_once(
    caller: Caller, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PAGE", 4)
    job_id = await caller.submit()
    await change(sql, job_id, 8)
    await end(sql, job_id)
    seen: list[int] = []
    done = False
    while not done:
        page = await log_of(caller, job_id, after=seen[-1] if seen else None)
        assert 0 < len(page["events"]) <= 4
        seen += [e["seq"] for e in page["events"]]
        done = page["done"]
    assert seen == list(range(1, 11))
    assert await log_of(caller, job_id, after=10) == {"events": [], "done": True}
    assert await log_of(caller, job_id, after=10**14) == {"events": [], "done": True}


async def test_the_log_of_a_foreign_job_is_not_found(caller: Caller, stranger: Caller) -> None:
    job_id = await caller.submit()
    unknown = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
    for path, headers in itertools.product((job_id, unknown, "x"), ({}, SSE)):
        response = await stranger.http.get(f"/jobs/{path}/events", headers=headers)
        assert response.status_code == 404
        assert response.json()["error"] == "job_id: no job with this id is visible to this key."


async def test_a_wrong_after_is_refused_by_name(caller: Caller) -> None:
    path = f"/jobs/{await caller.submit()}/events"
    for wrong in ("-1", "x", "1.5", "1" * 16):
        response = await caller.http.get(path, params={"after": wrong})
        assert response.status_code == 400
        assert response.json()["error"].startswith("after: ")
        for accept in (SSE, {}):
            headers = {**accept, "Last-Event-ID": wrong}
            response = await caller.http.get(path, headers=headers)
            assert response.status_code == 400
            assert response.json()["error"].startswith("Last-Event-ID: ")


# --- The stream -----------------------------------------------------------------------------


async def test_a_stream_tells_each_change_as_it_happens_and_ends_with_the_job(
    caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    job_id = await caller.submit()
    async with follow(caller, job_id) as followed:
        headers = followed.response.headers
        assert headers["content-type"].startswith("text/event-stream")
        assert headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no"
        assert headers["vary"] == "Accept, Authorization"
        events = aiter(followed)
        assert (await anext(events))["event"] == "job.pending"
        assert followed.retry == 2000
        await change(sql, job_id)
        bell.announce(job_id)
        assert (await anext(events))["event"] == "job.progress"
        await end(sql, job_id)
        bell.announce(job_id)
        assert (await anext(events))["event"] == "job.failed"
        assert [event async for event in events] == []


async def test_a_stream_and_a_read_tell_the_same(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    job_id = await caller.submit()
    async with follow(caller, job_id) as followed:
        await drain()
        told = await followed.all()
    assert [(e.pop("id"), e.pop("event")) for e in told] == [(e["seq"], e["type"]) for e in told]
    assert told == (await log_of(caller, job_id))["events"]


async def test_who_comes_back_gets_what_was_missed_from_any_id_on(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    await change(sql, job_id, 3)
    await end(sql, job_id)
    for last in range(5):
        async with follow(caller, job_id, **{"Last-Event-ID": str(last)}) as followed:
            assert [e["id"] for e in await followed.all()] == list(range(last + 1, 6))


async def test_the_header_wins_over_the_query_because_a_browser_repeats_the_url(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    await change(sql, job_id, 3)
    await end(sql, job_id)
    path = f"/jobs/{job_id}/events?after=1"
    response = await caller.http.get(path, headers={**SSE, "Last-Event-ID": "3"})
    assert [line for line in response.text.splitlines() if line.startswith("id:")] == [
        "id: 4",
        "id: 5",
    ]


async def test_nothing_is_lost_or_told_twice_over_many_reconnects_while_the_job_changes(
    caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    job_id = await caller.submit()

    async def work() -> None:
        for _ in range(40):
            await change(sql, job_id)
            bell.announce(job_id)
        await end(sql, job_id)
        bell.announce(job_id)

    working = asyncio.create_task(work())
    seen: list[int] = []
    while not seen or seen[-1] < 42:
        async with follow(caller, job_id, **{"Last-Event-ID": str(max(seen, default=0))}) as told:
            seen += [e["id"] for e in await told.first(4)]
    await working
    assert seen == list(range(1, 43))


async def test_a_browser_that_comes_back_after_the_end_is_told_to_stay_away(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    await end(sql, job_id)
    response = await caller.http.get(
        f"/jobs/{job_id}/events", headers={**SSE, "Last-Event-ID": "2"}
    )
    assert (response.status_code, response.content) == (204, b"")


async def test_a_silent_stream_is_kept_alive(
    caller: Caller, sql: asyncpg.Connection, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE", 0.01)
    job_id = await caller.submit()
    async with follow(caller, job_id) as followed:
        reading = asyncio.create_task(followed.all())
        while len(followed.comments) < 3:
            await asyncio.sleep(0.01)
        await end(sql, job_id)
        bell.announce(job_id)
        assert [e["event"] for e in await reading] == ["job.pending", "job.failed"]
    assert set(followed.comments) == {"ka"}


async def test_a_reader_that_takes_nothing_is_cut_off_and_nothing_of_it_is_left(
    caller: Caller,
    app: Starlette,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stream, "SEND_TIMEOUT", 0.05)
    path = f"/api/v1/jobs/{await caller.submit()}/events"
    never = asyncio.Event()

    async def receive() -> Message:
        await never.wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await never.wait()  # its buffers are full

    headers = [
        (b"authorization", f"Bearer {caller.key}".encode()),
        (b"accept", b"text/event-stream"),
    ]
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()}
    async with asyncio.timeout(10):
        # It returns in the middle of the answer, so the server closes the connection.
        await app({**scope, "query_string": b"", "headers": headers}, receive, send)
    assert app.state.hub.jobs == {}
    [line] = [vars(r) for r in caplog.records if r.getMessage() == "answer cut off"]
    assert line["trace"].startswith("TimeoutError") and not line["exc_info"]


async def test_the_client_says_which_form_it_wants(caller: Caller, sql: asyncpg.Connection) -> None:
    job_id = await caller.submit()
    await end(sql, job_id)
    for accept, form in {
        "text/event-stream": "text/event-stream",
        "Text/Event-Stream; q=0.9, */*": "text/event-stream",
        "text/event-stream, application/json": "text/event-stream",
        "application/json, text/event-stream": "application/json",
        "*/*": "application/json",
        "text/html": "application/json",
    }.items():
        response = await caller.http.get(f"/jobs/{job_id}/events", headers={"Accept": accept})
        assert response.headers["content-type"].startswith(form), accept


async def test_only_asking_for_the_head_of_a_stream_ends_at_once(caller: Caller) -> None:
    job_id = await caller.submit()
    response = await caller.http.head(f"/jobs/{job_id}/events", headers=SSE)
    assert response.status_code == 200
