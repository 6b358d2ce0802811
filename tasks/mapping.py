"""What a delivery of a source comes to: events, whatever was sent and whatever goes wrong.

It hides which function maps which source. The one rule: no delivery is lost because somebody's
mapping is wrong about it; it becomes one event that says what came.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from app.logs import trace
from app.schemas import Metadata
from app.sources import Malformed, read_body
from tasks.sources import (
    alertmanager,
    asana,
    bitbucket,
    buildkite,
    circleci,
    cloudevents,
    discord,
    github,
    gitlab,
    grafana,
    incident_io,
    jira,
    linear,
    notion,
    pagerduty,
    sentry,
    slack,
    vercel,
)
from tasks.sources.event import Delivery, SourceEvent
from tasks.sources.generic import events as events_of_any

log = logging.getLogger("baton.worker")

Events = Callable[[Delivery], Sequence[SourceEvent]]
METADATA_BYTES = 16 * 1024  # of an event
MEMBERS = 200  # of metadata that is too much, which are looked at

MAPPINGS: Mapping[str, Events] = {
    "alertmanager": alertmanager.events,
    "asana": asana.events,
    "bitbucket": bitbucket.events,
    "buildkite": buildkite.events,
    "circleci": circleci.events,
    "discord": discord.events,
    "github": github.events,
    "gitlab": gitlab.events,
    "grafana": grafana.events,
    "incident_io": incident_io.events,
    "jira": jira.events,
    "linear": linear.events,
    "notion": notion.events,
    "pagerduty": pagerduty.events,
    "sentry": sentry.events,
    "slack": slack.events,
    "vercel": vercel.events,
}


def read(headers: Mapping[str, str], body: bytes, received_at: datetime) -> Delivery:
    """A stored delivery; a body that nobody can read is none."""
    try:
        value = read_body(headers, body)
    except Malformed:
        value = None
    return Delivery(headers, value, received_at)


def map_delivery(source: str, delivery: Delivery) -> list[dict[str, Any]]:
    """The events of a delivery as the database takes them, by the mapping of its source or as
    CloudEvents; if that fails, one.

    What has no mapping is read for what is usual in any JSON.
    """
    mapping = MAPPINGS.get(source, events_of_any)
    if cloudevents.are_in(delivery):
        mapping = cloudevents.events
    try:
        return rows(source, delivery, mapping(delivery))
    except Exception as error:  # a fault of ours, or a shape that nobody has seen yet
        log.error("mapping failed", extra={"source": source, "trace": trace(error)})
        return generic(source, delivery)


def generic(source: str, delivery: Delivery) -> list[dict[str, Any]]:
    """The one event of what no mapping knows."""
    kept = {"headers": sorted(delivery.headers.items()), "body": delivery.body}
    digest = hashlib.sha256(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)).hexdigest()
    event = SourceEvent(
        event_type=f"{source}.received",
        title=f"Something happened in {source}",
        external_id=f"delivery:{digest}",
    )
    return rows(source, delivery, [event])


def rows(source: str, delivery: Delivery, events: Sequence[SourceEvent]) -> list[dict[str, Any]]:
    """Events as the database takes them: in bounds whatever the mapping made."""
    return [
        {**event.row(source, delivery.received_at), "metadata": bounded(event.metadata)}
        for event in events
    ]


def bounded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as they may be at all; of what is too much as many members as there is room for."""
    kept = dict(metadata)
    if _sound(kept):
        return kept
    kept = {}
    for name, value in list(metadata.items())[:MEMBERS]:
        if _sound({**kept, name: value}):
            kept[name] = value
    return kept


def _sound(metadata: dict[str, Any]) -> bool:
    try:
        written = orjson.dumps(metadata)
    except TypeError:  # what JSON or 64 bits cannot hold
        return False
    if len(written) > METADATA_BYTES or b"\\u0000" in written:
        return False
    try:
        _metadata().validate_python(metadata)
    except ValidationError:
        return False
    return True


@cache
def _metadata() -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(Metadata)
