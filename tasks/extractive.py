"""The built-in provider: five artifacts pulled out of events without a model or a network.

Pure and deterministic: the same context gives the same draft. The one rule: everything said is
a sentence of an event or a count over events, and carries the ids of those events.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from app.schemas import (
    AnyDraft,
    ArchitectureDraft,
    Area,
    Correlation,
    CorrelationDraft,
    HandoffDraft,
    NotesSection,
    OnboardingDraft,
    Person,
    ReleaseNotesDraft,
    Statement,
)
from tasks import signals
from tasks.context import Context
from tasks.signals import Signal, line, words

MODEL = "extractive-1"

THEME_MAX = 60  # characters of one theme in a title
KEY_CHANGES = 12  # more than a screen of bullets is a log, not a handoff
NOTES_MAX = 20  # items of release notes; maintainers write 5 to 15
THREAD_MAX = 3  # of them about the same issue
DOCS_MAX = 3  # of them about documentation
NOTED = 2.5  # what a line in the changelog adds to a change's weight
TRIFLE_LESS = 1.0  # and what a trifle loses
LIST_MAX = 8  # entries of every other list
SUMMARY_IDS = 50  # ids behind a summary; its counts may stand on a thousand events
TEXT_BUDGET = 2_000_000  # characters of bodies read in one context, about a second on a slow core
BODY_MIN = 2_000  # characters of one body that are read even then
SIMILAR = 0.8  # share of common words from which two lines say the same
CANDIDATES = 40  # earlier lines that one line is compared with
WEAK_TIE = 0.5  # share of common words that ties events of different sources
WEAK_HOURS = 72  # and how far apart in time they may be
HUB = 25  # events that share a reference before it says nothing any more

# What a change is worth to someone coming back.
WEIGHTS = {
    "security": 5.0, "feature": 4.0, "fix": 3.0, "performance": 3.0, "removal": 3.0,
    "deprecation": 3.0, "change": 2.5, "refactor": 1.4, "docs": 1.0, "test": 0.7, "build": 0.6,
    "chore": 0.5, "ci": 0.3, "dependency": 0.2, "noise": 0.0,
}  # fmt: skip
ORDER = tuple(WEIGHTS)
HEADINGS = {
    "Breaking changes": "", "Security": "security", "Added": "feature", "Changed": "change",
    "Deprecated": "deprecation", "Removed": "removal", "Performance": "performance",
    "Fixed": "fix", "Documentation": "docs",
}  # fmt: skip
INTERNAL = frozenset(("refactor", "test", "build", "chore", "ci", "dependency", "noise"))
KIND_WORDS = {
    "feature": ("feature", "features"), "fix": ("fix", "fixes"),
    "security": ("security change", "security changes"), "removal": ("removal", "removals"),
    "performance": ("performance change", "performance changes"),
    "deprecation": ("deprecation", "deprecations"), "refactor": ("refactoring", "refactorings"),
}  # fmt: skip
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
SIDE_FILES = (
    ("", signals.CHANGELOG_FILE),  # every change touches it, so it is no area
    ("CI", signals.CI_FILE),
    ("tests", signals.TEST_FILE),
    ("packaging", signals.MANIFEST_FILE),
    ("docs", signals.DOC_FILE),
)
SIDE_AREAS = frozenset(name for name, _ in SIDE_FILES)
WRAPPERS = frozenset(("src", "lib", "packages", "apps"))  # folders that say nothing about a part
DIGIT = re.compile(r"\d")  # "part 1" is not "part 2"
WORDS = re.compile(r"[^\W_]+")
VERSION = re.compile(r"v?\d{1,5}(?:\.\d{1,5}){1,3}[\w.+-]{0,20}", re.I)
RELEASE_COMMIT = re.compile(
    r"^(?:prepare |bump |new )?(?:version|release)\b.{0,20}\d|^v?\d+(?:\.\d+)+\S{0,10}$"
    r"|\bfor v?\d\S{1,20} release$",
    re.I,
)
STRUCTURAL = re.compile(
    r"\b(?:mov(?:e|es|ed|ing)\b.{1,80}\b(?:to|into|out|from)|renam\w{1,3}|extract\w{0,3}"
    r"|split\w{0,4}|"
    r"introduc\w{1,3}|migrat\w{1,5}|restructur\w{1,3}|reorgani[sz]\w{1,3}|replac\w{1,3}"
    r"|switch\w{0,3} (?:to|from)|"
    r"new (?:module|package|service|table|column|hook|plugin|api|endpoint|driver|class)|schema|"
    r"endpoints?|protocol|interface|(?:add|remove|drop)\w{0,3}\b.{0,40}\b(?:dependency|module"
    r"|package|"
    r"service|table|column|hook|driver|backend|queue|endpoint|api|class))\b",
    re.I,
)
SCHEMA_FILE = re.compile(r"migrations?/|schema|\.sql$|openapi|\.proto$|\.graphql$", re.I)
FIRST_FILES = re.compile(
    r"(?:^|/)(?:readme|contributing|getting[-_ ]?started|quickstart|install\w*|development"
    r"|architecture)\b[^/]*$",
    re.I,
)
FIRST_ISSUE = re.compile(r"good first|starter|beginner|help wanted|easy|small", re.I)


TRIFLE = re.compile(
    r"\b(?:tweak\w{0,3}|cosmetic|nicer|minor|slightly|a (?:little|bit)|wording|alignment|align"
    r"|icons?|css|padding|margin|"
    r"colou?rs?|fonts?|tooltips?|line[- ]height|look of|comments?|variable names?)\b",
    re.I,
)


BREAK = re.compile(
    r"(?:[,;:]| [-\u2013\u2014(]| (?:because|when|so that|instead of|by|for|in|to|from|if|after"
    r"|without|at))\s"
)
# What a role works on, as the folders and words of its areas.
ROLES = {
    "frontend": "frontend web static template ui css js javascript component view style",
    "designer": "design static css template icon ui figma style component",
    "backend": "backend api app server db database model migration worker queue auth",
    "devops": "deploy docker terraform infra ci ops helm kubernetes",
    "sre": "deploy docker terraform infra ci ops helm kubernetes monitoring",
    "qa": "test tests spec e2e",
    "writer": "docs readme guide",
    "data": "data etl pipeline warehouse sql analytics",
    "mobile": "ios android mobile app",
    "security": "auth security permission session token",
}


class NothingToSay(Exception):
    """Raised when no event of the context holds anything worth repeating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that was done: a pull request with its commits, a commit, or a closed ticket."""

    text: str
    kind: str
    breaking: str
    reference: str  # as people write it: "(#12)", "(ENG-4)" or ""
    signals: tuple[Signal, ...]  # the one that speaks for it first
    areas: tuple[str, ...]
    people: tuple[str, ...]
    files: tuple[str, ...]
    undone: bool = False  # reverted, and the revert stands
    known: bool = True  # what was reverted is itself in the context

    @property
    def ids(self) -> list[str]:
        return _ids(self.signals)

    @property
    def line(self) -> str:
        """The change with its reference; the text gives way when both do not fit."""
        text = f"Reverted: {_lowered(self.text)}" if self.undone else _raised(self.text)
        return f"{line(text, signals.LINE_MAX - len(self.reference) - 1)} {self.reference}".strip()

    @property
    def statement(self) -> Statement:
        return _statement(self.line, self.signals)

    @property
    def score(self) -> float:
        """Importance: what it is, how much it touched, and how it arrived."""
        size = 0.35 * min(math.log2(1 + len(self.files)), 5)
        arrived = 0.5 * any(signal.pull for signal in self.signals) + 0.1 * min(
            len(self.signals), 8
        )
        urgent = 0.5 * max(signal.urgency for signal in self.signals)
        noted = NOTED * self.noted - TRIFLE_LESS * bool(TRIFLE.search(self.text))
        return WEIGHTS[self.kind] + 6 * bool(self.breaking) + size + arrived + urgent + noted

    @property
    def noted(self) -> bool:
        """Whether its author gave it a line in the changelog, which says it matters to users."""
        logs = [path for path in self.files if signals.CHANGELOG_FILE.search(path)]
        return bool(logs) and len(logs) < len(self.files) and self.kind != "noise"


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


def extract(context: Context) -> AnyDraft:
    """Compose the artifact that the context asks for; raise NothingToSay when it is empty."""
    if not context.events:
        raise NothingToSay("no events in scope")
    compose = COMPOSERS.get(context.kind)
    if compose is None:
        raise ValueError(f"unknown kind: {context.kind}")
    return compose(_reading(context))


# --- Handoff -------------------------------------------------------------------------------


def _handoff(reading: Reading) -> HandoffDraft:
    """What happened, what was decided, what is open: for a colleague who comes back."""
    top = [change for change in reading.changes if change.kind not in ("noise", "dependency")]
    top = _spread(top, KEY_CHANGES) or [c for c in reading.changes if c.kind != "noise"]
    top.sort(key=lambda change: (not change.breaking, ORDER.index(change.kind)))
    key_changes = [change.statement for change in top]
    if len(key_changes) < KEY_CHANGES:
        key_changes += _dependency_line(reading) if top else []
    if not key_changes:
        key_changes = _said(reading, "done", KEY_CHANGES) or _remarks(reading)
    taken = _Seen()
    decisions = _said(reading, "decision", LIST_MAX, taken)
    questions = _said(reading, "question", LIST_MAX, taken)
    steps = _next_steps(reading, taken)
    _require(key_changes, decisions, questions, steps)
    headlines = sorted((c for c in top if not c.undone), key=lambda change: -change.score)[:3]
    return HandoffDraft(
        title=_title(reading, headlines, key_changes or decisions or questions or steps),
        summary=_summary(reading, headlines),
        key_changes=key_changes[:KEY_CHANGES],
        decisions=decisions,
        open_questions=questions,
        next_steps=steps,
    )


def _title(reading: Reading, headlines: Sequence[Change], fallback: Sequence[Statement]) -> str:
    themes = [_short(change.text) for change in headlines[:2]]
    if not themes:
        themes = [line(statement.text, 80) for statement in fallback[:1]]
    name = line(reading.context.project_name, 80)
    joined = (
        f"{_raised(themes[0])}; {_lowered(themes[1])}"
        if len(themes) > 1
        else _raised("".join(themes))
    )
    return f"{name}: {joined}" if name else joined


def _short(text: str) -> str:
    """A theme for a title: up to a natural break when the text is long."""
    if len(text) <= THEME_MAX:
        return text.rstrip(".")
    breaks = [found.start() for found in BREAK.finditer(text[:THEME_MAX])]
    kept = text[: breaks[-1]] if breaks and breaks[-1] >= THEME_MAX // 3 else text
    return line(kept, THEME_MAX)


def _summary(reading: Reading, headlines: Sequence[Change]) -> Statement:
    """Numbers first, then the two or three things that matter, then what is still burning."""
    said = _numbers(reading, reading.changes)
    parts = [f"{said}."]
    if headlines:
        parts.append(f"Most important: {_themes(headlines)}.")
    burning = [
        signal for signal in reading.open if signal.role == "incident" or signal.urgency == 3
    ]
    if burning:
        names = "; ".join(line(signal.text, 90) for signal in burning[:2])
        parts.append(f"Still open and urgent: {names}.")
    behind = [
        *(signal for change in headlines for signal in change.signals),
        *burning,
        *reading.signals,
    ]
    return Statement(text=" ".join(parts), event_ids=_ids(behind)[:SUMMARY_IDS])


def _themes(changes: Sequence[Change]) -> str:
    return "; ".join(_raised(line(change.text, 90)).rstrip(".") for change in changes)


def _numbers(reading: Reading, changes: Sequence[Change]) -> str:
    """As in "12 changes by 4 people in app/auth and docs, 2 Dec to 20 Dec 2023"."""
    real = [change for change in changes if change.kind != "noise"]
    period = _period([signal.event.occurred_at for signal in reading.signals])
    if not real:
        sources = _listed(sorted({signal.event.source for signal in reading.signals}), 4)
        return f"{_count(len(reading.signals), 'event')} from {sources}, {period}"
    people = {name for change in real for name in change.people}
    areas = [name for name, _ in _areas_of(real).most_common()]
    areas = [name for name in areas if name not in SIDE_AREAS] or areas
    by = f" by {_count(len(people), 'person', 'people')}" if people else ""
    where = f" {'mostly ' if len(areas) > 3 else ''}in {_listed(areas[:3], 3)}" if areas else ""
    return f"{_count(len(real), 'change')}{by}{where}, {period}"


def _dependency_line(reading: Reading) -> list[Statement]:
    """All dependency updates as one line; nobody reads them one by one."""
    bumps = [change for change in reading.changes if change.kind == "dependency"]
    if len(bumps) < 2:
        return [change.statement for change in bumps]
    names: dict[str, None] = {}
    for change in bumps:
        found = signals.DEPENDENCY.match(change.text) or signals.GROUP_BUMP.match(change.text)
        if found and found[1]:
            names[found[1]] = None
    listed = ", ".join(sorted(names)[:6]) + (" \u2026" if len(names) > 6 else "")
    text = (
        f"Updated {len(names)} dependencies: {listed}"
        if len(names) > 1
        else f"Dependency updates ({len(bumps)})"
    )
    return [_statement(line(text), [s for change in bumps for s in change.signals])]


def _next_steps(reading: Reading, taken: "_Seen") -> list[Statement]:
    """What burns first, then what people said, then unfinished task lists, tickets and PRs."""

    def presses(signal: Signal) -> bool:
        return signal.urgency >= 2 or signal.role == "incident"

    urgent = [signal for signal in reading.open if presses(signal)]
    rest = [signal for signal in reading.open if not presses(signal)]
    statements = [
        _open_line(reading, signal) for signal in sorted(urgent, key=lambda s: -s.urgency)
    ]
    statements += _said(reading, "next", LIST_MAX, taken)
    statements += _open_tasks(reading)
    statements += [_open_line(reading, signal) for signal in rest]
    return _merged(statements, _Seen())[:LIST_MAX]


OPEN_WORDS = {"ticket": "Open", "pull": "Open pull request", "incident": "Unresolved"}


def _open_line(reading: Reading, signal: Signal) -> Statement:
    details = (
        [_shown(signal.own, reading.several)]
        if signal.own and signal.own not in signal.text
        else []
    )
    if signal.urgency:
        details.append(f"priority {line(str(signal.event.priority), 20)}")
    suffix = f" ({', '.join(detail for detail in details if detail)})" if any(details) else ""
    text = f"{OPEN_WORDS[signal.role]}: {line(signal.text, signals.LINE_MAX - 60)}{suffix}"
    return _statement(text, [signal])


def _open_tasks(reading: Reading) -> list[Statement]:
    """Task-list items that no newer event ticks off and whose owner is not closed."""
    done = {
        text.casefold() for signal in reading.signals for ticked, text in signal.tasks if ticked
    }
    found = []
    for signal in reading.signals:
        if signal.own in reading.closed or signal.state == "closed":
            continue
        for ticked, text in signal.tasks[:LIST_MAX]:
            if not ticked and text.casefold() not in done:
                found.append(_statement(_raised(text), [signal]))
    return found


# --- Release notes -------------------------------------------------------------------------


def _release_notes(reading: Reading) -> ReleaseNotesDraft:
    """What changed for users, grouped as people group it; a pull request text when asked."""
    wanted = reading.context.options.get("repo")
    if isinstance(wanted, str) and any(
        signal.event.resource == wanted for signal in reading.signals
    ):
        events = tuple(event for event in reading.context.events if event.resource == wanted)
        reading = _reading(replace(reading.context, events=events))
    version, reading = _released(reading)
    describing = reading.context.options.get("style") == "pr_description"
    sections = _description(reading) if describing else _note_sections(reading)
    _require(sections)
    name = line(wanted, 80) if isinstance(wanted, str) else line(reading.context.project_name, 80)
    visible = [change for change in reading.changes if change.kind not in INTERNAL] or list(
        reading.changes
    )
    if describing:
        title = _raised(line(visible[0].text, 90)) if visible else name
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
    return name, _reading(replace(reading.context, events=tuple(s.event for s in inside)))


def _version(signal: Signal) -> str | None:
    if signal.role != "release":
        return None
    for value in (
        signal.event.metadata.get("tag"),
        signal.event.metadata.get("version"),
        signal.text,
    ):
        if isinstance(value, str) and (found := VERSION.search(value[:200])):
            return found[0]
    tag = signal.event.metadata.get("tag")
    return line(tag, 60) or None if isinstance(tag, str) else None


def _committed_version(reading: Reading) -> str | None:
    """A version from a "Release 1.2" commit, when no real change came after it."""
    for signal in reading.signals:
        if RELEASE_COMMIT.match(signal.text) and (found := VERSION.search(signal.text)):
            return found[0]
        if signal.role == "change" and signal.kind not in INTERNAL:
            return None
    return None


def _note_sections(reading: Reading) -> list[NotesSection]:
    changes = [change for change in reading.changes if not (change.undone and change.known)]
    changes = [c for c in changes if any(s.role == "change" for s in c.signals)] or changes
    changes = _notable(changes)
    sections = []
    for heading, kind in HEADINGS.items():
        if kind:
            chosen = [change for change in changes if change.kind == kind and not change.breaking]
        else:
            chosen = [change for change in changes if change.breaking]
        items = [change.statement for change in chosen]
        if items:
            sections.append(NotesSection(heading=heading, items=items))
    if not sections:
        inner = [change for change in changes if change.kind not in ("noise", "dependency")]
        items = [change.statement for change in inner]
        items = items or _dependency_line(reading)
        sections = [NotesSection(heading="Internal", items=items)] if items else []
    return sections


def _notable(changes: Sequence[Change]) -> list[Change]:
    """The changes that users read about, best first: not all fifty commits of a busy month."""
    told = [change for change in changes if change.breaking or change.kind not in INTERNAL]
    if not told:
        return list(changes)
    return _spread(told, NOTES_MAX)


def _spread(changes: Sequence[Change], most: int) -> list[Change]:
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


def _description(reading: Reading) -> list[NotesSection]:
    """The sections of a pull request text."""
    changes = [
        change
        for change in reading.changes
        if change.kind not in ("noise", "dependency") and not (change.undone and change.known)
    ]
    told = [change for change in changes if change.kind != "test"] or changes
    what = [c.statement for c in told][: KEY_CHANGES - 1]
    what += _dependency_line(reading)
    why = [
        _statement(signal.why, [signal])
        for change in changes
        for signal in change.signals
        if signal.why and not signal.bot
    ]
    tests: dict[str, list[Signal]] = defaultdict(list)
    for signal in reading.signals:
        for path in signal.files:
            if signals.TEST_FILE.search(path):
                tests[path].append(signal)
    testing = [_statement(line(f"`{path}`"), by) for path, by in sorted(tests.items())]
    named = {
        "What changed": what,
        "Why": why,
        "Notes for reviewers": _review_notes(reading, changes),
        "Testing": testing,
    }
    return [
        NotesSection(heading=heading, items=kept[:KEY_CHANGES])
        for heading, items in named.items()
        if (kept := _merged(items, _Seen()))
    ]


def _review_notes(reading: Reading, changes: Sequence[Change]) -> list[Statement]:
    """What a reviewer has to know: what breaks, what touches the schema, what is unsure."""
    found = [
        _statement(f"Breaking: {_raised(c.breaking)}", c.signals) for c in changes if c.breaking
    ]
    for change in changes:
        paths = [path for path in change.files if SCHEMA_FILE.search(path)]
        paths = [path for path in paths if not signals.TEST_FILE.search(path)]
        if paths:
            found.append(_statement(f"Touches the schema: {_listed(paths, 3)}", change.signals))
    for label in ("risk", "next", "question"):
        found += _said(reading, label, LIST_MAX)
    return found


def _notes_summary(
    reading: Reading, visible: Sequence[Change], sections: Sequence[NotesSection]
) -> Statement:
    counts = [f"{len(s.items)} {s.heading.casefold().removesuffix(' changes')}" for s in sections]
    if reading.context.options.get("style") == "pr_description":
        text = f"{_numbers(reading, reading.changes)}."
    else:
        shown = sum(len(section.items) for section in sections)
        what = (
            _count(shown, "change")
            if shown >= len(visible)
            else f"The {shown} most notable of {len(visible)} changes"
        )
        text = f"{what}: {_listed(counts, 9)}."
    best = sorted(visible, key=lambda change: -change.score)[:2]
    if best:
        text += f" Highlights: {_themes(best)}."
    behind = [
        signal for change in (*best, *visible) for signal in change.signals
    ] or reading.signals
    return Statement(text=text, event_ids=_ids(behind)[:SUMMARY_IDS])


def _contributors(reading: Reading) -> list[str]:
    """Everyone who made a change, most changes first; bots are not people."""
    counts = Counter(name for change in reading.changes for name in change.people)
    return sorted(counts, key=lambda name: (-counts[name], name))


# --- Onboarding brief ----------------------------------------------------------------------


def _onboarding(reading: Reading) -> OnboardingDraft:
    """Where things happen, who to ask, what to read first."""
    options = reading.context.options
    wanted, role = (str(options.get(key) or "")[:300] for key in ("focusArea", "newMemberRole"))
    hints = " ".join(ROLES.get(word, word) for word in WORDS.findall(role.casefold()))
    focus, fit = _focus(reading, wanted), _focus(reading, hints)
    relevance = _focus(reading, f"{wanted} {hints}")
    # An area that is asked for by name comes first; one that fits the role counts several times.
    ranked = _ranked_areas(
        reading, lambda name, text: 99 * focus(name) + 3 * focus(text) + 30 * fit(name) + fit(text)
    )
    areas = [_area(reading, name, changes) for name, changes in ranked[:LIST_MAX]]
    taken = _Seen()
    decisions = _said(reading, "decision", LIST_MAX, taken, relevance=relevance)
    questions = _said(reading, "question", LIST_MAX, taken, relevance=relevance)
    steps = _first_steps(reading, ranked)
    people = _key_people(reading, ranked)
    _require(areas, decisions, questions, steps)
    name = line(reading.context.project_name, 80)
    member = line(str(options.get("newMemberRole") or ""), 60)
    title = f"{name}: brief for a new {member}" if member else f"{name}: brief for a new member"
    if options.get("focusArea"):
        title += f", with a focus on {line(str(options['focusArea']), 60)}"
    text = f"{_numbers(reading, reading.changes)}."
    near = [name for name, _ in ranked[:3] if focus(name)]
    if near:
        text += f" For {line(wanted, 60)}, start with {_listed(near, 3)}."
    if people:
        text += f" Ask {_listed([person.name for person in people[:3]], 3)}."
    behind = [
        signal for _, changes in ranked[:3] for change in changes for signal in change.signals
    ]
    summary = Statement(text=text, event_ids=_ids([*behind, *reading.signals])[:SUMMARY_IDS])
    return OnboardingDraft(
        title=title, summary=summary, areas=areas, key_people=people, decisions=decisions,
        open_questions=questions, first_steps=steps,
    )  # fmt: skip


def _ranked_areas(
    reading: Reading, boost: Callable[[str, str], float]
) -> list[tuple[str, list[Change]]]:
    """Areas with their changes, most active first; what was asked for comes before."""
    changes: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        if change.kind not in ("noise", "dependency"):
            for name in change.areas:
                changes[name].append(change)

    def rank(name: str) -> tuple[float, str]:
        text = " ".join(change.text for change in changes[name][:40])
        side = 0.2 if name in SIDE_AREAS else 1.0
        # A change counts in full where most of it happened and by half elsewhere.
        total = sum(c.score * (1.0 if c.areas[0] == name else 0.5) for c in changes[name])
        return (-(side * total * (1 + boost(name, text))), name)

    return [(name, changes[name]) for name in sorted(changes, key=rank)]


def _area(reading: Reading, name: str, changes: Sequence[Change], more: str = "") -> Area:
    people = Counter(person for change in changes for person in change.people)
    kinds = Counter(change.kind for change in changes)
    counted = [
        _count(kinds[kind], *KIND_WORDS[kind])
        for kind in ORDER
        if kinds[kind] and kind in KIND_WORDS
    ]
    text = _count(len(changes), "change")
    text += f" ({_listed(counted, 3)})" if counted and len(changes) > 1 else ""
    text += f" by {_listed([person for person, _ in people.most_common()], 3)}" if people else ""
    best = max(changes, key=lambda change: (change.areas[0] == name, change.score))
    text += (
        f"{more}. Largest: {line(best.text, 110)}"
        if len(changes) > 1
        else f": {line(best.text, 110)}"
    )
    return Area(
        name=name, text=line(text, 300), event_ids=_ids(s for c in changes for s in c.signals)
    )


def _key_people(reading: Reading, ranked: Sequence[tuple[str, list[Change]]]) -> list[Person]:
    """Who did most of the work where."""
    work: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        if change.kind not in ("noise", "dependency"):
            for name in change.people:
                work[name].append(change)
    order = {name: at for at, (name, _) in enumerate(ranked)}
    totals = {name: len(changes) for name, changes in ranked}
    found = []
    for name in sorted(work, key=lambda name: (-len(work[name]), name))[:LIST_MAX]:
        counts = Counter(area for change in work[name] for area in change.areas)
        areas = sorted(
            counts, key=lambda area: (area in SIDE_AREAS, -counts[area], order.get(area, 0))
        )[:3]
        shares = [f"{counts[area]} of {totals[area]} in {area}" for area in areas]
        text = _count(len(work[name]), "change") + (f": {_listed(shares, 3)}" if shares else "")
        best = max(work[name], key=lambda change: change.score)
        text += f". Most notable: {line(best.text, 110)}"
        ids = _ids(s for c in work[name] for s in c.signals)
        found.append(Person(name=name, areas=areas, text=line(text, 300), event_ids=ids))
    return found


def _first_steps(reading: Reading, ranked: Sequence[tuple[str, list[Change]]]) -> list[Statement]:
    """Good first reading and a good first issue, all of it from the events."""
    touched: dict[str, list[Signal]] = defaultdict(list)
    for signal in reading.signals:
        for path in signal.files:
            touched[path].append(signal)
    steps = []
    guides = [
        path
        for path in sorted(touched)
        if FIRST_FILES.search(path) and not signals.CI_FILE.search(path)
    ]
    for path in sorted(guides, key=lambda path: (path.count("/"), -len(touched[path]), path))[:2]:
        steps.append(_statement(f"Read `{path}`, {_touched(touched[path])}", touched[path]))
    code = [path for path in touched if not _side(path)]
    focus = {path for _, changes in ranked[:3] for change in changes for path in change.files}
    for path in sorted(code, key=lambda path: (path not in focus, -len(touched[path]), path))[:3]:
        if len(touched[path]) > 1:
            steps.append(_statement(f"Read `{path}`, {_touched(touched[path])}", touched[path]))
    for _, changes in ranked[:2]:
        best = max(changes, key=lambda change: (len(change.files), change.score))
        if len(best.files) > 1:
            where = f" ({_count(len(best.files), 'file')})"
            steps.append(
                Statement(
                    text=f"Study a large change: {line(best.line, 190)}{where}", event_ids=best.ids
                )
            )
    small = [s for s in reading.open if s.role == "ticket" and s.urgency < 2]
    small.sort(key=lambda signal: not any(FIRST_ISSUE.search(label) for label in signal.labels))
    steps += [
        _statement(f"Pick up: {_open_line(reading, s).text.partition(': ')[2]}", [s])
        for s in small[:2]
    ]
    return _merged([s.model_copy(update={"text": line(s.text)}) for s in steps], _Seen())[:LIST_MAX]


def _touched(by: Sequence[Signal]) -> str:
    return (
        f"touched by {_count(len(by), 'change')}, last: {line(by[0].text, 90)}"
        if by[0].text
        else "touched"
    )


# --- Architecture insight ------------------------------------------------------------------


def _architecture(reading: Reading) -> ArchitectureDraft:
    """The parts, what moves in them, what moves together, and what is fragile."""
    question = str(reading.context.options.get("focusQuestion") or "")[:2_000]
    relevance = _focus(reading, question)
    ranked = _ranked_areas(reading, lambda name, text: 20 * relevance(name) + 6 * relevance(text))
    ranked = [entry for entry in ranked if entry[0] not in SIDE_AREAS] or ranked
    together = _together(reading)
    components = [
        _area(reading, name, changes, together.get(name, "")) for name, changes in ranked[:LIST_MAX]
    ]
    structural = [change for change in reading.changes if _structural(change) and not change.undone]
    structural.sort(key=lambda change: -(change.score + 8 * relevance(change.text)))
    changes = [change.statement for change in structural[:KEY_CHANGES]]
    taken = _Seen()
    decisions = _said(reading, "decision", LIST_MAX, taken, relevance=relevance)
    questions = _said(reading, "question", LIST_MAX, taken, relevance=relevance)
    risks = _risks(reading, taken, relevance)
    _require(components, changes, decisions, risks, questions)
    name = line(reading.context.project_name, 80)
    names = [area.name for area in components if area.name not in SIDE_AREAS] or [
        a.name for a in components
    ]
    title = f"{name}: movement in {_listed(names, 3)}" if names else f"{name}: architecture"
    return ArchitectureDraft(
        title=title, summary=_architecture_summary(reading, question, ranked, structural, risks),
        components=components, changes=changes, decisions=decisions, risks=risks,
        open_questions=questions,
    )  # fmt: skip


def _architecture_summary(
    reading: Reading,
    question: str,
    ranked: Sequence[tuple[str, list[Change]]],
    structural: Sequence[Change],
    risks: Sequence[Statement],
) -> Statement:
    """Numbers, or what the events say to the question when there is one."""
    parts = [f"{_numbers(reading, reading.changes)}."]
    behind: list[Signal] = []
    if question:
        relevance = _focus(reading, question)
        near = sorted(reading.changes, key=lambda change: -relevance(change.text))[:3]
        near = [change for change in near if relevance(change.text) > 0]
        asked = line(question, 120)
        if near:
            parts.insert(0, f"On \u201c{asked}\u201d: {_themes(near)}.")
            behind += [signal for change in near for signal in change.signals]
        else:
            parts.insert(0, f"No change in this period speaks to \u201c{asked}\u201d.")
    elif structural:
        parts.append(f"Structural: {_themes(structural[:2])}.")
        behind += [signal for change in structural[:2] for signal in change.signals]
    ids = _ids(behind) + (risks[0].event_ids if risks else []) + _ids(reading.signals)
    return Statement(text=" ".join(parts), event_ids=list(dict.fromkeys(ids))[:SUMMARY_IDS])


def _structural(change: Change) -> bool:
    if change.kind in ("noise", "dependency", "docs", "test", "ci"):
        return False
    plain = [path for path in change.files if not signals.TEST_FILE.search(path)]
    large = change.kind == "feature" and len(plain) >= 5
    schema = any(SCHEMA_FILE.search(path) for path in plain)
    return bool(change.breaking or large or schema or STRUCTURAL.search(change.text))


def _together(reading: Reading) -> dict[str, str]:
    """For an area, the area it changes together with, when that happened often enough."""
    alone: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for change in reading.changes:
        areas = [name for name in change.areas if name not in SIDE_AREAS]
        if change.kind == "noise" or len(areas) > 8:  # a sweep over everything ties nothing
            continue
        alone.update(areas)
        pairs.update((one, other) for one in areas for other in areas if one != other)
    found: dict[str, str] = {}
    for (one, other), times in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0])):
        if times >= 2 and times * 3 >= alone[one] and one not in found:
            found[one] = f", {times} of them together with {other}"
    return found


def _risks(reading: Reading, taken: "_Seen", relevance: Callable[[str], float]) -> list[Statement]:
    """Incidents, breaks, reverts, files that keep being fixed, and what people call a risk."""
    found = [_open_line(reading, signal) for signal in reading.open if signal.role == "incident"]
    found += [
        _statement(line(f"Breaking: {change.breaking}"), change.signals)
        for change in reading.changes
        if change.breaking and not change.undone
    ]
    found += [change.statement for change in reading.changes if change.undone]
    found += [
        _statement(f"Security: {change.line}", change.signals)
        for change in reading.changes
        if change.kind == "security" and not change.undone
    ]
    fixed: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        if change.kind in ("fix", "security"):
            for path in change.files:
                if not _side(path):
                    fixed[path].append(change)
    for path in sorted(fixed, key=lambda path: (-len(fixed[path]), path))[:3]:
        if len(fixed[path]) >= 3:
            ids = _ids(signal for change in fixed[path] for signal in change.signals)
            found.append(
                Statement(text=f"`{path}` was fixed {len(fixed[path])} times", event_ids=ids)
            )
    found += _said(reading, "risk", LIST_MAX, taken, relevance=relevance)
    return _merged(found, _Seen())[:LIST_MAX]


# --- Cross-source correlation --------------------------------------------------------------


def _correlation(reading: Reading) -> CorrelationDraft:
    """Activity of different sources that shares a reference, told in the order of time."""
    sources = sorted({signal.event.source for signal in reading.signals})
    groups = _tied(reading, across=len(sources) > 1)
    if len(sources) > 1:
        groups += _alike(reading, groups)
    correlations = [_told(reading, keys, members) for keys, members in groups[:20]]
    if not correlations:
        raise NothingToSay("no events share a reference")
    name = line(reading.context.project_name, 80)
    texts = [f"{correlation.title}" for correlation in correlations[:2]]
    period = _period([signal.event.occurred_at for signal in reading.signals])
    text = (
        f"{_count(len(correlations), 'thread')} of work across {_listed(sources, 5)}, {period}: "
        f"{'; '.join(line(title, 90) for title in texts)}."
    )
    ids = list(dict.fromkeys(event_id for c in correlations for event_id in c.event_ids))
    return CorrelationDraft(
        title=f"{name}: {_listed([line(title, 60) for title in texts], 2)}",
        summary=Statement(text=text, event_ids=ids[:SUMMARY_IDS]),
        correlations=correlations,
    )


Group = tuple[list[str], list[Signal]]  # what ties the events, and the events in order of time


def _tied(reading: Reading, *, across: bool) -> list[Group]:
    """Groups by shared references; references with nearly the same events are one group."""
    mentions: dict[str, list[Signal]] = defaultdict(list)
    known = {s.own for s in reading.signals if s.own.startswith("@")}
    resolved = _resolver(reading)
    for signal in reading.signals:
        for key in () if signal.bot else resolved(signal):
            if not key.startswith("@") or key in known:
                mentions[key].append(signal)
    groups: list[tuple[list[str], dict[str, Signal]]] = []
    places: dict[str, list[int]] = defaultdict(list)  # event id -> groups that hold it
    for key in sorted(
        mentions,
        key=lambda key: (-len({s.event.source for s in mentions[key]}), _own_rank(key), key),
    ):
        members = {signal.event.id: signal for signal in mentions[key]}
        wide = len({signal.event.source for signal in members.values()}) > 1
        if len(members) < 2 or len(members) > HUB or (across and not wide):
            continue
        near = Counter(at for event_id in members for at in places[event_id][:CANDIDATES])
        for at, common in sorted(near.items(), key=lambda pair: (-pair[1], pair[0]))[:1]:
            keys, others = groups[at]
            if common * 2 > min(len(members), len(others)) and len(others) <= HUB:
                keys.append(key)
                for event_id in members.keys() - others.keys():
                    places[event_id].append(at)
                others.update(members)
                break
        else:
            for event_id in members:
                places[event_id].append(len(groups))
            groups.append(([key], members))
    return [(keys, sorted(members.values(), key=_when)) for keys, members in groups]


def _resolver(reading: Reading) -> Callable[[Signal], list[str]]:
    """How to read an event's references among those of all the others.

    A key in a branch name counts when somebody wrote it out, and a bare number in a chat when
    there is no doubt about its repository.
    """
    written = frozenset(key for s in reading.signals for key in s.references if "-" in key)
    sources = (s.event for s in reading.signals if s.event.source in signals.GIT_SOURCES)
    repositories = sorted({event.resource.casefold() for event in sources if event.resource})
    names = {
        repository: re.compile(rf"(?<![\w-]){re.escape(repository.rpartition('/')[2])}(?![\w-])")
        for repository in repositories[:CANDIDATES]
    }

    def resolved(signal: Signal) -> list[str]:
        keys = dict.fromkeys(signal.references)
        for branch in (signal.event.branch, signal.head):
            keys.update((k, None) for k in signals.branch_tickets(branch) if k in written)
        if signal.unresolved:
            spoken = f"{signal.event.title[:1_000]} {(signal.event.content or '')[:4_000]}"
            named = [name for name, found in names.items() if found.search(spoken.casefold())]
            candidates = repositories if len(repositories) == 1 else named
            if len(candidates) == 1:
                keys.update((f"{candidates[0]}{number}", None) for number in signal.unresolved)
        return list(keys)

    return resolved


def _own_rank(key: str) -> int:
    """Tickets name a thread best, then pull requests, then commits, then addresses."""
    if signals.TICKET.fullmatch(key):
        return 0
    return 1 if "#" in key else 2 if key.startswith("@") else 3


def _alike(reading: Reading, groups: Sequence[Group]) -> list[Group]:
    """Weaker evidence: titles that share most of their words, close in time."""
    tied = {signal.event.id for _, members in groups for signal in members}
    index: dict[str, list[int]] = defaultdict(list)
    free = [
        s for s in reading.signals if s.event.id not in tied and s.kind != "noise" and not s.bot
    ]
    bags = [words(signal.text) for signal in free]
    found: list[Group] = []
    used: set[int] = set()
    for at, bag in enumerate(bags):
        near = Counter(other for word in bag for other in index[word][-CANDIDATES:])
        for word in bag:
            index[word].append(at)
        for other, common in sorted(near.items(), key=lambda pair: (-pair[1], pair[0]))[
            :CANDIDATES
        ]:
            if (
                common < 3
                or at in used
                or other in used
                or free[at].event.source == free[other].event.source
            ):
                continue
            apart = abs(free[at].event.occurred_at - free[other].event.occurred_at)
            if common / len(bag | bags[other]) >= WEAK_TIE and apart <= timedelta(hours=WEAK_HOURS):
                used.update((at, other))
                found.append(([], sorted((free[at], free[other]), key=_when)))
    return found


def _told(reading: Reading, keys: Sequence[str], members: Sequence[Signal]) -> Correlation:
    """One thread of work as a sentence: who saw it first, where it was discussed, what fixed it."""
    shown = [_shown(key, several=True) for key in keys]
    steps: dict[tuple[str, str], list[Signal]] = {}
    for signal in members:
        steps.setdefault(_step(reading, signal, keys), []).append(signal)
    parts = [
        what + (f" ({len(by)} times)" if len(by) > 1 else "") for (what, _), by in steps.items()
    ]
    best = min(
        members, key=lambda s: (s.role not in ("ticket", "incident"), s.role == "chat", not s.text)
    )
    title = line(best.text or shown[0] if shown else best.text, 110)
    if shown and shown[0] not in title:
        title = line(f"{shown[0]}: {_lowered(title)}" if title else shown[0])
    if shown:
        text = f"{shown[0]} was {_listed(parts[:6], 6)}"
        text += f". Tied by {_listed(shown, 4)}"
    else:
        hours = max(
            1,
            round(
                (members[-1].event.occurred_at - members[0].event.occurred_at).total_seconds()
                / 3600
            ),
        )
        text = (
            f"Similar titles within {_count(hours, 'hour')}, weaker evidence: {_listed(parts, 4)}"
        )
    return Correlation(
        title=title, text=line(text, 500), references=shown[:12],
        sources=list(dict.fromkeys(signal.event.source for signal in members)),
        event_ids=_ids(members),
    )  # fmt: skip


STEP_WORDS = {
    ("ticket", "open"): "opened in", ("ticket", "closed"): "closed in",
    ("ticket", ""): "updated in",
    ("incident", "open"): "reported by", ("incident", "closed"): "resolved in",
    ("pull", "open"): "taken up in", ("pull", "closed"): "closed in", ("pull", ""): "taken up in",
}  # fmt: skip


def _step(reading: Reading, signal: Signal, keys: Sequence[str]) -> tuple[str, str]:
    """One step of a thread, "discussed in slack (#backend)", and what makes it the same step."""
    source, where = signal.event.source, line(signal.event.resource or "", 80)
    date = _day(signal.event.occurred_at)
    if signal.role == "change":
        name = _shown(signal.pull or signal.own, several=True) or f"{source} {where}".strip()
        if keys and keys[0] in (signal.pull, signal.own):
            return f"merged on {date}", name
        fixes = any(key in signal.closes for key in keys)
        verb = "reverted" if signal.reverts else "fixed" if fixes else "changed"
        return f"{verb} by {name} on {date}", name
    if signal.role in ("ticket", "incident") and keys and signal.own not in keys:
        return (
            f"named in {source}{f' {line(signal.own)}' if signal.own else ''} on {date}",
            f"named{source}{signal.own}",
        )
    if signal.role in ("chat", "release", "other"):
        verb = {"chat": "discussed in", "release": "released in"}.get(signal.role, "mentioned in")
        return (
            f"{verb} {source}{f' ({where})' if where else ''} on {date}",
            f"{verb}{source}{where}",
        )
    verb = STEP_WORDS.get((signal.role, signal.state), "updated in")
    own = (
        _shown(signal.own, several=True)
        if signal.role == "pull" and signal.own not in keys[:1]
        else ""
    )
    return f"{verb} {own or source} on {date}", f"{verb}{own or source}"


def _when(signal: Signal) -> tuple[datetime, str]:
    return signal.event.occurred_at, signal.event.id


# --- Reading: signals -> changes -----------------------------------------------------------


def _reading(context: Context) -> Reading:
    """Read every event once and group what belongs to one change."""
    limit = max(BODY_MIN, TEXT_BUDGET // max(1, len(context.events)))
    read = tuple(signals.read(event, limit=limit) for event in context.events)
    several = len({s.event.resource for s in read if s.event.source in signals.GIT_SOURCES}) > 1
    people = _people(read)
    names = _area_names(read, several)
    closed = _closed(read)
    made = [_change(group, names, people, several) for group in _grouped(read)]
    made = _without_duplicates(_reverted([change for change in made if change.text]))
    made.sort(key=lambda change: -change.score)
    return Reading(
        context=context, signals=read, changes=tuple(made), open=_open(read, closed),
        closed=closed, people=people, several=several,
    )  # fmt: skip


def _grouped(read: Sequence[Signal]) -> list[list[Signal]]:
    """Signals of one change: a pull request, its merge and its commits; a ticket and its end."""
    merged = {s.pull: at for at, s in enumerate(read) if s.role == "change" and s.pull}
    heads = {(s.event.resource, s.head): at for at, s in enumerate(read) if _has_branch(s)}
    brought = _brought_in(read)
    groups: dict[Hashable, list[Signal]] = defaultdict(list)
    for at, signal in enumerate(read):
        if signal.role not in ("change", "pull") and not (
            signal.role in ("ticket", "incident") and signal.state == "closed"
        ):
            continue
        key: Hashable = signal.pull or (signal.role == "ticket" and signal.own) or at
        if not signal.pull and signal.role == "change":
            # A commit is part of a later merge that it names, or whose branch it was made on.
            part = [ref for ref in signal.references if merged.get(ref, at) < at]
            merge = heads.get((signal.event.resource, signal.event.branch or ""))
            merge = brought.get(at, merge)
            if part and at not in brought:
                key = part[0]
            elif merge is not None and merge < at:
                key = read[merge].pull or merge
                groups[key]  # the merge itself may come without a request
        groups[key].append(signal)
    closers = {
        ref for group in groups.values() for s in group if s.role == "change" for ref in s.closes
    }
    return [
        group
        for group in groups.values()
        if any(s.role == "change" for s in group)
        or (group[0].role in ("ticket", "incident") and group[0].own not in closers)
    ]


def _has_branch(signal: Signal) -> bool:
    """Whether commits on the merged branch are this merge's; a fork's `main` is everybody's."""
    trunk = {"main", "master", "trunk", "develop", signal.event.branch}
    return bool(signal.text) and bool(signal.head) and signal.head not in trunk


