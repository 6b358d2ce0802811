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
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.sources import (
    DISCORD_WINDOW,
    LIMIT,
    LINEAR_WINDOW,
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
PAGERDUTY = Path(__file__).parent / "pagerduty_signed.json"
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


Sign = Callable[[str, bytes, int], dict[str, str]]


@dataclass(frozen=True)
class Case:
    """How a source signs: headers of a secret, a body and a time."""

    source: str
    sign: Sign
    needs: tuple[str, ...]  # each of these headers must be there
    body: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] = field(default_factory=dict)
    window: int | None = None  # seconds, where the time is signed
    headers: Mapping[str, str] = field(default_factory=dict)
    delivery_id: str | None = None  # None: the SHA-256 of the body
    event: str | None = None
    secrets: Callable[[], str] = new_secret
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.source

    @cached_property
    def secret(self) -> str:
        return self.secrets()

    @cached_property
    def other(self) -> str:
        return self.secrets()

    def incoming(self, *secrets: str, at: int = NOW) -> Incoming:
        body = self.body(at) if callable(self.body) else self.body
        raw = json.dumps(body).encode()
        headers = {"content-type": "application/json", **self.headers}
        headers |= self.sign(self.secret, raw, at)
        return Incoming(headers, raw, {}, secrets or (self.secret,), NOW)


def slack_signature(secret: str, raw: bytes, now: int) -> dict[str, str]:
    signature = "v0=" + mac(secret, b"v0:%d:%s" % (now, raw)).hexdigest()
    return {"x-slack-request-timestamp": str(now), "x-slack-signature": signature}


def hub(name: str, prefix: str = "sha256=", algorithm: str = "sha256") -> Sign:
    """The hexadecimal HMAC of the body in a header, which most do."""
    return lambda secret, raw, now: {name: prefix + mac(secret, raw, algorithm).hexdigest()}


def linear_body(now: int) -> dict[str, Any]:
    return {"type": "Issue", "action": "create", "webhookTimestamp": now * 1000 + 999}


def buildkite_signature(secret: str, raw: bytes, now: int) -> dict[str, str]:
    signature = mac(secret, b"%d.%s" % (now, raw)).hexdigest()
    return {"x-buildkite-signature": f"timestamp={now},signature={signature}"}


def grafana_signature(secret: str, raw: bytes, now: int) -> dict[str, str]:
    return {
        "x-grafana-alerting-signature": mac(secret, b"%d:%s" % (now, raw)).hexdigest(),
        "x-grafana-alerting-timestamp": str(now),
    }


def bearer(secret: str, raw: bytes, now: int) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def basic(secret: str, raw: bytes, now: int) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"baton:{secret}".encode()).decode()}


# A key of its own for each application; the public half is what we are given.
DISCORD_KEYS: dict[str, Ed25519PrivateKey] = {}


def discord_key() -> str:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    DISCORD_KEYS[public] = key
    return public


def discord_signature(secret: str, raw: bytes, now: int) -> dict[str, str]:
    key = DISCORD_KEYS.get(secret)
    signature = key.sign(b"%d%s" % (now, raw)).hex() if key else "00" * 64
    return {"x-signature-ed25519": signature, "x-signature-timestamp": str(now)}


ALERTS = {"status": "firing", "alerts": [{"status": "firing"}]}

