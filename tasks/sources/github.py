"""What GitHub sends, as events: pushes, pull requests and their reviews, issues, releases, builds.

Pure. The one rule: a fact has the same external id from a webhook and from the REST API, whose
objects are the same, so `baton import github` maps with these functions too.

Not told: what only repeats another delivery (synchronize, check runs and jobs of a workflow), what
no one acts on (labels, edits, pins, stars, forks), and builds that passed elsewhere than on the
default branch, unless they were run again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.lines import set_of
from tasks.sources.body import facts, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent
from tasks.sources.forge import (
    build,
    commit,
    deployment,
    labels_of,
    number_of,
    numbered,
    other,
    priority_of,
    ref_event,
    sha_of,
    tag,
)

# Deliveries that tell nothing that a team did, or repeat what another delivery tells.
UNTOLD = set_of(
    "ping meta star watch fork installation installation_repositories installation_target "
    "github_app_authorization marketplace_purchase check_run workflow_job workflow_dispatch "
    "repository_dispatch deployment deployment_review merge_group label project_card "
    "project_column projects_v2_item pull_request_review_thread page_build team_add "
    "repository_import"
)
QUIET = set_of(
    "edited labeled unlabeled synchronize unassigned locked unlocked milestoned demilestoned "
    "pinned unpinned review_request_removed auto_merge_enabled auto_merge_disabled enqueued "
    "dequeued typed untyped category_changed requested in_progress queued waiting rerequested "
    "unanswered"
)
# What an action on an issue or a request is called, and the field that says when it was.
TOLD = {
    "opened": "created_at", "closed": "closed_at", "merged": "merged_at", "reopened": "updated_at",
    "ready_for_review": "updated_at", "converted_to_draft": "updated_at",
    "review_requested": "updated_at", "assigned": "updated_at",
}  # fmt: skip
ONCE = frozenset(("opened", "merged"))  # the others may happen again: their ids say when
FAILED = frozenset(("failure", "timed_out", "startup_failure", "error"))
DEPLOYED = {"success": "succeeded", "failure": "failed", "error": "failed"}
ALERTS = {
    "created": "opened", "create": "opened", "appeared_in_branch": "opened",
    "reopened": "reopened", "reopened_by_user": "reopened", "reintroduced": "reopened",
    "auto_reopened": "reopened", "fixed": "fixed", "resolve": "resolved", "resolved": "resolved",
    "dismissed": "closed", "auto_dismissed": "closed", "closed_by_user": "closed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Said:
    """One delivery, with what nearly all of them have."""

    name: str
    action: str
    body: Any
    resource: Resource | None
    sender: str


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; none for a ping and for what is not told."""
    body = _body(delivery.body)
    name = words(delivery.headers.get("x-github-event"))
    said = _Said(
        name, words(body, "action"), body, resource_of(body), words(body, "sender", "login")
    )
    if name in UNTOLD or said.action in QUIET:
        return []
    reader = READERS.get(name)
    return [_other(said)] if reader is None else reader(said)


def resource_of(body: Any) -> Resource | None:
    """The repository of a delivery, or the organization of one that is of no repository."""
    name = words(body, "repository", "full_name")
    if name:
        default = part(body, "repository", "default_branch")
        return Resource(name, name, "repository", default)
    login = words(body, "organization", "login")
    return Resource(login, login, "organization") if login else None


def _body(body: Any) -> Any:
    """The payload, also of a webhook whose content type is a form."""
    payload = part(body, "payload")
    if not isinstance(payload, str):
        return body
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {}


# --- Commits and refs ----------------------------------------------------------------------


def _push(said: _Said) -> list[SourceEvent]:
    """The commits that no push has brought before, and what became of the ref."""
    body = said.body
    ref = words(body, "ref")
    author = words(body, "pusher", "name") or said.sender
    if ref.startswith("refs/tags/"):
        return _refs(said, "tag", ref.removeprefix("refs/tags/"), author)
    branch = _branch(ref)
    changed = _refs(said, "branch", branch, author) if branch else []
    return changed + [
        _commit(said, item, branch)
        for item in parts(body, "commits")
        if part(item, "distinct") is not False
    ]


