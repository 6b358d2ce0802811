"""`baton mcp` as agents see it: the SDK's own client, both transports, a real API and worker."""

import asyncio
import json
import logging
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import httpx2
import pytest
from click.testing import CliRunner
from conftest import Caller, Workers, served
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent
from sse_starlette.sse import AppStatus

from app import jobs, mcp_server
from app.__main__ import cli
from app.client import RequestFailed
from app.mcp_server import TOOLS, Call, create_http_app

ROOT = Path(__file__).parent.parent
UNKNOWN = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
GENERATORS = [tool.name for tool in TOOLS if tool.name.startswith("generate_")]
SPENDING = [*GENERATORS, "ask"]


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API wants to be polled more often than it wants outside of tests."""
    monkeypatch.setattr(jobs, "POLL_AFTER", (50, 50))


@pytest.fixture(autouse=True)
def servers_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK ends all streams of a process once any of its servers has been told to stop, also one
    of a test before: that is right for a process of its own only."""
    monkeypatch.setattr(AppStatus, "should_exit", False)
    monkeypatch.setattr(AppStatus, "enable_automatic_graceful_drain", False)


@pytest.fixture
async def working(worker: Workers) -> AsyncIterator[None]:
    """A worker runs."""
    running, _ = worker()
    task = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
    yield
    running.stop()
    async with asyncio.timeout(10):
        await task


@pytest.fixture
async def mcp_url(base_url: str) -> AsyncIterator[str]:
    """`baton mcp --http` on a port of loopback."""
    async with served(create_http_app(base_url, "127.0.0.1")) as url:
        yield f"{url}/mcp"


@asynccontextmanager
async def connected(url: str, key: str, mode: str = "auto") -> AsyncIterator[Client]:
    """An agent with a key of its own."""
    headers = httpx2.Headers({"Authorization": f"Bearer {key}"}, encoding="utf-8")
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False, timeout=30) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


def text(result: CallToolResult) -> str:
    """What a model reads."""
    [content] = result.content
    assert isinstance(content, TextContent)
    return content.text


async def refusal(agent: Client, tool: str, **arguments: Any) -> str:
    """The sentence of a call that must fail."""
    result = await agent.call_tool(tool, arguments)
    assert result.is_error, text(result)
    assert "Traceback" not in text(result) and "fr_" not in text(result).replace("fr_…", "")
    return text(result)


