"""What a GitHub repository remembers beside its commits: issues, pull requests, reviews, releases.

It hides GitHub's REST and GraphQL APIs: their pages, conditions, limits and failures. Everything
leaves as a delivery of GitHub's webhooks would have brought it, so that one mapping serves both.

A stream is read from the least to the most recently updated thing, a page after the other, each
asked for by the time where the last one ended: a thing that changes meanwhile comes later and is
never missed, as it could be by the number of a page. What a page held is stored before its end is
noted, and an event is stored once. So a stop at any moment, even by kill -9, costs no more than
that the last page is read again.

REST has conditions: of what did not change a second run learns so at no cost. GraphQL has none, but
tells of fifty pull requests at once what REST tells of one: branches, files and reviews.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from app.db import Database
from app.events import store
from app.schemas import BATCH_MAX, rfc3339

API = "https://api.github.com"
VERSION = "2022-11-28"  # of the REST API
PAGE = 100  # things of one request; the most there is
AT_ONCE = 50  # pull requests of one GraphQL query, which GitHub ends after 10 seconds
TIMEOUT = 60.0  # seconds
TRIES = 6  # of a request that fails for reasons that pass
FIRST_BACKOFF = 1.0  # seconds before the second of these, doubled before each next
SECONDARY_WAIT = 60.0  # seconds, doubled each time, where GitHub limits without saying how long
LONGEST_WAIT = 3_700.0  # seconds; limits begin anew every hour
OVERLAP = timedelta(seconds=1)  # whether `since` is from a time on or after it, nothing is missed
FILES = 50  # paths of one pull request

_PULL = f"""fragment Pull on PullRequest {{
  number baseRefName headRefName isDraft changedFiles mergeCommit {{ oid }} mergedBy {{ login }}
  files(first: {FILES}) {{ nodes {{ path }} }}
  reviews(first: 100) {{ pageInfo {{ hasNextPage }} nodes {{
    databaseId state body url submittedAt author {{ __typename login }} }} }}
}}"""
_SUBJECT = """fragment Subject on IssueOrPullRequest {
  ... on Issue { title } ... on PullRequest { title baseRefName }
}"""

# What a delivery becomes: its event, as GitHub calls it, and its body -> events as they are stored.
Rows = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]
Said = tuple[str, dict[str, Any]]  # the same event and body


class GitHubError(Exception):
    """GitHub does not give what was asked for; says why, in a sentence for a person."""


class Progress(Protocol):
    """Who is told how far it is."""

    def begin(self, stream: str, total: int) -> None:
        """A stream of about so many things begins."""

    def advance(self, count: int) -> None:
        """So many more have been stored."""

    def wait(self, seconds: float, why: str) -> None:
        """Nothing happens for so long."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it."""

    name: str  # of the repository, as GitHub writes it now
    accepted: int
    duplicates: int


# --- Calling GitHub ------------------------------------------------------------------------


