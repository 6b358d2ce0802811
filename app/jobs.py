"""Asking for an artifact, and reading the job that makes it: the heart of Baton.

It hides how a request becomes a job. The one rule: a 202 is sent only after one transaction has
stored the job and its ticket, and what a client reads is always the row, never a memory of it.
"""

import base64
import hashlib
import logging
import math
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app import metrics
from app.auth import missing_job, visible_project
from app.db import Database, DatabaseError
from app.errors import (
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    InvalidRequest,
    NotGenerated,
    Unavailable,
)
from app.limits import wait_slot
from app.logs import request_id
from app.schemas import (
    ArchitectureRequest,
    ArtifactRequest,
    CorrelationRequest,
    FilteredRequest,
    HandoffRequest,
    JobOptions,
    JobsQuery,
    OnboardingRequest,
    QuestionRequest,
    ReleaseNotesRequest,
    ScopedRequest,
)
from app.tracing import traceparent
from app.waits import Preferred, Together, preferred, read_when
from app.wire import decode, is_id, json_response, known_id, path_id, query

log = logging.getLogger("baton.api")

# Milliseconds that a client is told to wait between polls. SDKs refuse what is much longer.
POLL_AFTER = (1_000, 15_000)
IDS_MAX = 100  # jobs in one `ids`
PACE_AGE = 10.0  # seconds for which measured medians are taken as current
VARY = "Prefer, Authorization"  # RFC 7240, section 2: whether the client used it or not
ANSWER_WITHIN = 20.0  # seconds that a question is waited for; clients give up at 30

_QUOTED_KEY = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE_KEY = re.compile(r"[\x21\x23-\x7e][\x20-\x7e]*")


@dataclass(frozen=True, slots=True)
class Read:
    """A job, and its artifact if there is one."""

    row: asyncpg.Record
    result: asyncpg.Record | None

    @property
    def etag(self) -> str:
        """What changes when the answer does."""
        return _etag(self.row, self.result)

    @property
    def unfinished(self) -> dict[str, int]:
        """The rev of the job; empty when it has ended."""
        return {} if self.row["done"] else {self.row["id"]: self.row["rev"]}


# --- Asking --------------------------------------------------------------------------------


async def create_handoff(request: Request) -> Response:
    """Ask for a handoff."""
    body = await decode(request, HandoffRequest)
    project_id = known_id(body.project_id, "project_id")
    return await _submit(request, "handoff", project_id, body, body.sources)


async def create_correlation(request: Request) -> Response:
    """Ask which activity in different sources belongs together."""
    return await _create_insight(request, "cross_source_correlation", CorrelationRequest)


async def create_onboarding(request: Request) -> Response:
    """Ask for a brief for a new member."""
    return await _create_insight(request, "onboarding_brief", OnboardingRequest)


async def create_architecture(request: Request) -> Response:
    """Ask how the system is built and where it is moving."""
    return await _create_insight(request, "architecture_insight", ArchitectureRequest)


async def create_release_notes(request: Request) -> Response:
    """Ask for release notes, or for the description of a pull request."""
    project_id = path_id(request, "project_id")
    body = await decode(request, ReleaseNotesRequest)
    return await _submit(request, "release_notes", project_id, body, [body.source])


async def _create_insight(request: Request, kind: str, model: type[ScopedRequest]) -> Response:
    project_id = path_id(request, "project_id")
    body = await decode(request, model)
    return await _submit(request, kind, project_id, body, body.sources)


async def _submit(
    request: Request,
    kind: str,
    project_id: str,
    body: ArtifactRequest,
    sources: list[str] | None,
) -> Response:
    row = await submit(
        request.app.state.database,
        user_id=request.state.user_id,
        project_id=project_id,
        kind=kind,
        sources=sources,
        body=body,
        key=_idempotency_key(request),
        pending=request.app.state.limits.pending,
    )
    _submitted(row)
    return await _accepted(request, row)


def _submitted(row: asyncpg.Record) -> None:
    """Tell of a request for an artifact: from here on its job is known by its own id."""
    again = row["replayed"] or row.get("deduplicated", False)
    log.info("submit", extra={"job_id": row["id"], "kind": row["kind"], "again": again})
    if again:
        return
    metrics.job_transitions.labels(row["kind"], "submit").inc()
    if row["status"] == "failed":  # the plan does not allow it
        metrics.jobs_ended.labels(row["kind"], row["outcome"], row["error_code"]).inc()


