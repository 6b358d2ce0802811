"""Backups: a dump restores into a database that does nothing until it is told to, and then all."""

import asyncio
import logging
import secrets
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from chaos.receiver import receiving
from conftest import Caller, Workers, with_database
from test_worker import Gate, Shop, running

from app import sweeper
from app.background import background
from app.db import Database, open_database
from app.embedded import EmbeddedUnavailable, program
from app.migration import migrate
from app.queue import Bell
from app.settings import Settings
from app.sweeper import SWEEP_TICKS, Sweeper
from tasks import delivery, worker
from tasks.delivery import Deliverer
from tasks.outbound import Outbound
from tasks.worker import run_worker

Drain = Callable[..., Awaitable[None]]
COPY = "This database is a restored copy of another one."
UNOWNED = ("--no-owner", "--no-privileges")  # the new cluster need not know the roles
LOOPBACK = (ip_network("127.0.0.0/8"),)


async def until(sql: asyncpg.Connection, condition: str) -> None:
    """Until a query answers true; there is no signal for what others commit."""
    async with asyncio.timeout(60):
        while not await sql.fetchval(f"select {condition}"):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def new_database(cluster: str, ending: str = "") -> AsyncIterator[str]:
    """A DSN of a database that is dropped again."""
    admin = await asyncpg.connect(cluster)
    name = f"baton_copy_{secrets.token_hex(6)}"
    await admin.execute(f"create database {name} {ending}")
    try:
        yield with_database(cluster, name)
    finally:
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


@pytest.fixture
async def sql(sql: asyncpg.Connection) -> asyncpg.Connection:
    """That of a database which knows itself, as `baton migrate` leaves it."""
    await sql.execute("select ops.go_live()")
    return sql


@pytest.fixture
async def restored(cluster: str) -> AsyncIterator[str]:
    async with new_database(cluster) as dsn:
        yield dsn


async def tool(cluster: str, name: str) -> Path:
    """PostgreSQL's program of the server's version: another one may write what it cannot read."""
    connection = await asyncpg.connect(cluster)
    major = connection.get_server_version().major
    await connection.close()
    installed = Path(f"/usr/lib/postgresql/{major}/bin/{name}")
    try:
        bundled = program(name)
    except EmbeddedUnavailable:
        return installed
    return bundled if f"pginstall{major}" in str(bundled) else installed


async def copied(cluster: str, dsn: str, target: str, folder: Path) -> None:
    """What docs/backup.md says: dump, and restore into a new database."""
    dump = str(folder / "baton.dump")
    for name, *args in (
        ("pg_dump", "--format=custom", f"--file={dump}", dsn),
        ("pg_restore", "--exit-on-error", *UNOWNED, f"--dbname={target}", dump),
    ):
        command = [str(await tool(cluster, name)), *args]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    await migrate(target)


