"""Every operation x every error that it can answer: one body, one content type, one request id."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import asyncpg
import orjson
import pytest
from conftest import Caller, loopback, served
from starlette.applications import Starlette

from app import db, openapi, wire
from app.main import OPERATIONS, create_app
from app.openapi import EXAMPLES, Operation
from app.settings import NO_LIMITS, Limits, Settings

UNKNOWN = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
PRIVATE = [o for o in OPERATIONS if not o.public]
WITH_BODY = [o for o in OPERATIONS if o.body]
CODES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    410: "gone",
    413: "payload_too_large",
    414: "uri_too_long",
    415: "unsupported_media_type",
    422: "idempotency_key_reuse",
    429: "rate_limited",
    431: "headers_too_large",
    500: "internal_error",
    502: "generation_failed",  # in test_questions.py
    503: "unavailable",
}


@dataclass
class Answer:
    """What came back, byte for byte."""

    status: int
    headers: dict[str, str]
    body: bytes


async def send(base_url: str, head: Iterable[str], body: bytes = b"") -> Answer:
    """One request on a connection of its own, exactly as written."""
    address = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
    lines = [*head, "Host: baton", "Connection: close", "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    try:
        async with asyncio.timeout(10):
            got, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    first, *fields = got.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (field.partition(":") for field in fields)}
    return Answer(int(first.split()[1]), headers, rest)


def assert_error(answer: Answer, status: int, where: str) -> dict[str, Any]:
    """The one shape of an error."""
    assert answer.status == status, (where, answer)
    assert answer.headers["content-type"] == "application/json", where
    body: dict[str, Any] = orjson.loads(answer.body)
    more = {"detail", "violated-policies"} if status == 429 else set()
    assert set(body) == {"error", "code", "request_id"} | more, where
    assert body["code"] == CODES[status], where
    assert isinstance(body["error"], str) and body["error"].endswith("."), (where, body)
    assert "\n" not in body["error"] and len(body["error"]) < 500, where
    assert body["request_id"] == answer.headers["x-request-id"], where
    return body


def line_of(operation: Operation, ident: str, query: str = "") -> str:
    path = operation.path
    path = re.sub(r"{\w+}", ident, path)
    return f"{operation.method} {path}{query} HTTP/1.1"


def wrong_verb(operation: Operation) -> str:
    """One that the operation's path does not know."""
    known = {o.method for o in OPERATIONS if o.path == operation.path}
    return next(verb for verb in ("PUT", "POST") if verb not in known)


def body_of(operation: Operation, project_id: str = UNKNOWN) -> bytes:
    """A body that the operation accepts, for a project."""
    assert operation.body
    example = dict(EXAMPLES[operation.body])
    return orjson.dumps(example | ({"project_id": project_id} if "project_id" in example else {}))


def full(
    operation: Operation, caller: Caller, body: bytes | None = None
) -> tuple[list[str], bytes]:
    """A good request, except that the ids in it are unknown."""
    head = [line_of(operation, UNKNOWN), f"Authorization: Bearer {caller.key}"]
    if operation.body is None:
        return head, b""
    sent = body_of(operation) if body is None else body
    return [*head, "Content-Type: application/json", f"Content-Length: {len(sent)}"], sent


class Gate:
    """A way to the database that can be shut."""

    def __init__(self, dsn: str) -> None:
        address = urlsplit(dsn)
        options = parse_qs(address.query)
        host = options.get("host", [unquote(address.hostname or "")])[0]
        port = int(options.get("port", [address.port or 5432])[0])
        self._socket = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None
        self._host, self._port = host, port
        self._listener = loopback()
        here = f"{address.username}@127.0.0.1:{self._listener.getsockname()[1]}"
        self.dsn = urlunsplit(address._replace(netloc=here, query=""))
        self._clients: set[asyncio.StreamWriter] = set()
        self._servers: set[asyncio.StreamWriter] = set()
        self._silent = asyncio.Event()
        self._shut = False
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Let connections through."""
        self._server = await asyncio.start_server(self._relay, sock=self._listener)

    def shut(self) -> None:
        """Refuse new connections and cut those that are there, like a server that was killed."""
        assert self._server
        self._shut = True
        self._server.close()
        for writer in self._clients | self._servers:
            writer.transport.abort()

    def say_goodbye(self) -> None:
        """Tell the clients what a server tells them when it ends their session, just before."""
        fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"
        for writer in self._clients:
            writer.write(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)

    def silence(self) -> None:
        """Accept bytes and pass none on, like a network that swallows packets."""
        self._silent.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._socket:
            back, forth = await asyncio.open_unix_connection(self._socket)
        else:
            back, forth = await asyncio.open_connection(self._host, self._port)
        self._clients.add(writer)
        self._servers.add(forth)
        if self._shut:  # while the way to the server was being opened
            writer.transport.abort()
            forth.transport.abort()
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, forth), self._pump(back, writer))
        self._clients.discard(writer)
        self._servers.discard(forth)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if not self._silent.is_set():
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def serving(dsn: str, limits: Limits = NO_LIMITS) -> AsyncIterator[tuple[str, Starlette]]:
    """An API of one's own, whose insides the test can reach."""
    app = create_app(Settings(database_url=dsn, limits=limits))
    async with served(app) as url:
        yield url, app