def _commit(said: _Said, item: Any, branch: str) -> SourceEvent:
    listed = [path for key in ("added", "modified", "removed") for path in parts(item, key)]
    touched = dict.fromkeys(path for path in listed if isinstance(path, str))
    author = words(item, "author", "name") or words(item, "author", "username")
    return commit(
        said.resource, sha_of(item, "id"), part(item, "message"), branch=branch, author=author,
        url=part(item, "url"), at=part(item, "timestamp"), files=touched,
    )  # fmt: skip


def _refs(said: _Said, kind: str, name: str, author: str) -> list[SourceEvent]:
    """A ref that came or went, by its own delivery or by a push."""
    body = said.body
    if said.name == "delete" or part(body, "deleted") is True:
        return [ref_event(said.resource, kind, name, "deleted", author)]
    if said.name == "push" and part(body, "created") is not True:
        return []
    if kind != "tag":
        return [ref_event(said.resource, kind, name, "created", author)]
    page = part(body, "repository", "html_url")
    url = f"{page}/releases/tag/{name}" if isinstance(page, str) else None
    at = part(body, "head_commit", "timestamp")
    return [
        tag(
            said.resource,
            name,
            sha=sha_of(body, "head_commit", "id"),
            author=author,
            url=url,
            at=at,
        )
    ]


def _ref(said: _Said) -> list[SourceEvent]:
    kind, name = words(said.body, "ref_type"), words(said.body, "ref")
    if kind not in ("branch", "tag") or not name:
        return [_other(said)]
    return _refs(said, kind, name, said.sender)


# --- Pull requests and issues --------------------------------------------------------------


def _pull_request(said: _Said) -> list[SourceEvent]:
    pull = part(said.body, "pull_request")
    merged = said.action == "closed" and bool(
        part(pull, "merged") is True or part(pull, "merged_at")
    )
    verb = "merged" if merged else said.action
    head = words(pull, "head", "ref")
    metadata = facts(
        pull_request=number_of(pull, "number"),
        head_branch=head,
        merged_branch=head if merged else None,
        sha=sha_of(pull, "merge_commit_sha") if merged else None,
        files=[path for item in parts(pull, "files") if (path := words(item, "filename"))],
        files_changed=number_of(pull, "changed_files"),
        draft=True if part(pull, "draft") is True else None,
        merged_by=words(pull, "merged_by", "login"),
        reviewer=words(said.body, "requested_reviewer", "login")
        or words(said.body, "requested_team", "name"),
    )
    return [_item(said, "pull_request", pull, verb, metadata, words(pull, "base", "ref"))]


def _issue(said: _Said) -> list[SourceEvent]:
    issue = part(said.body, "issue")
    metadata = facts(
        number=number_of(issue, "number"),
        resolution=words(issue, "state_reason") if said.action == "closed" else None,
        assignee=words(said.body, "assignee", "login"),
        milestone=words(issue, "milestone", "title"),
    )
    return [_item(said, "issue", issue, said.action, metadata, None)]


def _item(
    said: _Said, noun: str, item: Any, verb: str, metadata: Mapping[str, Any], branch: str | None
) -> SourceEvent:
    """An issue or a pull request, and what was done with it."""
    field = TOLD.get(verb, "updated_at")
    at = part(item, field) or part(item, "updated_at")
    when = () if verb in ONCE else (at,)
    labels = labels_of(parts(item, "labels"), "name")
    author = words(item, "user", "login") if verb in ONCE else said.sender
    return SourceEvent(
        event_type=f"{noun}.{verb or 'updated'}",
        title=words(item, "title"),
        content=part(item, "body") if verb in ("opened", "merged", "closed") else None,
        external_id=numbered(said.resource, number_of(item, "number"), f"{noun}.{verb}", *when),
        resource=said.resource,
        branch=branch,
        priority=priority_of(labels),
        author=author or words(item, "user", "login"),
        url=part(item, "html_url"),
        occurred_at=at,
        metadata={**metadata, **facts(labels=labels)},
    )


