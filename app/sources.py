"""How a request of a source is told from one of anybody else, and from another of the same source.

For each source it holds, as that source documents it: what proves a delivery (a signature over the
raw body, or a token), what is answered to a handshake, which header or field is the delivery's id,
and what every delivery of it has. Nothing here knows a database or a server. The one rule: what is
not proven is refused in one sentence that says nothing, whatever was wrong with it, and neither a
secret nor a body is in any message.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import parse_qsl

import orjson
from standardwebhooks import Webhook

WINDOW = 300  # seconds that the clock of a source and ours may differ, where it signs the time
LIMIT = 1024 * 1024  # bytes of a body, where the source does not say that it sends more
ID_MAX = 300  # characters of a delivery's id, as the table has it
FIELDS_MAX = 1_000  # of a form
LARGEST = 25 * 1024 * 1024  # bytes that GitHub and GitLab send at most
HANDSHAKE_MAX = 4_096  # bytes of a body that brings a secret
PREFIX = "whsec_"  # of a secret that we made, as Standard Webhooks have it

Headers = Mapping[str, str]  # lower-case names, or a mapping to which case is nothing


class Unverified(Exception):
    """Not proven to be from the source: 401. It is the same whatever was wrong."""

    def __init__(self) -> None:
        super().__init__("The signature or token of this delivery is missing or wrong.")


class Malformed(Exception):
    """Proven, but not what the source sends: 400. The sentence names what is wrong."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as it arrived, and what it may be proven with."""

    headers: Headers
    raw: bytes = field(repr=False)
    query: Mapping[str, str] = field(repr=False)  # may hold the token
    secrets: Sequence[str] = field(repr=False)  # all that are good: the current, and rotated ones
    now: float  # seconds since 1970


@dataclass(frozen=True, slots=True)
class Challenge:
    """What is answered to a handshake instead of storing it."""

    body: bytes = b""
    media_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret: str | None = field(default=None, repr=False)  # keep it as the signing secret


@dataclass(frozen=True, slots=True)
class Checked:
    """What is stored of a delivery beside its body."""

    delivery_id: str  # the same when the source sends it again
    headers: dict[str, str]  # those that say what the body is; lower-case names
    event: str | None  # as the source calls it


