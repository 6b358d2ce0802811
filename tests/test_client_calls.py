"""The calls that existing clients of such an API make, each with a test that is named after it.

`CALLS` is the table: what a client calls, the endpoint that answers, and the test. Those with their
own file are only named here; the others follow.
"""

import ast
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Caller, Workers
from test_worker import running

from app.main import OPERATIONS

Drain = Callable[..., Awaitable[None]]
HERE = Path(__file__)
P = "/api/v1"
CALLS = {
    "generate handoff": ("POST", "/handoffs", "test_generate_handoff"),
    "list handoffs": ("GET", "/handoffs", "test_list_handoffs"),
    "archive handoff": ("PATCH", "/handoffs/{handoff_id}", "test_archive_and_restore_handoff"),
    "handoff filters": ("GET", "/handoffs/filters", "test_list_handoff_filters"),
    "generate correlation": (
        "POST", "/projects/{project_id}/insights/correlation", "test_generate_insight",
    ),
    "generate onboarding brief": (
        "POST", "/projects/{project_id}/insights/onboarding", "test_generate_insight",
    ),
    "generate architecture insight": (
        "POST", "/projects/{project_id}/insights/architecture", "test_generate_insight",
    ),
    "generate release notes": (
        "POST", "/projects/{project_id}/insights/release_notes", "test_generate_insight",
    ),
    "list insights": ("GET", "/projects/{project_id}/insights", "test_list_insights"),
    "archive insight": ("PATCH", "/insights/{insight_id}", "test_archive_and_restore_insight"),
    "read job": ("GET", "/jobs/{job_id}", "test_poll_job_until_it_has_ended"),
    "list projects": ("GET", "/projects", "test_list_projects"),
    "list events": ("GET", "/events", "test_list_events"),
    "ingest events": ("POST", "/events", "test_ingest_events_once_each"),
    "ask project": ("POST", "/projects/{project_id}/qa", "test_ask_project"),
    "list integrations": (
        "GET", "/integrations", "test_integrations::test_get_integrations_tells_what_is_connected",
    ),
    "list untracked resources": (
        "GET", "/integrations/untracked",
        "test_tracking::test_get_untracked_lists_resources_with_recent_events_and_no_project",
    ),
    "list digests": (
        "GET", "/projects/{project_id}/digests",
        "test_digests::test_get_digests_answers_what_the_schedule_had_written",
    ),
    "list discord channels": (
        "GET", "/discord/channels", "test_channels::test_list_discord_channels",
    ),
    "send to discord": ("POST", "/discord/send", "test_channels::test_send_a_text_to_discord"),
    "send artifact to discord": (
        "POST", "/discord/send", "test_channels::test_send_the_last_artifact_of_each_kind",
    ),
    "list slack channels": ("GET", "/slack/channels", "test_channels::test_list_slack_channels"),
    "send to slack": ("POST", "/slack/send", "test_channels::test_send_a_text_to_slack"),
}  # fmt: skip


def test_each_call_has_its_endpoint_and_its_test() -> None:
    served = {(operation.method, operation.path) for operation in OPERATIONS}
    for call, (method, path, named) in CALLS.items():
        assert (method, P + path) in served, call
        file, _, test = named.rpartition("::")
        tree = ast.parse((HERE.with_name(f"{file}.py") if file else HERE).read_text())
        found = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)
        }
        assert test in found, call


async def get(caller: Caller, path: str) -> Any:
    answer = await caller.http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def made(caller: Caller, drain: Drain, path: str = "/handoffs") -> dict[str, Any]:
    """An artifact of two events."""
    await caller.ingest(
        {"title": "fix(cart): total is wrong", "external_id": "a" * 40},
        {"title": "ENG-4: the total is wrong", "source": "linear", "event_type": "issue.created"},
        {"title": "Is it ENG-4?", "source": "slack", "event_type": "message"},
    )
    job_id = await caller.submit(path)
    await drain()
    return dict((await caller.job(job_id))["result"])


async def test_generate_handoff(caller: Caller, drain: Drain) -> None:
    answer = await caller.http.post("/handoffs", json={"project_id": caller.project_id})
    assert answer.status_code == 202
    assert {"jobId", "status"} <= set(answer.json())
    handoff = await made(caller, drain)
    assert handoff["key_changes"] == ["Total is wrong"]


