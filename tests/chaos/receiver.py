"""A receiver of webhooks: a small HTTP server that notes what comes and answers by a script."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any

from standardwebhooks import Webhook


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """An answer as it goes over the wire; `retry_after` becomes Retry-After."""
    lines = [f"HTTP/1.1 {status} -", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Received:
    """One request."""

    target: str
    headers: dict[str, str]
    body: bytes

    def verified(self, secret: str) -> Any:
        """The body, as a receiver that checks the signature reads it."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Receiver:
    """Answers in turn what `answers` holds, then `otherwise`; None is silence."""

    port: int = 0
    answers: list[bytes | None] = field(default_factory=list)
    delay: float = 0.0  # seconds before an answer
    otherwise: bytes | None = field(default_factory=lambda: answer(204))
    got: list[Received] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    open: set[asyncio.StreamWriter] = field(default_factory=set)

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        """Where it listens."""
        return f"http://{host}:{self.port}{path}"

    async def has(self, number: int) -> list[Received]:
        """Wait until so many requests have come."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: len(self.got) >= number)
        return self.got

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        self.open.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            pairs = (line.partition(":") for line in head[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            body = await reader.readexactly(int(headers["content-length"]))
            async with self.changed:
                self.got.append(Received(head[0].split()[1], headers, body))
                self.changed.notify_all()
            said = self.answers.pop(0) if self.answers else self.otherwise
            await asyncio.sleep(self.delay)
            if said is None:
                await reader.read()  # until the sender gives up
            else:
                writer.write(said)
                await writer.drain()
        self.open.discard(writer)
        writer.close()

    def cut(self) -> None:
        """End all connections without a word."""
        for writer in self.open:
            writer.transport.abort()


@asynccontextmanager
async def receiving(
    host: str = "127.0.0.1", port: int = 0, ssl: SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """A receiver on a port of loopback."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, host, port, ssl=ssl)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        receiver.cut()
        await server.wait_closed()
