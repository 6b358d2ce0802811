"""Which project a resource is of, what waits for one, and the saved scope of a project."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import orjson
import pytest
from conftest import Caller
from conftest import connected as connected_to

from tasks.intake import Mapper

Drain = Callable[..., Awaitable[None]]
UNKNOWN = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"


class Tracked:
    """An integration with resources that events have come of."""

    def __init__(self, sql: asyncpg.Connection, caller: Caller, integration_id: str) -> None:
        self.sql = sql
        self.caller = caller
        self.id = integration_id

    async def resource(self, name: str, label: str = "", kind: str = "repository") -> None:
        """One that has no project."""
        await self.sql.execute(
            "insert into resources (integration_id, id, name, type, default_branch) "
            "values ($1, $2, $3, $4, 'trunk')",
            self.id, name, label or name, kind,
        )  # fmt: skip

    async def wait(self, resource: str, *titles: str, age: str = "0 s", **more: Any) -> None:
        """Events of it that wait, as a mapping leaves them."""
        source = await self.sql.fetchval("select source from integrations where id = $1", self.id)
        for title in titles:
            event = {"source": source, "event_type": "commit", "title": title, "resource": resource,
                     "external_id": title, **more}  # fmt: skip
            await self.sql.execute(
                "insert into untracked_events (integration_id, resource_id, external_id, event, "
                "created_at) values ($1, $2, $3, $4, baton_now() - $5::text::interval)",
                self.id, resource, title, orjson.dumps(event).decode(), age,
            )  # fmt: skip

    async def put(self, *names: str, project_id: str = "", **more: Any) -> Any:
        """PUT /projects/{id}/resources."""
        chosen = [{"integration_id": self.id, "resource_id": name, **more} for name in names]
        path = f"/projects/{project_id or self.caller.project_id}/resources"
        return await self.caller.http.put(path, json={"resources": chosen})

    async def titles(self, project_id: str = "") -> set[str]:
        """Of the events of a project."""
        path = f"/events?limit=100&project_id={project_id or self.caller.project_id}"
        return {e["title"] for e in (await self.caller.http.get(path)).json()["events"]}


async def connected(
    sql: asyncpg.Connection, caller: Caller, source: str = "github", **body: Any
) -> Tracked:
    """An integration of the caller's."""
    answer = await caller.http.post("/integrations", json={"source": source, **body})
    return Tracked(sql, caller, answer.json()["integration"]["id"])


@pytest.fixture
async def tracked(sql: asyncpg.Connection, caller: Caller) -> Tracked:
    """One of two repositories; events of both wait."""
    made = await connected(sql, caller)
    for name in ("acme/web", "acme/api"):
        await made.resource(name)
        await made.wait(name, f"{name} one", f"{name} two")
    return made


async def untracked(caller: Caller) -> list[str]:
    """GET /integrations/untracked."""
    answer = await caller.http.get("/integrations/untracked")
    assert answer.status_code == 200
    return [each["resource_id"] for each in answer.json()]


# --- GET /integrations/untracked ------------------------------------------------------------


async def test_get_untracked_lists_resources_with_recent_events_and_no_project(
    tracked: Tracked, caller: Caller, stranger: Caller
) -> None:
    ages = {"acme/web": "1 hour", "acme/api": "1 minute", "acme/old": "15 days"}
    await tracked.resource("acme/old")
    for name, age in ages.items():
        await tracked.sql.execute(
            "update resources set last_event_at = baton_now() - $1::text::interval where id = $2",
            age, name,
        )  # fmt: skip
    answer = (await caller.http.get("/integrations/untracked")).json()
    assert [each["resource_id"] for each in answer] == ["acme/api", "acme/web"]
    contract = {"source": "github", "resource_id": "acme/api", "resource_name": "acme/api",
                "resource_type": "repository"}  # fmt: skip
    assert contract.items() <= answer[0].items()
    assert answer[0]["integration_id"] == tracked.id
    assert await untracked(stranger) == []
    await tracked.put("acme/api")
    assert await untracked(caller) == ["acme/web"]


