"""Discord and Slack are called as they document, and no more often than they allow."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from chat_servers import (
    APP,
    BOT,
    ELSEWHERE,
    GENERAL,
    GUILD,
    NEWS,
    OTHER_GUILD,
    SECRET_TALK,
    TALK,
    Answer,
    ChatServer,
)

from app import chat as chats
from app.chat import Account, Busy, Channel, Chat, Down, Forbidden, Post, Rejected, Service
from app.settings import Settings

BOT_ACCOUNT, APP_ACCOUNT = Account(BOT, GUILD), Account(APP)
HELLO = Post(text="Hello @everyone <@41771983423143937>")
FILE = Post(title="Sprint 12: caches & queues", markdown="# Sprint 12\n\n- ein Gerät\n")


@pytest.fixture
async def services(chat: ChatServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Chat]:
    monkeypatch.setattr(chats, "BACKOFF", 0.001)
    made = Chat(Settings(discord_url=f"{chat.url}/api/v10", slack_url=f"{chat.url}/api"))
    yield made
    await made.close()


@pytest.fixture
def discord(services: Chat) -> Service:
    return services["discord"]


@pytest.fixture
def slack(services: Chat) -> Service:
    return services["slack"]


# --- Discord ---


async def test_discord_lists_text_channels_in_its_order(discord: Service) -> None:
    topic = "24/7 chat about how to gank Mike #2"
    assert await discord.channels(BOT_ACCOUNT) == [
        Channel(GENERAL, "general", topic),
        Channel(NEWS, "news", None),
    ]


async def test_without_a_guild_discord_lists_those_of_the_bot(
    discord: Service, chat: ChatServer
) -> None:
    found = await discord.channels(Account(BOT))
    assert [each.id for each in found] == [GENERAL, NEWS, ELSEWHERE]
    assert {each.token for each in chat.asked} == {f"Bot {BOT}"}


async def test_a_channel_of_another_guild_is_not_there(discord: Service) -> None:
    assert await discord.has(BOT_ACCOUNT, GENERAL)
    assert not await discord.has(BOT_ACCOUNT, ELSEWHERE)
    assert await discord.has(Account(BOT, OTHER_GUILD), ELSEWHERE)
    assert await discord.has(Account(BOT), ELSEWHERE)


async def test_a_conversation_with_one_person_is_not_there(
    discord: Service, chat: ChatServer
) -> None:
    for account in (Account(BOT), BOT_ACCOUNT):
        chat.script = [Answer(body={"id": GENERAL, "type": 1})]
        assert not await discord.has(account, GENERAL)


async def test_what_is_no_id_is_not_asked_for(services: Chat, chat: ChatServer) -> None:
    for wrong in ("general", "../users/@me", "1", "", "417719834231439370000000", "C012AB3C\n"):
        for source, account in (("discord", BOT_ACCOUNT), ("slack", APP_ACCOUNT)):
            assert not await services[source].has(account, wrong)
    with pytest.raises(Forbidden):
        await services["discord"].channels(Account(BOT, "../users/@me"))
    assert chat.asked == []


async def test_discord_gets_a_text_that_pings_nobody(discord: Service, chat: ChatServer) -> None:
    message_id = await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    [message] = chat.messages
    assert message["id"] == message_id
    assert (message["channel_id"], message["content"]) == (GENERAL, HELLO.text)
    assert message["allowed_mentions"] == {"parse": []}


async def test_discord_gets_an_artifact_as_a_file(discord: Service, chat: ChatServer) -> None:
    await discord.post(BOT_ACCOUNT, GENERAL, FILE)
    [message] = chat.messages
    assert message["files"] == [["Sprint-12-caches-queues.md", FILE.markdown]]


@pytest.mark.parametrize(
    "failure", [Answer(503), Answer(502, text="<html>"), Answer(503, done=True)]
)
async def test_what_failed_is_posted_to_discord_again_and_is_there_once(
    discord: Service, chat: ChatServer, failure: Answer
) -> None:
    chat.script = [failure, failure]
    message_id = await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    [message] = chat.messages
    assert message["id"] == message_id and len(chat.asked) == 3


async def test_two_equal_texts_are_two_messages(discord: Service, chat: ChatServer) -> None:
    ids = {await discord.post(BOT_ACCOUNT, GENERAL, HELLO) for _ in range(2)}
    assert len(ids) == len(chat.messages) == 2


async def test_discord_is_asked_again_when_it_says_so(discord: Service, chat: ChatServer) -> None:
    limited = {"message": "You are being rate limited.", "retry_after": 0.2, "global": False}
    chat.script = [Answer(429, limited, {"retry-after": "1", "x-ratelimit-scope": "user"})]
    started = time.monotonic()
    await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    assert time.monotonic() - started >= 0.2
    assert len(chat.messages) == 1


async def test_who_would_wait_long_is_told_for_how_long(discord: Service, chat: ChatServer) -> None:
    limited = {"message": "You are being rate limited.", "retry_after": 64.57, "global": False}
    chat.script = [Answer(429, limited, {"retry-after": "65"})]
    with pytest.raises(Busy) as caught:
        await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    assert 60 < caught.value.retry_after <= 64.57
    with pytest.raises(Busy):  # and Discord is left in peace
        await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    assert len(chat.asked) == 1
    assert await discord.has(BOT_ACCOUNT, GENERAL)  # of which it did not say so
    await discord.post(BOT_ACCOUNT, NEWS, HELLO)  # limits are for each channel


async def test_a_global_limit_is_for_everything(discord: Service, chat: ChatServer) -> None:
    limited = {"message": "You are being rate limited.", "retry_after": 64.57, "global": True}
    chat.script = [Answer(429, limited, {"retry-after": "65", "x-ratelimit-global": "true"})]
    for _ in range(2):
        with pytest.raises(Busy):
            await discord.has(BOT_ACCOUNT, GENERAL)
    with pytest.raises(Busy):
        await discord.post(BOT_ACCOUNT, NEWS, HELLO)
    assert len(chat.asked) == 1


async def test_a_block_without_json_is_a_limit_too(discord: Service, chat: ChatServer) -> None:
    chat.script = [Answer(429, text="<html>", headers={"retry-after": "30"})]
    with pytest.raises(Busy) as caught:
        await discord.channels(BOT_ACCOUNT)
    assert 25 < caught.value.retry_after <= 30


async def test_nothing_is_asked_of_a_bucket_that_is_empty(
    discord: Service, chat: ChatServer
) -> None:
    chat.headers = {
        "x-ratelimit-bucket": "abcd1234",
        "x-ratelimit-limit": "5",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset-after": "0.25",
    }
    started = time.monotonic()
    await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    await discord.post(BOT_ACCOUNT, NEWS, HELLO)
    assert time.monotonic() - started < 0.25
    await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    assert time.monotonic() - started >= 0.25
    chat.headers["x-ratelimit-reset-after"] = "60"
    await discord.post(BOT_ACCOUNT, NEWS, HELLO)
    with pytest.raises(Busy):
        await discord.post(BOT_ACCOUNT, NEWS, HELLO)
    assert len(chat.messages) == 4


async def test_two_routes_may_share_a_bucket(discord: Service, chat: ChatServer) -> None:
    chat.headers = {
        "x-ratelimit-bucket": "abcd1234",
        "x-ratelimit-remaining": "5",
        "x-ratelimit-reset-after": "60",
    }
    await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    chat.headers["x-ratelimit-remaining"] = "0"
    assert await discord.has(BOT_ACCOUNT, GENERAL)
    with pytest.raises(Busy):
        await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    assert len(chat.messages) == 1


async def test_what_is_left_of_a_bucket_is_counted_while_calls_are_on_their_way(
    discord: Service, chat: ChatServer
) -> None:
    few = {"x-ratelimit-remaining": "2", "x-ratelimit-reset-after": "60"}
    chat.script = [Answer(headers=few)]
    await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    asked = [discord.post(BOT_ACCOUNT, GENERAL, HELLO) for _ in range(4)]
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in done] == [str, str, Busy, Busy]


async def test_the_limit_of_one_token_is_not_that_of_another(
    discord: Service, chat: ChatServer
) -> None:
    chat.script = [Answer(429, {"retry_after": 60, "global": True})]
    with pytest.raises(Busy):
        await discord.has(BOT_ACCOUNT, GENERAL)
    with pytest.raises(Forbidden):
        await discord.has(Account("another", GUILD), GENERAL)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(401, {"message": "401: Unauthorized", "code": 0}), Forbidden),
        (Answer(403, {"message": "Missing Permissions", "code": 50013}), Forbidden),
        (Answer(404, {"message": "Unknown Channel", "code": 10003}), Forbidden),
        (Answer(400, {"message": "Invalid Form Body", "code": 50035}), Rejected),
        (Answer(413, text="too large"), Rejected),
        (Answer(200, text="<html>"), Down),
    ],
)
async def test_what_discord_refuses_is_told_in_a_sentence(
    discord: Service, chat: ChatServer, answer: Answer, error: type[Exception]
) -> None:
    chat.script = [answer]
    with pytest.raises(error) as caught:
        await discord.post(BOT_ACCOUNT, GENERAL, HELLO)
    assert str(caught.value).endswith(".") and BOT not in str(caught.value)
    assert len(chat.asked) == 1


# --- Slack ---


async def test_slack_lists_its_channels_page_by_page(slack: Service, chat: ChatServer) -> None:
    assert await slack.channels(APP_ACCOUNT) == [
        Channel(TALK, "general", "Company-wide announcements"),
        Channel(SECRET_TALK, "plans", None),
    ]
    assert [each.body["cursor"] for each in chat.asked] == ["", "page:1"]
    assert {each.token for each in chat.asked} == {f"Bearer {APP}"}


async def test_slack_lists_public_channels_to_an_app_that_may_see_no_others(
    slack: Service, chat: ChatServer
) -> None:
    chat.scopes.remove("groups:read")
    assert [each.id for each in await slack.channels(APP_ACCOUNT)] == [TALK]


async def test_a_channel_of_another_workspace_is_not_there(slack: Service) -> None:
    assert await slack.has(APP_ACCOUNT, TALK)
    assert await slack.has(Account(APP, "T061EG9R6"), TALK)
    assert not await slack.has(Account(APP, "T0OTHER00"), TALK)
    assert not await slack.has(APP_ACCOUNT, "C0NOWHERE")


async def test_slack_gets_a_text_that_pings_nobody(slack: Service, chat: ChatServer) -> None:
    post = Post(text="<!channel> a & b <@U061F7AUR>")
    ts = await slack.post(APP_ACCOUNT, TALK, post)
    [message] = chat.messages
    assert (message["channel"], message["ts"]) == (TALK, ts)
    assert message["text"] == "&lt;!channel&gt; a &amp; b &lt;@U061F7AUR&gt;"


async def test_slack_gets_an_artifact_as_a_file(slack: Service, chat: ChatServer) -> None:
    message_id = await slack.post(APP_ACCOUNT, TALK, FILE)
    [message] = chat.messages
    assert (message["channel_id"], message["content"]) == (TALK, FILE.markdown)
    assert message["files"] == [{"id": message_id, "title": FILE.title}]
    assert chat.paths() == [
        "files.getUploadURLExternal",
        "upload",
        "files.completeUploadExternal",
    ]
    assert chat.asked[0].body == {
        "filename": "Sprint-12-caches-queues.md",
        "length": str(len((FILE.markdown or "").encode())),
    }
    assert chat.asked[1].token == ""  # the address alone is the proof


async def test_the_message_of_a_file_is_told_when_slack_tells_it(
    slack: Service, chat: ChatServer
) -> None:
    shares = {"public": {TALK: [{"ts": "1503435956.000247"}]}}
    done = {"ok": True, "files": [{"id": "F123ABC456", "shares": shares}]}
    chat.script = [Answer(), Answer(), Answer(body=done)]
    assert await slack.post(APP_ACCOUNT, TALK, FILE) == "1503435956.000247"


async def test_what_slack_may_have_posted_is_not_posted_again(
    slack: Service, chat: ChatServer
) -> None:
    for failure in (Answer(503, done=True), Answer(body={"ok": False, "error": "fatal_error"})):
        chat.script = [failure]
        with pytest.raises(Down):
            await slack.post(APP_ACCOUNT, TALK, HELLO)
    assert chat.paths() == ["chat.postMessage"] * 2


async def test_what_slack_only_reads_is_asked_again(slack: Service, chat: ChatServer) -> None:
    chat.script = [Answer(503), Answer(503)]
    assert await slack.has(APP_ACCOUNT, TALK)


async def test_slack_is_asked_again_when_it_says_so(slack: Service, chat: ChatServer) -> None:
    chat.script = [Answer(429, {"ok": False, "error": "ratelimited"}, {"retry-after": "1"})]
    started = time.monotonic()
    await slack.post(APP_ACCOUNT, TALK, HELLO)
    assert time.monotonic() - started >= 1
    assert len(chat.messages) == 1
    chat.script = [Answer(429, {"ok": False}, {"retry-after": "30"})]
    with pytest.raises(Busy):
        await slack.has(APP_ACCOUNT, TALK)


async def test_a_file_goes_only_where_slack_is(slack: Service, chat: ChatServer) -> None:
    for url in ("https://slack.com.evil.example/", "http://files.slack.com/", f"{chat.url}1/x"):
        chat.script = [Answer(body={"ok": True, "upload_url": url, "file_id": "F1"})]
        with pytest.raises(Down):
            await slack.post(APP_ACCOUNT, TALK, FILE)
    assert set(chat.paths()) == {"files.getUploadURLExternal"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("token_revoked", Forbidden),
        ("not_in_channel", Forbidden),
        ("ratelimited", Busy),
        ("msg_too_long", Rejected),
        (None, Rejected),
    ],
)
async def test_what_slack_refuses_is_told_in_a_sentence(
    slack: Service, chat: ChatServer, code: str | None, error: type[Exception]
) -> None:
    chat.script = [Answer(body={"ok": False, "error": code})]
    with pytest.raises(error) as caught:
        await slack.post(APP_ACCOUNT, TALK, HELLO)
    assert str(caught.value).endswith(".") and APP not in str(caught.value)


# --- Both ---


async def test_who_cannot_be_reached_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "BACKOFF", 0.001)
    nobody = "http://127.0.0.1:1"
    services = Chat(Settings(discord_url=nobody, slack_url=nobody))
    for source in ("discord", "slack"):
        with pytest.raises(Down):
            await services[source].post(BOT_ACCOUNT, GENERAL, HELLO)
    await services.close()


async def test_a_token_that_cannot_be_one_is_refused(services: Chat, chat: ChatServer) -> None:
    for token in ("", "a b", "a\r\nX: y", "ü"):
        with pytest.raises(Forbidden):
            await services["slack"].has(Account(token), TALK)
    assert chat.asked == []


def test_a_file_is_named_after_its_title() -> None:
    for title, name in {
        "Handoff: acme/web, 12–19 May": "Handoff-acme-web-12-19-May.md",
        "../../etc/passwd": "etc-passwd.md",
        "Übergabe v1.2": "Übergabe-v1.2.md",
        "???": "baton.md",
        "x" * 300: "x" * 80 + ".md",
    }.items():
        assert Post(title=title).filename == name


def test_nothing_secret_is_shown() -> None:
    shown = repr(BOT_ACCOUNT) + repr(HELLO) + repr(FILE)
    assert BOT not in shown and "Hello" not in shown and "Gerät" not in shown


def test_the_library_is_loaded_when_it_is_needed_only() -> None:
    assert "httpx" not in vars(chats)
