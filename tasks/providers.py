"""Who turns context into a draft.

The seam is one method. The built-in provider is the default and also the test double: it is
deterministic, offline and free.
"""

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from app.schemas import AnyDraft
from app.settings import ConfigurationError, Settings
from tasks.calls import Calls
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
    estimated: bool = False  # are the tokens, because the provider did not tell all of them
    prompt_version: str | None = None  # which wording asked for it; stored with the artifact


class Provider(Protocol):
    """Makes a draft from a context."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        """The draft for `context.kind`.

        Args:
            calls: told of the model before it is asked (`use`, so that a plan can refuse it), of
                each call that was made, and of how far the draft is.

        Raises:
            tasks.outcomes.Retry: a failure that may pass; with what the provider asked to wait.
            tasks.outcomes.Failed: it cannot be made.
        """
        ...


class Extractive:
    """The built-in provider: pulls out of the events what a careful colleague would."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        """Extract in a thread, so that leases are renewed meanwhile."""
        calls.use(MODEL)
        try:
            draft = await asyncio.to_thread(extract, context)
        except NothingToSay:
            raise NoResult(
                "What is in scope says nothing that could be reported "
                f"(events: {len(context.events)})."
            ) from None
        return Completion(draft=draft, model=MODEL)


@asynccontextmanager
async def open_provider(settings: Settings) -> AsyncIterator[Provider]:
    """The provider that the settings name; at the end it is closed, if it has anything to close.

    Raises:
        app.settings.ConfigurationError: it cannot be made.
    """
    provider = make_provider(settings)
    try:
        yield provider
    finally:
        close = getattr(provider, "aclose", None)
        if close is not None:
            await close()


def make_provider(settings: Settings) -> Provider:
    """The provider that the settings name.

    Raises:
        app.settings.ConfigurationError: a provider of the operator's own that cannot be made.
    """
    if settings.provider == "extractive":
        return Extractive()
    if settings.provider in ("openai", "anthropic"):
        return _make_drafter(settings)
    module, _, factory = settings.provider.partition(":")
    try:
        made: Provider = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # whatever it is, starting again would not mend it
        told = f"{type(error).__name__}: {error}"
        raise ConfigurationError(f"BATON_PROVIDER: {settings.provider}: {told}") from error
    return made


def _make_drafter(settings: Settings) -> Provider:
    """A provider over a vendor's SDK, which is heavy to import and an extra of its own."""
    name = settings.provider
    try:
        drafting = importlib.import_module("tasks.drafting")
        made: Provider = getattr(drafting, f"make_{name}")(settings)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("app", "tasks"):
            raise
        raise ConfigurationError(
            f"BATON_PROVIDER: {name} needs the extra `{name}`: pip install 'baton[{name}]'."
        ) from None
    return made
