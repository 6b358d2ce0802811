"""What Linear sends, as events: issues, what is said about them, projects, cycles, documents.

Pure. The one rule: an issue's title is the title of each of its events, and the event's type says
what happened to it, so that a reader follows one issue by its `identifier`.

Not told: reactions, labels, people, customers, and changes of order or of who is subscribed.
"""

import re
from typing import Any

from tasks.lines import set_of
from tasks.sources.body import facts, fingerprint, identity, names, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text

UNTOLD = set_of(
    "Reaction IssueLabel User Customer CustomerNeed CustomerRequest OAuthApp "
    "AppUserNotification AgentSessionEvent PermissionChange"
)
CLOSED = frozenset(("completed", "canceled", "cancelled", "duplicate"))
VERBS = {"create": "created", "update": "updated", "remove": "deleted", "restore": "restored"}
# What changed, the strongest first, and what an event of it is called.
CHANGES = {
    "trashed": "updated", "archivedAt": "archived", "assigneeId": "assigned",
    "delegateId": "assigned", "priority": "prioritized", "projectId": "updated",
    "cycleId": "scheduled", "dueDate": "scheduled", "teamId": "moved", "title": "updated",
    "description": "updated", "estimate": "updated", "labelIds": "labeled", "parentId": "updated",
    "projectMilestoneId": "updated", "stateId": "updated",
}  # fmt: skip
WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; what tells nothing gives none."""
    body = delivery.body
    kind, data = words(body, "type"), part(body, "data")
    if not kind or kind in UNTOLD:
        return []
    if kind == "Issue":
        return _issue(body, data)
    if kind == "Comment":
        return _comment(body, data)
    if kind == "Attachment":
        return _attachment(body, data)
    return _other(body, kind, data)


def _issue(body: Any, issue: Any) -> list[SourceEvent]:
    """An issue that came, changed or went."""
    verb, changed = _change(body, issue)
    if not verb:
        return []
    status = words(issue, "state", "type").casefold()
    closed = status in CLOSED or verb in ("deleted", "archived")
    described = verb == "opened" or "description" in changed
    return [
        SourceEvent(
            event_type=f"issue.{verb}",
            title=words(issue, "title") or words(issue, "identifier"),
            content=text(part(issue, "description")) if described else None,
            external_id=_identity(body, words(issue, "identifier"), f"issue.{verb}", issue),
            resource=_team(issue),
            branch=words(issue, "branchName"),
            priority=_priority(issue),
            author=_author(body, issue, "creator"),
            url=words(issue, "url") or words(body, "url"),
            occurred_at=_at(body, issue),
            metadata=facts(
                identifier=words(issue, "identifier"),
                state="closed" if closed else "open" if status else None,
                status=words(issue, "state", "name"),
                labels=names(parts(issue, "labels")),
                assignee=words(issue, "assignee", "name"),
                project=words(issue, "project", "name"),
                cycle=words(issue, "cycle", "name") or words(issue, "cycle", "number"),
                changed=changed,
                bot=_bot(body, issue),
            ),
        )
    ]


def _change(body: Any, issue: Any) -> tuple[str, list[str]]:
    """What happened to an issue in one word, and the fields that changed; "" when it is nothing."""
    action = words(body, "action")
    if action != "update":
        return {"create": "opened", "remove": "deleted"}.get(action, action or "updated"), []
    before = part(body, "updatedFrom")
    changed = [key for key in CHANGES if isinstance(before, dict) and key in before]
    if "stateId" in changed:
        status = words(issue, "state", "type").casefold()
        if status in CLOSED:
            return "completed" if status == "completed" else "cancelled", changed
        if any(part(before, key) for key in ("completedAt", "canceledAt")):
            return "reopened", changed
        return "started" if status == "started" else "updated", changed
    if "archivedAt" in changed and not part(issue, "archivedAt"):
        return "restored", changed
    return (CHANGES[changed[0]] if changed else ""), changed


def _comment(body: Any, comment: Any) -> list[SourceEvent]:
    """What somebody said about an issue, a project update or a document."""
    verb = VERBS.get(words(body, "action"), "commented")
    said = text(part(comment, "body")) or ""
    about = part(comment, "issue")
    named = words(about, "identifier")
    where = named or words(comment, "projectUpdate", "id") or words(comment, "documentContentId")
    if not said and verb != "deleted":
        return []
    told = {"created": "commented", "updated": "comment_edited", "deleted": "comment_deleted"}
    noun = "issue" if about else "project"
    gone = verb == "deleted"
    return [
        SourceEvent(
            event_type=f"{noun}.{told.get(verb, 'commented')}",
            title="Comment deleted" if gone else said.partition("\n")[0],
            content=None if gone else said,
            external_id=_identity(body, "comment", verb, comment),
            resource=_team(about) or _team(comment),
            author=_author(body, comment, "user"),
            url=words(comment, "url") or words(body, "url") or words(about, "url"),
            occurred_at=_at(body, comment),
            metadata=facts(
                identifier=named, thread=where, about=words(about, "title"),
                parent=words(comment, "parentId"), bot=_bot(body, comment),
            ),
        )
    ]  # fmt: skip


def _attachment(body: Any, attachment: Any) -> list[SourceEvent]:
    """A link on an issue, such as the pull request that is for it."""
    named = words(attachment, "issue", "identifier")
    if words(body, "action") != "create" or not named:
        return []
    return [
        SourceEvent(
            event_type="issue.linked",
            title=words(attachment, "issue", "title") or words(attachment, "title"),
            content=f"{words(attachment, 'title')} {words(attachment, 'url')}".strip(),
            external_id=identity(named, "linked", words(attachment, "id")),
            resource=_team(part(attachment, "issue")),
            author=_author(body, attachment, "creator"),
            url=words(attachment, "issue", "url"),
            occurred_at=_at(body, attachment),
            metadata=facts(identifier=named),
        )
    ]


def _other(body: Any, kind: str, data: Any) -> list[SourceEvent]:
    """Projects, their updates, cycles, documents, initiatives, and whatever Linear adds."""
    noun = WORD.sub("_", kind).casefold()
    verb = VERBS.get(words(body, "action"), words(body, "action") or "updated")
    before = part(body, "updatedFrom")
    about = words(data, "project", "name") or words(data, "initiative", "name")
    status = words(data, "status", "type") or words(data, "state")
    ended = isinstance(before, dict) and ("completedAt" in before or "statusId" in before)
    if verb == "updated" and ended and (part(data, "completedAt") or status in CLOSED):
        verb = "cancelled" if status in ("canceled", "cancelled") else "completed"
    elif kind.endswith("Update") and verb == "created":
        verb = "posted"
    health = words(data, "health")
    said = (
        text(part(data, "body")) or text(part(data, "description")) or text(part(data, "content"))
    )
    number = words(data, "number")
    title = words(data, "name") or words(data, "title") or (f"{kind} {number}" if number else about)
    if health:
        title = f"{title}: {WORD.sub(' ', health).casefold()}"
    return [
        SourceEvent(
            event_type=f"{noun}.{verb}",
            title=title or f"{noun.replace('_', ' ')} {verb}",
            content=said,
            external_id=_identity(body, noun, verb, data),
            resource=_team(data),
            priority=_priority(data),
            author=_author(body, data, "user") or words(data, "creator", "name"),
            url=words(data, "url") or words(body, "url"),
            occurred_at=_at(body, data),
            metadata=facts(project=about, health=health, progress=words(data, "progress")),
        )
    ]


def _identity(body: Any, name: str, what: str, data: Any) -> str:
    """The same for the same fact; what can happen again includes when it did."""
    once = words(body, "action") in ("create", "remove")
    key = name if "-" in name else identity(name, words(data, "id"))
    when = () if once else (words(data, "updatedAt") or words(body, "createdAt"),)
    return identity(key, what, *when) or fingerprint(body)


def _team(data: Any) -> Resource | None:
    """The team, by the key that its issues begin with."""
    team = part(data, "team") or part(data, "teams", 0)
    key = words(team, "key") or words(data, "identifier").rpartition("-")[0]
    key = key or words(team, "id") or words(data, "teamId") or words(data, "teamIds", 0)
    return Resource(key, words(team, "name") or key, "team") if key else None


def _priority(data: Any) -> str | None:
    """The priority in words; 0 is none."""
    label = words(data, "priorityLabel")
    if label:
        return None if label.casefold() == "no priority" else label
    ranks = {1: "Urgent", 2: "High", 3: "Medium", 4: "Low"}
    rank = part(data, "priority")
    return ranks.get(rank) if type(rank) is int else None


def _author(body: Any, data: Any, field: str) -> str:
    return words(body, "actor", "name") or words(data, field, "name") or words(body, "actor", "id")


def _bot(body: Any, data: Any) -> bool | None:
    kind = words(body, "actor", "type").casefold()
    return True if part(data, "botActor") or kind not in ("", "user") else None


def _at(body: Any, data: Any) -> str:
    """When it happened: Linear tells that of every delivery, beside the times of its object."""
    return words(body, "createdAt") or words(data, "updatedAt") or words(data, "createdAt")
