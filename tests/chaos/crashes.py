"""Scenarios in which a process of Baton dies, hangs, is stopped or lies about the time."""

import asyncio
import time

from .lab import Lab, missing, scenario
from .proxy import Rule
from .stack import ROOT, TESTS, Process

EVER = 1_000_000  # times; a rule that is never spent


@scenario("1", "kill -9 of the API before the submit commits")
async def kill_api_before_commit(lab: Lab) -> None:
    [api], _ = await lab.start(workers=1, proxied=True)
    [job] = await lab.driver.prepare(["sleep=0.2"])
    assert api.proxy
    rule = Rule("submit_job(", "hold")
    api.proxy.rules.append(rule)
    asking = asyncio.create_task(lab.driver.submit_prepared(job, key="mine"))
    await rule.seen.wait()
    api.kill()
    lab.expect(not await asking, "a submit that was never committed got a 202")
    made = await (await lab.stack.sql()).fetchval("select count(*) from jobs")
    lab.expect(made == 0, f"{made} jobs exist without a commit")
    await lab.stack.serve()
    lab.expect(await lab.driver.submit_prepared(job, key="mine"), "the key was used up")
    await lab.ended()
    lab.completed([job])
    made = await (await lab.stack.sql()).fetchval("select count(*) from jobs")
    lab.expect(made == 1, f"{made} jobs exist for one key")


@scenario("2", "kill -9 of the API after the commit, before the 202")
async def kill_api_after_commit(lab: Lab) -> None:
    [api], _ = await lab.start(workers=1, proxied=True)
    [job] = await lab.driver.prepare(["sleep=0.2"])
    assert api.proxy
    rule = Rule("submit_job(", "swallow")
    api.proxy.rules.append(rule)
    asking = asyncio.create_task(lab.driver.submit_prepared(job, key="mine"))
    await rule.seen.wait()
    api.kill()
    lab.expect(not await asking, "a killed API has answered")
    await lab.stack.serve()
    lab.expect(await lab.driver.submit_prepared(job, key="mine"), "the key found no job")
    await lab.ended()
    lab.completed([job])
    made = await (await lab.stack.sql()).fetchval("select count(*) from jobs")
    lab.expect(made == 1, f"{made} jobs exist for one key")


@scenario("3", "the same key from ten clients at once, over two APIs", short=True)
async def same_key(lab: Lab) -> None:
    await lab.start(apis=2, workers=1)
    [job] = await lab.driver.prepare(["sleep=0.2"])
    asking = [lab.driver.submit_prepared(job, key="mine", poll=False) for _ in range(10)]
    lab.expect(all(await asyncio.gather(*asking)), "a repeated request was refused")
    lab.driver.poll(job)
    await lab.ended()
    lab.completed([job])
    made = await (await lab.stack.sql()).fetchval("select count(*) from jobs")
    lab.expect(made == 1, f"{made} jobs exist for one key")


@scenario("4", "the same key with another body")
async def same_key_other_body(lab: Lab) -> None:
    await lab.start(workers=1)
    first, second = await lab.driver.prepare(["sleep=0.2", "sleep=0.2"])
    await lab.driver.submit_prepared(first, key="mine")
    refused = not await lab.driver.submit_prepared(second, key="mine")
    lab.expect(refused and lab.driver.statuses[422] == 1, "another request got the key's job")
    await lab.ended()
    lab.completed([first])


@scenario("5", "the submitting transaction rolls back after the ticket")
async def rolled_back(lab: Lab) -> None:
    await lab.start(workers=1)
    sql = await lab.stack.sql()
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute(
        "select (job).id from submit_job($1, $2, 'handoff', null, null, null, '{}')",
        lab.stack.user_id,
        lab.stack.project_id,
    )
    await asyncio.sleep(1.5)  # a worker looks in between
    await transaction.rollback()
    left = await sql.fetchval(
        "select (select count(*) from jobs) + (select count(*) from procrastinate_jobs)"
    )
    lab.expect(left == 0, f"{left} rows of a transaction that was rolled back")


@scenario("6", "kill -9 of the worker while the model runs", limit=20, short=True)
async def kill_mid_call(lab: Lab) -> None:
    lab.calls_allowed = 2
    await lab.start()
    jobs = await lab.run(*["sleep=6@1 sleep=1"] * 4)
    lab.owner(jobs[0]).kill()
    await lab.ended()
    lab.completed(jobs)


