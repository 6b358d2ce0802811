"""What GitLab sends, as events: pushes, tags, merge requests, issues, notes, pipelines, releases.

Pure. The one rule: a resource is a project by its full path, and what may happen to one thing more
than once has its time in the external id.

Not told: edits, emoji, running pipelines and jobs, and pipelines that passed elsewhere than on the
default branch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tasks.sources.body import facts, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text
from tasks.sources.forge import (
    build,
    commit,
    deployment,
    labels_of,
    number_of,
    other,
    priority_of,
    ref_event,
    sha_of,
    tag,
)

UNTOLD = frozenset(("emoji",))
ISSUE_VERBS = {"open": "opened", "close": "closed", "reopen": "reopened"}
MERGE_VERBS = ISSUE_VERBS | {"merge": "merged"}
VERBS = ISSUE_VERBS | {"create": "created", "update": "updated", "delete": "deleted"}
REVIEWS = {
    "approved": ("approved", "Review of"), "approval": ("approved", "Review of"),
    "unapproved": ("unapproved", "Approval taken back on"),
    "unapproval": ("unapproved", "Approval taken back on"),
}  # fmt: skip
DEPLOYED = {"success": "succeeded", "failed": "failed"}


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; none for what is not told."""
    body = delivery.body
    kind = words(body, "object_kind") or words(body, "event_name")
    if kind in UNTOLD:
        return []
    reader = READERS.get(kind)
    return [_other(body, kind)] if reader is None else reader(body, resource_of(body))


def resource_of(body: Any) -> Resource | None:
    """The project of a delivery, or the group of one that is of no project."""
    path = words(body, "project", "path_with_namespace") or words(body, "path_with_namespace")
    if path:
        return Resource(path, path, "repository", part(body, "project", "default_branch"))
    group = words(body, "group", "full_path") or words(body, "group_path")
    group = group or words(body, "full_path")
    return Resource(group, group, "group") if group else None


# --- Commits and refs ----------------------------------------------------------------------


def _push(body: Any, resource: Resource | None) -> list[SourceEvent]:
    branch = words(body, "ref").removeprefix("refs/heads/")
    author = words(body, "user_name") or words(body, "user_username")
    found = [
        commit(
            resource, sha_of(item, "id"), part(item, "message"), branch=branch,
            author=words(item, "author", "name"), url=part(item, "url"),
            at=part(item, "timestamp"),
            files=[path for key in ("added", "modified", "removed") for path in parts(item, key)],
        )
        for item in parts(body, "commits")
    ]  # fmt: skip
    before, after = sha_of(body, "before"), sha_of(body, "after")
    if branch and (before is None) != (after is None):
        verb = "created" if before is None else "deleted"
        found.insert(0, ref_event(resource, "branch", branch, verb, author))
    return found


def _tag_push(body: Any, resource: Resource | None) -> list[SourceEvent]:
    name = words(body, "ref").removeprefix("refs/tags/")
    author = words(body, "user_name") or words(body, "user_username")
    sha = sha_of(body, "checkout_sha") or sha_of(body, "after")
    if sha is None:
        return [ref_event(resource, "tag", name, "deleted", author)]
    page = part(body, "project", "web_url")
    url = f"{page}/-/tags/{name}" if isinstance(page, str) else None
    return [tag(resource, name, sha=sha, author=author, url=url, at=None)]


# --- Issues and merge requests -------------------------------------------------------------


def _issue(body: Any, resource: Resource | None) -> list[SourceEvent]:
    """An issue, or another work item, that was opened, closed or opened again."""
    item = part(body, "object_attributes")
    action = words(item, "action")
    verb = ISSUE_VERBS.get(action)
    if verb is None:
        return [] if action == "update" else [_other(body, words(body, "object_kind"))]
    noun = words(item, "type").casefold().replace(" ", "_") or "issue"
    noun = noun if noun in ("issue", "task", "epic", "incident") else "issue"
    labels = labels_of(parts(body, "labels") or parts(item, "labels"), "title")
    metadata = facts(number=number_of(item, "iid"), labels=labels)
    priority = priority_of(labels) or words(item, "severity").replace("unknown", "")
    return [_item(body, resource, noun, verb, metadata, priority=priority)]


def _merge_request(body: Any, resource: Resource | None) -> list[SourceEvent]:
    item = part(body, "object_attributes")
    action = words(item, "action")
    if action in REVIEWS:
        return [_review(body, resource, *REVIEWS[action])]
    verb = MERGE_VERBS.get(action)
    if verb is None and action == "update" and part(body, "changes", "draft", "current") is False:
        verb = "ready_for_review"
    if verb is None:
        return [] if action == "update" else [_other(body, "merge_request")]
    head = words(item, "source_branch")
    labels = labels_of(parts(body, "labels") or parts(item, "labels"), "title")
    metadata = facts(
        merge_request=number_of(item, "iid"),
        head_branch=head,
        merged_branch=head if verb == "merged" else None,
        sha=sha_of(item, "merge_commit_sha") or sha_of(item, "squash_commit_sha")
        if verb == "merged" else None,
        draft=True if part(item, "draft") is True else None,
        labels=labels,
    )  # fmt: skip
    branch = words(item, "target_branch")
    priority = priority_of(labels)
    return [_item(body, resource, "merge_request", verb, metadata, branch, priority)]


