"""From every released version to this one: the same catalog, every row, and nobody stops work.

The old side is the released programs themselves, from tests/released, as processes.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from catalog import catalog, difference
from chaos.postgres import free_port
from chaos.receiver import Receiver, receiving
from conftest import connected, new_database, served, with_database

from app import migration
from app.db import current_version, open_database, queries, schema
from app.main import create_app
from app.migration import migrate
from app.queue import hung_bell
from app.settings import NO_LIMITS, Settings
from tasks.providers import Extractive
from tasks.worker import make_worker

ROOT = Path(__file__).parent.parent
RELEASED = sorted(int(path.name.partition(".")[0]) for path in ROOT.glob("tests/released/*.tar.gz"))
BEFORE = RELEASED[-1]  # whose programs go on working
# Of what is running, and of what the built-in provider and Baton's queue do not do.
GROWING = [
    *("events", "job_events", "jobs", "handoffs", "insights", "charges", "provider_calls"),
    *("webhook_deliveries", "webhook_attempts", "idempotency_keys", "deleted_jobs"),
]
pytestmark = pytest.mark.timeout(240)  # many processes start, which takes a busy machine long
EMPTY = {
    *("wait_slots", "procrastinate_workers", "procrastinate_periodic_defers", "provider_calls"),
    *("procrastinate_events", "procrastinate_migrations", "usage_by_day", "usage_counted"),
    "installation",
}


# --- Programs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders with the programs of each released version."""
    return {
        version: extract(version, tmp_path_factory.mktemp(f"version-{version}"))
        for version in RELEASED
    }


def extract(version: int, folder: Path) -> Path:
    """Put the programs of a released version into a folder."""
    with tarfile.open(ROOT / "tests" / "released" / f"{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@dataclass
class Program:
    """A process of one version."""

    child: asyncio.subprocess.Process
    url: str
    log: Path

    async def ready(self) -> None:
        """Wait until an API is ready."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, verify=False) as http:
            while True:
                assert self.child.returncode is None, self.log.read_text()
                with suppress(httpx.TransportError):
                    if (await http.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """As a supervisor stops it."""
        if self.child.returncode is None:
            self.child.send_signal(signal.SIGTERM)
        assert await self.child.wait() in (0, -signal.SIGTERM), self.log.read_text()

    def faults(self) -> list[Any]:
        """What it complained about. That a ticket is tried again is an error to Procrastinate."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        told = [json.loads(line) for line in lines]
        ours = [line for line in told if not line["logger"].startswith("procrastinate.")]
        return [line for line in ours if line["level"] in ("error", "critical")]


def environment(code: Path, dsn: str, **changes: str) -> dict[str, str]:
    foreign = ("BATON_", "DATABASE_URL", "HOST", "PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "PYTHONPATH": str(code), "DATABASE_URL": dsn, "BATON_LOG": "json",
        "BATON_LIMITS": "default=0,poll=0,generate=0", "BATON_WEBHOOK_ALLOW": "127.0.0.0/8",
        **changes,
    }  # fmt: skip


@asynccontextmanager
async def running(code: Path, command: str, dsn: str, folder: Path) -> AsyncIterator[Program]:
    """A process of the programs in `code`, on its way up when the body begins."""
    port = free_port()
    log = folder / f"{command}-{port}.log"
    with log.open("wb") as out:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "app", command,
            env=environment(code, dsn, PORT=str(port)), stdout=out, stderr=out,
        )  # fmt: skip
    program = Program(child, f"http://127.0.0.1:{port}", log)
    try:
        yield program
        await program.stop()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


# --- A client ------------------------------------------------------------------------------


