"""The parts of a system, ranked by what happened in them and by what somebody asked about."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from app.schemas import Area
from tasks.changes import ORDER, Change, lasting, signals_behind
from tasks.lines import line, words
from tasks.paths import SIDE_AREAS
from tasks.reading import Reading
from tasks.statements import count, ids_of, listed

KIND_WORDS = {
    "feature": ("feature", "features"), "fix": ("fix", "fixes"),
    "security": ("security change", "security changes"), "removal": ("removal", "removals"),
    "performance": ("performance change", "performance changes"),
    "deprecation": ("deprecation", "deprecations"), "refactor": ("refactoring", "refactorings"),
}  # fmt: skip
ASKING = words("what how why does do system code team new member role area parts happens work")


def relevance_of(reading: Reading, asked: str) -> Callable[[str], float]:
    """How much of what was asked a text speaks about, between 0 and 1; rare words weigh more."""
    wanted = words(asked) - ASKING
    common = Counter(word for change in reading.changes for word in words(change.text) & wanted)
    weights = {word: 1 / (1 + common[word]) for word in wanted}
    total = sum(weights[word] for word in sorted(wanted))

    def relevance(text: str) -> float:
        found = wanted & words(text.replace("/", " ").replace("_", " "))
        return sum(weights[word] for word in sorted(found)) / total if found else 0.0

    return relevance


def ranked_areas(
    reading: Reading, boost: Callable[[str, str], float]
) -> list[tuple[str, list[Change]]]:
    """Areas with their changes, most active first; what was asked for comes before."""
    changes: dict[str, list[Change]] = defaultdict(list)
    for change in reading.changes:
        if not change.minor:
            for name in change.areas:
                changes[name].append(change)

    def rank(name: str) -> tuple[float, str]:
        text = " ".join(change.text for change in changes[name][:40])
        side = 0.2 if name in SIDE_AREAS else 1.0
        # A change counts in full where most of it happened and by half elsewhere.
        total = sum(c.score * (1.0 if c.areas[0] == name else 0.5) for c in changes[name])
        return (-(side * total * (1 + boost(name, text))), name)

    return [(name, changes[name]) for name in sorted(changes, key=rank)]


def area_of(name: str, changes: Sequence[Change], more: str = "") -> Area:
    """What happened in an area, by whom, and the change that touched it most."""
    people = Counter(person for change in changes for person in change.people)
    kinds = Counter(change.kind for change in changes)
    counted = [
        count(kinds[kind], *KIND_WORDS[kind])
        for kind in ORDER
        if kinds[kind] and kind in KIND_WORDS
    ]
    text = count(len(changes), "change")
    text += f" ({listed(counted, 3)})" if counted and len(changes) > 1 else ""
    text += f" by {listed([person for person, _ in people.most_common()], 3)}" if people else ""
    text += more
    if len(changes) == 1:
        text += f": {line(changes[0].told if changes[0].undone else changes[0].text, 110)}"
    elif stand := lasting(changes):
        best = max(stand, key=lambda change: (change.areas[0] == name, change.score))
        text += f". Largest: {line(best.text, 110)}"
    return Area(name=name, text=line(text, 300), event_ids=ids_of(signals_behind(changes)))
