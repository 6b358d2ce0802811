"""Reading events together: which of them are one change.

A pull request with its commits, a commit, or a ticket that was closed is one change; so are a
change and its revert, and two that say the same. The one rule: a change carries all its events.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from app.schemas import Statement
from tasks.lines import LINE_MAX, line, strings
from tasks.paths import CHANGELOG_FILE, SIDE_AREAS
from tasks.references import TICKET, as_written
from tasks.signals import Signal
from tasks.statements import Seen, lowered, raised, stated

# What a change is worth to someone coming back.
WEIGHTS = {
    "security": 5.0, "feature": 4.0, "fix": 3.0, "performance": 3.0, "removal": 3.0,
    "deprecation": 3.0, "change": 2.5, "refactor": 1.4, "docs": 1.0, "test": 0.7, "build": 0.6,
    "chore": 0.5, "ci": 0.3, "dependency": 0.2, "noise": 0.0,
}  # fmt: skip
ORDER = tuple(WEIGHTS)
INTERNAL = frozenset(("refactor", "docs", "test", "build", "chore", "ci", "dependency", "noise"))
REFERRED = 1.0  # what a number adds: somebody had asked for it, or reviewed it
NOTED = 2.5  # what a line in the changelog adds to a change's weight
TRIFLE_LESS = 1.0  # and what a trifle loses
TRIFLE = re.compile(
    r"\b(?:tweak\w{0,3}|cosmetic|nicer|minor|slightly|a (?:little|bit)|wording|alignment|align"
    r"|icons?|css|padding|margin|colou?rs?|fonts?|tooltips?|line[- ]height|look of|comments?"
    r"|variable names?)\b",
    re.I,
)


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
    listed: bool = False  # a commit to the changelog alone names its request or issue
    undone: bool = False  # reverted, and the revert stands
    known: bool = True  # what was reverted is itself in the context

    @property
    def minor(self) -> bool:
        """Whether nobody reads it one by one."""
        return self.kind in ("noise", "dependency")

    @property
    def visible(self) -> bool:
        """Whether users may notice it."""
        return bool(self.breaking) or self.kind not in INTERNAL

    @property
    def cancelled(self) -> bool:
        """Whether it was made and undone within the context, so that nothing is left of it."""
        return self.undone and self.known

    @property
    def told(self) -> str:
        """The text as it may stand alone: what was undone says so."""
        return f"Reverted: {lowered(self.text)}" if self.undone else raised(self.text)

    @property
    def line(self) -> str:
        """The change with its reference; the text gives way when both do not fit."""
        return f"{line(self.told, LINE_MAX - len(self.reference) - 1)} {self.reference}".strip()

    @property
    def statement(self) -> Statement:
        """The line with the ids behind it."""
        return stated(self.line, self.signals)

    @property
    def score(self) -> float:
        """Importance: what it is, how much it touched, and how it arrived."""
        size = 0.35 * min(math.log2(1 + len(self.files)), 5)
        arrived = 0.5 * any(signal.pull for signal in self.signals)
        arrived += 0.1 * min(len(self.signals), 8) + REFERRED * bool(self.reference)
        urgent = 0.5 * max(signal.urgency for signal in self.signals)
        noted = NOTED * self.noted - TRIFLE_LESS * bool(TRIFLE.search(self.text))
        return WEIGHTS[self.kind] + 6 * bool(self.breaking) + size + arrived + urgent + noted

    @property
    def noted(self) -> bool:
        """Whether somebody gave it a line in the changelog, which says it matters to users."""
        logs = [path for path in self.files if CHANGELOG_FILE.search(path)]
        with_code = bool(logs) and len(logs) < len(self.files)
        return (with_code or self.listed) and self.kind not in ("noise", "docs", "ci")


def signals_behind(changes: Iterable[Change]) -> list[Signal]:
    """The signals of all the changes, for the ids of what is said about them."""
    return [signal for change in changes for signal in change.signals]


def lasting(changes: Iterable[Change]) -> list[Change]:
    """The changes that stand: only these are worth a title or the word "largest"."""
    return [change for change in changes if not change.undone]


def changes_of(
    read: Sequence[Signal], names: dict[str, str], people: dict[str, str], *, several: bool
) -> tuple[Change, ...]:
    """The changes that the events tell of, most important first."""
    logged = _logged(read)
    made = [_change(group, names, people, logged, several) for group in _grouped(read)]
    made = _without_duplicates(_reverted([change for change in made if change.text]))
    return tuple(sorted(made, key=lambda change: -change.score))


def _logged(read: Sequence[Signal]) -> frozenset[str]:
    """Requests and issues that commits to the changelog alone name, as in "Changelog for #7"."""
    logs = [s for s in read if s.files and all(CHANGELOG_FILE.search(path) for path in s.files)]
    return frozenset(ref for signal in logs for ref in signal.references if "#" in ref)


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
        shas = strings(read[at].event.metadata.get("parents"))
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
            if len(strings(read[at].event.metadata.get("parents"))) > 1:
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
    group: list[Signal],
    names: dict[str, str],
    people: dict[str, str],
    logged: frozenset[str],
    several: bool,
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
        listed=any(ref in logged for s in group for ref in (s.pull, s.own, *_fixed(s)) if ref),
    )  # fmt: skip


def _kind(group: Sequence[Signal]) -> str:
    """The kind of a change; its commits make a plain one more precise."""
    first = group[0]
    if first.role == "incident":
        return "fix"
    if first.role == "ticket":
        return "fix" if any("bug" in label.casefold() for label in first.labels) else "change"
    noted = any(CHANGELOG_FILE.search(path) for path in first.files)
    if first.kind in ("dependency", "build", "refactor") and noted and not first.bot:
        return "change"  # people note the update of a framework, not of a linter
    if first.kind in ("change", "noise"):
        return min((s.kind for s in group if s.role == "change"), key=ORDER.index, default="change")
    return first.kind


def _reference(group: Sequence[Signal], several: bool) -> str:
    """How people refer to the change: its pull request, its ticket, or the issues it names."""
    first = group[0]
    found = [s.pull for s in group if s.pull] or [first.own] * (first.role == "ticket")
    found = found[:1] or [reference for signal in group[:4] for reference in _fixed(signal)]
    shown = dict.fromkeys(as_written(reference, several) for reference in found)
    told = [text for text in shown if text and text not in first.text][:2]
    return f"({', '.join(told)})" if told else ""


def _fixed(signal: Signal) -> list[str]:
    """The issues a commit names, for a change that has no pull request."""
    named = [
        ref
        for ref in signal.references
        if not ref.startswith("@") and ("#" in ref or TICKET.fullmatch(ref))
    ]
    return list(signal.closes) or named[:2]


def _ended(signal: Signal) -> str:
    """The text of a change; what was closed without a commit says so."""
    word = {"ticket": "Closed", "incident": "Resolved"}.get(signal.role, "")
    return f"{word}: {signal.text}" if word and signal.text else signal.text


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
    seen = Seen()
    for change in changes:
        at = seen.find(change.text) if change.kind != "dependency" else None
        if at is None or not _same(kept[at], change):
            seen.add(change.text if change.kind != "dependency" else "")
            kept.append(change)
        else:
            kept[at] = _joined(kept[at], change)
    return kept


def _same(one: Change, other: Change) -> bool:
    """Whether changes of the same words are one: not when of two repositories, or one undone."""
    places = {change.signals[0].event.resource for change in (one, other)}
    return len(places) == 1 and one.undone == other.undone


def _joined(first: Change, second: Change) -> Change:
    """One change of two that say the same; the words are those of the first."""
    kinds = first.kind, second.kind
    return replace(
        first,
        signals=(*first.signals, *second.signals),
        people=tuple(dict.fromkeys((*first.people, *second.people))),
        files=tuple(dict.fromkeys((*first.files, *second.files))),
        areas=tuple(dict.fromkeys((*first.areas, *second.areas))),
        kind=min(kinds, key=ORDER.index) if "change" in kinds else first.kind,
        breaking=first.breaking or second.breaking,
        reference=first.reference or second.reference,
    )