@dataclass
class Client:
    """The one who asks, of the APIs of either version."""

    key: str
    project_id: str

    async def call(self, api: str, method: str, path: str, **options: Any) -> httpx.Response:
        """Like a client that keeps to the document: it asks again after a 503."""
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=30) as http:
            while True:
                response = await http.request(
                    method, f"{api}/api/v1{path}", headers=headers, **options
                )
                if response.status_code != 503:
                    return response
                await asyncio.sleep(0.1)

    async def submit(self, api: str, path: str = "/handoffs", **body: Any) -> str:
        if path == "/handoffs":
            body.setdefault("project_id", self.project_id)
        else:
            path = f"/projects/{self.project_id}/insights/{path}"
        response = await self.call(api, "POST", path, json=body)
        assert response.status_code == 202, response.text
        return str(response.json()["jobId"])

    async def job(self, api: str, job_id: str) -> dict[str, Any]:
        response = await self.call(api, "GET", f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return dict(response.json()["job"])

    async def ended(self, api: str, *job_ids: str) -> list[dict[str, Any]]:
        """Wait until the jobs have ended."""
        jobs = []
        for job_id in job_ids:
            while (job := await self.job(api, job_id))["status"] in ("pending", "processing"):
                await asyncio.sleep(0.05)
            jobs.append(job)
        return jobs


async def client(connection: asyncpg.Connection, name: str = "ada") -> Client:
    """Made as an operator makes one, with functions that every version has."""
    user_id = await connection.fetchval("select ops.create_user($1)", f"{name}@example.com")
    project_id = await connection.fetchval("select ops.create_project($1, $2)", name, user_id)
    key = await connection.fetchval("select ops.create_api_key($1)", user_id)
    return Client(key, str(project_id))


EVENTS = [
    {"source": "github", "event_type": "commit", "title": "feat(cache): switch to an LRU",
     "content": "We decided to drop the TTL map.", "external_id": "c-1"},
    {"source": "slack", "event_type": "message", "title": "Who runs the upgrade?"},
]  # fmt: skip


async def ingest(api: str, client: Client) -> None:
    body = {"project_id": client.project_id, "events": EVENTS}
    response = await client.call(api, "POST", "/events", json=body)
    assert response.status_code == 200, response.text


# --- Databases of released versions --------------------------------------------------------


@pytest.fixture(scope="module")
def lived_in(
    cluster: str, released: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, str]]:
    """Names of databases in which each version has worked and was stopped in the midst of it."""
    made = {version: f"baton_version_{version}_{os.getpid()}" for version in released}

    async def make() -> None:
        folder = tmp_path_factory.mktemp("lived")
        for name in made.values():
            await _sql(cluster, f"create database {name}")
        await asyncio.gather(
            *(
                _live(code, version, with_database(cluster, made[version]), folder)
                for version, code in released.items()
            )
        )

    asyncio.run(make())
    yield made
    for name in made.values():
        asyncio.run(_sql(cluster, f"drop database {name} with (force)"))


async def _sql(dsn: str, statement: str) -> None:
    async with connected(dsn) as connection:
        await connection.execute(statement)


async def _live(code: Path, version: int, dsn: str, folder: Path) -> None:
    async with connected(dsn) as connection:
        await install(code, version, connection)
        await _work(code, dsn, folder, connection)


async def install(code: Path, version: int, connection: asyncpg.Connection) -> None:
    """Make the database as that version did, which had Procrastinate 3.10."""
    await connection.execute((ROOT / "tests/released/procrastinate-3.10.0.sql").read_text())
    text = (code / "schema.sql").read_bytes()
    await connection.execute(text.decode())
    digest = hashlib.sha256(text).hexdigest()
    await connection.execute(queries()["record_schema"], version, digest)


