"""One Baton under test: a database, API processes, workers, and who died when.

It hides how processes are started. The one rule: every death that a scenario causes is noted with
its time, because the checker judges what clients saw by it.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from .client import Connection, NoAnswer
from .postgres import TEMPLATE, Postgres, free_port
from .provider import CALLS
from .proxy import Proxy

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
START_SECONDS = 40.0
NOTHING: Mapping[str, str] = {}


@dataclass
class Process:
    """One process of Baton."""

    name: str
    child: "subprocess.Popen[bytes]"
    log: Path
    proxy: Proxy | None
    port: int | None = None  # of an API
    died: float | None = None  # when it was killed, or stopped for a while; monotonic

    @property
    def pid(self) -> int:
        """Its pid; the suite is its parent, so no other process gets it before it is reaped."""
        return self.child.pid

    def kill(self) -> None:
        """SIGKILL: dead at once, without a word."""
        self.died = time.monotonic()
        self.child.kill()

    def freeze(self) -> None:
        """SIGSTOP: for others it is dead."""
        self.died = time.monotonic()
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: a zombie from now on."""
        self.child.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: a polite request."""
        self.child.send_signal(signal.SIGTERM)

    async def exited(self, seconds: float) -> int | None:
        """Its exit code, or None when it still runs after that time."""
        deadline = time.monotonic() + seconds
        while (code := self.child.poll()) is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if code is not None and self.died is None:
            self.died = time.monotonic()
        return code

    def said(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log with this event."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                fields = json.loads(line)
                if isinstance(fields, dict) and fields.get("event") == event:
                    found.append(fields)
        return found


@dataclass(frozen=True)
class Call:
    """One call of the provider."""

    tag: str
    number: int
    pid: int
    parent: int  # of an isolated attempt this is the worker
    started: float
    ended: float | None
    how: str | None


@dataclass
class Stack:
    """A database of the scenario's own and the processes on it."""

    postgres: Postgres
    name: str
    folder: Path
    processes: list[Process] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)  # for every process
    key: str = ""
    project_id: str = ""
    user_id: str = ""
    _sql: asyncpg.Connection | None = None

    async def open(self) -> None:
        """Make the database, a user, a project and a key."""
        self.folder.mkdir(parents=True)
        (self.folder / "calls").mkdir()
        admin = await asyncpg.connect(self.postgres.dsn("postgres"))
        await admin.execute(f"create database {self.name} template {TEMPLATE}")
        await admin.close()
        sql = await self.sql()
        await sql.execute("select ops.go_live()")  # it is a copy, and knows it
        self.user_id = str(await sql.fetchval("select ops.create_user('ada@example.com')"))
        self.project_id = str(
            await sql.fetchval("select ops.create_project('chaos', $1)", self.user_id)
        )
        self.key = await sql.fetchval("select ops.create_api_key($1)", self.user_id)

    async def close(self) -> None:
        """End everything that was started."""
        for process in self.processes:
            if process.child.poll() is None:
                process.child.kill()
                process.child.wait()
            if process.proxy is not None:
                await process.proxy.close()
        if self._sql is not None:
            self._sql.terminate()

    async def sql(self) -> asyncpg.Connection:
        """A connection for looking and for doing what an operator does, past all proxies; one at
        a time may use it."""
        if self._sql is None or self._sql.is_closed():
            self._sql = await self.connect()
        return self._sql

    async def connect(self) -> asyncpg.Connection:
        """A new connection; an outage is waited out."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return await asyncpg.connect(
                    self.postgres.dsn(self.name),
                    timeout=5,
                    command_timeout=30,
                    server_settings={"application_name": "chaos"},
                )
            except (OSError, TimeoutError, asyncpg.PostgresError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def serve(
        self, settings: Mapping[str, str] = NOTHING, *, proxied: bool = False
    ) -> Process:
        """Start an API process and wait until it is ready."""
        port = free_port()
        process = await self._start("serve", proxied, {"PORT": str(port), **settings})
        process.port = port
        await self.ready(process)
        return process

    async def worker(
        self, settings: Mapping[str, str] = NOTHING, *, proxied: bool = False
    ) -> Process:
        """Start a worker and wait until it works."""
        process = await self._start("worker", proxied, settings)
        deadline = time.monotonic() + START_SECONDS
        while not process.said("start"):
            if process.child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no worker: {process.log.read_text()[-2000:]}")
            await asyncio.sleep(0.05)
        return process

    async def ready(self, process: Process, seconds: float = START_SECONDS) -> None:
        """Wait until an API process says that it is ready."""
        assert process.port
        connection = Connection(process.port, self.key)
        deadline = time.monotonic() + seconds
        while True:
            with suppress(NoAnswer):
                if (await connection.ask("GET", "/readyz")).status == 200:
                    connection.close()
                    return
            if process.child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"not ready: {process.log.read_text()[-2000:]}")
            await asyncio.sleep(0.05)

    async def _start(self, command: str, proxied: bool, settings: Mapping[str, str]) -> Process:
        proxy = None
        if proxied:
            proxy = Proxy(self.postgres.port)
            await proxy.open()
        number = 1 + sum(p.name.startswith(command) for p in self.processes)
        name = f"{command}{number}"
        log = self.folder / f"{name}.log"
        user = settings.get("CHAOS_ROLE", "postgres")
        dsn = self.postgres.dsn(self.name, port=proxy.port if proxy else None, user=user)
        env = {
            **{n: v for n, v in os.environ.items() if not n.startswith(("BATON_", "PG"))},
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS))),
            "DATABASE_URL": dsn,
            "HOST": "127.0.0.1",
            "BATON_PROVIDER": "chaos.provider:Scripted",
            "BATON_LIMITS": "default=0,poll=0,generate=0,waits=0,pending=0",
            "BATON_LOG": "json",
            CALLS: str(self.folder / "calls"),
            **self.settings,
            **settings,
        }
        with log.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "app", command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                start_new_session=True,
            )
        process = Process(name, child, log, proxy)
        self.processes.append(process)
        return process

    @property
    def apis(self) -> list[Process]:
        """The API processes that have not died."""
        return [p for p in self.processes if p.port is not None and p.child.poll() is None]

    def deaths(self) -> dict[int, float]:
        """When which process died, by pid."""
        return {p.pid: p.died for p in self.processes if p.died is not None}

    def calls(self) -> dict[str, list[Call]]:
        """The provider's calls by tag, in order."""
        found: dict[str, list[Call]] = defaultdict(list)
        for path in (self.folder / "calls").iterdir():
            found[path.name] = sorted(_read_calls(path), key=lambda call: call.started)
        return found

    async def sessions(self, name: str) -> list[int]:
        """The server processes of connections with this application name."""
        rows = await (await self.sql()).fetch(
            "select pid from pg_stat_activity where datname = $1 and application_name = $2",
            self.name,
            name,
        )
        return [row[0] for row in rows]

    async def cut(self, *names: str) -> int:
        """`pg_terminate_backend` on the connections of these application names."""
        count = await (await self.sql()).fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where datname = $1 and application_name = any ($2)",
            self.name,
            list(names),
        )
        return int(count)


def _read_calls(path: Path) -> Iterator[Call]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["what"] == "start":
            same = (
                other
                for other in lines
                if other["what"] != "start"
                and (other["pid"], other["call"]) == (line["pid"], line["call"])
            )
            end = next(same, None)
            yield Call(
                tag=path.name,
                number=line["call"],
                pid=line["pid"],
                parent=line["parent"],
                started=line["monotonic"],
                ended=end and end["monotonic"],
                how=end and end["what"],
            )
