"""What Prometheus reads: counted where it happens, by few labels, and never at the work's cost."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from conftest import Caller, Workers, loopback, served
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from scripted import CALL
from starlette.applications import Starlette
from test_error_shape import Gate, send, serving

from app import exporter, metrics
from app.db import Database
from app.exporter import Exporter, listening
from app.main import create_app
from app.queue import Bell
from app.settings import ConfigurationError, Settings
from app.sweeper import Sweeper
from tasks.breaker import FAILURES, Breaker
from tasks.calls import Calls
from tasks.context import Context
from tasks.outcomes import Retry
from tasks.providers import Completion, Extractive

Drain = Callable[..., Awaitable[None]]
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]
REGISTRIES = (metrics.COMMON, metrics.API, metrics.DATABASE, metrics.WORKER)


def values_of(page: str) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


class Since:
    """What has been counted in this process since it was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> Values:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for registry in REGISTRIES
            for family in registry.collect()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return self._now().get(key, 0) - self._before.get(key, 0)

    def grown(self, name: str) -> dict[tuple[str, ...], float]:
        """By the values of its labels in alphabetical order, by how much each series grew."""
        return {
            tuple(value for _, value in sorted(labels)): value - self._before.get((n, labels), 0)
            for (n, labels), value in self._now().items()
            if n == name and value != self._before.get((n, labels), 0)
        }


@pytest.fixture
def since() -> Since:
    return Since()


