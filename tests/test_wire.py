"""Bytes to checked values: whatever is wrong ends in one sentence, soon and cheaply."""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from conftest import served
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import wire
from app.errors import InvalidRequest, NotFound
from app.main import Edge
from app.schemas import CorrelationRequest, EventInput, EventsQuery, HandoffRequest, HandoffsQuery

ID = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
LIMIT = 1000  # bytes, of the route below

# --- Values ---------------------------------------------------------------------------------


def refusal(raw: bytes, model: type[Any] = CorrelationRequest) -> str:
    """The sentence that a body is refused with."""
    with pytest.raises(InvalidRequest) as caught:
        wire.parse(raw, model)
    return caught.value.sentence


@pytest.mark.parametrize("raw", [b"", b"   ", b"\r\n\t"])
def test_an_empty_body_is_called_empty(raw: bytes) -> None:
    assert refusal(raw) == "The body is empty; send a JSON object."


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"1", b"null", b"true"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    assert refusal(raw) == "The body must be a JSON object."


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\x00"}',
        b'{"a":1}{"a":1}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 2000 + b"]" * 2000,
    ],
)
def test_what_is_no_json_is_called_so(raw: bytes) -> None:
    assert refusal(raw).startswith("The body is not valid JSON: ")
    assert len(refusal(raw)) < 200


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"filters":{"github":{"projects":["a","b\\u0000c"]}}}', "filters.github.projects[1]"),
        (b'{"sources":["\\u0000"]}', "sources[0]"),
        (b'{"filters":{"\\u0000":{}}}', "filters"),
        (b'{"\\u0000":1}', "body"),
    ],
)
def test_nul_is_refused_wherever_it_hides(raw: bytes, field: str) -> None:
    assert refusal(raw) == f"{field}: must not contain NUL characters."


def test_the_letters_of_an_escaped_nul_are_no_nul() -> None:
    assert wire.load_json(b'{"a":"C:\\\\u0000"}') == {"a": "C:\\u0000"}


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b'{"maxEvents":0}', "maxEvents: must be greater than or equal to 1."),
        (b'{"maxEvents":"5"}', "maxEvents: must be an integer."),
        (b'{"maxEvents":true}', "maxEvents: must be an integer."),
        (b'{"maxEvents":null}', "maxEvents: must be an integer."),
        (b'{"nope":1}', "nope: is not a known field."),
        (b'{"job":{"nope":1}}', "job.nope: is not a known field."),
        (b'{"filters":{"github":{"nope":[]}}}', "filters.github.nope: is not a known field."),
        (b'{"sources":["github",5]}', "sources[1]: must be a string."),
        (b'{"until":1}', "until: must be an RFC 3339 time such as 2026-11-24T08:00:00Z."),
    ],
)
def test_a_sentence_begins_with_the_field(raw: bytes, sentence: str) -> None:
    assert refusal(raw) == sentence


def test_a_missing_field_is_called_required() -> None:
    assert refusal(b"{}", HandoffRequest) == "project_id: is required."


def test_a_sentence_stays_short_however_long_the_field_is() -> None:
    assert len(refusal(b'{"' + b"n" * 100_000 + b'":1}')) < 300


def test_a_prefix_says_which_of_many_was_wrong() -> None:
    with pytest.raises(InvalidRequest, match=r"^events\[3\]\.event_type: is required\.$"):
        wire.validate({"source": "github"}, EventInput, prefix="events[3].")


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    assert wire.parse(b'{"maxEvents":1,"maxEvents":2}', CorrelationRequest).maxEvents == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("limit=0", "limit: must be greater than or equal to 1."),
        ("limit=abc", "limit: must be an integer."),
        ("source=", "source: must have at least 1 character."),
        ("source=a%00b", "source: must not contain NUL characters."),
    ],
)
def test_query_parameters_are_checked_like_fields(text: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.query(request(text), EventsQuery)
    assert caught.value.sentence == sentence


def test_a_choice_of_words_names_the_parameter_and_every_word() -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.query(request("status=foo"), HandoffsQuery)
    assert caught.value.sentence.startswith("status: must be ")
    assert all(word in caught.value.sentence for word in ("active", "archived", "all"))


def test_foreign_query_parameters_are_left_alone() -> None:
    assert wire.query(request("utm_source=x%00&limit=7"), EventsQuery).limit == 7


@pytest.mark.parametrize(
    "value", [ID.upper(), f"{ID}\n", f" {ID}", ID.replace("-", ""), f"{{{ID}}}", "", "0", "٠" * 36]
)
def test_what_is_not_written_like_an_id_is_not_found(value: str) -> None:
    with pytest.raises(NotFound, match=r"^job_id: no job with this id is visible to this key\.$"):
        wire.known_id(value, "job_id")
    assert wire.known_id(ID, "job_id") == ID


def test_times_are_written_in_utc_with_a_z() -> None:
    response = wire.json_response({"at": datetime(2026, 11, 24, 8, tzinfo=UTC)}, 202, {"A": "b"})
    assert response.body == b'{"at":"2026-11-24T08:00:00Z"}'
    assert response.status_code == 202
    assert response.headers["content-type"] == "application/json"
    assert response.headers["a"] == "b"


def request(query_string: str) -> Request:
    """A request of which only the query matters."""
    return Request({"type": "http", "query_string": query_string.encode(), "headers": []})


# --- Bodies over the wire -------------------------------------------------------------------


class Wire:
    """A server with one route that reads a body, and raw connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.finished = asyncio.Event()  # the route has ended, well or not

    async def send(self, *parts: bytes) -> tuple[int, dict[str, Any], str]:
        """Send bytes on a new connection; answer status, body and headers of what comes back."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            async with asyncio.timeout(5):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
                body = orjson.loads(await reader.readexactly(size))
            return int(head.split()[1]), body, head.lower()
        finally:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Wire]:
    """The wire module behind the edge, without a database."""

    async def echo(request: Request) -> Response:
        try:
            wire.content_type(request, "application/json")
            raw = await wire.read_body(request, LIMIT)
            return wire.json_response({"bytes": len(raw), "value": wire.load_json(raw)})
        finally:
            made.finished.set()

    app = Starlette(routes=[Route("/", echo, methods=["POST"])], middleware=[Middleware(Edge)])
    async with served(app, lifespan="off") as url:
        made = Wire(int(url.rpartition(":")[2]))
        yield made


