"""What Bitbucket Cloud sends, as events: pushes, pull requests, issues and commit statuses.

Pure. The one rule: the event key of the header says what a body is; Bitbucket puts nothing of it
into the body.

Not told: edits, forks, and builds that passed elsewhere than on the default branch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tasks.lines import set_of
from tasks.sources.body import facts, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent
from tasks.sources.forge import build, commit, number_of, numbered, other, ref_event, sha_of, tag

UNTOLD = set_of(
    "repo:fork diagnostics:ping pullrequest:updated pullrequest:comment_updated "
    "pullrequest:comment_deleted pullrequest:comment_resolved pullrequest:comment_reopened"
)
PULL_VERBS = {"created": "opened", "fulfilled": "merged", "rejected": "closed"}
REVIEWS = {
    "approved": ("approval", "approved", "Review of {}"),
    "unapproved": ("approval", "unapproved", "Approval taken back on {}"),
    "changes_request_created": (
        "changes_request", "changes_requested", "Changes requested on {}"),
    "changes_request_removed": (
        "changes_request", "changes_request_removed", "Request for changes taken back on {}"),
}  # fmt: skip
CLOSED = frozenset(("closed", "resolved", "invalid", "duplicate", "wontfix"))


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; none for what is not told."""
    key = words(delivery.headers.get("x-event-key"))
    body = delivery.body
    if key in UNTOLD:
        return []
    resource = resource_of(body)
    noun, _, verb = key.partition(":")
    reader = READERS.get(key) or READERS.get(noun)
    return [_other(body, resource, key)] if reader is None else reader(body, resource, verb)


def resource_of(body: Any) -> Resource | None:
    """The repository of a delivery."""
    name = words(body, "repository", "full_name")
    default = part(body, "repository", "mainbranch", "name")
    return Resource(name, name, "repository", default) if name else None


def _person(value: Any) -> str:
    return words(value, "display_name") or words(value, "nickname") or words(value, "username")


def _page(value: Any) -> Any:
    return part(value, "links", "html", "href")


# --- Commits and refs ----------------------------------------------------------------------


def _push(body: Any, resource: Resource | None, _: str) -> list[SourceEvent]:
    author = _person(part(body, "actor"))
    return [
        event
        for change in parts(body, "push", "changes")
        for event in _change(change, resource, author)
    ]


def _change(change: Any, resource: Resource | None, author: str) -> list[SourceEvent]:
    """What happened to one branch or tag of a push."""
    new, old = part(change, "new"), part(change, "old")
    name = words(new, "name") or words(old, "name")
    kind = words(new, "type") or words(old, "type")
    if kind in ("tag", "annotated_tag"):
        if not new:
            return [ref_event(resource, "tag", name, "deleted", author)]
        at = part(new, "date") or part(new, "target", "date")
        sha = sha_of(new, "target", "hash")
        return [tag(resource, name, sha=sha, author=author, url=_page(new), at=at)]
    found = [
        commit(
            resource, sha_of(item, "hash"), part(item, "message"), branch=name,
            author=_person(part(item, "author", "user"))
            or words(item, "author", "raw").partition(" <")[0],
            url=_page(item), at=part(item, "date"),
        )
        for item in parts(change, "commits")
    ]  # fmt: skip
    if name and bool(new) != bool(old):
        found.insert(
            0, ref_event(resource, "branch", name, "created" if new else "deleted", author)
        )
    return found


# --- Pull requests and issues --------------------------------------------------------------


def _pull_request(body: Any, resource: Resource | None, key: str) -> list[SourceEvent]:
    pull = part(body, "pullrequest")
    if key == "comment_created":
        return [_comment(body, resource, pull, "pull_request")]
    if key in REVIEWS:
        return [_review(body, resource, key)]
    verb = PULL_VERBS.get(key)
    if verb is None:
        return [_other(body, resource, f"pullrequest:{key}")]
    at = part(pull, "created_on" if verb == "opened" else "updated_on")
    head = words(pull, "source", "branch", "name")
    when = (at,) if verb == "closed" else ()
    return [
        SourceEvent(
            event_type=f"pull_request.{verb}",
            title=words(pull, "title"),
            content=part(pull, "description") or part(pull, "summary", "raw"),
            external_id=numbered(resource, number_of(pull, "id"), f"pull_request.{verb}", *when),
            resource=resource,
            branch=words(pull, "destination", "branch", "name"),
            author=_person(part(pull, "author")) or _person(part(body, "actor")),
            url=_page(pull),
            occurred_at=at,
            metadata=facts(
                pull_request=number_of(pull, "id"),
                head_branch=head,
                merged_branch=head if verb == "merged" else None,
                sha=words(pull, "merge_commit", "hash") if verb == "merged" else None,
                merged_by=_person(part(body, "actor")) if verb == "merged" else None,
                reason=words(pull, "reason") if verb == "closed" else None,
            ),
        )
    ]


