"""How long do the views of the schema `ops` take, in a database that has seen years of use?

    python bench/ops.py [--scale 1.0] [--runs 30] [--data-dir DIR] [--database-url URL]

Generates 1,000,000 finished jobs over 30 days, 200,000 pending ones of the last hour (95 % with a
ticket, the rest parked), 500 running ones, 100,000 webhooks that wait among 300,000, 1,000,000
calls of models and the charges: --scale times that. Then asks each view --runs times, on one
connection as the service has it, and prints the median and the 95th percentile in milliseconds,
the median as a multiple of `select 1` on the same connection, and the median of the server's own
processor time, which does not depend on what else the machine does (Linux, same machine; queries
run in one process for that). Exit 1 when that, or without it the median, is above 100 ms.

Starts a PostgreSQL of its own, which is gone at the end; with --data-dir it stays, and what has
been generated there is used again. With --database-url that database is timed as it is.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg

from app.db import SETTINGS
from app.embedded import EmbeddedPostgres
from app.migration import migrate

MOST = 100.0  # milliseconds that a view may take
LOAD = """
set session_replication_role = replica;
set synchronous_commit = off;
set maintenance_work_mem = '512MB';
insert into users (id, email, name)
  select md5('u' || n)::uuid, 'u' || n || '@example.com', 'U' from generate_series(0, 49) n;
insert into projects (id, name, slug, owner_id)
  select md5('p' || n)::uuid, 'P ' || n, 'p-' || n, md5('u' || n % 50)::uuid
  from generate_series(0, 199) n;

create temporary table kinds as
  select row_number() over (order by kind) - 1 as place, kind from flows limit 5;

-- Of a hundred that ended three have failed. Nine in ten took less than a minute.
insert into jobs (id, user_id, project_id, kind, input, credits, status, outcome, attempt,
    lease_token, result_kind, result_id, error, error_code, error_meta, usage, created_at,
    updated_at, started_at, completed_at, deadline_at, rev)
  select
    uuidv7(t.submitted - now()), md5('u' || n % 50)::uuid, md5('p' || n % 200)::uuid, k.kind,
    '{"sources": ["github", "slack"], "filters": {}, "until": null, "options": {}}', 1,
    case when bad then 'failed' else 'completed' end,
    case when bad then 'failed' else 'succeeded' end, 1, gen_random_uuid(),
    case when not bad then 'handoff' end, case when not bad then gen_random_uuid() end,
    case when bad then 'The provider refused.' end,
    case when bad then 'generation_failed' end,
    case when bad then '{"retryable": true, "attempts": 1}'::jsonb else '{}' end,
    case when not bad then '{"prompt_tokens": 900, "completion_tokens": 90, "total_tokens": 990,'
      '"credits": 1}'::jsonb end,
    t.submitted, t.submitted + t.waited + t.ran, t.submitted + t.waited,
    t.submitted + t.waited + t.ran, t.submitted + interval '24 hours', 3
  from generate_series(0, {finished} - 1) n
  join kinds k on k.place = n % 5
  cross join lateral (
    select
      n % 33 = 0 as bad,
      now() - interval '30 days' + n * (interval '30 days' - interval '2 minutes') / {finished}
        as submitted,
      random() * interval '2 seconds' as waited,
      random() * random() * interval '100 seconds' as ran
  ) t;

insert into jobs (id, user_id, project_id, kind, input, credits, priority, ticket_id, created_at,
    updated_at, deadline_at)
  select
    uuidv7(t.submitted - now()), md5('u' || n % 50)::uuid,
    md5('p' || case when n % 2 = 0 then 7 else n % 200 end)::uuid, k.kind,
    '{"sources": ["github", "slack"], "filters": {}, "until": null, "options": {}}', 1,
    case n % 10 when 0 then 'high' when 1 then 'low' else 'normal' end,
    case when n % 20 <> 0 then n + 1 end, t.submitted, t.submitted,
    t.submitted + interval '24 hours'
  from generate_series(0, {pending} - 1) n
  join kinds k on k.place = n / 7 % 5
  cross join lateral (
    select now() - interval '1 hour' + n * interval '59 minutes' / {pending} as submitted) t;
