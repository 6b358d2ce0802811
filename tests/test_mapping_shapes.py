"""No mapping fails, whatever a source that proved who it is sends: on every documented payload."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from app.schemas import EventInput
from tasks.mapping import bounded
from tasks.sources.event import Delivery

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
PAYLOADS = Path(__file__).parent / "payloads"
SOURCES = sorted(path.name for path in PAYLOADS.iterdir() if path.is_dir())
ODD: tuple[Any, ...] = (
    None, True, -1, 1e300, 2**70, "", "\0", "https://[", "x" * 3_000, [], {}, [None], {"id": {}},
)  # fmt: skip
DEEP: Any = "end"
for name in ("content", "elements", "text", "blocks") * 50:
    DEEP = {"type": "doc", name: [DEEP]}
NESTED: Any = []
for _ in range(1_020):  # as deep as a body may be parsed
    NESTED = [NESTED]


def headers(source: str, name: str) -> dict[str, str]:
    """Those that tell which event it is; a file is called after it."""
    if source == "github":
        return {"x-github-event": name.partition(".")[0]}
    return {"x-event-key": ":".join(name.split(".")[:2])} if source == "bitbucket" else {}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a body, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def odd(body: Any) -> Iterator[Any]:
    """The body with one piece of it gone, or of another shape, at a time."""
    yield from (*ODD, DEEP, NESTED)
    for at, (container, key) in enumerate(places(body)):
        kept = container[key]
        # Each place in turn gets a few of them: all of them at each would take minutes.
        for value in (None, *(ODD[(at * 3 + step) % len(ODD)] for step in range(3)), DEEP, NESTED):
            container[key] = value
            yield body
        container[key] = kept
        if isinstance(container, dict):
            del container[key]
            yield body
            container[key] = kept


@pytest.mark.parametrize("source", SOURCES)
def test_no_shape_of_a_body_makes_a_mapping_fail(source: str) -> None:
    mapping = import_module(f"tasks.sources.{source}").events
    for path in sorted((PAYLOADS / source).glob("*.json")):
        for body in odd(json.loads(path.read_text())):
            for event in mapping(Delivery(headers(source, path.stem), body, NOW)):
                row = event.row(source, NOW)
                del row["in"], row["metadata"]
                EventInput.model_validate(row)
                json.dumps(bounded(event.metadata), allow_nan=False)
