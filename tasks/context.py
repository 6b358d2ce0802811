"""From a project's events to what a provider reads: bounded, newest first, duplicates folded.

Pure: it sees events, never a database. The one rule: everything in a context can be traced, so
an event that was folded into another leaves its id there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One tracked event as the worker loads it; the field names are the columns of `events`."""

    id: str
    source: str
    event_type: str
    title: str
    occurred_at: datetime
    content: str | None = None
    external_id: str | None = None
    resource: str | None = None
    branch: str | None = None
    priority: str | None = None
    author: str | None = None
    url: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    folded: tuple[str, ...] = ()  # ids of older duplicates that this event stands for

    @property
    def ids(self) -> tuple[str, ...]:
        """This event's id and those of the duplicates folded into it."""
        return (self.id, *self.folded)


@dataclass(frozen=True, slots=True)
class Weighed:
    """An event and what it is worth to the artifact."""

    event: Event
    weight: float
    place: tuple[str, str]  # its source, and the area or resource in it
    keys: tuple[str, ...]  # references that it shares with events of its thread


@dataclass(frozen=True, slots=True)
class Thread:
    """Events that belong together, newest first; most events are one of their own."""

    members: tuple[Weighed, ...]
    keys: tuple[str, ...]  # what ties them, best known first


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """All that a provider may know about a job."""

    kind: str  # a job kind of the contract
    project_name: str
    since: datetime
    until: datetime
    events: tuple[Event, ...]  # newest first
    omitted: int = 0  # events in scope that did not fit under the limit
    options: Mapping[str, Any] = field(default_factory=dict)  # focusArea, style, … as asked
    threads: tuple[Thread, ...] = ()  # the events again, what matters most first; () if not known


def fold(events: Iterable[Event]) -> tuple[Event, ...]:
    """Fold events that say the same into the newest of them; the order is kept.

    The same means: same source, resource, event type, author, title and content. A deploy that
    reports itself ten times is one fact, but the same subject by two people is two.
    """
    kept: dict[tuple[str | None, ...], Event] = {}
    for event in events:
        said = (
            event.source,
            event.resource,
            event.event_type,
            event.author,
            " ".join(event.title.split()).casefold(),
            " ".join((event.content or "").split()).casefold(),
        )
        newer = kept.get(said)
        kept[said] = replace(newer, folded=(*newer.folded, *event.ids)) if newer else event
    return tuple(kept.values())
