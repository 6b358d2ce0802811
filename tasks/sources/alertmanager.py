"""What Alertmanager sends, as events: alerts that fire and that are resolved.

Pure. The one rule: an alert is told by its labels' fingerprint and the time it began, so what
Alertmanager repeats while it fires, in whatever group, is one event.

The resource is the first of the labels `service`, `service_name`, `app`, `namespace`, `job` and
`grafana_folder`: what people call the thing comes before where it runs, and that before what
measured it.
"""

import hashlib
from typing import Any

from tasks.sources.body import facts, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, line, text

ALERTS = 1_000  # of one delivery
WHERE = ("service", "service_name", "app", "namespace", "job", "grafana_folder")
SEVERITY = ("severity", "priority", "level")
SUMMARIES = ("summary", "title", "message")
LABELS_MAX = 15  # told of one alert
VALUES_MAX = 10


def events(delivery: Delivery) -> list[SourceEvent]:
    """One event for each alert of the group that is told."""
    return alerts_of(delivery.body)


def alerts_of(body: Any) -> list[SourceEvent]:
    """The alerts of a body of the shape that Alertmanager has given to others."""
    return [_alert(alert, body) for alert in parts(body, "alerts")[:ALERTS]]


def _alert(alert: Any, body: Any) -> SourceEvent:
    labels = part(alert, "labels") or part(body, "commonLabels")
    resolved = (words(alert, "status") or words(body, "status")) == "resolved"
    began = words(alert, "startsAt")
    name = words(labels, "alertname") or "Alert"
    summary = _first(alert, body, SUMMARIES)
    title = summary if name.casefold() in summary.casefold() else f"{name}: {summary}"
    status = "resolved" if resolved else "firing"
    return SourceEvent(
        event_type=f"alert.{status}",
        title=title if summary else f"{name} {_where(labels)}".strip(),
        content=_content(alert, body),
        external_id=identity(fingerprint_of(alert, labels), began, status),
        resource=_resource(labels),
        priority=next((found for key in SEVERITY if (found := words(labels, key))), None),
        url=part(alert, "generatorURL"),
        occurred_at=part(alert, "endsAt") if resolved else began,
        metadata=facts(
            status=status,
            alertname=name,
            thread=fingerprint_of(alert, labels),
            alert_labels=_labels(labels),
        ),
    )


def fingerprint_of(alert: Any, labels: Any) -> str:
    """What tells an alert from others: its labels, as a number of its own or as one of ours."""
    given = words(alert, "fingerprint")
    if given or not isinstance(labels, dict) or not labels:
        return given
    pairs = "\n".join(sorted(f"{line(key)}={line(value)}" for key, value in labels.items()))
    return hashlib.blake2b(pairs.encode(errors="replace"), digest_size=8).hexdigest()


def _content(alert: Any, body: Any) -> str | None:
    """What it says, the measured values, and the runbook, which people link to as well."""
    values = part(alert, "values")
    shown = list(values.items())[:VALUES_MAX] if isinstance(values, dict) else []
    measured = [f"{line(key)} = {found}" for key, value in shown if (found := line(value))]
    runbook = _first(alert, body, ("runbook_url", "runbook"))
    pieces = (
        text(part(alert, "annotations", "description"))
        or text(part(body, "commonAnnotations", "description")),
        ", ".join(measured),
        f"Runbook: {runbook}" if runbook else "",
    )
    return "\n\n".join(piece for piece in pieces if piece)


def _first(alert: Any, body: Any, names: tuple[str, ...]) -> str:
    """The annotation of one of these names, of the alert or else of its group."""
    places = (part(alert, "annotations"), part(body, "commonAnnotations"))
    found = (words(place, name) for place in places for name in names)
    return next((each for each in found if each), "")


def _where(labels: Any) -> str:
    return next((found for key in WHERE if (found := words(labels, key))), "")


def _resource(labels: Any) -> Resource | None:
    found = _where(labels)
    kind = next((key for key in WHERE if words(labels, key)), "")
    kinds = {"namespace": "namespace", "job": "job", "grafana_folder": "folder"}
    return Resource(found, found, kinds.get(kind, "service")) if found else None


def _labels(labels: Any) -> list[str]:
    if not isinstance(labels, dict):
        return []
    shown = ((line(key, 30), line(value, 60)) for key, value in labels.items())
    return [f"{key}={value}" for key, value in shown if value and key != "alertname"][:LABELS_MAX]
