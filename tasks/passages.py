"""What several artifacts tell the same way: numbers, themes, what was said, what is open."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from app.schemas import Statement
from tasks.changes import Change, signals_behind
from tasks.cues import SMALL_TALK
from tasks.kinds import DEPENDENCY, GROUP_BUMP
from tasks.lines import LINE_MAX, WORD, line
from tasks.paths import SIDE_AREAS
from tasks.reading import OPEN_WORDS, Reading
from tasks.references import as_written
from tasks.signals import Signal
from tasks.statements import Seen, count, ids_of, listed, merged, period_of, raised, stated

KEY_CHANGES = 12  # more than a screen of bullets is a log, not a handoff
LIST_MAX = 8  # entries of every other list
SUMMARY_IDS = 50  # ids behind a summary; its counts may stand on a thousand events
THREAD_MAX = 3  # of them about the same issue
DOCS_MAX = 3  # of them about documentation


def numbers(reading: Reading) -> str:
    """As in "12 changes by 4 people in app/auth and docs, 2 Dec to 20 Dec 2023"."""
    real = [change for change in reading.changes if change.kind != "noise"]
    period = period_of([signal.event.occurred_at for signal in reading.signals])
    if not real:
        sources = listed(sorted({signal.event.source for signal in reading.signals}), 4)
        return f"{count(len(reading.signals), 'event')} from {sources}, {period}"
    people = {name for change in real for name in change.people}
    main = Counter(change.areas[0] for change in real if change.areas)
    areas = [name for name, _ in main.most_common()]
    areas = [name for name in areas if name not in SIDE_AREAS] or areas
    by = f" by {count(len(people), 'person', 'people')}" if people else ""
    where = f" {'mostly ' if len(areas) > 3 else ''}in {listed(areas[:3], 3)}" if areas else ""
    return f"{count(len(real), 'change')}{by}{where}, {period}"


def themes(changes: Sequence[Change]) -> str:
    """The changes in a row, for a summary."""
    return "; ".join(line(change.told, 90).rstrip(".") for change in changes)


def summary_of(text: str, behind: Iterable[Signal]) -> Statement:
    """A summary: it stands on more events than anybody wants to see cited."""
    return Statement(text=text, event_ids=ids_of(behind)[:SUMMARY_IDS])


def touched_files(reading: Reading) -> dict[str, list[Signal]]:
    """Every path with the events that touched it, newest first."""
    found: dict[str, list[Signal]] = defaultdict(list)
    for signal in reading.signals:
        for path in signal.files:
            found[path].append(signal)
    return found


def spread(changes: Sequence[Change], most: int) -> list[Change]:
    """The best changes, without letting one issue or the documentation take all the room."""
    kept: list[Change] = []
    counts: Counter[str] = Counter()
    for change in sorted(changes, key=lambda change: -change.score):
        limit = DOCS_MAX if change.kind == "docs" else THREAD_MAX if change.reference else most
        thread = change.kind if change.kind == "docs" else change.reference
        counts[thread] += 1
        if counts[thread] <= limit and len(kept) < most:
            kept.append(change)
    return kept


def dependency_line(reading: Reading) -> list[Statement]:
    """All dependency updates as one line; nobody reads them one by one."""
    bumps = [change for change in reading.changes if change.kind == "dependency"]
    if len(bumps) < 2:
        return [change.statement for change in bumps]
    names: dict[str, None] = {}
    for change in bumps:
        found = DEPENDENCY.match(change.text) or GROUP_BUMP.match(change.text)
        if found and found[1]:
            names[found[1]] = None
    updated = ", ".join(sorted(names)[:6]) + (" \u2026" if len(names) > 6 else "")
    text = (
        f"Updated {len(names)} dependencies: {updated}"
        if len(names) > 1
        else f"Dependency updates ({len(bumps)})"
    )
    return [stated(line(text), signals_behind(bumps))]


def open_line(reading: Reading, signal: Signal) -> Statement:
    """A ticket, pull request or incident that is open, with its name and priority."""
    own = as_written(signal.own, reading.several) if signal.own not in signal.text else ""
    urgency = f"priority {line(str(signal.event.priority), 20)}" if signal.urgency else ""
    details = ", ".join(filter(None, (own, urgency)))
    suffix = f" ({details})" if details else ""
    text = f"{OPEN_WORDS[signal.role]}: {line(signal.text, LINE_MAX - 60)}{suffix}"
    return stated(text, [signal])


def said(
    reading: Reading,
    label: str,
    most: int,
    seen: Seen,
    *,
    relevance: Callable[[str], float] | None = None,
) -> list[Statement]:
    """The sentences under one label, strongest and newest first, with who said them in chat."""
    answered = _answered(reading)
    undone = {s.event.id for s in signals_behind(c for c in reading.changes if c.undone)}
    found: list[tuple[float, int, Statement]] = []
    for at, signal in enumerate(reading.signals):
        over = signal.own in reading.closed or signal.state == "closed"
        settled = {
            "question": over or at > answered.get(_thread(signal), at),
            "next": over and signal.role != "change",
        }
        if signal.bot or signal.event.id in undone or settled.get(label):
            continue
        for sentence in signal.sentences:
            if sentence.label == label:
                asked = 10 * relevance(sentence.text) if relevance else 0
                weight = sentence.strength + signal.urgency + asked
                found.append((-weight, at, attributed(reading, signal, sentence.text)))
    found.sort(key=lambda entry: entry[:2])
    return merged((statement for _, _, statement in found[: most * 20]), seen)[:most]


def attributed(reading: Reading, signal: Signal, text: str) -> Statement:
    """A sentence with who said it and where, or with the title that it stood under."""
    if signal.role == "chat":
        name = reading.people.get(signal.author, signal.author)
        where = line(signal.event.resource or "", 60)
        room = f"#{where}" if where and signal.event.source in ("slack", "discord") else where
        by = f"{line(name, 60)} in {room}" if name and room else line(name, 60) or room
    else:
        # A sentence from a body needs the title to be understood.
        named = "" if text == signal.text else raised(line(signal.text, 70))
        by = f"in \u201c{named}\u201d" if named else ""
    if by:
        text = f"{line(text, LINE_MAX - len(by) - 3).rstrip('.')} \u2014 {by}"
    return stated(text, [signal])


def _thread(signal: Signal) -> str:
    """The conversation that a message is part of, when its source tells."""
    for key in ("thread_ts", "thread_id", "thread"):
        value = signal.event.metadata.get(key)
        if isinstance(value, str) and value:
            return f"{signal.event.resource}/{value}"
    return ""


def _answered(reading: Reading) -> dict[str, int]:
    """For a thread, the place of its newest decision: questions before it are answered."""
    found: dict[str, int] = {}
    for at, signal in enumerate(reading.signals):
        thread = _thread(signal)
        if thread and any(sentence.label == "decision" for sentence in signal.sentences):
            found.setdefault(thread, at)
    return found


def remarks(reading: Reading, seen: Seen) -> list[Statement]:
    """What was said or happened, when nothing else is there to report."""
    found = [
        attributed(reading, signal, signal.text)
        for signal in reading.signals
        if signal.role in ("chat", "other", "release") and not signal.bot and signal.kind != "noise"
        and len(WORD.findall(signal.text)) >= 3
        and not SMALL_TALK.match(signal.text[:120])
    ]  # fmt: skip
    return merged(found[:200], seen)[:KEY_CHANGES]