# --- Talk ----------------------------------------------------------------------------------


def _review(said: _Said) -> list[SourceEvent]:
    """A review; one without a verdict and without words only holds comments, which come too."""
    review = part(said.body, "review")
    state = words(review, "state").casefold()
    if said.action == "dismissed":
        return [_talk(said, "review.dismissed", "Review dismissed", review, "dismissed", state)]
    if said.action != "submitted" or (state == "commented" and not words(review, "body")):
        return []
    lead = "Changes requested" if state == "changes_requested" else "Review"
    return [_talk(said, "review.submitted", lead, review, "", state)]


def _comment(said: _Said) -> list[SourceEvent]:
    """A comment on an issue, a pull request, its code, a discussion or a commit."""
    if said.action != "created":
        return []
    noun = COMMENTED.get(said.name, "comment")
    if said.name == "issue_comment" and part(said.body, "issue", "pull_request"):
        noun = "pull_request.commented"
    return [_talk(said, noun, "Comment", part(said.body, "comment"), "", "")]


COMMENTED = {
    "issue_comment": "issue.commented",
    "pull_request_review_comment": "review.commented",
    "discussion_comment": "discussion.commented",
    "commit_comment": "commit.commented",
}


def _talk(said: _Said, event_type: str, lead: str, item: Any, verb: str, state: str) -> SourceEvent:
    """What somebody said about something that has a title."""
    body = said.body
    subject = next(
        (found for key in ("pull_request", "issue", "discussion") if (found := part(body, key))),
        None,
    )
    number = number_of(subject, "number")
    kind = {"pull_request_review": "review", "pull_request_review_comment": "review_comment"}
    pieces = [kind.get(said.name, "comment"), part(item, "id"), *([verb] if verb else [])]
    pull = event_type.startswith(("pull_request", "review"))
    sha = sha_of(item, "commit_id") if said.name == "commit_comment" else None
    of_commit = identity(said.resource and said.resource.id, *pieces)
    about = words(subject, "title") or (sha or "")[:7]
    return SourceEvent(
        event_type=event_type,
        title=f"{lead} {'of' if lead == 'Review' else 'on'} {about}",
        content=part(item, "body"),
        external_id=numbered(said.resource, number, *pieces) if number else of_commit,
        resource=said.resource,
        branch=words(subject, "base", "ref"),
        author=words(item, "user", "login") if not verb else said.sender,
        url=part(item, "html_url"),
        occurred_at=None if verb else part(item, "submitted_at") or part(item, "created_at"),
        metadata=facts(
            **{"pull_request" if pull else "number": number},
            state=state,
            path=words(item, "path"),
            sha=sha,
            bot=True if part(item, "user", "type") == "Bot" else None,
        ),
    )


def _discussion(said: _Said) -> list[SourceEvent]:
    discussion = part(said.body, "discussion")
    if said.action not in ("created", "answered", "closed", "reopened"):
        return [_other(said)]
    answer = part(said.body, "answer") if said.action == "answered" else discussion
    at = part(answer, "created_at") if said.action != "closed" else part(discussion, "updated_at")
    number = number_of(discussion, "number")
    return [
        SourceEvent(
            event_type=f"discussion.{said.action}",
            title=words(discussion, "title"),
            content=part(answer, "body"),
            external_id=numbered(said.resource, number, f"discussion.{said.action}", at),
            resource=said.resource,
            author=words(answer, "user", "login") or said.sender,
            url=part(answer, "html_url") or part(discussion, "html_url"),
            occurred_at=at,
            metadata=facts(number=number, category=words(discussion, "category", "name")),
        )
    ]


# --- Releases, builds, deployments ---------------------------------------------------------


