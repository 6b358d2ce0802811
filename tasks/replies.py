"""From what a language model wrote to a draft: checked, cleaned, bounded, its ids mapped back.

A reply is a stranger's text. The one rule: what leaves this file has the shape of the kind's draft,
no control characters, no field of absurd length, nothing of what we said to the model, and cites
only events that it was shown.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import orjson
from pydantic import ValidationError

from app.schemas import DRAFTS, AnyDraft
from tasks.prompts import Prompt, quotes

# Longer than any good answer: what exceeds it is a model that runs away.
TITLE_MAX = 200  # characters, also of names, headings and versions
TEXT_MAX = 2_000  # characters of one statement
LIST_MAX = 60  # entries of one list
IDS_MAX = 100  # events behind one statement
PROBLEMS_TOLD = 5  # faults of the shape that a model is told at once

_SHORT = {"title", "name", "heading", "version", "references", "sources", "areas"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_FENCE = re.compile(r"```[a-zA-Z]*\s*\n?(.*?)\n?\s*```", re.DOTALL)

ShortIds = Mapping[str, tuple[str, ...]]  # what a model cites -> event ids


class Unusable(Exception):
    """The reply is no draft; the message says what is wrong, to the model. It may quote the reply,
    so it is never logged or stored."""


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind's draft, in the subset that strict modes take: no references, every
    property required, nothing else allowed."""
    schema = DRAFTS[kind].model_json_schema()
    flat: dict[str, Any] = _flat(schema, schema.get("$defs", {}))
    return flat


def read_reply(
    text: str, kind: str, ids: ShortIds, prompt: Prompt, *, may_be_empty: bool = False
) -> AnyDraft:
    """The draft that a reply holds, citing event ids.

    Args:
        ids: what the model was shown.
        prompt: what it was asked; of texts that repeat it, nothing is left.
        may_be_empty: a draft that cites nothing is one too, as of a part where nothing happened.

    Raises:
        Unusable: it holds none, also after all that can be mended has been.
    """
    try:
        value = _cleaned(_parsed(text), ids, quotes(prompt))
    except RecursionError:
        raise Unusable("it is nested too deeply") from None
    try:
        draft = DRAFTS[kind].model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        told = (f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults[:PROBLEMS_TOLD])
        raise Unusable("it has not the required shape: " + "; ".join(told)) from None
    if not may_be_empty and not _cites(value):
        examples = ", ".join(list(ids)[:3])
        raise Unusable(
            f"no statement names in event_ids an id of the data; these are ids: {examples}"
        )
    return cast(AnyDraft, draft)


def _parsed(text: str) -> dict[str, Any]:
    """The one JSON object in a reply, also when it is wrapped in a code fence or in words."""
    text = _CONTROL.sub("", text).strip()
    candidates = [text, *_FENCE.findall(text), text[text.find("{") : text.rfind("}") + 1]]
    for candidate in filter(None, candidates):
        try:
            value = orjson.loads(candidate)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            return value
    raise Unusable("it is not one JSON object" if text else "it is empty")


def _cleaned(value: Any, ids: ShortIds, is_ours: Callable[[str], bool], name: str = "") -> Any:
    """The value without control characters and without what we said ourselves, within bounds, its
    short ids mapped to event ids."""
    if isinstance(value, str):
        text = _cut(_CONTROL.sub("", value), TITLE_MAX if name in _SHORT else TEXT_MAX)
        return "" if is_ours(text) else text
    if isinstance(value, list):
        if name == "event_ids":
            found = (id for short in value for id in ids.get(_short(short), ()))
            return list(dict.fromkeys(found))[:IDS_MAX]
        return [_cleaned(item, ids, is_ours, name) for item in value[:LIST_MAX]]
    if isinstance(value, dict):
        return {key: _cleaned(part, ids, is_ours, key) for key, part in value.items()}
    return value


def _short(cited: Any) -> str:
    """A short id as it was shown: models like to wrap it, `[e12]`, `#e12`, `E12`."""
    return cited.strip("[](){}#<>` \t\n").lower() if isinstance(cited, str) else ""


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _cites(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("event_ids")) or any(map(_cites, value.values()))
    return isinstance(value, list) and any(map(_cites, value))


def _flat(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_flat(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _flat(definitions[node["$ref"].rpartition("/")[2]], definitions)
    flat = {
        key: {name: _flat(part, definitions) for name, part in value.items()}
        if key == "properties"
        else _flat(value, definitions)
        for key, value in node.items()
        if key not in ("$defs", "title", "default", "description")
    }
    if "properties" in flat:
        flat["required"] = list(flat["properties"])
        flat["additionalProperties"] = False
    return flat
