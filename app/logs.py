"""One event per line, with the same fields everywhere.

A line names what happened with the verb of the thing (`claim`, `complete`, `request`) and carries
ids and figures as fields. The one rule: no prompts, no bodies, no keys. A field is logged because
somebody passed it by name, never because an object happened to have it.
"""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_subject: ContextVar[Mapping[str, object]] = ContextVar("subject", default={})  # noqa: B039

# Attributes of every LogRecord; whatever else is on a record was passed with `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render the record; whatever JSON cannot hold is written as its text."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # an integer of more than 64 bits, a lone surrogate
            plain = {name: str(v).encode(errors="replace").decode() for name, v in line.items()}
            return orjson.dumps(plain).decode()


class TextFormatter(logging.Formatter):
    """For a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Render the record as time, level, event and `key=value` fields."""
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {record.levelname:<7} {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(style: str) -> None:
    """Send all logs of this process to stderr.

    Args:
        style: `json` or `text`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Procrastinate reports each ticket at INFO; a job's own events already say it once.
    logging.getLogger("procrastinate").setLevel(logging.WARNING)
    # It tells every address that is called, and where Slack takes a file is a secret.
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def about(fields: Mapping[str, object], request: str | None = None) -> Iterator[None]:
    """Put these fields into every line that is logged in the body, whoever logs it.

    Args:
        request: the id of the request that it is done for.
    """
    subject, id_ = _subject.set(fields), request_id.set(request)
    try:
        yield
    finally:
        _subject.reset(subject)
        request_id.reset(id_)


def trace(error: BaseException) -> str:
    """Where an error came from, without its message: a message may quote what a client sent."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 5:
        frames = "".join(traceback.format_tb(current.__traceback__))
        parts.append(f"{type(current).__name__}\n{frames}")
        current = current.__cause__ or current.__context__
    return "caused by ".join(parts)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    for name, value in _subject.get().items():
        fields.setdefault(name, value)
    current = request_id.get()
    if current is not None:
        fields.setdefault("request_id", current)
    return fields
