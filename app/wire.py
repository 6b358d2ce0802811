"""Bytes to checked values, and values to bytes.

It hides body limits, JSON's traps and the wording of validation errors. The one rule: whatever is
wrong with a request ends in one sentence that names the field, and costs next to nothing.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from app.errors import (
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)

Model = TypeVar("Model", bound=BaseModel)

BODY_LIMIT = 256 * 1024  # bytes; parsing that much broad JSON stops the event loop for 25-45 ms
BODY_TIMEOUT = 10.0  # seconds for a whole body; a client that drips bytes is not waited for
# A client that is cut off while it still sends never reads why. So a little of a body that is
# refused is taken and thrown away.
DISCARD_LIMIT = 8 * 1024 * 1024  # bytes
DISCARD_TIMEOUT = 2.0  # seconds
OFF_LOOP = 64 * 1024  # bytes from which a body is parsed in a thread

# Ids are written one way only, so that what is not an id never reaches the database.
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
# A pair of an object in a query: `metadata[ticket]`.
_PAIR = re.compile(r"(\w+)\[(.*)\]", re.DOTALL)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer a value."""
    return Response(
        render(value),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def render(value: Any) -> bytes:
    """A value as JSON on one line; times become RFC 3339 with a Z."""
    return orjson.dumps(value, option=orjson.OPT_UTC_Z)


def path_id(request: Request, name: str) -> str:
    """An id in the path; one that is malformed is as unknown as any other.

    Raises:
        NotFound: always the same sentence, so that foreign, unknown and malformed look alike.
    """
    return known_id(request.path_params[name], name)


def known_id(value: str, name: str) -> str:
    """An id in a body or query, checked like one in the path."""
    if not is_id(value):
        raise not_found(name)
    return value


def is_id(value: str) -> bool:
    """Can this be an id at all?"""
    return bool(_ID.fullmatch(value))


def not_found(name: str) -> NotFound:
    """The one answer for an id that leads nowhere; `name` is the field, such as `job_id`."""
    return NotFound(f"{name}: no {name.removesuffix('_id')} with this id is visible to this key.")


def query(request: Request, model: type[Model]) -> Model:
    """The query parameters that `model` knows; others are left to proxies and trackers.

    `name[key]=value` is a pair of the object `name`.
    """
    known: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        pair = _PAIR.fullmatch(name)
        field = pair[1] if pair else name
        if field not in model.model_fields:
            continue
        if "\0" in name + value:
            raise InvalidRequest(f"{field}: must not contain NUL characters.")
        if pair:
            known[field] = (known[field] if isinstance(known.get(field), dict) else {}) | {
                pair[2]: value
            }
        else:
            known[field] = value
    return validate(known, model)


async def decode(request: Request, model: type[Model], *, limit: int = BODY_LIMIT) -> Model:
    """The JSON body of a request as a checked value.

    Raises:
        UnsupportedMediaType, PayloadTooLarge, RequestTimeout, InvalidRequest
    """
    content_type(request, "application/json")
    raw = await read_body(request, limit)
    if len(raw) < OFF_LOOP:
        return parse(raw, model)
    return await asyncio.to_thread(parse, raw, model)


def content_type(request: Request, *allowed: str) -> str:
    """The media type of the body, without its parameters; `allowed` is what the route reads."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        raise UnsupportedMediaType(f"Content-Type: must be {' or '.join(allowed)}.")
    return given


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, refused as soon as it is known to be too large or too slow."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(request.stream())
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    stream = request.stream()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in stream:
                size += len(chunk)
                if size > limit:
                    await _discard(stream)
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {BODY_TIMEOUT:.0f} s.") from None
    except ClientDisconnect:
        raise RequestTimeout("The client went away before the body was complete.") from None
    return b"".join(chunks)


async def _discard(stream: AsyncIterator[bytes]) -> None:
    size = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_TIMEOUT):
            async for chunk in stream:
                size += len(chunk)
                if size > DISCARD_LIMIT:
                    return


def parse(raw: bytes, model: type[Model]) -> Model:
    """JSON to a checked value; see `decode` for the errors."""
    if not raw.strip():
        raise InvalidRequest("The body is empty; send a JSON object.")
    value = load_json(raw)
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return validate(value, model)


def load_json(raw: bytes) -> Any:
    """Parse JSON that PostgreSQL can hold: no NUL, no lone surrogate, no NaN.

    orjson accepts NUL, which PostgreSQL cannot store in text or jsonb; the search for where it is
    runs only when its escape is there at all.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if b"\\u0000" in raw:
        for path, text in _strings(value):
            if "\0" in text:
                raise InvalidRequest(f"{path or 'body'}: must not contain NUL characters.")
    return value


def validate(value: dict[str, Any], model: type[Model], prefix: str = "") -> Model:
    """Check a parsed object; `prefix` is put before the name of the field at fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(prefix + sentence(error)) from None


def sentence(error: ValidationError) -> str:
    """The first fault as one sentence, beginning with the field."""
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    field = _path(first["loc"])
    match first["type"]:
        case "missing":
            return f"{field}: is required."
        case "extra_forbidden":
            return f"{field}: is not a known field."
        case "value_error":
            return f"{field}: {first['ctx']['error']}."
        case "too_short" | "too_long":
            return f"{field}: must {_size(first['type'], first['ctx'])}."
        case kind if kind in _KINDS:
            return f"{field}: must be {_KINDS[kind]}."
        case _:
            _, found, rest = first["msg"].partition("should ")
            return f"{field}: must {rest}." if found else f"{field}: {first['msg']}."


# What pydantic calls valid dictionaries and instances.
_KINDS = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "an array",
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
}


def _size(kind: str, context: dict[str, Any]) -> str:
    """How many items there have to be."""
    if kind == "too_short":
        least = context["min_length"]
        return "not be empty" if least == 1 else f"have at least {least} items"
    most = context["max_length"]
    return f"have at most {most} item{'s' if most != 1 else ''}"


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return (text.removeprefix(".") or "body")[:200]


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Every key and string of a parsed body with its path; iterative, as bodies can be deep."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, str):
            yield path, item
        elif isinstance(item, list):
            stack.extend((f"{path}[{i}]", child) for i, child in enumerate(item))
        elif isinstance(item, dict):
            for key, child in item.items():
                yield path, key
                stack.append((f"{path}.{key}".removeprefix("."), child))


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {limit // 1024} KiB, the limit of this route.")
