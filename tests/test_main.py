"""The edge of the application: ids of requests, the log line, health, and verbs nobody lists."""

import asyncio
import logging
import re
from typing import Any

import asyncpg
import httpx
import pytest
from conftest import Caller
from test_error_shape import Gate, send, serving

from app import background
from app.logs import request_id
from app.main import HEADERS_LIMIT, OPERATIONS, URI_LIMIT, create_app
from app.migration import migrate
from app.settings import Settings

NEW_ID = re.compile(r"[0-9a-f]{16}")


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the lines that say a request was answered."""
    return [vars(r) for r in caplog.records if r.getMessage() == "request"]


@pytest.mark.parametrize("given", ["a", "req_1", "01.a:b-c_D", "x" * 128])
async def test_a_sane_request_id_comes_back(given: str, base_url: str, caller: Caller) -> None:
    for path in ("/projects", "/jobs/x"):
        answer = await caller.http.get(path, headers={"X-Request-Id": given})
        assert answer.headers.get_list("x-request-id") == [given]
    assert answer.json()["request_id"] == given


async def test_another_request_id_is_replaced(base_url: str) -> None:
    insane = ("", " ", "two words", "x" * 129, "a\tb", "a,b", "<script>", "ä", "%00", '"a"')
    seen = set()
    for given in (*insane, None):
        head = ["GET /api/v1/projects HTTP/1.1"]
        answer = await send(base_url, head if given is None else [*head, f"X-Request-Id: {given}"])
        made = answer.headers["x-request-id"]
        assert NEW_ID.fullmatch(made), given
        assert made.encode() in answer.body
        seen.add(made)
    assert len(seen) == len(insane) + 1


async def test_every_answer_has_its_request_id(base_url: str, caller: Caller) -> None:
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/nope", "/api/v1/projects"):
        for method in ("GET", "HEAD", "DELETE", "OPTIONS"):
            answer = await send(base_url, [f"{method} {path} HTTP/1.1"])
            assert NEW_ID.fullmatch(answer.headers["x-request-id"])


async def test_one_line_tells_of_a_request_and_holds_neither_query_nor_key(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"X-Request-Id": "r-1", "Cookie": "secret=cookie"}
    await caller.http.get("/events?source=slack&token=topsecret", headers=headers)
    [line] = access_lines(caplog)
    fields = {name: line[name] for name in ("method", "path", "status")}
    assert fields == {"method": "GET", "path": "/api/v1/events", "status": 200}
    assert 0 < line["ms"] < 10_000
    ours = [r for r in caplog.records if r.name.startswith("baton")]
    everything = "".join(repr(vars(r)) for r in ours)
    for secret in (caller.key, caller.key[3:], "topsecret", "slack", "cookie"):
        assert secret not in everything


async def test_lines_of_a_request_carry_its_id_and_no_other(
    caller: Caller, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    seen: list[str | None] = []

    class Witness(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(request_id.get())

    witness = Witness()
    logging.getLogger("baton.api").addHandler(witness)
    try:
        for given in ("r-1", "r-2"):
            await caller.http.get("/projects", headers={"X-Request-Id": given})
    finally:
        logging.getLogger("baton.api").removeHandler(witness)
    assert seen == ["r-1", "r-2"]


async def test_errors_have_their_line_too(base_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path, status in (("/nope", 404), ("/api/v1/projects", 401), ("/x?" + "y" * 9000, 414)):
        assert (await send(base_url, [f"GET {path} HTTP/1.1"])).status == status
        assert access_lines(caplog)[-1]["status"] == status
    assert len(access_lines(caplog)) == 3


async def test_health_checks_are_not_worth_a_line(
    base_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/healthz", "/readyz"):
        assert (await send(base_url, [f"GET {path} HTTP/1.1"])).body == b'{"status":"ok"}'
    assert access_lines(caplog) == []


async def test_the_limits_of_the_head_are_exact(base_url: str) -> None:
    def line(size: int) -> str:
        return f"GET /healthz?{'x' * (size - len('/healthz'))} HTTP/1.1"

    assert (await send(base_url, [line(URI_LIMIT)])).status == 200
    assert (await send(base_url, [line(URI_LIMIT + 1)])).status == 414
    others = len("host" + "baton" + "connection" + "close" + "x")
    for over in (0, 1):
        wide = f"X: {'x' * (HEADERS_LIMIT - others + over)}"
        assert (await send(base_url, ["GET /healthz HTTP/1.1", wide])).status == 200 + 231 * over


async def test_healthz_needs_no_database_and_readyz_does(dsn: str) -> None:
    gate = Gate(dsn)
    await gate.open()
    async with serving(gate.dsn) as (base_url, _):
        gate.shut()
        assert (await send(base_url, ["GET /healthz HTTP/1.1"])).status == 200
        assert (await send(base_url, ["GET /readyz HTTP/1.1"])).status == 503


async def test_readyz_is_503_when_the_schema_is_older_than_the_code(
    base_url: str, sql: asyncpg.Connection
) -> None:
    assert (await send(base_url, ["GET /readyz HTTP/1.1"])).status == 200
    await sql.execute("update schema_version set version = version - 1")
    answer = await send(base_url, ["GET /readyz HTTP/1.1"])
    assert answer.status == 503
    assert b"baton migrate" in answer.body


async def test_readyz_knows_the_schema_of_the_next_version_and_no_later_one(
    base_url: str, sql: asyncpg.Connection
) -> None:
    await sql.execute("update schema_version set version = version + 1")
    assert (await send(base_url, ["GET /readyz HTTP/1.1"])).status == 200
    await sql.execute("update schema_version set version = version + 1")
    answer = await send(base_url, ["GET /readyz HTTP/1.1"])
    assert answer.status == 503
    assert b"use the newer program" in answer.body


async def test_an_empty_database_is_waited_for_and_then_used(
    empty_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[asyncio.Task[None]] = []
    monkeypatch.setattr(background, "_exit_if_failed", ended.append)
    async with serving(empty_dsn) as (base_url, _):
        answer = await send(base_url, ["GET /readyz HTTP/1.1"])
        assert answer.status == 503
        assert b"baton migrate" in answer.body
        key = f"Authorization: Bearer fr_{'x' * 43}"
        answer = await send(base_url, ["GET /api/v1/projects HTTP/1.1", key])
        assert (answer.status, b"baton migrate" in answer.body) == (503, True)
        await migrate(empty_dsn)
        assert (await send(base_url, ["GET /readyz HTTP/1.1"])).status == 200
        assert ended == []  # nothing that would have taken the process down


async def test_head_is_get_without_the_body(base_url: str, caller: Caller) -> None:
    for path in ("/", "/healthz", "/docs", "/openapi.json", "/api/v1/projects", "/api/v1/events"):
        auth = f"Authorization: Bearer {caller.key}"
        got = await send(base_url, [f"GET {path} HTTP/1.1", auth])
        head = await send(base_url, [f"HEAD {path} HTTP/1.1", auth])
        assert (head.status, head.body) == (200, b"")
        for name in ("content-type", "content-length"):
            assert head.headers[name] == got.headers[name]


async def test_paths_are_exact_and_never_redirected(base_url: str) -> None:
    for path in ("/api/v1/handoffs/", "/API/V1/handoffs", "/api/v1//handoffs", "/docs/"):
        assert (await send(base_url, [f"GET {path} HTTP/1.1"])).status == 404, path


async def test_no_foreign_site_may_read_answers(base_url: str, caller: Caller) -> None:
    answer = await caller.http.get("/projects", headers={"Origin": "https://example.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_application_needs_nothing_to_be_made_and_starts_nothing() -> None:
    app = create_app(Settings(database_url="postgresql://nowhere/"))
    assert not hasattr(app.state, "database")
    assert len({(o.method, o.path) for o in OPERATIONS}) == len(OPERATIONS)


async def test_the_http_side_does_not_say_what_it_is_made_of(base_url: str) -> None:
    async with httpx.AsyncClient(base_url=base_url, trust_env=False) as http:
        answer = await http.get("/nope")
    assert "python" not in repr(answer.headers).lower() + answer.text.lower()