async def test_poll_job_until_it_has_ended(caller: Caller, drain: Drain) -> None:
    await caller.ingest({"title": "fix: total is wrong"})
    job_id = await caller.submit()
    waiting = await get(caller, f"/jobs/{job_id}")
    assert waiting["job"]["status"] == "pending" and waiting.get("result") is None
    await drain()
    ended = await get(caller, f"/jobs/{job_id}")
    assert ended["job"]["status"] == "completed" and ended["result"]["title"]


async def test_list_handoffs(caller: Caller, drain: Drain) -> None:
    handoff = await made(caller, drain)
    for query in ("", "?status=active", "?status=all&limit=1", f"?project_id={caller.project_id}"):
        assert await get(caller, f"/handoffs{query}") == {"handoffs": [handoff]}
    assert await get(caller, "/handoffs?status=archived") == {"handoffs": []}


async def archived_and_restored(caller: Caller, noun: str, artifact_id: str) -> None:
    for status in ("archived", "active"):
        answer = await caller.http.patch(f"/{noun}s/{artifact_id}", json={"status": status})
        assert answer.status_code == 200
        assert answer.json()[noun]["status"] == status


async def test_archive_and_restore_handoff(caller: Caller, drain: Drain) -> None:
    handoff = await made(caller, drain)
    await archived_and_restored(caller, "handoff", handoff["id"])


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("correlation", "cross_source_correlation"),
        ("onboarding", "onboarding_brief"),
        ("architecture", "architecture_insight"),
        ("release_notes", "release_notes"),
    ],
)
async def test_generate_insight(path: str, kind: str, caller: Caller, drain: Drain) -> None:
    insight = await made(caller, drain, f"/projects/{caller.project_id}/insights/{path}")
    assert (insight["kind"], insight["project_id"]) == (kind, caller.project_id)
    assert insight["markdown"].startswith("# ") and insight["related_event_ids"]


async def test_list_insights(caller: Caller, drain: Drain) -> None:
    path = f"/projects/{caller.project_id}/insights"
    insight = await made(caller, drain, f"{path}/onboarding")
    for query in ("", "?kind=onboarding_brief", "?status=active&limit=5"):
        assert await get(caller, path + query) == {"insights": [insight]}
    assert await get(caller, f"{path}?kind=release_notes") == {"insights": []}


async def test_archive_and_restore_insight(caller: Caller, drain: Drain) -> None:
    insight = await made(caller, drain, f"/projects/{caller.project_id}/insights/onboarding")
    await archived_and_restored(caller, "insight", insight["id"])


async def test_list_projects(caller: Caller) -> None:
    listed = await get(caller, "/projects")
    assert set(listed) == {"account_type", "organizations", "projects"}
    [project] = listed["projects"]
    assert (project["id"], project["access_role"]) == (caller.project_id, "owner")


async def test_list_events(caller: Caller) -> None:
    await caller.ingest({"title": "one"}, {"title": "two", "source": "slack"})
    for query, titles in (("", {"one", "two"}), ("?source=slack&limit=1", {"two"})):
        events = (await get(caller, f"/events{query}"))["events"]
        assert {event["title"] for event in events} == titles
        assert {"id", "user_id", "source", "event_type", "content", "created_at"} <= set(events[0])


async def test_ingest_events_once_each(caller: Caller) -> None:
    event = {"title": "one", "external_id": "1"}
    assert await caller.ingest(event, event) == {"accepted": 1, "duplicates": 1}


async def test_list_handoff_filters(caller: Caller) -> None:
    await caller.ingest({"resource": "acme/web", "branch": "main", "priority": "high"})
    filters = (await get(caller, f"/handoffs/filters?project_id={caller.project_id}"))["filters"]
    assert set(filters) == {"github"}
    assert filters["github"]["projects"] == [{"id": "acme/web", "label": "acme/web"}]
    assert filters["github"]["branches"] == [{"value": "main", "label": "main"}]


async def test_ask_project(caller: Caller, worker: Workers) -> None:
    await caller.ingest({"title": "We decided to keep the lock of a voucher until capture."})
    async with running(worker()[0]):
        answer = await caller.http.post(
            f"/projects/{caller.project_id}/qa", json={"question": "What of the voucher's lock?"}
        )
    assert answer.status_code == 200, answer.text
    [event] = (await get(caller, "/events"))["events"]
    assert answer.json()["citations"] == [f"ev:{event['id']}"]
    assert "voucher" in answer.json()["answer"]
