"""An artifact as Markdown: the one rendering, for browsers, chats and terminals alike.

Pure. The one rule: structure comes from this file only. Every text of an event or a model is
escaped, so that it can say anything and do nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote, urlsplit

from app.schemas import (
    Area,
    Correlation,
    Draft,
    Person,
    ReleaseNotesDraft,
    Statement,
)
from tasks.context import Event
from tasks.statements import day_of, period_of

CITATIONS = 3  # per bullet: enough to check a claim, few enough to read past
SECTIONS = {
    "handoff": (
        ("Key changes", "key_changes"),
        ("Decisions", "decisions"),
        ("Open questions", "open_questions"),
        ("Next steps", "next_steps"),
    ),
    "digest": (
        ("What happened", "key_changes"),
        ("Decisions", "decisions"),
        ("Open questions", "open_questions"),
        ("Next", "next_steps"),
    ),
    "cross_source_correlation": (("What belongs together", "correlations"),),
    "onboarding_brief": (
        ("Areas", "areas"),
        ("Key people", "key_people"),
        ("Decisions", "decisions"),
        ("Open questions", "open_questions"),
        ("First steps", "first_steps"),
    ),
    "architecture_insight": (
        ("Components", "components"),
        ("Changes", "changes"),
        ("Decisions", "decisions"),
        ("Risks", "risks"),
        ("Open questions", "open_questions"),
    ),
    "question": (("Answer", "statements"),),
    "release_notes": (),  # the draft brings its own headings
}

CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff]+"
)
CODE = re.compile(r"(?<!`)(`[^`]{1,200}`)(?!`)")
# Underscores inside a word are harmless and common: `snake_case` stays readable.
SPECIAL = re.compile(r"[\\*\[\]|~`]|(?<![^\W_])_|_(?![^\W_])|\$(?=\S)")
ENTITY = re.compile(r"&(?=#?\w{1,32};)")
MENTION = re.compile(r"@(?=[\w-])")
SCHEME = re.compile(r"\b(javascript|vbscript|data|file|mailto|ftp)(?=:)", re.I)
LEADING = re.compile(r"^(?:[#>+=-]|\d{1,9}(?=[.)]))")
TAIL_REFERENCES = re.compile(r"\s\(((?:[\w./-]{0,120}#\d{1,7}"
                             r"|[A-Z][A-Z0-9]{1,9}-\d{1,6})(?:, (?:[\w./-]{0,120}#\d{1,7}"
                             r"|[A-Z][A-Z0-9]{1,9}-\d{1,6})){0,3})\)$")  # fmt: skip
NUMBER_URL = re.compile(
    r"/(?:pull|pulls|issues|pull-requests|merge_requests|discussions)/(\d{1,7})(?!\w)"
)
COMMIT_URL = re.compile(r"/commits?/([0-9a-f]{7,40})(?!\w)")
SHA = re.compile(r"[0-9a-f]{7,64}")
TICKET = re.compile(r"(?<![A-Za-z0-9])([A-Z][A-Z0-9]{1,9}-\d{1,6})(?![\w-])")

Entry = Statement | Area | Person | Correlation


def render(kind: str, draft: Draft, events: Mapping[str, Event], *, cut: bool = False) -> str:
    """Write an artifact.

    Args:
        events: those it may cite, by id.
        cut: the period holds older events that were too many to read; a reader has to know.
    """
    known = {event_id: event for event in events.values() for event_id in event.ids} | dict(events)
    parts = [f"# {escaped(getattr(draft, 'title', '')) or kind}"]
    summary = getattr(draft, "summary", None)
    if isinstance(summary, Statement) and summary.text.strip():
        parts.append(escaped(summary.text))
    for heading, entries in _sections(kind, draft):
        bullets = [_bullet(entry, known) for entry in entries]
        if bullets:
            parts.append(f"## {escaped(heading)}\n\n" + "\n".join(bullets))
    if isinstance(draft, ReleaseNotesDraft) and draft.contributors:
        parts.append(
            "## Contributors\n\n" + ", ".join(escaped(each.name) for each in draft.contributors)
        )
    if events:
        rest = "; older ones in the period were left out" if cut else ""
        parts.append(f"_{_footer(events.values())}{rest}_")
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text on one line that renders as itself; balanced code spans stay code."""
    text = " ".join(CONTROLS.sub(" ", text).split())
    pieces = CODE.split(text)
    plain = "".join(piece if at % 2 else _plain(piece) for at, piece in enumerate(pieces))
    return LEADING.sub(lambda found: _backslash(found[0]), plain)


