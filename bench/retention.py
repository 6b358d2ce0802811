"""What does the removal of a backlog cost those who work meanwhile, and what would partitions save?

    python -m bench.retention purge [--rows 300000]
    python -m bench.retention partitions [--rows 1000000]

Each starts a PostgreSQL of its own, with the disk as it comes. `purge` fills events and jobs with
rows that are too old, and then measures the steps of a job's life and the reading of a job, one
after the other, in rounds that take turns: without the removal and while the loop of a worker
removes. `partitions` fills a copy of a table with two months and removes the older one: with the
batches that retention takes, and by dropping a partition; in time, in write-ahead log, and in what
is left for vacuum.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from app.db import open_database
from app.embedded import EmbeddedPostgres
from app.migration import migrate
from app.retention import apply_retention

ROUNDS, SECONDS = 4, 8.0  # of `purge`, each with and without
ARTIFACT = """{
    "title": "demo", "summary": "A change.", "sources": [], "key_changes": [], "decisions": [],
    "open_questions": [], "next_steps": [], "data": {}, "related_event_ids": [], "markdown": "-",
    "period_start": "2026-11-23Z", "period_end": "2026-11-24Z", "model_used": "bench",
    "token_usage": {}}"""
OLD = "overlay(uuid_at(now() - {0})::text placing right(gen_random_uuid()::text, 21) from 16)::uuid"
OLD_EVENTS = f"""
insert into events (id, user_id, project_id, source, event_type, title, content, external_id,
  occurred_at, created_at)
select {OLD.format("interval '400 days' + n * interval '1 second'")}, $1, $2, 'github', 'commit',
  'Switch the cache to an LRU', repeat('Why and how. ', 30), n::text, now(),
  now() - interval '400 days'
from generate_series(1, $3::int) n
"""
OLD_JOBS = f"""
insert into jobs (id, user_id, project_id, kind, input, credits, status, outcome, error_code, error,
  completed_at, created_at)
select {OLD.format("interval '60 days' + n * interval '1 second'")}, $1, $2, 'handoff', '{{}}', 1,
  'failed', 'failed', 'no_result', 'Nothing.', now() - interval '60 days',
  now() - interval '61 days'
from generate_series(1, $3::int) n
"""
FILL = """
insert into {table} select overlay(uuid_at(at)::text placing right(gen_random_uuid()::text, 21)
    from 16)::uuid, $1, $2, 'github', 'commit', 'Switch the cache to an LRU',
  repeat('Why and how. ', 30), n::text, 'acme/web', 'main', null, 'Ada', null, '{{}}', at, at
from generate_series(1, $3::int) n,
  lateral (select '2026-01-01Z'::timestamptz + (n::float8 / $3::int) * interval '59 days') t (at)
"""
BATCH = """
delete from whole where id = any (array(
  select id from whole where id >= $1 and id < uuid_at('2026-02-01Z') order by id limit 1000
  for update skip locked))
