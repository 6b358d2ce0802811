"""Are the limits exact over processes, and what do they cost?

    python bench/limits.py window [SECONDS]
    python bench/limits.py cost [CHECKOUT]

`window` starts three API processes on one database, hammers one key through each of them for so
many seconds (130) and counts how many requests were admitted in any 60 seconds. `cost` compares the
time of GET /projects with limits, without, and in another checkout of Baton, in rounds that take
turns.
"""

import hashlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import asyncpg
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.embedded import EmbeddedPostgres  # noqa: E402
from app.migration import migrate  # noqa: E402  (the path has to be set first)

QUOTA = 60
THREADS = 2  # clients of each process
PAUSE = 0.02  # seconds between two requests of a client
ROUNDS, REQUESTS = 21, 200
OFF = "default=0,poll=0,generate=0,waits=0,pending=0"


def main(arguments: Sequence[str]) -> int:
    """Run one of the two; 1 when a window holds more than the quota."""
    match arguments:
        case ["window", *rest]:
            return window(float(rest[0]) if rest else 130.0)
        case ["cost", *rest]:
            return cost(Path(rest[0]).resolve() if rest else None)
    print(__doc__, file=sys.stderr)
    return 2


def window(seconds: float) -> int:
    """Hammer one key through three processes."""
    with ExitStack() as stack:
        dsn, key = stack.enter_context(database())
        ports = [stack.enter_context(serving(dsn, f"default={QUOTA}")) for _ in range(3)]
        admitted: list[tuple[float, float]] = []  # when it was sent, and when it was answered
        refused: list[int] = []
        end = time.monotonic() + seconds

        def hammer(port: int) -> None:
            client = Client(port, key)
            while time.monotonic() < end:
                sent = time.monotonic()
                status = client.get("/api/v1/projects")
                if status == 200:
                    admitted.append((sent, time.monotonic()))
                else:
                    refused.append(status)
                time.sleep(PAUSE)

        threads = [threading.Thread(target=hammer, args=(p,)) for p in ports * THREADS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    most = {"sent": fullest(s for s, _ in admitted), "answered": fullest(a for _, a in admitted)}
    print(f"{len(admitted)} admitted in {seconds:.0f} s, {len(refused)} refused: {set(refused)}")
    for what, count in most.items():
        print(f"most in any 60 s, by the time when it was {what}: {count} (the quota is {QUOTA})")
    return int(max(most.values()) > QUOTA)


def fullest(times: Iterator[float]) -> int:
    """The most that lie in any 60 seconds."""
    ordered = sorted(times)
    first, most = 0, 0
    for last, at in enumerate(ordered):
        while ordered[first] <= at - 60:
            first += 1
        most = max(most, last - first + 1)
    return most


def cost(other: Path | None) -> int:
    """Ask each server in turn, one request at a time."""
    with ExitStack() as stack:
        dsn, key = stack.enter_context(database())
        ports = {
            "with limits": stack.enter_context(serving(dsn, "default=900000")),
            "without limits": stack.enter_context(serving(dsn, OFF)),
        }
        if other:
            ports["other checkout"] = stack.enter_context(serving(dsn, OFF, other))
        clients = {name: Client(port, key) for name, port in ports.items()}
        medians: dict[str, list[float]] = {name: [] for name in ports}
        for number in range(ROUNDS + 1):
            for name, client in clients.items():
                took = sorted(timed(client) for _ in range(REQUESTS))
                if number:  # the first round warms up
                    medians[name].append(took[len(took) // 2])
    last = [statistics.median(each) for each in medians.values()][-1]
    for name, each in medians.items():
        ms = statistics.median(each)
        print(f"{name:16} {ms * 1000:6.3f} ms   {ms / last:5.3f} of the last line")
    return 0


def timed(client: "Client") -> float:
    """Seconds for one GET /projects."""
    started = time.perf_counter()
    assert client.get("/api/v1/projects") == 200
    return time.perf_counter() - started


class Client:
    """One connection that stays open."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=30)
        self._headers = {"Authorization": f"Bearer {key}"}

    def get(self, path: str) -> int:
        """The status of an answer that has been read to its end."""
        self._connection.request("GET", path, headers=self._headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status


@contextmanager
def database() -> Iterator[tuple[str, str]]:
    """A new PostgreSQL with a user and a project; its DSN and a key."""
    key = "fr_" + "k" * 43

    async def fill(dsn: str) -> None:
        await migrate(dsn)
        sql = await asyncpg.connect(dsn)
        user_id = await sql.fetchval("select ops.create_user('bench@example.com')")
        await sql.execute("select ops.create_project('bench', $1)", user_id)
        await sql.execute(
            "insert into api_keys (user_id, prefix, digest) values ($1, 'bench', $2)",
            user_id,
            hashlib.sha256(key.encode()).digest(),
        )
        await sql.close()

    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        server = EmbeddedPostgres(Path(folder))
        try:
            dsn = server.start()
            uvloop.run(fill(dsn))
            yield dsn, key
        finally:
            server.stop()


@contextmanager
def serving(dsn: str, limits: str, checkout: Path = ROOT) -> Iterator[int]:
    """An API process; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("BATON_", "PG"))}
    told = {"DATABASE_URL": dsn, "PORT": str(port), "BATON_LIMITS": limits}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "app", "serve"],
        env={**kept, **told, "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no API from {checkout}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def _ready(port: int) -> bool:
    try:
        return Client(port, "").get("/readyz") == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
