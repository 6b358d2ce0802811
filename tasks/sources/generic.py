"""What a body says in words that most sources use: of sources that have no mapping of their own,
and of events that a mapping does not know.

Pure. The one rule: it looks at a bounded part of a body and repeats what is there under a usual
name; what it cannot tell it leaves out.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tasks.sources.body import facts, fingerprint, identity, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent, line, text, url

MEMBERS = 40  # of one object, that are looked at
PLACES = 60  # objects in a body, that are looked at
EVENTS = 100  # in a list
EXCERPT_MAX = 2_000  # characters of the content
# Headers by which the sources that keep one say what the event is (app/sources.py).
NAMED_IN = (
    "x-github-event", "x-gitlab-event", "x-event-key", "x-buildkite-event", "linear-event",
    "circleci-event-type", "sentry-hook-resource",
)  # fmt: skip
KINDS = ("event_type", "eventType", "event", "webhookEvent", "event_name", "type", "kind", "topic")
TITLES = ("title", "subject", "summary", "headline", "name", "message", "text", "description")
CONTENTS = ("description", "body", "content", "text", "message", "details", "summary")
LINKS = ("html_url", "web_url", "htmlUrl", "webUrl", "permalink", "url", "link", "href")
PEOPLE = ("author", "user", "sender", "actor", "creator", "created_by", "createdBy", "username")
NAMES = ("name", "display_name", "displayName", "login", "username", "full_name", "email")
TIMES = (
    "occurred_at", "timestamp", "time", "updated_at", "updatedAt", "created_at", "createdAt", "date"
)  # fmt: skip
IDS = ("event_id", "eventId", "delivery_id", "deliveryId", "message_id", "uuid")
WHERE = (
    "repository", "project", "channel", "board", "team", "service", "space", "workspace", "site",
    "app", "environment", "organization",
)  # fmt: skip
KEYS = ("full_name", "key", "slug", "id", "uuid", "name")
URGENT = ("priority", "severity", "urgency", "level")
PRIVATE = re.compile(r"secret|token|passw|credential|signature|authori|cookie|api_?key|email", re.I)


def events(delivery: Delivery) -> list[SourceEvent]:
    """One event, or one of each object of a list."""
    body = delivery.body
    named = next((found for key in NAMED_IN if (found := line(delivery.headers.get(key)))), "")
    if isinstance(body, list):
        return [_event(item, named) for item in body[:EVENTS] if isinstance(item, dict)]
    return [_event(body, named)]


def title_of(body: Any) -> str:
    """What it is called; "" when nothing in it says so."""
    return _first(_places(body), TITLES)


def content_of(body: Any, title: str = "") -> str | None:
    """Its longest story that is not the title, or an excerpt of what it holds."""
    if isinstance(body, str):
        return text(body, EXCERPT_MAX)
    for place in _places(body):
        told = (text(place.get(key), EXCERPT_MAX) for key in CONTENTS)
        found = next((each for each in told if each and line(each) != title), None)
        if found:
            return found
    return text("\n".join(_scalars(body)), EXCERPT_MAX)


def url_of(body: Any) -> str | None:
    """Where a person can open it."""
    found = (url(place.get(key)) for place in _places(body) for key in LINKS)
    return next((each for each in found if each), None)


def author_of(body: Any) -> str:
    """Who did it."""
    for place in _places(body):
        for key in PEOPLE:
            who = place.get(key)
            if found := _text(who) or _first([who] if isinstance(who, dict) else [], NAMES):
                return found
    return ""


def resource_of(body: Any) -> Resource | None:
    """The project, repository, channel or the like that it happened in."""
    for place in _places(body):
        for kind in WHERE:
            where = place.get(kind)
            found = [where] if isinstance(where, dict) else []
            if key := _text(where) or _first(found, KEYS):
                return Resource(key, _first(found, ("full_name", *NAMES)) or key, kind)
    return None


def time_of(body: Any) -> Any:
    """When it happened, as it is written."""
    found = (place.get(key) for place in _places(body) for key in TIMES)
    return next((each for each in found if _text(each)), None)


def priority_of(body: Any) -> str | None:
    """How urgent it is said to be."""
    for place in _places(body):
        for key in URGENT:
            if found := _text(place.get(key)) or words(place.get(key), "name"):
                return found
    return None


def told(body: Any, event_type: str, resource: Resource | None = None) -> SourceEvent:
    """A body as an event of a type that the caller knows."""
    title = title_of(body)
    return SourceEvent(
        event_type=event_type,
        title=title or re.sub(r"[._:-]+", " ", event_type).capitalize(),
        content=content_of(body, title),
        external_id=identity(event_type, _first(_places(body), IDS)) or fingerprint(body),
        resource=resource or resource_of(body),
        priority=priority_of(body),
        author=author_of(body),
        url=url_of(body),
        occurred_at=time_of(body),
        metadata=facts(status=_status(body)),
    )


def _event(body: Any, named: str) -> SourceEvent:
    kind = named or next((found for key in KINDS if (found := _text(part(body, key)))), "")
    action = _text(part(body, "action"))
    return told(body, ".".join(piece for piece in (kind, action) if piece) or "event")


def _status(body: Any) -> str:
    """Its state, which readers take for what is left open."""
    return next((found for key in ("status", "state") if (found := words(body, key))), "")[:100]


def _places(body: Any) -> list[dict[str, Any]]:
    """The objects of a body, outer ones first, as far as anybody should look."""
    found = [body] if isinstance(body, dict) else []
    for place in found:  # grows while it is read
        if len(found) >= PLACES:
            break
        # Two levels hold what a delivery is about; deeper ones are about something else.
        inner = list(place.values())[:MEMBERS] if place is body or _under(body, place) else []
        found.extend(value for value in inner if isinstance(value, dict))
    return found[:PLACES]


def _under(body: dict[str, Any], place: dict[str, Any]) -> bool:
    return any(place is value for value in list(body.values())[:MEMBERS])


def _first(places: Iterable[dict[str, Any]], keys: Iterable[str]) -> str:
    names = tuple(keys)
    found = (_text(place.get(key)) for place in places for key in names)
    return next((each for each in found if each), "")


def _text(value: Any) -> str:
    return "" if isinstance(value, bool) else line(value) or ""


def _scalars(body: Any) -> Iterator[str]:
    """The plain members of an object, without those that may be secret."""
    if isinstance(body, dict):
        for key, value in list(body.items())[:MEMBERS]:
            found = _text(value)
            if found and isinstance(key, str) and not PRIVATE.search(key):
                yield f"{key}: {found}"
