"""One attempt under a lease: claim, generate, then complete, park, fail or release.

It knows nothing of prompts. The one rule: every write of a running attempt carries the lease token
of its claim, so whatever an attempt does after it has lost the job is refused by the database.
"""

import asyncio
import logging
import random
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app import metrics
from app.db import Database, LeaseLost, Refused, Unavailable
from app.logs import about, trace
from app.queue import Bell
from app.sweeper import LEASE
from app.tracing import span
from tasks.breaker import Breaker
from tasks.calls import Calls, Progress
from tasks.generate import ClaimedJob, generate
from tasks.isolated import ChildDied, generate_isolated
from tasks.outcomes import Failed, GenerationFailed, Retry, unforeseen
from tasks.providers import Provider

log = logging.getLogger("baton.worker")

RENEW_EVERY = 5.0  # seconds; two renewals may fail before a lease of 15 s is lost
REPORT_EVERY = 2.0  # seconds between writes of what the running attempts are at, and of calls
REPORTS_AT_ONCE = 100  # in one write; each is a row and an event, so a thousand take turns
CALLS_KEPT = 10_000  # calls of models that are not written yet; older ones are forgotten
CALLS_AT_ONCE = 1_000  # in one statement
KEEP_OUTCOME = 120.0  # seconds for which an outcome is kept in memory while the database is away
KEEP_DELAY = (0.1, 2.0)  # seconds between tries to store it, first and longest
ISOLATE_AFTER = 2  # lost workers, from which on a job runs in a process of its own


Artifact = dict[str, Any]  # the columns of handoffs or insights that a worker fills


@dataclass(frozen=True, slots=True)
class Hold:
    """The provider is down: the job waits for so many seconds, and that does not count."""

    seconds: float


