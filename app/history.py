"""What a git repository remembers, as events: its commits, its merges and its tags.

Hides git's command line and everything that people have ever put into a commit. The one rule: an
event that leaves this file fits `EventInput`, whatever the repository holds.

The order is tags first (few, and they mark the releases), then commits, newest first: git can
stream that way at once and in constant memory, while oldest first makes it walk, and hold, the
whole history before the first line.

A repository is foreign input and its configuration can name programs to run. So nothing here
reads the index (`core.fsmonitor`), shows content (external diffs, textconv, signatures) or talks
to a remote (an absent object of a partial clone is never fetched). For the same reason git's
refusal of a directory that belongs to another user is passed on with its remedy, not overridden.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from app.schemas import CONTENT_MAX, NAME_MAX, TITLE_MAX, URL_MAX

ANSWER_SECONDS = 120.0  # for git's short answers; counting a million commits takes ten
CHUNK = 1 << 18  # bytes read from git at once: four pipes full
PIECE_MAX = 4 * CONTENT_MAX + CHUNK  # bytes kept of one field; UTF-8 needs at most 4 a character
FILES_MAX = 50  # paths kept of one commit; enough to tell the area, however large the commit is
LATEST = int(datetime(2200, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())  # as EventInput has it

# A hook, or another git, leaves variables such as GIT_DIR that would override the path. Only those
# stay that say how to find configuration, programs and repositories, or make git stricter.
KEPT = ("GIT_CONFIG_", "GIT_EXEC_PATH", "GIT_DISCOVERY_", "GIT_CEILING_", "GIT_TEST_")
QUIET = {
    "GIT_ALLOW_PROTOCOL": "none",  # with the next line: never fetch what a partial clone lacks
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",  # the messages that are matched below are the English ones
}
# Each answers a setting of somebody's ~/.gitconfig that would change or break the output.
LOG = (
    *("-c", "log.showRoot=true", "log", "-z", "--no-color", "--no-show-signature", "--no-notes"),
    *("--no-decorate", "--encoding=UTF-8", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--ignore-submodules=none", "-O/dev/null"),
)
# The empty field in front tells a new commit from one more path, since no path is empty.
COMMIT = "--format=%x00%H%x00%P%x00%aN%x00%ct%x00%s%x00%b"
TAG = (
    "--format=%(refname:lstrip=2)%00%(objecttype)%00%(objectname)%00%(*objectname)%00%(taggername)"
    "%00%(authorname)%00%(creator)%00%(*committer)%00%(contents:subject)%00%(contents:body)%00"
)
TAG_FIELDS = TAG.count("%00")

# Host, then where it shows a commit and a tag. Only these are known well enough to link to.
FORGES = {
    "github.": ("/commit/", "/releases/tag/"),
    "gitlab.": ("/-/commit/", "/-/tags/"),
    "bitbucket.org": ("/commits/", "/commits/tag/"),
}
# Everything up to the last @ counts as credentials: a password may hold a bare / or @.
URL = re.compile(r"([a-z][a-z0-9+.-]*)://(?:.*@)?([^/]*/[^?#]*)", re.I | re.S)
SCP = re.compile(r"(?:.*@)?([^/:@]+):(?!:)(.+)", re.S)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
PULL_REQUESTS = (
    re.compile(r"Merge pull request #(?P<number>[0-9]{1,9}) from (?P<branch>\S+)"),
    re.compile(r"Merged in (?P<branch>\S+) \(pull request #(?P<number>[0-9]{1,9})\)"),
)
MERGE_REQUEST = re.compile(r"^See merge request \S*!([0-9]{1,9})\s*$", re.M)
SQUASHED = re.compile(r"\(#([0-9]{1,9})\)$")
BRANCHES = re.compile(r"Merge (?:remote-tracking )?branch(?:es)? ('.+?'(?:(?:, | and )'.+?')*)")


class NotARepository(Exception):
    """There is no history to read at the path; says why, in a sentence for a person.

    NotARepository
      GitFailed      git gave up on a repository; the sentence ends with git's own last line
      UnknownTime    `since` is no past time that git understands
    """


class GitFailed(NotARepository):
    """Git gave up; the message ends with the last line that git wrote."""


class UnknownTime(NotARepository):
    """Git takes what it cannot read for "now"; that would import nothing and say nothing."""


@dataclass(frozen=True)
class History:
    """One repository as it was when it was opened: later commits do not change the counts."""

    path: Path
    name: str
    branch: str | None
    remote: str | None
    commits: int
    tags: int
    head: str = field(repr=False)
    max_age: int = field(repr=False)  # git's word for the seconds of `since`; 0 is everything
    boundaries: frozenset[str] = field(repr=False)


_Events = Generator[dict[str, Any], None, None]  # an iterator that can be closed


def open_history(path: Path, *, name: str | None = None, since: str | None = None) -> History:
    """Find the repository that holds the path and count what `read_events` will yield."""
    path, common = _locate(path)
    head = _try(path, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if not head:
        raise NotARepository(f"{path} has no commits yet")
    max_age = 0 if since is None else _epoch(path, since)
    origin = _try(path, "remote", "get-url", "origin")
    remote = origin and _address(_line(origin, URL_MAX))
    history = History(
        path=path,
        name=_line(name or "") or _line(_repository(remote)[1]) or _directory(common),
        branch=_branch(path),
        remote=remote,
        commits=int(_ask(path, "rev-list", "--count", f"--max-age={max_age}", head, "--")),
        tags=0,
        head=head,
        max_age=max_age,
        boundaries=_boundaries(common),
    )
    return replace(history, tags=sum(1 for _ in _tags(history)))


def read_events(history: History, *, source: str = "github") -> _Events:
    """Stream the events, `commits + tags` of them; closing the iterator early stops git."""
    commit_url, tag_url = _links(history.remote)
    same = {"source": source, "resource": history.name}
    with closing(_tags(history)) as tags:
        for tag in tags:
            yield same | tag | {"url": _url(tag_url, tag["metadata"]["tag"])}
    with closing(_commits(history)) as commits:
        for commit in commits:
            yield same | commit | {"url": _url(commit_url, commit["external_id"])}


# --- The repository ------------------------------------------------------------------------


def _locate(path: Path) -> tuple[Path, Path]:
    """The top level that holds the path, and the directory that all its worktrees share."""
    if not os.path.isdir(path):  # False, too, for what may not be looked at
        raise NotARepository(f"{path} is not a directory")
    path = path.resolve()
    try:
        common = (path / _ask(path, "rev-parse", "--git-common-dir")).resolve()
    except GitFailed as error:
        text = str(error)
        if "safe.directory" in text:  # git's last line is the command that lifts the refusal
            raise NotARepository(
                f"{path} belongs to another user, so git does not read it; if you trust it, run:"
                f" git config{text.rpartition('git config')[2]}"
            ) from None
        if "not a git repository" in text:
            raise NotARepository(f"{path} is not a git repository") from None
        raise
    # Not git's --show-toplevel: the repository's core.worktree can point that anywhere.
    around = (path, *path.parents)
    return next((up for up in around if up == common or (up / ".git").exists()), path), common


def _branch(path: Path) -> str | None:
    """The checked-out branch; of a detached HEAD the default branch, if that contains it."""
    ref = _try(path, "symbolic-ref", "--quiet", "HEAD")
    if ref is None:
        form = "%(if)%(symref)%(then)%(symref:lstrip=3)%(else)%(refname:lstrip=2)%(end)"
        defaults = ("refs/heads/main", "refs/heads/master", "refs/remotes/origin/HEAD")
        found = _try(path, "for-each-ref", "--contains=HEAD", f"--format={form}", *defaults)
        ref = (found or "").partition("\n")[0]
    return _line(ref.removeprefix("refs/heads/")) or None


def _epoch(path: Path, since: str) -> int:
    """Seconds of a time in git's words. A bare date means its midnight, not this time of day."""
    complaint = UnknownTime(
        f"{since!r} is no past time that git understands; try '2 weeks ago' or '2026-01-31'"
    )
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", since):
        try:
            date.fromisoformat(since)
        except ValueError:
            raise complaint from None
        since += " 00:00"
    now = int(time.time())
    max_age = int(_ask(path, "rev-parse", f"--since={since}").partition("=")[2])
    if now - 1 <= max_age <= time.time() + 1:
        raise complaint
    return max_age


