"""What sends activity by itself, which project it goes to, and what waits for one.

It hides encryption and who may do what: the user's own integrations, and those of an organization,
which its admins change and its members see. The one rule: a secret comes back once, when it is
made, and a token never.
"""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app.auth import visible_project
from app.cipher import Cipher
from app.db import Database
from app.errors import InvalidRequest, NotFound
from app.schemas import (
    IntegrationChange,
    IntegrationRequest,
    IntegrationRotation,
    ProjectQuery,
    ResourcesRequest,
    ScopeRequest,
)
from app.sources import new_secret, sender
from app.wire import decode, is_id, json_response, known_id, not_found, path_id, query

PULLED = 200  # events that a statement stores of those that have waited
PULL_FOR = 5.0  # seconds that a request stores such events; the sweep does the rest
TIMEOUT = 8.0  # seconds; what stores or removes many rows takes longer than other statements
REMOVED = 5_000  # rows that a statement removes of each table

_SECRET_HEADERS = {"Cache-Control": "no-store"}


async def create_integration(request: Request) -> Response:
    """Connect a source; the secret that verifies what it sends is shown this once."""
    body = await decode(request, IntegrationRequest)
    for name in ("project_id", "organization_id"):
        if (given := getattr(body, name)) is not None:
            known_id(given, name)
    cipher = _cipher(request)
    secret = body.secret or (new_secret() if sender(body.source).makes_secret else None)
    async with _database(request).transaction() as connection:
        integration_id = await connection.value(
            "create_integration",
            request.state.user_id,
            body.organization_id,
            body.source,
            body.workspace_id,
            body.workspace_name,
            body.project_id,
            secret and cipher.encrypt(secret),
            body.token and cipher.encrypt(body.token),
        )
        row = await connection.row("read_integration", request.state.user_id, integration_id)
    return _with_secret(request, row, secret, status=201)


async def list_integrations(request: Request) -> Response:
    """What is connected: the caller's own and their organizations', or what reaches a project."""
    asked = query(request, ProjectQuery)
    if asked.project_id is not None:
        await visible_project(request, asked.project_id)
    rows = await _database(request).rows(
        "list_integrations", request.state.user_id, asked.project_id
    )
    return json_response({"integrations": [_shown(request, row) for row in rows]})


async def update_integration(request: Request) -> Response:
    """Rename, disable or enable, send new resources to another project, or give a token."""
    integration_id = path_id(request, "integration_id")
    body = await decode(request, IntegrationChange)
    changes = body.model_dump(include=body.model_fields_set)
    if body.project_id is not None:
        known_id(body.project_id, "project_id")
    token = changes.pop("token", None)
    async with _database(request).transaction() as connection:
        user_id = request.state.user_id
        await connection.value(
            "update_integration",
            user_id,
            integration_id,
            changes | ({"token": True} if "token" in body.model_fields_set else {}),
            token and _cipher(request).encrypt(token),
        )
        row = await connection.row("read_integration", user_id, integration_id)
    return json_response({"integration": _shown(request, row)})


async def rotate_integration(request: Request) -> Response:
    """Give it a new secret; for 24 hours the old one is good as well.

    A source that makes the secret itself needs it sent here. One that brings it with its first
    request is to be connected anew: until then what it sends is refused.
    """
    integration_id = path_id(request, "integration_id")
    body = await decode(request, IntegrationRotation)
    database, user_id = _database(request), request.state.user_id
    row = await database.row("read_integration", user_id, integration_id)
    if row is None:
        raise not_found("integration_id")
    secret = body.secret or rotated_secret(row["source"])
    async with database.transaction() as connection:
        await connection.value(
            "rotate_integration",
            user_id,
            integration_id,
            secret and _cipher(request).encrypt(secret),
        )
        row = await connection.row("read_integration", user_id, integration_id)
    return _with_secret(request, row, secret, status=200)


