"""What a model reads about the events: compact text with short ids, never more than its budget.

Pure. The one rule: only this file opens a line with an id in brackets. What events say is
indented, and what looks like such an id in it is altered, so no event can speak for another.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.context import Context, Event
from tasks.cues import TRAILER
from tasks.lines import ANSI, BLOB, CONTROLS, strings, uncommented
from tasks.selection import TRIFLE, ranked_threads
from tasks.tokens import estimate_tokens

MIN_BUDGET = 1_000  # tokens; less holds too few events of any length
HEADER_TOKENS = 200  # kept for the first line of a brief
BREADTH = 0.7  # share of a budget that names many events before any of them is quoted
LINE_TOKENS = 120  # that name an event, however long its title is
TIES_TOKENS = 40  # that name what ties a thread
TITLE_MAX = 200  # characters
EXCERPTS = (200, 600, 1_600, 4_000)  # characters of a body, step by step while there is room
FILES = (4, 12)  # paths that are named for a change, at the first step and later
CUT = " [cut]"
MAIN = frozenset(("main", "master"))  # branches that go without saying
# Invisible, and so able to tell a model what no person sees: soft hyphens, fillers, tags,
# variation selectors.
HIDDEN = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180e\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0000-\U000e0fff]"
)
# What would read as one of the ids: `e12` as a word, and in brackets in any case or script.
OWN_ID = re.compile(r"e(?<![^\W_]e)(?=\d{1,9}(?![^\W_]))")
BRACKETED_ID = re.compile(
    r"[\[(\uff08\uff3b\u3010\u3014]\s{0,9}[eE\u0415\u0435\uff25\uff45](?=\s{0,9}\d)"
)
# What chat templates of open models read as the end of the data.
TEMPLATE = re.compile(
    r"<(?=[|\uff5c]|/?s>|</?SYS>|/?(?:start|end)_of_turn>|/?think>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])",
    re.I,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """What one call of a model reads about the events."""

    text: str  # events that belong together stand together; a short id opens each: [e1]
    ids: Mapping[str, tuple[str, ...]]  # short id, as e1 -> ids of the event and its duplicates
    tokens: int  # a safe estimate: no tokenizer makes more of the text


def write_briefs(context: Context, budget: int, *, parts: int = 6) -> list[Brief]:
    """The events of a context, the most telling ones when there is no room for all.

    One brief when it can name all that matters; else several, whose drafts are to be put
    together. Threads stay in one brief, an event is in one at most, and short ids count through.

    Args:
        budget: tokens of one brief by `estimate_tokens`.
        parts: briefs at most.

    Raises:
        ValueError: a budget below MIN_BUDGET, or less than one part.
    """
    if budget < MIN_BUDGET or parts < 1:
        raise ValueError(f"a brief needs {MIN_BUDGET} tokens, and one part at least")
    blocks = _blocks(context)
    worth = sum(e.cost for block in blocks for e in block.entries if e.weight >= TRIFLE)
    room = budget - HEADER_TOKENS
    count = min(parts, max(1, math.ceil(worth / (room * BREADTH))))
    filled = _packed(_chosen(blocks, count, room), count, room)
    briefs: list[Brief] = []
    number = 0
    for at, part in enumerate(filled, 1):
        _quote(part, room)
        place = f" Part {at} of {len(filled)}." if len(filled) > 1 else ""
        text, ids = _written(context, part, number, place)
        briefs.append(Brief(text=text, ids=ids, tokens=estimate_tokens(text)))
        number += len(ids)
    return briefs


@dataclass(slots=True)
class _Entry:
    """An event on its way into a brief."""

    event: Event
    weight: float
    line: str  # names the event; stands behind its short id
    cost: int  # tokens of the line
    quoted: str = ""  # what stands below the line
    body: str | None = None  # cleaned when it is first quoted


@dataclass(frozen=True, slots=True)
class _Block:
    """The events of one thread, newest first."""

    rank: int  # 0 matters most
    head: str  # what ties them
    entries: Sequence[_Entry]

    @property
    def cost(self) -> int:
        """Tokens while nothing is quoted."""
        return estimate_tokens(f"{self.head}\n") + sum(entry.cost for entry in self.entries)


def _blocks(context: Context) -> list[_Block]:
    """The threads of the context, the one that matters most first, each event named."""
    blocks: list[_Block] = []
    ranked = context.threads or ranked_threads(context.kind, context.options, context.events)
    for thread in ranked:
        entries = []
        for member in thread.members:
            line = _line(member.event)
            cost = estimate_tokens(f"[e9999] {line}\n")
            entries.append(_Entry(member.event, member.weight, line, cost))
        ties = [_plain(key, 60) for key in thread.keys if " " not in key][:3]
        head = f"\nThread {', '.join(ties)}".rstrip() + "\n" if len(entries) > 1 else ""
        head = head if _fits(head, TIES_TOKENS) else "\nThread\n"
        blocks.append(_Block(len(blocks), head, entries))
    return blocks


def _line(event: Event) -> str:
    """When, where, who and what, in one line of bounded length."""
    where = _plain(event.resource or "", 60)
    branch = event.branch or ""
    branch = f"@{_plain(branch, 40)}" if branch and branch not in MAIN else ""
    author = _plain((event.author or "").partition("<")[0], 40)
    priority = _plain(event.priority or "", 16)
    about = "".join(
        (
            f"{event.occurred_at:%m-%d %H:%M} {event.source} {_plain(event.event_type, 40)}",
            f" {where}{branch}" if where or branch else "",
            f" by {author}" if author else "",
            f", priority {priority}" if priority else "",
            f", {len(event.ids)} times" if event.folded else "",
        )
    )
    if not _fits(about, LINE_TOKENS * 2 // 3):  # nobody's names: source and time will do
        about = f"{event.occurred_at:%m-%d %H:%M} {_plain(event.source, 16)}"
    left = LINE_TOKENS - estimate_tokens(about)
    length = TITLE_MAX
    title = _plain(event.title, length)
    while not _fits(title, left) and length > 1:
        length = length * 2 // 3
        title = _plain(event.title, length)
    return f"{about}: {title}"


def _chosen(blocks: Sequence[_Block], count: int, room: int) -> list[_Block]:
    """The blocks that are named, best first; of one that is too big, its best events.

    None takes more of a brief than is left when the others are named, so each finds a place.
    """
    kept: list[_Block] = []
    left = int(count * room * BREADTH)
    most = int(room * (1 - BREADTH))
    for block in blocks:
        if block.cost > min(left, most):
            spare = min(left, most) - estimate_tokens(f"{block.head}\n")
            fitting = set()
            for entry in sorted(block.entries, key=lambda entry: -entry.weight):
                if entry.cost <= spare:
                    spare -= entry.cost
                    fitting.add(entry.event.id)
            some = [entry for entry in block.entries if entry.event.id in fitting]
            block = _Block(block.rank, block.head, some)
        if block.entries:
            kept.append(block)
            left -= block.cost
    return kept


def _packed(blocks: Sequence[_Block], count: int, room: int) -> list[list[_Block]]:
    """The blocks in parts of about the same size, newest first, threads in one piece."""
    share = sum(block.cost for block in blocks) / count
    parts: list[list[_Block]] = [[] for _ in range(count)]
    spent = [0] * count
    at = 0
    for block in sorted(blocks, key=lambda block: block.entries[0].event.occurred_at, reverse=True):
        if at < count - 1 and spent[at] + block.cost / 2 > share:
            at += 1
        place = next(n for n in (at, *range(count)) if spent[n] + block.cost <= room)
        parts[place].append(block)
        spent[place] += block.cost
    return [part for part in parts if part]


def _quote(part: Sequence[_Block], room: int) -> None:
    """Spend what is left of the room on bodies: a little of many first, then more of the best."""
    room -= sum(block.cost for block in part)
    open_ = [
        entry
        for block in sorted(part, key=lambda block: block.rank)
        for entry in sorted(block.entries, key=lambda entry: -entry.weight)
    ]
    for step in range(len(EXCERPTS)):
        growing = []
        for entry in open_:
            quoted = _excerpt(entry, step)
            more = estimate_tokens(quoted) - estimate_tokens(entry.quoted)
            if quoted != entry.quoted and more <= room:
                entry.quoted = quoted
                room -= more
            if len(entry.body or "") > EXCERPTS[step]:
                growing.append(entry)
        open_ = growing


def _excerpt(entry: _Entry, step: int) -> str:
    """What an event touched and the head of what it says, indented below its line."""
    if entry.body is None:
        entry.body = _body(entry.event)
    files = strings(entry.event.metadata.get("files"))
    most = FILES[step > 0]
    paths = ", ".join(_plain(path, 80) for path in files[:most])
    more = f" and {len(files) - most} more" if len(files) > most else ""
    lines = [f"files: {paths}{more}"] if files else []
    if entry.body:
        lines += _altered(_cut(entry.body, EXCERPTS[step])).split("\n")
    return "".join(f"  {line}\n" for line in lines)


def _body(event: Event) -> str:
    """The content without what nobody reads: controls, comments, trailers, blobs, blank lines."""
    text = (event.content or "")[: 2 * EXCERPTS[-1]]
    text = HIDDEN.sub("", CONTROLS.sub("", ANSI.sub("", text))).replace("\r", "\n")
    if "<!--" in text:
        text = uncommented(text)
    lines = []
    for raw in text.split("\n"):
        line = " ".join(raw.split())
        if line and not TRAILER.match(line[:200]):
            lines.append(BLOB.sub("\u2026", line) if len(line) > 80 else line)
    if lines and lines[0] == " ".join(event.title.split()):
        del lines[0]
    return "\n".join(lines)


def _written(
    context: Context, part: Sequence[_Block], number: int, place: str
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The text of a brief and what its short ids stand for."""
    entries = [entry for block in part for entry in block.entries]
    total = len(context.events) + context.omitted
    times = sorted(entry.event.occurred_at for entry in entries)
    counts = Counter(entry.event.source for entry in entries)
    sources = ", ".join(f"{_plain(name, 30)} {n}" for name, n in counts.most_common(6))
    head = (
        f"{len(entries)} of {total} events, {times[0]:%Y-%m-%d} to {times[-1]:%Y-%m-%d},"
        f" times in UTC.{place}"
    )
    named = f"{head} Sources: {sources}.\n"
    lines = [named if _fits(named, HEADER_TOKENS) else f"{head}\n"]
    ids: dict[str, tuple[str, ...]] = {}
    for block in part:
        lines.append(block.head)
        for entry in block.entries:
            name = f"e{number + len(ids) + 1}"
            ids[name] = entry.event.ids
            lines.append(f"[{name}] {entry.line}\n{entry.quoted}")
        lines.append("\n" if block.head else "")
    return "".join(lines), ids


def _plain(text: str, limit: int) -> str:
    """Foreign text on one line, cut, and unable to pass for anything of ours."""
    text = text[: 4 * limit]
    if not text.isprintable():
        text = CONTROLS.sub(" ", ANSI.sub("", text))
    if not text.isascii():
        text = HIDDEN.sub("", text)
    return _altered(_cut(" ".join(text.split()), limit))


def _cut(text: str, limit: int) -> str:
    """The head of a text, up to a word's end where there is one, and marked."""
    if len(text) <= limit:
        return text
    kept = text[:limit]
    space = max(kept.rfind(" "), kept.rfind("\n"))
    return (kept[:space] if space > limit // 2 else kept) + CUT


def _altered(text: str) -> str:
    """The text without what a model could take for a short id or for the end of the data."""
    text = BRACKETED_ID.sub(lambda found: f"{found[0]}-", OWN_ID.sub("e-", text))
    return TEMPLATE.sub(lambda found: f"{found[0]} ", text)


def _fits(text: str, tokens: int) -> bool:
    return estimate_tokens(text) <= tokens
