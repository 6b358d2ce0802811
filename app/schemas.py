"""Every shape that crosses a border, written once.

A pydantic type here validates a request body, describes itself in the OpenAPI document, and (the
drafts) is the JSON Schema that a model has to fill. The one rule: a field's name is the same on
the wire, in this file and in the table, so there is no mapping layer anywhere.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    RootModel,
    StringConstraints,
    WithJsonSchema,
)

# --- Words of the contract -----------------------------------------------------------------

JobKind = Literal[
    "handoff",
    "cross_source_correlation",
    "onboarding_brief",
    "architecture_insight",
    "release_notes",
    "question",
    "digest",
]
InsightKind = Literal[
    "cross_source_correlation",
    "onboarding_brief",
    "architecture_insight",
    "release_notes",
    "question",
    "digest",
]
JobStatus = Literal["pending", "processing", "completed", "failed"]
ErrorCode = Literal[
    "plan_violation",
    "quota_exceeded",
    "generation_failed",
    "no_result",
    "cancelled",
    "timeout",
    "worker_lost",
]
Outcome = Literal["succeeded", "failed", "cancelled", "timed_out", "expired"]
ArtifactStatus = Literal["active", "archived"]
LastArtifact = Literal[
    "last_handoff",
    "last_correlation",
    "last_onboarding",
    "last_architecture",
    "last_release_notes",
]

# The longest accepted texts, in characters. A title is a line, a content is a long message.
TITLE_MAX = 1_000
CONTENT_MAX = 100_000
NAME_MAX = 300
URL_MAX = 2_000
BATCH_MAX = 1_000  # events in one request
POST_MAX = 2_000  # of a message, as Discord takes it
METADATA_DEPTH = 16
METADATA_VALUES = 2_000


def _rfc3339(value: object) -> object:
    """Accept an RFC 3339 string with an offset; a bare number or a local time is ambiguous."""
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or len(value) > 40:
        raise ValueError("must be an RFC 3339 time such as 2026-11-24T08:00:00Z")
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be an RFC 3339 time such as 2026-11-24T08:00:00Z") from None
    if parsed.tzinfo is None:
        raise ValueError("must carry a time zone, for example a final Z")
    return parsed


def _in_range(value: datetime) -> datetime:
    """Keep to years that PostgreSQL, RFC 3339 and time zone arithmetic all can hold."""
    if not 1970 <= value.year <= 2200:
        raise ValueError("must lie between the years 1970 and 2200")
    return value.astimezone(UTC)


def rfc3339(value: datetime) -> str:
    """The one way a time is written on the wire: UTC with a Z, microseconds when there are any."""
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


Time = Annotated[
    datetime,
    BeforeValidator(_rfc3339),
    AfterValidator(_in_range),
    PlainSerializer(rfc3339, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "format": "date-time",
            "pattern": "^(19[7-9][0-9]|2[01][0-9]{2}|2200)-",  # the years of _in_range
        }
    ),
]


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    """Keep free-form metadata to what JSON writers and jsonb take without trouble."""
    count = 0
    stack: list[tuple[dict[str, Any] | list[Any], int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        children = item.values() if isinstance(item, dict) else item
        count += len(item)
        if depth > METADATA_DEPTH:
            raise ValueError(f"must not be nested deeper than {METADATA_DEPTH} levels")
        if count > METADATA_VALUES:
            raise ValueError(f"must not hold more than {METADATA_VALUES} values")
        stack += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_bounded)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=NAME_MAX)]
SourceName = Annotated[str, StringConstraints(min_length=1, max_length=64)]


def _whole(value: object) -> object:
    """To JSON, 30.0 is the integer 30; some languages write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Strict(BaseModel):
    """What comes in: no unknown field, no silent conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Shape(BaseModel):
    """What goes out: documented here, rendered from rows without passing through this class.

    Tests hold the answers to just these fields. Clients are not told so: they must bear new ones.
    """

    model_config = ConfigDict(
        extra="forbid", json_schema_extra=lambda schema: schema.pop("additionalProperties", None)
    )


# --- Requests ------------------------------------------------------------------------------


class Filter(Strict):
    """Narrows one source; the arrays are combined with AND, the values inside one with OR."""

    projects: list[Line] | None = Field(None, max_length=500, description="Resource ids.")
    eventTypes: list[Line] | None = Field(None, max_length=500)
    branches: list[Line] | None = Field(None, max_length=500, description="Git sources only.")
    priorities: list[Line] | None = Field(
        None, max_length=500, description="Only sources that have priorities."
    )


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Priority = Literal["low", "normal", "high"]


def _webhook_url(value: str) -> str:
    """Only the shape: whether the address may be reached is judged when a message is sent."""
    if len(value) > URL_MAX:
        raise ValueError(f"must not be longer than {URL_MAX} characters")
    if not re.fullmatch(r"(?i:https?)://[!#-;=?-\[\]_a-z~]+", value):
        raise ValueError("must be an http or https URL, with all else than ASCII percent-encoded")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL with a valid host and port") from None
    if "@" in parts.netloc:
        raise ValueError("must not hold a user name or password")
    if not parts.hostname or port == 0:
        raise ValueError("must be a URL with a valid host and port")
    return value


WebhookUrl = Annotated[
    str,
    AfterValidator(_webhook_url),
    WithJsonSchema({"type": "string", "format": "uri", "maxLength": URL_MAX}),
]
WebhookType = Literal["job.completed", "job.failed", "job.processing", "job.progress"]
WebhookTypes = Annotated[
    list[WebhookType],
    Field(min_length=1, max_length=4),
    AfterValidator(lambda types: list(dict.fromkeys(types))),
]


Seconds = Annotated[int, Field(ge=1, le=86_400), BeforeValidator(_whole)]


class JobOptions(Strict):
    """Options of the job itself, apart so that they never collide with an artifact's."""

    priority: Priority = "normal"
    start_timeout_s: Seconds | None = Field(
        None, description="Seconds; not started by then, the job fails."
    )
    timeout_s: Seconds | None = Field(
        None, description="Seconds; not done by then, the job fails. A day if unset."
    )
    dedupe: Literal["in_flight"] | None = Field(
        None,
        description="`in_flight`: join the unfinished job of the same request, if there is one.",
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        None, max_length=16, description="Comes back with the job, and finds it in a list."
    )
    webhook_url: WebhookUrl | None = Field(
        None, description="Told how the job ends, signed with the project's webhook secret."
    )


