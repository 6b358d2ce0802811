"""A server that speaks the REST APIs of Discord and Slack, and does as a script says.

It keeps what it is given, checks it as they document, and answers in their shapes. `script` holds
answers for the next calls, each instead of what would be answered; what was asked is kept.
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message as EmailMessage
from typing import Any
from urllib.parse import parse_qs

import asyncpg
import orjson
from cryptography.fernet import Fernet
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.cipher import Cipher

KEY = Fernet.generate_key().decode()
BOT = "MTE5ODYyMjQ4MzQ3MTkyNTI0OA.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs"  # of Discord's documents
APP = "xoxb-not-a-real-token-this-will-not-work"  # of Slack's
GUILD, OTHER_GUILD = "197038439483310086", "197038439483310087"
GENERAL, NEWS, VOICE, ELSEWHERE = (f"41771983423143{n}" for n in (937, 938, 939, 940))
TALK, SECRET_TALK = "C012AB3CD", "G061EG9T2"


@dataclass(frozen=True)
class Answer:
    """Instead of what would be answered."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    done: bool = False  # but what was asked is done first
    text: str | None = None


@dataclass(frozen=True)
class Asked:
    """One call."""

    path: str
    token: str
    body: Any = None
    files: tuple[tuple[str, str], ...] = ()  # names and contents


def discord_channel(
    channel_id: str, guild_id: str, name: str, kind: int = 0, position: int = 0
) -> dict[str, Any]:
    """As Discord has it, shortened."""
    topic = "24/7 chat about how to gank Mike #2" if name == "general" else None
    return {
        "id": channel_id, "guild_id": guild_id, "name": name, "type": kind,
        "position": position, "permission_overwrites": [], "nsfw": False, "topic": topic,
    }  # fmt: skip


def slack_channel(channel_id: str, name: str, topic: str = "") -> dict[str, Any]:
    """As Slack has it, shortened."""
    return {
        "id": channel_id, "name": name, "is_channel": True, "is_archived": False,
        "is_private": channel_id.startswith("G"), "context_team_id": "T061EG9R6",
        "topic": {"value": topic, "creator": "", "last_set": 0},
    }  # fmt: skip


class ChatServer:
    """One server for both."""

    def __init__(self) -> None:
        self.url = ""
        self.script: list[Answer] = []
        self.asked: list[Asked] = []
        self.headers: dict[str, str] = {}  # that come with every answer of Discord
        self.guilds = {
            GUILD: [
                discord_channel(NEWS, GUILD, "news", 5, position=2),
                discord_channel(GENERAL, GUILD, "general", 0, position=1),
                discord_channel(VOICE, GUILD, "voice", 2),
            ],
            OTHER_GUILD: [discord_channel(ELSEWHERE, OTHER_GUILD, "elsewhere")],
        }
        self.talks = [
            slack_channel(TALK, "general", "Company-wide announcements"),
            slack_channel(SECRET_TALK, "plans"),
        ]
        self.scopes = {"channels:read", "groups:read", "chat:write", "files:write"}
        self.messages: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.app = Starlette(
            routes=[
                Route("/api/v10/{path:path}", self._discord, methods=["GET", "POST"]),
                Route("/api/{method}", self._slack, methods=["POST"]),
                Route("/upload/{file_id}", self._upload, methods=["POST"]),
            ]
        )

    def paths(self) -> list[str]:
        """What was asked for, in order."""
        return [each.path for each in self.asked]

    async def _scripted(
        self, handle: Callable[[], Awaitable[Response]], headers: Mapping[str, str]
    ) -> Response:
        if not self.script:
            answer = await handle()
            answer.headers.update(headers)
            return answer
        planned = self.script.pop(0)
        if planned.done:
            answer = await handle()
        if planned.text is not None:
            answer = PlainTextResponse(planned.text, planned.status)
        elif planned.body is not None or planned.status != 200:
            answer = JSONResponse(planned.body, planned.status)
        elif not planned.done:
            answer = await handle()
        answer.headers.update({**headers, **planned.headers})
        return answer

    # --- Discord ---

    async def _discord(self, request: Request) -> Response:
        body, files = await _read(request)
        path, token = request.path_params["path"], request.headers.get("authorization", "")
        query = f"?{request.url.query}" if request.url.query else ""
        self.asked.append(Asked(f"{request.method} /{path}{query}", token, body, files))
        known = _discord_not_found("Unknown Channel", 10003)

        async def handle() -> Response:
            if token != f"Bot {BOT}":
                return JSONResponse({"message": "401: Unauthorized", "code": 0}, 401)
            match request.method, path.split("/"):
                case "GET", ["users", "@me", "guilds"]:
                    return JSONResponse([{"id": each, "name": "-"} for each in self.guilds])
                case "GET", ["guilds", guild, "channels"] if guild in self.guilds:
                    return JSONResponse(self.guilds[guild])
                case "GET", ["channels", channel] if found := self._channel(channel):
                    return JSONResponse(found)
                case "POST", ["channels", channel, "messages"] if self._channel(channel):
                    return self._create_message(channel, body, files)
            return known

        return await self._scripted(handle, self.headers)

    def _channel(self, channel_id: str) -> dict[str, Any] | None:
        every = [each for channels in self.guilds.values() for each in channels]
        return next((each for each in every if each["id"] == channel_id), None)

    def _create_message(
        self, channel: str, body: dict[str, Any], files: tuple[tuple[str, str], ...]
    ) -> Response:
        content = body.get("content", "")
        if len(content) > 2000 or not (content.strip() or files):
            return JSONResponse({"message": "Invalid Form Body", "code": 50035}, 400)
        assert [each["filename"] for each in body.get("attachments", [])] == [n for n, _ in files]
        assert len(body["nonce"]) <= 25
        same = [m for m in self.messages if body["enforce_nonce"] and m["nonce"] == body["nonce"]]
        if same:
            return JSONResponse(same[0])
        message = {
            "id": str(334385199974967042 + len(self.messages)), "channel_id": channel,
            "content": content, "nonce": body["nonce"], "files": [list(each) for each in files],
            "allowed_mentions": body["allowed_mentions"],
        }  # fmt: skip
        self.messages.append(message)
        return JSONResponse(message)

    # --- Slack ---

    async def _slack(self, request: Request) -> Response:
        body, _ = await _read(request)
        method, token = request.path_params["method"], request.headers.get("authorization", "")
        self.asked.append(Asked(method, token, body))

        async def handle() -> Response:
            if token != f"Bearer {APP}":
                return JSONResponse({"ok": False, "error": "invalid_auth"})
            return JSONResponse(getattr(self, "_" + method.replace(".", "_"))(body))

        return await self._scripted(handle, {})

    def _conversations_list(self, body: dict[str, str]) -> dict[str, Any]:
        kinds = body["types"].split(",")
        if "private_channel" in kinds and "groups:read" not in self.scopes:
            return {"ok": False, "error": "missing_scope", "needed": "groups:read"}
        every = [t for t in self.talks if not t["is_private"] or "private_channel" in kinds]
        start = int(body["cursor"].removeprefix("page:") or 0)
        more = start + 1 < len(every)  # pages of one
        cursor = f"page:{start + 1}" if more else ""
        page = every[start : start + 1]
        return {"ok": True, "channels": page, "response_metadata": {"next_cursor": cursor}}

    def _conversations_info(self, body: dict[str, str]) -> dict[str, Any]:
        found = next((t for t in self.talks if t["id"] == body["channel"]), None)
        return {"ok": True, "channel": found} if found else _not_found()

    def _chat_postMessage(self, body: dict[str, Any]) -> dict[str, Any]:
        ts = f"1503435956.{len(self.messages):06}"
        self.messages.append(body | {"ts": ts})
        return {"ok": True, "channel": body["channel"], "ts": ts, "message": {"text": body["text"]}}

    def _files_getUploadURLExternal(self, body: dict[str, str]) -> dict[str, Any]:
        file_id = f"F123ABC{len(self.uploads):03}"
        self.uploads[file_id] = b""
        return {"ok": True, "upload_url": f"{self.url}/upload/{file_id}", "file_id": file_id}

    async def _upload(self, request: Request) -> Response:
        content = await request.body()
        self.asked.append(Asked("upload", request.headers.get("authorization", "")))

        async def handle() -> Response:
            self.uploads[request.path_params["file_id"]] = content
            return PlainTextResponse(f"OK - {len(content)}")

        return await self._scripted(handle, {})

    def _files_completeUploadExternal(self, body: dict[str, Any]) -> dict[str, Any]:
        [file] = body["files"]
        content = self.uploads[file["id"]].decode()
        self.messages.append({**body, "content": content})
        return {"ok": True, "files": [{"id": file["id"], "title": file["title"]}]}


