"""What runs beside the work of a process, and what watches its event loop and its parent.

The one rule: a background task that dies takes its process down. One that had quietly stopped
would be found by the people whom it should have warned.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from app import metrics
from app.logs import trace

log = logging.getLogger("baton.background")

PARENT = "BATON_PARENT_PID"  # names the parent in the environment of a child
DIED_EXIT = 70  # EX_SOFTWARE: start me again
WATCH_EVERY = 0.5  # seconds between signs of life of the event loop
BLOCKED_AFTER = 2.0  # seconds without one; a lease survives seven of these


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` for as long as the body runs; end the process if it fails before that."""
    task = asyncio.create_task(work)
    task.add_done_callback(_exit_if_failed)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _exit_if_failed(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("background task died", extra={"trace": trace(error)})
        os._exit(DIED_EXIT)


async def watch_loop() -> None:
    """Log where the event loop is stuck, while it is: a thread looks on from outside."""
    loop_thread = threading.get_ident()
    last_sign = time.monotonic()
    stop = threading.Event()

    def look_on() -> None:
        reported = 0.0
        while not stop.wait(WATCH_EVERY):
            silent = time.monotonic() - last_sign
            if silent < BLOCKED_AFTER or reported == last_sign:
                continue
            reported = last_sign
            frame = sys._current_frames().get(loop_thread)
            stack = "".join(traceback.format_stack(frame)) if frame else "gone"
            log.error("event loop blocked", extra={"seconds": round(silent, 1), "stack": stack})

    watcher = threading.Thread(target=look_on, name="loop watcher", daemon=True)
    watcher.start()
    try:
        while True:
            last_sign = time.monotonic()
            await asyncio.sleep(WATCH_EVERY)
            metrics.loop_lag.observe(time.monotonic() - last_sign - WATCH_EVERY)
    finally:
        stop.set()


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process of ours: it finds this very code wherever the user is,
    knows its parent (see `stop_with_parent`), and differs by `changes`."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid()), **changes}


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
