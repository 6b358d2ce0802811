"""The document says what the service does: every route, every error, examples that are true."""

import re
from datetime import UTC, datetime
from typing import Any, get_args

import asyncpg
import httpx
import orjson
import pytest
from chat_servers import GENERAL, TALK, ChatServer, chat_settings, connect
from conftest import Caller, Workers
from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel, TypeAdapter
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from starlette.applications import Starlette
from starlette.routing import Route
from test_worker import running

from app.docs import page
from app.main import OPERATIONS, create_app
from app.openapi import ERRORS, EXAMPLES, HEADERS, TAGS, WEBHOOK_HEADERS, Operation, document
from app.schemas import Job, JobResponse, JobStart, WebhookMessage, WebhookType
from app.settings import Limits, Settings
from app.static import FILES
from tasks.delivery import Delivery

DOCUMENT = document(OPERATIONS)


@pytest.fixture
def app(dsn: str, limits: Limits, chat: ChatServer) -> Starlette:
    return create_app(Settings(database_url=dsn, limits=limits, **chat_settings(chat)))


def described(operation: Operation) -> dict[str, Any]:
    """What the document says of an operation."""
    found: dict[str, Any] = DOCUMENT["paths"][operation.path][operation.method.lower()]
    return found


def found(value: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to; anything else as it is."""
    where: Any = DOCUMENT
    for name in value.get("$ref", "#").split("/")[1:]:
        where = where[name]
    return where if "$ref" in value else value


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
    pages = {("GET", path) for path in ("/openapi.json", "/docs", "/metrics", *FILES)}
    hooks = {("POST", "/hooks/{integration_id}")}  # for sources, each of which has its own shape
    assert served - told == pages | hooks
    assert told <= served


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_an_operation_is_described_in_full(operation: Operation) -> None:
    shown = described(operation)
    assert shown["summary"].endswith(".") and len(shown["summary"]) > 10
    assert str(operation.status) in shown["responses"]
    successes = {str(operation.status), "200", "204", "304"}
    assert set(shown["responses"]) - successes <= {str(s) for s in ERRORS}
    assert "500" in shown["responses"]
    assert ("503" in shown["responses"]) is operation.database
    assert ("401" in shown["responses"]) is not operation.public
    assert ("429" in shown["responses"]) is not operation.public
    assert ("requestBody" in shown) is (operation.body is not None)
    in_path = set(re.findall(r"{(\w+)}", operation.path))
    parameters = [found(parameter) for parameter in shown["parameters"]]
    assert {p["name"] for p in parameters if p["in"] == "path"} == in_path
    assert {p["name"] for p in parameters if p["in"] == "header"} == {
        *operation.headers,
        "X-Request-Id",
    }
    for status, answer in ((s, found(a)) for s, a in shown["responses"].items()):
        assert answer["description"]
        assert "X-Request-Id" in answer["headers"]
        for content in answer.get("content", {}).values():
            assert content["schema"] and content["example"]
        problem = "application/problem+json" in answer.get("content", {})
        assert problem is (int(status) >= 400)
    assert ("content" in shown["responses"][str(operation.status)]) is bool(operation.response)


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    used = set(references(DOCUMENT))
    assert all(found({"$ref": reference}) for reference in used)
    for kind in ("schemas", "parameters", "headers", "responses"):
        there = {f"#/components/{kind}/{name}" for name in DOCUMENT["components"][kind]}
        assert there - used == set()


def test_the_document_is_valid_and_so_are_its_examples() -> None:
    document = orjson.loads(orjson.dumps(DOCUMENT))
    OpenAPIV31SpecValidator(document).validate()
    named = orjson.loads(orjson.dumps(DOCUMENT).replace(b'"#/', b'"urn:baton#/'))
    registry: Registry[Any] = Registry()
    registry = registry.with_resource("urn:baton", DRAFT202012.create_resource(named))
    checked = 0
    stack: list[Any] = [named]
    while stack:
        part = stack.pop()
        children = part.values() if isinstance(part, dict) else part
        stack += [child for child in children if isinstance(child, dict | list)]
        if isinstance(part, dict) and "example" in part and "schema" in part:
            validator = Draft202012Validator(
                part["schema"], registry=registry, format_checker=FormatChecker()
            )
            validator.validate(part["example"])
            checked += 1
    assert checked > len(OPERATIONS)


def test_what_the_table_names_is_explained() -> None:
    assert {o.tag for o in OPERATIONS} == set(TAGS)
    assert {name for o in OPERATIONS for name in o.headers} | {"X-Request-Id"} == set(HEADERS)


def test_a_webhook_is_described_as_it_is_sent() -> None:
    sent = Delivery(
        id="msg_1", job_id="j", project_id="p", url="https://host/", host="host",
        type="job.completed", payload="{}", attempt=1, leased_until=datetime.now(UTC),
        created_at=datetime.now(UTC), secrets=["whsec_" + "A" * 32],
    ).headers(datetime.now(UTC))  # fmt: skip
    assert set(sent) == {*WEBHOOK_HEADERS, "Content-Type", "User-Agent"}
    assert set(DOCUMENT["webhooks"]) == set(get_args(WebhookType))
    for kind, told in DOCUMENT["webhooks"].items():
        example = told["post"]["requestBody"]["content"]["application/json"]["example"]
        assert example["type"] == kind
        WebhookMessage.model_validate(example)


async def test_a_message_is_of_the_type_that_is_described(
    caller: Caller, sql: asyncpg.Connection, drain: Any
) -> None:
    every = list(get_args(WebhookType))
    hook = {"project_id": caller.project_id, "url": "https://hooks.example/", "types": every}
    assert (await caller.http.post("/webhooks", json=hook)).status_code == 201
    wordy = {f"{n:02}": "\x01" * 512 for n in range(16)}
    for metadata in ({"ticket": "A-12"}, wordy):
        await caller.submit(job={"metadata": metadata})
    await drain()
    payloads = await sql.fetch("select payload from webhook_deliveries")
    jobs = [WebhookMessage.model_validate_json(row["payload"]).data.job for row in payloads]
    assert {type(job) for job in jobs} == {Job, JobStart}


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda m: m.__name__)
def test_an_example_is_of_its_type(model: type[BaseModel]) -> None:
    TypeAdapter(model).validate_python(EXAMPLES[model])


def test_operation_ids_are_unique() -> None:
    assert len({o.name for o in OPERATIONS}) == len(OPERATIONS)


async def test_what_the_service_answers_is_what_the_document_says(
    caller: Caller, base_url: str, sql: asyncpg.Connection, drain: Any, worker: Workers
) -> None:
    for source in ("discord", "slack"):
        await connect(sql, caller.user_id, source)
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
    connected = (await caller.http.post("/integrations", json={"source": "slack"})).json()
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
        "answer_question": {"question": "What about the cache?"},
        "send_to_discord": {"channel_id": GENERAL, "content": "Done."},
        "send_to_slack": {"channel_id": TALK, "content": "Done."},
        "set_digest_schedule": {"cron": "0 9 * * 1-5", "time_zone": "Europe/Berlin"},
        "create_integration": {"source": "github", "project_id": caller.project_id},
        "set_resources": {"resources": []},
    }
    for operation in sorted(OPERATIONS, key=lambda o: o.method == "DELETE"):
        path = operation.path.format(
            project_id=caller.project_id,
            job_id=ended if operation.name in ("retry_job", "delete_job") else ids["handoff"],
            handoff_id=handoff_id,
            insight_id=insight_id,
            webhook_id=webhook_id,
            delivery_id=delivery_id,
            integration_id=connected["integration"]["id"],
        )
        if operation.name == "list_deliveries":
            path += f"?project_id={caller.project_id}"
        bodies["rotate_integration"] = {"secret": "8f742231b10e8888abcd99yyyzzz85a5"}
        body = bodies.get(operation.name, {}) if operation.body else None
        async with running(*([worker()[0]] if operation.name == "answer_question" else ())):
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
    parts = DOCUMENT["components"]
    folded = (OPERATIONS, DOCUMENT["webhooks"], parts["schemas"], parts["responses"])
    assert shown.count("<details>") == sum(map(len, folded))


def test_the_page_tells_what_the_document_tells() -> None:
    shown = page(DOCUMENT)
    told = (*DOCUMENT["webhooks"], *WEBHOOK_HEADERS, *DOCUMENT["components"]["headers"], *HEADERS)
    for name in (*told, "application/problem+json", "text/event-stream", "metadata"):
        assert name in shown
    assert "**" not in shown