class FilteredRequest(Strict):
    """A request about the events that its filters let through."""

    filters: dict[SourceName, Filter] | None = Field(None, max_length=100)


class ArtifactRequest(FilteredRequest):
    """What all requests for an artifact share."""

    until: Time | None = Field(
        None, description="Look back from this time instead of now; handy for old histories."
    )
    job: JobOptions | None = None


class ScopedRequest(ArtifactRequest):
    """A request that can name its sources; without sources and filters the saved scope is used."""

    sources: list[SourceName] | None = Field(None, min_length=1, max_length=100)


class HandoffRequest(ScopedRequest):
    """Ask what happened since the previous handoff of the same scope (24 hours to 14 days)."""

    project_id: str


class CorrelationRequest(ScopedRequest):
    """Ask which activity in different sources belongs together."""

    lookbackHours: Whole = Field(168, ge=1, le=2160)
    maxEvents: Whole = Field(150, ge=1, le=1000)


class OnboardingRequest(ScopedRequest):
    """Ask for a brief that brings a new member up to date."""

    newMemberRole: Line | None = None
    focusArea: Line | None = None
    lookbackDays: Whole = Field(30, ge=1, le=365)
    maxEvents: Whole = Field(400, ge=1, le=1000)


class ArchitectureRequest(ScopedRequest):
    """Ask how the system is built and where it is moving."""

    focusQuestion: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    lookbackDays: Whole = Field(14, ge=1, le=365)
    maxEvents: Whole = Field(250, ge=1, le=1000)


class ReleaseNotesRequest(ArtifactRequest):
    """Ask for the notes of the latest release, or of what is not released yet."""

    source: SourceName = "github"
    repo: Line | None = None
    style: Literal["release_notes", "pr_description"] = "release_notes"


class QuestionRequest(FilteredRequest):
    """Ask about the last 14 days; without filters the saved scope is used."""

    question: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)
    ] = Field(
        description="In the language that the team writes in, as to a colleague.",
        json_schema_extra={"pattern": r"\S"},
    )


