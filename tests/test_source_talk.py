"""What the tools that teams talk and plan in send, as events, on their own documented payloads."""

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
from tasks.sources import asana, discord, jira, linear, notion, slack
from tasks.sources.event import Delivery, moment

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
PAYLOADS = Path(__file__).parent / "payloads"
TABLE = PAYLOADS / "talk.md"
SOURCES: dict[str, ModuleType] = {
    "slack": slack,
    "discord": discord,
    "linear": linear,
    "jira": jira,
    "notion": notion,
    "asana": asana,
}
FILES = [path for source in SOURCES for path in sorted((PAYLOADS / source).glob("*.json"))]
COLUMNS = (
    "payload", "event_type", "title", "resource", "called", "priority", "author", "occurred_at",
    "external_id", "role", "state", "references", "metadata",
)  # fmt: skip


def rows(source: str, body: Any) -> list[dict[str, Any]]:
    """The events as they are stored; each fits the table, whatever was sent."""
    made = [e.row(source, NOW) for e in SOURCES[source].events(Delivery({}, body, NOW))]
    for row in made:
        EventInput.model_validate({k: v for k, v in row.items() if k != "in"})
        assert row["external_id"]
    return made


def read(source: str, row: dict[str, Any]) -> signals.Signal:
    """As what writes about it reads it."""
    fields = {k: v for k, v in row.items() if k not in ("in", "occurred_at")}
    occurred_at = moment(row["occurred_at"])
    assert occurred_at
    return signals.read(Event(id="e", occurred_at=occurred_at, **fields))


def of(payload: str) -> list[dict[str, Any]]:
    source = payload.partition("/")[0]
    return rows(source, json.loads((PAYLOADS / f"{payload}.json").read_text()))


def shown(path: Path) -> Iterator[str]:
    source = path.parent.name
    payload = f"{source}/{path.stem}"
    made = of(payload)
    if not made:
        yield f"| {payload} | not told |{' |' * (len(COLUMNS) - 2)}"
    for row in made:
        signal = read(source, row)
        where = row["in"] or {}
        metadata = ", ".join(
            f"{key}: {', '.join(value) if isinstance(value, list) else value}"
            for key, value in row["metadata"].items()
        )
        cells = (
            payload, row["event_type"], row["title"], row["resource"],
            f"{where['name']} ({where['type']})" if where else "the workspace", row["priority"],
            row["author"], row["occurred_at"], row["external_id"], signal.role, signal.state,
            ", ".join(signal.references), metadata,
        )  # fmt: skip
        yield f"| {' | '.join(str(cell or '').replace('|', '/') for cell in cells)} |"


def test_every_documented_payload_becomes_the_events_of_the_table() -> None:
    """To write the table anew: `python tests/test_source_talk.py`. Then read what changed in it."""
    assert TABLE.read_text() == table()


def table() -> str:
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join((*head, *(line for path in FILES for line in shown(path)), ""))


@pytest.mark.parametrize(
    ("payload", "event_type", "role", "state"),
    [
        ("slack/message.channels", "message", "chat", ""),
        ("slack/message.channels.reply", "message.reply", "chat", ""),
        ("discord/MESSAGE_CREATE.reply", "message.reply", "chat", ""),
        ("linear/Issue.create", "issue.opened", "ticket", "open"),
        ("linear/Issue.update.started", "issue.started", "ticket", "open"),
        ("linear/Issue.update.completed", "issue.completed", "ticket", "closed"),
        ("linear/Issue.update.canceled", "issue.cancelled", "ticket", "closed"),
        ("linear/Issue.update.reopened", "issue.reopened", "ticket", "open"),
        ("linear/Issue.remove", "issue.deleted", "ticket", "closed"),
        ("linear/Comment.create", "issue.commented", "chat", ""),
        ("jira/jira_issue_created", "issue.opened", "ticket", "open"),
        ("jira/jira_issue_updated.started", "issue.started", "ticket", "open"),
        ("jira/jira_issue_updated.closed", "issue.closed", "ticket", "closed"),
        ("jira/jira_issue_updated.reopened", "issue.reopened", "ticket", "open"),
        ("jira/jira_issue_updated.commented", "issue.commented", "chat", ""),
        ("jira/jira_version_released", "version.released", "release", ""),
        ("asana/story.added", "task.completed", "ticket", "closed"),
        ("asana/task.deleted", "task.deleted", "ticket", "closed"),
        ("notion/comment.created", "comment.created", "chat", ""),
        ("notion/page.content_updated", "page.updated", "other", ""),
        ("linear/ProjectUpdate.create", "project_update.posted", "other", ""),
    ],
)
def test_a_reader_sees_what_it_is_and_whether_it_is_open(
    payload: str, event_type: str, role: str, state: str
) -> None:
    row = of(payload)[0]
    signal = read(payload.partition("/")[0], row)
    assert (row["event_type"], signal.role, signal.state) == (event_type, role, state)


@pytest.mark.parametrize(
    ("payload", "reference"),
    [
        ("slack/message.channels.links", "acme/web#12"),
        ("slack/message.channels.links", "ENG-42"),
        ("slack/message.channels.blocks", "@6dcb09b"),
        ("discord/MESSAGE_CREATE", "acme/web#12"),
        ("discord/MESSAGE_CREATE.embed", "ENG-42"),
        ("linear/Issue.update.completed", "LIN-1778"),
        ("linear/Comment.create", "LIN-1778"),
        ("linear/Attachment.create", "acme/web#12"),
        ("linear/Issue.create", "logs.example.com/session/77"),
        ("jira/jira_issue_updated.closed", "JRA-20002"),
        ("jira/comment_created", "JRA-20002"),
        ("jira/jira_issue_created", "traces.example.com/nav/10"),
        ("jira/jira_issue_created.adf", "acme/web#12"),
    ],
)
def test_what_is_linked_or_named_can_be_tied(payload: str, reference: str) -> None:
    assert reference in read(payload.partition("/")[0], of(payload)[0]).references


