"""Whatever is sent: a 4xx with a sentence that names the field, nothing stored, nothing leaked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import orjson
import pytest
from conftest import Caller

UNKNOWN = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
EVENT = {"source": "github", "event_type": "push", "title": "t"}
HUGE = 10**40
KINDS = ("correlation", "onboarding", "architecture", "release_notes")

Refused = Callable[..., Any]


@pytest.fixture(autouse=True)
async def nothing_happens(
    caller: Caller, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[None]:
    """Around every test of this file: no row is added or changed, no traceback, no key logged."""
    caplog.set_level(logging.DEBUG)
    before = await contents(sql)
    yield
    assert await contents(sql) == before
    assert [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR] == []
    logged = "".join(repr(vars(record)) for record in caplog.records)
    assert caller.key not in logged and caller.key[3:20] not in logged


async def contents(sql: asyncpg.Connection) -> dict[str, Any]:
    """All rows of all tables."""
    tables = await sql.fetch("select tablename from pg_tables where schemaname = 'public'")
    return {t: await sql.fetch(f"select * from {t} order by 1") for [t] in tables}


async def refusals(caller: Caller, requests: list[tuple[Any, ...]]) -> list[str]:
    """Send `(method, path, body or raw body, status, start of the sentence)`; list what differs."""
    wrong = []
    for method, path, body, status, sentence in requests:
        raw = body if isinstance(body, bytes) else b"" if body is None else dumps(body)
        response = await caller.http.request(
            method,
            path.replace("PROJECT", caller.project_id),
            content=raw.replace(b"PROJECT", caller.project_id.encode()),
            headers={"Content-Type": "application/json"},
        )
        error = response.json()["error"]
        if response.status_code != status or not error.startswith(sentence) or len(error) > 400:
            wrong.append(f"{method} {path} {raw[:80]!r}: {response.status_code} {error[:200]}")
    return wrong


def dumps(value: Any) -> bytes:
    """JSON with whatever Python can put into it: NaN, huge integers, lone surrogates."""
    import json

    return json.dumps(value).encode()


def handoff(**fields: Any) -> dict[str, Any]:
    return {"project_id": "PROJECT", **fields}


def batch(*events: Any, **fields: Any) -> dict[str, Any]:
    return {"project_id": "PROJECT", "events": list(events), **fields}


async def test_a_handoff_request_is_refused_by_its_first_wrong_field(caller: Caller) -> None:
    github: dict[str, Any] = {"github": {}}
    cases: list[tuple[Any, int, str]] = [
        ({}, 400, "project_id: is required."),
        (handoff(project_id=None), 400, "project_id: must be a string."),
        (handoff(project_id=5), 400, "project_id: must be a string."),
        (handoff(project_id=["x"]), 400, "project_id: must be a string."),
        (handoff(project_id=""), 404, "project_id: no project "),
        (handoff(project_id="x"), 404, "project_id: no project "),
        (handoff(project_id="x" * 10_000), 404, "project_id: no project "),
        (handoff(project_id=UNKNOWN), 404, "project_id: no project "),
        (handoff(sources=[]), 400, "sources: must not be empty."),
        (handoff(sources="github"), 400, "sources: must be an array."),
        (handoff(sources={"github": 1}), 400, "sources: must be an array."),
        (handoff(sources=["myspace"]), 400, 'sources: there is no source named "myspace".'),
        (handoff(sources=["GitHub"]), 400, "sources: there is no source named"),
        (handoff(sources=["github", None]), 400, "sources[1]: must be a string."),
        (handoff(sources=[""]), 400, "sources[0]: must have at least 1 character."),
        (handoff(sources=["x" * 65]), 400, "sources[0]: must have at most 64 characters."),
        (handoff(sources=["github"] * 101), 400, "sources: must have at most 100 items."),
        (handoff(filters=[]), 400, "filters: must be an object."),
        (handoff(filters={"myspace": {}}), 400, "filters.myspace: there is no source named"),
        (handoff(filters={"github": None}), 400, "filters.github: must "),
        (handoff(filters={"github": []}), 400, "filters.github: must "),
        (handoff(filters={"github": {"labels": []}}), 400, "filters.github.labels: is not a known"),
        (handoff(filters={"slack": {"branches": ["main"]}}), 400, "filters.slack.branches: "),
        (handoff(filters={"slack": {"branches": []}}), 400, "filters.slack.branches: "),
        (handoff(filters={"gitlab": {"priorities": ["1"]}}), 400, "filters.gitlab.priorities: "),
        (
            handoff(sources=["slack"], filters=github | {"slack": {"priorities": ["x"]}}),
            400,
            "filters.slack.priorities: Slack has no priorities.",
        ),
        (handoff(filters={"github": {"projects": "a"}}), 400, "filters.github.projects: must be"),
        (handoff(filters={"github": {"projects": [1]}}), 400, "filters.github.projects[0]: must"),
        (handoff(filters={"github": {"projects": [""]}}), 400, "filters.github.projects[0]: must"),
        (handoff(filters={"github": {"projects": ["x" * 301]}}), 400, "filters.github.projects[0]"),
        (handoff(filters={"github": {"branches": ["b"] * 501}}), 400, "filters.github.branches: "),
        (handoff(until="yesterday"), 400, "until: must be an RFC 3339 time"),
        (handoff(until="2026-01-01T00:00:00"), 400, "until: must carry a time zone"),
        (handoff(until=1767225600), 400, "until: must be an RFC 3339 time"),
        (handoff(job=[]), 400, "job: must "),
        (handoff(job={"webhook": "x"}), 400, "job.webhook: is not a known field."),
        (handoff(kind="handoff"), 400, "kind: is not a known field."),
        (handoff(status="completed"), 400, "status: is not a known field."),
        (handoff(lookbackDays=1), 400, "lookbackDays: is not a known field."),
        (handoff(user_id=caller.user_id), 400, "user_id: is not a known field."),
    ]
    assert await refusals(caller, [("POST", "/handoffs", *case) for case in cases]) == []


async def test_an_insight_request_is_refused_by_its_first_wrong_field(caller: Caller) -> None:
    cases: list[tuple[str, Any, int, str]] = [
        ("correlation", {"lookbackHours": 0}, 400, "lookbackHours: must be greater than or"),
        ("correlation", {"lookbackHours": 2161}, 400, "lookbackHours: must be less than or equal"),
        ("correlation", {"lookbackHours": 1.5}, 400, "lookbackHours: must be an integer"),
        ("correlation", {"maxEvents": 0}, 400, "maxEvents: must be greater than or"),
        ("correlation", {"maxEvents": 1001}, 400, "maxEvents: must be less than or equal"),
        ("correlation", {"maxEvents": HUGE}, 400, "maxEvents: must be "),
        ("correlation", {"maxEvents": -HUGE}, 400, "maxEvents: must be "),
        ("correlation", {"maxEvents": 2**63}, 400, "maxEvents: must be "),
        ("correlation", {"maxEvents": float("nan")}, 400, "The body is not valid JSON"),
        ("correlation", {"maxEvents": float("inf")}, 400, "The body is not valid JSON"),
        ("correlation", {"project_id": "PROJECT"}, 400, "project_id: is not a known field."),
        ("correlation", {"lookbackDays": 3}, 400, "lookbackDays: is not a known field."),
        ("onboarding", {"lookbackDays": 0}, 400, "lookbackDays: must be greater than or"),
        ("onboarding", {"lookbackDays": 366}, 400, "lookbackDays: must be less than or equal"),
        ("onboarding", {"lookbackDays": "30"}, 400, "lookbackDays: must be an integer."),
        ("onboarding", {"lookbackDays": True}, 400, "lookbackDays: must be an integer."),
        ("onboarding", {"lookbackDays": None}, 400, "lookbackDays: must be an integer."),
        ("onboarding", {"newMemberRole": 5}, 400, "newMemberRole: must be a string."),
        ("onboarding", {"newMemberRole": ""}, 400, "newMemberRole: must have at least 1"),
        ("onboarding", {"focusArea": "x" * 301}, 400, "focusArea: must have at most 300"),
        ("architecture", {"focusQuestion": "x" * 2001}, 400, "focusQuestion: must have at most"),
        ("architecture", {"sources": ["slack"]}, 400, "sources: this artifact needs a code source"),
        ("architecture", {"filters": {"slack": {}}}, 400, "sources: this artifact needs a code"),
        ("release_notes", {"source": "slack"}, 400, "source: this artifact needs a code source"),
        ("release_notes", {"source": "myspace"}, 400, "source: there is no source named"),
        ("release_notes", {"source": None}, 400, "source: must be a string."),
        ("release_notes", {"sources": ["github"]}, 400, "sources: is not a known field."),
        ("release_notes", {"style": "haiku"}, 400, "style: must be 'release_notes' or"),
        ("release_notes", {"repo": 5}, 400, "repo: must be a string."),
        ("release_notes", {"lookbackDays": 5}, 400, "lookbackDays: is not a known field."),
        ("poem", {}, 404, "There is nothing at this path"),
        *((kind, {"nope": 1}, 400, "nope: is not a known field.") for kind in KINDS),
        *((kind, {"job": {"nope": 1}}, 400, "job.nope: is not a known field.") for kind in KINDS),
    ]
    path = "/projects/PROJECT/insights/"
    requests = [("POST", path + kind, *case) for kind, *case in cases]
    assert await refusals(caller, requests) == []


async def test_an_event_is_refused_by_its_first_wrong_field(caller: Caller) -> None:
    deep: Any = {}
    for _ in range(16):
        deep = {"d": deep}
    texts = ("event_type", "external_id", "resource", "branch", "priority", "author")
    cases: list[tuple[Any, int, str]] = [
        ({"project_id": "PROJECT"}, 400, "events: is required."),
        ({"events": [EVENT]}, 400, "project_id: is required."),
        (batch(), 400, "events: must not be empty."),
        (batch(*[EVENT] * 1001), 400, "events: must have at most 1000 items."),
        (batch(events=EVENT), 400, "events: must be an array."),
        (batch(5), 400, "events[0]: must be an object."),
        (batch(EVENT, user_id="x"), 400, "user_id: is not a known field."),
    ]
    fields: list[tuple[dict[str, Any], str]] = [
        ({"source": "myspace"}, 'source: there is no source named "myspace".'),
        ({"source": None}, "source: must be a string."),
        ({"event_type": ""}, "event_type: must have at least 1"),
        ({"title": ""}, "title: must have at least 1"),
        ({"title": "x" * 1001}, "title: must have at most 1000"),
        ({"content": "x" * 100_001}, "content: must have at most 100000"),
        ({"content": ["x"]}, "content: must be a string."),
        ({"url": "javascript:alert(1)"}, "url: must "),
        ({"url": "data:text/html,x"}, "url: must "),
        ({"url": "//example.com"}, "url: must "),
        ({"url": "https://" + "x" * 2000}, "url: must have at most 2000"),
        ({"occurred_at": "2026-01-01 00:00"}, "occurred_at: must carry a time zone"),
        ({"occurred_at": "2026-01-01"}, "occurred_at: must carry a time zone"),
        ({"occurred_at": 1767225600}, "occurred_at: must be an RFC 3339 time"),
        ({"occurred_at": "1800-01-01T00:00:00Z"}, "occurred_at: must lie between the years"),
        ({"occurred_at": "9999-12-31T23:59:59-23:59"}, "occurred_at: must lie between the years"),
        ({"occurred_at": "0001-01-01T00:00:00+23:59"}, "occurred_at: must lie between the years"),
        ({"occurred_at": "2026-02-30T00:00:00Z"}, "occurred_at: must be an RFC 3339 time"),
        ({"occurred_at": "2" * 5000}, "occurred_at: must be an RFC 3339 time"),
        ({"metadata": []}, "metadata: must "),
        ({"metadata": "x"}, "metadata: must "),
        ({"metadata": deep}, "metadata: must not be nested deeper than 16 levels."),
        ({"metadata": {"a": [0] * 2000}}, "metadata: must not hold more than 2000 values."),
        ({"id": UNKNOWN}, "id: is not a known field."),
        ({"created_at": "2026-01-01T00:00:00Z"}, "created_at: is not a known field."),
        *(({name: "x" * 301}, f"{name}: must have at most 300") for name in texts),
        *(({name: 5}, f"{name}: must be a string.") for name in (*texts, "title", "url")),
    ]
    cases += [(batch({**EVENT, **field}), 400, f"events[0].{text}") for field, text in fields]
    many: list[dict[str, Any]] = [{**EVENT, "external_id": str(n)} for n in range(1000)]
    cases += [
        (batch(*many[:617], {**EVENT, "title": 5}, *many[618:]), 400, "events[617].title: must be"),
        (batch(*many[:617], {**EVENT, "source": "x"}, *many[618:]), 400, "events[617].source: the"),
    ]
    assert await refusals(caller, [("POST", "/events", *case) for case in cases]) == []


async def test_nul_is_refused_in_every_text_key_parameter_and_path(caller: Caller) -> None:
    texts = ("source", "event_type", "title", "content", "external_id", "resource", "branch")
    nul = "must not contain NUL characters."
    cases: list[tuple[str, str, Any, int, str]] = [
        ("POST", "/handoffs", handoff(project_id="a\0"), 400, f"project_id: {nul}"),
        ("POST", "/handoffs", handoff(sources=["a\0"]), 400, f"sources[0]: {nul}"),
        ("POST", "/handoffs", handoff(filters={"a\0": {}}), 400, f"filters: {nul}"),
        ("POST", "/handoffs", {"\0": 1}, 400, f"body: {nul}"),
        *(
            ("POST", "/events", batch({**EVENT, name: "a\0"}), 400, f"events[0].{name}: {nul}")
            for name in (*texts, "priority", "author", "url", "occurred_at")
        ),
        (
            "POST",
            "/events",
            batch({**EVENT, "metadata": {"a": {"b": ["\0"]}}}),
            400,
            f"events[0].metadata.a.b[0]: {nul}",
        ),
        (
            "POST",
            "/events",
            batch({**EVENT, "metadata": {"\0": 1}}),
            400,
            "events[0].metadata: mus",
        ),
        ("GET", "/events?source=%00", None, 400, f"source: {nul}"),
        ("GET", "/events?project_id=%00", None, 400, f"project_id: {nul}"),
        ("GET", "/handoffs?status=%00", None, 400, f"status: {nul}"),
        ("GET", "/handoffs/filters?project_id=%00", None, 400, f"project_id: {nul}"),
        ("GET", "/projects/PROJECT/insights?kind=%00", None, 400, f"kind: {nul}"),
        ("GET", "/jobs/%00", None, 404, "job_id: no job "),
        ("PATCH", "/handoffs/%00", {"status": "active"}, 404, "handoff_id: no handoff "),
        ("GET", "/projects/%00/insights", None, 404, "project_id: no project "),
        ("GET", "/%00", None, 404, "There is nothing at this path"),
    ]
    assert await refusals(caller, cases) == []


async def test_json_that_is_none_or_too_much_of_it_is_refused(caller: Caller) -> None:
    nested = b'{"project_id":"PROJECT","%s":%s}'
    cases: list[tuple[bytes, int, str]] = [
        (b"", 400, "The body is empty"),
        (b" \r\n\t", 400, "The body is empty"),
        (b"[]", 400, "The body must be a JSON object."),
        (b'"text"', 400, "The body must be a JSON object."),
        (b"5", 400, "The body must be a JSON object."),
        (b"null", 400, "The body must be a JSON object."),
        (b"{", 400, "The body is not valid JSON"),
        (b'{"project_id":"PROJECT","until":NaN}', 400, "The body is not valid JSON"),
        (b'{"project_id":"PROJECT","until":1e999}', 400, "The body is not valid JSON"),
        (b'{"project_id":"\\ud83d"}', 400, "The body is not valid JSON"),
        (b'{"project_id":"\xff"}', 400, "The body is not valid JSON"),
        (nested % (b"job", b"[" * 2000 + b"]" * 2000), 400, "The body is not valid JSON"),
        (nested % (b"job", b"[" * 300 + b"]" * 300), 400, "job: must "),
        (nested % (b"filters", b'{"a":' * 300 + b"1" + b"}" * 300), 400, "filters.a.a: is not a k"),
        (nested % (b"sources", b"[" + b"[]," * 80_000 + b"[]]"), 400, "sources"),
        (b"[" + b"[]," * 80_000 + b"[]]", 400, "The body must be a JSON object."),
        (b'{"project_id":"PROJECT","job":{"a":1},"job":{"b":1}}', 400, "job.b: is not a known"),
        (b'{"project_id":"PROJECT","' + b"k" * 50_000 + b'":1}', 400, "kkk"),
    ]
    assert await refusals(caller, [("POST", "/handoffs", *case) for case in cases]) == []
    meta = b'{"project_id":"PROJECT","events":[{"source":"github","event_type":"e","title":"t",'
    more: list[tuple[bytes, int, str]] = [
        (meta + b'"metadata":{"a":%s}}]}' % (b"[" * n + b"]" * n), 400, sentence)
        for n, sentence in ((16, "events[0].metadata: must"), (100, "events[0].metadata: must"))
    ]
    broad = b'"metadata":{"a":[' + b"[]," * 100_000 + b"[]]}}]}"
    more.append((meta + broad, 400, "events[0].metadata: mus"))
    assert await refusals(caller, [("POST", "/events", *case) for case in more]) == []


async def test_a_client_that_sends_too_much_is_told_so(caller: Caller) -> None:
    json = {"Content-Type": "application/json"}
    megabytes = b" " * (4 * 1024 * 1024)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield megabytes[:65_536]

    for path, limit in (("/handoffs", 256), ("/events", 1024)):
        for body in (megabytes[: limit * 1024 + 1], megabytes, chunks()):
            answer = await caller.http.post(path, content=body, headers=json)
            assert answer.status_code == 413
            assert answer.json()["error"].startswith(f"The body is larger than {limit} KiB")


async def test_ndjson_is_refused_by_line(caller: Caller) -> None:
    line = dumps(EVENT)
    own, other = ({**EVENT, "project_id": p} for p in (caller.project_id, UNKNOWN))
    mine = f"?project_id={caller.project_id}"
    cases: list[tuple[str, list[bytes], int, str]] = [
        (mine, [], 400, "events: send 1 to 1000 lines"),
        (mine, [b"", b" ", b""], 400, "events: send 1 to 1000 lines"),
        (mine, [line] * 1001, 400, "events: send 1 to 1000 lines"),
        (mine, [line, b"", b"nope"], 400, "events[1]: The body is not valid JSON"),
        (mine, [line, b"[]"], 400, "events[1]: must be a JSON object."),
        (mine, [line, dumps({**EVENT, "title": 5})], 400, "events[1].title: must be a string."),
        (mine, [line, dumps({**EVENT, "title": "\0"})], 400, "events[1]"),
        (mine, [line, dumps({**EVENT, "source": "x"})], 400, "events[1].source: there is no"),
        (mine, [line, dumps(other)], 400, "events[1].project_id: must be the same"),
        ("", [dumps(own), dumps(other)], 400, "events[1].project_id: must be the same"),
        ("", [dumps({**EVENT, "project_id": 5})], 400, "events[0].project_id: must "),
        ("", [line], 400, "project_id: is required"),
        ("", [dumps(other)], 404, "project_id: no project "),
        ("?project_id=x", [line], 404, "project_id: no project "),
    ]
    wrong = []
    for query, lines, status, sentence in cases:
        response = await caller.http.post(
            f"/events{query}",
            content=b"\r\n".join(lines),
            headers={"Content-Type": "application/x-ndjson"},
        )
        error = response.json()["error"]
        if response.status_code != status or not error.startswith(sentence):
            wrong.append(f"{query} {lines[-1:]!r:.80}: {response.status_code} {error[:200]}")
    assert wrong == []


async def test_lists_and_status_changes_refuse_what_they_do_not_know(caller: Caller) -> None:
    insights = "/projects/PROJECT/insights"
    requests: list[tuple[str, str, Any, int, str]] = [
        *(
            ("GET", f"{path}?limit={limit}", None, 400, "limit: ")
            for path in ("/events", "/handoffs", insights)
            for limit in ("0", "101", "abc", "-1", "1.5", "", "9" * 5000, "%D9%A3")
        ),
        ("GET", "/handoffs?status=foo", None, 400, "status: must be "),
        ("GET", f"{insights}?status=foo", None, 400, "status: must be "),
        ("GET", f"{insights}?kind=foo", None, 400, "kind: must be "),
        ("GET", f"{insights}?kind=correlation", None, 400, "kind: must be "),
        ("GET", "/events?source=myspace", None, 400, "source: there is no source named"),
        ("GET", "/events?source=%ff", None, 400, "source: there is no source named"),
        ("GET", "/events?project_id=x", None, 404, "project_id: no project "),
        ("GET", "/handoffs?project_id=", None, 404, "project_id: no project "),
        ("PATCH", f"/handoffs/{UNKNOWN}", {}, 400, "status: is required."),
        ("PATCH", f"/handoffs/{UNKNOWN}", {"status": "deleted"}, 400, "status: must be 'active'"),
        ("PATCH", f"/insights/{UNKNOWN}", {"status": None}, 400, "status: must be 'active'"),
        ("PATCH", f"/insights/{UNKNOWN}", {"status": "active", "a": 1}, 400, "a: is not a known"),
    ]
    assert await refusals(caller, requests) == []


async def test_a_head_that_makes_no_sense_does_no_harm(caller: Caller) -> None:
    address = urlsplit(str(caller.http.base_url))
    auth = f"Authorization: Bearer {caller.key}\r\nContent-Type: application/json\r\n"
    heads = {
        "bad length": f"POST /api/v1/handoffs HTTP/1.1\r\n{auth}Content-Length: five\r\n\r\n12345",
        "negative": f"POST /api/v1/handoffs HTTP/1.1\r\n{auth}Content-Length: -5\r\n\r\n12345",
        "500 KB": f"GET /healthz HTTP/1.1\r\nX: {'y' * 500_000}\r\n\r\n",
        "url": f"GET /healthz?{'y' * 20_000} HTTP/1.1\r\n\r\n",
        "not HTTP": "\x16\x03\x01\x02\r\n\r\n",
    }
    statuses = {}
    for name, head in heads.items():
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head.encode("latin-1"))
        async with asyncio.timeout(5):
            statuses[name] = int((await reader.readline()).split()[1])
        writer.close()
    expected = {"bad length": 400, "negative": 400, "500 KB": 431, "url": 414, "not HTTP": 400}
    assert statuses == expected
    assert (await caller.http.get("/projects")).status_code == 200


def test_the_writer_of_these_bodies_writes_what_json_forbids() -> None:
    assert dumps([float("nan"), HUGE, "\ud800"]) == b'[NaN, 1%s, "\\ud800"]' % (b"0" * 40)
    assert orjson.loads(dumps({"a": "\0"})) == {"a": "\0"}
