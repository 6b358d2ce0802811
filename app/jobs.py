"""Asking for an artifact, and reading the job that makes it: the heart of Baton.

It hides how a request becomes a job. The one rule: a 202 is sent only after one transaction has
stored the job and its ticket, and what a client reads is always the row, never a memory of it.
"""

from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app.db import Database
from app.schemas import (
    ArchitectureRequest,
    ArtifactRequest,
    CorrelationRequest,
    HandoffRequest,
    OnboardingRequest,
    ReleaseNotesRequest,
    ScopedRequest,
)
from app.wire import decode, json_response, known_id, not_found, path_id

POLL_AFTER = 2  # seconds that clients are told to wait between polls


async def create_handoff(request: Request) -> Response:
    """Ask for a handoff."""
    body = await decode(request, HandoffRequest)
    project_id = known_id(body.project_id, "project_id")
    return await _submit(request, "handoff", project_id, body, body.sources)


async def create_correlation(request: Request) -> Response:
    """Ask which activity in different sources belongs together."""
    return await _create_insight(request, "cross_source_correlation", CorrelationRequest)


async def create_onboarding(request: Request) -> Response:
    """Ask for a brief for a new member."""
    return await _create_insight(request, "onboarding_brief", OnboardingRequest)


async def create_architecture(request: Request) -> Response:
    """Ask how the system is built and where it is moving."""
    return await _create_insight(request, "architecture_insight", ArchitectureRequest)


async def create_release_notes(request: Request) -> Response:
    """Ask for release notes, or for the description of a pull request."""
    project_id = path_id(request, "project_id")
    body = await decode(request, ReleaseNotesRequest)
    return await _submit(request, "release_notes", project_id, body, [body.source])


async def read_job(request: Request) -> Response:
    """A job, with its artifact once it is completed."""
    database: Database = request.app.state.database
    user_id = request.state.user_id
    job = await database.row("read_job", user_id, path_id(request, "job_id"))
    if job is None:
        raise not_found("job_id")
    result = None
    if job["result_kind"] is not None:
        name = "read_handoff" if job["result_kind"] == "handoff" else "read_insight"
        result = await database.row(name, user_id, job["result_id"])
    return json_response(
        {"job": dict(job), "result": dict(result) if result else None},
        headers=_headers(done=job["status"] in ("completed", "failed")),
    )


async def _create_insight(request: Request, kind: str, model: type[ScopedRequest]) -> Response:
    project_id = path_id(request, "project_id")
    body = await decode(request, model)
    return await _submit(request, kind, project_id, body, body.sources)


async def _submit(
    request: Request,
    kind: str,
    project_id: str,
    body: ArtifactRequest,
    sources: list[str] | None,
) -> Response:
    job_id = await submit(
        request.app.state.database,
        user_id=request.state.user_id,
        project_id=project_id,
        kind=kind,
        sources=sources,
        body=body,
    )
    request.app.state.bell.ring()
    return json_response(
        {"jobId": job_id, "status": "pending"},
        status=202,
        headers={"Location": f"/api/v1/jobs/{job_id}", **_headers(done=False)},
    )


async def submit(
    database: Database,
    *,
    user_id: str,
    project_id: str,
    kind: str,
    sources: list[str] | None,
    body: ArtifactRequest,
) -> str:
    """Store a job and its ticket in one transaction; answer the job's id.

    Raises:
        db.NotFound: the user may not see the project.
        db.InvalidRequest: the scope is wrong; the sentence names the field.
    """
    filters = body.model_dump(include={"filters"}, exclude_none=True).get("filters")
    until: datetime | None = body.until
    options: dict[str, Any] = body.model_dump(mode="json", exclude=_SCOPE_FIELDS, exclude_none=True)
    job = await database.row(
        "submit_job", user_id, project_id, kind, sources, filters, until, options
    )
    assert job is not None
    return str(job["id"])


# What every request has; whatever else a request type has are the options of its kind.
_SCOPE_FIELDS = {"project_id", "sources", "source", "filters", "until", "job"}


def _headers(*, done: bool) -> dict[str, str]:
    """A job's state must not be cached, and until it has ended a client is told when to ask."""
    headers = {"Cache-Control": "no-store"}
    if not done:
        headers["Retry-After"] = str(POLL_AFTER)
    return headers
