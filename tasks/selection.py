"""Which events matter most to an artifact: threads together, every source heard, trifles last.

Pure and quick: an event is glanced at here, not read as `signals` does. The one rule: the order
depends on the events and the options alone, never on chance.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from tasks.architecture import STRUCTURAL
from tasks.context import Event, Thread, Weighed
from tasks.kinds import DEPENDENCY, NOISE
from tasks.lines import strings, words
from tasks.paths import SCHEMA_FILE, area_name
from tasks.references import branch_tickets, head_branch, mentions, number_at_end, own_of, pull_of
from tasks.signals import BOT, MERGE_PR, URGENCY, role_of

GLANCE = 1_500  # characters of a body that are looked at for references and cues
FILES_MAX = 12  # paths of a change that are looked at
HUB = 25  # events that share a reference before it ties nothing any more
THREAD_MAX = 40  # events of one thread; references can tie a whole history together
CROWD = 16  # threads of one place after which the next one counts half
TRIFLE = 1.0  # events that weigh less are nothing that anybody would miss
# What an event is worth to an artifact, by its role.
ROLES = ("change", "pull", "ticket", "incident", "release", "chat", "other")
WORTH: dict[str, tuple[float, ...]] = {
    "handoff": (2.2, 2.2, 2.0, 3.2, 2.6, 1.6, 1.4),
    "cross_source_correlation": (1.8, 2.2, 2.6, 3.2, 1.4, 1.8, 1.2),
    "onboarding_brief": (2.4, 2.4, 1.6, 1.4, 1.4, 1.8, 1.4),
    "architecture_insight": (2.6, 2.6, 1.4, 2.0, 1.2, 1.4, 1.2),
    "release_notes": (3.0, 2.6, 1.6, 1.2, 3.2, 1.1, 1.1),
    "digest": (2.2, 2.4, 2.0, 3.2, 2.8, 1.6, 1.4),
}
# How much of its worth an event loses from the newest to the oldest.
FADE = {"handoff": 0.35, "cross_source_correlation": 0.2, "onboarding_brief": 0.2,
        "architecture_insight": 0.2, "release_notes": 0.0, "digest": 0.0}  # fmt: skip
TRUNKS = frozenset(("main", "master", "trunk", "develop", "development", "dev", "next", "staging"))
# Fragments of what people say when they decide, ask, or leave something to do.
TELLING = (
    "decid", "decision", "agreed", "going with", "settled on", "consensus", "todo", "next step",
    "action item", "follow-up", "follow up", "blocked", "waiting for", "not sure", "unclear",
    "should we", "open question", "tbd", "data loss", "outage", "regression", "rollback", "revert",
    "rolled back", "breaking", "security", "migrat", "deprecat", "instead of", "?", "\uff1f",
)  # fmt: skip


def ranked_threads(kind: str, options: Mapping[str, Any], events: Sequence[Event]) -> list[Thread]:
    """All events as threads, the one that the artifact can least do without first.

    Args:
        events: newest first, as a context has them.
    """
    glance = _Glance(kind, options, events)
    threads = _threads([glance.at(event) for event in events])
    across = 1.5 if kind == "cross_source_correlation" else 0.5
    scores = [_score(thread, across) for thread in threads]
    order = sorted(range(len(threads)), key=lambda at: (-scores[at], at))
    crowd: Counter[tuple[str, str]] = Counter()
    for at in order:  # the tenth thread of a place tells less than the first of another
        place = threads[at].members[0].place
        scores[at] /= 1 + crowd[place] / CROWD
        crowd[place] += 1
    first: dict[str, int] = {}
    for at in order:
        for member in threads[at].members:
            first.setdefault(member.event.source, at)
    heard = frozenset(first.values())
    order.sort(key=lambda at: (at not in heard, -scores[at], at))
    return [threads[at] for at in order]


def choose(
    kind: str, options: Mapping[str, Any], events: Sequence[Event], limit: int
) -> list[Thread]:
    """The threads of the events that the artifact may use: at most `limit` with duplicates."""
    room = limit
    kept: list[Thread] = []
    for thread in ranked_threads(kind, options, events):
        fitting: dict[str, Weighed] = {}
        for member in sorted(thread.members, key=lambda member: -member.weight):
            event = member.event
            if room <= 0:
                break
            if len(event.ids) > room:
                event = replace(event, folded=event.folded[: room - 1])
            fitting[event.id] = replace(member, event=event)
            room -= len(event.ids)
        if not fitting:
            break
        members = [fitting[m.event.id] for m in thread.members if m.event.id in fitting]
        kept.append(Thread(tuple(members), thread.keys))
    return kept


class _Glance:
    """What one artifact looks at in an event."""

    def __init__(self, kind: str, options: Mapping[str, Any], events: Sequence[Event]) -> None:
        worth = WORTH.get(kind, WORTH["handoff"])
        self._worth = dict(zip(ROLES, worth, strict=True))
        self._fade = FADE.get(kind, FADE["handoff"])
        self._structural = kind == "architecture_insight"
        asked = (options.get(key) for key in ("focusArea", "focusQuestion", "newMemberRole"))
        self._asked = words(" ".join(text for text in asked if isinstance(text, str)))
        self._newest = events[0].occurred_at if events else datetime.max
        span = self._newest - events[-1].occurred_at if events else None
        self._seconds = max(1.0, span.total_seconds()) if span else 1.0
        self._areas: dict[str, str] = {}  # of paths; the same ones come again and again
        self._bots: dict[str, bool] = {}

    def at(self, event: Event) -> Weighed:
        """The event, weighed; never fails, whatever the text or the metadata hold."""
        metadata = event.metadata if isinstance(event.metadata, Mapping) else {}
        role, state = role_of(event, metadata)
        body = (event.content or "")[:GLANCE]
        files = metadata.get("files")
        files = strings(files[:FILES_MAX]) if isinstance(files, list) else []
        area = next((area for path in files if (area := self._area(path))), event.resource or "")
        return Weighed(
            event=event,
            weight=self._weight(event, metadata, role, state, body, files),
            place=(event.source, area),
            keys=_keys(event, metadata, role, body),
        )

    def _area(self, path: str) -> str:
        if path not in self._areas:
            self._areas[path] = area_name(path[:300])
        return self._areas[path]

    def _is_bot(self, author: str) -> bool:
        if author not in self._bots:
            self._bots[author] = bool(BOT.search(author[:120]))
        return self._bots[author]

    def _weight(
        self,
        event: Event,
        metadata: Mapping[str, Any],
        role: str,
        state: str,
        body: str,
        files: Sequence[str],
    ) -> float:
        title = event.title[:300]
        bot = self._is_bot(event.author or "") or metadata.get("bot") is True
        if role != "incident" and (bot or NOISE.match(title) or DEPENDENCY.match(title)):
            return 0.3
        told = f"{title}\n{body}".casefold()
        weight = self._worth[role]
        for fragment in TELLING:  # a loop costs half of any()
            if fragment in told:
                weight += 1.2
                break
        weight += 0.15 * min(math.log2(1 + len(files)), 5)
        weight += 0.2 * (len(body) > 80) + 0.1 * min(len(event.folded), 5)
        age = (self._newest - event.occurred_at).total_seconds() / self._seconds
        weight *= 1 - self._fade * min(1.0, max(0.0, age))
        # What presses, what shapes the system and what was asked about does not fade.
        weight += 0.3 * (state == "open")
        weight += 0.7 * URGENCY.get((event.priority or "").strip()[:20].casefold(), 0)
        if self._structural and role in ("change", "pull"):
            schema = any(SCHEMA_FILE.search(path[:300]) for path in files)
            weight += 1.5 * (schema or bool(STRUCTURAL.search(title)))
        if self._asked:
            near = words(f"{title} {' '.join(files[:8])}".replace("/", " ").replace("_", " "))
            weight += 2.5 * len(near & self._asked) / len(self._asked)
        return weight


def _keys(event: Event, metadata: Mapping[str, Any], role: str, body: str) -> tuple[str, ...]:
    """References that tie the event to others: its own, its request, its branch, its talk."""
    merge = MERGE_PR.match(event.title[:300])
    number = merge[1] if merge else number_at_end(event.title[:300], role)
    for name in ("pull_request", "merge_request"):
        if type(value := metadata.get(name)) is int:
            number = str(value)
    own = own_of(event, metadata, role)
    pull = pull_of(event, role, own, number)
    keys = dict.fromkeys(mentions(event, body, own, pull)[0])
    for branch in (event.branch, head_branch(event) or (merge and merge[2])):
        if not branch or branch.casefold() in TRUNKS:
            continue
        keys.update((key, None) for key in branch_tickets(branch))
        if role in ("change", "pull"):
            keys[f"{event.resource} {branch.rpartition('/')[2]}"[:300]] = None
    for name in ("thread_ts", "thread_id", "thread"):
        if isinstance(value := metadata.get(name), str) and value:
            keys[f"{event.resource} {value}"[:300]] = None
    return tuple(keys)


def _threads(weighed: Sequence[Weighed]) -> list[Thread]:
    """Tie the events that share a reference which not everybody uses."""
    users: dict[str, list[int]] = defaultdict(list)
    for at, item in enumerate(weighed):
        for key in item.keys:
            users[key].append(at)
    ties = [(by, key) for key, by in users.items() if 1 < len(by) <= HUB]
    groups = _Groups(len(weighed))
    for by, _ in ties:
        for at in by[1:]:
            groups.join(by[0], at)
    members: dict[int, list[Weighed]] = defaultdict(list)
    for at, item in enumerate(weighed):
        members[groups.first(at)].append(item)
    names: dict[int, list[str]] = defaultdict(list)
    for by, key in ties:
        names[groups.first(by[0])].append(key)
    return [Thread(tuple(items), tuple(names[at])) for at, items in members.items()]


class _Groups:
    """Numbers in groups of at most THREAD_MAX, each known by its first."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))
        self._sizes = [1] * count

    def first(self, at: int) -> int:
        above = self._above
        while above[at] != at:
            above[at] = above[above[at]]
            at = above[at]
        return at

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self.first(one), self.first(other)))
        if one != other and self._sizes[one] + self._sizes[other] <= THREAD_MAX:
            self._above[other] = one
            self._sizes[one] += self._sizes[other]


def _score(thread: Thread, across: float) -> float:
    """A thread is worth its best event, something for the others and for every further source."""
    weights = sorted((member.weight for member in thread.members), reverse=True)
    sources = {member.event.source for member in thread.members}
    return weights[0] + 0.15 * sum(weights[1:6]) + across * (len(sources) - 1)
