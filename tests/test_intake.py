"""What integrations have sent becomes events: once, in turn, whatever is wrong with it."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from conftest import Caller

from app.background import background
from app.db import Database, Unavailable
from app.queue import hung_bell
from tasks import intake, mapping
from tasks.intake import Mapper
from tasks.mapping import MAPPINGS, bounded
from tasks.sources.event import Delivery, Resource, SourceEvent

HEADERS = {"content-type": "application/json"}
WEB = Resource("acme/web", "acme/web", "repository", "main")


def told(delivery: Delivery) -> list[SourceEvent]:
    """A mapping for tests: the body says what it becomes."""
    if delivery.body.get("raises"):
        raise KeyError("raises")
    resource = WEB if delivery.body.get("in", True) else None
    return [
        SourceEvent(
            event_type="commit",
            title=delivery.body["title"],
            external_id=delivery.body.get("id", delivery.body["title"]),
            resource=resource,
            metadata=delivery.body.get("metadata", {}),
        )
        for _ in range(delivery.body.get("times", 1))
    ]


@pytest.fixture(autouse=True)
def mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "MAPPINGS", {"github": told})


@pytest.fixture
def mapper(database: Database) -> Mapper:
    return Mapper(database)


Integrate = Callable[..., Awaitable[str]]


@pytest.fixture
def integrate(caller: Caller, sql: asyncpg.Connection) -> Integrate:
    """Makes an integration of the caller's; its resources are of their project, unless told."""

    async def make(project: bool = True, source: str = "github") -> str:
        integration_id: str = await sql.fetchval(
            "insert into integrations (source, user_id, project_id, workspace_name) "
            "values ($1, $2, $3, 'acme') returning id::text",
            source,
            caller.user_id,
            caller.project_id if project else None,
        )
        return integration_id

    return make


async def deliver(api: Database, integration_id: str, *bodies: Any) -> None:
    """What the API does with verified requests."""
    raw = [json.dumps(body).encode() for body in bodies]
    prefix = secrets.token_hex(8)
    results = await api.value(
        "store_hook_deliveries",
        [integration_id] * len(raw),
        [f"{prefix}-{n}" for n in range(len(raw))],
        [HEADERS] * len(raw),
        raw,
    )
    assert results == ["accepted"] * len(raw)


async def titles(sql: asyncpg.Connection, table: str = "events") -> list[str]:
    column = "title" if table == "events" else "event ->> 'title'"
    return [row[0] for row in await sql.fetch(f"select {column} from {table} order by id")]


async def test_deliveries_become_events_of_the_project_of_their_resource(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection, caller: Caller
) -> None:
    integration = await integrate()
    await deliver(api, integration, {"title": "one"}, {"title": "two"})
    assert await mapper.map_round() == 2
    assert await titles(sql) == ["one", "two"]
    event = await sql.fetchrow("select * from events order by id limit 1")
    assert event is not None
    assert (str(event["project_id"]), str(event["user_id"])) == (
        caller.project_id,
        caller.user_id,
    )
    assert (event["source"], event["resource"]) == ("github", "acme/web")
    resource = await sql.fetchrow("select * from resources")
    assert resource is not None
    assert (resource["id"], resource["type"], resource["default_branch"]) == (
        "acme/web",
        "repository",
        "main",
    )
    assert await sql.fetchval("select count(*) from waiting_deliveries") == 0
    assert await sql.fetchval("select count(*) from hook_deliveries where error is null") == 2
    assert await mapper.map_round() == 0


