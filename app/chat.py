"""Lists the channels of Discord and Slack, and posts into them, by the REST API of each.

It hides how each names things, what may be asked how often, and what may be asked once more. The
rules: a text pings nobody; what may have been posted is posted again only where the service itself
keeps the two apart; no token and no text is in a message or a log.
"""

import asyncio
import hashlib
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from app.settings import Settings

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 3  # of one call
PAUSE = 3.0  # seconds that are waited for a limit at most; who waits longer is told for how long
BACKOFF = 0.25  # seconds before what failed is tried again, then twice that
CALL_TIMEOUT = 6.0  # seconds for one call
RETRY_AFTER = 5  # seconds, when nobody says how long
PAGES = 10  # of a list
KNOWN = 10_000  # limits that are known at once

_TOKEN = re.compile(r"[\x21-\x7e]+", re.ASCII)


class ChatError(Exception):
    """It was not done. The sentence is for whoever asked."""


class Forbidden(ChatError):
    """The service does not let this token do it; it will not the next time."""


class Rejected(ChatError):
    """The service does not take this message."""


class Busy(ChatError):
    """Too much has been asked of the service.

    Args:
        retry_after: seconds.
    """

    def __init__(self, sentence: str, retry_after: float) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class Down(ChatError):
    """The service does not answer, or says that it cannot. What was to be posted may have been."""


@dataclass(frozen=True, slots=True)
class Account:
    """With what a service is called, and which part of it is meant."""

    token: str = field(repr=False)
    workspace_id: str | None = None  # a guild or a team; None: all that the token sees


@dataclass(frozen=True, slots=True)
class Channel:
    """Where one can post."""

    id: str
    name: str
    topic: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What is posted: a text, a file, or both."""

    text: str | None = field(default=None, repr=False)
    title: str | None = None  # of the file, which is named after it
    markdown: str | None = field(default=None, repr=False)  # what is in the file
    nonce: str | None = None  # 25 characters at most; the same when it is posted once more

    @property
    def filename(self) -> str:
        """Letters, digits and dashes of the title, and `.md`."""
        words = re.sub(r"[^\w.]+", "-", self.title or "").strip("-._")[:80].rstrip("-.")
        return f"{words or 'baton'}.md"


@dataclass(slots=True)
class _Bucket:
    """What a service lets one token do of one kind, as it last said."""

    left: int = 1
    until: float = 0.0  # of the monotonic clock; after it, more is left


class _Limits:
    """Which calls have to wait. Calls with one key share what is left."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, ...], _Bucket] = {}
        self._shared: dict[tuple[str, str], str] = {}  # token and route -> what Discord calls them

    def wait(self, token: str, route: str, major: str) -> float:
        """Seconds until a call may be made; at 0 it counts as made."""
        now = time.monotonic()
        bucket = self._buckets.get(self._key(token, route, major), _Bucket())
        everything = self._buckets.get((token,), _Bucket())
        waits = [each.until - now for each in (bucket, everything) if each.left <= 0]
        if waits and max(waits) > 0:
            return max(waits)
        bucket.left -= 1
        return 0.0

    def told(self, token: str, route: str, major: str, headers: Mapping[str, str]) -> None:
        """Take in what came with an answer."""
        if name := headers.get("x-ratelimit-bucket"):
            self._shared[token, route] = name
        with suppress(KeyError, ValueError):
            left = int(headers["x-ratelimit-remaining"])
            until = time.monotonic() + float(headers["x-ratelimit-reset-after"])
            self._keep(self._key(token, route, major), _Bucket(left, until))

    def hold(self, token: str, route: str, major: str, seconds: float, everything: bool) -> None:
        """Make no such call for so long, or none at all."""
        key = (token,) if everything else self._key(token, route, major)
        self._keep(key, _Bucket(0, time.monotonic() + seconds))

    def _key(self, token: str, route: str, major: str) -> tuple[str, ...]:
        return token, self._shared.get((token, route), route), major

    def _keep(self, key: tuple[str, ...], bucket: _Bucket) -> None:
        if len(self._buckets) >= KNOWN:
            now = time.monotonic()
            self._buckets = {k: b for k, b in self._buckets.items() if b.until > now}
            self._shared.clear()
        self._buckets[key] = bucket


