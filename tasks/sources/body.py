"""Reading what a source sent: a body is verified, but nothing promises what it looks like.

Pure. The one rule: a value that is missing or of another shape is None or empty, never an error.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from tasks.sources.event import line


def part(value: Any, *path: str | int) -> Any:
    """What a body has at a path; None where a piece of it is missing or of another shape."""
    for step in path:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and -len(value) <= step < len(value):
            value = value[step]
        else:
            return None
    return value


def parts(value: Any, *path: str | int) -> list[Any]:
    """The list at a path, or an empty one."""
    found = part(value, *path)
    return found if isinstance(found, list) else []


def words(value: Any, *path: str | int) -> str:
    """The text at a path as one line, or an empty one; true and false are no text."""
    found = part(value, *path)
    return "" if isinstance(found, bool) else line(found) or ""


def names(values: Iterable[Any], limit: int = 20) -> list[str]:
    """What things are called that are texts, or that have a name."""
    found = (words(value) or words(value, "name") for value in values)
    return [name for name in found if name][:limit]


def identity(*pieces: object) -> str:
    """An external id of its pieces; "" when one is missing, so that two facts never become one."""
    found = ["" if isinstance(piece, bool) else line(piece) or "" for piece in pieces]
    return ":".join(found) if all(found) else ""


def facts(**found: Any) -> dict[str, Any]:
    """Metadata without what is not known."""
    return {key: value for key, value in found.items() if value not in (None, "", [], {})}


def fingerprint(body: Any) -> str:
    """An id of a body that has none of its own: the same meaning gives the same id.

    It begins with a word, because hexadecimal digits alone are read as a commit.
    """
    try:
        raw = orjson.dumps(body, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return ""
    return f"body:{hashlib.blake2b(raw, digest_size=16).hexdigest()}"
