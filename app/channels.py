"""Channels of Discord and Slack: what there are, and posting into them.

It hides by which integration a channel is reached. The one rule: a channel is posted into only by
an integration that is the caller's or of one of the caller's organizations, and only if it is of
that integration's server or workspace; this is asked of the service each time.
"""

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app.auth import visible_project
from app.chat import Account, Busy, Channel, Chat, ChatError, Down, Post, Rejected, Service
from app.chat import Forbidden as NotAllowed
from app.cipher import Cipher, CipherError
from app.db import Database
from app.errors import Forbidden, InvalidRequest, NotFound, RateLimited, Unavailable
from app.schemas import PostRequest
from app.wire import decode, json_response, known_id, not_found

log = logging.getLogger("baton.api")

PATIENCE = 12.0  # seconds for all calls that one request needs

_KINDS = {
    "last_correlation": "cross_source_correlation",
    "last_onboarding": "onboarding_brief",
    "last_architecture": "architecture_insight",
    "last_release_notes": "release_notes",
}


async def list_discord_channels(request: Request) -> Response:
    """The text channels of the connected Discord servers."""
    return await _list(request, "discord")


async def send_to_discord(request: Request) -> Response:
    """Post a text, or an artifact as a file, into a channel of Discord."""
    return await _send(request, "discord")


async def list_slack_channels(request: Request) -> Response:
    """The channels of the connected Slack workspaces: public ones, and those that the app is in."""
    return await _list(request, "slack")


async def send_to_slack(request: Request) -> Response:
    """Post a text, or an artifact as a file, into a channel of Slack."""
    return await _send(request, "slack")


@dataclass(frozen=True, slots=True)
class _Way:
    """An integration by which the caller may post."""

    integration_id: str
    account: Account


async def _list(request: Request, source: str) -> Response:
    service, ways = await _ways(request, source)
    found: dict[str, Channel] = {}
    refused: ChatError | None = None
    try:
        async with asyncio.timeout(PATIENCE):
            for way in ways:
                try:
                    found |= {each.id: each for each in await service.channels(way.account)}
                except NotAllowed as error:  # the others are shown all the same
                    refused = error
    except (ChatError, TimeoutError) as error:
        raise _as_api_error(error, service) from None
    if refused and not found:
        raise _as_api_error(refused, service)
    return json_response({
        "channels": [{"id": c.id, "name": c.name, "topic": c.topic} for c in found.values()]
    })  # fmt: skip


async def _send(request: Request, source: str) -> Response:
    body = await decode(request, PostRequest)
    post = await _post(request, body)
    service, ways = await _ways(request, source)
    try:
        async with asyncio.timeout(PATIENCE):
            way = await _reaches(service, ways, body.channel_id)
            message_id = await service.post(way.account, body.channel_id, post)
    except (ChatError, TimeoutError) as error:
        raise _as_api_error(error, service) from None
    log.info("posted", extra={"source": source, "integration_id": way.integration_id})
    return json_response({"ok": True, "message_id": message_id})


async def reach(request: Request, source: str, channel_id: str) -> str:
    """The integration by which the caller may post into a channel.

    Raises:
        errors.Forbidden: there is none.
        errors.RateLimited, errors.Unavailable: nobody knows right now.
    """
    service, ways = await _ways(request, source)
    try:
        async with asyncio.timeout(PATIENCE):
            return (await _reaches(service, ways, channel_id)).integration_id
    except (ChatError, TimeoutError) as error:
        raise _as_api_error(error, service) from None


async def _ways(request: Request, source: str) -> tuple[Service, list[_Way]]:
    chat: Chat = request.app.state.chat
    cipher: Cipher = request.app.state.cipher
    service = chat[source]
    rows = await _database(request).rows("chat_accounts", request.state.user_id, source)
    if not rows:
        raise Forbidden(f"{service.name} is not connected; connect it with a token first.")
    try:
        return service, [
            _Way(row["integration_id"], Account(cipher.decrypt(row["token"]), row["workspace_id"]))
            for row in rows
        ]
    except CipherError as error:
        log.error("token not decrypted", extra={"cause": str(error)})
        raise Unavailable("This server cannot use the tokens of integrations right now.") from None


async def _reaches(service: Service, ways: list[_Way], channel_id: str) -> _Way:
    refused: ChatError | None = None
    for way in ways:
        try:
            if await service.has(way.account, channel_id):
                return way
        except NotAllowed as error:
            refused = error
    raise refused or NotAllowed("channel_id: no connected integration has this channel.")


async def _post(request: Request, body: PostRequest) -> Post:
    """What is to be posted; only what the caller may see."""
    given = (body.content, body.handoff_id, body.insight_id, body.artifact)
    if sum(each is not None for each in given) != 1:
        raise InvalidRequest(
            "content: give exactly one of content, handoff_id, insight_id and artifact."
        )
    if (body.project_id is None) is not (body.artifact is None):
        raise InvalidRequest("project_id: is required with artifact, and goes with nothing else.")
    if body.content is not None:
        return Post(text=body.content)
    row = await _artifact(request, body)
    return Post(title=row["title"], markdown=row["markdown"])


async def _artifact(request: Request, body: PostRequest) -> Any:
    database, user_id = _database(request), request.state.user_id
    if body.artifact is not None:
        assert body.project_id is not None
        project_id = await visible_project(request, body.project_id)
        if body.artifact == "last_handoff":
            rows = await database.rows("list_handoffs", user_id, project_id, "active", 1)
        else:
            kind = _KINDS[body.artifact]
            rows = await database.rows("list_insights", user_id, project_id, kind, "active", 1)
        if not rows:
            raise NotFound("artifact: the project has none of this kind yet.")
        return rows[0]
    name = "handoff_id" if body.handoff_id is not None else "insight_id"
    ids = [known_id(body.handoff_id or body.insight_id or "", name)]
    row = await database.row(f"read_{name.removesuffix('_id')}", user_id, ids)
    if row is None:
        raise not_found(name)
    return row


def _as_api_error(error: Exception, service: Service) -> Exception:
    match error:
        case NotAllowed():
            return Forbidden(str(error))
        case Rejected():
            return InvalidRequest(str(error))
        case Busy():
            seconds = math.ceil(error.retry_after)
            return RateLimited(f"{service.name} takes no more for now", [service.name], seconds)
        case Down():
            return Unavailable(str(error))
    return Unavailable(f"{service.name} is too slow right now. Try again shortly.")


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database
