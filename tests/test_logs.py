"""One event a line, the same fields everywhere, whoever logged it."""

import io
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import orjson
import pytest
from conftest import Caller, Workers, served
from llm_servers import KEY, Server, Turn, good_answer

from app import logs
from app.db import Database
from app.settings import Settings
from tasks.delivery import Deliverer
from tasks.outbound import Outbound
from tasks.providers import open_provider


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Undoes what `configure` does to the loggers of this process."""
    root, procrastinate = logging.getLogger(), logging.getLogger("procrastinate")
    before = (root.level, list(root.handlers), procrastinate.level)
    yield
    root.handlers[:] = before[1]
    root.setLevel(before[0])
    procrastinate.setLevel(before[2])


def record(message: str = "claim", **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "baton.test", "levelno": 20, "levelname": "INFO"})
    made.msg = message
    vars(made).update(extra)
    return made


def test_a_json_line_has_the_event_and_the_fields_that_were_passed() -> None:
    line = logs.JsonFormatter().format(record(job_id="j1", ms=1.5, nothing=None))
    assert "\n" not in line
    body = orjson.loads(line)
    assert datetime.fromisoformat(body.pop("time")).tzinfo == UTC
    assert body == {
        "level": "info",
        "logger": "baton.test",
        "event": "claim",
        "job_id": "j1",
        "ms": 1.5,
        "nothing": None,
    }


def test_the_arguments_of_a_message_are_put_into_it_and_are_no_fields() -> None:
    made = record("listener lost: %r")
    made.args = ("gone",)
    body = orjson.loads(logs.JsonFormatter().format(made))
    assert body["event"] == "listener lost: 'gone'"
    assert set(body) == {"time", "level", "logger", "event"}


@pytest.mark.parametrize(
    ("value", "written"),
    [(ValueError("no"), "no"), ({"a", "b"} - {"b"}, "{'a'}"), (10**40, str(10**40))],
)
def test_what_json_cannot_hold_is_written_as_its_text(value: object, written: str) -> None:
    body = orjson.loads(logs.JsonFormatter().format(record(cause=value, job_id="j1")))
    assert (body["cause"], body["job_id"]) == (written, "j1")


def test_the_request_id_is_in_every_line_of_a_request_and_in_no_other() -> None:
    token = logs.request_id.set("r-1")
    try:
        inside = orjson.loads(logs.JsonFormatter().format(record()))
        assert " request_id=r-1" in logs.TextFormatter().format(record())
    finally:
        logs.request_id.reset(token)
    assert inside["request_id"] == "r-1"
    assert "request_id" not in orjson.loads(logs.JsonFormatter().format(record()))


def test_a_traceback_is_part_of_the_same_json_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        made = record("unexpected")
        made.exc_info = sys.exc_info()
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: boom" in orjson.loads(line)["exception"]
    assert logs.TextFormatter().format(made).endswith("ValueError: boom")


def test_a_text_line_reads_time_level_event_and_fields() -> None:
    line = logs.TextFormatter().format(record(job_id="j1", ms=3))
    assert line[2] == line[5] == ":"
    assert line[8:] == " INFO    claim job_id=j1 ms=3"


@pytest.mark.parametrize("style", ["json", "text"])
def test_configure_sends_everything_of_this_process_to_stderr(
    style: str, monkeypatch: pytest.MonkeyPatch, root_logger: None
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    logs.configure(style)
    logging.getLogger("baton.test").info("claim", extra={"job_id": "j1"})
    logging.getLogger("baton.test").debug("too fine")
    logging.getLogger("procrastinate.worker").info("each ticket")
    [line] = stderr.getvalue().splitlines()
    assert line.startswith("{") == (style == "json")
    assert "j1" in line


def test_what_it_is_about_is_in_every_line_of_the_body_and_a_line_may_say_otherwise() -> None:
    with logs.about({"job_id": "j1", "attempt": 2}, "r-1"):
        inside = orjson.loads(logs.JsonFormatter().format(record(attempt=3)))
    assert (inside["job_id"], inside["attempt"], inside["request_id"]) == ("j1", 3, "r-1")
    assert "job_id" not in orjson.loads(logs.JsonFormatter().format(record()))


# --- A run, and all that it logged -----------------------------------------------------------


class Lines(logging.Handler):
    """What this process would have logged, as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logs.JsonFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of this event."""
        return [line for line in map(orjson.loads, self.lines) if line["event"] == name]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """All that a process logs at INFO."""
    root, kept = logging.getLogger(), Lines()
    level = root.level
    root.addHandler(kept)
    root.setLevel(logging.INFO)
    yield kept
    root.removeHandler(kept)
    root.setLevel(level)


SECRETS = {
    "content": "canary-content-1f0c",
    "title": "canary-title-88ab",
    "author": "canary-author-0d11",
    "metadata": "canary-metadata-77e2",
    "query": "canary-query-5c5c",
    "url": "canary-token-of-a-url-9a9a",
    "answer": "canary-answer-of-the-model-4d4d",
    "artifact": "canary-lru",
    "idempotency key": "canary-idempotency-2b2b",
    "provider key": KEY,
    "e-mail": "ada@example.com",
}
SCRIPT = (
    Turn(text=f"not json: {SECRETS['answer']}"),
    Turn(text=SECRETS["answer"]),  # still not: that job fails
    Turn(status=500, error={"error": {"message": SECRETS["answer"]}}),
    Turn(status=401, error={"error": {"message": f"{SECRETS['answer']} {KEY}"}}),
    Turn(finish="refusal"),
    Turn(text=orjson.dumps(good_answer("handoff", ["e1"])).decode().replace("LRU", "canary-lru")),
)


async def submitted(caller: Caller, number: int) -> str:
    """Ask with a secret wherever one fits; answers the job's id."""
    answer = await caller.http.post(
        "/handoffs",
        json={
            "project_id": caller.project_id,
            "job": {
                "metadata": {"ticket": SECRETS["metadata"]},
                "webhook_url": f"http://127.0.0.1:9/{SECRETS['url']}",
            },
        },
        headers={
            "X-Request-Id": f"r-{number}",
            "Idempotency-Key": f"{SECRETS['idempotency key']}{number}",
        },
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["jobId"])


