"""What tests share: a real PostgreSQL, a database of its own for each test, real HTTP.

The cluster is the embedded one, or the server of TEST_DATABASE_URL. The schema is applied once, to
a template; each test gets a copy, so no test sees another's rows and none has to clean up.
"""

import asyncio
import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
import uvicorn

from app import embedded
from app.db import Database, migrate, open_database
from app.embedded import EmbeddedPostgres
from app.main import create_app
from app.queue import Bell, hung_bell
from app.settings import NO_LIMITS, Limits, Settings
from tasks.executor import Executor
from tasks.providers import Extractive, Provider
from tasks.worker import TicketWorker, make_worker

TEMPLATE = f"baton_template_{os.getpid()}"


def with_database(dsn: str, name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A DSN of a server on which databases can be made."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    # Not under pytest's own temporary path: that closes to the server's account when a second run
    # begins, and the server would panic.
    with tempfile.TemporaryDirectory(prefix="baton-cluster-") as path:
        server = EmbeddedPostgres(Path(path))
        with pytest.MonkeyPatch.context() as patch:  # these data need not survive the machine
            for name in ("fsync", "full_page_writes"):
                patch.setitem(embedded.SETTINGS, name, "off")
            started = server.start()
        try:
            yield started
        finally:
            server.stop()


@pytest.fixture(scope="session")
def template(cluster: str) -> Iterator[str]:
    """The name of a database with the current schema and nothing else."""

    asyncio.run(_execute(cluster, f"create database {TEMPLATE}"))
    asyncio.run(migrate(with_database(cluster, TEMPLATE)))
    yield TEMPLATE
    asyncio.run(_execute(cluster, f"drop database {TEMPLATE} with (force)"))


@pytest.fixture(scope="session")
def janitor(cluster: str) -> Iterator[ThreadPoolExecutor]:
    """Drops databases while the next test runs; a drop takes longer than most tests."""
    with ThreadPoolExecutor(1, "janitor") as janitor:
        yield janitor


@pytest.fixture
async def empty_dsn(cluster: str, janitor: ThreadPoolExecutor) -> AsyncIterator[str]:
    """A DSN of a new database without any schema."""
    async with _new_database(cluster, "template1", janitor) as dsn:
        yield dsn


@pytest.fixture
async def dsn(cluster: str, template: str, janitor: ThreadPoolExecutor) -> AsyncIterator[str]:
    """A DSN of a new database with the current schema."""
    async with _new_database(cluster, template, janitor) as dsn:
        yield dsn


@asynccontextmanager
async def _new_database(
    cluster: str, template: str, janitor: ThreadPoolExecutor
) -> AsyncIterator[str]:
    name = f"baton_test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(cluster)
    await connection.execute(f"create database {name} template {template} strategy wal_log")
    await connection.close()
    yield with_database(cluster, name)
    janitor.submit(asyncio.run, _execute(cluster, f"drop database {name} with (force)"))


async def _execute(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """A pool on the test's database, as the code has it."""
    async with open_database(dsn, application_name="baton test", size=10) as database:
        yield database


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection, for looking at rows and for doing what an operator does."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


@dataclass(frozen=True)
class Caller:
    """A user with a key and a project of their own."""

    user_id: str
    project_id: str
    key: str
    http: httpx.AsyncClient  # sends the key

    async def submit(self, path: str = "/handoffs", **body: Any) -> str:
        """Ask for an artifact; answer the job's id."""
        if path == "/handoffs":
            body.setdefault("project_id", self.project_id)
        response = await self.http.post(path, json=body)
        assert response.status_code == 202, response.text
        return str(response.json()["jobId"])

    async def job(self, job_id: str) -> dict[str, Any]:
        """What GET /jobs/{id} answers."""
        response = await self.http.get(f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def ingest(self, *events: dict[str, Any]) -> dict[str, Any]:
        """Store events; what an event has to have and the test does not care about is filled in."""
        filled = [{"source": "github", "event_type": "commit", "title": "-", **e} for e in events]
        response = await self.http.post(
            "/events", json={"project_id": self.project_id, "events": filled}
        )
        assert response.status_code == 200, response.text
        return dict(response.json())


def loopback() -> socket.socket:
    """A listening port of loopback, its protocol named: only then does asyncio switch Nagle's
    algorithm off, which costs 40 ms a request."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener


@pytest.fixture
def limits() -> Limits:
    """What `base_url` admits: everything, unless a test says otherwise."""
    return NO_LIMITS


@pytest.fixture
async def base_url(dsn: str, limits: Limits) -> AsyncIterator[str]:
    """The API, listening on a port of loopback, on the test's database."""
    listener = loopback()
    app = create_app(Settings(database_url=dsn, limits=limits))
    server = uvicorn.Server(
        uvicorn.Config(app, http="httptools", log_config=None, access_log=False)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


@pytest.fixture
async def new_caller(
    base_url: str, sql: asyncpg.Connection
) -> AsyncIterator[Callable[[str], Awaitable[Caller]]]:
    """Makes callers by name; each has a project that the others do not see."""
    clients: list[httpx.AsyncClient] = []

    async def make(name: str) -> Caller:
        user_id = await sql.fetchval("select ops.create_user($1)", f"{name}@example.com")
        project_id = await sql.fetchval("select ops.create_project($1, $2)", name, user_id)
        key = await sql.fetchval("select ops.create_api_key($1)", user_id)
        http = httpx.AsyncClient(
            base_url=f"{base_url}/api/v1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
        )
        clients.append(http)
        return Caller(str(user_id), str(project_id), key, http)

    yield make
    for http in clients:
        await http.aclose()


@pytest.fixture
async def caller(new_caller: Callable[[str], Awaitable[Caller]]) -> Caller:
    """The one who asks."""
    return await new_caller("ada")


@pytest.fixture
async def stranger(new_caller: Callable[[str], Awaitable[Caller]]) -> Caller:
    """One who must not see what is the caller's."""
    return await new_caller("mallory")


Workers = Callable[..., tuple[TicketWorker, Executor]]


@pytest.fixture
async def bell(database: Database) -> AsyncIterator[Bell]:
    """Announces tickets on the test's database."""
    async with hung_bell(database) as bell:
        yield bell


@pytest.fixture
def worker(database: Database, bell: Bell) -> Workers:
    """Makes a worker that is not running yet, on the test's database."""

    def make(provider: Provider | None = None, **options: Any) -> tuple[TicketWorker, Executor]:
        made = {"concurrency": 10, "attempt_timeout": 30.0, "retry_for": 0.0, **options}
        worker, executor = make_worker(database, provider or Extractive(), bell, **made)
        worker.install_signal_handlers = False
        return worker, executor

    return make


@pytest.fixture
def drain(worker: Workers) -> Callable[..., Awaitable[None]]:
    """Works until no ticket is left."""

    async def run(provider: Provider | None = None, **options: Any) -> None:
        draining, _ = worker(provider, **options)
        draining.wait = False
        await draining.run()  # type: ignore[no-untyped-call]  # unannotated upstream

    return run


@pytest.fixture
def root() -> Path:
    """The top of the repository."""
    return Path(__file__).parent.parent
