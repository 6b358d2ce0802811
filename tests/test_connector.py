"""Procrastinate's own queries and calls, all of them, on asyncpg."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import procrastinate
import psycopg
import psycopg_pool
import pytest
from conftest import Caller, Workers, with_database
from procrastinate import exceptions, jobs, manager
from procrastinate import sql as stock

from app.connector import AsyncpgConnector, init_connection, translate
from app.db import Database

TEMPLATED = sorted(set(stock.queries) - {"listen_queue"})  # LISTEN takes no parameter
CHANNEL = "procrastinate_queue_v1#jobs"


@pytest.fixture
async def raw(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection with the codecs of the service."""
    connection = await asyncpg.connect(dsn)
    await init_connection(connection)
    yield connection
    await connection.close()


@pytest.fixture
def connector(database: Database) -> AsyncpgConnector:
    return AsyncpgConnector(database.pool, database.dsn)


@pytest.fixture
def tickets(connector: AsyncpgConnector) -> procrastinate.App:
    return procrastinate.App(connector=connector)


def job(**fields: Any) -> jobs.Job:
    made = {"queue": "jobs", "task_name": "t", "lock": None, "queueing_lock": None, **fields}
    return jobs.Job(id=None, **made)


async def test_every_query_of_procrastinate_prepares(raw: asyncpg.Connection) -> None:
    assert len(TEMPLATED) >= 19
    for name in TEMPLATED:
        text, names = translate(stock.queries[name])
        prepared = await raw.prepare(text)
        assert len(prepared.get_parameters()) == len(names), name
        assert "%(" not in text, name


def test_a_name_that_is_used_twice_is_one_parameter() -> None:
    assert translate("%(a)s %(b)s %(a)s 5%%") == ("$1 $2 $1 5%", ("a", "b"))


async def test_a_batch_keeps_its_order_and_its_arguments(
    tickets: procrastinate.App, sql: asyncpg.Connection
) -> None:
    asked = [{"n": n, "deep": {"é": [n, None, 1.5]}} for n in range(50)]
    when = datetime.now(UTC) + timedelta(hours=1)
    made = await tickets.job_manager.batch_defer_jobs_async(
        [job(task_kwargs=kwargs, priority=7, scheduled_at=when) for kwargs in asked]
    )
    rows = await sql.fetch("select id, args, priority, scheduled_at from procrastinate_jobs")
    stored = {row["id"]: orjson.loads(row["args"]) for row in rows}
    assert [stored[each.id] for each in made] == asked
    assert {(row["priority"], row["scheduled_at"]) for row in rows} == {(7, when)}


async def test_a_ticket_is_fetched_retried_and_finished(tickets: procrastinate.App) -> None:
    queue = tickets.job_manager
    worker_id = await queue.register_worker()
    made = await queue.defer_job_async(job(task_kwargs={"job_id": "x"}))
    assert await queue.fetch_job(queues=["other"], worker_id=worker_id) is None
    fetched = await queue.fetch_job(queues=["jobs"], worker_id=worker_id)
    assert fetched and fetched.id == made.id and fetched.task_kwargs == {"job_id": "x"}
    assert fetched.worker_id == worker_id

    await queue.retry_job(fetched, retry_at=datetime.now(UTC), priority=3)
    again = await queue.fetch_job(queues=None, worker_id=worker_id)
    assert again and (again.attempts, again.priority) == (1, 3)
    await queue.finish_job(again, status=jobs.Status.SUCCEEDED, delete_job=False)
    assert again.id and await queue.get_job_status_async(again.id) is jobs.Status.SUCCEEDED