def _web_url(value: str) -> str:
    """Where a person can look; nobody here asks there."""
    if not value.lower().startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value


WebUrl = Annotated[
    str,
    StringConstraints(max_length=URL_MAX),
    AfterValidator(_web_url),
    Field(json_schema_extra={"pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"}),
]


class EventInput(Strict):
    """One piece of tracked activity."""

    source: SourceName
    event_type: Line
    title: Annotated[str, StringConstraints(min_length=1, max_length=TITLE_MAX)]
    content: Annotated[str, StringConstraints(max_length=CONTENT_MAX)] | None = None
    external_id: Line | None = Field(
        None, description="The same id of the same source and project is stored once."
    )
    resource: Line | None = Field(None, description="Repository, channel, board.")
    branch: Line | None = None
    priority: Line | None = None
    author: Line | None = None
    url: WebUrl | None = None
    occurred_at: Time | None = Field(None, description="Now, when omitted.")
    metadata: Metadata | None = None


class EventsRequest(Strict):
    """A batch of events; one bad event refuses the whole batch."""

    project_id: str
    events: list[EventInput] = Field(min_length=1, max_length=BATCH_MAX)


class StatusRequest(Strict):
    """Archive an artifact, or bring it back."""

    status: ArtifactStatus


class WebhookRequest(Strict):
    """Tell this URL of the jobs of a project."""

    project_id: str
    url: WebhookUrl
    types: WebhookTypes = Field(
        ["job.completed", "job.failed"],
        description="`job.failed` is every end but a completed one; branch on `error_code`.",
    )


class WebhookChange(Strict):
    """What to change; the rest stays."""

    enabled: bool | None = None
    url: WebhookUrl | None = None
    types: WebhookTypes | None = None


class DigestChannel(Strict):
    """A channel that digests are posted into."""

    to: Literal["discord", "slack"]
    channel_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]


class DigestScheduleRequest(Strict):
    """When the digests of a project are written."""

    cron: str = Field(
        max_length=200,
        description="Five fields: minute (one number), hour, day of the month, month, day of the "
        "week. A digest is about the time since the one before.",
    )
    time_zone: str = Field("UTC", max_length=100, description="As in `Europe/Berlin`.")
    deliver: list[DigestChannel] = Field(
        [], max_length=10, description="Channels that the caller can post into."
    )


class PostRequest(Strict):
    """What to post: a text, or an artifact as a Markdown file, and into which channel."""

    channel_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: Annotated[str, StringConstraints(max_length=POST_MAX, pattern=r"\S")] | None = Field(
        None, description="Pings nobody, whatever it says."
    )
    handoff_id: str | None = None
    insight_id: str | None = None
    artifact: LastArtifact | None = Field(
        None, description="The newest active one of the project that `project_id` names."
    )
    project_id: str | None = Field(None, description="With `artifact`, and only with it.")


class ScopeRequest(Strict):
    """What requests of the project mean that name neither sources nor filters; neither: all."""

    sources: list[SourceName] | None = Field(None, min_length=1, max_length=100)
    filters: dict[SourceName, Filter] | None = Field(None, max_length=100)


# As it stands in a header or a form: no space, nothing that only looks like a letter.
Secret = Annotated[str, StringConstraints(min_length=8, max_length=500, pattern=r"^[!-~]+$")]


class IntegrationRequest(Strict):
    """Connect a source: the caller's own, or an organization's."""

    source: SourceName
    project_id: str | None = Field(
        None, description="Gets all resources that are new, from the first event on."
    )
    organization_id: str | None = Field(
        None, description="Default: of the project, if the caller is an admin there; else none."
    )
    workspace_id: Line | None = Field(None, description="What the source calls it.")
    workspace_name: Line | None = Field(None, description="Default: the name of the source.")
    secret: Secret | None = Field(
        None, description="That the source has made, such as Slack's signing secret."
    )
    token: Secret | None = Field(
        None, description="To call the source with. It is stored encrypted and never shown."
    )


