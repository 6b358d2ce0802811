"""The command line, and the one place that imports both sides.

`baton run` is all of Baton; the other commands are one process of it, or what an operator does.
"""

import asyncio
import fcntl
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from setproctitle import setproctitle

from app import __version__, connect, demo, github, logs, operator, tracing
from app.background import stop_with_parent
from app.cipher import make_key_file
from app.connector import TRANSIENT
from app.db import AHEAD, Database, DatabaseError, applied_version, current_version, schema_fault
from app.embedded import EmbeddedPostgres, EmbeddedUnavailable
from app.migration import migrate
from app.settings import ConfigurationError, Settings
from app.supervisor import CONFIGURATION_EXIT, supervise
from app.terminal import Fault, dsn, find_project, opened, run_async, with_database, with_pool


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


for command in (
    operator.key,
    operator.project,
    connect.integration,
    operator.import_group,
    operator.psql,
    operator.pg_dump,
    operator.doctor,
    demo.handoff,
    demo.ask,
    demo.demo,
):
    cli.add_command(command)


@cli.command()
@click.option("--greeting/--no-greeting", default=True, hidden=True)  # a key is not for a log
@click.pass_obj
def run(settings: Settings, greeting: bool) -> None:
    """Run the API and one worker; without DATABASE_URL with an embedded PostgreSQL."""
    logs.configure(settings.log)
    setproctitle("baton run")
    _claim_ports(settings, worker=True)
    # Until the supervisor listens to signals: leave through `finally`, so that no server is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _database_to_run_on(settings) as (found, server):
        run_async(migrate(found, anew=False, ahead=AHEAD))
        if greeting and settings.database_url is None:
            run_async(_greet(replace(settings, database_url=found)))
        code = run_async(supervise(found, server))
    sys.exit(code)


@cli.command()
@click.pass_obj
def serve(settings: Settings) -> None:
    """Run the API alone."""
    # The HTTP side is heavy to import and only this command needs it.
    from app import guard
    from app.main import create_app

    logs.configure(settings.log)
    setproctitle("baton serve")
    stop_with_parent()
    found = with_database(settings)
    if settings.traces:
        tracing.start("baton-api", __version__)
    _claim_ports(settings)
    _check_schema(found, "baton_api")
    guard.serve(create_app(found), settings.host, settings.port)


@cli.command()
@click.pass_obj
def worker(settings: Settings) -> None:
    """Run a worker alone."""
    # Providers are loaded in this process only.
    import uvloop

    from tasks.worker import WorkerBroken, run_worker

    logs.configure(settings.log)
    setproctitle("baton worker")
    stop_with_parent()
    found = with_database(settings)
    _check_schema(found, "baton_worker", older=False)
    if settings.traces:
        tracing.start("baton-worker", __version__)
    try:
        uvloop.run(run_worker(found))
    except ConfigurationError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except WorkerBroken as error:
        raise Fault(f"The worker stopped and should be started again: {error}") from None


@cli.command("mcp")
@click.option("--http", is_flag=True, help="Serve over streamable HTTP, at /mcp, not over stdio.")
@click.option("--host", help="With --http; default: HOST.")
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True)
@click.option("--url", envvar="BATON_URL", help="Of the API; default: http://HOST:PORT.")
@click.option("--key", envvar="BATON_API_KEY", help="Over HTTP each client sends its own.")
@click.pass_obj
def mcp_command(
    settings: Settings, http: bool, host: str | None, port: int, url: str | None, key: str | None
) -> None:
    """Serve an agent over the Model Context Protocol; a client of the API."""
    try:
        from app import mcp_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        click.echo("`baton mcp` needs the extra `mcp`: pip install 'baton[mcp]'.", err=True)
        sys.exit(2)

    if not (http or key):
        click.echo("BATON_API_KEY: is required, to call the API with.", err=True)
        sys.exit(2)
    logs.configure(settings.log)
    setproctitle("baton mcp")  # also takes the key out of the process list
    found = url or settings.base_url
    if http:
        mcp_server.serve_http(found, host or settings.host, port)
    else:
        run_async(mcp_server.serve_stdio(found, key or ""))