CASES = [
    Case(
        "github",
        hub("x-hub-signature-256"),
        needs=("x-hub-signature-256",),
        headers={"x-github-event": "issues", "x-github-delivery": "72d3162e-cc78-11e3-81ab-4c93"},
        body={"action": "opened"},
        delivery_id="72d3162e-cc78-11e3-81ab-4c93",
        event="issues",
    ),
    Case(
        "gitlab",
        lambda secret, raw, now: {"x-gitlab-token": secret},
        needs=("x-gitlab-token",),
        headers={
            "x-gitlab-event": "Push Hook",
            "idempotency-key": "a5461c4d-9c7f-4af9-add6-cddebe3c426f",
        },
        body={"object_kind": "push"},
        delivery_id="a5461c4d-9c7f-4af9-add6-cddebe3c426f",
        event="Push Hook",
        name="gitlab, secret token",
    ),
    Case(
        "gitlab",
        standard,
        needs=("webhook-id", "webhook-timestamp", "webhook-signature"),
        window=WINDOW,
        headers={"x-gitlab-event": "Push Hook"},
        delivery_id="msg_1",
        event="Push Hook",
        name="gitlab, signing token",
    ),
    Case(
        "bitbucket",
        hub("x-hub-signature"),
        needs=("x-hub-signature",),
        headers={
            "x-event-key": "repo:push",
            "x-request-uuid": "07606ab4-601c-4ca4-8c93-b979d3c7b3a1",
        },
        delivery_id="07606ab4-601c-4ca4-8c93-b979d3c7b3a1",
        event="repo:push",
    ),
    Case(
        "jira",
        hub("x-hub-signature"),
        needs=("x-hub-signature",),
        headers={"x-atlassian-webhook-identifier": "5a8f-1"},
        body={"webhookEvent": "jira:issue_updated"},
        delivery_id="5a8f-1",
        event="jira:issue_updated",
    ),
    Case(
        "linear",
        hub("linear-signature", ""),
        needs=("linear-signature",),
        window=LINEAR_WINDOW - 1,  # it writes milliseconds
        headers={
            "linear-event": "Issue",
            "linear-delivery": "234d1a4e-b617-4388-90fe-adc3633d6b72",
        },
        body=linear_body,
        delivery_id="234d1a4e-b617-4388-90fe-adc3633d6b72",
        event="Issue",
    ),
    Case(
        "slack",
        slack_signature,
        needs=("x-slack-request-timestamp", "x-slack-signature"),
        window=WINDOW,
        body={"type": "event_callback", "event_id": "Ev0PV52K25", "event": {"type": "message"}},
        delivery_id="Ev0PV52K25",
        event="message",
    ),
    Case(
        "discord",
        discord_signature,
        needs=("x-signature-ed25519", "x-signature-timestamp"),
        window=DISCORD_WINDOW,
        body={"version": 1, "type": 1, "event": {"type": "APPLICATION_AUTHORIZED"}},
        event="APPLICATION_AUTHORIZED",
        secrets=discord_key,
    ),
    Case(
        "discord",
        bearer,
        needs=("authorization",),
        body={"op": 0, "t": "MESSAGE_CREATE", "d": {"id": "1", "type": 0}},
        event="MESSAGE_CREATE",
        name="discord, forwarded",
    ),
    Case(
        "sentry",
        hub("sentry-hook-signature", ""),
        needs=("sentry-hook-signature",),
        headers={
            "sentry-hook-resource": "issue",
            "request-id": "74cb33b30d804d93b3abe5c4d4d4d4d4",
        },
        body={"action": "created", "installation": {"uuid": "a8e5d37a"}, "data": {}},
        delivery_id="74cb33b30d804d93b3abe5c4d4d4d4d4",
        event="issue.created",
    ),
    Case(
        "pagerduty",
        hub("x-pagerduty-signature", "v1="),
        needs=("x-pagerduty-signature",),
        body={"event": {"id": "01BWDWL3NYY7LUFPZCC28QUCMK", "event_type": "incident.triggered"}},
        delivery_id="01BWDWL3NYY7LUFPZCC28QUCMK",
        event="incident.triggered",
    ),
    Case(
        "notion",
        hub("x-notion-signature"),
        needs=("x-notion-signature",),
        body={"id": "367cba44-b6f3-4c92-81e7-6a2e9659efd4", "type": "page.content_updated"},
        delivery_id="367cba44-b6f3-4c92-81e7-6a2e9659efd4",
        event="page.content_updated",
    ),
    Case(
        "asana",
        hub("x-hook-signature", ""),
        needs=("x-hook-signature",),
        body={"events": [{"action": "changed"}]},
    ),
    Case(
        "circleci",
        hub("circleci-signature", "v1="),
        needs=("circleci-signature",),
        body={"id": "3888f21b-eaa7-38e3-8f3d-75a63bba8895", "type": "workflow-completed"},
        delivery_id="3888f21b-eaa7-38e3-8f3d-75a63bba8895",
        event="workflow-completed",
    ),
    Case(
        "buildkite",
        buildkite_signature,
        needs=("x-buildkite-signature",),
        window=WINDOW,
        headers={"x-buildkite-event": "build.finished"},
        event="build.finished",
    ),
    Case(
        "buildkite",
        lambda secret, raw, now: {"x-buildkite-token": secret},
        needs=("x-buildkite-token",),
        headers={"x-buildkite-event": "ping"},
        event="ping",
        name="buildkite, token",
    ),
    Case(
        "vercel",
        hub("x-vercel-signature", "", "sha1"),
        needs=("x-vercel-signature",),
        body={"id": "hook_1", "type": "deployment.succeeded", "payload": {}},
        delivery_id="hook_1",
        event="deployment.succeeded",
    ),
    Case(
        "incident_io",
        standard,
        needs=("webhook-id", "webhook-timestamp", "webhook-signature"),
        window=WINDOW,
        body={"event_type": "public_incident.incident_created_v2"},
        delivery_id="msg_1",
        event="public_incident.incident_created_v2",
    ),
    Case(
        "grafana",
        grafana_signature,
        needs=("x-grafana-alerting-signature", "x-grafana-alerting-timestamp"),
        window=WINDOW,
        body=ALERTS,
        event="firing",
    ),
    Case(
        "grafana",
        hub("x-grafana-alerting-signature", ""),
        needs=("x-grafana-alerting-signature",),
        body=ALERTS,
        event="firing",
        name="grafana, without time",
    ),
    Case("grafana", bearer, ("authorization",), ALERTS, event="firing", name="grafana, bearer"),
    Case("alertmanager", bearer, ("authorization",), ALERTS, event="firing"),
    Case(
        "alertmanager",
        basic,
        ("authorization",),
        ALERTS,
        event="firing",
        name="alertmanager, basic",
    ),
    Case(
        "netlify",
        standard,
        needs=("webhook-id", "webhook-timestamp", "webhook-signature"),
        window=WINDOW,
        delivery_id="msg_1",
        name="generic, signed",
    ),
    Case("netlify", bearer, ("authorization",), name="generic, bearer"),
    Case("netlify", basic, ("authorization",), name="generic, basic"),
]
BY_NAME = {str(case): case for case in CASES}
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


