"""The OpenAPI document, made from the route table and the types.

The one rule: nothing is typed twice. A route says what it takes and gives; which errors it can
answer, and which headers come with an answer, follows from that.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import orjson
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from app import __version__, errors, schemas
from app.limits import Policy

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One row of the route table."""

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    handler: Handler  # the first sentence of its docstring is the summary
    response: type[BaseModel] | None  # None: no body
    tag: str
    body: type[BaseModel] | None = None
    body_types: tuple[str, ...] = ("application/json",)
    query: type[BaseModel] | None = None
    headers: tuple[str, ...] = ()  # that it reads; `HEADERS` explains them
    status: int = 200
    ended: type[BaseModel] | None = None  # what a 200 holds instead, when `Prefer: wait` was met
    stream: bool = False  # sends `text/event-stream` to those who prefer it
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


@dataclass(frozen=True, slots=True)
class Fault:
    """An error as the document tells it."""

    kind: type[errors.ApiError]
    meaning: str
    example: str  # a sentence

    @property
    def name(self) -> str:
        """Among the components."""
        return self.kind.code.title().replace("_", "")


# What each error means, once. Which of them a route can answer is decided in `_errors`.
ERRORS = {
    int(fault.kind.status): fault
    for fault in (
        Fault(
            errors.InvalidRequest,
            "A field is missing or wrong; `error` names it.",
            "lookbackDays: must be greater than or equal to 1.",
        ),
        Fault(
            errors.Unauthorized,
            "The key is missing, malformed, unknown or revoked.",
            "Send a valid API key as 'Authorization: Bearer fr_…'.",
        ),
        Fault(
            errors.Forbidden,
            "Visible, but only an owner or admin of the project may do this; or, with the code "
            "`plan_violation` or `quota_exceeded`, not with the plan of its owner.",
            "Only an owner or admin of the project may do this to its webhooks.",
        ),
        Fault(
            errors.NotFound,
            "Unknown, or not visible to this key; the two look alike.",
            "job_id: no job with this id is visible to this key.",
        ),
        Fault(
            errors.RequestTimeout,
            "The body did not arrive in time.",
            "The body did not arrive within 10 s.",
        ),
        Fault(
            errors.Conflict,
            "What is there now does not allow this; `error` says why.",
            "The job has not ended yet; cancel it first.",
        ),
        Fault(errors.Gone, "The job has been deleted.", "This job has been deleted."),
        Fault(
            errors.PayloadTooLarge,
            "The body is over the limit.",
            "The body is larger than 256 KiB, the limit of this route.",
        ),
        Fault(
            errors.UriTooLong,
            "The path and query are over the limit.",
            "The path and query are longer than 8 KiB.",
        ),
        Fault(
            errors.UnsupportedMediaType,
            "The body is of a type that this route does not read.",
            "Content-Type: must be application/json.",
        ),
        Fault(
            errors.IdempotencyKeyReuse,
            "The `Idempotency-Key` stands for another request.",
            "Idempotency-Key: was used for another request.",
        ),
        Fault(
            errors.RateLimited,
            "Too many requests for now, or with the code `too_many_waits` too many that wait, or "
            "with `queue_full` too many unfinished jobs; try again after `Retry-After`.",
            "Too many requests. Please wait a moment and try again.",
        ),
        Fault(
            errors.HeadersTooLarge,
            "The headers are over the limit.",
            "cookie: the headers are larger than 16 KiB together.",
        ),
        Fault(
            errors.ApiError,
            "Unexpected; the log has it by the request id.",
            "Something unexpected went wrong; the log has it by the request id.",
        ),
        Fault(
            errors.NotGenerated,
            "The job behind the request has failed; `code` is its `error_code`. It cost nothing.",
            "The provider refused the request (400).",
        ),
        Fault(
            errors.Unavailable,
            "The database is away or too slow, or no worker has answered a question in time; try "
            "again after `Retry-After`, with the same `Idempotency-Key` if there was one.",
            "The database does not answer right now. Try again shortly.",
        ),
    )
}

