"""Does the database stay as large as what it has to hold, however many jobs pass through it?

    python -m bench.bloat --jobs 1000000
    python -m bench.bloat --jobs 100000 --hold 60

Starts a PostgreSQL of its own and sends jobs through their whole life with the functions that the
service calls, each in a transaction of its own: submit with an idempotency key, fetch the ticket,
claim, renew, report progress, complete, log a call of a model. The same number waits in the queue
all the time. Time passes 30 days in 100,000 jobs, so that retention, which runs beside it as in a
worker, has to remove as many rows as come in.

`--hold` keeps a transaction open for so many seconds in the middle, as a forgotten psql does: no
vacuum can remove what it might still see. What ops.health says of it is printed with the sizes,
under thresholds that are a tenth of the usual ones. The server does not wait for the disk (fsync is
off), and the loops run inside it, since this is about sizes and many jobs.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import uvloop

from app import embedded
from app.embedded import EmbeddedPostgres
from app.migration import migrate

LOOPS = 2  # connections that send jobs; the machine of the figures has two cores
WAITING = 50  # jobs in the queue
CHUNK = 250  # jobs between two looks at the clock
DAYS_PER_JOB = 30 / 100_000
QUEUE = ("procrastinate_jobs", "procrastinate_events", "leases", "job_due")
KEPT = ("jobs", "job_events", "handoffs", "provider_calls", "charges", "idempotency_keys")
KEEP = {"handoffs": "30 days", "provider_calls": "62 days", "charges": "62 days"}
STEADY_AFTER = 65 / DAYS_PER_JOB  # jobs: then every table is as full as its retention lets it be

# Both are in the schema pg_temp of a connection.
LIVES = """
create procedure pg_temp.lives(p_user uuid, p_project uuid, p_worker bigint, p_count int)
language plpgsql as $$
declare
  v_ticket procrastinate_jobs;
  v_job jobs;
begin
  for n in 1 .. p_count loop
    perform pg_temp.ask(p_user, p_project);
    commit;
    v_ticket := procrastinate_fetch_job_v2(array['jobs'], p_worker);
    commit;
    continue when v_ticket.id is null;
    v_job := claim_job((v_ticket.args ->> 'job_id')::uuid, v_ticket.id, 'bench', 15);
    commit;
    perform renew_leases(array[v_job.id], array[v_job.lease_token], 15);
    commit;
    perform report_progress(array[v_job.id], array[v_job.lease_token],
      array['{"value": 0.5, "step": "generating", "message": null}'::jsonb]);
    commit;
    perform complete_job(v_job.id, v_job.lease_token, jsonb_build_object(
      'title', 'demo', 'summary', 'A change.', 'sources', '["github"]'::jsonb,
      'key_changes', jsonb_build_array(repeat('Switch the cache to an LRU. ', 10)),
      'decisions', '[]'::jsonb, 'open_questions', '[]'::jsonb, 'next_steps', '[]'::jsonb,
      'data', '{}'::jsonb, 'related_event_ids', '[]'::jsonb,
      'markdown', repeat('- Switch the cache to an LRU\n', 20),
      'period_start', now(), 'period_end', now(), 'model_used', 'bench',
      'token_usage', '{"prompt_tokens": 900, "completion_tokens": 100}'::jsonb));
    commit;
    perform record_calls(jsonb_build_array(jsonb_build_object(
      'job_id', v_job.id, 'attempt', 1, 'user_id', p_user, 'project_id', p_project,
      'kind', 'handoff', 'model', 'bench', 'asked', 'bench', 'purpose', 'draft', 'outcome', 'ok',
      'prompt_tokens', 900, 'completion_tokens', 100, 'seconds', 1.5)));
    commit;
  end loop;
end
$$;
"""
ASK = """
create function pg_temp.ask(p_user uuid, p_project uuid) returns void language sql as $$
  select submit_job(p_user, p_project, 'handoff', null, null, null, '{}', '{}',
    gen_random_uuid()::text, sha256('request'))
$$;
"""
TOLD = """
select string_agg(format('%s (%s)', name, value), ', ') from ops.checks
where not ok and name in ('oldest_transaction', 'oldest_xmin', 'dead_tuples', 'retention_behind')
"""
TENTH = """
select ops.set_threshold(name, by_default / 10) from ops.thresholds
where name in ('oldest_transaction', 'oldest_xmin', 'dead_tuples')
"""
SIZES = """
select c.relname as name, pg_total_relation_size(c.oid) as bytes, pg_relation_size(c.oid) as heap,
  pg_indexes_size(c.oid) as indexes, coalesce(s.n_live_tup, 0) as live,
  coalesce(s.n_dead_tup, 0) as dead
