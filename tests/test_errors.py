"""Whatever was raised, a client is told one thing: a sentence, a code and the request's id."""

import logging
from typing import Any

import orjson
import pytest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import db, errors, logs


def leaves(kind: type[errors.ApiError]) -> list[type[errors.ApiError]]:
    below = kind.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [kind]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.ApiError.__doc__ or ""
    for kind in leaves(errors.ApiError):
        [line] = [line for line in drawn.splitlines() if f" {kind.__name__} " in line]
        assert line.split()[-2:] == [str(int(kind.status)), kind.code]
    assert drawn.count("─ ") == len(leaves(errors.ApiError))


def test_a_code_says_just_what_is_wrong() -> None:
    """A status may not: a 429 can mean three things."""
    kinds = leaves(errors.ApiError)
    assert len({kind.code for kind in kinds}) == len(kinds)


def made(kind: type[errors.ApiError]) -> errors.ApiError:
    """One of the kind."""
    if kind is errors.RateLimited:
        return errors.RateLimited("60 requests per 60 s for this key", ["default"], 7)
    return errors.TooManyWaits(20) if kind is errors.TooManyWaits else kind("field: is wrong.")


def rendered(error: Exception, accept: str = "") -> tuple[Response, dict[str, Any]]:
    """The answer to request `r-1`, and its body."""
    token = logs.request_id.set("r-1")
    try:
        response = errors.error_response(error, accept)
    finally:
        logs.request_id.reset(token)
    return response, orjson.loads(response.body)


@pytest.mark.parametrize("kind", leaves(errors.ApiError))
def test_every_error_has_the_one_body(kind: type[errors.ApiError]) -> None:
    error = made(kind)
    response, body = rendered(error)
    assert response.status_code == kind.status
    assert response.headers["content-type"] == "application/json"
    assert body == {
        "error": error.sentence,
        "code": kind.code,
        "request_id": "r-1",
        **error.extra,
    }
    for name, value in error.headers.items():
        assert response.headers[name] == value


@pytest.mark.parametrize("kind", [*leaves(errors.ApiError), errors.ApiError])
def test_every_error_is_a_problem_for_those_who_name_it(kind: type[errors.ApiError]) -> None:
    error = made(kind)
    response, body = rendered(error, "application/json;q=0.5, Application/Problem+JSON")
    plain = rendered(error)[1]
    assert response.status_code == kind.status
    assert response.headers["content-type"] == "application/problem+json"
    assert "Accept" in response.headers["vary"]
    assert {name: body[name] for name in plain} == plain
    assert set(body) == {"type", "title", "status", "detail", "instance"} | set(plain)
    assert body["status"] == kind.status
    assert body["instance"] == "urn:request:r-1"
    if kind.status == 429:
        assert body["type"].endswith("http-problem-types#quota-exceeded")
        assert body["detail"] == plain["detail"]
    else:
        assert (body["type"], body["title"]) == ("about:blank", kind.status.phrase)
        assert body["detail"] == error.sentence


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/*",
        "application/json",
        "application/problem+json;q=0",
        "application/problem+json;q=0.1, application/json",
        "application/problem+xml",
        "application/problem+jsonx",
    ],
)
def test_who_does_not_ask_for_a_problem_gets_what_everybody_got(accept: str) -> None:
    response, body = rendered(errors.NotFound("field: is wrong."), accept)
    assert response.headers["content-type"] == "application/json"
    assert set(body) == {"error", "code", "request_id"}
    assert response.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (db.InvalidRequest("sources: no."), 400, "invalid_request"),
        (db.NotFound("project_id: no."), 404, "not_found"),
        (db.QueueFull("This project has too many."), 429, "queue_full"),
        (db.Unavailable("gone"), 503, "unavailable"),
        (HTTPException(404), 404, "not_found"),
        (HTTPException(405, headers={"Allow": "GET"}), 405, "method_not_allowed"),
        (RuntimeError("secret detail"), 500, "internal_error"),
        (db.LeaseLost("not for clients"), 500, "internal_error"),
    ],
)
def test_what_others_raise_is_mapped(raised: Exception, status: int, code: str) -> None:
    response = errors.error_response(raised)
    body = orjson.loads(response.body)
    assert (response.status_code, body["code"]) == (status, code)
    assert body["error"].endswith(".")
    assert "secret" not in body["error"] and "gone" not in body["error"]


def test_sentences_of_the_database_reach_the_client_when_they_are_meant_for_it() -> None:
    assert errors.as_api_error(db.NotFound("project_id: no.")).sentence == "project_id: no."
    assert errors.as_api_error(db.InvalidRequest("a: no.")).sentence == "a: no."


def test_headers_of_the_framework_survive() -> None:
    response = errors.error_response(HTTPException(405, headers={"Allow": "GET"}))
    assert response.headers["allow"] == "GET"


def test_only_what_nobody_foresaw_is_logged_with_its_trace_but_not_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for expected in (errors.NotFound("-"), db.InvalidRequest("-"), HTTPException(404)):
        errors.as_api_error(expected)
    assert caplog.records == []
    try:
        raise RuntimeError("what a client sent")
    except RuntimeError as error:
        errors.as_api_error(error)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    trace = vars(record)["trace"]
    assert "RuntimeError" in trace and __name__.rpartition(".")[2] in trace
    assert "what a client sent" not in trace.replace('raise RuntimeError("what a client sent")', "")


def test_an_absent_database_is_a_warning_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise db.Unavailable("gone") from ConnectionRefusedError(111, "refused")
    except db.Unavailable as error:
        errors.as_api_error(error)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "ConnectionRefusedError" in vars(record)["cause"]


def test_a_sentence_is_one_line_whatever_it_quotes() -> None:
    _, body = rendered(
        db.InvalidRequest('sources: there is no source named "a\n\x1b[2J\u2028\x9b".')
    )
    assert body["error"] == 'sources: there is no source named "a\ufffd\ufffd[2J\ufffd\ufffd".'
