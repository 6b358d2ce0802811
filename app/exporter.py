"""`GET /metrics`: what app/metrics.py has, for Prometheus, on the API's port or on one of its own.

The one rule: being asked costs next to nothing and never fails. A page is made once a second at
most, however many ask. What is in the database is read every `STATE_AGE` at most, and is not there
while it cannot be read, which `baton_database_up` says.
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import metrics
from app.db import Database, DatabaseError
from app.guard import Bounds, Server
from app.settings import Address, ConfigurationError
from app.sweeper import DEAD_AFTER

log = logging.getLogger("baton.metrics")

PAGE_AGE = 1.0  # seconds for which a page is as good as new
STATE_AGE = 10.0  # seconds for which what was read from the database is
CONNECTIONS = 64  # of a port that is for metrics alone


class Exporter:
    """Makes the page of one process.

    Args:
        part: the registry of this process, beside the common one.
        pools: its pools by name.
        state: where to read what the database knows; None: another process tells that.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        part: CollectorRegistry,
        pools: Mapping[str, Database],
        state: Database | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = [metrics.COMMON, part]
        self._pools = pools
        self._state = state
        self._clock = clock
        self._making = asyncio.Lock()
        self._page = b""
        self._made = self._read = -float("inf")
        self._known = False

    async def scrape(self, request: Request) -> Response:
        """Answer a scrape."""
        return Response(
            await self.page(),
            headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4, "Cache-Control": "no-store"},
        )

    async def page(self) -> bytes:
        """The page; all who ask while it is made get the same."""
        async with self._making:
            if self._clock() - self._made >= PAGE_AGE:
                await self._read_state()
                self._look_at_pools()
                parts = [*self._parts, metrics.DATABASE] if self._known else self._parts
                self._page = b"".join(map(generate_latest, parts))
                self._made = self._clock()
        return self._page

    async def _read_state(self) -> None:
        """Bring the gauges of the database up to date."""
        if self._state is None or self._clock() - self._read < STATE_AGE:
            return
        self._known = False
        try:
            metrics.schema_version.set(await self._state.value("schema_version") or 0)
        except DatabaseError:
            metrics.database_up.set(0)  # asked again for the next page: it may be back
            return
        metrics.database_up.set(1)
        self._read = self._clock()
        try:
            state = await self._state.row("queue_state", DEAD_AFTER)
            kinds = await self._state.rows("jobs_by_kind")
            checks = await self._state.rows("checks")
        except DatabaseError as error:  # an older schema, or too slow; not worth asking at once
            log.warning("metrics not read", extra={"cause": type(error).__name__})
            return
        self._known = True
        assert state is not None
        metrics.leases_expired.set(state["leases_expired"])
        metrics.workers_alive.set(state["workers_alive"])
        metrics.webhooks_waiting.set(state["webhooks_waiting"])
        metrics.webhooks_overdue.set(state["webhooks_overdue"])
        for row in kinds:
            for name in ("ready", "parked", "paused", "held", "running"):
                metrics.jobs.labels(row["kind"], name).set(row[name])
            metrics.oldest_ready.labels(row["kind"]).set(row["oldest_ready"])
        for row in checks:
            metrics.check_ok.labels(row["name"]).set(row["ok"])

    def _look_at_pools(self) -> None:
        for name, database in self._pools.items():
            size, idle = database.pool.get_size(), database.pool.get_idle_size()
            metrics.pool_connections.labels(name, "used").set(size - idle)
            metrics.pool_connections.labels(name, "idle").set(idle)
            metrics.pool_limit.labels(name).set(database.pool.get_max_size())


@asynccontextmanager
async def listening(address: Address, variable: str, exporter: Exporter) -> AsyncIterator[None]:
    """Answer `GET /metrics` on a port of its own for as long as the body runs, and nothing else.

    Args:
        variable: that names the address, for who reads why it cannot be had.

    Raises:
        app.settings.ConfigurationError: it cannot be had.
    """
    app = Starlette(routes=[Route("/metrics", exporter.scrape)])
    app.state.stopping = asyncio.Event()
    with _bound(address, variable) as listener:
        server = _Beside(app, Bounds(connections=CONNECTIONS), lifespan="off")
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


class _Beside(Server):
    """A server that leaves the signals to the process that it runs in."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until `should_exit`."""
        await self._serve(sockets)


def _bound(address: Address, variable: str) -> socket.socket:
    host, port = address
    listener = None
    try:
        [(family, kind, protocol, _, found), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found)
        listener.listen()  # whoever comes before the server has started waits for it
    except OSError as error:
        if listener:
            listener.close()
        raise ConfigurationError(f"{variable}: {host}:{port}: {error.strerror}.") from None
    return listener