TAGS = {
    "Ask": "Ask for an artifact, follow the job that makes it, end it, try again.",
    "Artifacts": "Handoffs and insights that are there.",
    "Projects and events": "What the key may see, and the activity that artifacts are made from.",
    "Chat": "Post texts and artifacts into channels of Discord and Slack.",
    "Integrations": "What sends activity by itself, and which project it goes to.",
    "Webhooks": "Who is told how jobs end, and what became of each message.",
    "Health": "Whether the service is up; needs no key.",
}

ABOUT = """\
**Ask, then poll.** A `POST` that asks for an artifact answers `202` as soon as the job is stored;
from then on it ends, whatever crashes. Read `Location` again after `Retry-After` seconds until
`job.done` is true: then `status` is `completed`, and `result` is the artifact, or `failed`, and
`error` says why. These two are the only statuses that end a job, for ever.

**Without polling.** With `Prefer: wait=20` the same requests answer when the job has ended, or
after 20 seconds (25 at most) with what there is; a `POST` then answers `200` if it has ended. With
`If-None-Match` a `GET` waits for any change, and answers `304` if there was none.
`GET /jobs/{job_id}/events` streams the changes, and webhooks tell the end of each job.

**Safe repeats.** Send an `Idempotency-Key` of your own with a `POST`, and repeat the request with
the same key until an answer arrives: the same key is the same job, and `410` once that has been
deleted. It counts for a day at least.

**Limits.** `RateLimit-Policy` tells the quotas of a route, `RateLimit` what is left of them.
Reading jobs has a quota of its own, so polling takes nothing from the rest.

**Errors.** Every body of an error has a sentence `error` and a `code`; with
`Accept: application/problem+json` also the members of RFC 9457. A verb that a path does not know
is `405` with `Allow`. Each `GET` answers `HEAD` too.

**Growth.** Answers may get more fields; ignore what you do not know. Query parameters that are not
listed are ignored, unknown fields of a body are refused. Ids are opaque. Text must not hold NUL.
"""


def _header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    shown = {"description": description, "schema": {"type": "string", **schema}}
    return shown | {"required": True} if required else shown


# What a client may send. `Accept` and `Authorization` are told by media types and security.
HEADERS = {
    "X-Request-Id": _header(
        "The caller's own id of the request; another one is made if it is longer than 128 "
        "characters or has others than letters, digits and `._:-`.",
        example="5f0c7a52c1e84a6f",
    ),
    "Idempotency-Key": _header(
        "What the caller calls this request, quoted or bare; asked so again, the answer is the "
        "same job. With another body it is 422.",
        pattern=r'^("([ !#-\[\]-~]|\\["\\]){1,255}"|[!#-~][ -~]{0,254})$',
        example='"8e03978e-40d5-43e8-bc93-6894a57f9324"',
    ),
    "Prefer": _header(
        "RFC 7240. `wait=N`: answer when the job has ended, or after N seconds, at most 25. "
        "`respond-async`: what happens anyway. What cannot be met is ignored.",
        example="wait=10",
    ),
    "If-None-Match": _header(
        "The `ETag` of an earlier answer: 304 if nothing has changed; with `Prefer: wait` any "
        "change ends the wait.",
        example='"7"',
    ),
    "Last-Event-ID": _header(
        "The `seq` of the last event that arrived, as browsers send it; wins over `after`.",
        pattern="^[0-9]{0,15}$",
        example="3",
    ),
}

