"""Limits: exact over processes and keys, honest about when to come back, free when not used."""

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import asyncpg
import httpx
import pytest
from conftest import Caller
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from test_auth import new_key
from test_error_shape import UNKNOWN, serving

from app import client
from app.auth import authenticate
from app.db import Database
from app.limits import WaitSlots, wait_slot, wait_slots
from app.settings import NO_LIMITS, Limits
from app.wire import json_response

FEW = Limits(default=3, poll=2, generate=2, waits=2)


@pytest.fixture
def limits() -> Limits:
    return FEW


@pytest.fixture
async def user_id(sql: asyncpg.Connection) -> str:
    return str(await sql.fetchval("select ops.create_user('eve@example.com')"))


async def digest_of_new_key(sql: asyncpg.Connection, user_id: str) -> bytes:
    key = await sql.fetchval("select ops.create_api_key($1)", user_id)
    return hashlib.sha256(key.encode()).digest()


@pytest.fixture
async def digest(sql: asyncpg.Connection, user_id: str) -> bytes:
    """What the database knows of a key."""
    return await digest_of_new_key(sql, user_id)


async def admit(sql: Any, digest: bytes, policies: list[str], quotas: list[int]) -> asyncpg.Record:
    """One request, as the database sees it."""
    row: asyncpg.Record = await sql.fetchrow(
        "select * from admit($1, $2, $3)", digest, policies, quotas
    )
    return row


async def move_clock(sql: asyncpg.Connection, seconds: float, *apps: Starlette) -> None:
    """Set the database's clock ahead for all new connections, and let pools have new ones."""
    name = await sql.fetchval("select current_database()")
    await sql.execute(f"alter database {name} set baton.clock_offset = '{seconds} seconds'")
    for app in apps:
        await app.state.database.pool.expire_connections()


async def burst(urls: list[str], key: str, count: int, path: str = "/projects") -> list[int]:
    """The statuses of so many requests, spread over the servers, eight at once on each."""
    limits = httpx.Limits(max_connections=8 * len(urls))
    async with httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=30, limits=limits
    ) as http:
        answers = await asyncio.gather(
            *(http.get(f"{urls[n % len(urls)]}/api/v1{path}") for n in range(count))
        )
    return [answer.status_code for answer in answers]


# --- Exact -----------------------------------------------------------------------------------


async def test_three_processes_together_admit_the_quota_in_any_minute(
    dsn: str, caller: Caller, sql: asyncpg.Connection
) -> None:
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(serving(dsn, Limits(default=60))) for _ in range(3)
        ]
        urls, apps = [url for url, _ in servers], [app for _, app in servers]
        assert await burst(urls, caller.key, 30) == [200] * 30
        await move_clock(sql, 30, *apps)
        assert sorted(await burst(urls, caller.key, 60)) == [200] * 30 + [429] * 30
        await move_clock(sql, 45, *apps)  # real time passes too, on a busy machine seconds of it
        assert await burst(urls, caller.key, 9) == [429] * 9
        await move_clock(sql, 75, *apps)  # the first thirty are a minute old, the others are not
        assert sorted(await burst(urls, caller.key, 60)) == [200] * 30 + [429] * 30
        await move_clock(sql, 200, *apps)
        assert sorted(await burst(urls, caller.key, 90)) == [200] * 60 + [429] * 30


async def test_a_hundred_callers_at_once_get_exactly_the_quota(
    dsn: str, sql: asyncpg.Connection, user_id: str
) -> None:
    digests = [await digest_of_new_key(sql, user_id) for _ in range(2)]
    async with asyncpg.create_pool(dsn, min_size=25, max_size=25) as pool:
        answers = await asyncio.gather(
            *(admit(pool, digests[n % 2], ["default", "generate"], [60, 50]) for n in range(100))
        )
    assert sum(a["refused"] == [] for a in answers) == 50
    assert sorted(a["remaining"][1] for a in answers if not a["refused"]) == list(range(50))
    rows = await sql.fetch("select policy, totals[cardinality(totals)] as n from rate_windows")
    assert sum(row["n"] for row in rows if row["policy"] == "default") == 50