def _brought_in(read: Sequence[Signal]) -> dict[int, int]:
    """For a commit that a titled merge brought in, that merge; known only when parents are."""
    places = {signal.own: at for at, signal in enumerate(read) if signal.own.startswith("@")}

    def parents(at: int) -> list[int]:
        shas = signals.strings(read[at].event.metadata.get("parents"))
        return [places[f"@{sha[:7]}"] for sha in shas[:8] if f"@{sha[:7]}" in places]

    trunk: set[int] = set()
    merges: list[int] = []
    for tip in {
        signal.event.resource: at
        for at, signal in reversed([*enumerate(read)])
        if signal.own in places
    }.values():
        at: int | None = tip
        while at is not None and at not in trunk:
            trunk.add(at)
            above = parents(at)
            if len(signals.strings(read[at].event.metadata.get("parents"))) > 1:
                merges.append(at)
            at = above[0] if above else None
    found: dict[int, int] = {}
    for merge in sorted(merges, reverse=True):  # the oldest merge brought the oldest commits
        below = [at for at in parents(merge) if at not in trunk]
        while below:
            at = below.pop()
            if at not in trunk and at not in found:
                found[at] = merge
                below += parents(at)
    return {at: merge for at, merge in found.items() if read[merge].kind != "noise"}


def _change(
    group: list[Signal], names: dict[str, str], people: dict[str, str], several: bool
) -> Change:
    """One change from its signals; the merge speaks for its commits."""

    def speaks(signal: Signal) -> tuple[bool, bool, bool, bool]:
        return (
            not signal.text,
            signal.kind == "noise",
            not signal.head and signal.role == "change",
            not signal.pull,
        )

    group = sorted(group, key=speaks)
    files = tuple(dict.fromkeys(path for signal in group for path in signal.files))
    counts = Counter(names[path] for path in files if names.get(path))
    areas = sorted(counts, key=lambda name: (name in SIDE_AREAS, -counts[name], name))
    if not areas:
        areas = [s.scope for s in group if s.scope][:1] or list(group[0].labels[:2])
    authors = [s.author for s in group if s.role == "change" and not s.bot]
    authors += [name for signal in group for name in signal.coauthors]
    authors = authors or [s.author for s in group if not s.bot]
    return Change(
        text=_ended(group[0]), kind=_kind(group), signals=tuple(group),
        breaking=next((s.breaking for s in group if s.breaking), ""),
        reference=_reference(group, several), areas=tuple(areas), files=files,
        people=tuple(dict.fromkeys(people.get(name, name) for name in authors if name)),
    )  # fmt: skip


