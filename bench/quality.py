"""How close do the built-in release notes come to what maintainers wrote themselves?

    python bench/quality.py [data directory]

For every release in the data set the notes are composed from the commits alone and compared
with the human changelog. A human item is covered when a produced item names one of its numbers
(`#12`) or shares enough words with it; precision asks the same the other way round. Two plain
lists stand beside it: all commit subjects, and as many non-merge subjects as the maintainers
wrote items. Tuning and reporting use different repositories.
"""

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.schemas import ReleaseNotesDraft  # noqa: E402  (the path has to be set first)
from tasks.context import Context, Event, fold  # noqa: E402
from tasks.extractive import NothingToSay, extract  # noqa: E402

SPLITS = {"tune": ("httpx", "healthchecks", "datasette"), "report": ("river", "starlette", "llm")}
OVERLAP = 0.5  # share of the shorter item's words that must occur in the other
COMMON = 2  # and at least so many of them, so that one word is no match
NUMBER = re.compile(r"(?:#|\()(\d{1,6})\b")
WORD = re.compile(r"[^\W_]{3,}")
STOP = frozenset(("the", "and", "for", "with", "from", "that", "this", "when", "now", "not", "are"))


def main(arguments: Sequence[str]) -> int:
    """Print one table; 2 when the data is not there."""
    folder = Path(arguments[0]) if arguments else ROOT.parent / "shared" / "data" / "changelogs"
    files = [f"{name}.jsonl" for names in SPLITS.values() for name in names]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        print(f"no data: {folder} lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    print(f"match: a shared #number, or >= {COMMON} words and >= {OVERLAP:.0%} of the shorter item")
    print("rec: human items covered; prec: items that match one; n: items per release\n")
    ways = "".join(f" {name:>20}" for name in ("extractive", "all subjects", "first N subjects"))
    print(f"{'':8}{'':14}{'human':>6}{ways}")
    print(f"{'split':8}{'repository':14}{'items':>6} " + f"{'rec  prec    F1    n':>20} " * 3)
    for split, names in SPLITS.items():
        totals: list[list[float]] = []
        for name in names:
            row = measured([json.loads(text) for text in (folder / f"{name}.jsonl").open()])
            totals.append(row)
            print(f"{split:8}{name:14}{shown(row)}")
        mean = [sum(column) / len(totals) for column in zip(*totals, strict=True)]
        print(f"{split:8}{'mean':14}{shown(mean)}\n")
    return 0


def measured(releases: Sequence[dict[str, Any]]) -> list[float]:
    """Human items per release, then recall, precision, F1 and length of the three lists."""
    ways = (produced, all_subjects, first_subjects)
    found = [[0, 0, 0] for _ in ways]  # covered human items, matching items, items
    human = 0
    for release in releases:
        human += len(release["changelog"])
        for counts, way in zip(found, ways, strict=True):
            items = way(release)
            counts[0] += sum(
                any(matches(item, text) for item in items) for text in release["changelog"]
            )
            counts[1] += sum(
                any(matches(item, text) for text in release["changelog"]) for item in items
            )
            counts[2] += len(items)
    row = [human / len(releases)]
    for covered, right, number in found:
        recall, precision = covered / max(1, human), right / max(1, number)
        both = 2 * recall * precision / (recall + precision) if right else 0.0
        row += [recall, precision, both, number / len(releases)]
    return row


def produced(release: dict[str, Any]) -> list[str]:
    """The items of the composed notes; internal fallbacks count like any other."""
    try:
        draft = extract(context_of(release, "release_notes"))
    except NothingToSay:
        return []
    assert isinstance(draft, ReleaseNotesDraft)
    return [item.text for section in draft.sections for item in section.items]


def all_subjects(release: dict[str, Any]) -> list[str]:
    return [commit["subject"] for commit in release["commits"]]


def first_subjects(release: dict[str, Any]) -> list[str]:
    """As many non-merge subjects as the maintainers wrote items, newest first."""
    plain = [commit["subject"] for commit in release["commits"] if not commit["merge"]]
    return plain[: len(release["changelog"])]


def context_of(release: dict[str, Any], kind: str) -> Context:
    """The commits of a release as the events that a git import would make of them."""
    events = fold(
        Event(
            id=commit["sha"],
            source="github",
            event_type="merge" if commit["merge"] else "commit",
            title=commit["subject"] or "(no subject)",
            content=commit["body"] or None,
            author=commit["author"],
            external_id=commit["sha"],
            resource=release["repo"],
            occurred_at=datetime.fromisoformat(commit["date"]),
            metadata={"files": commit["files"]},
        )
        for commit in release["commits"]
    )
    name = str(release["repo"]).rpartition("/")[2]
    moments = [event.occurred_at for event in events]
    return Context(
        kind=kind, project_name=name, since=min(moments), until=max(moments), events=events
    )


def matches(one: str, other: str) -> bool:
    """Whether two items speak of the same change."""
    if set(NUMBER.findall(one)) & set(NUMBER.findall(other)):
        return True
    left, right = bag(one), bag(other)
    common = len(left & right)
    return common >= COMMON and common >= OVERLAP * min(len(left), len(right))


def bag(text: str) -> frozenset[str]:
    """Words without endings, so that `Fixes` and `fixed` agree."""
    found = (re.sub(r"(?:ing|ed|es|s)$", "", word) for word in WORD.findall(text.casefold()))
    return frozenset(word for word in found if word not in STOP)


def shown(row: Sequence[float]) -> str:
    cells = [f"{row[0]:6.1f}"]
    for at in range(1, len(row), 4):
        recall, precision, both, number = row[at : at + 4]
        cells.append(f"{recall:7.2f}{precision:5.2f}{both:5.2f}{number:5.1f}"[2:].rjust(20))
    return " ".join(cells)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
