"""All configuration, read once from the environment.

The one rule: every fault is found at start and all of them are reported together, each naming its
variable. Only what a command of the client needs (BATON_URL, BATON_API_KEY) is read elsewhere.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

Network = IPv4Network | IPv6Network
Address = tuple[str, int]  # host and port

# The built-in provider, or one of the operator's own: a module and a factory without arguments.
_HOST = r"(?:\[[^]@/?#]+\]|[^][:,@/?#]*)(?::[0-9]+)?"
_DSN = rf"postgres(?:ql)?://(?:[^/?#]*@)?{_HOST}(?:,{_HOST})*(?:[/?].*)?"
_PROVIDER = r"extractive|openai|anthropic|[A-Za-z_][\w.]*:[A-Za-z_]\w*"
_URL = r"https?://[^\s/?#@]+(?:/[^\s?#]*)?"
_KEY = r"[\x21-\x7e]+"
SECRET_KEY = r"[A-Za-z0-9_-]{43}="  # 32 bytes for app/cipher.py
_ADDRESS = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})"

# BATON_MODEL_<KIND>: the job kinds, and short words for three of them.
_KINDS = {
    "HANDOFF": "handoff",
    "CROSS_SOURCE_CORRELATION": "cross_source_correlation",
    "ONBOARDING_BRIEF": "onboarding_brief",
    "ARCHITECTURE_INSIGHT": "architecture_insight",
    "RELEASE_NOTES": "release_notes",
    "QUESTION": "question",
    "DIGEST": "digest",
    "CORRELATION": "cross_source_correlation",
    "ONBOARDING": "onboarding_brief",
    "ARCHITECTURE": "architecture_insight",
}


DISCORD_URL = "https://discord.com/api/v10"
SLACK_URL = "https://slack.com/api"


class ConfigurationError(Exception):
    """The environment is wrong; the message has one line per fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one caller may ask for; 0 is no limit. What each covers is told in app/limits.py."""

    default: int = 60  # requests a minute and key
    poll: int = 600  # reads of jobs a minute and key
    generate: int = 10  # requests for an artifact a minute and user
    waits: int = 20  # requests of a key that are held open at once
    pending: int = 200  # jobs of a project that nobody works on yet


NO_LIMITS = Limits(default=0, poll=0, generate=0, waits=0, pending=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a process of Baton needs to know."""

    database_url: str | None = field(default=None, repr=False)  # None: embedded; holds a password
    data_dir: Path = Path(".baton")
    host: str = "127.0.0.1"
    port: int = 8000
    provider: str = "extractive"
    model: str | None = None  # None: the provider's default
    models: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # kind -> name, variable
    context_tokens: int = 100_000  # of one request to a model and its answer together
    openai_api_key: str | None = field(default=None, repr=False)
    openai_base_url: str | None = None
    anthropic_api_key: str | None = field(default=None, repr=False)
    anthropic_base_url: str | None = None
    concurrency: int = 100  # attempts in flight in one worker
    attempt_timeout: float = 110.0  # seconds; clients are told to wait 120
    limits: Limits = Limits()
    log: str = "json"
    discord_url: str = DISCORD_URL
    slack_url: str = SLACK_URL
    public_url: str | None = None  # where sources reach this API; None: where it listens
    secret_keys: tuple[str, ...] = field(default=(), repr=False)  # see app/cipher.py
    webhook_allow: tuple[Network, ...] = ()  # may get webhooks although they are not public
    metrics: Address | None = None  # of the API; None: where it answers everything else
    worker_metrics: Address | None = None  # None: the worker listens nowhere
    traces: bool = False  # are OpenTelemetry's variables set, which its own library reads

    @property
    def base_url(self) -> str:
        """Where the API listens, as seen from this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def hook_url(self, integration_id: str) -> str:
        """Where the source of an integration sends to."""
        return f"{self.public_url or self.base_url}/hooks/{integration_id}"

    def model_for(self, kind: str) -> tuple[str | None, str]:
        """The model for a job kind, None for the provider's default; the variable that names it."""
        return self.models.get(kind, (self.model, "BATON_MODEL"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Read and check the environment.

        Raises:
            ConfigurationError: listing every fault.
        """
        faults: list[str] = []

        def text(name: str, default: str, allowed: str = "", form: str = ".*") -> str:
            value = env.get(name, "").strip() or default
            if not re.fullmatch(form, value):
                faults.append(f"{name}: must be {allowed}, not {value!r}")
            return value

        def number(name: str, default: int, low: int, high: int) -> int:
            raw = env.get(name, "").strip() or str(default)
            if not re.fullmatch("[0-9]{1,9}", raw) or not low <= int(raw) <= high:
                faults.append(f"{name}: must be a whole number from {low} to {high}, not {raw!r}")
                return default
            return int(raw)

        def networks(name: str) -> tuple[Network, ...]:
            parts = filter(None, map(str.strip, env.get(name, "").split(",")))
            try:
                return tuple(map(ip_network, parts))
            except ValueError as error:
                faults.append(f"{name}: must be networks such as 10.0.0.0/8,fd00::/8; {error}")
                return ()

        def private(name: str, allowed: str, form: str) -> str | None:
            value = env.get(name, "").strip() or None
            if value and not re.fullmatch(form, value):  # not quoted: it may hold a secret
                faults.append(f"{name}: must be {allowed}")
            return value

        settings = cls(
            database_url=private(
                "DATABASE_URL",
                "postgresql://user:password@host:port/database, with special characters of the "
                "password percent-encoded",
                _DSN,
            ),
            data_dir=Path(text("BATON_DATA_DIR", ".baton")),
            host=text("HOST", "127.0.0.1"),
            port=number("PORT", 8000, 1, 65535),
            provider=text(
                "BATON_PROVIDER",
                "extractive",
                "extractive, openai, anthropic, or module:factory",
                _PROVIDER,
            ),
            model=env.get("BATON_MODEL", "").strip() or None,
            models=_models(env, faults),
            context_tokens=number("BATON_CONTEXT_TOKENS", 100_000, 8_000, 2_000_000),
            openai_api_key=private("OPENAI_API_KEY", "a key without spaces", _KEY),
            openai_base_url=private("OPENAI_BASE_URL", "http://host/path or https://…", _URL),
            anthropic_api_key=private("ANTHROPIC_API_KEY", "a key without spaces", _KEY),
            anthropic_base_url=private("ANTHROPIC_BASE_URL", "http://host/path or https://…", _URL),
            concurrency=number("BATON_CONCURRENCY", 100, 1, 1000),
            attempt_timeout=number("BATON_ATTEMPT_TIMEOUT", 110, 1, 3600),
            limits=_limits(env.get("BATON_LIMITS", ""), faults),
            log=text(
                "BATON_LOG",
                "text" if sys.stderr.isatty() else "json",
                "text or json",
                "text|json",
            ),
            discord_url=private("BATON_DISCORD_URL", "http://host/path or https://…", _URL)
            or DISCORD_URL,
            slack_url=private("BATON_SLACK_URL", "http://host/path or https://…", _URL)
            or SLACK_URL,
            public_url=(
                private("BATON_PUBLIC_URL", "http://host/path or https://…", _URL) or ""
            ).rstrip("/")
            or None,
            secret_keys=_secret_keys(env.get("BATON_SECRET_KEYS", ""), faults),
            webhook_allow=networks("BATON_WEBHOOK_ALLOW"),
            metrics=_address(env, "BATON_METRICS", faults),
            worker_metrics=_address(env, "BATON_WORKER_METRICS", faults),
            traces=_traces(env),
        )
        _require_key(settings, faults)
        if faults:
            raise ConfigurationError("\n".join(faults))
        return settings


def _models(env: Mapping[str, str], faults: list[str]) -> dict[str, tuple[str, str]]:
    """By job kind, the model and the variable that names it."""
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(env):
        word = name.removeprefix("BATON_MODEL_")
        value = env[name].strip()
        if word == name or not value:
            continue
        kind = _KINDS.get(word)
        if kind is None:
            faults.append(f"{name}: there is no such kind; there are {', '.join(_KINDS)}")
        elif kind in found and found[kind][0] != value:
            faults.append(f"{name}: {found[kind][1]} names another model for the same kind")
        else:
            found[kind] = (value, name)
    return found


def _traces(env: Mapping[str, str]) -> bool:
    """Is there a receiver of traces, and are they wanted?"""
    receivers = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return (
        any(env.get(name, "").strip() for name in receivers)
        and env.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"
        and env.get("OTEL_TRACES_EXPORTER", "").strip().lower() != "none"
    )


def _address(env: Mapping[str, str], name: str, faults: list[str]) -> Address | None:
    raw = env.get(name, "").strip()
    found = re.fullmatch(_ADDRESS, raw)
    if found and 1 <= int(found[2]) <= 65535:
        return found[1].strip("[]"), int(found[2])
    if raw:
        faults.append(f"{name}: must be HOST:PORT such as 127.0.0.1:9464, not {raw!r}")
    return None


def _secret_keys(text: str, faults: list[str]) -> tuple[str, ...]:
    """The keys in their order; which of them is wrong is told by its place."""
    keys = tuple(filter(None, map(str.strip, text.split(","))))
    for place, key in enumerate(keys, 1):
        if not re.fullmatch(SECRET_KEY, key):
            faults.append(
                f"BATON_SECRET_KEYS: must be keys as `baton integration new-key` prints them,"
                f" parted by commas; number {place} is none"
            )
            return ()
    return keys


def _require_key(settings: Settings, faults: list[str]) -> None:
    """A vendor's own service needs a key; a server of the operator's own may need none."""
    vendor = settings.provider
    if vendor not in ("openai", "anthropic"):
        return
    if not (getattr(settings, f"{vendor}_api_key") or getattr(settings, f"{vendor}_base_url")):
        name = vendor.upper()
        faults.append(
            f"{name}_API_KEY: is required for BATON_PROVIDER={vendor}, or {name}_BASE_URL of a "
            "server that needs none"
        )


def _limits(text: str, faults: list[str]) -> Limits:
    """Those that are named, the others as they are by default; whatever is wrong joins `faults`."""
    found: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        limit, _, quota = (each.strip() for each in part.partition("="))
        if limit not in Limits.__slots__:
            known = ", ".join(Limits.__slots__)
            faults.append(f"BATON_LIMITS: there is no limit named {limit!r}; there are {known}")
        elif limit in found:
            faults.append(f"BATON_LIMITS: names {limit} twice")
        elif not re.fullmatch("[0-9]{1,6}", quota):
            faults.append(
                f"BATON_LIMITS: {limit} must be a whole number from 0 to 999999, not {quota!r}"
            )
        else:
            found[limit] = int(quota)
    return Limits(**found)