def _item(
    body: Any,
    resource: Resource | None,
    noun: str,
    verb: str,
    metadata: Mapping[str, Any],
    branch: str | None = None,
    priority: str | None = None,
) -> SourceEvent:
    item = part(body, "object_attributes")
    once = verb in ("opened", "merged")
    at = part(item, "created_at" if verb == "opened" else "updated_at")
    return SourceEvent(
        event_type=f"{noun}.{verb}",
        title=words(item, "title"),
        content=part(item, "description") if verb in ("opened", "closed", "merged") else None,
        external_id=_numbered(resource, noun, item, verb, *(() if once else (at,))),
        resource=resource,
        branch=branch,
        priority=priority,
        author=words(body, "user", "name") or words(body, "user", "username"),
        url=part(item, "url"),
        occurred_at=at,
        metadata=metadata,
    )


def _review(body: Any, resource: Resource | None, state: str, lead: str) -> SourceEvent:
    item = part(body, "object_attributes")
    at = part(item, "updated_at")
    who = words(body, "user", "name") or words(body, "user", "username")
    # Of an approval GitLab tells twice: of one person's, and that all who must have given theirs.
    return SourceEvent(
        event_type="review.submitted",
        title=f"{lead} {words(item, 'title')}",
        external_id=_numbered(resource, "merge_request", item, "review", state, who, at),
        resource=resource,
        branch=words(item, "target_branch"),
        author=who,
        url=part(item, "url"),
        occurred_at=at,
        metadata=facts(merge_request=number_of(item, "iid"), state=state),
    )


def _numbered(resource: Resource | None, noun: str, item: Any, *pieces: object) -> str:
    """An id of an issue or a merge request, whose numbers GitLab counts apart."""
    number = number_of(item, "iid")
    if resource is None or number is None:
        return ""
    mark = "!" if noun == "merge_request" else "#"
    first, *rest = pieces
    return identity(f"{resource.id}{mark}{number}", f"{noun}.{first}", *rest)


def _note(body: Any, resource: Resource | None) -> list[SourceEvent]:
    """A comment on an issue, a merge request, a commit or a snippet."""
    note = part(body, "object_attributes")
    if words(note, "action") not in ("create", "") or part(note, "system") is True:
        return []
    kinds = {"Issue": "issue", "MergeRequest": "merge_request", "Commit": "commit"}
    noun = kinds.get(words(note, "noteable_type"), "snippet")
    subject = part(body, noun)
    about = words(subject, "title") or words((text(part(subject, "message")) or "").split("\n")[0])
    sha = sha_of(note, "commit_id") if noun == "commit" else None
    key = {"issue": "number", "merge_request": "merge_request"}.get(noun)
    return [
        SourceEvent(
            event_type=f"{noun}.commented",
            title=f"Comment on {about}",
            content=part(note, "note"),
            external_id=identity(resource and resource.id, "note", part(note, "id")),
            resource=resource,
            branch=words(subject, "target_branch") if noun == "merge_request" else None,
            author=words(body, "user", "name") or words(body, "user", "username"),
            url=part(note, "url"),
            occurred_at=part(note, "created_at"),
            metadata=facts(sha=sha) | (facts(**{key: number_of(subject, "iid")}) if key else {}),
        )
    ]


# --- Builds, deployments, releases ---------------------------------------------------------


def _pipeline(body: Any, resource: Resource | None) -> list[SourceEvent]:
    run = part(body, "object_attributes")
    status, branch = words(run, "status"), words(run, "ref")
    default = resource and resource.default_branch
    if status != "failed" and not (status == "success" and default and branch == default):
        return []
    broken = [
        words(job, "name") for job in parts(body, "builds") if part(job, "status") == "failed"
    ]
    return [
        build(
            resource, status == "success", name=words(run, "name") or "Pipeline",
            external_id=identity(resource and resource.id, "pipeline", part(run, "id"), status),
            branch=branch, sha=sha_of(run, "sha"), message=part(body, "commit", "message"),
            author=words(body, "user", "name"), url=part(run, "url"), at=part(run, "finished_at"),
            more=facts(failed_jobs=broken[:10] if status == "failed" else None),
        )
    ]  # fmt: skip


