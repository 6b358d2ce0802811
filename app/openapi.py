"""The OpenAPI document and its page, made from the route table and the types.

The one rule: nothing is typed twice. A route says which types it takes and gives; which errors it
can answer follows from that.
"""

import html
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from app import __version__, schemas
from app.limits import Policy

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One row of the route table."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    handler: Handler  # its docstring is the summary
    response: type[BaseModel] | None  # None: no body
    tag: str
    body: type[BaseModel] | None = None
    body_types: tuple[str, ...] = ("application/json",)
    query: type[BaseModel] | None = None
    status: int = 200
    errors: tuple[int, ...] = ()  # beside those that follow from what it takes
    public: bool = False  # needs no key, and so has no limits
    limits: tuple[Policy, ...] = ("default",)
    polls_with: str | None = None  # a query parameter with which it reads jobs that one knows of
    database: bool = True  # asks the database

    @property
    def name(self) -> str:
        """The operation's id, for generated clients."""
        return self.handler.__name__

    def policies(self, request: Request) -> tuple[Policy, ...]:
        """Which limits count a request."""
        return ("poll",) if self.polls_with in request.query_params else self.limits


# What each error means, once. Which of them a route can answer is decided in `_errors`.
ERRORS = {
    400: "A field is missing or wrong; `error` names it.",
    401: "The key is missing, malformed, unknown or revoked.",
    403: "Visible, but only an owner or admin of the project may do this.",
    404: "Unknown, or not visible to this key; the two look alike.",
    408: "The body did not arrive in time.",
    409: "What is there now does not allow this; `error` says why.",
    410: "The job has been deleted.",
    413: "The body is over the limit.",
    414: "The path and query are over the limit.",
    415: "The body is of a type that this route does not read.",
    422: "The `Idempotency-Key` stands for another request.",
    429: "Too many requests for now; try again after `Retry-After`.",
    431: "The headers are over the limit.",
    500: "Unexpected; the log has it by the request id.",
    503: "The database is away or too slow; try again after `Retry-After`.",
}

