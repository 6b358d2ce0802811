"""Whatever a source sends, what is made of it fits into an event."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from app.schemas import CONTENT_MAX, EventInput
from tasks.sources.event import Resource, SourceEvent, moment

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)


def event(**given: object) -> SourceEvent:
    fields = {"event_type": "issue.opened", "title": "Broken", "external_id": "1"} | given
    return SourceEvent(**fields)  # type: ignore[arg-type]


def test_what_is_too_long_is_cut_and_what_cannot_be_read_is_left_out() -> None:
    row = event(
        title="a\0 long\n title " + "x" * 2_000,
        content="y" * (CONTENT_MAX + 1),
        branch="b" * 400,
        url="javascript:alert(1)",
        author="",
        priority=3,
        occurred_at="yesterday",
        resource=Resource("r" * 400, "", "board"),
    ).row("github", NOW)
    resource = row.pop("in")
    assert EventInput.model_validate(row)
    assert row["title"].startswith("a long title xxx") and row["title"].endswith("…")
    assert (row["url"], row["author"], row["priority"]) == (None, None, "3")
    assert row["occurred_at"] == "2026-03-02T12:00:00Z"
    assert resource["id"] == row["resource"] == resource["name"]


def test_an_event_without_words_is_called_what_it_is() -> None:
    assert event(title=" \n").row("github", NOW)["title"] == "issue.opened"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-03-02T12:00:00Z", NOW),
        ("2026-03-02T13:00:00.000+01:00", NOW),
        ("2026-03-02T12:00:00", NOW),
        ("2026-03-02 12:00:00 UTC", NOW),
        ("2026-03-02 14:00:00 +0200", NOW),
        (NOW.timestamp(), NOW),
        (int(NOW.timestamp() * 1000), NOW),
        (f"{NOW.timestamp():.6f}", NOW),
        (NOW.astimezone(timezone(timedelta(hours=1))), NOW),
        ("soon", None),
        (-1, None),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+01:00", None),
        ("2201-01-01T00:00:00Z", None),
        (None, None),
        (1e300, None),
        ({}, None),
    ],
)
def test_times_are_read_as_sources_write_them(written: object, read: datetime | None) -> None:
    assert moment(written) == read
