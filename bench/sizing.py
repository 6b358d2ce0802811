"""What a job, an event and a poll cost: CPU, WAL, transactions, storage, memory.

    python -m bench.sizing [--jobs 2000] [--events 20000] [--polls 10000]

Starts a PostgreSQL of its own (fsync on), one `baton serve` and one `baton worker` with the
built-in provider; this process is the clients. On a machine with few cores they share them, and
the rates are those of all together: what carries over to another machine is the CPU that one of
each costs. docs/sizing.md is made of this.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import uvloop

from app.embedded import EmbeddedPostgres
from bench.in_flight import NO_LIMITS, free_port, memory, opened, started

CLIENTS = 32  # connections that ask, one request after the other each
BATCH = 500  # events in a request, the most that it may hold
LOOK_EVERY = 0.2  # seconds between two looks at whether all jobs have ended
EVENTS_OF_JOBS = 100  # that a brief is made of
UNFINISHED = "select count(*) from jobs where status in ('pending', 'processing')"


@dataclass
class Bench:
    """What runs."""

    dsn: str
    sql: asyncpg.Connection
    http: httpx.AsyncClient
    user_id: str
    project_id: str
    postmaster: int
    pids: dict[str, int] = field(default_factory=dict)  # of our processes, by name

    def cpu(self) -> dict[str, float]:
        """Seconds of CPU that each has used so far."""
        used = {name: _cpu(psutil.Process(pid)) for name, pid in self.pids.items()}
        server = psutil.Process(self.postmaster)
        times = server.cpu_times()
        total = _cpu(server) + times.children_user + times.children_system
        for child in server.children():
            with suppress(psutil.NoSuchProcess):
                total += _cpu(child)
        return {**used, "postgres": total}

    async def told(self) -> dict[str, float]:
        """What the server has counted so far."""
        row = await self.sql.fetchrow(
            "select (pg_current_wal_insert_lsn() - '0/0')::float8 as wal,"
            " pg_snapshot_xmax(pg_current_snapshot())::text::float8 as writes"
        )
        assert row
        return dict(row)

    async def sizes(self) -> dict[str, int]:
        """Bytes of every table that has some, with its indexes and what is out of line."""
        rows = await self.sql.fetch(
            "select relname, pg_total_relation_size(oid) as size from pg_class"
            " where relkind = 'r' and relnamespace = 'public'::regnamespace"
        )
        return {row["relname"]: row["size"] for row in rows}


@contextmanager
def lasted() -> Iterator[list[float]]:
    """The seconds of the body, afterwards."""
    taken: list[float] = []
    begun = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - begun)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def clients(count: int, ask: Any, at_once: int = CLIENTS) -> None:
    """Ask so many times."""
    numbers = iter(range(count))

    async def one() -> None:
        for number in numbers:
            await ask(number)

    await asyncio.gather(*(one() for _ in range(at_once)))


def report(what: str, count: int, seconds: float, before: Any, after: Any) -> None:
    """A line of what one costs."""
    (cpu, told), (cpu_now, told_now) = before, after
    costs = "  ".join(f"{name} {1000 * (cpu_now[name] - cpu[name]) / count:.2f}" for name in cpu)
    wal = (told_now["wal"] - told["wal"]) / count / 1024
    writes = (told_now["writes"] - told["writes"]) / count
    print(
        f"{what}: {count} in {seconds:.1f} s, {count / seconds:.0f}/s; ms of CPU each: {costs}; "
        f"WAL {wal:.2f} KB, transactions that write {writes:.2f} each",
        flush=True,
    )


def grown(what: str, count: int, before: dict[str, int], after: dict[str, int]) -> None:
    """What a million would take, by table."""
    growth = {name: (after[name] - before.get(name, 0)) / count for name in after}
    print(f"  storage: {sum(growth.values()):.0f} bytes for one of the {what}; GB per million:")
    for name, each in sorted(growth.items(), key=lambda item: -item[1]):
        if each * 1e6 > 50e6:  # less is the page that any table has
            print(f"    {name:24} {each * 1e6 / 1e9:6.2f}")


async def ingest(bench: Bench, count: int) -> None:
    """Store events, as a client does, in a project of their own."""
    project = str(await bench.sql.fetchval("select ops.create_project('ev', $1)", bench.user_id))

    async def ask(number: int) -> None:
        events = [
            {**happened(number * BATCH + n), "external_id": f"{number}-{n}"} for n in range(BATCH)
        ]
        answer = await bench.http.post("/events", json={"project_id": project, "events": events})
        assert answer.status_code == 200, answer.text

    sizes = await bench.sizes()
    before = bench.cpu(), await bench.told()
    with lasted() as taken:
        await clients(count // BATCH, ask, at_once=2)
    report("events", count, taken[0], before, (bench.cpu(), await bench.told()))
    grown("events", count, sizes, await bench.sizes())


def happened(number: int) -> dict[str, Any]:
    """An event as an integration writes it."""
    return {
        "source": ("github", "slack", "linear")[number % 3],
        "event_type": "commit",
        "title": f"feat: make part {number} of the cache an LRU",
        "content": f"We decided to drop the TTL map of part {number}. " * 5,
        "author": f"Ada {number % 7}",
        "resource": f"acme/web-{number % 5}",
        "external_id": str(number),
    }


async def submit(bench: Bench, count: int) -> list[str]:
    """Ask for briefs while the worker is at work; wait until all have ended."""
    ids: list[str] = []

    async def ask(number: int) -> None:
        wanted = {"focusArea": f"part {number}"}
        path = f"/projects/{bench.project_id}/insights/onboarding"
        answer = await bench.http.post(path, json=wanted)
        assert answer.status_code == 202, answer.text
        ids.append(answer.json()["jobId"])

    sizes = await bench.sizes()
    before = bench.cpu(), await bench.told()
    with lasted() as taken:
        with lasted() as accepting:
            await clients(count, ask)
        while await bench.sql.fetchval(UNFINISHED):
            await asyncio.sleep(LOOK_EVERY)
    print(f"jobs accepted beside the work: {count / accepting[0]:.0f}/s")
    report("jobs", count, taken[0], before, (bench.cpu(), await bench.told()))
    ended = await bench.sql.fetch("select status, count(*) from jobs group by 1")
    print(f"  {[tuple(row) for row in ended]}")
    await bench.sql.execute("vacuum analyze")
    grown("jobs", count, sizes, await bench.sizes())
    return ids


async def poll(bench: Bench, ids: list[str], count: int) -> None:
    """Read jobs that have ended, with their artifacts; then those that have not changed."""
    tags: dict[str, str] = {}

    async def ask(number: int) -> None:
        answer = await bench.http.get(f"/jobs/{ids[number % len(ids)]}")
        assert answer.status_code == 200, answer.text
        tags[ids[number % len(ids)]] = answer.headers["ETag"]

    async def ask_again(number: int) -> None:
        job_id = list(tags)[number % len(tags)]
        answer = await bench.http.get(f"/jobs/{job_id}", headers={"If-None-Match": tags[job_id]})
        assert answer.status_code == 304, answer.text

    for what, asking in (("polls", ask), ("polls, unchanged", ask_again)):
        before = bench.cpu(), await bench.told()
        with lasted() as taken:
            await clients(count, asking)
        report(what, count, taken[0], before, (bench.cpu(), await bench.told()))


@asynccontextmanager
async def running(server: EmbeddedPostgres) -> AsyncIterator[Bench]:
    """Everything, on a new database."""
    dsn, port = server.start(), free_port()
    settings = {
        "DATABASE_URL": dsn,
        "PORT": str(port),
        "BATON_LIMITS": NO_LIMITS,
        "BATON_LOG": "json",
        "BATON_PROVIDER": "extractive",
    }
    async with opened(dsn):
        pass
    sql = await asyncpg.connect(dsn)
    user = str(await sql.fetchval("select ops.create_user('ada@example.com')"))
    project = str(await sql.fetchval("select ops.create_project('demo', $1)", user))
    key = await sql.fetchval("select ops.create_api_key($1)", user)
    postmaster = psutil.Process(await sql.fetchval("select pg_backend_pid()")).ppid()
    with ExitStack() as stack:
        pids = {
            name: started(stack, "-m", "app", name, **settings).pid for name in ("serve", "worker")
        }
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}/api/v1",
            headers={"Authorization": f"Bearer {key}"},
            timeout=120,
            trust_env=False,
            limits=httpx.Limits(max_connections=CLIENTS),
        ) as http:
            while True:
                with suppress(httpx.TransportError):
                    if (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
            yield Bench(dsn, sql, http, user, project, postmaster, pids)
    await sql.close()


async def measure(server: EmbeddedPostgres, jobs: int, events: int, polls: int) -> None:
    """Measure and print."""
    async with running(server) as bench:

        def told(when: str) -> None:
            each = ", ".join(f"{name} {memory(pid):.0f} MB" for name, pid in bench.pids.items())
            print(f"memory {when}: {each}", flush=True)

        told("at the start")
        await ingest(bench, events)
        batch = [happened(n) for n in range(EVENTS_OF_JOBS)]
        answer = await bench.http.post(
            "/events", json={"project_id": bench.project_id, "events": batch}
        )
        assert answer.status_code == 200, answer.text
        ids = await submit(bench, jobs)
        told("after the jobs")
        await poll(bench, ids, polls)
        told("at the end")
        rows = await bench.sql.fetch(
            "select application_name, count(*) from pg_stat_activity"
            " where backend_type = 'client backend' group by 1 order by 1"
        )
        print("connections:", ", ".join(f"{row[0] or '-'} {row[1]}" for row in rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--polls", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as path:
        server = EmbeddedPostgres(Path(path))
        try:
            uvloop.run(measure(server, asked.jobs, asked.events, asked.polls))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