_ID = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
_JOB_ID = "019ab3f2-7a10-7b52-8c3f-0e1d2c3b4a59"
_EVENT_ID = "019ab3f1-0001-7000-8000-00000000c0de"
_AT = "2026-11-24T08:00:00Z"
_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
_STATEMENT = {"text": "Switch the cache to an LRU", "event_ids": [_EVENT_ID]}
_URLS = {
    "self": f"/api/v1/jobs/{_JOB_ID}",
    "cancel": f"/api/v1/jobs/{_JOB_ID}/cancel",
    "retry": f"/api/v1/jobs/{_JOB_ID}/retry",
    "events": f"/api/v1/jobs/{_JOB_ID}/events",
}
_JOB: dict[str, Any] = {
    "id": _JOB_ID,
    "project_id": _ID,
    "kind": "handoff",
    "status": "completed",
    "result_kind": "handoff",
    "result_id": _ID,
    "error": None,
    "error_code": None,
    "error_meta": {},
    "created_at": _AT,
    "updated_at": _AT,
    "done": True,
    "outcome": "succeeded",
    "attempt": 1,
    "retry_of": None,
    "started_at": _AT,
    "completed_at": _AT,
    "cancel_requested_at": None,
    "start_deadline_at": None,
    "deadline_at": "2026-11-25T08:00:00Z",
    "progress": {"value": 1, "step": "completed", "message": None},
    "queue": None,
    "eta": None,
    "timings": {"queue_ms": 4, "run_ms": 118, "total_ms": 122},
    "usage": {**_USAGE, "credits": 1},
    "priority": "normal",
    "metadata": {"ticket": "A-12"},
    "recovering": False,
    "urls": _URLS,
}
_PENDING: dict[str, Any] = {
    **_JOB,
    "status": "pending",
    "result_kind": None,
    "result_id": None,
    "done": False,
    "outcome": None,
    "attempt": 0,
    "started_at": None,
    "completed_at": None,
    "progress": {"value": 0, "step": "queued", "message": None},
    "queue": {"position": 1, "capped": False, "ahead_in_project": 0},
    "eta": {"start_at": _AT, "done_at": "2026-11-24T08:00:01Z", "basis": "p50_last_200"},
    "timings": {"queue_ms": None, "run_ms": None, "total_ms": None},
    "usage": {**_USAGE, "credits": 0},
}
_HANDOFF = {
    "id": _ID,
    "user_id": _ID,
    "project_id": _ID,
    "project_name": "demo",
    "scope_type": "personal",
    "title": "demo: cache",
    "summary": "1 change by 1 person.",
    "status": "active",
    "sources": ["github"],
    "key_changes": ["Switch the cache to an LRU"],
    "decisions": ["We decided to drop the TTL map."],
    "open_questions": [],
    "next_steps": [],
    "data": {"key_changes": [_STATEMENT]},
    "related_event_ids": [_EVENT_ID],
    "period_start": _AT,
    "period_end": _AT,
    "model_used": "extractive-1",
    "token_usage": _USAGE,
    "created_at": _AT,
    "updated_at": _AT,
    "markdown": "# demo: cache\n",
}
_INSIGHT = {
    "id": _ID,
    "project_id": _ID,
    "requested_by": _ID,
    "kind": "release_notes",
    "title": "demo 1.4.0",
    "summary": "1 fix.",
    "data": {"sections": [{"heading": "Fixed", "items": [_STATEMENT]}]},
    "model_used": "extractive-1",
    "token_usage": _USAGE,
    "status": "active",
    "related_event_ids": [_EVENT_ID],
    "period_start": _AT,
    "period_end": _AT,
    "created_at": _AT,
    "updated_at": _AT,
    "markdown": "# demo 1.4.0\n",
}
_EVENT = {
    "source": "github",
    "event_type": "push",
    "title": "Switch the cache to an LRU",
    "content": "We decided to drop the TTL map.",
    "external_id": "4f1c2d3",
    "resource": "acme/web",
    "branch": "main",
    "author": "Ada",
    "occurred_at": _AT,
}
_PROJECT = {
    "id": _ID,
    "name": "demo",
    "slug": "demo",
    "description": None,
    "organization_id": None,
    "organization_name": None,
    "organization_slug": None,
    "project_type": "personal",
    "access_role": "owner",
    "created_at": _AT,
    "updated_at": _AT,
}
_WEBHOOK = {
    "id": _ID,
    "project_id": _ID,
    "url": "https://hooks.example.com/baton",
    "types": ["job.completed", "job.failed"],
    "enabled": True,
    "disabled_reason": None,
    "created_at": _AT,
    "updated_at": _AT,
}
_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDCg1eK7H5tWk="
_DELIVERY = {
    "id": "msg_019ab3f27a107b528c3f0e1d2c3b4a59",
    "job_id": _JOB_ID,
    "project_id": _ID,
    "webhook_id": _ID,
    "url": "https://hooks.example.com/baton",
    "type": "job.completed",
    "state": "waiting",
    "attempt": 1,
    "next_attempt_at": "2026-11-24T08:00:05Z",
    "created_at": _AT,
    "ended_at": None,
    "attempts": [
        {"at": _AT, "status": 503, "ms": 41, "error": "Answered 503 Service Unavailable."}
    ],
}
# One example a type; a test holds them to their types.
EXAMPLES: dict[type[BaseModel], Any] = {
    schemas.HandoffRequest: {"project_id": _ID, "sources": ["github"]},
    schemas.CorrelationRequest: {"lookbackHours": 168},
    schemas.OnboardingRequest: {"newMemberRole": "backend", "lookbackDays": 30},
    schemas.ArchitectureRequest: {"focusQuestion": "How are jobs claimed?"},
    schemas.ReleaseNotesRequest: {"repo": "acme/web", "style": "release_notes"},
    schemas.EventsRequest: {"project_id": _ID, "events": [_EVENT]},
    schemas.StatusRequest: {"status": "archived"},
    schemas.Accepted: {
        "jobId": _JOB_ID,
        "status": "pending",
        "job": _PENDING,
        "urls": _URLS,
        "deduplicated": False,
    },
    schemas.JobList: {"jobs": [_JOB], "next_cursor": None},
    schemas.JobResponse: {"job": _JOB, "result": _HANDOFF},
    schemas.JobEventList: {
        "events": [
            {
                "seq": 1,
                "type": "job.pending",
                "at": _AT,
                "data": {
                    "status": "pending",
                    "attempt": 0,
                    "outcome": None,
                    "error": None,
                    "error_code": None,
                    "progress": None,
                },
            }
        ],
        "done": False,
    },
    schemas.HandoffResponse: {"handoff": _HANDOFF},
    schemas.InsightResponse: {"insight": _INSIGHT},
    schemas.HandoffList: {"handoffs": [_HANDOFF]},
    schemas.InsightList: {"insights": [_INSIGHT]},
    schemas.ProjectList: {
        "account_type": "personal",
        "organizations": [],
        "projects": [_PROJECT],
    },
    schemas.EventList: {
        "events": [
            {
                "id": _EVENT_ID,
                "user_id": _ID,
                "project_id": _ID,
                **_EVENT,
                "priority": None,
                "url": None,
                "metadata": {},
                "created_at": _AT,
            }
        ]
    },
    schemas.Ingested: {"accepted": 1, "duplicates": 0},
    schemas.FiltersResponse: {
        "filters": {
            "github": {
                "projects": [{"id": "acme/web", "label": "acme/web"}],
                "eventTypes": [{"value": "push", "label": "Push"}],
                "priorities": [],
                "branches": [{"value": "main", "label": "main"}],
                "branchesByProject": {"acme/web": [{"value": "main", "label": "main"}]},
                "defaultBranchByProject": {"acme/web": "main"},
            }
        }
    },
    schemas.WebhookRequest: {"project_id": _ID, "url": "https://hooks.example.com/baton"},
    schemas.WebhookChange: {"enabled": True},
    schemas.WebhookResponse: {"webhook": _WEBHOOK},
    schemas.WebhookWithSecret: {"webhook": _WEBHOOK, "secret": _SECRET},
    schemas.WebhookSecret: {"secret": _SECRET},
    schemas.WebhookList: {"webhooks": [_WEBHOOK]},
    schemas.DeliveryList: {"deliveries": [_DELIVERY]},
    schemas.DeliveryResponse: {"delivery": _DELIVERY},
    schemas.Health: {"status": "ok"},
    schemas.Error: {
        "error": "lookbackDays: must be greater than or equal to 1.",
        "code": "invalid_request",
        "request_id": "5f0c7a52c1e84a6f",
    },
    schemas.TooManyRequests: {
        "error": "Too many requests. Please wait a moment and try again.",
        "code": "rate_limited",
        "request_id": "5f0c7a52c1e84a6f",
        "detail": "60 requests per 60 s for this key",
        "violated-policies": ["default"],
    },
}


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a route table."""
    inputs = {t for o in operations for t in (o.body, o.query) if t}
    outputs = {o.response for o in operations if o.response}
    outputs |= {schemas.Error, schemas.TooManyRequests}
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((t, "validation") for t in sorted(inputs, key=lambda t: t.__name__)),
        *((t, "serialization") for t in sorted(outputs, key=lambda t: t.__name__)),
    ]
    refs, definitions = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation, refs, definitions["$defs"])
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": __version__,
            "summary": "Handoffs and insights about a team's work.",
            "description": "Ask for an artifact, get a job id, poll the job until it has ended.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "`fr_…`"}
            },
        },
    }


def _operation(
    operation: Operation, refs: dict[Any, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": (operation.handler.__doc__ or "").strip().split("\n")[0],
        "parameters": [*_path_parameters(operation), *_query_parameters(operation, definitions)],
        "responses": {
            str(operation.status): _success(operation, refs),
            **{
                str(status): {
                    "description": ERRORS[status],
                    "content": _content(error, refs[error, "serialization"]),
                    "headers": _headers(operation, status),
                }
                for status in _errors(operation)
                for error in [schemas.TooManyRequests if status == 429 else schemas.Error]
            },
        },
    }
    if operation.body:
        schema = refs[operation.body, "validation"]
        described["requestBody"] = {
            "required": True,
            "content": {
                media_type: (
                    _content(operation.body, schema)["application/json"]
                    if media_type == "application/json"
                    else {"schema": {"type": "string", "description": "One JSON object a line."}}
                )
                for media_type in operation.body_types
            },
        }
    if operation.public:
        described["security"] = []
    return described


def _success(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    headers = _headers(operation, operation.status)
    if operation.response is None:
        return {"description": "Done.", "headers": headers}
    return {
        "description": (operation.response.__doc__ or "").strip(),
        "content": _content(operation.response, refs[operation.response, "serialization"]),
        "headers": headers,
    }


def _content(model: type[BaseModel], schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema, "example": EXAMPLES[model]}}


def _errors(operation: Operation) -> list[int]:
    """Which errors a route can answer."""
    return sorted({*_implied_errors(operation), *operation.errors})


def _implied_errors(operation: Operation) -> Iterator[int]:
    if operation.body or operation.query:
        yield 400
    if not operation.public:
        yield 401
    if "{" in operation.path or any(
        model and "project_id" in model.model_fields for model in (operation.body, operation.query)
    ):
        yield 404
    if operation.body:
        yield from (408, 413, 415)
    if not operation.public:
        yield 429
    yield from (414, 431, 500)
    if operation.database:
        yield 503


def _headers(operation: Operation, status: int) -> dict[str, Any]:
    text = {"schema": {"type": "string"}}
    headers = {"X-Request-Id": {"description": "Also in every log line of the request.", **text}}
    if status == 202:
        headers["Location"] = {"description": "What to poll.", **text}
    if not operation.public and status not in (401, 414, 431):  # those are told nothing
        headers["RateLimit-Policy"] = {
            "description": "The quotas that apply: `q` requests in any `w` seconds.",
            **text,
        }
        headers["RateLimit"] = {
            "description": "What remains (`r`), and the seconds until there is more (`t`).",
            **text,
        }
    if status in (202, 429, 503):
        headers["Retry-After"] = {"description": "Seconds to wait before asking again.", **text}
    return headers


def _path_parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for part in operation.path.split("/"):
        if part.startswith("{"):
            yield {
                "name": part.strip("{}"),
                "in": "path",
                "required": True,
                "schema": {"type": "string"}
                if part == "{delivery_id}"
                else {"type": "string", "format": "uuid"},
            }


def _query_parameters(
    operation: Operation, definitions: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    if operation.query is None:
        return
    for name, schema in definitions[operation.query.__name__]["properties"].items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


# --- The page -------------------------------------------------------------------------------

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1c2024;background:#fff}
h1,h2{line-height:1.2}code,pre{font:14px/1.45 ui-monospace,monospace;background:#f3f4f6;
border-radius:4px}code{padding:.1em .3em}pre{padding:.8rem;overflow:auto}
details{border:1px solid #d9dde1;border-radius:6px;margin:.5rem 0;padding:.5rem .8rem}
summary{cursor:pointer}.verb{display:inline-block;min-width:4rem;font-weight:600;color:#0b5cad}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
border-bottom:1px solid #e5e8eb;padding:.3rem .5rem}
@media(prefers-color-scheme:dark){body{color:#e6e8ea;background:#15181b}code,pre{background:#22272b}
details,td,th{border-color:#363c42}.verb{color:#6cb2ff}}
"""