class GitHub:
    """A connection to GitHub's API that waits for its limits and outlasts its failures.

    Args:
        token: never in a message, and never sent to another host.
        url: of the REST API; of an own GitHub Enterprise Server https://HOST/api/v3.
        sleep: instead of waiting.
    """

    def __init__(
        self,
        token: str,
        url: str,
        progress: Progress,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
            raise GitHubError("--url: must be https://HOST/PATH, of GitHub's REST API.")
        self._url = url.rstrip("/")
        self._progress = progress
        self._sleep = sleep
        # The environment may name a proxy, or the authority behind an own server's certificate.
        self._http = httpx.AsyncClient(
            timeout=TIMEOUT,
            follow_redirects=True,
            headers={
                "accept": "application/vnd.github+json",
                "authorization": f"Bearer {token}",
                "user-agent": "baton",
                "x-github-api-version": VERSION,
            },
        )

    async def __aenter__(self) -> "GitHub":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str, *, etag: str | None = None, **params: object) -> httpx.Response:
        """Ask the REST API; 304 when it is still what has this ETag.

        Raises:
            GitHubError
        """
        url = path if path.startswith(("http://", "https://")) else self._url + path
        if urlsplit(url)[:2] != urlsplit(self._url)[:2]:
            raise GitHubError("GitHub names a next page on another host; nothing is sent there.")
        headers = {"if-none-match": etag} if etag else {}
        given = {name: str(value) for name, value in params.items() if value is not None}
        request = self._http.build_request("GET", url, params=given or None, headers=headers)
        return await self._answer(request)

    async def graphql(self, query: str, owner: str, name: str) -> dict[str, Any]:
        """Ask the GraphQL API about a repository; what it cannot see is None.

        Raises:
            GitHubError
        """
        url = self._url.removesuffix("/v3") + "/graphql"
        body = {
            "query": f"query($owner: String!, $name: String!) {{"
            f" repository(owner: $owner, name: $name) {{ {query}",
            "variables": {"owner": owner, "name": name},
        }
        response = await self._answer(self._http.build_request("POST", url, json=body))
        found = _json(response)
        data = found.get("data") if isinstance(found, dict) else None
        repository = data.get("repository") if isinstance(data, dict) else None
        if not isinstance(repository, dict):
            raise GitHubError(f"GitHub gives no answer about {owner}/{name} over GraphQL.")
        return repository

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        failures = waits = 0
        while True:
            try:
                response = await self._http.send(request)
            except httpx.TransportError as error:
                failure = f"cannot be reached ({type(error).__name__})"
            else:
                wait = _limited(response, waits)
                if wait is not None:
                    waits += 1
                    await self._pause(wait, "GitHub's limit is used up")
                    continue
                if response.status_code < 500:
                    return _checked(response)
                failure = f"answers {response.status_code}"
            failures += 1
            if failures == TRIES:
                raise GitHubError(f"GitHub {failure}; run it again later, it goes on from here.")
            await self._pause(FIRST_BACKOFF * 2 ** (failures - 1), f"GitHub {failure}")

    async def _pause(self, seconds: float, why: str) -> None:
        self._progress.wait(seconds, why)
        await self._sleep(seconds)


def _limited(response: httpx.Response, waits: int) -> float | None:
    """Seconds that GitHub wants nothing to be asked for; None if it does not."""
    status, headers = response.status_code, response.headers
    over = status in (403, 429) or _graphql_limited(response)
    if over and re.fullmatch(r"\d{1,6}", headers.get("retry-after", "")):
        return min(float(headers["retry-after"]), LONGEST_WAIT)
    reset: str = headers.get("x-ratelimit-reset", "")
    if over and headers.get("x-ratelimit-remaining") == "0" and re.fullmatch(r"\d{1,12}", reset):
        return min(max(float(reset) - time.time(), 0.0) + 1, LONGEST_WAIT)
    if over and (status != 403 or "secondary rate limit" in response.text.casefold()):
        return min(SECONDARY_WAIT * 2.0**waits, LONGEST_WAIT)
    return None


def _graphql_limited(response: httpx.Response) -> bool:
    """GraphQL says it in an answer that looks well."""
    if response.status_code != 200 or response.request.method != "POST":
        return False
    found = _json(response)
    errors = found.get("errors") if isinstance(found, dict) else None
    return any(isinstance(e, dict) and e.get("type") == "RATE_LIMITED" for e in errors or [])


def _checked(response: httpx.Response) -> httpx.Response:
    status = response.status_code
    if status in (200, 304):
        return response
    sentences = {
        401: "GitHub refuses the token; check GITHUB_TOKEN.",
        403: "GitHub does not let this token read the repository; check what it may do.",
        404: "GitHub has no such repository, or does not show it to this token.",
        410: "GitHub has this switched off for the repository.",
    }
    raise GitHubError(sentences.get(status, f"GitHub answers {status}."))


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise GitHubError("GitHub's answer is not JSON; is the URL that of its API?") from None


def _things(response: httpx.Response) -> list[dict[str, Any]]:
    found = _json(response)
    if not isinstance(found, list):
        raise GitHubError("GitHub's answer is not a list; is the URL that of its API?")
    return [item for item in found if isinstance(item, dict)]


def _link(response: httpx.Response, name: str) -> str | None:
    return response.links.get(name, {}).get("url")


def _total(response: httpx.Response) -> int:
    """About how many things the pages hold, by the number of the last."""
    last = re.search(r"[?&]page=(\d{1,7})", _link(response, "last") or "")
    return int(last[1]) * PAGE if last else PAGE


