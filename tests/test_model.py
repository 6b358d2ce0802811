"""The transitions of a job as a model: random schedules of everything that may happen to one.

Half of the jobs are of somebody who may do without limit, half of one whose credits do not suffice.

An operator pauses, resumes, caps, cancels, retries and puts jobs first; the second project may have
no more than a fixed number of attempts at once all the time.

Several connections at once submit, take tickets, claim, renew, finish once or twice, die silently,
come back as zombies, cancel, retry, sweep, wake, reconcile, duplicate and delete tickets, while
the clock is moved along. A seed makes the choices, not the interleaving; the invariants hold for
every one.
More seeds: BATON_MODEL_SEEDS=200.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest

SEEDS = int(os.environ.get("BATON_MODEL_SEEDS", "6"))
JOBS = 100
SUBMITTERS = 2
WORKERS = 6  # connections that run attempts
SWEEPERS = 3
LEASE = 15.0  # seconds
LIMIT = 40.0  # seconds of the real clock until every job has to have ended
CAP = 3  # attempts of the second project at once
COST, MONTHLY, GRANTED = 2, 31, 8  # credits; neither of the latter is what jobs use up evenly

# An artifact as a worker makes it, as small as the columns allow.
ARTIFACT = json.dumps(
    {
        **dict.fromkeys(("title", "summary", "markdown", "model_used"), "x"),
        **dict.fromkeys(("sources", "key_changes", "decisions", "open_questions"), []),
        **dict.fromkeys(("next_steps", "related_event_ids"), []),
        **dict.fromkeys(("data", "token_usage"), {}),
        "period_start": "2026-01-01T00:00:00Z",
        "period_end": "2026-01-02T00:00:00Z",
    }
)
FINISHES = {  # how an attempt ends, how often, and the statement
    "complete": (58, "select result_id from complete_job($1, $2, $3)", (ARTIFACT,)),
    "fail": (8, "select id from fail_job($1, $2, 'no_result', 'Nothing.', '{}')", ()),
    "park": (12, "select park_job($1, $2, 20, 'generation_failed', 'Busy.', '{}')", ()),
    "crash": (8, "select crash_job($1, $2, 'It died.', '{}')", ()),
    "hold": (6, "select hold_job($1, $2, 20)", ()),
    "release": (14, "select id from release_job($1, $2)", ()),
}
REPEATABLE = ("complete", "fail")  # a second time they answer the same
# Written by a trigger of the test, so that no change of a status can hide between two looks.
NOTED = """
create table moves (job_id uuid, before text, after text, grew boolean);
grant insert on moves to baton_migrate; -- as whom the functions run
create function note_move() returns trigger language plpgsql as $$
begin
  insert into moves values (new.id, old.status, new.status, new.rev > old.rev);
  return null;
end
$$;
create trigger moves after update of status on jobs for each row
  when (old.status is distinct from new.status) execute function note_move();
