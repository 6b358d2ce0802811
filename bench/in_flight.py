"""A thousand jobs against a model that takes its time: does one worker hold them all?

    python bench/in_flight.py [--jobs 1000] [--seconds 20] [--events 200]

Starts a PostgreSQL of its own, one `baton serve`, one `baton worker` and, in a process of its own,
a server that speaks OpenAI's Chat Completions and streams each answer over that many seconds.
Meanwhile a client reads jobs. Told are how many were in flight, how long it took, the memory of the
worker, how late its leases and heartbeats came at worst, and what reading a job took, idle and
meanwhile.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvloop

from app.background import child_environment
from app.db import Database, open_database
from app.embedded import EmbeddedPostgres
from app.migration import migrate
from app.queue import Bell, hung_bell

NO_LIMITS = "default=0,poll=0,generate=0,waits=0,pending=0"
READ_EVERY = 0.02  # seconds between two reads of the client
LOOK_EVERY = 0.25  # seconds between two looks at the worker


@dataclass
class Seen:
    """The worst that was seen of the worker."""

    in_flight: int = 0
    memory: float = 0.0  # MB
    lease_left: float = 15.0  # seconds; a lease is of 15 and renewed every 5
    heartbeat: float = 0.0  # seconds since the last one; every 5


async def look(database: Database, worker: int, seen: Seen) -> int:
    """Look at the worker once; answer how many jobs have ended."""
    async with database.transaction() as connection:
        row = await connection.raw.fetchrow(
            "select (select count(*) from jobs where status = 'processing'),"
            " (select count(*) from jobs where status in ('completed', 'failed')),"
            " (select extract(epoch from min(expires_at) - now())::float8 from leases),"
            " (select extract(epoch from now() - min(last_heartbeat))::float8"
            "  from procrastinate_workers)"
        )
    assert row
    in_flight, ended, left, heartbeat = row
    seen.in_flight = max(seen.in_flight, in_flight)
    seen.memory = max(seen.memory, memory(worker))
    seen.lease_left = min(seen.lease_left, 15.0 if left is None else left)
    seen.heartbeat = max(seen.heartbeat, heartbeat or 0.0)
    return int(ended)


def memory(process: int) -> float:
    """Resident memory in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def read(
    client: httpx.AsyncClient, job_ids: Sequence[str], stop: asyncio.Event
) -> list[float]:
    """Read one job after the other; answer how long each took, in milliseconds."""
    taken: list[float] = []
    while not stop.is_set():
        started = time.perf_counter()
        answer = await client.get(f"/api/v1/jobs/{job_ids[len(taken) % len(job_ids)]}")
        taken.append(1000 * (time.perf_counter() - started))
        assert answer.status_code == 200, answer.text
        await asyncio.sleep(READ_EVERY)
    return taken