# --- PUT /projects/{id}/resources -----------------------------------------------------------


async def test_put_resources_pulls_in_what_has_waited(tracked: Tracked, caller: Caller) -> None:
    await tracked.wait("acme/web", "came long ago", age="15 days")
    answer = await tracked.put("acme/web", source="github")
    assert answer.status_code == 200
    [shown] = answer.json()["resources"]
    assert shown == {
        "source": "github", "integration_id": tracked.id, "resource_id": "acme/web",
        "resource_name": "acme/web", "resource_type": "repository", "default_branch": "trunk",
        "last_event_at": shown["last_event_at"],
    }  # fmt: skip
    assert await tracked.titles() == {"acme/web one", "acme/web two"}
    left = await tracked.sql.fetch("select distinct resource_id from untracked_events")
    assert [row[0] for row in left] == ["acme/api"]
    events = (await caller.http.get("/events")).json()["events"]
    assert {event["user_id"] for event in events} == {caller.user_id}
    listed = await caller.http.get(f"/projects/{caller.project_id}/resources")
    assert listed.json() == answer.json()


async def test_put_resources_is_the_whole_set_and_twice_changes_nothing(tracked: Tracked) -> None:
    for names in (("acme/web", "acme/api"), ("acme/api",), ("acme/api",), ()):
        for _ in range(2):
            answer = (await tracked.put(*names)).json()
            assert {each["resource_id"] for each in answer["resources"]} == set(names)
    assert len(await tracked.titles()) == 4  # they stay where they are
    await tracked.wait("acme/web", "after it was taken away")
    await tracked.put("acme/api")
    assert len(await tracked.titles()) == 4


async def test_put_resources_moves_one_from_another_project_and_leaves_its_events(
    tracked: Tracked, caller: Caller, sql: asyncpg.Connection
) -> None:
    other = str(await sql.fetchval("select ops.create_project('other', $1)", caller.user_id))
    await tracked.put("acme/web")
    await tracked.wait("acme/web", "new")
    assert (await tracked.put("acme/web", project_id=other)).status_code == 200
    assert await tracked.titles(other) == {"new"}
    assert await tracked.titles() == {"acme/web one", "acme/web two"}
    listed = await caller.http.get(f"/projects/{caller.project_id}/resources")
    assert listed.json() == {"resources": []}


async def test_a_long_line_comes_in_piece_by_piece_and_all_of_it(
    tracked: Tracked, caller: Caller
) -> None:
    await tracked.sql.execute(
        "insert into untracked_events (integration_id, resource_id, external_id, event) "
        "select $1, 'acme/web', n::text, jsonb_build_object('source', 'github', 'event_type', "
        "'commit', 'title', 'x', 'external_id', n::text, 'resource', 'acme/web') "
        "from generate_series(1, 1000) n",
        tracked.id,
    )
    await tracked.put("acme/web")
    assert await tracked.sql.fetchval("select count(*) from events") == 1002
    assert await tracked.sql.fetchval("select count(*) from resources where pulling") == 0


async def test_what_nobody_came_to_pull_in_the_next_sweep_does(
    tracked: Tracked, caller: Caller, api: Any, database: Any
) -> None:
    move = "select move_resources($1, $2, $3)"  # as far as a request came that was cut off
    await tracked.sql.execute(move, [tracked.id], ["acme/web"], caller.project_id)
    assert await tracked.titles() == set()
    for pool in (api, database):
        while await pool.value("pull_events", None, 1) is not None:
            pass
    assert await tracked.titles() == {"acme/web one", "acme/web two"}