async def delete_integration(request: Request) -> Response:
    """Forget an integration, its secrets, its resources and what waits; events of projects stay."""
    integration_id = path_id(request, "integration_id")
    gone = False
    while not gone:
        async with _database(request).transaction() as connection:
            await connection.value("allow_time", f"{TIMEOUT - 1:.0f}s")
            gone = await connection.value(
                "delete_integration",
                request.state.user_id,
                integration_id,
                REMOVED,
                timeout=TIMEOUT,
            )
    return Response(status_code=204)


async def list_untracked(request: Request) -> Response:
    """Resources that have no project and had events in the last 14 days, the newest first."""
    rows = await _database(request).rows("list_untracked", request.state.user_id)
    return json_response([dict(row) for row in rows])


async def list_resources(request: Request) -> Response:
    """The repositories, channels and boards whose events become events of the project."""
    project_id = await visible_project(request, request.path_params["project_id"])
    return await _resources(request, project_id)


async def set_resources(request: Request) -> Response:
    """Say which resources the project has, all of them.

    What new ones sent in the last 14 days comes in. Those that it has no more leave their events,
    and what they send from then on waits for another project.
    """
    project_id = path_id(request, "project_id")
    body = await decode(request, ResourcesRequest)
    for index, each in enumerate(body.resources):
        if not is_id(each.integration_id):
            raise NotFound(
                f"resources[{index}].integration_id: no integration with this id is visible to"
                " this key."
            )
    database = _database(request)
    async with database.transaction() as connection:
        await connection.value("allow_time", f"{TIMEOUT - 1:.0f}s")
        await connection.value(
            "set_resources",
            request.state.user_id,
            project_id,
            [each.integration_id for each in body.resources],
            [each.resource_id for each in body.resources],
            [each.source for each in body.resources],
            timeout=TIMEOUT,
        )
    await _pull(database, project_id)
    return await _resources(request, project_id)


async def read_scope(request: Request) -> Response:
    """The saved scope of a project: what a request means that names neither sources nor filters."""
    project_id = await visible_project(request, request.path_params["project_id"])
    scope = await _database(request).value("read_scope", project_id)
    return json_response({"scope": scope})


async def set_scope(request: Request) -> Response:
    """Save what a request means that names neither sources nor filters; without both: all."""
    project_id = path_id(request, "project_id")
    body = await decode(request, ScopeRequest)
    scope = await _database(request).value(
        "set_scope",
        request.state.user_id,
        project_id,
        body.sources,
        body.model_dump(include={"filters"}, exclude_none=True).get("filters"),
    )
    return json_response({"scope": scope})


def rotated_secret(source: str) -> str | None:
    """The secret that an integration gets when nobody gives one; None: the source brings it.

    Raises:
        InvalidRequest: somebody has to, because the source makes it.
    """
    made_by = sender(source).secret_from
    if made_by == "source":
        raise InvalidRequest(f"secret: {source} makes it; send the one that its settings show.")
    return new_secret() if made_by == "baton" else None


async def _pull(database: Database, project_id: str) -> None:
    """Store what has waited for the project, batch after batch."""
    until = time.monotonic() + PULL_FOR
    taken: int | None = 0
    while taken is not None and time.monotonic() < until:
        async with database.transaction() as connection:
            await connection.value("allow_time", f"{TIMEOUT - 1:.0f}s")
            taken = await connection.value("pull_events", project_id, PULLED, timeout=TIMEOUT)


async def _resources(request: Request, project_id: str) -> Response:
    rows = await _database(request).rows("list_resources", project_id)
    return json_response({"resources": [dict(row) for row in rows]})


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _cipher(request: Request) -> Cipher:
    cipher: Cipher = request.app.state.cipher
    return cipher


def _shown(request: Request, row: Any) -> dict[str, Any]:
    return {**row, "url": request.app.state.settings.hook_url(row["id"])}


def _with_secret(request: Request, row: Any, secret: str | None, status: int) -> Response:
    return json_response(
        {
            "integration": _shown(request, row),
            "secret": secret,
            "advice": sender(row["source"]).advice,
        },
        status,
        _SECRET_HEADERS,
    )
