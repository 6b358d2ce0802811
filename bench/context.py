"""How long does it take to build what a model reads, and does it grow with what is out of scope?

    python bench/context.py [EVENTS]

Fills a PostgreSQL of its own with a project of so many events (1,000,000), of which nine in ten are
older than anything that an artifact looks back to, and with as many in another project. Each
artifact's context is built over and over: scope, query, folding, choice, briefs. Before that, the
same is done with a tenth of the events. Prints milliseconds, and those of this process's CPU, which
a busy machine does not change as much; exits with 1 when a 95th percentile is above the promise.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.db import Database, open_database  # noqa: E402  (the path has to be set first)
from app.embedded import EmbeddedPostgres  # noqa: E402
from app.migration import migrate  # noqa: E402  (the path has to be set first)
from tasks.briefs import write_briefs  # noqa: E402
from tasks.generate import ClaimedJob, find_context  # noqa: E402

EVENTS = 1_000_000
RECENT = 0.1  # of the events lie in the last 40 days
PROMISE = 0.150  # seconds, 95th percentile
BUDGETS = (8_000, 32_000, 128_000)  # tokens
ROUNDS, WARM = 25, 3
NOW = datetime(2026, 6, 15, 12, tzinfo=UTC)
JOBS: dict[str, tuple[str, dict[str, Any], list[str] | None]] = {
    "handoff": ("handoff", {}, None),
    "correlation": ("cross_source_correlation", {"lookbackHours": 168, "maxEvents": 150}, None),
    "onboarding": ("onboarding_brief", {"lookbackDays": 30, "maxEvents": 400}, None),
    "architecture": ("architecture_insight", {"lookbackDays": 14, "maxEvents": 250}, None),
    "release notes": ("release_notes", {"repo": "acme/web"}, ["github"]),
    "onboarding, 1000": ("onboarding_brief", {"lookbackDays": 365, "maxEvents": 1000}, None),
}
# Six in ten events are commits with their files, one in four is a message, the rest are tickets and
# incidents; one commit in a thousand is tagged. Texts are those of this repository's own history.
FILL = """
insert into events (user_id, project_id, source, event_type, title, content, external_id, resource,
    branch, priority, author, url, metadata, occurred_at)
select
  $1, $2, s.source,
  case s.source when 'github' then case when n % 1000 = 0 then 'tag' else 'commit' end
    when 'slack' then 'message' when 'linear' then 'issue.updated' else 'issue' end,
  case s.source when 'github' then t.title || ' (#' || n % 90001 || ')'
    when 'slack' then coalesce(nullif(left(t.body, 180), ''), t.title) else t.title || ' ' || n end,
  case when n % 3 = 0 then t.body || E'\n\nRefs ENG-' || n % 5003 else t.body end,
  case s.source when 'github' then encode(sha256((n || ':' || $4)::bytea), 'hex')
    when 'linear' then 'ENG-' || n || $4 else 'm' || n || $4 end,
  case s.source when 'github' then case when n % 3 = 0 then 'acme/api' else 'acme/web' end
    when 'slack' then 'room-' || n % 7 else 'Engineering' end,
  case s.source when 'github' then 'main' end,
  case s.source when 'linear' then (array['low', 'high', 'urgent'])[1 + n % 3] end,
  (array['Ada Lovelace', 'Grace Hopper', 'Linus', 'renovate[bot]', 'Bo'])[1 + n % 5],
  'https://example.com/' || n,
  case s.source when 'github' then jsonb_build_object('files', t.files) else '{}' end,
  $5::timestamptz - (n - $6) * $7::interval
from generate_series($6::int, $6 + $8 - 1) n
cross join lateral (select (array['github', 'slack', 'github', 'github', 'linear', 'github',
  'slack', 'github', 'github', 'sentry', 'slack', 'github'])[1 + n % 12] as source) s
