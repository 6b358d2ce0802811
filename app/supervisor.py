"""`baton run`: API and worker as two processes under one parent.

The one rule: the death of one child never touches the other. A child that dies is started again
with back-off; a child whose parent dies stops by itself, so that nothing is left holding a port.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger("baton.run")

COMMANDS = ("serve", "worker")
BACKOFF = (1.0, 30.0)  # seconds before a child is started again: first and longest
STEADY = 60.0  # seconds of life after which a child's next death starts from the first back-off
DRAIN = 45.0  # seconds that children get to stop; the worker's own grace is shorter
CONFIGURATION_EXIT = 2  # a fault that no restart can mend
PARENT = "BATON_PARENT_PID"


async def supervise(env: Mapping[str, str]) -> int:
    """Run the children until SIGTERM or SIGINT; answer the exit code.

    Args:
        env: the environment of the children, with `DATABASE_URL`.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    keepers = [asyncio.create_task(_keep_running(name, env, stop)) for name in COMMANDS]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, *keepers], return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    codes = await asyncio.gather(*keepers)
    await stopping
    return max(codes)


async def _keep_running(name: str, env: Mapping[str, str], stop: asyncio.Event) -> int:
    """Run one child again and again until `stop`; answer 0, or a code that ends everything."""
    delay = BACKOFF[0]
    while True:
        started = time.monotonic()
        child = await _start(name, env)
        code = await _until_exit(child, stop)
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


async def _start(name: str, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    """Start one child, in a session of its own: a Ctrl-C reaches the parent alone, which then
    stops both in order."""
    # -P and this path: a directory `app` where the user happens to be must not be imported.
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (here, env.get("PYTHONPATH"))))
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "app",
        name,
        env={**env, "PYTHONPATH": path, PARENT: str(os.getpid())},
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


async def _until_exit(child: asyncio.subprocess.Process, stop: asyncio.Event) -> int:
    exited = asyncio.create_task(child.wait())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([exited, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not exited.done():
        child.terminate()
        try:
            async with asyncio.timeout(DRAIN):
                await asyncio.shield(exited)
        except TimeoutError:
            child.kill()
    return await exited


def stop_with_parent() -> None:
    """In a child: stop as if by SIGTERM when the parent that is named in the environment dies."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