def _release(said: _Said) -> list[SourceEvent]:
    """A release that was published; what happens to it before and after is not told."""
    release = part(said.body, "release")
    if said.action != "published":
        return []
    name = words(release, "tag_name")
    return [
        SourceEvent(
            event_type="release.published",
            title=words(release, "name") or name,
            content=part(release, "body"),
            external_id=identity(
                said.resource and said.resource.id, "release", part(release, "id")
            ),
            resource=said.resource,
            author=words(release, "author", "login"),
            url=part(release, "html_url"),
            occurred_at=part(release, "published_at"),
            metadata=facts(
                tag=name, prerelease=True if part(release, "prerelease") is True else None
            ),
        )
    ]


def _workflow_run(said: _Said) -> list[SourceEvent]:
    run = part(said.body, "workflow_run")
    again = (number_of(run, "run_attempt") or 1) > 1
    return _built(
        said, run, words(run, "name") or "Workflow", part(run, "check_suite_id"), again=again
    )


def _check_suite(said: _Said) -> list[SourceEvent]:
    """The result of one app's checks; that of a workflow has the id of the workflow's run."""
    suite = part(said.body, "check_suite")
    return _built(said, suite, words(suite, "app", "name") or "Checks", part(suite, "id"))


def _built(
    said: _Said, run: Any, name: str, suite: Any, *, again: bool = False
) -> list[SourceEvent]:
    conclusion = words(run, "conclusion")
    branch = words(run, "head_branch")
    passed = conclusion == "success"
    if not _matters(said, conclusion, branch, again=again):
        return []
    return [
        build(
            said.resource, passed, name=name, branch=branch, sha=sha_of(run, "head_sha"),
            external_id=identity(said.resource and said.resource.id, "build", suite, conclusion),
            message=part(run, "head_commit", "message"), at=part(run, "updated_at"),
            author=words(run, "actor", "login") or words(run, "head_commit", "author", "name"),
            url=part(run, "html_url"), more=facts(head_branch=branch),
        )
    ]  # fmt: skip


def _status(said: _Said) -> list[SourceEvent]:
    """What a build service outside GitHub says of a commit."""
    body = said.body
    default = said.resource and said.resource.default_branch
    branches = [words(item, "name") for item in parts(body, "branches")]
    branch = default if default and default in branches else next(iter(branches), "")
    state = words(body, "state")
    if not _matters(said, state, branch):
        return []
    return [
        build(
            said.resource, state == "success", name=words(body, "context") or "Status",
            external_id=identity(said.resource and said.resource.id, "status", part(body, "id")),
            branch=branch, sha=sha_of(body, "sha"),
            message=part(body, "commit", "commit", "message"),
            author=words(body, "commit", "author", "login"), url=part(body, "target_url"),
            at=part(body, "created_at"),
        )
    ]  # fmt: skip


def _matters(said: _Said, conclusion: str, branch: str, *, again: bool = False) -> bool:
    """Whether a build is worth telling: a failure, or what may be a recovery."""
    if conclusion in FAILED:
        return True
    default = said.resource and said.resource.default_branch
    return conclusion == "success" and (again or (bool(default) and branch == default))


def _deployment_status(said: _Said) -> list[SourceEvent]:
    status, deployed = part(said.body, "deployment_status"), part(said.body, "deployment")
    verb = DEPLOYED.get(words(status, "state"))
    if verb is None:
        return []
    sha, ref = sha_of(deployed, "sha"), words(deployed, "ref")
    ref = "" if ref == sha else ref
    name = said.resource.name if said.resource else ""
    return [
        deployment(
            said.resource,
            verb,
            what=f"{name} {ref}".strip(),
            environment=words(status, "environment") or words(deployed, "environment"),
            external_id=identity(name, "deployment", part(deployed, "id"), verb),
            branch=ref,
            sha=sha,
            message=part(status, "description"),
            author=words(deployed, "creator", "login"),
            url=part(status, "target_url") or part(status, "log_url"),
            at=part(status, "created_at"),
        )
    ]


# --- Alerts, wiki, the rest ----------------------------------------------------------------


