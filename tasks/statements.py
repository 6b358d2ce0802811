"""Statements: sentences with the ids of the events behind them, merged when they say the same.

Also the few words that all artifacts put around facts: counts, lists, days.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime

from app.schemas import Statement
from tasks.kinds import kind_of_verb
from tasks.lines import words
from tasks.signals import Signal

SIMILAR = 0.8  # share of common words from which two lines say the same
CANDIDATES = 40  # earlier lines that one line is compared with
DIGIT = re.compile(r"\d")  # "part 1" is not "part 2"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def stated(text: str, read: Iterable[Signal]) -> Statement:
    """A sentence with the ids of the events that it was made from."""
    return Statement(text=text, event_ids=ids_of(read))


def ids_of(read: Iterable[Signal]) -> list[str]:
    """Ids of events, once each; duplicates that were folded into an event are cited too."""
    return list(dict.fromkeys(event_id for signal in read for event_id in signal.event.ids))


class Seen:
    """Lines seen so far, indexed by word, so that looking for a duplicate stays cheap."""

    def __init__(self) -> None:
        self._bags: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> int:
        """Remember a line; the answer is the place at which `find` will find it."""
        bag, place = words(text), len(self._bags)
        for word in bag:
            self._index[word].append(place)
        self._bags.append(bag)
        return place

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


def merged(statements: Iterable[Statement], seen: Seen) -> list[Statement]:
    """Statements without near-duplicates; the first keeps its words and gets the others' ids."""
    kept: dict[int, Statement] = {}
    for statement in statements:
        if not statement.text or not statement.event_ids:
            continue
        at = seen.find(statement.text)
        if at is None:
            kept[seen.add(statement.text)] = statement
        elif at in kept:
            ids = list(dict.fromkeys((*kept[at].event_ids, *statement.event_ids)))
            kept[at] = kept[at].model_copy(update={"event_ids": ids})
    return list(kept.values())


def count(number: int, one: str, many: str = "") -> str:
    """As in "1 change" and "2 people"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """As in "a, b and c", or "a, b and 3 more"."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def day_of(moment: datetime) -> str:
    """As in "2 Mar"."""
    return f"{moment.day} {MONTHS[moment.month - 1]}"


def period_of(moments: Sequence[datetime]) -> str:
    """As in "2 to 9 Mar 2026": nothing that both ends share is said twice."""
    first, last = min(moments), max(moments)
    if first.date() == last.date():
        return f"{day_of(last)} {last.year}"
    start = f"{first.day}"
    if (first.year, first.month) != (last.year, last.month):
        start = day_of(first) if first.year == last.year else f"{day_of(first)} {first.year}"
    return f"{start} to {day_of(last)} {last.year}"


def raised(text: str) -> str:
    """First letter as a capital, unless the first word is code or a name."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if re.fullmatch(r"[a-z][a-z'-]*[,:]?", first) else text


def lowered(text: str) -> str:
    """First letter small inside a sentence, unless the first word is a name or all capitals."""
    first = text.split(" ", 1)[0]
    known = kind_of_verb(first.casefold())
    return text[:1].lower() + text[1:] if known and first[1:].islower() else text
