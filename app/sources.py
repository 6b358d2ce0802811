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
    """

    advice: str
    proofs: tuple[Proof, ...]  # one is enough
    reads: Reader
    keeps: tuple[str, ...] = ()  # headers beside the content type; a * at the end is any rest
    secret_from: Literal["baton", "source", "handshake"] = "baton"
    answers: Callable[["Sender", Incoming], Challenge | None] | None = None
    limit: int = LIMIT

    @property
    def makes_secret(self) -> bool:
        """Do we make the secret, for a person to paste it into the source's settings?"""
        return self.secret_from == "baton"

    def challenge(self, incoming: Incoming) -> Challenge | None:
        """The answer to a handshake; None if this is none. Ask before `verify`.

        Raises:
            Unverified: a handshake that the source signs is not proven, or one that brings a secret
                comes to an integration that has another.
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
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


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
    signed: Callable[[Incoming], bytes | None] = lambda incoming: incoming.raw,
) -> Proof:
    """A hexadecimal HMAC in a header, of what `signed` makes of the request (None: refuse)."""

    def proof(incoming: Incoming, secret: str) -> bool:
        given, message = incoming.headers.get(header, ""), signed(incoming)
        if message is None:
            return False
        expected = prefix + hmac.new(secret.encode(), message, algorithm).hexdigest()
        return _equal(given, expected)

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


def _recent(incoming: Incoming, at: str, unit: int = 1) -> bool:
    """Is a time of a request, in `unit`ths of a second since 1970, within the window?"""
    return bool(re.fullmatch(r"[0-9]{1,16}", at)) and (abs(incoming.now - int(at) / unit) <= WINDOW)


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
    return f"{event['source']} {event['id']}", event["type"]


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
        limit=25 * 1024 * 1024,  # as documented
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
}
