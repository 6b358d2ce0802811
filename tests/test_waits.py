"""Requests wait for a job to change: no change is missed, and waiting costs nobody anything."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from conftest import Caller
from starlette.datastructures import Headers
from starlette.requests import Request

from app import waits
from app.background import background
from app.db import Database
from app.queue import Bell
from app.waits import Hub, preferences, seconds_to_wait

LONG = 20.0  # seconds; a wait that nothing ends would fail its test


class Client:
    """The one behind a request: still there, until it leaves."""

    def __init__(self) -> None:
        self._left = asyncio.Event()
        self.request = Request({"type": "http"}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._left.set()


@pytest.fixture
async def hub(database: Database, sql: asyncpg.Connection) -> AsyncIterator[Hub]:
    hub = Hub(database)
    async with background(hub.run()):
        await listener_of(sql)
        yield hub


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only notifications wake."""
    monkeypatch.setattr(waits, "LOOK_EVERY", 3600.0)


@pytest.fixture
def frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No need to wait for them."""
    monkeypatch.setattr(waits, "LOOK_EVERY", 0.05)


async def listener_of(sql: asyncpg.Connection) -> int:
    """The server process of the connection that listens, as soon as it does."""
    async with asyncio.timeout(10):
        while True:
            pid: int | None = await sql.fetchval(
                "select pid from pg_stat_activity where datname = current_database() "
                "and application_name = 'baton listen' and query ilike 'listen%'"
            )
            if pid is not None:
                return pid


async def finish(sql: asyncpg.Connection, job_id: str) -> None:
    """What a worker does in the end, as far as a waiter can see."""
    await sql.execute(
        "update jobs set status = 'failed', outcome = 'failed', error = 'E', rev = rev + 1, "
        "error_code = 'no_result', completed_at = now() where id = $1",
        job_id,
    )


async def touch(sql: asyncpg.Connection, job_id: str) -> None:
    """A change that is not the end."""
    await sql.execute("update jobs set rev = rev + 1 where id = $1", job_id)


# --- What wakes -----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_looks")
async def test_an_announced_change_wakes_the_one_who_waits_for_it_and_nobody_else(
    hub: Hub, bell: Bell, caller: Caller, sql: asyncpg.Connection
) -> None:
    mine, other = await caller.submit(), await caller.submit()
    with (
        hub.watching(Client().request, [mine]) as watch,
        hub.watching(Client().request, [other]) as idle,
    ):
        waiting = asyncio.create_task(watch.changed({mine: 1}, LONG))
        idling = asyncio.create_task(idle.changed({other: 1}, LONG))
        await touch(sql, mine)
        bell.announce(mine)
        assert await waiting
        assert not idling.done()
        idling.cancel()


@pytest.mark.usefixtures("no_looks")
async def test_one_who_waits_for_the_end_sleeps_through_other_changes(
    hub: Hub, bell: Bell, caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    with (
        hub.watching(Client().request, [job_id]) as end,
        hub.watching(Client().request, [job_id]) as step,
    ):
        ending = asyncio.create_task(end.changed({job_id: 1}, LONG, ended=True))
        await touch(sql, job_id)
        bell.announce(job_id)
        assert await step.changed({job_id: 1}, LONG)
        assert not ending.done()
        await finish(sql, job_id)
        bell.announce(job_id)
        assert await ending


@pytest.mark.usefixtures("no_looks")
async def test_a_job_that_ends_between_the_registration_and_the_wait_is_not_missed(
    hub: Hub, bell: Bell, caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        seen = {job_id: 1}
        await finish(sql, job_id)
        bell.announce(job_id)
        with hub.watching(Client().request, [job_id]) as other:
            assert await other.changed(seen, LONG)  # the hub has read the change
        assert await watch.changed(seen, LONG, ended=True)


@pytest.mark.usefixtures("no_looks")
async def test_any_of_several_jobs_wakes(
    hub: Hub, bell: Bell, caller: Caller, sql: asyncpg.Connection
) -> None:
    ids = [await caller.submit() for _ in range(3)]
    with hub.watching(Client().request, ids) as watch:
        await finish(sql, ids[2])
        bell.announce(ids[2])
        assert await watch.changed(dict.fromkeys(ids, 1), LONG, ended=True)


@pytest.mark.usefixtures("frequent_looks")
async def test_a_change_that_nobody_announced_is_found(
    hub: Hub, caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        await finish(sql, job_id)
        assert await watch.changed({job_id: 1}, LONG, ended=True)


@pytest.mark.usefixtures("frequent_looks")
async def test_a_job_that_is_gone_wakes(hub: Hub, caller: Caller, sql: asyncpg.Connection) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        await sql.execute("delete from jobs where id = $1", job_id)
        assert await watch.changed({job_id: 1}, LONG, ended=True)


@pytest.mark.usefixtures("no_looks")
async def test_what_was_announced_while_the_listener_was_away_is_found_when_it_is_back(
    hub: Hub, caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        waiting = asyncio.create_task(watch.changed({job_id: 1}, LONG))
        await touch(sql, job_id)  # nobody announces it
        await sql.execute("select pg_terminate_backend($1)", await listener_of(sql))
        assert await waiting


@pytest.mark.usefixtures("no_looks")
async def test_a_change_is_announced_by_the_worker_that_makes_it(
    hub: Hub, caller: Caller, drain: Callable[..., Awaitable[None]]
) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        waiting = asyncio.create_task(watch.changed({job_id: 1}, LONG, ended=True))
        await drain()
        assert await waiting


# --- What ends a wait -----------------------------------------------------------------------


async def test_a_wait_ends_when_its_time_is_over(hub: Hub, caller: Caller) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        assert not await watch.changed({job_id: 1}, 0.01)
        assert watch.alive


async def test_a_wait_ends_when_the_client_goes_away_and_nothing_of_it_is_left(
    hub: Hub, caller: Caller
) -> None:
    client, job_id = Client(), await caller.submit()
    with hub.watching(client.request, [job_id]) as watch:
        waiting = asyncio.create_task(watch.changed({job_id: 1}, LONG))
        client.leave()
        assert not await waiting
        assert not watch.alive
        assert len(hub) == 1
    assert len(hub) == 0


async def test_a_wait_ends_when_the_process_stops_and_no_new_one_begins(
    hub: Hub, caller: Caller
) -> None:
    job_id = await caller.submit()
    with hub.watching(Client().request, [job_id]) as watch:
        waiting = asyncio.create_task(watch.changed({job_id: 1}, LONG))
        await asyncio.sleep(0)  # it waits
        hub.stop()
        assert not await waiting
        assert not await watch.changed({job_id: 1}, LONG)


# --- Prefer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "understood"),
    [
        ([], {}),
        (["wait=10"], {"wait": "10"}),
        (["respond-async, wait=10"], {"respond-async": "", "wait": "10"}),
        (["Respond-Async", "WAIT = 10"], {"respond-async": "", "wait": "10"}),
        (["wait=1, wait=2", "wait=3"], {"wait": "1"}),
        (['wait="10"; strict; x="a,b", b'], {"wait": "10", "b": ""}),
        (['a="x, wait=9", wait=1'], {"a": "x, wait=9", "wait": "1"}),
        (['a="say \\"hi\\"", b'], {"a": 'say "hi"', "b": ""}),
        (['a="never closed, wait=9'], {}),
        ([", ,wait=5,,"], {"wait": "5"}),
        (["wait=, b="], {"wait": "", "b": ""}),
        (["@, wait wait, wait=4"], {"wait": "4"}),
    ],
)
def test_preferences_are_read_as_rfc_7240_says(sent: list[str], understood: dict[str, str]) -> None:
    headers = Headers(raw=[(b"prefer", value.encode()) for value in sent])
    assert preferences(headers) == understood


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *[("0", 0), ("1", 1), ("25", 25), ("26", 25), ("007", 7), ("9" * 9000, 25), ("000", 0)],
        *[(bad, None) for bad in ("", "-1", "1.5", "ten", "1e1", " 5", "٣")],
    ],
)
def test_a_wait_is_a_number_of_seconds_of_at_most_25(value: str, seconds: int | None) -> None:
    assert seconds_to_wait({"wait": value}) == seconds
    assert seconds_to_wait({}) is None


def test_a_hostile_prefer_costs_no_time() -> None:
    for hostile in ('"\\' * 8000, '"' * 16000, "=;" * 8000, 'a="' * 5000, " " * 16000):
        preferences(Headers({"prefer": hostile}))
