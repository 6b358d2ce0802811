"""Channels and people get the names that Slack has for them."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from conftest import Caller, loopback, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.cipher import Cipher, new_key
from app.db import Database
from tasks.naming import Namer

TOKEN = "xoxb-it-is-between-us"
CHANNEL, PERSON = "C024BE91L", "U2147483697"


class Slack:
    """Answers as Slack's Web API does, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.busy = 0  # requests that it refuses
        self.users = {PERSON: {"name": "ada", "profile": {"display_name": "", "real_name": "Ada"}}}
        self.channels = {CHANNEL: {"id": CHANNEL, "name": "backend"}}
        self.app = Starlette(routes=[Route("/api/{method}", self.answer)])

    async def answer(self, request: Request) -> Response:
        """One call."""
        method = request.path_params["method"]
        field = "user" if method == "users.info" else "channel"
        known_as = request.query_params[field]
        self.asked.append(known_as)
        if self.busy:
            self.busy -= 1
            return JSONResponse({"ok": False, "error": "ratelimited"}, 429, {"Retry-After": "30"})
        if request.headers["authorization"] != f"Bearer {TOKEN}":
            return JSONResponse({"ok": False, "error": "invalid_auth"})
        known: dict[str, Any] = self.users if field == "user" else self.channels
        found = known.get(known_as)
        if found is None:
            return JSONResponse({"ok": False, "error": f"{field}_not_found"})
        return JSONResponse({"ok": True, field: found})


@pytest.fixture
def slack() -> Slack:
    return Slack()


@pytest.fixture
def cipher() -> Cipher:
    return Cipher((new_key(),))


@pytest.fixture
async def namer(database: Database, cipher: Cipher, slack: Slack) -> AsyncIterator[Namer]:
    async with served(slack.app) as url:
        yield Namer(database, cipher, slack=f"{url}/api/")


@pytest.fixture
async def integration(caller: Caller, cipher: Cipher, sql: asyncpg.Connection) -> str:
    """A Slack workspace of the caller's project, in which Ada has said something."""
    integration_id: str = await sql.fetchval(
        "insert into integrations (source, user_id, project_id, workspace_name) "
        "values ('slack', $1, $2, 'acme') returning id::text",
        caller.user_id,
        caller.project_id,
    )
    await sql.execute(
        "insert into integration_secrets (integration_id, name, value) values ($1, 'token', $2)",
        integration_id,
        cipher.encrypt(TOKEN),
    )
    await say(sql, integration_id, CHANNEL)
    return integration_id


async def say(sql: asyncpg.Connection, integration_id: str, called: str) -> None:
    """A message of Ada's in the channel, as the mapping makes it."""
    event = {
        "source": "slack", "event_type": "message", "title": "Keep the session",
        "external_id": f"{CHANNEL}:1", "resource": CHANNEL, "author": PERSON,
        "occurred_at": "2026-03-02T12:00:00Z", "metadata": {},
        "in": {"id": CHANNEL, "name": called, "type": "channel", "default_branch": None},
    }  # fmt: skip
    await sql.execute("select store_source_events($1, $2)", integration_id, json.dumps([event]))


async def told(database: Database, caller: Caller) -> tuple[str, str]:
    """Where and by whom, as what writes an artifact reads it."""
    since, until = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 3, tzinfo=UTC)
    (row,) = await database.rows(
        "events_in_scope", caller.project_id, None, {}, since, until, None, 10
    )
    return row["resource"], row["author"]


async def test_a_channel_and_a_person_are_called_by_their_names(
    namer: Namer, slack: Slack, integration: str, database: Database, caller: Caller
) -> None:
    assert await told(database, caller) == (CHANNEL, PERSON)
    assert await namer.name_round() == 2
    assert await told(database, caller) == ("#backend", "Ada")
    assert await namer.name_round() == 0  # what is known is not asked for again
    assert sorted(slack.asked) == [CHANNEL, PERSON]


async def test_a_message_that_has_only_the_id_does_not_undo_the_name(
    namer: Namer, integration: str, database: Database, caller: Caller, sql: asyncpg.Connection
) -> None:
    await namer.name_round()
    await say(sql, integration, CHANNEL)
    assert (await told(database, caller))[0] == "#backend"
    await say(sql, integration, "#platform")  # it was renamed
    assert (await told(database, caller))[0] == "#platform"


async def test_who_is_busy_is_asked_once_and_again_later(
    namer: Namer, slack: Slack, integration: str, database: Database, sql: asyncpg.Connection
) -> None:
    slack.busy = 1
    assert await namer.name_round() == 2
    assert len(slack.asked) == 1  # the other is not even tried
    assert await namer.name_round() == 0
    assert (
        25
        < await sql.fetchval(
            "select extract(epoch from min(asked_at) + interval '1 day' - baton_now()) from people"
        )
        <= 30
    )
    await sql.execute("update people set asked_at = asked_at - interval '31 seconds'")
    await sql.execute("update resources set asked_at = asked_at - interval '31 seconds'")
    assert await namer.name_round() == 2
    assert await sql.fetchval("select name from people") == "Ada"


async def test_what_has_no_name_is_not_asked_for_again_and_again(
    namer: Namer, slack: Slack, integration: str, database: Database, caller: Caller
) -> None:
    slack.users.clear()
    slack.channels.clear()
    assert await namer.name_round() == 2
    assert await namer.name_round() == 0
    assert await told(database, caller) == (CHANNEL, PERSON)


async def test_without_a_token_nobody_is_asked(
    namer: Namer, slack: Slack, integration: str, sql: asyncpg.Connection
) -> None:
    await sql.execute("delete from integration_secrets")
    assert await namer.name_round() == 0
    assert slack.asked == []


@pytest.mark.parametrize("value", [b"nonsense", None])
async def test_a_token_that_does_not_do_is_in_no_log(
    namer: Namer, slack: Slack, integration: str, cipher: Cipher, sql: asyncpg.Connection,
    value: bytes | None, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG")
    await sql.execute(
        "update integration_secrets set value = $1", value or cipher.encrypt("xoxb-revoked")
    )
    assert await namer.name_round() == 2
    assert await namer.name_round() == 0
    told = " ".join(str(vars(record)) for record in caplog.records)
    assert "xoxb" not in told
    assert ("BATON_SECRET_KEYS" if value else "invalid_auth") in told


async def test_a_slack_that_is_away_stops_nothing(
    database: Database, cipher: Cipher, integration: str, sql: asyncpg.Connection
) -> None:
    listener = loopback()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/api/"
    listener.close()
    assert await Namer(database, cipher, slack=address).name_round() == 2
    assert await sql.fetchval("select name from people") is None
