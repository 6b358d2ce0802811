"""Servers that speak OpenAI's Chat Completions and Anthropic's Messages, and do as a script says.

Real HTTP and real Server-Sent Events, for the vendors' own SDKs. A script is a list of turns, one
for each request; the last is for all that come after. What was asked is kept.

Run as `python -m tests.llm_servers PORT SECONDS`, it answers each request after that long.
"""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "sk-test-canary-key"
SAYS_IT_IS = "scripted-model-2026-11-24"  # whatever was asked for
USAGE = (1234, 56)  # tokens of the prompt and of the answer, as the server counts


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a server does with one request."""

    text: str | None = None  # None: a good answer about the events that were shown
    finish: str = "stop"  # stop, length, refusal
    usage: tuple[int, int] | None = USAGE
    piece: int = 40  # characters of a piece
    wait: float = 0.0  # seconds before the first byte
    pause: float = 0.0  # seconds between pieces
    hang: bool = False  # never answers
    stall: bool = False  # after the first piece never another byte
    close: bool = False  # after the first piece the connection breaks
    end: bool = False  # after the first piece the stream ends as if it were whole
    flood: int = 0  # bytes of one line without an end
    status: int = 200
    error: dict[str, Any] | None = None  # the body of an error; inside the stream with status 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # instead of a stream


GOOD = Turn()


class Server:
    """One scripted server for both vendors."""

    def __init__(self, *script: Turn) -> None:
        self.script = list(script) or [GOOD]
        self.asked: list[dict[str, Any]] = []  # the bodies
        self.headers: list[dict[str, str]] = []
        self.inside = self.peak = 0
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._openai, methods=["POST"]),
                Route("/v1/messages", self._anthropic, methods=["POST"]),
                Route("/v1/models", self._models),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if KEY not in str(dict(request.headers)):
            return JSONResponse({"error": {"message": "no"}}, 401)
        return JSONResponse({"data": [{"id": SAYS_IT_IS}]})

    async def _openai(self, request: Request) -> Response:
        return await self._answer(request, openai_events, "x-request-id")

    async def _anthropic(self, request: Request) -> Response:
        return await self._answer(request, anthropic_events, "request-id")

    async def _answer(self, request: Request, events: Any, request_id: str) -> Response:
        body = orjson.loads(await request.body())
        turn = self.script[min(len(self.asked), len(self.script) - 1)]
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        while turn.hang and (await request.receive())["type"] != "http.disconnect":
            pass
        headers = {request_id: f"req-{len(self.asked)}", **turn.headers}
        if turn.status != 200:
            return JSONResponse(turn.error or {}, turn.status, headers)
        if turn.body is not None:
            return Response(turn.body, headers=headers, media_type="text/html")
        stream = self._stream(turn, events(turn, body))
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    async def _stream(self, turn: Turn, events: list[bytes]) -> AsyncIterator[bytes]:
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            await asyncio.sleep(turn.wait)
            for sent in range(0, turn.flood, 1 << 16):
                yield (b"data: " if not sent else b"") + b"x" * (1 << 16)
            for event in events:
                yield event
                await asyncio.sleep(turn.pause)
            if turn.stall:
                await asyncio.Event().wait()
            if turn.close:
                raise ConnectionResetError
        finally:
            self.inside -= 1


def good_answer(kind: str, shown: list[str]) -> dict[str, Any]:
    """An answer of a kind's shape that cites what was shown."""
    said = {"text": "The cache was switched to an LRU.", "event_ids": shown[:3]}
    named = {"name": "Cache", **said}
    lists: dict[str, Any] = {
        "handoff": {
            name: [said] for name in ("key_changes", "decisions", "open_questions", "next_steps")
        },
        "cross_source_correlation": {
            "correlations": [
                {"title": "Cache", **said, "references": ["#1"], "sources": ["github"]}
            ]
        },
        "onboarding_brief": {
            "areas": [named],
            "key_people": [{**named, "areas": ["cache"]}],
            "decisions": [said],
            "open_questions": [said],
            "first_steps": [said],
        },
        "architecture_insight": {
            "components": [named],
            "changes": [said],
            "decisions": [said],
            "risks": [said],
            "open_questions": [said],
        },
        "release_notes": {
            "version": None,
            "sections": [{"heading": "Changed", "items": [said]}],
            "contributors": [{"name": "Ada", "event_ids": shown[:1]}],
        },
    }
    lists["digest"] = lists["handoff"]
    if kind == "question":
        return {"title": "An LRU cache", "statements": [said]}
    return {"title": "An LRU cache", "summary": said, **lists[kind]}