async def submit(
    database: Database,
    *,
    user_id: str,
    project_id: str,
    kind: str,
    sources: list[str] | None,
    body: FilteredRequest,
    key: str | None = None,
    pending: int = 0,
    job: JobOptions | None = None,
) -> asyncpg.Record:
    """Store a job and its ticket in one transaction; answer the row of the query `submit_job`.

    Args:
        key: what the client calls this request; called so again, it gets the same job.
        pending: how many pending jobs the project may have; 0 is no limit.
        job: options of a job whose request has none of its own.

    Raises:
        db.NotFound: the user may not see the project.
        db.InvalidRequest: the scope is wrong; the sentence names the field.
        db.KeyReuse: the key stands for another request.
        db.QueueFull: the project has as many pending jobs as it may.
    """
    filters = body.model_dump(include={"filters"}, exclude_none=True).get("filters")
    until: datetime | None = None
    if isinstance(body, ArtifactRequest):
        until, job = body.until, body.job
    options: dict[str, Any] = body.model_dump(mode="json", exclude=_SCOPE_FIELDS, exclude_none=True)
    of_job = job.model_dump(mode="json", exclude_none=True) if job else {}
    row = await database.row(
        "submit_job",
        user_id,
        project_id,
        kind,
        sources,
        filters,
        until,
        options,
        of_job | _request(),
        key,
        _fingerprint(project_id, kind, body.model_dump(mode="json", exclude_unset=True)),
        pending,
    )
    assert row is not None
    return row


def _request() -> dict[str, str | None]:
    """What a job keeps of the request that it came from."""
    return {"request_id": request_id.get(), "traceparent": traceparent()}


async def retry_job(request: Request) -> Response:
    """Ask once more for what a failed job was asked for; a new job with `retry_of`."""
    job_id = path_id(request, "job_id")
    row = await request.app.state.database.row(
        "retry_job",
        request.state.user_id,
        job_id,
        _idempotency_key(request),
        _fingerprint(job_id, "retry", {}),
        request.app.state.limits.pending,
        _request(),
    )
    _submitted(row)
    return await _accepted(request, row)


async def _accepted(request: Request, row: asyncpg.Record) -> Response:
    """The 202, for a job that is new or that the same request has made before; or with
    `Prefer: wait` a 200, when the job has ended by then."""
    request.app.state.bell.ring()
    wish = preferred(request)
    read = await _read_ended(request, row["id"], wish)
    job = await _shown(request, read.row if read else row)
    headers = {
        **_headers(job),
        **wish.applied(waited=read is not None, asynchronous=not (read and read.row["done"])),
        "Operation-Location": str(request.base_url).rstrip("/") + job.fields["urls"]["self"],
    }
    if row["replayed"]:
        headers["Idempotent-Replayed"] = "true"
    answer = {
        "jobId": job.fields["id"],
        "status": job.fields["status"],
        "job": job.fields,
        "urls": job.fields["urls"],
        "deduplicated": row.get("deduplicated", False),
    }
    if not (read and read.row["done"]):
        # Also for a job that the plan has refused, or that a repeated request finds ended.
        headers |= {"Location": job.fields["urls"]["self"], **_retry_after(job.poll_after or 0)}
        if not job.fields["done"]:  # else a 304 would keep the result from the client
            headers["ETag"] = read.etag if read else _etag(row, None)
        return json_response(answer, status=202, headers=headers)
    answer["result"] = dict(read.result) if read.result else None
    return json_response(answer, headers={**headers, "ETag": read.etag})


async def _read_ended(request: Request, job_id: str, wish: Preferred) -> Read | None:
    """The job as it is when the client has waited as long as it would. None without a wait, and
    also when that fails: the job is stored, and an error would make the client ask for another."""
    if not wish.wait:
        return None
    try:
        return await read_when(
            request,
            [job_id],
            wish.wait,
            read=lambda: _read_together(request, job_id),
            unmet=lambda read: read.unfinished,
            ended=True,
        )
    except (ApiError, DatabaseError) as error:
        log.warning("not waited", extra={"job_id": job_id, "cause": str(error)})
        return None


