"""What an operator does from the command line: keys, projects, imports, psql, dumps, doctor.

Keys and projects are functions of the schema `ops` as well; those commands only save typing.
"""

import asyncio
import os
import sys
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import click
import httpx

from app.db import Database, applied_version, current_version, schema_fault
from app.embedded import EmbeddedUnavailable, program
from app.events import store
from app.github import GitHub, GitHubError, Imported, Rows, import_repository, moment_of
from app.history import NotARepository, open_history, read_events
from app.schemas import BATCH_MAX
from app.settings import Settings
from app.sweeper import DEAD_AFTER
from app.terminal import Fault, dsn, find_project, find_user, with_pool


@click.group()
def key() -> None:
    """API keys."""


@key.command("create")
@click.option("--user", "email", required=True, metavar="EMAIL")
@click.option("--label", default="", help="What the key is for.")
@click.pass_obj
def key_create(settings: Settings, email: str, label: str) -> None:
    """Make a key and print it, this once."""

    async def create(database: Database) -> str:
        user_id = await find_user(database, email)
        return str(await database.value("create_api_key", user_id, label))

    click.echo(with_pool(settings, create))


@key.command("list")
@click.pass_obj
def key_list(settings: Settings) -> None:
    """List the keys by their prefix."""

    async def rows(database: Database) -> list[Any]:
        return await database.rows("all_keys")

    for row in with_pool(settings, rows):
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

    if not with_pool(settings, revoke):
        raise Fault(f"There is no live key that begins with {prefix[:11]}.")
    click.echo("Revoked.")


@click.group()
def project() -> None:
    """Projects."""


@project.command("create")
@click.argument("name")
@click.option("--user", "email", metavar="EMAIL", help="The owner; may be left out when clear.")
@click.option("--org", "slug", metavar="SLUG", help="The organization that it is for.")
@click.pass_obj
def project_create(settings: Settings, name: str, email: str | None, slug: str | None) -> None:
    """Make a project, personal or of an organization, and print its id."""

    async def create(database: Database) -> str:
        organization = owner = None
        if slug is not None:
            organization = await database.value("find_organization", slug)
            if organization is None:
                raise Fault(f"--org: there is no organization {slug}.")
            if email is None:
                owner = await database.value("sole_member", organization)
                if owner is None:
                    raise Fault(f"--user: say whose; {slug} has not just one member or admin.")
        owner = owner or await find_user(database, email)
        return str(await database.value("create_project", name, owner, organization))

    click.echo(with_pool(settings, create))


@project.command("list")
@click.pass_obj
def project_list(settings: Settings) -> None:
    """List all projects."""

    async def rows(database: Database) -> list[Any]:
        return await database.rows("all_projects")

    for row in with_pool(settings, rows):
        of = row["organization"] or row["owner"]
        click.echo(f"{row['id']}  {row['slug']:<20}  {of:<30}  {row['name']}")


@click.group("import")
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
        return await import_history(
            database,
            path,
            await find_project(database, wanted),
            since=since,
            repo=repo,
            source=source,
        )

    accepted, duplicates, name = with_pool(settings, store)
    click.echo(f"{name}: {accepted} events imported, {duplicates} already there.", err=True)


class Bar:
    """The progress of an import: a bar for each of its streams, on a terminal; waiting is told."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None

    def begin(self, stream: str, total: int) -> None:
        self.end(whole=True)
        self._bar = click.progressbar(
            length=total, label=f"{self._name} {stream}", file=sys.stderr
        ).__enter__()

    def advance(self, count: int) -> None:
        bar = self._bar
        if bar.pos + count > bar.length:  # more came while it was read
            bar.length = bar.pos + count
        bar.update(count)

    def wait(self, seconds: float, why: str) -> None:
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
        above = "\n" if self._bar is not None and sys.stderr.isatty() else ""
        click.echo(f"{above}{why}; waiting until {until}.", err=True)

    def end(self, *, whole: bool = False) -> None:
        if self._bar is not None:
            if whole:  # the total was about so many
                self._bar.length = max(self._bar.pos, 1)
                self._bar.update(self._bar.length - self._bar.pos)
            self._bar.__exit__(None, None, None)
            self._bar = None


async def import_from_github(
    database: Database,
    project: Any,
    repository: str,
    *,
    rows: Rows,
    since: str | None,
    url: str,
    token: str | None,
) -> Imported:
    """Import issues, pull requests, reviews and releases, with a bar on a terminal.

    Args:
        rows: what a delivery of GitHub's becomes, as it is stored.
    """
    if not token:
        raise Fault("GITHUB_TOKEN: is needed, to read from GitHub with.")
    try:
        start = moment_of(since, datetime.now(UTC)) if since is not None else None
    except (ValueError, OverflowError):
        raise Fault(
            f"--since: {since!r} is no past time; try 2026-01-31 or '2 weeks ago'."
        ) from None
    bar = Bar(repository)
    try:
        async with GitHub(token, url, bar) as connection:
            done = await import_repository(
                connection, database, project, repository, rows=rows, progress=bar, since=start
            )
            bar.end(whole=True)
            return done
    except GitHubError as error:
        raise Fault(str(error)) from None
    finally:
        bar.end()


PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.command(context_settings=PASSED_ON)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def psql(settings: Settings, args: tuple[str, ...]) -> NoReturn:
    """Open psql on the database; ARGS go to psql."""
    _become("psql", settings, args)


@click.command("pg_dump", context_settings=PASSED_ON)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def pg_dump(settings: Settings, args: tuple[str, ...]) -> NoReturn:
    """Dump the database with pg_dump; ARGS go to pg_dump."""
    _become("pg_dump", settings, args)


def _become(name: str, settings: Settings, args: tuple[str, ...]) -> NoReturn:
    """Go on as one of PostgreSQL's programs, on the configured or embedded database."""
    found = dsn(settings)
    try:
        path = str(program(name))
    except EmbeddedUnavailable:
        path = name  # not bundled here: the one on the PATH
    try:
        os.execvp(path, [name, found, *args])
    except FileNotFoundError:
        raise Fault(f"There is no {name} here; install it or baton's extra `embedded`.") from None


