"""A POST to wherever a stranger says goes to public addresses only, and says why it did not."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from chaos.receiver import Receiver, answer, receiving

from tasks import outbound
from tasks.outbound import Answer, Outbound, Undelivered, permitted

LOOPBACK = (ip_network("127.0.0.0/8"),)
NOT_PUBLIC = """
127.0.0.1 127.255.0.1 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1
169.254.169.254 100.64.0.1 100.100.100.200 192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1
198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0:7f00:1
64:ff9b::127.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::1 2002:7f00:1::1 2002:a00:1::
2002:a9fe:a9fe::1 fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1 100::1 2001::1
2001:db8::1 3fff::1 5f00::1
"""
PUBLIC = "8.8.8.8 93.184.216.34 2001:4860:4860::8888 2606:4700::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8"
THIS_MACHINE = """
localhost localhost. 127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 0 0.0.0.0 [::1] [::]
[::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:127.0.0.1]
"""


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def refusal(out: Outbound, url: str) -> str:
    with pytest.raises(Undelivered) as caught:
        await out.post(url, {}, b"{}")
    return str(caught.value)


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not permitted(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC.split())
def test_a_public_address_is_permitted(address: str) -> None:
    assert permitted(ip_address(address))


def test_an_operator_allows_networks_and_nothing_beside_them() -> None:
    allowed = (ip_network("10.1.0.0/16"), ip_network("fd12::/16"))
    inside = ("10.1.2.3", "::ffff:10.1.2.3", "fd12::5", "8.8.8.8")
    assert all(permitted(ip_address(a), allowed) for a in inside)
    assert not any(
        permitted(ip_address(a), allowed) for a in ("10.2.0.1", "::ffff:10.2.0.1", "::1")
    )


@pytest.mark.parametrize("host", THIS_MACHINE.split())
async def test_no_spelling_of_this_machine_is_reached(receiver: Receiver, host: str) -> None:
    said = await refusal(Outbound(), receiver.url(host=host))
    assert said.endswith(
        ("leads to an address that is not public.", "does not resolve to an address.")
    )
    assert "127.0.0.1" not in said.removeprefix(host.strip("[]"))
    assert receiver.got == []


async def test_a_spelling_of_an_allowed_address_is_reached(receiver: Receiver) -> None:
    sent = await Outbound(LOOPBACK).post(receiver.url("/a?b=c", "2130706433"), {"x-y": "z"}, b"{}")
    assert sent == Answer(204)
    [got] = receiver.got
    assert (got.target, got.body, got.headers["x-y"]) == ("/a?b=c", b"{}", "z")
    assert got.headers["host"] == f"2130706433:{receiver.port}"


async def test_a_name_that_changes_its_mind_is_asked_once_and_leads_nowhere_else() -> None:
    # 127.0.0.2 stands for a public address, 127.0.0.1 for what must not be reached.
    answers = [["127.0.0.2"], ["127.0.0.1"], ["127.0.0.1"]]
    asked = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers.pop(0)

    async with receiving("127.0.0.2") as outside, receiving(port=outside.port) as inside:
        out = Outbound((ip_network("127.0.0.2/32"),), rebinding)
        await out.post(outside.url(host="rebind.example"), {}, b"{}")
        assert (len(outside.got), asked) == (1, ["rebind.example"])
        said = await refusal(out, outside.url(host="rebind.example"))
        assert said == "rebind.example leads to an address that is not public."
        assert (len(outside.got), inside.got, len(asked)) == (1, [], 2)


async def test_one_address_that_is_not_public_condemns_a_name(receiver: Receiver) -> None:
    async def both(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]

    said = await refusal(
        Outbound((ip_network("127.0.0.1"),), both), receiver.url(host="two.example")
    )
    assert said == "two.example leads to an address that is not public."
    assert receiver.got == []


async def test_the_next_address_of_a_name_is_tried(receiver: Receiver) -> None:
    async def two(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.9", "127.0.0.1"]  # nobody listens at the first one

    assert await Outbound(LOOPBACK, two).post(receiver.url(host="two.example"), {}, b"") == Answer(
        204
    )


async def test_a_redirect_inward_is_an_answer_and_is_not_followed(receiver: Receiver) -> None:
    async with receiving() as inside:
        receiver.otherwise = answer(302, location=inside.url("/latest/meta-data"))
        assert (await Outbound(LOOPBACK).post(receiver.url(), {}, b"{}")).status == 302
        assert (len(receiver.got), inside.got) == (1, [])


async def test_a_proxy_of_the_environment_is_not_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await Outbound(LOOPBACK).post(receiver.url(), {}, b"{}")).status == 204


async def test_a_silent_receiver_is_given_up(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "TIMEOUT", 0.2)
    receiver.otherwise = None
    assert await refusal(Outbound(LOOPBACK), receiver.url()) == "No answer within 0 s."


async def test_a_name_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "TIMEOUT", 0.1)

    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    said = await refusal(Outbound(resolve=never), "http://slow.example/")
    assert said == "No answer within 0 s."


@pytest.mark.parametrize("rest", [b"x" * 1_000_000, b"x"])
async def test_the_body_of_an_answer_is_neither_waited_for_nor_read_to_its_end(
    receiver: Receiver, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "REST_TIMEOUT", 0.1)
    receiver.otherwise = b"HTTP/1.1 200 OK\r\nContent-Length: 900000000\r\n\r\n" + rest
    assert await Outbound(LOOPBACK).post(receiver.url(), {}, b"{}") == Answer(200)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"220 smtp.example ESMTP\r\n", "The answer was not HTTP, or was cut short."),
        (b"", "The answer was not HTTP, or was cut short."),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000, "The answer was not HTTP, or was cut short."),
    ],
)
async def test_what_is_no_answer_is_told_in_a_sentence(
    receiver: Receiver, raw: bytes, said: str
) -> None:
    receiver.otherwise = raw
    assert await refusal(Outbound(LOOPBACK), receiver.url()) == said


async def test_nobody_there_is_told_in_a_sentence(receiver: Receiver) -> None:
    out = Outbound(LOOPBACK)
    assert await refusal(out, "http://127.0.0.1:9/") == "The connection was refused."
    assert (await refusal(out, "http://no-such-name.invalid/")).startswith(
        "no-such-name.invalid does"
    )


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("30", 30.0), ("0", 0.0), ("soon", None), ("-5", None), ("9" * 40, 999999999.0), ("", None)],
)
async def test_the_time_to_wait_is_read(receiver: Receiver, value: str, seconds: float) -> None:
    receiver.otherwise = answer(503, retry_after=value)
    assert await Outbound(LOOPBACK).post(receiver.url(), {}, b"") == Answer(503, seconds)


async def test_the_time_to_wait_can_be_a_date(receiver: Receiver) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    receiver.otherwise = answer(503, retry_after=format_datetime(at, usegmt=True))
    got = (await Outbound(LOOPBACK).post(receiver.url(), {}, b"")).retry_after
    assert got is not None and 3500 < got <= 3600


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for hooks.example, its key with it."""
    path = tmp_path_factory.mktemp("tls") / "hooks.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=hooks"
    subprocess.run(
        ["openssl", *made.split(), "-addext", "subjectAltName=DNS:hooks.example",
         "-keyout", path, "-out", path.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


async def test_the_certificate_has_to_be_of_the_name_not_of_the_address(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)

    async def here(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async with receiving(ssl=context) as receiver:
        url = receiver.url(host="hooks.example").replace("http:", "https:")
        said = await refusal(Outbound(LOOPBACK, here), url)
        assert said.startswith("The certificate is not trusted: self")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        out = Outbound(LOOPBACK, here)
        assert await out.post(url, {}, b"{}") == Answer(204)
        said = await refusal(out, url.replace("hooks.example", "other.example"))
        assert said.startswith("The certificate is not trusted: Hostname mismatch")
        assert asked == ["hooks.example", "hooks.example", "other.example"]
        assert len(receiver.got) == 1