def _backslash(start: str) -> str:
    """`#` becomes `\\#`; of `1.` the full stop is escaped."""
    return f"{start}\\" if start.isdigit() else f"\\{start}"


def _plain(text: str) -> str:
    text = SPECIAL.sub(lambda found: f"\\{found[0]}", ENTITY.sub("&amp;", text))
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    # A zero-width space keeps the name readable and calls nobody.
    return SCHEME.sub("\\1\\\\", MENTION.sub("@\u200b", text))


def _sections(kind: str, draft: Draft) -> Iterable[tuple[str, Sequence[Entry]]]:
    if isinstance(draft, ReleaseNotesDraft):
        return [(section.heading, section.items) for section in draft.sections]
    return [(heading, getattr(draft, field)) for heading, field in SECTIONS[kind]]


def _bullet(entry: Entry, events: Mapping[str, Event]) -> str:
    text, cited = _cited(entry.text, entry.event_ids, events)
    said = escaped(text)
    if isinstance(entry, Person):
        # Each by itself: together, their backticks could pair up into other code than they hold.
        areas = f" ({', '.join(map(escaped, entry.areas))})" if entry.areas else ""
        said = f"**{escaped(entry.name)}**{areas}: {said}"
    elif isinstance(entry, Area):
        said = f"**{escaped(entry.name)}**: {said}"
    elif isinstance(entry, Correlation):
        said = f"**{escaped(entry.title)}**: {said}"
    return f"- {said} ({cited})" if cited else f"- {said}"


def _cited(text: str, ids: Sequence[str], events: Mapping[str, Event]) -> tuple[str, str]:
    """The text and its citations; a reference that the text ends with becomes the link itself."""
    labels: dict[str, str] = {}  # label -> Markdown, the first link of a label wins
    for event_id in ids:
        event = events.get(event_id)
        if event is not None:
            label = _label(event)
            link = _link(label, event)
            if label not in labels or (not labels[label].startswith("[") and link.startswith("[")):
                labels[label] = link
    tail = TAIL_REFERENCES.search(text)
    named = tail[1].split(", ") if tail else []
    if tail and all(labels.get(_short(name), "").startswith("[") for name in named):
        text = text[: tail.start()]
        labels = {_short(name): labels[_short(name)] for name in named} | labels
    else:
        # A label that the text already says is only worth repeating as a link.
        said = {
            *map(_short, named),
            *(label for label in labels if TICKET.fullmatch(label) and label in text),
        }
        labels = {k: link for k, link in labels.items() if link.startswith("[") or k not in said}
    shown = list(labels.values())[:CITATIONS]
    more = f" +{len(labels) - CITATIONS} more" if len(labels) > CITATIONS else ""
    return text, ", ".join(shown) + more


def _short(reference: str) -> str:
    return f"#{reference.rpartition('#')[2]}" if "#" in reference else reference


def _label(event: Event) -> str:
    """What people call the event: a number, a key, a short sha, or where and when it was."""
    url, identity = event.url or "", event.external_id or ""
    if found := NUMBER_URL.search(url):
        return f"#{found[1]}"
    if found := COMMIT_URL.search(url):
        return found[1][:7]
    if SHA.fullmatch(identity):
        return identity[:7]
    if found := TICKET.search(identity) or TICKET.search(url):
        return found[1]
    return f"{event.source}, {day_of(event.occurred_at)}"


def _link(label: str, event: Event) -> str:
    url = _safe_url(event.url)
    if url:
        return f"[{_plain(CONTROLS.sub(' ', label))}]({url})"
    return f"`{label}`" if SHA.fullmatch(label) else escaped(label)


def _safe_url(url: str | None) -> str:
    """An http address that cannot end its own brackets; "" for anything else."""
    try:
        parts = urlsplit(CONTROLS.sub("", url or "").strip())
        if parts.scheme.casefold() not in ("http", "https") or not parts.hostname:
            return ""
    except ValueError:
        return ""
    # Percent signs stay: the address is already encoded. An `&copy;` in it is no entity.
    return ENTITY.sub(r"\&", quote(parts.geturl(), safe="/:?#@!$&'*+,;=%~"))


def _footer(events: Iterable[Event]) -> str:
    """As in "2 to 20 Dec 2023, 38 events from github, slack"."""
    distinct = {event.id: event for event in events}
    period = period_of([event.occurred_at for event in distinct.values()])
    number = len({event_id for event in distinct.values() for event_id in event.ids})
    sources = ", ".join(escaped(source) for source in sorted({e.source for e in distinct.values()}))
    return f"{period}, {number} event{'' if number == 1 else 's'} from {sources}"
