"""What the tools that watch over programs send, CloudEvents and plain JSON, as events."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_source_forges import ODD, mutations

from app.schemas import EventInput
from tasks import signals
from tasks.context import Event
from tasks.sources import (
    alertmanager,
    cloudevents,
    generic,
    grafana,
    incident_io,
    pagerduty,
    sentry,
)
from tasks.sources.event import Delivery, SourceEvent, moment

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
PAYLOADS = Path(__file__).parent / "payloads"
TABLE = PAYLOADS / "ops.md"
SOURCES: dict[str, ModuleType] = {
    "sentry": sentry,
    "pagerduty": pagerduty,
    "incident_io": incident_io,
    "grafana": grafana,
    "alertmanager": alertmanager,
    "cloudevents": cloudevents,
    "generic": generic,
}
FILES = [path for source in SOURCES for path in sorted((PAYLOADS / source).glob("*.json"))]
COLUMNS = (
    "payload", "event_type", "title", "resource", "priority", "author", "occurred_at",
    "external_id", "role", "state", "own", "url",
)  # fmt: skip
VOCABULARY = {"cloudevents": "netlify", "generic": "netlify"}  # sources that may send these


def delivery(path: Path) -> Delivery:
    """As the source would send it; a file is called after its event."""
    source, name = path.parent.name, path.stem
    body = json.loads(path.read_text())
    if source == "sentry":
        return Delivery({"sentry-hook-resource": name.partition(".")[0]}, body, NOW)
    if name.startswith("binary"):
        return Delivery(body["headers"], body["body"], NOW)
    kinds = {"structured": "application/cloudevents+json", "batch": cloudevents.MANY}
    kind = kinds.get(name.partition(".")[0], "application/json")
    return Delivery({"content-type": kind}, body, NOW)


def rows(source: str, given: Delivery) -> list[dict[str, Any]]:
    """The events as they are stored; each fits the table, whatever was sent."""
    named = VOCABULARY.get(source, source)
    made = [event.row(named, NOW) for event in SOURCES[source].events(given)]
    for row in made:
        EventInput.model_validate({k: v for k, v in row.items() if k not in ("in", "metadata")})
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
        arrived = "when it arrived" if row["occurred_at"] == "2026-03-02T12:00:00Z" else ""
        cells = (
            payload, row["event_type"], row["title"], row["resource"], row["priority"],
            row["author"], arrived or row["occurred_at"], row["external_id"], signal.role,
            signal.state, signal.own, row["url"],
        )  # fmt: skip
        yield f"| {' | '.join(str(cell or '').replace('|', '/') for cell in cells)} |"


def table() -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *(line for path in FILES for line in shown(path))]) + "\n"


def test_each_documented_payload_gives_the_events_that_the_table_shows() -> None:
    """After a change that is meant, `python tests/test_source_ops.py` writes the table anew."""
    assert table() == TABLE.read_text()


@pytest.mark.parametrize("source", SOURCES)
def test_odd_shapes_give_poorer_events_and_never_an_error(source: str) -> None:
    for path in (path for path in FILES if path.parent.name == source):
        given = delivery(path)
        for body in (*mutations({"at": given.body}), *({"at": odd} for odd in ODD)):
            if "at" in body:
                rows(source, Delivery(given.headers, body["at"], NOW))


def one(source: str, name: str) -> SourceEvent:
    [event] = SOURCES[source].events(delivery(PAYLOADS / source / f"{name}.json"))
    assert isinstance(event, SourceEvent)
    return event


def test_what_alertmanager_repeats_while_it_fires_is_one_event() -> None:
    given = json.loads((PAYLOADS / "alertmanager" / "firing.json").read_text())
    first = alertmanager.events(Delivery({}, given, NOW))
    again = given | {"groupKey": "{}:{}", "receiver": "other"}
    assert [e.external_id for e in alertmanager.events(Delivery({}, again, NOW))] == [
        e.external_id for e in first
    ]
    again["alerts"][0]["startsAt"] = "2018-08-04T09:52:26Z"
    [later] = alertmanager.events(Delivery({}, again, NOW))
    assert later.external_id != first[0].external_id


def test_alerts_without_a_fingerprint_are_told_apart_by_their_labels() -> None:
    [firing, resolved] = alertmanager.events(delivery(PAYLOADS / "alertmanager" / "mixed.json"))
    assert firing.external_id and resolved.external_id
    assert firing.external_id.split(":")[0] != resolved.external_id.split(":")[0]


def test_the_resource_of_an_alert_is_what_people_call_it() -> None:
    [by_namespace, by_service] = alertmanager.events(
        delivery(PAYLOADS / "alertmanager" / "mixed.json")
    )
    by_job = one("alertmanager", "firing")
    named = [event.resource and event.resource.id for event in (by_job, by_namespace, by_service)]
    assert named == ["prometheus24", "checkout", "payments"]


def test_an_alert_of_sentry_has_the_address_of_its_issue() -> None:
    issue, error = one("sentry", "issue.created"), one("sentry", "error.created")
    assert issue.url == error.url == "https://sentry.io/organizations/test-org/issues/1170820242/"
    assert issue.resource and error.resource and issue.resource.id == error.resource.id


def test_what_became_of_an_issue_happened_when_sentry_sent_it() -> None:
    given = delivery(PAYLOADS / "sentry" / "issue.resolved.json")
    at = {**given.headers, "sentry-hook-timestamp": "1772445600"}
    [event] = sentry.events(Delivery(at, given.body, NOW))
    assert moment(event.occurred_at) == datetime(2026, 3, 2, 10, tzinfo=UTC)


def test_many_errors_of_one_issue_in_a_day_are_one_event() -> None:
    given = json.loads((PAYLOADS / "sentry" / "error.created.json").read_text())
    headers = {"sentry-hook-resource": "error"}
    ids = set()
    for at in ("2019-08-19T00:00:01Z", "2019-08-19T23:00:00Z", "2019-08-20T00:00:01Z"):
        given["data"]["error"] |= {"datetime": at, "event_id": at}
        ids |= {event.external_id for event in sentry.events(Delivery(headers, given, NOW))}
    assert len(ids) == 2


def test_an_issue_that_a_commit_resolved_is_tied_to_the_commit() -> None:
    [row] = rows("sentry", delivery(PAYLOADS / "sentry" / "issue.resolved.json"))
    assert "@9f2c1ab" in read(row).references


def test_a_follow_up_is_tied_to_the_ticket_that_it_was_exported_to() -> None:
    name = "public_incident.follow_up_created_v2.json"
    [row] = rows("incident_io", delivery(PAYLOADS / "incident_io" / name))
    signal = read(row)
    assert (signal.role, signal.state) == ("ticket", "open")
    assert "INC-1609" in signal.references


def test_nothing_is_told_of_what_is_private() -> None:
    for path in (PAYLOADS / "incident_io").glob("private_*.json"):
        assert incident_io.events(delivery(path)) == []


def test_a_changed_service_is_no_incident() -> None:
    [row] = rows("pagerduty", delivery(PAYLOADS / "pagerduty" / "service.updated.json"))
    assert read(row).role == "other"


@pytest.mark.parametrize(
    "name", ["structured", "structured.data", "structured.base64", "batch", "binary"]
)
def test_a_cloud_event_is_told_by_its_source_and_id(name: str) -> None:
    given = delivery(PAYLOADS / "cloudevents" / f"{name}.json")
    assert cloudevents.are_in(given)
    bodies = given.body if name == "batch" else [given.body]
    for event, body in zip(cloudevents.events(given), bodies, strict=True):
        attributes = body if name != "binary" else {k[3:]: v for k, v in given.headers.items()}
        assert event.external_id == f"{attributes['source']} {attributes['id']}"
        assert event.resource and event.resource.id == attributes["source"]


def test_the_data_of_a_cloud_event_give_title_address_and_author() -> None:
    event = one("cloudevents", "structured.data")
    assert (event.title, event.url, event.author) == (
        "Pipeline nightly is red", "https://ci.example.com/runs/7", "Ada",
    )  # fmt: skip
    assert one("cloudevents", "structured.base64").content == "Hello"
    assert one("cloudevents", "binary.text").content == "The cache is warm again"


def test_a_cloud_event_that_is_none_is_kept() -> None:
    event = one("cloudevents", "structured.wrong")
    assert (event.title, event.external_id) == ("Kept all the same", "/mycontext C1")


def test_what_may_be_secret_is_in_no_excerpt() -> None:
    event = one("generic", "nothing")
    assert event.content == "counter: 3"


def test_a_body_that_nobody_knows_is_looked_at_within_bounds() -> None:
    wide = {f"k{n}": {f"k{m}": {"title": "deep"} for m in range(100)} for n in range(100)}
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"next": deep, "text": "x" * 50_000}
    for body in (wide, deep, [wide] * 1_000, "x" * 1_000_000):
        for event in generic.events(Delivery({}, body, NOW)):
            assert len(event.content or "") <= generic.EXCERPT_MAX


if __name__ == "__main__":
    TABLE.write_text(table())