def _idempotency_key(request: Request) -> str | None:
    """What the client calls this request: a quoted string, as the draft has it, or a bare one."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    text = given[0].strip()
    if quoted := _QUOTED_KEY.fullmatch(text):
        key = re.sub(r'\\(["\\])', r"\1", quoted[1])
    else:
        key = text if _BARE_KEY.fullmatch(text) else ""
    if len(given) > 1 or not 1 <= len(key) <= 255:
        raise InvalidRequest(
            "Idempotency-Key: must be one text of 1 to 255 ASCII characters, quoted or bare."
        )
    return key


def _fingerprint(scope: str, route: str, body: dict[str, Any]) -> bytes:
    """What makes two requests the same: the order of the fields in a body does not."""
    return hashlib.sha256(orjson.dumps([scope, route, body], option=orjson.OPT_SORT_KEYS)).digest()


# --- Asking a question -----------------------------------------------------------------------


async def answer_question(request: Request) -> Response:
    """Answer a question from the events of the last 14 days, with the events that it stands on.

    It is a job of the kind `question`, which this request waits for. After 20 seconds it is 503
    with the job in `Location`, and the job goes on: ask again with the same `Idempotency-Key`, or
    the same question while it runs, and you wait for the same job. When nothing in these days
    speaks about it, the answer says so, without citations and without a charge.
    """
    project_id = path_id(request, "project_id")
    body = await decode(request, QuestionRequest)
    async with wait_slot(request):  # before the job is stored: who may not wait has asked nothing
        row = await submit(
            request.app.state.database,
            user_id=request.state.user_id,
            project_id=project_id,
            kind="question",
            sources=None,
            body=body,
            key=_idempotency_key(request),
            pending=request.app.state.limits.pending,
            job=JobOptions(priority="high", dedupe="in_flight"),  # somebody sits and waits
        )
        _submitted(row)
        request.app.state.bell.ring()
        read = await read_when(
            request,
            [row["id"]],
            ANSWER_WITHIN,
            read=lambda: _read_together(request, row["id"]),
            unmet=lambda read: read.unfinished,
            ended=True,
            held=True,
        )
    itself = f"/api/v1/jobs/{row['id']}"
    answer = _answer(read, itself)
    headers = {"Operation-Location": str(request.base_url).rstrip("/") + itself}
    if row["replayed"]:
        headers["Idempotent-Replayed"] = "true"
    return json_response(answer, headers=headers)


def _answer(read: Read, itself: str) -> dict[str, Any]:
    """What the job of a question has come to; `itself` is its path.

    Raises:
        Unavailable: nothing yet. Forbidden, Conflict, Gone, NotGenerated: it cannot be answered.
    """
    job = read.row
    if read.result:
        cited = read.result["related_event_ids"]
        return {"answer": read.result["data"]["answer"], "citations": [f"ev:{id}" for id in cited]}
    if not job["done"]:
        late = Unavailable(
            "The question is not answered yet, and goes on. Ask again with the same "
            "Idempotency-Key, or read its job."
        )
        late.headers = {**late.headers, "Location": itself}
        raise late
    if job["status"] == "completed":
        raise Gone("The answer is gone: its time was over.")
    if job["error_code"] == "no_result" and job["error_meta"].get("stage") in _NOTHING_FOUND:
        return {"answer": job["error"], "citations": []}
    error = _NOT_ANSWERED.get(job["error_code"], NotGenerated)(job["error"])
    error.code = job["error_code"]
    raise error


_NOTHING_FOUND = ("context", "grounding")  # stages: the events tell nothing about it
_NOT_ANSWERED: dict[str, type[ApiError]] = {
    "plan_violation": Forbidden,
    "quota_exceeded": Forbidden,
    "cancelled": Conflict,
}

# What every request has; whatever else a request type has are the options of its kind.
_SCOPE_FIELDS = {"project_id", "sources", "source", "filters", "until", "job"}


# --- Reading -------------------------------------------------------------------------------


async def read_job(request: Request) -> Response:
    """A job, with its artifact once it is completed.

    `Prefer: wait` answers when it has ended, or with `If-None-Match` when it has changed.
    """
    job_id, seen = path_id(request, "job_id"), _etags(request)
    wish = preferred(request)

    def unmet(read: Read) -> dict[str, int]:
        return {} if seen and read.etag not in seen else read.unfinished

    read = await read_when(
        request,
        [job_id],
        wish.wait,
        read=lambda: (_read_together if wish.wait else _read)(request, job_id),
        unmet=unmet,
        ended=not seen,
    )
    job = await _shown(request, read.row)
    headers = {**_headers(job), **wish.applied(), "ETag": read.etag}
    if read.etag in seen:
        return Response(status_code=304, headers=headers)
    return json_response(
        {"job": job.fields, "result": dict(read.result) if read.result else None}, headers=headers
    )


async def _read(request: Request, job_id: str) -> Read:
    """One read by itself, for one who does not wait."""
    database: Database = request.app.state.database
    user_id = request.state.user_id
    row = await database.row("read_job", user_id, job_id)
    if row is None:
        raise await missing_job(request, job_id)
    result = None
    if row["result_kind"] is not None:
        name = "read_handoff" if row["result_kind"] == "handoff" else "read_insight"
        result = await database.row(name, user_id, [row["result_id"]])
    return await _whole(request, Read(row, result))


async def _read_together(request: Request, job_id: str) -> Read:
    """The same, for one of many that wait and may be woken at once."""
    read: Read | None = await request.app.state.reads.get((request.state.user_id, job_id))
    if read is None:
        raise await missing_job(request, job_id)
    return await _whole(request, read)


async def _whole(request: Request, read: Read) -> Read:
    """The read, unless the job was deleted between its row and its artifact: then it is gone, and
    not a completed one without a result."""
    if read.row["result_kind"] is not None and read.result is None:
        error = await missing_job(request, read.row["id"])
        if isinstance(error, Gone):
            raise error
    return read


def reads(database: Database) -> Together[tuple[str, str], Read]:
    """Reads of jobs by user and id."""

    async def read(keys: Collection[tuple[str, str]]) -> dict[tuple[str, str], Read]:
        by_user: dict[str, list[str]] = {}
        for user_id, job_id in keys:
            by_user.setdefault(user_id, []).append(job_id)
        found = {}
        for user_id, job_ids in by_user.items():
            rows = await database.rows("read_jobs", user_id, job_ids)
            results: dict[str, asyncpg.Record] = {}
            for kind, name in (("handoff", "read_handoff"), ("insight", "read_insight")):
                if ids := [row["result_id"] for row in rows if row["result_kind"] == kind]:
                    results |= {r["id"]: r for r in await database.rows(name, user_id, ids)}
            for row in rows:
                found[user_id, row["id"]] = Read(row, results.get(row["result_id"]))
        return found

    return Together(read)


async def list_jobs(request: Request) -> Response:
    """Jobs, newest first, without their artifacts; or just those of `ids`."""
    asked = query(request, JobsQuery)
    if asked.ids is not None:
        return await _list_some(request, asked.ids)
    database: Database = request.app.state.database
    user_id = request.state.user_id
    if asked.project_id is not None:
        await visible_project(request, asked.project_id)
    after = _position(asked.cursor) if asked.cursor else (None, None)
    rows = await database.rows(
        "list_jobs",
        user_id,
        asked.project_id,
        asked.kind,
        asked.status,
        asked.error_code,
        asked.created_after,
        asked.created_before,
        asked.metadata,
        asked.idempotency_key,
        *after,
        asked.limit + 1,
    )
    page = [await _shown(request, row) for row in rows[: asked.limit]]
    cursor = _cursor(rows[asked.limit - 1]) if len(rows) > asked.limit else None
    headers = {"Cache-Control": "no-store", "Vary": VARY}
    if cursor:
        headers["Link"] = f'<{request.url.include_query_params(cursor=cursor)}>; rel="next"'
    return json_response(
        {"jobs": [job.fields for job in page], "next_cursor": cursor}, headers=headers
    )


async def _list_some(request: Request, ids: str) -> Response:
    """The jobs of `ids` in that order; what is not visible is left out. `Prefer: wait` answers when
    one of them has ended or changes, or with `If-None-Match` when one has changed since."""
    wanted = list(dict.fromkeys(filter(None, ids.split(","))))
    if not 1 <= len(wanted) <= IDS_MAX:
        raise InvalidRequest(f"ids: must be 1 to {IDS_MAX} job ids with commas between them.")
    known, seen = [id for id in wanted if is_id(id)], _etags(request)
    user_id, wish = request.state.user_id, preferred(request)
    first: str | None = None  # the state that the wait began with

    async def read() -> list[asyncpg.Record]:
        async with request.app.state.hub.turn:
            rows = await request.app.state.database.rows("read_jobs", user_id, known)
        return sorted(rows, key=lambda row: known.index(row["id"]))

    def unmet(rows: list[asyncpg.Record]) -> dict[str, int]:
        nonlocal first
        etag = _etag_of_all(rows)
        if first is None and (etag in seen or not (seen or any(row["done"] for row in rows))):
            first = etag
        return {row["id"]: row["rev"] for row in rows if not row["done"]} if etag == first else {}

    rows = await read_when(request, known, wish.wait, read=read, unmet=unmet, ended=False)
    jobs = [await _shown(request, row) for row in rows]
    etag = _etag_of_all(rows)
    headers = {"ETag": etag, "Cache-Control": "no-store", "Vary": VARY, **wish.applied()}
    waits = [job.poll_after for job in jobs if job.poll_after]
    if waits:
        headers |= _retry_after(min(waits))
    if etag in seen:
        return Response(status_code=304, headers=headers)
    return json_response(
        {"jobs": [job.fields for job in jobs], "next_cursor": None}, headers=headers
    )


def _etag_of_all(rows: list[asyncpg.Record]) -> str:
    digest = hashlib.sha256("".join(row["id"] + _etag(row, None) for row in rows).encode())
    return f'"{digest.hexdigest()[:32]}"'


def _cursor(row: asyncpg.Record) -> str:
    """Where the next page begins, opaque to clients."""
    text = f"{row['created_at'].isoformat()} {row['id']}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _position(cursor: str) -> tuple[datetime, str]:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        created_at, _, id = text.partition(" ")
        if not is_id(id):
            raise ValueError
        return datetime.fromisoformat(created_at).astimezone(UTC), id
    except (ValueError, OverflowError):
        raise InvalidRequest("cursor: must be the next_cursor of an earlier answer.") from None


# --- Ending --------------------------------------------------------------------------------


async def cancel_job(request: Request) -> Response:
    """End a job that is wanted no more. One that has ended stays as it is."""
    database: Database = request.app.state.database
    row = await database.row("cancel_job", request.state.user_id, path_id(request, "job_id"))
    assert row is not None
    if row["running_ticket_id"] is not None:
        request.app.state.bell.stop(row["running_ticket_id"])
    if row["changed"]:
        request.app.state.bell.announce(row["id"])
        log.info("cancel", extra={"job_id": row["id"], "kind": row["kind"]})
        metrics.job_transitions.labels(row["kind"], "cancel").inc()
        metrics.jobs_ended.labels(row["kind"], row["outcome"], row["error_code"]).inc()
    job = await _shown(request, row)
    return json_response({"job": job.fields, "result": None}, headers=_headers(job))


async def delete_job(request: Request) -> Response:
    """Take an ended job away, with its artifact; from then on it answers 410."""
    await request.app.state.database.value(
        "delete_job", request.state.user_id, path_id(request, "job_id")
    )
    return Response(status_code=204)


# --- What a client sees of a job -----------------------------------------------------------


class Pace:
    """How long jobs of each kind take, by the last ones; measured again every few seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_kind: dict[str, tuple[timedelta, timedelta]] = {}
        self._measured = -math.inf

    async def of(self, kind: str) -> tuple[timedelta, timedelta] | None:
        """The median times of waiting and running; None without experience."""
        if time.monotonic() - self._measured > PACE_AGE:
            self._measured = time.monotonic()  # before asking: one asks, the others go on
            try:
                rows = await self._database.rows("pace")
            except DatabaseError as error:  # no estimate is worth an error: the job may be stored
                log.warning("pace not measured", extra={"cause": str(error)})
                return None
            self._by_kind = {
                row["kind"]: (timedelta(seconds=row["wait"]), timedelta(seconds=row["run"]))
                for row in rows
            }
        return self._by_kind.get(kind)