# --- Importing -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Cursor:
    """How far a stream has been read; `at` is the time of the last thing."""

    since: datetime | None
    at: str | None = None
    etag: str | None = None


@dataclass(slots=True)
class _Import:
    """One run: a repository into a project."""

    github: GitHub
    database: Database
    project: Any
    rows: Rows
    progress: Progress
    since: datetime | None
    repository: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    accepted: int = 0
    duplicates: int = 0
    subjects: dict[int, tuple[str, str]] = field(default_factory=dict)  # title and base branch

    async def keep(self, said: Iterable[Said], since: datetime | None) -> None:
        """Store what deliveries come to, of what happened since then."""
        of = {"repository": self.repository}
        rows = [row for event, body in said for row in self.rows(event, of | body)]
        if since is not None:
            rows = [row for row in rows if datetime.fromisoformat(row["occurred_at"]) >= since]
        for at in range(0, len(rows), BATCH_MAX):
            new, known = await store(
                self.database, self.project["owner_id"], self.project["id"],
                rows[at : at + BATCH_MAX],
            )  # fmt: skip
            self.accepted, self.duplicates = self.accepted + new, self.duplicates + known

    async def cursor(self, stream: str) -> _Cursor:
        """Where the last run ended; at the beginning when this one is to go further back."""
        row = await self.database.row(
            "import_cursor", self.project["id"], "github", self.name, stream
        )
        if row is None:
            return _Cursor(self.since)
        further = row["since"] is not None and (self.since is None or self.since < row["since"])
        if further:
            return _Cursor(self.since)
        return _Cursor(row["since"], row["cursor"], row["etag"])

    async def save(self, stream: str, cursor: _Cursor) -> None:
        await self.database.value(
            "save_import_cursor", self.project["id"], "github", self.name, stream, cursor.since,
            cursor.at, cursor.etag,
        )  # fmt: skip


async def import_repository(
    github: GitHub,
    database: Database,
    project: Any,
    repository: str,
    *,
    rows: Rows,
    progress: Progress,
    since: datetime | None = None,
) -> Imported:
    """Store what a repository (OWNER/REPO) remembers; a second run goes on where this one ends.

    Args:
        project: its row; the events are its owner's.
        since: leave out what happened before.

    Raises:
        GitHubError: what came before it is stored, and the next run goes on from there.
    """
    if not re.fullmatch(r"[\w.-]{1,100}/[\w.-]{1,100}", repository):
        raise GitHubError(f"OWNER/REPO: {repository!r} is no repository such as acme/web.")
    found = _json(await github.get(f"/repos/{repository}"))
    name = found.get("full_name") if isinstance(found, dict) else None
    if not isinstance(name, str) or name.count("/") != 1:
        raise GitHubError("GitHub's answer is not a repository; is the URL that of its API?")
    run = _Import(github, database, project, rows, progress, since, found, name)
    await _by_time(run, "issues", f"/repos/{name}/issues", _issues, state="all")
    await _by_time(run, "comments", f"/repos/{name}/issues/comments", _comments)
    await _by_time(run, "review comments", f"/repos/{name}/pulls/comments", _review_comments)
    await _releases(run)
    return Imported(name, run.accepted, run.duplicates)


Read = Callable[[_Import, list[dict[str, Any]]], AsyncIterator[Said]]


async def _by_time(run: _Import, stream: str, path: str, read: Read, **params: str) -> None:
    """Read all that was updated since the last run, from the least recently updated on."""
    cursor = await run.cursor(stream)
    page: str | None = None  # of things that all have the time where the cursor is
    begun = False
    seen: set[object] = set()  # what the page before ended with may begin this one
    while True:
        first = page is None
        if page is None:
            response = await run.github.get(
                path, etag=cursor.etag, sort="updated", direction="asc", per_page=PAGE,
                since=_since(cursor), **params,
            )  # fmt: skip
        else:
            response = await run.github.get(page)
        if response.status_code == 304:
            return
        if not begun:
            run.progress.begin(stream, _total(response))
            begun = True
        things = _things(response)
        marks = [(thing.get("id"), thing.get("updated_at")) for thing in things]
        fresh = [thing for thing, mark in zip(things, marks, strict=True) if mark not in seen]
        seen = set(marks)
        await run.keep([said async for said in read(run, fresh)], cursor.since)
        run.progress.advance(len(fresh))
        last = str(things[-1].get("updated_at") or "") if things else ""
        if last > (cursor.at or ""):
            cursor.at, cursor.etag, page = last, None, None
            await run.save(stream, cursor)
            continue
        page = _link(response, "next")
        if page is None:
            cursor.etag = response.headers.get("etag") if first else None
            await run.save(stream, cursor)
            return


