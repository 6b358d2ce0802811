"""What belongs to others looks like what is not there, byte for byte, in every operation."""

import re
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import httpx
import orjson
import pytest
from chat_servers import TALK, ChatServer, chat_settings, connect
from conftest import Caller, Workers
from starlette.applications import Starlette
from test_worker import running

from app.main import OPERATIONS, P, create_app
from app.openapi import EXAMPLES, Operation
from app.settings import Limits, Settings

UNKNOWN = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
MALFORMED = ("x", "1", "null", UNKNOWN.upper(), UNKNOWN[:-1], f"{UNKNOWN}0", "%20", "é")
INSIGHT_ASKED = "/projects/PROJECT/insights/correlation"

Drain = Callable[..., Awaitable[None]]


class Owned:
    """One thing of each kind, all of one caller."""

    def __init__(self, caller: Caller, ids: dict[str, str]) -> None:
        self.caller = caller
        self.ids = ids


@pytest.fixture
def app(dsn: str, limits: Limits, chat: ChatServer) -> Starlette:
    return create_app(Settings(database_url=dsn, limits=limits, **chat_settings(chat)))


@pytest.fixture
async def owned(caller: Caller, drain: Drain, sql: asyncpg.Connection) -> Owned:
    """What the caller has and the stranger must not see."""
    for source in ("discord", "slack"):
        await connect(sql, caller.user_id, source)
    path = INSIGHT_ASKED.replace("PROJECT", caller.project_id)
    await caller.ingest(
        {"title": "fix: ENG-4 leak", "external_id": "1", "branch": "main", "resource": "acme/web"},
        {"title": "ENG-4 is fixed", "source": "slack", "external_id": "2"},
    )
    handoff, insight = await caller.submit(), await caller.submit(path)
    await drain()
    ids = {"project_id": caller.project_id, "job_id": handoff}
    for name, job in (("handoff_id", handoff), ("insight_id", insight)):
        ids[name] = (await caller.job(job))["job"]["result_id"]
        assert ids[name]
    body = {"project_id": caller.project_id, "url": "https://hooks.example/"}
    webhook = (await caller.http.post("/webhooks", json=body)).json()["webhook"]["id"]
    await caller.http.post(f"/jobs/{await caller.submit()}/cancel")
    listed = (await caller.http.get(f"/webhooks/deliveries?webhook_id={webhook}")).json()
    [delivery] = listed["deliveries"]
    asked = {"source": "github", "project_id": caller.project_id}
    connected = (await caller.http.post("/integrations", json=asked)).json()["integration"]
    more = {"webhook_id": webhook, "delivery_id": delivery["id"], "integration_id": connected["id"]}
    return Owned(caller, ids | more)


def uses(operation: Operation) -> list[tuple[str, str]]:
    """Where an operation takes an id: `(place, name)`."""
    names = ("project_id", "job_id", "handoff_id", "insight_id", "webhook_id", "delivery_id",
             "integration_id")  # fmt: skip
    found = [("path", name) for name in names if f"{{{name}}}" in operation.path]
    if operation.query and not operation.body:
        found += [("query", name) for name in names if name in operation.query.model_fields]
    if operation.body and "project_id" in operation.body.model_fields and not found:
        found.append(("body", "project_id"))
    return found


async def ask(
    http: httpx.AsyncClient, operation: Operation, place: str, name: str, value: str, owned: Owned
) -> tuple[int, bytes, list[tuple[str, str]]]:
    """A request that is good but for the id; what comes back, without the date."""
    ids = owned.ids | ({name: value} if place == "path" else {})
    path = re.sub(r"{(\w+)}", lambda found: ids[found[1]], operation.path.removeprefix(P))
    body: Any = dict(EXAMPLES[operation.body]) if operation.body else None
    if operation.name == "send_to_slack":
        body["channel_id"] = TALK
    if body and place == "path" and "project_id" in body:
        body["project_id"] = owned.ids["project_id"]
    if body and "resources" in body:
        body["resources"] = []
    if place == "query":
        path += f"?{name}={value}"
    if place == "body":
        body[name] = value
    answer = await http.request(operation.method, path, json=body, headers={"X-Request-Id": "same"})
    kept = [(k, v) for k, v in answer.headers.items() if k != "date"]
    return answer.status_code, answer.content, kept


async def contents(sql: asyncpg.Connection) -> dict[str, Any]:
    """All rows of all tables."""
    tables = await sql.fetch("select tablename from pg_tables where schemaname = 'public'")
    return {t: await sql.fetch(f"select * from {t} order by 1") for [t] in tables}


async def test_a_foreign_id_looks_like_an_unknown_and_like_a_malformed_one(
    owned: Owned, stranger: Caller, sql: asyncpg.Connection
) -> None:
    before = await contents(sql)
    asked = 0
    for operation in OPERATIONS:
        for place, name in uses(operation):
            foreign = await ask(stranger.http, operation, place, name, owned.ids[name], owned)
            assert foreign[0] == 404, (operation.name, place, foreign)
            for other in (UNKNOWN, *MALFORMED):
                answer = await ask(stranger.http, operation, place, name, other, owned)
                assert answer == foreign, (operation.name, place, other)
            asked += 1
    assert asked >= 13
    assert await contents(sql) == before


