"""How an attempt ends: well, badly, in time or too late, and what it never tells the log."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from scripted import CALL

from app.db import Database, Unavailable
from app.jobs import submit
from app.queue import Bell
from app.schemas import HandoffDraft, HandoffRequest
from tasks.calls import Calls
from tasks.context import Context
from tasks.executor import Executor
from tasks.outcomes import GenerationFailed, NoResult, PlanViolation, Retry
from tasks.providers import Completion, Extractive, Provider

CANARY = "canary-7f3a"


class Scripted:
    """A provider that says when it was asked, and does as it is told."""

    def __init__(self, behave: Callable[[Context], Awaitable[None]] | None = None) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self._behave = behave

    async def complete(self, context: Context, calls: Calls) -> Completion:
        self.asked.set()
        await (self._behave(context) if self._behave else self.go.wait())
        said = {"text": "It happened.", "event_ids": [e.id for e in context.events]}
        lists = {name: [said] for name in HandoffDraft.model_fields if name not in ("title",)}
        return Completion(
            draft=HandoffDraft.model_validate({"title": "T", **lists, "summary": said}), model="m"
        )


async def nothing(_: Context) -> None:
    """What a provider does that answers at once."""


def raising(error: BaseException) -> Scripted:
    async def behave(_: Context) -> None:
        raise error

    return Scripted(behave)


class Attempts:
    """Jobs of one project, whose tickets are already in a worker's hands."""

    def __init__(
        self, database: Database, api: Database, sql: asyncpg.Connection, user: str, project: str
    ) -> None:
        self.database, self.api, self.sql = database, api, sql
        self.user, self.project = user, project

    def executor(self, provider: Provider, attempt_timeout: float = 20.0) -> Executor:
        return Executor(
            self.database,
            provider,
            name="w",
            attempt_timeout=attempt_timeout,
            bell=Bell(self.database),  # rings for nobody
        )

    async def submitted(self) -> tuple[str, int]:
        job = await submit(
            self.api, user_id=self.user, project_id=self.project,
            kind="handoff", sources=None, body=HandoffRequest(project_id=self.project),
        )  # fmt: skip
        job_id = str(job["id"])
        ticket = await self.sql.fetchval(
            "update procrastinate_jobs set status = 'doing' where args ->> 'job_id' = $1 "
            "returning id",
            job_id,
        )
        return job_id, ticket

    async def job(self, job_id: str) -> dict[str, Any]:
        row = await self.api.row("read_job", self.user, job_id)
        assert row
        return dict(row)

    async def left(self) -> dict[str, int]:
        """What attempts leave behind, counted."""
        tables = ("leases", "handoffs", "charges", "procrastinate_jobs")
        return {t: await self.sql.fetchval(f"select count(*) from {t}") for t in tables}


@pytest.fixture
async def attempts(
    database: Database, api: Database, ops: asyncpg.Connection, sql: asyncpg.Connection
) -> Attempts:
    user = str(await ops.fetchval("select ops.create_user('ada@example.com')"))
    project = str(await ops.fetchval("select ops.create_project('Demo', $1)", user))
    event = {"source": "github", "event_type": "commit", "title": f"feat: add {CANARY}",
             "content": f"We decided to keep {CANARY}.", "author": "Ada"}  # fmt: skip
    await api.row("ingest_events", user, project, [event])
    return Attempts(database, api, sql, user, project)


NOTHING = {"leases": 0, "handoffs": 0, "charges": 0, "procrastinate_jobs": 0}


async def test_an_attempt_completes_its_job(attempts: Attempts) -> None:
    job_id, ticket = await attempts.submitted()
    await attempts.executor(Extractive()).run(job_id, ticket)
    assert (await attempts.job(job_id))["status"] == "completed"
    assert await attempts.left() == NOTHING | {"handoffs": 1, "charges": 1}


async def test_an_attempt_that_takes_too_long_is_cancelled_and_tried_again_later(
    attempts: Attempts,
) -> None:
    job_id, ticket = await attempts.submitted()
    await attempts.executor(Scripted(), attempt_timeout=0.05).run(job_id, ticket)
    job = await attempts.job(job_id)
    assert (job["status"], job["error_code"]) == ("pending", None)
    assert await attempts.sql.fetchval("select count(*) from job_due") == 1
    assert await attempts.sql.fetchval("select provider_errors from jobs") == 1
    assert await attempts.left() == NOTHING


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (NoResult("Nothing came.", stage="s"), "no_result", "Nothing came."),
        (GenerationFailed("It broke.", stage="s"), "generation_failed", "It broke."),
    ],
)
async def test_a_failure_becomes_the_job_s_error(
    attempts: Attempts, error: Exception, code: str, sentence: str
) -> None:
    job_id, ticket = await attempts.submitted()
    await attempts.executor(raising(error)).run(job_id, ticket)
    job = await attempts.job(job_id)
    assert (job["status"], job["error_code"], job["error"]) == ("failed", code, sentence)
    assert job["error_meta"] == {"attempts": 1, "retryable": False, "stage": "s"}
    assert await attempts.left() == NOTHING


