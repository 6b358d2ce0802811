"""What a mapping of a source is given, and what it makes: a delivery, and events.

Pure. The one rule: whatever a source sends, an event fits into the table `events`; what is too long
is cut, and what cannot be read is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from app.schemas import CONTENT_MAX, NAME_MAX, TITLE_MAX, URL_MAX, rfc3339

TYPE_MAX = 64  # characters of the type of a resource
YEARS = (1970, 2200)  # the first and the last that an event may be of
CUT = "…"
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request of a source, verified."""

    headers: Mapping[str, str]  # those that app/sources.py keeps; lower-case names
    body: Any  # parsed JSON, or the fields of a form
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Resource:
    """What an event happened in, as a project is told to have it."""

    id: str  # stays, and is unique in its integration; what events.resource and filters hold
    name: str  # as people call it
    type: str  # repository, channel, board, team, project, service, pipeline, …
    default_branch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEvent:
    """One piece of activity, before it is known which project it is of.

    `external_id` is the same whenever and by whatever way the same fact arrives: as a delivery, a
    repeated one, or an import.
    """

    event_type: str  # noun.verb, such as pull_request.merged; tasks/signals.py reads its words
    title: str
    external_id: str
    resource: Resource | None = None
    content: str | None = None
    branch: str | None = None
    priority: str | None = None
    author: str | None = None
    url: str | None = None
    occurred_at: datetime | str | None = None  # text as a source writes it; None: when it arrived
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def row(self, source: str, received_at: datetime) -> dict[str, Any]:
        """As `store_source_events` takes it: bounded, without NUL, with its resource."""
        resource = self.resource and {
            "id": line(self.resource.id) or "-",
            "name": line(self.resource.name) or line(self.resource.id) or "-",
            "type": line(self.resource.type, TYPE_MAX) or "resource",
            "default_branch": line(self.resource.default_branch),
        }
        return {
            "source": source,
            "event_type": line(self.event_type) or "event",
            "title": line(self.title, TITLE_MAX) or line(self.event_type) or "event",
            "content": text(self.content),
            "external_id": line(self.external_id),
            "resource": resource and resource["id"],
            "branch": line(self.branch),
            "priority": line(self.priority),
            "author": line(self.author),
            "url": url(self.url),
            "metadata": self.metadata,
            "occurred_at": rfc3339(moment(self.occurred_at) or received_at),
            "in": resource,
        }


def line(value: object, limit: int = NAME_MAX) -> str | None:
    """A value as one line of text; None when it says nothing."""
    if not isinstance(value, str | int | float):
        return None
    found = _SPACES.sub(" ", str(value).replace("\0", "")).strip()
    if not found:
        return None
    return found if len(found) <= limit else found[: limit - 1] + CUT


def text(value: object, limit: int = CONTENT_MAX) -> str | None:
    """A value as text of several lines; None when it says nothing."""
    if not isinstance(value, str) or not value.strip():
        return None
    found = value.replace("\0", "").strip()
    return found if len(found) <= limit else found[: limit - 1] + CUT


def url(value: object) -> str | None:
    """An address that a person can open, or None."""
    if not isinstance(value, str) or len(value) > URL_MAX or "\0" in value:
        return None
    return value if value.lower().startswith(("http://", "https://")) else None


def moment(value: object) -> datetime | None:
    """A time as sources write it: RFC 3339, with a space before `UTC` or the offset, or seconds or
    milliseconds since 1970. None if it is none, or one that no event can have."""
    try:
        found = _moment(value)
        return found if YEARS[0] <= found.astimezone(UTC).year <= YEARS[1] else None
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _moment(value: object) -> datetime:
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?", value):
        spaced = value.strip().removesuffix("UTC").rstrip()
        value = datetime.fromisoformat(re.sub(r"\s(?=[+-]\d\d:?\d\d$)", "", spaced))
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    seconds = float(value)  # type: ignore[arg-type]  # what is no number raises
    return datetime.fromtimestamp(seconds / 1000 if seconds > 1e11 else seconds, UTC)
