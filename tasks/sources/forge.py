"""What the mappings of code forges and of build services share: commits, tags, builds.

Pure. The one rule: an identity that lacks a piece is none at all, so two facts never become one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.sources.body import facts, fingerprint, identity, part
from tasks.sources.event import Resource, SourceEvent, line, text

FILES_MAX = 50  # paths kept of one commit, as of one that is imported
LABELS_MAX = 20
MERGE = re.compile(r"Merge(?:d in| pull request #| branch | remote-tracking branch )")
URGENT = re.compile(
    r"(?:priority|prio|severity|urgency)\W{1,3}(critical|urgent|blocker|highest|high|major|medium"
    r"|minor|low|lowest|p?\d)(?:\W.*)?|(p[0-4])",
    re.I,
)
SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def number_of(value: Any, *path: str | int) -> int | None:
    """The whole number at a path."""
    found = part(value, *path)
    return found if type(found) is int else None


def numbered(resource: Resource | None, number: int | None, *pieces: object) -> str:
    """An external id such as `acme/web#12:review:991`."""
    if resource is None or number is None:
        return ""
    return identity(f"{resource.id}#{number}", *pieces)


def labels_of(values: Iterable[Any], key: str) -> list[str]:
    """The names of labels, whose sources call them differently."""
    found = (line(part(value, key), 100) for value in values)
    return [name for name in found if name][:LABELS_MAX]


def priority_of(labels: Iterable[str]) -> str | None:
    """The priority that a label such as `P1` or `priority: high` gives."""
    for label in labels:
        if found := URGENT.fullmatch(label):
            return (found[1] or found[2]).casefold()
    return None


def sha_of(value: Any, *path: str | int) -> str | None:
    """The full id of a commit at a path; the zeros of a ref that is new or gone are none."""
    found = part(value, *path)
    known = isinstance(found, str) and SHA.fullmatch(found) and found.strip("0")
    return found if known else None


def commit(
    resource: Resource | None,
    sha: str | None,
    message: Any,
    *,
    branch: str,
    author: str,
    url: Any,
    at: Any,
    files: Iterable[Any] = (),
) -> SourceEvent:
    """A commit, or the merge that its message says it is, as `baton import git` has them."""
    subject, _, rest = (text(message) or "(no message)").partition("\n")
    paths = [path for path in (line(value) for value in files) if path]
    touched = facts(files=paths[:FILES_MAX], files_changed=len(paths) or None)
    return SourceEvent(
        event_type="merge" if MERGE.match(subject) else "commit",
        title=subject,
        content=rest,
        external_id=sha or "",
        resource=resource,
        branch=branch,
        author=author,
        url=url,
        occurred_at=at,
        metadata=facts(sha=sha) | touched,
    )


def tag(
    resource: Resource | None, name: str, *, sha: str | None, author: str, url: Any, at: Any
) -> SourceEvent:
    """A tag that was made; type and id are those of `baton import git`."""
    return SourceEvent(
        event_type="tag",
        title=name,
        external_id=identity("tag", resource and resource.id, name),
        resource=resource,
        author=author,
        url=url,
        occurred_at=at,
        metadata=facts(tag=name, sha=sha),
    )


def ref_event(resource: Resource | None, kind: str, name: str, verb: str, author: str) -> Any:
    """A branch that came or went, or a tag that went: once per name, as no source says when."""
    noun = "branch" if kind == "branch" else "ref"  # a `tag` would be read as a release
    return SourceEvent(
        event_type=f"{noun}.{verb}",
        title=f"{kind.capitalize()} {name} {verb}",
        external_id=identity(resource and resource.id, f"{kind}.{verb}", name),
        resource=resource,
        branch=name if kind == "branch" else None,
        author=author,
    )


def build(
    resource: Resource | None,
    passed: bool,
    *,
    name: str,
    external_id: str,
    branch: str = "",
    sha: str | None = None,
    message: Any = None,
    author: str = "",
    url: Any = None,
    at: Any = None,
    noun: str = "build",
    more: Mapping[str, Any] | None = None,
) -> SourceEvent:
    """A build, or one job of it, that ended; `sha` ties it to the commit that it is of."""
    where = f" on {branch}" if branch else ""
    subject = (text(message) or "").partition("\n")[0]
    return SourceEvent(
        event_type=f"{noun}.{'succeeded' if passed else 'failed'}",
        title=f"{name} {'passed' if passed else 'failed'}{where}",
        content=f"{(sha or '')[:7]} {subject}".strip(),
        external_id=external_id,
        resource=resource,
        branch=branch,
        author=author,
        url=url,
        occurred_at=at,
        metadata=facts(sha=sha) | dict(more or {}),
    )


def deployment(
    resource: Resource | None,
    verb: str,
    *,
    what: str,
    environment: str,
    external_id: str,
    branch: str = "",
    sha: str | None = None,
    message: Any = None,
    author: str = "",
    url: Any = None,
    at: Any = None,
) -> SourceEvent:
    """A deployment that ended; `verb` is one of succeeded, failed, promoted, rolled_back."""
    titles = {
        "succeeded": "Deployed {} to {}",
        "failed": "Deployment of {} to {} failed",
        "promoted": "Promoted {} to {}",
        "rolled_back": "Rolled {} back in {}",
    }
    subject = (text(message) or "").partition("\n")[0]
    return SourceEvent(
        event_type=f"deployment.{verb}",
        title=titles[verb].format(what, environment or "production"),
        content=f"{(sha or '')[:7]} {subject}".strip(),
        external_id=external_id,
        resource=resource,
        branch=branch,
        author=author,
        url=url,
        occurred_at=at,
        metadata=facts(sha=sha, environment=environment),
    )


def other(
    resource: Resource | None, name: str, body: Any, *, title: str, author: str, url: Any = None
) -> SourceEvent:
    """Anything else that a source tells, under the source's own name for it."""
    return SourceEvent(
        event_type=name or "event",
        title=title,
        external_id=fingerprint(body),
        resource=resource,
        author=author,
        url=url,
    )
