"""Webhooks: queued with the end of a job, signed, sent until received, and never in a job's way."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

import asyncpg
import pytest
from chaos.receiver import Receiver, answer, receiving
from conftest import Caller, Workers
from standardwebhooks import Webhook, WebhookVerificationError

from app.background import background, child_environment
from app.db import Database, open_database
from tasks import delivery
from tasks.delivery import SCHEDULE, Deliverer
from tasks.outbound import Outbound

Drain = Callable[..., Awaitable[None]]
LOOPBACK = (ip_network("127.0.0.0/8"),)
DEFAULT = ["job.completed", "job.failed"]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """One connection, so that the clock of the code can be moved."""
    async with open_database(dsn, application_name="baton test", size=1) as database:
        yield database


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for silent receivers at the end of a test."""
    monkeypatch.setattr(delivery, "DRAIN", 0.05)


@pytest.fixture
def deliverer(database: Database) -> Deliverer:
    return Deliverer(database, Outbound(LOOPBACK))


@dataclass
class Site:
    """A project whose jobs end as told, and its webhooks."""

    sql: asyncpg.Connection
    database: Database
    user: str
    project: str

    async def endpoint(self, url: str, types: list[str] = DEFAULT) -> tuple[str, str]:
        """Register; answers the id and the secret."""
        row = await self.sql.fetchrow(
            "select (c.webhook).id, c.secret from create_webhook($1, $2, $3, $4) c",
            self.user, self.project, url, types,
        )  # fmt: skip
        assert row
        return str(row["id"]), row["secret"]

    async def job(self, url: str | None = None) -> tuple[str, str]:
        """A job that runs; answers its id and the token of its attempt."""
        job_id = await self.sql.fetchval(
            "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}', $3)",
            self.user, self.project, json.dumps({"webhook_url": url} if url else {}),
        )  # fmt: skip
        token = await self.sql.fetchval("select lease_token from claim_job($1, 1, 'w', 60)", job_id)
        return str(job_id), str(token)

    async def failed(self, url: str | None = None) -> str:
        """A job that has failed."""
        job_id, token = await self.job(url)
        await self.sql.fetch(
            "select fail_job($1, $2, 'no_result', 'Nothing.', '{}')", job_id, token
        )
        return job_id

    async def project_secret(self) -> str:
        secret = await self.sql.fetchval(
            "select read_webhook_secret($1, $2)", self.user, self.project
        )
        return str(secret)

    async def deliveries(self) -> list[Any]:
        return list(await self.sql.fetch("select * from webhook_deliveries order by id"))

    async def attempts(self) -> list[Any]:
        return list(await self.sql.fetch("select * from webhook_attempts order by id"))

    async def pass_time(self, seconds: float) -> None:
        """Move the clock of the code and of this connection."""
        self.passed = getattr(self, "passed", 0.0) + seconds
        moved = f"set baton.clock_offset = '{self.passed:.6f} seconds'"
        await self.sql.execute(moved)
        await self.database.pool.execute(moved)


@pytest.fixture
async def site(sql: asyncpg.Connection, database: Database) -> Site:
    user = await sql.fetchval("select ops.create_user('ada@example.com')")
    project = await sql.fetchval("select ops.create_project('Demo', $1)", user)
    return Site(sql, database, str(user), str(project))


@asynccontextmanager
async def delivering(*deliverers: Deliverer) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each.run()) for each in deliverers]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- What is queued ------------------------------------------------------------------------