async def test_a_ticket_can_be_cancelled_or_its_run_aborted(tickets: procrastinate.App) -> None:
    queue = tickets.job_manager
    worker_id = await queue.register_worker()
    first, second = await queue.batch_defer_jobs_async([job(), job()])
    assert first.id and second.id
    assert await queue.cancel_job_by_id_async(first.id)
    assert not await queue.cancel_job_by_id_async(first.id)
    assert await queue.get_job_status_async(first.id) is jobs.Status.CANCELLED

    await queue.fetch_job(queues=None, worker_id=worker_id)
    assert await queue.cancel_job_by_id_async(second.id, abort=True)
    assert list(await queue.list_jobs_to_abort_async()) == [second.id]
    assert list(await queue.list_jobs_to_abort_async(queue="other")) == []


@pytest.fixture
async def ticket_log(sql: asyncpg.Connection) -> None:
    """Procrastinate's log of tickets, which Baton has switched off: two of its queries read it."""
    await sql.execute("alter table procrastinate_jobs enable trigger user")


async def test_tickets_of_silent_workers_are_stalled(
    tickets: procrastinate.App, ticket_log: None, sql: asyncpg.Connection
) -> None:
    queue = tickets.job_manager
    worker_id = await queue.register_worker()
    made = await queue.defer_job_async(job())
    await queue.fetch_job(queues=None, worker_id=worker_id)
    assert list(await queue.get_stalled_jobs(seconds_since_heartbeat=30.5)) == []
    with pytest.warns(DeprecationWarning, match="nb_seconds"):
        assert list(await queue.get_stalled_jobs(nb_seconds=60)) == []
    assert await queue.prune_stalled_workers(30.5) == []

    age = "interval '1 minute 5 seconds'"
    await sql.execute(f"update procrastinate_workers set last_heartbeat = now() - {age}")
    await sql.execute(f"update procrastinate_events set at = now() - {age}")
    by_heartbeat = await queue.get_stalled_jobs(seconds_since_heartbeat=60)
    with pytest.warns(DeprecationWarning, match="nb_seconds"):
        by_start = await queue.get_stalled_jobs(nb_seconds=60, queue="jobs", task_name="t")
    assert [j.id for j in by_heartbeat] == [j.id for j in by_start] == [made.id]

    await queue.update_heartbeat(worker_id)
    assert list(await queue.get_stalled_jobs(seconds_since_heartbeat=60)) == []
    await sql.execute(f"update procrastinate_workers set last_heartbeat = now() - {age}")
    assert list(await queue.prune_stalled_workers(60)) == [worker_id]


async def test_a_worker_that_leaves_is_gone(
    tickets: procrastinate.App, sql: asyncpg.Connection
) -> None:
    await tickets.job_manager.unregister_worker(await tickets.job_manager.register_worker())
    assert await sql.fetchval("select count(*) from procrastinate_workers") == 0


async def test_old_tickets_are_deleted_and_younger_ones_are_kept(
    tickets: procrastinate.App, ticket_log: None, sql: asyncpg.Connection
) -> None:
    queue = tickets.job_manager
    for made in await queue.batch_defer_jobs_async([job(), job()]):
        await queue.finish_job(made, status=jobs.Status.FAILED, delete_job=False)
    old = await sql.fetchval("select min(id) from procrastinate_jobs")
    await sql.execute(
        "update procrastinate_events set at = at - interval '3 hours' where job_id = $1", old
    )
    await queue.delete_old_jobs(nb_hours=2)
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 2
    await queue.delete_old_jobs(nb_hours=2, include_failed=True)
    assert await sql.fetchval("select array_agg(id) from procrastinate_jobs") == [old + 1]


async def test_queues_tasks_locks_and_tickets_can_be_listed(tickets: procrastinate.App) -> None:
    queue = tickets.job_manager
    made = await queue.defer_job_async(job(lock="l"))
    assert [j.id for j in await queue.list_jobs_async(id=made.id, status="todo")] == [made.id]
    for rows, name in (
        (await queue.list_queues_async(), "jobs"),
        (await queue.list_tasks_async(), "t"),
        (await queue.list_locks_async(), "l"),
    ):
        [row] = rows
        assert (row["name"], row["jobs_count"], row["todo"], row["doing"]) == (name, 1, 1, 0)
    assert await queue.check_connection_async()