@dataclass(frozen=True, slots=True)
class Shown:
    """A job as a client sees it; `poll_after` in milliseconds, None when it is done."""

    fields: dict[str, Any]
    poll_after: int | None


async def _shown(request: Request, row: asyncpg.Record) -> Shown:
    """A row of `job_objects`, with what depends on the time and on other jobs."""
    eta = poll_after = None
    if not row["done"]:
        paused = row["queue"] and row["queue"]["paused"]  # nobody knows for how long
        pace = None if paused else await request.app.state.pace.of(row["kind"])
        eta = _estimate(row, *pace) if pace else None
        poll_after = _poll_after(row, eta)
    itself = f"/api/v1/jobs/{row['id']}"
    fields = {name: row[name] for name in _FIELDS}
    fields["eta"] = eta
    fields["urls"] = {
        "self": itself,
        "cancel": f"{itself}/cancel",
        "retry": f"{itself}/retry",
        "events": f"{itself}/events",
    }
    return Shown(fields, poll_after)


# The columns of job_objects that are for clients.
_FIELDS = (
    *("id", "project_id", "kind", "status", "result_kind", "result_id", "error", "error_code"),
    *("error_meta", "created_at", "updated_at", "done", "outcome", "attempt", "retry_of"),
    *("started_at", "completed_at", "cancel_requested_at", "start_deadline_at", "deadline_at"),
    *("expires_at", "data_removed", "progress", "queue", "timings", "usage", "priority"),
    *("metadata", "recovering"),
)


