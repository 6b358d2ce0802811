"""What slow, greedy and silent clients can hold of the HTTP server, over real sockets."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
import pytest
from conftest import Caller, PromptServer, loopback
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from app import guard, wire
from app.guard import Bounds, Guard, Incoming, Server
from app.main import Edge

SHORT = 0.1  # seconds; a time-out that a test waits for
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HELD = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"
MIB = 1024 * 1024


@dataclass
class Client:
    """One connection, written and read byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *data: bytes) -> None:
        """Hand bytes to the kernel, as far as it takes them."""
        self.writer.writelines(data)

    async def answer(self) -> tuple[int, bytes]:
        """The next answer's status and body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def error(self) -> tuple[int, str]:
        """The next answer's status and code, and that the connection ends with it."""
        status, body = await self.answer()
        error = orjson.loads(body)
        assert error["error"].endswith(".")
        assert error["request_id"]
        assert await self.closed() == b""
        return status, error["code"]

    async def closed(self) -> bytes:
        """What came until the server ended the connection, in order or not."""
        came = b""
        try:
            while data := await self.reader.read(65_536):
                came += data
        except ConnectionResetError:
            pass
        return came

    async def drip(self, data: bytes, gap: float = SHORT / 10) -> None:
        """Send byte by byte until the server has had enough."""
        for byte in data:
            if self.writer.is_closing() or self.reader.at_eof():
                return
            self.send(bytes([byte]))
            await asyncio.sleep(gap)


@dataclass
class Running:
    """A server with an application that holds, counts and sends what it is asked for."""

    port: int
    server: Server
    app: Starlette
    started: asyncio.Event
    release: asyncio.Event
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def connections(self) -> set[Guard]:
        """What the server holds."""
        return cast(set[Guard], self.server.server_state.connections)

    async def connection(self) -> Guard:
        """The only one that the server holds, once it has accepted it."""
        await self.until(lambda: self.connections)
        [connection] = self.connections
        return connection

    async def connect(self, receive_buffer: int | None = None) -> Client:
        """A new connection, which the server has accepted."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        self.writers.append(writer)
        return Client(reader, writer)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a state of the server that sends no signal."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


def application(started: asyncio.Event, release: asyncio.Event) -> Starlette:
    """Answers at once, when it is released, with a stream, or with megabytes."""

    async def plain(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def echo(request: Request) -> Response:
        return PlainTextResponse(str(len(await wire.read_body(request, MIB))))

    async def held(request: Request) -> Response:
        started.set()
        await release.wait()
        return PlainTextResponse("released")

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await release.wait()
            yield b"last"

        return StreamingResponse(parts())

    async def much(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(int(request.query_params["mib"])):
                yield b"x" * MIB

        return StreamingResponse(parts())

    async def whole(request: Request) -> Response:
        return Response(b"x" * 8 * MIB)

    routes = [
        Route("/", plain),
        Route("/whole", whole),
        Route("/held", held, methods=["GET", "POST"]),
    ]
    routes += [Route("/echo", echo, methods=["POST"])]
    routes += [Route("/stream", stream), Route("/much", much)]
    app = Starlette(routes=routes, middleware=[Middleware(Edge)])
    app.state.stopping = asyncio.Event()
    return app


@asynccontextmanager
async def serving(kind: type[Server] = PromptServer, **bounds: Any) -> AsyncIterator[Running]:
    """A guarded server without a database."""
    started, release = asyncio.Event(), asyncio.Event()
    app = application(started, release)
    server = kind(app, Bounds(**bounds), lifespan="off")
    listener = loopback()
    running = Running(listener.getsockname()[1], server, app, started, release)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await running.until(lambda: server.started)
    try:
        yield running
    finally:
        release.set()
        for writer in running.writers:
            writer.close()
        server.should_exit = True
        if isinstance(server, PromptServer):
            server.stop()
        await task
        listener.close()


@pytest.fixture
def stop_signal() -> Iterator[None]:
    """SIGTERM is for the server only: raised again after its stop, it would end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


async def test_a_connection_that_sends_nothing_is_closed_without_a_word() -> None:
    async with serving(head_timeout=SHORT) as running:
        client = await running.connect()
        assert await client.closed() == b""


async def test_a_head_that_drips_is_answered_with_408_and_closed() -> None:
    async with serving(head_timeout=SHORT) as running:
        client = await running.connect()
        dripping = asyncio.create_task(client.drip(b"GET / HTTP/1.1\r\nX-Slow: " + b"y" * 1000))
        assert await client.error() == (408, "request_timeout")
        await dripping


async def test_a_head_that_drips_on_a_used_connection_is_closed_too() -> None:
    async with serving(head_timeout=SHORT) as running:
        client = await running.connect()
        client.send(GET)
        assert (await client.answer())[0] == 200
        dripping = asyncio.create_task(client.drip(b"GET / HTTP/1.1\r\nX-Slow: " + b"y" * 1000))
        assert await client.error() == (408, "request_timeout")
        await dripping


