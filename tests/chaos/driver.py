"""The client: submits jobs, polls each of them, and keeps all that it has been told.

The one rule: it believes nothing but answers. A job counts as accepted when a 202 arrived, and a
submit without an answer may or may not have made a job; both are what a client would know.
"""

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from .client import Answer, Connection, NoAnswer
from .stack import Stack

POLL_EVERY = 0.2  # seconds
WATCH_EVERY = 2.0  # seconds, for jobs that have ended: they must stay as they are
TERMINAL = ("completed", "failed")
EXPECTED = (200, 202, 422, 503)  # whatever happens, a client of ours gets one of these


class NotPrepared(Exception):
    """The events of jobs could not be stored."""


class Seen(NamedTuple):
    """One answer about a job."""

    at: float  # monotonic, when the answer was there
    status: str
    recovering: bool


@dataclass
class Job:
    """A job as its client knows it."""

    tag: str
    id: str | None = None  # without a 202 there is none
    accepted_at: float = 0.0
    seen: list[Seen] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str | None:
        """What was seen last."""
        return self.seen[-1].status if self.seen else None

    @property
    def ended(self) -> bool:
        """A terminal status has been seen."""
        return self.status in TERMINAL

    @property
    def ended_at(self) -> float:
        """When a terminal status was first seen; never is later than everything."""
        return next((seen.at for seen in self.seen if seen.status in TERMINAL), math.inf)


class Driver:
    """Submits to all API processes in turn and polls until it is closed."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.jobs: list[Job] = []
        self.unanswered = 0  # submits that got no answer
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []  # answers that nobody may get, whatever is broken
        self.slowest = 0.0  # seconds, of all answers
        self.unavailable_at: list[float] = []
        self._tags = itertools.count()
        self._turn = itertools.count()
        self._idle: dict[int, list[Connection]] = {}
        self._pollers: set[asyncio.Task[None]] = set()

    async def ask(self, method: str, path: str, body: Any = None, key: str = "") -> Answer:
        """One request to the next API process.

        Raises:
            NoAnswer: there was none.
        """
        apis = self.stack.apis
        if not apis:
            raise NoAnswer("no API runs")
        port = apis[next(self._turn) % len(apis)].port
        assert port
        idle = self._idle.setdefault(port, [])
        connection = idle.pop() if idle else Connection(port, self.stack.key)
        started = time.monotonic()
        answer = await connection.ask(method, f"/api/v1{path}", body, key=key)
        self._note(method, path, answer, time.monotonic() - started)
        idle.append(connection)
        return answer

    def _note(self, method: str, path: str, answer: Answer, took: float) -> None:
        self.statuses[answer.status] += 1
        self.slowest = max(self.slowest, took)
        if answer.status not in EXPECTED:
            self.wrong.append(f"{method} {path}: {answer.status} {answer.body[:200]!r}")
        if answer.status == 503:
            self.unavailable_at.append(time.monotonic())
            if "retry-after" not in answer.headers:
                self.wrong.append(f"{method} {path}: 503 without Retry-After")

    async def prepare(self, scripts: Iterable[str]) -> list[Job]:
        """Store the events that carry the scripts; the jobs can then be submitted."""
        jobs, events = [], []
        # Before any jump of a clock that a scenario makes, and inside a handoff's period.
        happened = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
        for script in scripts:
            job = Job(f"job-{next(self._tags)}")
            jobs.append(job)
            events.append(
                {
                    "source": "github",
                    "event_type": "commit",
                    "title": script,
                    "resource": job.tag,
                    "occurred_at": happened,
                }
            )
        for start in range(0, len(events), 500):
            answer = await self.ask(
                "POST",
                "/events",
                {"project_id": self.stack.project_id, "events": events[start : start + 500]},
            )
            if answer.status != 200:
                raise NotPrepared(answer.body)
        return jobs

    async def submit(self, *scripts: str, poll: bool = True) -> list[Job]:
        """Submit a job for each script, in order, each once, and poll those that were accepted."""
        jobs = await self.prepare(scripts)
        for job in jobs:
            await self.submit_prepared(job, poll=poll)
        return jobs

    async def submit_prepared(self, job: Job, *, poll: bool = True, key: str = "") -> bool:
        """Submit one job once; answers whether it was accepted. With a key it may be submitted
        again, and is the same job then."""
        body = {
            "project_id": self.stack.project_id,
            "filters": {"github": {"projects": [job.tag]}},
        }
        if job not in self.jobs:
            self.jobs.append(job)
        try:
            answer = await self.ask("POST", "/handoffs", body, key)
        except NoAnswer:
            self.unanswered += 1
            return False
        if answer.status != 202:
            return False
        job.id = answer.json()["jobId"]
        job.accepted_at = time.monotonic()
        if poll:
            self.poll(job)
        return True

    def poll(self, job: Job) -> None:
        """Poll a job for as long as the driver lives."""
        poller = asyncio.create_task(self._poll(job))
        self._pollers.add(poller)
        poller.add_done_callback(self._pollers.discard)

    async def _poll(self, job: Job) -> None:
        while True:
            with suppress(NoAnswer):
                await self.look(job)
            await asyncio.sleep(WATCH_EVERY if job.ended else POLL_EVERY)

    async def look(self, job: Job) -> bool:
        """Ask once for a job; answers whether there was news of it."""
        answer = await self.ask("GET", f"/jobs/{job.id}")
        if answer.status != 200:
            return False
        body = answer.json()
        job.last = body
        told = body["job"]
        job.seen.append(Seen(time.monotonic(), told["status"], told["recovering"]))
        return True

    @property
    def accepted(self) -> list[Job]:
        """The jobs that got a 202."""
        return [job for job in self.jobs if job.id is not None]

    async def until(self, status: str, seconds: float, jobs: list[Job] | None = None) -> None:
        """Wait until all these jobs (or all accepted) have been seen with a status."""
        await self._until(
            lambda job: job.status == status, seconds, self.accepted if jobs is None else jobs
        )

    async def until_ended(self, seconds: float, jobs: list[Job] | None = None) -> None:
        """Wait until all these jobs (or all accepted) have been seen to have ended."""
        await self._until(lambda job: job.ended, seconds, self.accepted if jobs is None else jobs)

    async def _until(self, good: Any, seconds: float, jobs: list[Job]) -> None:
        """Wait; running out of time is for the checker to judge, not an error here."""
        deadline = time.monotonic() + seconds
        while not all(map(good, jobs)) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def last_look(self) -> None:
        """One more poll of every accepted job, in case it was not polled or has changed since."""
        for job in self.accepted:
            with suppress(NoAnswer):
                await self.look(job)

    async def close(self) -> None:
        """Stop polling."""
        for poller in tuple(self._pollers):
            poller.cancel()
        await asyncio.gather(*self._pollers, return_exceptions=True)
        for connection in itertools.chain(*self._idle.values()):
            connection.close()
