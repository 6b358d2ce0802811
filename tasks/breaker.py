"""Is the provider there? While it is not, jobs wait instead of using up their tries.

Each worker learns it for itself, from its own attempts: one that cannot reach the provider leaves
the tickets to those that can. The one rule: it takes two jobs to say that it is the provider. What
fails again and again for one job alone may be that job's doing, and ends it after five tries.
"""

import logging
import random
import time
from collections.abc import Callable, Collection

from app import metrics

log = logging.getLogger("baton.worker")

FAILURES = 5  # in a row, of two jobs or more, with no success between them
REST = (5.0, 60.0)  # seconds until the next try, first and longest; each is twice the one before


class Breaker:
    """Closed: all is well. Open: nothing is asked. Half open, when it has rested: one job is tried;
    its success closes it, its failure opens it again for longer.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._jobs: set[str] = set()  # that failed, up to two
        self._until: float | None = None  # when it has rested; None: it is closed
        self._rest = REST[0]
        self._tried: int | None = None  # the ticket of the one job

    @property
    def rest(self) -> float | None:
        """Seconds until the provider is asked again; None: it answers, as far as is known."""
        return None if self._until is None else max(0.0, self._until - self._clock())

    def admits(self, held: Collection[int]) -> bool:
        """May another ticket be taken, beside those that the worker has in hand?"""
        if self._until is None:
            return True
        return self._clock() >= self._until and self._tried not in held

    def take(self, ticket_id: int) -> None:
        """A ticket was taken."""
        if self._until is not None:
            self._tried = ticket_id

    def succeed(self) -> None:
        """The provider has answered."""
        if self._until is not None:
            log.warning("provider back", extra={"failures": self._failures})
            metrics.breaker_open.set(0)
        self._failures, self._until, self._rest = 0, None, REST[0]
        self._jobs.clear()

    def fail(self, job_id: str) -> float | None:
        """The provider has failed a job in a way that may pass. Answers for how many seconds the
        job should wait without that counting against it; None: it counts."""
        self._failures += 1
        if len(self._jobs) < 2:
            self._jobs.add(job_id)
        if self._until is None and (self._failures < FAILURES or len(self._jobs) < 2):
            return None
        now = self._clock()
        if self._until is None or now >= self._until:
            rest = self._rest * random.uniform(0.8, 1.2)  # workers shall not come back together
            self._until, self._rest = now + rest, min(self._rest * 2, REST[1])
            log.error("provider down", extra={"failures": self._failures, "rest": round(rest, 1)})
            metrics.breaker_open.set(1)
            metrics.breaker_opened.inc()
        return self._until - now