def _alert(said: _Said) -> list[SourceEvent]:
    """A finding of code, dependency or secret scanning; of a secret only its kind is told."""
    alert = part(said.body, "alert")
    verb = ALERTS.get(said.action)
    if verb is None:
        return [_other(said)]
    severity = (
        words(alert, "rule", "security_severity_level")
        or words(alert, "security_vulnerability", "severity")
        or words(alert, "security_advisory", "severity")
        or words(alert, "severity")
        or words(alert, "rule", "severity")
    )
    if said.name == "secret_scanning_alert":
        severity = "critical"  # GitHub gives none, and a leaked secret is one
    ended = part(alert, "fixed_at") or part(alert, "dismissed_at") or part(alert, "resolved_at")
    at = part(alert, "updated_at") or ended or part(alert, "created_at")
    at = part(alert, "created_at") if verb == "opened" else at
    number = number_of(alert, "number") or number_of(alert, "id")
    return [
        SourceEvent(
            event_type=f"alert.{verb}",
            title=_finding(alert),
            content=part(alert, "security_advisory", "description")
            or part(alert, "rule", "full_description")
            or part(alert, "most_recent_instance", "message", "text"),
            external_id=identity(
                said.resource and said.resource.id, said.name, number, verb,
                *(() if verb == "opened" else (at,)),
            ),
            resource=said.resource,
            branch=_branch(words(said.body, "ref")),
            priority=severity.casefold() or None,
            author=said.sender,
            url=part(alert, "html_url"),
            occurred_at=at,
            metadata=facts(path=words(alert, "most_recent_instance", "location", "path")
                           or words(alert, "dependency", "manifest_path")),
        )
    ]  # fmt: skip


def _finding(alert: Any) -> str:
    secret = words(alert, "secret_type_display_name") or words(alert, "secret_type")
    package = words(alert, "dependency", "package", "name") or words(alert, "affected_package_name")
    return (
        words(alert, "security_advisory", "summary")
        or words(alert, "rule", "description")
        or words(alert, "rule", "name")
        or (f"Leaked secret: {secret}" if secret else "")
        or (f"Vulnerable dependency: {package}" if package else "Security alert")
    )


def _branch(ref: str) -> str:
    return ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else ""


def _wiki(said: _Said) -> list[SourceEvent]:
    return [
        SourceEvent(
            event_type="page.created" if part(page, "action") == "created" else "page.updated",
            title=words(page, "title") or words(page, "page_name"),
            content=part(page, "summary"),
            external_id=identity(
                said.resource and said.resource.id, "wiki", part(page, "page_name"),
                part(page, "sha"),
            ),
            resource=said.resource,
            author=said.sender,
            url=part(page, "html_url"),
        )
        for page in parts(said.body, "pages")
    ]  # fmt: skip


def _other(said: _Said) -> SourceEvent:
    """Anything else: renamed repositories, new members, milestones, packages."""
    noun = said.name or "event"
    item = part(said.body, noun)
    named = next(
        (found for key in ("title", "full_name", "name", "login") if (found := words(item, key))),
        said.resource.name if said.resource else "",
    )
    told = f"{noun} {said.action}".replace("_", " ").strip().capitalize()
    return other(
        said.resource, f"{noun}.{said.action}" if said.action else noun,
        said.body, title=f"{told}: {named}" if named else told,
        author=said.sender, url=part(item, "html_url"),
    )  # fmt: skip


READERS: Mapping[str, Callable[[_Said], list[SourceEvent]]] = {
    "push": _push,
    "create": _ref,
    "delete": _ref,
    "pull_request": _pull_request,
    "issues": _issue,
    "pull_request_review": _review,
    "pull_request_review_comment": _comment,
    "issue_comment": _comment,
    "commit_comment": _comment,
    "discussion_comment": _comment,
    "discussion": _discussion,
    "release": _release,
    "workflow_run": _workflow_run,
    "check_suite": _check_suite,
    "status": _status,
    "deployment_status": _deployment_status,
    "code_scanning_alert": _alert,
    "dependabot_alert": _alert,
    "secret_scanning_alert": _alert,
    "repository_vulnerability_alert": _alert,
    "gollum": _wiki,
}