async def _read(request: Request) -> tuple[Any, tuple[tuple[str, str], ...]]:
    raw, kind = await request.body(), request.headers.get("content-type", "")
    if kind.startswith("application/json"):
        return orjson.loads(raw), ()
    if kind.startswith("application/x-www-form-urlencoded"):
        fields = parse_qs(raw.decode(), keep_blank_values=True)
        return {name: values[0] for name, values in fields.items()}, ()
    if not kind.startswith("multipart/form-data"):
        return None, ()
    parts = message_from_bytes(b"Content-Type: %s\r\n\r\n%s" % (kind.encode(), raw)).get_payload()
    body: Any = None
    files: list[tuple[str, str]] = []
    assert isinstance(parts, list)
    for part in parts:
        assert isinstance(part, EmailMessage)
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        name = part.get_param("name", header="content-disposition")
        if name == "payload_json":
            body = orjson.loads(content)
        else:
            assert name == f"files[{len(files)}]"
            files.append((part.get_filename() or "", content.decode()))
    return body, tuple(files)


def _discord_not_found(message: str, code: int) -> Response:
    return JSONResponse({"message": message, "code": code}, 404)


def _not_found() -> dict[str, Any]:
    return {"ok": False, "error": "channel_not_found"}


def chat_settings(chat: "ChatServer") -> dict[str, Any]:
    """How an API finds the server, and decrypts the tokens of `connect`."""
    return {
        "secret_keys": (KEY,),
        "discord_url": f"{chat.url}/api/v10",
        "slack_url": f"{chat.url}/api",
    }


async def connect(
    sql: asyncpg.Connection,
    user_id: str,
    source: str,
    *,
    token: str | None = None,
    workspace_id: str | None = None,
    organization_id: str | None = None,
) -> str:
    """An integration with a token; its id."""
    integration_id = await sql.fetchval(
        "insert into integrations (source, user_id, organization_id, workspace_id, workspace_name)"
        " values ($1, $2, $3, $4, 'acme') returning id",
        source, user_id, organization_id, workspace_id,
    )  # fmt: skip
    await sql.execute(
        "insert into integration_secrets (integration_id, name, value) values ($1, 'token', $2)",
        integration_id,
        Cipher((KEY,)).encrypt(token or {"discord": BOT, "slack": APP}[source]),
    )
    return str(integration_id)


def unknown_channel() -> str:
    """One that nobody has."""
    return str(10**17 + secrets.randbelow(10**17))
