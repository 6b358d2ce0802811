"""The page for people: three files, read once and served from memory.

Hides packaging and caching. The one rule: a browser may run and show nothing but these files, so
that whatever a document says, the key in the page stays there.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import __version__

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",  # the icon of the tab
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes markup, where browsers know this
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for: three files of one release fit together
}


def page_routes() -> Iterator[Route]:
    """The routes of the page, for GET and HEAD."""
    for path, (name, media_type) in FILES.items():
        text = (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")
        yield Route(path, _file(text.replace("{version}", __version__).encode(), media_type))


def _file(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}

    async def file(request: Request) -> Response:
        known = ",".join(request.headers.getlist("if-none-match"))
        if etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return file
