"""When two texts speak of one change, and the scores that follow from it. Deterministic."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

RULE = (
    "two items match if they name the same #number and share a word, or if they share at least two "
    "words and three fifths of those of the shorter; one to one, the largest such assignment"
)
GROUNDED = 0.6  # share of a statement's words that its events have to hold

NUMBER = re.compile(r"#(\d{1,6})\b")
NUMBERS = re.compile(r"\(((?:#?\d{1,6}(?:,\s?)?)+)\)")  # also "(2787, 2788)", without the marks
WORD = re.compile(r"\d+(?:\.\d+)+|(?!\d+\b)[^\W_]{2,}")
ENDING = re.compile(r"(?:ing|ed|es|s|e)$")
# Words that every change has in common, so that sharing them proves nothing.
STOP = frozenset(
    re.findall(
        r"\w+",
        "the and for with from that this when now not are is be to of in on by as at an or it if "
        "so we our you your has have can also only more than then into per via use using used was "
        "were will all any new add added adding fix fixed fixes update updated updates change "
        "changed changes remove removed make makes improve improved support allow closes close "
        "refs ref pull request merge merged",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Lists of items against what people wrote: counts, so that many lists add up."""

    human: int = 0  # human items
    items: int = 0  # items of the lists
    matched: int = 0  # pairs of the assignment
    repeats: int = 0  # items that say what an earlier one of their list says
    words: int = 0  # of all items, as a reader counts them
    statements: int = 0  # all that the artifacts say, not only their items
    grounded: int = 0  # those that their events support
    lists: int = 0

    def __add__(self, other: "Scores") -> "Scores":
        names = (field.name for field in fields(self))
        return Scores(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def recall(self) -> float:
        """Share of the human items that are matched."""
        return self.matched / max(1, self.human)

    @property
    def precision(self) -> float:
        """Share of the items that match one."""
        return self.matched / max(1, self.items)

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        return 2 * self.matched / max(1, self.human + self.items)

    @property
    def redundancy(self) -> float:
        """Share of the items that repeat another."""
        return self.repeats / max(1, self.items)

    @property
    def grounding(self) -> float:
        """Share of the statements that their events support."""
        return self.grounded / max(1, self.statements)

    @property
    def length(self) -> float:
        """Items in a list."""
        return self.items / max(1, self.lists)

    @property
    def wordy(self) -> float:
        """Words in an item."""
        return self.words / max(1, self.items)


def scores(items: Sequence[str], human: Sequence[str]) -> Scores:
    """Judge a list of items by what the maintainers wrote."""
    return Scores(
        human=len(human),
        items=len(items),
        matched=assigned(items, human),
        repeats=sum(any(matches(item, b) for b in items[:at]) for at, item in enumerate(items)),
        words=sum(len(item.split()) for item in items),
    )


def assigned(items: Sequence[str], human: Sequence[str]) -> int:
    """The most pairs that match when no item is in two of them, so that none can stand for five."""
    near = [[at for at, text in enumerate(human) if matches(item, text)] for item in items]
    taken: dict[int, int] = {}  # human item -> item

    def places(item: int, tried: set[int]) -> bool:
        """Find the item a partner, moving earlier ones to another where that helps."""
        for at in near[item]:
            if at not in tried:
                tried.add(at)
                if at not in taken or places(taken[at], tried):
                    taken[at] = item
                    return True
        return False

    return sum(places(item, set()) for item in range(len(items)))


def matches(one: str, other: str) -> bool:
    """Whether two texts speak of one change, as RULE says."""
    left, right = words(one), words(other)
    common = len(left & right)
    if common and numbers(one) & numbers(other):
        return True
    return common >= 2 and 5 * common >= 3 * min(len(left), len(right))


def supported(text: str, ids: Sequence[str], events: Mapping[str, str]) -> bool:
    """Whether the cited events exist and hold most words of the statement.

    Args:
        events: all that an event says, by its id.
    """
    if not ids or not all(event_id in events for event_id in ids):
        return False
    told = words(text)
    held = words(" ".join(events[event_id] for event_id in ids))
    return len(told & held) >= GROUNDED * len(told)


def numbers(text: str) -> frozenset[str]:
    """The issues and requests that a text names."""
    listed = [number for group in NUMBERS.findall(text) for number in re.findall(r"\d+", group)]
    return frozenset((*NUMBER.findall(text), *listed))


def words(text: str) -> frozenset[str]:
    """The words that tell one change from another, without endings."""
    found = (word for word in WORD.findall(text.casefold()) if word not in STOP)
    return frozenset(ENDING.sub("", word) if len(word) > 4 else word for word in found)
