"""What Notion sends, as events: that pages, databases and comments changed, and hardly more.

Notion tells ids and no texts, so a title says what kind of thing changed how; the address opens it.

Pure. The one rule: what happened is in the type, which page it was is in the address, and all of a
workspace is one resource, because a page in a page does not say what it is part of.
"""

from typing import Any

from tasks.sources.body import facts, fingerprint, part, parts, words
from tasks.sources.event import Delivery, Resource, SourceEvent, text

# How Notion calls it, and how it is told.
TOLD = {
    "content_updated": ("updated", "edited"),
    "properties_updated": ("properties_updated", "properties changed"),
    "schema_updated": ("schema_updated", "columns changed"),
    "undeleted": ("restored", "restored"),
}
NOUNS = {"data_source": "Data source", "file_upload": "File upload"}


def events(delivery: Delivery) -> list[SourceEvent]:
    """The events of one delivery; the handshake gives none."""
    body = delivery.body
    noun, _, what = words(body, "type").partition(".")
    if not noun or not what:
        return []
    verb, told = TOLD.get(what, (what, what.replace("_", " ")))
    entity = words(body, "entity", "id")
    page = words(body, "data", "page_id") or words(body, "data", "parent", "id")
    about = page if noun == "comment" else entity
    named = words(body, "data", "title") or words(body, "entity", "title")
    authors = parts(body, "authors")
    workspace = words(body, "workspace_id")
    return [
        SourceEvent(
            event_type=f"{noun}.{verb}",
            title=named or f"{_called(noun, entity)} {told}{_extent(body)}",
            content=text(part(body, "data", "text")),
            external_id=words(body, "id") or fingerprint(body),
            resource=Resource(workspace, words(body, "workspace_name") or workspace, "workspace")
            if workspace
            else None,
            author=words(authors[0], "name") or words(authors[0], "id") if authors else None,
            url=f"https://www.notion.so/{about.replace('-', '')}" if about else None,
            occurred_at=words(body, "timestamp"),
            metadata=facts(
                entity=entity,
                thread=page if noun == "comment" else None,
                parent=words(body, "data", "parent", "id"),
                authors=[words(author, "id") for author in authors[1:10]],
                bot=bool(authors) and words(authors[0], "type") in ("bot", "agent") or None,
            ),
        )
    ]


def _called(noun: str, entity: str) -> str:
    """What changed, told from the others of its kind by the end of its id: ids begin alike.

    Seven such digits would be read as a commit, so it is six of them.
    """
    name = NOUNS.get(noun) or noun.replace("_", " ").capitalize()
    return f"{name} {entity[-6:]}".strip()


def _extent(body: Any) -> str:
    """How much changed, where Notion tells."""
    for field, noun in (("updated_blocks", "block"), ("updated_properties", "property")):
        if count := len(parts(body, "data", field)):
            many = "properties" if noun == "property" else f"{noun}s"
            return f" ({count} {noun if count == 1 else many})"
    return ""