# What comes with answers. Which of them is decided in `_answer_headers`.
ANSWER_HEADERS = {
    "X-Request-Id": _header(
        "Also in every log line of the request.", required=True, pattern="^[A-Za-z0-9._:-]{1,128}$"
    ),
    "RateLimit-Policy": _header(
        "The quotas that apply: `q` requests in any `w` seconds, or at once.",
        example='"default";q=60;w=60, "generate";q=10;w=60',
    ),
    "RateLimit": _header(
        "What remains (`r`), and the seconds until there is more (`t`).",
        example='"default";r=57;t=41, "generate";r=9;t=41',
    ),
    "Retry-After": _header(
        "Seconds to wait before asking again; while a job is not done, by how long such jobs take.",
        type="integer",
        minimum=0,
        example=2,
    ),
    "retry-after-ms": _header("The same in milliseconds.", type="integer", minimum=0, example=1800),
    "Location": _header("What to poll.", format="uri-reference"),
    "Operation-Location": _header("The same with the host.", required=True, format="uri"),
    "Idempotent-Replayed": _header(
        "The `Idempotency-Key` was known: this is the job of the first request.", enum=["true"]
    ),
    "Preference-Applied": _header("What of `Prefer` was done.", example="respond-async, wait=10"),
    "ETag": _header("Changes with everything that the answer shows but estimates.", example='"7"'),
    "Cache-Control": _header("`no-store`.", required=True, enum=["no-store"]),
    "Vary": _header("Which request headers the answer depends on.", required=True),
    "Server-Timing": _header(
        "How long the job waited and ran, in milliseconds.", example="queue;dur=824, run;dur=3391"
    ),
    "Link": _header('The next page, `rel="next"`; absent on the last.'),
    "WWW-Authenticate": _header("`Bearer`.", required=True, enum=["Bearer"]),
}

