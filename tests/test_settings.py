"""Configuration: every fault at once, each naming its variable, and no secret in sight."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from app.settings import NO_LIMITS, ConfigurationError, Limits, Settings

SECRET = "hunter2-in-a-url"
KEYS = ("A" * 43 + "=", "b" * 43 + "=")


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = Settings.from_env({})
    assert settings.database_url is None
    assert settings.data_dir == Path(".baton")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.provider == "extractive"
    assert (settings.concurrency, settings.attempt_timeout) == (100, 110)
    assert settings.limits == Limits(default=60, poll=600, generate=10, waits=20, pending=200)


def test_every_variable_is_read() -> None:
    settings = Settings.from_env(
        {
            "DATABASE_URL": "postgres://baton@db/baton",
            "BATON_DATA_DIR": "/var/lib/baton",
            "HOST": "0.0.0.0",
            "PORT": "9000",
            "BATON_PROVIDER": "openai",
            "BATON_MODEL": "small",
            "BATON_MODEL_RELEASE_NOTES": "terse",
            "BATON_CONTEXT_TOKENS": "32000",
            "OPENAI_API_KEY": SECRET,
            "OPENAI_BASE_URL": "http://localhost:11434/v1",
            "ANTHROPIC_API_KEY": SECRET,
            "ANTHROPIC_BASE_URL": "https://gateway.example/anthropic",
            "BATON_CONCURRENCY": "7",
            "BATON_ATTEMPT_TIMEOUT": "30",
            "BATON_LIMITS": "default=5, poll=50,generate=0,waits=3,pending=7",
            "BATON_LOG": "text",
            "BATON_DISCORD_URL": "http://localhost:1/api/v10",
            "BATON_SLACK_URL": "https://slack-gov.com/api",
            "BATON_PUBLIC_URL": "https://baton.example/team/",
            "BATON_SECRET_KEYS": f"{KEYS[0]}, {KEYS[1]}",
            "BATON_WEBHOOK_ALLOW": "10.0.0.0/8, fd12::/16,192.168.1.5",
            "BATON_METRICS": "0.0.0.0:9464",
            "BATON_WORKER_METRICS": "[::1]:9465",
        }
    )
    assert settings == Settings(
        database_url="postgres://baton@db/baton",
        data_dir=Path("/var/lib/baton"),
        host="0.0.0.0",
        port=9000,
        provider="openai",
        model="small",
        models={"release_notes": ("terse", "BATON_MODEL_RELEASE_NOTES")},
        context_tokens=32_000,
        openai_api_key=SECRET,
        openai_base_url="http://localhost:11434/v1",
        anthropic_api_key=SECRET,
        anthropic_base_url="https://gateway.example/anthropic",
        concurrency=7,
        attempt_timeout=30,
        limits=Limits(default=5, poll=50, generate=0, waits=3, pending=7),
        log="text",
        discord_url="http://localhost:1/api/v10",
        slack_url="https://slack-gov.com/api",
        public_url="https://baton.example/team",
        secret_keys=KEYS,
        webhook_allow=tuple(map(ip_network, ("10.0.0.0/8", "fd12::/16", "192.168.1.5/32"))),
        metrics=("0.0.0.0", 9464),
        worker_metrics=("::1", 9465),
    )


def test_an_empty_or_blank_variable_counts_as_not_set() -> None:
    names = ("DATABASE_URL", "BATON_DATA_DIR", "HOST", "PORT", "BATON_PROVIDER", "BATON_LOG")
    assert Settings.from_env(dict.fromkeys(names, "  ")) == Settings.from_env({})


def test_all_faults_are_reported_together_and_name_their_variables() -> None:
    wrong = {
        "DATABASE_URL": "mysql://localhost/baton",
        "PORT": "http",
        "BATON_PROVIDER": "oracle",
        "BATON_MODEL_POETRY": "large",
        "BATON_CONTEXT_TOKENS": "7999",
        "OPENAI_API_KEY": f"{SECRET} and more",
        "OPENAI_BASE_URL": f"https://user:{SECRET}@host/v1",
        "ANTHROPIC_API_KEY": f"{SECRET}\u00e9",
        "ANTHROPIC_BASE_URL": "localhost:8000",
        "BATON_CONCURRENCY": "0",
        "BATON_ATTEMPT_TIMEOUT": "1.5",
        "BATON_LIMITS": "default=many",
        "BATON_LOG": "xml",
        "BATON_DISCORD_URL": f"https://user:{SECRET}@discord.com",
        "BATON_SLACK_URL": "slack.com/api",
        "BATON_PUBLIC_URL": f"https://user:{SECRET}@baton.example",
        "BATON_SECRET_KEYS": f"{KEYS[0]},{SECRET}",
        "BATON_WEBHOOK_ALLOW": "10.0.0.0/8,10.0.0.1/8,localhost",
    }
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env(wrong)
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted(wrong)
    assert SECRET not in str(caught.value)
    assert "'oracle'" in str(caught.value) and "extractive" in str(caught.value)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "8000.0", "1e3", "０８", "²", "9" * 5000])
def test_a_port_is_a_whole_number_of_the_right_size(port: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^PORT: must be a whole number from 1 to 65535"):
        Settings.from_env({"PORT": port})


def test_the_largest_and_smallest_values_are_allowed() -> None:
    assert Settings.from_env({"PORT": "65535", "BATON_CONCURRENCY": "1"}).port == 65535


def test_without_a_terminal_logs_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert Settings.from_env({}).log == "json"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert Settings.from_env({}).log == "text"


def test_a_password_appears_neither_in_the_repr_nor_in_a_fault() -> None:
    settings = Settings.from_env(
        {
            "DATABASE_URL": f"postgresql://baton:{SECRET}@db/baton",
            "OPENAI_API_KEY": SECRET,
            "ANTHROPIC_API_KEY": SECRET,
            "BATON_SECRET_KEYS": KEYS[1],
        }
    )
    assert SECRET not in repr(settings) and KEYS[1] not in repr(settings)
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env({"DATABASE_URL": f"mysql://baton:{SECRET}@db/baton"})
    assert SECRET not in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://baton:p%2Fq@db:5432/baton?sslmode=require",
        "postgresql://postgres@/baton?host=%2Ftmp%2Fpg&port=5432",
        "postgres://baton@db1:5432,db2:5433/baton",
        "postgresql://baton@[::1]:5432/baton",
    ],
)
def test_a_database_url_in_any_form_that_the_driver_reads_is_taken(url: str) -> None:
    assert Settings.from_env({"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("password", ["se/cret", "se?cret", "se#cret"])
def test_a_password_that_must_be_encoded_is_a_fault_and_is_not_quoted(password: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encoded") as fault:
        Settings.from_env({"DATABASE_URL": f"postgresql://baton:{password}@db/baton"})
    assert "cret" not in str(fault.value)


def test_limits_that_are_not_named_keep_their_defaults() -> None:
    assert Settings.from_env({"BATON_LIMITS": "poll=7,"}).limits == Limits(poll=7)
    zeros = ",".join(f"{name}=0" for name in Limits.__slots__)
    assert Settings.from_env({"BATON_LIMITS": zeros}).limits == NO_LIMITS


@pytest.mark.parametrize("quota", ["", "-1", "1.5", "many", "1000000", "²"])
def test_every_fault_of_the_limits_is_reported(quota: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env({"BATON_LIMITS": f"default={quota},burst=3,poll=1,poll=2"})
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["BATON_LIMITS"] * 3
    assert "default must be a whole number" in lines[0] and repr(quota) in lines[0]
    assert "'burst'" in lines[1] and "generate" in lines[1]
    assert "poll twice" in lines[2]


@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
def test_a_vendor_s_own_service_needs_a_key_and_another_server_may_not(vendor: str) -> None:
    asked = {"BATON_PROVIDER": vendor}
    key, url = f"{vendor.upper()}_API_KEY", f"{vendor.upper()}_BASE_URL"
    with pytest.raises(ConfigurationError, match=f"^{key}: is required for BATON_PROVIDER"):
        Settings.from_env(asked)
    assert Settings.from_env(asked | {key: SECRET}).provider == vendor
    assert Settings.from_env(asked | {url: "http://localhost:8001/v1"}).provider == vendor


def test_a_kind_has_the_model_that_is_named_for_it_by_its_name_or_a_short_word() -> None:
    settings = Settings.from_env(
        {
            "BATON_MODEL": "small",
            "BATON_MODEL_ARCHITECTURE": "large",
            "BATON_MODEL_ONBOARDING_BRIEF": "kind",
            "BATON_MODEL_ONBOARDING": "kind",
            "BATON_MODEL_HANDOFF": " ",
        }
    )
    assert settings.model_for("handoff") == ("small", "BATON_MODEL")
    assert settings.model_for("architecture_insight") == ("large", "BATON_MODEL_ARCHITECTURE")
    assert settings.model_for("onboarding_brief")[0] == "kind"
    assert Settings().model_for("handoff") == (None, "BATON_MODEL")


def test_two_models_for_one_kind_are_a_fault() -> None:
    both = {"BATON_MODEL_CORRELATION": "a", "BATON_MODEL_CROSS_SOURCE_CORRELATION": "b"}
    with pytest.raises(ConfigurationError, match="names another model for the same kind"):
        Settings.from_env(both)


@pytest.mark.parametrize("given", ["9464", ":9464", "host:0", "host:65536", "http://h:1", "a b:1"])
def test_the_address_of_metrics_is_a_host_and_a_port(given: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^BATON_METRICS: must be HOST:PORT such as"):
        Settings.from_env({"BATON_METRICS": given})
