"""Asking for a handoff or an answer from the command line, and the demo that first starts what it
takes."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from app.background import child_environment
from app.client import Client, RequestFailed, is_baton, is_ready
from app.db import Database
from app.embedded import running_dsn
from app.operator import import_history
from app.settings import Settings
from app.terminal import Fault, dsn, find_project, with_pool

FIRST_USER = "owner@localhost"  # of an embedded install; `baton key create --user` takes it
FIRST_PROJECT = "demo"
OCCASION = "baton handoff"  # the label of keys that live for one command; see `has_key`
START_TIMEOUT = 60.0  # seconds for `baton demo` to see its own server ready


@click.command()
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
    with _key(settings, wanted, key_) as usable:
        client = Client(url or settings.base_url, usable, _say_wait)
        click.echo(_handoff(client, wanted, sources=sources, until=until), nl=False)


@click.command()
@click.option("--project", "wanted", required=True, metavar="P", help="Id, slug or name.")
@click.option("--url", envvar="BATON_URL", help="Default: http://HOST:PORT.")
@click.option("--key", "key_", envvar="BATON_API_KEY", help="Default: one made for the occasion.")
@click.argument("question")
@click.pass_obj
def ask(settings: Settings, wanted: str, url: str | None, key_: str | None, question: str) -> None:
    """Ask a question about the last 14 days over HTTP; print the answer and the ids of the events
    that it stands on."""
    with _key(settings, wanted, key_) as usable:
        client = Client(url or settings.base_url, usable, _say_wait)
        try:
            project_id = _project(client, wanted)
            answer, citations = client.ask(project_id, question, _shown("question"))
        except RequestFailed as error:
            raise Fault(str(error)) from None
    click.echo("\n".join([answer.rstrip("\n"), *(["", *citations] if citations else [])]))


@click.command()
@click.pass_obj
def demo(settings: Settings) -> None:
    """Start Baton if need be, import this repository's history, print a handoff of it."""
    # Leave through `finally`, so that the Baton that was started is stopped as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _running(settings) as (url, found):
        local = replace(settings, database_url=found)

        async def store(database: Database) -> tuple[int, int, str]:
            project = await first_project(database)
            return await import_history(database, _this_repository(), project)

        accepted, duplicates, name = with_pool(local, store)
        click.echo(f"{name}: {accepted} events imported, {duplicates} already there.", err=True)
        with _key(local, FIRST_PROJECT, None) as usable:
            client = Client(url, usable, _say_wait)
            markdown = _handoff(client, FIRST_PROJECT, until=_last_activity(local))
            click.echo(markdown, nl=False)


@contextmanager
def _key(settings: Settings, wanted: str, given: str | None) -> Iterator[str]:
    """The key that was given, or one of the project's owner for as long as the body runs."""
    if given:
        yield given
        return

    async def create(database: Database) -> str:
        owner = (await find_project(database, wanted))["owner_id"]
        return str(await database.value("create_api_key", owner, OCCASION))

    made = with_pool(settings, create)

    async def revoke(database: Database) -> None:
        await database.value("revoke_api_key", made)

    try:
        yield made
    finally:
        with_pool(settings, revoke)


def _handoff(
    client: Client, wanted: str, *, sources: tuple[str, ...] = (), until: str | None = None
) -> str:
    """Ask, wait, and answer the Markdown; a failed job is a fault with its own sentence."""
    try:
        body: dict[str, Any] = {"project_id": _project(client, wanted)}
        if sources:
            body["sources"] = list(sources)
        if until:
            body["until"] = until
        job_id = client.request_handoff(body)
        ended = client.wait(job_id, _shown(f"job {job_id}"))
    except RequestFailed as error:
        raise Fault(str(error)) from None
    if ended["job"]["status"] == "failed":
        raise Fault(f"{ended['job']['error_code']}: {ended['job']['error']}")
    return str(ended["result"]["markdown"])


def _project(client: Client, wanted: str) -> str:
    """The id of the project that is meant, of those that the key sees."""
    meant = [p for p in client.projects() if wanted in (p["id"], p["slug"], p["name"])]
    if len(meant) != 1:
        raise Fault(f"--project: {len(meant)} projects of this key are called {wanted}.")
    return str(meant[0]["id"])


def _shown(what: str) -> Callable[[str], None]:
    """Tells each status of a job, and how long it took until then."""
    started = time.monotonic()

    def show(status: str) -> None:
        click.echo(f"{what}: {status} ({time.monotonic() - started:.0f} s)", err=True)

    return show


def _say_wait(seconds: int) -> None:
    click.echo(f"The limit of requests is reached; going on in {seconds} s.", err=True)


@contextmanager
def _running(settings: Settings) -> Iterator[tuple[str, str]]:
    """The base URL and DSN of the Baton of this configuration, started if it does not run."""
    url = settings.base_url
    found = settings.database_url or running_dsn(settings.data_dir)
    if found is not None and is_baton(url):
        yield url, found
        return
    port = settings.port if _is_free(settings.port) else _free_port()
    url = replace(settings, host="127.0.0.1", port=port).base_url
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_path = settings.data_dir / "demo.log"
    click.echo(f"Starting Baton at {url} (its log: {log_path}) …", err=True)
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app", "run", "--no-greeting"],
            env=child_environment(HOST="127.0.0.1", PORT=str(port)),
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _await_ready(process, url, log_path)
        yield url, dsn(settings)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _await_ready(process: "subprocess.Popen[bytes]", url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_ready(url):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log_path.read_text(errors="replace")[-2000:]
            raise Fault(f"Baton did not start; the end of {log_path}:\n{tail}")
        time.sleep(0.1)


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
        project_id = (await find_project(database, FIRST_PROJECT))["id"]
        now = datetime.now(UTC)
        last: datetime | None = await database.value("newest_event", project_id, None, now)
        return last if last and (now - last).days >= 1 else None

    last = with_pool(settings, newest)
    if last is None:
        return None
    click.echo(f"The history ends on {last:%Y-%m-%d}; the handoff is as of then.", err=True)
    return last.isoformat()


async def first_project(database: Database) -> Any:
    """The project of an install that is new, and its user: made if they are not there."""
    if not await database.rows("find_projects", FIRST_PROJECT):
        user_id = await database.value("find_user", FIRST_USER)
        user_id = user_id or await database.value("create_user", FIRST_USER)
        await database.value("create_project", FIRST_PROJECT, user_id, None)
    return await find_project(database, FIRST_PROJECT)
