"""What a source that sends is answered, and what is there afterwards."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from conftest import Caller, served
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette

from app import hooks
from app.cipher import Cipher, new_key
from app.db import Database
from app.main import create_app
from app.settings import Limits, Settings
from tasks.intake import Mapper

KEY = new_key()
SECRET = "whsec_not-a-real-one"
PUSH = {"ref": "refs/heads/main", "repository": {"full_name": "acme/web"}, "commits": []}


@pytest.fixture
async def app(dsn: str, limits: Limits) -> Starlette:
    return create_app(Settings(database_url=dsn, limits=limits, secret_keys=(KEY,)))


class Hook:
    """An integration of GitHub, and what sends to it."""

    def __init__(self, integration_id: str, http: httpx.AsyncClient, sql: asyncpg.Connection):
        self.id = integration_id
        self.http = http
        self.sql = sql

    async def send(
        self,
        body: Any = PUSH,
        *,
        delivery_id: str = "d-1",
        secret: str = SECRET,
        **headers: str,
    ) -> httpx.Response:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        signature = hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()
        sent = {
            "X-GitHub-Event": "push",
            "X-GitHub-Delivery": delivery_id,
            "X-Hub-Signature-256": f"sha256={signature}",
            "Content-Type": "application/json",
            **headers,
        }
        return await self.http.post(
            f"/hooks/{self.id}", content=raw, headers={k: v for k, v in sent.items() if v}
        )

    async def stored(self) -> int:
        count: int = await self.sql.fetchval(
            "select count(*) from hook_deliveries where integration_id = $1", self.id
        )
        return count


@pytest.fixture
async def new_hook(
    base_url: str, caller: Caller, sql: asyncpg.Connection
) -> AsyncIterator[Callable[..., Awaitable[Hook]]]:
    """Makes integrations of the caller's."""
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=30) as http:

        async def make(source: str = "github", secret: str | None = SECRET) -> Hook:
            integration_id = await sql.fetchval(
                "insert into integrations (source, user_id, workspace_name) "
                "values ($1, $2, 'acme') returning id::text",
                source,
                caller.user_id,
            )
            if secret:
                await sql.execute(
                    "insert into integration_secrets (integration_id, name, value) "
                    "values ($1, 'signing', $2)",
                    integration_id,
                    Cipher((KEY,)).encrypt(secret),
                )
            return Hook(integration_id, http, sql)

        yield make


@pytest.fixture
async def hook(new_hook: Callable[..., Awaitable[Hook]]) -> Hook:
    return await new_hook()


@pytest.fixture
def stuck(sql: asyncpg.Connection) -> Callable[[], AbstractAsyncContextManager[None]]:
    """While the body runs, whoever stores deliveries waits."""

    @asynccontextmanager
    async def lock() -> AsyncIterator[None]:
        async with sql.transaction():
            await sql.execute("lock table hook_deliveries in exclusive mode")
            yield

    return lock


Stuck = Callable[[], AbstractAsyncContextManager[None]]


async def test_a_verified_delivery_is_stored_as_it_came_before_the_202(hook: Hook) -> None:
    answer = await hook.send()
    assert (answer.status_code, answer.json()) == (202, {"status": "accepted"})
    row = await hook.sql.fetchrow("select * from waiting_deliveries")
    assert row is not None
    assert json.loads(row["body"]) == PUSH
    assert (row["delivery_id"], row["size"]) == ("d-1", len(json.dumps(PUSH)))
    assert json.loads(row["headers"]) == {
        "content-type": "application/json",
        "x-github-event": "push",
    }
    assert "x-request-id" in answer.headers and "ratelimit" not in answer.headers


async def test_a_known_delivery_id_is_200_and_nothing_is_stored(hook: Hook) -> None:
    await hook.send()
    again = await hook.send()
    assert (again.status_code, again.json()) == (200, {"status": "duplicate"})
    await hook.sql.execute("delete from waiting_deliveries")  # it has been mapped
    assert (await hook.send()).status_code == 200
    assert await hook.stored() == 1
    assert await hook.sql.fetchval("select count(*) from waiting_deliveries") == 0


async def test_of_the_same_delivery_at_the_same_time_one_is_accepted(
    hook: Hook, app: Starlette, stuck: Stuck
) -> None:
    """Held up until all have come, so that they are in one statement or wait for one another."""
    async with stuck():
        sending = [asyncio.create_task(hook.send(delivery_id=f"d-{n % 2}")) for n in range(12)]
        while not app.state.intake.store.writing:
            await asyncio.sleep(0.005)
    answers = [answer.status_code for answer in await asyncio.gather(*sending)]
    assert sorted(answers) == [200] * 10 + [202] * 2
    assert await hook.stored() == 2