# Is this what who holds the secret sends?
Proof = Callable[[Incoming, str], bool]
# Delivery id and event of a parsed body; raises Malformed.
Reader = Callable[[Headers, Any], tuple[str | None, str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """How one source sends.

    Attributes:
        advice: where its settings take the URL, and where the secret goes or comes from.
        secret_from: who makes the secret: we (`baton`), the source, or the source in its first
            request (`handshake`).
        limit: bytes of the largest body that it sends.
        empty_answer: it wants 204 and no body where others are answered 202.
    """

    advice: str
    proofs: tuple[Proof, ...]  # one is enough
    reads: Reader
    keeps: tuple[str, ...] = ()  # headers beside the content type; a * at the end is any rest
    secret_from: Literal["baton", "source", "handshake"] = "baton"
    answers: Callable[["Sender", Incoming], Challenge | None] | None = None
    limit: int = LIMIT
    empty_answer: bool = False

    @property
    def makes_secret(self) -> bool:
        """Do we make the secret, for a person to paste it into the source's settings?"""
        return self.secret_from == "baton"

    def challenge(self, incoming: Incoming) -> Challenge | None:
        """The answer to a handshake; None if this is none. Ask before `verify`.

        One that brings a secret cannot be proven. It is to be answered only where that is the
        secret already, or there is none: whoever comes first is who was meant.

        Raises:
            Unverified: a handshake that the source signs is not proven.
            Malformed: it is one, but not as the source sends it.
        """
        return self.answers(self, incoming) if self.answers else None

    def verify(self, incoming: Incoming) -> None:
        """Compare with all secrets, in constant time, over the body as it came.

        Raises:
            Unverified: by none of them.
        """
        # No short cut: how long it takes does not tell which secret it is.
        found = [
            proof(incoming, secret)
            for secret in incoming.secrets
            if secret
            for proof in self.proofs
        ]
        if not any(found):
            raise Unverified

    def delivery(self, incoming: Incoming) -> Checked:
        """Tell a verified request from the others, and whether it is what the source sends.

        Raises:
            Malformed: it is not.
        """
        delivery_id, event = self.reads(incoming.headers, read_body(incoming.headers, incoming.raw))
        kept = {
            name.lower(): value
            for name, value in incoming.headers.items()
            if self._keeps(name.lower())
        }
        return Checked(
            delivery_id=_plain(delivery_id) or hashlib.sha256(incoming.raw).hexdigest(),
            headers=kept,
            event=_plain(event),
        )

    def _keeps(self, name: str) -> bool:
        return name == "content-type" or any(
            name.startswith(kept[:-1]) if kept.endswith("*") else name == kept
            for kept in self.keeps
        )


def sender(source: str) -> Sender:
    """How a source sends; one that has no way of its own sends as anything can be made to."""
    return SENDERS.get(source, GENERIC)


def new_secret() -> str:
    """A secret that every source takes for which we make one: 32 random bytes, as Standard Webhooks
    write them."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def read_body(headers: Headers, raw: bytes) -> Any:
    """The JSON of a body, or of the field `payload` of a form; else the fields of the form.

    What a CloudEvent in binary mode carries may be anything: text that is no JSON is a string.

    Raises:
        Malformed: it cannot be read as what it is said to be.
    """
    kind = _media_type(headers)
    if kind == "application/x-www-form-urlencoded":
        try:
            fields = dict(
                parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX)
            )
        except ValueError:
            raise Malformed("The body is not a form.") from None
        return _json(fields["payload"]) if "payload" in fields else fields
    if "ce-specversion" in headers and kind and not kind.endswith("json"):
        return raw.decode(errors="replace")
    return _json(raw)


# --- What proves a delivery -----------------------------------------------------------------


def _hmac(
    header: str,
    *,
    algorithm: str = "sha256",
    prefix: str = "",
    several: bool = False,
    signed: Callable[[Incoming], bytes | None] = lambda incoming: incoming.raw,
) -> Proof:
    """A hexadecimal HMAC in a header, of what `signed` makes of the request (None: refuse).

    With `several` there may be more than one, with commas between them: while the source has two
    secrets, or two versions of signatures.
    """

    def proof(incoming: Incoming, secret: str) -> bool:
        given, message = incoming.headers.get(header, ""), signed(incoming)
        if message is None:
            return False
        expected = prefix + hmac.new(secret.encode(), message, algorithm).hexdigest()
        every = given.split(",") if several else [given]
        return any([_equal(each.strip(), expected) for each in every])

    return proof


def _token(header: str) -> Proof:
    """The secret itself in a header."""
    return lambda incoming, secret: _equal(incoming.headers.get(header, ""), secret)


def _authorization(incoming: Incoming, secret: str) -> bool:
    """The secret as a bearer token, or as the password of basic authentication."""
    scheme, _, value = incoming.headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    return _equal(value, secret)


def _access_token(incoming: Incoming, secret: str) -> bool:
    """The secret in the query, as HTTP Web Hooks of CloudEvents allow who can set no header."""
    return _equal(incoming.query.get("access_token", ""), secret)


def _standard(prefix: str = "webhook") -> Proof:
    """Standard Webhooks: any of several signatures over id, time and body."""

    def proof(incoming: Incoming, secret: str) -> bool:
        message_id, at, given = (
            incoming.headers.get(f"{prefix}-{name}", "")
            for name in ("id", "timestamp", "signature")
        )
        if not message_id or not _recent(incoming, at):
            return False
        try:  # the library raises ValueError for a key that is not base64, or a body not UTF-8
            expected = Webhook(secret).sign(
                message_id, datetime.fromtimestamp(int(at), UTC), incoming.raw.decode()
            )
        except (ValueError, RuntimeError):
            return False
        return any([_equal(each, expected) for each in given.split(" ")])

    return proof


def _recent(incoming: Incoming, at: str, unit: int = 1, window: int = WINDOW) -> bool:
    """Is a time of a request, in `unit`ths of a second since 1970, within the window?"""
    return bool(re.fullmatch(r"[0-9]{1,16}", at)) and (abs(incoming.now - int(at) / unit) <= window)


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


# --- What a body must have ------------------------------------------------------------------


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _json(raw: bytes | str) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise Malformed("The body is not valid JSON.") from None


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Malformed("The body must be a JSON object.")
    return body


def _field(body: Any, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field that every delivery of the source has."""
    value = _object(body).get(name)
    if not isinstance(value, kind) or value in ("", None):
        raise Malformed(f"{name}: is required.")
    return value


def _header(headers: Headers, name: str) -> str:
    value = headers.get(name.lower(), "")
    if not value:
        raise Malformed(f"{name}: this header is required.")
    return value


def _brought(value: Any, name: str) -> str:
    """The secret that a handshake brings."""
    secret = _plain(_text(value))
    if secret is None or not secret.isascii():
        raise Malformed(f"{name}: must be a secret.")
    return secret


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _plain(value: str | None) -> str | None:
    """An id or a name that fits into its column; None if it does not."""
    return value if value and len(value) <= ID_MAX and value.isprintable() else None


# --- GitHub: https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries ---


def _github(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _header(headers, "X-GitHub-Event")
    _object(body)
    return headers.get("x-github-delivery"), event


# --- Slack: https://docs.slack.dev/authentication/verifying-requests-from-slack ---------------


def _slack_signed(incoming: Incoming) -> bytes | None:
    at = incoming.headers.get("x-slack-request-timestamp", "")
    return b"v0:%s:%s" % (at.encode(), incoming.raw) if _recent(incoming, at) else None


def _slack(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    if "command" in _object(body):  # a slash command, the only form without a payload
        return _text(body.get("trigger_id")), "slash_command"
    kind = _field(body, "type")
    if kind != "event_callback":
        return _text(body.get("trigger_id")), kind
    event = _field(body, "event", dict)
    return _field(body, "event_id"), _text(event.get("type"))


def _slack_answers(source: Sender, incoming: Incoming) -> Challenge | None:
    if b"url_verification" not in incoming.raw:
        return None
    source.verify(incoming)
    body = read_body(incoming.headers, incoming.raw)
    if not isinstance(body, dict) or body.get("type") != "url_verification":
        return None
    return Challenge(orjson.dumps({"challenge": _field(body, "challenge")}))


# --- GitLab: https://docs.gitlab.com/user/project/integrations/webhooks -----------------------


def _gitlab(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _header(headers, "X-Gitlab-Event")
    _object(body)
    return headers.get("idempotency-key") or headers.get("webhook-id"), event


# --- Bitbucket: https://support.atlassian.com/bitbucket-cloud/docs/manage-webhooks ------------


def _bitbucket(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _header(headers, "X-Event-Key")
    _object(body)
    # Bitbucket Cloud, and Bitbucket Data Center
    return headers.get("x-request-uuid") or headers.get("x-request-id"), event


# --- Jira: https://developer.atlassian.com/cloud/jira/platform/webhooks -----------------------


def _jira(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    return headers.get("x-atlassian-webhook-identifier"), _field(body, "webhookEvent")


# --- Linear: https://linear.app/developers/webhooks -------------------------------------------

LINEAR_WINDOW = 60  # seconds, as documented

_linear_signed = _hmac("linear-signature")


def _linear_proof(incoming: Incoming, secret: str) -> bool:
    """The signature, and then the time, which is in the body."""
    if not _linear_signed(incoming, secret):
        return False
    try:
        body = orjson.loads(incoming.raw)
    except orjson.JSONDecodeError:
        return True  # signed, so it is for `delivery` to say what is wrong
    at = body.get("webhookTimestamp") if isinstance(body, dict) else None
    return _recent(incoming, str(at), unit=1000, window=LINEAR_WINDOW)


def _linear(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    _header(headers, "Linear-Event")
    return headers.get("linear-delivery"), _field(body, "type")


# --- Discord: https://docs.discord.com/developers/events/webhook-events -----------------------

DISCORD_WINDOW = 900  # seconds; it repeats for ten minutes what was not acknowledged

_PUBLIC_KEY = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def _discord_proof(incoming: Incoming, secret: str) -> bool:
    """Ed25519 over time and body. The secret is the public key, so as a token it proves nothing."""
    if not _PUBLIC_KEY.fullmatch(secret):
        return False
    at = incoming.headers.get("x-signature-timestamp", "")
    if not _recent(incoming, at, window=DISCORD_WINDOW):
        return False
    # 8 MB that a process without Discord need not have
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(secret))
        signature = bytes.fromhex(incoming.headers.get("x-signature-ed25519", ""))
        key.verify(signature, at.encode() + incoming.raw)
    except (ValueError, InvalidSignature):
        return False
    return True


def _discord_bridge(incoming: Incoming, secret: str) -> bool:
    """A secret of ours as a bearer token: of a bot that forwards what Discord does not send."""
    return secret.startswith(PREFIX) and _authorization(incoming, secret)


def _discord(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    if isinstance(_object(body).get("t"), str):  # an event of the Gateway, forwarded
        return None, body["t"]
    _field(body, "type", int)
    if "event" in body:
        return None, _field(_field(body, "event", dict), "type")
    return _text(body.get("id")), None


def _discord_answers(source: Sender, incoming: Incoming) -> Challenge | None:
    if b'"event"' in incoming.raw:
        return None
    source.verify(incoming)
    body = read_body(incoming.headers, incoming.raw)
    if not isinstance(body, dict):
        return None
    if body.get("type") == 0 and "id" not in body and "application_id" in body:
        return Challenge(status=204)  # of the Webhook Events URL
    if body.get("type") == 1 and "token" in body:
        return Challenge(b'{"type":1}')  # of the Interactions Endpoint URL
    return None


# --- Sentry: https://docs.sentry.io/organization/integrations/integration-platform/webhooks ---


def _sentry(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    resource = _header(headers, "Sentry-Hook-Resource")
    action = _field(body, "action")
    _field(body, "data", dict)
    return headers.get("request-id"), f"{resource}.{action}"


# --- PagerDuty: https://developer.pagerduty.com/docs/verifying-signatures ---------------------


def _pagerduty(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _field(body, "event", dict)
    return _text(event.get("id")), _field(event, "event_type")


# --- Notion: https://developers.notion.com/reference/webhooks ---------------------------------


def _notion(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    return _text(_object(body).get("id")), _field(body, "type")


def _notion_answers(source: Sender, incoming: Incoming) -> Challenge | None:
    """The first request has nothing but the key of all later signatures."""
    if b"verification_token" not in incoming.raw or len(incoming.raw) > HANDSHAKE_MAX:
        return None
    body = read_body(incoming.headers, incoming.raw)
    if not isinstance(body, dict) or "type" in body:
        return None
    return Challenge(b"{}", secret=_brought(body.get("verification_token"), "verification_token"))


# --- Asana: https://developers.asana.com/docs/webhooks-guide ----------------------------------


def _asana(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    # What is sent to see whether we are there has no events.
    if not isinstance(_object(body).get("events", []), list):
        raise Malformed("events: must be an array.")
    return None, None


def _asana_answers(source: Sender, incoming: Incoming) -> Challenge | None:
    """The first request has the key of all later signatures in a header, which we send back."""
    secret = incoming.headers.get("x-hook-secret")
    if secret is None:
        return None
    secret = _brought(secret, "X-Hook-Secret")
    return Challenge(headers={"X-Hook-Secret": secret}, secret=secret)


# --- CircleCI: https://circleci.com/docs/guides/integration/outbound-webhooks -----------------


def _circleci(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    return _text(_object(body).get("id")), _field(body, "type")


# --- Buildkite: https://buildkite.com/docs/apis/webhooks/pipelines ----------------------------


def _buildkite_proof(incoming: Incoming, secret: str) -> bool:
    """HMAC over time and body, `timestamp=…,signature=…`."""
    given = incoming.headers.get("x-buildkite-signature", "")
    parts = dict(part.strip().partition("=")[::2] for part in given.split(","))
    at = parts.get("timestamp", "")
    if not _recent(incoming, at):
        return False
    message = b"%s.%s" % (at.encode(), incoming.raw)
    expected = hmac.new(secret.encode(), message, "sha256").hexdigest()
    return _equal(parts.get("signature", ""), expected)


def _buildkite(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _header(headers, "X-Buildkite-Event")
    _object(body)
    return None, event


# --- Vercel: https://vercel.com/docs/webhooks/webhooks-api ------------------------------------


def _vercel(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _field(body, "type")
    _field(body, "payload", dict)
    return _text(body.get("id")), event


# --- incident.io: https://docs.incident.io/api-reference/webhooks -----------------------------


def _incident_io(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    return headers.get("webhook-id"), _field(body, "event_type")


# --- Grafana and Alertmanager -----------------------------------------------------------------
# https://grafana.com/docs/grafana/latest/alerting/configure-notifications/manage-contact-points/integrations/webhook-notifier
# https://prometheus.io/docs/alerting/latest/configuration/#webhook_config


def _grafana_signed(incoming: Incoming) -> bytes | None:
    """The time is signed where the contact point names a header for it."""
    at = incoming.headers.get("x-grafana-alerting-timestamp")
    if at is None:
        return incoming.raw
    return b"%s:%s" % (at.encode(), incoming.raw) if _recent(incoming, at) else None


def _alerts(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    event = _field(body, "status")
    if not isinstance(body.get("alerts"), list):
        raise Malformed("alerts: is required.")
    return None, event


# --- Everything else: a token or Standard Webhooks; CloudEvents or JSON -----------------------

_CE_REQUIRED = ("id", "source", "type")


def _generic(headers: Headers, body: Any) -> tuple[str | None, str | None]:
    kind = _media_type(headers)
    if kind == "application/cloudevents-batch+json":
        if not isinstance(body, list):
            raise Malformed("The body must be a JSON array of CloudEvents.")
        for index, event in enumerate(body):
            _cloud_event(event if isinstance(event, dict) else {}, f"[{index}].")
        return headers.get("webhook-id"), None
    if kind == "application/cloudevents+json":
        return _cloud_event(_object(body), "")
    if "ce-specversion" in headers:
        names = ("specversion", *_CE_REQUIRED)
        return _cloud_event({each: headers.get(f"ce-{each}") for each in names}, "ce-")
    if not isinstance(body, dict | list):
        raise Malformed("The body must be a JSON object or array.")
    return headers.get("webhook-id"), None


def _cloud_event(event: Mapping[str, Any], prefix: str) -> tuple[str, str]:
    """What tells an event from every other: its id is unique in its source."""
    if event.get("specversion") != "1.0":
        raise Malformed(f"{prefix}specversion: must be 1.0.")
    for name in _CE_REQUIRED:
        if not isinstance(event.get(name), str) or not event[name]:
            raise Malformed(f"{prefix}{name}: is required.")
    told = f"{event['source']} {event['id']}"
    # One that does not fit is still this event's: a body may be the same as that of another.
    return _plain(told) or hashlib.sha256(told.encode()).hexdigest(), event["type"]


# --- All of them ----------------------------------------------------------------------------

GENERIC = Sender(
    advice=(
        "Send with the header 'Authorization: Bearer SECRET', or sign as Standard Webhooks do;"
        " the body is a CloudEvent or any JSON."
    ),
    proofs=(_standard(), _authorization, _access_token),
    reads=_generic,
    keeps=("ce-*", "webhook-id"),
)

SENDERS: Mapping[str, Sender] = {
    "github": Sender(
        advice=(
            "Repository or organization > Settings > Webhooks > Add webhook: the URL as Payload"
            " URL, application/json as Content type, the secret as Secret."
        ),
        proofs=(_hmac("x-hub-signature-256", prefix="sha256="),),
        reads=_github,
        keeps=("x-github-event",),
        limit=LARGEST,
    ),
    "gitlab": Sender(
        advice=(
            "Project or group > Settings > Webhooks > Add new webhook: the URL as URL, the secret"
            " as Signing token, or as Secret token where there is no such field."
        ),
        proofs=(_standard(), _token("x-gitlab-token")),
        reads=_gitlab,
        keeps=("x-gitlab-event", "x-gitlab-instance"),
        limit=LARGEST,
    ),
    "bitbucket": Sender(
        advice=(
            "Repository > Repository settings > Webhooks > Add webhook: the URL as URL, the secret"
            " as Secret."
        ),
        proofs=(_hmac("x-hub-signature", prefix="sha256="),),
        reads=_bitbucket,
        keeps=("x-event-key",),
    ),
    "linear": Sender(
        advice=(
            "Settings > API > Webhooks > New webhook: the URL as URL; the secret is the Signing"
            " secret that its page shows."
        ),
        proofs=(_linear_proof,),
        reads=_linear,
        keeps=("linear-event",),
        secret_from="source",
    ),
    "jira": Sender(
        advice=(
            "Settings > System > WebHooks > Create a WebHook: the URL as URL, the secret as Secret;"
            " without Exclude body."
        ),
        proofs=(_hmac("x-hub-signature", prefix="sha256="),),
        reads=_jira,
    ),
    "slack": Sender(
        advice=(
            "api.slack.com/apps > your app > Event Subscriptions: the URL as Request URL; the"
            " secret is the Signing Secret under Basic Information."
        ),
        proofs=(_hmac("x-slack-signature", prefix="v0=", signed=_slack_signed),),
        reads=_slack,
        secret_from="source",
        answers=_slack_answers,
    ),
    "discord": Sender(
        advice=(
            "discord.com/developers > your application > Webhooks: the URL as Endpoint URL; the"
            " secret is the Public Key under General Information. For messages, which Discord does"
            " not send, let a bot forward them with a secret of ours as a bearer token."
        ),
        proofs=(_discord_proof, _discord_bridge),
        reads=_discord,
        secret_from="source",
        answers=_discord_answers,
        empty_answer=True,
    ),
    "sentry": Sender(
        advice=(
            "Settings > Custom Integrations > Create New Integration > Internal: the URL as Webhook"
            " URL; the secret is the Client Secret."
        ),
        proofs=(_hmac("sentry-hook-signature"),),
        reads=_sentry,
        keeps=("sentry-hook-resource", "sentry-hook-timestamp"),
        secret_from="source",
    ),
    "pagerduty": Sender(
        advice=(
            "Integrations > Generic Webhooks (v3) > New Webhook: the URL as Webhook URL; the secret"
            " is the one that is shown once when it has been added."
        ),
        proofs=(_hmac("x-pagerduty-signature", prefix="v1=", several=True),),
        reads=_pagerduty,
        secret_from="source",
    ),
    "notion": Sender(
        advice=(
            "notion.so/profile/integrations > your integration > Webhooks > Create a subscription:"
            " the URL as Webhook URL; Notion sends the secret to it, which `baton integration"
            " secret` shows, and which is to be pasted there as verification token."
        ),
        proofs=(_hmac("x-notion-signature", prefix="sha256="),),
        reads=_notion,
        secret_from="handshake",
        answers=_notion_answers,
    ),
    "asana": Sender(
        advice=(
            "POST https://app.asana.com/api/1.0/webhooks with the id of a project as resource and"
            " the URL as target; Asana sends the secret to it. One integration for each project."
        ),
        proofs=(_hmac("x-hook-signature"),),
        reads=_asana,
        secret_from="handshake",
        answers=_asana_answers,
    ),
    "circleci": Sender(
        advice=(
            "Project Settings > Webhooks > Add Webhook: the URL as Receiver URL, the secret as"
            " Secret token."
        ),
        proofs=(_hmac("circleci-signature", prefix="v1=", several=True),),
        reads=_circleci,
        keeps=("circleci-event-type",),
    ),
    "buildkite": Sender(
        advice=(
            "Settings > Notification Services > Add a Webhook: the URL as Webhook URL, and let it"
            " send the token as X-Buildkite-Signature; the secret is the Token."
        ),
        proofs=(_buildkite_proof, _token("x-buildkite-token")),
        reads=_buildkite,
        keeps=("x-buildkite-event",),
        secret_from="source",
    ),
    "vercel": Sender(
        advice=(
            "Team > Settings > Webhooks > Create Webhook: the URL as Endpoint URL; the secret is"
            " the one that is shown once when it has been created."
        ),
        proofs=(_hmac("x-vercel-signature", algorithm="sha1"),),
        reads=_vercel,
        secret_from="source",
    ),
    "incident_io": Sender(
        advice=(
            "Settings > Webhooks > Add Endpoint: the URL as Endpoint URL; the secret is its Signing"
            " Secret."
        ),
        proofs=(_standard(),),
        reads=_incident_io,
        keeps=("webhook-id",),
        secret_from="source",
    ),
    "grafana": Sender(
        advice=(
            "Alerting > Contact points > Create, Webhook: the URL as URL, under HMAC Signature the"
            " secret as Secret and X-Grafana-Alerting-Timestamp as Timestamp Header."
        ),
        proofs=(_hmac("x-grafana-alerting-signature", signed=_grafana_signed), _authorization),
        reads=_alerts,
    ),
    "alertmanager": Sender(
        advice=(
            "alertmanager.yml > receivers > webhook_configs: the URL as url, the secret as"
            " http_config.authorization.credentials."
        ),
        proofs=(_authorization,),
        reads=_alerts,
    ),
}