# What is told to webhooks, and when.
WEBHOOKS = {
    "job.completed": "A job has ended with an artifact.",
    "job.failed": "A job has ended without one: failed, cancelled or timed out; see `error_code`.",
    "job.processing": "A worker has begun a job. Only for those who ask for it.",
    "job.progress": "A running job has moved on, at most every 5 seconds. Only for those who ask.",
}
# The headers of a message, with an example of each.
WEBHOOK_HEADERS = {
    "webhook-id": (
        "The id of the message, the same on every attempt: drop what you have had already.",
        "msg_019ab3f27a107b528c3f0e1d2c3b4a59",
    ),
    "webhook-timestamp": ("Seconds since 1970 at this attempt; refuse what is old.", "1795507200"),
    "webhook-signature": (
        "`v1,` and the HMAC-SHA256 of `id.timestamp.body` in base64, by the webhook's secret; "
        "after a rotation two of them for a day, with a space between. Any library of Standard "
        "Webhooks verifies it.",
        "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
    ),
    "ce-specversion": ("CloudEvents in binary mode.", "1.0"),
    "ce-id": ("As `webhook-id`.", "msg_019ab3f27a107b528c3f0e1d2c3b4a59"),
    "ce-type": ("As `type` in the body.", "job.completed"),
    "ce-source": ("The project.", "/api/v1/projects/019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"),
    "ce-subject": ("The job.", "019ab3f2-7a10-7b52-8c3f-0e1d2c3b4a59"),
    "ce-time": ("When the message was made.", "2026-11-24T08:00:00Z"),
}
WEBHOOK_ANSWERS = {
    "2XX": "Received. Answer within 20 seconds and do the work later.",
    "410": "Not wanted any more: the webhook is disabled.",
    "429": "Later, please: `Retry-After` is honoured, as with 502, 503 and 504.",
    "default": "Not received: ten attempts in 75 hours. Redirects are not followed.",
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
    "expires_at": "2026-12-24T08:00:00Z",
    "data_removed": False,
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
    "expires_at": None,
    "progress": {"value": 0, "step": "queued", "message": None},
    "queue": {"position": 1, "capped": False, "ahead_in_project": 0, "paused": False},
    "eta": {"start_at": _AT, "done_at": "2026-11-24T08:00:01Z", "basis": "p50_last_200"},
    "timings": {"queue_ms": None, "run_ms": None, "total_ms": None},
    "usage": {**_USAGE, "credits": 0},
}
_PROCESSING: dict[str, Any] = {
    **_PENDING,
    "status": "processing",
    "attempt": 1,
    "started_at": _AT,
    "progress": {"value": 0.4, "step": "generating", "message": "3 of 7 sources"},
    "queue": None,
    "timings": {"queue_ms": 4, "run_ms": None, "total_ms": None},
}
_FAILED: dict[str, Any] = {
    **_PROCESSING,
    "status": "failed",
    "error": "Cancelled by the caller.",
    "error_code": "cancelled",
    "error_meta": {"retryable": True, "stage": "generating", "attempts": 1},
    "done": True,
    "outcome": "cancelled",
    "completed_at": _AT,
    "cancel_requested_at": _AT,
    "expires_at": "2026-12-24T08:00:00Z",
    "timings": {"queue_ms": 4, "run_ms": 87, "total_ms": 91},
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
_INTEGRATION = {
    "id": _ID,
    "source": "github",
    "workspace_id": _ID,
    "workspace_name": "acme",
    "connected_at": _AT,
    "scope": "personal",
    "resource_type": "repository",
    "connection_status": "connected",
    "providers_connected": ["github"],
    "last_validated_at": _AT,
    "organization_id": None,
    "project_id": _ID,
    "enabled": True,
    "has_token": False,
    "updated_at": _AT,
    "url": f"https://baton.example.com/hooks/{_ID}",
}
_RESOURCE = {
    "source": "github",
    "integration_id": _ID,
    "resource_id": "acme/web",
    "resource_name": "acme/web",
    "resource_type": "repository",
    "default_branch": "main",
    "last_event_at": _AT,
}
_ADVICE = "In the repository: Settings, Webhooks, Add webhook; paste the URL and the secret."
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
_SNAPSHOT = {
    "status": "pending",
    "attempt": 0,
    "outcome": None,
    "error": None,
    "error_code": None,
    "progress": None,
}
_JOB_EVENT = {"seq": 1, "type": "job.pending", "at": _AT, "data": _SNAPSHOT}
_STREAM = "\n".join(
    (
        "retry: 2000",
        "",
        "id: 1",
        "event: job.pending",
        f"data: {orjson.dumps(_JOB_EVENT).decode()}",
        "",
        ": ka",
        "",
        "",
    )
)
# One example a type; a test holds them to their types.
EXAMPLES: dict[type[BaseModel], Any] = {
    schemas.HandoffRequest: {"project_id": _ID, "sources": ["github"]},
    schemas.CorrelationRequest: {"lookbackHours": 168},
    schemas.OnboardingRequest: {"newMemberRole": "backend", "lookbackDays": 30},
    schemas.ArchitectureRequest: {"focusQuestion": "How are jobs claimed?"},
    schemas.ReleaseNotesRequest: {"repo": "acme/web", "style": "release_notes"},
    schemas.QuestionRequest: {"question": "Why was the TTL map dropped?"},
    schemas.Answer: {
        "answer": "We decided to drop the TTL map.",
        "citations": [f"ev:{_EVENT_ID}"],
    },
    schemas.EventsRequest: {"project_id": _ID, "events": [_EVENT]},
    schemas.StatusRequest: {"status": "archived"},
    schemas.Accepted: {
        "jobId": _JOB_ID,
        "status": "pending",
        "job": _PENDING,
        "urls": _URLS,
        "deduplicated": False,
    },
    schemas.Ended: {
        "jobId": _JOB_ID,
        "status": "completed",
        "job": _JOB,
        "urls": _URLS,
        "deduplicated": False,
        "result": _HANDOFF,
    },
    schemas.WebhookMessage: {
        "type": "job.completed",
        "timestamp": _AT,
        "data": {"job": _JOB, "result_url": _URLS["self"]},
    },
    schemas.JobList: {"jobs": [_JOB], "next_cursor": None},
    schemas.JobResponse: {"job": _JOB, "result": _HANDOFF},
    schemas.JobEventList: {"events": [_JOB_EVENT], "done": False},
    schemas.HandoffResponse: {"handoff": _HANDOFF},
    schemas.InsightResponse: {"insight": _INSIGHT},
    schemas.HandoffList: {"handoffs": [_HANDOFF]},
    schemas.InsightList: {"insights": [_INSIGHT]},
    schemas.DigestScheduleRequest: {"cron": "0 9 * * 1-5", "time_zone": "Europe/Berlin"},
    schemas.DigestScheduleResponse: {
        "digest_schedule": {
            "project_id": _ID,
            "cron": "0 9 * * 1-5",
            "time_zone": "Europe/Berlin",
            "period_start": _AT,
            "next_at": _AT,
            "last_job_id": None,
            "error": None,
            "deliver": [{"to": "slack", "channel_id": "C012AB3CD"}],
            "updated_at": _AT,
        }
    },
    schemas.DigestList: {
        "digests": [
            {
                "id": _ID,
                "projectId": _ID,
                "generatedBy": _ID,
                "periodStart": _AT,
                "periodEnd": _AT,
                "content": {
                    "title": "demo: Switch the cache to an LRU",
                    "summary": _STATEMENT,
                    "key_changes": [_STATEMENT],
                    "decisions": [],
                    "open_questions": [],
                    "next_steps": [],
                },
                "markdown": "# demo: Switch the cache to an LRU\n",
                "createdAt": _AT,
            }
        ]
    },
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
    schemas.PostRequest: {
        "channel_id": "41771983423143937",
        "artifact": "last_handoff",
        "project_id": _ID,
    },
    schemas.ChannelList: {
        "channels": [{"id": "41771983423143937", "name": "general", "topic": "24/7 chat"}]
    },
    schemas.Posted: {"ok": True, "message_id": "334385199974967042"},
    schemas.ScopeRequest: {"sources": ["github"], "filters": {"github": {"branches": ["main"]}}},
    schemas.ScopeResponse: {
        "scope": {"sources": ["github"], "filters": {"github": {"branches": ["main"]}}}
    },
    schemas.IntegrationRequest: {"source": "github", "project_id": _ID, "workspace_name": "acme"},
    schemas.IntegrationChange: {"enabled": True, "project_id": _ID},
    schemas.IntegrationRotation: {},
    schemas.IntegrationResponse: {"integration": _INTEGRATION},
    schemas.IntegrationWithSecret: {
        "integration": _INTEGRATION,
        "secret": _SECRET,
        "advice": _ADVICE,
    },
    schemas.IntegrationList: {"integrations": [_INTEGRATION]},
    schemas.UntrackedList: [
        {k: v for k, v in _RESOURCE.items() if k != "default_branch"},
    ],
    schemas.ResourcesRequest: {"resources": [{"integration_id": _ID, "resource_id": "acme/web"}]},
    schemas.ResourceList: {"resources": [_RESOURCE]},
    schemas.WebhookRequest: {"project_id": _ID, "url": "https://hooks.example.com/baton"},
    schemas.WebhookChange: {"enabled": True},
    schemas.WebhookResponse: {"webhook": _WEBHOOK},
    schemas.WebhookWithSecret: {"webhook": _WEBHOOK, "secret": _SECRET},
    schemas.WebhookSecret: {"secret": _SECRET},
    schemas.WebhookList: {"webhooks": [_WEBHOOK]},
    schemas.DeliveryList: {"deliveries": [_DELIVERY]},
    schemas.DeliveryResponse: {"delivery": _DELIVERY},
    schemas.Health: {"status": "ok"},
}


class _Untitled(GenerateJsonSchema):
    """A title that only repeats a field's name becomes the name of a type in generated clients."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a route table."""
    queries = {o.query for o in operations if o.query}
    inputs = {o.body for o in operations if o.body} | queries
    outputs = {model for o in operations for model in (o.response, o.ended) if model}
    outputs |= {schemas.Error, schemas.TooManyRequests, schemas.Problem, schemas.WebhookMessage}
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((t, "validation") for t in sorted(inputs, key=lambda t: t.__name__)),
        *((t, "serialization") for t in sorted(outputs, key=lambda t: t.__name__)),
    ]
    refs, made = models_json_schema(
        modes, ref_template="#/components/schemas/{model}", schema_generator=_Untitled
    )
    types = made["$defs"]
    asked = {query: types.pop(query.__name__) for query in queries}  # they become parameters
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation, refs, asked)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    used = {o.tag for o in operations}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": __version__,
            "summary": "Handoffs and insights about a team's work.",
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The server that this document came from."}],
        "security": [{"key": []}],
        "tags": [{"name": n, "description": text} for n, text in TAGS.items() if n in used],
        "paths": paths,
        "webhooks": {
            kind: {"post": _webhook(kind, refs[schemas.WebhookMessage, "serialization"])}
            for kind in get_args(schemas.WebhookType)
        },
        "components": {
            "schemas": types,
            "parameters": {
                name: {"name": name, "in": "header", **header} for name, header in HEADERS.items()
            },
            "headers": ANSWER_HEADERS,
            "responses": {fault.name: _fault(fault, refs) for fault in ERRORS.values()},
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, `fr_…`, of `baton key create`.",
                }
            },
        },
    }