async def test_a_run_logs_ids_and_nothing_that_anybody_wrote_or_must_not_know(
    caller: Caller,
    worker: Workers,
    database: Database,
    sql: asyncpg.Connection,
    lines: Lines,
) -> None:
    await caller.ingest(
        {
            "title": SECRETS["title"],
            "content": SECRETS["content"],
            "author": SECRETS["author"],
            "metadata": {"a": SECRETS["metadata"]},
        }
    )
    await caller.http.get(f"/events?q={SECRETS['query']}&source=nope")
    await caller.http.post("/handoffs", json={"project_id": SECRETS["content"]})
    await caller.http.get("/projects", headers={"Authorization": f"Bearer {KEY}"})
    asked = [await submitted(caller, number) for number in range(5)]
    models = Server(*SCRIPT)
    async with served(models.app) as url:
        settings = Settings(provider="openai", openai_api_key=KEY, openai_base_url=f"{url}/v1")
        async with open_provider(settings) as provider:
            working, _ = worker(provider, concurrency=1)
            working.wait = False
            await working.run()  # type: ignore[no-untyped-call]  # unannotated upstream
    await Deliverer(database, Outbound(())).drain()

    ends = {line["job_id"]: line for n in ("complete", "fail", "park") for line in lines.events(n)}
    assert {line["event"] for line in ends.values()} == {"complete", "fail", "park"}
    assert set(ends) == set(asked)
    for number, job_id in enumerate(asked):
        [submit] = [line for line in lines.events("submit") if line["job_id"] == job_id]
        assert (submit["request_id"], submit["kind"]) == (f"r-{number}", "handoff")
        [claim] = [line for line in lines.events("claim") if line["job_id"] == job_id]
        for line in (claim, ends[job_id]):  # which the worker says
            told = (line["request_id"], line["kind"], line["attempt"])
            assert told == (f"r-{number}", "handoff", 1)
    assert lines.events("webhook")
    ours = [line for line in lines.lines if orjson.loads(line)["logger"] != "httpx"]  # the caller's
    everything = "\n".join(ours)
    hidden = {
        **SECRETS,
        "key": caller.key[3:],
        "webhook secret": await sql.fetchval("select secret from webhook_secrets"),
    }
    assert [what for what, secret in hidden.items() if secret in everything] == []
