"""One request to a language model, whoever the vendor is: how it may fail, and its bounds.

    Fault              what an SDK, the network or the server said, in the same few words for all
    └── becomes        Retry, GenerationFailed or NoResult (tasks/outcomes.py), by `outcome_of` only

The SDKs do not retry and follow no redirect; no proxy of the environment is used. A server may be
slow, silent, endless or broken: every byte that comes back passes `_Bounded`.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol

import httpx2
import orjson

from tasks.outcomes import GenerationFailed, NoResult, Outcome, Retry
from tasks.prompts import Prompt

CONNECT = 10.0  # seconds to reach the server
WRITE = 30.0  # seconds for a piece of the request to be taken
STALL = (
    30.0  # seconds without a byte in a stream that has begun; before that the attempt's own limit
)
TEXT_MAX = 400_000  # characters of a reply, over ten times what `max_tokens` allows
LINE_MAX = 1 << 20  # bytes of one line of a stream
STREAM_MAX = 32 << 20  # bytes of a stream: each few characters come in an envelope of their own
ERROR_MAX = 64 << 10  # bytes of an error that are read
POOL = 32  # requests in one pool of connections
IDLE_CONNECTIONS = 8  # of a pool, kept open for the next requests
IDLE_FOR = 30.0  # seconds; servers commonly close after 60 or more

Finish = Literal["", "stop", "length", "refusal", "endless"]
Effort = Literal["low", "medium"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to ask of whom."""

    model: str
    prompt: Prompt
    name: str  # of the structure that is wanted
    schema: Mapping[str, Any]  # its JSON Schema
    max_tokens: int  # of the reply
    effort: Effort  # what a model that can think should spend


@dataclass(slots=True, kw_only=True)
class Reply:
    """What has come back so far; an SDK's stream fills it, so that a cut one is known as well."""

    told: Callable[[int], None] = lambda _: None  # called with the characters that came
    status: int | None = None
    request_id: str | None = None
    model: str | None = None  # what the server says it was
    finish: Finish = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    size: int = 0
    _parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The reply."""
        return "".join(self._parts)

    def add(self, text: str) -> None:
        """The next piece.

        Raises:
            Fault: it is longer than any reply could be.
        """
        self.size += len(text)
        if self.size > TEXT_MAX:
            raise Fault("endless")
        self._parts.append(text)
        self.told(len(text))


class Fault(Exception):
    """A request that failed, in words of no vendor.

    Args:
        how: `status` (the server refused), `timeout`, `connection` (no answer, or it broke off),
            `endless` (more than the bounds allow), `foreign` (what answers is no such server).
        status: of HTTP, or what the error inside a stream stands for.
        code: the server's word for it, in lower case.
        message: the server's sentence; it may quote the request, so it is read but never passed on.
        after: seconds that the server asks to wait.
    """

    def __init__(
        self,
        how: Literal["status", "timeout", "connection", "endless", "foreign"],
        *,
        status: int | None = None,
        code: str = "",
        message: str = "",
        after: float | None = None,
    ) -> None:
        super().__init__(how, status, code)
        self.how = how
        self.status = status
        self.code = code.lower()
        self.message = message.lower()
        self.after = after


class Chat(Protocol):
    """A vendor's SDK behind one method."""

    key: str  # the variable with the key
    url: str  # the variable with the address

    async def ask(self, request: Request, reply: Reply) -> None:
        """Fill in the reply while it streams.

        Raises:
            Fault: it failed; the reply holds what came before.
        """
        ...

    def adapt(self, request: Request, fault: Fault) -> bool:
        """Has the server refused something that can be left out? Then leave it out from now on, for
        this model and as long as the process lives; asking again makes sense."""
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


class Traits:
    """What the models have been found not to take, each a word; remembered per model."""

    def __init__(self, words: Mapping[str, tuple[str, ...]]) -> None:
        self._words = words  # what may be left out -> what a refusal of it says
        self._lacks: dict[str, set[str]] = {}

    def lacks(self, model: str, what: str) -> bool:
        """Is it known that the model does not take it?"""
        return what in self._lacks.get(model, ())

    def learn(self, model: str, fault: Fault, sent: tuple[str, ...]) -> bool:
        """Take note of the first of what was sent that the refusal is about."""
        if fault.status not in (400, 422) or does_not_fit(fault):
            return False
        for what in sent:
            if any(word in fault.message for word in self._words[what]):
                self._lacks.setdefault(model, set()).add(what)
                return True
        return False