async def _work(code: Path, dsn: str, folder: Path, connection: asyncpg.Connection) -> None:
    ada = await client(connection)
    user_id = await connection.fetchval("select id from users")
    await connection.execute(
        f"select ops.add_member(ops.create_organization('Acme'), '{user_id}', 'admin');"
        f"select ops.set_limit('{user_id}', 'poll', 1000);"
        f"select create_webhook('{user_id}', '{ada.project_id}', 'http://127.0.0.1:9/', "
        "'{job.completed,job.failed}');"
    )
    if await connection.fetchval("select to_regclass('plans')"):
        await connection.execute(
            "select ops.create_plan('team', 100);"
            f"select ops.set_plan('{user_id}', 'team');"
            f"select ops.add_credits('{user_id}', 5, 'hello');"
            "select ops.set_price('m', 1, 2);"
        )
    async with running(code, "serve", dsn, folder) as program:
        api = program.url
        async with running(code, "worker", dsn, folder):
            await program.ready()
            empty = await ada.submit(api)
            [failed] = await ada.ended(api, empty)
            assert failed["error_code"] == "no_result"
            await ingest(api, ada)
            paths = ("/handoffs", "correlation", "onboarding", "architecture", "release_notes")
            asked = [await ada.submit(api, path) for path in paths]
            ended = await ada.ended(api, *asked)
            assert ended[0]["result_kind"] == "handoff" and ended[2]["result_kind"] == "insight"
            assert {job["error_code"] for job in ended} <= {None, "no_result"}
            while not await connection.fetchval("select count(*) from webhook_attempts"):
                await asyncio.sleep(0.05)
        # What is left when all is stopped: with a ticket, with the lease of a dead worker, and due.
        await ada.submit(api, until="2026-01-01T00:00:00Z")
        left = [await ada.submit(api, sources=[source]) for source in ("github", "slack", "linear")]
        if await connection.fetchval("select to_regclass('deleted_jobs')"):
            for method, path in (
                ("POST", f"/jobs/{left[0]}/cancel"),
                ("DELETE", f"/jobs/{left[0]}"),
            ):
                assert (await ada.call(api, method, path)).is_success
            keyed = {"Idempotency-Key": "k-1"}
            body = {"project_id": ada.project_id}
            assert (await ada.call(api, "POST", "/handoffs", json=body, headers=keyed)).is_success
    await connection.execute(
        "with t as (update procrastinate_jobs set status = 'doing' "
        f"where args ->> 'job_id' = '{left[1]}' returning id) "
        f"select claim_job('{left[1]}', t.id, 'dead:1', 0.01) from t;"
        f"delete from procrastinate_jobs where args ->> 'job_id' = '{left[2]}';"
        f"insert into job_due values ('{left[2]}', now())"
    )
    if await connection.fetchval("select to_regclass('pauses')"):
        await connection.execute(
            "select ops.pause('release_notes');"
            f"select ops.set_concurrency('{ada.project_id}', 100);"
            "delete from installation;"  # its copies would take themselves for copies
        )


@pytest.fixture
async def there(of_version: tuple[int, str]) -> AsyncIterator[asyncpg.Connection]:
    """A connection to that database."""
    async with connected(of_version[1]) as connection:
        yield connection


@pytest.fixture
async def of_version(
    request: pytest.FixtureRequest,
    cluster: str,
    lived_in: dict[int, str],
    janitor: ThreadPoolExecutor,
) -> AsyncIterator[tuple[int, str]]:
    """A version and a DSN of a database that it left."""
    version = getattr(request, "param", BEFORE)
    async with new_database(cluster, lived_in[version], janitor) as dsn:
        yield version, dsn


each_version = pytest.mark.parametrize("of_version", RELEASED, indirect=True)


# --- The same as a new one -----------------------------------------------------------------


@each_version
async def test_an_upgraded_database_has_the_catalog_of_a_new_one(
    of_version: tuple[int, str], there: asyncpg.Connection, sql: asyncpg.Connection
) -> None:
    version, dsn = of_version
    new = await catalog(sql)
    assert difference(new, await catalog(there))
    done = await migrate(dsn)
    assert (done.before, done.version) == (version, current_version())
    if found := difference(new, await catalog(there)):
        pytest.fail(f"Upgraded from version {version} (+) it is not as a new one (-):\n{found}")
    # What a new one knows from the start is there as well.
    for table, rows in (await rows_of(sql)).items():
        if table not in ("schema_version", "procrastinate_migrations"):
            known = [timeless(row) for row in (await rows_of(there))[table]]
            assert [row for row in rows if timeless(row) not in known] == [], table