async def test_without_a_key_every_operation_answers_401(base_url: str, caller: Caller) -> None:
    for operation in PRIVATE:
        head, body = full(operation, caller)
        answer = await send(base_url, [h for h in head if "Bearer" not in h], body)
        assert_error(answer, 401, operation.name)
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_an_unknown_id_is_404_wherever_it_stands(base_url: str, caller: Caller) -> None:
    for operation in PRIVATE:
        head, body = full(operation, caller)
        if operation.query and "project_id" in operation.query.model_fields:
            head[0] = line_of(operation, UNKNOWN, f"?project_id={UNKNOWN}")
        if UNKNOWN in head[0] or UNKNOWN.encode() in body:
            assert_error(await send(base_url, head, body), 404, operation.name)


async def test_a_wrong_field_is_400(base_url: str, caller: Caller) -> None:
    for operation in WITH_BODY:
        head, body = full(operation, caller, b'{"nope":1}')
        error = assert_error(await send(base_url, head, body), 400, operation.name)["error"]
        required = ("project_id", "events", "status", "source", "resources", "question")
        assert error.partition(":")[0] in ("nope", "channel_id", "cron", *required)
    for operation in (o for o in OPERATIONS if o.query and not o.body):
        head, _ = full(operation, caller)
        known = operation.query.model_fields if operation.query else {}
        number = known.keys() & {"limit", "after"}
        name, value = (number.pop(), "abc") if number else ("project_id", "%00")
        head[0] = line_of(operation, caller.project_id, f"?{name}={value}")
        error = assert_error(await send(base_url, head), 400, operation.name)["error"]
        assert error.startswith(f"{name}: must ")


async def test_another_media_type_is_415(base_url: str, caller: Caller) -> None:
    for operation in WITH_BODY:
        head, body = full(operation, caller)
        head = [h.replace("application/json", "text/csv") for h in head]
        assert_error(await send(base_url, head, body), 415, operation.name)


async def test_too_much_is_413_414_or_431(
    base_url: str, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "DISCARD_TIMEOUT", 0.02)  # the bodies below never come
    for operation in OPERATIONS:
        head, body = full(operation, caller)
        long = [line_of(operation, UNKNOWN, "?x=" + "y" * 20_000), *head[1:]]
        assert_error(await send(base_url, long, body), 414, operation.name)
        wide = [*head, "X-Wide: " + "y" * 20_000]
        error = assert_error(await send(base_url, wide, body), 431, operation.name)["error"]
        assert error.startswith("x-wide: ")
    for operation in WITH_BODY:
        head, _ = full(operation, caller)
        big = [h for h in head if "Length" not in h]
        answer = await send(base_url, [*big, "Content-Length: 1048577"])
        assert_error(answer, 413, operation.name)


async def test_a_body_that_does_not_come_is_408(
    base_url: str, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "BODY_TIMEOUT", 0.02)
    for operation in WITH_BODY:
        head, body = full(operation, caller)
        assert_error(await send(base_url, head, body[:-1]), 408, operation.name)


async def test_one_request_too_many_is_429(dsn: str, caller: Caller) -> None:
    async with serving(dsn, Limits(default=1, poll=1, generate=1)) as (base_url, _):
        for path in ("/projects", f"/jobs/{UNKNOWN}"):
            await caller.http.get(f"{base_url}/api/v1{path}")
        for operation in PRIVATE:
            head, body = full(operation, caller)
            answer = await send(base_url, head, body)
            assert_error(answer, 429, operation.name)
            assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_an_error_is_a_problem_for_whoever_asks_so(base_url: str, caller: Caller) -> None:
    asks = "Accept: application/json;q=0.9, application/problem+json"
    key = f"Authorization: Bearer {caller.key}"
    handoffs = "POST /api/v1/handoffs HTTP/1.1"
    for status, head in {
        400: ["GET /api/v1/events?limit=0 HTTP/1.1", key],
        401: ["GET /api/v1/events HTTP/1.1"],
        404: ["GET /nope HTTP/1.1"],
        405: ["PUT /api/v1/events HTTP/1.1"],
        413: [handoffs, key, "Content-Type: application/json", "Content-Length: 99999999"],
        414: ["GET /?" + "y" * 9_000 + " HTTP/1.1"],
        415: [handoffs, key, "Content-Type: text/csv"],
        431: ["GET / HTTP/1.1", "X-Wide: " + "y" * 20_000],
    }.items():
        expect = "Expect: 100-continue"  # so that nobody waits for a body that does not come
        answer = await send(base_url, [*head, asks, expect])
        body = orjson.loads(answer.body)
        assert answer.headers["content-type"] == "application/problem+json", status
        assert answer.headers["vary"] == "Accept"
        assert (answer.status, body["status"], body["code"]) == (status, status, CODES[status])
        assert body["detail"] == body["error"]
        assert body["instance"] == f"urn:request:{answer.headers['x-request-id']}"


