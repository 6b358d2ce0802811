"""A context, read once: what the five artifacts are composed from."""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tasks.changes import Change, changes_of
from tasks.context import Context
from tasks.lines import line, words
from tasks.paths import area_names
from tasks.references import GIT_SOURCES
from tasks.signals import Signal, read

TEXT_BUDGET = 2_000_000  # characters of bodies read in one context, about a second on a slow core
BODY_MIN = 2_000  # characters of one body that are read even then
OPEN_WORDS = {"ticket": "Open", "pull": "Open pull request", "incident": "Unresolved"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A context, read once: what the five artifacts are composed from."""

    context: Context
    signals: tuple[Signal, ...]  # newest first
    changes: tuple[Change, ...]  # most important first
    open: tuple[Signal, ...]  # tickets, pull requests and incidents that nothing closed
    closed: frozenset[str]  # references that something closed
    people: dict[str, str]  # author as written -> name to print
    several: bool  # more than one repository: references need its name


def read_together(context: Context) -> Reading:
    """Read every event once and group what belongs to one change."""
    limit = max(BODY_MIN, TEXT_BUDGET // max(1, len(context.events)))
    signals = tuple(read(event, limit=limit) for event in context.events)
    several = len({s.event.resource for s in signals if s.event.source in GIT_SOURCES}) > 1
    people = _people(signals)
    closed = _closed(signals)
    return Reading(
        context=context,
        signals=signals,
        changes=changes_of(signals, _parts(signals, several), people, several=several),
        open=_open(signals, closed),
        closed=closed,
        people=people,
        several=several,
    )


def _closed(read: Sequence[Signal]) -> frozenset[str]:
    """References that a change closes, or whose newest state is closed."""
    closed = {ref for signal in read if signal.role == "change" for ref in signal.closes}
    known: dict[str, str] = {}
    for signal in read:  # newest first: the first state that is known counts
        if signal.own and signal.state and signal.role in ("ticket", "pull", "incident", "change"):
            known.setdefault(signal.own, signal.state)
    closed |= {own for own, state in known.items() if state == "closed"}
    requests = {signal.own for signal in read if signal.role == "pull"}
    closed |= requests & {signal.pull for signal in read if signal.role == "change"}  # merged
    reopened = {
        s.own
        for s in read
        if known.get(s.own) == "open" and "reopened" in s.event.event_type.casefold()
    }
    return frozenset(closed - reopened)


def _open(read: Sequence[Signal], closed: frozenset[str]) -> tuple[Signal, ...]:
    """The newest event of each ticket, pull request and incident that is still open."""
    found: dict[Hashable, Signal] = {}
    ended: set[Hashable] = set()
    for signal in read:
        filed = signal.bot and signal.role != "incident"  # monitors file incidents, and mean it
        if signal.role not in OPEN_WORDS or not signal.text or filed or not signal.state:
            continue
        key: Hashable = signal.own or signal.event.url or (signal.event.source, words(signal.text))
        if signal.state == "closed":
            ended.add(key)
        elif key not in ended and signal.own not in closed:
            found.setdefault(key, signal)
    return tuple(found.values())


def _parts(read: Sequence[Signal], several: bool) -> dict[str, str]:
    """For every path that was touched, the part of the system that it belongs to."""
    touches = Counter(path for s in read if s.role in ("change", "pull") for path in s.files)
    owners = {path: s.event.resource or "" for s in reversed(read) for path in s.files}
    names = area_names(touches)
    if several:
        names = {
            path: name and f"{owners[path].rpartition('/')[2]}: {name}"
            for path, name in names.items()
        }
    return {path: line(name, 80) for path, name in names.items()}


def _people(read: Sequence[Signal]) -> dict[str, str]:
    """One name per person: the same mail, the same name, or a mail that spells the name."""
    raw: dict[str, tuple[str, str]] = {}
    for signal in read:
        for text in (signal.author, *signal.coauthors):
            name, _, mail = text.partition("<")
            if "@" in name and " " not in name.strip():
                name, mail = "", name
            raw.setdefault(text, (line(name, 80), mail.strip(" <>").casefold()))
        mail_of = signal.event.metadata.get("author_email") or signal.event.metadata.get("email")
        if isinstance(mail_of, str) and signal.author and not raw[signal.author][1]:
            raw[signal.author] = (raw[signal.author][0], mail_of.strip()[:200].casefold())
    full: dict[str, str] = {}
    first_names: dict[str, set[str]] = defaultdict(set)
    mails: dict[str, str] = {}
    for name, mail in sorted(raw.values(), key=lambda pair: (pair[0].islower(), pair)):
        if " " in name:
            full.setdefault(_squeezed(name), name)
            first_names[_squeezed(name.split()[0])].add(full[_squeezed(name)])
        if mail and name:
            mails.setdefault(mail, name)
    found = {}
    for text, (name, mail) in raw.items():
        handle = name or mails.get(mail) or line(mail.partition("@")[0], 80)
        key = _squeezed(handle)
        same = first_names.get(key, set())
        found[text] = full.get(key) or (min(same) if len(same) == 1 else handle)
    return found


def _squeezed(name: str) -> str:
    """A name as a key: `ada-lovelace` and "Ada Lovelace" are one person."""
    return re.sub(r"[\W_]+", "", name.casefold())