async def test_events_of_a_resource_without_a_project_wait_once_each(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    integration = await integrate(project=False)
    await deliver(api, integration, {"title": "one"}, {"title": "one"})
    await deliver(api, integration, {"title": "two", "in": False})
    await mapper.drain()
    assert await titles(sql) == []
    assert await titles(sql, "untracked_events") == ["one", "two"]
    waiting = await sql.fetch("select id, type from resources order by id")
    assert [tuple(row) for row in waiting] == [
        ("acme/web", "repository"),
        ("github", "workspace"),
    ]


async def test_a_project_deleted_while_its_events_came_in_is_in_no_others_way(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection, caller: Caller
) -> None:
    doomed = await sql.fetchval("select ops.create_project('two', $1)", caller.user_id)
    first, second = await integrate(project=False), await integrate(project=False)
    await deliver(api, first, {"title": "one"})
    await deliver(api, second, {"title": "two"})
    await mapper.drain()
    for integration, project in ((first, doomed), (second, caller.project_id)):
        await sql.execute(
            "select move_resources(array[$1::uuid], array['acme/web'], $2)", integration, project
        )
    await sql.execute("delete from projects where id = $1", doomed)
    while await sql.fetchval("select pull_events(null, 10)") is not None:
        pass
    assert await titles(sql) == ["two"]
    assert await titles(sql, "untracked_events") == ["one"]


async def test_the_same_fact_by_two_ways_is_one_event(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection, caller: Caller
) -> None:
    await caller.ingest({"title": "one", "external_id": "sha"})
    integration = await integrate()
    await deliver(api, integration, {"title": "one", "id": "sha"}, {"title": "one", "id": "sha"})
    await mapper.drain()
    assert await titles(sql) == ["one"]


async def test_the_many_of_one_integration_do_not_hold_up_another(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    flood, other = sorted([await integrate(), await integrate()])
    await deliver(api, flood, *({"title": f"flood {n}"} for n in range(2_000)))
    await deliver(api, other, {"title": "other"})
    assert await mapper.map_round() == intake.EACH + 1
    assert "other" in await titles(sql)
    assert await sql.fetchval("select count(*) from waiting_deliveries") == 2_000 - intake.EACH


async def test_of_many_integrations_each_has_its_turn(
    api: Database,
    mapper: Mapper,
    integrate: Integrate,
    sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "INTEGRATIONS", 2)
    monkeypatch.setattr(intake, "EACH", 1)
    for n in range(5):
        await deliver(api, await integrate(), {"title": f"{n}a"}, {"title": f"{n}b"})
    for _ in range(3):
        await mapper.map_round()
    assert {title[0] for title in await titles(sql)} == set("01234")
    await mapper.drain()
    assert len(await titles(sql)) == 10


async def test_a_mapping_that_fails_costs_no_delivery(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    integration = await integrate()
    await deliver(api, integration, {"title": "a"}, {"raises": True}, {"title": "b"})
    await mapper.drain()
    assert sorted(await titles(sql)) == ["Something happened in github", "a", "b"]
    assert await sql.fetchval("select count(*) from waiting_deliveries") == 0


async def test_what_the_database_refuses_blocks_nothing_and_is_told(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    integration = await integrate()
    await sql.execute("alter table events add check (title <> 'bad')")
    await deliver(api, integration, {"title": "a"}, {"title": "bad"}, {"title": "b"})
    await mapper.drain()
    assert sorted(await titles(sql)) == ["Something happened in github", "a", "b"]
    await sql.execute("alter table events add check (title !~ '^Something') not valid")
    await deliver(api, integration, {"title": "bad"}, {"title": "c"})
    await mapper.drain()
    assert sorted(await titles(sql))[1:] == ["a", "b", "c"]
    errors = await sql.fetch("select error from hook_deliveries where error is not null")
    assert [row[0] for row in errors] == ["The database refused its events (23514)."]
    assert await sql.fetchval("select count(*) from waiting_deliveries") == 0


@pytest.mark.parametrize("made", [None, [None], ["x"], [SourceEvent], "raises"])
async def test_whatever_a_mapping_makes_the_delivery_becomes_an_event(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection, made: Any
) -> None:
    mapping.MAPPINGS["github"] = lambda delivery: made  # type: ignore[index]
    await deliver(api, await integrate(), {"title": "a"})
    await mapper.drain()
    assert await titles(sql) == ["Something happened in github"]


async def test_what_cannot_even_be_written_blocks_nothing(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    """A lone surrogate, which is no UTF-8."""
    other = await integrate()
    integration = await integrate()

    def told(delivery: Delivery) -> list[SourceEvent]:
        title = "\ud800" if delivery.body["title"] == "bad" else delivery.body["title"]
        return [SourceEvent(event_type="a", title=title, external_id=None)]  # type: ignore[arg-type]

    mapping.MAPPINGS["github"] = told  # type: ignore[index]
    await deliver(api, integration, {"title": "a"}, {"title": "bad"}, {"title": "b"})
    await deliver(api, other, {"title": "other"})
    await mapper.map_round()
    assert await titles(sql) == ["other"]
    while await sql.fetchval("select count(*) from waiting_deliveries"):
        await mapper.map_round()
    assert sorted(await titles(sql)) == ["Something happened in github", "a", "b", "other"]


async def test_what_takes_too_long_again_and_again_is_put_aside(
    api: Database,
    mapper: Mapper,
    integrate: Integrate,
    sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a statement that is cancelled each time; the others of the integration are stored."""
    integration = await integrate()
    await sql.execute(
        "create function stuck() returns trigger language plpgsql as $$ begin "
        "if new.title ~ 'slow|Something' then raise 'late' using errcode = '57014'; end if; "
        "return new; end $$; "
        "create trigger stuck before insert on events for each row execute function stuck()"
    )
    await deliver(api, integration, {"title": "slow"}, {"title": "a"}, {"title": "b"})
    rounds = 0
    while await sql.fetchval("select count(*) from waiting_deliveries"):
        await mapper.map_round()
        rounds += 1
    assert rounds <= intake.TRIES + 3
    assert await titles(sql) == ["a", "b"]
    assert await sql.fetchval("select count(*) from hook_deliveries where error ~ 'in time'") == 1


async def test_while_the_database_is_away_no_delivery_is_taken_for_what_fails(
    api: Database,
    mapper: Mapper,
    integrate: Integrate,
    sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await deliver(api, await integrate(), {"title": "a"})
    monkeypatch.setattr(intake, "TRIES", 2)
    with monkeypatch.context() as away:
        away.setattr(mapper._database, "transaction", _away)
        for _ in range(4):
            assert await mapper.map_round() == 0
    await mapper.drain()
    assert await titles(sql) == ["a"]


@asynccontextmanager
async def _away() -> AsyncIterator[Any]:
    raise Unavailable("It is away.")
    yield


async def test_a_delivery_of_very_many_events_is_stored_in_parts(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    def many(delivery: Delivery) -> list[SourceEvent]:
        return [
            SourceEvent(event_type="commit", title=f"{n}", external_id=f"{n}", resource=WEB)
            for n in range(2_500)
        ]

    mapping.MAPPINGS["github"] = many  # type: ignore[index]
    await deliver(api, await integrate(), {})
    assert await mapper.map_round() == 1
    assert await sql.fetchval("select count(*) from events") == 2_500


async def test_a_crash_leaves_what_was_taken_as_it_was(
    api: Database, database: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    integration = await integrate()
    await deliver(api, integration, {"title": "a"})
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as connection:
            [taken] = await connection.rows("take_deliveries", integration, 10, 1000)
            assert await mapper.map_round() == 0  # nobody else gets it meanwhile
            await connection.value("end_deliveries", integration, [taken["seq"]], [], None)
            raise ZeroDivisionError
    assert await mapper.map_round() == 1
    assert await titles(sql) == ["a"]


async def test_a_restored_copy_maps_nothing(
    api: Database, mapper: Mapper, integrate: Integrate, sql: asyncpg.Connection
) -> None:
    integration = await integrate()
    await deliver(api, integration, {"title": "a"})
    await sql.execute("insert into installation (identity) values ('1/2')")
    assert await mapper.map_round() == 0
    await sql.execute("select ops.go_live()")
    assert await mapper.map_round() == 1


async def test_a_delivery_wakes_the_loop_and_an_outage_does_not_end_it(
    api: Database,
    mapper: Mapper,
    integrate: Integrate,
    sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "POLL_EVERY", 60.0)
    integration = await integrate()

    async def mapped(count: int) -> None:
        while await sql.fetchval("select count(*) from events") < count:
            await asyncio.sleep(0.01)

    async with background(mapper.run()), hung_bell(api) as bell, asyncio.timeout(20):
        await deliver(api, integration, {"title": "a"})
        bell.deliver()
        await mapped(1)
        await sql.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() "
            "and datname = current_database()"
        )
        with suppress(Unavailable):  # this pool's connections have gone as well
            await deliver(api, integration, {"title": "b"})
        if await sql.fetchval("select count(*) from hook_deliveries") < 2:
            await deliver(api, integration, {"title": "b"})
        await mapped(2)  # the listener that comes back looks at once


def test_metadata_are_bounded_and_as_much_as_fits_is_kept() -> None:
    deep: Any = "x"
    for _ in range(20):
        deep = [deep]
    kept = bounded(
        {
            "labels": ["bug"],
            "deep": deep,
            "many": list(range(3_000)),
            "long": "x" * 100_000,
            "nul": "a\0b",
            "huge": 2**70,
            "number": 12,
        }
    )
    assert kept == {"labels": ["bug"], "number": 12}


@pytest.mark.parametrize("source", MAPPINGS)
def test_every_mapping_is_asked_for_its_source(source: str) -> None:
    assert MAPPINGS[source].__module__ == f"tasks.sources.{source}"