def _since(cursor: _Cursor) -> str | None:
    at = datetime.fromisoformat(cursor.at) - OVERLAP if cursor.at else cursor.since
    return rfc3339(at.replace(microsecond=0)) if at else None


async def _issues(run: _Import, things: list[dict[str, Any]]) -> AsyncIterator[Said]:
    """Issues as they are; GitHub counts pull requests among them, and more is asked of these."""
    things = [thing for thing in things if type(thing.get("number")) is int]
    pulls = [thing for thing in things if thing.get("pull_request")]
    details = await _details(run, [thing["number"] for thing in pulls])
    for thing in things:
        number = thing["number"]
        ended = [thing.get("closed_by")] if thing.get("state") == "closed" else []
        detail = details.get(number, {})
        run.subjects[number] = str(thing.get("title") or ""), str(detail.get("baseRefName") or "")
        if not thing.get("pull_request"):
            yield "issues", {"action": "opened", "issue": thing}
            for who in ended:
                yield "issues", {"action": "closed", "issue": thing, "sender": who}
            continue
        pull = _pull(thing, detail)
        yield "pull_request", {"action": "opened", "pull_request": pull}
        async for review in _reviews(run, number, detail):
            yield "pull_request_review", {
                "action": "submitted", "review": review, "pull_request": pull,
            }  # fmt: skip
        for who in ended:
            yield "pull_request", {"action": "closed", "pull_request": pull, "sender": who}


async def _details(run: _Import, numbers: list[int]) -> dict[int, dict[str, Any]]:
    """What only the pull request itself tells, by its number."""
    found: dict[int, dict[str, Any]] = {}
    owner, _, name = run.name.partition("/")
    for at in range(0, len(numbers), AT_ONCE):
        asked = numbers[at : at + AT_ONCE]
        query = " ".join(f"p{n}: pullRequest(number: {n}) {{ ...Pull }}" for n in asked)
        answer = await run.github.graphql(f"{query} }} }} {_PULL}", owner, name)
        found.update({n: answer[f"p{n}"] for n in asked if isinstance(answer.get(f"p{n}"), dict)})
    return found


def _pull(thing: Mapping[str, Any], detail: Mapping[str, Any]) -> dict[str, Any]:
    """A pull request in the shape that REST and webhooks give it."""
    files = (detail.get("files") or {}).get("nodes") or []
    return {
        **thing,
        "merged_at": thing["pull_request"].get("merged_at"),
        "base": {"ref": detail.get("baseRefName")},
        "head": {"ref": detail.get("headRefName")},
        "draft": detail.get("isDraft"),
        "changed_files": detail.get("changedFiles"),
        "merge_commit_sha": (detail.get("mergeCommit") or {}).get("oid"),
        "merged_by": detail.get("mergedBy"),
        "files": [{"filename": node.get("path")} for node in files if isinstance(node, dict)],
    }