def _boundaries(common: Path) -> frozenset[str]:
    """Where a shallow clone was cut: git shows these as adding every file of the repository."""
    try:
        return frozenset((common / "shallow").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return frozenset()


def _directory(common: Path) -> str:
    """The name of last resort; worktrees and the `.git` inside a directory share the outer one."""
    named = common.parent if common.name.startswith(".") else common
    return _line(os.fsencode(named.name)).removesuffix(".git") or "repository"


# --- The remote ----------------------------------------------------------------------------


def _address(origin: str) -> str | None:
    """The remote in one form, without credentials: `scheme://host/path`, or a local path.

    None for a remote helper, whose "address" can be a command.
    """
    if origin.startswith(("/", ".", "file://")):
        return origin.removeprefix("file://")
    if found := URL.match(origin):
        return "{}://{}".format(*found.groups())
    if found := SCP.match(origin):
        return "ssh://{}/{}".format(*found.groups())
    return None if "::" in origin else origin


def _repository(remote: str | None) -> tuple[str, str]:
    """Web host and `owner/repo` (or `group/subgroup/repo`); of a local path the last two names."""
    scheme, _, rest = (remote or "").rpartition("://")
    host, _, path = rest.partition("/") if scheme else ("", "", rest)
    parts = [part for part in path.split("/") if part not in ("", ".", "..", ".git")]
    if scheme != "https":  # only then is the port one of web pages
        host = host.partition(":")[0]
    return host.lower(), "/".join(parts if scheme else parts[-2:]).removesuffix(".git")


def _links(remote: str | None) -> tuple[str, str]:
    """What precedes the id in the web address of a commit and of a tag; empty if unknown."""
    host, repository = _repository(remote)
    if not repository or not re.fullmatch(r"[a-z0-9.-]+(:[0-9]+)?", host):
        return "", ""
    for start, (commit, tag) in FORGES.items():
        if host.startswith(start):
            base = f"https://{host}/{quote(repository, safe='/~')}"
            return base + commit, base + tag
    return "", ""


def _url(prefix: str, name: str) -> str | None:
    url = prefix + quote(name)
    return url if prefix and len(url) <= URL_MAX else None


# --- Tags ----------------------------------------------------------------------------------


def _tags(history: History) -> _Events:
    with closing(_stream(history.path, "for-each-ref", TAG, "refs/tags")) as pieces:
        while len(record := list(islice(pieces, TAG_FIELDS))) == TAG_FIELDS:
            event = _tag_event(record, history.name)
            if event and history.max_age <= event["occurred_at"].timestamp():
                yield event


def _tag_event(record: list[bytes], resource: str) -> dict[str, Any] | None:
    """One tag, or None for a bare label on something without a time, such as a blob."""
    name, kind, object_id, target, tagger, author, creator, committer, subject, body = record
    # "Name <mail> seconds zone", as it was stored: git itself dies on a date that it cannot show.
    stamp = (creator or committer).rpartition(b">")[2].split()
    if not stamp:
        return None
    title = _line(name, TITLE_MAX) or "(no name)"
    sha = (target or object_id).decode("ascii")
    message = _text(subject + b"\n\n" + body) if kind == b"tag" else ""
    external_id = f"tag:{resource}:{title}"
    return {
        "event_type": "tag",
        "title": title,
        "content": _cut(message, CONTENT_MAX) or None,
        # Two endless names must not become the same id by being cut.
        "external_id": external_id if len(external_id) <= NAME_MAX else f"tag:{sha}",
        "branch": None,
        "author": _line(tagger or author) or None,
        "occurred_at": _time(stamp[0]),
        "metadata": {"tag": title, "sha": sha},
    }


# --- Commits and merges --------------------------------------------------------------------


def _commits(history: History) -> _Events:
    names = ["--name-only"]
    if "tree:" in (_try(history.path, "config", "--get-regexp", r"\.partialclonefilter$") or ""):
        names = []  # a clone without trees does not know its files
    arguments = [*LOG, *names, COMMIT, f"--max-age={history.max_age}", history.head, "--"]
    with closing(_stream(history.path, *arguments)) as pieces:
        next(pieces, None)
        while len(record := list(islice(pieces, 6))) == 6:
            files = _files(pieces)
            at_boundary = record[0].decode("ascii") in history.boundaries
            event = _commit_event(record, at_boundary)
            # A merge lists no files: they are on the commits that it brings in.
            if names and not at_boundary and event["event_type"] == "commit":
                event["metadata"] |= files
            yield event | {"branch": history.branch}


def _files(pieces: Iterator[bytes]) -> dict[str, Any]:
    """The paths up to the empty field that opens the next commit: the first ones and a count."""
    files: list[str] = []
    count = 0
    for piece in pieces:
        if not piece:
            break
        if count < FILES_MAX:
            files.append(_path(piece if count else piece.removeprefix(b"\n")))
        count += 1
    return {"files": files, "files_changed": count}


def _commit_event(record: list[bytes], at_boundary: bool) -> dict[str, Any]:
    sha, parents = (raw.decode("ascii") for raw in record[:2])
    author, stamp, raw_subject, raw_body = record[2:]
    subject = " ".join(_text(raw_subject).split())
    title, content, facts = _understand(subject, _text(raw_body))
    if len(title) > TITLE_MAX:  # the rest of an endless subject is not lost
        content = f"{title}\n\n{content}".strip()
    # At the edge of a shallow clone the parents are missing.
    is_merge = " " in parents or (at_boundary and "merged_branch" in facts)
    return {
        "event_type": "merge" if is_merge else "commit",
        "title": _cut(title, TITLE_MAX) or "(no message)",
        "content": _cut(content, CONTENT_MAX) or None,
        "external_id": sha,
        "author": _line(author) or None,
        "occurred_at": _time(stamp),
        "metadata": {"sha": sha, "parents": parents.split(), **facts},
    }


def _understand(subject: str, body: str) -> tuple[str, str, dict[str, Any]]:
    """Title, content, and the request and branch that the forges write into their messages."""
    for pattern in PULL_REQUESTS:
        if found := pattern.match(subject):
            facts = {"pull_request": int(found["number"]), "merged_branch": found["branch"]}
            title, _, rest = body.partition("\n")
            return (title.strip() or subject), rest.strip(), facts
    facts = {}
    if found := SQUASHED.search(subject):
        facts["pull_request"] = int(found[1])
    if found := MERGE_REQUEST.search(body):
        facts["merge_request"] = int(found[1])
    if branches := BRANCHES.match(subject):
        facts["merged_branch"] = ", ".join(re.findall(r"'([^']+)'", branches[1]))
        title, _, rest = body.partition("\n")
        # GitLab puts the title of the request where GitHub does, unless its template says no.
        if "merge_request" in facts and not title.startswith(("See merge request", "Closes ")):
            return title.strip(), rest.strip(), facts
    return subject, body, facts


# --- Text and time -------------------------------------------------------------------------


def _text(raw: bytes | str) -> str:
    """Readable text of anything: no NUL or other control characters, no lone surrogates."""
    # A string comes from an argument or a path, with lone surrogates for undecodable bytes.
    text = SURROGATE.sub("�", raw) if isinstance(raw, str) else raw.decode("utf-8", "replace")
    return CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _line(raw: bytes | str, limit: int = NAME_MAX) -> str:
    return " ".join(_text(raw).split())[:limit].rstrip()


def _path(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace").replace("\n", " ").replace("\t", " ")
    return CONTROL.sub(" ", text)[:NAME_MAX]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _time(seconds: bytes) -> datetime:
    """A moment that EventInput accepts; git stores any digits, and an unreadable date as none."""
    try:
        number = int(seconds)
    except ValueError:
        number = 0
    return datetime.fromtimestamp(min(max(number, 0), LATEST), UTC)


# --- Git -----------------------------------------------------------------------------------


def _command(path: Path, arguments: tuple[str, ...]) -> list[str]:
    # An absolute path behind -C and a constant first word: nothing given can pass as an option.
    return ["git", "--no-pager", "-c", "core.fsmonitor=false", "-C", str(path), *arguments]


def _environment() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("GIT_") or key.startswith(KEPT)
    } | QUIET


def _try(path: Path, *arguments: str) -> str | None:
    """Git's answer, or None where git has none."""
    try:
        return _ask(path, *arguments)
    except GitFailed:
        return None


def _ask(path: Path, *arguments: str) -> str:
    """Git's short answer without its last newline. Undecodable bytes survive, for file names."""
    try:
        done = subprocess.run(
            _command(path, arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_environment(),
            timeout=ANSWER_SECONDS,
        )
    except FileNotFoundError:
        raise NotARepository(f"{path} cannot be read: git is not installed") from None
    except subprocess.TimeoutExpired:
        raise GitFailed(f"{path}: git did not answer in {ANSWER_SECONDS:.0f} seconds") from None
    except ValueError:  # a NUL character, which no argument can hold
        raise NotARepository(f"{str(path)!r} cannot be read: invalid character") from None
    if done.returncode:
        raise _failure(path, done.stderr, done.returncode)
    return os.fsdecode(done.stdout).removesuffix("\n")


def _stream(path: Path, *arguments: str) -> Generator[bytes, None, None]:
    """Git's long answer, piece by piece. Git never outlives the iterator, finished or left."""
    # The complaints go to a file: a pipe that nobody reads fills up and stops git for ever.
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            _command(path, arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=_environment(),
        ) as child,
    ):
        try:
            assert child.stdout is not None
            yield from _pieces(child.stdout)
            code = child.wait(ANSWER_SECONDS)
        except BaseException:  # also the GeneratorExit of an iterator that is left early
            child.kill()
            raise
        if code:
            complaints.seek(0)
            raise _failure(path, complaints.read(CHUNK), code)


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Split at NUL while reading; of a monstrous field only as much is held as can be used."""
    rest = b""
    while chunk := stream.read(CHUNK):
        *whole, rest = (rest + chunk).split(b"\0")
        yield from whole
        rest = rest[:PIECE_MAX]
    if rest.strip():
        yield rest


def _failure(path: Path, complaint: bytes, code: int) -> GitFailed:
    lines = _text(complaint).splitlines() or [f"exit code {code}"]
    return GitFailed(f"{path}: git failed: {lines[-1].strip().removeprefix('fatal: ')}")
