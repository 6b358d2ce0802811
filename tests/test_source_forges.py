"""What the forges and build services send, as events, on their own documented payloads."""

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from app.schemas import EventInput
from tasks import signals
from tasks.context import Event
from tasks.sources import bitbucket, buildkite, circleci, github, gitlab, vercel
from tasks.sources.event import Delivery, moment

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
PAYLOADS = Path(__file__).parent / "payloads"
TABLE = PAYLOADS / "forges.md"
SOURCES: dict[str, ModuleType] = {
    "github": github,
    "gitlab": gitlab,
    "bitbucket": bitbucket,
    "circleci": circleci,
    "buildkite": buildkite,
    "vercel": vercel,
}
FILES = [path for source in SOURCES for path in sorted((PAYLOADS / source).glob("*.json"))]
COLUMNS = (
    "payload", "event_type", "title", "resource", "default branch", "branch", "priority", "author",
    "occurred_at", "external_id", "role", "state", "own", "url",
)  # fmt: skip


def headers(source: str, name: str) -> dict[str, str]:
    """As the source would send them; a file is called after its event."""
    if source == "github":
        return {"x-github-event": name.partition(".")[0]}
    if source == "bitbucket":
        return {"x-event-key": ":".join(name.split(".")[:2])}
    return {}


def delivery(path: Path) -> Delivery:
    source, name = path.parent.name, path.stem
    return Delivery(headers(source, name), json.loads(path.read_text()), NOW)


def rows(source: str, given: Delivery) -> list[dict[str, Any]]:
    """The events as they are stored; each fits the table, whatever was sent."""
    made = [event.row(source, NOW) for event in SOURCES[source].events(given)]
    for row in made:
        EventInput.model_validate({k: v for k, v in row.items() if k != "in"})
        json.dumps(row, allow_nan=False)
    return made


def read(row: dict[str, Any]) -> signals.Signal:
    fields = {k: v for k, v in row.items() if k not in ("in", "occurred_at")}
    occurred_at = moment(row["occurred_at"])
    assert occurred_at
    return signals.read(Event(id="e", occurred_at=occurred_at, **fields))


def shown(path: Path) -> Iterator[str]:
    source = path.parent.name
    made = rows(source, delivery(path))
    payload = f"{source}/{path.name}"
    if not made:
        yield f"| {payload} | not told |{' |' * (len(COLUMNS) - 2)}"
    for row in made:
        signal = read(row)
        where = row["in"] or {}
        arrived = "when it arrived" if row["occurred_at"] == "2026-03-02T12:00:00Z" else ""
        cells = (
            payload, row["event_type"], row["title"], row["resource"], where.get("default_branch"),
            row["branch"], row["priority"], row["author"], arrived or row["occurred_at"],
            row["external_id"], signal.role, signal.state, signal.own, row["url"],
        )  # fmt: skip
        yield f"| {' | '.join(str(cell or '').replace('|', '/') for cell in cells)} |"


def table() -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *(line for path in FILES for line in shown(path))]) + "\n"


def test_each_documented_payload_gives_the_events_that_the_table_shows() -> None:
    """After a change that is meant, `python tests/test_source_forges.py` writes the table anew."""
    assert table() == TABLE.read_text()


ODD: tuple[Any, ...] = (
    None,
    "",
    "x\0y",
    "\u2028",
    -1,
    10**30,
    1.5,
    True,
    [],
    {},
    [None],
    [{}],
    {"id": [1]},
    "9" * 400,
)


def mutations(body: Any) -> Iterator[Any]:
    """The body with each of its values, at any depth, taken out or of another shape."""
    for at, path in enumerate(paths(body)):
        for turn in range(3):
            changed = copy.deepcopy(body)
            holder = changed
            for step in path[:-1]:
                holder = holder[step]
            if turn == 0 and isinstance(holder, dict):
                del holder[path[-1]]
            else:
                holder[path[-1]] = ODD[(at * 3 + turn) % len(ODD)]
            yield changed


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*above, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*above, key))


@pytest.mark.parametrize("source", SOURCES)
def test_odd_shapes_give_poorer_events_and_never_an_error(source: str) -> None:
    for path in (path for path in FILES if path.parent.name == source):
        given = delivery(path)
        for body in mutations(given.body):
            rows(source, Delivery(given.headers, body, NOW))
    for body in ODD:
        rows(source, Delivery({}, body, NOW))
        for name in (
            "push",
            "pull_request",
            "issues",
            "release",
            "repo:push",
            "pullrequest:created",
        ):
            rows(source, Delivery({"x-github-event": name, "x-event-key": name}, body, NOW))


def test_facts_without_a_number_of_their_own_get_no_id_that_others_would_share() -> None:
    body = {
        "action": "opened",
        "pull_request": {"title": "One"},
        "repository": {"full_name": "a/b"},
    }
    (row,) = rows("github", Delivery({"x-github-event": "pull_request"}, body, NOW))
    assert (row["event_type"], row["external_id"]) == ("pull_request.opened", None)


def test_a_leaked_secret_is_told_without_the_secret() -> None:
    given = delivery(PAYLOADS / "github" / "secret_scanning_alert.created.json")
    assert given.body["alert"]["secret"] not in json.dumps(rows("github", given))


def test_a_form_of_github_is_read_as_its_payload() -> None:
    given = delivery(PAYLOADS / "github" / "issues.opened.json")
    form = Delivery(given.headers, {"payload": json.dumps(given.body)}, NOW)
    assert rows("github", form) == rows("github", given)


def test_a_tag_is_one_fact_whether_the_push_or_the_ref_tells_it() -> None:
    ids = {
        row["external_id"]
        for name in ("push.tag", "create.tag")
        for row in rows("github", delivery(PAYLOADS / "github" / f"{name}.json"))
    }
    assert ids == {"tag:Codertocat/Hello-World:simple-tag"}


if __name__ == "__main__":
    TABLE.write_text(table())