async def test_empty_lines_before_a_request_do_not_keep_a_connection() -> None:
    async with serving(head_timeout=SHORT) as running:
        client = await running.connect()
        client.send(GET)
        assert (await client.answer())[0] == 200
        dripping = asyncio.create_task(client.drip(b"\r\n" * 1000))
        assert await client.closed() == b""
        await dripping


async def test_a_head_of_any_size_is_refused_before_it_is_held() -> None:
    async with serving(head_size=32 * 1024) as running:
        client = await running.connect()
        client.send(b"GET / HTTP/1.1\r\nX-Large: ")
        connection = await running.connection()
        await running.until(lambda: connection.incoming is Incoming.HEAD)
        client.send(b"y" * 33_000)
        assert await client.error() == (431, "headers_too_large")


async def test_trailers_are_not_kept() -> None:
    async with serving() as running:
        client = await running.connect()
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        client.send(*[b"X-%d: y\r\n" % number for number in range(1000)], b"\r\n")
        assert (await client.answer())[0] == 405
        assert len((await running.connection()).headers) == 2


async def test_a_body_that_drips_to_a_route_that_does_not_read_it_is_cut_off() -> None:
    async with serving(body_timeout=SHORT) as running:
        client = await running.connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        dripping = asyncio.create_task(client.drip(b"y" * 1000))
        assert (await client.answer())[0] == 200
        assert await client.closed() == b""
        await dripping


async def test_a_body_that_drips_to_a_route_that_reads_it_is_answered_with_408(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "BODY_TIMEOUT", SHORT)
    async with serving() as running:
        client = await running.connect()
        client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        dripping = asyncio.create_task(client.drip(b"y" * 1000))
        assert await client.error() == (408, "request_timeout")
        await dripping


async def test_a_body_has_more_time_than_a_head() -> None:
    async with serving(head_timeout=SHORT) as running:
        client = await running.connect()
        client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbo")
        connection = await running.connection()
        await running.until(lambda: connection.incoming is Incoming.BODY)
        for _ in range(2):
            assert await (await running.connect()).closed() == b""  # the time of a head is over
        client.send(b"dy")
        assert await client.answer() == (200, b"4")


async def test_a_body_larger_than_any_route_takes_ends_the_connection() -> None:
    async with serving(request_size=MIB) as running:
        client = await running.connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.send(b"y" * 2 * MIB)
        assert await client.closed() == b""


async def test_a_connection_is_kept_for_the_next_request_and_closed_when_none_comes() -> None:
    async with serving(keep_alive=SHORT, head_timeout=60) as running:
        client = await running.connect()
        for _ in range(5):
            client.send(GET)
            assert await client.answer() == (200, b"ok")
        body = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
        client.send(body[:-2])
        connection = await running.connection()
        await running.until(lambda: connection.incoming is Incoming.BODY)
        client.send(body[-2:])
        assert await client.answer() == (200, b"4")
        assert await client.closed() == b""


