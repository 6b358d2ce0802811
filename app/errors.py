"""What a client is told when something is wrong: one tree of errors, one body.

The one rule: every error body has a string `error` (a sentence for a person), a `code` (for a
program) and the `request_id`, whatever raised it. Whoever names `application/problem+json` in
`Accept` gets the same and the members of RFC 9457.
"""

import logging
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import asyncpg
import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import db
from app.cipher import CipherError
from app.logs import request_id, trace

log = logging.getLogger("baton.api")

PROBLEM = "application/problem+json"
# What a sentence may quote of a request, and what would end its line or change a terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
RETRY_AFTER = 2  # seconds; a restart of PostgreSQL usually takes about that long


class ApiError(Exception):
    """An answer that is not a success.

    ApiError
    ├── InvalidRequest        400 invalid_request
    ├── Unauthorized          401 unauthorized
    ├── Forbidden             403 forbidden
    ├── NotFound              404 not_found
    ├── RequestTimeout        408 request_timeout
    ├── Conflict              409 conflict
    ├── Gone                  410 gone
    ├── PayloadTooLarge       413 payload_too_large
    ├── UriTooLong            414 uri_too_long
    ├── UnsupportedMediaType  415 unsupported_media_type
    ├── IdempotencyKeyReuse   422 idempotency_key_reuse
    ├── RateLimited           429 rate_limited
    ├── TooManyWaits          429 too_many_waits
    ├── QueueFull             429 queue_full
    ├── HeadersTooLarge       431 headers_too_large
    ├── NotGenerated          502 generation_failed
    └── Unavailable           503 unavailable
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"
    headers: dict[str, str] = {}
    extra: dict[str, Any] = {}  # more members of the body, by the names of RFC 9457
    problem = ("about:blank", "")  # its `type` and `title` in RFC 9457; the title is the status's

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = _CONTROL.sub("\ufffd", sentence)


class InvalidRequest(ApiError):
    """A field is missing or wrong; the sentence names it."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_request"


class Unauthorized(ApiError):
    """The same for a missing, malformed, unknown and revoked key."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"
    headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ApiError):
    """Visible, but the caller's role does not allow it."""

    status = HTTPStatus.FORBIDDEN
    code = "forbidden"


class NotFound(ApiError):
    """Unknown or not visible; nobody can tell which."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class RequestTimeout(ApiError):
    """The body did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "request_timeout"
    headers = {"Connection": "close"}


class Conflict(ApiError):
    """Not in the status that it now has."""

    status = HTTPStatus.CONFLICT
    code = "conflict"


class Gone(ApiError):
    """It was there, and has been deleted."""

    status = HTTPStatus.GONE
    code = "gone"


class PayloadTooLarge(ApiError):
    """The body is over the limit; the rest of it is not read."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "payload_too_large"
    headers = {"Connection": "close"}


class UriTooLong(ApiError):
    """The path and query are over the limit."""

    status = HTTPStatus.REQUEST_URI_TOO_LONG
    code = "uri_too_long"
    headers = {"Connection": "close"}


class UnsupportedMediaType(ApiError):
    """The body is not of a type that this route reads."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"


class IdempotencyKeyReuse(ApiError):
    """The key belongs to another request. Not 409, which many clients repeat by themselves."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "idempotency_key_reuse"


# Of the draft of the RateLimit headers.
_QUOTA_EXCEEDED = (
    "https://iana.org/assignments/http-problem-types#quota-exceeded",
    "Request cannot be satisfied as assigned quota has been exceeded",
)


class RateLimited(ApiError):
    """A policy has no request left for now. The sentence is what existing clients show.

    Args:
        detail: what the quota is.
        violated: the policies that refuse.
        retry_after: seconds, after which a request is admitted.
    """

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limited"
    problem = _QUOTA_EXCEEDED

    def __init__(self, detail: str, violated: list[str], retry_after: int) -> None:
        super().__init__("Too many requests. Please wait a moment and try again.")
        self.headers = {"Retry-After": str(retry_after)}
        self.extra = {"detail": detail, "violated-policies": violated}


class TooManyWaits(ApiError):
    """So many requests of the key are held open that this one may not wait as well."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "too_many_waits"
    problem = _QUOTA_EXCEEDED
    headers = {"Retry-After": "5"}  # seconds; nobody knows when one ends, but none takes long

    def __init__(self, quota: int) -> None:
        super().__init__(
            "Too many requests of this key are waiting already. End one, or ask without waiting."
        )
        self.extra = {
            "detail": f"{quota} waiting requests at once for this key",
            "violated-policies": ["waits"],
        }


