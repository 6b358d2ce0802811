"""A ticket carries the job's id, commits with its job, and a bell tells the workers."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from conftest import Caller

from app.db import Database, Refused, Unavailable
from app.queue import CHANGES, GENERATE, QUEUE, Bell, make_queue


@pytest.fixture
async def heard(sql: asyncpg.Connection) -> AsyncIterator[asyncio.Queue[str]]:
    """What a worker that listens hears."""
    inbox: asyncio.Queue[str] = asyncio.Queue()
    await sql.add_listener(f"procrastinate_queue_v1#{QUEUE}", lambda *a: inbox.put_nowait(a[3]))
    yield inbox


async def test_a_ticket_carries_the_id_of_its_job_and_nothing_else(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    job_id = await caller.submit()
    row = await sql.fetchrow("select * from procrastinate_jobs")
    assert row is not None
    assert row["args"] == f'{{"job_id": "{job_id}"}}'
    assert (row["task_name"], row["queue_name"], row["status"]) == (GENERATE, QUEUE, "todo")
    assert (row["lock"], row["queueing_lock"], row["scheduled_at"]) == (None, None, None)
    assert await sql.fetchval("select ticket_id from jobs") == row["id"]


async def test_a_ticket_commits_with_its_job_and_goes_with_its_rollback(
    caller: Caller, api: Database, sql: asyncpg.Connection
) -> None:
    submit: tuple[Any, ...] = (
        "submit_job",
        caller.user_id,
        caller.project_id,
        "handoff",
        None,
        None,
        None,
        {},
        {},
        None,
        None,
        0,
    )
    with pytest.raises(ZeroDivisionError):
        async with api.transaction() as connection:
            await connection.row(*submit)
            raise ZeroDivisionError
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sql.fetchval("select count(*) from jobs") == 0

    async with api.transaction() as connection:
        await connection.row(*submit)
        assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 1
    assert await sql.fetchval("select count(*) from jobs") == 1


async def test_procrastinate_can_defer_in_the_transaction_of_a_caller(
    database: Database, sql: asyncpg.Connection
) -> None:
    queue = make_queue(database)
    async with database.transaction() as connection:
        task = queue.configure_task(GENERATE, queue=QUEUE, connection=connection.raw)
        await task.defer_async(job_id="x")
        assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 1


async def test_storing_a_ticket_notifies_nobody(
    caller: Caller, api: Database, heard: asyncio.Queue[str], sql: asyncpg.Connection
) -> None:
    await api.row(
        "submit_job",
        caller.user_id,
        caller.project_id,
        "handoff",
        None,
        None,
        None,
        {},
        {},
        None,
        None,
        0,
    )
    await sql.execute("select pg_notify($1, 'end')", f"procrastinate_queue_v1#{QUEUE}")
    async with asyncio.timeout(5):
        assert await heard.get() == "end"


async def test_a_bell_is_heard_in_the_queue_that_workers_listen_to(
    bell: Bell, heard: asyncio.Queue[str]
) -> None:
    bell.ring()
    async with asyncio.timeout(5):
        assert '"job_inserted"' in await heard.get()


@pytest.mark.parametrize("error", [Unavailable("away"), Refused("its queue is full")])
async def test_a_bell_that_cannot_be_heard_is_no_error_and_rings_again_later(
    error: Exception,
    bell: Bell,
    database: Database,
    heard: asyncio.Queue[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value, tried = database.value, asyncio.Event()

    async def away(*_: object, **__: object) -> None:
        tried.set()
        raise error

    monkeypatch.setattr(database, "value", away)
    bell.ring()
    async with asyncio.timeout(5):
        await tried.wait()
        monkeypatch.setattr(database, "value", value)
        bell.ring()
        await heard.get()


async def test_changed_jobs_are_announced_together_and_each_once(
    bell: Bell, sql: asyncpg.Connection
) -> None:
    inbox: asyncio.Queue[str] = asyncio.Queue()
    await sql.add_listener(CHANGES, lambda *a: inbox.put_nowait(a[3]))
    ids = {str(uuid.uuid4()) for _ in range(450)}  # more than a payload can hold
    for job_id in [*ids, *ids]:
        bell.announce(job_id)
    bell.ring()
    heard: list[str] = []
    async with asyncio.timeout(5):
        while len(heard) < len(ids):
            heard += (await inbox.get()).split(" ")
    assert sorted(heard) == sorted(ids)
    assert inbox.empty()


def test_the_name_of_the_queue_fits_into_a_channel() -> None:
    assert len(QUEUE.encode()) <= 40
