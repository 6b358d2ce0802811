"""`baton run`: API and worker as two processes under one parent.

The one rule: the death of one child never touches the other. A child that dies is started again
with back-off; a child whose parent dies stops by itself, so that nothing is left holding a port.
"""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from app.background import child_environment

log = logging.getLogger("baton.run")

COMMANDS = ("serve", "worker")
BACKOFF = (1.0, 30.0)  # seconds before a child is started again: first and longest
STEADY = 60.0  # seconds of life after which a child's next death starts from the first back-off
DRAIN = 45.0  # seconds that children get to stop; the worker's own grace is shorter
CONFIGURATION_EXIT = 2  # a fault that no restart can mend


async def supervise(dsn: str) -> int:
    """Run the children until SIGTERM or SIGINT; a second one kills them. Answer the exit code.

    Args:
        dsn: the database of the children.
    """
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
        if time.monotonic() - started > STEADY:
            delay = BACKOFF[0]
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