def _kind(group: Sequence[Signal]) -> str:
    """The kind of a change; its commits make a plain one more precise."""
    first = group[0]
    if first.role == "incident":
        return "fix"
    if first.role == "ticket":
        return "fix" if any("bug" in label.casefold() for label in first.labels) else "change"
    noted = any(signals.CHANGELOG_FILE.search(path) for path in first.files)
    if first.kind in ("dependency", "build") and noted and not first.bot:
        return "change"  # people note the update of a framework, not of a linter
    if first.kind in ("change", "noise"):
        return min((s.kind for s in group if s.role == "change"), key=ORDER.index, default="change")
    return first.kind


def _reference(group: Sequence[Signal], several: bool) -> str:
    """How people refer to the change: its pull request, its ticket, or the issues it names."""
    first = group[0]
    found = [s.pull for s in group if s.pull] or [first.own] * (first.role == "ticket")
    found = found[:1] or [reference for signal in group[:4] for reference in _fixed(signal)]
    shown = [text for text in dict.fromkeys(_shown(reference, several) for reference in found)]
    shown = [text for text in shown if text and text not in first.text][:2]
    return f"({', '.join(shown)})" if shown else ""


def _ended(signal: Signal) -> str:
    """The text of a change; what was closed without a commit says so."""
    word = {"ticket": "Closed", "incident": "Resolved"}.get(signal.role, "")
    return f"{word}: {signal.text}" if word and signal.text else signal.text


