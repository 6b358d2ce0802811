"""What a scenario gets to work with, how scenarios are declared, and how one is run and judged.

A scenario breaks something and says what it expects beyond the invariants; starting, settling,
checking and cleaning up are done here, the same for all.
"""

import asyncio
import statistics
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .checker import Verdict, check, settle, time_to_truth
from .driver import Driver, Job
from .postgres import Postgres
from .stack import NOTHING, Process, Stack

Cluster = Literal["shared", "own", "disk"]
RESTART_AFTER = 1.0  # seconds after which `baton run` starts a child again for the first time


@dataclass
class Lab:
    """A scenario's stack, its client, and what it found out."""

    stack: Stack
    driver: Driver
    postgres: Postgres
    folder: Path
    scale: float = 1.0  # of the durations that only make a measurement steadier
    calls_allowed: int | dict[str, int] = 1
    deadlocks_allowed: int = 0
    settle: float = 90.0  # seconds until everything has to have come to rest
    truth: float | None = None  # seconds, when the scenario measures it itself
    ratio: float | None = None  # recovery rate / baseline rate
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _keepers: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(
        self,
        settings: Mapping[str, str] = NOTHING,
        *,
        apis: int = 1,
        workers: int = 2,
        proxied: bool = False,
    ) -> tuple[list[Process], list[Process]]:
        """Start API processes and workers; with `proxied` each behind a proxy of its own."""
        served = [self.stack.serve(settings, proxied=proxied) for _ in range(apis)]
        worked = [self.stack.worker(settings, proxied=proxied) for _ in range(workers)]
        started = await asyncio.gather(*served, *worked)
        return started[:apis], started[apis:]

    def keep(self, process: Process) -> None:
        """Start a worker anew whenever it has ended, as a supervisor does."""

        async def keeping() -> None:
            current = process
            while True:
                await current.exited(3600)
                await asyncio.sleep(RESTART_AFTER)
                current = await self.stack.worker()

        self._keepers.append(asyncio.create_task(keeping()))

    async def stop_keeping(self) -> None:
        """The supervisor is gone."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def submit(self, *scripts: str) -> list[Job]:
        """See `Driver.submit`."""
        return await self.driver.submit(*scripts)

    async def run(self, *scripts: str, seconds: float = 15) -> list[Job]:
        """Submit jobs and wait until the provider has been called for each of them."""
        jobs = await self.submit(*scripts)
        await self.called(jobs, seconds)
        return jobs

    async def called(self, jobs: list[Job], seconds: float = 15, times: int = 1) -> None:
        """Wait until the provider has been called so often for each of the jobs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            calls = self.stack.calls()
            if all(len(calls.get(job.tag, ())) >= times for job in jobs):
                return
            await asyncio.sleep(0.03)
        self.expect(False, f"{len(jobs)} jobs called {times} times within {seconds:.0f} s")

    def owner(self, job: Job) -> Process:
        """The worker that made the newest call of a job."""
        pid = self.stack.calls()[job.tag][-1].pid
        return next(process for process in self.stack.processes if process.pid == pid)

    def expect(self, good: object, sentence: str) -> None:
        """What this scenario asks for beyond the invariants."""
        if not good:
            self.failures.append(sentence)

    def note(self, sentence: str) -> None:
        """For the last column."""
        self.notes.append(sentence)

    async def ended(self, jobs: list[Job] | None = None, seconds: float = 60) -> float:
        """Wait until the jobs have ended; answers how long that took."""
        started = time.monotonic()
        await self.driver.until_ended(seconds, jobs)
        return time.monotonic() - started

    def completed(self, jobs: list[Job]) -> None:
        """Expect that all of them have completed."""
        for job in jobs:
            code = (job.last.get("job") or {}).get("error_code")
            self.expect(job.status == "completed", f"{job.tag} is {job.status} ({code})")

    def failed(self, job: Job, code: str) -> None:
        """Expect that a job has failed with a code."""
        found = (job.last.get("job") or {}).get("error_code")
        self.expect(found == code, f"{job.tag}: {found} ({job.status}), expected {code}")

    @asynccontextmanager
    async def load(self, script: str, every: float) -> AsyncIterator[list[Job]]:
        """Submit a job every so many seconds for as long as the body runs, each once: what is
        refused is not submitted again, so that accepted and made can be compared."""
        jobs: list[Job] = []
        fresh = await self.driver.prepare([script] * 400)

        async def submitting() -> None:
            running: set[asyncio.Task[bool]] = set()
            try:
                for job in fresh:
                    jobs.append(job)
                    task = asyncio.create_task(self.driver.submit_prepared(job))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    await asyncio.sleep(every)
            finally:
                await asyncio.gather(*running, return_exceptions=True)

        task = asyncio.create_task(submitting())
        try:
            yield jobs
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