async def test_a_completed_job_is_told_to_its_own_url_and_to_whoever_subscribed(
    caller: Caller, sql: asyncpg.Connection, drain: Drain, deliverer: Deliverer, receiver: Receiver
) -> None:
    site = Site(sql, deliverer._database, caller.user_id, caller.project_id)
    endpoint, secret = await site.endpoint(receiver.url("/registered"))
    await caller.ingest({"title": "A secret of the artifact"})
    job_id = await caller.submit()
    await sql.execute("update jobs set webhook_url = $1", receiver.url("/own?token=t0k"))
    await drain()
    await deliverer.drain()

    shown = (await caller.job(job_id))["job"]
    secrets = {"/registered": secret, "/own?token=t0k": await site.project_secret()}
    assert {got.target for got in receiver.got} == set(secrets)
    for got in receiver.got:
        body = got.verified(secrets[got.target])
        assert (body["type"], set(body)) == ("job.completed", {"type", "timestamp", "data"})
        assert body["data"]["result_url"] == f"/api/v1/jobs/{job_id}"
        told = body["data"]["job"]
        assert {k: v for k, v in told.items() if not k.endswith("_at")} == {
            k: v for k, v in shown.items() if k in told and not k.endswith("_at")
        }
        assert set(told) >= {"id", "status", "result_id", "error", "error_meta", "updated_at"}
        for name in ("created_at", "updated_at"):
            assert datetime.fromisoformat(told[name]) == datetime.fromisoformat(shown[name])
            assert told[name].endswith("Z")
        assert b"A secret of the artifact" not in got.body and len(got.body) < 20_000
        events = {name: got.headers[f"ce-{name}"] for name in ("specversion", "type", "subject")}
        assert events == {"specversion": "1.0", "type": "job.completed", "subject": job_id}
        assert got.headers["ce-id"] == got.headers["webhook-id"]
        assert got.headers["ce-source"] == f"/api/v1/projects/{caller.project_id}"
        assert datetime.fromisoformat(got.headers["ce-time"]) == datetime.fromisoformat(
            body["timestamp"]
        )
        assert "ce-datacontenttype" not in got.headers
        assert got.headers["content-type"] == "application/json"
    ids = {got.headers["webhook-id"] for got in receiver.got}
    assert len(ids) == 2 and not any("." in each for each in ids)
    assert {d["state"] for d in await site.deliveries()} == {"delivered"}


ENDS = {
    "no_result": "fail_job($1, $2, 'no_result', 'Nothing.', '{}')",
    "cancelled": "(cancel_job((select id from users), $1)).changed, $2::uuid",
    "generation_failed": "park_job($1, $2, 1e9, 'generation_failed', 'Busy.', '{}')",
    "timeout": "sweep_job($1), $2::uuid",
}