def told(name: str, taken: Sequence[float]) -> str:
    """One line of latencies."""
    cuts = statistics.quantiles(taken, n=100)
    return (
        f"GET /jobs/{{id}} {name:10} n={len(taken):5}  median {cuts[49]:6.1f}  "
        f"p95 {cuts[94]:6.1f}  p99 {cuts[98]:6.1f}  max {max(taken):6.1f} ms"
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(stack: ExitStack, *command: str, **environment: str) -> subprocess.Popen[bytes]:
    """A child that ends with the stack."""
    log = Path(os.environ.get("BENCH_LOG", os.devnull))
    with log.open("ab") as stderr:
        child = subprocess.Popen(
            [sys.executable, *command], env=child_environment(**environment), stderr=stderr
        )
    stack.callback(child.wait)
    stack.callback(child.kill)
    return child


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[tuple[Database, Bell]]:
    """The database and the bell of this process."""
    await migrate(dsn)
    async with (
        open_database(
            dsn, application_name="bench", size=2, command_timeout=120, statement_timeout="120s"
        ) as database,
        hung_bell(database) as bell,
    ):
        yield database, bell


async def measure(dsn: str, jobs: int, seconds: float, events: int) -> None:
    """Measure once and print."""
    port, models = free_port(), free_port()
    settings = {
        "DATABASE_URL": dsn,
        "PORT": str(port),
        "BATON_LIMITS": NO_LIMITS,
        "BATON_LOG": "json",
        "BATON_CONCURRENCY": str(jobs),
        "BATON_PROVIDER": "openai",
        "BATON_MODEL": "scripted",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{models}/v1",
    }
    async with opened(dsn) as (database, bell):
        user = await database.value("create_user", "ada@example.com")
        project = await database.value("create_project", "demo", user, None)
        key = await database.value("create_api_key", user, "bench")
        happened = [
            {
                "source": ("github", "slack", "linear")[n % 3],
                "event_type": "commit",
                "title": f"feat: make part {n} of the cache an LRU",
                "content": f"We decided to drop the TTL map of part {n}. " * 5,
                "author": f"Ada {n % 7}",
                "external_id": str(n),
            }
            for n in range(events)
        ]
        await database.row("ingest_events", user, project, happened)
        with ExitStack() as stack:
            started(stack, "-m", "tests.llm_servers", str(models), str(seconds))
            started(stack, "-m", "app", "serve", **settings)
            worker = started(stack, "-m", "app", "worker", **settings).pid
            client = httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                headers={"Authorization": f"Bearer {key}"},
                timeout=30,
                trust_env=False,
            )
            await until_up(client, models)
            warm = await submitted(database, user, project, 1)
            bell.ring()
            seen = Seen()
            while await look(database, worker, seen) < 1:
                await asyncio.sleep(LOOK_EVERY)
            stop = asyncio.Event()
            reading = asyncio.create_task(read(client, warm, stop))
            await asyncio.sleep(5)
            stop.set()
            idle = await reading
            at_rest = memory(worker)

            begun = time.perf_counter()
            job_ids = await submitted(database, user, project, jobs)
            submitting = time.perf_counter() - begun
            bell.ring()
            seen, stop = Seen(), asyncio.Event()
            reading = asyncio.create_task(read(client, job_ids, stop))
            all_held = None
            while await look(database, worker, seen) < jobs + 1:
                if seen.in_flight == jobs and all_held is None:
                    all_held = time.perf_counter() - begun
                await asyncio.sleep(LOOK_EVERY)
            took = time.perf_counter() - begun
            stop.set()
            meanwhile = await reading
            async with database.transaction() as connection:
                ends = await connection.raw.fetchrow(
                    "select count(*) filter (where status = 'completed'),"
                    " max(attempt), (select count(*) from handoffs), (select count(*) from charges)"
                    " from jobs"
                )
        assert ends
        print(f"{jobs} jobs, a model that takes {seconds:.0f} s, {events} events each")
        held = f"all of them after {all_held:.1f} s" if all_held else "never all of them"
        print(f"in flight at most {seen.in_flight}, {held}")
        print(f"all ended {took:.1f} s after the submit (which took {submitting:.1f} s)")
        print(f"completed {ends[0]}, attempts at most {ends[1]}, artifacts {ends[2]}, "
              f"charges {ends[3]}")  # fmt: skip
        print(f"memory of the worker: {at_rest:.0f} MB before, {seen.memory:.0f} MB at most")
        print(f"leases: {seen.lease_left:.1f} s left at worst; "
              f"heartbeat: {seen.heartbeat:.1f} s ago at worst")  # fmt: skip
        print(told("idle", idle))
        print(told("meanwhile", meanwhile))


async def submitted(database: Database, user: str, project: str, count: int) -> list[str]:
    """Submit so many handoffs at once; answer their ids."""
    async with database.transaction() as connection:
        rows = await connection.raw.fetch(
            "select (s.job).id::text as id from generate_series(1, $1) n, lateral submit_job("
            "$2, $3, 'handoff', null, null, null, jsonb_build_object('n', n)) s",
            count,
            user,
            project,
        )
    return [row["id"] for row in rows]


async def until_up(client: httpx.AsyncClient, models: int) -> None:
    """Wait until both servers answer."""
    for url in ("/readyz", f"http://127.0.0.1:{models}/v1/models"):
        while True:
            try:
                await client.get(url)
                break
            except httpx.TransportError:
                await asyncio.sleep(0.1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--events", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as path:
        server = EmbeddedPostgres(Path(path))
        try:
            uvloop.run(measure(server.start(), asked.jobs, asked.seconds, asked.events))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
