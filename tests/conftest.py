"""What tests share: a real PostgreSQL, a database of its own for each test, real HTTP.

The cluster is the embedded one, or the server of TEST_DATABASE_URL. The schema is applied once, to
a template; each test gets a copy, so no test sees another's rows and none has to clean up.

`make test` spreads the tests over processes (pytest-xdist), of which each has a cluster of its own.
Plain `pytest` runs them in one.
"""

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from chat_servers import ChatServer
from starlette.applications import Starlette

from app import embedded
from app.db import Database, open_database
from app.embedded import EmbeddedPostgres
from app.guard import Server
from app.main import create_app
from app.migration import migrate
from app.queue import Bell, hung_bell
from app.settings import NO_LIMITS, Limits, Settings
from tasks.executor import Executor
from tasks.providers import Extractive, Provider
from tasks.worker import TicketWorker, make_worker

SECRET_KEYS = ("k" * 43 + "=",)  # what the API of a test keeps the secrets of integrations with
TEMPLATE = f"baton_template_{os.getpid()}"
MEMORY = Path("/dev/shm")  # where Linux keeps files in memory
MEMORY_BYTES = 4 << 30  # what all clusters of a run need, with much to spare
TOGETHER = (
    "test_chaos",
    "test_cli",
    "test_deploy",
    "test_page",
    "test_plans",
    "test_upgrade",
)  # their tests share what takes long to make
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NEEDED = "the tests of the page need chromium and chromedriver (Debian: chromium-driver)"
PROCESSES = 4  # at most; each has its cluster, of 100 MB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: the tests that take longest mostly wait."""
    return min((os.cpu_count() or 1) + 1, PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out the files of `TOGETHER` as a whole, and first; then one test at a time."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return file.stem if file.stem in TOGETHER else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without Chromium the tests of the page are left out, which is said at the end; in CI they
    fail, so that a green run has always seen the page."""
    if not (BROWSER and DRIVER) and not os.environ.get("CI"):
        left_out = [item for item in items if item.get_closest_marker("browser")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if not (BROWSER and DRIVER) and not os.environ.get("CI"):
        terminalreporter.write_line(f"Left out: {NEEDED}.", yellow=True)


def with_database(dsn: str, name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


@contextmanager
def new_folder(prefix: str) -> Iterator[Path]:
    """A folder for a server's data, in memory if there is room: on a disk, writing the files of new
    databases takes longer than all tests.

    Not under pytest's own temporary path: that closes to the server's account when a second run
    begins, and the server would panic.
    """
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    with tempfile.TemporaryDirectory(prefix=prefix, dir=MEMORY if roomy else None) as path:
        yield Path(path).resolve()


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A DSN of a server on which databases can be made."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    with new_folder("baton-cluster-") as folder:
        server = EmbeddedPostgres(folder)
        with pytest.MonkeyPatch.context() as patch:  # these data need not survive the machine
            for name in ("fsync", "full_page_writes"):
                patch.setitem(embedded.SETTINGS, name, "off")
            # What an operator may find, a test has to be able to make.
            patch.setitem(embedded.SETTINGS, "max_prepared_transactions", 2)
            patch.setitem(embedded.SETTINGS, "wal_level", "logical")
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
    # Without it a database does not know itself, and so its copies take themselves for no copies.
    asyncio.run(_execute(with_database(cluster, TEMPLATE), "delete from installation"))
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
    async with new_database(cluster, "template1", janitor) as dsn:
        yield dsn


@pytest.fixture
async def dsn(cluster: str, template: str, janitor: ThreadPoolExecutor) -> AsyncIterator[str]:
    """A DSN of a new database with the current schema."""
    async with new_database(cluster, template, janitor) as dsn:
        yield dsn


@asynccontextmanager
async def new_database(
    cluster: str, template: str, janitor: ThreadPoolExecutor
) -> AsyncIterator[str]:
    """A DSN of a copy of a database."""
    name = f"baton_test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(cluster)
    await connection.execute(f"create database {name} template {template} strategy file_copy")
    await connection.close()
    yield with_database(cluster, name)
    janitor.submit(asyncio.run, _execute(cluster, f"drop database {name} with (force)"))


async def _execute(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection to any database."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """A pool on the test's database, as a worker has it."""
    async with open_database(
        dsn, application_name="baton test", role="baton_worker", size=10
    ) as database:
        yield database


@pytest.fixture
async def api(dsn: str) -> AsyncIterator[Database]:
    """A pool on the test's database, as the API has it."""
    async with open_database(
        dsn, application_name="baton test", role="baton_api", size=10
    ) as database:
        yield database


@pytest.fixture
async def ops(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection for doing what an operator does."""
    settings = {"role": "baton_ops", "application_name": "psql"}
    connection = await asyncpg.connect(dsn, server_settings=settings)
    yield connection
    await connection.close()


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """The laboratory's connection: it looks at all rows, and breaks things. As a superuser, which
    nothing of Baton is."""
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


def loopback(port: int = 0) -> socket.socket:
    """A listening port of loopback, its protocol named: only then does asyncio switch Nagle's
    algorithm off, which costs 40 ms a request."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    return listener


class PromptServer(Server):
    """The server without its pauses of 0.1 s: before it sees that it has to stop, and in it."""

    async def main_loop(self) -> None:
        """Tick until `stop`."""
        self._ticking = asyncio.create_task(super().main_loop())
        await asyncio.wait([self._ticking])

    def stop(self) -> None:
        """Begin the shutdown, once it has started."""
        self._ticking.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The same steps: no new connections, the old ones to their end, then the app's own."""
        if hasattr(self.app.state, "stopping"):  # not every test's app has something that waits
            self.app.state.stopping.set()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.001)
        await self.lifespan.shutdown()


@asynccontextmanager
async def served(app: Starlette, *, port: int = 0, **options: Any) -> AsyncIterator[str]:
    """Serves an app on a port of loopback, a free one if none is given; its URL."""
    listener = loopback(port)
    server = PromptServer(app, **options)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or running.done()):
        await asyncio.sleep(0.001)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        if not running.done():
            server.stop()
        await running
        listener.close()


@pytest.fixture
async def chat() -> AsyncIterator[ChatServer]:
    """A server that is Discord and Slack."""
    server = ChatServer()
    async with served(server.app) as server.url:
        yield server


@pytest.fixture
def limits() -> Limits:
    """What `base_url` admits: everything, unless a test says otherwise."""
    return NO_LIMITS


@pytest.fixture
async def app(dsn: str, limits: Limits) -> Starlette:
    """The API on the test's database; `base_url` runs it."""
    return create_app(Settings(database_url=dsn, limits=limits, secret_keys=SECRET_KEYS))


@pytest.fixture
async def base_url(app: Starlette) -> AsyncIterator[str]:
    """The API, listening on a port of loopback."""
    async with served(app) as url:
        yield url


@pytest.fixture
async def new_caller(
    base_url: str, ops: asyncpg.Connection
) -> AsyncIterator[Callable[[str], Awaitable[Caller]]]:
    """Makes callers by name; each has a project that the others do not see."""
    clients: list[httpx.AsyncClient] = []

    async def make(name: str) -> Caller:
        user_id = await ops.fetchval("select ops.create_user($1)", f"{name}@example.com")
        project_id = await ops.fetchval("select ops.create_project($1, $2)", name, user_id)
        key = await ops.fetchval("select ops.create_api_key($1)", user_id)
        http = httpx.AsyncClient(
            base_url=f"{base_url}/api/v1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=30,  # on a busy machine many requests at once take long
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