def _fixed(signal: Signal) -> list[str]:
    """The issues a commit names, for a change that has no pull request."""
    named = [
        ref
        for ref in signal.references
        if not ref.startswith("@") and ("#" in ref or signals.TICKET.fullmatch(ref))
    ]
    return list(signal.closes) or named[:2]


def _reverted(changes: list[Change]) -> list[Change]:
    """Let a change and its revert cancel; a revert of the revert brings the change back."""
    by_sha = {s.own: change for change in changes for s in change.signals if s.own.startswith("@")}
    families: dict[Hashable, list[Change]] = defaultdict(list)
    for change in changes:
        first = change.signals[0]
        base = first.base
        if first.reverts and first.reverted_sha and (named := by_sha.get(f"@{first.reverted_sha}")):
            base = named.signals[0].base
        families[(first.event.resource, base.casefold())].append(change)
    kept: list[Change] = []
    for family in families.values():
        depths = [change.signals[0].reverts for change in family]
        if not any(depths):
            kept += family
            continue
        newest = max(
            range(len(family)), key=lambda at: max(s.event.occurred_at for s in family[at].signals)
        )
        known = 0 in depths
        origin = family[depths.index(0)] if known else family[newest]
        text = origin.text if known else line(origin.signals[0].base)
        together = {s.event.id: s for change in (origin, *family) for s in change.signals}
        undone = depths[newest] % 2 == 1
        kept.append(
            replace(origin, text=text, signals=tuple(together.values()), undone=undone, known=known)
        )
    return kept