Body = Callable[[Lab], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """A row of the table."""

    id: str
    title: str
    body: Body | None  # None: not there yet; the reason is `needs`
    limit: float | None = None  # seconds to the truth
    cluster: Cluster = "shared"
    alone: bool = False  # measures speed: nothing else may run beside it
    short: bool = False  # in the selection of `make test`
    needs: str = ""


@dataclass
class Result:
    """What became of a scenario."""

    scenario: Scenario
    jobs: int = 0
    accepted: int = 0
    calls: int = 0  # most for one job
    verdict: Verdict = field(default_factory=Verdict)
    truth: float | None = None
    ratio: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def good(self) -> bool:
        """Nothing was violated."""
        return not self.verdict.violations


REGISTRY: list[Scenario] = []


def scenario(
    id: str,
    title: str,
    *,
    limit: float | None = None,
    cluster: Cluster = "shared",
    alone: bool = False,
    short: bool = False,
) -> Callable[[Body], Body]:
    """Declare a scenario; ids are those of the list in the design, or names."""

    def declare(body: Body) -> Body:
        REGISTRY.append(Scenario(id, title, body, limit, cluster, alone, short))
        return body

    return declare


def missing(id: str, title: str, needs: str) -> None:
    """Declare a scenario that cannot run, and why; it is listed, not dropped."""
    REGISTRY.append(Scenario(id, title, None, needs=needs))


class Skip(Exception):
    """This machine cannot run the scenario; the message says why."""


async def run_scenario(
    declared: Scenario, postgres: Postgres, folder: Path, *, scale: float
) -> Result:
    """Run one scenario from an empty database to a verdict."""
    started = time.monotonic()
    result = Result(declared)
    if declared.body is None:
        result.skipped = f"needs: {declared.needs}"
        return result
    name = "chaos_" + "".join(c if c.isalnum() else "_" for c in declared.id)
    stack = Stack(postgres, name, folder)
    driver = Driver(stack)
    lab = Lab(stack, driver, postgres, folder, scale=scale)
    try:
        await stack.open()
        await _run_and_judge(declared, lab, result)
    except Skip as reason:
        result.skipped = f"skipped: {reason}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result.verdict.add("scenario", [f"broke: {error!r} at {where.name}:{where.lineno}"])
        (folder / "traceback.txt").write_text(traceback.format_exc())
    finally:
        await lab.stop_keeping()
        await driver.close()
        await stack.close()
    result.seconds = time.monotonic() - started
    return result


async def _run_and_judge(declared: Scenario, lab: Lab, result: Result) -> None:
    assert declared.body is not None
    driver = lab.driver
    await declared.body(lab)
    await settle(driver, lab.settle)
    await driver.close()
    await driver.last_look()
    result.verdict = await check(
        driver, calls_allowed=lab.calls_allowed, deadlocks_allowed=lab.deadlocks_allowed
    )
    result.truth = lab.truth if lab.truth is not None else time_to_truth(driver)
    if declared.limit is not None:
        late = result.truth > declared.limit + 0.7  # a poll, and a busy machine
        lab.expect(not late, f"the truth took {result.truth:.1f} s, {declared.limit} allowed")
    result.verdict.add("expected", lab.failures)
    result.jobs, result.accepted = len(driver.jobs), len(driver.accepted)
    result.calls = max(map(len, lab.stack.calls().values()), default=0)
    result.ratio = lab.ratio
    result.notes = lab.notes


def median(values: list[float]) -> float:
    """The middle one; 0 of none."""
    return statistics.median(values) if values else 0.0
