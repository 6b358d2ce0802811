"""The onboarding brief: where things happen, who to ask, what to read first."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from app.schemas import OnboardingDraft, Person, Statement
from tasks.areas import area_of, ranked_areas, relevance_of
from tasks.changes import Change, lasting, signals_behind
from tasks.lines import line
from tasks.passages import LIST_MAX, numbers, open_line, said, summary_of, touched_files
from tasks.paths import CI_FILE, SIDE_AREAS, is_side
from tasks.reading import Reading
from tasks.signals import Signal
from tasks.statements import Seen, count, ids_of, listed, merged, stated

WORDS = re.compile(r"[^\W_]+")
FIRST_FILES = re.compile(
    r"(?:^|/)(?:readme|contributing|getting[-_ ]?started|quickstart|install\w*|development"
    r"|architecture)\b[^/]*$",
    re.I,
)
FIRST_ISSUE = re.compile(r"good first|starter|beginner|help wanted|easy|small", re.I)
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


def onboarding_brief(reading: Reading) -> OnboardingDraft:
    """Where things happen, who to ask, what to read first."""
    options = reading.context.options
    wanted, role = (str(options.get(key) or "")[:300] for key in ("focusArea", "newMemberRole"))
    hints = " ".join(ROLES.get(word, word) for word in WORDS.findall(role.casefold()))
    focus, fit = relevance_of(reading, wanted), relevance_of(reading, hints)
    relevance = relevance_of(reading, f"{wanted} {hints}")
    # An area that is asked for by name comes first; one that fits the role counts several times.
    ranked = ranked_areas(
        reading, lambda name, text: 99 * focus(name) + 3 * focus(text) + 30 * fit(name) + fit(text)
    )
    areas = [area_of(name, changes) for name, changes in ranked[:LIST_MAX]]
    taken = Seen()
    decisions = said(reading, "decision", LIST_MAX, taken, relevance=relevance)
    questions = said(reading, "question", LIST_MAX, taken, relevance=relevance)
    steps = _first_steps(reading, ranked)
    people = _key_people(reading, ranked)
    name = line(reading.context.project_name, 80)
    member = line(str(options.get("newMemberRole") or ""), 60)
    title = f"{name}: brief for a new {member}" if member else f"{name}: brief for a new member"
    if options.get("focusArea"):
        title += f", with a focus on {line(str(options['focusArea']), 60)}"
    text = f"{numbers(reading)}."
    near = [name for name, _ in ranked[:3] if focus(name)]
    if near:
        text += f" For {line(wanted, 60)}, start with {listed(near, 3)}."
    if people:
        text += f" Ask {listed([person.name for person in people[:3]], 3)}."
    behind = [signal for _, changes in ranked[:3] for signal in signals_behind(changes)]
    summary = summary_of(text, (*behind, *reading.signals))
    return OnboardingDraft(
        title=title, summary=summary, areas=areas, key_people=people, decisions=decisions,
        open_questions=questions, first_steps=steps,
    )  # fmt: skip


def _key_people(reading: Reading, ranked: Sequence[tuple[str, list[Change]]]) -> list[Person]:
    """Who did most of the work where."""
    work: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        if not change.minor:
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
        text = count(len(work[name]), "change") + (f": {listed(shares, 3)}" if shares else "")
        if stand := lasting(work[name]):
            best = max(stand, key=lambda change: change.score)
            text += f". Most notable: {line(best.text, 110)}"
        ids = ids_of(signals_behind(work[name]))
        found.append(Person(name=name, areas=areas, text=line(text, 300), event_ids=ids))
    return found


def _first_steps(reading: Reading, ranked: Sequence[tuple[str, list[Change]]]) -> list[Statement]:
    """Good first reading and a good first issue, all of it from the events."""
    touched = touched_files(reading)
    steps = []
    guides = [
        path for path in sorted(touched) if FIRST_FILES.search(path) and not CI_FILE.search(path)
    ]
    for path in sorted(guides, key=lambda path: (path.count("/"), -len(touched[path]), path))[:2]:
        steps.append(stated(f"Read `{path}`, {_touched(touched[path])}", touched[path]))
    code = [path for path in touched if not is_side(path)]
    focus = {path for _, changes in ranked[:3] for change in changes for path in change.files}
    for path in sorted(code, key=lambda path: (path not in focus, -len(touched[path]), path))[:3]:
        if len(touched[path]) > 1:
            steps.append(stated(f"Read `{path}`, {_touched(touched[path])}", touched[path]))
    for _, changes in ranked[:2]:
        stand = lasting(changes)
        best = max(stand, key=lambda change: (len(change.files), change.score), default=None)
        if best and len(best.files) > 1:
            where = f" ({count(len(best.files), 'file')})"
            steps.append(
                stated(f"Study a large change: {line(best.line, 190)}{where}", best.signals)
            )
    small = [s for s in reading.open if s.role == "ticket" and s.urgency < 2]
    small.sort(key=lambda signal: not any(FIRST_ISSUE.search(label) for label in signal.labels))
    steps += [
        stated(f"Pick up: {open_line(reading, s).text.partition(': ')[2]}", [s]) for s in small[:2]
    ]
    return merged([s.model_copy(update={"text": line(s.text)}) for s in steps], Seen())[:LIST_MAX]


def _touched(by: Sequence[Signal]) -> str:
    """How often a file was touched and why it was last."""
    last = line(by[0].text, 90)
    return f"touched by {count(len(by), 'change')}, last: {last}" if by[0].text else "touched"
