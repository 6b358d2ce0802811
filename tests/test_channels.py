"""What clients call to post into Discord and Slack, each against a server that speaks their API."""

from typing import Any

import asyncpg
import httpx
import pytest
from chat_servers import (
    APP,
    BOT,
    ELSEWHERE,
    GENERAL,
    GUILD,
    NEWS,
    OTHER_GUILD,
    TALK,
    Answer,
    ChatServer,
    chat_settings,
    connect,
    unknown_channel,
)
from conftest import Caller
from starlette.applications import Starlette

from app import channels
from app.main import create_app
from app.settings import Limits, Settings

SOURCES = ("discord", "slack")
HERE = {"discord": GENERAL, "slack": TALK}
UNKNOWN = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"


@pytest.fixture
def app(dsn: str, limits: Limits, chat: ChatServer) -> Starlette:
    return create_app(Settings(database_url=dsn, limits=limits, **chat_settings(chat)))


@pytest.fixture
async def connected(caller: Caller, sql: asyncpg.Connection) -> Caller:
    """The caller, with a guild of Discord and a workspace of Slack."""
    await connect(sql, caller.user_id, "discord", workspace_id=GUILD)
    await connect(sql, caller.user_id, "slack")
    return caller


async def sent(caller: Caller, source: str, **body: Any) -> httpx.Response:
    body.setdefault("channel_id", HERE[source])
    return await caller.http.post(f"/{source}/send", json=body)


async def stored(
    sql: asyncpg.Connection, caller: Caller, kind: str, title: str, status: str = "active"
) -> str:
    """An artifact of the caller's project, newer than those before it; its id."""
    given = {
        "job_id": "uuidv7()", "lease_token": "uuidv7()", "project_id": "$1", "status": "$3",
        "title": "$4", "summary": "'-'", "data": "'{}'", "related_event_ids": "'[]'",
        "markdown": "'# ' || $4 || e'\\n'", "model_used": "'-'", "token_usage": "'{}'",
        "period_start": "now()", "period_end": "now()",
    }  # fmt: skip
    lists = ("sources", "key_changes", "decisions", "open_questions", "next_steps")
    if kind == "handoff":
        table, more = "handoffs", {"user_id": "$2", "scope": "'{}'", **dict.fromkeys(lists, "'[]'")}
    else:
        table, more = "insights", {"requested_by": "$2", "kind": f"'{kind}'"}
    given |= more
    columns, values = ", ".join(given), ", ".join(given.values())
    statement = f"insert into {table} ({columns}) values ({values}) returning id"
    ids = caller.project_id, caller.user_id
    return str(await sql.fetchval(statement, *ids, status, title))


def contents(chat: ChatServer) -> list[str]:
    """What is in the files that were posted."""
    return [
        message["content"]
        if "ts" not in message and "nonce" not in message
        else message["files"][0][1]
        for message in chat.messages
    ]


def assert_error(answer: httpx.Response, status: int, code: str) -> str:
    body = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert BOT not in answer.text and APP not in answer.text
    return str(body["error"])


# --- The calls of clients ---


async def test_list_discord_channels(connected: Caller) -> None:
    answer = await connected.http.get("/discord/channels")
    assert answer.status_code == 200
    topic = "24/7 chat about how to gank Mike #2"
    assert answer.json() == {
        "channels": [
            {"id": GENERAL, "name": "general", "topic": topic},
            {"id": NEWS, "name": "news", "topic": None},
        ]
    }


async def test_send_a_text_to_discord(connected: Caller, chat: ChatServer) -> None:
    answer = await sent(connected, "discord", content="The release is out, @everyone.")
    [message] = chat.messages
    assert answer.json() == {"ok": True, "message_id": message["id"]}
    assert message["content"] == "The release is out, @everyone."
    assert message["allowed_mentions"] == {"parse": []}


async def test_list_slack_channels(connected: Caller) -> None:
    answer = await connected.http.get("/slack/channels")
    assert [each["name"] for each in answer.json()["channels"]] == ["general", "plans"]


async def test_send_a_text_to_slack(connected: Caller, chat: ChatServer) -> None:
    answer = await sent(connected, "slack", content="The release is out, <!channel>.")
    [message] = chat.messages
    assert answer.json() == {"ok": True, "message_id": message["ts"]}
    assert message["text"] == "The release is out, &lt;!channel&gt;."