insert into procrastinate_jobs (id, queue_name, task_name, priority, args)
  select ticket_id, 'jobs', 'baton.generate',
    case priority when 'high' then 10 when 'low' then -10 else 0 end,
    jsonb_build_object('job_id', id)
  from jobs where ticket_id is not null order by ticket_id;
select setval('procrastinate_jobs_id_seq', {pending} + 1);
insert into job_due (job_id, not_before, reason)
  select id, case when kind = 'handoff' then 'infinity' else now() + interval '5 minutes' end,
    case when kind = 'handoff' then 'paused' else 'retry' end
  from jobs where status = 'pending' and ticket_id is null;

insert into procrastinate_workers (last_heartbeat) select now() from generate_series(1, 10);
insert into workers (id, name, host, version, concurrency, provider, state)
  select id, 'host-' || id || ':7', 'host-' || id, '0', 100, 'openai', 'running'
  from procrastinate_workers;
insert into jobs (user_id, project_id, kind, input, credits, status, attempt, lease_token, rev,
    created_at, started_at)
  select md5('u' || n % 50)::uuid, md5('p' || n % 200)::uuid, 'handoff', '{}', 1, 'processing', 1,
    gen_random_uuid(), 2, now() - interval '30 seconds', now() - interval '20 seconds'
  from generate_series(0, {running} - 1) n;
insert into procrastinate_jobs (queue_name, task_name, args, status, worker_id)
  select 'jobs', 'baton.generate', jsonb_build_object('job_id', id), 'doing',
    (select min(id) from procrastinate_workers)
  from jobs where status = 'processing';
update jobs set ticket_id = t.id
  from procrastinate_jobs t
  where t.status = 'doing' and jobs.id = (t.args ->> 'job_id')::uuid;
insert into leases (job_id, lease_token, worker, expires_at)
  select j.id, j.lease_token,
    (select name from workers order by hashtext(name || j.id) limit 1), now() + interval '1 day'
  from jobs j where status = 'processing';

insert into charges (job_id, user_id, project_id, payer_id, kind, credits, created_at)
  select id, user_id, project_id, user_id, kind, 1, completed_at
  from jobs where status = 'completed';
insert into provider_calls (job_id, attempt, user_id, project_id, kind, model, purpose, outcome,
    prompt_tokens, completion_tokens, cost, seconds, created_at)
  select id, 1, user_id, project_id, kind, 'large-1', 'draft',
    case when status = 'completed' then 'ok' else 'timeout' end, 900, 90, 0.001, 4, completed_at
  from jobs where completed_at is not null order by completed_at;

insert into webhook_endpoints (id, project_id, url, types, enabled)
  select md5('w' || n)::uuid, md5('p' || n)::uuid, 'https://h' || n || '.example.com/a',
    '{job.completed}', n % 10 <> 0
  from generate_series(0, 199) n;
insert into webhook_deliveries (job_id, project_id, endpoint_id, url, type, payload, state, attempt,
    next_attempt_at, created_at, ended_at)
  select j.id, j.project_id, e.id, e.url, 'job.completed', repeat(j.id::text, 25),
    case when w.waits then 'waiting' else 'delivered' end, 1,
    case when w.waits and e.enabled then now() + interval '1 hour' end, j.completed_at,
    case when not w.waits then j.completed_at end
  from (
    select *, row_number() over (order by completed_at desc) as n
    from jobs where status = 'completed' order by completed_at desc limit {deliveries}
  ) j
  join webhook_endpoints e on e.project_id = j.project_id
  cross join lateral (select j.n % 3 = 0 as waits) w;
