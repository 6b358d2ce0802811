"""What a provider tells while it makes a draft: how far it is, and every call that it made.

A call of a model costs money whether or not anything comes of it, so each is a row of
`provider_calls`. The one rule: telling returns at once and never fails; the executor collects the
rows and writes them in batches, beside the attempts. A process that is killed takes the rows of its
last seconds along.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from tasks.outcomes import PlanViolation

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
LONGEST = 200  # characters of a text that a server chose

Progress = dict[str, Any]  # {"value": 0..1 or None, "step", "message"}


class Calls:
    """What one attempt's provider tells.

    Args:
        told: given each new state of the attempt; it returns at once.
        kind: of the job.
        plan: that the job runs under.
        models: that the plan includes; None for all.
    """

    def __init__(
        self,
        told: Callable[[Progress], None] = lambda _: None,
        *,
        kind: str = "",
        plan: str = "",
        models: Collection[str] | None = None,
    ) -> None:
        self._told = told
        self._kind = kind
        self._plan = plan
        self._models = models
        self._asked = ""
        self.made: list[dict[str, Any]] = []  # what `record_calls` wants to know of each

    def report(self, value: float | None, step: str, message: str | None = None) -> None:
        """Say what the attempt is at.

        Args:
            value: how much of it is done, from 0 to 1; None when nobody can say.
            step: a word for programs, such as `generating`.
            message: a few words for people.
        """
        self._told({"value": value, "step": step, "message": message})

    def use(self, model: str) -> None:
        """Say which model is about to be asked, before it costs anything.

        Raises:
            tasks.outcomes.PlanViolation: the plan does not include it.
        """
        if self._models is not None and model not in self._models:
            raise PlanViolation(
                f'The plan "{self._plan}" does not include the model {model}.',
                flow=self._kind,
                plan=self._plan,
                model=model,
            )
        self._asked = model

    def record(
        self,
        *,
        model: str,
        outcome: str,
        prompt_tokens: int,
        completion_tokens: int,
        seconds: float,
        request_id: str | None,
        status: int | None,
        purpose: str,
    ) -> None:
        """Note one request that was made, whatever came of it.

        Args:
            model: as the provider calls it, which may be more exact than what was asked for.
            outcome: `ok`, or a word for how it failed.
            seconds: from sending it to the last byte of the answer.
            request_id: the provider's own name for it.
            status: of the HTTP answer, if there was one.
            purpose: a word for what it was made for.
        """
        self.made.append(
            {
                "asked": _clean(self._asked),
                "model": _clean(model),
                "outcome": _clean(outcome),
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "seconds": seconds,
                "request_id": None if request_id is None else _clean(request_id),
                "status": status,
                "purpose": _clean(purpose),
            }
        )


def _clean(text: str) -> str:
    """What PostgreSQL can hold of it: one row that it refuses would take its batch along."""
    return _CONTROL.sub("", text)[:LONGEST]