async def test_a_periodic_ticket_is_deferred_once(tickets: procrastinate.App) -> None:
    periodic = job(task_kwargs={"timestamp": 60})
    assert await tickets.job_manager.defer_periodic_job(periodic, "p", 60)
    assert await tickets.job_manager.defer_periodic_job(periodic, "p", 60) is None


async def test_a_queueing_lock_is_named_whatever_it_is_called(tickets: procrastinate.App) -> None:
    await tickets.job_manager.defer_job_async(job(queueing_lock="x)y"))
    with pytest.raises(exceptions.AlreadyEnqueued, match=re.escape("lock x)y")) as caught:
        await tickets.job_manager.defer_job_async(job(queueing_lock="x)y"))
    cause = caught.value.__cause__
    assert isinstance(cause, exceptions.UniqueViolation)
    assert (cause.constraint_name, cause.queueing_lock) == (
        manager.QUEUEING_LOCK_CONSTRAINT,
        "x)y",
    )


async def test_a_ticket_belongs_to_the_transaction_of_its_caller(
    tickets: procrastinate.App, raw: asyncpg.Connection, sql: asyncpg.Connection
) -> None:
    transaction = raw.transaction()
    await transaction.start()
    await tickets.job_manager.defer_job_async(job(), connection=raw)
    await transaction.rollback()
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    async with raw.transaction():
        made = await tickets.job_manager.defer_job_async(job(), connection=raw)
        assert made.id
        assert await tickets.job_manager.get_job_status_async(made.id, connection=raw)
        assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 1


async def test_foreign_errors_become_procrastinate_s_own(
    connector: AsyncpgConnector, database: Database, cluster: str
) -> None:
    with pytest.raises(exceptions.ConnectorException) as caught:
        await connector.execute_query_async("select 1/0")
    assert isinstance(caught.value.__cause__, asyncpg.DivisionByZeroError)
    with pytest.raises(exceptions.ConnectorException) as caught:
        await connector.execute_query_all_async("select no_such_column")
    assert isinstance(caught.value.__cause__, asyncpg.UndefinedColumnError)
    with pytest.raises(exceptions.NoResult):
        await connector.execute_query_one_async("select 1 where false")
    async with database.connection() as connection:
        with pytest.raises(exceptions.NoResult):
            await connector.execute_query_one_async_with_connection(
                connection.raw, "select 1 where %(yes)s::boolean", yes=False
            )
    pool = await asyncpg.create_pool(with_database(cluster, "postgres"), min_size=0, max_size=1)
    pool.terminate()
    closed = AsyncpgConnector(pool, "")
    with pytest.raises(exceptions.ConnectorException) as caught:
        await closed.execute_query_all_async("select 1")
    assert isinstance(caught.value.__cause__, asyncpg.InterfaceError)


async def test_cancelling_a_query_is_no_error_of_the_connector(
    connector: AsyncpgConnector, sql: asyncpg.Connection
) -> None:
    task = asyncio.create_task(connector.execute_query_async("select pg_sleep(30)"))
    async with asyncio.timeout(5):
        while not await sql.fetchval(
            "select count(*) from pg_stat_activity"
            " where query = 'select pg_sleep(30)' and datname = current_database()"
        ):
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_sync_connector_is_refused(connector: AsyncpgConnector) -> None:
    with pytest.raises(exceptions.SyncConnectorConfigurationError):
        connector.get_sync_connector()


class Ears:
    """A listener that keeps what it hears."""

    def __init__(self, connector: AsyncpgConnector) -> None:
        self.heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.task = asyncio.create_task(connector.listen_notify(self._hear, [CHANNEL]))

    async def _hear(self, *, channel: str, payload: str) -> None:
        self.heard.put_nowait((channel, payload))

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(5):
            return await self.heard.get()


@pytest.fixture
async def ears(connector: AsyncpgConnector) -> AsyncIterator[Ears]:
    ears = Ears(connector)
    channel, payload = await ears.next()
    assert (channel, orjson.loads(payload)["type"]) == (CHANNEL, "job_inserted")
    yield ears
    ears.task.cancel()
    await asyncio.wait([ears.task])


