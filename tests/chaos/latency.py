"""How soon a submitted job is picked up, with and without notifications.

Measured in the database, `started_at - created_at`, so that neither the driver nor the way to the
API is in the figure.
"""

import asyncio
import statistics

from .crashes import EVER
from .lab import Lab, scenario
from .proxy import Rule

SPACED = 0.3  # seconds between submits: each finds an idle worker


async def pickups(lab: Lab, count: int) -> list[float]:
    """Submit jobs one by one; answers how long each waited, in milliseconds, sorted."""
    fresh = await lab.driver.prepare(["sleep=0.01"] * count)
    for job in fresh:
        await lab.driver.submit_prepared(job, poll=False)
        await asyncio.sleep(SPACED)
    await asyncio.sleep(2)
    await lab.driver.last_look()
    lab.completed(fresh)
    rows = await (await lab.stack.sql()).fetch(
        "select extract(epoch from started_at - created_at)::float8 * 1000 from jobs order by 1"
    )
    return [row[0] for row in rows]


def summary(lab: Lab, waits: list[float]) -> tuple[float, float]:
    """Note the figures; answers median and 99th percentile."""
    middle = statistics.median(waits)
    high = statistics.quantiles(waits, n=100)[98]
    lab.note(
        f"pickup median {middle:.0f} ms, p99 {high:.0f} ms, longest {waits[-1]:.0f} ms"
        f" of {len(waits)}"
    )
    return middle, high


@scenario("pickup", "idle pickup", limit=1, alone=True)
async def idle(lab: Lab) -> None:
    await lab.start(workers=1)
    middle, high = summary(lab, await pickups(lab, int(120 * lab.scale)))
    lab.truth = high / 1000
    lab.expect(middle < 20, f"the median is {middle:.0f} ms, 20 allowed")
    lab.expect(high < 100, f"the 99th percentile is {high:.0f} ms, 100 allowed")


@scenario("21", "every notification is lost", limit=1.2, alone=True)
async def deaf(lab: Lab) -> None:
    await lab.start(workers=0)
    process = await lab.stack.worker(proxied=True)
    assert process.proxy
    process.proxy.rules.append(Rule("baton listen", "reset", times=EVER))
    await lab.stack.cut("baton listen")
    await asyncio.sleep(1)
    waits = await pickups(lab, int(40 * lab.scale))
    summary(lab, waits)
    lab.truth = waits[-1] / 1000


@scenario("19", "the backend of LISTEN is killed again and again", limit=1.2, alone=True)
async def killed_listener(lab: Lab) -> None:
    await lab.start(workers=1)
    cuts = 0

    async def killing() -> None:
        nonlocal cuts
        while True:
            cuts += await lab.stack.cut("baton listen")
            await asyncio.sleep(0.7)

    killer = asyncio.create_task(killing())
    try:
        fresh = await lab.driver.prepare(["sleep=0.01"] * 40)
        for job in fresh:
            await lab.driver.submit_prepared(job, poll=False)
            await asyncio.sleep(SPACED)
    finally:
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)
    await asyncio.sleep(2)
    await lab.driver.last_look()
    lab.completed(fresh)
    rows = await (await lab.stack.sql()).fetch(
        "select extract(epoch from started_at - created_at)::float8 * 1000 from jobs order by 1"
    )
    waits = [row[0] for row in rows]
    summary(lab, waits)
    lab.truth = waits[-1] / 1000
    lab.expect(cuts > 5, f"only {cuts} listeners were killed")


@scenario("20", "a job is announced while a fetch that will be empty is on its way", limit=0.5)
async def during_fetch(lab: Lab) -> None:
    await lab.start(workers=0)
    worker = await lab.stack.worker(proxied=True)
    assert worker.proxy
    await asyncio.sleep(2)  # past the first fetches
    for _ in range(5):
        [job] = await lab.driver.prepare(["sleep=0.01"])
        rule = Rule("procrastinate_fetch_job", "delay", seconds=0.3)
        worker.proxy.rules = [rule]
        await rule.seen.wait()  # the server has answered: nothing is there
        await lab.driver.submit_prepared(job)
        await lab.ended([job])
    rows = await (await lab.stack.sql()).fetch(
        "select extract(epoch from started_at - created_at)::float8 from jobs"
    )
    worst = max(row[0] for row in rows)
    lab.truth = worst
    lab.note(f"longest {worst * 1000:.0f} ms, of which 300 are the delayed answer")
