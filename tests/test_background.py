"""What runs beside the work: a loop that is stuck is seen, and a task that dies is not hidden."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app import background
from app.background import DIED_EXIT, watch_loop


async def test_a_blocked_event_loop_is_logged_with_the_stack_while_it_is_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "WATCH_EVERY", 0.02)
    monkeypatch.setattr(background, "BLOCKED_AFTER", 0.1)
    seen = threading.Event()
    told: list[logging.LogRecord] = []

    class Signal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "event loop blocked":
                told.append(record)
                seen.set()

    # Nobody else may hear of it: the watching thread could still be telling them in the next test.
    monkeypatch.setattr(logging.getLogger("baton.background"), "propagate", False)
    logging.getLogger("baton.background").addHandler(handler := Signal())
    try:
        async with background.background(watch_loop()):
            await asyncio.sleep(0)  # let it start

            def stuck_in_here() -> bool:
                return seen.wait(10)

            assert stuck_in_here()
    finally:
        logging.getLogger("baton.background").removeHandler(handler)
    [record] = told
    assert "stuck_in_here" in vars(record)["stack"]
    assert vars(record)["seconds"] >= 0.1


async def test_a_lively_loop_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "WATCH_EVERY", 0.01)
    monkeypatch.setattr(background, "BLOCKED_AFTER", 5.0)
    async with background.background(watch_loop()):
        started = time.monotonic()
        while time.monotonic() - started < 0.2:
            await asyncio.sleep(0.005)
    assert caplog.records == []


PROGRAM = """
import asyncio
from app import logs
from app.background import background

async def work():
    raise RuntimeError("what an event says")

async def main():
    async with background(work()):
        await asyncio.sleep(30)

logs.configure("text")
asyncio.run(main())
"""


def test_a_background_task_that_dies_takes_its_process_down(root: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == DIED_EXIT
    assert "background task died" in ended.stderr
    assert "RuntimeError" in ended.stderr and "in work" in ended.stderr
    assert "what an event says" not in ended.stderr