async def test_a_notification_arrives(ears: Ears, sql: asyncpg.Connection) -> None:
    await sql.execute("select pg_notify($1, 'hello')", CHANNEL)
    assert await ears.next() == (CHANNEL, "hello")
    assert ears.heard.empty()


async def test_a_killed_listener_listens_again_and_wakes_once(
    ears: Ears, sql: asyncpg.Connection
) -> None:
    killed = await sql.fetchval(
        "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity "
        "where application_name = 'baton listen' and datname = current_database()"
    )
    assert killed == 1
    channel, payload = await ears.next()
    assert (channel, orjson.loads(payload)) == (CHANNEL, {"type": "job_inserted", "job_id": 0})
    await sql.execute("select pg_notify($1, 'after')", CHANNEL)
    assert await ears.next() == (CHANNEL, "after")
    assert ears.heard.empty()


async def test_a_listener_that_stops_leaves_no_connection(
    connector: AsyncpgConnector, sql: asyncpg.Connection
) -> None:
    ears = Ears(connector)
    await ears.next()
    ears.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ears.task
    async with asyncio.timeout(5):
        while await sql.fetchval(
            "select count(*) from pg_stat_activity "
            "where application_name = 'baton listen' and datname = current_database()"
        ):
            await asyncio.sleep(0.01)


async def test_psycopg_opens_no_connection(
    caller: Caller, worker: Workers, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("psycopg connects")

    for target in (psycopg.Connection, psycopg.AsyncConnection):
        monkeypatch.setattr(target, "connect", refuse)
    for pool in (psycopg_pool.ConnectionPool, psycopg_pool.AsyncConnectionPool):
        monkeypatch.setattr(pool, "__init__", refuse)
    await caller.ingest({"title": "feat: a thing", "content": "We decided to do it."})
    job_id = await caller.submit()
    running, _ = worker()
    task = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
    async with asyncio.timeout(10):
        while (await caller.job(job_id))["job"]["status"] != "completed":
            await asyncio.sleep(0.02)
    names = await sql.fetch(
        "select distinct application_name from pg_stat_activity where pid <> pg_backend_pid() "
        "and datname = current_database() and backend_type = 'client backend'"
    )
    running.stop()
    await task
    assert {row[0] for row in names} <= {"baton test", "baton listen", "baton serve", "psql"}
    assert "baton listen" in {row[0] for row in names}


async def test_a_uuid_is_a_string_that_orjson_can_write(raw: asyncpg.Connection) -> None:
    row = await raw.fetchrow("select gen_random_uuid() as id, '{\"a\": 1}'::jsonb as data")
    assert row is not None
    assert isinstance(row["id"], str) and re.fullmatch(r"[0-9a-f-]{36}", row["id"])
    assert orjson.loads(orjson.dumps(dict(row))) == {"id": row["id"], "data": {"a": 1}}
    assert await raw.fetchval("select $1::uuid", row["id"].upper()) == row["id"]
    assert await raw.fetchval("select $1::uuid[]", [row["id"]]) == [row["id"]]


async def test_json_makes_the_round_trip(raw: asyncpg.Connection) -> None:
    values: tuple[Any, ...] = ({}, [], "text", 5, 1.5, None, True, {"é": {"b": ["\t", "🙂"]}})
    for value in values:
        for kind in ("json", "jsonb"):
            assert await raw.fetchval(f"select $1::{kind}", [value]) == [value]


async def test_jsonb_makes_the_round_trip_inside_an_array_of_composites(
    raw: asyncpg.Connection,
) -> None:
    given = ("jobs", "t", 0, None, None, {"é": [1, {"b": None}]}, None)
    answered = await raw.fetchval("select $1::procrastinate_job_to_defer_v1[]", [given, given])
    assert [tuple(each) for each in answered] == [given, given]
