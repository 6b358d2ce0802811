"""A POST to an address that a stranger chose.

It hides name resolution, TLS and HTTP/1.1. The one rule: a name is resolved once, every address of
it must be public or allowed by the operator, and the connection goes to exactly the address that
was judged. So neither a name that changes its mind, nor an odd spelling of 127.0.0.1, nor a
redirect, which is never followed, nor a proxy of the environment leads into the network here.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import urlsplit

import httpcore

TIMEOUT = 15.0  # seconds for all of it: name, connection, request, head of the answer
REST_TIMEOUT = 1.0  # seconds more for the body of the answer, which tells us nothing
REST_LIMIT = 4096  # bytes of it
# Threads. A dead name server holds one for seconds, and the event loop's own few must stay free for
# the name of the database.
RESOLVERS = 32
ADDRESSES = 4  # of a name that are tried, one after the other

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# What `is_global` of the standard library calls global in some of its versions and is not, or is
# the metadata service of a cloud at a public address (168.63.129.16).
_NOT_PUBLIC = tuple(
    map(ip_network, ("0.0.0.0/8", "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"))
)
_UNICAST = ip_network("2000::/3")  # all that is global in IPv6; the rest is local or reserved
_NOT_UNICAST = tuple(map(ip_network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_NAT64 = ip_network("64:ff9b::/96")


class Undelivered(Exception):
    """There is no answer; the message is a sentence for the person who owns the receiver. It names
    no address: where a name leads inside this network is nobody's business."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a receiver said, as far as we listen."""

    status: int
    retry_after: float | None = None  # seconds, when it asked to wait


class Outbound:
    """Sends requests out.

    Args:
        allowed: networks that may be reached although they are not public.
        resolve: addresses of a host and port; they are asked for once a request.
    """

    def __init__(self, allowed: Iterable[Network] = (), resolve: Resolve | None = None) -> None:
        self._threads = ThreadPoolExecutor(RESOLVERS, "resolver")
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpcore.default_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,  # each request is judged anew
            network_backend=_Guarded(tuple(allowed), resolve or self._resolve),
        )

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send one request and read the head of the answer.

        Raises:
            Undelivered: there is none.
        """
        try:
            async with asyncio.timeout(TIMEOUT):
                return await self._post(url, headers, body)
        except TimeoutError:
            raise Undelivered(f"No answer within {TIMEOUT:.0f} s.") from None
        except httpcore.ProtocolError:
            raise Undelivered("The answer was not HTTP, or was cut short.") from None
        except (httpcore.NetworkError, httpcore.TimeoutException, OSError) as error:
            raise Undelivered(_why(error)) from None

    def close(self) -> None:
        """Start no more look-ups of names."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        request = httpcore.Request(
            "POST",
            httpcore.URL(
                scheme=parts.scheme.lower(),
                host=parts.hostname or "",
                port=parts.port,
                target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            ),
            headers=[("Host", host), ("Content-Length", str(len(body))), *headers.items()],
            content=body,
        )
        response = await self._pool.handle_async_request(request)
        try:
            answer = Answer(response.status, _retry_after(response.headers))
            with suppress(TimeoutError, httpcore.NetworkError, httpcore.ProtocolError):
                async with asyncio.timeout(REST_TIMEOUT):
                    await _read_a_little(response)
            return answer
        finally:
            await response.aclose()

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(sockaddr[0]) for *_, sockaddr in found]


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to a judged address; TLS still asks for the name."""

    def __init__(self, allowed: Sequence[Network], resolve: Resolve) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = list(dict.fromkeys(await self._resolve(host, port)))
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise Undelivered(f"{host} does not resolve to an address.")
        if not all(permitted(ip_address(address), self._allowed) for address in found):
            raise Undelivered(f"{host} leads to an address that is not public.")
        for address in found[:ADDRESSES]:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address)
            except httpcore.ConnectError as error:
                failed = error
        raise failed

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


def permitted(address: Address, allowed: Iterable[Network] = ()) -> bool:
    """May a request go to this address?"""
    if any(address in network for network in allowed):
        return True
    if isinstance(address, IPv4Address):
        return (
            address.is_global
            and not address.is_multicast
            and not address.is_reserved
            and not any(address in network for network in _NOT_PUBLIC)
        )
    inside = _embedded(address)
    if inside:
        return all(permitted(each, allowed) for each in inside)
    return (
        address in _UNICAST
        and address.is_global
        and not any(address in network for network in _NOT_UNICAST)
    )


def _embedded(address: IPv6Address) -> Sequence[IPv4Address]:
    """The IPv4 addresses to which a gateway would pass what is sent to this one."""
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address.sixtofour:
        return [address.sixtofour]
    if address in _NAT64:
        return [IPv4Address(int(address) & 0xFFFFFFFF)]
    return ()


async def _read_a_little(response: httpcore.Response) -> None:
    """Let the receiver finish, so that it does not log a broken connection for a good delivery."""
    assert not isinstance(response.stream, bytes)
    size = 0
    async for chunk in response.aiter_stream():
        size += len(chunk)
        if size > REST_LIMIT:
            return


def _retry_after(headers: Sequence[tuple[bytes, bytes]]) -> float | None:
    """Seconds; the header is a number or a date."""
    for name, value in headers:
        if name.lower() == b"retry-after":
            text = value.decode("latin-1").strip()
            if text.isascii() and text.isdigit():
                return float(text[:9])
            with suppress(ValueError, TypeError, OverflowError):
                at = parsedate_to_datetime(text)
                return max(
                    0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
                )
    return None


def _why(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"The certificate is not trusted: {cause.verify_message}."
        if isinstance(cause, ssl.SSLError):
            return "The TLS handshake failed."
        if isinstance(cause, ConnectionRefusedError):
            return "The connection was refused."
        cause = cause.__cause__ or cause.__context__
    return "The connection failed or was cut."