def _job(body: Any, resource: Resource | None) -> list[SourceEvent]:
    """A job that failed and should not have; those that passed are told by their pipeline."""
    if words(body, "build_status") != "failed" or part(body, "build_allow_failure") is True:
        return []
    page, number = part(body, "project", "web_url"), number_of(body, "build_id")
    return [
        build(
            resource, False, name=words(body, "build_name") or "Job", noun="job",
            external_id=identity(resource and resource.id, "job", number),
            branch=words(body, "ref"), sha=sha_of(body, "sha"),
            message=part(body, "commit", "message"), author=words(body, "user", "name"),
            url=f"{page}/-/jobs/{number}" if isinstance(page, str) and number else None,
            at=part(body, "build_finished_at"),
            more=facts(
                reason=words(body, "build_failure_reason"), stage=words(body, "build_stage")
            ),
        )
    ]  # fmt: skip


def _deployment(body: Any, resource: Resource | None) -> list[SourceEvent]:
    verb = DEPLOYED.get(words(body, "status"))
    if verb is None:
        return []
    sha = words(body, "commit_url").rpartition("/")[2]
    key = identity(resource and resource.id, "deployment", part(body, "deployment_id"), verb)
    ref = words(body, "ref")
    what = f"{resource.name if resource else ''} {ref}".strip()
    return [
        deployment(
            resource, verb, what=what or "the project", environment=words(body, "environment"),
            external_id=key, branch=ref, sha=sha_of(sha), message=part(body, "commit_title"),
            author=words(body, "user", "name"),
            url=part(body, "deployable_url") or part(body, "environment_external_url"),
            at=part(body, "status_changed_at"),
        )
    ]  # fmt: skip


def _release(body: Any, resource: Resource | None) -> list[SourceEvent]:
    """A release that was made; its edits, and its removal, are not told."""
    if words(body, "action") != "create":
        return []
    name = words(body, "tag")
    return [
        SourceEvent(
            event_type="release.published",
            title=words(body, "name") or name,
            content=part(body, "description"),
            external_id=identity(resource and resource.id, "release", name),
            resource=resource,
            author=words(body, "commit", "author", "name"),
            url=part(body, "url"),
            occurred_at=part(body, "released_at") or part(body, "created_at"),
            metadata=facts(tag=name, sha=sha_of(body, "commit", "id")),
        )
    ]


# --- The rest ------------------------------------------------------------------------------


def _wiki(body: Any, resource: Resource | None) -> list[SourceEvent]:
    page = part(body, "object_attributes")
    verb = {"create": "created", "delete": "deleted"}.get(words(page, "action"), "updated")
    return [
        SourceEvent(
            event_type=f"page.{verb}",
            title=words(page, "title"),
            content=part(page, "message"),
            external_id=identity(
                resource and resource.id, "wiki", part(page, "slug"), part(page, "version_id"), verb
            ),
            resource=resource,
            author=words(body, "user", "name"),
            url=part(page, "url"),
        )
    ]


def _vulnerability(body: Any, resource: Resource | None) -> list[SourceEvent]:
    item = part(body, "object_attributes")
    state = words(item, "state")
    verb = {"resolved": "resolved", "dismissed": "closed"}.get(state, "opened")
    return [
        SourceEvent(
            event_type=f"alert.{verb}",
            title=words(item, "title"),
            external_id=identity(part(item, "url"), verb, part(item, "updated_at")),
            resource=resource or _project_of(part(item, "url")),
            priority=words(item, "severity"),
            url=part(item, "url"),
            occurred_at=part(item, "updated_at"),
            metadata=facts(path=words(item, "location", "file")),
        )
    ]


def _project_of(url: Any) -> Resource | None:
    """The project in an address, for the deliveries that name it by its number only."""
    path = url.partition("/-/")[0].split("/", 3)[-1] if isinstance(url, str) else ""
    return Resource(path, path, "repository") if "/" in path and "/-/" in url else None


def _other(body: Any, kind: str) -> SourceEvent:
    item = part(body, "object_attributes")
    verb = words(body, "action") or words(item, "action")
    verb = VERBS.get(verb, verb)
    named = words(item, "title") or words(item, "name") or words(body, "name")
    named = named or words(body, "user_name")
    told = f"{kind} {verb}".replace("_", " ").strip().capitalize() or "Event"
    return other(
        resource_of(body), f"{kind or 'event'}.{verb}" if verb else kind, body,
        title=f"{told}: {named}" if named else told, author=words(body, "user", "name"),
        url=part(item, "url"),
    )  # fmt: skip


READERS: Mapping[str, Callable[[Any, Resource | None], list[SourceEvent]]] = {
    "push": _push,
    "tag_push": _tag_push,
    "issue": _issue,
    "work_item": _issue,
    "merge_request": _merge_request,
    "note": _note,
    "pipeline": _pipeline,
    "build": _job,
    "deployment": _deployment,
    "release": _release,
    "wiki_page": _wiki,
    "vulnerability": _vulnerability,
}
