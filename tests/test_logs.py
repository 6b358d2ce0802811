"""One event a line, the same fields everywhere, whoever logged it."""

import io
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import orjson
import pytest

from app import logs


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