async def test_no_window_of_a_minute_holds_more_than_the_quota_and_retry_after_is_true(
    sql: asyncpg.Connection, digest: bytes
) -> None:
    """Against a log of every admitted request, with a clock that jumps at random."""
    chance = random.Random(7)
    quota, admitted, offset = 12, list[float](), 0.0

    async def ask() -> tuple[asyncpg.Record, float]:
        await sql.execute(f"set baton.clock_offset = '{offset:.3f} seconds'")
        [row] = await sql.fetch(
            "select a.*, extract(epoch from baton_clock())::float8 as clock"
            " from admit($1, '{default}', $2) a",
            digest,
            [quota],
        )
        return row, row["clock"]

    for _ in range(400):
        offset += chance.choice((0, 0, 0, 0.3, 0.9, 1.7, 6, 25))
        row, now = await ask()
        if row["refused"]:
            assert sum(now - 61.5 < at for at in admitted) >= quota  # at most a second too strict
            assert 1 <= row["resets"][0] <= 60
            offset += row["resets"][0]
            row, now = await ask()
            assert row["refused"] == []
        admitted.append(now)
        recent = sum(now - 59.5 < at for at in admitted)
        assert recent <= quota
        assert row["remaining"][0] <= quota - recent
    assert len(admitted) > 300
    assert await sql.fetchval("select cardinality(times) from rate_windows") <= quota


async def test_a_window_stays_small_however_many_requests_it_admits(
    sql: asyncpg.Connection, digest: bytes
) -> None:
    for second in range(130):
        await sql.execute(f"set baton.clock_offset = '{second} seconds'")
        for _ in range(3):
            row = await admit(sql, digest, ["poll"], [600])
    assert row["remaining"][0] <= 600 - 3 * 59
    [(times, size)] = await sql.fetch(
        "select cardinality(times), pg_column_size(w) from rate_windows w"
    )
    assert times <= 61 and size < 1300


async def test_a_clock_that_is_set_back_locks_nobody_out(
    sql: asyncpg.Connection, digest: bytes
) -> None:
    await sql.execute("set baton.clock_offset = '1 hour'")
    for refused in ([], [], ["default"]):
        assert (await admit(sql, digest, ["default"], [2]))["refused"] == refused
    await sql.execute("set baton.clock_offset = '0'")
    for refused in ([], [], ["default"]):
        row = await admit(sql, digest, ["default"], [2])
        assert row["refused"] == refused
    assert row["resets"][0] <= 60


# --- Whose, and what for ---------------------------------------------------------------------