async def test_what_nobody_foresaw_fails_the_job_without_its_message(
    attempts: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    job_id, ticket = await attempts.submitted()
    await attempts.executor(raising(ZeroDivisionError(CANARY))).run(job_id, ticket)
    job = await attempts.job(job_id)
    assert (job["status"], job["error_code"]) == ("failed", "generation_failed")
    assert "ZeroDivisionError" in job["error"] and CANARY not in str(job)
    assert await attempts.left() == NOTHING
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.__dict__["job_id"] == job_id
    assert "ZeroDivisionError" in logging.Formatter().format(record) + str(vars(record))


async def test_a_database_that_is_away_for_a_moment_does_not_fail_the_job(
    attempts: Attempts,
) -> None:
    job_id, ticket = await attempts.submitted()
    with contextlib.suppress(Unavailable):
        await attempts.executor(raising(Unavailable("away"))).run(job_id, ticket)
    assert (await attempts.job(job_id))["status"] == "pending"
    assert await attempts.left() == NOTHING | {"procrastinate_jobs": 1}


async def test_a_nul_in_an_answer_does_not_cost_the_result(attempts: Attempts) -> None:
    job_id, ticket = await attempts.submitted()

    class Unstorable(Scripted):
        async def complete(self, context: Context, calls: Calls) -> Completion:
            made = await super().complete(context, calls)
            assert isinstance(made.draft, HandoffDraft)
            made.draft.title = "a NUL \0, which no text of PostgreSQL can hold"
            return made

    unstorable = Unstorable()
    unstorable.go.set()
    await attempts.executor(unstorable).run(job_id, ticket)
    assert (await attempts.job(job_id))["status"] == "completed"
    title = await attempts.sql.fetchval("select title from handoffs")
    assert title == "a NUL , which no text of PostgreSQL can hold"


async def test_a_result_that_cannot_be_stored_fails_the_job_at_the_first_try(
    attempts: Attempts,
) -> None:
    job_id, ticket = await attempts.submitted()
    await attempts.sql.execute("alter table handoffs add check (title <> 'T')")
    provider = Scripted()
    provider.go.set()
    await attempts.executor(provider).run(job_id, ticket)
    job = await attempts.job(job_id)
    assert (job["status"], job["error_code"]) == ("failed", "generation_failed")
    assert await attempts.left() == NOTHING


async def test_a_cancelled_attempt_gives_job_and_ticket_back(attempts: Attempts) -> None:
    job_id, ticket = await attempts.submitted()
    provider = Scripted()
    task = asyncio.create_task(attempts.executor(provider).run(job_id, ticket))
    await provider.asked.wait()
    assert (await attempts.left())["leases"] == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await attempts.job(job_id))["status"] == "pending"
    row = await attempts.sql.fetchrow("select id, status, worker_id from procrastinate_jobs")
    assert row and tuple(row) == (ticket, "todo", None)
    assert await attempts.left() == NOTHING | {"procrastinate_jobs": 1}


async def steal(attempts: Attempts, job_id: str) -> str:
    """Another worker takes the job over."""
    token = await attempts.sql.fetchval("select lease_token from jobs where id = $1", job_id)
    await attempts.sql.execute("select release_job($1, $2)", job_id, token)
    row = await attempts.database.row("claim_job", job_id, 0, "other", 15.0)
    assert row
    return str(row["lease_token"])


