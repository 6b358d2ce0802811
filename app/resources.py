"""The plain ones: projects, handoffs, insights, filters.

They share one shallow shape: who, what, one statement, answer.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app.auth import visible_project
from app.db import Database
from app.schemas import HandoffsQuery, InsightsQuery, ProjectQuery, StatusRequest
from app.wire import decode, json_response, not_found, path_id, query

# The branch that a repository most likely starts from, when nothing says so.
DEFAULT_BRANCHES = ("main", "master", "trunk", "develop")


async def list_projects(request: Request) -> Response:
    """The projects that the key may see, and the organizations of its user."""
    database: Database = request.app.state.database
    user_id = request.state.user_id
    organizations = [dict(row) for row in await database.rows("list_organizations", user_id)]
    projects = [dict(row) for row in await database.rows("list_projects", user_id)]
    return json_response(
        {
            "account_type": "business" if organizations else "personal",
            "organizations": organizations,
            "projects": projects,
        }
    )


async def list_handoffs(request: Request) -> Response:
    """Handoffs, newest first."""
    asked = query(request, HandoffsQuery)
    if asked.project_id is not None:
        await visible_project(request, asked.project_id)
    database: Database = request.app.state.database
    rows = await database.rows(
        "list_handoffs",
        request.state.user_id,
        asked.project_id,
        _status(asked.status),
        asked.limit,
    )
    return json_response({"handoffs": [dict(row) for row in rows]})


async def read_handoff(request: Request) -> Response:
    """One handoff."""
    return json_response({"handoff": await _read(request, "handoff")})


async def update_handoff(request: Request) -> Response:
    """Archive a handoff, or bring it back."""
    handoff = await _set_status(request, "handoff")
    return json_response({"handoff": handoff})


async def list_insights(request: Request) -> Response:
    """Insights of a project, newest first."""
    asked = query(request, InsightsQuery)
    project_id = await visible_project(request, request.path_params["project_id"])
    database: Database = request.app.state.database
    rows = await database.rows(
        "list_insights",
        request.state.user_id,
        project_id,
        asked.kind,
        _status(asked.status),
        asked.limit,
    )
    return json_response({"insights": [dict(row) for row in rows]})


async def read_insight(request: Request) -> Response:
    """One insight."""
    return json_response({"insight": await _read(request, "insight")})


async def update_insight(request: Request) -> Response:
    """Archive an insight, or bring it back."""
    insight = await _set_status(request, "insight")
    return json_response({"insight": insight})


async def list_filters(request: Request) -> Response:
    """What can be filtered by: only what the events of the project really hold."""
    asked = query(request, ProjectQuery)
    if asked.project_id is not None:
        await visible_project(request, asked.project_id)
    database: Database = request.app.state.database
    rows = await database.rows("list_facets", request.state.user_id, asked.project_id)
    by_source: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row)
    return json_response({"filters": {s: _source_filters(f) for s, f in by_source.items()}})


async def _read(request: Request, noun: str) -> dict[str, Any]:
    artifact_id = path_id(request, f"{noun}_id")
    database: Database = request.app.state.database
    row = await database.row(f"read_{noun}", request.state.user_id, [artifact_id])
    if row is None:
        raise not_found(f"{noun}_id")
    return dict(row)


async def _set_status(request: Request, noun: str) -> dict[str, Any]:
    artifact_id = path_id(request, f"{noun}_id")
    body = await decode(request, StatusRequest)
    async with request.app.state.database.transaction() as connection:
        user_id = request.state.user_id
        if not await connection.value(f"set_{noun}_status", user_id, artifact_id, body.status):
            raise not_found(f"{noun}_id")
        row = await connection.row(f"read_{noun}", user_id, [artifact_id])
    return dict(row)


def _status(asked: str) -> str | None:
    return None if asked == "all" else asked


def _source_filters(facets: Iterable[Any]) -> dict[str, Any]:
    values: dict[str, list[str]] = defaultdict(list)
    branches: dict[str, list[str]] = defaultdict(list)
    known: dict[str, Any] = {}  # resources that an integration tells more of
    for facet in facets:
        if facet["dimension"] == "branches":
            branches[facet["resource"]].append(facet["value"])
        else:
            values[facet["dimension"]].append(facet["value"])
        if facet["name"]:
            known[facet["value"]] = facet
    filters: dict[str, Any] = {
        "projects": [
            {"id": v, "label": known[v]["name"] if v in known else v} for v in values["projects"]
        ],
        "eventTypes": [{"value": v, "label": _label(v)} for v in values["eventTypes"]],
        "priorities": [{"value": v, "label": _label(v)} for v in values["priorities"]],
    }
    if branches:
        names = sorted({name for of_resource in branches.values() for name in of_resource})
        filters["branches"] = [{"value": v, "label": v} for v in names]
        filters["branchesByProject"] = {
            resource: [{"value": v, "label": v} for v in of_resource]
            for resource, of_resource in branches.items()
            if resource
        }
        filters["defaultBranchByProject"] = {
            resource: default
            for resource, of_resource in branches.items()
            if resource and (default := _default_branch(of_resource, known.get(resource)))
        }
    return filters


def _default_branch(branches: list[str], known: Any) -> str | None:
    """What the source says, else what is most likely."""
    if known and known["default_branch"]:
        return str(known["default_branch"])
    if len(branches) == 1:
        return branches[0]
    return next((name for name in DEFAULT_BRANCHES if name in branches), None)


def _label(value: str) -> str:
    """`pull_request.merged` -> `Pull request merged`."""
    words = value.replace("_", " ").replace(".", " ").replace(":", " ")
    return words[:1].upper() + words[1:]
