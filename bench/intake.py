"""How fast deliveries of sources are taken, next to what the bare server can read.

    python -m bench.intake [--rate 2000] [--seconds 30] [--rounds 3]

Starts a PostgreSQL of its own (fsync on), a real `baton serve`, and a bare Starlette application on
uvicorn that reads the same body and answers 202. Rounds take turns:

  open    so many deliveries a second, whether the ones before are answered or not, as many sources
          send: latency is from when one was due. Whoever gets no 202 or 200 sends again
  most    as many as 64 connections can send one after the other

Every delivery has an id of its own, a body of 10 KB like GitHub's and a valid HMAC-SHA-256 of it.
Afterwards the table is counted: each delivery that was sent is there, once. Then a worker maps for
a few seconds. Exit 1 when a delivery is lost or there twice, or the rate was not kept.
"""

import argparse
import asyncio
import hashlib
import hmac
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import asyncpg
import orjson
import uvloop

from app.background import child_environment
from app.cipher import Cipher, new_key
from app.embedded import EmbeddedPostgres
from app.migration import migrate

CONNECTIONS = 64
INTEGRATIONS = 16
BODY = 10 * 1024  # bytes
BODIES = 500  # that differ; each is sent again and again, under new ids
MOST_SECONDS = 4.0
GIVE_UP = 90.0  # seconds after the end of a round
TRIES_AGAIN = {b"429", b"503"}  # what a sender would send again
SECRET = "whsec_measured"

BARE = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

async def read(request):
    await request.body()
    return Response(b'{"status":"accepted"}', status_code=202, media_type="application/json")

app = Starlette(routes=[Route("/hooks/{integration_id}", read, methods=["POST"])])
uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False,
            timeout_keep_alive=75, log_level="warning")