Found = Artifact | Retry | Hold | Failed | ChildDied | Unavailable  # what an attempt comes to


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended: the verb of schema.sql, and what became of its job."""

    transition: str
    error_code: str | None = None  # of a job that failed with it
    completed: bool = False

    @property
    def outcome(self) -> str | None:
        """Of a job that ended with it, as in `jobs.outcome`."""
        if self.completed:
            return "succeeded"
        return self.error_code and ("timed_out" if self.error_code == "timeout" else "failed")


class Executor:
    """Runs the attempts of one worker and keeps their leases.

    Args:
        name: who holds the leases, for people who look at the table.
        attempt_timeout: seconds for one attempt.
        bell: tells the workers that a job waits again, and whoever waits for a job that it changed.
        breaker: learns from the attempts whether the provider is there.
        attempts: the database for what attempts read and write, if not the same.
    """

    def __init__(
        self,
        database: Database,
        provider: Provider,
        *,
        name: str,
        attempt_timeout: float,
        bell: Bell,
        breaker: Breaker | None = None,
        attempts: Database | None = None,
    ) -> None:
        self._breaker = breaker or Breaker()
        self._database = database
        self._attempts = attempts or database
        self._provider = provider
        self._name = name
        self._attempt_timeout = attempt_timeout
        self._bell = bell
        # By lease token; without a task once the outcome is being stored.
        self._running: dict[str, tuple[ClaimedJob, asyncio.Task[Any] | None]] = {}
        self._progress: dict[str, Progress] = {}  # by lease token: what is not written yet
        self._calls: deque[dict[str, Any]] = deque(maxlen=CALLS_KEPT)  # nor these
        self._renewed = time.monotonic()

    async def run(self, job_id: str, ticket_id: int) -> None:
        """Run one attempt for a ticket.

        It returns normally whatever becomes of the job; only being cancelled, which means that
        this worker has to stop or the lease is lost, is passed on.

        Raises:
            db.Unavailable: the database could not be reached to claim the job.
        """
        if self._cut_off():
            raise Unavailable("The leases of this worker cannot be renewed.")
        job = await self._claimed(job_id, ticket_id)
        if job is None:  # another ticket won, or the job has ended: this ticket is spent
            log.info("ticket dropped", extra={"job_id": job_id, "ticket_id": ticket_id})
            return
        traced = span(f"attempt {job.kind}", "consumer", _attributes(job), parent=job.traceparent)
        with about(job.told, job.request_id), traced as told:
            ending = await self._run(job)
            told.set("baton.transition", ending.transition)
            if ending.error_code:
                told.fail(ending.error_code)

    async def _run(self, job: ClaimedJob) -> Ending:
        current = asyncio.current_task()
        assert current
        started, ending = time.monotonic(), Ending("fenced")
        self._running[job.lease_token] = (job, current)
        metrics.attempts_running.inc()
        try:
            outcome = self._judged(job, await self._attempt(job))
            # From here on the database says whether the lease still counts. To stop now what may
            # have committed already would call a completed job lost.
            self._running[job.lease_token] = (job, None)
            with span("store"):
                ending = await self._store(job, outcome)
        except LeaseLost:
            log.warning("fenced", extra=job.told)
            metrics.leases_lost.labels("write").inc()
        except asyncio.CancelledError:
            if job.lease_token in self._running:  # else the lease is lost: nothing to give back
                await asyncio.shield(self._release(job))
                ending = Ending("release")
            raise
        finally:
            self._running.pop(job.lease_token, None)
            self._progress.pop(job.lease_token, None)
            metrics.attempts_running.dec()
            _count_attempt(job, time.monotonic() - started, ending)
        return ending

    async def renew_once(self) -> int:
        """Renew all leases in one statement; stop the attempts that lost theirs. Answers how many
        attempts are still ours."""
        held = [job for job, _ in self._running.values()]
        if held:
            rows = await self._database.rows(
                "renew_leases", [j.id for j in held], [j.lease_token for j in held], LEASE
            )
            still_ours = {row[0] for row in rows}
            for job in held:
                _, task = self._running.get(job.lease_token, (job, None))
                if job.id not in still_ours and task:
                    del self._running[job.lease_token]
                    log.warning("lease lost", extra=job.told)
                    metrics.leases_lost.labels("renewal").inc()
                    task.cancel()
            metrics.renewals.labels("ok").inc()
        self._renewed = time.monotonic()
        return len(self._running)

    async def renew_forever(self) -> None:
        """Keep the leases of running attempts; one failed renewal is made up by the next."""
        metrics.renewal_age.set_function(lambda: time.monotonic() - self._renewed)
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                await self.renew_once()
            except Unavailable as error:
                metrics.renewals.labels("unavailable").inc()
                log.warning("leases not renewed", extra={"cause": str(error)})

    async def report_once(self) -> None:
        """Write what the attempts are at whose state is new, in one statement."""
        first = list(self._progress)[:REPORTS_AT_ONCE]  # those that have waited longest
        reported = {token: self._progress.pop(token) for token in first}
        held = [(self._running[token][0].id, token) for token in reported if token in self._running]
        if held:
            ids, tokens = zip(*held, strict=True)
            progress = [reported[token] for token in tokens]
            for row in await self._database.rows("report_progress", ids, tokens, progress):
                self._bell.announce(row[0])

    async def report_forever(self) -> None:
        """Keep `progress` of running jobs fresh, and write the calls that ended attempts made; a
        short attempt ends before its progress costs a write."""
        while True:
            await asyncio.sleep(REPORT_EVERY)
            try:
                await self.report_once()
                await self.record_once()
            except Unavailable as error:  # the next state replaces this one, the calls are kept
                log.warning("progress not written", extra={"cause": str(error)})

    async def record_once(self) -> None:
        """Write the calls of the attempts that have ended, fenced ones too: all were paid for."""
        while self._calls:
            batch = [self._calls.popleft() for _ in range(min(len(self._calls), CALLS_AT_ONCE))]
            try:
                await self._database.value("record_calls", batch)
            except Unavailable:
                self._calls.extendleft(reversed(batch))
                raise
            except Refused as error:
                log.error("calls refused", extra={"calls": len(batch), "trace": trace(error)})

    def _cut_off(self) -> bool:
        """Has renewing failed for so long that our leases have expired? Then a new attempt would
        only cost a call whose result somebody else makes as well."""
        return time.monotonic() - self._renewed > LEASE

    async def _claimed(self, job_id: str, ticket_id: int) -> ClaimedJob | None:
        """The job, if it is ours now. A claim is not left half way: its commit may be on its way
        when we are told to stop, and then the job is given back at once."""
        claiming = asyncio.ensure_future(self._claim(job_id, ticket_id))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            with suppress(Unavailable):
                if job := await claiming:
                    await self._release(job)
            raise

    async def _claim(self, job_id: str, ticket_id: int) -> ClaimedJob | None:
        row = await self._attempts.row("claim_job", job_id, ticket_id, self._name, LEASE)
        if row is None:
            return None
        job = ClaimedJob(**row)
        with about(job.told, job.request_id):
            log.info("claim")
        metrics.job_transitions.labels(job.kind, "claim").inc()
        if job.attempt == 1:
            metrics.pickup_seconds.labels(job.kind).observe(job.age)
        self._bell.announce(job.id)
        return job

    async def _attempt(self, job: ClaimedJob) -> Found:
        """The artifact, or how it did not come to be; every outcome of an attempt passes here."""
        deadline = asyncio.timeout(self._attempt_timeout)
        calls = self._calls_of(job)
        try:
            async with deadline:
                if job.crashes >= ISOLATE_AFTER:
                    return await generate_isolated(job, self._database.dsn, calls)
                return await generate(self._attempts, self._provider, job, calls)
        except (Retry, Failed, ChildDied) as outcome:
            return outcome
        except TimeoutError:
            if not deadline.expired():
                return Retry("The provider did not answer in time.", code="timeout")
            return Retry(
                f"The attempt took longer than {self._attempt_timeout:.0f} s.", code="timeout"
            )
        except Unavailable as error:
            return error
        except Exception as error:
            log.error("attempt failed", extra={**job.told, "trace": trace(error)})
            return unforeseen(error)
        finally:
            whose = {name: getattr(job, name) for name in _CALLER}
            self._calls.extend({"job_id": job.id, **whose, **call} for call in calls.made)
            for call in calls.made:
                _count_call(job.kind, call)

    def _calls_of(self, job: ClaimedJob) -> Calls:
        def told(progress: Progress) -> None:
            self._progress[job.lease_token] = progress

        return Calls(told, kind=job.kind, plan=job.plan, models=job.models)

    def _judged(self, job: ClaimedJob, outcome: Found) -> Found:
        """The outcome in the light of how the provider does; what did not reach it says nothing."""
        match outcome:
            case Retry():
                wait = self._breaker.fail(job.id)
                return outcome if wait is None else Hold(max(wait, outcome.asked()))
            case dict():
                self._breaker.succeed()
            case Failed() if outcome.meta.get("stage") in ("provider", "answer"):
                self._breaker.succeed()
        return outcome

    async def _store(self, job: ClaimedJob, outcome: Found) -> Ending:
        """Write the outcome. One that the database cannot hold, such as a sentence with a NUL, is
        a failure: the next attempt would cost as much and end the same way."""
        try:
            return await self._write(job, outcome)
        except Refused as error:
            log.error("outcome refused", extra={**job.told, "trace": trace(error)})
            return await self._write(
                job, GenerationFailed("The database cannot store the outcome.")
            )

    async def _write(self, job: ClaimedJob, outcome: Found) -> Ending:
        """Write the outcome, in the one transaction that ends the attempt."""
        match outcome:
            case Retry():
                return await self._park(job, outcome)
            case Hold(seconds):
                await self._keep(job, "hold_job", seconds)
                log.warning("hold", extra={**job.told, "delay": round(seconds, 1)})
                return Ending("hold")
            case Failed():
                meta = {"retryable": False, "attempts": job.attempt, **outcome.meta}
                await self._keep(job, "fail_job", outcome.code, outcome.sentence, meta)
                log.info("fail", extra={**job.told, "error_code": outcome.code})
                return Ending("fail", outcome.code)
            case ChildDied():
                sentence = f"The process that ran the job died ({outcome}), again and again."
                meta = {"retryable": True, "attempts": job.attempt}
                status = await self._keep(job, "crash_job", sentence, meta)
                log.error("crash", extra={**job.told, "how": str(outcome), "status": status})
                self._bell.ring()
                return Ending("crash", "worker_lost" if status == "failed" else None)
            case Unavailable():  # nobody's fault: the attempt does not count
                await self._release(job)
                return Ending("release")
            case artifact:
                await self._keep(job, "complete_job", artifact)
                log.info("complete", extra=job.told)
                return Ending("complete", completed=True)

    async def _park(self, job: ClaimedJob, retry: Retry) -> Ending:
        delay = retry.delay(job.provider_errors + 1)
        meta = {"retryable": True, "attempts": job.attempt, **retry.meta}
        status = await self._keep(job, "park_job", delay, retry.code, retry.sentence, meta)
        log.warning("park", extra={**job.told, "delay": round(delay, 1), "status": status})
        return Ending("park", retry.code if status == "failed" else None)

    async def _release(self, job: ClaimedJob) -> None:
        with suppress(LeaseLost):  # then there is nothing to give back
            await self._keep(job, "release_job")
            log.info("release", extra=job.told)
            self._bell.ring()

    async def _keep(self, job: ClaimedJob, name: str, *args: Any) -> Any:
        """Call a function that ends the attempt; while the database is away, again and again.

        A result costs money, and these functions may be repeated: completing or failing a job
        again under the same token changes nothing. If another attempt has taken over meanwhile,
        this one is fenced, which is correct and only costs the call.
        """
        started, delay = time.monotonic(), KEEP_DELAY[0]
        while True:
            try:
                answer = await self._attempts.value(name, job.id, job.lease_token, *args)
                self._bell.announce(job.id)
                metrics.job_transitions.labels(job.kind, name.removesuffix("_job")).inc()
                return answer
            except Unavailable as error:
                if time.monotonic() - started > KEEP_OUTCOME:
                    log.error("outcome lost", extra={**job.told, "cause": str(error)})
                    raise
                log.warning("outcome kept", extra={**job.told, "cause": str(error)})
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
            delay = min(delay * 2, KEEP_DELAY[1])


_CALLER = ("attempt", "user_id", "project_id", "kind")  # of provider_calls, and of a job


def _attributes(job: ClaimedJob) -> dict[str, Any]:
    return {f"baton.{name}": value for name, value in job.told.items()}


def _count_attempt(job: ClaimedJob, seconds: float, ending: Ending) -> None:
    metrics.attempt_seconds.labels(job.kind, ending.transition).observe(seconds)
    if ending.outcome:
        code = ending.error_code or "none"
        metrics.jobs_ended.labels(job.kind, ending.outcome, code).inc()
        metrics.job_seconds.labels(job.kind, ending.outcome).observe(job.age + seconds)


def _count_call(kind: str, call: dict[str, Any]) -> None:
    """Count a call of a model by the name that it was asked for, of which there are few."""
    model = metrics.MODELS(call["asked"] or call["model"])
    metrics.provider_calls.labels(kind, model, metrics.OUTCOMES(call["outcome"])).inc()
    metrics.provider_seconds.labels(model).observe(call["seconds"])
    for type_ in ("prompt", "completion"):
        metrics.provider_tokens.labels(kind, model, type_).inc(call[f"{type_}_tokens"])
