"""The life of a job in the database: every verb in every status, races, and random schedules."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from app.connector import init_connection
from app.db import Conflict, Database, LeaseLost, Refused, Unavailable

ARTIFACT: dict[str, Any] = {
    "title": "T", "summary": "S", "sources": ["github"], "key_changes": [], "decisions": [],
    "open_questions": [], "next_steps": [], "data": {}, "related_event_ids": [], "markdown": "#",
    "period_start": "2026-01-01T00:00:00Z", "period_end": "2026-01-02T00:00:00Z",
    "model_used": "m", "token_usage": {},
}  # fmt: skip
LEASE = 15.0
STATUSES = ("pending", "processing", "completed", "failed")


async def test_renewals_and_progress_do_not_wait_for_the_disk(sql: asyncpg.Connection) -> None:
    """Asked in the same transaction, because that is what decides at the commit."""
    for call in ("renew_leases('{}', '{}', 15)", "report_progress('{}', '{}', '{}')"):
        async with sql.transaction():
            assert await sql.fetchval("show synchronous_commit") == "on"
            await sql.execute(f"select {call}")
            assert await sql.fetchval("show synchronous_commit") == "off", call


class Jobs:
    """The verbs of a job, as the two sides use them."""

    def __init__(
        self, database: Database, api: Database, sql: asyncpg.Connection, user: str, project: str
    ) -> None:
        self.database = database
        self.api = api
        self.sql = sql
        self.user = user
        self.project = project

    async def submit(self, kind: str = "handoff") -> str:
        row = await self.api.row(
            "submit_job",
            self.user,
            self.project,
            kind,
            ["github"],
            None,
            None,
            {},
            {},
            None,
            None,
            0,
        )
        assert row and row["status"] == "pending"
        return str(row["id"])

    async def ticket(self, job_id: str, status: str = "doing") -> int:
        """The job's ticket as a worker has fetched it; another one when that is taken."""
        async with self.database.connection() as connection:
            own: int | None = await connection.raw.fetchval(
                "update procrastinate_jobs set status = $2 "
                "where args ->> 'job_id' = $1 and status = 'todo' returning id",
                job_id,
                status,
            )
            if own is not None:
                return own
            id: int = await connection.raw.fetchval(
                "insert into procrastinate_jobs (queue_name, task_name, args, status) values "
                "('jobs', 't', jsonb_build_object('job_id', $1::text), $2) returning id",
                job_id,
                status,
            )
        return id

    async def claim(self, job_id: str, ticket: int = 0, worker: str = "w") -> str | None:
        row = await self.database.row("claim_job", job_id, ticket, worker, LEASE)
        return row["lease_token"] if row else None

    async def renew(self, job_id: str, token: str) -> bool:
        return bool(await self.database.rows("renew_leases", [job_id], [token], LEASE))

    async def complete(self, job_id: str, token: str, **changed: Any) -> Any:
        return await self.database.row("complete_job", job_id, token, ARTIFACT | changed)

    async def fail(self, job_id: str, token: str) -> Any:
        return await self.database.row("fail_job", job_id, token, "timeout", "It took long.", {})

    async def release(self, job_id: str, token: str) -> Any:
        return await self.database.row("release_job", job_id, token)

    async def state(self, job_id: str) -> tuple[Any, ...]:
        """All that a transition may change."""
        row = await self.sql.fetchrow("select * from jobs where id = $1", job_id)
        counts = await self.sql.fetchrow(
            "select (select count(*) from leases where job_id = $1) as leases, "
            "(select count(*) from handoffs where job_id = $1) as handoffs, "
            "(select count(*) from insights where job_id = $1) as insights, "
            "(select sum(credits) from charges where job_id = $1) as credits, "
            "(select array_agg((id, status)::text) from procrastinate_jobs) as tickets",
            job_id,
        )
        assert row and counts
        return (*row, *counts)


@pytest.fixture
async def jobs(
    database: Database, api: Database, ops: asyncpg.Connection, sql: asyncpg.Connection
) -> Jobs:
    user = str(await ops.fetchval("select ops.create_user('ada@example.com')"))
    project = str(await ops.fetchval("select ops.create_project('Demo', $1)", user))
    return Jobs(database, api, sql, user, project)


