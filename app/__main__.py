"""The command line, and the one place that imports both sides.

`baton run` is all of Baton; the other commands are one process of it, or what an operator does.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from setproctitle import setproctitle

from app import __version__, logs
from app.client import Client, RequestFailed, is_baton, is_ready
from app.db import (
    Database,
    DatabaseError,
    Unavailable,
    applied_version,
    current_version,
    migrate,
    open_database,
)
from app.embedded import EmbeddedPostgres, EmbeddedUnavailable, program, running_dsn
from app.history import NotARepository, open_history, read_events
from app.settings import ConfigurationError, Settings
from app.supervisor import stop_with_parent, supervise

FIRST_USER = "owner@localhost"  # of an embedded install; `baton key create --user` takes it
FIRST_PROJECT = "demo"
BATCH = 1_000  # events that an import stores in one transaction
START_TIMEOUT = 60.0  # seconds for `baton demo` to see its own server ready
WORKER_FRESH = 30.0  # seconds; a worker beats every 10
KEEP_ALIVE = 75  # seconds; at uvicorn's 5 a client's next poll often meets a closing connection

T = TypeVar("T")


class Fault(click.ClickException):
    """One clear line, exit 1."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="baton")
@click.pass_context
def cli(context: click.Context) -> None:
    """Baton writes handoffs and insights about a team's work."""
    try:
        context.obj = Settings.from_env()
    except ConfigurationError as error:
        click.echo(str(error), err=True)
        context.exit(2)


# --- Processes ------------------------------------------------------------------------------


@cli.command()
@click.pass_obj
def run(settings: Settings) -> None:
    """Run the API and one worker; without DATABASE_URL with an embedded PostgreSQL."""
    logs.configure(settings.log)
    setproctitle("baton run")
    with _database_to_run_on(settings) as dsn:
        _run_async(migrate(dsn))
        if settings.database_url is None:
            _run_async(_greet(replace(settings, database_url=dsn)))
        code = _run_async(supervise({**os.environ, "DATABASE_URL": dsn}))
    sys.exit(code)


@cli.command()
@click.pass_obj
def serve(settings: Settings) -> None:
    """Run the API alone."""
    # The HTTP side is heavy to import and only this command needs it.
    import uvicorn

    from app.main import create_app

    logs.configure(settings.log)
    setproctitle("baton serve")
    stop_with_parent()
    uvicorn.run(
        create_app(_with_database(settings)),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=30,
    )


@cli.command()
@click.pass_obj
def worker(settings: Settings) -> None:
    """Run a worker alone."""
    # Providers are loaded in this process only.
    import uvloop

    from tasks.worker import run_worker

    logs.configure(settings.log)
    setproctitle("baton worker")
    stop_with_parent()
    uvloop.run(run_worker(_with_database(settings)))


@cli.command("migrate")
@click.pass_obj
def migrate_command(settings: Settings) -> None:
    """Apply or upgrade the schema."""
    version = _run_async(migrate(_dsn(settings)))
    click.echo(f"The schema is at version {version}.")


# --- What an operator does ------------------------------------------------------------------


@cli.group()
def key() -> None:
    """API keys."""


@key.command("create")
@click.option("--user", "email", required=True, metavar="EMAIL")
@click.option("--label", default="", help="What the key is for.")
@click.pass_obj
def key_create(settings: Settings, email: str, label: str) -> None:
    """Make a key and print it, this once."""

    async def create(database: Database) -> str:
        user_id = await _user(database, email)
        return str(await database.value("create_api_key", user_id, label))

    click.echo(_with_pool(settings, create))


@key.command("list")
@click.pass_obj
def key_list(settings: Settings) -> None:
    """List the keys by their prefix."""

    async def rows(database: Database) -> list[Any]:
        return await database.rows("all_keys")

    for row in _with_pool(settings, rows):
        state = "revoked" if row["revoked_at"] else "live"
        click.echo(
            f"{row['prefix']}  {state:<7}  {row['created_at']:%Y-%m-%d}  {row['email']}"
            f"  {row['label']}".rstrip()
        )


@key.command("revoke")
@click.argument("prefix")
@click.pass_obj
def key_revoke(settings: Settings, prefix: str) -> None:
    """Revoke the key that begins with PREFIX (11 characters)."""

    async def revoke(database: Database) -> bool:
        return bool(await database.value("revoke_api_key", prefix))

    if not _with_pool(settings, revoke):
        raise Fault(f"There is no live key that begins with {prefix[:11]}.")
    click.echo("Revoked.")


@cli.group()
def project() -> None:
    """Projects."""


