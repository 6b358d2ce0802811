"""Who is told how jobs end: endpoints of a project, their secrets, the log of deliveries.

It hides nothing but who may do what: an owner or admin of the project changes, whoever sees the
project looks. The one rule: a secret is answered when it is made and by the two routes of a
project's own secret, and nowhere else. Sending is the worker's (tasks/delivery.py).
"""

import re
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from app.auth import visible_project
from app.db import Database
from app.errors import InvalidRequest
from app.schemas import DeliveriesQuery, ProjectQuery, WebhookChange, WebhookRequest
from app.wire import decode, json_response, known_id, not_found, path_id, query

REPLAYED_AFTER = 2  # seconds after which the attempt is usually in the log

_DELIVERY_ID = re.compile(r"msg_[0-9a-f]{32}", re.ASCII)
_SECRET_HEADERS = {"Cache-Control": "no-store"}


async def create_webhook(request: Request) -> Response:
    """Register a URL; its secret is shown this once."""
    body = await decode(request, WebhookRequest)
    project_id = known_id(body.project_id, "project_id")
    row = await _database(request).row(
        "create_webhook", request.state.user_id, project_id, body.url, body.types
    )
    assert row
    return _with_secret(row, status=201)


async def list_webhooks(request: Request) -> Response:
    """The registered URLs of a project, or of all that the key may see."""
    asked = query(request, ProjectQuery)
    if asked.project_id is not None:
        await visible_project(request, asked.project_id)
    rows = await _database(request).rows("list_webhooks", request.state.user_id, asked.project_id)
    return json_response({"webhooks": [dict(row) for row in rows]})


async def update_webhook(request: Request) -> Response:
    """Enable or disable, move to another URL, subscribe to other types."""
    webhook_id = path_id(request, "webhook_id")
    body = await decode(request, WebhookChange)
    row = await _database(request).row(
        "update_webhook", request.state.user_id, webhook_id, body.enabled, body.url, body.types
    )
    assert row
    return json_response({"webhook": dict(row)})


async def rotate_webhook(request: Request) -> Response:
    """Make a new secret; for 24 hours the old one signs as well."""
    webhook_id = path_id(request, "webhook_id")
    row = await _database(request).row("rotate_webhook", request.state.user_id, webhook_id)
    assert row
    return _with_secret(row, status=200)


async def delete_webhook(request: Request) -> Response:
    """Forget a URL, what waits for it and its log."""
    webhook_id = path_id(request, "webhook_id")
    await _database(request).value("delete_webhook", request.state.user_id, webhook_id)
    return Response(status_code=204)


async def read_webhook_secret(request: Request) -> Response:
    """The secret that signs what is sent to `job.webhook_url`."""
    project_id = path_id(request, "project_id")
    secret = await _database(request).value(
        "read_webhook_secret", request.state.user_id, project_id
    )
    return json_response({"secret": secret}, headers=_SECRET_HEADERS)


async def rotate_webhook_secret(request: Request) -> Response:
    """Make a new secret for `job.webhook_url`; for 24 hours the old one signs as well."""
    project_id = path_id(request, "project_id")
    secret = await _database(request).value(
        "rotate_webhook_secret", request.state.user_id, project_id
    )
    return json_response({"secret": secret}, headers=_SECRET_HEADERS)


async def list_deliveries(request: Request) -> Response:
    """Messages of a job, a webhook or a project with every attempt, newest first."""
    asked = query(request, DeliveriesQuery)
    given = asked.model_dump(include={"job_id", "webhook_id", "project_id"}, exclude_none=True)
    if len(given) != 1:
        raise InvalidRequest("project_id: give exactly one of job_id, webhook_id and project_id.")
    [(name, value)] = given.items()
    known_id(value, name)
    ids = [given.get(each) for each in ("project_id", "job_id", "webhook_id")]
    database, user_id = _database(request), request.state.user_id
    if not await database.value("sees_deliveries", user_id, *ids):
        raise not_found(name)
    rows = await database.rows("list_deliveries", user_id, *ids, asked.limit)
    return json_response({"deliveries": [dict(row) for row in rows]})


async def replay_delivery(request: Request) -> Response:
    """Send a message once more, under the same id; the schedule starts anew."""
    delivery_id = request.path_params["delivery_id"]
    if not _DELIVERY_ID.fullmatch(delivery_id):
        raise not_found("delivery_id")
    row = await _database(request).row("replay_delivery", request.state.user_id, delivery_id)
    assert row
    where = f"/api/v1/webhooks/deliveries?job_id={row['job_id']}"
    headers = {"Location": where, "Retry-After": str(REPLAYED_AFTER)}
    return json_response({"delivery": dict(row)}, status=202, headers=headers)


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _with_secret(row: asyncpg.Record, status: int) -> Response:
    webhook: dict[str, Any] = dict(row)
    secret = webhook.pop("secret")
    return json_response({"webhook": webhook, "secret": secret}, status, _SECRET_HEADERS)
