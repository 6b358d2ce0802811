"""The architecture insight: the parts, what moves in them and together, what is fragile."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from app.schemas import ArchitectureDraft, Statement
from tasks.areas import area_of, ranked_areas, relevance_of
from tasks.changes import Change, signals_behind
from tasks.lines import line
from tasks.passages import KEY_CHANGES, LIST_MAX, SUMMARY_IDS, numbers, open_line, said, themes
from tasks.paths import SCHEMA_FILE, SIDE_AREAS, TEST_FILE, is_side
from tasks.reading import Reading
from tasks.signals import Signal
from tasks.statements import Seen, ids_of, listed, merged, stated

STRUCTURAL = re.compile(
    r"\b(?:mov(?:e|es|ed|ing)\b.{1,80}\b(?:to|into|out|from)|renam\w{1,3}|extract\w{0,3}"
    r"|split\w{0,4}|introduc\w{1,3}|migrat\w{1,5}|restructur\w{1,3}|reorgani[sz]\w{1,3}"
    r"|replac\w{1,3}|switch\w{0,3} (?:to|from)|new (?:module|package|service|table|column|hook"
    r"|plugin|api|endpoint|driver|class)|schema|endpoints?|protocol|interface|(?:add|remove"
    r"|drop)\w{0,3}\b.{0,40}\b(?:dependency|module|package|service|table|column|hook|driver|backend"
    r"|queue|endpoint|api|class))\b",
    re.I,
)


def architecture_insight(reading: Reading) -> ArchitectureDraft:
    """The parts, what moves in them, what moves together, and what is fragile."""
    question = str(reading.context.options.get("focusQuestion") or "")[:2_000]
    relevance = relevance_of(reading, question)
    ranked = ranked_areas(reading, lambda name, text: 20 * relevance(name) + 6 * relevance(text))
    ranked = [entry for entry in ranked if entry[0] not in SIDE_AREAS] or ranked
    together = _together(reading)
    components = [
        area_of(name, changes, together.get(name, "")) for name, changes in ranked[:LIST_MAX]
    ]
    structural = [change for change in reading.changes if _structural(change) and not change.undone]
    structural.sort(key=lambda change: -(change.score + 8 * relevance(change.text)))
    changes = [change.statement for change in structural[:KEY_CHANGES]]
    taken = Seen()
    decisions = said(reading, "decision", LIST_MAX, taken, relevance=relevance)
    questions = said(reading, "question", LIST_MAX, taken, relevance=relevance)
    risks = _risks(reading, taken, relevance)
    name = line(reading.context.project_name, 80)
    names = [area.name for area in components if area.name not in SIDE_AREAS] or [
        a.name for a in components
    ]
    title = f"{name}: movement in {listed(names, 3)}" if names else f"{name}: architecture"
    return ArchitectureDraft(
        title=title, summary=_summary(reading, question, structural, risks),
        components=components, changes=changes, decisions=decisions, risks=risks,
        open_questions=questions,
    )  # fmt: skip


def _summary(
    reading: Reading, question: str, structural: Sequence[Change], risks: Sequence[Statement]
) -> Statement:
    """Numbers, or what the events say to the question when there is one."""
    parts = [f"{numbers(reading)}."]
    behind: list[Signal] = []
    if question:
        relevance = relevance_of(reading, question)
        near = sorted(reading.changes, key=lambda change: -relevance(change.text))[:3]
        near = [change for change in near if relevance(change.text) > 0]
        asked = line(question, 120)
        if near:
            parts.insert(0, f"On \u201c{asked}\u201d: {themes(near)}.")
            behind += signals_behind(near)
        else:
            parts.insert(0, f"No change in this period speaks to \u201c{asked}\u201d.")
    elif structural:
        parts.append(f"Structural: {themes(structural[:2])}.")
        behind += signals_behind(structural[:2])
    ids = ids_of(behind) + (risks[0].event_ids if risks else []) + ids_of(reading.signals)
    return Statement(text=" ".join(parts), event_ids=list(dict.fromkeys(ids))[:SUMMARY_IDS])


def _structural(change: Change) -> bool:
    """Whether a change moves the structure: by its words, its size or the schema it touches."""
    if change.kind in ("noise", "dependency", "docs", "test", "ci"):
        return False
    plain = [path for path in change.files if not TEST_FILE.search(path)]
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


def _risks(reading: Reading, taken: Seen, relevance: Callable[[str], float]) -> list[Statement]:
    """Incidents, breaks, reverts, files that keep being fixed, and what people call a risk."""
    found = [open_line(reading, signal) for signal in reading.open if signal.role == "incident"]
    found += [
        stated(line(f"Breaking: {change.breaking}"), change.signals)
        for change in reading.changes
        if change.breaking and not change.undone
    ]
    found += [change.statement for change in reading.changes if change.undone]
    found += [
        stated(f"Security: {change.line}", change.signals)
        for change in reading.changes
        if change.kind == "security" and not change.undone
    ]
    fixed: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        if change.kind in ("fix", "security"):
            for path in change.files:
                if not is_side(path):
                    fixed[path].append(change)
    for path in sorted(fixed, key=lambda path: (-len(fixed[path]), path))[:3]:
        if len(fixed[path]) >= 3:
            text = f"`{path}` was fixed {len(fixed[path])} times"
            found.append(stated(text, signals_behind(fixed[path])))
    found += said(reading, "risk", LIST_MAX, taken, relevance=relevance)
    return merged(found, Seen())[:LIST_MAX]