def _without_duplicates(changes: list[Change]) -> list[Change]:
    """Changes that say the same become one, with the ids of both."""
    kept: list[Change] = []
    seen = _Seen()
    for change in changes:
        at = seen.find(change.text) if change.kind != "dependency" else None
        if at is None or kept[at].undone != change.undone or _conflict(kept[at], change):
            seen.add(change.text if change.kind != "dependency" else "")
            kept.append(change)
            continue
        first, second = kept[at], change
        kept[at] = replace(
            first,
            signals=(*first.signals, *second.signals),
            people=tuple(dict.fromkeys((*first.people, *second.people))),
            files=tuple(dict.fromkeys((*first.files, *second.files))),
            areas=tuple(dict.fromkeys((*first.areas, *second.areas))),
            kind=min(first.kind, second.kind, key=ORDER.index)
            if "change" in (first.kind, second.kind)
            else first.kind,
            breaking=first.breaking or second.breaking,
            reference=first.reference or second.reference,
        )
    return kept


def _conflict(one: Change, other: Change) -> bool:
    """The same words in two repositories are two changes."""
    return one.signals[0].event.resource != other.signals[0].event.resource


def _closed(read: Sequence[Signal]) -> frozenset[str]:
    """References that a change closes, or whose newest state is closed."""
    closed = {ref for signal in read if signal.role == "change" for ref in signal.closes}
    known: dict[str, str] = {}
    for signal in read:  # newest first: the first state that is known counts
        if signal.own and signal.state and signal.role in ("ticket", "pull", "incident", "change"):
            known.setdefault(signal.own, signal.state)
    closed |= {own for own, state in known.items() if state == "closed"}
    reopened = {own for own, state in known.items() if state == "open"}
    opened_later = {
        s.own for s in read if s.own in reopened and "reopened" in s.event.event_type.casefold()
    }
    return frozenset(closed - opened_later)