join unnest($3::jsonb[]) with ordinality x (text, at) on x.at = 1 + n % cardinality($3::jsonb[])
cross join lateral jsonb_to_record(x.text) as t (title text, body text, files jsonb)
"""


def main(arguments: Sequence[str]) -> int:
    """Measure; 1 when the promise is not kept."""
    events = int(arguments[0]) if arguments else EVENTS
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        server = EmbeddedPostgres(Path(folder))
        try:
            return uvloop.run(measure(server.start(), events))
        finally:
            server.stop()


async def measure(dsn: str, events: int) -> int:
    """Few events out of scope, then all of them."""
    await migrate(dsn)
    sql = await asyncpg.connect(dsn)
    await sql.execute("set session_replication_role = replica; set synchronous_commit = off")
    user = await sql.fetchval("select ops.create_user('bench@example.com')")
    projects = [
        await sql.fetchval("select ops.create_project($1, $2)", name, user) for name in "ab"
    ]
    project, other = (row if isinstance(row, str) else str(row) for row in projects)
    written = texts()
    recent = int(events * RECENT)
    near, far = timedelta(days=40) / recent, timedelta(days=1_000) / events

    async def fill(project: str, first: int, count: int, newest: datetime, step: timedelta) -> None:
        mark = project[-4:]
        await sql.execute(FILL, user, project, written, mark, newest, first, step, count)

    async def settle() -> None:
        await sql.execute(
            "insert into event_facets select distinct project_id, source, 'eventTypes', '', "
            "event_type from events on conflict do nothing"
        )
        await sql.execute("vacuum analyze events")
        await sql.execute("analyze event_facets")

    before = NOW - timedelta(days=41)
    async with open_database(dsn, size=2, application_name="bench", command_timeout=60) as database:
        await fill(project, 0, recent, NOW, near)
        await fill(other, 0, recent, NOW, near)
        await settle()
        few = {name: await timed(database, project, job) for name, job in JOBS.items()}
        old = events - recent
        await fill(project, recent, old, before, far)
        await fill(other, recent, old, NOW, far)
        await settle()
        total = await sql.fetchval("select count(*) from events where project_id = $1", project)
        all_ = {name: await timed(database, project, job) for name, job in JOBS.items()}
    await sql.close()
    return report(total, few, all_)


def texts() -> list[str]:
    """Subjects, bodies and files of this repository's commits."""
    command = ["git", "-C", str(ROOT), "log", "--name-only", "--format=%x1e%s%x1f%b%x1f"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for commit in log.split("\x1e")[1:]:
        title, body, files = commit.split("\x1f")
        text = {"title": title, "body": body.strip(), "files": files.split()[:40]}
        found.append(json.dumps(text))
    return found


async def timed(
    database: Database, project: str, asked: tuple[str, dict[str, Any], list[str] | None]
) -> dict[str, list[float]]:
    """Seconds of the query, of everything before the briefs, and of everything by budget."""
    kind, options, sources = asked
    given = {"sources": sources, "filters": {}, "until": None, "options": options}
    job = ClaimedJob(
        id="", user_id="", project_id=project, project_name="Bench", kind=kind, input=given,
        attempt=1, crashes=0, provider_errors=0, lease_token="", claimed_at=NOW,
    )  # fmt: skip
    took: dict[str, list[float]] = {}
    for number in range(ROUNDS + WARM):
        for budget in BUDGETS:
            started, cpu = time.perf_counter(), time.process_time()
            _, context = await find_context(database, job)
            found = time.perf_counter()
            briefs = await asyncio.to_thread(write_briefs, context, budget)
            ended, used = time.perf_counter(), time.process_time() - cpu
            if number >= WARM:
                took.setdefault("context", []).append(found - started)
                took.setdefault(f"{budget // 1000}k", []).append(ended - started)
                took.setdefault(f"cpu {budget // 1000}k", []).append(used)
        if not number:
            told = ", ".join(f"{len(b.ids)} in {b.tokens}" for b in briefs)
            print(f"{kind}: {len(context.events)} of {context.omitted} more; {told}", flush=True)
    return took


def report(
    total: int, few: dict[str, dict[str, list[float]]], all_: dict[str, dict[str, list[float]]]
) -> int:
    """Print the table; 1 when a 95th percentile is above the promise."""
    print(
        f"\n{total} events in the project; milliseconds, best/p50/p95; x: best with ten times more"
    )
    columns = list(next(iter(all_.values())))
    print(f"{'':16}" + "".join(f"{name:>21}" for name in columns))
    worst = 0.0
    for name, took in all_.items():
        cells = []
        for column in columns:
            low, middle, high = (at(took[column], share) for share in (0.0, 0.5, 0.95))
            ratio = low / at(few[name][column], 0.0)
            cells.append(f"{low * 1e3:.0f}/{middle * 1e3:.0f}/{high * 1e3:.0f} x{ratio:4.2f}")
            worst = worst if column.startswith("cpu") or "1000" in name else max(worst, high)
        print(f"{name:16}" + "".join(f"{cell:>21}" for cell in cells))
    print(f"worst p95: {worst * 1e3:.0f} ms, promised: {PROMISE * 1e3:.0f} ms")
    return int(worst > PROMISE)


def at(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