"""
MOVES = {
    ("pending", "processing"),
    ("pending", "failed"),  # past its deadline, or cancelled
    ("processing", "pending"),
    ("processing", "completed"),
    ("processing", "failed"),
}


@dataclass
class Model:
    """One seed's world: what is shared by its actors, and what they have seen."""

    dsn: str
    rng: random.Random
    owners: list[tuple[Any, Any]] = field(default_factory=list)  # users and their projects
    undecided: bool = True  # do clients still cancel and retry?
    offset: float = 0.0  # seconds by which the database's clock has been moved
    seen: Counter[str] = field(default_factory=Counter)
    tokens: list[Any] = field(default_factory=list)  # of all claims
    finished: dict[Any, str] = field(default_factory=dict)  # how, by token, as answered
    fenced: set[Any] = field(default_factory=set)  # tokens that were refused at first
    wrong: list[str] = field(default_factory=list)
    calm: bool = False  # nothing is disturbed any more

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A session that need not wait for the disk: nobody crashes the server here."""
        connection = await asyncpg.connect(
            self.dsn, server_settings={"synchronous_commit": "off", "jit": "off"}
        )
        try:
            yield connection
        finally:
            connection.terminate()

    async def tick(self, connection: asyncpg.Connection) -> None:
        """Bring a session's clock up to date."""
        await connection.execute(f"set baton.clock_offset = '{self.offset:.3f} seconds'")

    async def clock(self) -> None:
        """Time passes, about a hundred times as fast as outside."""
        while True:
            await asyncio.sleep(0.02)
            self.offset += self.rng.uniform(0.5, 4)

    async def submit_together(self) -> None:
        """Requests come in on several connections at once."""
        await asyncio.gather(*(self.submit() for _ in range(SUBMITTERS)))

    async def submit(self) -> None:
        """Requests come in; some transactions roll back, some jobs have little time."""
        async with self.connection() as connection:
            for _ in range(JOBS // SUBMITTERS):
                await self.tick(connection)
                transaction = connection.transaction()
                await transaction.start()
                job = await connection.fetchrow(
                    "select (job).id, (job).status"
                    " from submit_job($1, $2, 'handoff', null, null, null, '{}')",
                    *self.rng.choice(self.owners),
                )
                assert job
                if self.rng.random() < 0.05:
                    await transaction.rollback()
                    self.seen["rolled back"] += 1
                    continue
                if job["status"] == "failed":
                    self.seen["refused"] += 1
                elif self.rng.random() < 0.04:
                    await connection.execute(
                        "update jobs set deadline_at = baton_now() + interval '40 s' where id = $1",
                        job["id"],
                    )
                await transaction.commit()
                self.seen["submitted"] += 1

    async def work(self) -> None:
        """Workers one after the other: each lives until it dies silently."""
        async with self.connection() as connection:
            while True:
                worker_id = await connection.fetchval("select procrastinate_register_worker_v1()")
                while await self.take(connection, worker_id):
                    pass
                self.seen["died"] += 1
                await connection.execute(
                    "update procrastinate_workers"
                    " set last_heartbeat = now() - interval '1 h' where id = $1",
                    worker_id,
                )

    async def take(self, connection: asyncpg.Connection, worker_id: int) -> bool:
        """Take a ticket and do something with it; answers whether the worker is still alive."""
        await self.tick(connection)
        ticket = await connection.fetchrow(
            "select id, args from procrastinate_fetch_job_v2(array['jobs'], $1)", worker_id
        )
        if ticket is None or ticket["id"] is None:
            await asyncio.sleep(0.01)
            return True
        if self.rng.random() < 0.04:
            return False  # dead between ticket and claim
        job_id = json.loads(ticket["args"])["job_id"]
        job = await connection.fetchrow(
            "select id, lease_token from claim_job($1, $2, 'model', $3)",
            job_id,
            ticket["id"],
            LEASE,
        )
        if job is None:
            self.seen["claims lost"] += 1
            await connection.execute(
                "delete from procrastinate_jobs"
                " where id = $1 and status = 'doing' and worker_id = $2",
                ticket["id"],
                worker_id,
            )
            return True
        self.tokens.append(job["lease_token"])
        return await self.attempt(connection, job["id"], job["lease_token"])

    async def attempt(self, connection: asyncpg.Connection, job_id: Any, token: Any) -> bool:
        """One attempt; answers whether its worker has survived it."""
        fate = self.rng.random()
        if fate < 0.2:
            return False
        if fate < 0.4:  # longer than the lease, without renewing it
            self.seen["paused"] += 1
            wake = self.offset + LEASE * self.rng.uniform(1, 2.5)
            while self.offset < wake:
                await asyncio.sleep(0.005)
        elif fate < 0.6:
            await self.tick(connection)
            kept = await connection.fetch(
                "select renew_leases($1, $2, $3)", [job_id], [token], LEASE
            )
            if not kept:
                self.seen["leases lost"] += 1
                return True
        await self.tick(connection)
        names, weights = list(FINISHES), [weight for weight, _, _ in FINISHES.values()]
        [name] = self.rng.choices(names, weights)
        first = await self.finish(connection, name, job_id, token)
        if self.rng.random() < 0.3:
            await self.again(connection, name, job_id, token, first)
        return True

    async def finish(
        self, connection: asyncpg.Connection, name: str, job_id: Any, token: Any
    ) -> Any:
        """End an attempt; answers what the function did, None when it was fenced."""
        _, statement, arguments = FINISHES[name]
        try:
            answer = await connection.fetchval(statement, job_id, token, *arguments)
        except asyncpg.PostgresError as error:
            if error.sqlstate != "BT410":
                raise
            self.seen["fenced"] += 1
            if token not in self.finished:
                self.fenced.add(token)
            return None
        # A crash or an error that was one too many has failed the job, and that is an end.
        ended = "fail" if answer == "failed" else name
        if self.finished.setdefault(token, ended) != ended:
            self.wrong.append(f"{token} ended as {self.finished[token]} and as {ended}")
        self.seen[name] += 1
        return answer

    async def again(
        self, connection: asyncpg.Connection, name: str, job_id: Any, token: Any, first: Any
    ) -> None:
        """The same finish once more, or another one: as after an answer that was lost."""
        self.seen["sent twice"] += 1
        other = self.rng.choice([name, *FINISHES])
        before = self.finished.get(token)
        second = await self.finish(connection, other, job_id, token)
        same = other == before and other in REPEATABLE
        if same and second is None or other == name and same and second != first:
            self.wrong.append(f"{name} answered {first}, then {second}")
        if not same and second is not None:
            self.wrong.append(f"{other} was accepted after {before}")

    async def disturb(self) -> None:
        """Tickets are duplicated, for jobs that wait, run or have ended, and deleted."""
        async with self.connection() as connection:
            while not self.calm:
                await asyncio.sleep(0.01)
                await self.tick(connection)
                if self.rng.random() < 0.6:
                    await connection.execute(
                        "select defer_ticket(id) from jobs order by random() limit 2"
                    )
                else:
                    await connection.execute(
                        "delete from procrastinate_jobs where id = ("
                        "select id from procrastinate_jobs where status = 'todo'"
                        " order by random() limit 1 for update skip locked)"
                    )

    async def change_minds(self) -> None:
        """Clients cancel jobs, in whatever state they find them, and try failed ones again."""
        async with self.connection() as connection:
            while self.undecided:
                await asyncio.sleep(0.03)
                await self.tick(connection)
                job = await connection.fetchrow(
                    "select id, status, user_id from jobs order by random() limit 1"
                )
                if job is None:
                    continue
                if self.rng.random() < 0.7:
                    changed = await connection.fetchval(
                        "select changed from cancel_job($1, $2)", job["user_id"], job["id"]
                    )
                    self.seen["cancelled"] += changed
                elif job["status"] == "failed":
                    await connection.fetchval(
                        "select (job).id from retry_job($1, $2, null, null, 0, '{}')",
                        job["user_id"],
                        job["id"],
                    )
                    self.seen["submitted"] += 1
                    self.seen["retried"] += 1

    async def operate(self) -> None:
        """An operator holds back, lets go, cancels and retries; in the end all is let go."""
        (_, project), (_, capped) = self.owners
        calls = [  # how often, what it is called in `seen`, and the call
            (5, "held", "ops.pause()", ()),
            (5, "held", "ops.pause('handoff', 'model')", ()),
            (12, "resumed", "ops.resume()", ()),
            (6, "limited", "ops.set_concurrency($1, $2)", (project, self.rng.randint(0, 3))),
            (6, "limited", "ops.set_concurrency($1, null)", (project,)),
            (8, "put first", "ops.prioritize((select id from jobs order by random() limit 1))", ()),
            (2, "cancelled", "ops.cancel_project($1, max => 3)", (capped,)),
            (2, "cancelled", "ops.cancel_project($1, max => 3)", (project,)),
            (2, "submitted", "ops.retry_failed('cancelled', max => 2)", ()),
        ]
        first = self.rng.sample(calls, len(calls))  # each of them happens, from the last one on,
        first.sort(key=lambda call: call[1] != "resumed")  # and a pause before it is ended
        async with self.connection() as connection:
            while self.undecided or first:
                await asyncio.sleep(0.03)
                await self.tick(connection)
                [drawn] = self.rng.choices(calls, [c[0] for c in calls])
                _, name, call, arguments = first.pop() if first else drawn
                try:
                    count = await connection.fetchval(f"select {call}", *arguments)
                except asyncpg.PostgresError as error:
                    if error.sqlstate not in ("BT404", "55P03"):  # no job yet; it was locked
                        raise
                    continue
                self.seen[name] += count if isinstance(count, int) else 1
            await connection.execute("select ops.resume()")
            await connection.execute("select ops.set_concurrency($1, null)", project)

    async def sweep(self) -> None:
        """What every process does all the time."""
        async with self.connection() as connection:
            while True:
                await self.tick(connection)
                for row in await connection.fetch("select sweepable(20)"):
                    if await connection.fetchval("select sweep_job($1)", row[0]):
                        self.seen["swept"] += 1
                self.seen["woken"] += await connection.fetchval("select wake_due(50)")
                self.seen["moved"] += await connection.fetchval("select wake_held(20)")
                running = await connection.fetchval(
                    "select count(*) from leases l join jobs j on j.id = l.job_id"
                    " where j.project_id = $1",
                    self.owners[1][1],
                )
                self.seen["at the cap"] += running == CAP
                if running > CAP:
                    self.wrong.append(f"{running} attempts at once")
                self.seen["mended"] += await connection.fetchval("select reconcile_jobs(50)")
                self.seen["tickets mended"] += await connection.fetchval(
                    "select reconcile_tickets(30)"
                )
                await asyncio.sleep(0.02)

    async def left(self, connection: asyncpg.Connection, *, tickets: bool) -> int:
        """How much has not come to rest."""
        return int(
            await connection.fetchval(
                "select (select count(*) from jobs where status in ('pending', 'processing'))"
                " + (select count(*) from leases) + (select count(*) from job_due)"
                + (" + (select count(*) from procrastinate_jobs)" if tickets else "")
            )
        )


async def run(model: Model, sql: asyncpg.Connection) -> None:
    """Let the actors act until everything has come to rest; the first error of one is ours."""
    loops = [model.clock(), *(model.work() for _ in range(WORKERS))]
    loops += [model.sweep() for _ in range(SWEEPERS)]
    acting = [asyncio.create_task(loop) for loop in loops]
    disturbing = asyncio.create_task(model.disturb())
    minding = asyncio.create_task(model.change_minds())
    operating = asyncio.create_task(model.operate())
    submitting = asyncio.create_task(model.submit_together())

    async def rest() -> None:
        await submitting
        model.undecided = False
        await minding
        await operating
        while await model.left(sql, tickets=False):
            await asyncio.sleep(0.05)
        model.calm = True
        await disturbing  # not cancelled: its last ticket would be stored after the last look
        while await model.left(sql, tickets=True):
            await asyncio.sleep(0.05)

    resting = asyncio.create_task(rest())
    everybody = {resting, submitting, disturbing, minding, operating, *acting}
    try:
        async with asyncio.timeout(LIMIT):
            while not resting.done():
                done, _ = await asyncio.wait(everybody, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled():
                        task.result()
                everybody -= done
    finally:
        for task in everybody:
            task.cancel()
        await asyncio.gather(*everybody, return_exceptions=True)


async def violations(model: Model, sql: asyncpg.Connection) -> dict[str, list[Any]]:
    """The invariants of the design by name, each with what breaks it."""
    asked = {
        "not terminal": "select id from jobs where status in ('pending', 'processing')",
        "completed without its one artifact": """
            select j.id from jobs j left join handoffs h on h.job_id = j.id
            where j.status = 'completed' and h.id is distinct from j.result_id""",
        "artifact without completed": """
            select h.job_id from handoffs h join jobs j on j.id = h.job_id
            where j.status <> 'completed'""",
        "artifact of another attempt": """
            select j.id from handoffs h join jobs j on j.id = h.job_id
            where h.lease_token <> j.lease_token""",
        "completed and not charged": """
            select j.id from jobs j left join charges c on c.job_id = j.id
            where j.status = 'completed' and c.credits is distinct from j.credits""",
        "charged and not completed": """
            select j.id from charges c join jobs j on j.id = c.job_id
            where j.status <> 'completed'""",
        "more charged than there was": f"""
            select month_of(created_at) from charges where payer_id = $1
            group by 1 having sum(credits - from_grants) > {MONTHLY}
            union all
            select null from charges where payer_id = $1 having sum(from_grants) > {GRANTED}""",
        "refused though there was enough": f"""
            select id from jobs where error_code = 'quota_exceeded'
            and (error_meta ->> 'remaining_credits')::int >= {COST}""",
        "reserved left": "select user_id from balances where reserved <> 0",
        "leases left": "select job_id from leases",
        "parked left": "select job_id from job_due",
        "tickets left": "select id from procrastinate_jobs",
        "over a budget": """
            select id from jobs where crashes > 3 or provider_errors > 5""",
        "worker_lost within the budget": """
            select id from jobs
            where error_code = 'worker_lost' and crashes < 3 and attempt < 10""",
        "revision did not grow": "select job_id from moves where not grew",
    }
    payer = model.owners[1][0]
    found = {
        name: [row[0] for row in await sql.fetch(query, *[payer] * ("$1" in query))]
        for name, query in asked.items()
    }
    moves = {tuple(row) for row in await sql.fetch("select distinct before, after from moves")}
    artifacts = {row[0] for row in await sql.fetch("select lease_token from handoffs")}
    completed = {token for token, name in model.finished.items() if name == "complete"}
    found["moves"] = sorted(moves - MOVES)
    found["artifact of a fenced attempt"] = sorted(artifacts & model.fenced)
    found["completions and artifacts differ"] = sorted(artifacts ^ completed)
    found["token used twice"] = [t for t, n in Counter(model.tokens).items() if n > 1]
    found["lost"] = [
        n for n in [await sql.fetchval("select count(*) from jobs")] if n != model.seen["submitted"]
    ]
    found["wrong answers"] = list(model.wrong)
    deadlocks = "select deadlocks from pg_stat_database where datname = current_database()"
    found["deadlocks"] = [n for n in [await sql.fetchval(deadlocks)] if n]
    return {name: broken for name, broken in found.items() if broken}


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_no_schedule_breaks_an_invariant(
    seed: int, dsn: str, sql: asyncpg.Connection
) -> None:
    model = Model(dsn, random.Random(seed))
    await sql.execute("update flows set credits = $1", COST)
    await sql.execute("select ops.create_plan('small', $1)", MONTHLY)
    for plan in ("self_hosted", "small"):
        user = await sql.fetchval("select ops.create_user($1, plan => $2)", f"{plan}@a.b", plan)
        project = await sql.fetchval("select ops.create_project('model', $1)", user)
        model.owners.append((user, project))
    await sql.execute("select ops.add_credits($1, $2, 'model')", user, GRANTED)
    await sql.execute("select ops.set_concurrency($1, $2)", project, CAP)
    await sql.execute(NOTED)

    await run(model, sql)

    print(dict(sorted(model.seen.items())))
    assert await violations(model, sql) == {}
    # A schedule in which nothing went wrong would prove nothing.
    happens = "died, fenced, swept, sent twice, claims lost, mended, cancelled, refused"
    happens += ", held, resumed, limited, moved, at the cap"
    for event in happens.split(", "):
        assert model.seen[event], f"{event} never happened"