@pytest.mark.parametrize("source", SOURCES)
async def test_send_a_handoff_or_an_insight_as_a_file(
    connected: Caller, chat: ChatServer, sql: asyncpg.Connection, source: str
) -> None:
    handoff_id = await stored(sql, connected, "handoff", "Week 20")
    insight_id = await stored(sql, connected, "onboarding_brief", "Welcome")
    for body in ({"handoff_id": handoff_id}, {"insight_id": insight_id}):
        answer = await sent(connected, source, **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["ok"] is True and answer.json()["message_id"]
    assert contents(chat) == ["# Week 20\n", "# Welcome\n"]


@pytest.mark.parametrize("source", SOURCES)
async def test_send_the_last_artifact_of_each_kind(
    connected: Caller, chat: ChatServer, sql: asyncpg.Connection, source: str
) -> None:
    kinds = {
        "last_handoff": "handoff",
        "last_correlation": "cross_source_correlation",
        "last_onboarding": "onboarding_brief",
        "last_architecture": "architecture_insight",
        "last_release_notes": "release_notes",
    }
    for kind in kinds.values():
        for title in ("older", "newer", "archived"):
            status = "archived" if title == "archived" else "active"
            await stored(sql, connected, kind, f"{kind}, {title}", status)
    for artifact in kinds:
        body = {"artifact": artifact, "project_id": connected.project_id}
        assert (await sent(connected, source, **body)).status_code == 200
    assert contents(chat) == [f"# {kind}, newer\n" for kind in kinds.values()]


async def test_without_an_artifact_of_the_kind_it_is_404(
    connected: Caller, chat: ChatServer
) -> None:
    body = {"artifact": "last_handoff", "project_id": connected.project_id}
    error = assert_error(await sent(connected, "discord", **body), 404, "not_found")
    assert error.startswith("artifact: ")
    assert chat.asked == []


# --- Whose it is ---


@pytest.mark.parametrize("source", SOURCES)
async def test_who_has_connected_nothing_gets_403(
    caller: Caller, sql: asyncpg.Connection, chat: ChatServer, source: str
) -> None:
    other = "slack" if source == "discord" else "discord"
    await connect(sql, caller.user_id, other)
    for answer in (
        await caller.http.get(f"/{source}/channels"),
        await sent(caller, source, content="-"),
    ):
        assert "is not connected" in assert_error(answer, 403, "forbidden")
    assert chat.asked == []


@pytest.mark.parametrize("source", SOURCES)
async def test_an_integration_that_is_disabled_or_has_no_token_is_none(
    connected: Caller, sql: asyncpg.Connection, chat: ChatServer, source: str
) -> None:
    await sql.execute("update integrations set enabled = false where source = $1", source)
    assert_error(await sent(connected, source, content="-"), 403, "forbidden")
    await sql.execute("update integrations set enabled = true")
    await sql.execute("update integration_secrets set name = 'signing'")
    assert_error(await sent(connected, source, content="-"), 403, "forbidden")
    assert chat.asked == []


@pytest.mark.parametrize("source", SOURCES)
async def test_the_integration_of_another_is_none(
    connected: Caller, stranger: Caller, chat: ChatServer, source: str
) -> None:
    assert_error(await stranger.http.get(f"/{source}/channels"), 403, "forbidden")
    assert_error(await sent(stranger, source, content="-"), 403, "forbidden")
    assert chat.asked == []


async def test_a_channel_of_another_tenant_is_403(
    connected: Caller, stranger: Caller, sql: asyncpg.Connection, chat: ChatServer
) -> None:
    """The bot is in both guilds, and so could post into either."""
    await connect(sql, stranger.user_id, "discord", workspace_id=OTHER_GUILD)
    assert (await sent(stranger, "discord", channel_id=ELSEWHERE, content="-")).status_code == 200
    for caller, channel in (
        (connected, ELSEWHERE),
        (stranger, GENERAL),
        (connected, unknown_channel()),
        (connected, "general"),
        (connected, f"{GENERAL}/messages"),
    ):
        answer = await sent(caller, "discord", channel_id=channel, content="-")
        assert_error(answer, 403, "forbidden")
    assert len(chat.messages) == 1


async def test_members_of_an_organization_use_its_integrations(
    caller: Caller,
    stranger: Caller,
    sql: asyncpg.Connection,
    ops: asyncpg.Connection,
    chat: ChatServer,
) -> None:
    organization_id = await ops.fetchval("select ops.create_organization('Acme', 'acme')")
    await connect(
        sql, caller.user_id, "discord", workspace_id=GUILD, organization_id=organization_id
    )
    for each in (caller, stranger):
        assert_error(await sent(each, "discord", content="-"), 403, "forbidden")
    await ops.execute("select ops.add_member($1, $2, 'member')", organization_id, stranger.user_id)
    assert (await sent(stranger, "discord", content="-")).status_code == 200
    assert_error(await sent(caller, "discord", content="-"), 403, "forbidden")


async def test_of_several_integrations_the_one_that_has_the_channel_is_used(
    connected: Caller, sql: asyncpg.Connection, chat: ChatServer
) -> None:
    await connect(sql, connected.user_id, "discord", token="revoked", workspace_id=GUILD)
    await connect(sql, connected.user_id, "discord", workspace_id=OTHER_GUILD)
    listed = (await connected.http.get("/discord/channels")).json()["channels"]
    assert [each["id"] for each in listed] == [GENERAL, NEWS, ELSEWHERE]
    answer = await sent(connected, "discord", channel_id=ELSEWHERE, content="-")
    assert answer.status_code == 200
    assert chat.messages[0]["channel_id"] == ELSEWHERE


async def test_an_artifact_that_the_caller_does_not_see_is_404(
    connected: Caller, stranger: Caller, chat: ChatServer, sql: asyncpg.Connection
) -> None:
    foreign = await stored(sql, stranger, "handoff", "Theirs")
    errors = set()
    for artifact_id in (foreign, UNKNOWN, "x"):
        for name in ("handoff_id", "insight_id"):
            answer = await sent(connected, "discord", **{name: artifact_id})
            errors.add(assert_error(answer, 404, "not_found"))
    for project_id in (stranger.project_id, UNKNOWN, "x"):
        body = {"artifact": "last_handoff", "project_id": project_id}
        errors.add(assert_error(await sent(connected, "discord", **body), 404, "not_found"))
    assert len(errors) == 3  # one for each name
    assert chat.asked == []


# --- What is wrong ---


@pytest.mark.parametrize("source", SOURCES)
async def test_a_message_is_exactly_one_thing(
    connected: Caller, chat: ChatServer, source: str
) -> None:
    project = {"project_id": connected.project_id}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "content"),
        ({"content": "-", "handoff_id": UNKNOWN}, "content"),
        ({"artifact": "last_handoff", "insight_id": UNKNOWN, **project}, "content"),
        ({"artifact": "last_handoff"}, "project_id"),
        ({"content": "-", **project}, "project_id"),
        ({"artifact": "last_words", **project}, "artifact"),
        ({"content": ""}, "content"),
        ({"content": " \n"}, "content"),
        ({"content": "x" * 2001}, "content"),
        ({"content": "-", "channel_id": ""}, "channel_id"),
        ({"content": "-", "tts": True}, "tts"),
    ]
    for body, name in wrong:
        error = assert_error(await sent(connected, source, **body), 400, "invalid_request")
        assert error.startswith(f"{name}: "), (body, error)
    assert chat.asked == []
    assert (await sent(connected, source, content="x" * 2000)).status_code == 200