class Looks:
    """Counts how often the processes of a database asked for something to do, and hurries them."""

    def __init__(self, dsn: str, patch: pytest.MonkeyPatch) -> None:
        self.dsn = dsn
        self.seen = {"sweeper": 0, "tickets": 0, "webhooks": 0}
        self._changed = asyncio.Condition()
        self._spy(patch, sweeper.Sweeper, "held", "sweeper")
        self._spy(patch, worker._Tickets, "fetch_job", "tickets")
        self._spy(patch, delivery.Deliverer, "start_due", "webhooks")
        for module, name in ((sweeper, "TICK"), (worker, "POLL_EVERY"), (delivery, "POLL_EVERY")):
            patch.setattr(module, name, 0.02)

    def _spy(self, patch: pytest.MonkeyPatch, owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        async def spied(*args: Any, **options: Any) -> Any:
            answer = await original(*args, **options)
            async with self._changed:
                self.seen[what] += getattr(args[0], "_database", self).dsn == self.dsn
                self._changed.notify_all()
            return answer

        patch.setattr(owner, name, spied)

    async def again(self, **times: int) -> None:
        """Until there have been so many more looks."""
        wanted = {what: self.seen[what] + more for what, more in times.items()}
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(
                lambda: all(self.seen[what] >= number for what, number in wanted.items())
            )


@asynccontextmanager
async def working(dsn: str, provider: Gate, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """`baton worker`, on that database and with that provider."""

    @asynccontextmanager
    async def open_provider(_: Settings) -> AsyncIterator[Gate]:
        yield provider

    patch.setattr(worker, "open_provider", open_provider)
    task = asyncio.create_task(run_worker(Settings(database_url=dsn, webhook_allow=LOOPBACK)))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


ALL = "select id, status, attempt, rev, ticket_id from jobs order by id"


async def test_a_restored_dump_runs_and_sends_nothing_until_told_to_and_then_everything_once(
    cluster: str, dsn: str, restored: str, tmp_path: Path, sql: asyncpg.Connection, caller: Caller,
    database: Database, worker: Workers, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    async with receiving() as receiver:
        await caller.ingest({"title": "feat: a thing"})
        hook = {"project_id": caller.project_id, "url": receiver.url()}
        made = await caller.http.post("/webhooks", json=hook)
        assert made.status_code == 201, made.text
        gate = Gate(opened=True)
        original, executor = worker(gate, concurrency=1)  # full, it takes no other job
        async with running(original), background(executor.renew_forever()):
            finished = await caller.submit()
            await until(sql, "count(*) = 1 from webhook_deliveries")
            gate.opened.clear()
            processing = await caller.submit()
            await gate.holds(1)
            pending = [await caller.submit() for _ in range(3)]
            parked = await caller.submit()
            token = await sql.fetchval(
                "select lease_token from claim_job($1, (select ticket_id from jobs where id = $1), "
                "'w', 60)", parked,
            )  # fmt: skip
            await sql.execute(
                "select park_job($1, $2, 3600, 'generation_failed', 'Busy.', '{}')", parked, token
            )
            before = await sql.fetch(ALL)
            assert [row["status"] for row in before] == [
                "completed", "processing", "pending", "pending", "pending", "pending",
            ]  # fmt: skip
            await copied(cluster, dsn, restored, tmp_path)

            # The original goes on, with what it has.
            original.stop()
            gate.opened.set()
            await until(sql, f"status = 'completed' from jobs where id = '{processing}'")
        async with open_database(dsn, application_name="baton test", size=2) as own:
            await Deliverer(own, Outbound(LOOPBACK)).drain()
        first = [got.headers["webhook-id"] for got in receiver.got]
        assert len(set(first)) == len(first) == 2

        copy = await asyncpg.connect(restored)
        again = Gate(opened=True)
        looks = Looks(restored, monkeypatch)
        async with working(restored, again, monkeypatch):
            await looks.again(sweeper=2 * SWEEP_TICKS, tickets=5, webhooks=5)
            assert await copy.fetch(ALL) == before
            assert again.total == 0 and len(receiver.got) == 2
            assert await sql.fetchval("select hold_reason()") is None

            # Time passes.
            await copy.execute("update leases set expires_at = baton_now()")
            await copy.execute("update job_due set not_before = baton_now()")
            assert await copy.fetchval("select ops.go_live()") is True
            await until(copy, "count(*) = 6 from webhook_deliveries where state = 'delivered'")
        jobs = await copy.fetch("select id, status, attempt from jobs order by id")
        assert [job["status"] for job in jobs] == ["completed"] * 6
        assert {str(job["id"]): job["attempt"] for job in jobs} == {
            finished: 1, processing: 2, **dict.fromkeys(pending, 1), parked: 2,
        }  # fmt: skip
        assert again.total == 5  # all but the finished one
        assert await copy.fetchval("select count(*) from handoffs") == 6
        sent = [got.headers["webhook-id"] for got in receiver.got[2:]]
        assert len(set(sent)) == len(sent) == 6
        assert first[0] in sent  # what both sent has the same id
        await copy.close()

    statuses = await sql.fetch("select status from jobs order by id")
    assert [row[0] for row in statuses] == ["completed"] * 2 + ["pending"] * 4


@pytest.fixture
async def shop(api: Database, ops: asyncpg.Connection, sql: asyncpg.Connection) -> Shop:
    user = str(await ops.fetchval("select ops.create_user('ada@example.com')"))
    project = str(await ops.fetchval("select ops.create_project('Demo', $1)", user))
    return Shop(api, sql, user, project)


@pytest.fixture
async def copy(
    cluster: str, dsn: str, shop: Shop, sql: asyncpg.Connection
) -> AsyncIterator[asyncpg.Connection]:
    """A copy by `create database ... template`, with a job and a webhook that wait."""
    await shop.submit()
    await sql.execute(
        "insert into webhook_deliveries (job_id, project_id, url, type, payload) "
        "select id, project_id, 'http://a', 'job.failed', '{}' from jobs"
    )
    await shop.api.pool.expire_connections()
    await sql.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )
    name = await sql.fetchval("select current_database()")
    await sql.close()
    async with new_database(cluster, f"template {name}") as copy:
        connection = await asyncpg.connect(copy)
        yield connection
        await connection.close()


# As version 2 has them: a worker of that version is held as well.
CLAIM = "select count(*) from jobs j, claim_job(j.id, j.ticket_id, 'w', 60)"
CLAIM_WEBHOOKS = "select count(*) from claim_webhooks(10, 10, '{}', '{}', 60)"


async def test_a_copy_gives_jobs_and_webhooks_to_nobody(copy: asyncpg.Connection) -> None:
    assert await copy.fetchval("select hold_reason()") == COPY
    assert await copy.fetchval(CLAIM) == 0
    assert await copy.fetchval(CLAIM_WEBHOOKS) == 0
    await copy.execute("select ops.go_live()")
    assert await copy.fetchval("select hold_reason()") is None
    assert await copy.fetchval(CLAIM) == 1
    assert await copy.fetchval(CLAIM_WEBHOOKS) == 1
    logged = await copy.fetchrow("select * from ops.audit order by id desc")
    assert logged is not None and logged["what"] == "go_live" and COPY in logged["detail"]


async def test_a_new_database_is_no_copy_though_who_made_it_may_see_more_than_workers(
    empty_dsn: str,
) -> None:
    connection = await asyncpg.connect(empty_dsn)
    await connection.execute("revoke execute on function pg_control_system() from public")
    await migrate(empty_dsn)
    await connection.execute("set role baton_worker")
    assert await connection.fetchval("select hold_reason()") is None
    await connection.close()


async def test_migrating_a_copy_does_not_let_it_go(copy: asyncpg.Connection, dsn: str) -> None:
    await migrate(with_database(dsn, await copy.fetchval("select current_database()")))
    assert await copy.fetchval("select hold_reason()") == COPY


async def test_what_is_held_by_hand_ends_what_runs_and_begins_nothing(
    shop: Shop, sql: asyncpg.Connection, worker: Workers, drain: Drain, bell: Bell,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "baton.sweeper")
    sweeper = Sweeper(shop.api, bell)
    gate = Gate()
    made, _ = worker(gate)
    event = {"source": "github", "event_type": "commit", "title": "feat: a thing"}
    await shop.api.row("ingest_events", shop.user, shop.project, [event])
    async with running(made):
        runs = await shop.submit()
        await gate.holds(1)
        await sql.execute("select ops.hold('We copy the volume.')")
        gate.opened.set()
        await shop.until("status = 'completed' from jobs where id = $1", runs)

    waits = await shop.submit()
    for held in (True, False):
        assert await sweeper.held() is held
        await drain(gate, on_hold=lambda: sweeper.hold_reason is not None)
        assert await shop.status(waits) == ("pending" if held else "completed")
        assert await sql.fetchval("select ops.go_live()") is held
    assert gate.total == 2
    assert [(r.message, getattr(r, "reason", None)) for r in caplog.records] == [
        ("held", "We copy the volume."), ("live", None),
    ]  # fmt: skip
    audit = await sql.fetch("select what, detail ->> 'reason' as reason from ops.audit order by id")
    assert [tuple(row) for row in audit[-3:]] == [
        ("hold", "We copy the volume."), ("go_live", "We copy the volume."), ("go_live", None),
    ]  # fmt: skip


async def test_a_sweeper_leaves_a_held_database_as_it_is(
    shop: Shop, sql: asyncpg.Connection, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an inspection of a backup finds must not be gone by then, nor announced as failed."""
    job = await shop.submit()
    await sql.execute("update jobs set deadline_at = baton_now()")
    await sql.execute("select ops.hold('Somebody looks at it.')")
    looks = Looks(shop.api.dsn, monkeypatch)
    async with background(Sweeper(shop.api, bell).run()):
        await looks.again(sweeper=2 * SWEEP_TICKS)
        assert await shop.status(job) == "pending"
        await sql.execute("select ops.go_live()")
        await shop.until("status = 'failed' from jobs")


async def test_a_copy_of_what_was_held_by_hand_is_held(copy: asyncpg.Connection) -> None:
    await copy.execute("select ops.hold('Before the copy.')")
    assert await copy.fetchval("select hold_reason()") == "Before the copy."
    assert await copy.fetchval("select ops.go_live()") is True


async def test_to_let_go_what_is_not_held_changes_nothing(sql: asyncpg.Connection) -> None:
    before = await sql.fetch("select * from installation")
    assert await sql.fetchval("select ops.go_live()") is False
    assert await sql.fetch("select * from installation") == before


@pytest.mark.parametrize("reason", [None, "", "  ", "x" * 301])
async def test_a_hold_needs_a_reason(sql: asyncpg.Connection, reason: str | None) -> None:
    with pytest.raises(asyncpg.PostgresError, match="^reason: ") as caught:
        await sql.execute("select ops.hold($1)", reason)
    assert caught.value.sqlstate == "BT400"
    assert await sql.fetchval("select hold_reason()") is None


async def test_a_server_that_hides_its_identifier_is_known_by_the_oid_of_the_database(
    sql: asyncpg.Connection,
) -> None:
    oid = await sql.fetchval("select oid from pg_database where datname = current_database()")
    system = await sql.fetchval("select system_identifier from pg_control_system()")
    assert await sql.fetchval("select database_identity()") == f"{system}/{oid}"
    role = f"baton_test_{secrets.token_hex(6)}"
    await sql.execute("begin")  # which takes the role away again
    await sql.execute("revoke execute on function pg_control_system() from public")
    await sql.execute(f"create role {role}")
    await sql.execute(f"grant execute on function database_identity() to {role}")
    await sql.execute(f"set local role {role}")
    assert await sql.fetchval("select database_identity()") == f"?/{oid}"
    await sql.execute("rollback")