def kind_of(body: dict[str, Any]) -> str:
    """The kind that a request asks for, wherever it says so."""
    told = orjson.dumps(body).decode()
    for word, kind in (
        ("Write a handoff", "handoff"),
        ("Write a digest", "digest"),
        ("Find activity", "cross_source_correlation"),
        ("Write an onboarding", "onboarding_brief"),
        ("Write an architecture", "architecture_insight"),
        ("Write release notes", "release_notes"),
        ("Answer the question", "question"),
    ):
        if word in told:
            return kind
    raise AssertionError("no kind in what was asked")


def shown_in(body: dict[str, Any]) -> list[str]:
    """The short ids in the data of a request, in order."""
    return list(dict.fromkeys(re.findall(r"\be[0-9]+\b", str(body["messages"][-1]["content"]))))


def _pieces(turn: Turn, body: dict[str, Any]) -> list[str]:
    text = turn.text
    if text is None:
        text = orjson.dumps(good_answer(kind_of(body), shown_in(body))).decode()
    pieces = [text[n : n + turn.piece] for n in range(0, len(text), turn.piece)]
    return pieces[:1] if turn.stall or turn.close or turn.end else pieces


def openai_events(turn: Turn, body: dict[str, Any]) -> list[bytes]:
    """The answer as chunks of a chat completion."""

    def chunk(**fields: Any) -> bytes:
        made = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": SAYS_IT_IS,
            "choices": [],
            **fields,
        }
        return b"data: " + orjson.dumps(made) + b"\n\n"

    def delta(finish: str | None = None, **said: str) -> bytes:
        return chunk(choices=[{"index": 0, "delta": said, "finish_reason": finish}])

    events = [delta(role="assistant")]
    if turn.finish == "refusal":
        events.append(delta(refusal="I cannot help with that."))
    events += [delta(content=piece) for piece in _pieces(turn, body)]
    if turn.error:
        return [*events, b"data: " + orjson.dumps(turn.error) + b"\n\n"]
    if turn.stall or turn.close or turn.end:
        return events
    events.append(delta(finish="length" if turn.finish == "length" else "stop"))
    if turn.usage and "stream_options" in body:
        events.append(
            chunk(
                usage={
                    "prompt_tokens": turn.usage[0],
                    "completion_tokens": turn.usage[1],
                    "total_tokens": sum(turn.usage),
                }
            )
        )
    return [*events, b"data: [DONE]\n\n"]


def anthropic_events(turn: Turn, body: dict[str, Any]) -> list[bytes]:
    """The answer as events of a message: the input of the tool if one is offered, else text."""

    def event(type_: str, **fields: Any) -> bytes:
        made = orjson.dumps({"type": type_, **fields})
        return f"event: {type_}\ndata: ".encode() + made + b"\n\n"

    tool = "tools" in body
    usage = {"input_tokens": turn.usage[0], "output_tokens": 1} if turn.usage else None
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": SAYS_IT_IS,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    block = {"type": "tool_use", "id": "t", "name": "n", "input": {}} if tool else {"type": "text"}
    key, kind = ("partial_json", "input_json_delta") if tool else ("text", "text_delta")
    events = [
        event("message_start", message=message),
        event("ping"),
        event("content_block_start", index=0, content_block={"text": "", **block}),
    ]
    for piece in _pieces(turn, body):
        events.append(event("content_block_delta", index=0, delta={"type": kind, key: piece}))
    if turn.error:
        return [*events, b"event: error\ndata: " + orjson.dumps(turn.error) + b"\n\n"]
    if turn.stall or turn.close or turn.end:
        return events
    reason = {"length": "max_tokens", "refusal": "refusal"}.get(
        turn.finish, "tool_use" if tool else "end_turn"
    )
    counted = {"output_tokens": turn.usage[1]} if turn.usage else None
    return [
        *events,
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=counted),
        event("message_stop"),
    ]


def main(port: int, seconds: float) -> None:
    """Serve until killed; each answer takes `seconds`, its tokens coming evenly."""
    import uvicorn

    pieces = 20
    server = Server(Turn(pause=seconds / pieces, piece=40))
    uvicorn.run(server.app, port=port, log_level="warning", access_log=False, backlog=4096)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