from pg_class c
left join pg_stat_user_tables s on s.relid = c.oid
where c.oid = any ($1::text[]::regclass[])
"""


@dataclass(frozen=True)
class Sizes:
    """What is there after so many jobs, in bytes."""

    jobs: int
    queue: int
    database: int
    by_table: dict[str, int]


async def main(arguments: Sequence[str]) -> int:
    """Run, print the curve; 1 when something has grown to twice its steady size or more."""
    asked = _arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="baton-bloat-", dir=asked.dir) as folder:
        server = EmbeddedPostgres(Path(folder))
        embedded.SETTINGS |= {"fsync": "off", "full_page_writes": "off", "max_wal_size": "2GB"}
        dsn = server.start()
        try:
            curve = await _run(dsn, asked)
        finally:
            server.stop()
    return _verdict(curve)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=50_000, help="jobs between two lines")
    parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--ticket-log", action="store_true", help="Procrastinate's own log as well")
    parser.add_argument("--dir", help="where the data go; default: the temporary folder")
    return parser.parse_args(arguments)


async def _run(dsn: str, asked: argparse.Namespace) -> list[Sizes]:
    await migrate(dsn)
    one = await asyncpg.connect(dsn)
    user = await one.fetchval("select ops.create_user('ada@example.com')")
    project = await one.fetchval("select ops.create_project('Demo', $1)", user)
    for name, keep in KEEP.items():
        await one.execute(f"select ops.set_retention('{name}', '{keep}')")
    if asked.ticket_log:
        await one.execute("alter table procrastinate_jobs enable trigger user")
    await one.execute(ASK)
    for _ in range(WAITING):
        await one.execute("select pg_temp.ask($1, $2)", user, project)
    traffic = Traffic(dsn, str(user), str(project), asked.jobs)
    print(f"{'jobs':>9} {'jobs/s':>7} {'queue':>8} {'dead':>8} {'kept':>9} {'database':>9}  MB")
    beside = [
        asyncio.create_task(traffic.remove()),
        asyncio.create_task(traffic.look(one, asked.every)),
        asyncio.create_task(traffic.hold(asked.hold)),
    ]
    await asyncio.gather(*(traffic.send() for _ in range(LOOPS)))
    for task in beside:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await traffic.note(one, 0.0)
    await one.close()
    return traffic.curve


class Traffic:
    """Jobs through one database, and what runs beside them."""

    def __init__(self, dsn: str, user: str, project: str, jobs: int) -> None:
        self.curve: list[Sizes] = []
        self._dsn, self._user, self._project = dsn, user, project
        self._jobs, self._done, self._held = jobs, 0, False

    async def send(self) -> None:
        """Jobs, one after the other."""
        connection = await asyncpg.connect(self._dsn)
        await connection.execute(ASK + LIVES)
        worker = await connection.fetchval(
            "select worker_id from procrastinate_register_worker_v1()"
        )
        while self._done < self._jobs:
            self._done += CHUNK
            await self._set_clock(connection)
            await connection.execute(
                f"call pg_temp.lives('{self._user}', '{self._project}', {worker}, {CHUNK})"
            )
        await connection.close()

    async def remove(self) -> None:
        """What a worker does for retention; ten times as often, since time passes quickly here."""
        connection = await asyncpg.connect(self._dsn)
        while True:
            await self._set_clock(connection)
            await asyncio.sleep(await connection.fetchval("select apply_retention(1000)") / 10)

    async def look(self, one: asyncpg.Connection, every: int) -> None:
        """A line for every so many jobs."""
        looked, began = 0, time.monotonic()
        while True:
            await asyncio.sleep(0.2)
            if self._done - looked >= every:
                await self.note(one, (self._done - looked) / (time.monotonic() - began))
                looked, began = self._done, time.monotonic()

    async def hold(self, seconds: float) -> None:
        """A transaction that is open for so long, from a third of the jobs on."""
        while not seconds or self._done < self._jobs / 3:
            await asyncio.sleep(0.2)
        connection = await asyncpg.connect(self._dsn)
        await connection.execute(TENTH)
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("select count(*) from users")
            self._held = True
            await asyncio.sleep(seconds)
        self._held = False
        await connection.close()

    async def note(self, one: asyncpg.Connection, rate: float) -> None:
        """The sizes of now, kept and printed."""
        rows = {row["name"]: row for row in await one.fetch(SIZES, [*QUEUE, *KEPT])}
        at = Sizes(
            jobs=self._done,
            queue=sum(rows[name]["bytes"] for name in QUEUE),
            database=await one.fetchval("select pg_database_size(current_database())"),
            by_table={name: row["bytes"] for name, row in rows.items()},
        )
        self.curve.append(at)
        dead = sum(rows[name]["dead"] for name in QUEUE)
        kept = sum(rows[name]["bytes"] for name in KEPT)
        told = await one.fetchval(TOLD) if self._held else ""
        print(
            f"{at.jobs:9} {rate:7.0f} {at.queue / 2**20:8.1f} {dead:8} {kept / 2**20:9.1f} "
            f"{at.database / 2**20:9.1f}  {'a transaction is open; not ok: ' * self._held}{told}",
            flush=True,
        )

    async def _set_clock(self, connection: asyncpg.Connection) -> None:
        days = self._done * DAYS_PER_JOB
        await connection.execute(f"set baton.clock_offset = '{days} days'")


def _verdict(curve: Sequence[Sizes]) -> int:
    """Every table at its end, as a multiple of its steady size: what it had when each was as full
    as its retention lets it be."""
    full = next((at for at in curve if at.jobs >= STEADY_AFTER), None)
    if full is None:
        print(f"Nothing has a steady size before {STEADY_AFTER:,.0f} jobs.")
        return 0
    worst = 0.0
    print(f"{'table':24} {'steady':>9} {'largest':>9} {'end':>9}  MB, and end / steady")
    for name in (*QUEUE, *KEPT):
        steady = max(full.by_table[name], 2**20)
        largest = max(at.by_table[name] for at in curve)
        end = curve[-1].by_table[name]
        worst = max(worst, end / steady)
        print(
            f"{name:24} {steady / 2**20:9.1f} {largest / 2**20:9.1f} {end / 2**20:9.1f}  "
            f"{end / steady:.2f}"
        )
    print(f"The whole database: {curve[-1].database / full.database:.2f} of its steady size.")
    return 1 if worst >= 2 else 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main(sys.argv[1:])))