def _estimate(row: asyncpg.Record, wait: timedelta, run: timedelta) -> dict[str, Any]:
    now = row["read_at"]
    start: datetime = row["started_at"] or row["created_at"] + wait
    if row["status"] == "pending":  # also one that has to start once more
        start = max(now, start, row["not_before"] or now)
    return {"start_at": start, "done_at": max(now, start + run), "basis": "p50_last_200"}


def _poll_after(row: asyncpg.Record, eta: dict[str, Any] | None) -> int:
    """Milliseconds: until it should be done, or a tenth of its age when that is past. A parked job
    is not done before it is due, whether or not there is an estimate."""
    until = eta["done_at"] if eta else row["not_before"] or row["read_at"]
    remaining = (until - row["read_at"]).total_seconds()
    age = (row["read_at"] - row["created_at"]).total_seconds()
    return int(min(max(remaining * 1_000, age * 100, POLL_AFTER[0]), POLL_AFTER[1]))


def _etag(row: asyncpg.Record, result: asyncpg.Record | None) -> str:
    """Changes with everything that a client can see, but for estimates."""
    text = str(row["rev"])
    if row["recovering"]:  # turns true by time alone
        text += "-recovering"
    if result and result["updated_at"] != result["created_at"]:  # archived, or brought back
        text += f"-{result['updated_at'].timestamp():.6f}"
    return f'"{text}"'


def _etags(request: Request) -> set[str]:
    """What the client has already."""
    given = ",".join(request.headers.getlist("if-none-match"))
    return {tag.strip().removeprefix("W/") for tag in given.split(",")} - {""}


def _headers(job: Shown) -> dict[str, str]:
    """A job's state must not be cached, and until it has ended a client is told when to ask."""
    timings = job.fields["timings"]
    headers = {"Cache-Control": "no-store", "Vary": VARY}
    durations = [
        f"{name};dur={timings[f'{name}_ms']}"
        for name in ("queue", "run")
        if timings[f"{name}_ms"] is not None
    ]
    if durations:
        headers["Server-Timing"] = ", ".join(durations)
    if job.poll_after:
        headers["Location"] = job.fields["urls"]["self"]
        headers |= _retry_after(job.poll_after)
    return headers


def _retry_after(milliseconds: int) -> dict[str, str]:
    return {
        "Retry-After": str(math.ceil(milliseconds / 1_000)),
        "retry-after-ms": str(milliseconds),
    }