def _operation(
    operation: Operation, refs: dict[Any, Any], asked: dict[type[BaseModel], dict[str, Any]]
) -> dict[str, Any]:
    summary, more = _sentences(operation.handler.__doc__ or "")
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": summary,
        "parameters": [
            *_path_parameters(operation),
            *(_query_parameters(asked[operation.query]) if operation.query else ()),
            *(
                {"$ref": f"#/components/parameters/{name}"}
                for name in (*operation.headers, "X-Request-Id")
            ),
        ],
        "responses": {
            **{
                str(status): _success(operation, status, model, refs)
                for status, model in _successes(operation).items()
            },
            **{
                str(status): {"$ref": f"#/components/responses/{ERRORS[status].name}"}
                for status in _errors(operation)
            },
        },
    }
    if more:
        described["description"] = more
    if operation.body:
        schema = refs[operation.body, "validation"]
        described["requestBody"] = {
            "required": True,
            "content": {
                media_type: (
                    {"schema": schema, "example": EXAMPLES[operation.body]}
                    if media_type == "application/json"
                    else {
                        "schema": {"type": "string", "description": "One JSON object a line."},
                        "example": orjson.dumps(_EVENT).decode() + "\n",
                    }
                )
                for media_type in operation.body_types
            },
        }
    if operation.public:
        described["security"] = []
    return described