returning id
"""


async def main(arguments: Sequence[str]) -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", choices=["purge", "partitions"])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dir", help="where the data go; default: the temporary folder")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="baton-retention-", dir=asked.dir) as folder:
        server = EmbeddedPostgres(Path(folder))
        dsn = server.start()
        try:
            await migrate(dsn)
            one = await asyncpg.connect(dsn)
            user = await one.fetchval("select ops.create_user('ada@example.com')")
            project = await one.fetchval("select ops.create_project('Demo', $1)", user)
            measure = purge if asked.what == "purge" else partitions
            await measure(dsn, one, user, project, asked.rows)
            await one.close()
        finally:
            server.stop()
    return 0


async def purge(dsn: str, one: asyncpg.Connection, user: Any, project: Any, rows: int) -> None:
    """Latencies with and without."""
    await one.execute("select ops.set_retention('events', '365 days')")
    for statement in (OLD_EVENTS, OLD_JOBS):
        await one.execute(statement, user, project, rows)
    await one.execute("vacuum analyze")
    worker = await one.fetchval("select worker_id from procrastinate_register_worker_v1()")
    taken: dict[tuple[str, bool], list[float]] = {}
    removed = 0.0
    for number in range(2 * ROUNDS):
        removing = number % 2 == 1
        before = await one.fetchval("select sum(removed) from retention")
        async with open_database(dsn, application_name="baton worker", size=2) as database:
            loop = asyncio.create_task(apply_retention(database)) if removing else None
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                for name, seconds in await _life(one, user, project, worker):
                    taken.setdefault((name, removing), []).append(1000 * seconds)
            if loop:
                loop.cancel()
                with suppress(asyncio.CancelledError):
                    await loop
        removed += float(await one.fetchval("select sum(removed) from retention") - before)
    print(f"{removed / ROUNDS / SECONDS:.0f} rows removed a second")
    print(f"{'':10} {'p50 ms':>16} {'p99 ms':>18}   without, with, ratio of p99")
    for name in dict.fromkeys(name for name, _ in taken):
        cuts = [statistics.quantiles(taken[name, with_], n=100) for with_ in (False, True)]
        print(
            f"{name:10} {cuts[0][49]:7.2f} {cuts[1][49]:8.2f} {cuts[0][98]:9.2f} {cuts[1][98]:8.2f}"
            f"   {cuts[1][98] / cuts[0][98]:.2f}"
        )


async def _life(
    one: asyncpg.Connection, user: Any, project: Any, worker: int
) -> list[tuple[str, float]]:
    """One job, and how long each step of it took."""
    taken: list[tuple[str, float]] = []

    async def timed(name: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        started = time.perf_counter()
        answer = await ask()
        taken.append((name, time.perf_counter() - started))
        return answer

    job_id = await timed(
        "submit",
        lambda: one.fetchval(
            "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')",
            user, project,
        ),
    )  # fmt: skip
    ticket = await timed(
        "fetch",
        lambda: one.fetchrow("select * from procrastinate_fetch_job_v2('{jobs}', $1)", worker),
    )
    claimed = await timed(
        "claim",
        lambda: one.fetchrow("select * from claim_job($1, $2, 'bench', 15)", job_id, ticket["id"]),
    )
    await timed(
        "complete",
        lambda: one.fetchval(
            "select complete_job($1, $2, $3)", job_id, claimed["lease_token"], ARTIFACT
        ),
    )
    await timed("read", lambda: one.fetchrow("select * from job_objects where id = $1", job_id))
    return taken


async def partitions(dsn: str, one: asyncpg.Connection, user: Any, project: Any, rows: int) -> None:
    """The older of two months: by batches, and by a partition."""
    await one.execute("create table whole (like events including all)")
    await one.execute(
        "create table parts (like events including defaults) partition by range (created_at);"
        "create table january partition of parts "
        "for values from ('2026-01-01Z') to ('2026-02-01Z');"
        "create table february partition of parts "
        "for values from ('2026-02-01Z') to ('2026-03-02Z');"
        "alter table parts add primary key (id, created_at);"
        # What keeps the promise "stored once" is not to be had: it would have to name the month.
        "create index on parts (project_id, source, external_id);"
        "create index on parts (project_id, occurred_at desc, id desc);"
        "create index on parts (project_id, source, occurred_at desc, id desc)"
    )
    for table in ("whole", "parts"):
        await _told(
            one, f"fill {table}", one.execute(FILL.format(table=table), user, project, rows)
        )
    await one.execute("vacuum analyze whole")
    await _told(one, "delete in batches", _delete(one))
    dead = await one.fetchrow(
        "select n_dead_tup, pg_total_relation_size('whole') / 1048576 from pg_stat_user_tables "
        "where relname = 'whole'"
    )
    print(f"   left: {dead} rows that are dead, MB")
    await _told(one, "vacuum after it", one.execute("vacuum whole"))
    print(f"   {await one.fetchval(SIZE)} MB")
    again = FILL.format(table="whole").replace("n::text", "'again ' || n")
    await _told(one, "fill the room again", one.execute(again, user, project, rows // 2))
    print(f"   {await one.fetchval(SIZE)} MB")
    await _told(one, "drop a partition", one.execute("drop table january"))


SIZE = "select pg_total_relation_size('whole') / 1048576"


async def _delete(one: asyncpg.Connection) -> None:
    reached: Any = "00000000-0000-0000-0000-000000000000"
    while rows := await one.fetch(BATCH, reached):
        reached = max(row[0] for row in rows)


async def _told(one: asyncpg.Connection, name: str, work: Awaitable[Any]) -> None:
    wal = await one.fetchval("select pg_current_wal_lsn()")
    started = time.monotonic()
    await work
    took = time.monotonic() - started
    written = await one.fetchval("select pg_wal_lsn_diff(pg_current_wal_lsn(), $1)", wal)
    print(f"{name:22} {took:7.2f} s {written / 2**20:8.1f} MB of write-ahead log", flush=True)


if __name__ == "__main__":
    sys.exit(uvloop.run(main(sys.argv[1:])))
