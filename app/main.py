"""The application: its route table, which is the table of contents, and its edge.

The HTTP process never imports `tasks`: no provider code is loaded here, and a change of a prompt
cannot break an endpoint.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from functools import cache

from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import (
    channels,
    digests,
    errors,
    events,
    hooks,
    integrations,
    jobs,
    limits,
    metrics,
    resources,
    schemas,
    stream,
    tracing,
    webhooks,
)
from app.auth import authenticate
from app.background import background, watch_loop
from app.chat import Chat
from app.cipher import Cipher
from app.db import applied_version, open_database, schema_fault
from app.docs import page
from app.exporter import Exporter, listening
from app.logs import request_id, trace
from app.openapi import Operation, document
from app.queue import hung_bell
from app.settings import Settings
from app.static import page_routes
from app.sweeper import Sweeper
from app.tracing import Span
from app.waits import Hub
from app.wire import json_response

log = logging.getLogger("baton.api")

HEADERS_LIMIT = 16 * 1024  # bytes of all header names and values together
URI_LIMIT = 8 * 1024  # bytes of path and query
POOL_SIZE = 10  # connections; a request holds one for milliseconds
COMMAND_TIMEOUT = 1.5  # seconds; a client learns soon that the database does not answer
# The database gives up before we do: what a client was told is unknown must not be stored later.
STATEMENT_TIMEOUT, LOCK_TIMEOUT = "1200ms", "1s"

# Asked every few seconds, and worth no line in the log.
QUIET = ("/healthz", "/readyz", "/metrics")
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


async def healthz(request: Request) -> Response:
    """The process is up."""
    return json_response({"status": "ok"})


async def readyz(request: Request) -> Response:
    """The database answers and its schema is one that this program works with."""
    if fault := schema_fault(await applied_version(request.app.state.database)):
        raise errors.Unavailable(fault)
    return json_response({"status": "ok"})


P = "/api/v1"
OPERATIONS = (
    Operation(
        method="POST",
        path=f"{P}/handoffs",
        handler=jobs.create_handoff,
        limits=("default", "generate"),
        body=schemas.HandoffRequest,
        headers=("Idempotency-Key", "Prefer"),
        response=schemas.Accepted,
        status=202,
        ended=schemas.Ended,
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/projects/{{project_id}}/insights/correlation",
        handler=jobs.create_correlation,
        limits=("default", "generate"),
        body=schemas.CorrelationRequest,
        headers=("Idempotency-Key", "Prefer"),
        response=schemas.Accepted,
        status=202,
        ended=schemas.Ended,
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/projects/{{project_id}}/insights/onboarding",
        handler=jobs.create_onboarding,
        limits=("default", "generate"),
        body=schemas.OnboardingRequest,
        headers=("Idempotency-Key", "Prefer"),
        response=schemas.Accepted,
        status=202,
        ended=schemas.Ended,
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/projects/{{project_id}}/insights/architecture",
        handler=jobs.create_architecture,
        limits=("default", "generate"),
        body=schemas.ArchitectureRequest,
        headers=("Idempotency-Key", "Prefer"),
        response=schemas.Accepted,
        status=202,
        ended=schemas.Ended,
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/projects/{{project_id}}/insights/release_notes",
        handler=jobs.create_release_notes,
        limits=("default", "generate"),
        body=schemas.ReleaseNotesRequest,
        headers=("Idempotency-Key", "Prefer"),
        response=schemas.Accepted,
        status=202,
        ended=schemas.Ended,
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/projects/{{project_id}}/qa",
        handler=jobs.answer_question,
        limits=("default", "generate"),
        body=schemas.QuestionRequest,
        headers=("Idempotency-Key",),
        response=schemas.Answer,
        errors=(403, 409, 502),
        tag="Ask",
    ),
    Operation(
        method="GET",
        path=f"{P}/jobs/{{job_id}}",
        handler=jobs.read_job,
        limits=("poll",),
        headers=("Prefer", "If-None-Match"),
        response=schemas.JobResponse,
        errors=(410,),
        tag="Ask",
    ),
    Operation(
        method="GET",
        path=f"{P}/jobs",
        handler=jobs.list_jobs,
        polls_with="ids",
        query=schemas.JobsQuery,
        headers=("Prefer", "If-None-Match"),
        response=schemas.JobList,
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/jobs/{{job_id}}/cancel",
        handler=jobs.cancel_job,
        response=schemas.JobResponse,
        errors=(410,),
        tag="Ask",
    ),
    Operation(
        method="POST",
        path=f"{P}/jobs/{{job_id}}/retry",
        handler=jobs.retry_job,
        limits=("default", "generate"),
        headers=("Idempotency-Key", "Prefer"),
        response=schemas.Accepted,
        status=202,
        ended=schemas.Ended,
        errors=(409, 410),
        tag="Ask",
    ),
    Operation(
        method="DELETE",
        path=f"{P}/jobs/{{job_id}}",
        handler=jobs.delete_job,
        response=None,
        status=204,
        errors=(409, 410),
        tag="Ask",
    ),
    Operation(
        method="GET",
        path=f"{P}/jobs/{{job_id}}/events",
        handler=stream.read_events,
        limits=("poll",),
        query=schemas.JobEventsQuery,
        headers=("Last-Event-ID",),
        response=schemas.JobEventList,
        stream=True,
        errors=(410,),
        tag="Ask",
    ),
    Operation(
        method="GET",
        path=f"{P}/handoffs",
        handler=resources.list_handoffs,
        query=schemas.HandoffsQuery,
        response=schemas.HandoffList,
        tag="Artifacts",
    ),
    Operation(
        method="GET",
        path=f"{P}/handoffs/{{handoff_id}}",
        handler=resources.read_handoff,
        response=schemas.HandoffResponse,
        tag="Artifacts",
    ),
    Operation(
        method="PATCH",
        path=f"{P}/handoffs/{{handoff_id}}",
        handler=resources.update_handoff,
        body=schemas.StatusRequest,
        response=schemas.HandoffResponse,
        tag="Artifacts",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects/{{project_id}}/insights",
        handler=resources.list_insights,
        query=schemas.InsightsQuery,
        response=schemas.InsightList,
        tag="Artifacts",
    ),
    Operation(
        method="GET",
        path=f"{P}/insights/{{insight_id}}",
        handler=resources.read_insight,
        response=schemas.InsightResponse,
        tag="Artifacts",
    ),
    Operation(
        method="PATCH",
        path=f"{P}/insights/{{insight_id}}",
        handler=resources.update_insight,
        body=schemas.StatusRequest,
        response=schemas.InsightResponse,
        tag="Artifacts",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects/{{project_id}}/digests",
        handler=digests.list_digests,
        query=schemas.DigestsQuery,
        response=schemas.DigestList,
        tag="Artifacts",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects/{{project_id}}/digest_schedule",
        handler=digests.read_digest_schedule,
        response=schemas.DigestScheduleResponse,
        tag="Artifacts",
    ),
    Operation(
        method="PUT",
        path=f"{P}/projects/{{project_id}}/digest_schedule",
        handler=digests.set_digest_schedule,
        body=schemas.DigestScheduleRequest,
        response=schemas.DigestScheduleResponse,
        errors=(403,),
        tag="Artifacts",
    ),
    Operation(
        method="DELETE",
        path=f"{P}/projects/{{project_id}}/digest_schedule",
        handler=digests.delete_digest_schedule,
        response=None,
        status=204,
        errors=(403,),
        tag="Artifacts",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects",
        handler=resources.list_projects,
        response=schemas.ProjectList,
        tag="Projects and events",
    ),
    Operation(
        method="POST",
        path=f"{P}/events",
        handler=events.create_events,
        body=schemas.EventsRequest,
        body_types=("application/json", events.NDJSON),
        query=schemas.ProjectQuery,
        response=schemas.Ingested,
        tag="Projects and events",
    ),
    Operation(
        method="GET",
        path=f"{P}/events",
        handler=events.list_events,
        query=schemas.EventsQuery,
        response=schemas.EventList,
        tag="Projects and events",
    ),
    Operation(
        method="GET",
        path=f"{P}/handoffs/filters",
        handler=resources.list_filters,
        query=schemas.ProjectQuery,
        response=schemas.FiltersResponse,
        tag="Projects and events",
    ),
    Operation(
        method="GET",
        path=f"{P}/discord/channels",
        handler=channels.list_discord_channels,
        response=schemas.ChannelList,
        errors=(403,),
        tag="Chat",
    ),
    Operation(
        method="POST",
        path=f"{P}/discord/send",
        handler=channels.send_to_discord,
        body=schemas.PostRequest,
        response=schemas.Posted,
        errors=(403,),
        tag="Chat",
    ),
    Operation(
        method="GET",
        path=f"{P}/slack/channels",
        handler=channels.list_slack_channels,
        response=schemas.ChannelList,
        errors=(403,),
        tag="Chat",
    ),
    Operation(
        method="POST",
        path=f"{P}/slack/send",
        handler=channels.send_to_slack,
        body=schemas.PostRequest,
        response=schemas.Posted,
        errors=(403,),
        tag="Chat",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects/{{project_id}}/scope",
        handler=integrations.read_scope,
        response=schemas.ScopeResponse,
        tag="Projects and events",
    ),
    Operation(
        method="PUT",
        path=f"{P}/projects/{{project_id}}/scope",
        handler=integrations.set_scope,
        body=schemas.ScopeRequest,
        response=schemas.ScopeResponse,
        errors=(403,),
        tag="Projects and events",
    ),
    Operation(
        method="POST",
        path=f"{P}/integrations",
        handler=integrations.create_integration,
        body=schemas.IntegrationRequest,
        response=schemas.IntegrationWithSecret,
        status=201,
        errors=(403, 409),
        tag="Integrations",
    ),
    Operation(
        method="GET",
        path=f"{P}/integrations",
        handler=integrations.list_integrations,
        query=schemas.ProjectQuery,
        response=schemas.IntegrationList,
        tag="Integrations",
    ),
    Operation(
        method="GET",
        path=f"{P}/integrations/untracked",
        handler=integrations.list_untracked,
        response=schemas.UntrackedList,
        tag="Integrations",
    ),
    Operation(
        method="PATCH",
        path=f"{P}/integrations/{{integration_id}}",
        handler=integrations.update_integration,
        body=schemas.IntegrationChange,
        response=schemas.IntegrationResponse,
        errors=(403,),
        tag="Integrations",
    ),
    Operation(
        method="POST",
        path=f"{P}/integrations/{{integration_id}}/rotate",
        handler=integrations.rotate_integration,
        body=schemas.IntegrationRotation,
        response=schemas.IntegrationWithSecret,
        errors=(403,),
        tag="Integrations",
    ),
    Operation(
        method="DELETE",
        path=f"{P}/integrations/{{integration_id}}",
        handler=integrations.delete_integration,
        response=None,
        status=204,
        errors=(403,),
        tag="Integrations",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects/{{project_id}}/resources",
        handler=integrations.list_resources,
        response=schemas.ResourceList,
        tag="Integrations",
    ),
    Operation(
        method="PUT",
        path=f"{P}/projects/{{project_id}}/resources",
        handler=integrations.set_resources,
        body=schemas.ResourcesRequest,
        response=schemas.ResourceList,
        errors=(403,),
        tag="Integrations",
    ),
    Operation(
        method="POST",
        path=f"{P}/webhooks",
        handler=webhooks.create_webhook,
        body=schemas.WebhookRequest,
        response=schemas.WebhookWithSecret,
        status=201,
        errors=(403, 409),
        tag="Webhooks",
    ),
    Operation(
        method="GET",
        path=f"{P}/webhooks",
        handler=webhooks.list_webhooks,
        query=schemas.ProjectQuery,
        response=schemas.WebhookList,
        tag="Webhooks",
    ),
    Operation(
        method="PATCH",
        path=f"{P}/webhooks/{{webhook_id}}",
        handler=webhooks.update_webhook,
        body=schemas.WebhookChange,
        response=schemas.WebhookResponse,
        errors=(403, 409),
        tag="Webhooks",
    ),
    Operation(
        method="POST",
        path=f"{P}/webhooks/{{webhook_id}}/rotate",
        handler=webhooks.rotate_webhook,
        response=schemas.WebhookWithSecret,
        errors=(403,),
        tag="Webhooks",
    ),
    Operation(
        method="DELETE",
        path=f"{P}/webhooks/{{webhook_id}}",
        handler=webhooks.delete_webhook,
        response=None,
        status=204,
        errors=(403,),
        tag="Webhooks",
    ),
    Operation(
        method="GET",
        path=f"{P}/webhooks/deliveries",
        handler=webhooks.list_deliveries,
        query=schemas.DeliveriesQuery,
        response=schemas.DeliveryList,
        tag="Webhooks",
    ),
    Operation(
        method="POST",
        path=f"{P}/webhooks/deliveries/{{delivery_id}}/replay",
        handler=webhooks.replay_delivery,
        response=schemas.DeliveryResponse,
        status=202,
        errors=(403, 409),
        tag="Webhooks",
    ),
    Operation(
        method="GET",
        path=f"{P}/projects/{{project_id}}/webhook_secret",
        handler=webhooks.read_webhook_secret,
        response=schemas.WebhookSecret,
        errors=(403,),
        tag="Webhooks",
    ),
    Operation(
        method="POST",
        path=f"{P}/projects/{{project_id}}/webhook_secret/rotate",
        handler=webhooks.rotate_webhook_secret,
        response=schemas.WebhookSecret,
        errors=(403,),
        tag="Webhooks",
    ),
    Operation(
        method="GET",
        path="/healthz",
        handler=healthz,
        response=schemas.Health,
        tag="Health",
        public=True,
        database=False,
    ),
    Operation(
        method="GET",
        path="/readyz",
        handler=readyz,
        response=schemas.Health,
        tag="Health",
        public=True,
    ),
)


def create_app(settings: Settings) -> Starlette:
    """The HTTP application; `settings.database_url` must be set."""
    described = document(OPERATIONS)
    rendered = page(described)

    async def openapi_json(request: Request) -> Response:
        return json_response(described)

    async def docs(request: Request) -> Response:
        return HTMLResponse(rendered, headers={"Content-Security-Policy": _DOCS_POLICY})

    async def scrape(request: Request) -> Response:
        answer: Response = await request.app.state.exporter.scrape(request)
        return answer

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        assert settings.database_url
        async with (
            open_database(
                settings.database_url,
                application_name="baton serve",
                role="baton_api",
                size=POOL_SIZE,
                command_timeout=COMMAND_TIMEOUT,
                statement_timeout=STATEMENT_TIMEOUT,
                lock_timeout=LOCK_TIMEOUT,
            ) as database,
            hung_bell(database) as bell,
            limits.wait_slots(database, settings.limits) as slots,
            background(Sweeper(database, bell).run()),
            background(watch_loop()),
            AsyncExitStack() as stack,
        ):
            hub = Hub(database)
            app.state.database = database
            app.state.exporter = exporter = Exporter(metrics.API, {"api": database}, database)
            if settings.metrics:
                place = listening(settings.metrics, "BATON_METRICS", exporter)
                await stack.enter_async_context(place)
            app.state.bell = bell
            app.state.pace = jobs.Pace(database)
            app.state.reads = jobs.reads(database)
            app.state.hub = hub
            app.state.wait_slots = slots
            app.state.intake = intake = hooks.Intake(database, bell, app.state.cipher)
            app.state.chat = chat = Chat(settings)
            stack.push_async_callback(chat.close)
            stop_waiting = _stop_waiting(app.state.stopping, hub)
            async with (
                background(hub.run()),
                background(intake.run()),
                background(stop_waiting),
            ):
                yield

    app = Starlette(
        routes=[
            # What sources send is their own shape, and no client's: docs/integrations.md. First, as
            # there may be thousands a second, and routes are tried one after the other.
            Route("/hooks/{integration_id}", hooks.receive_delivery, methods=["POST"]),
            *_routes(),
            *page_routes(),
            Route("/openapi.json", openapi_json),
            Route("/docs", docs),
            *([] if settings.metrics else [Route("/metrics", scrape)]),
        ],
        middleware=[Middleware(Edge)],
        exception_handlers={HTTPException: _raise},  # to the edge, which renders all errors
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.cipher = Cipher.from_settings(settings)
    app.state.limits = settings.limits
    app.state.stopping = asyncio.Event()  # set when the server is told to stop
    app.router.redirect_slashes = False  # a redirect of a POST loses its body in many clients
    return app


async def _raise(request: Request, error: Exception) -> Response:
    raise error


async def _stop_waiting(stopping: asyncio.Event, hub: Hub) -> None:
    """Held requests end when the server stops, which waits for them."""
    await stopping.wait()
    hub.stop()


_DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def _routes() -> Iterator[Route]:
    """One route per path, so that a 405 lists all verbs of the path."""
    paths: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = operation
    # /handoffs/filters comes before /handoffs/{handoff_id}
    for path, by_method in sorted(paths.items(), key=lambda item: "{" in item[0]):
        yield Route(path, _endpoint(by_method), methods=list(by_method))


def _endpoint(by_method: Mapping[str, Operation]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        operation = by_method["GET" if request.method == "HEAD" else request.method]
        if not operation.public:
            request.state.user_id = await authenticate(request, operation.policies(request))
        return await operation.handler(request)

    return endpoint


class Edge:
    """The outermost layer: request id, limits of the head, one body for every error, one log line.

    A plain ASGI class, because Starlette's own middleware base costs a task and a queue for each
    request and breaks streaming.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes (the lifespan) pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = request_id.set(_request_id(scope))
        try:
            with _traced(scope) as span:
                await self._answer(scope, receive, send, span)
        finally:
            request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, span: Span) -> None:
        started = time.perf_counter()
        metrics.requests_open.inc()
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id.get() or ""
                headers.update(limits.headers(scope))
            await send(message)

        try:
            _check_head(scope)
            await self.app(scope, receive, stamped)
        except Exception as error:
            if status:  # the answer has begun; the server cuts off one that is not complete
                log.warning("answer cut off", extra={"trace": trace(error)})
                return
            accept = ",".join(Headers(scope=scope).getlist("accept"))
            await errors.error_response(error, accept)(scope, receive, stamped)
        finally:
            seconds = time.perf_counter() - started
            _count(scope, status, seconds)
            if tracing.on():
                _tell(span, scope, status)
            log.log(
                logging.DEBUG if scope["path"] in QUIET else logging.INFO,
                "request",
                extra={
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "ms": round(seconds * 1000, 1),
                },
            )


