"""The OpenAPI document as a page for people: one file, no script, nothing from elsewhere."""

import html
import re
from typing import Any

import orjson

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1c2024;background:#fff}
h1,h2{line-height:1.2}code,pre{font:14px/1.45 ui-monospace,monospace;background:#f3f4f6;
border-radius:4px}code{padding:.1em .3em}pre{padding:.8rem;overflow:auto}
details{border:1px solid #d9dde1;border-radius:6px;margin:.5rem 0;padding:.5rem .8rem}
summary{cursor:pointer}.verb{display:inline-block;min-width:4rem;font-weight:600;color:#0b5cad}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
border-bottom:1px solid #e5e8eb;padding:.3rem .5rem}
@media(prefers-color-scheme:dark){body{color:#e6e8ea;background:#15181b}code,pre{background:#22272b}
details,td,th{border-color:#363c42}.verb,a{color:#6cb2ff}}
"""


def page(described: dict[str, Any]) -> str:
    """The document as one HTML page without any external asset."""
    info, components = described["info"], described["components"]
    sections: dict[str, list[str]] = {tag["name"]: [] for tag in described["tags"]}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            shown = _operation(described, method.upper(), path, operation)
            sections[operation["tags"][0]].append(shown)
    for name, webhook in described["webhooks"].items():
        sections["Webhooks"].append(_operation(described, "sent", name, webhook["post"]))
    about = {tag["name"]: tag["description"] for tag in described["tags"]}
    parts = [
        f"<h2>{_text(tag)}</h2><p>{_text(about[tag])}{''.join(operations)}"
        for tag, operations in sections.items()
    ]
    parts.append("<h2>Errors</h2>")
    parts += [
        _details(f"<code>{_text(name)}</code> {_text(answer['description'])}", _answer(answer))
        for name, answer in components["responses"].items()
    ]
    parts.append("<h2>Headers of answers</h2>")
    parts.append(_table("header", components["headers"].items()))
    parts.append("<h2>Types</h2>")
    parts += [
        _details(f"<code>{_text(name)}</code>", _json(schema))
        for name, schema in sorted(components["schemas"].items())
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{_text(info['title'])} {_text(info['version'])}</title><style>{_STYLE}</style>"
        f"<h1>{_text(info['title'])} <small>{_text(info['version'])}</small></h1>"
        f"<p>{_text(info['summary'])} Send <code>Authorization: Bearer fr_…</code>. The same as "
        f"JSON: <a href=/openapi.json>openapi.json</a>."
        f"{''.join(f'<p>{_text(p)}' for p in info['description'].split(chr(10) * 2))}"
        f"{''.join(parts)}</html>"
    )


def _operation(described: dict[str, Any], verb: str, where: str, operation: dict[str, Any]) -> str:
    parts = [f"<p>{_text(operation['description'])}"] if "description" in operation else []
    parameters = [_found(described, parameter) for parameter in operation["parameters"]]
    if parameters:
        rows = ((f"{p['name']}", p) for p in parameters)
        parts.append(_table("parameter", rows))
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, {_text(media_type)}: <code>{_text(_type(body['schema']))}</code>")
        parts.append(_json(body["example"]))
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            name = answer["$ref"].rpartition("/")[2]
            told = _found(described, answer)["description"]
            parts.append(f"<p><b>{status}</b> <code>{_text(name)}</code> {_text(told)}")
        else:
            parts.append(f"<p><b>{status}</b> {_text(answer['description'])}{_answer(answer)}")
    head = f"<span class=verb>{_text(verb)}</span> <code>{_text(where)}</code> — "
    return _details(head + _text(operation["summary"]), "".join(parts))


def _answer(answer: dict[str, Any]) -> str:
    parts = []
    if names := ", ".join(f"<code>{_text(name)}</code>" for name in answer.get("headers", ())):
        parts.append(f"<p>Headers: {names}")
    for media_type, content in answer.get("content", {}).items():
        parts.append(f"<p>{_text(media_type)}: <code>{_text(_type(content['schema']))}</code>")
        parts.append(_json(content["example"]))
    return "".join(parts)


def _table(what: str, rows: Any) -> str:
    return f"<table><tr><th>{what}<th>in<th>type<th>{''.join(_row(*row) for row in rows)}</table>"


def _row(name: str, described: dict[str, Any]) -> str:
    kind = _text(_type(described["schema"]))
    return (
        f"<tr><td><code>{_text(name)}</code><td>{_text(described.get('in', 'answer'))}"
        f"<td>{kind}<td>{_text(described.get('description', ''))}"
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _found(described: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to; anything else as it is."""
    if "$ref" not in value:
        return value
    found = described
    for name in value["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def _text(text: str) -> str:
    """As HTML, with the little of Markdown that the document uses: `code` and **strong**."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", escaped)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " | ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    bounds = [f"{schema[k]}" for k in ("minimum", "maximum") if k in schema]
    return str(schema.get("const", schema.get("type", "any"))) + (
        f" {'–'.join(bounds)}" if bounds else ""
    )


def _json(value: Any) -> str:
    shown = value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_INDENT_2)
    text = shown if isinstance(shown, str) else shown.decode()
    return f"<pre>{html.escape(text)}</pre>"