async def test_what_is_not_there_is_404_and_a_wrong_verb_405(base_url: str) -> None:
    for path in ("/page", "/api/v1", "/api/v1/nope", "/api/v1/projects/", "/api/v2/projects", "//"):
        assert_error(await send(base_url, [f"GET {path} HTTP/1.1"]), 404, path)
    for operation in OPERATIONS:
        path = line_of(operation, UNKNOWN).split()[1]
        answer = await send(base_url, [f"{wrong_verb(operation)} {path} HTTP/1.1"])
        assert_error(answer, 405, operation.name)


async def test_a_405_lists_every_verb_of_the_path(base_url: str) -> None:
    for operation in OPERATIONS:
        path = line_of(operation, UNKNOWN).split()[1]
        answer = await send(base_url, [f"{wrong_verb(operation)} {path} HTTP/1.1"])
        allowed = {verb.strip() for verb in answer.headers["allow"].split(",")}
        verbs = {o.method for o in OPERATIONS if o.path == operation.path}
        assert verbs <= allowed, operation.path


async def test_what_nobody_foresaw_is_500_and_says_nothing_of_itself(
    dsn: str, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(dsn) as (base_url, app):
        app.state.database = None
        for operation in OPERATIONS:
            if operation.name == "healthz":
                continue
            head, body = full(operation, caller)
            error = assert_error(await send(base_url, head, body), 500, operation.name)
            assert "NoneType" not in error["error"]
            [record] = [r for r in caplog.records if r.getMessage() == "unexpected"]
            assert "main.py" in vars(record)["trace"]
            caplog.clear()


async def test_an_absent_database_is_503_within_seconds_and_nothing_else(
    dsn: str, caller: Caller
) -> None:
    gate = Gate(dsn)
    await gate.open()
    async with serving(gate.dsn) as (base_url, _):
        assert (await send(base_url, ["GET /readyz HTTP/1.1"])).status == 200
        gate.shut()
        for operation in OPERATIONS:
            if operation.name == "healthz":
                continue
            head, body = full(operation, caller)
            async with asyncio.timeout(3):
                answer = await send(base_url, head, body)
            assert_error(answer, 503, operation.name)
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert (await send(base_url, ["GET /healthz HTTP/1.1"])).status == 200


async def test_a_connection_that_was_cut_off_is_replaced_at_once(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    assert (await caller.http.get("/projects")).status_code == 200
    await sql.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )
    answers = [(await caller.http.get("/projects")).status_code for _ in range(2)]
    assert set(answers) <= {200, 503} and answers[-1] == 200


async def test_a_connection_that_is_being_cut_off_is_503(dsn: str, caller: Caller) -> None:
    gate = Gate(dsn)
    await gate.open()
    async with serving(gate.dsn) as (base_url, _):
        head = ["GET /api/v1/projects HTTP/1.1", f"Authorization: Bearer {caller.key}"]
        assert (await send(base_url, head)).status == 200
        gate.say_goodbye()
        assert_error(await send(base_url, head), 503, "between goodbye and the end")
        gate.shut()


async def test_a_database_that_swallows_statements_is_503(
    dsn: str, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "COMMAND_TIMEOUT", 0.2)
    monkeypatch.setattr(db, "ACQUIRE_TIMEOUT", 0.2)
    gate = Gate(dsn)
    await gate.open()
    async with serving(gate.dsn) as (base_url, _):
        assert (await send(base_url, ["GET /readyz HTTP/1.1"])).status == 200
        gate.silence()
        head = ["GET /api/v1/projects HTTP/1.1", f"Authorization: Bearer {caller.key}"]
        for _ in range(3):
            async with asyncio.timeout(3):
                assert_error(await send(base_url, head), 503, "swallowed")
        gate.shut()


async def test_a_database_that_lets_nobody_in_is_503(
    dsn: str, caller: Caller, cluster: str, sql: asyncpg.Connection
) -> None:
    name = urlsplit(dsn).path[1:]
    head = ["GET /api/v1/projects HTTP/1.1", f"Authorization: Bearer {caller.key}"]
    async with serving(dsn) as (base_url, _):
        operator = await asyncpg.connect(cluster)
        await operator.execute(f"alter database {name} allow_connections false")
        await operator.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = $1 and application_name = 'baton serve'",
            name,
        )
        answers = [await send(base_url, head) for _ in range(2)]
        await operator.execute(f"alter database {name} allow_connections true")
        await operator.close()
        assert_error(answers[-1], 503, "refused")
        assert (await send(base_url, head)).status == 200


def test_every_error_that_is_tested_here_is_described() -> None:
    assert set(CODES) - {405} == set(openapi.ERRORS)