def _sentences(docstring: str) -> tuple[str, str]:
    """The first sentence, and the others; as text that does not care about lines."""
    text = _flat(docstring)
    found = re.search(r"\.(?=\s|$)", text)
    end = found.end() if found else len(text)
    return text[:end], text[end:].strip()


def _successes(operation: Operation) -> dict[int, type[BaseModel] | None]:
    """What it answers when all is well, by status; None: no body."""
    answers: dict[int, type[BaseModel] | None] = {}
    if operation.ended:
        answers[200] = operation.ended
    answers[operation.status] = operation.response
    if operation.stream:
        answers[204] = None
    if "If-None-Match" in operation.headers:
        answers[304] = None
    return answers


_WITHOUT_BODY = {
    204: "Done.",
    304: "Nothing has changed since the answer with this `ETag`.",
}


def _success(
    operation: Operation, status: int, model: type[BaseModel] | None, refs: dict[Any, Any]
) -> dict[str, Any]:
    headers = _references("headers", _answer_headers(operation, status, model))
    if model is None:
        told = _WITHOUT_BODY[status]
        if operation.stream:
            told = "The job has ended and there is no event left to stream: do not come back."
        return {"description": told, "headers": headers}
    content = {"application/json": _content(model, refs)}
    if operation.stream:
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": "Server-Sent Events."},
            "example": _STREAM,
        }
    return {"description": _flat(model.__doc__ or ""), "headers": headers, "content": content}


def _answer_headers(
    operation: Operation, status: int, model: type[BaseModel] | None
) -> Iterator[str]:
    """Which headers come with an answer that is no error."""
    fields = set(model.model_fields) if model else set()
    yield "X-Request-Id"
    if not operation.public:
        yield from ("RateLimit-Policy", "RateLimit")
    if operation.stream:
        yield from ("Cache-Control", "Vary")
    if "secret" in fields:
        yield "Cache-Control"
    if status == 202:
        yield from ("Location", "Retry-After")
    if fields & {"job", "jobs"} or status == 304:
        yield from ("Cache-Control", "Vary", "Retry-After", "retry-after-ms")
    if "job" in fields or (status == 304 and "{job_id}" in operation.path):
        yield from ("Location", "Server-Timing")
    yield from _asked_headers(operation, status)
    if "next_cursor" in fields:
        yield "Link"