@each_version
async def test_no_row_is_lost_or_changed(
    of_version: tuple[int, str], there: asyncpg.Connection
) -> None:
    version, dsn = of_version
    before = await rows_of(there)
    assert {table for table, rows in before.items() if not rows} <= EMPTY
    await migrate(dsn)
    after = await rows_of(there)
    for table, rows in before.items():
        assert rows_missing(rows, after[table]) == [], table


@each_version
async def test_what_was_begun_before_is_finished_and_shown(
    of_version: tuple[int, str], there: asyncpg.Connection
) -> None:
    _, dsn = of_version
    await migrate(dsn)
    jobs = await there.fetch("select id, status, result_id from jobs order by id")
    [(user_id, project_id)] = await there.fetch("select owner_id, id from projects")
    ada = Client(await there.fetchval("select ops.create_api_key($1)", user_id), str(project_id))
    async with (
        served(create_app(Settings(database_url=dsn, limits=NO_LIMITS))) as url,
        open_database(dsn, application_name="baton test", size=5) as database,
        hung_bell(database) as bell,
    ):
        working, _ = make_worker(database, Extractive(), bell, concurrency=5, attempt_timeout=30)
        working.install_signal_handlers = False
        running_worker = asyncio.create_task(working.run())  # type: ignore[no-untyped-call]
        ended = await ada.ended(url, *(str(job["id"]) for job in jobs))
        for was, job in zip(jobs, ended, strict=True):
            if was["status"] in ("completed", "failed"):
                assert job["status"] == was["status"]
            else:
                assert job["status"] == "completed" or job["error_code"] == "no_result", job
            assert job["status"] == "failed" or job["usage"]["credits"] >= 1
        shown = (await ada.call(url, "GET", "/handoffs")).json()["handoffs"]
        assert str(jobs[1]["result_id"]) in {handoff["id"] for handoff in shown}
        [job] = await ada.ended(url, await ada.submit(url, "onboarding"))
        assert job["status"] == "completed"
        working.stop()
        await running_worker
    assert await there.fetchval("select count(*) from leases") == 0


@each_version
async def test_a_question_reaches_what_was_there_before(
    of_version: tuple[int, str], there: asyncpg.Connection
) -> None:
    _, dsn = of_version
    await there.execute(
        "insert into events (id, user_id, project_id, source, event_type, title, occurred_at) "
        "select gen_random_uuid(), user_id, project_id, source, event_type, 'Of old', "
        "now() - interval '16 days' from events limit 1"
    )
    await migrate(dsn)
    noted = (
        "select e.title, count(s.id) from events e left join search_entries s using (id) "
        "where s.artifact_id is null group by 1 order by 1"
    )
    expected = [("Of old", 0), ("Who runs the upgrade?", 1), ("feat(cache): switch to an LRU", 1)]
    assert sorted(map(tuple, await there.fetch(noted))) == sorted(expected)
    artifacts = {row[0] for row in await there.fetch("select id from handoffs union "
                                                     "select id from insights")}  # fmt: skip
    said = await there.fetch("select artifact_id, event_ids, terms from search_entries "
                             "where artifact_id is not null")  # fmt: skip
    assert len(artifacts) > 1 and {row["artifact_id"] for row in said} == artifacts
    events = {row[0] for row in await there.fetch("select id from events")}
    assert all(row["terms"] and set(row["event_ids"]) <= events for row in said)

    await there.execute("select enter_events(null, 100)")
    found = await there.fetchval(
        "select e.title from projects p, search_events(p.id, 'Why an LRU?', null, '{}', "
        "now() - interval '14 days', now(), 1) s join events e on e.id = s.id"
    )
    assert found == "feat(cache): switch to an LRU"

    # Once more, such as when a migration was broken off: nothing twice.
    await there.execute("delete from schema_version where version = $1", current_version())
    await migrate(dsn)
    assert await there.fetchval("select count(*) from search_entries") == len(said) + 2


