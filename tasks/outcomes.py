"""How an attempt can end, other than well.

    Outcome
    └── Failed             the job fails for good; nothing is charged
        ├── NoResult            no_result: nothing in scope, or nothing usable came back
        ├── GenerationFailed    generation_failed: the provider or the processing failed
        └── TimedOut            timeout: the attempt took longer than it may

Being fenced (`db.LeaseLost`) and being cancelled (`asyncio.CancelledError`) are no outcomes of the
job: somebody else decides about it.
"""

from typing import Any


class Outcome(Exception):
    """Raised inside an attempt, turned into the job's status by the executor only."""


class Failed(Outcome):
    """The job fails for good.

    Args:
        sentence: for a person; it becomes the job's `error`.
        meta: for a program; it becomes the job's `error_meta`.
    """

    code = "generation_failed"

    def __init__(self, sentence: str, **meta: Any) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.meta = meta


class NoResult(Failed):
    """Nothing was in scope, or nothing usable came back."""

    code = "no_result"


class GenerationFailed(Failed):
    """The provider or the processing failed."""


class TimedOut(Failed):
    """The attempt took longer than `BATON_ATTEMPT_TIMEOUT`."""

    code = "timeout"
