"""The handoff: what happened, what was decided, what is open, for a colleague who comes back."""

import re
from collections.abc import Sequence

from app.schemas import HandoffDraft, Statement
from tasks.changes import ORDER, Change, lasting, signals_behind
from tasks.lines import line
from tasks.passages import (
    KEY_CHANGES,
    LIST_MAX,
    dependency_line,
    numbers,
    open_line,
    remarks,
    said,
    spread,
    summary_of,
    themes,
)
from tasks.reading import Reading
from tasks.signals import Signal
from tasks.statements import Seen, lowered, merged, raised, stated

SHORT = 6  # key changes up to which what users cannot see is told as well
THEME_MAX = 60  # characters of one theme in a title
BREAK = re.compile(
    r"(?:[,;:]| [-\u2013\u2014(]| (?:because|when|so that|instead of|by|for|in|to|from|if|after"
    r"|without|at))\s"
)


def handoff(reading: Reading) -> HandoffDraft:
    """What happened, what was decided, what is open: for a colleague who comes back."""
    top = _key_changes(reading) or [c for c in reading.changes if c.kind != "noise"]
    top.sort(key=lambda change: (not change.breaking, ORDER.index(change.kind)))
    key_changes = [change.statement for change in top]
    if len(key_changes) < KEY_CHANGES:
        key_changes += dependency_line(reading) if top else []
    taken = Seen()
    for change in top:
        taken.add(change.text)
    decisions = said(reading, "decision", LIST_MAX, taken)
    questions = said(reading, "question", LIST_MAX, taken)
    steps = _next_steps(reading, taken)
    if not key_changes:
        key_changes = said(reading, "done", KEY_CHANGES, taken)
    if not (key_changes or decisions or questions or steps):
        key_changes = remarks(reading, taken)
    headlines = sorted(lasting(top), key=lambda change: -change.score)[:3]
    told = [] if top else key_changes  # without headlines, nothing of `top` stands
    return HandoffDraft(
        title=_title(reading, headlines, told or decisions or questions or steps),
        summary=_summary(reading, headlines),
        key_changes=key_changes[:KEY_CHANGES],
        decisions=decisions,
        open_questions=questions,
        next_steps=steps,
    )


def _key_changes(reading: Reading) -> list[Change]:
    """What users can see, then as much of the rest as still makes a short list."""
    told = [change for change in reading.changes if not change.minor]
    seen = spread([change for change in told if change.visible], KEY_CHANGES)
    rest = [change for change in told if not change.visible]
    return seen + spread(rest, max(0, SHORT - len(seen)))


def _title(reading: Reading, headlines: Sequence[Change], fallback: Sequence[Statement]) -> str:
    """The two changes that matter most, or the first thing there is to say, or the numbers."""
    told = [_short(change.text) for change in headlines[:2]]
    told = told or [line(statement.text, 80) for statement in fallback[:1]] or [numbers(reading)]
    name = line(reading.context.project_name, 80)
    joined = "; ".join((raised(told[0]), *map(lowered, told[1:])))
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
    parts = [f"{numbers(reading)}."]
    if headlines:
        parts.append(f"Most important: {themes(headlines)}.")
    burning = [
        signal for signal in reading.open if signal.role == "incident" or signal.urgency == 3
    ]
    if burning:
        names = "; ".join(line(signal.text, 90) for signal in burning[:2])
        parts.append(f"Still open and urgent: {names}.")
    return summary_of(" ".join(parts), (*signals_behind(headlines), *burning, *reading.signals))


def _next_steps(reading: Reading, taken: Seen) -> list[Statement]:
    """What burns first, then what people said, then unfinished task lists, tickets and PRs."""

    def presses(signal: Signal) -> bool:
        return signal.urgency >= 2 or signal.role == "incident"

    urgent = [signal for signal in reading.open if presses(signal)]
    rest = [signal for signal in reading.open if not presses(signal)]
    statements = [open_line(reading, signal) for signal in sorted(urgent, key=lambda s: -s.urgency)]
    statements += said(reading, "next", LIST_MAX, taken)
    statements += _open_tasks(reading)
    statements += [open_line(reading, signal) for signal in rest]
    return merged(statements, Seen())[:LIST_MAX]


def _open_tasks(reading: Reading) -> list[Statement]:
    """Task-list items that no newer event ticks off and whose owner is not closed."""
    tasks = [task for signal in reading.signals for task in signal.tasks]
    done = {text.casefold() for ticked, text in tasks if ticked}
    found = []
    for signal in reading.signals:
        if signal.own in reading.closed or signal.state == "closed":
            continue
        for ticked, text in signal.tasks[:LIST_MAX]:
            if not ticked and text.casefold() not in done:
                found.append(stated(raised(text), [signal]))
    return found