def _open(read: Sequence[Signal], closed: frozenset[str]) -> tuple[Signal, ...]:
    """The newest event of each ticket, pull request and incident that is still open."""
    found: dict[Hashable, Signal] = {}
    ended: set[Hashable] = set()
    for signal in read:
        if signal.role not in OPEN_WORDS or not signal.text or signal.bot or not signal.state:
            continue
        key: Hashable = signal.own or (signal.event.source, words(signal.text))
        if signal.state == "closed":
            ended.add(key)
        elif key not in ended and signal.own not in closed:
            found.setdefault(key, signal)
    return tuple(found.values())


# --- Sentences -----------------------------------------------------------------------------


class _Seen:
    """Lines seen so far, indexed by word, so that looking for a duplicate stays cheap."""

    def __init__(self) -> None:
        self._bags: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        bag = words(text)
        for word in sorted(bag):
            self._index[word].append(len(self._bags))
        self._bags.append(bag)

    def find(self, text: str) -> int | None:
        """The place of an earlier line that says the same, if there is one."""
        bag = words(text)
        rare = sorted(bag, key=lambda word: (len(self._index.get(word, ())), word))[:4]
        near = dict.fromkeys(at for word in rare for at in self._index.get(word, ())[-CANDIDATES:])
        for at in near:
            other = self._bags[at]
            common = len(bag & other)
            alike = common >= 4 and common / len(bag | other) >= SIMILAR
            if bag == other or (alike and not any(DIGIT.search(word) for word in bag ^ other)):
                return at
        return None


