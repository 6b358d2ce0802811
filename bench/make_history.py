"""Write a large git repository that reads like years of a team's work.

    python bench/make_history.py PATH --commits 50000 --seed 7

The one rule: the same arguments (with --until) give the same commit ids on every machine, so two
measurements are of the same thing. Everything goes to a single `git fast-import`.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

PEOPLE = (
    ("Amara Okafor", "amara@example.com"),
    ("Jonas Lindqvist", "jonas@example.com"),
    ("Mei Tanaka", "mei@example.com"),
    ("Rafael Souza", "rafael@example.com"),
    ("Priya Nair", "priya@example.com"),
    ("Tomáš Dvořák", "tomas@example.com"),
    ("Zoë Martin", "zoe@example.com"),
    ("Sam Whitfield", "sam@example.com"),
)
BOT = ("dependabot[bot]", "bot@example.com")
AREAS = {
    "api": ("pagination", "rate limits", "error bodies", "the events route", "request ids"),
    "auth": ("session refresh", "API keys", "SSO login", "password reset", "role checks"),
    "billing": ("invoices", "proration", "the usage meter", "tax rounding", "refunds"),
    "db": ("the jobs index", "vacuum settings", "the migration lock", "connection reuse"),
    "search": ("ranking", "typo tolerance", "the nightly reindex", "facet counts"),
    "web": ("the timeline", "dark mode", "keyboard navigation", "empty states", "the sidebar"),
    "worker": ("retries", "lease renewal", "graceful shutdown", "the dead letter queue"),
    "ci": ("the release job", "test sharding", "the build cache"),
    "docs": ("the quick start", "the upgrade guide", "webhook examples"),
}
VERBS = {
    "feat": ("add", "support", "allow filtering of", "show progress for", "expose"),
    "fix": ("correct", "stop losing", "handle timeouts in", "do not retry", "repair"),
    "perf": ("speed up", "cache", "batch"),
    "refactor": ("extract", "simplify", "rename parts of", "move"),
    "test": ("cover", "deflake", "pin down"),
    "chore": ("tidy", "remove unused parts of", "update"),
}
BODIES = (
    "Customers on large accounts saw this every Monday, when {thing} ran cold.",
    "Decision: {thing} stays synchronous for now; a queue would only hide the slow query.",
    "Decision: we keep one Postgres for everything and revisit {area} at ten times the load.",
    "Question: should {thing} also apply to archived projects?",
    "Open question: who owns {area} after the team split?",
    "TODO: remove the old path for {thing} once the mobile app has caught up.",
    "TODO(next sprint): measure {thing} again with production data.",
    "The cause was a race between two workers; the second one overwrote {thing}.",
    "We considered a feature flag, but {area} has only one caller.",
)
PACKAGES = ("httpx", "uvicorn", "pydantic", "asyncpg", "react", "vite", "typescript", "ruff")
GAP = 1_700  # seconds between commits on average: a team of eight, around the clock


@dataclass
class Writer:
    """The state of one run: what was written, and what later commits refer to."""

    out: IO[bytes]
    answers: IO[bytes]
    chance: random.Random
    when: int
    end: int
    total: int
    mark: int = 0
    number: int = 100  # of the latest pull request
    main: int = 0  # mark of the newest commit on main
    paths: dict[str, list[str]] = field(default_factory=lambda: {area: [] for area in AREAS})
    landed: list[tuple[int, str]] = field(default_factory=list)  # lately, to revert or to tag


def main() -> None:
    arguments = _arguments()
    path: Path = arguments.path
    if path.exists() and any(path.iterdir()):
        sys.exit(f"{path} exists and is not empty")
    subprocess.run(["git", "init", "-q", "-b", "main", "--", os.path.abspath(path)], check=True)
    end = int(arguments.until.timestamp()) if arguments.until else int(time.time())
    command = ["git", "-C", os.path.abspath(path), "fast-import", "--quiet", "--done"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        chance = random.Random(arguments.seed)
        start = end - GAP * arguments.commits
        writer = Writer(child.stdin, child.stdout, chance, start, end, arguments.commits)
        _write(writer)
        child.stdin.write(b"done\n")
    if child.returncode:
        sys.exit("git fast-import failed")
    subprocess.run(["git", "-C", os.path.abspath(path), "reset", "-q", "--hard"], check=True)
    print(f"{path}: {writer.mark} commits, {writer.number - 100} pull requests")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--commits", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--until", type=lambda day: datetime.fromisoformat(day).replace(tzinfo=UTC), metavar="DAY"
    )
    return parser.parse_args()


def _write(writer: Writer) -> None:
    """Tell the story until the commits are used up."""
    release = 0
    for area in AREAS:
        if writer.mark < writer.total:
            _land(writer, f"Start {area}", PEOPLE[0], area)
    while (left := writer.total - writer.mark) > 0:
        draw = writer.chance.random()
        if draw < 0.16 and left > 5:
            _pull_request(writer)
        elif draw < 0.24:
            _bump(writer)
        elif draw < 0.26 and writer.landed:
            _revert(writer)
        elif draw < 0.50:
            _squashed(writer)
        else:
            _plain(writer)
        if writer.mark // 250 > release:
            release = writer.mark // 250
            _tag(writer, release)


def _plain(writer: Writer) -> None:
    kind, area, thing, title = _work(writer)
    if writer.chance.random() < 0.6:
        title = f"{kind}({area}): {title}"
    else:
        title = title[0].upper() + title[1:]
    _land(writer, title + _body(writer, area, thing), writer.chance.choice(PEOPLE), area)


def _squashed(writer: Writer) -> None:
    kind, area, thing, title = _work(writer)
    writer.number += 1
    title = f"{kind}({area}): {title} (#{writer.number})"
    _land(writer, title + _body(writer, area, thing), writer.chance.choice(PEOPLE), area)


def _bump(writer: Writer) -> None:
    package = writer.chance.choice(PACKAGES)
    major, minor, patch = (writer.chance.randrange(9) for _ in range(3))
    writer.number += 1
    title = f"Bump {package} from {major}.{minor}.{patch} to {major}.{minor}.{patch + 1}"
    body = f"\n\nBumps [{package}](https://example.com/{package}).\n\nSigned-off-by: {BOT[0]}"
    _land(writer, f"{title} (#{writer.number}){body}", BOT, "ci", {"requirements.lock"})


def _revert(writer: Writer) -> None:
    mark, title = writer.chance.choice(writer.landed)
    _put(writer, f"get-mark :{mark}")
    writer.out.flush()
    sha = writer.answers.readline().decode().strip()
    message = f'Revert "{title}"\n\nThis reverts commit {sha}.\n\nIt broke the nightly import.'
    _land(writer, message, writer.chance.choice(PEOPLE), "worker")


def _pull_request(writer: Writer) -> None:
    """A branch of one to four commits; meanwhile main may move on; then the merge."""
    kind, area, thing, title = _work(writer)
    author = writer.chance.choice(PEOPLE)
    writer.number += 1
    tip, touched = writer.main, set[str]()
    for step in range(writer.chance.randint(1, 4)):
        message = title if not step else f"{title}: part {step + 1}"
        paths = _paths(writer, area)
        touched |= paths
        tip = _commit(writer, "refs/heads/pull", message, author, [tip], paths)
    _put(writer, "reset refs/heads/pull")
    if writer.chance.random() < 0.4 and writer.total - writer.mark > 1:
        _plain(writer)
    owner = author[1].partition("@")[0]
    branch = f"{owner}/{kind}-{thing.replace(' ', '-').lower()}"
    message = f"Merge pull request #{writer.number} from {branch}\n\n{title[0].upper()}{title[1:]}"
    message += _body(writer, area, thing)
    parents = [writer.main, tip]
    writer.main = _commit(writer, "refs/heads/main", message, author, parents, touched)


def _tag(writer: Writer, release: int) -> None:
    name = f"v{release // 20}.{release % 20}.0"
    if release % 5 == 0:  # a bare label now and then
        _put(writer, f"reset refs/tags/{name}", f"from :{writer.main}", "")
        return
    lines = "\n".join(f"- {title}" for _, title in writer.landed[-8:])
    _put(writer, f"tag {name}", f"from :{writer.main}")
    _put(writer, "tagger {} <{}> {} +0000".format(*PEOPLE[1], writer.when))
    _data(writer, f"Release {name}\n\n{lines}\n")


# --- Words ---------------------------------------------------------------------------------


def _work(writer: Writer) -> tuple[str, str, str, str]:
    """Kind, area, thing and title of one piece of work."""
    kind = writer.chance.choices(tuple(VERBS), (5, 6, 2, 3, 2, 2))[0]
    area = writer.chance.choice(tuple(AREAS))
    thing = writer.chance.choice(AREAS[area])
    return kind, area, thing, f"{writer.chance.choice(VERBS[kind])} {thing}"


def _body(writer: Writer, area: str, thing: str) -> str:
    """Half of all messages have none; the rest explain, decide, ask or promise."""
    if writer.chance.random() < 0.5:
        return ""
    lines = writer.chance.sample(BODIES, writer.chance.randint(1, 3))
    text = "\n\n".join(line.format(area=area, thing=thing) for line in lines)
    if writer.chance.random() < 0.1:
        text += f"\n\nBREAKING CHANGE: {thing} needs the new settings."
    if writer.chance.random() < 0.3:
        text += f"\n\nRefs #{writer.chance.randint(1, writer.number)}"
    return f"\n\n{text}\n"


def _paths(writer: Writer, area: str) -> set[str]:
    """A few files of the area, mostly known ones, as in a code base that matures."""
    known = writer.paths[area]
    if len(known) < 8 or (len(known) < 250 and writer.chance.random() < 0.2):
        group = writer.chance.choice(("core", "routes", "models", "views"))
        known.append(f"src/{area}/{group}/part_{len(known):03}.py")
    count = min(len(known), writer.chance.choice((1, 1, 2, 2, 3, 5, 8)))
    return set(writer.chance.sample(known, count))


# --- The stream of git fast-import ---------------------------------------------------------


def _land(
    writer: Writer, message: str, author: tuple[str, str], area: str, paths: set[str] | None = None
) -> None:
    """One commit on main."""
    paths = paths or _paths(writer, area)
    parents = [writer.main] if writer.main else []
    writer.main = _commit(writer, "refs/heads/main", message, author, parents, paths)
    writer.landed = [*writer.landed[-20:], (writer.mark, message.partition("\n")[0])]


def _commit(
    writer: Writer,
    ref: str,
    message: str,
    author: tuple[str, str],
    parents: list[int],
    paths: set[str],
) -> int:
    writer.mark += 1
    # Random gaps that drift neither before the plan nor beyond the end.
    left = writer.total - writer.mark
    writer.when += int(writer.chance.expovariate(1 / GAP))
    writer.when = min(max(writer.when, writer.end - GAP * (left + 1)), writer.end - left)
    _put(writer, f"commit {ref}", f"mark :{writer.mark}")
    _put(writer, "committer {} <{}> {} +0000".format(*author, writer.when))
    _data(writer, message)
    for word, parent in zip(_words(), parents, strict=False):
        _put(writer, f"{word} :{parent}")
    for path in sorted(paths):
        _put(writer, f"M 100644 inline {path}")
        _data(writer, f"# {path}\nREVISION = {writer.mark}\n")
    return writer.mark


def _words() -> Iterator[str]:
    yield "from"
    while True:
        yield "merge"


def _data(writer: Writer, text: str) -> None:
    raw = text.encode()
    writer.out.write(b"data %d\n%b\n" % (len(raw), raw))


def _put(writer: Writer, *lines: str) -> None:
    writer.out.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