@project.command("create")
@click.argument("name")
@click.option("--user", "email", metavar="EMAIL", help="The owner; may be left out when alone.")
@click.option("--org", "slug", metavar="SLUG", help="The organization that it is for.")
@click.pass_obj
def project_create(settings: Settings, name: str, email: str | None, slug: str | None) -> None:
    """Make a project, personal or of an organization, and print its id."""

    async def create(database: Database) -> str:
        owner = await _user(database, email)
        organization = None
        if slug is not None:
            organization = await database.value("find_organization", slug)
            if organization is None:
                raise Fault(f"There is no organization {slug}.")
        return str(await database.value("create_project", name, owner, organization))

    click.echo(_with_pool(settings, create))


@project.command("list")
@click.pass_obj
def project_list(settings: Settings) -> None:
    """List all projects."""

    async def rows(database: Database) -> list[Any]:
        return await database.rows("all_projects")

    for row in _with_pool(settings, rows):
        of = row["organization"] or row["owner"]
        click.echo(f"{row['id']}  {row['slug']:<20}  {of:<30}  {row['name']}")


@cli.group("import")
def import_group() -> None:
    """Bring activity in."""


@import_group.command("git")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--project", "wanted", required=True, metavar="P", help="Id, slug or name.")
@click.option("--since", metavar="WHEN", help="As git understands it, e.g. '2 weeks ago'.")
@click.option("--repo", metavar="NAME", help="The resource's name; default: from the remote.")
@click.option("--source", default="github", show_default=True)
@click.pass_obj
def import_git(
    settings: Settings, path: Path, wanted: str, since: str | None, repo: str | None, source: str
) -> None:
    """Turn the commits, merges and tags of a git history into events; twice adds nothing."""

    async def store(database: Database) -> tuple[int, int, str]:
        return await _import_history(
            database, path, await _project(database, wanted), since=since, repo=repo, source=source
        )

    accepted, duplicates, name = _with_pool(settings, store)
    click.echo(f"{name}: {accepted} events imported, {duplicates} already there.", err=True)


@cli.command()
@click.option("--project", "wanted", required=True, metavar="P", help="Id, slug or name.")
@click.option("--source", "sources", multiple=True, metavar="S", help="May be repeated.")
@click.option("--until", metavar="WHEN", help="RFC 3339; look back from then, not from now.")
@click.option("--url", envvar="BATON_URL", help="Default: http://HOST:PORT.")
@click.option("--key", "key_", envvar="BATON_API_KEY", help="Default: one made for the occasion.")
@click.pass_obj
def handoff(
    settings: Settings,
    wanted: str,
    sources: tuple[str, ...],
    until: str | None,
    url: str | None,
    key_: str | None,
) -> None:
    """Ask for a handoff over HTTP, wait for it and print its Markdown."""
    base_url = url or _base_url(settings)
    with _key(settings, wanted, key_) as usable:
        client = Client(base_url, usable)
        click.echo(_handoff(client, wanted, sources=sources, until=until), nl=False)


@cli.command()
@click.pass_obj
def demo(settings: Settings) -> None:
    """Start Baton if need be, import this repository's history, print a handoff of it."""
    with _running(settings) as (base_url, dsn):
        local = replace(settings, database_url=dsn)

        async def store(database: Database) -> tuple[int, int, str]:
            project_id = await _demo_project(database)
            return await _import_history(database, _this_repository(), project_id)

        accepted, duplicates, name = _with_pool(local, store)
        click.echo(f"{name}: {accepted} events imported, {duplicates} already there.", err=True)
        with _key(local, FIRST_PROJECT, None) as usable:
            client = Client(base_url, usable)
            markdown = _handoff(client, FIRST_PROJECT, until=_last_activity(local))
            click.echo(markdown, nl=False)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def psql(settings: Settings, args: tuple[str, ...]) -> NoReturn:
    """Open psql on the database; ARGS go to psql."""
    dsn = _dsn(settings)
    try:
        path = str(program("psql"))
    except EmbeddedUnavailable:
        path = "psql"  # not bundled here: the one on the PATH
    try:
        os.execvp(path, ["psql", dsn, *args])
    except FileNotFoundError:
        raise Fault("There is no psql here; install it or baton's extra `embedded`.") from None


@cli.command()
@click.pass_obj
def doctor(settings: Settings) -> None:
    """Check configuration, database, schema, worker and provider."""
    findings = [("configuration", True, "read")]  # a wrong one has ended the program by now
    try:
        findings += _with_pool(settings, _examine)
    except click.ClickException as error:
        findings.append(("database", False, error.message))
    findings.append(("provider", True, f"{settings.provider}: built in, nothing to reach"))
    for name, good, finding in findings:
        click.echo(f"{'ok  ' if good else 'FAIL'}  {name:<14} {finding}")
    if not all(good for _, good, _ in findings):
        sys.exit(1)