def _asked_headers(operation: Operation, status: int) -> Iterator[str]:
    """Which come because of what the request may say."""
    if "Idempotency-Key" in operation.headers:
        yield from ("Operation-Location", "Idempotent-Replayed")
    if "Prefer" in operation.headers:
        yield "Preference-Applied"
    if "If-None-Match" in operation.headers or operation.ended:
        yield "ETag"


def _fault(fault: Fault, refs: dict[Any, Any]) -> dict[str, Any]:
    """An error as any route answers it."""
    status = int(fault.kind.status)
    model = schemas.TooManyRequests if status == 429 else schemas.Error
    example: dict[str, Any] = {
        "error": fault.example,
        "code": fault.kind.code,
        "request_id": "5f0c7a52c1e84a6f",
    }
    if status == 429:
        example |= {
            "detail": "60 requests per 60 s for this key",
            "violated-policies": ["default"],
        }
    return {
        "description": fault.meaning,
        "headers": _references("headers", _fault_headers(status)),
        "content": {
            "application/json": {"schema": refs[model, "serialization"], "example": example},
            errors.PROBLEM: {
                "schema": refs[schemas.Problem, "serialization"],
                "example": errors.problem(fault.kind, example),
            },
        },
    }


def _fault_headers(status: int) -> Iterator[str]:
    yield from ("X-Request-Id", "Vary")
    if status == 401:
        yield "WWW-Authenticate"
    elif status not in (414, 431):  # who is not asked for a key is told no limits
        yield from ("RateLimit-Policy", "RateLimit")
    if status in (429, 503):
        yield "Retry-After"


def _webhook(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A message that is sent to those who registered for it."""
    example = EXAMPLES[schemas.WebhookMessage] | {"type": kind}
    state = {"job.completed": _JOB, "job.failed": _FAILED}.get(kind, _PROCESSING)
    example["data"] = {**example["data"], "job": {**state, "eta": None}}
    return {
        "operationId": kind.replace(".", "_"),
        "tags": ["Webhooks"],
        "summary": WEBHOOKS[kind],
        "security": [],
        "parameters": [
            {
                "name": name,
                "in": "header",
                "required": True,
                "description": description,
                "schema": {"type": "string"},
                "example": kind if name == "ce-type" else shown,
            }
            for name, (description, shown) in WEBHOOK_HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": example}},
        },
        "responses": {status: {"description": text} for status, text in WEBHOOK_ANSWERS.items()},
    }


def _content(model: type[BaseModel], refs: dict[Any, Any]) -> dict[str, Any]:
    return {"schema": refs[model, "serialization"], "example": EXAMPLES[model]}


def _references(kind: str, names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in names}


def _flat(docstring: str) -> str:
    return " ".join(docstring.split())


def _errors(operation: Operation) -> list[int]:
    """Which errors a route can answer."""
    return sorted({*_implied_errors(operation), *operation.errors})


def _implied_errors(operation: Operation) -> Iterator[int]:
    if operation.body or operation.query or "Idempotency-Key" in operation.headers:
        yield 400
    if not operation.public:
        yield 401
    if "{" in operation.path or any(
        model and "project_id" in model.model_fields for model in (operation.body, operation.query)
    ):
        yield 404
    if operation.body:
        yield from (408, 413, 415)
    if "Idempotency-Key" in operation.headers:
        yield from (410, 422)
    if not operation.public:
        yield 429
    yield from (414, 431, 500)
    if operation.database:
        yield 503


def _path_parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", operation.path):
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": f"The id of the {name.removesuffix('_id')}.",
            "schema": {"type": "string"},
        }


def _query_parameters(query: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, described in query["properties"].items():
        schema = dict(described)
        parameter: dict[str, Any] = {"name": name, "in": "query", "required": False}
        if description := schema.pop("description", None):
            parameter["description"] = description
        options = [s for s in schema.get("anyOf", ()) if s != {"type": "null"}]
        if len(options) == 1:  # a query has no null: what is not given is left out
            schema = options[0]
        if schema.get("type") == "object":
            parameter |= {"style": "deepObject", "explode": True}
        yield parameter | {"schema": schema}
