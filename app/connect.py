"""What an operator does with integrations from the command line: connect a source in a minute.

The schema `ops` has what needs no key for secrets; here secrets are made, encrypted and shown once.
"""

from typing import Any

import click

from app.cipher import Cipher, CipherError, new_key
from app.db import Connection, Database
from app.settings import Settings
from app.sources import new_secret, sender
from app.terminal import Fault, find_project, find_user, with_pool
from app.wire import is_id

REKEYED = 500  # secrets that are read, and written, at once
REMOVED = 10_000  # rows that a statement removes of each table
PATIENCE = 60.0  # seconds for such a statement

FIRST = "00000000-0000-0000-0000-000000000000"


@click.group()
def integration() -> None:
    """What sends activity by itself: GitHub, Slack, Sentry, anything."""


@integration.command("create")
@click.argument("source")
@click.option("--project", metavar="P", help="Gets all resources that are new.")
@click.option("--org", "slug", metavar="SLUG", help="Whose it is; default: of the project.")
@click.option("--user", "email", metavar="EMAIL", help="Whose it is; may be left out when clear.")
@click.option("--name", metavar="N", help="Of the workspace; default: of the source.")
@click.option("--secret", metavar="S", help="That the source has made, such as Slack's.")
@click.option("--token", metavar="T", help="To call the source with.")
@click.pass_obj
def create(
    settings: Settings,
    source: str,
    project: str | None,
    slug: str | None,
    email: str | None,
    name: str | None,
    secret: str | None,
    token: str | None,
) -> None:
    """Connect SOURCE: print where it has to send to, and the secret, this once."""
    made = secret or (new_secret() if sender(source).makes_secret else None)
    values = [_encrypted(settings, value) for value in (made, token)]

    async def work(database: Database) -> str:
        project_id = None
        if project is not None:
            found = await find_project(database, project)
            project_id = found["id"]
            if slug is None and email is None:
                owner, organization = found["owner_id"], found["organization_id"]
            else:
                owner, organization = await _whose(database, slug, email)
        else:
            owner, organization = await _whose(database, slug, email)
        return str(
            await database.value(
                "add_integration", source, owner, organization, project_id, name, *values
            )
        )

    _tell(settings, with_pool(settings, work), source, made)