async def job_in(jobs: Jobs, status: str) -> tuple[str, str]:
    """A job in a status, and the token of its last attempt."""
    job_id = await jobs.submit()
    token = str(uuid.uuid4())
    if status != "pending":
        token = await jobs.claim(job_id, await jobs.ticket(job_id)) or ""
    if status == "completed":
        await jobs.complete(job_id, token)
    if status == "failed":
        await jobs.fail(job_id, token)
    return job_id, token


# What each verb answers in each status, with the token of the job's last attempt.
VERBS: dict[str, dict[str, str | None | type[Exception]]] = {
    "claim": {"pending": "processing", "processing": None, "completed": None, "failed": None},
    "renew": {"pending": None, "processing": "processing", "completed": None, "failed": None},
    "complete": {
        "pending": LeaseLost, "processing": "completed", "completed": "completed",
        "failed": LeaseLost,
    },
    "fail": {
        "pending": LeaseLost, "processing": "failed", "completed": LeaseLost, "failed": "failed",
    },
    "release": {
        "pending": LeaseLost, "processing": "pending", "completed": LeaseLost,
        "failed": LeaseLost,
    },
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_does_what_its_status_allows(jobs: Jobs, verb: str) -> None:
    for status in STATUSES:
        await check_verb(jobs, verb, status)


async def check_verb(jobs: Jobs, verb: str, status: str) -> None:
    job_id, token = await job_in(jobs, status)
    before = await jobs.state(job_id)
    expected = VERBS[verb][status]
    arguments = (job_id,) if verb == "claim" else (job_id, token)
    if isinstance(expected, type):
        with pytest.raises(expected):
            await getattr(jobs, verb)(*arguments)
    else:
        answer = await getattr(jobs, verb)(*arguments)
        assert bool(answer) is (expected is not None)
    unchanged = expected in (None, LeaseLost, status)
    assert (await jobs.state(job_id) == before) is unchanged
    row = await jobs.api.row("read_job", jobs.user, job_id)
    assert row and row["status"] == (status if unchanged else expected)


@pytest.mark.parametrize("status", STATUSES)
async def test_a_wrong_token_is_refused_and_changes_nothing(jobs: Jobs, status: str) -> None:
    job_id, _ = await job_in(jobs, status)
    before = await jobs.state(job_id)
    assert not await jobs.renew(job_id, str(uuid.uuid4()))
    for verb in (jobs.complete, jobs.fail, jobs.release):
        with pytest.raises(LeaseLost):
            await verb(job_id, str(uuid.uuid4()))
    assert await jobs.state(job_id) == before


async def test_an_unknown_job_is_not_claimed_and_its_writes_are_refused(jobs: Jobs) -> None:
    nobody, token = str(uuid.uuid4()), str(uuid.uuid4())
    assert await jobs.claim(nobody) is None
    for verb in (jobs.complete, jobs.fail, jobs.release):
        with pytest.raises(LeaseLost):
            await verb(nobody, token)


@pytest.mark.parametrize("kind", ["handoff", "cross_source_correlation"])
async def test_completing_twice_answers_the_same_and_stores_and_charges_once(
    jobs: Jobs, sql: asyncpg.Connection, kind: str
) -> None:
    job_id = await jobs.submit(kind)
    token = await jobs.claim(job_id, await jobs.ticket(job_id)) or ""
    first = await jobs.complete(job_id, token)
    state = await jobs.state(job_id)
    assert first == await jobs.complete(job_id, token, title="Another")
    assert await jobs.state(job_id) == state
    table = "handoffs" if kind == "handoff" else "insights"
    [row] = await sql.fetch(f"select a.id, j.result_id, title, a.lease_token::text as token "
                            f"from {table} a join jobs j on j.id = a.job_id")  # fmt: skip
    assert row["id"] == row["result_id"] and (row["title"], row["token"]) == ("T", token)
    assert await sql.fetchval("select array_agg(credits) from charges") == [
        1 if kind == "handoff" else 2
    ]
    assert await sql.fetchval("select count(*) from leases") == 0
    assert await sql.fetchval("select count(*) from procrastinate_jobs") == 0


async def test_a_result_under_a_lost_lease_is_refused(jobs: Jobs) -> None:
    job_id = await jobs.submit()
    zombie = await jobs.claim(job_id) or ""
    await jobs.release(job_id, zombie)
    owner = await jobs.claim(job_id, worker="other") or ""
    assert zombie != owner
    before = await jobs.state(job_id)
    for verb in (jobs.complete, jobs.fail, jobs.release):
        with pytest.raises(LeaseLost):
            await verb(job_id, zombie)
    assert not await jobs.renew(job_id, zombie)
    assert await jobs.state(job_id) == before
    await jobs.complete(job_id, owner)
    with pytest.raises(LeaseLost):
        await jobs.complete(job_id, zombie)


async def test_renewing_moves_the_end_of_the_leases_that_are_still_held(
    jobs: Jobs, sql: asyncpg.Connection
) -> None:
    held = [await job_in(jobs, "processing") for _ in range(3)]
    await jobs.release(*held[2])
    await sql.execute("update leases set expires_at = expires_at - interval '10 seconds'")
    ids, tokens = ([each[n] for each in held] for n in (0, 1))
    rows = await jobs.database.rows(
        "renew_leases", ids, [*tokens[:1], *tokens[:1], tokens[2]], 60.0
    )
    assert [row[0] for row in rows] == ids[:1]
    left = await sql.fetch(
        "select job_id::text as id, expires_at - now() > '50 seconds' as renewed from leases"
    )
    assert {row["id"]: row["renewed"] for row in left} == {ids[0]: True, ids[1]: False}


async def test_of_many_claims_at_once_exactly_one_wins(jobs: Jobs, sql: asyncpg.Connection) -> None:
    job_id = await jobs.submit()
    tokens = await asyncio.gather(*(jobs.claim(job_id, n, f"w{n}") for n in range(20)))
    [won] = [token for token in tokens if token]
    [lease] = await sql.fetch("select lease_token::text, worker from leases")
    assert tuple(lease) == (won, f"w{tokens.index(won)}")
    assert await sql.fetchval("select attempt from jobs") == 1


async def test_of_many_ends_at_once_exactly_one_counts(jobs: Jobs, sql: asyncpg.Connection) -> None:
    job_id = await jobs.submit()
    token = await jobs.claim(job_id) or ""
    verbs = [jobs.complete, jobs.fail, jobs.release] * 6
    answers = await asyncio.gather(*(v(job_id, token) for v in verbs), return_exceptions=True)
    refused = [each for each in answers if isinstance(each, BaseException)]
    assert {type(each) for each in refused} <= {LeaseLost}
    status = await sql.fetchval("select status from jobs")
    ended = {"completed": 6, "failed": 6, "pending": 1}[status]  # an end may be repeated
    assert len(answers) - len(refused) == ended
    assert await sql.fetchval("select count(*) from charges") == (status == "completed")


async def test_releasing_gives_the_ticket_back_to_the_queue(
    jobs: Jobs, sql: asyncpg.Connection
) -> None:
    job_id = await jobs.submit()
    worker = await sql.fetchval("insert into procrastinate_workers default values returning id")
    ticket = await jobs.ticket(job_id)
    await sql.execute(
        "update procrastinate_jobs set worker_id = $1, abort_requested = true", worker
    )
    token = await jobs.claim(job_id, ticket) or ""
    await jobs.release(job_id, token)
    row = await sql.fetchrow("select status, worker_id, abort_requested from procrastinate_jobs")
    assert row and tuple(row) == ("todo", None, False)
    assert await sql.fetchval("select count(*) from leases") == 0
    row = await sql.fetchrow("select status, lease_token, attempt from jobs")
    assert row and tuple(row) == ("pending", None, 1)


async def test_failing_leaves_no_charge_no_lease_and_no_ticket(
    jobs: Jobs, sql: asyncpg.Connection
) -> None:
    job_id = await jobs.submit()
    token = await jobs.claim(job_id, await jobs.ticket(job_id)) or ""
    other = await jobs.ticket("another job's", "todo")
    await jobs.fail(job_id, token)
    for table in ("charges", "leases", "handoffs"):
        assert await sql.fetchval(f"select count(*) from {table}") == 0
    assert await sql.fetchval("select array_agg(id) from procrastinate_jobs") == [other]
    row = await sql.fetchrow("select outcome, error, error_code, completed_at from jobs")
    assert row and tuple(row)[:3] == ("timed_out", "It took long.", "timeout") and row[3]


@pytest.mark.parametrize("bad", [{"title": None}, {"period_start": "soon"}, {"markdown": "a\0b"}])
async def test_a_result_that_cannot_be_stored_leaves_all_as_it_was(
    jobs: Jobs, bad: dict[str, Any]
) -> None:
    job_id = await jobs.submit()
    token = await jobs.claim(job_id, await jobs.ticket(job_id)) or ""
    before = await jobs.state(job_id)
    with pytest.raises(Refused):
        await jobs.complete(job_id, token, **bad)
    assert await jobs.state(job_id) == before
    await jobs.complete(job_id, token)


async def test_a_revision_grows_with_every_change_that_a_client_can_see(
    jobs: Jobs, sql: asyncpg.Connection
) -> None:
    seen = []
    job_id = await jobs.submit()
    for step in ("claim", "release", "claim", "complete", "complete"):
        if step == "claim":
            token = await jobs.claim(job_id) or ""
        else:
            await getattr(jobs, step)(job_id, token)
        seen.append(await sql.fetchval("select rev from jobs"))
    assert seen == [2, 3, 4, 5, 5]


# --- Random schedules ----------------------------------------------------------------------


class Schedule:
    """One client of several that do what workers and accidents do, in a random order."""

    def __init__(self, jobs: Jobs, seed: int, held: dict[str, list[str]]) -> None:
        self.jobs = jobs
        self.random = random.Random(seed)
        self.held = held  # every token that a job ever had: old ones are zombies
        self.deadlocks = 0

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            verb = self.random.choice(
                ["submit", "claim", "claim", "claim", "renew", "complete", "fail", "release"]
            )
            try:
                await self.step(verb)
            except LeaseLost:
                pass
            except (Unavailable, Conflict):
                self.deadlocks += 1

    async def step(self, verb: str) -> None:
        if verb == "submit" or not self.held:
            self.held[await self.jobs.submit()] = []
            return
        job_id = self.random.choice(list(self.held))
        if verb == "claim":
            for _ in range(self.random.choice((1, 1, 2))):  # a ticket may come twice
                token = await self.jobs.claim(job_id, await self.jobs.ticket(job_id))
                if token:
                    self.held[job_id].append(token)
        elif self.held[job_id]:
            token = self.random.choice(self.held[job_id][-2:])
            await getattr(self.jobs, verb)(job_id, token)
            if verb == "complete" and self.random.random() < 0.5:
                await self.jobs.complete(job_id, token)


INVARIANTS = """
  select
    count(*) filter (where (j.status = 'completed')
      <> ((select count(*) from handoffs h where h.job_id = j.id and h.id = j.result_id
           and h.lease_token = j.lease_token) = 1)) as artifacts,
    count(*) filter (where (j.status = 'completed')
      <> exists (select from charges c where c.job_id = j.id and c.credits = 1)) as charges,
    count(*) filter (where (j.status = 'processing')
      <> exists (select from leases l where l.job_id = j.id and l.lease_token = j.lease_token))
      as leases,
    count(*) filter (where j.status in ('completed', 'failed')
      and exists (select from procrastinate_jobs t where t.id = j.ticket_id)) as tickets
  from jobs j
"""


@pytest.fixture
async def changes(sql: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """Notes every change of a status, so that one that comes after the end is seen."""
    await init_connection(sql)
    await sql.execute(
        "create table changes (job_id uuid, was text, became text);"
        "grant insert on changes to baton_migrate;"  # whose rights the functions have
        "create function note() returns trigger language plpgsql as $$ begin "
        "insert into changes values (new.id, old.status, new.status); return new; end $$;"
        "create trigger note after update on jobs for each row execute function note()"
    )
    yield sql


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_random_schedule_breaks_a_promise(
    jobs: Jobs, changes: asyncpg.Connection, seed: int
) -> None:
    held: dict[str, list[str]] = {}
    clients = [Schedule(jobs, seed * 100 + n, held) for n in range(6)]
    await asyncio.gather(*(client.run(60) for client in clients))
    assert sum(client.deadlocks for client in clients) == 0
    row = await changes.fetchrow(INVARIANTS)
    assert row and dict(row) == {"artifacts": 0, "charges": 0, "leases": 0, "tickets": 0}
    assert {row["job_id"] for row in await changes.fetch("select job_id from leases")} <= set(held)

    seen = await changes.fetch("select distinct was, became from changes")
    allowed = {("pending", "processing")} | {
        ("processing", end) for end in ("completed", "failed", "pending")
    }
    assert {tuple(each) for each in seen} == allowed
    attempts = await changes.fetch("select id, attempt from jobs")
    assert {r["id"]: r["attempt"] for r in attempts} == {j: len(t) for j, t in held.items()}