async def rows_of(connection: asyncpg.Connection) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables."""
    tables = await connection.fetch(
        "select c.oid::regclass::text from pg_class c where relkind = 'r' "
        "and relnamespace in ('public'::regnamespace, to_regnamespace('ops')) order by 1"
    )
    found = {}
    for [table] in tables:
        rows = await connection.fetch(f"select to_jsonb(t)::text from {table} t")
        found[table] = [json.loads(row[0]) for row in rows]
    return found


@each_version
async def test_no_table_that_grows_is_read_or_written_anew_under_lock(
    of_version: tuple[int, str], there: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, dsn = of_version
    await there.execute("create table probe as select relname, seq_tup_read from "
                        "pg_stat_xact_user_tables where false")  # fmt: skip
    text = schema() + (
        "\ninsert into probe select relname, seq_tup_read from pg_stat_xact_user_tables "
        "where seq_tup_read > 0;"
    )
    monkeypatch.setattr(migration, "schema", lambda: text)
    files = "select relname, pg_relation_filenode(oid) from pg_class where relname = any($1)"
    before = {row[0]: row[1] for row in await there.fetch(files, GROWING)}
    await migrate(dsn)
    exempt = {"webhook_deliveries"} if version == 1 else set()  # nothing could make one over HTTP
    read = {row["relname"] for row in await there.fetch("select relname from probe")}
    assert read & set(GROWING) - exempt == set()
    after = {row[0]: row[1] for row in await there.fetch(files, GROWING)}
    assert {name for name in before if before[name] != after[name]} <= exempt


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the moments at which things were done, and how far workers have come."""
    if "keep" in row:  # of retention
        return {name: row[name] for name in ("name", "keep", "least")}
    return {k: v for k, v in row.items() if not re.match(r"\d{4}-\d\d-\d\dT", str(v))}


def rows_missing(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Any]:
    """Rows that are not there any more as they were; columns may have come, and a check may have
    another place among the others."""
    columns = before[0].keys() - {"place"} if before else set()

    def written(row: dict[str, Any]) -> str:
        return json.dumps({name: row.get(name) for name in sorted(columns)})

    there = set(map(written, after))
    return [row for row in before if written(row) not in there]


# --- Side by side --------------------------------------------------------------------------


async def test_old_programs_find_all_that_they_ask_for(
    of_version: tuple[int, str], there: asyncpg.Connection, released: dict[int, Path]
) -> None:
    """Every query of theirs takes and answers the same, by name and type, and perhaps more."""
    _, dsn = of_version
    text = (released[BEFORE] / "app" / "queries.sql").read_text()
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    asked = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert len(asked) > 50

    async def shapes() -> dict[str, Any]:
        async with connected(dsn) as connection:
            prepared = {name: await connection.prepare(query) for name, query in asked.items()}
            return {
                name: (
                    [kind.name for kind in one.get_parameters()],
                    {each.name: each.type.name for each in one.get_attributes()},
                )
                for name, one in prepared.items()
            }

    before = await shapes()
    await migrate(dsn)
    after = await shapes()
    for name, (takes, answers) in before.items():
        assert after[name][0] == takes, name
        assert answers.items() <= after[name][1].items(), name


async def test_old_and_new_programs_work_side_by_side(
    of_version: tuple[int, str],
    there: asyncpg.Connection,
    released: dict[int, Path],
    tmp_path: Path,
) -> None:
    _, dsn = of_version
    await migrate(dsn)
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(receiving())
        old, new = [
            await stack.enter_async_context(running(code, "serve", dsn, tmp_path))
            for code in (released[BEFORE], ROOT)
        ]
        await asyncio.gather(old.ready(), new.ready())
        for number, (accepting, other, worker) in enumerate(
            ((old.url, new.url, ROOT), (new.url, old.url, released[BEFORE]))
        ):
            ada = await client(there, f"ada-{number}")
            await _story(ada, accepting, other, receiver, worker, dsn, tmp_path)
        # They count together what a user may do.
        bob = await client(there, "bob")
        await there.execute(
            "select ops.set_limit(id, 'generate', 2) from users where email = 'bob@example.com'"
        )
        for api in (old.url, new.url):
            await bob.submit(api)
        for api in (old.url, new.url):
            body = {"project_id": bob.project_id}
            assert (await bob.call(api, "POST", "/handoffs", json=body)).status_code == 429
        assert old.faults() == new.faults() == []


