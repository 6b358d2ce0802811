"""One day of a team, sent by its tools over HTTP, and what is written about it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import orjson
import pytest
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent
from conftest import Caller
from starlette.applications import Starlette
from story_of_sources import SECRET, SIGNS, at, told

from app.cipher import Cipher, new_key
from app.db import Database
from app.main import create_app
from app.settings import Limits, Settings
from tasks.intake import Mapper
from tasks.sources.cloudevents import MANY

Drain = Callable[..., Awaitable[None]]
Post = Callable[[str, bytes, Mapping[str, str]], Awaitable[httpx.Response]]
KEY = new_key()


@pytest.fixture
async def app(dsn: str, limits: Limits) -> Starlette:
    return create_app(Settings(database_url=dsn, limits=limits, secret_keys=(KEY,)))


@pytest.fixture
async def post(base_url: str, caller: Caller, sql: asyncpg.Connection) -> AsyncIterator[Post]:
    """Sends deliveries, each source to an integration of its own, whose project is the caller's."""
    ids = {}
    for source in SIGNS:
        ids[source] = await sql.fetchval(
            "insert into integrations (source, user_id, project_id, workspace_name) "
            "values ($1, $2, $3, 'acme') returning id::text",
            source, caller.user_id, caller.project_id,
        )  # fmt: skip
        await sql.execute(
            "insert into integration_secrets (integration_id, name, value) "
            "values ($1, 'signing', $2)",
            ids[source], Cipher((KEY,)).encrypt(SECRET),
        )  # fmt: skip
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=30) as http:

        async def send(source: str, raw: bytes, headers: Mapping[str, str]) -> httpx.Response:
            return await http.post(f"/hooks/{ids[source]}", content=raw, headers=headers)

        yield send


async def test_one_correlation_joins_ticket_pull_request_thread_and_alert_without_the_noise(
    post: Post, caller: Caller, database: Database, drain: Drain, tmp_path: Path
) -> None:
    """`pytest tests/test_story.py --basetemp DIRECTORY` leaves the three artifacts in it."""
    story = told()
    for number, sent in enumerate(story):
        answer = await post(sent.source, *sent.signed(number))
        assert (answer.status_code, answer.json()) == (202, {"status": "accepted"}), sent
    await Mapper(database).drain()

    path = f"/projects/{caller.project_id}/insights"
    made: dict[str, Any] = {}
    for name, where in (
        ("handoff", "/handoffs"),
        ("correlation", f"{path}/correlation"),
        ("onboarding", f"{path}/onboarding"),
    ):
        job_id = await caller.submit(where)
        await drain()
        made[name] = (await caller.job(job_id))["result"]
        (tmp_path / f"{name}.md").write_text(made[name]["markdown"])

    # One event each: nothing of the story is lost, and of the noise nothing either.
    events = (await caller.http.get("/events?limit=100")).json()["events"]
    passed = 1  # a build that passed elsewhere than on the default branch is not told
    assert len(events) == len(story) - passed

    found = made["correlation"]["data"]["correlations"]
    [joined] = [each for each in found if "ENG-482" in each["references"]]
    of_it = [event for event in events if event["id"] in joined["event_ids"]]
    of_none = [event for event in events if event["id"] not in joined["event_ids"]]
    kinds = {(event["source"], event["event_type"]) for event in of_it}
    assert {
        ("linear", "issue.opened"), ("linear", "issue.completed"),
        ("github", "pull_request.opened"), ("github", "pull_request.merged"),
        ("github", "review.submitted"), ("github", "commit"),
        ("slack", "message"), ("slack", "message.reply"),
        ("alertmanager", "alert.firing"), ("alertmanager", "alert.resolved"),
        ("pagerduty", "incident.triggered"), ("pagerduty", "incident.resolved"),
        ("sentry", "issue.created"), ("sentry", "issue.resolved"),
        ("incident_io", "incident.created"), ("incident_io", "incident.closed"),
        ("circleci", "build.failed"), ("vercel", "deployment.succeeded"),
        ("notion", "page.updated"),
    } <= kinds  # fmt: skip
    assert len(of_none) == sum(sent.noise for sent in story)
    assert {event["source"] for event in of_none} == {
        "slack", "grafana", "linear", "buildkite", "netlify",
    }  # fmt: skip
    assert joined["title"] == "ENG-482: Vouchers are counted twice at checkout"

    handoff = made["handoff"]
    assert any("Count a voucher once per cart" in change for change in handoff["key_changes"])
    assert any("lock of a voucher" in decision for decision in handoff["decisions"])
    assert not any("ENG-482" in step or "INC-57" in step for step in handoff["next_steps"])
    assert "checkout" in made["onboarding"]["markdown"]


async def test_a_cloud_event_arrives_in_each_mode_as_its_sdk_sends_it(
    post: Post, caller: Caller, database: Database
) -> None:
    def event(number: int, data: Any, kind: str = "application/json") -> CloudEvent:
        return CloudEvent(
            {
                "id": f"e{number}", "source": "/sites/döner", "type": "com.acme.deploy.failed",
                "subject": "Nightly, of “main”", "time": at(9, number), "datacontenttype": kind,
            },
            data,
        )  # fmt: skip

    secret = {"authorization": f"Bearer {SECRET}"}
    messages = [
        to_binary_event(event(1, {"title": "One", "url": "https://ci.acme.dev/1"})),
        to_binary_event(event(2, "Two is told in words", "text/plain")),
        to_structured_event(event(3, {"message": "Three"})),
    ]
    for message in messages:
        for status in (202, 200):  # the second time it is known
            answer = await post("netlify", message.body, {**message.headers, **secret})
            assert answer.status_code == status, answer.text
    batch = [orjson.loads(to_structured_event(event(n, {"title": f"{n}"})).body) for n in (4, 5)]
    answer = await post("netlify", orjson.dumps(batch), {"content-type": MANY, **secret})
    assert answer.status_code == 202
    await Mapper(database).drain()

    listed = (await caller.http.get("/events?limit=100")).json()["events"]
    assert [(e["title"], e["external_id"]) for e in reversed(listed)] == [
        ("One", "/sites/döner e1"),
        ("com.acme.deploy.failed Nightly, of “main”", "/sites/döner e2"),
        ("Three", "/sites/döner e3"),
        ("4", "/sites/döner e4"),
        ("5", "/sites/döner e5"),
    ]
    assert {e["event_type"] for e in listed} == {"com.acme.deploy.failed"}
    assert listed[-1]["url"] == "https://ci.acme.dev/1"
    assert listed[-2]["content"] == "Two is told in words"


async def test_what_is_no_cloud_event_is_refused_where_one_is_promised(post: Post) -> None:
    headers = {"authorization": f"Bearer {SECRET}", "content-type": "application/cloudevents+json"}
    answer = await post("netlify", b'{"specversion": "1.0", "id": "1", "type": "x"}', headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "source: is required.")
