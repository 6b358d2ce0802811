"""The HTTP server: uvicorn, and a bound on what one client can hold of it.

uvicorn by itself keeps a connection that sends half a head, or nothing, or that never reads its
answer, for ever. The one rule here: while no request is being answered a timer runs for the
connection, and while an answer is not taken another one does. A request that is complete and whose
answer is awaited, for seconds or as a stream for minutes, has neither and is never cut off.
"""

import asyncio
import logging
import resource
import secrets
import socket
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app import metrics
from app.errors import (
    ApiError,
    HeadersTooLarge,
    InvalidRequest,
    RequestTimeout,
    Unavailable,
    error_body,
)
from app.logs import request_id

log = logging.getLogger("baton.api")

SPARE_FILES = 256  # file descriptors that are not a client's: the pool, logs, a burst of accepts


@dataclass(frozen=True)
class Bounds:
    """What one client, and all together, may hold. Times in seconds, sizes in bytes."""

    connections: int = 4096  # 2,000 that wait and as many that ask; an idle one costs about 15 KB
    keep_alive: int = 75  # at uvicorn's 5 a client's next poll often meets a closing connection
    head_timeout: float = 10  # from the connection, or from the first byte of the next request
    # A route that reads gives up after 10 and says so (wire.py); this is for those that do not.
    body_timeout: float = 20
    write_timeout: float = 30  # a client that takes nothing for so long does not read its answer
    unsent: int = 128 * 1024  # of an answer in the kernel, beyond what is on its way
    head_size: int = 64 * 1024  # above what main.py refuses with a name, so that it can
    request_size: int = 16 * 1024 * 1024  # above what wire.py takes of a body that it refuses
    pipelined: int = 16  # requests sent ahead; each is parsed and kept, and real clients send none


def serve(app: Starlette, host: str, port: int) -> None:
    """Answer HTTP until SIGTERM or SIGINT; requests in flight get 30 s to end.

    `app.state.stopping` is an asyncio.Event, set as soon as the stop begins: a request that only
    waits ends then, so that the stop need not wait for it.
    """
    bounds = Bounds(connections=affordable(Bounds.connections))
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has stopped
        Server(app, bounds, host=host, port=port, loop="uvloop").run()


def affordable(connections: int) -> int:
    """How many of so many connections the limit of open files allows, once it is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - SPARE_FILES, 1)


class Server(uvicorn.Server):
    """uvicorn with guarded connections, and a sign to the application when it stops."""

    def __init__(self, app: Starlette, bounds: Bounds | None = None, **options: Any) -> None:
        bounds = bounds or Bounds()
        config = uvicorn.Config(
            app,
            http=Guard,
            ws="none",  # an upgraded connection would leave the guard
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=bounds.keep_alive,
            timeout_graceful_shutdown=30,
            **options,
        )
        super().__init__(config)
        self.app = app
        self.server_state = Connections(bounds)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop in order; runs on the event loop within 0.1 s of the signal."""
        self.app.state.stopping.set()
        await super().shutdown(sockets)