async def test_over_stdio_an_agent_works_and_nothing_but_the_protocol_is_on_stdout(
    base_url: str, caller: Caller, working: None, tmp_path: Path
) -> None:
    await caller.ingest({"title": "Add a cache", "resource": "acme/web"})
    wire, said = tmp_path / "stdout", tmp_path / "stderr"
    program = StdioServerParameters(
        command="/bin/sh",
        args=["-c", f"'{sys.executable}' -P -m app mcp | tee '{wire}'"],
        env={"BATON_URL": base_url, "BATON_API_KEY": caller.key, "PYTHONPATH": str(ROOT)},
    )
    told: list[float] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        told.append(progress)

    with said.open("w") as errlog:
        async with Client(stdio_client(program, errlog=errlog), mode="legacy") as agent:
            assert agent.server_info and agent.server_info.name == "baton"
            listed = await agent.list_tools()
            assert {tool.name for tool in listed.tools} == {tool.name for tool in TOOLS}
            made = await agent.call_tool("generate_handoff", {}, progress_callback=hear)
            assert "Add a cache" in text(made) and not made.is_error
            assert "handoff_id" in await refusal(agent, "read_handoff", handoff_id=UNKNOWN)
    assert told and told == sorted(set(told))
    lines = wire.read_text().splitlines()
    assert lines and all(json.loads(line)["jsonrpc"] == "2.0" for line in lines)
    assert caller.key not in said.read_text() + wire.read_text()


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_over_http_every_tool_does_what_it_says(
    mcp_url: str, caller: Caller, working: None, mode: str
) -> None:
    await caller.ingest(
        {"title": "fix(cart): total is wrong, ENG-4", "author": "Ada", "resource": "acme/web"},
        {"source": "linear", "event_type": "issue", "title": "ENG-4", "content": "word " * 999},
    )
    called = set()

    async with connected(mcp_url, caller.key, mode) as agent:

        async def call(tool: str, **arguments: Any) -> CallToolResult:
            called.add(tool)
            result = await agent.call_tool(tool, arguments)
            assert not result.is_error, (tool, text(result))
            return result

        assert caller.project_id in text(await call("list_projects"))
        made = {}
        for tool in GENERATORS:
            result = await call(tool)
            artifact = result.structured_content["result"]
            assert text(result) == artifact["markdown"] and artifact["markdown"].startswith("# ")
            assert "related_event_ids" not in artifact
            made[tool] = result.structured_content["job"]
        for noun, several, count in (("handoff", "handoffs", 1), ("insight", "insights", 4)):
            listed = await call(f"list_{several}", project_id="ada")
            rows = listed.structured_content[several]
            assert len(rows) == count and all("markdown" not in row for row in rows)
            read = await call(f"read_{noun}", **{f"{noun}_id": rows[0]["id"]})
            assert read.structured_content[noun]["markdown"] == text(read)
            assert rows[0]["id"] in text(listed) and rows[0]["title"] in text(listed)
        answer = await call("ask", question="Is the total of the cart wrong?")
        told = answer.structured_content
        assert "total is wrong" in told["answer"] and "github" in text(answer)
        assert set(told) == {"answer", "citations"} and told["citations"][0] in text(answer)
        nothing = await call("ask", question="Who feeds the zebra?", filters={"slack": {}})
        assert nothing.structured_content["citations"] == []
        assert text(nothing) == "Nothing in the last 14 days speaks about this."
        seen = await call("get_job", job_id=made["generate_handoff"]["id"])
        assert seen.structured_content["job"]["status"] == "completed"
        assert text(seen).startswith("# ")
        events = await call("list_events", source="linear", limit=1)
        [event] = events.structured_content["events"]
        assert len(event["content"]) == mcp_server.QUOTED + 1 and event["content"].endswith("…")
        assert text(events).endswith(event["content"])
        await call("cancel_job", job_id=seen.structured_content["job"]["id"])
    assert called == {tool.name for tool in TOOLS}


async def test_each_client_over_http_acts_with_its_own_key(
    mcp_url: str, caller: Caller, stranger: Caller
) -> None:
    async with (
        connected(mcp_url, caller.key) as ours,
        connected(mcp_url, stranger.key, "legacy") as theirs,
    ):
        for agent, own in ((ours, caller), (theirs, stranger), (ours, caller)):
            listed = await agent.call_tool("list_projects")
            assert [p["id"] for p in listed.structured_content["projects"]] == [own.project_id]
        foreign = await refusal(theirs, "generate_handoff", project_id=caller.project_id)
        assert foreign == await refusal(theirs, "generate_handoff", project_id=UNKNOWN)


async def test_without_a_key_http_is_401_and_a_wrong_one_is_the_sentence_of_the_api(
    mcp_url: str, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with httpx.AsyncClient(trust_env=False) as http:
        for headers in ({}, {"Authorization": "Basic YTpi"}):
            answer = await http.post(mcp_url, json={}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"].startswith("Send a valid API key")
    for wrong in ("fr_" + "x" * 43, "fr_é"):
        async with connected(mcp_url, wrong) as agent:
            assert (await refusal(agent, "list_projects")).startswith("Send a valid API key")
    async with connected(mcp_url, caller.key) as agent:
        await agent.call_tool("list_projects")
    assert caller.key not in caplog.text


async def test_a_key_of_the_one_who_runs_it_over_http_is_nobodys(caller: Caller) -> None:
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "app", "mcp", "--http", "--port", "0"),
        env={"BATON_API_KEY": caller.key, "PYTHONPATH": str(ROOT)},
        stderr=asyncio.subprocess.PIPE,
    )
    assert program.stderr
    try:
        async with asyncio.timeout(30):
            while not (
                url := re.search(rb"http://127.0.0.1:\d+", line := await program.stderr.readline())
            ):
                assert line, "it did not start"
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(f"{url[0].decode()}/mcp", json={})
            guarded = await http.post(f"{url[0].decode()}/mcp", headers={"X-Big": "x" * 70_000})
        assert (answer.status_code, guarded.status_code) == (401, 431)
    finally:
        program.terminate()
        rest = await program.stderr.read()
        await program.wait()
    assert b"Application shutdown complete" in rest and b"Traceback" not in rest


