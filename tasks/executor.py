"""One attempt under a lease: claim, generate, then complete, fail or release.

It knows nothing of prompts. The one rule: every write of a running attempt carries the lease token
of its claim, so whatever an attempt does after it has lost the job is refused by the database.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.db import Database, LeaseLost
from tasks.generate import generate
from tasks.outcomes import Failed, GenerationFailed, TimedOut
from tasks.providers import Provider

log = logging.getLogger("baton.worker")

LEASE = 15.0  # seconds that a claim or a renewal counts
RENEW_EVERY = 5.0  # seconds; two renewals may fail before a lease is lost


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job that this attempt owns; the field names are the columns of `claim_job`."""

    id: str
    user_id: str
    project_id: str
    project_name: str
    kind: str
    input: Mapping[str, Any]
    attempt: int
    lease_token: str
    claimed_at: datetime


class Executor:
    """Runs the attempts of one worker and keeps their leases.

    Args:
        name: who holds the leases, for people who look at the table.
        attempt_timeout: seconds for one attempt.
    """

    def __init__(
        self, database: Database, provider: Provider, *, name: str, attempt_timeout: float
    ) -> None:
        self._database = database
        self._provider = provider
        self._name = name
        self._attempt_timeout = attempt_timeout
        self._running: dict[str, tuple[ClaimedJob, asyncio.Task[Any]]] = {}  # by lease token

    async def run(self, job_id: str, ticket_id: int) -> None:
        """Run one attempt for a ticket.

        It returns normally whatever becomes of the job; only being cancelled, which means that
        this worker has to stop or the lease is lost, is passed on.
        """
        job = await self._claim(job_id, ticket_id)
        if job is None:
            return
        current = asyncio.current_task()
        assert current
        self._running[job.lease_token] = (job, current)
        try:
            artifact = await self._attempt(job)
            await self._complete(job, artifact)
        except Failed as failure:
            await self._fail(job, failure)
        except LeaseLost:
            log.warning("fenced", extra=_ids(job))
        except asyncio.CancelledError:
            if job.lease_token in self._running:
                await asyncio.shield(self._release(job))
            raise
        finally:
            self._running.pop(job.lease_token, None)

    async def renew_once(self) -> int:
        """Renew all leases in one statement; stop the attempts that lost theirs. Answers how many
        attempts are still ours."""
        held = [job for job, _ in self._running.values()]
        if not held:
            return 0
        rows = await self._database.rows(
            "renew_leases", [j.id for j in held], [j.lease_token for j in held], LEASE
        )
        still_ours = {row[0] for row in rows}
        for job in held:
            if job.id not in still_ours and job.lease_token in self._running:
                _, task = self._running.pop(job.lease_token)
                log.warning("lease lost", extra=_ids(job))
                task.cancel()
        return len(still_ours)

    async def _claim(self, job_id: str, ticket_id: int) -> ClaimedJob | None:
        row = await self._database.row("claim_job", job_id, ticket_id, self._name, LEASE)
        if row is None:  # another ticket won, or the job has ended: this ticket is spent
            log.info("ticket dropped", extra={"job_id": job_id, "ticket_id": ticket_id})
            return None
        job = ClaimedJob(**row)
        log.info("claim", extra=_ids(job))
        return job

    async def _attempt(self, job: ClaimedJob) -> dict[str, Any]:
        """The artifact, or how it failed; whatever nobody foresaw fails the job and is logged."""
        try:
            async with asyncio.timeout(self._attempt_timeout):
                return await generate(self._database, self._provider, job)
        except (Failed, LeaseLost):
            raise
        except TimeoutError:
            raise TimedOut(
                f"The attempt took longer than {self._attempt_timeout:.0f} s.", retryable=True
            ) from None
        except Exception as error:
            log.exception("attempt failed", extra=_ids(job))
            raise GenerationFailed(
                f"The processing failed unexpectedly ({type(error).__name__}); "
                "the worker's log has it by the job's id."
            ) from error

    async def _complete(self, job: ClaimedJob, artifact: dict[str, Any]) -> None:
        await self._database.row("complete_job", job.id, job.lease_token, artifact)
        log.info("complete", extra=_ids(job))

    async def _fail(self, job: ClaimedJob, failure: Failed) -> None:
        meta = {"attempts": job.attempt, **failure.meta}
        await self._database.row(
            "fail_job", job.id, job.lease_token, failure.code, failure.sentence, meta
        )
        log.info("fail", extra={**_ids(job), "error_code": failure.code})

    async def _release(self, job: ClaimedJob) -> None:
        await self._database.row("release_job", job.id, job.lease_token)
        log.info("release", extra=_ids(job))


def _ids(job: ClaimedJob) -> dict[str, Any]:
    return {"job_id": job.id, "kind": job.kind, "attempt": job.attempt}