async def test_every_other_end_is_told_as_failed_with_its_code(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    _, secret = await site.endpoint(receiver.url())
    ended = []
    for code, how in ENDS.items():
        job_id, token = await site.job()
        if code == "timeout":
            late = "update jobs set deadline_at = now() - interval '1 second' where id = $1"
            await site.sql.execute(late, job_id)
        await site.sql.fetch(f"select {how}", job_id, token)
        ended.append(("job.failed", job_id, code))
    await deliverer.drain()
    bodies = [got.verified(secret) for got in receiver.got]
    told = [(b["type"], b["data"]["job"]["id"], b["data"]["job"]["error_code"]) for b in bodies]
    assert sorted(told) == sorted(ended)


async def test_a_job_that_is_refused_from_the_start_is_told_as_well(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    await site.endpoint(receiver.url())
    await site.sql.execute(
        "insert into jobs (user_id, project_id, kind, input, credits, status, outcome, error, "
        "error_code, completed_at) values ($1, $2, 'handoff', '{}', 1, 'failed', 'failed', 'No.', "
        "'plan_violation', now())",
        site.user, site.project,
    )  # fmt: skip
    await deliverer.drain()
    assert json.loads(receiver.got[0].body)["data"]["job"]["error_code"] == "plan_violation"


async def test_what_is_rolled_back_is_not_announced(site: Site, receiver: Receiver) -> None:
    await site.endpoint(receiver.url())
    job_id, token = await site.job(receiver.url())
    transaction = site.sql.transaction()
    await transaction.start()
    await site.sql.fetch("select fail_job($1, $2, 'no_result', 'No.', '{}')", job_id, token)
    assert len(await site.deliveries()) == 2
    await transaction.rollback()
    assert await site.deliveries() == []


async def test_an_end_that_is_reported_twice_is_queued_once(site: Site, receiver: Receiver) -> None:
    await site.endpoint(receiver.url())
    job_id, token = await site.job(receiver.url())
    for _ in range(2):
        await site.sql.fetch("select fail_job($1, $2, 'no_result', 'No.', '{}')", job_id, token)
    assert len(await site.deliveries()) == 2
    with pytest.raises(asyncpg.UniqueViolationError):
        await site.sql.execute(
            "insert into webhook_deliveries (job_id, project_id, endpoint_id, url, type, payload) "
            "select job_id, project_id, endpoint_id, url, type, payload from webhook_deliveries"
        )


async def test_beginnings_and_progress_are_told_to_those_who_ask_and_not_too_often(
    site: Site, receiver: Receiver
) -> None:
    every = [*DEFAULT, "job.processing", "job.progress"]
    await site.endpoint(receiver.url("/all"), every)
    await site.endpoint(receiver.url("/ends"))
    job_id, token = await site.job(receiver.url("/own"))
    for percent, later in ((1, 0.0), (2, 4.9), (3, 0.2), (4, 4.9), (5, 0.2)):
        await site.pass_time(later)
        await site.sql.execute("update jobs set progress = $1", json.dumps({"value": percent}))
    await site.sql.execute("update jobs set rev = rev + 1")
    await site.sql.fetch("select release_job($1, $2)", job_id, token)
    token = await site.sql.fetchval("select lease_token from claim_job($1, 1, 'w', 60)", job_id)
    await site.sql.fetch("select fail_job($1, $2, 'no_result', 'No.', '{}')", job_id, token)
    seen: dict[str, list[str]] = {}
    for each in await site.deliveries():
        seen.setdefault(each["url"].rpartition("/")[2], []).append(each["type"])
    assert seen == {
        "all": ["job.processing", *["job.progress"] * 3, "job.failed"],
        "ends": ["job.failed"],
        "own": ["job.failed"],
    }


async def test_a_webhook_that_is_being_deleted_does_not_fail_the_end_of_a_job(
    site: Site, dsn: str
) -> None:
    going, _ = await site.endpoint("http://a.example/")
    await site.endpoint("http://b.example/")
    deleting = await asyncpg.connect(dsn)
    transaction = deleting.transaction()
    await transaction.start()
    await deleting.execute("select delete_webhook($1, $2)", site.user, going)
    ending = asyncio.create_task(site.failed())
    waiting = "select exists (select from pg_stat_activity where wait_event_type = 'Lock')"
    async with asyncio.timeout(10):
        while not await deleting.fetchval(waiting):
            await asyncio.sleep(0.01)
    await transaction.commit()
    await deleting.close()
    await ending
    assert [d["host"] for d in await site.deliveries()] == ["b.example"]


async def test_a_url_that_is_none_does_not_fail_the_end_of_a_job(
    site: Site, deliverer: Deliverer
) -> None:
    for url in ("", "nonsense", "http://", "http://[", "http://a b/\r\nX: y", "http://a:b/"):
        await site.failed(url)
    await deliverer.drain()
    attempts = await site.attempts()
    assert len(attempts) >= 5 and all(a["error"] for a in attempts)


async def test_a_disabled_endpoint_and_other_projects_are_told_nothing(
    site: Site, receiver: Receiver
) -> None:
    endpoint, _ = await site.endpoint(receiver.url())
    await site.sql.execute("select update_webhook($1, $2, false, null, null)", site.user, endpoint)
    other = await site.sql.fetchval("select ops.create_project('Other', $1)", site.user)
    await Site(site.sql, site.database, site.user, str(other)).endpoint(receiver.url("/other"))
    await site.failed()
    assert await site.deliveries() == []


# --- Attempts ------------------------------------------------------------------------------


async def test_a_receiver_that_is_down_is_tried_ten_times_in_75_hours_with_one_id_and_body(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.otherwise = answer(500)
    _, secret = await site.endpoint(receiver.url())
    await site.failed()
    begun = (await site.deliveries())[0]["created_at"]
    for number in range(1, 11):
        assert await deliverer.start_due() == 1
        await deliverer.drain()
        assert len(receiver.got) == number
        [waiting] = await site.deliveries()
        assert waiting["attempt"] == number
        if number == 10:
            break
        assert waiting["state"] == "waiting"
        now = await site.sql.fetchval("select baton_now()")
        delay = (waiting["next_attempt_at"] - now).total_seconds()
        assert 0.9 * SCHEDULE[number] - 1 < delay < 1.1 * SCHEDULE[number]
        await site.pass_time(delay - 0.1 if delay > 1 else 0.0)
        assert await deliverer.start_due() == 0  # not before it is due
        await site.pass_time(0.2)
    [dead] = await site.deliveries()
    assert (dead["state"], dead["next_attempt_at"]) == ("dead", None)
    assert 65 < (dead["ended_at"] - begun).total_seconds() / 3600 < 85
    assert {got.body for got in receiver.got} == {receiver.got[0].body}
    assert {got.headers["webhook-id"] for got in receiver.got} == {dead["id"]}
    for got in receiver.got:
        got.verified(secret)
    log = await site.attempts()
    assert [(a["status"], a["error"]) for a in log] == [
        (500, "Answered 500 Internal Server Error.")
    ] * 10
    await site.pass_time(1e6)
    assert await deliverer.start_due() == 0


async def test_each_attempt_carries_its_own_time(site: Site, receiver: Receiver) -> None:
    _, secret = await site.endpoint(receiver.url())
    old = Deliverer(
        site.database, Outbound(LOOPBACK), now=lambda: datetime(2024, 1, 2, 3, 4, 5, 678, UTC)
    )
    await site.failed()
    await old.drain()
    [got] = receiver.got
    assert got.headers["webhook-timestamp"] == "1704164645"
    with pytest.raises(WebhookVerificationError, match="too old"):
        got.verified(secret)
    signed = Webhook(secret).sign(
        got.headers["webhook-id"], datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), got.body.decode()
    )
    assert got.headers["webhook-signature"] == signed


async def test_a_forged_or_changed_message_does_not_verify(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    _, secret = await site.endpoint(receiver.url())
    _, other = await site.endpoint(receiver.url("/other"))
    await site.failed()
    await deliverer.drain()
    [got] = [each for each in receiver.got if each.target == "/hook"]
    got.verified(secret)
    with pytest.raises(WebhookVerificationError):
        got.verified(other)
    got.body = got.body.replace(b"job.failed", b"job.copied")
    with pytest.raises(WebhookVerificationError):
        got.verified(secret)


async def test_a_receiver_that_asks_to_wait_is_given_the_time(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    asking = [429, 502, 503, 504]
    receiver.answers = [answer(status, retry_after="120") for status in asking]
    await site.failed(receiver.url())
    for _ in asking:
        await deliverer.drain()
        assert await site.sql.fetchval("update webhook_deliveries set attempt = 0 returning 1")
        await site.pass_time(115)
        assert await deliverer.start_due() == 0
        await site.pass_time(5.5)
    await deliverer.drain()
    assert [a["status"] for a in await site.attempts()] == [*asking, 204]


async def test_a_time_to_wait_is_no_way_to_be_left_alone_for_ever(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [answer(503, retry_after="99999999"), answer(500, retry_after="3600")]
    await site.endpoint(receiver.url())
    await site.failed()
    await deliverer.drain()
    await site.pass_time(86_401)
    await deliverer.drain()
    assert len(receiver.got) == 2
    await site.pass_time(331)  # the second entry of the schedule: only 429, 502, 503, 504 may ask
    await deliverer.drain()
    assert len(receiver.got) == 3


async def test_gone_disables_the_endpoint_until_somebody_enables_it(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [answer(410)]
    endpoint, _ = await site.endpoint(receiver.url())
    first = await site.failed()
    await deliverer.drain()
    row = await site.sql.fetchrow("select * from webhook_endpoints")
    assert row
    assert (row["enabled"], row["disabled_reason"]) == (False, "The receiver answered 410 Gone.")
    assert [d["state"] for d in await site.deliveries()] == ["dead"]
    await site.failed()
    assert [str(d["job_id"]) for d in await site.deliveries()] == [first]

    await site.sql.execute("select update_webhook($1, $2, true, null, null)", site.user, endpoint)
    await site.failed()
    await deliverer.drain()
    assert [d["state"] for d in await site.deliveries()] == ["dead", "delivered"]


async def test_what_waits_for_an_endpoint_waits_while_it_is_disabled_and_goes_to_its_new_url(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    endpoint, _ = await site.endpoint("http://127.0.0.1:9/nobody")
    await site.failed()
    await deliverer.drain()
    change = "select update_webhook($1, $2, $3, $4, null)"
    await site.sql.execute(change, site.user, endpoint, False, receiver.url("/new"))
    await site.pass_time(1e6)
    assert await deliverer.start_due() == 0
    await site.sql.execute(change, site.user, endpoint, True, None)
    await deliverer.drain()
    assert [got.target for got in receiver.got] == ["/new"]


async def test_an_endpoint_that_fails_for_days_is_disabled_with_the_reason(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    await site.endpoint(receiver.url())
    receiver.answers = [answer(500), answer(200), answer(500), answer(500), answer(500)]
    for later in (0, 4, 1, 4.9, 0.2):  # days
        await site.pass_time(later * 86_400)
        await site.sql.execute("delete from webhook_deliveries")
        row = await site.sql.fetchrow("select enabled, disabled_reason from webhook_endpoints")
        assert row and row["enabled"], row
        await site.failed()
        await deliverer.drain()
    row = await site.sql.fetchrow("select enabled, disabled_reason from webhook_endpoints")
    assert row and not row["enabled"]
    assert row["disabled_reason"].startswith("No attempt has succeeded since 20")


async def test_an_address_inside_is_refused_with_a_sentence_and_tried_again(
    site: Site, receiver: Receiver
) -> None:
    await site.endpoint(receiver.url(host="localhost"))
    await site.failed(receiver.url(host="2130706433"))
    await Deliverer(site.database, Outbound()).drain()
    assert {a["error"] for a in await site.attempts()} == {
        "localhost leads to an address that is not public.",
        "2130706433 leads to an address that is not public.",
    }
    assert {d["state"] for d in await site.deliveries()} == {"waiting"}
    assert receiver.got == []


async def test_a_redirect_is_a_failure(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.otherwise = answer(307, location=receiver.url("/inside"))
    await site.failed(receiver.url())
    await deliverer.drain()
    assert [a["error"] for a in await site.attempts()] == [
        "Answered 307 Temporary Redirect; redirects are not followed."
    ]
    assert [got.target for got in receiver.got] == ["/hook"]


async def test_both_secrets_sign_for_a_day_after_a_rotation(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    endpoint, old = await site.endpoint(receiver.url())
    old_own = await site.project_secret()
    rotate = "select rotate_webhook_secret($1, $2, $3)"
    new = await site.sql.fetchval(rotate, site.user, None, endpoint)
    new_own = await site.sql.fetchval(rotate, site.user, site.project, None)
    assert len({old, new, old_own, new_own}) == 4
    assert await site.project_secret() == new_own

    async def signers(target: str) -> list[bool]:
        await site.failed(receiver.url("/own"))
        await deliverer.drain()
        got = next(each for each in reversed(receiver.got) if each.target == target)
        found = []
        for secret in (old, new) if target == "/hook" else (old_own, new_own):
            try:
                found.append(bool(got.verified(secret)))
            except WebhookVerificationError:
                found.append(False)
        return found

    assert await signers("/hook") == [True, True] == await signers("/own")
    await site.pass_time(86_401)
    assert await signers("/hook") == [False, True] == await signers("/own")


async def test_no_more_than_three_secrets_sign_however_often_one_rotates(site: Site) -> None:
    endpoint, _ = await site.endpoint("http://a.example/")
    rotate = "select rotate_webhook_secret($1, null, $2)"
    made = [await site.sql.fetchval(rotate, site.user, endpoint) for _ in range(5)]
    kept = await site.sql.fetch("select secret from webhook_secrets order by id desc")
    assert [row[0] for row in kept] == [made[4], made[3], made[2]]


# --- Nobody in the way of another ------------------------------------------------------------


async def test_a_dead_receiver_holds_up_neither_other_receivers_nor_too_many_places(
    site: Site, receiver: Receiver
) -> None:
    async with receiving() as dead:
        dead.otherwise = None
        ports = {"dead.example": dead.port, "good.example": receiver.port}

        async def resolve(host: str, port: int) -> list[str]:
            assert ports[host] == port
            return ["127.0.0.1"]

        deliverer = Deliverer(site.database, Outbound(LOOPBACK, resolve))
        for _ in range(60):
            await site.failed(dead.url(host="dead.example"))
        await site.failed(receiver.url(host="good.example"))
        async with delivering(deliverer):
            await receiver.has(1)
            await dead.has(delivery.PER_HOST)
            waits = await site.sql.fetchval(
                "select count(*) from webhook_deliveries "
                "where state = 'waiting' and next_attempt_at <= baton_now()"
            )
            assert (waits, len(dead.got)) == (60 - delivery.PER_HOST, delivery.PER_HOST)


async def test_a_host_that_has_just_failed_gets_one_request_at_a_time(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [answer(500)]
    await site.failed(receiver.url())
    await deliverer.drain()
    receiver.otherwise = None
    for _ in range(5):
        await site.failed(receiver.url())
    assert [await deliverer.start_due() for _ in range(3)] == [1, 0, 0]
    await receiver.has(2)
    await deliverer._stop()


async def test_jobs_end_while_every_receiver_is_silent(
    caller: Caller, sql: asyncpg.Connection, worker: Workers, receiver: Receiver, dsn: str
) -> None:
    receiver.otherwise = None
    await caller.ingest({"title": "feat: a cache"})
    async with open_database(dsn, application_name="baton test", size=6) as database:
        deliverer = Deliverer(database, Outbound(LOOPBACK))
        running, _ = worker(ended=deliverer.wake)
        async with delivering(deliverer):
            working = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
            for _ in range(12):
                job_id = await caller.submit()
                await sql.execute("update jobs set webhook_url = $1", receiver.url())
                async with asyncio.timeout(10):
                    while (await caller.job(job_id))["job"]["status"] != "completed":
                        await asyncio.sleep(0.01)
            await receiver.has(delivery.PER_HOST)
            # All jobs have ended before the first receiver has said anything.
            assert await sql.fetchval("select count(*) from webhook_attempts") == 0
            running.stop()
            await working


async def test_the_end_of_a_job_is_told_at_once(
    caller: Caller,
    sql: asyncpg.Connection,
    worker: Workers,
    receiver: Receiver,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "POLL_EVERY", 3600.0)
    site = Site(sql, None, caller.user_id, caller.project_id)  # type: ignore[arg-type]
    await site.endpoint(receiver.url())
    await caller.ingest({"title": "feat: a cache"})
    async with open_database(dsn, application_name="baton test", size=6) as database:
        deliverer = Deliverer(database, Outbound(LOOPBACK))
        running, _ = worker(ended=deliverer.wake)
        async with delivering(deliverer):
            working = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
            await caller.submit()
            await receiver.has(1)
            running.stop()
            await working


# --- Nothing lost --------------------------------------------------------------------------


async def test_what_a_dead_worker_had_claimed_is_sent_by_another_when_its_lease_is_over(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    _, secret = await site.endpoint(receiver.url())
    await site.failed()
    claim = "select * from claim_webhooks(10, 4, '{}', '{}', 45)"
    [lost] = await site.sql.fetch(claim)
    assert await deliverer.start_due() == 0
    await site.pass_time(46)
    await deliverer.drain()
    [got] = receiver.got
    assert got.headers["webhook-id"] == lost["id"]
    got.verified(secret)
    # The dead one was only slow. Its failure decides nothing any more; it is in the log.
    late = "select webhook_attempted($1, $2, now(), 500, 5, 'Late.', 5, false)"
    await site.sql.fetch(late, lost["id"], lost["leased_until"])
    assert [d["state"] for d in await site.deliveries()] == ["delivered"]
    assert [a["error"] for a in await site.attempts()] == [None, "Late."]


async def test_a_message_outlives_kill_9_of_its_worker_and_the_loss_of_all_connections(
    site: Site, receiver: Receiver, dsn: str
) -> None:
    env = child_environment(DATABASE_URL=dsn, BATON_WEBHOOK_ALLOW="127.0.0.0/8", BATON_LOG="json")

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "worker", env=env, stderr=asyncio.subprocess.DEVNULL
        )

    _, secret = await site.endpoint(receiver.url())
    await site.failed()
    receiver.answers = [None, None]
    first = await start()
    await receiver.has(1)
    first.kill()
    await first.wait()
    # The lease of the dead one is over for whoever connects from now on.
    name = await site.sql.fetchval("select current_database()")
    await site.sql.execute(f"alter database {name} set baton.clock_offset = '1 minute'")
    second = await start()
    await receiver.has(2)
    await site.sql.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = $1 and application_name = 'baton worker'",
        name,
    )
    receiver.cut()
    async with asyncio.timeout(20):
        while not await site.attempts():
            await asyncio.sleep(0.02)
        await site.sql.execute("select replay_webhook($1, id) from webhook_deliveries", site.user)
        while (await site.deliveries())[0]["state"] != "delivered":
            await asyncio.sleep(0.02)
    second.terminate()
    assert await second.wait() == 0
    assert len(receiver.got) == 3
    assert len({(got.headers["webhook-id"], got.body) for got in receiver.got}) == 1
    for got in receiver.got:
        got.verified(secret)


async def test_a_late_failure_counts_for_nothing_and_a_late_success_for_good(site: Site) -> None:
    await site.endpoint("http://127.0.0.1:9/")
    await site.failed()
    claim = "select * from claim_webhooks(10, 4, '{}', '{}', 45)"
    [first] = await site.sql.fetch(claim)
    await site.pass_time(46)
    [second] = await site.sql.fetch(claim)
    assert second["id"] == first["id"]
    failed = "select webhook_attempted($1, $2, now(), 500, 5, 'Late.', null, false)"
    assert await site.sql.fetchval(failed, first["id"], first["leased_until"]) is None
    [waiting] = await site.deliveries()
    assert (waiting["state"], waiting["attempt"]) == ("waiting", 0)
    assert waiting["next_attempt_at"] == second["leased_until"]
    late = "select webhook_attempted($1, $2, now(), 200, 5, null, null, false)"
    assert await site.sql.fetchval(late, first["id"], first["leased_until"]) == "delivered"


async def test_two_workers_send_each_message_once(site: Site, receiver: Receiver, dsn: str) -> None:
    for _ in range(40):
        await site.failed(receiver.url())
    async with open_database(dsn, application_name="baton test", size=4) as other:
        both = [Deliverer(each, Outbound(LOOPBACK)) for each in (site.database, other)]
        await asyncio.gather(*(each.drain() for each in both))
    ids = [got.headers["webhook-id"] for got in receiver.got]
    assert len(ids) == len(set(ids)) == 40


async def test_an_outcome_is_kept_while_the_database_is_away(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.otherwise = None
    await site.failed(receiver.url())
    await deliverer.start_due()
    await receiver.has(1)
    killed = await site.sql.fetchval(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )
    assert killed
    [task] = deliverer._sending
    receiver.cut()
    await task
    assert [d["attempt"] for d in await site.deliveries()] == [1]


async def test_a_worker_that_stops_gives_back_what_it_cannot_finish(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [None]
    await site.failed(receiver.url())
    async with background(deliverer.run()):
        await receiver.has(1)
    assert await Deliverer(site.database, Outbound(LOOPBACK)).start_due() == 1
    await receiver.has(2)


async def test_a_worker_that_stops_lets_a_request_on_its_way_finish(
    site: Site, deliverer: Deliverer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "DRAIN", 10.0)
    await site.failed(receiver.url())
    async with background(deliverer.run()):
        await receiver.has(1)
    assert [d["state"] for d in await site.deliveries()] == ["delivered"]


async def test_a_replay_sends_the_same_message_again(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [answer(410)]
    await site.failed(receiver.url())
    await deliverer.drain()
    [dead] = await site.deliveries()
    assert dead["state"] == "dead"
    await site.sql.execute("select replay_webhook($1, $2)", site.user, dead["id"])
    await deliverer.drain()
    first, second = receiver.got
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == dead["id"]
    assert first.body == second.body
    [delivered] = await site.deliveries()
    assert (delivered["state"], delivered["attempt"]) == ("delivered", 1)
    assert [a["status"] for a in await site.attempts()] == [410, 204]


# --- What people see -----------------------------------------------------------------------


async def test_a_log_holds_hosts_and_no_secret_no_body_and_no_token_of_a_url(
    site: Site, deliverer: Deliverer, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.answers = [answer(500, b"inside information")]
    _, secret = await site.endpoint(receiver.url("/path-t0k?token=t1k"))
    await site.failed()
    await deliverer.drain()
    said = "".join(
        f"{vars(record)}" for record in caplog.records if record.name.startswith("baton")
    )
    assert "'host': '127.0.0.1'" in said and "'status': 500" in said
    for hidden in (secret, secret[6:], "t0k", "t1k", "Nothing.", "inside information"):
        assert hidden not in said
    assert "inside information" not in repr(await site.attempts())


async def test_an_operator_sees_who_does_not_answer_and_no_secret(
    site: Site, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.otherwise = answer(500)
    endpoint, secret = await site.endpoint(receiver.url("/?token=t0k"))
    await site.failed()
    await site.failed()
    await deliverer.drain()
    [row] = await site.sql.fetch("select * from ops.webhook_backlog")
    assert (str(row["endpoint_id"]), row["host"], row["waiting"]) == (endpoint, "127.0.0.1", 2)
    assert row["oldest"] == (await site.deliveries())[0]["created_at"]
    assert row["last_error"] == "Answered 500 Internal Server Error."
    assert secret not in repr(row) and "t0k" not in repr(row)
    said = await site.sql.fetchval("select obj_description('ops.webhook_backlog'::regclass)")
    assert "last" in said or "latest" in said
