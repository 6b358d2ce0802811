"""What must hold after every scenario, whatever was broken: each figure of `Verdict` is 0.

It compares what clients were told with what the database holds and what the provider was asked.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .driver import TERMINAL, Driver, Job
from .stack import Call

TRUTH = 20.0  # seconds: lease 15 + sweep 5
NOTICED = 1.0  # seconds from a claim to the provider's note of its call
POLL = 0.7  # seconds by which a poll may be late, on a busy machine

# Everything about the jobs of a scenario in one snapshot, so that no two figures disagree.
_STATE = """
select
  j.id::text, j.status, j.lease_token::text, j.error_code, j.crashes, j.provider_errors, j.attempt,
  j.input -> 'filters' -> 'github' -> 'projects' ->> 0 as tag,
  (select count(*) from handoffs h where h.job_id = j.id) as artifacts,
  (select count(*) from handoffs h where h.job_id = j.id and h.lease_token = j.lease_token)
    as artifacts_of_token,
  (select count(*) from charges c where c.job_id = j.id) as charges
from jobs j
"""


@dataclass
class Verdict:
    """The invariants' counts, in the words of the table, and examples of what was wrong."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, found: Iterable[str]) -> None:
        """Count what violates an invariant."""
        listed = list(found)
        self.counts[name] = self.counts.get(name, 0) + len(listed)
        self.examples += [f"{name}: {one}" for one in listed[:3]]

    @property
    def violations(self) -> int:
        """How many there are in all."""
        return sum(self.counts.values())


async def settle(driver: Driver, seconds: float) -> None:
    """Give jobs, leases and tickets until then to come to rest."""
    deadline = time.monotonic() + seconds
    await driver.until_ended(seconds, [job for job in driver.accepted if job.seen])
    while time.monotonic() < deadline:
        sql = await driver.stack.sql()
        left = await sql.fetchval(
            "select (select count(*) from jobs where status in ('pending', 'processing'))"
            " + (select count(*) from leases) + (select count(*) from procrastinate_jobs)"
        )
        if not left:
            return
        await asyncio.sleep(0.1)


async def check(
    driver: Driver, *, calls_allowed: int | dict[str, int], deadlocks_allowed: int = 0
) -> Verdict:
    """Judge a scenario that has come to rest.

    Args:
        calls_allowed: calls of the provider per job, or by tag where jobs differ.
        deadlocks_allowed: those that the scenario itself made.
    """
    stack, verdict = driver.stack, Verdict()
    sql = await stack.sql()
    rows = {row["id"]: row for row in await sql.fetch(_STATE)}
    done = [row for row in rows.values() if row["status"] == "completed"]
    others = [row for row in rows.values() if row["status"] != "completed"]
    accepted = [job for job in driver.accepted if job.id]
    calls = stack.calls()

    verdict.add("lost", (str(job.id) for job in accepted if job.id not in rows))
    verdict.add(
        "not terminal",
        (f"{id} is {row['status']}" for id, row in rows.items() if row["status"] not in TERMINAL),
    )
    verdict.add("artifacts", (row["id"] for row in done if row["artifacts"] != 1))
    verdict.add("artifacts", (row["id"] for row in others if row["artifacts"]))
    verdict.add(
        "fence", (row["id"] for row in done if row["artifacts_of_token"] != row["artifacts"])
    )
    verdict.add("charges", (row["id"] for row in done if row["charges"] != 1))
    verdict.add("charges", (row["id"] for row in others if row["charges"]))
    verdict.add("backwards", (told for job in accepted for told in _backwards(job)))
    verdict.add("untrue", (told for job in accepted for told in _stale(job, calls, stack.deaths())))
    leases = await sql.fetch("select job_id::text from leases")
    verdict.add("leases", (row[0] for row in leases))
    tickets = await sql.fetch(
        "select id, status::text, worker_id, args::text from procrastinate_jobs"
    )
    verdict.add("tickets", (str(tuple(row)) for row in tickets))
    verdict.add("calls", _too_many(calls, calls_allowed))
    verdict.add("answers", driver.wrong)
    found = await sql.fetchval(
        "select deadlocks from pg_stat_database where datname = current_database()"
    )
    verdict.add("deadlocks", ["in pg_stat_database"] * max(0, found - deadlocks_allowed))
    return verdict


def time_to_truth(driver: Driver) -> float:
    """Seconds from a worker's death until every client that asked was told the truth.

    The truth about a job that the dead worker had: anything but a plain `processing`, unless
    another worker has it.
    """
    calls, worst = driver.stack.calls(), 0.0
    for pid, died in driver.stack.deaths().items():
        for job in driver.accepted:
            own = calls.get(job.tag, [])
            if (had := _newest(own, died)) and pid in (had.pid, had.parent):
                worst = max(worst, _untrue_for(job, own, had, died))
    return worst


def _untrue_for(job: Job, calls: Sequence[Call], had: Call, died: float) -> float:
    """Seconds from the death to the first true answer; without an untrue one 0."""
    untrue = False
    for seen in job.seen:
        if seen.at <= died:
            continue
        plain = seen.status == "processing" and not seen.recovering
        if not plain or _newest(calls, seen.at) is not had:
            return seen.at - died if untrue else 0.0
        untrue = True
    return job.seen[-1].at - died if untrue else 0.0


def _backwards(job: Job) -> Iterable[str]:
    """Changes of status that no job may make. The order of answers is the order of questions,
    because each job is polled by one poller."""
    allowed = {
        "pending": ("pending", "processing", *TERMINAL),
        "processing": ("pending", "processing", *TERMINAL),
        "completed": ("completed",),
        "failed": ("failed",),
    }
    for before, after in zip(job.seen, job.seen[1:], strict=False):
        if after.status not in allowed[before.status]:
            yield f"{job.id}: {before.status} -> {after.status}"


def _stale(job: Job, by_tag: dict[str, list[Call]], deaths: dict[int, float]) -> Iterable[str]:
    """Sightings of a plain `processing` long after the death of the worker that had the job."""
    calls = by_tag.get(job.tag, [])
    for seen in job.seen:
        if seen.status != "processing" or seen.recovering:
            continue
        call = _newest(calls, seen.at)
        died = call and deaths.get(call.pid, deaths.get(call.parent))
        if call and died and call.started < died and seen.at - died > TRUTH + POLL:
            yield f"{job.id}: processing {seen.at - died:.1f} s after the death of {call.pid}"


def _newest(calls: Sequence[Call], at: float) -> Call | None:
    """The newest call of a job then; whoever made it has the job, or had it last."""
    begun = [call for call in calls if call.started <= at + NOTICED]
    return begun[-1] if begun else None


def _too_many(by_tag: dict[str, list[Call]], allowed: int | dict[str, int]) -> Iterable[str]:
    for tag, calls in by_tag.items():
        limit = allowed if isinstance(allowed, int) else allowed.get(tag, 1)
        if len(calls) > limit:
            how = ", ".join(f"{call.pid}: {call.how}" for call in calls)
            yield f"{tag}: {len(calls)} calls, {limit} allowed ({how})"