class Service(ABC):
    """One of the two; what they have in common is how it is called."""

    name: str

    def __init__(self, url: str, clients: "Clients") -> None:
        self._url = url.rstrip("/")
        self._clients = clients
        self._limits = _Limits()

    @abstractmethod
    async def channels(self, account: Account) -> list[Channel]:
        """The channels that can be posted into.

        Raises:
            ChatError
        """

    @abstractmethod
    async def has(self, account: Account, channel_id: str) -> bool:
        """Is this channel of the account's workspace, and does its token see it?

        Raises:
            ChatError: nobody knows.
        """

    @abstractmethod
    async def post(self, account: Account, channel_id: str, post: Post) -> str:
        """Post into a channel; the id of the message. Ask `has` first.

        Raises:
            ChatError
        """

    async def _call(
        self,
        method: str,
        path: str,
        account: Account,
        *,
        route: str,
        major: str = "",
        scheme: str = "Bearer",
        repeat: bool = True,
        **what: Any,
    ) -> "httpx.Response":
        """Call, as often as is right; the first answer that says more than "later".

        Args:
            route, major: what shares a limit.
            repeat: may it be done twice? What surely was not done is asked again anyway.
        """
        if not _TOKEN.fullmatch(account.token):
            raise self._refused()
        token = hashlib.sha256(account.token.encode()).hexdigest()
        headers = {"Authorization": f"{scheme} {account.token}"}
        for attempt in range(ATTEMPTS):
            while pause := self._limits.wait(token, route, major):
                await self._pause(pause)
            last = attempt == ATTEMPTS - 1
            response = await self._send(
                method, f"{self._url}{path}", repeat and not last, last, headers=headers, **what
            )
            if response is not None:
                self._limits.told(token, route, major, response.headers)
                if response.status_code == 429:
                    seconds, everything = _told_to_wait(response)
                    self._limits.hold(token, route, major, seconds, everything)
                    if last:
                        raise self._busy(seconds)
                    continue
                if response.status_code < 500 or last or not repeat:
                    return self._up(response)
            await asyncio.sleep(BACKOFF * 2**attempt)
        raise AssertionError  # the last attempt has returned or raised

    async def _send(
        self, method: str, url: str, repeat: bool, last: bool, **what: Any
    ) -> "httpx.Response | None":
        """One call; None when it failed and may be made again."""
        import httpx

        try:
            return await self._clients.get().request(method, url, **what)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            if last:
                raise self._down() from None
        except httpx.HTTPError:
            if not repeat:
                raise self._down() from None
        return None

    def _up(self, response: "httpx.Response") -> "httpx.Response":
        if response.status_code >= 500:
            raise self._down()
        return response

    async def _pause(self, seconds: float) -> None:
        if seconds > PAUSE:
            raise self._busy(seconds)
        await asyncio.sleep(seconds)

    def _busy(self, seconds: float) -> Busy:
        return Busy(f"{self.name} takes no more for now. Try again later.", seconds)

    def _down(self) -> Down:
        return Down(f"{self.name} does not answer right now. Try again shortly.")

    def _refused(self) -> Forbidden:
        return Forbidden(f"{self.name} refuses the token of this integration.")


def _told_to_wait(response: "httpx.Response") -> tuple[float, bool]:
    """For how many seconds, and whether that is for all calls."""
    body = _object(response)
    try:
        seconds = float(body.get("retry_after") or response.headers.get("retry-after", ""))
    except (TypeError, ValueError):
        seconds = RETRY_AFTER
    everything = body.get("global") is True or "x-ratelimit-global" in response.headers
    return max(seconds, 0.05), everything


def _object(response: "httpx.Response") -> dict[str, Any]:
    """The JSON object of an answer; empty when it is none."""
    with suppress(orjson.JSONDecodeError):
        value = orjson.loads(response.content)
        if isinstance(value, dict):
            return value
    return {}


# --- Discord: https://docs.discord.com/developers/reference -----------------------------------