class QueueFull(ApiError):
    """The project has as many pending jobs as it may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "queue_full"
    problem = _QUOTA_EXCEEDED
    headers = {"Retry-After": "10"}  # seconds; how soon the next job is taken is not known

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.extra = {"detail": sentence, "violated-policies": ["pending"]}


class HeadersTooLarge(ApiError):
    """The headers together are over the limit."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "headers_too_large"
    headers = {"Connection": "close"}


class NotGenerated(ApiError):
    """The job behind a request has failed for good; the code is the job's."""

    status = HTTPStatus.BAD_GATEWAY
    code = "generation_failed"


class Unavailable(ApiError):
    """The database is away; nothing is known, so nothing is claimed."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"
    headers = {"Retry-After": str(RETRY_AFTER)}


# What the database refuses in a sentence that is meant for the client.
_OF_DATABASE: dict[type[Exception], type[ApiError]] = {
    db.InvalidRequest: InvalidRequest,
    db.Forbidden: Forbidden,
    db.NotFound: NotFound,
    db.Conflict: Conflict,
    db.Gone: Gone,
    db.KeyReuse: IdempotencyKeyReuse,
    db.QueueFull: QueueFull,
}


def as_api_error(error: Exception) -> ApiError:
    """The answer for whatever was raised; what nobody foresaw is logged and becomes a 500."""
    match error:
        case ApiError():
            return error
        case db.DatabaseError() if type(error) in _OF_DATABASE:
            return _OF_DATABASE[type(error)](str(error))
        case db.Refused(__cause__=asyncpg.UndefinedTableError() | asyncpg.UndefinedFunctionError()):
            log.error("schema not current", extra={"cause": str(error)})
            return Unavailable("The schema is not current; an operator has to run: baton migrate.")
        case CipherError():
            log.error("no key for secrets", extra={"cause": str(error)})
            return Unavailable(
                "The server cannot keep secrets; an operator has to look at its log."
            )
        case db.Unavailable():
            log.warning("unavailable", extra={"cause": repr(error.__cause__ or error)})
            return Unavailable("The database does not answer right now. Try again shortly.")
        case HTTPException(status_code=404):
            return NotFound("There is nothing at this path; GET /openapi.json lists what there is.")
        case HTTPException():
            return _of_starlette(error)
        case _:
            log.error("unexpected", extra={"trace": trace(error)})
            return ApiError("Something unexpected went wrong; the log has it by the request id.")


def _of_starlette(error: HTTPException) -> ApiError:
    status = HTTPStatus(error.status_code)
    known = ApiError(f"{status.phrase}.")
    known.status = status
    known.code = status.name.lower()
    known.headers = dict(error.headers or {})
    return known


def error_body(error: ApiError) -> dict[str, Any]:
    """The one shape of an error."""
    return {
        "error": error.sentence,
        "code": error.code,
        "request_id": request_id.get(),
        **error.extra,
    }


def problem(kind: ApiError | type[ApiError], body: dict[str, Any]) -> dict[str, Any]:
    """The same, and what RFC 9457 adds."""
    name, title = kind.problem
    return {
        "type": name,
        "title": title or kind.status.phrase,
        "status": kind.status.value,
        "detail": body["error"],
        "instance": f"urn:request:{body['request_id']}",
        **body,
    }


def error_response(error: Exception, accept: str = "") -> Response:
    """Render whatever was raised.

    Args:
        accept: the request's header of that name.
    """
    known = as_api_error(error)
    body, media_type = error_body(known), "application/json"
    if _names_problem(accept):
        body, media_type = problem(known, body), PROBLEM
    return Response(
        orjson.dumps(body),
        status_code=known.status,
        media_type=media_type,
        headers={"Vary": "Accept", **known.headers},
    )


def _names_problem(accept: str) -> bool:
    """Is a problem named, and wanted no less than plain JSON? A wildcard does not name it: whoever
    takes anything gets what everybody always got."""
    weights = dict(_weights(accept))
    wanted = weights.get(PROBLEM, 0.0)
    return wanted > 0 and wanted >= weights.get("application/json", 0.0)


def _weights(accept: str) -> Iterator[tuple[str, float]]:
    for part in accept.lower().split(","):
        media_type, *parameters = (text.strip() for text in part.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            yield media_type, float(weight)
        except ValueError:
            yield media_type, 1.0