class IntegrationChange(Strict):
    """What to change; the rest stays."""

    workspace_name: Line | None = None
    enabled: bool | None = Field(
        None, description="False: what the source sends is refused with 404."
    )
    project_id: str | None = Field(
        None, description="Gets all resources that are new from now on; null: they wait."
    )
    token: Secret | None = Field(None, description="To call the source with; null: none.")


class IntegrationRotation(Strict):
    """A new secret; without one it is made, if the source leaves that to us."""

    secret: Secret | None = None


class ResourceName(Strict):
    """A repository, channel or board that the project is to have."""

    integration_id: str
    resource_id: Line
    source: SourceName | None = Field(None, description="Checked, if it is there.")


class ResourcesRequest(Strict):
    """All resources that the project has from now on."""

    resources: list[ResourceName] = Field(max_length=1000)


class Query(BaseModel):
    """Query parameters: text that is converted, with the same limits."""

    model_config = ConfigDict(extra="forbid")


Limit = Annotated[int, Field(ge=1, le=100)]


class EventsQuery(Query):
    """Which events to list."""

    project_id: str | None = None
    source: SourceName | None = None
    limit: Limit = 20


class HandoffsQuery(Query):
    """Which handoffs to list."""

    project_id: str | None = None
    status: Literal["active", "archived", "all"] = "active"
    limit: Limit = 20


class InsightsQuery(Query):
    """Which insights of a project to list."""

    kind: InsightKind | None = Field(
        None, description="All but answers to questions and digests, when omitted."
    )
    status: Literal["active", "archived", "all"] = "active"
    limit: Limit = 20


class DigestsQuery(Query):
    """How many digests to list."""

    limit: Limit = 20


class JobsQuery(Query):
    """Which jobs to list."""

    ids: Annotated[str, StringConstraints(max_length=3_700)] | None = Field(
        None, description="Up to 100 job ids with commas between them; then the rest is not asked."
    )
    project_id: str | None = None
    kind: JobKind | None = None
    status: JobStatus | None = None
    error_code: ErrorCode | None = None
    created_after: Time | None = None
    created_before: Time | None = None
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        None, max_length=16, description="`metadata[key]=value`: only jobs with these pairs."
    )
    cursor: Annotated[str, StringConstraints(max_length=200)] | None = Field(
        None, description="`next_cursor` of the page before."
    )
    limit: Limit = 20


class ProjectQuery(Query):
    """Of which project; of all that the key may see, when omitted."""

    project_id: str | None = None


class DeliveriesQuery(Query):
    """Of which job, webhook or project: exactly one of them."""

    job_id: str | None = None
    webhook_id: str | None = None
    project_id: str | None = None
    limit: Limit = 20


class JobEventsQuery(Query):
    """Which events of a job."""

    after: int = Field(0, ge=0, lt=10**15, description="The `seq` of the last one you have.")


# --- Responses -----------------------------------------------------------------------------


class Error(Shape):
    """Every answer that is not a success."""

    error: str = Field(description="One sentence for a person; a 400 names the field at fault.")
    code: str
    request_id: str


class TooManyRequests(Error):
    """An error that passes by itself."""

    detail: str = Field(description="What the quota is.")
    violated_policies: list[str] = Field(
        alias="violated-policies", description="Those of `RateLimit-Policy` that refuse."
    )