class Discord(Service):
    """By a bot. A workspace is a guild."""

    name = "Discord"
    _POSTED_INTO = (0, 5)  # types: text, announcements
    _ID = re.compile(r"[0-9]{15,20}", re.ASCII)

    async def channels(self, account: Account) -> list[Channel]:
        """Text channels of the guild, or of all guilds that the bot is in; in Discord's order."""
        guilds = [account.workspace_id] if account.workspace_id else await self._guilds(account)
        found = []
        for guild in guilds:
            rows = None
            if self._ID.fullmatch(guild):
                path = f"/guilds/{guild}/channels"
                rows = await self._get(account, path, "/guilds/channels", guild)
            if rows is None:
                raise Forbidden("Discord has no such server for this bot; invite it there first.")
            rows = [row for row in rows if row.get("type") in self._POSTED_INTO]
            rows.sort(key=lambda row: (row.get("position", 0), int(row["id"])))
            found += [Channel(row["id"], row["name"], row.get("topic")) for row in rows]
        return found

    async def has(self, account: Account, channel_id: str) -> bool:
        """Is it of the guild, or of any guild? A conversation with one person is of none."""
        if not self._ID.fullmatch(channel_id):
            return False
        row = await self._get(account, f"/channels/{channel_id}", "/channels", channel_id)
        guild = row.get("guild_id") if isinstance(row, dict) else None
        return bool(guild) and account.workspace_id in (None, guild)

    async def post(self, account: Account, channel_id: str, post: Post) -> str:
        """Post once: Discord knows the same nonce again for some minutes."""
        body: dict[str, Any] = {
            "allowed_mentions": {"parse": []},
            "nonce": post.nonce or secrets.token_hex(12),
            "enforce_nonce": True,
        }
        if post.text is not None:
            body["content"] = post.text
        what: dict[str, Any] = {"json": body}
        if post.markdown is not None:
            body["attachments"] = [{"id": 0, "filename": post.filename}]
            file = (post.filename, post.markdown.encode(), "text/markdown; charset=utf-8")
            what = {
                "data": {"payload_json": orjson.dumps(body).decode()},
                "files": {"files[0]": file},
            }
        path = f"/channels/{channel_id}/messages"
        response = await self._call(
            "POST", path, account, route="POST /messages", major=channel_id, scheme="Bot", **what
        )
        if response.status_code in (403, 404):
            raise Forbidden("Discord does not let this bot post into this channel.")
        return str(self._checked(response)["id"])

    async def _guilds(self, account: Account) -> list[str]:
        found: list[str] = []
        for _ in range(PAGES):
            after = f"&after={found[-1]}" if found else ""
            path = f"/users/@me/guilds?limit=200{after}"
            rows = await self._get(account, path, "/users/@me/guilds", "") or []
            found += [row["id"] for row in rows]
            if len(rows) < 200:
                break
        return found

    async def _get(self, account: Account, path: str, route: str, major: str) -> Any:
        """What is there; None when it is not there, or not for this bot."""
        response = await self._call(
            "GET", path, account, route=f"GET {route}", major=major, scheme="Bot"
        )
        if response.status_code in (403, 404):
            return None
        return self._checked(response)

    def _checked(self, response: "httpx.Response") -> Any:
        if response.status_code == 401:
            raise self._refused()
        if response.status_code >= 300:
            raise Rejected("Discord does not take this message.")
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise self._down() from None


# --- Slack: https://docs.slack.dev/apis/web-api -----------------------------------------------