_UNTRACED = nullcontext(Span())


def _traced(scope: Scope) -> AbstractContextManager[Span]:
    """Trace a request, as part of what its client traces."""
    if not tracing.on() or scope["path"] in QUIET:
        return _UNTRACED
    parent = Headers(scope=scope).get("traceparent")
    return tracing.span(_method(scope), "server", parent=parent)


def _tell(span: Span, scope: Scope, status: int) -> None:
    """Say in a trace what became of a request; its path may hold what only a log should."""
    method, route = _method(scope), _route(scope)
    span.rename(f"{method} {route}")
    span.set("http.request.method", method)
    span.set("url.scheme", scope.get("scheme", "http"))
    span.set("http.route", route)
    span.set("http.response.status_code", status)
    span.set("baton.request_id", request_id.get())
    if status >= 500:
        span.fail(str(status))


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else "other"


def _route(scope: Scope) -> str:
    """The template of the path; a path itself may be anything."""
    return str(scope["route"].path) if "route" in scope else "other"


def _count(scope: Scope, status: int, seconds: float) -> None:
    """Count a request that is over, by the template of its path."""
    metrics.requests_open.dec()
    count, duration = _series(_method(scope), _route(scope), status)
    count.inc()
    if "held" not in scope.get("state", ()):
        duration.observe(seconds)


@cache
def _series(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """What counts such requests; to find it costs more than to count."""
    return (
        metrics.requests.labels(method, route, status or "aborted"),
        metrics.request_seconds.labels(method, route),
    )


def _request_id(scope: Scope) -> str:
    """The caller's own id when it is sane, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if _SANE_REQUEST_ID.fullmatch(given):
                return str(given)
    return secrets.token_hex(8)


def _check_head(scope: Scope) -> None:
    """Refuse what the server in front lets through: it accepts heads of many hundred KB."""
    if len(scope["raw_path"]) + len(scope["query_string"]) > URI_LIMIT:
        raise errors.UriTooLong(f"The path and query are longer than {URI_LIMIT // 1024} KiB.")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS_LIMIT:
        largest = max(scope["headers"], key=lambda header: len(header[1]))[0]
        name = largest.decode("latin-1")[:80]
        raise errors.HeadersTooLarge(
            f"{name}: the headers are larger than {HEADERS_LIMIT // 1024} KiB together."
        )
