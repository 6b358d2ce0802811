"""What Vercel sends, as events: deployments that succeeded, failed, were promoted or rolled back.

Pure. The one rule: the meta data of a deployment tells its commit, whatever forge that is in.

Not told: deployments that only began, were cancelled, or wait for checks.
"""

from typing import Any

from tasks.lines import set_of
from tasks.sources.body import identity, part, words
from tasks.sources.event import Delivery, Resource, SourceEvent
from tasks.sources.forge import deployment, other, sha_of

VERBS = {
    "deployment.succeeded": "succeeded", "deployment.ready": "succeeded",
    "deployment.error": "failed", "deployment.checks.failed": "failed",
    "deployment.promoted": "promoted", "deployment.rollback": "rolled_back",
    "deployment-ready": "succeeded", "deployment-error": "failed",
}  # fmt: skip
UNTOLD = set_of(
    "deployment deployment.created deployment.canceled deployment-canceled deployment.cleanup "
    "deployment.check-rerequested deployment-check-rerequested deployment.integration.action.start "
    "deployment.integration.action.cancel deployment.integration.action.cleanup "
    "deployment.checks.succeeded deployment-prepared deployment-checks-completed"
)
FORGES = ("github", "gitlab", "bitbucket")


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery."""
    body, kind = delivery.body, words(delivery.body, "type")
    payload = part(body, "payload")
    resource = resource_of(payload)
    if kind in UNTOLD:
        return []
    verb = VERBS.get(kind)
    if verb is None:
        told = kind.replace(".", " ").replace("-", " ").capitalize() or "Vercel event"
        title = f"{told}: {resource.name}" if resource else told
        return [other(resource, kind, body, title=title, author="")]
    return [_deployment(body, payload, resource, verb)]


def resource_of(payload: Any) -> Resource | None:
    """The project; its id stays when it is renamed."""
    name = words(payload, "project", "name") or words(payload, "deployment", "name")
    name = name or words(payload, "name")
    key = words(payload, "project", "id") or words(payload, "projectId") or name
    return Resource(key, name or key, "project") if key else None


def _deployment(body: Any, payload: Any, resource: Resource | None, verb: str) -> SourceEvent:
    deployed = part(payload, "deployment")
    meta = part(deployed, "meta") or part(payload, "meta")

    def told(name: str) -> Any:
        return next((v for forge in FORGES if (v := part(meta, f"{forge}{name}"))), None)

    host = words(deployed, "url") or words(payload, "url")
    environment = words(payload, "target") or words(deployed, "target") or "preview"
    # One deployment succeeds and is ready: two deliveries of one fact.
    key = identity("deployment", part(deployed, "id") or part(payload, "deploymentId"), verb)
    return deployment(
        resource, verb, what=resource.name if resource else host,
        environment=environment if verb not in ("promoted", "rolled_back") else "production",
        external_id=key, branch=words(told("CommitRef")), sha=sha_of(told("CommitSha")),
        message=told("CommitMessage"),
        author=words(told("CommitAuthorName")) or words(told("CommitAuthorLogin")),
        url=part(payload, "links", "deployment") or (f"https://{host}" if host else None),
        at=part(body, "createdAt"),
    )  # fmt: skip
