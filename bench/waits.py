"""How fast a waiting request hears that its job has ended, and what it costs to wait.

    python bench/waits.py --waiters 2000

Starts a PostgreSQL of its own and one `baton serve`, with the limits lifted; this process is the
clients and plays the worker. The one rule: every latency begins when the commit that ended the job
has returned and ends when the last byte of the answer, artifact included, is there.
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
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from app.background import child_environment
from app.db import Database, open_database
from app.embedded import EmbeddedPostgres
from app.migration import migrate
from app.queue import Bell, hung_bell

NO_LIMITS = "default=0,poll=0,generate=0,waits=0"
ARRIVALS = 250  # clients that begin to wait in a second; each costs three statements
LEASE = 3600.0  # seconds; nobody renews
ARTIFACT = {
    "title": "demo: cache",
    "summary": "A change by one person.",
    "sources": ["github"],
    "key_changes": ["Switch the cache to an LRU"] * 20,
    "decisions": [],
    "open_questions": [],
    "next_steps": [],
    "data": {},
    "related_event_ids": [],
    "markdown": "# demo: cache\n\n" + "- Switch the cache to an LRU\n" * 100,
    "period_start": "2026-11-23T08:00:00Z",
    "period_end": "2026-11-24T08:00:00Z",
    "model_used": "bench",
    "token_usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
}


@dataclass(eq=False)
class Waiter(asyncio.Protocol):
    """A client that asks for its job with `Prefer: wait` until it has ended."""

    job_id: str
    key: str
    done: asyncio.Future[float] = field(default_factory=asyncio.Future)
    asked: int = 0
    received: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = cast(asyncio.WriteTransport, transport)
        self.ask()

    def ask(self) -> None:
        """One long poll."""
        self.asked += 1
        self.received = b""
        self.transport.write(
            f"GET /api/v1/jobs/{self.job_id} HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {self.key}\r\nPrefer: wait=25\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        """Take the answer; ask again when the job has not ended."""
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not found or len(body) < int(length):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.fail(RuntimeError(self.received[:300].decode()))
        elif b'"status":"completed"' not in body[:1000]:
            self.ask()
        elif not self.done.done():
            self.done.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        """Not before the end."""
        self.fail(ConnectionError("the server hung up"))

    def fail(self, error: Exception) -> None:
        """The measurement is void."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass
class Bench:
    """A running server and somebody to ask it."""

    database: Database
    bell: Bell
    server: subprocess.Popen[bytes]
    port: int
    user_id: str
    project_id: str
    key: str

    async def jobs(self, count: int) -> dict[str, str]:
        """So many running jobs: their ids and lease tokens."""
        async with self.database.transaction() as connection:
            rows = await connection.raw.fetch(
                "select c.id, c.lease_token from generate_series(1, $1) n, "
                "lateral submit_job("
                "  $2, $3, 'handoff', null, null, null, jsonb_build_object('n', n)) s, "
                "lateral claim_job((s.job).id, 0, 'bench', $4) c",
                count,
                self.user_id,
                self.project_id,
                LEASE,
                timeout=120,
            )
        return {row["id"]: row["lease_token"] for row in rows}

    async def end(self, jobs: Sequence[tuple[str, str]]) -> float:
        """What a worker does at the end, in one transaction; answers when it had committed."""
        async with self.database.transaction() as connection:
            await connection.raw.fetch(
                "select complete_job(id, token, $3) "
                "from unnest($1::uuid[], $2::uuid[]) as j (id, token)",
                [job_id for job_id, _ in jobs],
                [token for _, token in jobs],
                ARTIFACT,
                timeout=120,
            )
        committed = time.perf_counter()
        for job_id, _ in jobs:
            self.bell.announce(job_id)
        return committed

    async def wait_for(self, job_ids: Sequence[str]) -> list[Waiter]:
        """A waiter for each, waiting."""
        waiters = [Waiter(job_id, self.key) for job_id in job_ids]
        for waiter in waiters:
            await asyncio.sleep(1 / ARRIVALS)
            await asyncio.get_running_loop().create_connection(
                lambda waiter=waiter: waiter,  # type: ignore[misc]
                "127.0.0.1",
                self.port,
            )
        await asyncio.sleep(3)  # the last ones have been registered
        return waiters

    def memory(self) -> float:
        """Resident memory of the server in MB."""
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def report(name: str, latencies: list[float]) -> None:
    """One line: median, p95, p99 and the longest, in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    p50, p95, p99, longest = (1000 * x for x in (cuts[49], cuts[94], cuts[98], max(latencies)))
    print(f"{name:44} n={len(latencies):5}  median {p50:7.1f}  p95 {p95:7.1f}  p99 {p99:7.1f}  "
          f"max {longest:7.1f} ms", flush=True)  # fmt: skip


async def one_by_one(bench: Bench, count: int, rate: float) -> None:
    """(a) Each waits for a job of its own; a quarter of the jobs end, one after the other."""
    jobs = await bench.jobs(count)
    before = bench.memory()
    waiters = await bench.wait_for(list(jobs))
    after = bench.memory()
    print(f"{count} waiting: {after - before:.0f} MB more than {before:.0f} MB, "
          f"{(after - before) * 1000 / count:.0f} MB per 1,000", flush=True)  # fmt: skip
    latencies = []
    ending = list(zip(jobs.items(), waiters, strict=True))[: count // 4]
    begun = time.perf_counter()
    for number, (job, waiter) in enumerate(ending):
        await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        committed = await bench.end([job])
        latencies.append((waiter, committed))
    report(f"one by one, {rate:.0f}/s, {count} waiting",
           [await waiter.done - committed for waiter, committed in latencies])  # fmt: skip
    rest = list(zip(jobs.items(), waiters, strict=True))[count // 4 :]
    committed = await bench.end([job for job, _ in rest])
    report(f"the other {len(rest)} at once", [await w.done - committed for _, w in rest])
    print(f"long polls per waiter: {sum(w.asked for w in waiters) / count:.2f}")


async def all_at_once(bench: Bench, count: int) -> None:
    """(b) Each waits for a job of its own; all end in one transaction."""
    jobs = await bench.jobs(count)
    waiters = await bench.wait_for(list(jobs))
    committed = await bench.end(list(jobs.items()))
    report(f"{count} jobs at once", [await waiter.done - committed for waiter in waiters])


async def all_on_one(bench: Bench, count: int) -> None:
    """(c) All wait for the same job."""
    [(job_id, token)] = (await bench.jobs(1)).items()
    waiters = await bench.wait_for([job_id] * count)
    committed = await bench.end([(job_id, token)])
    report(f"{count} on the same job", [await waiter.done - committed for waiter in waiters])


@asynccontextmanager
async def running(dsn: str) -> AsyncIterator[Bench]:
    """A server on a new database, warm."""
    await migrate(dsn)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = child_environment(
        DATABASE_URL=dsn, PORT=str(port), BATON_LIMITS=NO_LIMITS, BATON_LOG="json"
    )
    async with (
        open_database(
            dsn, application_name="bench", size=4, command_timeout=120, statement_timeout="120s"
        ) as database,
        hung_bell(database) as bell,
    ):
        user_id = await database.value("create_user", "ada@example.com")
        project_id = await database.value("create_project", "demo", user_id, None)
        key = await database.value("create_api_key", user_id, "bench")
        with open(os.devnull, "wb") as nowhere:
            server = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"], env=environment, stderr=nowhere
            )
        try:
            bench = Bench(database, bell, server, port, user_id, project_id, key)
            while True:
                try:
                    jobs = await bench.jobs(50)
                    waiters = await bench.wait_for(list(jobs))
                    break
                except OSError:  # not listening yet
                    await asyncio.sleep(0.2)
            await bench.end(list(jobs.items()))
            for waiter in waiters:
                await waiter.done
            yield bench
        finally:
            server.kill()
            server.wait()


async def measure(dsn: str, count: int, rate: float) -> None:
    """All three, on a server that has answered a few requests before."""
    async with running(dsn) as bench:
        await one_by_one(bench, count, rate)
        await all_at_once(bench, count)
        await all_on_one(bench, count)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiters", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=50.0, help="jobs that end in a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as path:
        server = EmbeddedPostgres(Path(path))
        try:
            uvloop.run(measure(server.start(), arguments.waiters, arguments.rate))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