@integration.command("list")
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the integrations, with whose they are and what they have sent."""

    async def rows(database: Database) -> list[Any]:
        return await database.rows("all_integrations")

    for row in with_pool(settings, rows):
        click.echo(
            f"{row['id']}  {row['source']:<12}  {row['status']:<23}  {row['belongs_to']:<24}"
            f"  {row['project'] or '-':<16}  {row['name']}"
        )


@integration.command("rotate")
@click.argument("wanted", metavar="ID")
@click.option("--secret", metavar="S", help="That the source has made; default: one is made.")
@click.option("--now", is_flag=True, help="The old one is good no more; else for 24 hours.")
@click.pass_obj
def rotate(settings: Settings, wanted: str, secret: str | None, now: bool) -> None:
    """Give the integration ID a new secret, and print it this once."""

    async def work(database: Database) -> tuple[str, str | None]:
        found = await _find(database, wanted)
        source = found["source"]
        made = secret
        if made is None and sender(source).secret_from == "source":
            raise Fault(f"--secret: {source} makes it; give the one that its settings show.")
        if made is None and sender(source).makes_secret:
            made = new_secret()
        await database.value(
            "replace_integration_secret", found["id"], _encrypted(settings, made), now
        )
        return source, made

    source, made = with_pool(settings, work)
    _tell(settings, wanted, source, made)


@integration.command("secret")
@click.argument("wanted", metavar="ID")
@click.pass_obj
def show(settings: Settings, wanted: str) -> None:
    """Print the secret that the source has brought: Notion wants it pasted back."""

    async def work(database: Database) -> list[bytes]:
        found = await _find(database, wanted)
        if sender(found["source"]).secret_from != "handshake":
            raise Fault(f"The secret of {found['source']} is shown once only; make a new one.")
        return list(await database.value("brought_secrets", found["id"]))

    brought = with_pool(settings, work)
    if not brought:
        raise Fault("The source has not brought one yet.")
    try:
        click.echo(Cipher.from_settings(settings).decrypt(brought[0]))
    except CipherError as error:
        raise Fault(str(error)) from None


@integration.command("disable")
@click.argument("wanted", metavar="ID")
@click.pass_obj
def disable(settings: Settings, wanted: str) -> None:
    """Refuse what the integration ID sends, until it is enabled again."""
    click.echo("Disabled." if _enable(settings, wanted, enabled=False) else "It was already.")


@integration.command("enable")
@click.argument("wanted", metavar="ID")
@click.pass_obj
def enable(settings: Settings, wanted: str) -> None:
    """Take again what the integration ID sends."""
    click.echo("Enabled." if _enable(settings, wanted, enabled=True) else "It was already.")


@integration.command("delete")
@click.argument("wanted", metavar="ID")
@click.pass_obj
def delete(settings: Settings, wanted: str) -> None:
    """Forget the integration ID and what waits for a project; events of projects stay."""

    async def work(database: Database) -> None:
        integration_id = (await _find(database, wanted))["id"]
        gone = False
        while not gone:
            async with database.transaction() as connection:
                gone = await _remove(connection, integration_id)

    with_pool(settings, work)
    click.echo("Deleted.")


@integration.command("rekey")
@click.pass_obj
def rekey(settings: Settings) -> None:
    """Encrypt all secrets with the first key, so that the others are needed no more.

    May be stopped, and run again, at any time.
    """
    cipher = Cipher.from_settings(settings)

    async def work(database: Database) -> tuple[int, int]:
        last, total, done = FIRST, 0, 0
        while rows := await database.rows("stored_secrets", last, REKEYED):
            last, total = rows[-1]["id"], total + len(rows)
            old = [row for row in rows if not cipher.is_current(row["value"])]
            new = [cipher.encrypt(cipher.decrypt(row["value"])) for row in old]
            if old:
                done += await database.value(
                    "rekey_secrets", [row["id"] for row in old], [row["value"] for row in old], new
                )
        return done, total

    try:
        done, total = with_pool(settings, work)
    except CipherError as error:
        raise Fault(str(error)) from None
    click.echo(f"{done} of {total} secrets encrypted anew.")


@integration.command("new-key")
def make_key() -> None:
    """Make a key for BATON_SECRET_KEYS and print it; nothing else knows it."""
    click.echo(new_key())


async def _whose(database: Database, slug: str | None, email: str | None) -> tuple[str, str | None]:
    """The user whose events they will be, and the organization, if it is one's."""
    if slug is None:
        return await find_user(database, email), None
    organization = await database.value("find_organization", slug)
    if organization is None:
        raise Fault(f"--org: there is no organization {slug}.")
    if email is not None:
        return await find_user(database, email), str(organization)
    owner = await database.value("sole_member", organization)
    if owner is None:
        raise Fault(f"--user: say whose; {slug} has not just one member or admin.")
    return str(owner), str(organization)


async def _find(database: Database, wanted: str) -> Any:
    found = await database.row("find_integration", wanted) if is_id(wanted) else None
    if found is None:
        raise Fault(f"There is no integration {wanted}; see: baton integration list")
    return found


def _enable(settings: Settings, wanted: str, *, enabled: bool) -> bool:
    async def work(database: Database) -> bool:
        found = await _find(database, wanted)
        return bool(await database.value("enable_integration", found["id"], enabled))

    return with_pool(settings, work)


async def _remove(connection: Connection, integration_id: str) -> bool:
    await connection.value("allow_time", f"{PATIENCE:.0f}s")
    return bool(
        await connection.value("remove_integration", integration_id, REMOVED, timeout=PATIENCE)
    )


def _encrypted(settings: Settings, value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        return Cipher.from_settings(settings).encrypt(value)
    except CipherError as error:
        raise Fault(str(error)) from None


def _tell(settings: Settings, integration_id: str, source: str, made: str | None) -> None:
    """Say once what has to be pasted where."""
    click.echo(f"URL     {settings.hook_url(integration_id)}")
    if made is not None:
        click.echo(f"secret  {made}")
    click.echo(sender(source).advice, err=True)
