"""What the forges and build services send, as events, on their own documented payloads."""

import copy
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stories import correlations, ticket

from app.history import open_history, read_events
from app.schemas import EventInput
from tasks import signals
from tasks.changes import changes_of
from tasks.context import Event
from tasks.sources import bitbucket, buildkite, circleci, github, gitlab, vercel
from tasks.sources.event import Delivery, moment

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
PAYLOADS = Path(__file__).parent / "payloads"
TABLE = PAYLOADS / "forges.md"
SOURCES: dict[str, ModuleType] = {
    "github": github,
    "gitlab": gitlab,
    "bitbucket": bitbucket,
    "circleci": circleci,
    "buildkite": buildkite,
    "vercel": vercel,
}
FILES = [path for source in SOURCES for path in sorted((PAYLOADS / source).glob("*.json"))]
COLUMNS = (
    "payload", "event_type", "title", "resource", "default branch", "branch", "priority", "author",
    "occurred_at", "external_id", "role", "state", "own", "url",
)  # fmt: skip


def headers(source: str, name: str) -> dict[str, str]:
    """As the source would send them; a file is called after its event."""
    if source == "github":
        return {"x-github-event": name.partition(".")[0]}
    if source == "bitbucket":
        return {"x-event-key": ":".join(name.split(".")[:2])}
    return {}


def delivery(path: Path) -> Delivery:
    source, name = path.parent.name, path.stem
    return Delivery(headers(source, name), json.loads(path.read_text()), NOW)


def rows(source: str, given: Delivery) -> list[dict[str, Any]]:
    """The events as they are stored; each fits the table, whatever was sent."""
    made = [event.row(source, NOW) for event in SOURCES[source].events(given)]
    for row in made:
        EventInput.model_validate({k: v for k, v in row.items() if k != "in"})
        json.dumps(row, allow_nan=False)
    return made


def read(row: dict[str, Any]) -> signals.Signal:
    fields = {k: v for k, v in row.items() if k not in ("in", "occurred_at")}
    occurred_at = moment(row["occurred_at"])
    assert occurred_at
    return signals.read(Event(id="e", occurred_at=occurred_at, **fields))


def shown(path: Path) -> Iterator[str]:
    source = path.parent.name
    made = rows(source, delivery(path))
    payload = f"{source}/{path.name}"
    if not made:
        yield f"| {payload} | not told |{' |' * (len(COLUMNS) - 2)}"
    for row in made:
        signal = read(row)
        where = row["in"] or {}
        arrived = "when it arrived" if row["occurred_at"] == "2026-03-02T12:00:00Z" else ""
        cells = (
            payload, row["event_type"], row["title"], row["resource"], where.get("default_branch"),
            row["branch"], row["priority"], row["author"], arrived or row["occurred_at"],
            row["external_id"], signal.role, signal.state, signal.own, row["url"],
        )  # fmt: skip
        yield f"| {' | '.join(str(cell or '').replace('|', '/') for cell in cells)} |"


def table() -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *(line for path in FILES for line in shown(path))]) + "\n"


def test_each_documented_payload_gives_the_events_that_the_table_shows() -> None:
    """After a change that is meant, `python tests/test_source_forges.py` writes the table anew."""
    assert table() == TABLE.read_text()


ODD: tuple[Any, ...] = (
    None,
    "",
    "x\0y",
    "\u2028",
    -1,
    10**30,
    1.5,
    True,
    [],
    {},
    [None],
    [{}],
    {"id": [1]},
    "9" * 400,
)


def mutations(body: Any) -> Iterator[Any]:
    """The body with each of its values, at any depth, taken out or of another shape."""
    for at, path in enumerate(paths(body)):
        for turn in range(3):
            changed = copy.deepcopy(body)
            holder = changed
            for step in path[:-1]:
                holder = holder[step]
            if turn == 0 and isinstance(holder, dict):
                del holder[path[-1]]
            else:
                holder[path[-1]] = ODD[(at * 3 + turn) % len(ODD)]
            yield changed


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*above, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*above, key))


