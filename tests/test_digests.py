"""Digests: once per period whatever restarts, and at the right moment in every time zone."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from conftest import Caller, Workers
from croniter import croniter  # type: ignore[import-untyped]

from app.db import Database

Drain = Callable[..., Awaitable[None]]
DAY = timedelta(days=1)
BOUNDARIES = "select cron_before($1, $2, $3), cron_after($1, $2, $3)"


async def schedule(caller: Caller, cron: str = "0 9 * * *", **body: Any) -> dict[str, Any]:
    path = f"/projects/{caller.project_id}/digest_schedule"
    response = await caller.http.put(path, json={"cron": cron, **body})
    assert response.status_code == 200, response.text
    return dict(response.json()["digest_schedule"])


async def age(sql: asyncpg.Connection, interval: timedelta) -> None:
    """As if the schedule had been set, and everything had happened, so much earlier."""
    await sql.execute(
        "update digest_schedules set covered_until = covered_until - $1::interval, "
        "next_at = next_at - $1::interval",
        interval,
    )
    await sql.execute("update events set occurred_at = occurred_at - $1::interval", interval)


async def asked_for(sql: asyncpg.Connection) -> list[asyncpg.Record]:
    """The digests that were asked for, oldest first: the time and the period of each."""
    return await sql.fetch(
        "select id, status, error_code, user_id::text, "
        "(input -> 'options' ->> 'since')::timestamptz as since, "
        "(input ->> 'until')::timestamptz as until "
        "from jobs where kind = 'digest' order by created_at, id"
    )


async def digests(caller: Caller, query: str = "") -> list[dict[str, Any]]:
    response = await caller.http.get(f"/projects/{caller.project_id}/digests{query}")
    assert response.status_code == 200, response.text
    return list(response.json()["digests"])


# --- From the schedule to the list ----------------------------------------------------------


async def test_get_digests_answers_what_the_schedule_had_written(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "fix: stop the cache from growing", "external_id": "a" * 40})
    await schedule(caller)
    await age(sql, DAY)
    await sql.execute("select submit_digest()")
    await drain()
    [told] = await digests(caller)
    [asked] = await asked_for(sql)
    assert set(told) == {
        *("id", "projectId", "generatedBy", "periodStart", "periodEnd", "content", "markdown"),
        "createdAt",
    }
    assert (told["projectId"], told["generatedBy"]) == (caller.project_id, caller.user_id)
    assert datetime.fromisoformat(told["periodStart"]) == asked["since"]
    assert datetime.fromisoformat(told["periodEnd"]) == asked["until"]
    assert "stop the cache from growing" in told["markdown"].lower()
    assert told["content"]["key_changes"][0]["event_ids"]
    assert "## What happened" in told["markdown"]
    assert (await sql.fetchval("select credits from charges")) == 1


async def test_a_digest_is_among_the_insights_only_when_its_kind_is_asked_for(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: add a cache"})
    await schedule(caller)
    await age(sql, DAY)
    await sql.execute("select submit_digest()")
    await drain()
    path = f"/projects/{caller.project_id}/insights"
    assert (await caller.http.get(path)).json() == {"insights": []}
    [insight] = (await caller.http.get(f"{path}?kind=digest")).json()["insights"]
    [told] = await digests(caller)
    assert insight["id"] == told["id"]
    await caller.http.patch(f"/insights/{told['id']}", json={"status": "archived"})
    assert await digests(caller) == []


async def test_a_digest_takes_the_saved_scope_of_its_project(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: add a cache"}, {"source": "slack", "title": "lunch?"})
    await sql.execute("""update projects set scope = '{"sources": ["slack"]}'""")
    await schedule(caller)
    await age(sql, DAY)
    await sql.execute("select submit_digest()")
    await drain()
    assert await sql.fetchval("select input ->> 'sources' from jobs") == '["slack"]'


async def test_the_list_has_the_newest_first_and_as_many_as_asked(
    caller: Caller, sql: asyncpg.Connection, drain: Drain, database: Database
) -> None:
    await schedule(caller)
    for _ in range(3):
        await caller.ingest({"title": "feat: add a cache"})
        await age(sql, DAY)
        await sql.execute("select submit_digest()")
        await drain()
    told = await digests(caller)
    made = [one["createdAt"] for one in told]
    assert made == sorted(made, reverse=True) and len(made) == 3
    assert await digests(caller, "?limit=2") == told[:2]


# --- Once per period ------------------------------------------------------------------------


async def test_two_workers_at_once_ask_for_one_digest_per_period(
    caller: Caller, sql: asyncpg.Connection, database: Database
) -> None:
    await schedule(caller)
    await age(sql, DAY)
    answers = await asyncio.gather(*(database.value("submit_digest") for _ in range(8)))
    assert [one for one in answers if one] == [caller.project_id]
    assert len(await asked_for(sql)) == 1


async def test_whoever_waits_for_the_schedule_of_another_worker_asks_for_nothing(
    caller: Caller, sql: asyncpg.Connection, database: Database
) -> None:
    await schedule(caller)
    await age(sql, DAY)
    async with sql.transaction():
        await sql.fetchval("select submit_digest()")  # in the middle of it
        assert await database.value("submit_digest") is None
    assert len(await asked_for(sql)) == 1
    assert await database.value("submit_digest") is None


@pytest.mark.parametrize("table", ["jobs", "procrastinate_jobs", "digest_schedules", "job_events"])
async def test_a_crash_between_any_two_steps_leaves_neither_a_job_nor_a_moved_schedule(
    caller: Caller, sql: asyncpg.Connection, database: Database, table: str
) -> None:
    await schedule(caller)
    await age(sql, DAY)
    before = await sql.fetchrow("select * from digest_schedules")
    assert before
    verb = "update" if table == "digest_schedules" else "insert"
    # The session dies while it writes to the table, as by kill -9 of its worker.
    await sql.execute(
        "create function die() returns trigger language plpgsql as "
        "$$ begin perform pg_terminate_backend(pg_backend_pid()); return new; end $$; "
        f"create trigger die after {verb} on {table} for each row execute function die()"
    )
    with pytest.raises(Exception):  # noqa: B017  # however the connection ends
        await database.value("submit_digest")
    assert await sql.fetchrow("select * from digest_schedules") == before
    assert await asked_for(sql) == []
    await sql.execute(f"drop trigger die on {table}")
    assert await database.value("submit_digest") == caller.project_id
    assert await database.value("submit_digest") is None
    [asked] = await asked_for(sql)
    assert (asked["since"], asked["until"]) == (before["covered_until"], before["next_at"])


async def test_workers_that_start_again_and_again_write_one_digest(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await caller.ingest({"title": "feat: add a cache"})
    await schedule(caller)
    await age(sql, DAY)
    for _ in range(3):
        await sql.execute("select submit_digest()")
        await drain()
    assert len(await digests(caller)) == 1


async def test_an_outage_of_three_periods_makes_one_digest_of_all_of_them(
    caller: Caller, sql: asyncpg.Connection, database: Database
) -> None:
    set_ = await schedule(caller)
    await age(sql, 3 * DAY)
    began = await sql.fetchval("select covered_until from digest_schedules")
    assert await database.value("submit_digest") == caller.project_id
    assert await database.value("submit_digest") is None
    [asked] = await asked_for(sql)
    assert asked["since"] == began
    assert asked["until"] == datetime.fromisoformat(set_["period_start"])  # the latest boundary
    assert asked["until"] - asked["since"] == 3 * DAY
    now = await schedule(caller)
    assert (now["period_start"], now["next_at"]) == (set_["period_start"], set_["next_at"])


async def test_the_clock_of_the_database_says_what_is_due(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await schedule(caller)
    assert await sql.fetchval("select submit_digest()") is None
    await sql.execute("set baton.clock_offset = '1 day'")
    assert str(await sql.fetchval("select submit_digest()")) == caller.project_id
    assert await sql.fetchval("select submit_digest()") is None
    await sql.execute("set baton.clock_offset = '2 days'")
    assert str(await sql.fetchval("select submit_digest()")) == caller.project_id
    first, second = await asked_for(sql)
    assert first["until"] == second["since"]


async def test_a_held_database_asks_for_no_digest(
    caller: Caller, sql: asyncpg.Connection, database: Database, ops: asyncpg.Connection
) -> None:
    await schedule(caller)
    await age(sql, DAY)
    await sql.execute("select ops.hold('moving')")
    assert await database.value("submit_digest") is None
    await sql.execute("select ops.go_live()")
    assert await database.value("submit_digest") == caller.project_id


async def test_a_digest_that_is_refused_says_why_and_is_not_in_the_way_of_others(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection, database: Database
) -> None:
    await sql.execute(
        """update projects set scope = '{"sources": ["fax"]}' where id = $1""", caller.project_id
    )
    await schedule(caller)
    await schedule(stranger)
    await age(sql, DAY)
    asked = {await database.value("submit_digest"), await database.value("submit_digest")}
    assert asked == {caller.project_id, stranger.project_id}
    assert await database.value("submit_digest") is None
    assert len(await asked_for(sql)) == 1
    row = await sql.fetchrow("select * from ops.digests where project_id = $1", caller.project_id)
    assert row and row["error"] == 'sources: there is no source named "fax".'
    path = f"/projects/{caller.project_id}/digest_schedule"
    assert (await caller.http.get(path)).json()["digest_schedule"]["error"] == row["error"]


# --- What becomes of a period ---------------------------------------------------------------


async def test_a_period_without_events_has_no_digest_and_the_next_one_is_as_usual(
    caller: Caller, sql: asyncpg.Connection, drain: Drain
) -> None:
    await schedule(caller)
    await age(sql, DAY)
    await sql.execute("select submit_digest()")
    await drain()
    assert await digests(caller) == []
    [asked] = await asked_for(sql)
    assert (asked["status"], asked["error_code"]) == ("failed", "no_result")
    await sql.execute("set baton.clock_offset = '1 day'")
    await sql.fetchval("select submit_digest()")
    _, second = await asked_for(sql)
    assert second["since"] == asked["until"]


@pytest.mark.parametrize(
    ("code", "again"),
    [("generation_failed", True), ("quota_exceeded", True), ("timeout", True),
     ("no_result", False), ("cancelled", False)],
)  # fmt: skip
async def test_what_a_failed_digest_should_have_told_is_told_by_the_next_one(
    caller: Caller, sql: asyncpg.Connection, code: str, again: bool
) -> None:
    await schedule(caller)
    await sql.execute("set baton.clock_offset = '1 day'")
    await sql.fetchval("select submit_digest()")
    await sql.execute(
        "update jobs set status = 'failed', outcome = outcome_of($1), error_code = $1, "
        "error = 'So it is.', completed_at = now()",
        code,
    )
    await sql.execute("set baton.clock_offset = '2 days'")
    await sql.fetchval("select submit_digest()")
    first, second = await asked_for(sql)
    assert second["since"] == (first["since"] if again else first["until"])
    assert second["until"] == first["until"] + DAY


async def test_failures_without_end_do_not_make_a_period_without_end(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    await schedule(caller)
    for day in range(1, 41, 3):
        await sql.execute(f"set baton.clock_offset = '{day} days'")
        await sql.fetchval("select submit_digest()")
        await sql.execute(
            "update jobs set status = 'failed', outcome = 'failed', error_code = 'worker_lost', "
            "error = 'So it is.', completed_at = now() where status = 'pending'"
        )
    last = (await asked_for(sql))[-1]
    assert last["until"] - last["since"] == 31 * DAY


async def test_a_new_cron_expression_goes_on_where_the_last_digest_ended(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    first = await schedule(caller)
    second = await schedule(caller, "30 17 * * *", time_zone="Asia/Tokyo")
    assert second["period_start"] == first["period_start"]
    assert second["next_at"] != first["next_at"]


async def test_a_digest_is_in_the_name_of_who_set_it_as_long_as_they_see_the_project(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection, ops: asyncpg.Connection
) -> None:
    org = await ops.fetchval("select ops.create_organization('Acme')")
    for each, role in ((caller, "admin"), (stranger, "admin")):
        await ops.execute("select ops.add_member($1, $2, $3)", org, each.user_id, role)
    await sql.execute("update projects set organization_id = $1 where id = $2", org,
                      caller.project_id)  # fmt: skip
    path = f"/projects/{caller.project_id}/digest_schedule"
    assert (await stranger.http.put(path, json={"cron": "0 9 * * *"})).status_code == 200
    await age(sql, DAY)
    await sql.fetchval("select submit_digest()")
    await sql.execute("delete from members where user_id = $1", stranger.user_id)
    await age(sql, DAY)
    await sql.fetchval("select submit_digest()")
    assert [row["user_id"] for row in await asked_for(sql)] == [stranger.user_id, caller.user_id]


# --- When a period ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "zone", "at", "before", "after"),
    [
        # 02:30 does not exist on the last Sunday of March: it comes when 03:30 does.
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T00:45Z", "2026-03-28T01:30Z",
         "2026-03-29T01:30Z"),
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T01:30Z", "2026-03-29T01:30Z",
         "2026-03-30T00:30Z"),
        # It is there twice on the last Sunday of October, and counts once.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30Z", "2026-10-24T00:30Z",
         "2026-10-25T01:30Z"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:30Z", "2026-10-25T01:30Z",
         "2026-10-26T01:30Z"),
        # Nine o'clock stays nine o'clock.
        ("0 9 * * *", "America/New_York", "2026-03-07T20:00Z", "2026-03-07T14:00Z",
         "2026-03-08T13:00Z"),
        # Half an hour of difference, and 45 minutes of it.
        ("0 9 * * *", "Asia/Kathmandu", "2026-01-01T03:15Z", "2026-01-01T03:15Z",
         "2026-01-02T03:15Z"),
        # A day that a country left out, and leap days eight years apart.
        ("0 9 * * *", "Pacific/Apia", "2011-12-29T20:00Z", "2011-12-29T19:00Z",
         "2011-12-30T19:00Z"),
        ("0 0 29 2 *", "UTC", "2099-01-01T00:00Z", "2096-02-29T00:00Z", "2104-02-29T00:00Z"),
    ],
)  # fmt: skip
async def test_boundaries_are_by_the_clock_on_the_wall(
    sql: asyncpg.Connection, cron: str, zone: str, at: str, before: str, after: str
) -> None:
    row = await sql.fetchrow(BOUNDARIES, cron, zone, datetime.fromisoformat(at))
    assert row and tuple(row) == (datetime.fromisoformat(before), datetime.fromisoformat(after))


async def test_boundaries_are_those_that_croniter_finds(sql: asyncpg.Connection) -> None:
    """The library that Procrastinate uses is asked for local times where no clock is changed."""
    dice = random.Random(7)
    like: dict[str, Any] = {
        "implement_cron_bug": True
    }  # as crontab(5) has it: */2 restricts no day

    def field(low: int, high: int) -> str:
        a, b = sorted(dice.sample(range(low, high + 1), 2))
        return dice.choice(("*", str(a), f"{a}-{b}", f"{a},{b}", f"*/{dice.randint(2, 9)}",
                            f"{a}-{b}/{dice.randint(1, 4)}"))  # fmt: skip

    for _ in range(300):
        cron = " ".join(
            (str(dice.randrange(60)), field(0, 23), field(1, 28), field(1, 12), field(0, 6))
        )
        zone = dice.choice(("Asia/Kolkata", "UTC", "Asia/Tokyo"))
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=dice.randrange(525_600))
        local = at.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        expected = [
            found.replace(tzinfo=ZoneInfo(zone))
            for found in (
                croniter(cron, local + timedelta(seconds=1), **like).get_prev(datetime),
                croniter(cron, local, **like).get_next(datetime),
            )
        ]
        row = await sql.fetchrow(BOUNDARIES, cron, zone, at)
        assert row and list(row) == expected, (cron, zone, at)


async def test_names_of_months_and_days_are_numbers_too(sql: asyncpg.Connection) -> None:
    at = datetime(2026, 11, 24, tzinfo=UTC)
    named = await sql.fetchrow(BOUNDARIES, "5 8 * Jan-mar MON,wed", "UTC", at)
    assert named == await sql.fetchrow(BOUNDARIES, "5 8 * 1-3 1,3", "UTC", at)
    seven = await sql.fetchrow(BOUNDARIES, "5 8 * * 7", "UTC", at)
    assert seven == await sql.fetchrow(BOUNDARIES, "5 8 * * 0", "UTC", at)


# --- Who may, and what is wrong -------------------------------------------------------------

FIVE = "cron: must be five fields such as 0 9 * * 1-5"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"cron": "every day"}, FIVE),
        ({"cron": ""}, FIVE),
        ({"cron": "0 9 * *"}, FIVE),
        ({"cron": "0 9 * * * *"}, FIVE),
        ({"cron": "* 9 * * *"}, FIVE),
        ({"cron": "*/5 9 * * *"}, FIVE),
        ({"cron": "0,30 9 * * *"}, FIVE),
        ({"cron": "60 9 * * *"}, FIVE),
        ({"cron": "0 24 * * *"}, FIVE),
        ({"cron": "0 9-8 * * *"}, FIVE),
        ({"cron": "0 9 0 * *"}, FIVE),
        ({"cron": "0 9 * 13 *"}, FIVE),
        ({"cron": "0 9 * * 8"}, FIVE),
        ({"cron": "0 9 * * mond"}, FIVE),
        ({"cron": "0 */0 * * *"}, FIVE),
        ({"cron": "0 9, * * *"}, FIVE),
        ({"cron": "@daily"}, FIVE),
        ({"cron": "0 9 31 2 *"}, "cron: there is no day like this."),
        ({"cron": "0 9 * * *", "time_zone": "Mars/Olympus"}, "time_zone: there is no time zone"),
        ({"cron": "0 9 * * *", "time_zone": ""}, "time_zone: there is no time zone"),
        ({"cron": "0 9 * * *", "time_zone": "EST5EDT6"}, "time_zone: there is no time zone"),
        ({"time_zone": "UTC"}, "cron: "),
        ({"cron": "0 9 * * *", "x": 1}, "x: is not a known"),
    ],
)
async def test_a_wrong_schedule_is_refused_in_one_sentence(
    caller: Caller, sql: asyncpg.Connection, body: dict[str, str], sentence: str
) -> None:
    response = await caller.http.put(f"/projects/{caller.project_id}/digest_schedule", json=body)
    assert response.status_code == 400
    assert response.json()["error"].startswith(sentence)
    assert await sql.fetchval("select count(*) from digest_schedules") == 0
    if "x" not in body and "cron" in body:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await sql.execute(
                "select ops.set_digest($1, $2, $3)",
                caller.project_id, body["cron"], body.get("time_zone", "UTC"),
            )  # fmt: skip
        assert refused.value.sqlstate == "BT400" and str(refused.value).startswith(sentence)


async def test_only_an_owner_or_admin_changes_the_schedule_and_a_stranger_sees_none(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection, ops: asyncpg.Connection
) -> None:
    await schedule(caller)
    path = f"/projects/{caller.project_id}/digest_schedule"
    for method, body in (("GET", None), ("PUT", {"cron": "0 9 * * *"}), ("DELETE", None)):
        assert (await stranger.http.request(method, path, json=body)).status_code == 404
    assert (await stranger.http.get(f"/projects/{caller.project_id}/digests")).status_code == 404

    org = await ops.fetchval("select ops.create_organization('Acme')")
    await ops.execute("select ops.add_member($1, $2, 'admin')", org, caller.user_id)
    await ops.execute("select ops.add_member($1, $2, 'member')", org, stranger.user_id)
    await sql.execute("update projects set organization_id = $1 where id = $2", org,
                      caller.project_id)  # fmt: skip
    assert (await stranger.http.get(path)).json()["digest_schedule"]["cron"] == "0 9 * * *"
    for method, body in (("PUT", {"cron": "0 9 * * *"}), ("DELETE", None)):
        response = await stranger.http.request(method, path, json=body)
        assert response.status_code == 403
        assert response.json()["error"].startswith("Only an owner or admin of the project may")
    assert (await caller.http.delete(path)).status_code == 204
    assert (await caller.http.get(path)).json() == {"digest_schedule": None}


async def test_an_operator_sets_sees_and_removes_a_schedule(
    caller: Caller, ops: asyncpg.Connection, sql: asyncpg.Connection
) -> None:
    due = await ops.fetchval(
        "select ops.set_digest($1, ' 0  9 * * 1-5 ', 'europe/berlin')", caller.project_id
    )
    row = await ops.fetchrow("select * from ops.digests")
    assert row and (row["cron"], row["time_zone"]) == ("0 9 * * 1-5", "Europe/Berlin")
    assert row["next_at"] == due and row["overdue"] == timedelta()
    assert await ops.fetchval("select ops.remove_digest($1)", caller.project_id) is True
    assert await ops.fetchval("select ops.remove_digest($1)", caller.project_id) is False
    done = [row[0] for row in await sql.fetch("select what from ops.audit order by id")]
    assert done[-3:] == ["set_digest", "remove_digest", "remove_digest"]


# --- Each minute ----------------------------------------------------------------------------


async def test_workers_share_one_ticket_a_minute_that_old_ones_do_not_see(
    sql: asyncpg.Connection, worker: Workers, database: Database
) -> None:
    for _ in range(2):
        one, _ = worker()
        for _ in range(2):
            [task] = one.app.periodic_registry.periodic_tasks.values()
            job = task.task.configure(task_kwargs={"timestamp": 60}).job
            await one.app.job_manager.defer_periodic_job(
                job=job, periodic_id="", defer_timestamp=60
            )
    tickets = await sql.fetch("select queue_name, task_name from procrastinate_jobs")
    assert [tuple(row) for row in tickets] == [("jobs_4", "baton.digests")]


async def test_the_ticket_of_a_digest_waits_where_old_workers_do_not_look(
    caller: Caller, sql: asyncpg.Connection, database: Database
) -> None:
    await schedule(caller)
    await age(sql, DAY)
    await database.value("submit_digest")
    await caller.submit()
    queues = "select queue_name from procrastinate_jobs order by id"
    assert [row[0] for row in await sql.fetch(queues)] == ["jobs_4", "jobs"]
    # Also the one that it gets when that is lost.
    await sql.execute("delete from procrastinate_jobs")
    await sql.execute("set baton.clock_offset = '1 minute'")
    await sql.execute("select reconcile_jobs(10)")
    assert sorted(row[0] for row in await sql.fetch(queues)) == ["jobs", "jobs_4"]


async def test_a_running_worker_finds_what_is_due_by_itself(
    caller: Caller, sql: asyncpg.Connection, worker: Workers
) -> None:
    await caller.ingest({"title": "feat: add a cache"})
    await schedule(caller)
    await age(sql, DAY)
    one, _ = worker()
    one.fetch_job_polling_interval = 0.02
    running = asyncio.create_task(one.run())  # type: ignore[no-untyped-call]  # unannotated upstream
    async with asyncio.timeout(20):
        while not await sql.fetchval("select exists (select from insights)"):
            await asyncio.sleep(0.01)
    one.stop()
    await running
    assert len(await digests(caller)) == 1


async def test_the_minute_is_missed_and_the_worker_goes_on_while_the_database_is_away_or_held(
    sql: asyncpg.Connection, worker: Workers
) -> None:
    held = False
    one, _ = worker(on_hold=lambda: held)
    [task] = one.app.periodic_registry.periodic_tasks.values()

    async def minute(number: int) -> int | None:
        job = task.task.configure(
            queueing_lock="baton.digests", task_kwargs={"timestamp": number}
        ).job
        return await one.app.job_manager.defer_periodic_job(
            job=job, periodic_id="", defer_timestamp=number
        )

    held = True
    assert await minute(60) is None
    held = False
    await sql.execute("alter table procrastinate_periodic_defers rename to away")
    assert await minute(120) is None
    await sql.execute("alter table away rename to procrastinate_periodic_defers")
    assert await minute(180) is not None
