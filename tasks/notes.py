"""Release notes and pull request texts: what changed for users, grouped as people group it."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from app.schemas import Contributor, NotesSection, ReleaseNotesDraft, Statement
from tasks.changes import INTERNAL, Change, lasting, signals_behind
from tasks.lines import line
from tasks.passages import (
    KEY_CHANGES,
    LIST_MAX,
    SUMMARY_IDS,
    dependency_line,
    numbers,
    said,
    spread,
    summary_of,
    themes,
    touched_files,
)
from tasks.paths import SCHEMA_FILE, TEST_FILE
from tasks.reading import Reading, read_together
from tasks.signals import Signal
from tasks.statements import Seen, count, ids_of, listed, merged, raised, stated

NOTES_MAX = 20  # items of release notes; maintainers write 5 to 15
# From so many changes with a line in the changelog on, and one in so many, it is kept as people go.
KEPT_MIN, KEPT_SHARE = 3, 10
HEADINGS = {
    "Breaking changes": "", "Security": "security", "Added": "feature", "Changed": "change",
    "Deprecated": "deprecation", "Removed": "removal", "Performance": "performance",
    "Fixed": "fix",
}  # fmt: skip
VERSION = re.compile(r"v?\d{1,5}(?:\.\d{1,5}){1,3}[\w.+-]{0,20}", re.I)
RELEASE_COMMIT = re.compile(
    r"^(?:prepare |bump |new )?(?:version|release)\b.{0,20}\d|^v?\d+(?:\.\d+)+\S{0,10}$"
    r"|\bfor v?\d\S{1,20} release$",
    re.I,
)


def release_notes(reading: Reading) -> ReleaseNotesDraft:
    """What changed for users, grouped as people group it; a pull request text when asked."""
    wanted = reading.context.options.get("repo")
    events = tuple(event for event in reading.context.events if event.resource == wanted)
    if isinstance(wanted, str) and events:
        reading = read_together(replace(reading.context, events=events))
    version, reading = _released(reading)
    describing = reading.context.options.get("style") == "pr_description"
    sections = _description(reading) if describing else _note_sections(reading)
    name = line(wanted, 80) if isinstance(wanted, str) else line(reading.context.project_name, 80)
    visible = [c for c in reading.changes if c.visible] or list(reading.changes)
    if describing:
        title = next((raised(line(change.text, 90)) for change in lasting(visible)), name)
    else:
        title = f"{name} {version}".strip() if version else f"{name}: unreleased changes"
    return ReleaseNotesDraft(
        title=title,
        version=version,
        summary=_notes_summary(reading, visible, sections),
        sections=sections,
        contributors=_contributors(reading),
    )


def _released(reading: Reading) -> tuple[str | None, Reading]:
    """The version of the newest release, and the events that belong to it.

    A release ends what came before it, so changes of the release before it are left out, and so
    are those that came later; when there are only later ones, they are unreleased.
    """
    tags = [(at, name) for at, signal in enumerate(reading.signals) if (name := _version(signal))]
    if not tags:
        return _committed_version(reading), reading
    newest, name = tags[0]
    before = [at for at, other in tags[1:] if other != name]
    end = before[0] if before else len(reading.signals)
    moment = reading.signals[newest].event.occurred_at
    start = next(at for at, s in enumerate(reading.signals) if s.event.occurred_at <= moment)
    inside = reading.signals[start:end]
    if not any(signal.role == "change" for signal in inside):
        return (None if newest else name), reading
    return name, read_together(replace(reading.context, events=tuple(s.event for s in inside)))


def _version(signal: Signal) -> str | None:
    """The version that a release event names; a tag without digits names itself."""
    if signal.role != "release":
        return None
    tag = signal.event.metadata.get("tag")
    for value in (tag, signal.event.metadata.get("version"), signal.text):
        if isinstance(value, str) and (found := VERSION.search(value[:200])):
            return found[0]
    return line(tag, 60) or None if isinstance(tag, str) else None


def _committed_version(reading: Reading) -> str | None:
    """A version from a "Release 1.2" commit, when no real change came after it."""
    for signal in reading.signals:
        if RELEASE_COMMIT.search(signal.text) and (found := VERSION.search(signal.text)):
            return found[0]
        if signal.role == "change" and signal.kind not in INTERNAL:
            return None
    return None


def _note_sections(reading: Reading) -> list[NotesSection]:
    """The headings that have something under them; internals when nothing else is left."""
    changes = [change for change in reading.changes if not change.cancelled]
    changes = [c for c in changes if any(s.role == "change" for s in c.signals)] or changes
    changes = _notable(changes)
    sections = []
    for heading, kind in HEADINGS.items():
        items = [c.statement for c in changes if ("" if c.breaking else c.kind) == kind]
        if items:
            sections.append(NotesSection(heading=heading, items=items))
    if not sections:
        items = [c.statement for c in changes if not c.minor] or dependency_line(reading)
        sections = [NotesSection(heading="Internal", items=items)] if items else []
    return sections


def _notable(changes: Sequence[Change]) -> list[Change]:
    """The changes that users read about, best first: not all fifty commits of a busy month."""
    told = [change for change in changes if change.visible]
    noted = [change for change in told if change.noted]
    if len(noted) >= KEPT_MIN and len(noted) * KEPT_SHARE >= len(told):
        # Where people keep a changelog, what they left out of it is seldom for users.
        rest = [change for change in told if not change.noted]
        grave = [change for change in rest if change.breaking or change.kind == "security"]
        rest = [change for change in rest if change not in grave]
        told = [*noted, *grave, *spread(rest, len(noted) // 2)]
    return spread(told, NOTES_MAX) if told else list(changes)


def _description(reading: Reading) -> list[NotesSection]:
    """The sections of a pull request text."""
    changes = [c for c in reading.changes if not c.minor and not c.cancelled]
    told = [change for change in changes if change.kind != "test"] or changes
    what = [change.statement for change in told[: KEY_CHANGES - 1]] + dependency_line(reading)
    why = [stated(s.why, [s]) for s in signals_behind(changes) if s.why and not s.bot]
    touched = sorted(touched_files(reading).items())
    tests = [stated(line(f"`{path}`"), by) for path, by in touched if TEST_FILE.search(path)]
    named = {
        "What changed": what,
        "Why": why,
        "Notes for reviewers": _review_notes(reading, changes),
        "Testing": tests,
    }
    return [
        NotesSection(heading=heading, items=kept[:KEY_CHANGES])
        for heading, items in named.items()
        if (kept := merged(items, Seen()))
    ]


def _review_notes(reading: Reading, changes: Sequence[Change]) -> list[Statement]:
    """What a reviewer has to know: what breaks, what touches the schema, what is unsure."""
    found = [stated(f"Breaking: {raised(c.breaking)}", c.signals) for c in changes if c.breaking]
    for change in changes:
        paths = [path for path in change.files if SCHEMA_FILE.search(path)]
        paths = [path for path in paths if not TEST_FILE.search(path)]
        if paths:
            found.append(stated(f"Touches the schema: {listed(paths, 3)}", change.signals))
    for label in ("risk", "next", "question"):
        found += said(reading, label, LIST_MAX, Seen())
    return found


def _notes_summary(
    reading: Reading, visible: Sequence[Change], sections: Sequence[NotesSection]
) -> Statement:
    """What there is of each section, and the two changes that matter most."""
    if reading.context.options.get("style") == "pr_description":
        text = f"{numbers(reading)}."
    else:
        shown = sum(len(section.items) for section in sections)
        what = f"The {shown} most notable of {len(visible)} changes"
        what = what if shown < len(visible) else count(shown, "change")
        kinds = [
            f"{len(s.items)} {s.heading.casefold().removesuffix(' changes')}" for s in sections
        ]
        text = f"{what}: {listed(kinds, 9)}."
    best = sorted(lasting(visible), key=lambda change: -change.score)[:2]
    if best:
        text += f" Highlights: {themes(best)}."
    return summary_of(text, signals_behind((*best, *visible)) or reading.signals)


def _contributors(reading: Reading) -> list[Contributor]:
    """Everyone who made a change, most changes first; bots are not people."""
    made: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        for name in change.people:
            made[name].append(change)
    return [
        Contributor(name=name, event_ids=ids_of(signals_behind(made[name]))[:SUMMARY_IDS])
        for name in sorted(made, key=lambda name: (-len(made[name]), name))
    ]