# --- The pieces -----------------------------------------------------------------------------


def _run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; what the database says becomes one line."""
    try:
        return asyncio.run(work)
    except Unavailable as error:
        raise Fault(f"The database cannot be reached: {error}") from None
    except DatabaseError as error:
        raise Fault(str(error)) from None


def _with_pool(settings: Settings, work: Callable[[Database], Coroutine[Any, Any, T]]) -> T:
    """Run `work` with a small pool on the configured or embedded database."""
    dsn = _dsn(settings)

    async def opened() -> T:
        async with _opened(dsn) as database:
            return await work(database)

    return _run_async(opened())


@asynccontextmanager
async def _opened(dsn: str) -> AsyncIterator[Database]:
    async with open_database(dsn, application_name="baton cli", size=2) as database:
        yield database


def _dsn(settings: Settings) -> str:
    if settings.database_url:
        return settings.database_url
    try:
        dsn = running_dsn(settings.data_dir)
    except EmbeddedUnavailable as error:
        raise Fault(str(error)) from None
    if dsn is None:
        raise Fault(
            f"No database: set DATABASE_URL, or start `baton run` on {settings.data_dir} first."
        )
    return dsn


def _with_database(settings: Settings) -> Settings:
    return replace(settings, database_url=_dsn(settings))


def _base_url(settings: Settings) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


@contextmanager
def _database_to_run_on(settings: Settings) -> Iterator[str]:
    """The configured database, or the embedded one for as long as the body runs."""
    if settings.database_url:
        yield settings.database_url
        return
    server = EmbeddedPostgres(settings.data_dir)
    try:
        dsn = server.start()
    except EmbeddedUnavailable as error:
        raise Fault(str(error)) from None
    try:
        yield dsn
    finally:
        server.stop()


async def _greet(settings: Settings) -> None:
    """The first time, make a user, a project and a key, and say how to use them."""
    assert settings.database_url
    async with _opened(settings.database_url) as database:
        if await database.value("has_user"):
            return
        user_id = await database.value("create_user", FIRST_USER)
        project_id = await database.value("create_project", FIRST_PROJECT, user_id, None)
        raw_key = await database.value("create_api_key", user_id, "first start")
    base_url = _base_url(settings)
    click.echo(
        f"\nBaton is new here. This API key is shown once:\n\n    {raw_key}\n\n"
        f"The project `{FIRST_PROJECT}` is {project_id}. Ask for a handoff of it:\n\n"
        f"    curl -s {base_url}/api/v1/handoffs -H 'Authorization: Bearer {raw_key}' \\\n"
        f"      -H 'Content-Type: application/json' -d '{{\"project_id\":\"{project_id}\"}}'\n"
    )


async def _user(database: Database, email: str | None) -> str:
    if email is None:
        user_id = await database.value("sole_user")
        if user_id is None:
            raise Fault("--user: say whose; there is not exactly one user.")
    else:
        user_id = await database.value("find_user", email)
        if user_id is None:
            raise Fault(f"--user: there is no user {email}; make one: select ops.create_user(…).")
    return str(user_id)


async def _project(database: Database, wanted: str) -> Any:
    """The row of the project that a person means by its id, slug or name."""
    found = await database.rows("find_projects", wanted)
    if not found:
        raise Fault(f"--project: there is no project {wanted}; see: baton project list")
    if len(found) > 1:
        ids = ", ".join(row["id"] for row in found)
        raise Fault(f"--project: {wanted} may be any of {ids}; give the id.")
    return found[0]


async def _demo_project(database: Database) -> Any:
    if not await database.rows("find_projects", FIRST_PROJECT):
        user_id = await database.value("find_user", FIRST_USER)
        user_id = user_id or await database.value("create_user", FIRST_USER)
        await database.value("create_project", FIRST_PROJECT, user_id, None)
    return await _project(database, FIRST_PROJECT)


async def _import_history(
    database: Database,
    path: Path,
    project: Any,
    *,
    since: str | None = None,
    repo: str | None = None,
    source: str = "github",
) -> tuple[int, int, str]:
    """Store a history in batches, with a bar on a terminal; answers new, known and the name."""
    # The API's rules for a batch are its own; loading them here keeps other commands quick.
    from app.events import store

    try:
        history = await asyncio.to_thread(open_history, path, name=repo, since=since)
        accepted = duplicates = 0
        with click.progressbar(
            length=history.commits + history.tags, label=history.name, file=sys.stderr
        ) as bar:
            events = read_events(history, source=source)
            while batch := list(islice(events, BATCH)):
                for event in batch:
                    event["occurred_at"] = event["occurred_at"].isoformat()
                new, known = await store(database, project["owner_id"], project["id"], batch)
                accepted, duplicates = accepted + new, duplicates + known
                bar.update(len(batch))
    except NotARepository as error:
        raise Fault(str(error)) from None
    return accepted, duplicates, history.name


@contextmanager
def _key(settings: Settings, wanted: str, given: str | None) -> Iterator[str]:
    """The key that was given, or one of the project's owner for as long as the body runs."""
    if given:
        yield given
        return

    async def create(database: Database) -> str:
        owner = (await _project(database, wanted))["owner_id"]
        return str(await database.value("create_api_key", owner, "baton handoff"))

    made = _with_pool(settings, create)

    async def revoke(database: Database) -> None:
        await database.value("revoke_api_key", made)

    try:
        yield made
    finally:
        _with_pool(settings, revoke)