# --- The error map --------------------------------------------------------------------------

_TOO_LONG = re.compile(
    r"context.?length|context.?window|maximum context|prompt is too long|too many (?:input )?tokens"
    r"|exceeds? .{0,40}context|available context size|input is too long|request_too_large"
)
_NO_MODEL = re.compile(
    r"model_not_found|model[^.]{0,80}(?:not found|does not exist|not available|unknown)"
    r"|(?:unknown|invalid|no such) model"
)
_NO_QUOTA = re.compile(
    r"insufficient_quota|billing|spend_limit_reached|credit balance is too low"
    r"|exceeded your current quota"
)
_PASSING = {408, 409, 425, 429}


def outcome_of(fault: Fault, chat: Chat, *, model: str, named_by: str, window: int) -> Outcome:
    """What a fault means for the job; the sentences are for an operator and quote nobody.

    Args:
        model: that was asked for.
        named_by: the variable that names it.
        window: tokens that a request was allowed to take.
    """
    meta: dict[str, Any] = {"stage": "provider"}
    if fault.status is not None:
        meta["provider_status"] = fault.status
    match fault.how:
        case "timeout":
            return Retry("The provider did not answer in time.", code="timeout", meta=meta)
        case "connection":
            return Retry("The connection to the provider failed or broke off.", meta=meta)
        case "endless":
            return NoResult("The model's answer was far too long.", **meta)
        case "foreign":
            sentence = f"What answers is no server of this kind; check {chat.url}."
            return GenerationFailed(sentence, **meta)
    return _of_status(fault, chat, meta, model=model, named_by=named_by, window=window)


def does_not_fit(fault: Fault) -> bool:
    """Were the request and the room for its answer too large for the model?"""
    told = f"{fault.code} {fault.message}"
    return fault.status == 413 or (fault.status in (400, 422) and bool(_TOO_LONG.search(told)))


def _of_status(
    fault: Fault, chat: Chat, meta: dict[str, Any], *, model: str, named_by: str, window: int
) -> Outcome:
    status, told = fault.status or 500, f"{fault.code} {fault.message}"
    if _NO_QUOTA.search(told) and 400 <= status < 500:
        sentence = (
            f"The provider's account has no quota left ({status}); check its plan and billing."
        )
    elif status in _PASSING or status >= 500:
        what = "limits requests" if status == 429 else "failed or is overloaded"
        return Retry(f"The provider {what} ({status}).", after=fault.after, meta=meta)
    elif does_not_fit(fault):
        sentence = (
            f"The request does not fit the context window of {model} ({status}); set "
            f"BATON_CONTEXT_TOKENS (now {window}) to what the model takes, or name another in "
            f"{named_by}."
        )
    elif status in (401, 403):
        sentence = f"The provider refused the key ({status}); check {chat.key}."
    elif _NO_MODEL.search(told):
        sentence = f"The provider has no model {model!r} ({status}); check {named_by}."
    elif status == 404:
        sentence = (
            f"The provider has no model {model!r} or is elsewhere (404); check {named_by} and "
            f"{chat.url}."
        )
    else:
        sentence = f"The provider refused the request ({status})."
    return GenerationFailed(sentence, **meta)


