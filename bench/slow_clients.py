"""What do a thousand slow clients cost a healthy one?

    python bench/slow_clients.py [--clients 1000] [--seconds 12] [--rounds 3]

Against a real `baton serve` on a PostgreSQL of its own, on loopback. One healthy client lists its
projects again and again, each round first alone and then beside the slow clients of one sort. A
slow client that the server closes comes back within a second. A round is longer than the server's
time-outs, so that it has closings and returns in it.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import asyncpg
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.embedded import EmbeddedPostgres  # noqa: E402
from app.migration import migrate  # noqa: E402  (the path has to be set first)

SORTS = ("idle", "head", "body")
# Nobody is to be refused for asking often: it is the dawdling that is measured.
SETTINGS = {"BATON_LOG": "json", "BATON_LIMITS": "default=0,poll=0,generate=0,waits=0"}
PAUSE = 0.005  # seconds between two requests of the healthy client
RAMP = 0.012  # seconds between two first connections, so that the closings are spread as well


Figures = tuple[float, float, float]


class Target(NamedTuple):
    """The server, and one who may ask it."""

    port: int
    key: str
    pid: int


def main() -> None:
    """Print one row per sort."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(
        f"{chosen.clients} slow clients; a healthy one's milliseconds, the server's share of a core"
    )
    print("slow by  p50 alone  beside  p99 alone  beside  ratio  CPU alone  beside")
    with served() as targets:
        for sort in SORTS:
            rounds = [compare(targets, sort, chosen) for _ in range(chosen.rounds)]
            alone, beside = (
                [statistics.median(figures) for figures in zip(*half, strict=True)]
                for half in zip(*rounds, strict=True)
            )
            ratio = statistics.median(beside[1] / alone[1] for alone, beside in rounds)
            print(
                f"{sort:7}  {alone[0]:9.2f} {beside[0]:7.2f}  {alone[1]:9.2f} {beside[1]:7.2f}"
                f"  {ratio:5.2f}  {alone[2]:9.0%} {beside[2]:7.0%}",
                flush=True,
            )


def compare(
    targets: tuple[Target, Target], sort: str, chosen: argparse.Namespace
) -> tuple[Figures, Figures]:
    """One round, alone and beside."""
    target, of_slow = targets
    alone = figures(target, chosen.seconds)
    context = multiprocessing.get_context("spawn")
    there = context.Event()
    slow = context.Process(target=be_slow, args=(of_slow, sort, chosen.clients, there))
    slow.start()
    try:
        if not there.wait(60):
            raise SystemExit("the slow clients could not connect")
        beside = figures(target, chosen.seconds)
    finally:
        slow.terminate()
        slow.join()
        time.sleep(1)  # the server sees them go
    return alone, beside


def figures(target: Target, seconds: float) -> Figures:
    """p50 and p99 in milliseconds, and the server's share of a core."""
    server = psutil.Process(target.pid)
    before = server.cpu_times()
    times = asyncio.run(healthy(target, seconds))
    after = server.cpu_times()
    used = after.user + after.system - before.user - before.system
    cuts = statistics.quantiles(times, n=100)
    return cuts[49] * 1000, cuts[98] * 1000, used / seconds


@contextmanager
def served() -> Iterator[tuple[Target, Target]]:
    """`baton serve` with two users who have a key and a project each."""
    with tempfile.TemporaryDirectory(prefix="baton-slow-") as folder, socket.socket() as probe:
        database = EmbeddedPostgres(Path(folder) / "data")
        dsn = database.start()
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        server = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": dsn, "PORT": str(port), **SETTINGS},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            healthy_key, slow_key = asyncio.run(prepare(dsn))
            yield Target(port, healthy_key, server.pid), Target(port, slow_key, server.pid)
        finally:
            server.terminate()
            server.wait()
            database.stop()


async def prepare(dsn: str) -> list[str]:
    """The keys of two users."""
    await migrate(dsn)
    sql = await asyncpg.connect(dsn)
    keys = []
    for name in ("ada", "mallory"):
        user_id = await sql.fetchval("select ops.create_user($1)", f"{name}@example.com")
        await sql.fetchval("select ops.create_project($1, $2)", name, user_id)
        keys.append(str(await sql.fetchval("select ops.create_api_key($1)", user_id)))
    await sql.close()
    return keys


async def healthy(target: Target, seconds: float) -> list[float]:
    """Seconds of each request of one client that keeps its connection."""
    times = []
    reader, writer = await connect(target.port, patience=20)
    end = time.monotonic() + seconds
    request = head(target, "GET /api/v1/projects") + b"\r\n"
    while (began := time.monotonic()) < end:
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(answer.decode())
        length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.monotonic() - began)
        await asyncio.sleep(PAUSE)
    writer.close()
    return times


def be_slow(target: Target, sort: str, clients: int, there: Event) -> None:
    """A process that is all the slow clients."""

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(one_slow(target, sort))
                await asyncio.sleep(RAMP)
            there.set()

    asyncio.run(run())


async def one_slow(target: Target, sort: str) -> None:
    """Connect, dawdle until the server has had enough, come back."""
    while True:
        with suppress(OSError):
            reader, writer = await connect(target.port)
            try:
                await dawdle(target, sort, reader, writer)
            finally:
                writer.close()
        # At different times, or one stall would make them all close and return together for ever.
        await asyncio.sleep(random.uniform(0, 1))


async def dawdle(
    target: Target, sort: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Send a byte a second, of the head or of the body, or nothing."""
    match sort:
        case "idle":
            await reader.read()
            return
        case "head":
            writer.write(head(target, "GET /api/v1/projects") + b"X-Slow: ")
        case "body":
            lines = b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            writer.write(head(target, "POST /api/v1/handoffs") + lines)
    while not (reader.at_eof() or writer.transport.is_closing()):
        writer.write(b"x")
        await asyncio.sleep(1)


async def connect(
    port: int, patience: float = 0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection, waiting up to `patience` seconds for the server to be there."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


def head(target: Target, line: str) -> bytes:
    """The head of a request, without the empty line that ends it."""
    return f"{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.key}\r\n".encode()


if __name__ == "__main__":
    main()
