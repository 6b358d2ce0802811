"""Who turns context into a draft.

The seam is one method. The built-in provider is the default and also the test double: it is
deterministic, offline and free.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from app.schemas import AnyDraft
from app.settings import Settings
from tasks.context import Context
from tasks.extractive import MODEL, NothingToSay, extract
from tasks.outcomes import NoResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A draft and what it took to make it; tokens as the provider counted them."""

    draft: AnyDraft
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Provider(Protocol):
    """Makes a draft from a context."""

    async def complete(self, context: Context) -> Completion:
        """The draft for `context.kind`.

        Raises:
            tasks.outcomes.Failed: it cannot be made.
        """
        ...


class Extractive:
    """The built-in provider: pulls out of the events what a careful colleague would."""

    async def complete(self, context: Context) -> Completion:
        """Extract in a thread, so that leases are renewed meanwhile."""
        try:
            draft = await asyncio.to_thread(extract, context)
        except NothingToSay:
            raise NoResult(
                f"The {len(context.events)} events in scope say nothing that could be reported."
            ) from None
        return Completion(draft=draft, model=MODEL)


def make_provider(settings: Settings) -> Provider:
    """The provider that the settings name."""
    assert settings.provider == "extractive", "settings allow no other"
    return Extractive()