@pytest.mark.parametrize("source", SOURCES)
def test_odd_shapes_give_poorer_events_and_never_an_error(source: str) -> None:
    for path in (path for path in FILES if path.parent.name == source):
        given = delivery(path)
        for body in mutations(given.body):
            rows(source, Delivery(given.headers, body, NOW))
    for body in ODD:
        rows(source, Delivery({}, body, NOW))
        for name in (
            "push",
            "pull_request",
            "issues",
            "release",
            "repo:push",
            "pullrequest:created",
        ):
            rows(source, Delivery({"x-github-event": name, "x-event-key": name}, body, NOW))


def test_facts_without_a_number_of_their_own_get_no_id_that_others_would_share() -> None:
    body = {
        "action": "opened",
        "pull_request": {"title": "One"},
        "repository": {"full_name": "a/b"},
    }
    (row,) = rows("github", Delivery({"x-github-event": "pull_request"}, body, NOW))
    assert (row["event_type"], row["external_id"]) == ("pull_request.opened", None)
    published = {"action": "published", "release": {"tag_name": "v1"}, "repository": REPOSITORY}
    (row,) = rows("github", Delivery({"x-github-event": "release"}, published, NOW))
    assert (row["title"], row["external_id"]) == ("v1", None)


def test_a_leaked_secret_is_told_without_the_secret() -> None:
    given = delivery(PAYLOADS / "github" / "secret_scanning_alert.created.json")
    assert given.body["alert"]["secret"] not in json.dumps(rows("github", given))


def test_a_form_of_github_is_read_as_its_payload() -> None:
    given = delivery(PAYLOADS / "github" / "issues.opened.json")
    form = Delivery(given.headers, {"payload": json.dumps(given.body)}, NOW)
    assert rows("github", form) == rows("github", given)


