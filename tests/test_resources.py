"""Projects, handoffs, insights and filters: the shapes that clients read, and nothing missing."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import asyncpg
import pytest
from conftest import Caller

Drain = Callable[..., Awaitable[None]]
HANDOFF = {
    *("id", "user_id", "project_id", "project_name", "scope_type", "title", "summary", "status"),
    *("sources", "key_changes", "decisions", "open_questions", "next_steps", "related_event_ids"),
    *("model_used", "token_usage", "created_at", "updated_at", "markdown"),
}
INSIGHT = {
    *("id", "project_id", "requested_by", "kind", "title", "summary", "data", "model_used"),
    *("token_usage", "status", "related_event_ids", "created_at", "updated_at", "markdown"),
}
ADDITIONS = {"data", "period_start", "period_end"}
TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


async def get(caller: Caller, path: str) -> Any:
    response = await caller.http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


async def make(caller: Caller, drain: Drain, *paths: str) -> list[dict[str, Any]]:
    """One artifact per path, of a few events."""
    await caller.ingest(
        {"title": "fix(cart): total is wrong", "author": "Ada", "resource": "acme/web"},
        {"title": "feat(cart): vouchers", "author": "Bo", "resource": "acme/web"},
    )
    jobs = []
    for path in paths:
        jobs.append(await caller.submit(path))
        await drain()
    return [(await caller.job(job_id))["result"] for job_id in jobs]


async def test_a_personal_account_lists_its_projects(caller: Caller) -> None:
    listed = await get(caller, "/projects")
    [project] = listed["projects"]
    assert project.pop("created_at").endswith("Z")
    assert project.pop("updated_at").endswith("Z")
    assert listed == {
        "account_type": "personal",
        "organizations": [],
        "projects": [
            {
                "id": caller.project_id,
                "name": "ada",
                "slug": "ada",
                "description": None,
                "organization_id": None,
                "organization_name": None,
                "organization_slug": None,
                "project_type": "personal",
                "access_role": "owner",
            }
        ],
    }


async def test_a_business_account_lists_its_organizations_and_roles(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme Inc')")
    await sql.execute("select ops.add_member($1, $2, 'admin')", organization, stranger.user_id)
    project_id = await sql.fetchval(
        "select ops.create_project('Web', $1, $2)", stranger.user_id, organization
    )

    async def seen(*membership: object) -> tuple[dict[str, Any], str]:
        arguments = ", ".join(f"${n}" for n in range(1, len(membership) + 3))
        query = f"select ops.add_member({arguments})"
        await sql.execute(query, organization, caller.user_id, *membership)
        listed = await get(caller, "/projects")
        assert listed["account_type"] == "business"
        [shown] = listed["organizations"]
        [web] = [p for p in listed["projects"] if p["id"] == str(project_id)]
        assert (web["project_type"], web["slug"]) == ("organization", "web")
        assert web["organization_id"] == shown["id"] == str(organization)
        assert (web["organization_name"], web["organization_slug"]) == ("Acme Inc", "acme-inc")
        return shown, web["access_role"]

    later, before = datetime(2100, 1, 1), datetime(2000, 1, 1)
    for membership, role, temporary in (
        (("member",), "member", False),
        (("admin",), "admin", False),
        (("member", later), "admin", True),
        (("member", before), "member", False),
        (("admin", later), "admin", False),
    ):
        shown, access = await seen(*membership)
        assert shown == {
            "id": str(organization),
            "name": "Acme Inc",
            "slug": "acme-inc",
            "role": role,
            "is_temporary_admin": temporary,
        }
        assert access == role
    of_stranger = (await get(stranger, "/projects"))["projects"]
    assert {p["id"]: p["access_role"] for p in of_stranger} == {
        str(project_id): "owner",
        stranger.project_id: "owner",
    }


async def test_a_handoff_has_the_agreed_fields_of_the_agreed_types(
    caller: Caller, drain: Drain
) -> None:
    [handoff] = await make(caller, drain, "/handoffs")
    assert set(handoff) == HANDOFF | ADDITIONS
    assert (handoff["user_id"], handoff["project_id"]) == (caller.user_id, caller.project_id)
    assert (handoff["project_name"], handoff["scope_type"]) == ("ada", "personal")
    assert (handoff["status"], handoff["sources"]) == ("active", ["github"])
    for name in ("key_changes", "decisions", "open_questions", "next_steps", "related_event_ids"):
        assert all(isinstance(line, str) for line in handoff[name])
    assert handoff["key_changes"]
    assert handoff["token_usage"] == TOKENS
    assert handoff["title"] and handoff["summary"]
    assert handoff["markdown"].startswith("# ")
    for name in ("created_at", "updated_at", "period_start", "period_end"):
        assert handoff[name].endswith("Z")
    assert await get(caller, "/handoffs") == {"handoffs": [handoff]}


async def test_an_insight_has_the_agreed_fields_of_the_agreed_types(
    caller: Caller, drain: Drain
) -> None:
    path = f"/projects/{caller.project_id}/insights"
    [insight] = await make(caller, drain, f"{path}/onboarding")
    assert set(insight) == INSIGHT | ADDITIONS
    assert (insight["requested_by"], insight["kind"]) == (caller.user_id, "onboarding_brief")
    assert isinstance(insight["data"], dict) and insight["data"]
    assert insight["token_usage"] == TOKENS
    assert insight["markdown"].startswith("# ")
    assert await get(caller, path) == {"insights": [insight]}


@pytest.mark.parametrize(
    ("ask", "noun"),
    [("/handoffs", "handoff"), ("/projects/PROJECT/insights/onboarding", "insight")],
)
async def test_an_artifact_is_archived_and_brought_back_as_often_as_wanted(
    ask: str, noun: str, caller: Caller, drain: Drain
) -> None:
    [made] = await make(caller, drain, ask.replace("PROJECT", caller.project_id))
    path = f"/{noun}s/{made['id']}"
    lists = "/handoffs" if noun == "handoff" else f"/projects/{caller.project_id}/insights"

    async def listed(query: str) -> list[str]:
        return [a["id"] for a in (await get(caller, lists + query))[f"{noun}s"]]

    for status, other in (("archived", "active"), ("active", "archived")) * 2:
        for _ in range(2):
            response = await caller.http.patch(path, json={"status": status})
            assert response.status_code == 200
            changed = response.json()[noun]
            assert set(response.json()) == {noun}
            assert changed["updated_at"] >= made["updated_at"]
            same = set(made) - {"status", "updated_at"}
            assert {name: changed[name] for name in same} == {name: made[name] for name in same}
            assert changed["status"] == status
        assert await listed(f"?status={status}") == [made["id"]]
        assert await listed(f"?status={other}") == []
        assert await listed("?status=all") == [made["id"]]
        assert await listed("") == ([made["id"]] if status == "active" else [])


async def test_an_artifact_is_read_by_its_id_whether_active_or_archived(
    caller: Caller, drain: Drain
) -> None:
    insight_path = f"/projects/{caller.project_id}/insights/onboarding"
    handoff, insight = await make(caller, drain, "/handoffs", insight_path)
    for noun, made in (("handoff", handoff), ("insight", insight)):
        path = f"/{noun}s/{made['id']}"
        assert await get(caller, path) == {noun: made}
        archived = (await caller.http.patch(path, json={"status": "archived"})).json()
        assert archived[noun]["status"] == "archived"
        assert await get(caller, path) == archived


async def test_an_archived_handoff_is_still_the_result_of_its_job(
    caller: Caller, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a thing"})
    job_id = await caller.submit()
    await drain()
    before = await caller.job(job_id)
    await caller.http.patch(f"/handoffs/{before['result']['id']}", json={"status": "archived"})
    after = await caller.job(job_id)
    assert after["job"] == before["job"]
    assert after["result"]["status"] == "archived"


async def test_handoffs_are_listed_newest_first_twenty_unless_told(
    caller: Caller, drain: Drain, sql: asyncpg.Connection
) -> None:
    other = str(await sql.fetchval("select ops.create_project('two', $1)", caller.user_id))
    await caller.ingest({"title": "feat: a thing"})
    event = {"source": "github", "event_type": "push", "title": "feat: another"}
    batch = {"project_id": other, "events": [event]}
    assert (await caller.http.post("/events", json=batch)).status_code == 200
    for n in range(24):
        await caller.submit(project_id=other if n % 3 == 0 else caller.project_id)
    await drain()

    everything = (await get(caller, "/handoffs?limit=100"))["handoffs"]
    assert len(everything) == 24
    order = [(h["created_at"], h["id"]) for h in everything]
    assert order == sorted(order, reverse=True)
    assert (await get(caller, "/handoffs"))["handoffs"] == everything[:20]
    assert (await get(caller, "/handoffs?limit=3"))["handoffs"] == everything[:3]
    of_other = [h for h in everything if h["project_id"] == other]
    assert len(of_other) == 8
    assert (await get(caller, f"/handoffs?project_id={other}"))["handoffs"] == of_other


async def test_insights_are_narrowed_by_kind_and_status(caller: Caller, drain: Drain) -> None:
    path = f"/projects/{caller.project_id}/insights"
    made = await make(
        caller, drain, f"{path}/onboarding", f"{path}/architecture", f"{path}/onboarding"
    )
    ids = [insight["id"] for insight in made]
    await caller.http.patch(f"/insights/{ids[0]}", json={"status": "archived"})

    async def listed(query: str) -> list[str]:
        return [insight["id"] for insight in (await get(caller, path + query))["insights"]]

    assert await listed("") == [ids[2], ids[1]]
    assert await listed("?status=all") == [ids[2], ids[1], ids[0]]
    assert await listed("?kind=onboarding_brief") == [ids[2]]
    assert await listed("?kind=onboarding_brief&status=all") == [ids[2], ids[0]]
    assert await listed("?kind=onboarding_brief&status=all&limit=1") == [ids[2]]
    assert await listed("?kind=release_notes&status=all") == []


async def test_filters_hold_what_the_events_hold_and_nothing_else(caller: Caller) -> None:
    assert await get(caller, "/handoffs/filters") == {"filters": {}}
    github: dict[str, Any] = {"source": "github", "event_type": "pull_request.merged"}
    await caller.ingest(
        {**github, "resource": "acme/web", "branch": "main", "priority": "high"},
        {**github, "resource": "acme/web", "branch": "fix/a"},
        {**github, "resource": "acme/api", "branch": "release"},
        {**github, "resource": "acme/doc", "branch": "x"},
        {**github, "resource": "acme/doc", "branch": "y"},
        {"source": "github", "event_type": "push", "branch": "loose"},
        {"source": "slack", "event_type": "message", "resource": "general"},
    )

    def values(*names: str) -> list[dict[str, str]]:
        return [{"value": name, "label": name} for name in names]

    filters = (await get(caller, "/handoffs/filters"))["filters"]
    assert filters == {
        "github": {
            "projects": [{"id": n, "label": n} for n in ("acme/api", "acme/doc", "acme/web")],
            "eventTypes": [
                {"value": "pull_request.merged", "label": "Pull request merged"},
                {"value": "push", "label": "Push"},
            ],
            "priorities": [{"value": "high", "label": "High"}],
            "branches": values("fix/a", "loose", "main", "release", "x", "y"),
            "branchesByProject": {
                "acme/api": values("release"),
                "acme/doc": values("x", "y"),
                "acme/web": values("fix/a", "main"),
            },
            "defaultBranchByProject": {"acme/api": "release", "acme/web": "main"},
        },
        "slack": {
            "projects": [{"id": "general", "label": "general"}],
            "eventTypes": [{"value": "message", "label": "Message"}],
            "priorities": [],
        },
    }


async def test_filters_are_of_one_project_when_one_is_named(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    other = str(await sql.fetchval("select ops.create_project('two', $1)", caller.user_id))
    await caller.ingest({"resource": "acme/web"})
    event = {"source": "slack", "event_type": "message", "title": "-"}
    await caller.http.post("/events", json={"project_id": other, "events": [event]})
    assert set((await get(caller, "/handoffs/filters"))["filters"]) == {"github", "slack"}
    assert set((await get(caller, f"/handoffs/filters?project_id={other}"))["filters"]) == {"slack"}


async def test_whatever_filters_offer_a_request_accepts(caller: Caller, drain: Drain) -> None:
    await caller.ingest(
        {"title": "feat: x", "resource": "acme/web", "branch": "main", "priority": "high"},
        {"title": "feat: y", "source": "linear", "resource": "ENG", "priority": "2"},
        {"title": "We decided to go.", "source": "slack", "resource": "general"},
        {
            "title": "feat: z",
            "source": "slack",
            "resource": "random",
            "branch": "b",
            "priority": "p",
        },
    )
    offered = (await get(caller, "/handoffs/filters"))["filters"]
    for source, dimensions in offered.items():
        chosen = {
            name: [value.get("value", value.get("id")) for value in dimensions[name]]
            for name in ("projects", "eventTypes", "branches", "priorities")
            if dimensions.get(name)
        }
        await caller.submit(filters={source: chosen})
