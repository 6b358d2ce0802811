"""Two children under one parent: a death is mended, an order to stop reaches both."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from app import supervisor
from app.background import PARENT, child_environment
from app.supervisor import supervise

DIES = "raise SystemExit({code})"
STAYS = "import signal; signal.pause()"
STUBBORN = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
while True: signal.pause()
"""


class Children:
    """Tiny processes in the place of `baton serve` and `baton worker`; says when one starts."""

    def __init__(self) -> None:
        self.programs: dict[str, list[str]] = {}  # by name; the last one is repeated
        self.started: list[tuple[str, asyncio.subprocess.Process]] = []
        self._news = asyncio.Event()

    async def start(self, name: str, dsn: str) -> asyncio.subprocess.Process:
        programs = self.programs[name]
        program = programs.pop(0) if len(programs) > 1 else programs[0]
        made = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-c", program),
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        if program == STUBBORN:
            assert made.stdout and await made.stdout.readline() == b"deaf\n"
        self.started.append((name, made))
        self._news.set()
        return made

    async def reach(self, *names: str) -> list[asyncio.subprocess.Process]:
        """The latest children of these names, once each was started as often as it is named."""
        while True:
            got = [name for name, _ in self.started]
            if all(got.count(name) >= names.count(name) for name in names):
                found = []
                for name in names:
                    found.append([child for known, child in self.started if known == name][-1])
                return found
            self._news.clear()
            async with asyncio.timeout(10):
                await self._news.wait()


@pytest.fixture
async def children(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Children]:
    """Children that both stay, unless a test says otherwise; none outlives the test."""
    made = Children()
    made.programs = {"serve": [STAYS], "worker": [STAYS]}
    monkeypatch.setattr(supervisor, "_start", made.start)
    monkeypatch.setattr(supervisor, "BACKOFF", (0.01, 0.04))
    yield made
    for _, child in made.started:
        if child.returncode is None:
            child.kill()
        await child.wait()


Supervised = Callable[[], Awaitable["asyncio.Task[int]"]]


@pytest.fixture
async def supervised(children: Children) -> AsyncIterator[Supervised]:
    """Starts the supervisor as a task; its signal handlers are put back."""
    tasks: list[asyncio.Task[int]] = []

    async def start() -> "asyncio.Task[int]":
        tasks.append(asyncio.create_task(supervise("postgresql://nowhere/")))
        return tasks[0]

    yield start
    for task in tasks:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(signum)


async def ended(task: "asyncio.Task[int]") -> int:
    async with asyncio.timeout(10):
        return await asyncio.shield(task)


def restarts(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(r) for r in caplog.records if r.getMessage() == "child died"]


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
async def test_an_order_to_stop_reaches_both_and_the_exit_is_0(
    order: signal.Signals, children: Children, supervised: Supervised
) -> None:
    task = await supervised()
    both = await children.reach("serve", "worker")
    os.kill(os.getpid(), order)
    assert await ended(task) == 0
    assert [child.returncode for child in both] == [-signal.SIGTERM] * 2
    assert len(children.started) == 2


async def test_a_child_that_ends_in_order_is_replaced_as_well(
    children: Children, supervised: Supervised, caplog: pytest.LogCaptureFixture
) -> None:
    children.programs["worker"] = ["pass", "pass", "pass", STAYS]
    await supervised()
    await children.reach("worker", "worker", "worker", "worker")
    assert restarts(caplog) == []  # it is no error, and needs no longer and longer pauses
    os.kill(os.getpid(), signal.SIGTERM)


async def test_a_child_that_dies_is_started_again_and_the_other_does_not_notice(
    children: Children, supervised: Supervised, caplog: pytest.LogCaptureFixture
) -> None:
    task = await supervised()
    serve, worker = await children.reach("serve", "worker")
    worker.kill()
    _, again = await children.reach("worker", "worker")
    assert again.pid != worker.pid
    assert serve.returncode is None and not task.done()
    [line] = restarts(caplog)
    assert (line["child"], line["code"]) == ("worker", -signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await ended(task) == 0
    assert serve.returncode == again.returncode == -signal.SIGTERM


async def test_a_child_that_goes_on_dying_is_started_ever_more_slowly_up_to_a_limit(
    children: Children, supervised: Supervised, caplog: pytest.LogCaptureFixture
) -> None:
    children.programs["worker"] = [DIES.format(code=1)] * 5 + [STAYS]
    await supervised()
    await children.reach(*["worker"] * 6)
    assert [line["restart_in"] for line in restarts(caplog)] == [0.01, 0.02, 0.04, 0.04, 0.04]
    assert all(line["code"] == 1 and line["levelno"] == logging.ERROR for line in restarts(caplog))


async def test_a_steady_life_makes_the_next_restart_quick_again(
    children: Children,
    supervised: Supervised,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STEADY", -1.0)  # every life counts as long
    children.programs["serve"] = [DIES.format(code=1)] * 3 + [STAYS]
    await supervised()
    await children.reach(*["serve"] * 4)
    assert [line["restart_in"] for line in restarts(caplog)] == [0.01, 0.01, 0.01]


async def test_a_child_that_ends_well_without_being_told_is_started_again(
    children: Children, supervised: Supervised
) -> None:
    children.programs["worker"] = [DIES.format(code=0), STAYS]
    task = await supervised()
    await children.reach("worker", "worker")
    assert not task.done()


async def test_a_wrong_configuration_ends_everything(
    children: Children, supervised: Supervised, caplog: pytest.LogCaptureFixture
) -> None:
    children.programs["worker"] = [DIES.format(code=2)]
    task = await supervised()
    assert await ended(task) == 2
    names = [name for name, _ in children.started]
    assert sorted(names) == ["serve", "worker"]
    assert all(child.returncode is not None for _, child in children.started)
    assert restarts(caplog) == []


async def test_no_child_is_started_after_the_order_to_stop(
    children: Children, supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF", (30.0, 30.0))
    children.programs["worker"] = [DIES.format(code=1)]
    task = await supervised()
    _, worker = await children.reach("serve", "worker")
    await worker.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await ended(task) == 0  # and not only after the back-off
    assert len(children.started) == 2


async def test_a_child_that_does_not_stop_is_killed(
    children: Children, supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "DRAIN", 0.1)
    children.programs["worker"] = [STUBBORN]
    task = await supervised()
    serve, worker = await children.reach("serve", "worker")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await ended(task) == 0
    assert (serve.returncode, worker.returncode) == (-signal.SIGTERM, -signal.SIGKILL)


async def test_a_second_order_to_stop_does_not_wait(
    children: Children, supervised: Supervised
) -> None:
    children.programs["worker"] = [STUBBORN]
    task = await supervised()
    serve, worker = await children.reach("serve", "worker")
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(10):
        await serve.wait()
    assert not task.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await ended(task) == 0
    assert worker.returncode == -signal.SIGKILL


def test_a_child_knows_its_parent_its_code_and_its_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("KEPT", "yes")
    made = child_environment(DATABASE_URL="postgresql://x/")
    assert made[PARENT] == str(os.getpid())
    assert made["DATABASE_URL"] == "postgresql://x/"
    assert made["KEPT"] == "yes"
    here, rest = made["PYTHONPATH"].split(os.pathsep)
    assert os.path.exists(os.path.join(here, "app", "supervisor.py"))
    assert rest == "/elsewhere"