class Problem(Error):
    """The same for those who name `application/problem+json` in `Accept`: RFC 9457."""

    type: str = Field(description="A URI; `about:blank`: the status says it all.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="`urn:request:` and the request id.")
    violated_policies: list[str] = Field(
        default_factory=list, alias="violated-policies", description="Only of a 429."
    )


class Progress(Shape):
    """What the running attempt is at."""

    value: float | None = Field(description="0 to 1; null while nobody can tell.", ge=0, le=1)
    step: str
    message: str | None


class QueuePosition(Shape):
    """How many jobs a worker takes before this one."""

    position: int = Field(description="1: the next one.")
    capped: bool = Field(description="There are more before it than were counted.")
    ahead_in_project: int = Field(description="Unfinished jobs of the same project that are older.")
    paused: bool = Field(description="The operator lets no such job start for now.")


class Estimate(Shape):
    """When it should start and end, by how long such jobs took lately. No promise."""

    start_at: Time
    done_at: Time
    basis: Literal["p50_last_200"]


class Timings(Shape):
    """Milliseconds; null for what has not happened yet."""

    queue_ms: int | None
    run_ms: int | None
    total_ms: int | None


class Usage(Shape):
    """What a completed job has used; zeros before."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    credits: int
    estimated: bool = Field(
        False, description="The provider's server did not tell all; what is missing is estimated."
    )


class JobUrls(Shape):
    """Where to go on; relative, and never with a key in them."""

    self: str
    cancel: str
    retry: str
    events: str


class JobStart(Shape):
    """The first fields of a job."""

    id: str
    project_id: str
    kind: JobKind
    status: JobStatus
    result_kind: Literal["handoff", "insight"] | None
    result_id: str | None
    error: str | None = Field(description="One sentence for a person, when failed.")
    error_code: ErrorCode | None
    error_meta: dict[str, Any]
    created_at: Time
    updated_at: Time


class Job(JobStart):
    """The work of making one artifact."""

    done: bool = Field(description="The status is `completed` or `failed`, and stays so.")
    outcome: Outcome | None = Field(description="How it ended.")
    attempt: int = Field(description="How many attempts have begun.")
    retry_of: str | None = Field(description="The failed job that this one tries again.")
    started_at: Time | None
    completed_at: Time | None = Field(description="When it ended, however it did.")
    cancel_requested_at: Time | None
    start_deadline_at: Time | None
    deadline_at: Time = Field(description="Not done by then, it fails with `timeout`.")
    expires_at: Time | None = Field(
        description="When the job is removed and answers 410; null until it has ended, and when it "
        "is kept for ever. Its artifact may be kept longer."
    )
    data_removed: bool = Field(
        description="Its artifact was kept as long as artifacts are; the result is null."
    )
    progress: Progress
    queue: QueuePosition | None = Field(description="While it waits for a worker.")
    eta: Estimate | None = Field(description="While it is not done and there is experience.")
    timings: Timings
    usage: Usage
    priority: Priority
    metadata: dict[str, str]
    recovering: bool = Field(
        description="Its worker is lost; within seconds another one takes the job."
    )
    urls: JobUrls


class Accepted(Shape):
    """The job is stored and will reach a terminal state. Poll `Location`."""

    jobId: str
    status: JobStatus
    job: Job
    urls: JobUrls
    deduplicated: bool = Field(
        description="`dedupe` found an unfinished job of the same request; this is it."
    )


class JobSnapshot(Shape):
    """The job at the time of an event."""

    status: JobStatus
    attempt: int
    outcome: Outcome | None
    error: str | None
    error_code: ErrorCode | None
    progress: Progress | None


class JobEvent(Shape):
    """A change of a job."""

    seq: int = Field(description="Grows with every event of the job, though not always by one.")
    type: Literal["job.pending", "job.processing", "job.progress", "job.completed", "job.failed"]
    at: Time
    data: JobSnapshot


class JobEventList(Shape):
    """The course of a job, oldest first. With `Accept: text/event-stream` each of these events is
    sent when it happens, as the data of an event whose id is `seq` and whose name is `type`."""

    events: list[JobEvent]
    done: bool = Field(description="Nothing will come after these.")


class TokenUsage(Shape):
    """What the provider counted, over all requests; zeros for the built-in one."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool = Field(
        False, description="The provider's server did not tell all; what is missing is estimated."
    )


class Handoff(Shape):
    """What happened lately, decisions, open questions and next steps."""

    id: str
    user_id: str
    project_id: str
    project_name: str
    scope_type: Literal["project", "personal"]
    title: str
    summary: str
    status: ArtifactStatus
    sources: list[str]
    key_changes: list[str]
    decisions: list[str]
    open_questions: list[str]
    next_steps: list[str]
    data: dict[str, Any] = Field(
        description="The same statements, each with the ids of the events behind it."
    )
    related_event_ids: list[str]
    period_start: Time
    period_end: Time
    model_used: str
    token_usage: TokenUsage
    created_at: Time
    updated_at: Time
    markdown: str