async def test_a_request_that_waits_outlives_every_time_out() -> None:
    times = ("keep_alive", "head_timeout", "body_timeout", "write_timeout")
    short: dict[str, Any] = dict.fromkeys(times, SHORT)
    async with serving(**short) as running:
        posting = await running.connect()
        posting.send(HELD.replace(b"GET", b"POST")[:-2] + b"Content-Length: 4\r\n\r\nbo")
        connection = await running.connection()
        await running.until(lambda: connection.reading)
        posting.send(b"dy")  # nothing of it is late any more
        waiting, streaming, ahead = [await running.connect() for _ in range(3)]
        waiting.send(HELD)
        streaming.send(HELD.replace(b"/held", b"/stream"))
        # Half a request sent ahead is not late before the first has been answered.
        ahead.send(HELD, b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbo")
        silent = await running.connect()
        assert await silent.closed() == b""  # the time-outs are over
        silent = await running.connect()
        assert await silent.closed() == b""
        running.release.set()
        assert await posting.answer() == await waiting.answer() == (200, b"released")
        assert b"last" in await streaming.reader.readuntil(b"last")
        assert await ahead.answer() == (200, b"released")
        ahead.send(b"dy")
        assert await ahead.answer() == (200, b"4")


async def test_requests_sent_ahead_are_answered_in_order_and_too_many_are_not_kept() -> None:
    async with serving(pipelined=4) as running:
        client = await running.connect()
        client.send(HELD, GET, GET)
        await running.started.wait()
        running.release.set()
        assert [await client.answer() for _ in range(3)] == [
            (200, b"released"),
            (200, b"ok"),
            (200, b"ok"),
        ]
        running.release.clear()
        greedy = await running.connect()
        greedy.send(HELD, GET * 5)
        assert await greedy.closed() == b""


async def test_a_client_that_does_not_read_is_dropped() -> None:
    async with serving(write_timeout=SHORT) as running:
        client = await running.connect(receive_buffer=4096)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(b"GET /much?mib=64 HTTP/1.1\r\nHost: x\r\n\r\n")
        connection = await running.connection()
        await running.until(lambda: connection.flow.write_paused)
        assert connection.transport.get_write_buffer_size() < 2 * MIB
        await running.until(lambda: not running.connections)
        await running.until(lambda: not running.server.server_state.tasks)


async def test_a_client_that_does_not_read_the_end_is_dropped_although_it_is_closing() -> None:
    async with serving(write_timeout=SHORT) as running:
        client = await running.connect(receive_buffer=4096)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(b"GET /whole HTTP/1.0\r\n\r\n")
        connection = await running.connection()
        await running.until(connection.transport.is_closing)
        assert connection.cycle.response_complete
        await running.until(lambda: not running.connections)


async def test_a_client_that_reads_slowly_gets_all_of_it() -> None:
    async with serving(write_timeout=0.4) as running:
        client = await running.connect(receive_buffer=65_536)
        client.send(b"GET /much?mib=8 HTTP/1.0\r\n\r\n")
        connection = await running.connection()
        await running.until(lambda: connection.writing)
        left, timer = connection.transport.get_write_buffer_size(), connection.writing
        got = 0
        while connection.transport.get_write_buffer_size() == left:
            got += len(await client.reader.read(4096))
        await running.until(lambda: connection.writing is not timer)  # it has been looked at
        got += len(await client.closed())
        assert got > 8 * MIB


async def test_at_the_limit_a_new_client_takes_the_place_of_the_longest_idle() -> None:
    async with serving(connections=4) as running:
        waiting = await running.connect()
        waiting.send(HELD)
        await running.started.wait()
        used, dripping, silent = [await running.connect() for _ in range(3)]
        used.send(GET)
        dripping.send(b"GET / HT")
        assert await used.answer() == (200, b"ok")  # so it is idle for less long than `dripping`
        fresh = await running.connect()
        fresh.send(GET)
        assert await fresh.answer() == (200, b"ok")
        assert await dripping.closed() == b""
        fresh.send(GET)
        used.send(GET)
        assert await fresh.answer() == await used.answer() == (200, b"ok")
        running.release.set()
        assert await waiting.answer() == (200, b"released")


async def test_when_every_connection_is_waiting_for_an_answer_a_new_one_is_refused() -> None:
    async with serving(connections=2) as running:
        first, second = await running.connect(), await running.connect()
        for client in (first, second):
            client.send(HELD)
            await running.started.wait()
            running.started.clear()
        assert await (await running.connect()).error() == (503, "unavailable")
        running.release.set()
        assert await first.answer() == await second.answer() == (200, b"released")


async def test_what_is_not_http_is_refused_in_the_shape_of_every_error() -> None:
    async with serving() as running:
        client = await running.connect()
        client.send(b"hello\r\n\r\n")
        assert await client.error() == (400, "invalid_request")


async def test_garbage_behind_a_request_is_not_answered_in_its_place() -> None:
    async with serving() as running:
        client = await running.connect()
        client.send(HELD)
        await running.started.wait()
        client.send(b"hello\r\n\r\n")
        assert await client.closed() == b""


def test_clients_get_the_files_that_the_system_allows_less_those_we_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: raised.append(given))

    def allowed(soft: int, hard: int) -> int:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        return guard.affordable(4096)

    assert allowed(1024, 100_000) == 4096
    assert allowed(1024, 2048) == 2048 - guard.SPARE_FILES
    assert allowed(256, resource.RLIM_INFINITY) == 4096
    assert raised == [(4352, 100_000), (2048, 2048), (4352, resource.RLIM_INFINITY)]
    assert allowed(65_536, 100_000) == allowed(*[resource.RLIM_INFINITY] * 2) == 4096
    assert len(raised) == 3  # it never lowers one


async def test_slow_clients_do_not_make_the_requests_of_another_fail() -> None:
    async with serving(head_timeout=SHORT, body_timeout=SHORT, connections=100) as running:
        sorts = b"GET / HT", b"POST /echo HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b""
        slow = [await running.connect() for _ in range(150)]
        for number, client in enumerate(slow):
            client.send(sorts[number % 3])
        healthy = await running.connect()
        for _ in range(50):
            healthy.send(GET)
            assert await healthy.answer() == (200, b"ok")
        await running.until(lambda: len(running.connections) == 1)


async def test_a_stop_is_announced_so_that_waiting_requests_can_end_and_it_waits_for_them(
    stop_signal: None,
) -> None:
    async with serving(Server) as running:
        client, idle = await running.connect(), await running.connect()
        client.send(HELD)
        await running.started.wait()
        assert not running.app.state.stopping.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await running.app.state.stopping.wait()
        assert await idle.closed() == b""
        running.release.set()
        assert await client.answer() == (200, b"released")
        assert await client.closed() == b""


async def test_a_stop_ends_the_streams_of_jobs_that_have_not_ended(
    app: Starlette, caller: Caller
) -> None:
    job_id = await caller.submit()
    headers = {"Accept": "text/event-stream"}
    async with caller.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        lines = answer.aiter_lines()
        async for line in lines:  # what there is so far; then the server waits
            if line.startswith("data:"):
                break
        app.state.stopping.set()
        async for _ in lines:
            pass