@operator.import_group.command("github")
@click.argument("repository", metavar="OWNER/REPO")
@click.option("--project", "wanted", required=True, metavar="P", help="Id, slug or name.")
@click.option("--since", metavar="WHEN", help="2026-01-31 or '2 weeks ago'; default: all of it.")
@click.option(
    "--url",
    envvar="GITHUB_API_URL",
    default=github.API,
    show_default=True,
    help="Of the REST API; of a GitHub Enterprise Server https://HOST/api/v3.",
)
@click.option("--token", envvar="GITHUB_TOKEN", hidden=True)  # not for a list of processes
@click.pass_obj
def import_github(
    settings: Settings, repository: str, wanted: str, since: str | None, url: str, token: str | None
) -> None:
    """Turn issues, pull requests, reviews and releases into events; twice adds nothing.

    GITHUB_TOKEN is needed; it has to be able to read contents, issues and pull requests.
    """
    # The mapping is the worker's, and only this command needs it here.
    from tasks.mapping import rows
    from tasks.sources.event import Delivery
    from tasks.sources.github import events

    def mapped(event: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        delivery = Delivery({"x-github-event": event}, body, datetime.now(UTC))
        found = rows("github", delivery, events(delivery))
        return [{key: value for key, value in row.items() if key != "in"} for row in found]

    async def store(database: Database) -> github.Imported:
        project = await find_project(database, wanted)
        return await operator.import_from_github(
            database, project, repository, rows=mapped, since=since, url=url, token=token
        )

    done = with_pool(settings, store)
    click.echo(
        f"{done.name}: {done.accepted} events imported, {done.duplicates} already there.", err=True
    )


@cli.command("migrate")
@click.option("--anew", is_flag=True, help="Also if it is there: mends what was changed by hand.")
@click.pass_obj
def migrate_command(settings: Settings, anew: bool) -> None:
    """Apply or upgrade the schema; Baton may be running."""
    click.echo(str(run_async(migrate(dsn(settings), anew=anew))))


def _check_schema(settings: Settings, role: str, *, older: bool = True) -> None:
    """End now rather than break later on what the schema has no longer, or not yet. A database that
    is away comes back.

    Args:
        role: of the process, whose login may have no other.
        older: an older schema will do: it is being migrated, and the process waits for that itself.
    """
    assert settings.database_url

    async def applied(dsn: str) -> int | None:
        async with opened(dsn, role) as database:
            return await applied_version(database)

    try:
        found = asyncio.run(applied(settings.database_url))
    except DatabaseError as error:
        if older or isinstance(error.__cause__, TRANSIENT):
            return
        raise Fault(str(error)) from None  # there is no such role, or it is not for this login
    fault = schema_fault(found)
    if fault and found is not None and found > current_version():
        click.echo(fault, err=True)
        sys.exit(CONFIGURATION_EXIT)
    if fault and not older:
        raise Fault(fault)


@contextmanager
def _database_to_run_on(settings: Settings) -> Iterator[tuple[str, EmbeddedPostgres | None]]:
    """The configured database, or the embedded one, with its server, while the body runs."""
    if settings.database_url:
        yield settings.database_url, None
        return
    server = EmbeddedPostgres(settings.data_dir)
    try:
        with _alone(settings.data_dir):
            _make_keys(settings)
            try:
                yield server.start(), server
            finally:
                server.stop()
    except EmbeddedUnavailable as error:
        raise Fault(str(error)) from None


def _make_keys(settings: Settings) -> None:
    """The key of the embedded database's secrets lies beside it, unless the environment has one."""
    if settings.secret_keys:
        return
    try:
        make_key_file(settings.data_dir)
    except OSError as error:
        raise Fault(f"BATON_DATA_DIR: {error.filename}: {error.strerror}") from None


@contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """One `baton run` for one data directory: each stops the server of both when it ends."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (data_dir / "run.lock").open("w")
    except OSError as error:
        raise Fault(f"BATON_DATA_DIR: {error.filename}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"`baton run` already runs on {data_dir}; stop it first.") from None
        yield


def _claim_ports(settings: Settings, *, worker: bool = False) -> None:
    """Say at once that a port is taken; a child that cannot listen would be restarted forever.

    Args:
        worker: those of a worker as well.
    """
    wanted = {"PORT": (settings.host, settings.port), "BATON_METRICS": settings.metrics}
    if worker:
        wanted["BATON_WORKER_METRICS"] = settings.worker_metrics
    with ExitStack() as claimed:
        for name, address in wanted.items():
            if address is not None:
                claimed.enter_context(_claimed(name, *address))


def _claimed(name: str, host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
    except OSError as error:
        probe.close()
        raise Fault(f"{name}: {host}:{port}: {error.strerror}.") from None
    return probe


async def _greet(settings: Settings) -> None:
    """The first time, make a user, a project and a key, and say how to use them."""
    assert settings.database_url
    async with opened(settings.database_url) as database:
        if await database.value("has_key"):
            return
        project = await demo.first_project(database)
        raw_key = await database.value("create_api_key", project["owner_id"], "first start")
    url, project_id = settings.base_url, project["id"]
    click.echo(
        f"\nBaton is new here. This API key is shown once:\n\n    {raw_key}\n\n"
        f"The project `{demo.FIRST_PROJECT}` is {project_id}. Ask for a handoff of it:\n\n"
        f"    curl -s {url}/api/v1/handoffs -H 'Authorization: Bearer {raw_key}' \\\n"
        f"      -H 'Content-Type: application/json' -d '{{\"project_id\":\"{project_id}\"}}'\n"
    )


def main() -> None:
    """The console script."""
    cli()


if __name__ == "__main__":
    main()