@pytest.fixture(autouse=True)
def always_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page and no state is kept from one scrape to the next, unless a test says so."""
    monkeypatch.setattr(exporter, "PAGE_AGE", 0.0)
    monkeypatch.setattr(exporter, "STATE_AGE", 0.0)


async def scraped(url: str) -> Values:
    answer = await send(url, ["GET /metrics HTTP/1.1"])
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return values_of(answer.body.decode())


# --- The page ------------------------------------------------------------------------------


async def test_a_request_is_counted_by_the_template_of_its_path_and_its_status(
    base_url: str, caller: Caller, since: Since
) -> None:
    for _ in range(3):
        await caller.http.get("/jobs/00000000-0000-7000-8000-000000000000")
    await caller.http.get("/projects")
    await send(base_url, ["GET /projects/secret-name HTTP/1.1"])
    await send(base_url, ["BREW /healthz HTTP/1.1"])
    await send(base_url, ["DELETE /healthz HTTP/1.1"])
    assert since.grown("baton_http_requests_total") == {
        ("GET", "/api/v1/jobs/{job_id}", "404"): 3,
        ("GET", "/api/v1/projects", "200"): 1,
        ("GET", "other", "404"): 1,
        ("other", "other", "400"): 1,
        ("DELETE", "/healthz", "405"): 1,
    }
    taken = since.grown("baton_http_request_duration_seconds_count")
    assert taken["GET", "/api/v1/jobs/{job_id}"] == 3
    page = await scraped(base_url)
    assert page["baton_http_requests_in_progress", frozenset()] == 1  # this very one


async def test_a_request_that_is_held_open_counts_but_is_not_timed(
    caller: Caller, app: Starlette, since: Since
) -> None:
    job = await caller.submit()
    held = asyncio.create_task(caller.http.get(f"/jobs/{job}", headers={"Prefer": "wait=20"}))
    while not len(app.state.hub):
        await asyncio.sleep(0.01)
    assert since("baton_http_requests_held") == 1
    await caller.http.post(f"/jobs/{job}/cancel")
    assert (await held).status_code == 200
    assert since("baton_http_requests_held") == 0
    route = "/api/v1/jobs/{job_id}"
    assert since("baton_http_requests_total", method="GET", route=route, status="200") == 1
    assert since("baton_http_request_duration_seconds_count", method="GET", route=route) == 0


async def test_the_page_needs_no_key_and_names_nobody(
    base_url: str, caller: Caller, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: a secret title"})
    job_id = await caller.submit()
    await drain()
    await caller.job(job_id)
    text = (await send(base_url, ["GET /metrics HTTP/1.1"])).body.decode()
    assert "baton_http_requests_total{" in text
    for secret in (job_id, caller.project_id, caller.user_id, caller.key, "ada", "secret title"):
        assert secret not in text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", text)


async def test_the_page_of_the_api_tells_what_the_database_knows(
    base_url: str, caller: Caller, sql: asyncpg.Connection
) -> None:
    await caller.ingest({"title": "feat: one"})
    for _ in range(3):
        await caller.submit()
    ids = [row["id"] for row in await sql.fetch("select id from jobs order by id")]
    await sql.execute(
        "insert into job_due (job_id, not_before, reason) values ($1, 'infinity', 'concurrency')",
        ids[0],
    )
    await sql.execute("update jobs set created_at = now() - interval '90 s' where id = $1", ids[1])
    await sql.execute(
        "select claim_job($1, 1, 'w', -1)", ids[2]
    )  # its lease has expired at once, and the sweeper may be about to see it
    page = await scraped(base_url)
    jobs = {
        dict(labels)["state"]: value
        for (name, labels), value in page.items()
        if name == "baton_jobs" and dict(labels)["kind"] == "handoff"
    }
    assert jobs["held"] == 1 and jobs["ready"] + jobs["running"] == 2
    oldest = page["baton_oldest_ready_seconds", frozenset({("kind", "handoff")})]
    assert 90 <= oldest < 150
    assert page["baton_database_up", frozenset()] == 1
    assert page["baton_workers_alive", frozenset()] == 0
    assert page["baton_check_ok", frozenset({("check", "worker_seen")})] == 0
    assert page["baton_check_ok", frozenset({("check", "invalid_indexes")})] == 1
    assert ("baton_worker_concurrency", frozenset()) not in page  # that is the worker's to tell


async def test_without_a_database_the_page_says_so_and_leaves_out_what_nobody_knows(
    dsn: str,
) -> None:
    gate = Gate(dsn)
    await gate.open()
    async with serving(gate.dsn) as (base_url, _):
        assert ("baton_workers_alive", frozenset()) in await scraped(base_url)
        gate.shut()
        page = await scraped(base_url)
        assert page["baton_database_up", frozenset()] == 0
        assert ("baton_workers_alive", frozenset()) not in page
        assert not [name for name, _ in page if name == "baton_jobs"]


async def test_an_empty_database_is_up_or_not_but_never_an_error(empty_dsn: str) -> None:
    async with serving(empty_dsn) as (base_url, _):
        page = await scraped(base_url)
    assert page["baton_database_up", frozenset()] == 0


async def test_a_flood_of_scrapes_reads_the_database_once_and_makes_one_page(
    api: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "PAGE_AGE", 1.0)
    monkeypatch.setattr(exporter, "STATE_AGE", 10.0)
    asked: list[str] = []
    made: list[CollectorRegistry] = []
    row = api.row

    async def counted(name: str, *args: Any) -> Any:
        asked.append(name)
        return await row(name, *args)

    def written(registry: CollectorRegistry) -> bytes:
        made.append(registry)
        return generate_latest(registry)

    monkeypatch.setattr(api, "row", counted)
    monkeypatch.setattr(exporter, "generate_latest", written)
    now = 100.0
    page = Exporter(metrics.API, {}, api, clock=lambda: now)
    pages = await asyncio.gather(*(page.page() for _ in range(200)))
    assert len(set(pages)) == 1 and (len(asked), len(made)) == (1, 3)
    now += 1.1  # another page, of what was read before
    await page.page()
    assert (len(asked), len(made)) == (1, 6)
    now += 10.0
    await page.page()
    assert (len(asked), len(made)) == (2, 9)


async def test_pools_are_shown_by_what_is_used_and_what_they_may_have(database: Database) -> None:
    page = Exporter(metrics.WORKER, {"worker": database})
    async with database.connection():
        values = values_of((await page.page()).decode())
    assert values["baton_pool_connections", frozenset({("pool", "worker"), ("state", "used")})] == 1
    assert values["baton_pool_connections_limit", frozenset({("pool", "worker")})] == 10


# --- A port of its own ---------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    with loopback() as taken:
        return int(taken.getsockname()[1])


async def test_with_a_port_of_its_own_the_page_is_there_and_nowhere_else(
    dsn: str, free_port: int
) -> None:
    own = f"http://127.0.0.1:{free_port}"
    app = create_app(Settings(database_url=dsn, metrics=("127.0.0.1", free_port)))
    async with served(app) as base_url:
        assert (await send(base_url, ["GET /metrics HTTP/1.1"])).status == 404
        assert ("baton_workers_alive", frozenset()) in await scraped(own)
        for path in ("/", "/healthz", "/api/v1/projects", "/metrics/x"):
            assert (await send(own, [f"GET {path} HTTP/1.1"])).status == 404
        assert (await send(own, ["POST /metrics HTTP/1.1"])).status == 405
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{own}/metrics")


async def test_a_port_that_is_taken_is_one_line_that_names_the_variable(
    database: Database,
) -> None:
    page = Exporter(metrics.WORKER, {})
    with loopback() as taken:
        address = ("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigurationError, match=r"^BATON_WORKER_METRICS: 127.0.0.1:\d+: Addr"):
            async with listening(address, "BATON_WORKER_METRICS", page):
                pass


async def test_the_port_of_a_worker_tells_of_the_worker_and_reads_no_database(
    free_port: int, worker: Workers
) -> None:
    worker(concurrency=7)
    async with listening(("127.0.0.1", free_port), "V", Exporter(metrics.WORKER, {})):
        page = await scraped(f"http://127.0.0.1:{free_port}")
    assert page["baton_worker_concurrency", frozenset()] == 7
    assert not [name for name, _ in page if name in ("baton_jobs", "baton_database_up")]
    assert not [name for name, _ in page if name.startswith("baton_http_")]


# --- Jobs and what they take ---------------------------------------------------------------


async def test_a_job_is_counted_from_its_request_to_its_end(
    caller: Caller, drain: Drain, since: Since
) -> None:
    await caller.ingest({"title": "feat: one"})
    again = {"Idempotency-Key": "k"}
    body = {"project_id": caller.project_id}
    for _ in range(2):
        await caller.http.post("/handoffs", json=body, headers=again)
    cancelled = await caller.submit("/handoffs", job={"priority": "low"})
    await caller.http.post(f"/jobs/{cancelled}/cancel")
    await caller.http.post(f"/jobs/{cancelled}/cancel")
    await drain()
    assert since.grown("baton_job_transitions_total") == {
        ("handoff", "submit"): 2,
        ("handoff", "cancel"): 1,
        ("handoff", "claim"): 1,
        ("handoff", "complete"): 1,
    }
    assert since.grown("baton_jobs_ended_total") == {
        ("none", "handoff", "succeeded"): 1,
        ("cancelled", "handoff", "cancelled"): 1,
    }
    assert since.grown("baton_job_pickup_seconds_count") == {("handoff",): 1}
    assert since.grown("baton_job_attempt_seconds_count") == {("handoff", "complete"): 1}
    whole = since("baton_job_duration_seconds_sum", kind="handoff", outcome="succeeded")
    attempt = since("baton_job_attempt_seconds_sum", kind="handoff", transition="complete")
    assert whole > attempt > 0
    assert since("baton_attempts_in_progress") == 0


async def test_a_job_that_fails_counts_with_its_code_and_one_that_waits_does_not_end(
    caller: Caller, drain: Drain, since: Since
) -> None:
    class Busy(Extractive):
        async def complete(self, context: Context, calls: Calls) -> Completion:
            raise Retry("Busy.")

    await caller.submit()  # there is nothing to write about
    await drain()
    await caller.ingest({"title": "feat: one"})
    await caller.submit()
    await drain(Busy())
    assert since.grown("baton_jobs_ended_total") == {("no_result", "handoff", "failed"): 1}
    assert since.grown("baton_job_attempt_seconds_count") == {
        ("handoff", "fail"): 1,
        ("handoff", "park"): 1,
    }


async def test_a_job_that_the_sweep_ends_counts_with_its_code(
    caller: Caller, sql: asyncpg.Connection, database: Database, bell: Bell, since: Since
) -> None:
    await caller.submit("/handoffs", job={"start_timeout_s": 1})
    await sql.execute("update jobs set start_deadline_at = now() - interval '1 s'")
    assert await Sweeper(database, bell).sweep_once() == 1
    assert since("baton_job_transitions_total", kind="handoff", transition="sweep") == 1
    assert since.grown("baton_jobs_ended_total") == {("timeout", "handoff", "expired"): 1}


async def test_a_claim_that_comes_second_is_no_second_pickup(
    caller: Caller, drain: Drain, sql: asyncpg.Connection, since: Since
) -> None:
    class BusyOnce(Extractive):
        tries = 0

        async def complete(self, context: Context, calls: Calls) -> Completion:
            self.tries += 1
            if self.tries == 1:
                raise Retry("Busy.")
            return await super().complete(context, calls)

    await caller.ingest({"title": "feat: one"})
    await caller.submit()
    provider = BusyOnce()
    await drain(provider)
    await sql.execute("update job_due set not_before = now()")
    await sql.execute("select wake_due(10)")
    await drain(provider)
    assert since("baton_job_transitions_total", kind="handoff", transition="claim") == 2
    assert since.grown("baton_job_pickup_seconds_count") == {("handoff",): 1}


async def test_calls_of_models_count_by_the_name_that_was_asked_for(
    caller: Caller, drain: Drain, since: Since
) -> None:
    class Calling(Extractive):
        async def complete(self, context: Context, calls: Calls) -> Completion:
            calls.use("small")
            told = {**CALL, "model": "small-2026-11-24"}
            calls.record(**{**told, "outcome": "rate_limited", "completion_tokens": 0})
            calls.record(**told)
            return await Extractive().complete(context, Calls())

    await caller.ingest({"title": "feat: one"})
    await caller.submit()
    await drain(Calling())
    assert since.grown("baton_provider_calls_total") == {
        ("handoff", "small", "rate_limited"): 1,
        ("handoff", "small", "ok"): 1,
    }
    assert since.grown("baton_provider_tokens_total") == {
        ("handoff", "small", "prompt"): 2_000,
        ("handoff", "small", "completion"): 200,
    }
    assert since("baton_provider_call_duration_seconds_sum", model="small") == 3.0


async def test_an_attempt_that_loses_its_lease_counts_as_fenced_and_ends_nothing(
    caller: Caller, drain: Drain, sql: asyncpg.Connection, since: Since
) -> None:
    class Slow(Extractive):
        async def complete(self, context: Context, calls: Calls) -> Completion:
            await sql.execute("update jobs set lease_token = gen_random_uuid()")
            return await super().complete(context, calls)

    await caller.ingest({"title": "feat: one"})
    await caller.submit()
    await drain(Slow())
    assert since.grown("baton_leases_lost_total") == {("write",): 1}
    assert since.grown("baton_job_attempt_seconds_count") == {("handoff", "fenced"): 1}
    assert since.grown("baton_jobs_ended_total") == {}


def test_the_breaker_shows_whether_it_is_open(since: Since) -> None:
    breaker = Breaker()
    for n in range(FAILURES):
        breaker.fail(f"job {n}")
    assert since("baton_breaker_opened_total") == 1
    assert metrics.WORKER.get_sample_value("baton_breaker_open") == 1
    breaker.succeed()
    assert metrics.WORKER.get_sample_value("baton_breaker_open") == 0


# --- Names ---------------------------------------------------------------------------------


def families() -> Iterator[Metric]:
    for registry in REGISTRIES:
        yield from (f for f in registry.collect() if f.name.startswith("baton"))


def test_names_are_those_of_prometheus() -> None:
    for family in families():
        assert re.fullmatch(r"baton(_[a-z]+)+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        timed = family.name.endswith("_seconds")
        if family.type == "histogram":
            assert timed, family.name
        assert not re.search(r"_(ms|millis|minutes|percent|count|sum|total)$", family.name)


def test_no_name_is_used_twice() -> None:
    names = [family.name for family in families()]
    assert len(names) == len(set(names)) > 30


def test_a_word_that_others_choose_cannot_fill_the_page() -> None:
    words = metrics.Words(2)
    assert [words(w) for w in ("a", "b", "c", "a", "d", "")] == [
        "a",
        "b",
        "other",
        "a",
        "other",
        "other",
    ]


def labels_of(family: Metric) -> tuple[str, ...]:
    """The labels that a metric is declared with."""
    for registry in REGISTRIES:
        for name in (family.name, f"{family.name}_total", f"{family.name}_info"):
            declared = registry._names_to_collectors.get(name)
            if declared is not None:
                return tuple(getattr(declared, "_labelnames", ()))
    raise AssertionError(family.name)


def name_of(family: Metric) -> str:
    """As the page has it, and so a query."""
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def test_the_table_of_the_documentation_is_what_is_declared(root: Path) -> None:
    text = (root / "docs" / "monitoring.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `baton_")]
    assert rows == [
        f"| `{name_of(family)}` | {family.type} | {', '.join(labels_of(family))} "
        f"| {family.documentation} |"
        for family in families()
    ]