def _review(body: Any, resource: Resource | None, key: str) -> SourceEvent:
    field, state, title = REVIEWS[key]
    pull = part(body, "pullrequest")
    who = _person(part(body, field, "user")) or _person(part(body, "actor"))
    at = part(body, field, "date")
    return SourceEvent(
        event_type="review.submitted",
        title=title.format(words(pull, "title")),
        external_id=numbered(resource, number_of(pull, "id"), "review", state, who, at),
        resource=resource,
        branch=words(pull, "destination", "branch", "name"),
        author=who,
        url=_page(pull),
        occurred_at=at,
        metadata=facts(pull_request=number_of(pull, "id"), state=state),
    )


def _issue(body: Any, resource: Resource | None, key: str) -> list[SourceEvent]:
    issue = part(body, "issue")
    if key == "comment_created":
        return [_comment(body, resource, issue, "issue")]
    state = words(issue, "state")
    status = words(body, "changes", "status", "new")
    verb = "opened"
    if key != "created":
        if not status:
            return []
        verb = "closed" if status in CLOSED else "updated"
    at = part(issue, "created_on" if verb == "opened" else "updated_on")
    when = () if verb == "opened" else (at,)
    return [
        SourceEvent(
            event_type=f"issue.{verb}",
            title=words(issue, "title"),
            content=part(issue, "content", "raw"),
            external_id=numbered(resource, number_of(issue, "id"), f"issue.{verb}", *when),
            resource=resource,
            priority=words(issue, "priority"),
            author=_person(part(body, "actor")),
            url=_page(issue),
            occurred_at=at,
            metadata=facts(
                number=number_of(issue, "id"), kind=words(issue, "type") or words(issue, "kind"),
                state=state if verb == "updated" else None,
            ),
        )
    ]  # fmt: skip


def _comment(body: Any, resource: Resource | None, item: Any, noun: str) -> SourceEvent:
    comment = part(body, "comment")
    number = number_of(item, "id")
    return SourceEvent(
        event_type=f"{noun}.commented",
        title=f"Comment on {words(item, 'title')}",
        content=part(comment, "content", "raw"),
        external_id=numbered(resource, number, f"{noun}.comment", part(comment, "id")),
        resource=resource,
        branch=words(item, "destination", "branch", "name"),
        author=_person(part(comment, "user")) or _person(part(body, "actor")),
        url=_page(comment),
        occurred_at=part(comment, "created_on"),
        metadata=facts(
            **{"pull_request" if noun == "pull_request" else "number": number},
            path=words(comment, "inline", "path"),
        ),
    )


# --- The rest ------------------------------------------------------------------------------


def _commit_comment(body: Any, resource: Resource | None, _: str) -> list[SourceEvent]:
    comment, sha = part(body, "comment"), sha_of(body, "commit", "hash")
    return [
        SourceEvent(
            event_type="commit.commented",
            title=f"Comment on commit {(sha or '')[:7]}".strip(),
            content=part(comment, "content", "raw"),
            external_id=identity(resource and resource.id, "comment", part(comment, "id")),
            resource=resource,
            author=_person(part(body, "actor")),
            url=_page(comment),
            occurred_at=part(comment, "created_on"),
            metadata=facts(sha=sha),
        )
    ]


def _status(body: Any, resource: Resource | None, _: str) -> list[SourceEvent]:
    status = part(body, "commit_status")
    state, branch = words(status, "state"), words(status, "refname")
    default = resource and resource.default_branch
    # The branch is often left out; then nobody knows whether a build that passed is a recovery.
    if state != "FAILED" and not (state == "SUCCESSFUL" and branch and branch == default):
        return []
    sha = (
        words(status, "commit", "hash")
        or words(status, "links", "commit", "href").rpartition("/")[2]
    )
    return [
        build(
            resource, state == "SUCCESSFUL", name=words(status, "name") or words(status, "key"),
            external_id=identity(
                resource and resource.id, "status", part(status, "key"), sha, state
            ),
            branch=branch, sha=sha_of(sha), message=part(status, "commit", "message"),
            author=_person(part(body, "actor")), url=part(status, "url"),
            at=part(status, "updated_on"),
        )
    ]  # fmt: skip


def _other(body: Any, resource: Resource | None, key: str) -> SourceEvent:
    name = key.replace(":", ".") or "event"
    told = name.replace(".", " ").replace("_", " ").capitalize()
    return other(
        resource, name, body, title=f"{told}: {resource.name}" if resource else told,
        author=_person(part(body, "actor")), url=_page(part(body, "repository")),
    )  # fmt: skip


READERS: Mapping[str, Callable[[Any, Resource | None, str], list[SourceEvent]]] = {
    "repo:push": _push,
    "repo:commit_comment_created": _commit_comment,
    "repo:commit_status_created": _status,
    "repo:commit_status_updated": _status,
    "pullrequest": _pull_request,
    "issue": _issue,
}
