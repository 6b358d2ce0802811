"""What all commands share: the database they mean, and one clear line when something is wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import click

from app.db import Database, DatabaseError, Unavailable, open_database
from app.embedded import EmbeddedUnavailable, running_dsn
from app.settings import Settings

T = TypeVar("T")


class Fault(click.ClickException):
    """One clear line, exit 1."""


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; what the database says becomes one line."""
    try:
        return asyncio.run(work)
    except Unavailable as error:
        raise Fault(f"The database cannot be reached: {error}") from None
    except DatabaseError as error:
        raise Fault(str(error)) from None


def with_pool(settings: Settings, work: Callable[[Database], Coroutine[Any, Any, T]]) -> T:
    """Run `work` with a small pool on the configured or embedded database."""

    async def opened_for_work() -> T:
        async with opened(dsn(settings)) as database:
            return await work(database)

    return run_async(opened_for_work())


@asynccontextmanager
async def opened(dsn: str, role: str = "baton_ops") -> AsyncIterator[Database]:
    """A small pool, of an operator's unless said otherwise."""
    async with open_database(dsn, application_name="baton cli", role=role, size=2) as database:
        yield database


def dsn(settings: Settings) -> str:
    """The configured database, else the embedded one if it runs."""
    if settings.database_url:
        return settings.database_url
    try:
        running = running_dsn(settings.data_dir)
    except EmbeddedUnavailable as error:
        raise Fault(str(error)) from None
    if running is None:
        raise Fault(
            f"No database: set DATABASE_URL, or start `baton run` on {settings.data_dir} first."
        )
    return running


def with_database(settings: Settings) -> Settings:
    """The settings with the database in them."""
    return replace(settings, database_url=dsn(settings))


async def find_user(database: Database, email: str | None) -> str:
    """The id of the user with this e-mail address, or of the only one there is."""
    if email is None:
        user_id = await database.value("sole_user")
        if user_id is None:
            raise Fault("--user: say whose; there is not exactly one user.")
    else:
        user_id = await database.value("find_user", email)
        if user_id is None:
            raise Fault(f"--user: there is no user {email}; make one: select ops.create_user(…).")
    return str(user_id)


async def find_project(database: Database, wanted: str) -> Any:
    """The row of the project that a person means by its id, slug or name."""
    found = await database.rows("find_projects", wanted)
    if not found:
        raise Fault(f"--project: there is no project {wanted}; see: baton project list")
    if len(found) > 1:
        ids = ", ".join(row["id"] for row in found)
        raise Fault(f"--project: {wanted} may be any of {ids}; give the id.")
    return found[0]
