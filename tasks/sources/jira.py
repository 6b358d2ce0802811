"""What Jira sends, as events: issues, comments, sprints, versions.

Pure. The one rule: an issue's summary is the title of each of its events, the event's type says
what happened to it, and `state` is what Jira's own category of its status says, however a team
calls its statuses.

Not told: work logs, links, boards, people, properties, and fields that only order the work.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tasks.lines import set_of
from tasks.sources.body import facts, fingerprint, identity, names, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text

UNTOLD = re.compile(
    r"(?:jira:)?(?:worklog|issuelink|board|user|option|attachment|filter|issue_property|issue_type"
    r"|comment_property|jira_expressions|project_(?:soft|restored|archived|unarchived))"
)
CLOSED = set_of("done closed resolved complete completed cancelled canceled released")
# Fields whose change tells something, the strongest first, and what an event of it is called.
CHANGES = {
    "assignee": "assigned", "priority": "prioritized", "sprint": "scheduled",
    "duedate": "scheduled", "fix version": "scheduled", "summary": "updated",
    "description": "updated", "labels": "labeled",
    "component": "updated", "issuetype": "updated", "project": "moved", "parent": "updated",
    "epic link": "updated", "link": "linked", "flagged": "updated",
}  # fmt: skip
SAID = ("commented", "comment_edited", "comment_deleted")
LINK = re.compile(r"\[([^\[\]|\n]{1,300})\|(https?://[^\[\]|\s]{1,2000})(?:\|[^\[\]\n]{0,100})?\]")
BARE = re.compile(r"\[(https?://[^\[\]|\s]{1,2000})\]")
MACRO = re.compile(r"\{(?:code|noformat|quote|panel|color)(?::[^{}\n]{0,200})?\}")
PERSON = re.compile(r"\[~(?:accountid:)?([^\[\]\n]{1,100})\]")
HEADING = re.compile(r"^h[1-6]\.\s+", re.M)
END = {"tableCell": " ", "tableHeader": " "} | dict.fromkeys(
    ("paragraph", "heading", "codeBlock", "blockquote", "taskItem", "tableRow"), "\n"
)
DEPTH = 40  # of a document's nodes


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; what tells nothing gives none."""
    body = delivery.body
    name = words(body, "webhookEvent")
    if UNTOLD.match(name):
        return []
    noun, _, verb = name.removeprefix("jira:").partition("_")
    if noun == "comment" or (
        part(body, "comment") and words(body, "issue_event_type_name").startswith("issue_comment")
    ):
        return _comment(body, verb if noun == "comment" else "created")
    if noun == "issue" or (not name and part(body, "issue", "key")):
        return _issue(body, verb or "updated")
    if noun in ("sprint", "version"):
        return _milestone(body, noun, verb)
    return [
        SourceEvent(
            event_type=f"{noun or 'event'}.{verb or 'sent'}",
            title=words(body, noun, "name") or name.replace("_", " "),
            external_id=fingerprint(body),
            resource=_project(part(body, "issue")) or _project({"fields": body}),
            author=_person(part(body, "user")),
            occurred_at=part(body, "timestamp"),
        )
    ]


def plain(value: Any) -> str | None:
    """A description or comment as plain text: Atlassian's document format, or wiki markup."""
    if isinstance(value, dict):
        return text(re.sub(r"\n{3,}", "\n\n", "".join(_nodes(value, DEPTH))))
    found = text(value)
    if not found:
        return None
    found = BARE.sub(r"\1", LINK.sub(r"\1 (\2)", found))
    return text(PERSON.sub(r"@\1", HEADING.sub("", MACRO.sub("", found))))


def _nodes(node: Any, depth: int) -> Iterator[str]:
    """The pieces of text of a document's node, with its lines and lists."""
    kind, said = words(node, "type"), part(node, "text")
    if kind == "text":
        yield said if isinstance(said, str) else ""
        for mark in parts(node, "marks"):
            if (address := words(mark, "attrs", "href")) and address != said:
                yield f" ({address})"
        return
    done = words(node, "attrs", "state") == "DONE"
    begin = {"hardBreak": "\n", "taskItem": f"- [{'x' if done else ' '}] ", "listItem": "- "}
    inline = (words(node, "attrs", key) for key in ("text", "url", "shortName"))
    yield begin.get(kind) or next(filter(None, inline), "")
    for child in parts(node, "content") if depth else ():
        yield from _nodes(child, depth - 1)
    yield END.get(kind, "")