async def test_what_is_wrong_is_a_sentence_that_names_the_argument(
    mcp_url: str, caller: Caller
) -> None:
    async with connected(mcp_url, caller.key) as agent:
        wrong: list[tuple[str, dict[str, Any], str]] = [
            ("generate_correlation", {"lookbackHours": 0}, "lookbackHours: must be greater than"),
            (
                "generate_correlation",
                {"lookbackHours": "7"},
                "lookbackHours: must be an integer",
            ),
            ("generate_handoff", {"sources": ["nope"]}, "sources: there is no source"),
            ("generate_handoff", {"job": {}}, "job: is not a known field."),
            ("generate_handoff", {"idempotency_key": "a b"}, "idempotency_key: must match"),
            (
                "generate_handoff",
                {"project_id": "nope"},
                '"nope" is the name of none; there are: ada',
            ),
            ("list_handoffs", {"limit": 101}, "limit: must be less than or equal to 100"),
            ("list_handoffs", {"limits": 1}, "limits: is not a known field."),
            ("list_insights", {"kind": "poem"}, "kind: must be 'cross_source_correlation'"),
            ("list_events", {"source": "nope"}, "source: there is no source"),
            ("read_handoff", {}, "handoff_id: is required."),
            ("ask", {}, "question: is required."),
            ("ask", {"question": " "}, "question: must have at least 1 character."),
            ("ask", {"question": "a", "filters": {"nope": {}}}, "filters.nope: there is no source"),
            ("read_insight", {"insight_id": "../handoffs/filters"}, "insight_id: no insight with"),
            ("get_job", {"job_id": UNKNOWN}, "job_id: no job with this id is visible to this key."),
            ("get_job", {"job_id": UNKNOWN, "wait_seconds": 46}, "wait_seconds: must be less than"),
        ]
        for tool, arguments, sentence in wrong:
            assert sentence in await refusal(agent, tool, **arguments), (tool, arguments)
        with pytest.raises(MCPError, match="no tool named nope"):
            await agent.call_tool("nope")


async def test_an_argument_that_is_null_was_left_out(mcp_url: str, caller: Caller) -> None:
    async with connected(mcp_url, caller.key) as agent:
        listed = await agent.call_tool("list_events", {"source": None, "limit": None})
        assert listed.structured_content == {"events": []}


async def test_of_several_projects_the_right_one_is_taken_or_all_are_named(
    mcp_url: str, caller: Caller, sql: asyncpg.Connection
) -> None:
    async with connected(mcp_url, caller.key) as agent:
        ids = [
            str(await sql.fetchval("select ops.create_project($1, $2)", name, caller.user_id))
            for name in ("Web Shop", "Twin", "Twin")
        ]
        sentence = await refusal(agent, "list_insights")
        assert sentence.startswith("project_id: say which")
        assert all(project_id in sentence for project_id in (caller.project_id, *ids))
        for name in ("web shop", "web-shop", ids[0]):
            listed = await agent.call_tool("list_insights", {"project_id": name})
            assert not listed.is_error and text(listed) == "There are no such insights."
        sentence = await refusal(agent, "list_insights", project_id="twin")
        assert ids[1] in sentence and ids[2] in sentence and ids[0] not in sentence