def _merged(statements: Iterable[Statement], seen: _Seen) -> list[Statement]:
    """Statements without near-duplicates; the first keeps its words and gets the others' ids."""
    kept: dict[int, Statement] = {}
    position = len(seen._bags)
    for statement in statements:
        if not statement.text or not statement.event_ids:
            continue
        at = seen.find(statement.text)
        if at is None:
            seen.add(statement.text)
            kept[position] = statement
            position += 1
        elif at in kept:
            ids = list(dict.fromkeys((*kept[at].event_ids, *statement.event_ids)))
            kept[at] = kept[at].model_copy(update={"event_ids": ids})
    return list(kept.values())


def _said(
    reading: Reading,
    label: str,
    most: int,
    seen: _Seen | None = None,
    *,
    relevance: Callable[[str], float] | None = None,
) -> list[Statement]:
    """The sentences under one label, strongest and newest first, with who said them in chat."""
    answered = _answered(reading)
    undone = {s.event.id for c in reading.changes if c.undone for s in c.signals}
    found: list[tuple[float, int, Statement]] = []
    for at, signal in enumerate(reading.signals):
        over = signal.own in reading.closed or signal.state == "closed"
        if (
            signal.bot
            or signal.event.id in undone
            or (over and (label == "question" or (label == "next" and signal.role != "change")))
        ):
            continue
        for sentence in signal.sentences:
            if sentence.label != label or (
                label == "question" and at > answered.get(_thread(signal), at)
            ):
                continue
            weight = (
                sentence.strength
                + signal.urgency
                + (10 * relevance(sentence.text) if relevance else 0)
            )
            found.append((-weight, at, _attributed(reading, signal, sentence.text)))
    found.sort(key=lambda entry: entry[:2])
    return _merged((statement for _, _, statement in found[: most * 20]), seen or _Seen())[:most]


