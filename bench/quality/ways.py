"""Who makes a list of items from a release: a provider of Baton's, and four plain baselines."""

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from app.schemas import AnyDraft, HandoffDraft, ReleaseNotesDraft
from bench.quality.releases import Release
from tasks.calls import Calls
from tasks.context import Context, Event
from tasks.outcomes import Outcome
from tasks.providers import Provider

AT_ONCE = 4  # drafts that a provider makes at the same time
# The groups of git-cliff's default configuration without what is of no interest to users.
GROUPS = ("feat", "fix", "doc", "perf", "refactor", "style", "revert")
SKIPPED = ("chore", "ci", "test", "build")
CONVENTIONAL = re.compile(r"^([a-z]+)(?:\(([^()]*)\))?!?: +(.+)$", re.I)


async def drafts(provider: Provider, contexts: Sequence[Context]) -> list[AnyDraft | None]:
    """A draft of each context; None where the provider had nothing to say, or failed."""
    free = asyncio.Semaphore(AT_ONCE)

    async def draft(context: Context) -> AnyDraft | None:
        async with free:
            try:
                return (await provider.complete(context, Calls(kind=context.kind))).draft
            except Outcome:
                return None

    return await asyncio.gather(*map(draft, contexts))


def items_of(draft: AnyDraft | None) -> list[str]:
    """The items of release notes, or the key changes of a handoff."""
    if isinstance(draft, ReleaseNotesDraft):
        return [item.text for section in draft.sections for item in section.items]
    return [item.text for item in draft.key_changes] if isinstance(draft, HandoffDraft) else []


def statements_of(value: Any) -> Iterator[tuple[str, list[str]]]:
    """Every statement of a draft as JSON, with its event ids; the summary counts, so not that."""
    if isinstance(value, list):
        for item in value:
            yield from statements_of(item)
    elif isinstance(value, dict):
        if "text" in value and "event_ids" in value:
            yield value["text"], value["event_ids"]
        for name, part in value.items():
            if name != "summary":
                yield from statements_of(part)


def first_lines(release: Release, length: int) -> list[str]:
    """The first line of every commit."""
    return [event.title for event in release.events]


def grouped(release: Release, length: int) -> list[str]:
    """Conventional commits by type and the others as one group, as git-cliff does it."""
    groups: dict[str, list[str]] = {name: [] for name in (*GROUPS, "other")}
    for event in _without_merges(release):
        found = CONVENTIONAL.match(event.title)
        kind = found[1].casefold() if found else ""
        if kind.startswith(SKIPPED):
            continue
        name = next((name for name in GROUPS if kind.startswith(name)), "other")
        scope = f"({found[2]}) " if found and found[2] else ""
        told = found and name != "other"
        groups[name].append(f"{scope}{found[3]}" if found and told else event.title)
    return [text for group in groups.values() for text in group]


def longest(release: Release, length: int) -> list[str]:
    """The first lines of the commits with the longest messages, as many as Baton has items."""
    plain = _without_merges(release)
    plain.sort(key=lambda event: -len(event.title + (event.content or "")))
    return [event.title for event in plain[:length]]


def newest(release: Release, length: int) -> list[str]:
    """The newest first lines, as many as the maintainers wrote items."""
    return [event.title for event in _without_merges(release)[: len(release.human)]]


def _without_merges(release: Release) -> list[Event]:
    return [event for event in release.events if event.event_type != "merge"]


# A baseline gets the release and the number of items that the built-in provider made of it.
BASELINES: dict[str, Callable[[Release, int], list[str]]] = {
    "first lines of all commits": first_lines,
    "conventional, as git-cliff": grouped,
    "longest commits": longest,
    "newest commits": newest,
}