async def _reviews(
    run: _Import, number: int, detail: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The reviews of a pull request; of one that has more than came along REST tells them all."""
    reviews = detail.get("reviews") or {}
    if (reviews.get("pageInfo") or {}).get("hasNextPage"):
        page: str | None = f"/repos/{run.name}/pulls/{number}/reviews?per_page={PAGE}"
        while page is not None:
            response = await run.github.get(page)
            for review in _things(response):
                if review.get("submitted_at"):  # one that is being written has no time
                    yield review
            page = _link(response, "next")
        return
    for node in reviews.get("nodes") or []:
        if not isinstance(node, dict) or not node.get("submittedAt"):
            continue
        author = node.get("author") or {}
        bot = author.get("__typename") == "Bot"
        yield {
            "id": node.get("databaseId"),
            "state": node.get("state"),
            "body": node.get("body"),
            "html_url": node.get("url"),
            "submitted_at": node["submittedAt"],
            "user": {
                "login": f"{author.get('login')}[bot]" if bot else author.get("login"),
                "type": author.get("__typename"),
            },
        }


async def _comments(run: _Import, things: list[dict[str, Any]]) -> AsyncIterator[Said]:
    numbers = {at: _number(thing.get("issue_url")) for at, thing in enumerate(things)}
    await _learn(run, numbers.values())
    for at, thing in enumerate(things):
        number = numbers[at]
        if number is None:
            continue
        issue: dict[str, Any] = {"number": number, "title": _title(run, number)}
        if "/pull/" in str(thing.get("html_url")):
            issue["pull_request"] = {"html_url": thing.get("html_url")}
        yield "issue_comment", {"action": "created", "comment": thing, "issue": issue}


async def _review_comments(run: _Import, things: list[dict[str, Any]]) -> AsyncIterator[Said]:
    numbers = {at: _number(thing.get("pull_request_url")) for at, thing in enumerate(things)}
    await _learn(run, numbers.values())
    for at, thing in enumerate(things):
        number = numbers[at]
        if number is None:
            continue
        base = run.subjects.get(number, ("", ""))[1]
        pull = {"number": number, "title": _title(run, number), "base": {"ref": base}}
        yield "pull_request_review_comment", {
            "action": "created", "comment": thing, "pull_request": pull,
        }  # fmt: skip


async def _learn(run: _Import, numbers: Iterable[int | None]) -> None:
    """The titles of what was commented on; a comment has only its number."""
    unknown = sorted({n for n in numbers if n is not None and n not in run.subjects})
    owner, _, name = run.name.partition("/")
    for at in range(0, len(unknown), PAGE):
        asked = unknown[at : at + PAGE]
        query = " ".join(f"s{n}: issueOrPullRequest(number: {n}) {{ ...Subject }}" for n in asked)
        answer = await run.github.graphql(f"{query} }} }} {_SUBJECT}", owner, name)
        for number in asked:
            subject = answer.get(f"s{number}") or {}
            run.subjects[number] = (
                str(subject.get("title") or ""), str(subject.get("baseRefName") or ""),
            )  # fmt: skip


def _title(run: _Import, number: int) -> str:
    return run.subjects.get(number, ("", ""))[0] or f"#{number}"


def _number(url: object) -> int | None:
    """12 of https://api.github.com/repos/acme/web/issues/12."""
    found = re.search(r"/(\d{1,9})$", url) if isinstance(url, str) else None
    return int(found[1]) if found else None


async def _releases(run: _Import) -> None:
    """All releases, which are few and have no order by time; none when the first page is known."""
    cursor = await run.cursor("releases")
    response = await run.github.get(f"/repos/{run.name}/releases", etag=cursor.etag, per_page=PAGE)
    if response.status_code == 304:
        return
    etag = response.headers.get("etag")
    run.progress.begin("releases", _total(response))
    while True:
        things = _things(response)
        said = [
            ("release", {"action": "published", "release": thing})
            for thing in things
            if thing.get("published_at")  # a draft has no such time
        ]
        await run.keep(said, cursor.since)
        run.progress.advance(len(things))
        page = _link(response, "next")
        if page is None:
            break
        response = await run.github.get(page)
    await run.save("releases", _Cursor(cursor.since, None, etag))


def moment_of(text: str, now: datetime) -> datetime:
    """A time as a person writes it: 2026-01-31, 2026-01-31T09:00Z, "2 weeks ago". UTC, if not said.

    Raises:
        ValueError: it is none, or not past.
    """
    ago = re.fullmatch(r"(\d{1,4}) (hour|day|week|month|year)s?(?: ago)?", text.strip())
    if ago:
        hours = {"hour": 1, "day": 24, "week": 168, "month": 730, "year": 8766}[ago[2]]
        return now - timedelta(hours=int(ago[1]) * hours)
    found = datetime.fromisoformat(text.strip())
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    if found > now:
        raise ValueError("it is not past")
    return found