insert into webhook_attempts (delivery_id, at, status, ms, error)
  select id, created_at, case state when 'waiting' then 500 else 200 end, 40,
    case state when 'waiting' then 'Answered 500 Internal Server Error.' end
  from webhook_deliveries;
set session_replication_role = default;
do $$ begin while count_usage(20000) > 0 loop end loop; end $$;
vacuum analyze
"""


def main(arguments: Sequence[str]) -> int:
    """Time the views; 1 when one of them is too slow."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="times the sizes named above")
    parser.add_argument("--runs", type=int, default=30, help="times that each view is asked")
    parser.add_argument("--data-dir", type=Path, help="a server that stays")
    parser.add_argument("--database-url", help="a database that is timed as it is")
    options = parser.parse_args(arguments)
    if options.database_url:
        return asyncio.run(time_views(options.database_url, options.runs))
    with tempfile.TemporaryDirectory(prefix="baton-ops-") as folder:
        server = EmbeddedPostgres(options.data_dir or Path(folder).resolve())
        dsn = server.start()
        try:
            asyncio.run(load(dsn, options.scale))
            return asyncio.run(time_views(dsn, options.runs))
        finally:
            server.stop()


async def load(dsn: str, scale: float) -> None:
    """Generate the rows, unless they are there."""
    await migrate(dsn)
    connection = await asyncpg.connect(dsn)
    if not await connection.fetchval("select count(*) from users"):
        sizes = {"finished": 1_000_000, "pending": 200_000, "running": 500, "deliveries": 300_000}
        text = LOAD
        for name, size in sizes.items():
            text = text.replace(f"{{{name}}}", str(int(size * scale)))
        began = time.monotonic()
        for statement in text.split(";\n"):
            await connection.execute(statement)
        print(f"generated in {time.monotonic() - began:.0f} s", file=sys.stderr)
    await connection.close()


async def time_views(dsn: str, runs: int) -> int:
    """Print the table."""
    one_process = {"jit": SETTINGS["jit"], "max_parallel_workers_per_gather": "0"}
    connection = await asyncpg.connect(dsn, server_settings=one_process)
    consumed = Path(f"/proc/{connection.get_server_pid()}/schedstat")
    names = await connection.fetch(
        "select relname from pg_class"
        " where relnamespace = 'ops'::regnamespace and relkind = 'v' order by relname"
    )
    floor = statistics.median((await timed(connection, "select 1", 10 * runs, consumed))[0])
    print(f"PostgreSQL {connection.get_server_version().major}, select 1: {floor:.2f} ms\n")
    print("| view | rows | median ms | p95 ms | median / `select 1` | processor ms |")
    print("|---|--:|--:|--:|--:|--:|")
    slow = []
    for (name,) in names:
        statement = f'select * from ops."{name}"'
        rows = len(await connection.fetch(statement))
        taken, computed = await timed(connection, statement, runs, consumed)
        median, p95 = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
        cost = statistics.median(computed)
        print(
            f"| `ops.{name}` | {rows:,} | {median:.1f} | {p95:.1f} | {median / floor:,.0f}"
            f" | {cost:.1f} |"
        )
        if (cost or median) > MOST:
            slow.append(name)
    await connection.close()
    for name in slow:
        print(f"ops.{name} takes more than {MOST:.0f} ms", file=sys.stderr)
    return int(bool(slow))


async def timed(
    connection: asyncpg.Connection, statement: str, runs: int, consumed: Path
) -> tuple[list[float], list[float]]:
    """Milliseconds of each run, its rows fetched, and of them the server's processor time, as
    `consumed` counts it in nanoseconds; 0 where there is no such file."""

    def processor() -> float:
        return int(consumed.read_text().split()[0]) / 1e6 if consumed.exists() else 0.0

    taken, computed = [], []
    for _ in range(runs):
        began, before = time.perf_counter(), processor()
        await connection.fetch(statement)
        computed.append(processor() - before)
        taken.append((time.perf_counter() - began) * 1000)
    return taken, computed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
