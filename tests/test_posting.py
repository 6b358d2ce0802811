"""Digests in channels: once as a rule, within a day or with the reason, and never another's."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from chat_servers import (
    APP,
    BOT,
    ELSEWHERE,
    GENERAL,
    GUILD,
    KEY,
    NEWS,
    TALK,
    Answer,
    ChatServer,
    chat_settings,
    connect,
)
from conftest import Caller
from starlette.applications import Starlette

from app.chat import Chat
from app.cipher import Cipher
from app.db import Database
from app.main import create_app
from app.settings import Limits, Settings
from tasks.posting import DELAYS, LEASE, Poster

Drain = Callable[..., Awaitable[None]]
HERE = {"discord": GENERAL, "slack": TALK}
DAY = timedelta(days=1)


@pytest.fixture
def app(dsn: str, limits: Limits, chat: ChatServer) -> Starlette:
    return create_app(Settings(database_url=dsn, limits=limits, **chat_settings(chat)))


@pytest.fixture
async def poster(database: Database, chat: ChatServer) -> AsyncIterator[Poster]:
    services = Chat(Settings(**chat_settings(chat)))
    yield Poster(database, services, Cipher((KEY,)))
    await services.close()


async def deliver(caller: Caller, *channels: tuple[str, str], cron: str = "0 9 * * *") -> Any:
    path = f"/projects/{caller.project_id}/digest_schedule"
    told = [{"to": to, "channel_id": channel} for to, channel in channels]
    return await caller.http.put(path, json={"cron": cron, "deliver": told})


@pytest.fixture
async def team(caller: Caller, sql: asyncpg.Connection) -> Caller:
    """A caller with both services and something to tell."""
    await connect(sql, caller.user_id, "discord", workspace_id=GUILD)
    await connect(sql, caller.user_id, "slack", workspace_id="T061EG9R6")
    await caller.ingest({"title": "fix: stop the <!channel> cache from growing @everyone"})
    return caller


@pytest.fixture
def write(sql: asyncpg.Connection, drain: Drain) -> Callable[[], Awaitable[None]]:
    """Writes the digest of the day before."""

    async def written() -> None:
        await sql.execute(
            "update digest_schedules set covered_until = covered_until - interval '1 day', "
            "next_at = next_at - interval '1 day'"
        )
        await sql.execute("update events set occurred_at = occurred_at - interval '1 day'")
        while await sql.fetchval("select submit_digest()"):
            pass
        await drain()

    return written


Write = Callable[[], Awaitable[None]]


async def messages(sql: asyncpg.Connection) -> list[tuple[Any, ...]]:
    rows = await sql.fetch("select state, attempt, error from chat_messages order by channel_id")
    return [tuple(row) for row in rows]


async def due(sql: asyncpg.Connection) -> None:
    await sql.execute(
        "update chat_messages set next_attempt_at = now() where next_attempt_at is not null"
    )


async def test_a_digest_is_posted_into_each_channel_as_a_text_and_a_file(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    answer = await deliver(team, ("discord", GENERAL), ("discord", NEWS), ("slack", TALK))
    told = answer.json()["digest_schedule"]["deliver"]
    assert {(each["to"], each["channel_id"]) for each in told} == {
        ("discord", GENERAL), ("discord", NEWS), ("slack", TALK),
    }  # fmt: skip
    await write()
    assert chat.messages == []  # queued with the digest, posted after it
    await poster.drain()
    assert await messages(sql) == [("posted", 1, None)] * 3
    markdown, title = await sql.fetchrow("select markdown, title from insights") or ("", "")
    in_discord = [m for m in chat.messages if "nonce" in m]
    [in_slack] = [m for m in chat.messages if "nonce" not in m]
    assert {m["channel_id"] for m in in_discord} == {GENERAL, NEWS}
    assert {m["files"][0][1] for m in in_discord} == {markdown} == {in_slack["content"]}
    assert in_discord[0]["allowed_mentions"] == {"parse": []}
    assert in_discord[0]["content"].startswith(title.split(":")[0])
    assert "<!channel>" not in in_slack["initial_comment"]


async def test_another_round_posts_nothing_again(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    await poster.drain()
    await poster.drain()
    assert len(chat.messages) == 1


async def test_who_has_left_takes_no_digests_along_and_the_organizations_channel_gets_its_own(
    team: Caller, stranger: Caller, sql: asyncpg.Connection, write: Write
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    for user_id in (team.user_id, stranger.user_id):
        await sql.execute("select ops.add_member($1, $2, 'admin')", organization, user_id)
    await sql.execute(
        "update projects set organization_id = $1, owner_id = $2 where id = $3",
        organization, stranger.user_id, team.project_id,
    )  # fmt: skip
    await sql.execute(
        "update integrations set organization_id = $1 where source = 'slack'", organization
    )
    answer = await deliver(team, ("discord", GENERAL), ("slack", TALK))
    assert answer.status_code == 200, answer.text
    await write()
    assert len(await messages(sql)) == 2

    await sql.execute("delete from members where user_id = $1", team.user_id)
    await sql.execute("delete from insights")  # and with them their messages
    await stranger.http.post(
        "/events",
        json={
            "project_id": team.project_id,
            "events": [{
                "source": "github", "event_type": "commit", "title": "fix: stop the cache",
                "occurred_at": "2026-01-01T00:00:00Z", "external_id": "c" * 40,
            }],
        },
    )  # fmt: skip
    await sql.execute("update events set occurred_at = now() - interval '1 minute'")
    await write()
    assert await sql.fetchval("select count(*) from insights") == 1
    posted = await sql.fetch(
        "select i.source from chat_messages m join integrations i on i.id = m.integration_id"
    )
    assert [row[0] for row in posted] == ["slack"]


async def test_without_a_digest_nothing_is_posted(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await sql.execute("delete from events; delete from event_facets")
    await deliver(team, ("discord", GENERAL))
    await write()
    await poster.drain()
    assert await sql.fetchval("select error_code from jobs") == "no_result"
    assert chat.messages == [] and await messages(sql) == []


async def test_a_crash_before_the_digest_is_stored_queues_nothing(
    team: Caller, sql: asyncpg.Connection, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    await sql.execute("delete from chat_messages")
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute(
        "insert into insights select (jsonb_populate_record(i, jsonb_build_object("
        "'id', uuidv7(), 'job_id', uuidv7()))).* from insights i"
    )
    assert len(await messages(sql)) == 1
    await transaction.rollback()
    assert await messages(sql) == []


@pytest.mark.parametrize("source", ["discord", "slack"])
async def test_what_the_service_cannot_take_now_is_posted_later(
    team: Caller,
    sql: asyncpg.Connection,
    chat: ChatServer,
    poster: Poster,
    write: Write,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.chat.BACKOFF", 0.001)
    await deliver(team, (source, HERE[source]))
    await write()
    chat.script = [Answer(503, {})] * 3
    await poster.drain()
    [(state, attempt, error)] = await messages(sql)
    assert (state, attempt) == ("waiting", 1) and "does not answer" in error
    wait = await sql.fetchval("select next_attempt_at - now() from chat_messages")
    assert timedelta(0) < wait <= timedelta(seconds=DELAYS[0] * 1.2)
    chat.script = []
    await due(sql)
    await poster.drain()
    assert await messages(sql) == [("posted", 2, None)] and len(chat.messages) == 1


async def test_the_service_says_when_to_come_back(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    chat.script = [Answer(429, {"retry_after": 300.0, "global": False})] * 3
    await poster.drain()
    wait = await sql.fetchval("select next_attempt_at - now() from chat_messages")
    assert wait > timedelta(seconds=290)
    assert (await messages(sql))[0][0] == "waiting"


async def test_an_answer_that_is_lost_makes_no_second_message_in_discord(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    """The worker dies after the post and before the note: its lease runs out."""
    await deliver(team, ("discord", GENERAL))
    await write()
    await sql.execute(
        "create function lost() returns trigger language plpgsql as "
        "$$ begin perform pg_terminate_backend(pg_backend_pid()); return new; end $$; "
        "create trigger lost before update of attempt on chat_messages for each row "
        "execute function lost()"
    )
    posting = asyncio.create_task(poster.drain())
    async with asyncio.timeout(10):
        while not chat.messages:
            await asyncio.sleep(0.01)
    posting.cancel()
    await asyncio.gather(posting, return_exceptions=True)
    for task in list(poster._posting):  # as kill -9 ends them
        task.cancel()
    await asyncio.gather(*poster._posting, return_exceptions=True)
    await sql.execute("drop trigger lost on chat_messages")
    [(state, attempt, _)] = await messages(sql)
    assert (state, attempt) == ("waiting", 0)
    assert await sql.fetchval("select next_attempt_at > now() from chat_messages")
    await due(sql)
    async with asyncio.timeout(10):
        while (await messages(sql))[0][0] == "waiting":  # the dying session may have it locked yet
            await poster.drain()
    assert await messages(sql) == [("posted", 1, None)]
    assert len(chat.messages) == 1
    assert len([path for path in chat.paths() if path.startswith("POST")]) == 2


async def test_a_lease_that_has_run_out_decides_nothing_but_a_post_that_was_made(
    team: Caller, sql: asyncpg.Connection, database: Database, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    [old] = await database.rows("claim_chat_messages", 10, LEASE)
    assert await database.rows("claim_chat_messages", 10, LEASE) == []
    await due(sql)
    [new] = await database.rows("claim_chat_messages", 10, LEASE)

    async def note(claim: Any, message_id: str | None, error: str | None) -> Any:
        return await database.value(
            "chat_attempted", claim["id"], claim["leased_until"], message_id, error, 5.0
        )

    assert await note(old, None, "It failed.") is None
    assert await note(new, None, "It failed.") == "waiting"
    assert await note(old, "123", None) == "posted"
    assert await note(new, "124", None) is None


async def test_after_a_day_it_is_given_up_and_operators_see_why(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("slack", TALK))
    await write()
    chat.talks = []
    await sql.execute("update chat_messages set created_at = now() - interval '1 day'")
    await poster.drain()
    [(state, _, error)] = await messages(sql)
    assert state == "dead" and error.startswith("The channel is not, or no longer, one of")
    row = await sql.fetchrow("select channels, waiting, dead, delivery_error from ops.digests")
    assert row and tuple(row) == (1, 0, 1, error)


async def test_what_the_service_refuses_is_not_posted_again(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    known = Answer(200, {"id": GENERAL, "guild_id": GUILD})
    chat.script = [known, Answer(400, {"message": "Invalid Form Body", "code": 50035})]
    await poster.drain()
    assert await messages(sql) == [("dead", 1, "Discord does not take this message.")]


@pytest.mark.parametrize("how", ["disabled", "no token", "another key"])
async def test_what_cannot_be_called_says_so_and_is_tried_again(
    team: Caller,
    sql: asyncpg.Connection,
    chat: ChatServer,
    poster: Poster,
    write: Write,
    how: str,
) -> None:
    await deliver(team, ("slack", TALK))
    await write()
    match how:
        case "disabled":
            await sql.execute("update integrations set enabled = false")
        case "no token":
            await sql.execute("delete from integration_secrets")
        case _:
            await sql.execute("update integration_secrets set value = 'gAAAAAnot'")
    asked = len(chat.asked)
    await poster.drain()
    [(state, _, error)] = await messages(sql)
    assert state == "waiting" and error
    assert APP not in error and BOT not in error
    assert len(chat.asked) == asked


# --- Whose channel it is --------------------------------------------------------------------


async def test_a_channel_of_another_tenant_is_refused_when_the_schedule_is_set(
    team: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    for channel in (("discord", ELSEWHERE), ("slack", "C999999999")):
        answer = await deliver(team, channel)
        assert answer.status_code == 403
        assert "has this channel" in answer.json()["error"]
    answer = await deliver(stranger, ("discord", GENERAL))
    assert answer.status_code == 403 and "is not connected" in answer.json()["error"]
    assert await sql.fetchval("select count(*) from digest_schedules") == 0


async def test_a_channel_that_has_moved_to_another_server_gets_nothing(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    """The bot is in the servers of several tenants, so its token reaches all of them."""
    await deliver(team, ("discord", GENERAL))
    await sql.execute("update digest_channels set channel_id = $1", ELSEWHERE)
    await write()
    await poster.drain()
    assert chat.messages == []
    assert (await messages(sql))[0][0] == "waiting"


async def test_an_operator_cannot_name_the_integration_of_another_tenant(
    team: Caller, stranger: Caller, ops: asyncpg.Connection, sql: asyncpg.Connection
) -> None:
    call = "select ops.set_digest($1, '0 9 * * *', 'UTC', $2::text::jsonb)"
    ours = await sql.fetchval("select id::text from integrations where source = 'slack'")
    theirs = await connect(sql, stranger.user_id, "slack")
    github = await connect(sql, team.user_id, "github", token="x")
    told = '[{"integration_id": "%s", "channel_id": "C012AB3CD"}]'
    for wrong in (theirs, github, "nope"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await ops.execute(call, team.project_id, told % wrong)
        assert refused.value.sqlstate == "BT404"
        assert str(refused.value).startswith("deliver: none of the integrations of Discord and")
    for bad in ("{}", told.replace("channel_id", "channel") % ours):
        with pytest.raises(asyncpg.PostgresError, match="deliver: ") as refused:
            await ops.execute(call, team.project_id, bad)
        assert refused.value.sqlstate == "BT400"
    await ops.execute(call, team.project_id, told % ours)
    assert await ops.fetchval("select channels from ops.digests") == 1
    await ops.execute("select ops.set_digest($1, '0 8 * * *')", team.project_id)
    assert await ops.fetchval("select channels from ops.digests") == 1


async def test_an_integration_that_is_deleted_takes_what_it_was_to_post_with_it(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL), ("slack", TALK))
    await write()
    await sql.execute("delete from integrations where source = 'discord'")
    await poster.drain()
    assert await messages(sql) == [("posted", 1, None)]
    path = f"/projects/{team.project_id}/digest_schedule"
    told = (await team.http.get(path)).json()["digest_schedule"]["deliver"]
    assert told == [{"to": "slack", "channel_id": TALK}]


async def test_a_held_database_posts_nothing(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    await sql.execute("select ops.hold('moving')")
    await poster.drain()
    assert chat.messages == []


async def test_a_worker_that_stops_gives_back_what_it_had_not_posted(
    team: Caller, sql: asyncpg.Connection, chat: ChatServer, poster: Poster, write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tasks.posting.DRAIN", 0.01)
    await deliver(team, ("discord", GENERAL))
    await write()
    reached, never = asyncio.Event(), asyncio.Event()

    async def hang(_: Any) -> str:
        reached.set()
        await never.wait()
        return ""

    monkeypatch.setattr(poster, "_post", hang)
    running = asyncio.create_task(poster.run())
    async with asyncio.timeout(10):
        await reached.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await sql.fetchval("select next_attempt_at <= clock_timestamp() from chat_messages")


async def test_the_log_tells_of_a_post_without_what_was_said(
    team: Caller, poster: Poster, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    await deliver(team, ("discord", GENERAL))
    await write()
    caplog.clear()
    with caplog.at_level("DEBUG", "baton"):
        await poster.drain()
    [told] = [r for r in caplog.records if r.name == "baton.posting"]
    assert told.message == "post" and told.__dict__["state"] == "posted"
    assert "cache" not in str(told.__dict__) and BOT not in str(told.__dict__)


async def test_the_digest_of_another_project_is_not_posted_there(
    team: Caller, stranger: Caller, chat: ChatServer, poster: Poster, write: Write
) -> None:
    await deliver(team, ("discord", GENERAL))
    await deliver(stranger)
    await stranger.ingest({"title": "feat: a secret of somebody else"})
    await write()
    await poster.drain()
    assert "secret" not in str(chat.messages)