@click.command()
@click.pass_obj
def doctor(settings: Settings) -> None:
    """Check configuration, database, schema, worker and provider."""
    findings = [("configuration", True, "read")]  # a wrong one has ended the program by now
    try:
        findings += with_pool(settings, _examine)
    except click.ClickException as error:
        findings.append(("database", False, error.message))
    good, told = _reach_provider(settings)
    findings.append(("provider", good, f"{settings.provider}: {told}"))
    for name, good, finding in findings:
        click.echo(f"{'ok  ' if good else 'FAIL'}  {name:<14} {finding}")
    if not all(good for _, good, _ in findings):
        sys.exit(1)


async def import_history(
    database: Database,
    path: Path,
    project: Any,
    *,
    since: str | None = None,
    repo: str | None = None,
    source: str = "github",
) -> tuple[int, int, str]:
    """Store a history in batches, with a bar on a terminal; answers new, known and the name."""
    try:
        history = await asyncio.to_thread(open_history, path, name=repo, since=since)
        accepted = duplicates = 0
        with click.progressbar(
            length=history.commits + history.tags, label=history.name, file=sys.stderr
        ) as bar:
            events = read_events(history, source=source)
            while batch := list(islice(events, BATCH_MAX)):
                for event in batch:
                    event["occurred_at"] = event["occurred_at"].isoformat()
                new, known = await store(database, project["owner_id"], project["id"], batch)
                accepted, duplicates = accepted + new, duplicates + known
                bar.update(len(batch))
    except NotARepository as error:
        raise Fault(str(error)) from None
    return accepted, duplicates, history.name


def _reach_provider(settings: Settings) -> tuple[bool, str]:
    """Ask a vendor's server for its models: that costs nothing, and needs the key."""
    vendor = settings.provider
    if vendor == "extractive":
        return True, "built in, nothing to reach"
    if vendor == "openai":
        key = settings.openai_api_key
        url = settings.openai_base_url or "https://api.openai.com/v1"
    elif vendor == "anthropic":
        key = settings.anthropic_api_key
        url = (settings.anthropic_base_url or "https://api.anthropic.com").rstrip("/") + "/v1"
    else:
        return True, "not tried here; a worker says at its start"
    headers = {"Authorization": f"Bearer {key or 'none'}", "anthropic-version": "2026-10-21"}
    try:
        with httpx.stream(
            "GET", f"{url.rstrip('/')}/models", headers=headers, timeout=10, trust_env=False
        ) as answer:
            status = answer.status_code
    except httpx.HTTPError as error:
        return False, f"{url} cannot be reached ({type(error).__name__})"
    if status in (401, 403):
        return False, f"{url} refuses the key ({status}); check {vendor.upper()}_API_KEY"
    if status >= 500:
        return False, f"{url} answers {status}"
    return True, f"{url} answers"  # also a 404: not every gateway lists its models


async def _examine(database: Database) -> list[tuple[str, bool, str]]:
    version = await database.value("server_version")
    applied = await applied_version(database)
    needed = current_version()
    findings = [
        ("database", True, f"PostgreSQL {version}"),
        (
            "schema",
            schema_fault(applied) is None,
            f"version {applied}, this program needs {needed}" if applied else "none; baton migrate",
        ),
    ]
    if applied is not None:
        worker = await database.row("workers_alive", DEAD_AFTER)
        assert worker is not None
        seen = "" if worker["seen"] is None else f", last sign {worker['seen']:.0f} s ago"
        finding = f"{worker['alive'] or 'no worker'} alive{seen}"
        findings.append(("worker", worker["alive"] > 0, finding))
    if await database.value("has_table", "ops.checks"):  # not in an older schema
        findings += [
            (check["name"], False, _told(check))
            for check in await database.rows("failing_checks")
            if check["name"] != "worker_seen"  # told already
        ]
    return findings


def _told(check: Any) -> str:
    which = f" ({check['detail']})" if check["detail"] else ""
    return (
        f"{check['value']:f} is more than {check['threshold']:f} {check['unit']}{which}."
        f" {check['meaning']} {check['advice']}"
    )
