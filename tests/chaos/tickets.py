"""Scenarios about tickets, and about what a provider may answer."""

import asyncio
import time
from collections import Counter
from itertools import pairwise

from tasks.breaker import FAILURES

from .driver import Job
from .lab import Lab, scenario
from .provider import DOWN


@scenario("40", "provider down for an hour, of one minute here", limit=0)
async def provider_down(lab: Lab) -> None:
    down = lab.stack.folder / DOWN
    down.touch()
    await lab.start(workers=2)
    *jobs, late = await lab.submit(*["sleep=0.1"] * 41)
    sql = await lab.stack.sql()
    deadline = "update jobs set deadline_at = now() + interval '20 s' where id = $1"
    await sql.execute(deadline, late.id)
    await asyncio.sleep(60)
    calls = sum(map(len, lab.stack.calls().values()))
    lab.expect(calls <= 41 + 2 * (FAILURES + 5), f"{calls} calls while it was down")
    waiting = [job.status for job in jobs]
    lab.expect(set(waiting) == {"pending"}, f"while it was down: {Counter(waiting)}")
    errors = await sql.fetchval("select max(provider_errors) from jobs")
    lab.expect(errors <= 2, f"{errors} provider errors count against a job")
    down.unlink()
    back = time.monotonic()
    lab.calls_allowed = 10
    await lab.ended(seconds=90)
    lab.completed(jobs)
    lab.failed(late, "timeout")
    last = max(job.ended_at for job in jobs) - back
    lab.note(f"{calls} calls in that minute for 41 jobs; all done {last:.0f} s after it")


@scenario("49", "thirty parallel submits for the last ten credits", limit=0)
async def last_credits(lab: Lab) -> None:
    await lab.start(apis=2)
    sql = await lab.stack.sql()
    await sql.execute("select ops.create_plan('small', 10)")
    await sql.execute("select ops.set_plan($1, 'small')", lab.stack.user_id)
    jobs = await lab.driver.prepare(["sleep=0.3"] * 30)

    async def submit(job: Job) -> bool:
        for _ in range(5):  # they take turns, and who has waited for too long is told 503
            if await lab.driver.submit_prepared(job, key=job.tag):
                return True
            await asyncio.sleep(0.5)
        return False

    accepted = await asyncio.gather(*map(submit, jobs))
    lab.expect(all(accepted), f"{accepted.count(False)} submits did not get their 202")
    await lab.ended()
    codes = Counter((job.last["job"]["error_code"] or job.status) for job in jobs if job.last)
    lab.expect(codes == {"completed": 10, "quota_exceeded": 20}, f"outcomes: {dict(codes)}")
    row = await sql.fetchrow("select used, reserved, remaining from ops.balances")
    lab.expect(row and tuple(row) == (10, 0, 0), f"used, reserved, remaining: {row}")
    lab.calls_allowed = {job.tag: int(job.status == "completed") for job in jobs}


@scenario("41", "a cancel at every moment of a job's life", short=True)
async def cancels(lab: Lab) -> None:
    await lab.start(workers=2)
    jobs = await lab.driver.prepare(["sleep=0.5"] * 60)

    async def one(job: Job, moment: float) -> None:
        if await lab.driver.submit_prepared(job):
            await asyncio.sleep(moment)
            await lab.driver.ask("POST", f"/jobs/{job.id}/cancel")

    # From before a worker has seen the ticket until after the job has ended.
    await asyncio.gather(*(one(job, number / 20) for number, job in enumerate(jobs)))
    await lab.ended()
    outcomes = Counter(job.last["job"]["outcome"] for job in jobs if job.last)
    lab.expect(set(outcomes) == {"cancelled", "succeeded"}, f"outcomes: {dict(outcomes)}")
    lab.note(f"{outcomes['cancelled']} cancelled, {outcomes['succeeded']} completed before")


