"""What PagerDuty's webhooks of version 3 send, as events: incidents, talk about them, services.

Pure. The one rule: the service is the resource, and the address of the incident is what ties a note
on it to it.
"""

from typing import Any

from tasks.sources.body import facts, identity, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent
from tasks.sources.generic import told

ONCE = frozenset(("incident.triggered",))  # everything else can happen again


def events(delivery: Delivery) -> list[SourceEvent]:
    """The event of one delivery; none for the ping of a test."""
    event = part(delivery.body, "event")
    name, data = words(event, "event_type"), part(event, "data")
    if name == "pagey.ping":
        return []
    kind = words(data, "type") or words(event, "resource_type")
    if kind == "incident":
        return [_incident(event, data, name)]
    if kind.startswith("incident_"):
        return [_said(event, data, name)]
    if kind == "service":
        return [_service(event, data, name)]
    return [told(data if isinstance(data, dict) else delivery.body, name or "event")]


def _incident(event: Any, incident: Any, name: str) -> SourceEvent:
    assignees = part(incident, "assignees")
    people = [words(each, "summary") for each in assignees] if isinstance(assignees, list) else []
    shown = ", ".join(person for person in people if person)
    reason = words(incident, "resolve_reason", "type")
    return SourceEvent(
        event_type=name or "incident.updated",
        title=words(incident, "title") or words(incident, "summary"),
        content=f"Assigned to {shown}" if shown else None,
        external_id=_identity(event, incident, name),
        resource=_reference(part(incident, "service")),
        priority=words(incident, "priority", "summary") or words(incident, "urgency"),
        author=_agent(event),
        url=part(incident, "html_url"),
        occurred_at=part(event, "occurred_at"),
        metadata=facts(
            number=part(incident, "number"), status=words(incident, "status"),
            urgency=words(incident, "urgency"), key=words(incident, "incident_key"), reason=reason,
        ),
    )  # fmt: skip


def _said(event: Any, data: Any, name: str) -> SourceEvent:
    """A note, an update for those who wait, or an answer of somebody who was asked for help."""
    incident = part(data, "incident")
    talk = name == "incident.annotated"
    message = part(data, "content") or part(data, "message")
    about = words(incident, "summary")
    who = words(data, "user", "summary")
    titles = {
        "incident.annotated": "Note on",
        "incident.status_update_published": "Update on",
        "incident.responder.added": f"{who} asked for help with" if who else "Help asked for with",
        "incident.responder.replied": f"{who} answered on" if who else "Answer on",
    }
    lead = titles.get(name, name.rpartition(".")[2].replace("_", " ").capitalize())
    return SourceEvent(
        event_type="incident.commented" if talk else name or "incident.updated",
        title=f"{lead} {about}".strip(),
        content=message if isinstance(message, str) else None,
        external_id=_identity(event, incident, name),
        resource=_reference(part(incident, "service")),
        author=_agent(event) or who,
        url=part(incident, "html_url"),
        occurred_at=part(event, "occurred_at"),
        metadata=facts(state=words(data, "state")),
    )


def _service(event: Any, service: Any, name: str) -> SourceEvent:
    about = words(service, "summary") or words(service, "name")
    verb = name.rpartition(".")[2]
    return SourceEvent(
        event_type=name or "service.updated",
        title=f"Service {about} {verb}",
        external_id=_identity(event, service, name),
        resource=_reference(service),
        author=_agent(event),
        url=part(service, "html_url"),
        occurred_at=part(event, "occurred_at"),
    )


def _identity(event: Any, about: Any, name: str) -> str:
    when = () if name in ONCE else (words(event, "occurred_at"),)
    return identity(words(about, "id"), name, *when) or identity(words(event, "id"))


def _reference(service: Any) -> Resource | None:
    key = words(service, "id")
    name = words(service, "summary") or words(service, "name")
    return Resource(key, name or key, "service") if key else None


def _agent(event: Any) -> str:
    """A person; an integration that opened an incident is none."""
    agent = part(event, "agent")
    return words(agent, "summary") if words(agent, "type").startswith("user") else ""
