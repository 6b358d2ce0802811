"""How an attempt can end, other than well, and how long to wait before the next one.

    Outcome
    ├── Retry              may pass: the job is parked and tried again, five tries in all
    └── Failed             the job fails for good; nothing is charged
        ├── NoResult            no_result: nothing in scope, or nothing usable came back
        ├── GenerationFailed    generation_failed: the provider or the processing failed
        └── PlanViolation       plan_violation: the plan does not include what the job needs

Being fenced (`db.LeaseLost`) and being cancelled (`asyncio.CancelledError`) are no outcomes of the
job: somebody else decides about it.
"""

import random
from typing import Any, Literal

RetryCode = Literal["generation_failed", "timeout"]
FailedCode = Literal["generation_failed", "no_result", "plan_violation"]

# Seconds after the nth error: 2, 4, 8, 16, each between half and one and a half of it, so that
# jobs that failed together do not come back together; the sum stays inside a client's patience.
BACKOFF_BASE = 2.0
BACKOFF_LONGEST = 60.0
RETRY_AFTER_LONGEST = 3600.0  # seconds; what a provider may ask for at most


class Outcome(Exception):
    """Raised inside an attempt, turned into the job's status by the executor only."""


class Retry(Outcome):
    """The provider failed in a way that may pass.

    Args:
        sentence: for a person; it becomes the job's `error` if this was the last try.
        code: the job's `error_code` in that case.
        after: seconds that the provider asked to wait, if it did.
        meta: for a program; it becomes the job's `error_meta`.
    """

    def __init__(
        self,
        sentence: str,
        *,
        code: RetryCode = "generation_failed",
        after: float | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code
        self.after = after
        self.meta = meta or {}

    def delay(self, failures: int) -> float:
        """Seconds to wait after that many provider errors, counted from 1: jittered back-off, and
        never less than the provider asked for."""
        backoff = min(BACKOFF_BASE * 2.0 ** (failures - 1), BACKOFF_LONGEST)
        jittered = backoff * random.uniform(0.5, 1.5)
        return max(jittered, self.asked())

    def asked(self) -> float:
        """Seconds that the provider asked to wait, within reason."""
        return min(self.after or 0.0, RETRY_AFTER_LONGEST)


class Failed(Outcome):
    """The job fails for good.

    Args:
        sentence: for a person; it becomes the job's `error`.
        meta: for a program; it becomes the job's `error_meta`.
    """

    code: FailedCode = "generation_failed"

    def __init__(self, sentence: str, **meta: Any) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.meta = meta


class NoResult(Failed):
    """Nothing was in scope, or nothing usable came back."""

    code = "no_result"


class GenerationFailed(Failed):
    """The provider or the processing failed."""


class PlanViolation(Failed):
    """The plan does not include what the job needs."""

    code = "plan_violation"


def unforeseen(error: Exception) -> GenerationFailed:
    """What becomes of an error that nobody foresaw; its message stays out, it may quote events."""
    return GenerationFailed(
        f"The processing failed unexpectedly ({type(error).__name__}); "
        "the worker's log has it by the job's id."
    )


def to_json(outcome: "Retry | Failed") -> dict[str, Any]:
    """An outcome for the way between two processes; see `from_json`."""
    fields = {"sentence": outcome.sentence, "code": outcome.code, "meta": outcome.meta}
    if isinstance(outcome, Retry):
        return {**fields, "retry": True, "after": outcome.after}
    return {**fields, "retry": False}


def from_json(fields: dict[str, Any]) -> "Retry | Failed":
    """The outcome that `to_json` wrote."""
    if fields["retry"]:
        return Retry(
            fields["sentence"], code=fields["code"], after=fields["after"], meta=fields["meta"]
        )
    by_code = {kind.code: kind for kind in (NoResult, GenerationFailed, PlanViolation)}
    return by_code[fields["code"]](fields["sentence"], **fields["meta"])
