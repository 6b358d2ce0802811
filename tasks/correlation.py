"""Cross-source correlation: activity of different sources that belongs together, in order of time.

The one rule: a shared reference is evidence, similar titles are weaker evidence and say so.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from app.schemas import Correlation, CorrelationDraft, Statement
from tasks.lines import line, words
from tasks.passages import SUMMARY_IDS
from tasks.reading import Reading
from tasks.references import (
    GIT_SOURCES,
    TICKET,
    as_written,
    branch_tickets,
    commit_of,
    head_branch,
)
from tasks.signals import Signal
from tasks.statements import CANDIDATES, count, day_of, ids_of, listed, lowered, period_of

ADDRESS = 3  # the last rank of a reference
WEAK_TIE = 0.5  # share of common words that ties events of different sources
WEAK_HOURS = 72  # and how far apart in time they may be
LINKS = 4  # references in one event up to which it ties threads together
HUB = 25  # things that share a reference before it says nothing any more
STEPS_MAX = 6  # steps of a story in its sentence
STEPS = ("change", "ticket", "incident", "chat", "pull", "release", "other")
STEP_WORDS = {
    ("ticket", "open"): "opened in", ("ticket", "closed"): "closed in",
    ("ticket", ""): "updated in",
    ("incident", "open"): "reported by", ("incident", "closed"): "resolved in",
    ("pull", "open"): "taken up in", ("pull", "closed"): "closed in", ("pull", ""): "taken up in",
}  # fmt: skip

ENDED_WORDS = {
    "build.failed": "broken in", "job.failed": "broken in", "build.succeeded": "built in",
    "deployment.succeeded": "deployed by", "deployment.failed": "not deployed by",
    "deployment.promoted": "promoted by", "deployment.rolled_back": "rolled back by",
}  # fmt: skip

Group = tuple[list[str], list[Signal]]  # what ties the events, and the events in order of time


@dataclass(slots=True)
class _Story:
    """A group while it grows: of things, of which there may be many events."""

    keys: list[str] = field(default_factory=list)
    members: dict[str, Signal] = field(default_factory=dict)  # by the event's id
    things: set[str] = field(default_factory=set)


def correlation(reading: Reading) -> CorrelationDraft:
    """Activity of different sources that shares a reference, told in the order of time."""
    sources = sorted({signal.event.source for signal in reading.signals})
    groups = _tied(reading, across=len(sources) > 1)
    if len(sources) > 1:
        groups += _alike(reading, groups)
    correlations = [_told(keys, members) for keys, members in groups[:20]]
    name = line(reading.context.project_name, 80)
    texts = [told.title for told in correlations[:2]]
    period = period_of([signal.event.occurred_at for signal in reading.signals])
    text = (
        f"{count(len(correlations), 'thread')} of work across {listed(sources, 5)}, {period}: "
        f"{'; '.join(line(title, 90) for title in texts)}."
    )
    ids = list(dict.fromkeys(event_id for c in correlations for event_id in c.event_ids))
    return CorrelationDraft(
        title=f"{name}: {listed([line(title, 60) for title in texts], 2)}",
        summary=Statement(text=text, event_ids=ids[:SUMMARY_IDS]),
        correlations=correlations,
    )


def _tied(reading: Reading, *, across: bool) -> list[Group]:
    """Groups by shared references; references with nearly the same things are one group."""
    mentions: dict[str, list[Signal]] = defaultdict(list)
    known = {s.own for s in reading.signals if s.own.startswith("@")}
    resolved = _resolver(reading)
    few: set[str] = set()  # things of which an event refers to so little that it means it
    for signal in reading.signals:
        told = [] if signal.bot else resolved(signal)
        if len(told) <= LINKS:
            few.add(signal.thing)
        for key in told:
            if not key.startswith("@") or key in known:
                mentions[key].append(signal)
    stories: list[_Story] = []
    places: dict[str, list[int]] = defaultdict(list)  # thing -> stories that hold it
    widths = {key: len({s.event.source for s in named}) for key, named in mentions.items()}
    for key in sorted(mentions, key=lambda key: (-widths[key], _own_rank(key), key)):
        members = {signal.event.id: signal for signal in mentions[key]}
        things = {signal.thing for signal in mentions[key]}
        if len(members) < 2 or len(things) > HUB or (across and widths[key] < 2):
            continue
        near = Counter(at for thing in things for at in places[thing][:CANDIDATES])
        at, common = min(near.items(), key=lambda pair: (-pair[1], pair[0]), default=(-1, 0))
        story = stories[at] if common else _Story()
        named = {signal.thing for signal in mentions[key] if key in (signal.own, signal.address)}
        # Half of one in the other is one story, unless what they share is a list of everything.
        # What the key is the name of does not count, as it is there whatever refers to it. And what
        # another story refers to as well is a place of both.
        shared = len(things & story.things & few)
        elsewhere = any(places[thing] for thing in things - story.things - named)
        smaller = min(len(things - named), len(story.things))
        near_enough = common * 2 > smaller or (shared * 2 >= smaller and not elsewhere)
        if not (common and near_enough and len(story.things) <= HUB):
            at, story = len(stories), _Story()
            stories.append(story)
        for thing in things - story.things:
            places[thing].append(at)
        story.keys.append(key)
        story.members.update(members)
        story.things |= things
    _complete(reading, stories, places)
    return [
        (sorted(story.keys, key=_own_rank), sorted(story.members.values(), key=_when))
        for story in stories
    ]


def _complete(
    reading: Reading, stories: Sequence[_Story], places: Mapping[str, Sequence[int]]
) -> None:
    """Add the rest of a conversation, or of an incident, to the one story that has some of it."""
    for signal in reversed(reading.signals):
        at = places.get(signal.thing, ())
        whole = signal.role in ("chat", "incident") and not signal.bot
        if whole and len(at) == 1 and len(stories[at[0]].members) < HUB * 2:
            stories[at[0]].members.setdefault(signal.event.id, signal)


def _resolver(reading: Reading) -> Callable[[Signal], list[str]]:
    """How to read an event's references among those of all the others.

    A key in a branch name counts when somebody wrote it out, a bare number in a chat when there is
    no doubt about its repository, and what is of a commit is of the request that brought it.
    """
    brought = {key: s.pull for s in reading.signals if s.pull and (key := commit_of(s.event))}
    written = frozenset(key for s in reading.signals for key in s.references if "-" in key)
    sources = (s.event for s in reading.signals if s.event.source in GIT_SOURCES)
    repositories = sorted({event.resource.casefold() for event in sources if event.resource})
    names = {
        repository: re.compile(rf"(?<![\w-]){re.escape(repository.rpartition('/')[2])}(?![\w-])")
        for repository in repositories[:CANDIDATES]
    }

    def resolved(signal: Signal) -> list[str]:
        keys = dict.fromkeys(signal.references)
        for branch in (signal.event.branch, signal.head, head_branch(signal.event)):
            keys.update((k, None) for k in branch_tickets(branch) if k in written)
        if pull := brought.get(commit_of(signal.event)):
            keys[pull] = None
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
    if TICKET.fullmatch(key):
        return 0
    return 1 if "#" in key else 2 if key.startswith("@") else ADDRESS


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
        closest = sorted(near.items(), key=lambda pair: (-pair[1], pair[0]))[:CANDIDATES]
        for other, common in closest:
            one, two = free[at], free[other]
            if common < 3 or {at, other} & used or one.event.source == two.event.source:
                continue
            apart = abs(one.event.occurred_at - two.event.occurred_at)
            if common / len(bag | bags[other]) >= WEAK_TIE and apart <= timedelta(hours=WEAK_HOURS):
                used.update((at, other))
                found.append(([], sorted((one, two), key=_when)))
    return found


def _told(keys: Sequence[str], members: Sequence[Signal]) -> Correlation:
    """One thread of work as a sentence: who saw it first, where it was discussed, what fixed it."""
    shown = [as_written(key, several=True) for key in keys]
    steps: dict[tuple[str, str], list[Signal]] = {}
    for signal in members:
        steps.setdefault(_step(signal, keys), []).append(signal)
    parts = [
        what + (f" ({times} times)" if (times := _times(by)) > 1 else "")
        for (what, _), by in _telling(steps).items()
    ]
    best = min(
        members,
        key=lambda s: (
            not keys or s.own != keys[0],
            s.role not in ("ticket", "incident"),
            s.role == "chat",
            not s.text,
        ),
    )
    title = line(best.text or shown[0] if shown else best.text, 110)
    if shown and shown[0] not in title and _own_rank(keys[0]) < ADDRESS:
        title = line(f"{shown[0]}: {lowered(title)}" if title else shown[0])
    if shown:
        text = f"{shown[0]} was {listed(parts, STEPS_MAX)}. Tied by {listed(shown, 4)}"
    else:
        apart = members[-1].event.occurred_at - members[0].event.occurred_at
        hours = max(1, round(apart / timedelta(hours=1)))
        text = f"Similar titles within {count(hours, 'hour')}, weaker evidence: {listed(parts, 4)}"
    return Correlation(
        title=title, text=line(text, 500), references=shown[:12],
        sources=list(dict.fromkeys(signal.event.source for signal in members)),
        event_ids=ids_of(members),
    )  # fmt: skip


def _telling(steps: Mapping[tuple[str, str], list[Signal]]) -> dict[tuple[str, str], list[Signal]]:
    """As many steps as a sentence holds, in order of time: one of each role before others."""
    ranks: dict[tuple[str, str], tuple[int, int]] = {}
    seen = Counter[str]()
    for step, by in steps.items():
        role = by[0].role
        ranks[step] = (seen[role] + 2 * (role == "other"), STEPS.index(role))
        seen[role] += 1
    kept = set(sorted(ranks, key=ranks.__getitem__)[:STEPS_MAX])
    return {step: by for step, by in steps.items() if step in kept}


def _times(by: Sequence[Signal]) -> int:
    """How often a step was taken; a request, its merge and its commits are one change."""
    return len({s.pull or s.event.id if s.role == "change" else s.event.id for s in by})


def _step(signal: Signal, keys: Sequence[str]) -> tuple[str, str]:
    """One step of a thread, "discussed in slack (#backend)", and what makes it the same step."""
    source, where = signal.event.source, line(signal.event.resource or "", 80)
    date = day_of(signal.event.occurred_at)
    if signal.role == "change":
        name = as_written(signal.pull or signal.own, several=True) or f"{source} {where}".strip()
        if keys and keys[0] in (signal.pull, signal.own):
            return f"merged on {date}", name
        fixes = any(key in signal.closes for key in keys)
        verb = "reverted" if signal.reverts else "fixed" if fixes else "changed"
        return f"{verb} by {name} on {date}", name
    if signal.role == "ticket" and keys and signal.own not in keys:
        return (
            f"named in {source}{f' {line(signal.own)}' if signal.own else ''} on {date}",
            f"named{source}{signal.own}",
        )
    if ended := ENDED_WORDS.get(signal.event.event_type):
        return f"{ended} {source} on {date}", f"{ended}{source}"
    if signal.role in ("chat", "release", "other"):
        verb = {"chat": "discussed in", "release": "released in"}.get(signal.role, "mentioned in")
        return (
            f"{verb} {source}{f' ({where})' if where else ''} on {date}",
            f"{verb}{source}{where}",
        )
    verb = STEP_WORDS.get((signal.role, signal.state), "updated in")
    own = (
        as_written(signal.own, several=True)
        if signal.role == "pull" and signal.own not in keys[:1]
        else ""
    )
    return f"{verb} {own or source} on {date}", f"{verb}{own or source}"


def _when(signal: Signal) -> tuple[datetime, str]:
    return signal.event.occurred_at, signal.event.id