@scenario("7", "kill -9 between the commit of the artifact and its answer", limit=20)
async def kill_after_complete(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    rule = Rule("complete_job(", "swallow")
    worker.proxy.rules.append(rule)
    jobs = await lab.submit("sleep=0.5")
    await rule.seen.wait()
    worker.kill()
    await lab.stack.worker()
    await lab.ended()
    lab.completed(jobs)


@scenario("7-late", "the finish of a killed worker arrives while the next one runs", limit=20)
async def late_finish(lab: Lab) -> None:
    lab.calls_allowed = 2
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    # A statement that is being prepared has its timeout running; so prepare it everywhere first.
    await lab.submit(*["sleep=1"] * 20)
    await lab.ended()
    rule = Rule("complete_job(", "late", seconds=25)
    worker.proxy.rules.append(rule)
    jobs = await lab.submit("sleep=0.5@1 sleep=15@2")
    await rule.seen.wait()
    worker.kill()
    await lab.stack.worker()
    await lab.called(jobs, 24, times=2)
    await asyncio.sleep(max(0.0, worker.died + 27 - time.monotonic()) if worker.died else 0)
    lab.expect(jobs[0].status == "processing", "the late finish was not refused")
    await lab.ended()
    lab.completed(jobs)


@scenario("8", "kill -9 of all workers, new ones much later", limit=20)
async def kill_all(lab: Lab) -> None:
    lab.calls_allowed = 2
    _, workers = await lab.start()
    jobs = await lab.run(*["sleep=30@1 sleep=1"] * 10)
    for worker in workers:
        worker.kill()
    await asyncio.sleep(25 if lab.scale == 1 else 60)
    lab.expect(all(job.status == "pending" for job in jobs), "jobs do not wait as pending")
    started = time.monotonic()
    await asyncio.gather(lab.stack.worker(), lab.stack.worker())
    await lab.ended()
    lab.completed(jobs)
    lab.note(f"done {time.monotonic() - started:.1f} s after the workers were back")


@scenario("kill50", "kill -9 of the worker in the middle of 50 running jobs", limit=20)
async def kill_fifty(lab: Lab) -> None:
    lab.calls_allowed = 2
    _, [worker] = await lab.start(workers=1)
    lab.keep(worker)
    jobs = await lab.run(*["sleep=10@1 sleep=2"] * 50, seconds=30)
    await asyncio.sleep(3)
    killed = time.monotonic()
    worker.kill()
    await lab.ended()
    lab.completed(jobs)
    made = await (await lab.stack.sql()).fetchval("select count(*) from handoffs")
    lab.expect(made == 50, f"{made} artifacts of 50 jobs")
    twice = sum(len(calls) == 2 for calls in lab.stack.calls().values())
    lab.note(f"{twice} called twice, all done {time.monotonic() - killed:.1f} s after the kill")


async def poison(lab: Lab, step: str) -> None:
    """A job that kills whoever runs it, among neighbours, under supervisors."""
    _, workers = await lab.start()
    for worker in workers:
        lab.keep(worker)
    [bad] = await lab.run(f"sleep=0.3 {step}")
    neighbours = await lab.submit(*["sleep=2"] * 6)
    await lab.ended([bad], seconds=120)
    await lab.ended(neighbours)
    lab.failed(bad, "worker_lost")
    lab.completed(neighbours)
    lab.calls_allowed = {job.tag: 3 for job in (bad, *neighbours)}
    took = bad.ended_at - bad.accepted_at
    lab.note(f"failed after {len(lab.stack.calls()[bad.tag])} calls and {took:.0f} s")


@scenario("10", "poison job: os._exit", limit=20)
async def poison_exit(lab: Lab) -> None:
    await poison(lab, "exit")


@scenario("10-segv", "poison job: segmentation fault", limit=20)
async def poison_segv(lab: Lab) -> None:
    await poison(lab, "segv")


@scenario("10-oom", "poison job: killed as by the memory killer", limit=20)
async def poison_kill(lab: Lab) -> None:
    await poison(lab, "kill")


@scenario("10-memory", "a job that raises MemoryError")
async def memory_error(lab: Lab) -> None:
    await lab.start(workers=1)
    bad, *neighbours = await lab.submit("memory", *["sleep=1"] * 3)
    await lab.ended()
    lab.failed(bad, "generation_failed")
    lab.completed(neighbours)


@scenario("10-isolated", "poison job that has killed two workers already", short=True)
async def poison_isolated(lab: Lab) -> None:
    [_], [worker] = await lab.start(workers=1)
    sql = await lab.stack.sql()
    await sql.execute("alter table jobs alter column crashes set default 2")
    [bad] = await lab.submit("exit")
    await sql.execute("alter table jobs alter column crashes set default 0")
    neighbours = await lab.submit(*["sleep=2"] * 4)
    await lab.ended()
    lab.failed(bad, "worker_lost")
    lab.completed(neighbours)
    lab.expect(worker.child.poll() is None, "the worker died with the job")


@scenario("11", "SIGSTOP of a worker for 60 s, then SIGCONT", limit=20)
async def freeze_worker(lab: Lab) -> None:
    lab.calls_allowed = 2
    await lab.start()
    jobs = await lab.run(*["sleep=10@1 sleep=50@2"] * 6)  # the second runs when the zombie wakes
    zombie = lab.owner(jobs[0])
    held = [job for job in jobs if lab.owner(job) is zombie]
    zombie.freeze()
    frozen = time.monotonic()
    await asyncio.sleep(frozen + 60 - time.monotonic())
    zombie.thaw()
    code = await zombie.exited(20)
    await lab.ended()
    lab.completed(jobs)
    refused = len(zombie.said("fenced")) + len(zombie.said("lease lost"))
    lab.expect(refused == len(held), f"{refused} of {len(held)} results of the zombie refused")
    lab.expect(code == 1, f"the zombie, whose row is gone, did not leave with 1: {code}")
    lab.note(f"{refused} results of the zombie refused; it left")


@scenario("12", "event loop of a worker blocked for 25 s", limit=20)
async def blocked_loop(lab: Lab) -> None:
    lab.calls_allowed = 2
    await lab.start()
    jobs = await lab.run(*["sleep=4@1 sleep=1"] * 3, "sleep=0.5 block=25@1 sleep=15@2")
    blocked = lab.owner(jobs[-1])
    blocked.died = lab.stack.calls()[jobs[-1].tag][-1].started + 0.5
    await lab.ended()
    lab.completed(jobs)
    await asyncio.sleep(max(0, blocked.died + 28 - time.monotonic()))
    logged = blocked.said("event loop blocked")
    lab.expect(logged and "time.sleep" in logged[0]["stack"], "the watchdog did not log the stack")


async def exits(lab: Lab, worker: Process, code: int, seconds: float) -> float:
    """Expect that a worker ends with a code within a time; answers how long it took."""
    started = time.monotonic()
    found = await worker.exited(seconds)
    lab.expect(found == code, f"{worker.name} ended with {found} within {seconds} s, not {code}")
    return time.monotonic() - started


@scenario("drain", "SIGTERM with 20 jobs of 10 s running, grace 30 s", limit=0)
async def drain(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1)
    jobs = await lab.run(*["sleep=10"] * 20, seconds=9)
    worker.terminate()
    took = await exits(lab, worker, 0, 15)
    await lab.ended(seconds=5)
    lab.completed(jobs)
    lab.note(f"exit 0 after {took:.1f} s")


@scenario("drain-short", "SIGTERM with 10 jobs of 3 s running", limit=0, short=True)
async def drain_short(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1)
    jobs = await lab.run(*["sleep=3"] * 10, seconds=9)
    worker.terminate()
    took = await exits(lab, worker, 0, 8)
    await lab.ended(seconds=5)
    lab.completed(jobs)
    lab.note(f"exit 0 after {took:.1f} s")


@scenario("13", "rolling restart of APIs and workers under load", limit=0)
async def rolling(lab: Lab) -> None:
    apis, workers = await lab.start(apis=2)
    async with lab.load("sleep=2", 0.1) as jobs:
        for worker in workers:
            await asyncio.sleep(1)
            await lab.stack.worker()
            worker.terminate()
            await exits(lab, worker, 0, 10)
        for api in apis:
            await lab.stack.serve()
            api.terminate()
            lab.expect(await api.exited(10) is not None, f"{api.name} does not stop")
        await asyncio.sleep(1)
    await lab.ended()
    lab.completed([job for job in jobs if job.id])
    lab.note(f"{lab.driver.unanswered} submits met a closing connection")


@scenario("14", "SIGTERM with jobs that outlast the grace of 30 s", limit=1)
async def outlast_grace(lab: Lab) -> None:
    lab.calls_allowed = 2
    _, [worker] = await lab.start(workers=1)
    jobs = await lab.run(*["sleep=50@1 sleep=1"] * 4)
    await lab.stack.worker()
    worker.terminate()
    await exits(lab, worker, 0, 36)
    released = time.monotonic()
    await lab.called(jobs, 5, times=2)
    lab.truth = max(0.0, *(calls[1].started - released for calls in lab.stack.calls().values()))
    await lab.ended(seconds=10)
    lab.completed(jobs)
    counted = await (await lab.stack.sql()).fetchval("select sum(crashes) from jobs")
    lab.expect(counted == 0, f"{counted} crashes were counted")


async def hurried(lab: Lab, hurry: str) -> None:
    """A drain that is cut short."""
    lab.calls_allowed = 2
    _, [worker] = await lab.start(workers=1)
    jobs = await lab.run(*["sleep=20@1 sleep=1"] * 4)
    worker.terminate()
    await asyncio.sleep(1)
    if hurry == "term":
        worker.died = time.monotonic()
        worker.terminate()
    else:
        worker.kill()
    lab.expect(await worker.exited(3) is not None, "the second signal did not end it at once")
    await lab.stack.worker()
    await lab.ended()
    lab.completed(jobs)


@scenario("15", "a second SIGTERM in the drain", limit=20)
async def second_term(lab: Lab) -> None:
    await hurried(lab, "term")


@scenario("15-kill", "SIGKILL in the drain", limit=20)
async def kill_in_drain(lab: Lab) -> None:
    await hurried(lab, "kill")


@scenario("22", "the answer to a claim is lost after its commit", limit=20)
async def lost_claim(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    rule = Rule("claim_job(", "cut")
    worker.proxy.rules.append(rule)
    jobs = await lab.submit("sleep=0.5")
    await rule.seen.wait()
    lost = time.monotonic()
    await lab.ended()
    lab.completed(jobs)
    lab.truth = lab.stack.calls()[jobs[0].tag][0].started - lost


@scenario("22-ticket", "the answer to taking a ticket is lost after its commit", limit=60)
async def lost_ticket(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    jobs = await lab.driver.prepare(["sleep=0.5"])
    rule = Rule("procrastinate_fetch_job", "swallow", times=EVER)
    sql = await lab.stack.sql()

    async def only_if_taken() -> None:
        if await sql.fetchval("select count(*) from procrastinate_jobs where status = 'doing'"):
            rule.times = 0

    rule.happened = only_if_taken
    await lab.driver.submit_prepared(jobs[0])
    worker.proxy.rules.append(rule)
    lost = time.monotonic()
    await lab.ended(seconds=80)
    lab.completed(jobs)
    lab.truth = lab.stack.calls()[jobs[0].tag][0].started - lost
    lab.note("pending all the while, which is true")


@scenario("23", "the answer to the finish is lost, the connection breaks", limit=2)
async def lost_finish(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    rule = Rule("complete_job(", "cut")
    worker.proxy.rules.append(rule)
    jobs = await lab.submit("sleep=0.5")
    await rule.seen.wait()
    lost = time.monotonic()
    await lab.ended()
    lab.completed(jobs)
    lab.truth = jobs[0].ended_at - lost
    deadline = time.monotonic() + 5  # the client may know before the worker does
    while not worker.said("complete") and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    lab.expect(worker.said("complete"), "the worker does not know that its job is done")


@scenario("23-silent", "the answer to the finish is lost, the connection stays", limit=2)
async def lost_finish_silent(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    rule = Rule("complete_job(", "swallow")
    worker.proxy.rules.append(rule)
    jobs = await lab.submit("sleep=0.5")
    await rule.seen.wait()
    lost = time.monotonic()
    await lab.ended()
    lab.completed(jobs)
    lab.truth = jobs[0].ended_at - lost
    later = await lab.submit(*["sleep=0.2"] * 5)
    await lab.ended(later, seconds=10)
    lab.completed(later)


@scenario("24", "one worker silently cut off from the database for 60 s", limit=20)
async def partition(lab: Lab) -> None:
    lab.calls_allowed = 2
    await lab.start(workers=1)
    [alone, other] = [await lab.stack.worker(proxied=True), await lab.stack.worker(proxied=True)]
    jobs = await lab.run(*["sleep=8@1 sleep=50@2"] * 9)  # the second runs when it is healed
    held = [job for job in jobs if lab.owner(job) is alone]
    assert alone.proxy
    alone.proxy.lose()
    alone.died = lost = time.monotonic()
    more = await lab.submit(*["sleep=1"] * 10)
    await asyncio.sleep(lost + 60 - time.monotonic())
    begun = [c for own in lab.stack.calls().values() for c in own if c.pid == alone.pid]
    lab.expect(all(c.started < lost + 0.5 for c in begun), "the cut off worker made new calls")
    alone.proxy.heal()
    code = await alone.exited(20)
    await lab.ended()
    lab.completed([*jobs, *more])
    refused = len(alone.said("fenced")) + len(alone.said("lease lost"))
    lab.expect(refused == len(held), f"{refused} of {len(held)} results of the cut off refused")
    lab.expect(code == 1, f"the worker whose row is gone did not leave with 1: {code}")
    lab.expect(other.child.poll() is None, "the other worker died")
    lab.note(f"{refused} results refused")


@scenario("25", "the database's host vanishes, another answers at its address", limit=15)
async def half_open(lab: Lab) -> None:
    lab.calls_allowed = 2
    apis, workers = await lab.start(proxied=True)
    jobs = await lab.run(*["sleep=12"] * 6)
    for process in (*apis, *workers):
        assert process.proxy
        process.proxy.vanish()
    lost = time.monotonic()
    await asyncio.sleep(4)
    more = await lab.submit(*["sleep=0.2"] * 5)
    await lab.ended()
    lab.completed([*jobs, *(job for job in more if job.id)])
    lab.truth = max([0.0, *(at - lost for at in lab.driver.unavailable_at)])
    twice = sum(len(calls) > 1 for calls in lab.stack.calls().values())
    lab.note(f"{lab.driver.statuses[503]} answers were 503, {twice} jobs called twice")


@scenario("26", "one renewal of the leases fails", limit=0)
async def renewal_fails_once(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    rule = Rule("renew_leases(", "reset")
    worker.proxy.rules.append(rule)
    jobs = await lab.submit(*["sleep=18"] * 4)
    await lab.ended()
    lab.completed(jobs)
    lab.expect(rule.count == 1, "no renewal was made to fail")


@scenario("26-long", "all renewals fail for 30 s", limit=20)
async def renewal_fails_long(lab: Lab) -> None:
    lab.calls_allowed = 2
    _, [worker] = await lab.start(workers=1, proxied=True)
    assert worker.proxy
    rule = Rule("renew_leases(", "reset", times=EVER)
    worker.proxy.rules.append(rule)
    jobs = await lab.run(*["sleep=40@1 sleep=1"] * 4)
    worker.died = time.monotonic()  # as far as the others can know
    await lab.stack.worker()
    await asyncio.sleep(30)
    rule.times = 0
    await lab.ended(seconds=30)
    lab.completed(jobs)
    await asyncio.sleep(6)
    first = [calls[0] for calls in lab.stack.calls().values() if calls[0].pid == worker.pid]
    lab.expect(
        all(call.how == "CancelledError" for call in first),
        f"the fenced worker went on with its calls: {[call.how for call in first]}",
    )


@scenario("27", "the worker's row is deleted", limit=0)
async def pruned(lab: Lab) -> None:
    _, [worker] = await lab.start(workers=1)
    lab.keep(worker)
    jobs = await lab.run(*["sleep=7"] * 3)
    await (await lab.stack.sql()).execute("delete from procrastinate_workers")
    took = await exits(lab, worker, 1, 15)
    await lab.ended()
    more = await lab.submit("sleep=0.2")
    await lab.ended()
    lab.completed([*jobs, *more])
    lab.note(f"left with 1 after {took:.1f} s, its jobs finished")


@scenario("30", "a worker whose clock is a day wrong", limit=0)
async def wrong_clock(lab: Lab) -> None:
    lies = lab.folder / "lies"
    lies.mkdir()
    (lies / "sitecustomize.py").write_text(
        "import time\n_true = time.time\ntime.time = lambda: _true() + 86400\n"
    )
    path = ":".join(map(str, (lies, ROOT, TESTS)))
    await lab.start(workers=0)
    await lab.stack.worker({"PYTHONPATH": path})
    await lab.stack.worker()
    jobs = await lab.submit(*["sleep=8"] * 6, *["retry=1:429:1 sleep=1"] * 2)
    lab.calls_allowed = {job.tag: 2 for job in jobs[6:]}
    await lab.ended()
    lab.completed(jobs)


@scenario("45", "20 expired jobs, sweepers in four processes", limit=20)
async def many_sweepers(lab: Lab) -> None:
    lab.calls_allowed = 2
    _, [worker] = await lab.start(apis=3, workers=1)
    jobs = await lab.run(*["sleep=10@1 sleep=1"] * 20)
    worker.kill()
    await lab.stack.worker()
    await lab.ended()
    lab.completed(jobs)
    counts = await (await lab.stack.sql()).fetch("select crashes from jobs")
    lab.expect(all(row[0] == 1 for row in counts), f"crashes: {sorted(r[0] for r in counts)}")


missing("46", "the sweepers are dead", "ops.health, which tells: tests/test_ops_views.py")
missing("47", "a deploy with a schema change", "programs of two versions: tests/test_upgrade.py")
missing("50", "failover to a standby that lost 2 s", "a standby; outside the promise")