@scenario("42", "every ticket is delivered four times", limit=0)
async def duplicates(lab: Lab) -> None:
    await lab.start()
    jobs = await lab.submit(*["sleep=1"] * 20)
    sql = await lab.stack.sql()
    await sql.execute("select defer_ticket(j.id) from jobs j cross join generate_series(1, 3)")
    await lab.ended()
    lab.completed(jobs)


@scenario("43", "the ticket of a waiting job is deleted by hand", limit=60)
async def deleted_ticket(lab: Lab) -> None:
    await lab.start(workers=0)
    jobs = await lab.submit(*["sleep=0.2"] * 3)
    await (await lab.stack.sql()).execute("delete from procrastinate_jobs")
    deleted = time.monotonic()
    await lab.stack.worker()
    await lab.ended(seconds=70)
    lab.completed(jobs)
    lab.truth = max(job.ended_at for job in jobs) - deleted
    lab.note("pending all the while, which is true")


@scenario("44", "a ticket for a job that has ended", limit=0)
async def late_ticket(lab: Lab) -> None:
    await lab.start(workers=1)
    await lab.submit("sleep=0.2", "fail")
    await lab.ended()
    await (await lab.stack.sql()).execute("select defer_ticket(id) from jobs")
    await asyncio.sleep(3)


@scenario("48", "a ticket for a task that this worker does not know", limit=0)
async def unknown_task(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1)
    sql = await lab.stack.sql()
    await sql.execute(
        "insert into procrastinate_jobs (queue_name, task_name, args)"
        " values ('jobs', 'baton.of_tomorrow', '{}')"
    )
    jobs = await lab.submit(*["sleep=1"] * 3)
    await lab.ended(seconds=10)
    lab.completed(jobs)
    await asyncio.sleep(5)
    kept = await sql.fetchval(
        "delete from procrastinate_jobs where task_name = 'baton.of_tomorrow' returning status"
    )
    lab.expect(kept in ("todo", "doing"), f"the ticket is {kept}, not waiting for a newer worker")
    lab.expect(worker.child.poll() is None, "the worker died of it")


@scenario("39", "provider: 429, 500, timeout, hang, NUL, huge, refusal", limit=0)
async def provider_matrix(lab: Lab) -> None:
    await lab.start({"BATON_ATTEMPT_TIMEOUT": "3"})
    busy, broken, slow, nul, huge, refused, never = await lab.submit(
        "retry=2:429:3",
        "retry=1:500:",
        "hang@1 sleep=0.1",
        "nul",
        "huge=3000000",
        "fail",
        "retry=9:503:0",
    )
    lab.calls_allowed = {busy.tag: 3, broken.tag: 2, slow.tag: 2, never.tag: 5, nul.tag: 1}
    await lab.ended(seconds=80)
    lab.completed([busy, broken, slow, nul, huge])
    lab.failed(refused, "generation_failed")
    lab.failed(never, "generation_failed")
    calls = lab.stack.calls()
    asked = [b.started - (a.ended or 0) for a, b in pairwise(calls[busy.tag])]
    lab.expect(all(gap >= 3 for gap in asked), f"Retry-After of 3 s was not kept: {asked}")
    lab.expect(len(calls[never.tag]) == 5, f"{len(calls[never.tag])} tries, not 5")
    meta = never.last["job"]["error_meta"]
    lab.expect(meta.get("provider_status") == 503, f"error_meta is {meta}")
    took = never.ended_at - never.accepted_at
    lab.note(f"five errors in {took:.0f} s, Retry-After kept")


@scenario("39-timeout", "a provider that hangs in every attempt", limit=0)
async def always_hangs(lab: Lab) -> None:
    await lab.start({"BATON_ATTEMPT_TIMEOUT": "2"}, workers=1)
    [job] = await lab.submit("hang")
    lab.calls_allowed = 5
    await lab.ended(seconds=80)
    lab.failed(job, "timeout")
    calls = lab.stack.calls()[job.tag]
    lab.expect(all(c.how == "CancelledError" for c in calls), "a hung call was not cancelled")