class Connections(ServerState):
    """What the connections of one server share."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self.bounds = bounds
        # Those without a request to answer, in the order in which they came to be so.
        self.idle: OrderedDict[Guard, None] = OrderedDict()

    def make_room(self) -> bool:
        """Close the connection that has gone longest without a request; False if none can go."""
        while self.idle:
            longest, _ = self.idle.popitem(last=False)
            if not longest.transport.is_closing():
                longest.close()
                return True
        return False


class Incoming(Enum):
    """What the next byte of a connection belongs to."""

    NOTHING = auto()  # the request before is complete
    HEAD = auto()
    BODY = auto()


class Guard(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: Connections,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.shared = server_state
        self.bounds = server_state.bounds
        self.incoming = Incoming.NOTHING
        self.received = 0  # bytes of the request that is coming in, to the size of a read
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None

    @property
    def answering(self) -> bool:
        """Is there a request whose answer is not complete? `cycle` is the newest of them."""
        return self.cycle is not None and not self.cycle.response_complete

    # --- A connection comes and goes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; at the limit it takes the place of one that asks for nothing."""
        super().connection_made(transport)
        # Or the kernel takes megabytes for a client that reads slowly or not at all, and shows no
        # progress before a third of them is gone.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # not in every Python on every system
            client = transport.get_extra_info("socket")
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self.bounds.unsent)
        full = len(self.connections) > self.bounds.connections
        if full and not self.shared.make_room():
            self._refuse(Unavailable("The server holds no more connections. Try again shortly."))
        else:
            self._now_idle()
            self._read_within(self.bounds.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over, whoever ended it."""
        super().connection_lost(exc)
        self.shared.idle.pop(self, None)
        self._read_within(None)
        self._stop_writing()

    def close(self) -> None:
        """Close once what is written has been taken."""
        self.transport.close()
        self._must_be_taken()

    def shutdown(self) -> None:
        """The server stops."""
        super().shutdown()
        if self.transport.is_closing():
            self._must_be_taken()

    def timeout_keep_alive_handler(self) -> None:
        """No next request came."""
        self.close()

    # --- What comes in

    def data_received(self, data: bytes) -> None:
        """Parse, then see to it that what is still missing comes in time and is not too much."""
        self.received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.incoming is Incoming.HEAD and self.received > self.bounds.head_size:
            kib = self.bounds.head_size // 1024
            self._refuse(HeadersTooLarge(f"The head of the request is larger than {kib} KiB."))
        elif self.received > self.bounds.request_size:
            self.close()
        elif self.reading is None:
            if self.incoming is Incoming.BODY:
                self._read_within(self.bounds.body_timeout)
            elif not self.answering:  # uvicorn has stopped its keep-alive timer for these bytes
                self._now_idle()
                self._read_within(self.bounds.head_timeout)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.incoming, self.received = Incoming.HEAD, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; after the head it is a trailer, which nobody reads and nothing would bound."""
        if self.incoming is Incoming.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """There is a request to answer."""
        self.incoming = Incoming.BODY
        self._read_within(None)
        self.shared.idle.pop(self, None)
        if len(self.pipeline) >= self.bounds.pipelined:
            self.transport.abort()
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is all there."""
        self.incoming = Incoming.NOTHING
        self._read_within(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written; uvicorn begins the next that was sent ahead, or waits for one."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._must_be_taken()
        elif not self.answering:
            self._now_idle()

    def _now_idle(self) -> None:
        self.shared.idle[self] = None
        self.shared.idle.move_to_end(self)

    def _read_within(self, seconds: float | None) -> None:
        if self.reading is not None:
            self.reading.cancel()
            self.reading = None
        if seconds is not None:
            self.reading = self.loop.call_later(seconds, self._not_received)

    def _not_received(self) -> None:
        self.reading = None
        if self.flow.read_paused:  # it is we who do not read: an earlier request is in work
            self._read_within(self.bounds.body_timeout)
        elif self.incoming is Incoming.HEAD:
            seconds = self.bounds.head_timeout
            self._refuse(RequestTimeout(f"The head of the request took longer than {seconds:g} s."))
        else:
            self.close()

    # --- What goes out

    def pause_writing(self) -> None:
        """More is written than the client takes."""
        super().pause_writing()
        self._must_be_taken()

    def resume_writing(self) -> None:
        """The client takes it."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_writing()

    def _must_be_taken(self) -> None:
        """Give up, and the memory back, when the client takes nothing of what is written."""
        if self.writing is None:
            left = self.transport.get_write_buffer_size()
            self.writing = self.loop.call_later(self.bounds.write_timeout, self._not_taken, left)

    def _not_taken(self, before: int) -> None:
        self.writing = None
        if self.transport.get_write_buffer_size() < before:
            self._must_be_taken()
        else:
            self.transport.abort()

    def _stop_writing(self) -> None:
        if self.writing is not None:
            self.writing.cancel()
            self.writing = None

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        self._refuse(InvalidRequest(msg))

    def _refuse(self, error: ApiError) -> None:
        """Say why, and close. Not in the middle of another answer, nor in its place."""
        if not self.answering:
            token = request_id.set(secrets.token_hex(8))
            body = orjson.dumps(error_body(error))
            headers = {
                **error.headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
                "X-Request-Id": request_id.get() or "",
            }
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(STATUS_LINE[error.status] + lines.encode() + b"\r\n" + body)
            metrics.requests.labels("other", "other", int(error.status)).inc()
            log.info("refused", extra={"status": int(error.status), "reason": error.sentence})
            request_id.reset(token)
        self.close()