async def test_lines_of_events_reach_no_foreign_project_either(
    owned: Owned, stranger: Caller, sql: asyncpg.Connection
) -> None:
    before = await contents(sql)
    line = {"source": "github", "event_type": "push", "title": "-"}
    seen = set()
    for project_id in (owned.ids["project_id"], UNKNOWN, "x"):
        for query, own in ((f"?project_id={project_id}", {}), ("", {"project_id": project_id})):
            answer = await stranger.http.post(
                f"/events{query}",
                content=orjson.dumps(line | own),
                headers={"Content-Type": "application/x-ndjson", "X-Request-Id": "same"},
            )
            seen.add((answer.status_code, answer.content))
    [(status, _)] = seen
    assert status == 404
    assert await contents(sql) == before


async def test_the_owner_gets_what_the_stranger_does_not(owned: Owned, worker: Workers) -> None:
    late = {"PATCH": 1, "DELETE": 2}  # what is archived or gone is not there for the others
    for operation in sorted(OPERATIONS, key=lambda o: late.get(o.method, 0)):
        expected = 409 if operation.name == "retry_job" else operation.status
        for place, name in uses(operation):
            async with running(*([worker()[0]] if operation.name == "answer_question" else ())):
                answer = await ask(
                    owned.caller.http, operation, place, name, owned.ids[name], owned
                )
            assert answer[0] == expected, (operation.name, place, answer)


async def test_an_id_of_one_kind_opens_nothing_of_another(owned: Owned) -> None:
    for operation in OPERATIONS:
        for place, name in uses(operation):
            for kind, value in owned.ids.items():
                if kind != name:
                    answer = await ask(owned.caller.http, operation, place, name, value, owned)
                    assert answer[0] == 404, (operation.name, place, kind)


async def test_lists_never_hold_what_is_foreign(owned: Owned, stranger: Caller) -> None:
    empty = {
        "/events": {"events": []},
        "/events?source=slack": {"events": []},
        "/handoffs?status=all": {"handoffs": []},
        "/handoffs/filters": {"filters": {}},
        f"/projects/{stranger.project_id}/insights?status=all": {"insights": []},
        "/webhooks": {"webhooks": []},
        "/integrations": {"integrations": []},
        f"/webhooks/deliveries?project_id={stranger.project_id}": {"deliveries": []},
    }
    for path, expected in empty.items():
        assert (await stranger.http.get(path)).json() == expected
        own = path.replace(stranger.project_id, owned.caller.project_id)
        assert (await owned.caller.http.get(own)).json() != expected
    [project] = (await stranger.http.get("/projects")).json()["projects"]
    assert project["id"] == stranger.project_id


async def test_an_event_of_one_project_is_no_duplicate_in_another(
    owned: Owned, stranger: Caller
) -> None:
    same = {"title": "-", "external_id": "1"}
    assert await stranger.ingest(same) == {"accepted": 1, "duplicates": 0}
    assert await owned.caller.ingest(same) == {"accepted": 0, "duplicates": 1}
    [event] = (await stranger.http.get("/events")).json()["events"]
    assert event["project_id"] == stranger.project_id


async def test_an_artifact_is_made_of_its_own_projects_events_only(
    owned: Owned, stranger: Caller, drain: Drain
) -> None:
    await stranger.ingest({"title": "feat: something of mallory", "external_id": "3"})
    job_id = await stranger.submit()
    await drain()
    result = (await stranger.job(job_id))["result"]
    [event] = (await stranger.http.get("/events")).json()["events"]
    assert result["related_event_ids"] == [event["id"]]
    assert "ENG-4" not in repr(result)


async def test_members_see_what_their_organization_has_and_former_members_do_not(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    await sql.execute("select ops.add_member($1, $2, 'admin')", organization, caller.user_id)
    await sql.execute("select ops.add_member($1, $2)", organization, stranger.user_id)
    project_id = str(
        await sql.fetchval("select ops.create_project('web', $1, $2)", caller.user_id, organization)
    )
    event = {"source": "github", "event_type": "push", "title": "feat: one for all"}
    batch = {"project_id": project_id, "events": [event]}
    assert (await caller.http.post("/events", json=batch)).status_code == 200
    job_id = await caller.submit(project_id=project_id)
    await drain()
    seen = await stranger.job(job_id)
    assert seen["result"]["scope_type"] == "project"
    handoff = f"/handoffs/{seen['result']['id']}"
    assert (await stranger.http.patch(handoff, json={"status": "active"})).status_code == 200
    assert len((await stranger.http.get("/events")).json()["events"]) == 1

    await sql.execute("delete from members where user_id = $1", stranger.user_id)

    assert (await stranger.http.get(f"/jobs/{job_id}")).status_code == 404
    assert (await stranger.http.patch(handoff, json={"status": "archived"})).status_code == 404
    assert (await stranger.http.post("/events", json=batch)).status_code == 404
    assert (await stranger.http.get("/events")).json() == {"events": []}
    assert (await stranger.http.get("/handoffs?status=all")).json() == {"handoffs": []}
    listed = (await stranger.http.get("/projects")).json()
    assert listed["account_type"] == "personal"
    assert [p["id"] for p in listed["projects"]] == [stranger.project_id]
    assert (await caller.job(job_id))["result"]["status"] == "active"


async def test_the_owner_of_an_organizations_project_is_out_when_out_of_the_organization(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    await sql.execute("select ops.add_member($1, $2)", organization, caller.user_id)
    project_id = str(
        await sql.fetchval("select ops.create_project('web', $1, $2)", caller.user_id, organization)
    )
    path = f"/projects/{project_id}/insights"
    assert (await caller.http.get(path)).status_code == 200
    await sql.execute("delete from members")
    assert (await caller.http.get(path)).status_code == 404