def fault_of(
    status: int, headers: Mapping[str, str], *, body: object, code: object = None
) -> Fault:
    """The fault that an error of the server stands for.

    Args:
        body: as parsed, or its text; the message and the word for the error are looked for in it.
    """
    inner = body.get("error", body) if isinstance(body, dict) else body
    found = inner if isinstance(inner, dict) else {}
    words = [code, found.get("code"), found.get("type"), found.get("param")]
    told = found.get("message") or (body if isinstance(body, str) else inner)
    return Fault(
        "status",
        status=status,
        code=" ".join(word for word in words if isinstance(word, str))[:500],
        message=f"{found.get('param') or ''} {told}"[:4_000],
        after=retry_after(headers),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: of `retry-after-ms`, or of `retry-after` as seconds or a date."""
    for name, factor in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", text):
            return float(text) * factor
    try:
        when = parsedate_to_datetime(headers.get("retry-after", ""))
        now = headers.get("date")  # the server's own clock, if it tells
        seen = parsedate_to_datetime(now).timestamp() if now else time.time()
    except (TypeError, ValueError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, when.timestamp() - seen)


# --- The connection -------------------------------------------------------------------------


TIMEOUT = httpx2.Timeout(connect=CONNECT, read=None, write=WRITE, pool=None)


def open_http() -> httpx2.AsyncClient:
    """The client that an SDK is given; it has as many connections as there are requests, since the
    worker bounds those."""
    for name in ("httpx2", "httpcore2", "openai", "anthropic"):  # at DEBUG they log what is sent
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx2.AsyncClient(
        transport=_Bounded(),
        timeout=TIMEOUT,
        trust_env=False,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # else a small reply may unpack to a huge one
    )


async def read_stream(
    response: httpx2.Response, reply: Reply, take: Callable[[dict[str, Any], Reply], None]
) -> None:
    """Take the Server-Sent Events of a reply as they come, until one has finished it.

    The SDKs make an object of each event, which costs fifty times as much: with a thousand replies
    at once, each of a thousand events, there is no time for that.

    Raises:
        Fault: it stalls, breaks off, is cut short, or is no stream of the right objects; a reply
            that is finished by then is one all the same.
    """
    rest = b""
    try:
        async for chunk in response.aiter_bytes():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                data = line[5:].strip() if line.startswith(b"data:") else b""
                if data and data != b"[DONE]":
                    take(orjson.loads(data), reply)
    except (httpx2.HTTPError, ValueError, TypeError, KeyError, AttributeError):
        if not reply.finish:
            raise Fault("connection") from None
    except Fault as fault:
        if fault.how == "endless" or not reply.finish:
            raise
    if not reply.finish:
        raise Fault("connection")


class _Bounded(httpx2.AsyncBaseTransport):
    """Bounds what comes back, before anybody collects it.

    A pool of connections looks at all of them for each request, so that a thousand requests at once
    cost it a million looks; several pools of some share that.
    """

    def __init__(self) -> None:
        self._ssl = httpx2.create_ssl_context(trust_env=False)
        self._pools: list[httpx2.AsyncHTTPTransport] = []
        self._busy: list[int] = []  # requests in each pool

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        at = self._room()
        self._busy[at] += 1
        try:
            response = await self._pools[at].handle_async_request(request)
            bounded = self._bounded(response, at)
        except BaseException:
            self._busy[at] -= 1
            raise
        if bounded is None:
            await response.aclose()
            self._busy[at] -= 1
            raise Fault("foreign", status=response.status_code)
        return bounded

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()

    def _room(self) -> int:
        """The first pool with room, so that few requests share few connections."""
        for at, busy in enumerate(self._busy):
            if busy < POOL:
                return at
        self._pools.append(
            httpx2.AsyncHTTPTransport(
                verify=self._ssl,
                trust_env=False,
                limits=httpx2.Limits(
                    max_connections=None,
                    max_keepalive_connections=IDLE_CONNECTIONS,
                    keepalive_expiry=IDLE_FOR,
                ),
            )
        )
        self._busy.append(0)
        return len(self._busy) - 1

    def _bounded(self, response: httpx2.Response, at: int) -> httpx2.Response | None:
        """The response with bounds, or None if it cannot be one."""
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        good = response.status_code == 200
        kind = response.headers.get("content-type", "")
        packed = response.headers.get("content-encoding", "identity") != "identity"
        if packed or (good and not kind.startswith("text/event-stream")):
            return None

        def ended() -> None:
            self._busy[at] -= 1

        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_BoundedStream(response.stream, good, ended),
            extensions=response.extensions,
        )


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(
        self, stream: httpx2.AsyncByteStream, good: bool, ended: Callable[[], None]
    ) -> None:
        self._stream = stream
        self._good = good
        self._ended = ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes, until there are too many: an error's are cut, a reply's are a fault."""
        chunks = aiter(self._stream)
        total = line = 0
        while True:
            try:
                async with asyncio.timeout(STALL):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Fault("timeout") from None
            total += len(chunk)
            end = chunk.rfind(b"\n")
            line = line + len(chunk) if end < 0 else len(chunk) - end - 1
            if not self._good and total > ERROR_MAX:
                return
            if total > STREAM_MAX or line > LINE_MAX:
                raise Fault("endless")
            yield chunk

    async def aclose(self) -> None:
        ended, self._ended = self._ended, lambda: None
        ended()
        await self._stream.aclose()
