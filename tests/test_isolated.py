"""An attempt in a process of its own: its death is noticed, and hurts nobody else."""

import asyncio
from pathlib import Path

import asyncpg
import pytest
from conftest import Caller
from scripted import CALL

from app.db import Database, Unavailable
from tasks.calls import Calls, Progress
from tasks.generate import ClaimedJob
from tasks.isolated import ChildDied, generate_isolated
from tasks.outcomes import GenerationFailed, NoResult, Retry


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child reads its provider from the environment, as a worker does."""
    monkeypatch.setenv("BATON_PROVIDER", "scripted:Scripted")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


async def claimed(caller: Caller, database: Database, script: str) -> ClaimedJob:
    await caller.ingest({"title": script})
    job_id = await caller.submit()
    row = await database.row("claim_job", job_id, 1, "test", 15.0)
    assert row is not None
    return ClaimedJob(**row)


async def test_a_child_makes_the_same_artifact(
    caller: Caller, database: Database, dsn: str
) -> None:
    job = await claimed(caller, database, "feat: switch to an LRU")
    artifact = await generate_isolated(job, dsn, Calls())
    assert "LRU" in artifact["markdown"]
    assert await database.value("complete_job", job.id, job.lease_token, artifact) == job.id


@pytest.mark.parametrize(
    ("script", "how"), [("exit", "exit status 9"), ("quit", "exit status 0"), ("segv", "signal 11")]
)
async def test_the_death_of_a_child_is_told_with_its_cause(
    caller: Caller, database: Database, dsn: str, script: str, how: str
) -> None:
    job = await claimed(caller, database, script)
    with pytest.raises(ChildDied, match=how):
        await generate_isolated(job, dsn, Calls())


async def test_what_a_child_tells_before_its_death_arrives(
    caller: Caller, database: Database, dsn: str
) -> None:
    job = await claimed(caller, database, "call and segv")
    told: list[Progress] = []
    calls = Calls(told.append)
    with pytest.raises(ChildDied):
        await generate_isolated(job, dsn, calls)
    assert calls.made == [{"asked": "", **CALL}]
    assert told[-1] == {"value": 0.5, "step": "generating", "message": "half of it"}


async def test_a_childs_outcome_arrives_as_if_it_were_our_own(
    caller: Caller, database: Database, dsn: str
) -> None:
    with pytest.raises(Retry) as busy:
        await generate_isolated(await claimed(caller, database, "retry"), dsn, Calls())
    assert (busy.value.after, busy.value.meta) == (7.0, {"provider_status": 429})
    with pytest.raises(NoResult, match="Nothing usable"):
        await generate_isolated(await claimed(caller, database, "fail"), dsn, Calls())


async def test_a_cancelled_attempt_kills_its_child(
    caller: Caller, database: Database, dsn: str, sql: asyncpg.Connection
) -> None:
    job = await claimed(caller, database, "hang")
    attempt = asyncio.create_task(generate_isolated(job, dsn, Calls()))
    children = (
        "select count(*) from pg_stat_activity"
        " where application_name = 'baton isolated' and datname = current_database()"
    )
    async with asyncio.timeout(20):
        while not await sql.fetchval(children):
            await asyncio.sleep(0.02)
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    async with asyncio.timeout(5):
        while await sql.fetchval(children):
            await asyncio.sleep(0.02)


async def test_an_error_or_an_outage_in_the_child_is_not_its_death(
    caller: Caller, database: Database, dsn: str
) -> None:
    with pytest.raises(GenerationFailed, match="KeyError") as failed:
        await generate_isolated(await claimed(caller, database, "raise"), dsn, Calls())
    assert "what an event says" not in failed.value.sentence
    with pytest.raises(Unavailable):
        nowhere = "postgresql://baton@127.0.0.1:1/baton"
        await generate_isolated(await claimed(caller, database, "feat: one"), nowhere, Calls())


async def test_what_a_library_prints_is_not_the_answer(
    caller: Caller, database: Database, dsn: str
) -> None:
    job = await claimed(caller, database, "print")
    assert (await generate_isolated(job, dsn, Calls()))["title"]
