"""What Sentry's integration platform sends, as events: issues, alerts, errors, comments.

Pure. The one rule: everything about one issue has that issue's address, which is what people paste,
and not the address of the single event that set it off.

Not told: what happens to the installation itself. An error is told once for each issue, release and
day: Sentry sends every occurrence.
"""

from dataclasses import replace
from typing import Any

from tasks.sources.body import facts, identity, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent, moment
from tasks.sources.generic import told


def events(delivery: Delivery) -> list[SourceEvent]:
    """The event of one delivery; which one it is stands in a header."""
    body = delivery.body
    kind = words(delivery.headers.get("sentry-hook-resource")) or _kind(body)
    if kind == "installation":
        return []
    reader = {
        "issue": _issue, "event_alert": _alert, "error": _error, "metric_alert": _metric,
        "comment": _comment,
    }.get(kind)  # fmt: skip
    if reader is None:
        data = part(body, "data")
        named = ".".join(each for each in (kind or "event", words(body, "action")) if each)
        return [told(data, named, _project(part(data, "issue")))]
    made = reader(body, part(body, "data"), words(body, "action"))
    # Of what became of an issue the body says no time.
    sent = delivery.headers.get("sentry-hook-timestamp")
    return [made if moment(made.occurred_at) else replace(made, occurred_at=sent)]


def _kind(body: Any) -> str:
    data = part(body, "data")
    kinds = {"metric_alert": "metric_alert", "triggered_rule": "event_alert", "issue": "issue"}
    found = (kind for key, kind in kinds.items() if part(data, key) is not None)
    return next(found, "")


def _issue(body: Any, data: Any, action: str) -> SourceEvent:
    issue = part(data, "issue")
    seen = "firstSeen" if action == "created" else "lastSeen"
    assignee = words(issue, "assignedTo", "name") or words(issue, "assignedTo", "email")
    when = () if action == "created" else (words(issue, "lastSeen"),)
    to = (assignee,) if action == "assigned" and assignee else ()
    return SourceEvent(
        event_type=f"issue.{action or 'updated'}",
        title=words(issue, "title"),
        content=_lines(_said(issue), _resolved_in(issue), assignee and f"Assigned to {assignee}"),
        external_id=identity(words(issue, "id"), f"issue.{action}", *to, *when),
        resource=_project(issue),
        priority=words(issue, "level"),
        author=_actor(body),
        url=part(issue, "web_url") or part(issue, "permalink"),
        occurred_at=part(issue, seen) if action == "created" else None,
        metadata=facts(
            identifier=words(issue, "shortId"), status=words(issue, "status"),
            substatus=words(issue, "substatus"), culprit=words(issue, "culprit"),
            count=words(issue, "count"), users=part(issue, "userCount"),
        ),
    )  # fmt: skip


def _alert(body: Any, data: Any, action: str) -> SourceEvent:
    """A rule that an event of an issue has set off."""
    event = part(data, "event")
    rule = words(data, "triggered_rule")
    return _occurrence(
        body, event, f"alert.{action or 'triggered'}", f"Alert rule: {rule}" if rule else "",
        identity("alert", words(event, "event_id"), rule or "rule"),
    )  # fmt: skip


def _error(body: Any, data: Any, action: str) -> SourceEvent:
    error = part(data, "error")
    at = moment(part(error, "datetime")) or moment(part(error, "timestamp"))
    day = at.date().isoformat() if at else ""
    release = words(error, "release") or "-"
    key = identity("error", words(error, "issue_id"), release, day)
    return _occurrence(body, error, f"error.{action or 'created'}", "", key)


def _occurrence(body: Any, event: Any, event_type: str, why: str, key: str) -> SourceEvent:
    """One event of an issue."""
    release = words(event, "release")
    return SourceEvent(
        event_type=event_type,
        title=words(event, "title") or words(event, "message"),
        content=_lines(why, _said(event), f"Release {release}" if release else ""),
        external_id=key,
        resource=_of_url(words(event, "url")),
        priority=words(event, "level"),
        author=_actor(body),
        url=_issue_url(words(event, "web_url")),
        occurred_at=part(event, "datetime") or part(event, "timestamp"),
        metadata=facts(
            release=release, culprit=words(event, "culprit"), issue=words(event, "issue_id")
        ),
    )


def _metric(body: Any, data: Any, action: str) -> SourceEvent:
    """A metric that crossed a threshold, or is back."""
    alert = part(data, "metric_alert")
    resolved = action == "resolved"
    status = "resolved" if resolved else "firing"
    project = words(alert, "projects", 0)
    at = part(alert, "date_closed" if resolved else "date_started")
    return SourceEvent(
        event_type=f"alert.{status}",
        title=words(data, "description_title") or words(alert, "alert_rule", "name"),
        content=words(data, "description_text").replace("\\n", "\n"),
        external_id=identity("metric_alert", words(alert, "id"), action),
        resource=Resource(project, project, "project") if project else None,
        priority=None if resolved else action,
        author=_actor(body),
        url=part(data, "web_url"),
        occurred_at=at,
        metadata=facts(status=status, rule=words(alert, "alert_rule", "name")),
    )


def _comment(body: Any, data: Any, action: str) -> SourceEvent:
    slug, number = words(data, "project_slug"), words(data, "comment_id")
    when = () if action == "created" else (words(data, "timestamp"),)
    deleted = action == "deleted"
    issue = words(data, "issue_id")
    return SourceEvent(
        event_type="issue.commented" if action == "created" else f"comment.{action}",
        title="Comment deleted" if deleted else words(data, "comment"),
        content=None if deleted else part(data, "comment"),
        external_id=identity(issue, "comment", number, action, *when),
        resource=Resource(slug, slug, "project") if slug else None,
        author=_actor(body),
        occurred_at=part(data, "timestamp"),
        metadata=facts(issue=issue),
    )


def _said(event: Any) -> str:
    """What went wrong and where, beside the title."""
    value, culprit = words(event, "metadata", "value"), words(event, "culprit")
    title = words(event, "title")
    return ". ".join(
        piece
        for piece in (value if value not in title else "", f"In {culprit}" if culprit else "")
        if piece
    )


def _resolved_in(issue: Any) -> str:
    """The commit or release that is said to have mended it."""
    details = part(issue, "statusDetails")
    commit = words(details, "inCommit", "commit") or words(details, "inCommit", "commit", "id")
    release = words(details, "inRelease")
    if commit:
        return f"Resolved in commit {commit}"
    return f"Resolved in release {release}" if release else ""


def _lines(*pieces: str) -> str:
    return "\n".join(piece for piece in pieces if piece)


def _actor(body: Any) -> str:
    """Who did it; Sentry itself is nobody."""
    return words(body, "actor", "name") if words(body, "actor", "type") == "user" else ""


def _project(issue: Any) -> Resource | None:
    slug = words(issue, "project", "slug")
    return Resource(slug, words(issue, "project", "name") or slug, "project") if slug else None


def _of_url(api: str) -> Resource | None:
    """The project in `…/api/0/projects/{organization}/{project}/events/…`: an event has its number
    only."""
    _, found, rest = api.partition("/projects/")
    pieces = rest.split("/")
    slug = pieces[1] if found and len(pieces) > 1 else ""
    return Resource(slug, slug, "project") if slug else None


def _issue_url(page: str) -> str:
    issue, found, _ = page.partition("/events/")
    return f"{issue}/" if found else page