@pytest.mark.parametrize("source", ["jira", "bitbucket"])
def test_the_signature_that_atlassian_documents_is_right(source: str) -> None:
    documented = "sha256=a4771c39fbe90f317c7824e83ddef3caae9cb3d976c214ace1f2937e133263c9"
    headers = {"x-hub-signature": documented}
    secret = "It's a Secret to Everybody"
    sender(source).verify(Incoming(headers, b"Hello World!", {}, [secret], NOW))


@pytest.mark.parametrize(
    ("body", "secret", "signature"),
    [
        (
            "hello world",
            "secret",
            "734cc62f32841568f45715aeb9f4d7891324e6d948e4c6c60c0621cdac48623a",
        ),
        (
            "an-important-request-payload",
            "hunter123",
            "9be2242094a9a8c00c64306f382a7f9d691de910b4a266f67bd314ef18ac49fa",
        ),
    ],
)
def test_the_signatures_that_circleci_documents_are_right(
    body: str, secret: str, signature: str
) -> None:
    headers = {"circleci-signature": f"v1={signature},v2=abc,v3=def"}
    sender("circleci").verify(Incoming(headers, body.encode(), {}, [secret], NOW))


def test_the_signature_in_the_client_that_pagerduty_publishes_is_right() -> None:
    # PagerDuty/go-pagerduty, webhookv3_test.go
    raw = PAGERDUTY.read_bytes()
    secret = "lDQHScfUeXUKaQRNF+8XIiDKZ7XX3itBAYzwU0TARw8lJqRnkKl2iB1anSb0Z+IK"
    good = "v1=0c0b9495b893a39e70d1fea2fe11fbe0a825f88b9f67846f6cc07dd2bc5476cd"
    bad = "v1=7020c8a7ec668a9b7012bc3dd82e483394b038f4230acc6785efbf2a7d8bcaf5"
    for signatures in (good, f"{bad},{good}", f"{good}, {bad}"):
        incoming = Incoming({"x-pagerduty-signature": signatures}, raw, {}, [secret], NOW)
        sender("pagerduty").verify(incoming)
    with pytest.raises(Unverified):
        sender("pagerduty").verify(replace(incoming, headers={"x-pagerduty-signature": bad}))


def test_the_signature_that_standard_webhooks_document_is_right() -> None:
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    raw = b'{"test": 2432232314}'
    for source in ("netlify", "incident_io", "gitlab"):
        incoming = Incoming(headers, raw, {}, [secret], 1614265330)
        sender(source).verify(incoming)
        several = {**headers, "webhook-signature": f"v1,bm9=  v1a,x {headers['webhook-signature']}"}
        sender(source).verify(replace(incoming, headers=several))


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
    refused(case, case.incoming(case.other))


@every_source
def test_no_secret_proves_nothing(case: Case) -> None:
    incoming = case.incoming()
    refused(case, replace(incoming, secrets=[]))
    headers = {**incoming.headers, **case.sign("", incoming.raw, NOW)}
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


