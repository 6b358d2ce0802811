"""`baton run`: API and worker as two processes under one parent, and the embedded PostgreSQL.

The one rule: the death of one never touches the others. A child that dies is started again with
back-off, and so is the server; a child whose parent dies stops by itself, so that nothing is left
holding a port.
"""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from app.background import background, child_environment
from app.embedded import EmbeddedPostgres, EmbeddedUnavailable

log = logging.getLogger("baton.run")

COMMANDS = ("serve", "worker")
BACKOFF = (1.0, 30.0)  # seconds before a child is started again: first and longest
STEADY = 60.0  # seconds of life after which a child's next death starts from the first back-off
DRAIN = 45.0  # seconds that children get to stop; the worker's own grace is shorter
CONFIGURATION_EXIT = 2  # a fault that no restart can mend
LOOK_EVERY = 1.0  # seconds between looks whether the embedded server is still there


class DatabaseMoved(Exception):
    """The embedded server is reached in another way than the children know."""


async def supervise(dsn: str, server: EmbeddedPostgres | None = None) -> int:
    """Run the children until SIGTERM or SIGINT; a second one kills them. Answer the exit code.

    Args:
        dsn: the database of the children.
        server: the embedded server that it is on, to be started again should it die.
    """
    if server is None:
        return await _supervise(dsn)
    async with background(keep_database(server, dsn)):
        return await _supervise(dsn)


async def keep_database(server: EmbeddedPostgres, dsn: str) -> None:
    """Start the embedded server again whenever it is gone, for ever.

    Raises:
        DatabaseMoved: it came back elsewhere, which only a new start of everything can mend. Its
            directory is then too long for a socket, so that the server has one of a new name.
    """
    delay = BACKOFF[0]
    while True:
        await asyncio.sleep(LOOK_EVERY)
        if await asyncio.to_thread(server.runs):
            delay = BACKOFF[0]
            continue
        log.error("database died")
        try:
            found = await asyncio.to_thread(server.start)
        except EmbeddedUnavailable as error:  # no space left, for example
            log.error("database does not start", extra={"cause": str(error), "restart_in": delay})
            await asyncio.sleep(delay)
            delay = min(delay * 2, BACKOFF[1])
            continue
        if found != dsn:
            raise DatabaseMoved(found)
        log.warning("database started again")


async def _supervise(dsn: str) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, lambda: (hurry if stop.is_set() else stop).set())
    keepers = [asyncio.create_task(_keep_running(name, dsn, stop, hurry)) for name in COMMANDS]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, *keepers], return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    codes = await asyncio.gather(*keepers)
    await stopping
    return max(codes)


async def _keep_running(name: str, dsn: str, stop: asyncio.Event, hurry: asyncio.Event) -> int:
    """Run one child again and again until `stop`; answer 0, or a code that ends everything."""
    delay = BACKOFF[0]
    while True:
        started = time.monotonic()
        child = await _start(name, dsn)
        code = await _until_exit(child, stop, hurry)
        if stop.is_set():
            return 0
        if code == CONFIGURATION_EXIT:
            return code
        if code == 0 or time.monotonic() - started > STEADY:
            delay = BACKOFF[0]
        if code == 0:  # a worker that an operator drains; a new one takes its place
            log.info("child ended", extra={"child": name, "restart_in": delay})
        else:
            log.error("child died", extra={"child": name, "code": code, "restart_in": delay})
        try:
            async with asyncio.timeout(delay):
                await stop.wait()
            return 0
        except TimeoutError:
            delay = min(delay * 2, BACKOFF[1])


async def _start(name: str, dsn: str) -> asyncio.subprocess.Process:
    """Start one child, in a session of its own: a Ctrl-C reaches the parent alone, which then
    stops both in order."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # a directory `app` where the user happens to be must not be imported
        "-m",
        "app",
        name,
        env=child_environment(DATABASE_URL=dsn),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


async def _until_exit(
    child: asyncio.subprocess.Process, stop: asyncio.Event, hurry: asyncio.Event
) -> int:
    """Wait for the child, telling it to stop when we are told, and killing it when it dawdles."""
    exited = asyncio.create_task(child.wait())
    await _first(exited, stop.wait())
    if not exited.done():
        child.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN):
                await _first(exited, hurry.wait())
    if not exited.done():
        child.kill()
    return await exited


async def _first(exited: "asyncio.Task[int]", order: Coroutine[Any, Any, object]) -> None:
    """Wait until the child has exited or the order has come."""
    ordered = asyncio.create_task(order)
    try:
        await asyncio.wait([exited, ordered], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ordered.cancel()