class Insight(Shape):
    """A correlation, an onboarding brief, an architecture insight, release notes, the answer to a
    question or a digest."""

    id: str
    project_id: str
    requested_by: str
    kind: InsightKind
    title: str
    summary: str
    data: dict[str, Any] = Field(description="Every statement with the ids of its events.")
    model_used: str
    token_usage: TokenUsage
    status: ArtifactStatus
    related_event_ids: list[str]
    period_start: Time
    period_end: Time
    created_at: Time
    updated_at: Time
    markdown: str


class Answer(Shape):
    """The answer to a question; without citations it says that the events tell nothing about it."""

    answer: str = Field(description="Plain text on one line.")
    citations: list[str] = Field(description="`ev:` and an event id, of all that it stands on.")


class JobList(Shape):
    """Jobs, newest first, without their artifacts; with `ids`, in the order asked for."""

    jobs: list[Job]
    next_cursor: str | None = Field(description="For `cursor`; null on the last page.")


class JobResponse(Shape):
    """A job, and its artifact exactly when the status is `completed`."""

    job: Job
    result: Handoff | Insight | None


class Ended(Accepted):
    """Asked with `Prefer: wait`, the job has ended in time; `result` is there when completed."""

    result: Handoff | Insight | None


class HandoffResponse(Shape):
    """One handoff."""

    handoff: Handoff


class InsightResponse(Shape):
    """One insight."""

    insight: Insight


class HandoffList(Shape):
    """Handoffs, newest first, with their full content."""

    handoffs: list[Handoff]


class InsightList(Shape):
    """Insights, newest first, with their full content."""

    insights: list[Insight]


class Digest(Shape):
    """What happened in a project in one period of its schedule."""

    id: str
    projectId: str
    generatedBy: str = Field(description="The user in whose name it was written.")
    periodStart: Time
    periodEnd: Time
    content: dict[str, Any] = Field(
        description="`title`, `summary`, `key_changes`, `decisions`, `open_questions` and "
        "`next_steps`; every statement with the ids of its events."
    )
    markdown: str
    createdAt: Time


class DigestList(Shape):
    """Digests, newest first."""

    digests: list[Digest]


class DigestSchedule(Shape):
    """When the digests of a project are written."""

    project_id: str
    cron: str
    time_zone: str
    period_start: Time = Field(description="Where the period of the next digest begins.")
    next_at: Time = Field(description="Where it ends, and when it is written.")
    last_job_id: str | None = Field(description="The job of the latest digest.")
    error: str | None = Field(description="Why none could be asked for; tried again in an hour.")
    deliver: list[DigestChannel]
    updated_at: Time


class DigestScheduleResponse(Shape):
    """The schedule of a project, if it has one."""

    digest_schedule: DigestSchedule | None


class Organization(Shape):
    """An organization that the caller is a member of."""

    id: str
    name: str
    slug: str
    role: Literal["admin", "member"]
    is_temporary_admin: bool


class Project(Shape):
    """A project that the caller may see."""

    id: str
    name: str
    slug: str
    description: str | None
    organization_id: str | None
    organization_name: str | None
    organization_slug: str | None
    project_type: Literal["personal", "organization"]
    access_role: Literal["owner", "admin", "member"]
    created_at: Time
    updated_at: Time


class ProjectList(Shape):
    """What the caller may see."""

    account_type: Literal["personal", "business"]
    organizations: list[Organization]
    projects: list[Project]


class Event(Shape):
    """A stored event."""

    id: str
    user_id: str
    project_id: str
    source: str
    event_type: str
    title: str
    content: str | None
    external_id: str | None
    resource: str | None
    branch: str | None
    priority: str | None
    author: str | None
    url: str | None
    metadata: dict[str, Any]
    occurred_at: Time
    created_at: Time = Field(description="When Baton stored it.")


class EventList(Shape):
    """Events, newest first by `occurred_at`."""

    events: list[Event]


class Scope(Shape):
    """What a request means that names neither sources nor filters."""

    sources: list[str] | None
    filters: dict[str, Filter] | None


class ScopeResponse(Shape):
    """The saved scope; null: all."""

    scope: Scope | None


