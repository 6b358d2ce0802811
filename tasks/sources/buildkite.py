"""What Buildkite sends, as events: builds that ended, and jobs that failed.

Pure. The one rule: a build tells what came of a commit, so a job is told only when it failed.

Not told: builds that are scheduled, running, blocked or cancelled, and those that passed on another
branch than the pipeline's default one.
"""

from typing import Any

from tasks.lines import set_of
from tasks.sources.body import facts, identity, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent
from tasks.sources.forge import build, number_of, other, sha_of

UNTOLD = set_of(
    "ping build.scheduled build.running build.failing build.skipped job.scheduled job.started "
    "job.activated agent.connected agent.disconnected agent.stopping agent.stopped "
    "agent.lost"
)


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; none for a ping and for what has not ended."""
    body = delivery.body
    name = words(body, "event") or words(delivery.headers.get("x-buildkite-event"))
    if name in UNTOLD:
        return []
    resource = resource_of(body)
    if name == "build.finished":
        return _build(body, resource)
    if name == "job.finished":
        return _job(body, resource)
    told = name.replace(".", " ").replace("_", " ").capitalize() or "Buildkite event"
    title = f"{told}: {resource.name}" if resource else told
    return [other(resource, name, body, title=title, author="")]


def resource_of(body: Any) -> Resource | None:
    """The pipeline, by its organization and slug as its address has them."""
    pipeline = part(body, "pipeline")
    slug = words(pipeline, "slug")
    if not slug:
        return None
    organization = words(pipeline, "url").partition("/organizations/")[2].partition("/")[0]
    if not organization:  # https://buildkite.com/my-org/my-pipeline
        organization = "".join(words(pipeline, "web_url").split("/")[3:4])
    full = f"{organization}/{slug}".strip("/")
    name = words(pipeline, "name") or slug
    return Resource(full, name, "pipeline", part(pipeline, "default_branch"))


def _build(body: Any, resource: Resource | None) -> list[SourceEvent]:
    run = part(body, "build")
    state, branch = words(run, "state"), words(run, "branch")
    default = resource and resource.default_branch
    passed = (
        state == "passed" and branch == (default or "main") and part(run, "blocked") is not True
    )
    if state != "failed" and not passed:
        return []
    number = number_of(run, "number")
    name = f"{resource.name if resource else 'Build'} #{number or '?'}"
    return [_ended(body, resource, run, passed, name, identity("build", part(run, "id"), state))]


def _job(body: Any, resource: Resource | None) -> list[SourceEvent]:
    job, run = part(body, "job"), part(body, "build")
    state = words(job, "state")
    broken = state in ("failed", "timed_out", "broken") or part(job, "passed") is False
    if state in ("canceled", "skipped") or not broken or part(job, "soft_failed") is True:
        return []
    name = words(job, "name") or words(job, "step_key") or "Job"
    key = identity("job", part(job, "id"))
    return [_ended(body, resource, run, False, name, key, job=job)]


def _ended(
    body: Any,
    resource: Resource | None,
    run: Any,
    passed: bool,
    name: str,
    external_id: str,
    *,
    job: Any = None,
) -> SourceEvent:
    item = job or run
    return build(
        resource, passed, name=name, noun="job" if job else "build", external_id=external_id,
        branch=words(run, "branch"), sha=sha_of(run, "commit"), message=part(run, "message"),
        author=words(run, "author", "name") or words(run, "creator", "name"),
        url=part(item, "web_url"), at=part(item, "finished_at"),
        more=facts(number=number_of(run, "number"), exit_status=number_of(job, "exit_status")),
    )  # fmt: skip