"""


def push(number: int) -> bytes:
    """The body of a push of a few commits, filled up with commits to its size."""
    words = random.Random(number)
    repository = {"id": number, "full_name": f"acme/web-{number % 20}", "default_branch": "main"}
    for name in ("archive", "branches", "commits", "compare", "contents", "downloads", "events"):
        repository[f"{name}_url"] = f"https://api.github.com/repos/acme/web/{name}{{/sha}}"
    body: dict[str, Any] = {
        "ref": "refs/heads/main",
        "repository": repository,
        "pusher": {"name": "ada", "email": "ada@example.com"},
        "commits": [],
    }
    while len(orjson.dumps(body)) < BODY - 600:
        sha = f"{words.getrandbits(160):040x}"
        body["commits"].append(
            {
                "id": sha,
                "tree_id": f"{words.getrandbits(160):040x}",
                "message": " ".join(f"{words.getrandbits(24):x}" for _ in range(12)),
                "timestamp": "2026-11-24T08:00:00+00:00",
                "url": f"https://github.com/acme/web/commit/{sha}",
                "author": {"name": "Ada", "email": "ada@example.com", "username": "ada"},
                "added": [],
                "removed": [],
                "modified": [f"app/{words.getrandbits(16):x}.py"],
            }
        )
    body["padding"] = ""
    body["padding"] = "x" * (BODY - len(orjson.dumps(body)))
    return orjson.dumps(body)


class Requests:
    """What is sent: the nth request, to one of the integrations in turn."""

    def __init__(self, integrations: Sequence[str]) -> None:
        self._tails = []
        for number in range(BODIES):
            body = push(number)
            digest = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
            self._tails.append(
                b"X-Hub-Signature-256: sha256=%s\r\nContent-Length: %d\r\n\r\n%s"
                % (digest.encode(), len(body), body)
            )
        self._heads = [
            f"POST /hooks/{each} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: GitHub-Hookshot/1\r\n"
            "Accept: */*\r\nContent-Type: application/json\r\nX-GitHub-Event: push\r\n"
            "X-GitHub-Delivery: ".encode()
            for each in integrations
        ]

    def request(self, number: int) -> bytes:
        """The whole of it."""
        head = self._heads[number % len(self._heads)]
        return b"%s%032d\r\n%s" % (head, number, self._tails[number % BODIES])


@dataclass
class Round:
    """What came of one."""

    latencies: list[float] = field(default_factory=list)
    answers: dict[bytes, int] = field(default_factory=dict)
    again: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Answered in a second."""
        return len(self.latencies) / self.seconds

    def quantile(self, hundredth: int) -> float:
        """Of the latencies, in milliseconds."""
        return 1000 * statistics.quantiles(self.latencies, n=100)[hundredth - 1]


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, free: Callable[["Connection"], None]) -> None:
        self._free = free
        self.answered: Callable[[bytes], None] = lambda status: None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready."""
        self.transport = cast(asyncio.WriteTransport, transport)
        self._free(self)

    def send(self, request: bytes, answered: Callable[[bytes], None]) -> None:
        """Send, and tell of the status."""
        self.answered = answered
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Take an answer."""
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not found or len(body) < int(length or 0):
            return
        self._received = b""
        self.answered(head[9:12])
        self._free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The measurement is void if it was in use; a server that stops is not measured."""


class Load:
    """Sends to one port over `CONNECTIONS`."""

    def __init__(self, port: int, requests: Requests) -> None:
        self._port, self._requests = port, requests
        self._idle: deque[Connection] = deque()
        self._due: deque[tuple[int, float]] = deque()
        self._round = Round()
        self._left = 0
        self._done = asyncio.Event()
        self._number, self._until = 0, 0.0

    async def connect(self) -> None:
        """Open all connections."""
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS):
            await loop.create_connection(lambda: Connection(self._free), "127.0.0.1", self._port)

    def close(self) -> None:
        """Hang up."""
        for connection in self._idle:
            connection.transport.close()

    async def open(self, first: int, rate: float, seconds: float) -> Round:
        """So many in a second, from request number `first` on."""
        self._round, count = Round(), int(rate * seconds)
        self._left = count
        self._done.clear()
        sent, begun = 0, time.perf_counter()
        while sent < count:
            due = min(count, int((time.perf_counter() - begun) * rate) + 1)
            for number in range(sent, due):
                self._due.append((first + number, begun + number / rate))
            sent = due
            self._send()
            await asyncio.sleep(0.001)
        async with asyncio.timeout(GIVE_UP):
            await self._done.wait()
        self._round.seconds = time.perf_counter() - begun
        return self._round

    async def most(self, first: int, seconds: float) -> tuple[Round, int]:
        """One after the other on each connection; also how many."""
        self._round, self._left = Round(), 0
        self._done.clear()
        begun = time.perf_counter()
        self._number, self._until = first, begun + seconds
        self._send()
        async with asyncio.timeout(seconds + GIVE_UP):
            await self._done.wait()
        self._until = 0.0
        self._round.seconds = time.perf_counter() - begun
        return self._round, self._number - first

    def _free(self, connection: Connection) -> None:
        self._idle.append(connection)
        self._send()

    def _send(self) -> None:
        while self._idle and (self._due or self._one_more()):
            number, due = self._due.popleft()
            connection = self._idle.popleft()
            connection.send(self._requests.request(number), self._answered(number, due))

    def _one_more(self) -> bool:
        """While most is measured, as soon as a connection is free."""
        if (now := time.perf_counter()) >= self._until:
            return False
        self._due.append((self._number, now))
        self._number, self._left = self._number + 1, self._left + 1
        return True

    def _answered(self, number: int, due: float) -> Callable[[bytes], None]:
        def take(status: bytes) -> None:
            answers = self._round.answers
            answers[status] = answers.get(status, 0) + 1
            if status in TRIES_AGAIN:
                self._round.again += 1
                asyncio.get_running_loop().call_later(0.2, self._due.append, (number, due))
                return
            self._round.latencies.append(time.perf_counter() - due)
            self._end()

        return take

    def _end(self) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()


async def integrate(connection: asyncpg.Connection, key: str) -> list[str]:
    """Integrations of GitHub, whose resources are of one project."""
    user_id = await connection.fetchval("select ops.create_user('ada@example.com')")
    project_id = await connection.fetchval("select ops.create_project('demo', $1)", user_id)
    rows = await connection.fetch(
        "insert into integrations (source, user_id, project_id, workspace_name) "
        "select 'github', $1, $2, 'acme' from generate_series(1, $3) returning id::text",
        user_id,
        project_id,
        INTEGRATIONS,
    )
    await connection.executemany(
        "insert into integration_secrets (integration_id, name, value) values ($1, 'signing', $2)",
        [(row["id"], Cipher((key,)).encrypt(SECRET)) for row in rows],
    )
    return [row["id"] for row in rows]


@contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own."""
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(
            [sys.executable, *command], env=child_environment(**environment), stderr=nowhere
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port of loopback that nobody has right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def listening(port: int) -> None:
    """Until somebody does."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.1)


@asynccontextmanager
async def loading(port: int, requests: Requests) -> AsyncIterator[Load]:
    """Connections to a server."""
    await listening(port)
    load = Load(port, requests)
    await load.connect()
    try:
        yield load
    finally:
        load.close()


def told(name: str, rounds: Sequence[Round]) -> None:
    """One line: medians over the rounds."""
    middle = statistics.median
    again = sum(each.again for each in rounds)
    print(
        f"{name:14} {middle(r.rate for r in rounds):8.0f}/s"
        f"   p50 {middle(r.quantile(50) for r in rounds):7.2f} ms"
        f"   p99 {middle(r.quantile(99) for r in rounds):7.2f} ms"
        f"   sent again {again}"
        f"   rounds {', '.join(f'{r.rate:.0f}/s {r.quantile(99):.1f} ms' for r in rounds)}",
        flush=True,
    )


async def stored(connection: asyncpg.Connection) -> tuple[int, int]:
    """Deliveries that are known, and that wait; both by distinct ids."""
    row = await connection.fetchrow(
        "select (select count(*) from hook_deliveries), (select count(*) from waiting_deliveries),"
        " (select count(distinct delivery_id) from waiting_deliveries)"
    )
    assert row is not None and row[1] == row[2], "a delivery waits twice"
    return row[0], row[1]


async def mapped(connection: asyncpg.Connection, dsn: str, key: str) -> None:
    """How fast one worker maps what waits."""
    [waiting] = await connection.fetchrow("select count(*) from waiting_deliveries")  # type: ignore[misc]
    with started("-m", "app", "worker", DATABASE_URL=dsn, BATON_SECRET_KEYS=key):
        while await connection.fetchval("select count(*) from waiting_deliveries") == waiting:
            await asyncio.sleep(0.02)
        begun = time.perf_counter()
        first = await connection.fetchval("select count(*) from waiting_deliveries")
        while left := await connection.fetchval("select count(*) from waiting_deliveries"):
            if time.perf_counter() > begun + 20:
                break
            await asyncio.sleep(0.05)
        seconds = time.perf_counter() - begun
    events = await connection.fetchval("select count(*) from events")
    print(f"one worker maps {(first - left) / seconds:.0f} deliveries/s; {events} events")


async def measure(dsn: str, arguments: argparse.Namespace) -> bool:
    """All rounds; True when none was lost or twice and the rate was kept."""
    await migrate(dsn)
    connection = await asyncpg.connect(dsn)
    key = new_key()
    requests = Requests(await integrate(connection, key))
    ports = free_port(), free_port()
    opened: dict[str, list[Round]] = {"bare": [], "baton": []}
    most: dict[str, list[Round]] = {"bare": [], "baton": []}
    number, good = 0, True
    serve = {"DATABASE_URL": dsn, "PORT": str(ports[1]), "BATON_SECRET_KEYS": key}
    with (
        started("-c", BARE, str(ports[0])),
        started("-m", "app", "serve", **serve, BATON_LOG="json"),
    ):
        async with loading(ports[0], requests) as bare, loading(ports[1], requests) as baton:
            for load in (bare, baton):
                await load.open(10**9, 200, 1)  # warm
            for turn in range(arguments.rounds):
                await connection.execute("truncate hook_deliveries, waiting_deliveries; checkpoint")
                opened["bare"].append(
                    await bare.open(0, arguments.rate, min(10.0, arguments.seconds))
                )
                sent = int(arguments.rate * arguments.seconds)
                opened["baton"].append(await baton.open(number, arguments.rate, arguments.seconds))
                number += sent
                for name, load in (("bare", bare), ("baton", baton)):
                    done, count = await load.most(number, MOST_SECONDS)
                    most[name].append(done)
                    number += count
                    sent += count if name == "baton" else 0
                known, waiting = await stored(connection)
                answers = opened["baton"][-1].answers, most["baton"][-1].answers
                print(f"round {turn + 1}: sent {sent}, stored {known}, wait {waiting}; {answers}")
                good = good and known == waiting == sent
    for name in ("bare", "baton"):
        told(f"{name} open", opened[name])
    for name in ("bare", "baton"):
        told(f"{name} most", most[name])
    rates = [statistics.median(r.rate for r in most[name]) for name in ("baton", "bare")]
    print(f"ratio: {rates[0] / rates[1]:.2f} of what the bare server reads")
    kept = min(r.rate for r in opened["baton"]) / arguments.rate
    print(f"kept {kept:.1%} of the rate; none lost, none twice: {good}")
    await mapped(connection, dsn, key)
    await connection.close()
    return good and kept > 0.98


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=2000.0, help="deliveries in a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of an open round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as path:
        server = EmbeddedPostgres(Path(path))
        try:
            return 0 if uvloop.run(measure(server.start(), arguments)) else 1
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