class Integration(Shape):
    """What a source sends to."""

    id: str
    source: str
    workspace_id: str = Field(description="What the source calls it, else the `id`.")
    workspace_name: str
    connected_at: Time
    scope: Literal["personal", "organization"]
    resource_type: str | None = Field(
        description="What most of its resources are, such as `repository` or `channel`; null: "
        "nothing has come yet."
    )
    connection_status: Literal[
        "connected", "awaiting_first_delivery", "awaiting_secret", "disabled"
    ] = Field(
        description="`awaiting_secret`: the source makes the secret, and it is not known yet."
    )
    providers_connected: list[str] = Field(description="The sources that it brings in.")
    last_validated_at: Time | None = Field(
        description="When the source last sent something that was verified."
    )
    organization_id: str | None
    project_id: str | None = Field(description="Gets the resources that are new; null: they wait.")
    enabled: bool
    has_token: bool = Field(description="The source can be called; the token itself is not shown.")
    updated_at: Time
    url: str = Field(description="What the source has to be told: where to send to.")


class IntegrationResponse(Shape):
    """The integration as it now is."""

    integration: Integration


class IntegrationWithSecret(Shape):
    """The integration, and the secret that verifies what it sends, which is not shown again."""

    integration: Integration
    secret: str | None = Field(description="Null: the source makes it, and is to be asked for it.")
    advice: str = Field(description="Where the URL and the secret go, in one or two sentences.")


class IntegrationList(Shape):
    """Integrations, oldest first."""

    integrations: list[Integration]


class UntrackedResource(Shape):
    """A resource without a project."""

    source: str
    resource_id: str
    resource_name: str
    resource_type: str
    integration_id: str
    last_event_at: Time


class UntrackedList(RootModel[list[UntrackedResource]]):
    """Resources that have no project, those with the newest events first."""


class ProjectResource(Shape):
    """A repository, channel or board of a project."""

    source: str
    integration_id: str
    resource_id: str = Field(description="`resource` of its events, and what filters take.")
    resource_name: str
    resource_type: str
    default_branch: str | None
    last_event_at: Time


class ResourceList(Shape):
    """All resources of the project."""

    resources: list[ProjectResource]


class Webhook(Shape):
    """A URL that is told of the jobs of a project."""

    id: str
    project_id: str
    url: str
    types: list[WebhookType]
    enabled: bool = Field(description="What is disabled is sent nothing; what waits, waits on.")
    disabled_reason: str | None = Field(
        description="Why Baton has disabled it: the receiver is gone, or has failed for days."
    )
    created_at: Time
    updated_at: Time


class WebhookResponse(Shape):
    """The webhook as it now is."""

    webhook: Webhook


class Channel(Shape):
    """Where one can post."""

    id: str
    name: str
    topic: str | None


class ChannelList(Shape):
    """The channels of all servers or workspaces that the key may post into."""

    channels: list[Channel]


class Posted(Shape):
    """It is there."""

    ok: Literal[True]
    message_id: str


class WebhookWithSecret(Shape):
    """The webhook, and the secret that verifies its signatures: keep it, it is not shown again."""

    webhook: Webhook
    secret: str = Field(description="`whsec_` and 32 random bytes in base64.")


class WebhookSecret(Shape):
    """What verifies the signatures of messages to `job.webhook_url`."""

    secret: str = Field(description="`whsec_` and 32 random bytes in base64.")


class WebhookList(Shape):
    """Webhooks, oldest first."""

    webhooks: list[Webhook]


class WebhookAttempt(Shape):
    """One request to the receiver."""

    at: Time
    status: int | None = Field(description="Of the answer, if there was one.")
    ms: int
    error: str | None = Field(description="Null: delivered.")


class Delivery(Shape):
    """A message to one receiver."""

    id: str = Field(description="`webhook-id`, the same on every attempt.")
    job_id: str
    project_id: str
    webhook_id: str | None = Field(description="Null: for `job.webhook_url`.")
    url: str
    type: WebhookType
    state: Literal["waiting", "delivered", "dead"]
    attempt: int = Field(description="Attempts since it was queued or replayed, at most ten.")
    next_attempt_at: Time | None = Field(
        description="Null: it has ended, or its webhook is disabled."
    )
    created_at: Time
    ended_at: Time | None
    attempts: list[WebhookAttempt]


class DeliveryList(Shape):
    """Messages, newest first."""

    deliveries: list[Delivery]


