"""What incident.io sends, as events: incidents and their states, follow-ups and actions, alerts.

Pure. The one rule: the ticket that something was exported to is named in it, and so ties it to that
ticket's work.

Not told: what is private, of which incident.io sends an id and nothing else, and which no one but
its members may hear of.
"""

import re
from typing import Any

from tasks.sources.body import facts, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text
from tasks.sources.generic import told

VERSION = re.compile(r"_v\d+$")
# Categories of states, as event types say them.
ENDED = {"learning": "resolved", "closed": "closed", "declined": "closed", "canceled": "closed",
         "cancelled": "closed", "merged": "closed"}  # fmt: skip
DONE = {
    "complete": "completed",
    "completed": "completed",
    "deleted": "cancelled",
    "not_doing": "cancelled",
}


def events(delivery: Delivery) -> list[SourceEvent]:
    """The event of one delivery, whose object has the name of the event."""
    body = delivery.body
    kind = words(body, "event_type")
    if kind.startswith("private_"):
        return []
    data = part(body, kind)
    name = VERSION.sub("", kind.partition(".")[2])
    if name.startswith("incident_"):
        return [_incident(data, name)]
    if name.startswith(("follow_up_", "action_")):
        return [_task(data, name)]
    if name.startswith("alert_"):
        return [_alert(data)]
    if name.startswith("postmortem_"):
        return [_postmortem(data)]
    return [told(data if data is not None else body, name.replace("_", ".") or "event")]


def _incident(data: Any, name: str) -> SourceEvent:
    """An incident that was made or changed; a change of state wraps it."""
    incident = part(data, "incident") or data
    status = part(data, "new_status") or part(incident, "incident_status")
    verb = name.removeprefix("incident_")
    if verb == "status_updated":
        verb = ENDED.get(words(status, "category"), verb)
    when = () if verb == "created" else (words(incident, "updated_at"),)
    before, now = words(data, "previous_status", "name"), words(status, "name")
    changed = f"{before} → {now}" if before and now else ""
    return SourceEvent(
        event_type=f"incident.{verb}",
        title=_titled(words(incident, "reference"), words(incident, "name")),
        content=_lines(
            changed, text(part(data, "message")), text(part(incident, "summary")),
            _exported(incident), words(incident, "postmortem_document_url"),
        ),
        external_id=identity(words(incident, "id"), f"incident.{verb}", *when),
        resource=_type(incident),
        priority=words(incident, "severity", "name"),
        author=_actor(data, incident) if verb == "created" else _actor(data),
        url=part(incident, "permalink"),
        occurred_at=part(incident, "created_at" if verb == "created" else "updated_at"),
        metadata=facts(
            identifier=words(incident, "reference"), status=now,
            channel=words(incident, "slack_channel_id"), mode=words(incident, "mode"),
        ),
    )  # fmt: skip


def _task(task: Any, name: str) -> SourceEvent:
    """Work that an incident leaves behind."""
    status = words(task, "status")
    verb = "created" if name.endswith("_created") else DONE.get(status, "updated")
    said = text(part(task, "description"))
    title = words(task, "title") or (said or "").partition("\n")[0]
    when = () if verb == "created" else (words(task, "updated_at"),)
    ticket = words(task, "external_issue_reference", "issue_name")
    return SourceEvent(
        event_type=f"task.{verb}",
        title=title,
        content=_lines(said if said != title else "", _exported(task)),
        external_id=identity(words(task, "id"), f"task.{verb}", *when),
        priority=words(task, "priority", "name"),
        author=words(task, "creator", "user", "name"),
        url=part(task, "permalink") or part(task, "external_issue_reference", "issue_permalink"),
        occurred_at=part(task, "created_at" if verb == "created" else "updated_at"),
        metadata=facts(
            ticket=ticket, status=status, incident=words(task, "incident_id"),
            assignee=words(task, "assignee", "name"),
            labels=[label for each in parts(task, "labels")[:20] if (label := words(each))],
        ),
    )  # fmt: skip


def _alert(alert: Any) -> SourceEvent:
    resolved = words(alert, "status") == "resolved"
    status = "resolved" if resolved else "firing"
    shown = (
        (words(each, "attribute", "name"), words(each, "value", "label"))
        for each in parts(alert, "attributes")[:20]
    )
    named = {key.casefold(): value for key, value in shown if key and value}
    service = named.get("service", "")
    return SourceEvent(
        event_type=f"alert.{status}",
        title=words(alert, "title"),
        content=part(alert, "description"),
        external_id=identity("alert", words(alert, "id"), status),
        resource=Resource(service, service, "service") if service else None,
        priority=named.get("priority") or named.get("severity"),
        url=part(alert, "source_url"),
        occurred_at=part(alert, "resolved_at" if resolved else "created_at"),
        metadata=facts(
            status=status, alert_labels=[f"{key}={value}" for key, value in named.items()]
        ),
    )


def _postmortem(data: Any) -> SourceEvent:
    document = part(data, "postmortem_document") or data
    status = words(data, "new_status") or words(document, "status")
    links = [words(each) for each in parts(document, "exported_urls")[:5]]
    return SourceEvent(
        event_type="postmortem.updated",
        title=f"Post-mortem of {words(document, 'title')}: {status.replace('_', ' ')}",
        content=_lines(*links),
        external_id=identity(words(document, "id"), "postmortem", status),
        url=part(document, "document_url"),
        occurred_at=part(document, "updated_at"),
        metadata=facts(status=DONE.get(status, status), incident=words(document, "incident_id")),
    )


def _titled(reference: str, name: str) -> str:
    return f"{reference}: {name}" if reference and name else reference or name


def _exported(item: Any) -> str:
    """The ticket that it has elsewhere, by its key and its address."""
    issue = part(item, "external_issue_reference")
    found = (words(issue, "issue_name"), words(issue, "issue_permalink"))
    return " ".join(each for each in found if each)


def _lines(*pieces: str | None) -> str:
    return "\n\n".join(piece for piece in pieces if piece)


def _type(incident: Any) -> Resource | None:
    """The type of the incident, by which organizations tell their kinds of incidents apart."""
    key, name = words(incident, "incident_type", "id"), words(incident, "incident_type", "name")
    return Resource(key, name or key, "incident_type") if key else None


def _actor(*places: Any) -> str:
    found = (words(place, key, "user", "name") for place in places for key in ("actor", "creator"))
    return next((each for each in found if each), "")