async def test_a_wrong_or_missing_signature_is_401_and_nothing_is_stored(
    hook: Hook, app: Starlette
) -> None:
    for answer in (
        await hook.send(secret="another"),
        await hook.send(**{"X-Hub-Signature-256": ""}),
        await hook.send(**{"X-Hub-Signature-256": "sha256=00"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert await hook.stored() == 0
    await app.state.intake.count_once()
    counted = await hook.sql.fetchrow("select result, count from hook_counts")
    assert counted is not None and tuple(counted) == ("unverified", 3)


async def test_a_body_that_the_source_does_not_send_is_400_and_counted(
    hook: Hook, app: Starlette
) -> None:
    for answer in (
        await hook.send(b"no json"),
        await hook.send([1]),
        await hook.send(**{"X-GitHub-Event": ""}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert await hook.stored() == 0
    await app.state.intake.count_once()
    counted = await hook.sql.fetchrow("select result, count from hook_counts")
    assert counted is not None and tuple(counted) == ("malformed", 3)


async def test_bad_requests_cost_no_write_each(hook: Hook, app: Starlette) -> None:
    before = await hook.sql.fetchval("select pg_current_wal_lsn()")
    await asyncio.gather(*(hook.send(secret="another") for _ in range(50)))
    assert await hook.sql.fetchval("select count(*) from hook_counts where count = 1") == 0
    await app.state.intake.count_once()
    await app.state.intake.count_once()  # there is nothing more
    assert await hook.sql.fetchval("select sum(count) from hook_counts") == 50
    assert before


async def test_an_unknown_a_malformed_and_a_disabled_integration_are_404(hook: Hook) -> None:
    assert (await hook.send()).status_code == 202
    await hook.sql.execute("update integrations set enabled = false")
    disabled = await hook.send(delivery_id="d-2")  # at once, though it is still known
    hook.id = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
    unknown = await hook.send()
    hook.id = "x"
    malformed = await hook.send()
    answers = [answer.json() for answer in (disabled, unknown, malformed)]
    assert {answer.status_code for answer in (disabled, unknown, malformed)} == {404}
    assert len({answer["error"] for answer in answers}) == 1
    assert await hook.sql.fetchval("select count(*) from hook_deliveries") == 1


async def test_a_deleted_integration_is_404_at_once_and_takes_its_deliveries_along(
    hook: Hook, new_hook: Callable[..., Awaitable[Hook]]
) -> None:
    other = await new_hook()
    assert (await hook.send()).status_code == 202
    await hook.sql.execute("delete from integrations where id = $1", hook.id)
    gone, fine = await asyncio.gather(hook.send(delivery_id="d-2"), other.send())
    assert (gone.status_code, fine.status_code) == (404, 202)
    left = await hook.sql.fetch("select integration_id::text from waiting_deliveries")
    assert [row[0] for row in left] == [other.id]


async def test_a_rotated_secret_counts_when_what_is_known_is_old(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hooks.KNOWN_FOR <= 2
    assert (await hook.send()).status_code == 202
    await hook.sql.execute("update integration_secrets set value = $1", Cipher((KEY,)).encrypt("b"))
    monkeypatch.setattr(hooks, "KNOWN_FOR", 0)
    assert (await hook.send(delivery_id="d-2")).status_code == 401
    assert (await hook.send(delivery_id="d-2", secret="b")).status_code == 202


async def test_one_bad_delivery_fails_no_other(
    hook: Hook, app: Starlette, sql: asyncpg.Connection, stuck: Stuck
) -> None:
    """What the database refuses nevertheless is refused alone."""
    await sql.execute("alter table hook_deliveries add constraint bad check (delivery_id <> 'bad')")
    ids = ["a", "b", "bad", "c", "d"]
    first = [asyncio.create_task(hook.send(delivery_id=f"first-{n}")) for n in range(hooks.WRITERS)]
    async with stuck():
        while app.state.intake.store.writing < hooks.WRITERS:
            first.append(asyncio.create_task(hook.send(delivery_id=f"more-{len(first)}")))
            await asyncio.sleep(0.02)
        sending = [asyncio.create_task(hook.send(delivery_id=each)) for each in ids]
        while app.state.intake.store.waiting < len(ids):
            await asyncio.sleep(0.005)
    assert {answer.status_code for answer in await asyncio.gather(*first)} == {202}
    answers = [answer.status_code for answer in await asyncio.gather(*sending)]
    assert answers == [202, 202, 500, 202, 202]


async def test_without_the_database_it_is_503_and_never_a_false_202(
    hook: Hook, stuck: Stuck
) -> None:
    assert (await hook.send()).status_code == 202
    async with stuck():
        answer = await hook.send(delivery_id="d-2")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert await hook.stored() == 1


async def test_a_body_over_the_limit_of_its_source_is_413(hook: Hook) -> None:
    limit = 25 * 1024 * 1024
    reader, writer = await asyncio.open_connection(hook.http.base_url.host, hook.http.base_url.port)
    head = f"POST /hooks/{hook.id} HTTP/1.1\r\nHost: x\r\nContent-Length: {limit + 1}\r\n"
    writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_large_body_is_stored_too(hook: Hook) -> None:
    body = {**PUSH, "padding": "x" * (2 * 1024 * 1024)}
    assert (await hook.send(body)).status_code == 202
    assert await hook.sql.fetchval("select size from waiting_deliveries") > 2 * 1024 * 1024


async def test_too_much_that_waits_is_429_for_that_integration_only(
    hook: Hook,
    new_hook: Callable[..., Awaitable[Hook]],
    app: Starlette,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "WAITING", 3)
    monkeypatch.setattr(hooks, "KNOWN_FOR", 0)
    other = await new_hook()
    answers = [await hook.send(delivery_id=f"d-{n}") for n in range(5)]
    assert [answer.status_code for answer in answers] == [202, 202, 202, 429, 429]
    assert int(answers[-1].headers["retry-after"]) > 0
    assert (await other.send()).status_code == 202
    await hook.sql.execute("delete from waiting_deliveries")
    assert (await hook.send(delivery_id="d-9")).status_code == 202


async def test_of_the_room_in_memory_one_integration_gets_a_share(
    hook: Hook,
    new_hook: Callable[..., Awaitable[Hook]],
    app: Starlette,
    stuck: Stuck,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "ROOM", 8)
    monkeypatch.setattr(hooks, "BATCH", 1)
    other = await new_hook()
    async with stuck():
        first = [asyncio.create_task(hook.send(delivery_id=f"a-{n}")) for n in range(hooks.WRITERS)]
        while app.state.intake.store.waiting or not app.state.intake.store.writing:
            await asyncio.sleep(0.005)
        more = [asyncio.create_task(hook.send(delivery_id=f"b-{n}")) for n in range(6)]
        refused: set[asyncio.Task[httpx.Response]] = set()
        while len(refused) < 4:  # two are a quarter of the room
            refused, _ = await asyncio.wait(more, timeout=0.005)
        theirs = asyncio.create_task(other.send())
        while app.state.intake.store.waiting < 3:
            await asyncio.sleep(0.005)
    answers = [answer.status_code for answer in await asyncio.gather(*first, *more, theirs)]
    assert sorted(answers) == [202] * 5 + [429] * 4 and answers[-1] == 202
    assert all(int(task.result().headers["retry-after"]) > 0 for task in refused)


async def test_a_handshake_is_answered_and_nothing_is_stored(
    new_hook: Callable[..., Awaitable[Hook]],
) -> None:
    slack = await new_hook("slack")
    raw = json.dumps({"type": "url_verification", "challenge": "3eZbrw1a"}).encode()
    at = str(int(time.time()))
    signed = hmac.new(SECRET.encode(), b"v0:%s:%s" % (at.encode(), raw), hashlib.sha256).hexdigest()
    answer = await slack.http.post(
        f"/hooks/{slack.id}",
        content=raw,
        headers={
            "Content-Type": "application/json",
            "X-Slack-Request-Timestamp": at,
            "X-Slack-Signature": f"v0={signed}",
        },
    )
    assert (answer.status_code, answer.json()) == (200, {"challenge": "3eZbrw1a"})
    assert await slack.stored() == 0


async def test_discord_gets_the_empty_answers_that_it_wants(
    new_hook: Callable[..., Awaitable[Hook]],
) -> None:
    key = Ed25519PrivateKey.generate()
    discord = await new_hook("discord", key.public_key().public_bytes_raw().hex())
    event = {"type": "APPLICATION_AUTHORIZED", "timestamp": "2024-10-18T14:42:53.064834"}
    ping = {"version": 1, "application_id": "1234560123453231555", "type": 0}
    told = ping | {"type": 1, "event": event}
    for body, forged, status, stored in (
        (ping, b"", 204, 0), (ping, b" ", 401, 0), (told, b" ", 401, 0), (told, b"", 204, 1),
        (told, b"", 204, 1),
    ):  # fmt: skip
        raw, at = json.dumps(body).encode(), str(int(time.time()))
        answer = await discord.http.post(
            f"/hooks/{discord.id}",
            content=raw,
            headers={
                "Content-Type": "application/json",
                "X-Signature-Timestamp": at,
                "X-Signature-Ed25519": key.sign(at.encode() + raw + forged).hex(),
            },
        )
        assert answer.status_code == status
        assert (answer.content == b"") is (status == 204)
        assert await discord.stored() == stored


async def test_a_secret_that_a_handshake_brings_is_kept_encrypted_and_only_the_first(
    new_hook: Callable[..., Awaitable[Hook]],
) -> None:
    asana = await new_hook("asana", None)

    async def shake(secret: str) -> httpx.Response:
        return await asana.http.post(f"/hooks/{asana.id}", headers={"X-Hook-Secret": secret})

    first = await shake("s" * 32)
    assert (first.status_code, first.headers["x-hook-secret"]) == (200, "s" * 32)
    assert (await shake("s" * 32)).status_code == 200
    assert (await shake("t" * 32)).status_code == 401
    [value] = await asana.sql.fetchrow("select value from integration_secrets") or [b""]
    assert Cipher((KEY,)).decrypt(value) == "s" * 32
    raw = b'{"events": []}'
    signature = hmac.new(b"s" * 32, raw, hashlib.sha256).hexdigest()
    answer = await asana.http.post(
        f"/hooks/{asana.id}", content=raw, headers={"X-Hook-Signature": signature}
    )
    assert answer.status_code == 202


async def test_what_github_sends_is_an_event_of_the_project(
    hook: Hook, caller: Caller, database: Database, root: Path
) -> None:
    await hook.sql.execute("update integrations set project_id = $1", caller.project_id)
    body = (root / "tests" / "payloads" / "github" / "push.commits.json").read_bytes()
    assert (await hook.send(body)).status_code == 202
    await Mapper(database).drain()
    events = (await caller.http.get("/events?source=github")).json()["events"]
    sha = json.loads(body)["commits"][0]["id"]
    assert (sha, "commit") in {(event["external_id"], event["event_type"]) for event in events}


async def test_over_two_processes_a_delivery_is_accepted_once(hook: Hook, dsn: str) -> None:
    other = create_app(Settings(database_url=dsn, secret_keys=(KEY,)))
    async with served(other) as url, httpx.AsyncClient(base_url=url, trust_env=False) as http:
        both = hook, Hook(hook.id, http, hook.sql)
        answers = await asyncio.gather(
            *(each.send(delivery_id=f"d-{n}") for n in range(20) for each in both)
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 20 + [202] * 20
    assert await hook.stored() == 20


async def test_neither_a_body_nor_a_secret_is_in_the_log(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await hook.send({"marker": "the-body-of-it"}, delivery_id="a")
    await hook.send({"marker": "the-body-of-it"}, delivery_id="b", secret="the-wrong-secret")
    await hook.send(b"the-body-of-it", delivery_id="c")
    text = "\n".join(str(record.__dict__) for record in caplog.records)
    assert "/hooks/" in text
    assert "the-body-of-it" not in text and SECRET not in text and "wrong-secret" not in text


async def test_without_the_key_of_its_secret_it_is_503(
    hook: Hook, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = create_app(Settings(database_url=dsn, secret_keys=(new_key(),)))
    async with served(other) as url, httpx.AsyncClient(base_url=url, trust_env=False) as http:
        answer = await Hook(hook.id, http, hook.sql).send()
    assert answer.status_code == 503
    causes = [str(record.__dict__.get("cause")) for record in caplog.records]
    assert any("BATON_SECRET_KEYS" in cause for cause in causes)
    assert not any(SECRET in cause for cause in causes)


async def test_a_secret_that_no_key_opens_concerns_its_own_integration_only(
    hook: Hook, new_hook: Callable[..., Awaitable[Hook]], caplog: pytest.LogCaptureFixture
) -> None:
    sealed = await new_hook()
    other = Cipher((new_key(),)).encrypt(SECRET)
    update = "update integration_secrets set value = $1 where integration_id = $2"
    await hook.sql.execute(update, other, sealed.id)
    await hook.sql.execute(  # nor is one that was rotated in the way of the one after it
        "insert into integration_secrets (integration_id, name, value, expires_at) "
        "values ($1, 'signing', $2, now() + interval '1 hour')",
        hook.id,
        other,
    )
    answers = await asyncio.gather(hook.send(), sealed.send())
    assert [answer.status_code for answer in answers] == [202, 503]
    assert await sealed.stored() == 0
    assert SECRET not in caplog.text