def page(described: dict[str, Any]) -> str:
    """The document as one HTML page without any external asset."""
    info = described["info"]
    sections: dict[str, list[str]] = {}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            shown = _operation_html(path, method, operation)
            sections.setdefault(operation["tags"][0], []).append(shown)
    body = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(s)}" for tag, s in sections.items())
    schemas_html = "".join(
        f"<details><summary><code>{html.escape(name)}</code></summary>{_json(schema)}</details>"
        for name, schema in sorted(described["components"]["schemas"].items())
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{info['title']} {info['version']}</title><style>{_STYLE}</style>"
        f"<h1>{info['title']} <small>{info['version']}</small></h1><p>{info['summary']} "
        f"{info['description']} Send <code>Authorization: Bearer fr_…</code>. The same as JSON: "
        f"<a href=/openapi.json>openapi.json</a>.</p>{body}<h2>Types</h2>{schemas_html}</html>"
    )


def _operation_html(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [
        f"<details><summary><span class=verb>{method.upper()}</span> "
        f"<code>{html.escape(path)}</code> — {html.escape(operation['summary'])}</summary>"
    ]
    if operation["parameters"]:
        rows = "".join(
            f"<tr><td><code>{p['name']}</code><td>{p['in']}<td>{html.escape(_type(p['schema']))}"
            for p in operation["parameters"]
        )
        parts.append(f"<table><tr><th>parameter<th>in<th>type{rows}</table>")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        parts.append(f"<p>Body: <code>{_type(body['schema'])}</code></p>{_json(body['example'])}")
    for status, answer in operation["responses"].items():
        parts.append(f"<p><b>{status}</b> {html.escape(answer['description'])}")
        if "content" in answer:
            shown = answer["content"]["application/json"]
            parts.append(f" <code>{_type(shown['schema'])}</code>")
            if status.startswith("2"):
                parts.append(_json(shown["example"]))
    return "".join([*parts, "</details>"])


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " | ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    bounds = [f"{schema[k]}" for k in ("minimum", "maximum") if k in schema]
    return str(schema.get("const", schema.get("type", "any"))) + (
        f" {'–'.join(bounds)}" if bounds else ""
    )


def _json(value: Any) -> str:
    return f"<pre>{html.escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())}</pre>"
