"""Whatever was raised, a client is told one thing: a sentence, a code and the request's id."""

import logging

import orjson
import pytest
from starlette.exceptions import HTTPException

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


PLAIN = [kind for kind in leaves(errors.ApiError) if kind.__init__ is errors.ApiError.__init__]


@pytest.mark.parametrize("kind", PLAIN)
def test_every_error_has_the_one_body(kind: type[errors.ApiError]) -> None:
    token = logs.request_id.set("r-1")
    try:
        response = errors.error_response(kind("field: is wrong."))
    finally:
        logs.request_id.reset(token)
    assert response.status_code == kind.status
    assert response.headers["content-type"] == "application/json"
    assert orjson.loads(response.body) == {
        "error": "field: is wrong.",
        "code": kind.code,
        "request_id": "r-1",
    }
    for name, value in kind.headers.items():
        assert response.headers[name] == value


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (db.InvalidRequest("sources: no."), 400, "invalid_request"),
        (db.NotFound("project_id: no."), 404, "not_found"),
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