@pytest.mark.parametrize(
    ("chosen", "status", "begins"),
    [
        ({"integration_id": UNKNOWN}, 404, "resources[1].integration_id: no integration"),
        ({"integration_id": "x"}, 404, "resources[1].integration_id: no integration"),
        ({"resource_id": "acme/nope"}, 404, "resources[1].resource_id: the integration has no"),
        ({"source": "slack"}, 404, "resources[1].source: the integration is of the source github"),
        ({"resource_id": ""}, 400, "resources[1].resource_id: must have at least 1"),
        ({"resource": "x"}, 400, "resources[1].resource: is not a known field"),
    ],
)
async def test_put_resources_names_the_one_that_is_wrong_and_changes_nothing(
    tracked: Tracked, caller: Caller, chosen: Any, status: int, begins: str
) -> None:
    good = {"integration_id": tracked.id, "resource_id": "acme/api"}
    wrong = {"integration_id": tracked.id, "resource_id": "acme/web"} | chosen
    answer = await caller.http.put(
        f"/projects/{caller.project_id}/resources", json={"resources": [good, wrong]}
    )
    assert answer.status_code == status
    assert answer.json()["error"].startswith(begins), answer.text
    assert await tracked.sql.fetchval("select count(project_id) from resources") == 0


async def test_put_resources_takes_no_resource_of_somebody_else(
    tracked: Tracked, caller: Caller, stranger: Caller
) -> None:
    chosen = {"resources": [{"integration_id": tracked.id, "resource_id": "acme/web"}]}
    unknown = {"resources": [{"integration_id": UNKNOWN, "resource_id": "acme/web"}]}
    path = f"/projects/{stranger.project_id}/resources"
    answers = [await stranger.http.put(path, json=body) for body in (chosen, unknown)]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.json()["error"] for answer in answers}) == 1
    answer = await stranger.http.put(
        f"/projects/{caller.project_id}/resources", json={"resources": []}
    )
    assert answer.status_code == 404


async def test_a_member_sees_the_resources_of_a_project_and_an_admin_changes_them(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    await sql.execute("select ops.add_member($1, $2, 'admin')", organization, caller.user_id)
    await sql.execute("select ops.add_member($1, $2)", organization, stranger.user_id)
    project = str(
        await sql.fetchval("select ops.create_project('web', $1, $2)", caller.user_id, organization)
    )
    tracked = await connected(sql, caller, organization_id=str(organization))
    await tracked.resource("acme/web")
    as_member = Tracked(sql, stranger, tracked.id)
    answer = await as_member.put("acme/web", project_id=project)
    assert (answer.status_code, answer.json()["error"]) == (
        403,
        "Only an owner or admin of the project may say which resources it has.",
    )
    assert (await tracked.put("acme/web")).json()["error"] == (
        "resources[0].integration_id: an integration of an organization reaches projects of that"
        " organization only."
    )
    await tracked.put("acme/web", project_id=project)
    listed = await stranger.http.get(f"/projects/{project}/resources")
    assert [each["resource_id"] for each in listed.json()["resources"]] == ["acme/web"]


async def test_two_at_once_neither_wait_for_each_other_for_ever_nor_lose_an_event(
    tracked: Tracked, caller: Caller, sql: asyncpg.Connection
) -> None:
    other = str(await sql.fetchval("select ops.create_project('other', $1)", caller.user_id))
    names = [f"acme/r{n}" for n in range(8)]
    for name in names:
        await tracked.resource(name)
        await tracked.wait(name, f"{name} x")
    calls = []
    for n in range(12):
        order = names if n % 2 else names[::-1]
        calls.append(tracked.put(*order, project_id=other if n % 3 else ""))
    answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} == {200}
    while await sql.fetchval("select pull_events(null, 100)") is not None:
        pass
    stored = await sql.fetchval("select array_agg(title order by title) from events")
    assert stored == [f"{name} x" for name in names]


# --- ops ------------------------------------------------------------------------------------


