"""What happened in a project, period by period, and when that is written.

A digest is an insight that a schedule asks for. The one rule: whoever sees the project reads its
digests, and only an owner or admin says when they are written. Which period is due is decided in
schema.sql; writing and sending are the worker's.
"""

from starlette.requests import Request
from starlette.responses import Response

from app.auth import visible_project
from app.channels import reach
from app.db import Database
from app.schemas import DigestScheduleRequest, DigestsQuery
from app.wire import decode, json_response, path_id, query


async def list_digests(request: Request) -> Response:
    """Digests of a project, newest first."""
    asked = query(request, DigestsQuery)
    project_id = await visible_project(request, request.path_params["project_id"])
    rows = await _database(request).rows(
        "list_digests", request.state.user_id, project_id, asked.limit
    )
    return json_response({"digests": [dict(row) for row in rows]})


async def read_digest_schedule(request: Request) -> Response:
    """When the digests of a project are written."""
    project_id = await visible_project(request, request.path_params["project_id"])
    row = await _database(request).row("read_digest_schedule", request.state.user_id, project_id)
    return json_response({"digest_schedule": dict(row) if row else None})


async def set_digest_schedule(request: Request) -> Response:
    """Set when the digests of a project are written, or change it."""
    project_id = path_id(request, "project_id")
    body = await decode(request, DigestScheduleRequest)
    deliver = [
        {
            "integration_id": await reach(request, each.to, each.channel_id),
            "channel_id": each.channel_id,
        }
        for each in body.deliver
    ]
    await _database(request).row(
        "set_digest_schedule",
        request.state.user_id,
        project_id,
        body.cron,
        body.time_zone,
        deliver,
    )
    return await read_digest_schedule(request)


async def delete_digest_schedule(request: Request) -> Response:
    """Write no more digests of a project; those that are there stay."""
    project_id = path_id(request, "project_id")
    await _database(request).value("delete_digest_schedule", request.state.user_id, project_id)
    return Response(status_code=204)


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database
