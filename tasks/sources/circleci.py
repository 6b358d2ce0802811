"""What CircleCI sends, as events: workflows that ended, and jobs that failed.

Pure. The one rule: a workflow tells what came of a commit, so a job is told only when it failed.

Not told: workflows that passed on another branch than `main`, `master` or `trunk`, as CircleCI does
not say which branch is the default one.
"""

from typing import Any

from tasks.sources.body import facts, identity, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent
from tasks.sources.forge import build, number_of, other, sha_of

FAILED = frozenset(("failed", "error", "timedout", "infrastructure_fail", "unauthorized"))
TRUNKS = frozenset(("main", "master", "trunk"))


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery."""
    body = delivery.body
    kind = words(body, "type")
    project = words(body, "project", "name")
    slug = words(body, "project", "slug") or project
    resource = Resource(slug, project or slug, "project") if slug else None
    if kind == "job-completed" or (kind and part(body, "job") and not part(body, "workflow")):
        return _ended(body, resource, "job")
    if kind == "workflow-completed":
        return _ended(body, resource, "workflow")
    if kind in ("ping", ""):
        return [] if kind else [other(resource, "event", body, title="CircleCI event", author="")]
    name = kind.replace("-", ".")
    return [other(resource, name, body, title=f"{kind.replace('-', ' ')}: {project}", author="")]


def _ended(body: Any, resource: Resource | None, noun: str) -> list[SourceEvent]:
    run = part(body, noun)
    status = words(run, "status")
    branch, sha, message, author = _of(part(body, "pipeline"))
    passed = status == "success" and noun == "workflow" and branch in TRUNKS
    if not passed and status not in FAILED:
        return []
    return [
        build(
            resource, passed, name=words(run, "name") or noun.capitalize(),
            noun="build" if noun == "workflow" else "job",
            external_id=identity(noun, part(run, "id"), status), branch=branch, sha=sha,
            message=message, author=author, url=part(body, "workflow", "url"),
            at=part(run, "stopped_at") or part(body, "happened_at"),
            more=facts(pipeline=number_of(body, "pipeline", "number")),
        )
    ]  # fmt: skip


def _of(pipeline: Any) -> tuple[str, str | None, Any, str]:
    """Branch, commit, message and author; where they stand depends on where the code is."""
    vcs, given = part(pipeline, "vcs"), part(pipeline, "trigger_parameters")
    host = part(given, "gitlab") or part(given, "github_app") or part(given, "webhook")
    return (
        words(vcs, "branch") or words(given, "git", "branch") or words(host, "branch"),
        sha_of(vcs, "revision") or sha_of(given, "git", "checkout_sha"),
        part(vcs, "commit", "subject") or part(host, "commit_title"),
        words(vcs, "commit", "author", "name") or words(host, "commit_author_name"),
    )