async def test_an_operator_maps_a_resource_and_takes_it_away_again(
    tracked: Tracked, caller: Caller, ops: asyncpg.Connection
) -> None:
    rows = await ops.fetch("select * from ops.resources order by resource")
    assert [(r["resource"], r["project"], r["waiting"]) for r in rows] == [
        ("acme/api", None, 2),
        ("acme/web", None, 2),
    ]
    mapped = "select ops.map_resource($1, 'acme/web', $2)"
    assert await ops.fetchval(mapped, tracked.id, caller.project_id) == 2
    assert await ops.fetchval(mapped, tracked.id, caller.project_id) == 0
    assert await tracked.titles() == {"acme/web one", "acme/web two"}
    unmapped = "select ops.unmap_resource($1, 'acme/web')"
    assert [await ops.fetchval(unmapped, tracked.id) for _ in range(2)] == [True, False]
    assert set(await untracked(caller)) == {"acme/web", "acme/api"}
    audited = await ops.fetch("select what, detail from ops.audit order by id desc limit 3")
    assert [row["what"] for row in audited] == ["unmap_resource", "map_resource", "map_resource"]
    assert orjson.loads(audited[2]["detail"]) == {
        "integration_id": tracked.id, "resource": "acme/web", "project_id": caller.project_id,
        "moved": 2,
    }  # fmt: skip


