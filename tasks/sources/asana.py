"""What Asana sends, as events: that tasks, projects and stories changed, and hardly more.

A delivery holds many events, each with ids and few names. What was completed, reopened, assigned
or said is told by the stories that Asana writes of it, so a webhook wants them in its filters.

Pure. The one rule: a task is known by its id, in the address and as the `thread` of what is said.
"""

from typing import Any

from tasks.lines import set_of
from tasks.sources.body import facts, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text

# Stories that tell what happened to a task; others repeat a change of the task itself.
STORIES = {
    "comment_added": ("commented", "commented on"),
    "marked_complete": ("completed", "completed"),
    "marked_incomplete": ("reopened", "reopened"),
    "marked_duplicate": ("closed", "closed as a duplicate"),
    "mentioned": ("mentioned", "mentioned"),
}
QUIET = set_of(  # fields of a task whose change tells nothing
    "followers hearts likes num_hearts num_likes num_subtasks modified_at memberships "
    "assignee_status assignee_section completed_by completed_at hearted liked external"
)
ACTIONS = {"added": "created", "changed": "updated", "undeleted": "restored"}
EVENTS_MAX = 1_000  # of one delivery; Asana sends at most as many


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; a heartbeat has none."""
    found = (_event(event) for event in parts(delivery.body, "events")[:EVENTS_MAX])
    return [event for event in found if event]


def _event(event: Any) -> SourceEvent | None:
    """One of them, or None when it tells nothing."""
    resource, parent = part(event, "resource"), part(event, "parent")
    kind, gid = words(resource, "resource_type") or words(event, "type"), words(resource, "gid")
    if not kind or not gid:
        return None
    if kind == "story":
        return _story(event, resource, parent)
    verb, told = _told(event, kind, parent)
    if not verb:
        return None
    field = words(event, "change", "field")
    named = words(resource, "name") or f"{kind.replace('_', ' ').capitalize()} {gid}"
    where = f" to {_name(parent)}" if verb == "added" else ""
    return SourceEvent(
        event_type=f"{kind}.{verb}",
        title=f"{named} {told}{where}" if not words(resource, "name") else named,
        external_id=_identity(event, f"{kind}.{verb}", field),
        resource=_project(resource) or _project(parent),
        author=_name(part(event, "user")),
        url=f"https://app.asana.com/0/0/{gid}",
        occurred_at=words(event, "created_at"),
        metadata=facts(
            changed=[field] if field else None,
            state="closed" if verb == "deleted" and kind == "task" else None,
            thread=gid if kind == "task" else None,
        ),
    )


def _told(event: Any, kind: str, parent: Any) -> tuple[str, str]:
    """What happened in one word, and as a title says it; "" when it is nothing that tells."""
    action, field = words(event, "action"), words(event, "change", "field")
    if action in ("added", "removed") and parent:
        if kind != "task" or words(parent, "resource_type") != "project":
            return "", ""  # a section, a tag, a list of somebody
        return action, action
    if action == "changed" and (field in QUIET or kind != "task" and not field):
        return "", ""
    if action == "changed" and field == "assignee":
        return "assigned", "assigned"
    verb = ACTIONS.get(action, action)
    told = f"changed: {field.replace('_', ' ')}" if field else verb
    return (verb, told) if verb else ("", "")


def _story(event: Any, story: Any, task: Any) -> SourceEvent | None:
    """What a story tells of its task."""
    subtype = words(story, "resource_subtype")
    if words(event, "action") != "added" or subtype not in STORIES:
        return None
    verb, told = STORIES[subtype]
    gid, said = words(task, "gid"), text(part(story, "text"))
    named = words(task, "name")
    short = said.partition("\n")[0] if said else ""
    return SourceEvent(
        event_type=f"task.{verb}",
        title=short or named or f"Task {gid} {told}",
        content=said,
        external_id=identity(gid or "-", f"task.{verb}", words(story, "gid")),
        author=_name(part(event, "user")),
        url=f"https://app.asana.com/0/0/{gid}" if gid else None,
        occurred_at=words(event, "created_at"),
        metadata=facts(thread=gid, about=named),
    )


def _identity(event: Any, what: str, field: str) -> str:
    """Asana gives its events no ids: what, to which, and when."""
    resource, at = words(event, "resource", "gid"), words(event, "created_at")
    parent = words(event, "parent", "gid")
    return identity(resource, what, *(piece for piece in (field, parent) if piece), at)


def _project(value: Any) -> Resource | None:
    """The project, when that is what this is."""
    gid = words(value, "gid")
    if words(value, "resource_type") != "project" or not gid:
        return None
    return Resource(gid, words(value, "name") or gid, "project")


def _name(value: Any) -> str:
    return words(value, "name") or words(value, "gid")