async def test_what_the_service_does_not_take_is_400(connected: Caller, chat: ChatServer) -> None:
    chat.script = [Answer(), Answer(400, {"message": "Invalid Form Body", "code": 50035})]
    assert_error(await sent(connected, "discord", content="-"), 400, "invalid_request")


async def test_a_limit_of_the_service_is_429_with_its_time(
    connected: Caller, chat: ChatServer
) -> None:
    chat.script = [Answer(), Answer(429, {"retry_after": 64.57, "global": False})]
    answer = await sent(connected, "discord", content="-")
    assert_error(answer, 429, "rate_limited")
    assert 60 < int(answer.headers["retry-after"]) <= 65


@pytest.mark.parametrize("source", SOURCES)
async def test_a_service_that_is_away_is_503(
    connected: Caller, chat: ChatServer, source: str
) -> None:
    chat.script = [Answer(503)] * 3
    answer = await connected.http.get(f"/{source}/channels")
    assert_error(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_service_that_hangs_is_503(
    connected: Caller, chat: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "PATIENCE", 0.1)
    chat.script = [Answer(429, {"retry_after": 2.5})]
    assert_error(await sent(connected, "discord", content="-"), 503, "unavailable")


async def test_without_the_key_nothing_is_said_but_that_it_cannot_be_done(
    connected: Caller, app: Starlette, chat: ChatServer
) -> None:
    app.state.cipher = type(app.state.cipher)(())
    assert_error(await sent(connected, "discord", content="-"), 503, "unavailable")
    assert chat.asked == []


async def test_no_token_and_no_text_is_logged(
    connected: Caller, chat: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        await sent(connected, "discord", content="strictly between us")
        chat.script = [Answer(401, {"message": "401: Unauthorized"})]
        await sent(connected, "discord", content="strictly between us")
    told = "".join(str(vars(record)) for record in caplog.records if record.name != "httpx")
    assert "posted" in told
    assert BOT not in told and "between us" not in told
