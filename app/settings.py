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

# The built-in provider, or one of the operator's own: a module and a factory without arguments.
_HOST = r"(?:\[[^]@/?#]+\]|[^][:,@/?#]*)(?::[0-9]+)?"
_DSN = rf"postgres(?:ql)?://(?:[^/?#]*@)?{_HOST}(?:,{_HOST})*(?:[/?].*)?"
_PROVIDER = r"extractive|[A-Za-z_][\w.]*:[A-Za-z_]\w*"


class ConfigurationError(Exception):
    """The environment is wrong; the message has one line per fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a process of Baton needs to know."""

    database_url: str | None = field(default=None, repr=False)  # None: embedded; holds a password
    data_dir: Path = Path(".baton")
    host: str = "127.0.0.1"
    port: int = 8000
    provider: str = "extractive"
    concurrency: int = 100  # attempts in flight in one worker
    attempt_timeout: float = 110.0  # seconds; clients are told to wait 120
    log: str = "json"
    webhook_allow: tuple[Network, ...] = ()  # may get webhooks although they are not public

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

        database_url = env.get("DATABASE_URL", "").strip() or None
        if database_url and not re.fullmatch(_DSN, database_url):  # not quoted: it has a password
            faults.append(
                "DATABASE_URL: must be postgresql://user:password@host:port/database, "
                "with special characters of the password percent-encoded"
            )
        settings = cls(
            database_url=database_url,
            data_dir=Path(text("BATON_DATA_DIR", ".baton")),
            host=text("HOST", "127.0.0.1"),
            port=number("PORT", 8000, 1, 65535),
            provider=text(
                "BATON_PROVIDER", "extractive", "extractive, or module:factory", _PROVIDER
            ),
            concurrency=number("BATON_CONCURRENCY", 100, 1, 1000),
            attempt_timeout=number("BATON_ATTEMPT_TIMEOUT", 110, 1, 3600),
            log=text(
                "BATON_LOG",
                "text" if sys.stderr.isatty() else "json",
                "text or json",
                "text|json",
            ),
            webhook_allow=networks("BATON_WEBHOOK_ALLOW"),
        )
        if faults:
            raise ConfigurationError("\n".join(faults))
        return settings
