"""The document says what the service does: every route, every error, examples that are true."""

import re
from typing import Any

import httpx
import pytest
from conftest import Caller
from pydantic import BaseModel, TypeAdapter
from starlette.routing import Route

from app.main import OPERATIONS, create_app
from app.openapi import ERRORS, EXAMPLES, Operation, document, page
from app.schemas import JobResponse
from app.settings import Settings

DOCUMENT = document(OPERATIONS)


def described(operation: Operation) -> dict[str, Any]:
    """What the document says of an operation."""
    found: dict[str, Any] = DOCUMENT["paths"][operation.path][operation.method.lower()]
    return found


def references(value: Any) -> list[str]:
    """Every $ref under a value."""
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [ref for part in value.values() for ref in references(part)]
    if isinstance(value, list):
        return [ref for part in value for ref in references(part)]
    return []


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    app = create_app(Settings(database_url="postgresql://nowhere/"))
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes)
    served = {(method, r.path) for r in routes for method in (r.methods or set()) - {"HEAD"}}
    told = {(m.upper(), path) for path, ms in DOCUMENT["paths"].items() for m in ms}
    assert served - told == {("GET", "/openapi.json"), ("GET", "/docs")}
    assert told <= served


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_an_operation_is_described_in_full(operation: Operation) -> None:
    shown = described(operation)
    assert shown["summary"].endswith(".") and len(shown["summary"]) > 10
    assert str(operation.status) in shown["responses"]
    assert set(shown["responses"]) - {str(operation.status)} <= {str(s) for s in ERRORS}
    assert "500" in shown["responses"]
    assert ("503" in shown["responses"]) is operation.database
    assert ("401" in shown["responses"]) is not operation.public
    assert ("429" in shown["responses"]) is not operation.public
    assert ("requestBody" in shown) is (operation.body is not None)
    in_path = set(re.findall(r"{(\w+)}", operation.path))
    assert {p["name"] for p in shown["parameters"] if p["in"] == "path"} == in_path
    for answer in shown["responses"].values():
        assert answer["description"]
        assert "content" not in answer or "example" in answer["content"]["application/json"]
    assert ("content" in shown["responses"][str(operation.status)]) is bool(operation.response)


def test_every_reference_leads_somewhere() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    found = references(DOCUMENT)
    assert found
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= set(schemas)


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda m: m.__name__)
def test_an_example_is_of_its_type(model: type[BaseModel]) -> None:
    TypeAdapter(model).validate_python(EXAMPLES[model])


def test_operation_ids_are_unique() -> None:
    assert len({o.name for o in OPERATIONS}) == len(OPERATIONS)


async def test_what_the_service_answers_is_what_the_document_says(
    caller: Caller, base_url: str, drain: Any
) -> None:
    await caller.ingest(
        {"title": "Add a cache", "resource": "acme/web", "branch": "main", "author": "Ada"}
    )
    insights = f"/projects/{caller.project_id}/insights"
    ids = {"handoff": await caller.submit()}
    for kind in ("correlation", "onboarding", "architecture", "release_notes"):
        ids[kind] = await caller.submit(f"{insights}/{kind}")
    await drain()
    jobs = {kind: (await caller.job(job_id)) for kind, job_id in ids.items()}
    hook = {"project_id": caller.project_id, "url": "https://hooks.example/"}
    webhook_id = (await caller.http.post("/webhooks", json=hook)).json()["webhook"]["id"]
    ended = await caller.submit()
    await caller.http.post(f"/jobs/{ended}/cancel")
    listed = (await caller.http.get(f"/webhooks/deliveries?job_id={ended}")).json()
    delivery_id = listed["deliveries"][0]["id"]
    handoff_id = jobs["handoff"]["job"]["result_id"]
    insight_id = next(
        j["job"]["result_id"] for j in jobs.values() if j["job"]["result_kind"] == "insight"
    )
    bodies = {
        "create_handoff": {"project_id": caller.project_id},
        "create_events": {
            "project_id": caller.project_id,
            "events": [{"source": "github", "event_type": "push", "title": "One"}],
        },
        "update_handoff": {"status": "archived"},
        "update_insight": {"status": "archived"},
        "create_webhook": {"project_id": caller.project_id, "url": "https://hooks.example/1"},
    }
    for operation in sorted(OPERATIONS, key=lambda o: o.method == "DELETE"):
        path = operation.path.format(
            project_id=caller.project_id,
            job_id=ended if operation.name in ("retry_job", "delete_job") else ids["handoff"],
            handoff_id=handoff_id,
            insight_id=insight_id,
            webhook_id=webhook_id,
            delivery_id=delivery_id,
        )
        if operation.name == "list_deliveries":
            path += f"?project_id={caller.project_id}"
        body = bodies.get(operation.name, {}) if operation.body else None
        answer = await caller.http.request(operation.method, f"{base_url}{path}", json=body)
        assert answer.status_code == operation.status, (operation.name, answer.text)
        if operation.response:
            operation.response.model_validate(answer.json())
    for answered in jobs.values():
        JobResponse.model_validate(answered)


async def test_the_page_needs_nothing_from_elsewhere(base_url: str) -> None:
    async with httpx.AsyncClient(base_url=base_url, trust_env=False) as http:
        answer = await http.get("/docs")
        assert (await http.get("/openapi.json")).json() == DOCUMENT
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", answer.text) == ["/openapi.json"]
    assert "<script" not in answer.text
    for operation in OPERATIONS:
        assert operation.path in answer.text


def test_what_the_document_says_cannot_become_markup() -> None:
    shown = page(DOCUMENT)
    assert "<project_id>" not in shown
    assert shown.count("<details>") == len(OPERATIONS) + len(DOCUMENT["components"]["schemas"])