class Slack(Service):
    """By an app with a bot token. A workspace is a team, and the token is of one."""

    name = "Slack"
    _ID = re.compile(r"[CG][A-Z0-9]{6,20}", re.ASCII)
    _NOT_HERE = frozenset({"channel_not_found", "not_in_channel", "is_archived"})
    _NOT_THIS_TOKEN = frozenset({
        *("invalid_auth", "not_authed", "account_inactive", "token_revoked", "token_expired"),
        *("no_permission", "missing_scope", "not_allowed_token_type", "org_login_required"),
        *("ekm_access_denied", "access_denied", "team_access_not_granted", "restricted_action"),
    })  # fmt: skip
    _LATER = frozenset({"internal_error", "service_unavailable", "fatal_error", "request_timeout"})

    async def channels(self, account: Account) -> list[Channel]:
        """Public channels, and private ones that the app is in."""
        kinds = "public_channel,private_channel"
        found: list[Channel] = []
        cursor = ""
        for _ in range(PAGES):
            asked = {"types": kinds, "exclude_archived": "true", "limit": "1000", "cursor": cursor}
            body = await self._ask(account, "conversations.list", data=asked)
            if body.get("error") == "missing_scope" and "," in kinds:  # those that it may see
                kinds = "public_channel"
                continue
            self._check(body)
            found += [
                Channel(row["id"], row["name"], (row.get("topic") or {}).get("value") or None)
                for row in body["channels"]
            ]
            cursor = (body.get("response_metadata") or {}).get("next_cursor") or ""
            if not cursor:
                break
        return found

    async def has(self, account: Account, channel_id: str) -> bool:
        """Does the app see it, in its own workspace?"""
        if not self._ID.fullmatch(channel_id):
            return False
        body = await self._ask(account, "conversations.info", data={"channel": channel_id})
        if body.get("error") in self._NOT_HERE:
            return False
        self._check(body)
        team = body["channel"].get("context_team_id")
        return account.workspace_id is None or team in (None, account.workspace_id)

    async def post(self, account: Account, channel_id: str, post: Post) -> str:
        """Post. Slack keeps no two apart, so what may have been posted is not posted again."""
        text = post.text and _plain(post.text)
        if post.markdown is not None:
            return await self._upload(account, channel_id, post, text)
        body = {"channel": channel_id, "text": text, "unfurl_links": False, "unfurl_media": False}
        answer = await self._ask(
            account, "chat.postMessage", major=channel_id, repeat=False, json=body
        )
        self._check(answer)
        return str(answer["ts"])

    async def _upload(self, account: Account, channel_id: str, post: Post, text: str | None) -> str:
        content = (post.markdown or "").encode()
        asked = {"filename": post.filename, "length": str(len(content))}
        place = await self._ask(account, "files.getUploadURLExternal", data=asked)
        self._check(place)
        await self._put(place["upload_url"], content)
        body: dict[str, Any] = {
            "files": [{"id": place["file_id"], "title": post.title or post.filename}],
            "channel_id": channel_id,
        }
        if text:
            body["initial_comment"] = text
        answer = await self._ask(account, "files.completeUploadExternal", repeat=False, json=body)
        self._check(answer)
        return _shared_as(answer, channel_id) or str(place["file_id"])

    async def _put(self, url: str, content: bytes) -> None:
        """Send a file where Slack wants it; nothing but the address proves that it may be sent."""
        here, there = urlsplit(self._url), urlsplit(url)
        ours = (there.scheme, there.netloc) == (here.scheme, here.netloc)
        if not (ours or there.scheme == "https" and (there.hostname or "").endswith(".slack.com")):
            raise self._down()
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            response = await self._send("POST", url, not last, last, content=content)
            if response is not None and (response.status_code < 500 or last):
                if response.status_code != 200:
                    raise self._down()
                return
            await asyncio.sleep(BACKOFF * 2**attempt)

    async def _ask(
        self, account: Account, method: str, *, major: str = "", repeat: bool = True, **what: Any
    ) -> dict[str, Any]:
        response = await self._call(
            "POST", f"/{method}", account, route=method, major=major, repeat=repeat, **what
        )
        body = _object(response)
        if not isinstance(body.get("ok"), bool):
            raise self._down()
        return body

    def _check(self, body: dict[str, Any]) -> None:
        if body["ok"]:
            return
        error = body.get("error")
        if error in self._NOT_THIS_TOKEN:
            raise self._refused()
        if error in self._NOT_HERE:
            raise Forbidden("Slack does not let this app post into this channel; invite it there.")
        if error == "ratelimited":
            raise self._busy(RETRY_AFTER)
        if error in self._LATER:
            raise self._down()
        raise Rejected("Slack does not take this message.")


def _plain(text: str) -> str:
    """Text in which nothing is a mention or a link of Slack's: those are in angle brackets."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _shared_as(answer: dict[str, Any], channel_id: str) -> str | None:
    """The message that a file was shared with, if Slack has made it already."""
    for file in answer.get("files") or ():
        for channels in (file.get("shares") or {}).values():
            for share in channels.get(channel_id) or ():
                return str(share["ts"])
    return None


# --- Both -------------------------------------------------------------------------------------


class Clients:
    """One HTTP client for a process, made when it is first used: most processes never do."""

    def __init__(self) -> None:
        self._made: httpx.AsyncClient | None = None

    def get(self) -> "httpx.AsyncClient":
        """The client."""
        if self._made is None:
            import httpx

            self._made = httpx.AsyncClient(timeout=CALL_TIMEOUT)
        return self._made

    async def close(self) -> None:
        """Close its connections."""
        if self._made is not None:
            await self._made.aclose()


class Chat:
    """The services by the name of their source: `discord`, `slack`. One for a process."""

    def __init__(self, settings: Settings) -> None:
        self._clients = Clients()
        self._services: Mapping[str, Service] = {
            "discord": Discord(settings.discord_url, self._clients),
            "slack": Slack(settings.slack_url, self._clients),
        }

    def __getitem__(self, source: str) -> Service:
        return self._services[source]

    async def close(self) -> None:
        """Close all connections."""
        await self._clients.close()