async def _story(
    ada: Client, accepting: str, other: str, receiver: Receiver, worker: Path, dsn: str,
    folder: Path,
) -> None:  # fmt: skip
    """One API accepts, the other shows and changes, and a worker of the other's version works."""
    await ingest(accepting, ada)
    hook = {"project_id": ada.project_id, "url": receiver.url(f"/{ada.project_id}")}
    assert (await ada.call(accepting, "POST", "/webhooks", json=hook)).status_code == 201
    done = await ada.submit(accepting)
    unwanted = await ada.submit(accepting, "onboarding")
    assert (await ada.call(other, "POST", f"/jobs/{unwanted}/cancel")).is_success
    again = (await ada.call(accepting, "POST", f"/jobs/{unwanted}/retry")).json()["jobId"]
    async with running(worker, "worker", dsn, folder) as working:
        ended = await ada.ended(other, done, again, unwanted)
        assert [job["outcome"] for job in ended] == ["succeeded", "succeeded", "cancelled"]
        told: set[str] = set()
        while len(told) < 3:
            got = [each for each in receiver.got if each.target == f"/{ada.project_id}"]
            told = {each.headers["webhook-id"] for each in got}
            await asyncio.sleep(0.02)
        for api in (accepting, other):
            shown = (await ada.call(api, "GET", f"/jobs/{done}")).json()
            assert "LRU" in shown["result"]["markdown"]
            told_events = (await ada.call(api, "GET", f"/jobs/{done}/events")).json()["events"]
            assert [event["type"] for event in told_events][-1] == "job.completed"
        assert (await ada.call(other, "DELETE", f"/jobs/{unwanted}")).status_code == 204
        assert (await ada.call(accepting, "GET", f"/jobs/{unwanted}")).status_code == 410
        assert working.faults() == []


async def test_every_job_ends_that_is_accepted_while_a_database_is_upgraded(
    of_version: tuple[int, str],
    there: asyncpg.Connection,
    released: dict[int, Path],
    tmp_path: Path,
) -> None:
    _, dsn = of_version
    accepted: list[str] = []
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(running(released[BEFORE], "serve", dsn, tmp_path))
        worker = await stack.enter_async_context(running(released[BEFORE], "worker", dsn, tmp_path))
        await old.ready()
        clients = [await client(there, name) for name in ("bob", "eve", "joe")]
        for one in clients:
            await ingest(old.url, one)
        apis, stopped = [old.url], asyncio.Event()

        async def keep_asking(one: Client) -> None:
            while not stopped.is_set():
                job_id = await one.submit(apis[len(accepted) % len(apis)])
                accepted.append(job_id)
                [job] = await one.ended(apis[-1], job_id)
                assert job["status"] == "completed", (job["error_code"], job["error"])

        asking = [asyncio.create_task(keep_asking(one)) for one in clients]
        await _more(accepted, asking)
        done = await migrate(dsn)
        await _more(accepted, asking)
        new = await stack.enter_async_context(running(ROOT, "serve", dsn, tmp_path))
        newer = await stack.enter_async_context(running(ROOT, "worker", dsn, tmp_path))
        await new.ready()
        apis.append(new.url)
        await _more(accepted, asking)
        apis.remove(old.url)
        await worker.stop()
        await _more(accepted, asking)
        stopped.set()
        await asyncio.gather(*asking)
        for program in (old, worker, new, newer):
            assert program.faults() == [], program.log
    assert done.before == BEFORE


async def _more(accepted: list[str], asking: list[asyncio.Task[None]]) -> None:
    """Wait until some more have been accepted since now."""
    enough = len(accepted) + 6
    while len(accepted) < enough:
        for task in asking:
            if task.done():
                task.result()
        await asyncio.sleep(0.01)
