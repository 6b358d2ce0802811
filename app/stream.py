"""The log of a job: as JSON for those who ask, as Server-Sent Events for those who follow.

Both read the same rows of `job_events`, so they cannot tell different stories. The one rule: a
stream is pulled, event by event, from the log; a reader that is slow or gone holds up nobody, and
whoever comes back with the id of the last event that arrived has missed nothing.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.auth import missing_job
from app.db import DatabaseError
from app.errors import ApiError, InvalidRequest
from app.limits import wait_slot
from app.schemas import JobEventsQuery
from app.waits import Hub
from app.wire import json_response, path_id, query, render

PAGE = 500  # events that are read at once
KEEP_ALIVE = 15.0  # seconds of silence after which a comment keeps proxies from hanging up
RECONNECT = 2000  # milliseconds until a browser comes back
SEND_TIMEOUT = 20.0  # seconds for a client to take what is there; then it is cut off
SSE = "text/event-stream"
_HEADERS = {"Cache-Control": "no-store", "Vary": "Accept, Authorization"}


async def read_events(request: Request) -> Response:
    """The course of a job: what changed after `after`, oldest first."""
    job_id = path_id(request, "job_id")
    after = _last_event_id(request, query(request, JobEventsQuery).after)
    streamed = request.method == "GET" and _wants_stream(request)
    log = await _read(request, job_id, after)
    if not streamed:
        return json_response({"events": log.events, "done": log.done}, headers=_HEADERS)
    if log.done and not log.events:  # tells a browser to stop coming back
        return Response(status_code=204, headers=_HEADERS)
    return _EventStream(request, job_id, after)


class _EventStream(Response):
    """Sends the events of a job until it has ended, the client has gone or the process stops."""

    def __init__(self, request: Request, job_id: str, after: int) -> None:
        super().__init__(media_type=SSE, headers={**_HEADERS, "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._job_id = job_id
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, then chunk by chunk."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with wait_slot(self._request), aclosing(self._chunks()) as chunks:
            await send(start)
            async for chunk in chunks:
                async with asyncio.timeout(SEND_TIMEOUT):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[bytes]:
        hub: Hub = self._request.app.state.hub
        after = self._after
        with hub.watching(self._request, [self._job_id]) as watch:
            yield b"retry: %d\n\n" % RECONNECT
            while True:
                try:
                    async with hub.turn:
                        log = await _read(self._request, self._job_id, after)
                except (ApiError, DatabaseError):  # whoever comes back is told why, or the rest
                    return
                for event in log.events:
                    after = event["seq"]
                    yield _frame(event)
                if log.done:
                    return
                if log.more:
                    continue
                while not await watch.changed({self._job_id: log.rev}, KEEP_ALIVE):
                    if not watch.alive:
                        return
                    yield b": ka\n\n"


@dataclass(frozen=True, slots=True)
class _Log:
    """A page of the log of a job whose rev was `rev`."""

    events: list[dict[str, Any]]
    rev: int
    ended: bool

    @property
    def more(self) -> bool:
        """Is there more to read already?"""
        return len(self.events) == PAGE

    @property
    def done(self) -> bool:
        """Will nothing ever come after this?"""
        return self.ended and not self.more


async def _read(request: Request, job_id: str, after: int) -> _Log:
    rows = await request.app.state.database.rows(
        "read_job_events", request.state.user_id, job_id, after, PAGE
    )
    if not rows:
        raise await missing_job(request, job_id)
    events = [
        {"seq": row["seq"], "type": row["type"], "at": row["at"], "data": row["data"]}
        for row in rows
        if row["seq"] is not None
    ]
    return _Log(events, rows[0]["rev"], rows[0]["ended"])


def _frame(event: dict[str, Any]) -> bytes:
    """An event on the wire; JSON has no line break, which would end it early."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (
        event["seq"],
        event["type"].encode(),
        render(event),
    )


def _wants_stream(request: Request) -> bool:
    """Is a stream what the client names first? Who names neither gets JSON."""
    accepted = ",".join(request.headers.getlist("accept")).lower().split(",")
    for media_type in (part.partition(";")[0].strip() for part in accepted):
        if media_type in (SSE, "application/json"):
            return media_type == SSE
    return False


def _last_event_id(request: Request, after: int) -> int:
    """Where a client that comes back stopped reading; `after` when it has not been here."""
    given = request.headers.get("last-event-id", "").strip()
    if not given:
        return after
    if not re.fullmatch("[0-9]{1,15}", given, re.ASCII):
        raise InvalidRequest("Last-Event-ID: must be the id of an event of this stream.")
    return int(given)