async def test_an_operator_is_told_which_argument_is_wrong(
    tracked: Tracked, caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    org = await sql.fetchval("select ops.create_organization('Acme')")
    named = {"mine": tracked.id, "ada": caller.user_id, "own": caller.project_id,
             "other": stranger.project_id, "nobody": UNKNOWN, "org": org}  # fmt: skip
    for call, sqlstate, begins in (
        ("map_resource($nobody, 'r', $own)", "BT404", "integration: there is no integration"),
        ("map_resource($mine, 'r', $own)", "BT404", "resource: the integration has no such"),
        ("map_resource($mine, 'acme/web', $nobody)", "BT404", "project: there is no project"),
        ("map_resource($mine, 'acme/web', $other)", "BT400", "project: an integration of a user"),
        ("unmap_resource($nobody, 'r')", "BT404", "integration: there is no integration"),
        ("unmap_resource($mine, 'r')", "BT404", "resource: the integration has no such"),
        ("enable_integration($nobody)", "BT404", "integration: there is no integration"),
        ("enable_integration($mine, null)", "BT400", "enabled: must be true or false"),
        ("delete_integration($nobody)", "BT404", "integration: there is no integration"),
        ("delete_integration($mine, 0)", "BT400", "max: must be 1 to 10000"),
        ("rotate_integration($nobody, 'x')", "BT404", "integration: there is no integration"),
        ("rotate_integration($mine, 'x', '-1 s')", "BT400", "keep: must be an interval from 0"),
        ("create_integration('nope', $ada)", "BT400", 'source: there is no source named "nope"'),
        ("create_integration('github', $nobody)", "BT404", "owner: there is no user"),
        ("create_integration('github', $ada, $nobody)", "BT404", "organization: there is no"),
        ("create_integration('github', $ada, $org)", "BT400", "owner: the user is no member"),
        ("create_integration('github', $ada, null, $other)", "BT400", "project: an integration"),
        ("create_integration('github', $ada, null, $nobody)", "BT404", "project: there is no"),
        ("create_integration('github', $ada, name => '')", "BT400", "name: must have 1 to 300"),
    ):
        for name, value in named.items():
            call = call.replace(f"${name}", f"'{value}'")
        with pytest.raises(asyncpg.PostgresError) as caught:
            await sql.execute(f"select ops.{call}")
        assert (caught.value.sqlstate, str(caught.value)[: len(begins)]) == (sqlstate, begins), call
        assert str(caught.value).endswith("."), call


# --- GET /handoffs/filters ------------------------------------------------------------------


async def test_get_filters_shows_names_and_the_default_branches_that_sources_tell(
    tracked: Tracked, caller: Caller, sql: asyncpg.Connection
) -> None:
    slack = await connected(sql, caller, "slack")
    await slack.resource("C024BE91L", "#backend", "channel")
    await slack.wait("C024BE91L", "hello")
    await slack.put("C024BE91L")
    for branch in ("main", "trunk", "next"):
        await tracked.wait("acme/web", f"on {branch}", branch=branch)
    await tracked.wait("acme/api", "on v2", branch="v2")
    chosen = [("acme/web", tracked.id), ("acme/api", tracked.id), ("C024BE91L", slack.id)]
    await caller.http.put(
        f"/projects/{caller.project_id}/resources",
        json={"resources": [{"resource_id": r, "integration_id": i} for r, i in chosen]},
    )
    await sql.execute("update resources set default_branch = null where id = 'acme/api'")
    await caller.ingest({"resource": "acme/old", "branch": "develop"}, {"resource": "acme/old"})
    filters = (await caller.http.get("/handoffs/filters")).json()["filters"]
    assert filters["slack"]["projects"] == [{"id": "C024BE91L", "label": "#backend"}]
    github = filters["github"]
    assert {"id": "acme/web", "label": "acme/web"} in github["projects"]
    assert github["defaultBranchByProject"] == {
        "acme/web": "trunk", "acme/api": "v2", "acme/old": "develop",
    }  # fmt: skip
    assert set(github["branchesByProject"]) == {"acme/web", "acme/api", "acme/old"}


async def test_an_artifact_calls_a_channel_as_people_do(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    slack = await connected(sql, caller, "slack")
    await slack.resource("C024BE91L", "#backend", "channel")
    await slack.wait("C024BE91L", "We decided to drop the TTL map", event_type="message")
    await slack.put("C024BE91L")
    filters = {"slack": {"projects": ["C024BE91L"]}}
    job_id = await caller.submit(filters=filters)
    await drain()
    result = (await caller.job(job_id))["result"]
    assert "#backend" in result["markdown"] and "C024BE91L" not in result["markdown"]
    [event] = (await caller.http.get("/events")).json()["events"]
    assert event["resource"] == "C024BE91L"


# --- PUT /projects/{id}/scope ---------------------------------------------------------------


async def test_put_scope_is_what_a_request_means_that_names_nothing(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    path = f"/projects/{caller.project_id}/scope"
    assert (await caller.http.get(path)).json() == {"scope": None}
    scope = {"sources": ["slack"], "filters": {"slack": {"projects": ["C1"]}}}
    assert (await caller.http.put(path, json=scope)).json() == {"scope": scope}
    assert (await caller.http.get(path)).json() == {"scope": scope}
    asked = "select input - '{until, options}'::text[] from jobs where id = $1"
    assert orjson.loads(await sql.fetchval(asked, await caller.submit())) == scope
    named = await sql.fetchval(asked, await caller.submit(sources=["github"]))
    assert orjson.loads(named) == {"sources": ["github"], "filters": {}}
    for cleared in ({}, {"sources": None, "filters": None}):
        await caller.http.put(path, json={"sources": ["slack"]})
        assert (await caller.http.put(path, json=cleared)).json() == {"scope": None}
    assert await sql.fetchval("select scope is null from projects where id = $1", caller.project_id)


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        ({"sources": ["githup"]}, 'sources: there is no source named "githup"'),
        ({"sources": []}, "sources: must not be empty"),
        ({"filters": {"slack": {"branches": ["x"]}}}, "filters.slack.branches: Slack has no"),
        ({"filters": {"slack": {"colours": []}}}, "filters.slack.colours: is not a known field"),
        ({"scope": {}}, "scope: is not a known field"),
    ],
)
async def test_put_scope_names_what_is_wrong(caller: Caller, body: Any, begins: str) -> None:
    path = f"/projects/{caller.project_id}/scope"
    answer = await caller.http.put(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"].startswith(begins), answer.text
    assert (await caller.http.get(path)).json() == {"scope": None}


async def test_put_scope_is_for_owners_and_admins(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    for user_id in (caller.user_id, stranger.user_id):
        await sql.execute("select ops.add_member($1, $2)", organization, user_id)
    project = await sql.fetchval(
        "select ops.create_project('web', $1, $2)", caller.user_id, organization
    )
    path = f"/projects/{project}/scope"
    answer = await stranger.http.put(path, json={"sources": ["github"]})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert (await caller.http.put(path, json={"sources": ["github"]})).status_code == 200
    scope = (await stranger.http.get(path)).json()["scope"]
    assert scope == {"sources": ["github"], "filters": None}


# --- From the source to the project ---------------------------------------------------------


async def test_what_a_source_sends_is_tracked_mapped_and_counts_as_a_sign_of_life(
    caller: Caller, sql: asyncpg.Connection, base_url: str, database: Any
) -> None:
    made = (await caller.http.post("/integrations", json={"source": "github"})).json()
    mapper = Mapper(database)

    async def send(delivery_id: str, event: str, payload: dict[str, Any]) -> None:
        raw = orjson.dumps(payload)
        digest = hmac.new(made["secret"].encode(), raw, hashlib.sha256).hexdigest()
        headers = {
            "X-GitHub-Event": event, "X-GitHub-Delivery": delivery_id,
            "X-Hub-Signature-256": f"sha256={digest}", "Content-Type": "application/json",
        }  # fmt: skip
        answer = await caller.http.post(
            f"{base_url}/hooks/{made['integration']['id']}", content=raw, headers=headers
        )
        assert answer.status_code == 202, answer.text
        while await mapper.map_round():
            pass

    payload = {
        "action": "opened",
        "issue": {"number": 1, "title": "The total is wrong", "user": {"login": "ada"},
                  "html_url": "https://github.com/acme/web/issues/1",
                  "created_at": "2026-11-24T08:00:00Z"},
        "repository": {"full_name": "acme/web", "default_branch": "trunk"},
    }  # fmt: skip
    await send("d-1", "issues", payload)
    assert await untracked(caller) == ["acme/web"]
    [one] = (await caller.http.get("/integrations")).json()["integrations"]
    assert (one["connection_status"], one["resource_type"]) == ("connected", "repository")
    assert one["last_validated_at"] >= one["connected_at"]

    tracked = Tracked(sql, caller, one["id"])
    assert (await tracked.put("acme/web")).status_code == 200
    assert len(await tracked.titles()) == 1
    issue = {**payload["issue"], "number": 2}  # type: ignore[dict-item]
    await send("d-2", "issues", {**payload, "issue": issue})
    await tracked.put()
    await send("d-3", "issues", {**payload, "issue": issue | {"number": 3}})
    events = (await caller.http.get("/events")).json()["events"]
    assert len(events) == 2 and {event["resource"] for event in events} == {"acme/web"}
    assert await untracked(caller) == ["acme/web"]
    assert await sql.fetchval("select count(*) from untracked_events") == 1
    assert (await caller.http.delete(f"/integrations/{one['id']}")).status_code == 204
    for table in ("hook_deliveries", "waiting_deliveries", "hook_counts", "untracked_events"):
        assert await sql.fetchval(f"select count(*) from {table}") == 0, table
    assert len((await caller.http.get("/events")).json()["events"]) == 2


async def test_a_project_that_is_given_while_events_come_misses_none(
    tracked: Tracked, caller: Caller, sql: asyncpg.Connection, dsn: str
) -> None:
    """One stores as a worker does and has not committed yet when the other maps."""
    events = [{
        "source": "github", "event_type": "commit", "title": "meanwhile", "external_id": "m",
        "resource": "acme/web",
        "in": {"id": "acme/web", "name": "acme/web", "type": "repository"},
    }]  # fmt: skip
    async with connected_to(dsn) as storing:
        transaction = storing.transaction()
        await transaction.start()
        stored = "select store_source_events($1, $2)"
        await storing.execute(stored, tracked.id, orjson.dumps(events).decode())
        mapping = asyncio.create_task(tracked.put("acme/web"))
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        while not mapping.done() and not await sql.fetchval(waits):
            await asyncio.sleep(0.01)
        assert not mapping.done()
        await transaction.commit()
    assert (await mapping).status_code == 200
    assert await tracked.titles() == {"acme/web one", "acme/web two", "meanwhile"}