@pytest.mark.parametrize(
    ("first", "reply"),
    [
        ("slack/message.channels", "slack/message.channels.reply"),
        ("discord/MESSAGE_CREATE", "discord/MESSAGE_CREATE.reply"),
        ("discord/MESSAGE_CREATE", "discord/MESSAGE_CREATE.in_thread"),
    ],
)
def test_a_reply_is_in_the_thread_of_its_parent(first: str, reply: str) -> None:
    (one,), (other,) = of(first), of(reply)
    assert one["resource"] == other["resource"]
    assert one["metadata"]["thread"] == other["metadata"]["thread"]
    assert "parent" not in one["metadata"]
    assert other["metadata"]["parent"] == one["external_id"]


def test_mrkdwn_is_told_as_people_read_it() -> None:
    (row,) = of("slack/message.channels.links")
    assert row["title"] == (
        "@cal the fix for ENG-42 is Keep the session (https://github.com/acme/web/pull/12), "
        "it's live & #general knows"
    )
    assert row["content"].endswith("\nWe decided to keep cookies for 30 days.")
    marks = "<!here> <!subteam^S1|@ops> <!date^1392734382^{date}|18 Feb>, <mailto:a@b.c|a>"
    assert slack.plain(marks) == "@here @ops 18 Feb, a@b.c"
    (blocks,) = of("slack/message.channels.blocks")
    assert blocks["content"].splitlines() == [
        "Deploy finished",
        "*web* is at https://github.com/acme/web/commit/6dcb09b5b57875f334f61aebed695e2e4193db5e",
        "see the run (https://deploys.example.com/runs/77), @U061F7AUR",
    ]


def test_a_document_is_told_as_plain_text() -> None:
    (row,) = of("jira/jira_issue_created.adf")
    assert row["content"].splitlines() == [
        "The fix is https://github.com/acme/web/pull/12 by @Ada",
        "- cookies (https://docs.example.com/cookies)",
        "- [x] measure",
    ]
    assert jira.plain("h2. Plan\n{code:java}x{code} by [~ada] [https://a.example/b]") == (
        "Plan\nx by @ada https://a.example/b"
    )


@pytest.mark.parametrize(
    "payload",
    ["slack/message.message_deleted", "linear/Comment.remove", "jira/comment_deleted"],
)
def test_what_somebody_took_back_is_not_repeated(payload: str) -> None:
    (row,) = of(payload)
    assert row["content"] is None and row["title"].endswith(" deleted")
    assert "deleted" in row["external_id"] or "remove" in payload
    assert "secret" not in json.dumps(row)


@pytest.mark.parametrize(
    "payload",
    [
        "slack/url_verification", "slack/app_rate_limited", "slack/message.im",
        "slack/message.channel_join", "slack/message.message_changed.unfurled",
        "slack/reaction_added", "discord/ping", "discord/interaction.ping",
        "discord/GAME_DIRECT_MESSAGE_CREATE", "discord/MESSAGE_UPDATE.embed",
        "linear/Reaction.create", "linear/Issue.update.order", "jira/jira_issue_updated.rank",
        "jira/worklog_created", "notion/verification", "asana/heartbeat",
    ],
)  # fmt: skip
def test_handshakes_private_talk_and_what_tells_nothing_are_no_events(payload: str) -> None:
    assert of(payload) == []


def test_what_the_app_itself_wrote_does_not_come_back() -> None:
    body = json.loads((PAYLOADS / "slack/message.bot_message.json").read_text())
    assert len(rows("slack", body)) == 1
    body["event"]["app_id"] = body["api_app_id"]
    assert rows("slack", body) == []


def test_a_mention_and_its_message_are_one_fact() -> None:
    """An app that is subscribed to both is sent both."""
    body = json.loads((PAYLOADS / "slack/app_mention.json").read_text())
    (mention,) = rows("slack", body)
    (message,) = rows("slack", {**body, "event": {**body["event"], "type": "message"}})
    assert mention == message


@pytest.mark.parametrize(
    ("payload", "event_type"),
    [
        ("slack/new_event", "canvas_signed"),
        ("discord/NEW_EVENT", "guild_scheduled_event_create"),
        ("jira/new_event", "form.submitted"),
        ("linear/Document.create", "document.created"),
    ],
)
def test_what_nobody_foresaw_is_kept_under_its_own_name(payload: str, event_type: str) -> None:
    (row,) = of(payload)
    assert row["event_type"] == event_type


def test_several_events_of_one_delivery_are_told_apart() -> None:
    found = of("asana/story.added")
    assert [row["event_type"] for row in found] == [
        "task.completed",
        "task.reopened",
        "task.commented",
        "task.commented",
    ]
    assert len({row["external_id"] for row in found}) == 4
    assert len({row["metadata"]["thread"] for row in found}) == 1


def test_the_same_delivery_twice_gives_the_same_ids_and_an_edit_another() -> None:
    for path in FILES:
        payload = f"{path.parent.name}/{path.stem}"
        ids = [row["external_id"] for row in of(payload)]
        assert ids == [row["external_id"] for row in of(payload)]
        assert len(ids) == len(set(ids)), payload
    (edit,), (message,) = of("discord/MESSAGE_UPDATE"), of("discord/MESSAGE_CREATE")
    assert edit["external_id"] != message["external_id"] == edit["metadata"]["edits"]


if __name__ == "__main__":
    TABLE.write_text(table())