@pytest.mark.parametrize("case", [case for case in CASES if case.window], ids=str)
def test_what_was_signed_long_ago_is_refused(case: Case) -> None:
    assert case.window
    for near in (NOW - case.window, NOW + case.window):
        sender(case.source).verify(case.incoming(at=near))
    for far in (NOW - case.window - 2, NOW + case.window + 2, 0):
        refused(case, case.incoming(at=far))


@every_source
def test_a_rotated_secret_is_good_beside_the_current_one(case: Case) -> None:
    sender(case.source).verify(case.incoming(case.other, case.secret))
    sender(case.source).verify(case.incoming(case.secret, case.other))


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


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.source != "netlify" and case.source != "asana"], ids=str
)
def test_an_empty_object_is_not_what_a_source_sends(case: Case) -> None:
    incoming = case.incoming()
    bare = {"content-type": "application/json"}
    with pytest.raises(Malformed):
        sender(case.source).delivery(replace(incoming, raw=b"{}", headers=bare))


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
    incoming = replace(BY_NAME["slack"], body=body).incoming()
    answer = sender("slack").challenge(incoming)
    assert answer and json.loads(answer.body) == {"challenge": "3eZbrw1aBm2rZgRNFdxV2595"}
    with pytest.raises(Unverified):
        sender("slack").challenge(replace(incoming, secrets=[OTHER]))


def test_discord_is_answered_its_pings_only_when_they_are_proven() -> None:
    pings = [
        ({"version": 1, "application_id": "1234560123453231555", "type": 0}, 204, b""),
        (
            {"id": "1", "application_id": "1", "token": "a", "type": 1, "version": 1},
            200,
            b'{"type":1}',
        ),
    ]
    for body, status, answered in pings:
        incoming = replace(BY_NAME["discord"], body=body).incoming()
        answer = sender("discord").challenge(incoming)
        assert answer and (answer.status, answer.body, answer.secret) == (status, answered, None)
        with pytest.raises(Unverified):
            sender("discord").challenge(replace(incoming, secrets=[discord_key()]))


def test_the_public_key_of_discord_is_no_token() -> None:
    case = BY_NAME["discord"]
    refused(case, Incoming(bearer(case.secret, b"", NOW), b"{}", {}, [case.secret], NOW))


def test_notion_brings_its_secret_first() -> None:
    token = "secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl"
    raw = json.dumps({"verification_token": token}).encode()
    answer = sender("notion").challenge(Incoming({}, raw, {}, [], NOW))
    assert answer and (answer.status, answer.secret) == (200, token)
    assert token not in repr(answer)
    for wrong in ("", None, "x" * 301, "ä"):
        raw = json.dumps({"verification_token": wrong}).encode()
        with pytest.raises(Malformed):
            sender("notion").challenge(Incoming({}, raw, {}, [], NOW))
    event = replace(BY_NAME["notion"], body={"type": "x", "verification_token": token})
    assert sender("notion").challenge(event.incoming()) is None


def test_asana_brings_its_secret_first_and_gets_it_back() -> None:
    secret = "b537207f20cbfa02357cf448134da559e8bd39d61597dcd5631b8012eae53e81"
    answer = sender("asana").challenge(Incoming({"x-hook-secret": secret}, b"", {}, [], NOW))
    assert answer and (answer.status, answer.secret) == (200, secret)
    assert answer.headers == {"X-Hook-Secret": secret} and secret not in repr(answer)
    with pytest.raises(Malformed):
        sender("asana").challenge(Incoming({"x-hook-secret": ""}, b"", {}, [], NOW))
    assert told("asana", {"events": []}).event is None


def test_sources_whose_secret_we_make_are_those_that_take_one() -> None:
    made = {source for source, each in SENDERS.items() if each.makes_secret}
    assert made == {
        *("github", "gitlab", "bitbucket", "jira", "circleci", "grafana", "alertmanager"),
    }
    assert sender("anything else").makes_secret
    brought = {source for source, each in SENDERS.items() if each.secret_from == "handshake"}
    assert brought == {"notion", "asana"}


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


def test_two_cloud_events_with_long_ids_and_one_body_are_two() -> None:
    binary = {f"ce-{name}": value for name, value in EVENT.items()}
    long = [binary | {"ce-source": "/" * 300, "ce-id": each} for each in ("1", "2", "1")]
    first, second, again = (told("heroku", {}, each).delivery_id for each in long)
    assert first == again != second and len(first) <= 300


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
