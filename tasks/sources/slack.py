"""What Slack's Events API sends, as events: messages with their threads, channels, pins.

Pure. The one rule: a message and all its replies are one `thread`, `<channel>:<ts of the first>`,
and a reply names its parent by the parent's external id.

Not told: direct messages, reactions, who came and went, files without a message, and what Baton's
own app wrote.
"""

import html
import re
from collections.abc import Iterator
from typing import Any

from tasks.lines import set_of
from tasks.sources.body import facts, fingerprint, identity, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text

UNTOLD = set_of(
    "reaction_added reaction_removed member_joined_channel member_left_channel team_join "
    "user_change user_profile_changed user_status_changed user_huddle_changed emoji_changed "
    "app_home_opened app_uninstalled app_rate_limited tokens_revoked file_shared file_created "
    "file_public file_change file_deleted file_unshared dnd_updated dnd_updated_user im_open "
    "im_created im_close im_history_changed channel_left group_left group_open group_close "
    "channel_history_changed group_history_changed link_shared team_domain_change team_rename "
    "subteam_created subteam_updated subteam_members_changed subteam_self_added "
    "subteam_self_removed assistant_thread_started assistant_thread_context_changed "
    "channel_id_changed channel_shared channel_unshared invite_requested url_verification"
)
QUIET = set_of(  # subtypes of messages
    "channel_join channel_leave group_join group_leave bot_add bot_remove bot_enable bot_disable "
    "message_replied ekm_access_denied tombstone assistant_app_thread huddle_thread "
    "channel_name group_name channel_archive group_archive channel_unarchive group_unarchive "
    "channel_posting_permissions channel_convert_to_private channel_convert_to_public "
    "pinned_item unpinned_item reminder_add"
)
CHANNELS = {  # the verb, and how the title says it
    "created": "created", "rename": "renamed", "archive": "archived",
    "unarchive": "unarchived", "deleted": "deleted",
}  # fmt: skip
MARK = re.compile(r"<([@#!]?)([^<>|]{1,3000})(?:\|([^<>]{0,3000}))?>")
DEPTH = 16  # of blocks and lists of them in each other
PIECES = 200  # texts taken of one message's blocks


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; handshakes and what tells nothing give none."""
    body = delivery.body
    event = part(body, "event")
    kind = words(event, "type")
    if not kind or kind in UNTOLD or words(event, "channel_type") in ("im", "app_home"):
        return []
    if kind in ("message", "app_mention"):
        return _message(body, event)
    noun, _, verb = kind.partition("_")
    if noun in ("channel", "group") and verb in CHANNELS:
        return _channel(body, event, CHANNELS[verb])
    if kind in ("pin_added", "pin_removed"):
        return _pin(event, "pinned" if kind == "pin_added" else "unpinned")
    return [
        SourceEvent(
            event_type=kind,
            title=kind.replace("_", " "),
            external_id=words(body, "event_id") or fingerprint(body),
            resource=_in(event),
            author=words(event, "user"),
            occurred_at=words(event, "event_ts"),
        )
    ]


def plain(mrkdwn: str) -> str:
    """Text as people read it: links keep their address, since that is what ties things together.

    A person or channel whose name Slack did not send stays as `@U…` or `#C…`.
    """
    return html.unescape(MARK.sub(_named, mrkdwn))


def _named(found: re.Match[str]) -> str:
    mark, what, label = found[1], found[2], (found[3] or "").strip()
    if mark in ("@", "#") and mark:
        return mark + (label.lstrip("@#") or what)
    if mark == "!":
        named = what.split("^")[0]
        return label or (f"@{named}" if named in ("here", "channel", "everyone") else "")
    address = what.removeprefix("mailto:").removeprefix("tel:")
    return address if not label or label in address else f"{label} ({address})"


def _message(body: Any, event: Any) -> list[SourceEvent]:
    """A message, one that was edited, or one that is gone."""
    channel, subtype = words(event, "channel"), words(event, "subtype")
    if subtype == "message_changed":
        message, before = part(event, "message"), part(event, "previous_message")
        if words(message, "subtype") == "tombstone":
            return _deleted(event, message, before)
        if part(message, "text") == part(before, "text") and part(before, "text"):
            return []  # Slack unfolded a link, or learned its language
        when = words(message, "edited", "ts") or words(event, "ts")
        return _told(body, message, channel, "message.edited", edited=when)
    if subtype == "message_deleted":
        return _deleted(event, part(event, "previous_message"), None)
    kind = "message" if _root(event) in ("", words(event, "ts")) else "message.reply"
    return _told(body, event, channel, kind)


def _told(body: Any, message: Any, channel: str, kind: str, edited: str = "") -> list[SourceEvent]:
    """What somebody said, whole."""
    own = words(body, "api_app_id")
    apps = (words(message, "app_id"), words(message, "bot_profile", "app_id"))
    said = _text(message)
    if words(message, "subtype") in QUIET or not said or (own and own in apps):
        return []
    ts = words(message, "ts")
    root = _root(message) or ts
    bot = bool(words(message, "bot_id")) or words(message, "subtype") == "bot_message"
    title, _, _ = said.partition("\n")
    team = words(message, "team") or words(body, "team_id")
    where = f"https://app.slack.com/client/{team}/{channel}/thread/{channel}-{root}"
    return [
        SourceEvent(
            event_type=kind,
            title=title,
            content=said if said != title or len(title) > 300 else None,
            external_id=identity(channel, ts, *(("edited", edited) if edited else ())),
            resource=_in({"channel": channel, "channel_name": part(message, "channel_name")}),
            author=_author(message),
            url=where if team and channel and root else None,
            occurred_at=edited or ts,
            metadata=facts(
                thread=identity(channel, root),
                parent=identity(channel, root) if root != ts else None,
                edits=identity(channel, ts) if edited else None,
                bot=bot or None,
                attachments=[
                    name for file in parts(message, "files")[:20] if (name := words(file, "name"))
                ],
            ),
        )
    ]


def _deleted(event: Any, message: Any, before: Any) -> list[SourceEvent]:
    """A message that is gone: that it is, and not what it said."""
    channel = words(event, "channel")
    ts = words(event, "deleted_ts") or words(message, "ts")
    root = _root(message) or _root(before) or ts
    return [
        SourceEvent(
            event_type="message.deleted",
            title="Message deleted",
            external_id=identity(channel, ts, "deleted"),
            resource=_in(event),
            occurred_at=words(event, "event_ts") or words(event, "ts"),
            metadata=facts(thread=identity(channel, root), deletes=identity(channel, ts)),
        )
    ]


def _channel(body: Any, event: Any, verb: str) -> list[SourceEvent]:
    """A channel that came, went or got its name."""
    resource = _in(event)
    if resource is None:
        return []
    at = words(event, "event_ts") or words(body, "event_time")
    return [
        SourceEvent(
            event_type=f"channel.{verb}",
            title=f"Channel {resource.name} {verb}",
            external_id=identity(resource.id, f"channel.{verb}", resource.name, at)
            or fingerprint(body),
            resource=resource,
            author=words(event, "channel", "creator") or words(event, "user"),
            occurred_at=at,
        )
    ]


def _pin(event: Any, verb: str) -> list[SourceEvent]:
    """A message that somebody wants to be found again."""
    channel = words(event, "channel_id") or words(event, "item", "channel")
    message = part(event, "item", "message")
    said = _text(message) or words(event, "item", "file", "title")
    ts, at = words(message, "ts"), words(event, "event_ts")
    root = _root(message) or ts
    return [
        SourceEvent(
            event_type=f"message.{verb}",
            title=said.partition("\n")[0] or f"Item {verb}",
            content=said,
            external_id=identity(channel, ts or words(event, "item", "file", "id"), verb, at),
            resource=_in({"channel": channel}),
            author=words(event, "user"),
            url=words(message, "permalink"),
            occurred_at=at,
            metadata=facts(thread=identity(channel, root), **{verb: identity(channel, ts)}),
        )
    ]


def _in(event: Any) -> Resource | None:
    """The channel, by its name where Slack sends it."""
    channel = part(event, "channel")
    found = words(channel, "id") or words(channel) or words(event, "channel_id")
    name = words(channel, "name") or words(event, "channel_name")
    return Resource(found, f"#{name.lstrip('#')}" if name else found, "channel") if found else None


def _author(message: Any) -> str:
    """Who wrote it: the name where Slack sends one, otherwise the id."""
    named = (
        words(message, "user_profile", "display_name"),
        words(message, "user_profile", "real_name"),
        words(message, "username"),
        words(message, "bot_profile", "name"),
        words(message, "user"),
        words(message, "bot_id"),
    )
    return next((name for name in named if name), "")


def _root(message: Any) -> str:
    """The time stamp of the message that a thread began with, when this is in one."""
    return words(message, "thread_ts")


def _text(message: Any) -> str:
    """What a message says: its text, or what its blocks and attachments say, or its files."""
    said = text(part(message, "text"))
    if not said:
        found = [
            piece
            for key in ("blocks", "attachments")
            for piece in _pieces(part(message, key), DEPTH)
        ]
        said = "\n".join(found[:PIECES])
    if not said.strip():
        files = (words(file, "title") or words(file, "name") for file in parts(message, "files"))
        said = ", ".join(name for name in files if name)
    return plain(said).strip()


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """The texts in blocks and attachments, in order; a run of rich text is one of them."""
    if isinstance(value, list) and depth:
        for item in value:
            yield from _pieces(item, depth - 1)
    if not isinstance(value, dict) or not depth:
        return
    if words(value, "type") in ("rich_text_section", "rich_text_quote", "rich_text_preformatted"):
        yield "".join(_run(item) for item in parts(value, "elements"))
        return
    said = [text(value.get(key)) for key in ("title", "pretext", "text", "value")]
    if said[0] and (address := words(value, "title_link")):
        said[0] = f"{said[0]} ({address})"
    yield from filter(None, said)
    for key in ("title", "text", "fields", "elements", "blocks", "columns"):
        if isinstance(value.get(key), dict | list):
            yield from _pieces(value[key], depth - 1)
    if not any(value.get(key) for key in ("title", "pretext", "text", "blocks", "fields")):
        yield from filter(None, (text(value.get("fallback")),))


def _run(item: Any) -> str:
    """One element of rich text."""
    address, said = words(item, "url"), part(item, "text")
    said = said if isinstance(said, str) else ""
    if address:
        return f"{said} ({address})" if said and said not in address else address
    if found := words(item, "user_id"):
        return f"@{found}"
    if found := words(item, "channel_id"):
        return f"#{found}"
    return said or (f":{words(item, 'name')}:" if words(item, "type") == "emoji" else "")