async def test_a_job_that_takes_long_is_handed_over_and_can_be_waited_for(
    mcp_url: str, caller: Caller, drain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(mcp_url, caller.key) as agent:
        await caller.ingest({"title": "Add a cache"})
        monkeypatch.setattr(mcp_server, "BLOCK", 0.2)
        told: list[float] = []

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            assert message == "queued"
            told.append(progress)

        given = await agent.call_tool("generate_handoff", {}, progress_callback=hear)
        job = given.structured_content["job"]
        assert not given.is_error and given.structured_content["result"] is None
        assert job["id"] in text(given) and "get_job" in text(given)
        assert len(told) > 1 and told == sorted(set(told)) and told[-1] < 1
        again = await agent.call_tool("get_job", {"job_id": job["id"], "wait_seconds": 0})
        assert "still pending" in text(again)
        await drain()
        assert "Add a cache" in text(await agent.call_tool("get_job", {"job_id": job["id"]}))


async def test_a_job_that_is_cancelled_ends_and_one_that_has_ended_stays(
    mcp_url: str, caller: Caller, drain: Any
) -> None:
    await caller.ingest({"title": "Add a cache"})
    unwanted, done = await caller.submit(), await caller.submit(sources=["github"])
    async with connected(mcp_url, caller.key) as agent:
        for _ in range(2):
            told = await agent.call_tool("cancel_job", {"job_id": unwanted})
            assert not told.is_error and text(told).startswith("cancelled: ")
            assert told.structured_content["job"]["outcome"] == "cancelled"
        await drain()
        told = await agent.call_tool("cancel_job", {"job_id": done})
        assert "had completed" in text(told)
        assert "Add a cache" in text(await agent.call_tool("get_job", {"job_id": done}))


async def test_a_call_made_again_with_its_key_makes_nothing_new(
    mcp_url: str, caller: Caller, working: None
) -> None:
    await caller.ingest({"title": "Add a cache"})
    async with connected(mcp_url, caller.key) as agent:
        asked = {"project_id": "ada", "idempotency_key": "mine"}
        one, two = [await agent.call_tool("generate_handoff", asked) for _ in range(2)]
        assert one.structured_content["job"]["id"] == two.structured_content["job"]["id"]
        assert text(one) == text(two)
        other = await refusal(agent, "generate_handoff", **asked, sources=["github"])
        assert "Idempotency-Key" in other
        listed = await agent.call_tool("list_handoffs")
        assert len(listed.structured_content["handoffs"]) == 1


async def test_a_job_that_fails_is_an_error_with_the_sentence_of_the_api(
    mcp_url: str, caller: Caller, working: None
) -> None:
    async with connected(mcp_url, caller.key) as agent:
        failed = await agent.call_tool("generate_handoff")
        assert failed.is_error and text(failed).startswith("no_result: There were no events")
        job = failed.structured_content["job"]
        read = await agent.call_tool("get_job", {"job_id": job["id"]})
        assert not read.is_error and text(read) == text(failed)


def test_a_model_is_told_the_bounds_and_to_reuse_its_key() -> None:
    for tool in TOOLS:
        listed = tool.listed()
        properties = listed.input_schema["properties"]
        assert listed.input_schema["additionalProperties"] is False
        assert "null" not in json.dumps(listed.input_schema)
        assert listed.annotations and listed.annotations.open_world_hint is False
        spends = tool.name in SPENDING
        assert listed.annotations.read_only_hint is not (spends or tool.name == "cancel_job")
        assert "job" not in properties
        assert ("idempotency_key" in properties) is spends
        if spends:
            key = properties["idempotency_key"]["description"]
            assert "Reuse the same key when retrying" in key
            assert listed.description and "credit" in listed.description
            assert {"filters", "project_id"} <= set(properties)
        if tool.name in GENERATORS:
            assert "until" in properties and "required" not in listed.input_schema
    [correlation] = [t.listed() for t in TOOLS if t.name == "generate_correlation"]
    hours = correlation.input_schema["properties"]["lookbackHours"]
    assert hours == {"type": "integer", "minimum": 1, "maximum": 2160, "default": 168}


class Scripted:
    """An API that answers what a test says, and remembers what it was asked."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []
        self.told: list[tuple[float, float | None, str]] = []

    async def run(self, tool: str, **arguments: Any) -> CallToolResult:
        """Call a tool on it."""

        def answer(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            return self.answers.pop(0)

        async def report(progress: float, total: float | None, message: str) -> None:
            self.told.append((progress, total, message))

        transport = httpx.MockTransport(answer)
        [row] = [t for t in TOOLS if t.name == tool]
        async with httpx.AsyncClient(transport=transport, base_url="http://baton") as api:
            return await row.run(Call(api, "Bearer fr_key", report), arguments)


def accepted() -> httpx.Response:
    """What a request for an artifact is answered."""
    return httpx.Response(202, json={"jobId": UNKNOWN, **job("pending").json()})


def job(status: str, etag: str | None = None, **more: Any) -> httpx.Response:
    """What GET /jobs/{id} answers; with a version, as one that can be waited for."""
    headers = {"ETag": etag, "Preference-Applied": "wait=20"} if etag else {}
    progress = {"value": None, "step": "queued", "message": None}
    known = {"id": UNKNOWN, "status": status, "progress": progress}
    result = {"markdown": "# done"} if status == "completed" else None
    return httpx.Response(200, json={"job": known | more, "result": result}, headers=headers)


async def test_a_request_is_held_by_an_api_that_can_hold_it() -> None:
    api = Scripted(
        accepted(),
        job("pending", '"1"'),
        httpx.Response(304, headers={"ETag": '"1"', "Preference-Applied": "wait=20"}),
        job("processing", '"2"', progress={"value": 0.5, "step": "generating", "message": None}),
        job("completed", '"3"'),
    )
    done = await api.run("generate_handoff", project_id=UNKNOWN, idempotency_key="mine")
    assert text(done) == "# done"
    first, unheld, *held = api.asked
    assert first.headers["Idempotency-Key"] == "mine"
    assert all(r.headers["Authorization"] == "Bearer fr_key" for r in api.asked)
    assert "prefer" not in unheld.headers and "if-none-match" not in unheld.headers
    assert [r.headers["Prefer"] for r in held] == ["wait=20"] * 3
    assert [r.headers["If-None-Match"] for r in held] == ['"1"', '"1"', '"2"']
    assert [t[0] for t in api.told] == sorted({t[0] for t in api.told})
    assert api.told[-1] == (0.5, 1.0, "generating")


def late() -> httpx.Response:
    """What a question is answered that takes longer than the API holds a request."""
    headers = {"Location": f"/api/v1/jobs/{UNKNOWN}", "Retry-After": "1"}
    return httpx.Response(503, json={"error": "Not yet."}, headers=headers)


async def test_an_answer_that_takes_long_is_waited_for_and_asked_for_with_the_same_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"answer": "It broke.", "citations": ["ev:1"]}
    operation = {"Operation-Location": f"http://baton/api/v1/jobs/{UNKNOWN}"}
    api = Scripted(
        late(),
        job("processing", '"1"'),
        job("completed", '"2"'),
        httpx.Response(200, json=said, headers=operation),
        job("completed"),
    )
    done = await api.run("ask", project_id=UNKNOWN, question="Why?")
    assert done.structured_content == said and text(done) == "# done\nEvents: ev:1"
    asked = [r for r in api.asked if r.method == "POST"]
    assert len({r.headers["Idempotency-Key"] for r in asked}) == 1 and len(asked) == 2
    assert [json.loads(r.content) for r in asked] == [{"question": "Why?"}] * 2

    monkeypatch.setattr(mcp_server, "BLOCK", 0.0)
    api = Scripted(late(), job("processing"))
    given = await api.run("ask", project_id=UNKNOWN, question="Why?", idempotency_key="mine")
    assert "Call get_job" in text(given) and not given.is_error
    assert api.asked[0].headers["Idempotency-Key"] == "mine"


async def test_a_version_does_not_make_an_api_that_cannot_wait_be_asked_without_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paused: list[float] = []

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    unwilling = [httpx.Response(304, headers={"ETag": '"1"', "Retry-After": "3"})] * 2
    api = Scripted(job("pending", '"1"'), *unwilling, job("completed", '"2"'))
    await api.run("get_job", job_id=UNKNOWN)
    assert paused == [0, 3, 3]


async def test_a_limit_or_an_outage_is_waited_out_once_the_job_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paused: list[float] = []

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    busy = [
        httpx.Response(c, json={"error": "Wait."}, headers={"Retry-After": "4"}) for c in (429, 503)
    ]
    api = Scripted(accepted(), *busy, job("completed"))
    assert text(await api.run("generate_handoff", project_id=UNKNOWN)) == "# done"
    assert paused == [4, 4]
    with pytest.raises(
        RequestFailed, match="^Wait. Try again in 4 s. Then use the same idempotency_key.$"
    ):
        await Scripted(*busy).run("generate_handoff", project_id=UNKNOWN, idempotency_key="mine")
    with pytest.raises(RequestFailed, match="^Wait. Try again in 4 s.$"):
        await Scripted(*busy).run("get_job", job_id=UNKNOWN)


def test_without_a_key_or_without_the_extra_one_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    done = CliRunner().invoke(cli, ["mcp"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "BATON_API_KEY: is required, to call the API with.\n"
    monkeypatch.delitem(sys.modules, "app.mcp_server")
    monkeypatch.delattr("app.mcp_server")
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    done = CliRunner().invoke(cli, ["mcp"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "`baton mcp` needs the extra `mcp`: pip install 'baton[mcp]'.\n"
