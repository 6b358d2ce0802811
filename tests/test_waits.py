"""Requests wait for a job to change: no change is missed, and waiting costs nobody anything."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any

import asyncpg
import httpx
import pytest
from conftest import Caller
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request

from app import waits
from app.background import background
from app.db import Database
from app.main import POOL_SIZE
from app.queue import Bell
from app.settings import NO_LIMITS
from app.waits import Hub, Together, preferences, preferred

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
async def hub(api: Database, sql: asyncpg.Connection) -> AsyncIterator[Hub]:
    hub = Hub(api)
    async with background(hub.run()):
        async with asyncio.timeout(10):
            while not await listeners_of(sql):
                await asyncio.sleep(0.01)
        yield hub


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only notifications wake."""
    monkeypatch.setattr(waits, "LOOK_EVERY", 3600.0)


@pytest.fixture
def frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No need to wait for them."""
    monkeypatch.setattr(waits, "LOOK_EVERY", 0.05)


def test_a_revoked_key_is_noticed_in_time() -> None:
    assert waits.KEYS_EVERY <= 1  # and a statement; it has to be true within 2 s


@pytest.mark.parametrize("how", ["revoke_api_key(left($1, 11))", "revoke_user_keys($2)"])
async def test_whatever_a_revoked_key_holds_open_ends_and_what_others_hold_does_not(
    how: str, caller: Caller, stranger: Caller, sql: asyncpg.Connection, app: Starlette,
    no_looks: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(waits, "KEYS_EVERY", 0.05)  # from the second look on
    wait = {"Prefer": f"wait={LONG:.0f}"}
    job_id, theirs = await caller.submit(), await stranger.submit()
    held = [
        asyncio.create_task(caller.http.get(path, headers=headers))
        for path, headers in (
            (f"/jobs/{job_id}", wait),
            (f"/jobs?ids={job_id}", wait),
            (f"/jobs/{job_id}/events", {"Accept": "text/event-stream"}),
        )
    ]
    other = asyncio.create_task(stranger.http.get(f"/jobs/{theirs}", headers=wait))
    async with asyncio.timeout(10):
        while len(app.state.hub) < 4:
            await asyncio.sleep(0.01)
        user = await sql.fetchval("select user_id from jobs where id = $1", job_id)
        await sql.execute(f"select $1::text, $2::uuid, ops.{how}", caller.key, user)
        one, some, stream = await asyncio.gather(*held)
    assert [answer.status_code for answer in (one, some)] == [401, 401]
    unknown = await caller.http.get(f"/jobs/{job_id}")
    for answer in (one, some):
        assert answer.json()["error"] == unknown.json()["error"]
        assert answer.json()["code"] == unknown.json()["code"] == "unauthorized"
    assert stream.status_code == 200 and "job.pending" in stream.text
    assert not other.done()
    await finish(sql, theirs)
    await app.state.hub._look([theirs])
    assert (await other).json()["job"]["status"] == "failed"


async def listeners_of(sql: asyncpg.Connection) -> list[int]:
    """The server processes of the connections that listen."""
    rows = await sql.fetch(
        "select pid from pg_stat_activity where datname = current_database() "
        "and application_name = 'baton listen' and query ilike 'listen%'"
    )
    return [row["pid"] for row in rows]


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


@pytest.fixture
async def hub_of_api(caller: Caller, app: Starlette) -> Hub:
    """What the API of this test waits with."""
    await caller.http.get("/projects")  # it has started
    hub: Hub = app.state.hub
    return hub


async def waiting_in(hub: Hub, count: int) -> None:
    """Return when so many requests wait."""
    async with asyncio.timeout(10):
        while len(hub) != count:
            await asyncio.sleep(0.005)


async def wait(caller: Caller, path: str, seconds: float, etag: str = "") -> httpx.Response:
    """A read that waits."""
    headers = {"Prefer": f"wait={seconds:.0f}", **({"If-None-Match": etag} if etag else {})}
    return await caller.http.get(path, headers=headers, timeout=LONG)


async def ask(caller: Caller, prefer: str) -> httpx.Response:
    """A request for a handoff."""
    return await caller.http.post(
        "/handoffs",
        json={"project_id": caller.project_id},
        headers={"Prefer": prefer},
        timeout=LONG,
    )


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
        async with asyncio.timeout(10):
            while (
                len(listeners := await listeners_of(sql)) < 2
            ):  # the API of the caller has one too
                await asyncio.sleep(0.01)
        await sql.execute("select pg_terminate_backend(pid) from unnest($1::int[]) pid", listeners)
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
    assert hub.jobs == {}


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


# --- Over HTTP ------------------------------------------------------------------------------


async def test_a_read_that_waits_answers_when_the_job_has_ended(
    caller: Caller, drain: Callable[..., Awaitable[None]]
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    job_id = await caller.submit()
    reading = asyncio.create_task(wait(caller, f"/jobs/{job_id}", LONG))
    await drain()
    response = await reading
    assert response.status_code == 200
    assert response.json()["job"]["status"] == "completed"
    assert response.json() == await caller.job(job_id)
    assert response.headers["preference-applied"] == "wait=20"
    assert response.headers["vary"] == "Prefer, Authorization"
    assert "retry-after" not in response.headers


async def test_a_request_that_waits_answers_200_with_the_artifact(
    hub_of_api: Hub, caller: Caller, drain: Callable[..., Awaitable[None]]
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    asking = asyncio.create_task(ask(caller, "wait=20"))
    await waiting_in(hub_of_api, 1)
    await drain()
    response = await asking
    answer = response.json()
    assert (response.status_code, answer["status"]) == (200, "completed")
    assert answer["job"]["id"] == answer["jobId"]
    ended = await caller.job(answer["jobId"])
    assert {"job": answer["job"], "result": answer["result"]} == ended
    assert answer["urls"] == ended["job"]["urls"]
    assert response.headers["preference-applied"] == "wait=20"


async def test_a_request_whose_job_takes_longer_than_the_wait_is_answered_202(
    caller: Caller,
) -> None:
    told = {
        "wait=1": "wait=1",
        "respond-async, wait=1": "respond-async, wait=1",
        "respond-async": "respond-async",
        "wait=soon": None,
        "return=minimal": None,
    }
    answers = await asyncio.gather(*(ask(caller, prefer) for prefer in told))
    for response, applied in zip(answers, told.values(), strict=True):
        assert (response.status_code, response.json()["status"]) == (202, "pending")
        assert "result" not in response.json()
        assert response.headers.get("preference-applied") == applied
        assert response.headers["vary"] == "Prefer, Authorization"


async def test_with_an_etag_a_wait_ends_at_any_change_and_without_one_at_the_end(
    hub_of_api: Hub, caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    job_id = await caller.submit()
    path = f"/jobs/{job_id}"
    first = await caller.http.get(path)
    step = asyncio.create_task(wait(caller, path, LONG, first.headers["etag"]))
    last = asyncio.create_task(wait(caller, path, LONG))
    await waiting_in(hub_of_api, 2)
    await touch(sql, job_id)
    bell.announce(job_id)
    changed = await step
    assert (changed.status_code, changed.json()["job"]["status"]) == (200, "pending")
    assert changed.headers["etag"] != first.headers["etag"]
    assert not last.done()
    await finish(sql, job_id)
    bell.announce(job_id)
    assert (await last).json()["job"]["status"] == "failed"


async def test_304_is_only_for_who_said_what_it_has_and_only_when_nothing_changed(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    path = f"/jobs/{job_id}"
    etag = (await caller.http.get(path)).headers["etag"]
    unchanged, plain = await asyncio.gather(wait(caller, path, 1, etag), wait(caller, path, 1))
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == etag
    assert unchanged.headers["preference-applied"] == "wait=1"
    assert plain.status_code == 200
    assert (await wait(caller, path, LONG, '"another"')).status_code == 200  # at once
    await finish(sql, job_id)
    etag = (await caller.http.get(path)).headers["etag"]
    assert (await wait(caller, path, LONG, etag)).status_code == 304  # at once: it stays so


async def test_a_foreign_or_unknown_job_is_not_waited_for(caller: Caller, stranger: Caller) -> None:
    job_id = await caller.submit()
    for path in (f"/jobs/{job_id}", "/jobs/019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30", "/jobs/x"):
        assert (await wait(stranger, path, LONG)).status_code == 404
    assert (await wait(stranger, f"/jobs?ids={job_id}", LONG)).json()["jobs"] == []


async def test_a_job_that_is_deleted_meanwhile_is_gone(
    hub_of_api: Hub, caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    job_id = await caller.submit()
    reading = asyncio.create_task(wait(caller, f"/jobs/{job_id}", LONG))
    await waiting_in(hub_of_api, 1)
    async with sql.transaction():
        await finish(sql, job_id)
        await sql.execute("select delete_job($1, $2)", caller.user_id, job_id)
    bell.announce(job_id)
    assert (await reading).status_code == 410


async def test_a_wait_for_several_jobs_ends_at_the_first_change(
    hub_of_api: Hub, caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    ids = [await caller.submit() for _ in range(3)]
    path = "/jobs?ids=" + ",".join(ids)
    reading = asyncio.create_task(wait(caller, path, LONG))
    await waiting_in(hub_of_api, 1)
    await touch(sql, ids[1])
    bell.announce(ids[1])
    changed = await reading
    assert [job["id"] for job in changed.json()["jobs"]] == ids

    # One who says what it has is told of what happened before it came back.
    await finish(sql, ids[2])
    seen = await wait(caller, path, LONG, changed.headers["etag"])
    assert [job["done"] for job in seen.json()["jobs"]] == [False, False, True]
    # A job that has ended is news to one who does not say so, and no news to one who does.
    assert (await wait(caller, path, LONG)).json() == seen.json()
    reading = asyncio.create_task(wait(caller, path, LONG, seen.headers["etag"]))
    await waiting_in(hub_of_api, 1)
    await finish(sql, ids[0])
    bell.announce(ids[0])
    assert [job["done"] for job in (await reading).json()["jobs"]] == [True, False, True]
    assert (await wait(caller, path, 1, (await reading).headers["etag"])).status_code == 304


async def test_more_requests_wait_than_the_pool_has_connections_and_others_are_served(
    hub_of_api: Hub, caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    job_id = await caller.submit()
    waiting = [
        asyncio.create_task(wait(caller, f"/jobs/{job_id}", LONG)) for _ in range(POOL_SIZE + 5)
    ]
    await waiting_in(hub_of_api, POOL_SIZE + 5)
    assert (await caller.http.get("/projects")).status_code == 200
    await finish(sql, job_id)
    bell.announce(job_id)
    for response in await asyncio.gather(*waiting):
        assert response.json()["job"]["status"] == "failed"


async def test_a_client_that_goes_away_leaves_nothing_behind(
    hub_of_api: Hub, caller: Caller
) -> None:
    job_id = await caller.submit()
    gone = [
        asyncio.create_task(wait(caller, f"/jobs/{job_id}", LONG)),
        asyncio.create_task(ask(caller, "wait=20")),
        asyncio.create_task(
            caller.http.get(f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        ),
    ]
    await waiting_in(hub_of_api, 3)
    for task in gone:
        task.cancel()
    await waiting_in(hub_of_api, 0)
    assert hub_of_api.jobs == {}


async def test_a_process_that_stops_answers_those_who_wait_with_what_is_so_far(
    hub_of_api: Hub, app: Starlette, caller: Caller
) -> None:
    job_id = await caller.submit()
    etag = (await caller.http.get(f"/jobs/{job_id}")).headers["etag"]
    waiting = [
        asyncio.create_task(wait(caller, f"/jobs/{job_id}", LONG)),
        asyncio.create_task(wait(caller, f"/jobs/{job_id}", LONG, etag)),
        asyncio.create_task(ask(caller, "wait=20")),
        asyncio.create_task(
            caller.http.get(f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        ),
    ]
    await waiting_in(hub_of_api, 4)
    app.state.stopping.set()  # what SIGTERM does
    answers = await asyncio.gather(*waiting)
    assert [answer.status_code for answer in answers] == [200, 304, 202, 200]
    assert answers[0].json()["job"]["status"] == "pending"


# --- Many at once ---------------------------------------------------------------------------


async def test_reads_at_the_same_time_are_one_statement_and_none_joins_one_under_way() -> None:
    asked: list[list[str]] = []
    go = asyncio.Event()

    async def read(keys: Collection[str]) -> dict[str, int]:
        asked.append(sorted(keys))
        await go.wait()
        return {key: len(asked) for key in keys if key != "none"}

    together = Together(read)
    first = [asyncio.create_task(together.get(key)) for key in ("a", "b", "a", "none")]
    await asyncio.sleep(0.001)
    late = [asyncio.create_task(together.get("a")) for _ in range(3)]
    late[0].cancel()  # others want it still
    await asyncio.sleep(0.001)
    go.set()
    assert await asyncio.gather(*first) == [1, 1, 1, None]
    assert await asyncio.gather(*late[1:]) == [2, 2]
    assert asked == [["a", "b", "none"], ["a"]]


async def test_a_read_that_fails_fails_for_all_who_wanted_it_and_the_next_is_a_new_one() -> None:
    faults = [ZeroDivisionError()]

    async def read(keys: Collection[str]) -> dict[str, int]:
        if faults:
            raise faults.pop()
        return dict.fromkeys(keys, 1)

    together = Together(read)
    failed = await asyncio.gather(*(together.get("a") for _ in range(2)), return_exceptions=True)
    assert [type(each) for each in failed] == [ZeroDivisionError] * 2
    assert await together.get("a") == 1


async def test_waits_of_many_users_are_answered_each_with_its_own(
    hub_of_api: Hub, caller: Caller, stranger: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    owned = [(each, await each.submit()) for each in (caller, stranger, caller, stranger)]
    waiting = [asyncio.create_task(wait(each, f"/jobs/{job_id}", LONG)) for each, job_id in owned]
    await waiting_in(hub_of_api, 4)
    for _, job_id in owned:
        await finish(sql, job_id)
        bell.announce(job_id)
    for (_, job_id), response in zip(owned, await asyncio.gather(*waiting), strict=True):
        assert response.json()["job"]["id"] == job_id
        assert response.json()["job"]["done"]


# --- Slots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [replace(NO_LIMITS, waits=1)])
async def test_who_has_no_slot_left_is_refused_but_a_job_that_was_stored_is_answered(
    hub_of_api: Hub, caller: Caller, sql: asyncpg.Connection, bell: Bell
) -> None:
    job_id = await caller.submit()
    path = f"/jobs/{job_id}"
    holding = asyncio.create_task(wait(caller, path, LONG))
    await waiting_in(hub_of_api, 1)
    for refused in (
        await wait(caller, path, LONG),
        await wait(caller, f"/jobs?ids={job_id}", LONG),
        await caller.http.get(f"{path}/events", headers={"Accept": "text/event-stream"}),
    ):
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_waits")
    asked = await ask(caller, "wait=20")
    assert asked.status_code == 202
    assert "preference-applied" not in asked.headers
    # What does not really wait needs no slot.
    assert (await wait(caller, path, LONG, '"another"')).status_code == 200
    assert (await wait(caller, path, 0)).status_code == 200

    holding.cancel()  # the client goes away, and its slot is free
    await waiting_in(hub_of_api, 0)
    holding = asyncio.create_task(wait(caller, path, LONG))
    await waiting_in(hub_of_api, 1)
    await finish(sql, job_id)
    bell.announce(job_id)
    assert (await holding).status_code == 200


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
    request = Request({"type": "http", "headers": [(b"prefer", f'wait="{value}"'.encode())]})
    assert preferred(request).wait == seconds


@pytest.mark.parametrize(
    "hostile",
    ['"\\' * 8000, '"' * 16000, "=;" * 8000, 'a="' * 5000, " " * 16000]
    + [f"{start}{' ' * 16000}(" for start in ("a", "a=", "a=b", 'a=""', "a=b;")],
)
def test_a_hostile_prefer_costs_no_time(hostile: str) -> None:
    def seconds(value: str) -> float:
        started = time.perf_counter()
        preferences(Headers({"prefer": value}))
        return time.perf_counter() - started

    # Time that grew with the square of the length would be a thousand times as much.
    usual = max(seconds("a=b, " * 3200) for _ in range(3))
    assert any(seconds(hostile) < 50 * usual for _ in range(3))
