"""A scenario of webhooks: whatever dies, each message arrives, and only a death repeats one."""

import asyncio
import time
from collections import Counter

from .driver import Job
from .lab import Lab, scenario
from .postgres import in_thread
from .receiver import Receiver, answer, receiving

JOBS = 40
FAILURES = 5  # of the first requests
PATIENCE = 90.0  # seconds; the lease of a dead worker's message is 45


@scenario(
    "53",
    "webhooks on their way: receiver down at first, kill -9 of the workers, PostgreSQL restarted",
    cluster="own",
)
async def webhooks_on_their_way(lab: Lab) -> None:
    async with receiving() as receiver:
        receiver.answers = [answer(500)] * FAILURES
        receiver.delay = 0.3
        allowed = {"BATON_WEBHOOK_ALLOW": "127.0.0.0/8"}
        _, workers = await lab.start(allowed)
        sql = await lab.stack.sql()
        secret = await sql.fetchval(
            "select secret from create_webhook($1, $2, $3, '{job.completed,job.failed}')",
            lab.stack.user_id,
            lab.stack.project_id,
            receiver.url(),
        )
        jobs = await lab.submit(*["sleep=0.1"] * JOBS)
        await receiver.has(8)
        for worker in workers:  # the newest message is on its way in one of them
            worker.kill()
        await asyncio.gather(*(lab.stack.worker(allowed) for _ in workers))
        jobs += await lab.submit(*["sleep=0.1"] * JOBS)
        await receiver.has(JOBS // 2)
        await in_thread(lab.postgres.restart, "immediate")
        lab.calls_allowed = 2
        await lab.ended(seconds=PATIENCE)
        took = await _delivered(lab, jobs)
        _judge(lab, receiver, secret, jobs)
        lab.note(f"all delivered {took:.1f} s after the last job's end")


async def _delivered(lab: Lab, jobs: list[Job]) -> float:
    """Wait until the database says that all have been; answers how long."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        rows = await (await lab.stack.sql()).fetch(
            "select state, count(*) from webhook_deliveries group by state"
        )
        found = {row["state"]: row["count"] for row in rows}
        if found == {"delivered": len(jobs)}:
            break
        await asyncio.sleep(0.1)
    lab.expect(found == {"delivered": len(jobs)}, f"deliveries: {found}, jobs: {len(jobs)}")
    return time.monotonic() - started


def _judge(lab: Lab, receiver: Receiver, secret: str, jobs: list[Job]) -> None:
    """What the receiver has got against what there was to tell."""
    told = {got.verified(secret)["data"]["job"]["id"] for got in receiver.got}
    lost = {job.id for job in jobs} - told
    lab.expect(not lost, f"{len(lost)} jobs were never told")
    times = Counter(got.headers["webhook-id"] for got in receiver.got)
    lab.expect(len(times) == len(jobs), f"{len(times)} message ids for {len(jobs)} jobs")
    again = len(receiver.got) - len(jobs) - FAILURES
    lab.expect(again, "no message was on its way when its worker died")
    lab.note(f"{len(receiver.got)} requests, {max(times.values())} at most for a message")