def _attributed(reading: Reading, signal: Signal, text: str) -> Statement:
    if signal.role == "chat":
        name = reading.people.get(signal.author, signal.author)
        where = line(signal.event.resource or "", 60)
        room = f"#{where}" if where and signal.event.source in ("slack", "discord") else where
        by = f"{line(name, 60)} in {room}" if name and room else line(name, 60) or room
    else:
        # A sentence from a body needs the title to be understood.
        named = "" if text == signal.text else _raised(line(signal.text, 70))
        by = f"in \u201c{named}\u201d" if named else ""
    if by:
        text = f"{line(text, signals.LINE_MAX - len(by) - 3).rstrip('.')} \u2014 {by}"
    return _statement(text, [signal])


def _thread(signal: Signal) -> str:
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


def _remarks(reading: Reading) -> list[Statement]:
    """What was said or happened, when nothing else is there to report."""
    found = [
        _attributed(reading, signal, signal.text)
        for signal in reading.signals
        if signal.role in ("chat", "other", "release") and not signal.bot and signal.kind != "noise"
        and len(signals.WORD.findall(signal.text)) >= 3
        and not signals.SMALL_TALK.match(signal.text[:120])
    ]  # fmt: skip
    return _merged(found[:200], _Seen())[:KEY_CHANGES]


# --- People and areas ----------------------------------------------------------------------


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
    return re.sub(r"[\W_]+", "", name.casefold())


def _area_names(read: Sequence[Signal], several: bool) -> dict[str, str]:
    """The part of the system that a path belongs to, by the name people use for it.

    When one folder takes most of the work, its files are the parts.
    """
    touches = Counter(path for s in read if s.role in ("change", "pull") for path in s.files)
    resources = (
        {path: s.event.resource or "" for s in reversed(read) for path in s.files}
        if several
        else {}
    )
    names = {path: _area_name(path) for path in touches}
    load: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path, name in names.items():
        if name not in SIDE_AREAS:
            load[name] += touches[path]
            files[name] += 1
    crowded = {name for name in load if load[name] * 2 > sum(load.values()) and files[name] >= 6}
    for path, name in names.items():
        if name in crowded and "/" in path:
            stem = path.rpartition("/")[2].partition(".")[0]
            names[path] = f"{name}/{stem}" if stem and stem != "__init__" else name
        if several and names[path]:
            names[path] = f"{resources[path].rpartition('/')[2]}: {names[path]}"
    return {path: line(name, 80) for path, name in names.items()}


def _area_name(path: str) -> str:
    """Folders, two deep at most; docs, tests and the like by what they are, a changelog by none."""
    for name, pattern in SIDE_FILES:
        if pattern.search(path):
            return name
    parts = [part for part in path.split("/") if part]
    folders = parts[:-1]
    if len(folders) > 1 and folders[0] in WRAPPERS:
        folders = folders[1:]
    if not folders:
        return parts[0].partition(".")[0] if parts else ""
    return "/".join(folders[:2])


def _side(path: str) -> bool:
    """Whether a path is docs, tests, CI or packaging rather than code."""
    return _area_name(path) in SIDE_AREAS


def _areas_of(changes: Sequence[Change]) -> Counter[str]:
    return Counter(change.areas[0] for change in changes if change.areas)


# --- Words ---------------------------------------------------------------------------------


def _focus(reading: Reading, asked: str) -> Callable[[str], float]:
    """How much of what was asked a text speaks about, between 0 and 1; rare words weigh more."""
    wanted = words(asked) - ASKING
    common = Counter(word for change in reading.changes for word in words(change.text) & wanted)
    weights = {word: 1 / (1 + common[word]) for word in wanted}
    total = sum(weights[word] for word in sorted(wanted))

    def relevance(text: str) -> float:
        found = wanted & words(text.replace("/", " ").replace("_", " "))
        return sum(weights[word] for word in sorted(found)) / total if found else 0.0

    return relevance


ASKING = words("what how why does do system code team new member role area parts happens work")


def _require(*parts: Sequence[object]) -> None:
    if not any(parts):
        raise NothingToSay("the events hold nothing worth repeating")


def _ids(read: Iterable[Signal]) -> list[str]:
    return list(dict.fromkeys(event_id for signal in read for event_id in signal.event.ids))


def _statement(text: str, read: Iterable[Signal]) -> Statement:
    return Statement(text=text, event_ids=_ids(read))


def _shown(reference: str, several: bool) -> str:
    """A reference as people write it: the repository only where it is needed."""
    if reference.startswith("@"):
        return reference[1:]
    repository, mark, number = reference.rpartition("#")
    if mark:
        return f"{line(repository, 100) if several else ''}#{number}"
    return line(reference, 100)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _listed(names: Sequence[str], most: int) -> str:
    """As in "a, b and c", or "a, b and 3 more"."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def _day(moment: datetime) -> str:
    return f"{moment.day} {MONTHS[moment.month - 1]}"


def _period(moments: Sequence[datetime]) -> str:
    first, last = min(moments), max(moments)
    if first.date() == last.date():
        return f"{_day(last)} {last.year}"
    start = f"{first.day}"
    if (first.year, first.month) != (last.year, last.month):
        start = _day(first) if first.year == last.year else f"{_day(first)} {first.year}"
    return f"{start} to {_day(last)} {last.year}"


def _raised(text: str) -> str:
    """First letter as a capital, unless the first word is code or a name."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if re.fullmatch(r"[a-z][a-z'-]*[,:]?", first) else text


def _lowered(text: str) -> str:
    """First letter small inside a sentence, unless the first word is a name or all capitals."""
    first = text.split(" ", 1)[0]
    known = (
        first.casefold() in signals.FIRST_WORDS
        or signals._stem(first.casefold()) in signals._STEMMED
    )
    return text[:1].lower() + text[1:] if known and first[1:].islower() else text


COMPOSERS: dict[str, Callable[[Reading], AnyDraft]] = {
    "handoff": _handoff,
    "cross_source_correlation": _correlation,
    "onboarding_brief": _onboarding,
    "architecture_insight": _architecture,
    "release_notes": _release_notes,
}