async def test_an_attempt_whose_lease_was_taken_is_cancelled_at_the_renewal(
    attempts: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Scripted()
    executor = attempts.executor(provider)
    lost, kept = await attempts.submitted(), await attempts.submitted()
    first = asyncio.create_task(executor.run(*lost))
    await provider.asked.wait()
    provider.asked.clear()
    second = asyncio.create_task(executor.run(*kept))
    await provider.asked.wait()
    await attempts.sql.execute("update leases set expires_at = now()")
    assert await executor.renew_once() == 2
    token = await steal(attempts, lost[0])

    assert await executor.renew_once() == 1
    with pytest.raises(asyncio.CancelledError):
        await first
    row = await attempts.sql.fetchrow("select * from leases where job_id = $1", lost[0])
    assert row and (str(row["lease_token"]), row["worker"]) == (token, "other")
    assert [r.__dict__["job_id"] for r in caplog.records if r.msg == "lease lost"] == [lost[0]]

    provider.go.set()
    await second
    assert (await attempts.job(kept[0]))["status"] == "completed"
    assert await executor.renew_once() == 0


async def test_a_fenced_result_stores_nothing(attempts: Attempts) -> None:
    job_id, ticket = await attempts.submitted()
    provider = Scripted()
    task = asyncio.create_task(attempts.executor(provider).run(job_id, ticket))
    await provider.asked.wait()
    token = await steal(attempts, job_id)
    provider.go.set()
    await task
    assert (await attempts.job(job_id))["status"] == "processing"
    assert await attempts.left() == NOTHING | {"leases": 1, "procrastinate_jobs": 1}
    await attempts.database.row("fail_job", job_id, token, "no_result", "Theirs.", {})


async def test_a_fenced_failure_is_nobody_s_error(attempts: Attempts) -> None:
    async def too_late(_: Context) -> None:
        await steal(attempts, job_id)
        raise NoResult("Nothing.")

    job_id, ticket = await attempts.submitted()
    await attempts.executor(Scripted(too_late)).run(job_id, ticket)
    assert (await attempts.job(job_id))["status"] == "processing"


# --- The calls that attempts made ----------------------------------------------------------


class Calling(Scripted):
    """Makes a call, then does as it is told."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        calls.record(**CALL)
        return await super().complete(context, calls)


async def recorded(attempts: Attempts, executor: Executor) -> list[tuple[Any, ...]]:
    await executor.record_once()
    rows = await attempts.sql.fetch(
        "select job_id::text, attempt, outcome, prompt_tokens, completion_tokens, cost "
        "from provider_calls order by id"
    )
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("error", [None, NoResult("Nothing."), Retry("Busy."), ValueError("?")])
async def test_every_call_is_a_row_however_its_attempt_ended(
    attempts: Attempts, error: Exception | None
) -> None:
    async def behave(_: Context) -> None:
        if error:
            raise error

    await attempts.sql.execute("insert into model_prices values ('m', 2, 10)")
    executor = attempts.executor(Calling(behave))
    job_id, ticket = await attempts.submitted()
    await executor.run(job_id, ticket)
    assert await recorded(attempts, executor) == [(job_id, 1, "ok", 1_000, 200, Decimal("0.004"))]
    assert await recorded(attempts, executor) != [], "once"


async def test_a_call_costs_what_the_model_costs_that_answered_or_else_the_one_that_was_asked(
    attempts: Attempts,
) -> None:
    class Asking(Scripted):
        async def complete(self, context: Context, calls: Calls) -> Completion:
            calls.use("m")
            for model in ("m-2026", "n"):
                calls.record(**CALL | {"model": model})
            return await super().complete(context, calls)

    await attempts.sql.execute("insert into model_prices values ('m', 2, 10), ('n', 4, 20)")
    executor = attempts.executor(Asking(nothing))
    await executor.run(*await attempts.submitted())
    assert [row[-1] for row in await recorded(attempts, executor)] == [
        Decimal("0.004"),
        Decimal("0.008"),
    ]


async def test_the_calls_of_a_fenced_or_stopped_attempt_are_rows(attempts: Attempts) -> None:
    provider = Calling()
    executor = attempts.executor(provider)
    job_id, ticket = await attempts.submitted()
    task = asyncio.create_task(executor.run(job_id, ticket))
    await provider.asked.wait()
    await attempts.api.value("cancel_job", attempts.user, job_id)
    await executor.renew_once()
    await asyncio.wait([task])
    assert await recorded(attempts, executor) == [(job_id, 1, "ok", 1_000, 200, None)]


async def test_calls_are_kept_while_the_database_is_away_and_stay_when_the_job_is_deleted(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = attempts.executor(Calling(nothing))
    for _ in range(2):
        job_id, ticket = await attempts.submitted()
        await executor.run(job_id, ticket)
    value = attempts.database.value

    async def away(*_: Any) -> None:
        raise Unavailable("away")

    monkeypatch.setattr(attempts.database, "value", away)
    with pytest.raises(Unavailable):
        await executor.record_once()
    monkeypatch.setattr(attempts.database, "value", value)
    await attempts.api.value("delete_job", attempts.user, job_id)
    assert [row[0] for row in await recorded(attempts, executor)][1] == job_id


async def test_what_a_server_says_of_a_call_cannot_cost_the_rows_of_others(
    attempts: Attempts,
) -> None:
    calls = Calls()
    calls.record(**CALL | {"model": "m\0\ud800", "request_id": "r" * 9_000})
    assert calls.made[0]["model"] == "m"
    assert len(calls.made[0]["request_id"]) == 200


async def test_a_model_that_the_plan_lacks_is_not_asked() -> None:
    Calls().use("any")
    Calls(models=["m"]).use("m")
    with pytest.raises(PlanViolation, match='The plan "free" does not include the model n.') as no:
        Calls(kind="handoff", plan="free", models=["m"]).use("n")
    assert no.value.meta == {"flow": "handoff", "plan": "free", "model": "n"}


async def test_cancelling_an_attempt_that_has_lost_its_job_is_passed_on(attempts: Attempts) -> None:
    job_id, ticket = await attempts.submitted()
    provider = Scripted()
    task = asyncio.create_task(attempts.executor(provider).run(job_id, ticket))
    await provider.asked.wait()
    await steal(attempts, job_id)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await attempts.job(job_id))["status"] == "processing"


async def test_a_job_that_is_taken_or_ended_is_not_run_again(attempts: Attempts) -> None:
    job_id, ticket = await attempts.submitted()
    provider = raising(AssertionError("asked"))
    await attempts.database.row("claim_job", job_id, 0, "other", 15.0)
    await attempts.executor(provider).run(job_id, ticket)
    assert not provider.asked.is_set()


async def test_no_record_of_a_log_holds_what_an_event_says(
    attempts: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    formatter = logging.Formatter()

    async def quoting(context: Context) -> None:
        raise ValueError(f"cannot read {context.events[0].title}")

    for provider in (Extractive(), raising(NoResult("Nothing.")), Scripted(quoting)):
        await attempts.executor(provider).run(*await attempts.submitted())
    lost = Scripted()
    task = asyncio.create_task(attempts.executor(lost).run(*await attempts.submitted()))
    await lost.asked.wait()
    task.cancel()
    await asyncio.wait([task])
    assert len(caplog.records) >= 8
    for record in caplog.records:
        assert CANARY not in formatter.format(record) + str(vars(record)), record.msg


async def test_a_renewal_while_the_result_is_being_stored_does_not_call_the_job_lost(
    attempts: Attempts,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    executor = attempts.executor(Extractive())
    job_id, ticket = await attempts.submitted()
    value, committed, answer = database.value, asyncio.Event(), asyncio.Event()

    async def slow_answer(name: str, *args: Any, **options: Any) -> Any:
        answered = await value(name, *args, **options)
        if name == "complete_job":
            committed.set()
            await answer.wait()
        return answered

    monkeypatch.setattr(database, "value", slow_answer)
    attempt = asyncio.create_task(executor.run(job_id, ticket))
    await committed.wait()
    await executor.renew_once()
    answer.set()
    await attempt
    assert [record.msg for record in caplog.records] == ["claim", "complete"]


@pytest.mark.parametrize(
    "error", [GenerationFailed("The model said a\0b."), GenerationFailed("No.", cause=ValueError())]
)
async def test_an_outcome_that_cannot_be_stored_is_a_failure_that_says_so(
    attempts: Attempts, error: GenerationFailed
) -> None:
    job_id, ticket = await attempts.submitted()
    await attempts.executor(raising(error)).run(job_id, ticket)
    job = await attempts.job(job_id)
    assert (job["status"], job["error"]) == ("failed", "The database cannot store the outcome.")
    assert await attempts.left() == NOTHING


async def test_many_attempts_take_turns_in_having_their_progress_written(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.executor.REPORTS_AT_ONCE", 1)
    provider = Scripted()
    executor = attempts.executor(provider)
    running = []
    for _ in range(2):
        provider.asked.clear()
        running.append(asyncio.create_task(executor.run(*await attempts.submitted())))
        await provider.asked.wait()
    reported = "select count(*) from jobs where progress is not null"
    at_first = await attempts.sql.fetchval(reported + " and progress ->> 'step' = 'generating'")
    await executor.report_once()
    once = await attempts.sql.fetchval(reported + " and progress ->> 'step' = 'generating'")
    await executor.report_once()
    twice = await attempts.sql.fetchval(reported + " and progress ->> 'step' = 'generating'")
    assert (at_first, once, twice) == (0, 1, 2)
    provider.go.set()
    await asyncio.gather(*running)