async def test_a_key_does_not_use_up_the_quota_of_another(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    second = await sql.fetchval("select ops.create_api_key($1)", caller.user_id)
    for status in (200, 200, 200, 429):
        assert (await caller.http.get("/projects")).status_code == status
    with_second = {"Authorization": f"Bearer {second}"}
    assert (await caller.http.get("/projects", headers=with_second)).status_code == 200


async def test_asking_for_artifacts_is_limited_by_user_over_all_keys(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    second = await sql.fetchval("select ops.create_api_key($1)", caller.user_id)
    body = {"project_id": caller.project_id}
    for key, status in ((caller.key, 202), (second, 202), (caller.key, 429), (second, 429)):
        answer = await caller.http.post(
            "/handoffs", json=body, headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == status
    assert answer.json()["violated-policies"] == ["generate"]
    assert answer.json()["detail"] == "2 requests per 60 s for this user"
    assert await sql.fetchval("select count(*) from jobs") == 2


async def test_reading_a_job_does_not_use_up_the_quota_for_anything_else(caller: Caller) -> None:
    for status in (404, 404, 429):
        assert (await caller.http.get(f"/jobs/{UNKNOWN}")).status_code == status
    assert (await caller.http.get("/projects")).status_code == 200


async def test_reading_jobs_by_id_is_polling_and_listing_them_is_not(caller: Caller) -> None:
    listed = await caller.http.get("/jobs")
    assert listed.headers["ratelimit-policy"] == '"default";q=3;w=60'
    some = await caller.http.get(f"/jobs?ids={UNKNOWN}")
    assert some.headers["ratelimit-policy"] == '"poll";q=2;w=60'


async def test_a_retry_is_counted_like_a_request_for_an_artifact(caller: Caller) -> None:
    answer = await caller.http.post(f"/jobs/{UNKNOWN}/retry")
    assert answer.headers["ratelimit-policy"] == '"default";q=3;w=60, "generate";q=2;w=60'


async def test_a_refused_request_costs_nothing_in_any_policy(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    body = {"project_id": caller.project_id}
    answers = [await caller.http.post("/handoffs", json=body) for _ in range(6)]
    assert [a.status_code for a in answers] == [202] * 2 + [429] * 4
    assert answers[-1].headers["ratelimit"].startswith('"default";r=1;')
    assert (await caller.http.get("/projects")).status_code == 200


async def test_a_limit_of_a_users_own_counts_from_the_next_request_on(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    async def statuses(who: Caller = caller) -> list[int]:
        return [(await who.http.get("/projects")).status_code for _ in range(5)]

    assert await statuses() == [200] * 3 + [429] * 2
    set_limit = "select ops.set_limit($1, 'default', $2)"
    await sql.execute(set_limit, caller.user_id, 6)
    assert await statuses() == [200] * 3 + [429] * 2
    await sql.execute(set_limit, caller.user_id, 0)
    assert await statuses() == [200] * 5
    await sql.execute(set_limit, caller.user_id, None)
    assert await statuses() == [429] * 5
    assert await statuses(stranger) == [200] * 3 + [429] * 2
    assert await sql.fetchval("select count(*) from limits") == 0


@pytest.mark.parametrize(("policy", "quota"), [("burst", 1), ("default", -1), ("poll", 1000001)])
async def test_a_limit_that_makes_no_sense_is_refused(
    policy: str, quota: int, sql: asyncpg.Connection, user_id: str
) -> None:
    with pytest.raises(asyncpg.PostgresError, match="^(policy|quota): must be "):
        await sql.execute("select ops.set_limit($1, $2, $3)", user_id, policy, quota)


async def test_a_key_that_is_not_good_is_401_and_not_counted(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    assert await sql.fetchval("select ops.revoke_api_key($1)", caller.key[:11])
    for key in (caller.key, new_key()):
        for _ in range(5):
            answer = await caller.http.get("/projects", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 401
            assert not [name for name in answer.headers if name.startswith("ratelimit")]
    assert await sql.fetchval("select count(*) from rate_windows") == 0


async def test_what_needs_no_key_has_no_limit(base_url: str, caller: Caller) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        for _ in range(5):
            answer = await caller.http.get(f"{base_url}{path}")
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("ratelimit")]


# --- What it costs ---------------------------------------------------------------------------


async def test_neither_an_unlimited_nor_a_refused_request_writes(
    sql: asyncpg.Connection, digest: bytes
) -> None:
    for quota, refused, writes in ((0, [], False), (1, [], True), (1, ["default"], False)):
        async with sql.transaction():
            row = await admit(sql, digest, ["default"], [quota])
            wrote = await sql.fetchval("select pg_current_xact_id_if_assigned() is not null")
        assert row["refused"] == refused
        assert wrote is writes


async def test_a_request_is_counted_by_the_statement_that_looks_up_its_key(
    dsn: str, caller: Caller
) -> None:
    asked: list[str] = []

    class Witness(Database):
        async def row(self, name: str, *args: Any, timeout: float | None = None) -> Any:
            asked.append(name)
            return await super().row(name, *args, timeout=timeout)

        async def rows(self, name: str, *args: Any, timeout: float | None = None) -> Any:
            asked.append(name)
            return await super().rows(name, *args, timeout=timeout)

    async with serving(dsn, FEW) as (base_url, app):
        app.state.database = Witness(app.state.database.pool, dsn)
        answer = await caller.http.get(f"{base_url}/api/v1/projects")
        assert answer.status_code == 200
    assert sorted(asked) == ["admit", "list_organizations", "list_projects"]


async def test_counting_waits_for_no_disk(sql: asyncpg.Connection) -> None:
    rows = await sql.fetch(
        "select relname from pg_class where relpersistence = 'u' and relkind = 'r'"
    )
    assert {row[0] for row in rows} == {"rate_windows", "wait_slots"}


# --- What a client is told -------------------------------------------------------------------


async def test_every_answer_says_what_the_limits_are_and_what_remains(
    caller: Caller, base_url: str
) -> None:
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert answer.headers["ratelimit-policy"] == '"default";q=3;w=60, "generate";q=2;w=60'
    assert answer.headers["ratelimit"] in (
        '"default";r=2;t=60, "generate";r=1;t=60',
        '"default";r=2;t=59, "generate";r=1;t=59',
    )
    for wrong in ({"nope": 1}, {"project_id": UNKNOWN}):
        answer = await caller.http.post("/handoffs", json=wrong)
        assert answer.status_code in (400, 404, 429)
        assert answer.headers["ratelimit-policy"].startswith('"default";q=3;w=60')
    answer = await caller.http.head(f"/jobs/{UNKNOWN}")
    assert answer.status_code == 404
    assert answer.headers["ratelimit-policy"] == '"poll";q=2;w=60'


async def test_a_policy_without_a_limit_is_not_told(dsn: str, caller: Caller) -> None:
    async with serving(dsn, Limits(default=0, poll=0, generate=9)) as (base_url, _):
        url = f"{base_url}/api/v1"
        answer = await caller.http.post(f"{url}/handoffs", json={"project_id": caller.project_id})
        assert answer.headers["ratelimit-policy"] == '"generate";q=9;w=60'
        assert answer.headers["ratelimit"].startswith('"generate";r=8;t=')
        assert "ratelimit" not in (await caller.http.get(f"{url}/projects")).headers


async def test_after_retry_after_a_request_is_admitted_and_not_before(
    dsn: str, caller: Caller, sql: asyncpg.Connection
) -> None:
    async with serving(dsn, FEW) as (base_url, app):
        url = f"{base_url}/api/v1/projects"
        for _ in range(3):
            assert (await caller.http.get(url)).status_code == 200
        await move_clock(sql, 20, app)
        refused = await caller.http.get(url)
        assert refused.status_code == 429
        assert refused.json() == {
            "error": "Too many requests. Please wait a moment and try again.",
            "code": "rate_limited",
            "request_id": refused.headers["x-request-id"],
            "detail": "3 requests per 60 s for this key",
            "violated-policies": ["default"],
        }
        after = int(refused.headers["retry-after"])
        assert refused.headers["ratelimit"] == f'"default";r=0;t={after}'
        await move_clock(sql, 20 + after - 10, app)
        assert (await caller.http.get(url)).status_code == 429
        await move_clock(sql, 20 + after, app)
        assert (await caller.http.get(url)).status_code == 200


async def test_both_policies_are_named_when_both_refuse(dsn: str, caller: Caller) -> None:
    async with serving(dsn, Limits(default=1, generate=1)) as (base_url, _):
        url = f"{base_url}/api/v1/handoffs"
        answers = [
            await caller.http.post(url, json={"project_id": caller.project_id}) for _ in range(2)
        ]
    assert [a.status_code for a in answers] == [202, 429]
    assert answers[1].json()["violated-policies"] == ["default", "generate"]


async def test_our_own_client_waits_as_it_is_told_and_then_gets_its_answer(
    base_url: str, caller: Caller, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    loop = asyncio.get_running_loop()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        lift = sql.execute("select ops.set_limit($1, 'default', 0)", caller.user_id)
        asyncio.run_coroutine_threadsafe(lift, loop).result()

    monkeypatch.setattr(time, "sleep", sleep)
    told: list[int] = []
    ours = client.Client(base_url, caller.key, told.append)
    for _ in range(4):
        assert len(await asyncio.to_thread(ours.projects)) == 1
    assert slept == told
    ours._http.close()
    [seconds] = slept
    assert 1 <= seconds <= 60


# --- Pending jobs ----------------------------------------------------------------------------


async def test_a_project_has_exactly_as_many_pending_jobs_as_it_may_over_all_processes(
    dsn: str, caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    limits = replace(NO_LIMITS, pending=7)
    async with serving(dsn, limits) as (one, _), serving(dsn, limits) as (two, _):

        async def ask(who: Caller, url: str, key: str | None = None) -> httpx.Response:
            headers = {"Idempotency-Key": key} if key else {}
            body = {"project_id": who.project_id}
            return await who.http.post(f"{url}/api/v1/handoffs", json=body, headers=headers)

        assert (await ask(caller, one, "first")).status_code == 202
        answers = await asyncio.gather(*(ask(caller, (one, two)[n % 2]) for n in range(16)))
        assert sorted(a.status_code for a in answers) == [202] * 6 + [429] * 10
        assert await sql.fetchval("select count(*) from jobs") == 7
        refused = next(a for a in answers if a.status_code == 429)
        assert refused.json()["code"] == "queue_full"
        assert refused.json()["error"].startswith("This project has 7 pending jobs, ")
        assert refused.json()["violated-policies"] == ["pending"]
        assert int(refused.headers["retry-after"]) > 0

        assert (await ask(stranger, one)).status_code == 202  # another project
        again = await ask(caller, two, "first")  # a replay is no new job
        assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
        job_id = again.json()["jobId"]
        cancelled = await caller.http.post(f"{one}/api/v1/jobs/{job_id}/cancel")
        assert cancelled.status_code == 200
        assert (await ask(caller, two)).status_code == 202
        retried = await caller.http.post(f"{one}/api/v1/jobs/{job_id}/retry")
        assert (retried.status_code, retried.json()["code"]) == (429, "queue_full")


async def test_a_job_that_a_worker_has_taken_is_not_pending(
    sql: asyncpg.Connection, user_id: str
) -> None:
    project_id = await sql.fetchval("select ops.create_project('p', $1)", user_id)
    submit = (
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}',"
        " p_pending_limit => 1)"
    )
    job_id = await sql.fetchval(submit, user_id, project_id)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.fetchval(submit, user_id, project_id)
    assert caught.value.sqlstate == "BT429"
    assert await sql.fetchval("select id from claim_job($1, 1, 'w', 15)", job_id) == job_id
    assert await sql.fetchval(submit, user_id, project_id)


async def test_submits_take_turns_only_when_the_limit_is_in_reach(
    sql: asyncpg.Connection, user_id: str
) -> None:
    project_id = await sql.fetchval("select ops.create_project('p', $1)", user_id)
    for limit, turns in ((0, 0), (1000, 0), (100, 1)):
        async with sql.transaction():
            await sql.execute("select assert_room($1, $2)", project_id, limit)
            held = "select count(*) from pg_locks where locktype = 'advisory'"
            assert await sql.fetchval(f"{held} and pid = pg_backend_pid()") == turns


# --- Waiting ---------------------------------------------------------------------------------


class Held:
    """An API with a route that waits in a slot until the test lets it go."""

    def __init__(self, app: Starlette) -> None:
        self.go = asyncio.Event()
        self.waiting = asyncio.Semaphore(0)
        app.router.routes.append(Route("/held", self._endpoint))

    async def _endpoint(self, request: Request) -> Response:
        request.state.user_id = await authenticate(request, ("poll",))
        async with wait_slot(request):
            self.waiting.release()
            await self.go.wait()
        return json_response({})


@pytest.fixture
async def slots(api: Database) -> AsyncIterator[Callable[[], WaitSlots]]:
    """Makes the slots of one more process; nobody keeps them or gives them back yet."""

    def make() -> WaitSlots:
        return WaitSlots(api, Limits(waits=20))

    yield make


Take = Callable[[WaitSlots], Awaitable[tuple[str | None, int, int | None]]]


@pytest.fixture
async def take(sql: asyncpg.Connection, user_id: str, digest: bytes) -> Take:
    key_id = str(await sql.fetchval("select id from api_keys where digest = $1", digest))

    async def one(of: WaitSlots) -> tuple[str | None, int, int | None]:
        return await of.take(user_id, key_id)

    return one


async def test_one_wait_too_many_is_refused_and_the_next_is_not(
    dsn: str, caller: Caller, stranger: Caller
) -> None:
    async with (
        serving(dsn, Limits(waits=2)) as (one, app),
        serving(dsn, Limits(waits=2)) as (
            two,
            other,
        ),
    ):
        first, second = Held(app), Held(other)
        held = [asyncio.create_task(caller.http.get(f"{url}/held")) for url in (one, two)]
        await asyncio.gather(first.waiting.acquire(), second.waiting.acquire())
        for url in (one, two):
            refused = await caller.http.get(f"{url}/held")
            assert refused.status_code == 429
            assert refused.json()["code"] == "too_many_waits"
            assert refused.json()["violated-policies"] == ["waits"]
            assert refused.json()["detail"] == "2 waiting requests at once for this key"
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["ratelimit-policy"] == (
                '"poll";q=600;w=60, "waits";q=2;qu="concurrent-requests"'
            )
            assert refused.headers["ratelimit"].endswith(', "waits";r=0')
        first.go.set()
        assert (await held[0]).status_code == 200
        assert (await caller.http.get(f"{one}/held")).status_code == 200  # free at once here
        second.go.set()
        assert (await stranger.http.get(f"{two}/held")).status_code == 200
        answered = await held[1]
        assert answered.headers["ratelimit"].rpartition('"waits";')[2] in ("r=0", "r=1")


async def test_slots_are_exact_over_processes(
    slots: Callable[[], WaitSlots], take: Take, sql: asyncpg.Connection
) -> None:
    processes = [slots() for _ in range(3)]
    taken = await asyncio.gather(*(take(processes[n % 3]) for n in range(60)))
    assert sum(slot is not None for slot, _, _ in taken) == 20
    assert sorted(left for slot, _, left in taken if slot and left is not None) == list(range(20))
    assert await sql.fetchval("select count(*) from wait_slots") == 20


async def test_a_slot_is_free_for_its_own_process_at_once_and_for_others_when_given_back(
    slots: Callable[[], WaitSlots], take: Take
) -> None:
    ours, theirs = slots(), slots()
    taken = [await take(ours) for _ in range(20)]
    assert (await take(theirs))[0] is None
    assert taken[0][0] is not None
    ours.release(taken[0][0])
    again = await take(ours)
    assert again[0] is not None and again[2] == 0
    assert (await take(theirs))[0] is None
    ours.release(again[0])
    giving_back = asyncio.create_task(ours.run())
    async with asyncio.timeout(5):
        while (await take(theirs))[0] is None:
            await asyncio.sleep(0.001)
    giving_back.cancel()


async def test_slots_that_a_process_keeps_last_and_those_of_a_dead_one_do_not(
    slots: Callable[[], WaitSlots], take: Take, dsn: str, sql: asyncpg.Connection
) -> None:
    ours, dead = slots(), slots()
    for process in (ours, dead):
        for _ in range(10):
            assert (await take(process))[0]
    pool = ours._database.pool
    for seconds, free in ((50, 0), (100, 10)):
        name = await sql.fetchval("select current_database()")
        await sql.execute(f"alter database {name} set baton.clock_offset = '{seconds} seconds'")
        await pool.expire_connections()
        third = slots()
        taken = [(await take(third))[0] for _ in range(11)]
        assert sum(slot is not None for slot in taken) == free
        await ours._keep()
    assert await sql.fetchval("select count(*) from wait_slots") == 20


async def test_a_process_that_ends_gives_its_slots_back(
    api: Database, take: Take, sql: asyncpg.Connection
) -> None:
    async with wait_slots(api, Limits(waits=20)) as ending:
        taken = [await take(ending) for _ in range(20)]
        assert None not in [slot for slot, _, _ in taken]
    assert await sql.fetchval("select count(*) from wait_slots") == 0


async def test_without_a_limit_no_slot_is_needed(
    api: Database, take: Take, sql: asyncpg.Connection, user_id: str
) -> None:
    free = WaitSlots(api, NO_LIMITS)
    assert await take(free) == (None, 0, None)
    await sql.execute("select ops.set_limit($1, 'waits', 1)", user_id)
    slot, quota, left = await take(free)
    assert slot is not None and (quota, left) == (1, 0)
    assert (await take(free))[0] is None
