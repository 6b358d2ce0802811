"""The built-in provider: six artifacts pulled out of events without a model or a network.

Pure and deterministic: the same context gives the same draft. The one rule: everything said is
a sentence of an event or a count over events, and carries the ids of those events.
"""

from collections.abc import Callable

from app.schemas import AnyDraft
from tasks.architecture import architecture_insight
from tasks.context import Context
from tasks.correlation import correlation
from tasks.handoff import handoff
from tasks.notes import release_notes
from tasks.onboarding import onboarding_brief
from tasks.question import answer
from tasks.reading import Reading, read_together

MODEL = "extractive-1"

COMPOSERS: dict[str, Callable[[Reading], AnyDraft]] = {
    "handoff": handoff,
    "cross_source_correlation": correlation,
    "onboarding_brief": onboarding_brief,
    "architecture_insight": architecture_insight,
    "release_notes": release_notes,
    "question": answer,
    "digest": handoff,
}
WHO = frozenset(("key_people", "contributors"))  # names alone are no artifact


class NothingToSay(Exception):
    """Raised when no event of the context holds anything worth repeating."""


def extract(context: Context) -> AnyDraft:
    """Compose the artifact that the context asks for; raise NothingToSay when it is empty."""
    if not context.events:
        raise NothingToSay("no events in scope")
    compose = COMPOSERS.get(context.kind)
    if compose is None:
        raise ValueError(f"unknown kind: {context.kind}")
    draft = compose(read_together(context))
    if not any(isinstance(part, list) and part for name, part in draft if name not in WHO):
        tied = context.kind == "cross_source_correlation"
        raise NothingToSay(
            "no events share a reference" if tied else "the events hold nothing worth repeating"
        )
    return draft