class DeliveryResponse(Shape):
    """The message as it now is; it is sent in a moment."""

    delivery: Delivery


class WebhookData(Shape):
    """What a message is about. A job with so many metadata that the message would be larger than
    20 kB is sent with its first fields only."""

    job: Job | JobStart
    result_url: str = Field(description="Where to read the job, and its artifact.")


class WebhookMessage(Shape):
    """What a webhook is told; never holds the artifact."""

    type: WebhookType
    timestamp: Time
    data: WebhookData


class Ingested(Shape):
    """What became of a batch."""

    accepted: int
    duplicates: int = Field(description="Already stored, or twice in the batch.")


class Labelled(Shape):
    """A value of a filter and what to show for it."""

    value: str
    label: str


class Resource(Shape):
    """A resource of a source, for the filter `projects`."""

    id: str
    label: str


class SourceFilters(Shape):
    """What the events of one source really hold."""

    projects: list[Resource]
    eventTypes: list[Labelled]
    priorities: list[Labelled]
    branches: list[Labelled] | None = None
    branchesByProject: dict[str, list[Labelled]] | None = None
    defaultBranchByProject: dict[str, str] | None = None


class FiltersResponse(Shape):
    """Filters by source."""

    filters: dict[str, SourceFilters]


class Health(Shape):
    """The process answers."""

    status: Literal["ok"]


# --- Drafts: what a provider returns -------------------------------------------------------


class Draft(BaseModel):
    """A provider's structured answer. Event ids are those of the context, nothing else."""

    model_config = ConfigDict(extra="forbid")


class Statement(Draft):
    """One sentence or line, with the events it was made from; without any it is dropped."""

    text: str
    event_ids: list[str]


class HandoffDraft(Draft):
    """What a colleague coming back needs to know."""

    title: str
    summary: Statement
    key_changes: list[Statement]
    decisions: list[Statement]
    open_questions: list[Statement]
    next_steps: list[Statement]


class Correlation(Draft):
    """Activity that belongs together, and what shows it (`references` such as `#12`, `ENG-4`)."""

    title: str
    text: str
    references: list[str]
    sources: list[str]
    event_ids: list[str]


class CorrelationDraft(Draft):
    """What belongs together across sources."""

    title: str
    summary: Statement
    correlations: list[Correlation]


class Person(Draft):
    """Who to ask, and about what."""

    name: str
    areas: list[str]
    text: str
    event_ids: list[str]


class Area(Draft):
    """A part of the system and what happens there."""

    name: str
    text: str
    event_ids: list[str]


class OnboardingDraft(Draft):
    """What a new member reads on the first day."""

    title: str
    summary: Statement
    areas: list[Area]
    key_people: list[Person]
    decisions: list[Statement]
    open_questions: list[Statement]
    first_steps: list[Statement]


class ArchitectureDraft(Draft):
    """How the system is built and where it is moving."""

    title: str
    summary: Statement
    components: list[Area]
    changes: list[Statement]
    decisions: list[Statement]
    risks: list[Statement]
    open_questions: list[Statement]


class NotesSection(Draft):
    """One group of the notes, for example `Fixed`."""

    heading: str
    items: list[Statement]


class Contributor(Draft):
    """Who made the changes."""

    name: str
    event_ids: list[str]


class ReleaseNotesDraft(Draft):
    """What changed, for the people who use it."""

    title: str
    version: str | None
    summary: Statement
    sections: list[NotesSection]
    contributors: list[Contributor]


class QuestionDraft(Draft):
    """What the events say to a question; no statement: nothing."""

    title: str
    statements: list[Statement]


AnyDraft = (
    HandoffDraft
    | CorrelationDraft
    | OnboardingDraft
    | ArchitectureDraft
    | ReleaseNotesDraft
    | QuestionDraft
)
DRAFTS: dict[str, type[Draft]] = {
    "handoff": HandoffDraft,
    "cross_source_correlation": CorrelationDraft,
    "onboarding_brief": OnboardingDraft,
    "architecture_insight": ArchitectureDraft,
    "release_notes": ReleaseNotesDraft,
    "question": QuestionDraft,
    "digest": HandoffDraft,
}
