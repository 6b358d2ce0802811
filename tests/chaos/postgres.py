"""A PostgreSQL of the suite's own, which it may stop, kill, freeze and fill.

It hides the account that the server runs under when the suite is root. The server listens on a
port of loopback, so that a proxy can stand before it; everybody on this machine may connect for as
long as it runs, which is why nothing but scripted jobs is ever stored there.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg

from app.embedded import EmbeddedPostgres, program
from app.migration import migrate

TEMPLATE = "chaos"  # has the schema; every scenario gets a copy
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "log_error_verbosity": "terse",
    "log_lock_waits": "on",
}


def free_port() -> int:
    """A port of loopback that nobody has right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_template(folder: Path) -> Path:
    """A data directory that has the schema, stopped; `Postgres` copies it."""
    embedded = EmbeddedPostgres(folder)
    embedded.start()  # makes the account's rights, and initdb
    embedded.stop()
    data = folder / "pg"
    (data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 trust\n")
    server = Postgres(data, folder / "template.log")
    server.start()

    async def fill() -> None:
        admin = await asyncpg.connect(server.dsn("postgres"))
        await admin.execute(f"create database {TEMPLATE}")
        await admin.close()
        await migrate(server.dsn(TEMPLATE))

    try:
        asyncio.run(fill())
    finally:
        server.stop("fast")
    return data


def copy_of(template: Path, target: Path) -> Path:
    """A copy of a stopped data directory, of the same owner."""
    shutil.copytree(template, target, symlinks=True)
    owner = template.stat()
    if os.geteuid() == 0:
        for path in (target, *target.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
    target.chmod(0o700)
    for parent in target.parents:  # the server's account has to be able to pass
        if os.geteuid() == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    return target


class Postgres:
    """One server on a data directory."""

    def __init__(self, data: Path, log: Path, *, settings: dict[str, str] | None = None) -> None:
        self._data = data
        self._log = log
        self._settings = {**SETTINGS, **(settings or {})}
        self.port = free_port()
        owner = data.stat()
        log.touch()
        if os.geteuid() == 0:
            os.chown(log, owner.st_uid, owner.st_gid)  # pg_ctl opens it as the server's account
        self._account: dict[str, Any] = (
            {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
            if os.geteuid() == 0
            else {}
        )

    def dsn(self, database: str, *, port: int | None = None, user: str = "postgres") -> str:
        """How to reach a database, by way of another port if one is given."""
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/{database}?sslmode=disable"

    def start(self) -> None:
        """Start and wait until it accepts connections, crash recovery included."""
        settings = {**self._settings, "port": str(self.port), "unix_socket_directories": ""}
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self._pg_ctl("start", "-o", options, "-l", str(self._log), "-t", "60")

    def stop(self, mode: str) -> None:
        """Stop: `fast` ends sessions and writes a checkpoint, `immediate` is a crash."""
        self._pg_ctl("stop", "-m", mode, "-t", "60")

    def restart(self, mode: str) -> None:
        """`pg_ctl restart`."""
        self._pg_ctl("restart", "-m", mode, "-l", str(self._log), "-t", "60")

    def freeze(self) -> list[int]:
        """Stop every process of the server where it is; sockets stay open and say nothing."""
        pids = self._pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def thaw(self, pids: Sequence[int]) -> None:
        """Let them go on."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop whatever state it is in."""
        if (self._data / "postmaster.pid").exists():
            try:
                self.stop("immediate")
            except RuntimeError:
                for pid in self._pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _pids(self) -> list[int]:
        """The postmaster and its children."""
        postmaster = int((self._data / "postmaster.pid").read_text().split("\n")[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return [postmaster, *map(int, children)]

    def _pg_ctl(self, *arguments: str) -> None:
        done = subprocess.run(
            [str(program("pg_ctl")), arguments[0], "-D", str(self._data), "-w", *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be inherited by the server and stay open
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath},
            **self._account,
        )
        if done.returncode:
            tail = self._log.read_text(errors="replace")[-800:] if self._log.exists() else ""
            raise RuntimeError(f"pg_ctl {' '.join(arguments)}: {done.returncode}\n{tail}")


async def in_thread(call: Any, *arguments: Any) -> float:
    """Run a blocking order without stopping the driver; answers how long it took."""
    started = time.monotonic()
    await asyncio.to_thread(call, *arguments)
    return time.monotonic() - started