def head(*lines: str, content_type: str = "application/json") -> bytes:
    """The head of a POST."""
    given = [f"Content-Type: {content_type}"] if content_type else []
    return "\r\n".join(["POST / HTTP/1.1", "Host: x", *given, *lines, "", ""]).encode()


def chunked(*chunks: bytes) -> list[bytes]:
    """A body whose length nobody declares."""
    return [*(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks), b"0\r\n\r\n"]


async def test_a_body_of_exactly_the_limit_is_read(server: Wire) -> None:
    body = b'"' + b"x" * (LIMIT - 2) + b'"'
    status, answer, _ = await server.send(head(f"Content-Length: {LIMIT}"), body)
    assert (status, answer["bytes"]) == (200, LIMIT)
    status, answer, _ = await server.send(head("Transfer-Encoding: chunked"), *chunked(body))
    assert (status, answer["bytes"]) == (200, LIMIT)


async def test_a_declared_length_over_the_limit_is_refused_before_the_body(
    server: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "DISCARD_TIMEOUT", 0.02)
    status, body, answer = await server.send(head("Content-Length: 1000000000"))
    assert (status, body["code"]) == (413, "payload_too_large")
    assert "connection: close" in answer


async def test_a_body_without_a_length_is_counted_and_cut_off(
    server: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "DISCARD_TIMEOUT", 0.02)
    endless = chunked(b"x" * 600, b"x" * 600)[:-1]  # never ended, and need not be
    status, body, answer = await server.send(head("Transfer-Encoding: chunked"), *endless)
    assert (status, body["code"]) == (413, "payload_too_large")
    assert "connection: close" in answer


async def test_a_client_that_asks_first_is_told_before_it_sends(server: Wire) -> None:
    async with asyncio.timeout(1):  # nothing is waited for
        head_only = head("Content-Length: 1000000000", "Expect: 100-continue")
        status, _, answer = await server.send(head_only)
    assert status == 413 and "100 continue" not in answer


async def test_of_a_body_that_is_too_large_only_so_much_is_taken(
    server: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "DISCARD_LIMIT", 10_000)
    monkeypatch.setattr(wire, "DISCARD_TIMEOUT", 60.0)
    endless = chunked(*[b"x" * 10_000] * 50)[:-1]  # more than arrives in one piece
    status, _, _ = await server.send(head("Transfer-Encoding: chunked"), *endless)
    assert status == 413


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON ;charset=UTF-8", 200),
        ("", 415),
        ("text/plain", 415),
        ("application/jsonp", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
async def test_only_the_media_type_of_the_route_is_read(
    given: str, status: int, server: Wire
) -> None:
    answer, body, _ = await server.send(head("Content-Length: 2", content_type=given), b"{}")
    assert answer == status
    if status == 415:
        assert body["error"] == "Content-Type: must be application/json."


async def test_a_body_that_drips_is_not_waited_for(
    server: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "BODY_TIMEOUT", 0.05)
    status, body, answer = await server.send(head("Content-Length: 10"), b"{")
    assert (status, body["code"]) == (408, "request_timeout")
    assert "connection: close" in answer


async def test_a_client_that_goes_away_leaves_one_plain_line(
    server: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head("Content-Length: 10") + b"{")
    await writer.drain()
    writer.transport.abort()
    async with asyncio.timeout(5):
        await server.finished.wait()
        while not (lines := [r for r in caplog.records if r.name == "baton.api"]):
            await asyncio.sleep(0)
    [line] = lines
    assert line.getMessage() == "request"
    assert all(r.exc_info is None and r.levelno < logging.WARNING for r in caplog.records)


async def test_the_connection_lives_on_after_a_body_that_was_not_read(server: Wire) -> None:
    refused = head("Content-Length: 200000", content_type="text/plain") + b"x" * 200_000
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(refused)
    async with asyncio.timeout(5):
        assert b" 415 " in await reader.readline()
        writer.write(head("Content-Length: 2") + b"{}")
        while b"HTTP/1.1" not in (line := await reader.readline()):
            assert line, "the connection was closed"
    assert b" 200 " in line
    writer.close()


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert wire.parse(b'{"lookbackHours":24.0,"maxEvents":1e2}', CorrelationRequest) == (
        CorrelationRequest(lookbackHours=24, maxEvents=100)
    )
    for wrong in (b'{"maxEvents":1.5}', b'{"maxEvents":1e300}'):
        with pytest.raises(InvalidRequest, match="^maxEvents: must be "):
            wire.parse(wrong, CorrelationRequest)