def _handoff(
    client: Client, wanted: str, *, sources: tuple[str, ...] = (), until: str | None = None
) -> str:
    """Ask, wait, and answer the Markdown; a failed job is a fault with its own sentence."""
    try:
        meant = [p for p in client.projects() if wanted in (p["id"], p["slug"], p["name"])]
        if len(meant) != 1:
            raise Fault(f"--project: {len(meant)} projects of this key are called {wanted}.")
        body: dict[str, Any] = {"project_id": meant[0]["id"]}
        if sources:
            body["sources"] = list(sources)
        if until:
            body["until"] = until
        job_id = client.request_handoff(body)
        started = time.monotonic()

        def show(status: str) -> None:
            click.echo(f"job {job_id}: {status} ({time.monotonic() - started:.0f} s)", err=True)

        ended = client.wait(job_id, show)
    except RequestFailed as error:
        raise Fault(str(error)) from None
    if ended["job"]["status"] == "failed":
        raise Fault(f"{ended['job']['error_code']}: {ended['job']['error']}")
    return str(ended["result"]["markdown"])


@contextmanager
def _running(settings: Settings) -> Iterator[tuple[str, str]]:
    """The base URL and DSN of the Baton of this configuration, started if it does not run."""
    base_url = _base_url(settings)
    dsn = settings.database_url or running_dsn(settings.data_dir)
    if dsn is not None and is_baton(base_url):
        yield base_url, dsn
        return
    port = settings.port if _is_free(settings.port) else _free_port()
    base_url = _base_url(replace(settings, port=port))
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    log_path = settings.data_dir / "demo.log"
    click.echo(f"Starting Baton at {base_url} (its log: {log_path}) …", err=True)
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app", "run"],
            env={**os.environ, "HOST": "127.0.0.1", "PORT": str(port), **_import_path()},
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _await_ready(process, base_url, log_path)
        yield base_url, _dsn(settings)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _await_ready(process: "subprocess.Popen[bytes]", base_url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_ready(base_url):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log_path.read_text(errors="replace")[-2000:]
            raise Fault(f"Baton did not start; the end of {log_path}:\n{tail}")
        time.sleep(0.1)


def _import_path() -> dict[str, str]:
    """Environment in which a child finds this very code, wherever the user happens to be."""
    here = str(Path(__file__).parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _this_repository() -> Path:
    """The repository that the user is in, else the checkout that this code lies in."""
    here = Path.cwd()
    if any((parent / ".git").exists() for parent in (here, *here.parents)):
        return here
    return Path(__file__).parent.parent


def _last_activity(settings: Settings) -> str | None:
    """When the demo's history ended, if that was so long ago that a handoff would be empty."""

    async def newest(database: Database) -> datetime | None:
        project_id = (await _project(database, FIRST_PROJECT))["id"]
        now = datetime.now(UTC)
        last: datetime | None = await database.value("newest_event", project_id, None, now)
        return last if last and (now - last).days >= 1 else None

    last = _with_pool(settings, newest)
    if last is None:
        return None
    click.echo(f"The history ends on {last:%Y-%m-%d}; the handoff is as of then.", err=True)
    return last.isoformat()


async def _examine(database: Database) -> list[tuple[str, bool, str]]:
    version = await database.value("server_version")
    applied = await applied_version(database)
    needed = current_version()
    findings = [
        ("database", True, f"PostgreSQL {version}"),
        (
            "schema",
            applied is not None and applied >= needed,
            f"version {applied}, this program needs {needed}" if applied else "none; baton migrate",
        ),
    ]
    if applied is not None:
        seen = await database.value("worker_seen")
        fresh = seen is not None and seen < WORKER_FRESH
        finding = "none has registered" if seen is None else f"last sign {seen:.0f} s ago"
        findings.append(("worker", fresh, finding))
    return findings


def main() -> None:
    """The console script."""
    cli()


if __name__ == "__main__":
    main()
