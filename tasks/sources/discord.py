"""What Discord sends, as events: webhook events, interactions, and the messages that relays post.

Discord itself posts few events to an address: a bot that relays a server posts gateway events
(`{"t": "MESSAGE_CREATE", "d": {…}}`) or bare message and thread objects; all of these are read.

Pure. The one rule: a message and what answers it are one `thread`, `<channel>:<id of the first>`;
a thread of Discord's own is known by its first message, whose id it has.

Not told: direct messages, who joined, embeds that Discord adds to a link, and what becomes of the
app itself.
"""

import re
from datetime import UTC, datetime
from typing import Any

from tasks.lines import set_of
from tasks.sources.body import facts, fingerprint, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text

SAID = frozenset(("0", "19", "20", "23"))  # types of messages that somebody wrote
THREADS = frozenset(("10", "11", "12"))  # types of channels that are threads
DIRECT = frozenset(("1", "3"))
UNTOLD = set_of(
    "application_authorized application_deauthorized entitlement_create entitlement_update "
    "entitlement_delete quest_user_enrollment typing_start presence_update ready resumed "
    "message_reaction_add message_reaction_remove message_reaction_remove_all "
    "message_reaction_remove_emoji guild_member_add guild_member_remove guild_member_update "
    "voice_state_update voice_server_update thread_members_update thread_member_update "
    "thread_list_sync user_update guild_create guild_update channel_pins_update "
    "game_direct_message_create game_direct_message_update game_direct_message_delete"
)
MARK = re.compile(r"<(@!?|@&|#|/|a?:|t:)([^<>]{1,100})>")
EPOCH = 1_420_070_400_000  # milliseconds that a snowflake counts from


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; handshakes and what tells nothing give none."""
    body = delivery.body
    at = words(body, "event", "timestamp")
    if part(body, "event"):
        name, data = words(body, "event", "type"), part(body, "event", "data")
    elif part(body, "d"):
        name, data = words(body, "t"), part(body, "d")
    elif part(body, "token") and type(part(body, "type")) is int:
        return _interaction(body)
    elif part(body, "channel_id") and part(body, "author"):
        name, data = "MESSAGE_UPDATE" if part(body, "edited_timestamp") else "MESSAGE_CREATE", body
    elif part(body, "parent_id") and words(body, "type") in THREADS:
        name, data = "THREAD_CREATE", body
    else:
        name, data = "", body
    name = name.casefold()
    if not name or name in UNTOLD or words(data, "channel", "type") in DIRECT:
        return []
    if name.removeprefix("lobby_") in ("message_create", "message_update"):
        return _message(data, at, edited=name.endswith("_update"))
    if name.removeprefix("lobby_") == "message_delete":
        return _deleted(data, at)
    if name in ("thread_create", "thread_update", "channel_create", "channel_update"):
        return _channel(data, name)
    return [
        SourceEvent(
            event_type=name,
            title=words(data, "name") or name.replace("_", " "),
            external_id=fingerprint(body),
            resource=_in(data)[0],
            occurred_at=at,
        )
    ]


def _message(message: Any, at: str, *, edited: bool) -> list[SourceEvent]:
    """What somebody said, whole; an embed that Discord adds later is no edit."""
    when = words(message, "edited_timestamp")
    said = _text(message)
    kind = words(message, "type") or "0"
    if not said or (edited and not when) or kind not in SAID:
        return []
    resource, root = _in(message)
    name = words(message, "id")
    answered = words(message, "message_reference", "message_id")
    first = part(message, "referenced_message", "message_reference", "message_id")
    place = resource.id if resource else ""
    channel = words(message, "channel_id") or place
    parent = identity(channel, answered) or (identity(place, root) if root != name else "")
    root = root or words(first) or answered or name
    title = said.partition("\n")[0]
    guild = words(message, "guild_id")
    bot = part(message, "author", "bot") is True or bool(part(message, "webhook_id"))
    return [
        SourceEvent(
            event_type="message.edited" if edited else "message.reply" if parent else "message",
            title=title,
            content=said if said != title or len(title) > 300 else None,
            external_id=identity(channel, name, *(("edited", when) if edited else ())),
            resource=resource,
            author=_author(message),
            url=f"https://discord.com/channels/{guild}/{channel}/{name}" if guild else None,
            occurred_at=when or words(message, "timestamp") or at or _made(name),
            metadata=facts(
                thread=identity(place, root),
                parent=parent,
                edits=identity(channel, name) if edited else None,
                bot=bot or None,
                attachments=[words(f, "filename") for f in parts(message, "attachments")[:20]],
            ),
        )
    ]


def _deleted(message: Any, at: str) -> list[SourceEvent]:
    """A message that is gone: that it is, and not what it said."""
    resource, _ = _in(message)
    name = words(message, "id")
    place = words(message, "channel_id") or words(message, "lobby_id")
    return [
        SourceEvent(
            event_type="message.deleted",
            title="Message deleted",
            external_id=identity(place, name, "deleted"),
            resource=resource,
            occurred_at=at,
            metadata=facts(deletes=identity(place, name)),
        )
    ]


def _channel(channel: Any, name: str) -> list[SourceEvent]:
    """A channel or a thread that came; a thread is an event of the channel that it is in."""
    noun, _, verb = name.partition("_")
    found, called = words(channel, "id"), words(channel, "name")
    if not found or verb == "update" or words(channel, "type") in DIRECT:
        return []
    parent = words(channel, "parent_id") if noun == "thread" else ""
    resource = Resource(parent or found, parent or f"#{called or found}", "channel")
    return [
        SourceEvent(
            event_type=f"{noun}.created",
            title=called or f"New {noun}",
            external_id=identity(found, f"{noun}.created"),
            resource=resource,
            author=words(channel, "owner_id"),
            occurred_at=part(channel, "thread_metadata", "create_timestamp") or _made(found),
            metadata=facts(thread=identity(parent, found) if parent else None),
        )
    ]


def _interaction(body: Any) -> list[SourceEvent]:
    """A command that somebody gave in a channel; buttons and half-typed words are nothing."""
    if part(body, "type") != 2 or not words(body, "data", "name"):
        return []
    given = [words(option, "value") for option in parts(body, "data", "options")[:20]]
    resource, _ = _in(body)
    user = part(body, "member") or body
    return [
        SourceEvent(
            event_type="command.given",
            title=" ".join(("/" + words(body, "data", "name"), *filter(None, given))),
            external_id=identity(words(body, "channel_id") or "-", words(body, "id")),
            resource=resource,
            author=words(user, "nick") or _named(part(user, "user")),
            occurred_at=_made(words(body, "id")),
        )
    ]


def _in(message: Any) -> tuple[Resource | None, str]:
    """The channel, by its name where it is sent, and the thread in it."""
    found = words(message, "channel_id") or words(message, "lobby_id")
    name = words(message, "channel", "name") or words(message, "channel_name")
    parent = words(message, "channel", "parent_id") or words(message, "parent_id")
    if words(message, "channel", "type") in THREADS and parent:
        return Resource(parent, parent, "channel"), found
    started = words(message, "thread", "id")
    return Resource(found, f"#{name}" if name else found, "channel") if found else None, started


def _author(message: Any) -> str:
    """Who wrote it, as the server calls them."""
    return words(message, "member", "nick") or _named(part(message, "author"))


def _named(user: Any) -> str:
    return words(user, "global_name") or words(user, "username") or words(user, "id")


def _made(snowflake: str) -> datetime | None:
    """When an id was given: it holds that."""
    if not snowflake.isdigit() or len(snowflake) > 20:
        return None
    return datetime.fromtimestamp(((int(snowflake) >> 22) + EPOCH) / 1000, UTC)


def _text(message: Any) -> str:
    """What a message says: its text, or its embeds, or its files; with names for ids."""
    said = text(part(message, "content"))
    if not said:
        lines = []
        for embed in parts(message, "embeds")[:10]:
            title, address = words(embed, "title"), words(embed, "url")
            lines.append(f"{title} ({address})" if address else title)
            lines.append(text(part(embed, "description")) or "")
            for entry in parts(embed, "fields")[:25]:
                lines.append(f"{words(entry, 'name')}: {words(entry, 'value')}")
        said = "\n".join(line for line in lines if line.strip(" :"))
    if not said:
        said = ", ".join(
            filter(None, (words(f, "filename") for f in parts(message, "attachments")))
        )
    people = {words(user, "id"): _named(user) for user in parts(message, "mentions")}
    rooms = {words(room, "id"): words(room, "name") for room in parts(message, "mention_channels")}

    def named(found: re.Match[str]) -> str:
        mark, what = found[1], found[2]
        if mark in ("@", "@!"):
            return f"@{people.get(what) or what}"
        if mark == "#":
            return f"#{rooms.get(what) or what}"
        if mark in (":", "a:"):
            return f":{what.partition(':')[0]}:"
        if mark == "t:" and (at := what.partition(":")[0]).isdigit() and len(at) < 12:
            return f"{datetime.fromtimestamp(int(at), UTC):%Y-%m-%d %H:%M UTC}"
        return f"/{what.partition(':')[0]}" if mark == "/" else ""

    return MARK.sub(named, said).strip()
