"""A TCP proxy between one process and PostgreSQL, which can lose, delay and cut what passes.

It reads the frames of the protocol, because the interesting moments are those of statements: a
`Rule` names one by a piece of its text, and says what becomes of it. Nothing in the product knows
that it is being watched.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

Action = Literal[
    "hold",  # the statement never reaches the server
    "swallow",  # the server runs it, its answer is lost; the connection stays open and silent
    "cut",  # the server runs it, its answer is lost, and the connection breaks
    "reset",  # the connection breaks before the server has seen the statement
    "delay",  # the answer comes later
    "late",  # the statement reaches the server later, even when its client is gone by then
]


@dataclass
class Rule:
    """What becomes of the statements whose text has `text` in it.

    Args:
        times: to how many of them it happens; then it is spent.
        seconds: for `delay` and `late`.
        happened: called when it has happened; for `swallow` and `cut`, after the server answered.
    """

    text: str
    action: Action
    times: int = 1
    seconds: float = 0.0
    happened: Callable[[], Awaitable[None] | None] | None = None
    count: int = 0
    seen: asyncio.Event = field(default_factory=asyncio.Event)

    async def report(self) -> None:
        """It happened once more."""
        self.seen.set()
        if self.happened:
            waiting = self.happened()
            if waiting is not None:
                await waiting


class _Frames:
    """Cuts a stream into the protocol's frames."""

    def __init__(self, *, startup: bool) -> None:
        self._buffer = b""
        self._startup = startup

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The whole frames so far, as type and payload; the first of a client has no type."""
        self._buffer += data
        frames: list[tuple[bytes, bytes]] = []
        while True:
            head = 4 if self._startup else 5
            if len(self._buffer) < head:
                return frames
            kind = b"" if self._startup else self._buffer[:1]
            (length,) = struct.unpack("!I", self._buffer[head - 4 : head])
            end = head - 4 + length
            if len(self._buffer) < end:
                return frames
            frames.append((kind, self._buffer[head:end]))
            self._buffer = self._buffer[end:]
            self._startup = False


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: "Proxy", client: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.answers: asyncio.StreamReader | None = None
        self.silent = False  # nothing passes any more, and nobody is told
        self._statements: dict[bytes, str] = {}  # by the name that the client gave them
        self._pending: Rule | None = None  # applies to the answer that comes next
        self.late: asyncio.Task[None] | None = None  # delivers what was sent before the client died

    async def upstream(self, reader: asyncio.StreamReader) -> None:
        """Pass on what the client says."""
        frames = _Frames(startup=True)
        while data := await reader.read(65536):
            rule = None
            for kind, payload in frames.feed(data):
                rule = self._rule_for(kind, payload) or rule
            if rule is not None and rule.action == "late":
                self.silent = True
                self.late = asyncio.create_task(self._deliver(data, rule.seconds))
                await rule.report()
            elif rule is not None and rule.action in ("hold", "reset"):
                self.silent = True
                await rule.report()
                if rule.action == "reset":
                    self.abort()
            elif rule is not None:
                self._pending = rule
            await self.proxy.passing.wait()
            if not self.silent and self.server is not None:
                self.server.write(data)
                await self.server.drain()

    async def downstream(self, reader: asyncio.StreamReader) -> None:
        """Pass on what the server says."""
        frames = _Frames(startup=False)
        while data := await reader.read(65536):
            kinds = [kind for kind, _ in frames.feed(data)]
            rule = self._pending
            if rule is not None and rule.action == "delay":
                self._pending = None
                await rule.report()
                await asyncio.sleep(rule.seconds)
            elif rule is not None:
                if b"Z" in kinds:  # ready for the next query: this one has been committed
                    self._pending, self.silent = None, True
                    await rule.report()
                    if rule.action == "cut":
                        self.abort()
                continue
            await self.proxy.passing.wait()
            if not self.silent:
                self.client.write(data)
                await self.client.drain()

    async def _deliver(self, data: bytes, seconds: float) -> None:
        await asyncio.sleep(seconds)
        assert self.server
        self.server.write(data)
        await self.server.drain()
        await asyncio.sleep(1)  # the server is at it; a broken connection would stop it

    def abort(self) -> None:
        """Break both halves without a farewell."""
        for half in (self.client, self.server):
            if half is not None:
                half.transport.abort()

    def _rule_for(self, kind: bytes, payload: bytes) -> Rule | None:
        """The rule that this frame of the client triggers."""
        match kind:
            case b"P":  # parse
                name, statement, _ = payload.split(b"\0", 2)
                self._statements[name] = statement.decode(errors="replace")
                return None
            case b"B":  # bind
                _, name, _ = payload.split(b"\0", 2)
                text = self._statements.get(name, "")
            case b"Q" | b"":  # a simple query; at the start, the application's name
                text = payload.decode(errors="replace")
            case _:
                return None
        for rule in self.proxy.rules:
            if rule.text in text and rule.count < rule.times:
                rule.count += 1
                return rule
        return None


class Proxy:
    """Listens on `port` and passes on to the server's port."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = True
        self.passing = asyncio.Event()
        self.passing.set()
        self.rules: list[Rule] = []
        self.port = 0

    async def open(self) -> None:
        """Begin to listen."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End all connections and stop listening."""
        await self.refuse()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refuse(self) -> None:
        """As if nothing listened; what is connected breaks. `open` ends it."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.reset()

    def pause(self) -> None:
        """Nothing passes; it comes later, after `go_on`, as in a network that is only slow."""
        self.passing.clear()

    def go_on(self) -> None:
        """End `pause`."""
        self.passing.set()

    def lose(self) -> None:
        """A partition: what is on its way is lost, and so is all on these connections from now on.
        New connections are accepted and silent, until `heal`."""
        self._accepting = False
        self.vanish()

    def heal(self) -> None:
        """New connections work again; those of before stay silent for ever."""
        self._accepting = True

    def vanish(self) -> None:
        """The server's host is gone without a word, and another has its address: what is connected
        is silent for ever, new connections work."""
        for link in self._links:
            link.silent = True

    def reset(self) -> None:
        """Break all connections."""
        for link in tuple(self._links):
            link.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, writer)
        link.silent = not self._accepting
        self._links.add(link)
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            # Nobody but us cancels: a task of the streams that was cancelled makes noise.
            with suppress(OSError, asyncio.CancelledError):
                await self._join(link, reader)
            if link.late is not None:
                with suppress(OSError, asyncio.CancelledError):
                    await link.late
        finally:
            self._tasks.discard(task)
            self._links.discard(link)
            link.abort()

    async def _join(self, link: _Link, reader: asyncio.StreamReader) -> None:
        answers, link.server = await asyncio.open_connection("127.0.0.1", self._target)
        link.answers = answers  # a connection whose reader nobody holds is broken by asyncio
        halves = [
            asyncio.create_task(link.upstream(reader)),
            asyncio.create_task(link.downstream(answers)),
        ]
        try:
            done, _ = await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            for half in done:
                with suppress(OSError):
                    half.result()
        finally:
            for half in halves:
                half.cancel()
