"""Delivers webhooks: takes what is due, signs it, sends it, notes what came of it.

It runs beside the attempts of a worker and shares nothing with them but the pool, of which it holds
`CONNECTIONS` for a statement at a time. The one rule: a delivery ends only by a note in the
database; until then it is due again when its lease has run out. So a receiver may get a message
twice, with the same id, and always gets it once if it answers within the schedule.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus

from standardwebhooks import Webhook

from app import __version__, metrics
from app.db import Database, DatabaseError, Unavailable
from app.logs import trace
from tasks.outbound import TIMEOUT, Answer, Outbound, Undelivered

log = logging.getLogger("baton.webhooks")

# Seconds before each attempt, of the Standard Webhooks: ten attempts in 75.6 hours. Over a weekend
# somebody can mend a receiver, and nothing is lost.
SCHEDULE = (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
JITTER = 0.1  # of a delay, up or down, so that what failed together does not come back together
RETRY_AFTER_LONGEST = 86400.0  # seconds; what a receiver may ask for at most
THROTTLED = {429, 502, 503, 504}  # whose Retry-After counts
POLL_EVERY = (
    1.0  # seconds between looks for what is due; the end of a job here is looked at at once
)
QUIET = 0.02  # seconds between two looks, or as long as a look took: 5 ms with 1,000 receivers
CONCURRENCY = 100  # requests on their way at a time: a socket and a few KB each
PER_HOST = 4  # of them to one host, and one to a host that has just failed
HOST_LOGGED = 253  # characters: the longest that DNS knows; what is longer is no host
REMEMBERED = 10_000  # hosts that have just failed
CONNECTIONS = 2  # of the pool; the rest is for jobs
LEASE = TIMEOUT + 30.0  # seconds that a claim counts: the request, and time to note its outcome
KEEP_DELAY = (0.1, 2.0)  # seconds between tries to note an outcome, first and longest
DRAIN = 3.0  # seconds that requests on their way get when the worker stops


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that is ours to send until `leased_until`."""

    id: str
    job_id: str
    project_id: str
    url: str
    host: str
    type: str
    payload: str
    attempt: int
    leased_until: datetime
    created_at: datetime
    secrets: list[str]

    def headers(self, at: datetime) -> dict[str, str]:
        """Those of the Standard Webhooks, and of CloudEvents in binary mode.

        Args:
            at: when this attempt is made, in UTC.
        """
        signatures = (Webhook(s).sign(self.id, at, self.payload) for s in self.secrets)
        return {
            "Content-Type": "application/json",
            "User-Agent": f"Baton/{__version__}",
            "webhook-id": self.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": " ".join(signatures),
            "ce-specversion": "1.0",
            "ce-id": self.id,
            "ce-type": self.type,
            "ce-source": f"/api/v1/projects/{self.project_id}",
            "ce-subject": self.job_id,
            "ce-time": self.created_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an attempt."""

    status: int | None
    error: str | None  # a sentence; None: delivered
    retry_after: float | None = None  # seconds that the receiver asked for
    gone: bool = False

    @classmethod
    def of(cls, answer: Answer) -> "Outcome":
        """Only 2xx is a success; a redirect is not followed, as it may lead anywhere."""
        status = answer.status
        if 200 <= status < 300:
            return cls(status, None)
        error = f"Answered {status}"
        with suppress(ValueError):
            error += f" {HTTPStatus(status).phrase}"
        if 300 <= status < 400:
            error += "; redirects are not followed"
        return cls(
            status,
            f"{error}.",
            retry_after=answer.retry_after if status in THROTTLED else None,
            gone=status == HTTPStatus.GONE,
        )

    def delay(self, attempt: int) -> float | None:
        """Seconds until the next attempt after the nth, counted from 1; None: there is none."""
        if self.gone or attempt >= len(SCHEDULE):
            return None
        scheduled = SCHEDULE[attempt] * random.uniform(1 - JITTER, 1 + JITTER)
        return max(scheduled, min(self.retry_after or 0.0, RETRY_AFTER_LONGEST))


class Deliverer:
    """Delivers the webhooks of one worker.

    Args:
        now: the time that signatures carry, in UTC.
    """

    def __init__(
        self,
        database: Database,
        outbound: Outbound,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._outbound = outbound
        self._now = now
        self._wanted = asyncio.Event()
        self._statements = asyncio.Semaphore(CONNECTIONS)
        self._sending: dict[asyncio.Task[None], Delivery] = {}
        self._failing: set[str] = set()  # hosts whose latest attempt failed

    def wake(self) -> None:
        """Look for what is due now; returns at once."""
        self._wanted.set()

    async def run(self) -> None:
        """Deliver for ever; an outage of the database, or of its schema, is waited out. When it is
        cancelled, requests on their way get `DRAIN` seconds, and the rest is given back."""
        try:
            while True:
                self._wanted.clear()
                started = time.monotonic()
                try:
                    await self.start_due()
                except DatabaseError as error:
                    log.warning("webhooks not claimed", extra={"cause": type(error).__name__})
                quiet = max(QUIET, time.monotonic() - started)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_EVERY):
                        await self._wanted.wait()
                await asyncio.sleep(min(quiet, POLL_EVERY))
        finally:
            await self._stop()

    async def start_due(self) -> int:
        """Claim what is due and start sending it; answers how many."""
        free = CONCURRENCY - len(self._sending)
        if free <= 0:
            return 0
        busy = Counter(delivery.host for delivery in self._sending.values())
        rooms = {
            host: (1 if host in self._failing else PER_HOST) for host in self._failing | set(busy)
        }
        async with self._statements:
            rows = await self._database.rows(
                "claim_webhooks",
                free,
                PER_HOST,
                list(rooms),
                [max(0, room - busy[host]) for host, room in rooms.items()],
                LEASE,
            )
        for row in rows:
            delivery = Delivery(**row)
            task = asyncio.create_task(self._deliver(delivery))
            self._sending[task] = delivery
            task.add_done_callback(self._sent)
        return len(rows)

    async def drain(self) -> None:
        """Until nothing is due and nothing on its way."""
        while await self.start_due() or self._sending:
            await asyncio.wait(list(self._sending))

    def _sent(self, task: "asyncio.Task[None]") -> None:
        del self._sending[task]
        self._wanted.set()  # its place is free
        if not task.cancelled() and (error := task.exception()):
            log.error("webhook failed", extra={"trace": trace(error)})

    async def _deliver(self, delivery: Delivery) -> None:
        at, started = self._now(), time.monotonic()
        try:
            outcome = Outcome.of(
                await self._outbound.post(
                    delivery.url, delivery.headers(at), delivery.payload.encode()
                )
            )
        except Undelivered as error:
            outcome = Outcome(None, str(error))
        except Exception as error:  # else it would be due again and again, for ever
            log.error("webhook broken", extra={"delivery_id": delivery.id, "trace": trace(error)})
            outcome = Outcome(None, "The message could not be sent.")
        ms = round((time.monotonic() - started) * 1000)
        if outcome.error is None:
            self._failing.discard(delivery.host)
        elif len(self._failing) < REMEMBERED:
            self._failing.add(delivery.host)
        await self._note(delivery, at, ms, outcome)

    async def _note(self, delivery: Delivery, at: datetime, ms: int, outcome: Outcome) -> None:
        """Write the outcome; while the database is away again and again, as long as the lease
        counts. After that somebody sends it again anyway."""
        retry = None if outcome.error is None else outcome.delay(delivery.attempt)
        args = (at, outcome.status, ms, outcome.error, retry, outcome.gone)
        started, delay = time.monotonic(), KEEP_DELAY[0]
        while True:
            try:
                async with self._statements:
                    state = await self._database.value(
                        "webhook_attempted", delivery.id, delivery.leased_until, *args
                    )
                break
            except Unavailable as error:
                if time.monotonic() - started > LEASE:
                    log.error("webhook not noted", extra={"delivery_id": delivery.id})
                    return
                log.warning("webhook kept", extra={"cause": str(error)})
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
            delay = min(delay * 2, KEEP_DELAY[1])
        answer = f"{outcome.status // 100}xx" if outcome.status else "none"
        metrics.webhook_attempts.labels(state or "fenced", answer).inc()
        metrics.webhook_seconds.observe(ms / 1000)
        log.log(
            logging.INFO if outcome.error is None else logging.WARNING,
            "webhook",
            extra={
                "delivery_id": delivery.id,
                "job_id": delivery.job_id,
                "type": delivery.type,
                "host": delivery.host[:HOST_LOGGED],  # the rest of a URL may hold a token
                "attempt": delivery.attempt,
                "status": outcome.status,
                "ms": ms,
                "state": state,
            },
        )

    async def _stop(self) -> None:
        if self._sending:
            await asyncio.wait(list(self._sending), timeout=DRAIN)
        left = dict(self._sending)
        for task in left:
            task.cancel()
        for delivery in left.values():
            with suppress(DatabaseError):
                await self._database.value("release_webhook", delivery.id, delivery.leased_until)
        self._outbound.close()
