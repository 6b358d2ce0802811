"""CloudEvents 1.0 of any source, as events: binary, structured, and many in one delivery.

Pure. The one rule: an event is told by its source and id together, as the specification has it, and
its source is the resource it is of, whatever its data hold.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from tasks.sources import generic
from tasks.sources.body import facts, fingerprint, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent, url

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent

ONE, MANY = "application/cloudevents+json", "application/cloudevents-batch+json"
EVENTS = 1_000  # in one delivery
ATTRIBUTES_MAX = 20  # extensions told of one event
STANDARD = frozenset(
    ("specversion", "id", "source", "type", "time", "subject", "datacontenttype", "dataschema")
)


def are_in(delivery: Delivery) -> bool:
    """Is this how CloudEvents are sent?"""
    return "ce-specversion" in delivery.headers or _kind(delivery) in (ONE, MANY)


def events(delivery: Delivery) -> list[SourceEvent]:
    """An event for each; what the specification does not allow is told as any JSON is."""
    body = delivery.body
    kind = _kind(delivery)
    if kind == MANY:
        return [_structured(each) for each in body[:EVENTS]] if isinstance(body, list) else []
    if kind == ONE:
        return [_structured(body)]
    return [_binary(delivery)]


def _kind(delivery: Delivery) -> str:
    return delivery.headers.get("content-type", "").partition(";")[0].strip().lower()


def _structured(body: Any) -> SourceEvent:
    # 0.1 s to load, for a worker to whom nobody may send any
    from cloudevents.core.formats.json import JSONFormat
    from cloudevents.core.v1.event import CloudEvent

    try:
        event = JSONFormat().read(CloudEvent, orjson.dumps(body))
        return _told(event, event.get_data(), timed="time" in body)
    except Exception:  # the library raises what the standard library does on odd shapes
        return _loosely(body if isinstance(body, Mapping) else {}, part(body, "data"))


def _binary(delivery: Delivery) -> SourceEvent:
    """The attributes are in the headers; the body is the data, which were read already."""
    from cloudevents.core.bindings.http import HTTPMessage, from_binary
    from cloudevents.core.formats.json import JSONFormat
    from cloudevents.core.v1.event import CloudEvent

    headers = dict(delivery.headers)
    told = {key: value for key, value in headers.items() if key.startswith("ce-")}
    try:
        event = from_binary(HTTPMessage(told, b""), JSONFormat(), CloudEvent)
        return _told(event, delivery.body, timed="ce-time" in told)
    except Exception:  # as above
        named = {key.removeprefix("ce-"): value for key, value in told.items()}
        return _loosely(named, delivery.body)


def _told(event: "BaseCloudEvent", data: Any, *, timed: bool) -> SourceEvent:
    attributes = event.get_attributes()
    if isinstance(data, bytes):
        data = data.decode(errors="replace") if b"\0" not in data else None
    source, subject = event.get_source(), event.get_subject() or ""
    title = generic.title_of(data)
    more = {
        key: value
        for key, value in list(attributes.items())[: len(STANDARD) + ATTRIBUTES_MAX]
        if key not in STANDARD and isinstance(value, str | int | float)
    }
    return SourceEvent(
        event_type=event.get_type(),
        title=title or f"{event.get_type()} {subject}".strip(),
        content=generic.content_of(data, title),
        external_id=f"{source} {event.get_id()}",
        resource=Resource(source, source, "source"),
        priority=generic.priority_of(data),
        author=generic.author_of(data),
        url=generic.url_of(data) or url(subject),
        # The library gives one without a time that of now.
        occurred_at=event.get_time() if timed else generic.time_of(data),
        metadata=facts(
            subject=subject, status=words(data, "status") or words(data, "state"), **more
        ),
    )


def _loosely(attributes: Mapping[str, Any], data: Any) -> SourceEvent:
    """What is meant as a CloudEvent and is none."""
    source, kind = words(attributes, "source"), words(attributes, "type") or "event"
    resource = Resource(source, source, "source") if source else None
    made = generic.told(data, kind, resource)
    key = words(attributes, "id")
    return SourceEvent(
        event_type=kind,
        title=made.title,
        content=made.content,
        external_id=f"{source} {key}" if source and key else fingerprint([dict(attributes), data]),
        resource=resource,
        author=made.author,
        url=made.url,
        occurred_at=words(attributes, "time") or made.occurred_at,
        metadata=made.metadata,
    )