def test_a_push_and_the_import_of_a_clone_give_the_same_facts(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        named = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
        command = ["git", "-C", str(tmp_path), *named, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "Keep the session (#12)")
    git("tag", "v1")
    imported = list(read_events(open_history(tmp_path, name="acme/web")))
    sha = git("rev-parse", "HEAD")
    pushed = [
        row
        for ref, created, commits in [
            ("refs/heads/main", False, [{"id": sha, "message": "Keep the session (#12)"}]),
            ("refs/tags/v1", True, []),
        ]
        for row in rows("github", Delivery({"x-github-event": "push"}, {
            "ref": ref, "created": created, "commits": commits, "repository": REPOSITORY,
        }, NOW))
    ]  # fmt: skip
    facts = {(row["event_type"], row["external_id"], row["resource"]) for row in imported}
    assert {(row["event_type"], row["external_id"], row["resource"]) for row in pushed} == facts
    assert len(facts) == 2


def test_a_tag_is_one_fact_whether_the_push_or_the_ref_tells_it() -> None:
    ids = {
        row["external_id"]
        for name in ("push.tag", "create.tag")
        for row in rows("github", delivery(PAYLOADS / "github" / f"{name}.json"))
    }
    assert ids == {"tag:Codertocat/Hello-World:simple-tag"}


SHA = "4f1c0d9e2ab37c5d6e8f90a1b2c3d4e5f6a7b8c9"
REPOSITORY = {
    "full_name": "acme/web",
    "default_branch": "main",
    "html_url": "https://github.com/acme/web",
}


def activity(hour: int, source: str, header: str, body: dict[str, Any]) -> list[Event]:
    """What a delivery comes to, as a worker reads it back."""
    at = NOW + timedelta(hours=hour)
    named = {"x-github-event": header, "x-event-key": header}
    found = []
    for event in SOURCES[source].events(Delivery(named, body, at)):
        row = event.row(source, at)
        fields = {key: value for key, value in row.items() if key not in ("in", "occurred_at")}
        name = f"{source}-{row['event_type']}-{row['external_id']}"
        found.append(Event(id=name, occurred_at=moment(row["occurred_at"]) or at, **fields))
    return found


def pull_request(action: str, **given: Any) -> dict[str, Any]:
    pull = {
        "number": 12, "title": "Keep the session over a redirect", "body": "Fixes the login loop.",
        "html_url": "https://github.com/acme/web/pull/12", "user": {"login": "ada"},
        "head": {"ref": "ada/eng-42-login"}, "base": {"ref": "main"},
        "created_at": "2026-03-02T13:00:00Z", "updated_at": "2026-03-02T14:00:00Z",
    } | given  # fmt: skip
    return {"action": action, "pull_request": pull, "repository": REPOSITORY}


def story() -> list[Event]:
    """A ticket, the request that took it up, its squash merge, and what came of that."""
    merged = pull_request(
        "closed", merged=True, merged_at="2026-03-02T14:00:00Z", merge_commit_sha=SHA
    )
    squash = {
        "id": SHA, "distinct": True, "timestamp": "2026-03-02T14:00:00Z",
        "added": ["app/session.py"],
        "message": "Keep the session over a redirect (#12)\n\nFixes the login loop.",
        "url": f"https://github.com/acme/web/commit/{SHA}", "author": {"name": "Ada Lovelace"},
    }  # fmt: skip
    push = {"ref": "refs/heads/main", "commits": [squash], "repository": REPOSITORY}
    build = {
        "type": "workflow-completed", "project": {"name": "web", "slug": "gh/acme/web"},
        "workflow": {"id": "w1", "name": "test", "status": "failed",
                     "stopped_at": "2026-03-02T14:10:00Z"},
        "pipeline": {"vcs": {"branch": "main", "revision": SHA,
                             "commit": {"subject": "Keep the session over a redirect (#12)"}}},
    }  # fmt: skip
    deployed = {
        "type": "deployment.succeeded", "createdAt": "2026-03-02T14:20:00Z",
        "payload": {"target": "production", "project": {"id": "prj_1", "name": "web"},
                    "deployment": {"id": "dpl_1", "meta": {"githubCommitSha": SHA,
                                                           "githubCommitRef": "main"}}},
    }  # fmt: skip
    return [
        ticket("ENG-42: Login loops after a redirect", external_id="ENG-42", occurred_at=NOW),
        *activity(1, "github", "pull_request", pull_request("opened")),
        *activity(2, "github", "pull_request", merged),
        *activity(2, "github", "push", push),
        *activity(2, "circleci", "", build),
        *activity(2, "vercel", "", deployed),
    ]


def test_one_story_is_told_as_one_from_the_ticket_to_the_deployment() -> None:
    events = story()
    found = correlations(*events).correlations
    whole = max(found, key=lambda thread: len(thread.event_ids))
    assert set(whole.event_ids) == {event.id for event in events}
    assert whole.sources == ["linear", "github", "circleci", "vercel"]
    assert whole.text == (
        "ENG-42 was opened in linear on 2 Mar, taken up in acme/web#12 on 2 Mar, changed by "
        "acme/web#12 on 2 Mar, broken in circleci on 2 Mar and deployed by vercel on 2 Mar. "
        "Tied by ENG-42, acme/web#12 and 4f1c0d9"
    )


def test_the_branch_of_an_open_request_names_its_ticket() -> None:
    events = story()[:2]
    (thread,) = correlations(*events).correlations
    assert thread.references[0] == "ENG-42"
    assert len(thread.event_ids) == 2


def test_the_squash_merge_of_a_pull_request_is_one_change_with_its_files() -> None:
    changes = changes_of([signals.read(event) for event in story()][::-1], {}, {}, several=False)
    (change,) = changes
    assert (change.text, change.reference, change.files) == (
        "Keep the session over a redirect",
        "(#12)",
        ("app/session.py",),
    )


if __name__ == "__main__":
    TABLE.write_text(table())
