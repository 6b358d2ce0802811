"""A trace follows a request through its job into the call of a model; without a receiver, none."""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import asyncpg
import orjson
import pytest
from conftest import Caller, served
from llm_servers import KEY, SAYS_IT_IS, USAGE, Server
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app import tracing
from app.settings import Settings
from tasks.providers import open_provider

Drain = Callable[..., Awaitable[None]]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Traced(InMemorySpanExporter):
    """The spans that have ended."""

    def named(self, name: str) -> ReadableSpan:
        [found] = [span for span in self.get_finished_spans() if span.name == name]
        return found

    def names(self) -> list[str]:
        return sorted(span.name for span in self.get_finished_spans())


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    spans = Traced()
    tracing.start("baton-test", "1", processor=SimpleSpanProcessor(spans))
    yield spans
    tracing.stop()


def ids(span: ReadableSpan) -> tuple[str, str, str | None]:
    """Trace, span and parent as the wire has them."""
    assert span.context
    parent = f"{span.parent.span_id:016x}" if span.parent else None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", parent


async def ask(caller: Caller, path: str = "/handoffs", **headers: str) -> str:
    answer = await caller.http.post(
        path, json={"project_id": caller.project_id} if path == "/handoffs" else {}, headers=headers
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["jobId"])


async def test_a_trace_goes_from_the_request_through_the_job_into_the_call_of_the_model(
    caller: Caller, drain: Drain, traced: Traced
) -> None:
    await caller.ingest({"title": "feat: a title that is nobody's business"})
    await ask(caller, traceparent=TRACEPARENT, **{"X-Request-Id": "r-1"})
    models = Server()
    async with served(models.app) as url:
        settings = Settings(provider="openai", openai_api_key=KEY, openai_base_url=f"{url}/v1")
        async with open_provider(settings) as provider:
            await drain(provider)
    submit, attempt = traced.named("POST /api/v1/handoffs"), traced.named("attempt handoff")
    [call] = [span for span in traced.get_finished_spans() if span.name.startswith("chat ")]
    assert ids(submit)[0] == ids(attempt)[0] == ids(call)[0] == TRACE
    assert ids(submit)[2] == PARENT
    assert ids(attempt)[2] == ids(submit)[1]
    inside = {ids(traced.named(name))[2] for name in ("context", "complete", "store")}
    assert inside == {ids(attempt)[1]}
    assert ids(call)[2] == ids(traced.named("complete"))[1]
    assert (submit.kind, attempt.kind, call.kind) == (
        SpanKind.SERVER,
        SpanKind.CONSUMER,
        SpanKind.CLIENT,
    )
    assert submit.attributes and attempt.attributes and call.attributes
    assert submit.attributes["http.route"] == "/api/v1/handoffs"
    assert submit.attributes["http.response.status_code"] == 202
    assert submit.attributes["baton.request_id"] == "r-1"
    assert attempt.attributes["baton.transition"] == "complete"
    assert call.attributes["gen_ai.operation.name"] == "chat"
    assert call.attributes["gen_ai.provider.name"] == "openai"
    assert call.attributes["gen_ai.response.model"] == SAYS_IT_IS
    assert call.attributes["gen_ai.usage.input_tokens"] == USAGE[0]
    assert call.attributes["gen_ai.usage.output_tokens"] == USAGE[1]
    everything = "".join(span.to_json() for span in traced.get_finished_spans())
    for secret in ("nobody's business", KEY, caller.key, "LRU"):
        assert secret not in everything


async def test_a_retry_is_traced_as_part_of_its_own_request(
    caller: Caller, drain: Drain, traced: Traced, sql: asyncpg.Connection
) -> None:
    failed = await ask(caller, traceparent=TRACEPARENT)
    await drain()
    other = TRACEPARENT.replace("4bf9", "5bf9")
    again = await ask(caller, f"/jobs/{failed}/retry", traceparent=other, **{"X-Request-Id": "r-2"})
    kept = await sql.fetchrow("select request_id, traceparent from jobs where id = $1", again)
    assert kept and kept["request_id"] == "r-2" and kept["traceparent"][3:7] == "5bf9"


async def test_no_client_can_say_what_its_job_is_traced_as_part_of(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    for name in ("traceparent", "request_id"):
        body = {"project_id": caller.project_id, "job": {name: TRACEPARENT}}
        answer = await caller.http.post("/handoffs", json=body)
        assert (answer.status_code, answer.json()["error"]) == (
            400,
            f"job.{name}: is not a known field.",
        )
    await ask(caller, traceparent=TRACEPARENT)  # nobody traces
    assert await sql.fetchval("select traceparent from jobs") is None


async def test_a_job_keeps_no_traceparent_that_is_none_and_no_endless_request_id(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    for given, kept in ((TRACEPARENT, TRACEPARENT), (TRACEPARENT + "x", None), ("'; --", None)):
        job = orjson.dumps({"traceparent": given, "request_id": "r" * 999}).decode()
        await sql.execute(
            "select replayed from submit_job($1, $2, 'handoff', null, null, null, '{}', $3)",
            caller.user_id,
            caller.project_id,
            job,
        )
        row = await sql.fetchrow(
            "select traceparent, length(request_id) as length from jobs order by id desc limit 1"
        )
        assert row and (row["traceparent"], row["length"]) == (kept, 128)


@pytest.mark.parametrize(
    "wrong", ["", "01-" + TRACEPARENT[3:], f"00-{'0' * 32}-{PARENT}-01", "x" * 99]
)
async def test_a_malformed_traceparent_begins_a_trace_of_its_own(
    wrong: str, caller: Caller, traced: Traced
) -> None:
    await caller.http.get("/projects", headers={"traceparent": wrong})
    trace, _, parent = ids(traced.named("GET /api/v1/projects"))
    assert parent is None and trace != TRACE


async def test_a_path_is_not_in_a_trace_and_health_checks_are_not_traced(
    base_url: str, caller: Caller, traced: Traced
) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        await caller.http.get(f"{base_url}{path}")
    await caller.http.get(f"{base_url}/nothing/secret-name?q=secret-query")
    assert traced.names() == ["GET other"]
    assert "secret" not in traced.named("GET other").to_json()


async def test_an_attempt_that_fails_is_one_in_its_trace(
    caller: Caller, drain: Drain, traced: Traced
) -> None:
    await ask(caller)
    await drain()
    attempt = traced.named("attempt handoff")
    assert attempt.attributes and attempt.attributes["error.type"] == "no_result"
    assert attempt.status.status_code is StatusCode.ERROR
    assert attempt.status.description is None and not attempt.events


def test_what_breaks_leaves_its_class_and_not_its_message(traced: Traced) -> None:
    with pytest.raises(ValueError), tracing.span("work"):
        raise ValueError("what an event says")
    work = traced.named("work")
    assert work.attributes and work.attributes["error.type"] == "ValueError"
    assert "what an event says" not in work.to_json()


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_wanted_when_opentelemetrys_own_variables_say_so(
    env: dict[str, str], wanted: bool
) -> None:
    assert Settings.from_env(env).traces == wanted


PROGRAM = """
import sys
import app.main, tasks.worker
from app import tracing
with tracing.span("work") as span:
    span.set("a", 1)
    assert tracing.traceparent() is None
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
sys.modules["opentelemetry"] = None
tracing.start("s", "1")
assert not tracing.on()
"""


def test_without_a_receiver_nothing_of_opentelemetry_is_loaded(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert "not traced" in done.stderr
