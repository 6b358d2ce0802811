"""As much of HTTP as the driver needs, and cheap enough to poll fifty jobs five times a second.

One connection, one request at a time. The one rule: what happened on the wire is reported as it
is; nothing is retried here.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NONE: Mapping[str, str] = {}


class NoAnswer(Exception):
    """The connection was refused or broke, or the answer did not come in time."""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


class Connection:
    """A connection to one server, made anew when it has broken."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str = "",
        headers: Mapping[str, str] = NONE,
        timeout: float = 15.0,
    ) -> Answer:
        """Send a request and await its answer.

        Args:
            key: what to call the request, so that it may be sent again.
            headers: more of them.

        Raises:
            NoAnswer: there is none.
        """
        try:
            async with asyncio.timeout(timeout):
                more = {"Idempotency-Key": key, **headers} if key else headers
                return await self._ask(method, path, body, more)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            raise NoAnswer(repr(error)) from error
        except asyncio.CancelledError:  # an answer that comes now would be taken for the next one
            self.close()
            raise

    async def _ask(self, method: str, path: str, body: Any, more: Mapping[str, str]) -> Answer:
        payload = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "Content-Type: application/json\r\n"
        kind += "".join(f"{name}: {value}\r\n" for name, value in more.items())
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._key}\r\n"
            f"{kind}Content-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        answer = Answer(
            int(first.split(" ")[1]),
            headers,
            await reader.readexactly(int(headers.get("content-length", 0))),
        )
        if headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        """Give the connection up."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None
