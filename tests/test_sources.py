"""Each source proves its deliveries as it documents; nothing else gets in, all is refused alike.

The signatures of the first section are those that the sources publish; the others are made here, as
their documents say, and not with app/sources.py.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import pytest

from app.sources import (
    LIMIT,
    SENDERS,
    WINDOW,
    Incoming,
    Malformed,
    Unverified,
    new_secret,
    read_body,
    sender,
)

NOW = 1_780_000_000
OTHER = new_secret()
REFUSED = "The signature or token of this delivery is missing or wrong."


def mac(secret: str | bytes, message: bytes, algorithm: str = "sha256") -> hmac.HMAC:
    key = secret.encode() if isinstance(secret, str) else secret
    return hmac.new(key, message, algorithm)


def standard(secret: str, raw: bytes, now: int, prefix: str = "webhook") -> dict[str, str]:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = mac(key, b"msg_1.%d.%s" % (now, raw)).digest()
    return {
        f"{prefix}-id": "msg_1",
        f"{prefix}-timestamp": str(now),
        f"{prefix}-signature": "v1," + base64.b64encode(digest).decode(),
    }


@dataclass(frozen=True)
class Case:
    """How a source signs: headers of a secret, a body and a time."""

    source: str
    sign: Callable[[str, bytes, int], dict[str, str]]
    needs: tuple[str, ...]  # each of these headers must be there
    timed: bool = False  # signs the time
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    delivery_id: str | None = None  # None: the SHA-256 of the body
    event: str | None = None
    secret: str = field(default_factory=new_secret)
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.source

    def incoming(self, *secrets: str, at: int = NOW) -> Incoming:
        raw = json.dumps(self.body).encode()
        headers = {"content-type": "application/json", **self.headers}
        headers |= self.sign(self.secret, raw, at)
        return Incoming(headers, raw, {}, secrets or (self.secret,), NOW)


def slack_signature(secret: str, raw: bytes, now: int) -> dict[str, str]:
    signature = "v0=" + mac(secret, b"v0:%d:%s" % (now, raw)).hexdigest()
    return {"x-slack-request-timestamp": str(now), "x-slack-signature": signature}


CASES = [
    Case(
        "github",
        lambda secret, raw, now: {"x-hub-signature-256": f"sha256={mac(secret, raw).hexdigest()}"},
        needs=("x-hub-signature-256",),
        headers={"x-github-event": "issues", "x-github-delivery": "72d3162e-cc78-11e3-81ab-4c93"},
        body={"action": "opened"},
        delivery_id="72d3162e-cc78-11e3-81ab-4c93",
        event="issues",
    ),
    Case(
        "slack",
        slack_signature,
        needs=("x-slack-request-timestamp", "x-slack-signature"),
        timed=True,
        body={"type": "event_callback", "event_id": "Ev0PV52K25", "event": {"type": "message"}},
        delivery_id="Ev0PV52K25",
        event="message",
    ),
    Case(
        "netlify",
        standard,
        needs=("webhook-id", "webhook-timestamp", "webhook-signature"),
        timed=True,
        delivery_id="msg_1",
        name="generic, signed",
    ),
    Case(
        "netlify",
        lambda secret, raw, now: {"authorization": f"Bearer {secret}"},
        needs=("authorization",),
        name="generic, bearer",
    ),
    Case(
        "netlify",
        lambda secret, raw, now: {
            "authorization": "Basic " + base64.b64encode(f"baton:{secret}".encode()).decode()
        },
        needs=("authorization",),
        name="generic, basic",
    ),
]
every_source = pytest.mark.parametrize("case", CASES, ids=str)


def refused(case: Case, incoming: Incoming) -> None:
    with pytest.raises(Unverified) as caught:
        sender(case.source).verify(incoming)
    assert str(caught.value) == REFUSED


# --- Signatures that the sources publish ----------------------------------------------------


def test_the_signature_that_github_documents_is_right() -> None:
    documented = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    headers = {"x-hub-signature-256": documented}
    secret = "It's a Secret to Everybody"
    sender("github").verify(Incoming(headers, b"Hello, World!", {}, [secret], NOW))


def test_the_signature_that_slack_documents_is_right() -> None:
    raw = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow"
        b"&channel_id=G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner"
        b"&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands"
        b"%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    )
    headers = {
        "content-type": "application/x-www-form-urlencoded",
        "x-slack-request-timestamp": "1531420618",
        "x-slack-signature": (
            "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"
        ),
    }
    incoming = Incoming(headers, raw, {}, ["8f742231b10e8888abcd99yyyzzz85a5"], 1531420618 + WINDOW)
    sender("slack").verify(incoming)
    checked = sender("slack").delivery(incoming)
    assert checked.delivery_id == "398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    with pytest.raises(Unverified):
        sender("slack").verify(replace(incoming, now=1531420618 + WINDOW + 1))


def test_the_signature_that_standard_webhooks_document_is_right() -> None:
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    raw = b'{"test": 2432232314}'
    sender("netlify").verify(Incoming(headers, raw, {}, [secret], 1614265330))


# --- For each source ------------------------------------------------------------------------


@every_source
def test_what_a_source_signs_is_taken_and_told_apart(case: Case) -> None:
    incoming = case.incoming()
    of_source = sender(case.source)
    assert of_source.challenge(incoming) is None
    of_source.verify(incoming)
    checked = of_source.delivery(incoming)
    assert checked.delivery_id == (case.delivery_id or hashlib.sha256(incoming.raw).hexdigest())
    assert checked.event == case.event


@every_source
def test_another_secret_proves_nothing(case: Case) -> None:
    refused(case, case.incoming(OTHER))


@every_source
def test_no_secret_proves_nothing(case: Case) -> None:
    refused(case, replace(case.incoming(), secrets=[]))
    unkeyed = replace(case, secret="").sign
    if case.source != "netlify":  # the key of Standard Webhooks cannot be empty
        incoming = case.incoming()
        headers = {**incoming.headers, **unkeyed("", incoming.raw, NOW)}
        refused(case, replace(incoming, headers=headers, secrets=[""]))


@every_source
def test_a_changed_body_is_refused_where_the_body_is_signed(case: Case) -> None:
    incoming = case.incoming()
    changed = replace(incoming, raw=incoming.raw + b" ")
    if case.sign(case.secret, b"1", NOW) == case.sign(case.secret, b"2", NOW):
        sender(case.source).verify(changed)  # a token: it proves who sends, not what
    else:
        refused(case, changed)


@every_source
def test_each_header_of_the_proof_is_needed(case: Case) -> None:
    incoming = case.incoming()
    for name in case.needs:
        without = {key: value for key, value in incoming.headers.items() if key != name}
        refused(case, replace(incoming, headers=without))
        for wrong in ("", "x", "v1,", "sha256=", "ü", "1" * 400):
            refused(case, replace(incoming, headers=without | {name: wrong}))


@pytest.mark.parametrize("case", [case for case in CASES if case.timed], ids=str)
def test_what_was_signed_long_ago_is_refused(case: Case) -> None:
    verify = sender(case.source).verify
    for near in (NOW - WINDOW, NOW + WINDOW):
        verify(case.incoming(at=near))
    for far in (NOW - WINDOW - 1, NOW + WINDOW + 1, 0):
        refused(case, case.incoming(at=far))


@every_source
def test_a_rotated_secret_is_good_beside_the_current_one(case: Case) -> None:
    sender(case.source).verify(case.incoming(OTHER, case.secret))
    sender(case.source).verify(case.incoming(case.secret, OTHER))


@every_source
def test_nothing_secret_is_kept_or_shown(case: Case) -> None:
    incoming = case.incoming()
    proof = set(case.sign(case.secret, incoming.raw, NOW).values())
    checked = sender(case.source).delivery(incoming)
    for shown in (repr(checked), repr(Unverified())):
        assert case.secret not in shown
    assert not {each for each in proof if len(each) > 20} & set(checked.headers.values())
    assert case.secret not in repr(replace(incoming, headers={}))


@every_source
def test_what_is_no_json_is_malformed(case: Case) -> None:
    incoming = case.incoming()
    for raw in (b"", b"{", b"\xff", b'"text"', b"NaN", b"[" * 5000):
        with pytest.raises(Malformed):
            sender(case.source).delivery(replace(incoming, raw=raw))


def test_every_source_says_where_its_secret_goes() -> None:
    for each in [*SENDERS.values(), sender("anything else")]:
        assert each.advice.endswith(".") and "secret" in each.advice.lower()
        assert each.limit >= LIMIT


# --- What is told apart ---------------------------------------------------------------------


def told(source: str, body: Any, headers: Mapping[str, str] = {}) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    return sender(source).delivery(Incoming(headers, raw, {}, [], NOW))


def malformed(source: str, body: Any, headers: Mapping[str, str] = {}) -> str:
    with pytest.raises(Malformed) as caught:
        told(source, body, headers)
    return str(caught.value)


def test_github_may_send_forms() -> None:
    headers = {
        "content-type": "application/x-www-form-urlencoded",
        "x-github-event": "ping",
    }
    raw = urlencode({"payload": '{"zen": "Design for failure."}'}).encode()
    assert told("github", raw, headers).event == "ping"
    assert read_body(headers, raw) == {"zen": "Design for failure."}
    assert malformed("github", b"payload=%7B", headers) == "The body is not valid JSON."


def test_github_names_its_event() -> None:
    assert malformed("github", {}) == "X-GitHub-Event: this header is required."
    assert malformed("github", [], {"x-github-event": "push"}) == "The body must be a JSON object."


def test_an_id_that_does_not_fit_is_replaced_by_the_hash_of_the_body() -> None:
    for wrong in ("x" * 301, "a\0b", "a\nb"):
        body = {"type": "event_callback", "event_id": wrong, "event": {"type": "message"}}
        raw = json.dumps(body).encode()
        assert told("slack", raw).delivery_id == hashlib.sha256(raw).hexdigest()


def test_slack_is_answered_its_challenge_only_when_it_is_proven() -> None:
    body = {"token": "x", "challenge": "3eZbrw1aBm2rZgRNFdxV2595", "type": "url_verification"}
    incoming = next(replace(case, body=body) for case in CASES if case.source == "slack").incoming()
    answer = sender("slack").challenge(incoming)
    assert answer and json.loads(answer.body) == {"challenge": "3eZbrw1aBm2rZgRNFdxV2595"}
    with pytest.raises(Unverified):
        sender("slack").challenge(replace(incoming, secrets=[OTHER]))


def test_slack_says_what_it_sends() -> None:
    assert malformed("slack", {}) == "type: is required."
    assert malformed("slack", {"type": "event_callback"}) == "event: is required."
    assert malformed("slack", {"type": "event_callback", "event": {"type": "message"}}) == (
        "event_id: is required."
    )


EVENT = {"specversion": "1.0", "id": "1", "source": "/acme", "type": "com.acme.made"}


def test_a_cloud_event_is_told_by_its_source_and_id_however_it_is_sent() -> None:
    binary = {f"ce-{name}": value for name, value in EVENT.items()}
    structured = {"content-type": "application/cloudevents+json; charset=utf-8"}
    found = [told("heroku", {"a": 1}, binary), told("heroku", EVENT, structured)]
    assert [(each.delivery_id, each.event) for each in found] == [("/acme 1", EVENT["type"])] * 2
    assert found[0].headers["ce-id"] == "1"
    text = binary | {"content-type": "text/plain"}
    assert told("heroku", b"no json", text).delivery_id == "/acme 1"
    assert read_body(text, b"no json") == "no json"


def test_a_cloud_event_that_lacks_an_attribute_is_named() -> None:
    structured = {"content-type": "application/cloudevents+json"}
    batch = {"content-type": "application/cloudevents-batch+json"}
    assert malformed("heroku", EVENT | {"specversion": "0.3"}, structured) == (
        "specversion: must be 1.0."
    )
    assert malformed("heroku", [EVENT, EVENT | {"id": ""}], batch) == "[1].id: is required."
    assert malformed("heroku", {}, {"ce-specversion": "1.0"}) == "ce-id: is required."
    assert told("heroku", [EVENT], batch).event is None


def test_the_token_may_be_in_the_query_of_a_source_that_can_do_no_better() -> None:
    secret = new_secret()
    incoming = Incoming({}, b"{}", {"access_token": secret}, [secret], NOW)
    sender("heroku").verify(incoming)
    with pytest.raises(Unverified):
        sender("heroku").verify(replace(incoming, query={"access_token": OTHER}))
    with pytest.raises(Unverified):
        sender("github").verify(incoming)
