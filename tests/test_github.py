"""Importing what a GitHub repository remembers, from a server that speaks GitHub's protocol."""

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result
from conftest import Caller, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import github
from app.__main__ import cli
from app.db import Database, open_database
from app.events import store
from app.github import GitHub, GitHubError, Imported, import_repository, moment_of
from tasks import mapping
from tasks.sources import github as mapped
from tasks.sources.event import Delivery

ROOT = Path(__file__).parent.parent
TOKEN = "ghp_the-token-that-nobody-may-see"
START = datetime(2026, 3, 2, 9, tzinfo=UTC)
PEOPLE = ("ada", "grace", "linus")


def at(minutes: float) -> str:
    return (START + timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")


@dataclass
class Forge:
    """A repository on GitHub, and what its API does when it is asked."""

    issues: list[dict[str, Any]] = field(default_factory=list)
    comments: list[dict[str, Any]] = field(default_factory=list)
    review_comments: list[dict[str, Any]] = field(default_factory=list)
    releases: list[dict[str, Any]] = field(default_factory=list)
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)  # as GraphQL has them
    asked: list[str] = field(default_factory=list)  # status and path of each request
    troubles: list[Response] = field(default_factory=list)  # answered first, in this order
    over: list[Response] = field(default_factory=list)  # of GraphQL, likewise
    after: int = 0  # requests before the first of these
    url: str = ""
    each: Any = None  # called with the number of each request

    def thing(self, number: int, minutes: float, **given: Any) -> dict[str, Any]:
        kind = "pull" if "pull_request" in given else "issues"
        found = {
            "id": 10_000 + number, "number": number, "title": f"Thing {number}",
            "body": f"About {number}.",
            "state": "open", "user": {"login": PEOPLE[number % 3], "type": "User"},
            "labels": [{"name": "bug"}], "created_at": at(number), "updated_at": at(minutes),
            "closed_at": None, "html_url": f"https://github.com/acme/web/{kind}/{number}",
        } | given  # fmt: skip
        self.issues.append(found)
        return found

    def pull(self, number: int, minutes: float, *, reviews: int = 1, **given: Any) -> None:
        merged = given.pop("merged_at", None)
        self.thing(number, minutes, pull_request={"merged_at": merged}, **given)
        nodes = [self.review(number, n) for n in range(reviews)]
        self.pulls[number] = {
            "number": number, "title": f"Thing {number}", "baseRefName": "main",
            "headRefName": f"ada/eng-{number}", "isDraft": False, "changedFiles": 2,
            "mergeCommit": {"oid": f"{number:040x}"} if merged else None,
            "mergedBy": {"login": "grace"} if merged else None,
            "files": {"nodes": [{"path": "app/a.py"}, {"path": "app/b.py"}]},
            "reviews": {"pageInfo": {"hasNextPage": reviews > 100}, "nodes": nodes[:100]},
            "all": nodes,
        }  # fmt: skip

    def review(self, number: int, n: int) -> dict[str, Any]:
        return {
            "databaseId": number * 1000 + n, "state": "APPROVED", "body": "Good.",
            "url": f"https://github.com/acme/web/pull/{number}#pullrequestreview-{n}",
            "submittedAt": at(number + 0.5), "author": {"__typename": "User", "login": "grace"},
        }  # fmt: skip

    def comment(self, id: int, number: int, minutes: float, kind: str = "issues") -> None:
        self.comments.append({
            "id": id, "body": "Yes.", "user": {"login": "linus", "type": "User"},
            "created_at": at(minutes), "updated_at": at(minutes),
            "issue_url": f"https://api.github.com/repos/acme/web/issues/{number}",
            "html_url": f"https://github.com/acme/web/{kind}/{number}#issuecomment-{id}",
        })  # fmt: skip

    # --- Its API ---

    async def rest(self, request: Request) -> Response:
        path = request.url.path.removeprefix("/api/v3")
        if trouble := await self.trouble():
            return self.told(trouble, path)
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        if path == "/repos/acme/web":
            repository = {"full_name": "acme/web", "default_branch": "main",
                          "html_url": "https://github.com/acme/web"}  # fmt: skip
            return self.told(JSONResponse(repository), path)
        if found := re.fullmatch(r"/repos/acme/web/pulls/(\d+)/reviews", path):
            nodes = self.pulls[int(found[1])]["all"]
            things = [
                {"id": n["databaseId"], "state": n["state"], "body": n["body"],
                 "html_url": n["url"], "submitted_at": n["submittedAt"], "user": n["author"]}
                for n in nodes
            ]  # fmt: skip
            return self.told(self.page(request, things), path)
        streams = {
            "/repos/acme/web/issues": self.issues,
            "/repos/acme/web/issues/comments": self.comments,
            "/repos/acme/web/pulls/comments": self.review_comments,
            "/repos/acme/web/releases": self.releases,
        }
        if path not in streams:
            return self.told(JSONResponse({"message": "Not Found"}, 404), path)
        things = streams[path]
        if "since" in request.query_params:
            since = request.query_params["since"]
            things = [t for t in things if t["updated_at"] >= since]
        if request.query_params.get("sort") == "updated":
            things = sorted(things, key=lambda t: (t["updated_at"], t.get("number", 0)))
        return self.told(self.page(request, things), path)

    def page(self, request: Request, things: list[dict[str, Any]]) -> Response:
        size = int(request.query_params.get("per_page", 30))
        number = int(request.query_params.get("page", 1))
        last = max(1, -(-len(things) // size))
        shown = json.dumps(things[(number - 1) * size : number * size])
        etag = f'W/"{hashlib.sha256(f"{number}{last}{shown}".encode()).hexdigest()}"'
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        links = {
            rel: str(request.url.include_query_params(page=n))
            for rel, n in (("next", number + 1), ("last", last))
            if number < last
        }
        link = ", ".join(f'<{url}>; rel="{rel}"' for rel, url in links.items())
        return Response(shown, media_type="application/json",
                        headers={"etag": etag} | ({"link": link} if link else {}))  # fmt: skip

    async def graphql(self, request: Request) -> Response:
        if self.each:
            await self.each(len(self.asked))
        if self.over:
            return self.told(self.over.pop(), "/graphql")
        body = await request.json()
        assert body["variables"] == {"owner": "acme", "name": "web"}
        assert body["query"].count("{") == body["query"].count("}")
        found: dict[str, Any] = {}
        for alias, kind, number in re.findall(
            r"(\w+): (pullRequest|issueOrPullRequest)\(number: (\d+)\)", body["query"]
        ):
            subjects = [t for t in self.issues if t["number"] == int(number)]
            named = {"title": subjects[0]["title"]} if subjects else None
            pull = self.pulls.get(int(number))
            found[alias] = pull if kind == "pullRequest" else pull or named
        return self.told(JSONResponse({"data": {"repository": found}}), "/graphql")

    async def trouble(self) -> Response | None:
        if self.each:
            await self.each(len(self.asked))
        if self.troubles and len(self.asked) >= self.after:
            return self.troubles.pop(0)
        return None

    def told(self, response: Response, path: str) -> Response:
        self.asked.append(f"{response.status_code} {path.removeprefix('/repos/acme/web')}")
        return response


class Quiet:
    """Who is told, and remembers it."""

    def __init__(self) -> None:
        self.streams: list[tuple[str, int]] = []
        self.stored = 0
        self.waits: list[tuple[float, str]] = []

    def begin(self, stream: str, total: int) -> None:
        self.streams.append((stream, total))

    def advance(self, count: int) -> None:
        self.stored += count

    def wait(self, seconds: float, why: str) -> None:
        self.waits.append((seconds, why))


@dataclass
class Importer:
    """Imports from the forge into a project of its own."""

    forge: Forge
    database: Database
    project: Any
    sql: asyncpg.Connection
    progress: Quiet = field(default_factory=Quiet)

    async def run(self, since: datetime | None = None) -> Imported:
        async def sleep(_: float) -> None:
            await asyncio.sleep(0)

        self.forge.asked.clear()
        async with GitHub(TOKEN, f"{self.forge.url}/api/v3", self.progress, sleep=sleep) as hub:
            return await import_repository(
                hub, self.database, self.project, "acme/web", rows=rows,
                progress=self.progress, since=since,
            )  # fmt: skip

    async def ids(self) -> list[str]:
        found = await self.sql.fetch("select external_id from events order by external_id")
        return [row["external_id"] for row in found]


def rows(event: str, body: Any) -> list[dict[str, Any]]:
    delivery = Delivery({"x-github-event": event}, body, datetime.now(UTC))
    made = mapping.rows("github", delivery, mapped.events(delivery))
    return [{key: value for key, value in row.items() if key != "in"} for row in made]


@pytest.fixture
async def forge() -> AsyncIterator[Forge]:
    forge = Forge()
    routes = [
        Route("/api/graphql", forge.graphql, methods=["POST"]),
        Route("/api/v3/{path:path}", forge.rest),
    ]
    async with served(Starlette(routes=routes)) as url:
        forge.url = url
        yield forge


@pytest.fixture
async def importer(
    forge: Forge, dsn: str, caller: Caller, sql: asyncpg.Connection
) -> AsyncIterator[Importer]:
    async with open_database(dsn, application_name="t", role="baton_ops", size=2) as database:
        (project,) = await database.rows("find_projects", caller.project_id)
        yield Importer(forge, database, project, sql)


def fill(forge: Forge) -> None:
    """Something of everything."""
    forge.thing(1, 10, state="closed", closed_at=at(10))
    forge.thing(2, 20)
    forge.pull(3, 30, state="closed", closed_at=at(30), merged_at=at(30))
    forge.pull(4, 40, state="closed", closed_at=at(40))
    forge.pull(5, 50)
    forge.comment(91, 2, 21)
    forge.comment(92, 3, 22, "pull")
    forge.review_comments.append({
        "id": 93, "body": "Why?", "path": "app/a.py", "user": {"login": "grace", "type": "User"},
        "created_at": at(25), "updated_at": at(25),
        "pull_request_url": "https://api.github.com/repos/acme/web/pulls/3",
        "html_url": "https://github.com/acme/web/pull/3#discussion_r93",
    })  # fmt: skip
    forge.releases.append({
        "id": 7, "tag_name": "v1", "name": "One", "draft": False, "published_at": at(60),
        "author": {"login": "ada"}, "html_url": "https://github.com/acme/web/releases/tag/v1",
    })  # fmt: skip
    forge.releases.append({"id": 8, "tag_name": "v2", "draft": True, "published_at": None})


ALL = sorted([
    "acme/web#1:issue.closed:2026-03-02T09:10:00Z", "acme/web#1:issue.opened",
    "acme/web#2:comment:91", "acme/web#2:issue.opened",
    "acme/web#3:comment:92", "acme/web#3:pull_request.merged", "acme/web#3:pull_request.opened",
    "acme/web#3:review:3000", "acme/web#3:review_comment:93",
    "acme/web#4:pull_request.closed:2026-03-02T09:40:00Z", "acme/web#4:pull_request.opened",
    "acme/web#4:review:4000", "acme/web#5:pull_request.opened", "acme/web#5:review:5000",
    "acme/web:release:7",
])  # fmt: skip


async def test_all_that_a_repository_remembers_becomes_events(importer: Importer) -> None:
    fill(importer.forge)
    assert await importer.run() == Imported("acme/web", len(ALL), 0)
    assert await importer.ids() == ALL
    merged = await importer.sql.fetchrow(
        "select * from events where event_type = 'pull_request.merged'"
    )
    assert merged
    assert json.loads(merged["metadata"]) == {
        "pull_request": 3, "head_branch": "ada/eng-3", "merged_branch": "ada/eng-3",
        "sha": f"{3:040x}", "files": ["app/a.py", "app/b.py"], "files_changed": 2,
        "merged_by": "grace", "labels": ["bug"],
    }  # fmt: skip
    assert (merged["branch"], merged["author"], merged["title"]) == ("main", "ada", "Thing 3")
    titles = await importer.sql.fetch(
        "select title, branch from events where event_type like '%comment%' order by external_id"
    )
    assert [tuple(row) for row in titles] == [
        ("Comment on Thing 2", None), ("Comment on Thing 3", None), ("Comment on Thing 3", "main")
    ]  # fmt: skip


async def test_an_imported_repository_is_known_to_the_filters(
    importer: Importer, caller: Caller
) -> None:
    fill(importer.forge)
    await importer.run()
    answer = await caller.http.get("/handoffs/filters")
    filters = answer.json()["filters"]["github"]
    assert filters["projects"] == [{"id": "acme/web", "label": "acme/web"}]
    assert "main" in [branch["value"] for branch in filters["branches"]]


async def test_import_and_webhooks_store_one_event_each(importer: Importer) -> None:
    fill(importer.forge)
    forge = importer.forge
    repository = {"full_name": "acme/web", "default_branch": "main"}
    issue, pull = forge.issues[0], dict(forge.issues[2])
    pull |= {"base": {"ref": "main"}, "head": {"ref": "ada/eng-3"}, "merged": True,
             "merged_at": at(30), "merge_commit_sha": f"{3:040x}"}  # fmt: skip
    review = {"id": 3000, "state": "approved", "body": "Good.", "user": {"login": "grace"},
              "submitted_at": at(3.5)}  # fmt: skip
    sender = {"sender": {"login": "ada"}, "repository": repository}
    hooks: list[tuple[str, dict[str, Any]]] = [
        ("issues", {"action": "opened", "issue": {**issue, "updated_at": at(1)}}),
        ("issues", {"action": "closed", "issue": issue}),
        ("pull_request", {"action": "opened", "pull_request": pull}),
        ("pull_request", {"action": "closed", "pull_request": pull}),
        ("pull_request_review", {"action": "submitted", "review": review, "pull_request": pull}),
        ("issue_comment", {"action": "created", "comment": forge.comments[0],
                           "issue": forge.issues[1]}),
        ("pull_request_review_comment", {"action": "created", "pull_request": pull,
                                         "comment": forge.review_comments[0]}),
        ("release", {"action": "published", "release": forge.releases[0]}),
    ]  # fmt: skip
    for event, body in hooks:
        await importer.database.row(
            "ingest_events", importer.project["owner_id"], importer.project["id"],
            rows(event, body | sender),
        )  # fmt: skip
    assert len(await importer.ids()) == len(hooks)
    assert await importer.run() == Imported("acme/web", len(ALL) - len(hooks), len(hooks))
    assert await importer.ids() == ALL


async def test_a_second_run_costs_next_to_nothing(importer: Importer) -> None:
    fill(importer.forge)
    await importer.run()
    assert await importer.run() == Imported("acme/web", 0, 0)
    assert importer.forge.asked == [
        "200 ", "304 /issues", "304 /issues/comments", "304 /pulls/comments", "304 /releases"
    ]  # fmt: skip


async def test_a_second_run_reads_only_what_changed(importer: Importer) -> None:
    for number in range(1, 151):
        importer.forge.thing(number, number)
    await importer.run()
    importer.forge.thing(151, 151)
    importer.forge.comment(5, 7, 300)
    assert (await importer.run()).accepted == 2
    assert [line for line in importer.forge.asked if "200" in line] == [
        "200 ", "200 /issues", "200 /issues", "200 /issues/comments", "200 /graphql",
        "200 /issues/comments",
    ]  # fmt: skip


async def test_pages_are_followed_also_through_a_second_in_which_hundreds_changed(
    importer: Importer,
) -> None:
    for number in range(1, 251):
        importer.forge.thing(number, 500 if number > 20 else number)
    for number in range(251, 301):
        importer.forge.thing(number, 400 + number)
    importer.forge.pull(301, 900, reviews=205)
    for number in range(230):
        importer.forge.releases.append(
            {"id": number, "tag_name": f"v{number}", "published_at": at(number)}
        )
    await importer.run()
    ids = await importer.ids()
    assert len(ids) == 301 + 205 + 230
    assert importer.progress.streams == [
        ("issues", 400), ("comments", 100), ("review comments", 100), ("releases", 300)
    ]  # fmt: skip


async def test_what_changes_while_it_is_read_is_not_missed(importer: Importer) -> None:
    forge = importer.forge
    for number in range(1, 301):
        forge.thing(number, number)

    async def touched(requests: int) -> None:
        if requests == 2:  # between the first page and the second
            for thing in forge.issues[:50]:
                thing["updated_at"] = at(1_000)

    forge.each = touched
    await importer.run()
    assert len(await importer.ids()) == 300


async def test_limits_and_failures_are_waited_for_and_told(importer: Importer) -> None:
    fill(importer.forge)
    soon = str(int(time.time()) + 30)
    importer.forge.after = 1
    limited = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": soon}
    importer.forge.troubles = [
        JSONResponse({"message": "API rate limit exceeded"}, 403, headers=limited),
        JSONResponse({"message": "You have exceeded a secondary rate limit."}, 403,
                     headers={"retry-after": "7"}),
        JSONResponse({"message": "You have exceeded a secondary rate limit."}, 403),
        Response("<html>Bad Gateway</html>", 502),
        Response("", 503),
    ]  # fmt: skip
    importer.forge.over = [JSONResponse({"errors": [{"type": "RATE_LIMITED"}]}, headers=limited)]
    assert (await importer.run()).accepted == len(ALL)
    seconds = [round(seconds) for seconds, _ in importer.progress.waits]
    assert 25 <= seconds[0] <= 31 and seconds[1:5] == [7, 240, 1, 2]
    assert 25 <= seconds[5] <= 31
    assert importer.progress.waits[3][1] == "GitHub answers 502"
    assert "limit" in importer.progress.waits[0][1]


class Crash(BaseException):
    """The end of the process, as far as a test can have it."""


async def test_a_stop_after_any_statement_loses_and_repeats_nothing(
    importer: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(importer.forge)
    done = left = 0

    async def counted(work: Awaitable[Any]) -> Any:
        nonlocal done, left
        found = await work
        done, left = done + 1, left - 1
        if left == 0:
            raise Crash
        return found

    save = github._Import.save
    monkeypatch.setattr(github, "store", lambda *given: counted(store(*given)))
    monkeypatch.setattr(github._Import, "save", lambda *given: counted(save(*given)))
    await importer.run()
    for stop in range(1, done + 1):
        await importer.sql.execute("truncate events, import_cursors")
        left = stop
        with pytest.raises(Crash):
            await importer.run()
        await importer.run()
        assert await importer.ids() == ALL, stop


async def test_who_is_refused_is_told_why_and_never_the_token(importer: Importer) -> None:
    cases: list[tuple[Response, str]] = [
        (JSONResponse({"message": "Bad credentials"}, 401), "refuses the token"),
        (JSONResponse({"message": "Not accessible by token"}, 403), "does not let this token"),
        (JSONResponse({"message": "Not Found"}, 404), "no such repository"),
        (Response("<html>hello</html>"), "not JSON"),
        (JSONResponse([1]), "not a repository"),
    ]
    for response, told in cases:
        importer.forge.troubles = [response]
        with pytest.raises(GitHubError, match=told) as caught:
            await importer.run()
        assert TOKEN not in str(caught.value)


async def test_a_server_that_stays_broken_ends_the_run_and_the_next_goes_on(
    importer: Importer,
) -> None:
    for number in range(1, 251):
        importer.forge.thing(number, number)
    importer.forge.after = 2
    importer.forge.troubles = [Response("", 502)] * github.TRIES
    with pytest.raises(GitHubError, match="answers 502"):
        await importer.run()
    assert len(await importer.ids()) == 100
    assert (await importer.run()).accepted == 150
    assert importer.forge.asked.count("200 /issues") == 3


async def test_a_next_page_on_another_host_gets_nothing(importer: Importer) -> None:
    importer.forge.after = 5
    elsewhere = '<https://evil.example/issues?page=2>; rel="next"'
    importer.forge.releases.append({"id": 1, "tag_name": "v1", "published_at": at(1)})
    importer.forge.after = 4
    importer.forge.troubles = [JSONResponse([], headers={"link": elsewhere})]
    with pytest.raises(GitHubError, match="another host"):
        await importer.run()


async def test_since_leaves_out_what_was_before_and_a_later_run_may_go_further_back(
    importer: Importer,
) -> None:
    fill(importer.forge)
    await importer.run(START + timedelta(minutes=29))
    few = await importer.ids()
    assert few == [i for i in ALL if "merged" in i or "#4:pull_request.closed" in i or ":7" in i]
    await importer.run(START + timedelta(minutes=45))  # nothing is left out that was not before
    assert await importer.ids() == few
    await importer.run()
    assert await importer.ids() == ALL
    importer.forge.thing(6, 61)  # opened before, and never left out by what was read so far
    await importer.run(START + timedelta(minutes=60))
    assert "acme/web#6:issue.opened" in await importer.ids()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-03-02", datetime(2026, 3, 2, tzinfo=UTC)),
        ("2026-03-02T10:00+01:00", START),
        ("2 weeks ago", START + timedelta(days=6)),
        ("1 day", START + timedelta(days=19)),
    ],
)
def test_a_time_is_read_as_a_person_writes_it(written: str, read: datetime) -> None:
    assert moment_of(written, START + timedelta(days=20)) == read


def test_what_is_no_past_time_is_refused() -> None:
    for written in ("soon", "2199-01-01", "", "9999 years ago"):
        with pytest.raises((ValueError, OverflowError)):
            moment_of(written, START)


# --- The command ---------------------------------------------------------------------------


def arguments(importer: Importer) -> list[str]:
    return ["import", "github", "acme/web", "--project", importer.project["id"]]


def environment(importer: Importer, dsn: str) -> dict[str, str]:
    url = f"{importer.forge.url}/api/v3"
    return {"DATABASE_URL": dsn, "GITHUB_API_URL": url, "GITHUB_TOKEN": TOKEN}


async def invoked(importer: Importer, dsn: str, *args: str, **env: str | None) -> Result:
    run = CliRunner(env={**environment(importer, dsn), **env}).invoke
    return await asyncio.to_thread(run, cli, [*arguments(importer), *args])


async def test_the_command_says_what_came_of_it(importer: Importer, dsn: str) -> None:
    fill(importer.forge)
    result = await invoked(importer, dsn)
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"acme/web: {len(ALL)} events imported, 0 already there.\n")
    assert TOKEN not in result.output
    assert await importer.ids() == ALL


async def test_what_is_missing_or_wrong_is_one_sentence(importer: Importer, dsn: str) -> None:
    for result, told in [
        (await invoked(importer, dsn, GITHUB_TOKEN=None), "GITHUB_TOKEN: is needed"),
        (await invoked(importer, dsn, "--since", "soon"), "--since: 'soon' is no past time"),
        (await invoked(importer, dsn, "--url", "github.com"), "--url: must be https://"),
    ]:
        assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
        assert told in result.output


async def test_killed_in_the_middle_of_a_page_and_run_again_it_loses_and_repeats_nothing(
    importer: Importer, dsn: str
) -> None:
    forge = importer.forge
    for number in range(1, 281):
        forge.pull(number, number)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BATON_", "GITHUB_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *arguments(importer)],
        env=kept | {"PYTHONPATH": str(ROOT)} | environment(importer, dsn),
    )

    async def killed(requests: int) -> None:
        if requests == 6:  # when the second page is half read
            process.kill()
            forge.each = None

    forge.each = killed
    assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
    assert len(await importer.ids()) == 200
    await importer.run()
    ids = await importer.ids()
    assert len(ids) == len(set(ids)) == 280 * 2
