"""Activity in, and out again.

It hides how a batch becomes rows. The one rule: a batch is stored whole or not at all, and the
same external id of the same source and project is stored once.
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app.auth import visible_project
from app.db import Database
from app.errors import InvalidRequest
from app.schemas import BATCH_MAX, EventInput, EventsQuery, EventsRequest
from app.wire import (
    content_type,
    json_response,
    known_id,
    load_json,
    parse,
    query,
    read_body,
    validate,
)

BATCH_LIMIT = 1024 * 1024  # bytes
STORE_TIMEOUT = 8.0  # seconds; a full batch on a slow disk takes longer than other statements
NDJSON = "application/x-ndjson"


async def create_events(request: Request) -> Response:
    """Store a batch of events.

    JSON, or `application/x-ndjson` with one event a line; there the project is the query
    parameter `project_id`, or a `project_id` that all lines share.
    """
    media_type = content_type(request, "application/json", NDJSON)
    raw = await read_body(request, BATCH_LIMIT)
    asked = request.query_params.get("project_id")
    batch = await asyncio.to_thread(_read_batch, raw, media_type, asked)
    accepted, duplicates = await store(
        request.app.state.database,
        request.state.user_id,
        known_id(batch.project_id, "project_id"),
        [event.model_dump(mode="json", exclude_none=True) for event in batch.events],
    )
    return json_response({"accepted": accepted, "duplicates": duplicates})


async def store(
    database: Database, user_id: str, project_id: str, events: list[dict[str, Any]]
) -> tuple[int, int]:
    """Store events; answer how many were new and how many were there already.

    Raises:
        db.NotFound: the user may not see the project.
        db.InvalidRequest: an event names an unknown source; nothing is stored.
    """
    async with database.transaction() as connection:
        await connection.value("allow_time", f"{STORE_TIMEOUT - 1:.0f}s")
        row = await connection.row(
            "ingest_events", user_id, project_id, events, timeout=STORE_TIMEOUT
        )
    assert row is not None
    return row["accepted"], row["duplicates"]


async def list_events(request: Request) -> Response:
    """The newest events that the caller may see."""
    asked = query(request, EventsQuery)
    if asked.project_id is not None:
        await visible_project(request, asked.project_id)
    database: Database = request.app.state.database
    rows = await database.rows(
        "list_events", request.state.user_id, asked.project_id, asked.source, asked.limit
    )
    if not rows and asked.source and not await database.value("has_source", asked.source):
        raise InvalidRequest(f'source: there is no source named "{asked.source}".')
    return json_response({"events": [dict(row) for row in rows]})


def _read_batch(raw: bytes, media_type: str, project_id: str | None) -> EventsRequest:
    if media_type != NDJSON:
        return parse(raw, EventsRequest)
    lines = [line for line in raw.splitlines() if line.strip()]
    if not 1 <= len(lines) <= BATCH_MAX:
        raise InvalidRequest(f"events: send 1 to {BATCH_MAX} lines, one event each.")
    events: list[EventInput] = []
    for index, line in enumerate(lines):
        try:
            value = load_json(line)
        except InvalidRequest as error:
            raise InvalidRequest(f"events[{index}]: {error.sentence}") from None
        if not isinstance(value, dict):
            raise InvalidRequest(f"events[{index}]: must be a JSON object.")
        own = value.pop("project_id", project_id)
        if project_id is None:
            project_id = own if isinstance(own, str) else None
        if own != project_id:
            raise InvalidRequest(f"events[{index}].project_id: must be the same in all lines.")
        events.append(validate(value, EventInput, prefix=f"events[{index}]."))
    if project_id is None:
        raise InvalidRequest("project_id: is required, as a query parameter or in each line.")
    return EventsRequest.model_construct(project_id=project_id, events=events)