def _issue(body: Any, verb: str) -> list[SourceEvent]:
    """An issue that came, changed or went."""
    issue = part(body, "issue")
    key, fields = words(issue, "key"), part(issue, "fields")
    closed = _closed(fields)
    items = {words(item, "field").casefold(): item for item in parts(body, "changelog", "items")}
    told = {"created": "opened", "deleted": "deleted"}.get(verb) or _change(body, items, fields)
    if not told:
        return []
    at = part(body, "timestamp") or words(fields, "updated")
    once = verb in ("created", "deleted")
    described = verb == "created" or "description" in items
    return [
        SourceEvent(
            event_type=f"issue.{told}",
            title=words(fields, "summary") or key,
            content=plain(part(fields, "description")) if described else None,
            external_id=identity(key, f"issue.{told}", *(() if once else (at,)))
            or fingerprint(body),
            resource=_project(issue),
            priority=words(fields, "priority", "name"),
            author=_person(part(body, "user")) or _person(part(fields, "creator")),
            url=_browse(issue, key),
            occurred_at=at or words(fields, "created"),
            metadata=facts(
                key=key,
                state="closed" if closed or verb == "deleted" else "open",
                status=words(fields, "status", "name"),
                resolution=words(fields, "resolution", "name"),
                type=words(fields, "issuetype", "name"),
                labels=names(parts(fields, "labels")),
                assignee=_person(part(fields, "assignee")),
                version=words(fields, "fixVersions", 0, "name"),
                changed=list(items)[:20],
            ),
        )
    ]


def _change(body: Any, items: dict[str, Any], fields: Any) -> str:
    """What happened to an issue in one word; "" when it is nothing that tells."""
    named = words(body, "issue_event_type_name")
    resolved = items.get("resolution")
    if named == "issue_reopened" or (resolved and not words(resolved, "toString")):
        return "reopened"
    if "status" in items or resolved:
        if _closed(fields):
            return "closed"
        started = words(fields, "status", "statusCategory", "key") == "indeterminate"
        return "started" if started else "updated"
    found = next((CHANGES[field] for field in CHANGES if field in items), "")
    return found or ("" if items else "updated")


def _closed(fields: Any) -> bool:
    """Whether the work is over: by the category of the status, or what an older Jira tells."""
    category = words(fields, "status", "statusCategory", "key").casefold()
    if category:
        return category == "done"
    return bool(part(fields, "resolution")) or (
        words(fields, "status", "name").casefold() in CLOSED
    )


def _comment(body: Any, verb: str) -> list[SourceEvent]:
    """What somebody said about an issue."""
    issue, comment = part(body, "issue"), part(body, "comment")
    key, said = words(issue, "key"), plain(part(comment, "body")) or ""
    told = {"updated": "comment_edited", "deleted": "comment_deleted"}.get(verb, "commented")
    gone = verb == "deleted"
    if not said and not gone:
        return []
    name, when = words(comment, "id"), words(comment, "updated")
    address = _browse(issue, key)
    return [
        SourceEvent(
            event_type=f"issue.{told}",
            title="Comment deleted" if gone else said.partition("\n")[0],
            content=None if gone else said,
            external_id=identity(
                key, "comment", name, *(("edited", when) if verb == "updated" else ()),
                *(("deleted",) if gone else ()),
            ) or fingerprint(body),
            resource=_project(issue),
            author=_person(part(comment, "updateAuthor") if verb == "updated" else None)
            or _person(part(comment, "author")) or _person(part(body, "user")),
            url=f"{address}?focusedCommentId={name}" if address and name else address,
            occurred_at=when if verb == "updated" else words(comment, "created"),
            metadata=facts(key=key, thread=key, about=words(issue, "fields", "summary")),
        )
    ]  # fmt: skip


def _milestone(body: Any, noun: str, verb: str) -> list[SourceEvent]:
    """A sprint that began or ended, a version that is out."""
    data = part(body, noun)
    if verb in ("moved", "merged") or not data:
        return []
    board, project = words(data, "originBoardId"), words(data, "projectId")
    place = None
    if noun == "sprint" and board:
        place = Resource(f"board-{board}", f"Board {board}", "board")
    elif project:
        place = Resource(f"project-{project}", f"Project {project}", "project")
    name = words(data, "name")
    at = part(body, "timestamp")
    return [
        SourceEvent(
            event_type=f"{noun}.{verb}",
            title=f"{name} {verb}"
            if noun in name.casefold()
            else f"{noun.capitalize()} {name} {verb}",
            content=text(part(data, "goal")) or text(part(data, "description")),
            external_id=identity(noun, words(data, "id"), verb, at) or fingerprint(body),
            resource=place,
            author=_person(part(body, "user")),
            occurred_at=at,
            metadata=facts(version=name if noun == "version" else None),
        )
    ]


def _project(issue: Any) -> Resource | None:
    """The project, by the key that its issues begin with."""
    project = part(issue, "fields", "project")
    key = words(project, "key") or words(issue, "key").rpartition("-")[0]
    return Resource(key, words(project, "name") or key, "project") if key else None


def _person(user: Any) -> str:
    return words(user, "displayName") or words(user, "name") or words(user, "accountId")


def _browse(issue: Any, key: str) -> str | None:
    """The page of an issue: Jira sends only the address of its interface."""
    base, found, _ = words(issue, "self").partition("/rest/")
    try:
        known = found and key and urlsplit(base).hostname
    except ValueError:
        known = None
    return f"{base}/browse/{key}" if known else None
