"""The on-call drill: real processes, six faults, and somebody who has psql and the runbook.

Each fault is made, then waited for in `ops.health`; what is typed are lines of docs/runbook.md,
through psql, as a login in the role baton_ops. `make drill` writes what was typed, what it showed,
and how long everything took to docs/drill.md. The one rule: a line that the runbook does not have
cannot be typed.
"""

import argparse
import asyncio
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from app.embedded import MAJOR, program

from .client import Connection, NoAnswer
from .driver import Driver
from .lab import Lab
from .postgres import Postgres, copy_of, free_port, make_template
from .runbook import Statement, beginning, sections
from .stack import ROOT, Stack

RECORD = ROOT / "docs" / "drill.md"
LOGIN = "oncall"
LOOK_EVERY = 0.5  # seconds between looks of the monitor
WIDTH = 110  # columns of the on-call's terminal
SHOWN = 12  # lines of an answer that are kept
OUTAGE = 30.0  # seconds that the provider's people need
LONGEST = 180.0  # seconds for anything to happen


class Failed(Exception):
    """Something did not happen in time."""


@dataclass
class OnCall:
    """Somebody with psql, a monitor beside it, and what they write down."""

    lab: Lab
    title: str
    record: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    sign: str = ""  # for the table
    sign_after: float | None = None  # seconds since the fault
    recovery: str = ""  # since the action, for the table
    in_all: str = ""  # since the fault
    _began: float = 0.0
    _acted: float = 0.0
    _set: dict[str, Any] = field(default_factory=dict)
    _monitor: asyncpg.Connection | None = None
    _alarm: asyncio.Task[None] | None = None

    @property
    def dsn(self) -> str:
        """As the on-call."""
        return self.lab.stack.postgres.dsn(self.lab.stack.name, user=LOGIN)

    def note(self, sentence: str) -> None:
        """Write down a sentence, with the time since the fault."""
        since = f"**+{time.monotonic() - self._began:.1f} s** " if self._began else ""
        self.record.append(f"{since}{sentence}")

    def fault(self, sentence: str, check: str = "") -> None:
        """Time begins; with a check, that of `ops.health` which is to tell of it."""
        self._began = time.monotonic()
        self.record.append(f"**Fault.** {sentence}")
        if check:
            self._alarm = asyncio.create_task(self._watch(check))

    async def _watch(self, check: str) -> None:
        await self.until(f"ops.health tells of {check}", self._fails, check)
        self.sign_after = time.monotonic() - self._began
        self.sign = f"`{check}`"
        self.note(f"`ops.health` is not ok: `{check}`.")

    async def alarm(self) -> None:
        """Wait until `ops.health` tells of it; then look as the runbook begins."""
        assert self._alarm
        await self._alarm
        await self.type("", "select ok, failing", "select name, value")

    async def _fails(self, check: str) -> bool:
        return check in await self.ask("select failing from ops.health")

    async def well(self, *checks: str) -> None:
        """Wait until these checks are ok again."""
        for check in checks:
            await self.until(f"{check} is ok", self._is_ok, check)
        named = " and ".join(f"`{check}`" for check in checks)
        self.note(f"{named} {'is' if len(checks) == 1 else 'are'} ok again.")

    async def _is_ok(self, check: str) -> bool:
        return not await self._fails(check)

    async def ask(self, query: str, *arguments: Any) -> Any:
        """What a monitor asks: one value."""
        if self._monitor is None:
            self._monitor = await asyncpg.connect(
                self.dsn, server_settings={"application_name": "monitor"}
            )
        return await self._monitor.fetchval(query, *arguments)

    async def until(
        self, what: str, condition: Callable[..., Awaitable[Any]], *arguments: Any
    ) -> Any:
        """Wait until it is so; answers what it said."""
        deadline = time.monotonic() + LONGEST
        while not (answer := await condition(*arguments)):
            if time.monotonic() > deadline:
                raise Failed(f"{self.title}: not within {LONGEST:.0f} s: {what}")
            await asyncio.sleep(LOOK_EVERY)
        return answer

    def acts(self) -> None:
        """From here on it is being mended."""
        self._acted = time.monotonic()

    def recovered(self, sentence: str) -> None:
        """All is well; says so with the time since the action."""
        self.recovery = f"{time.monotonic() - self._acted:.1f} s"
        self.in_all = f"{time.monotonic() - self._began:.1f} s"
        self.note(f"{sentence} {self.recovery} after the action.")

    async def type(self, section: str, *lines: str) -> str:
        """Type the lines of a section that begin so, in psql; without a section those that the
        runbook begins with. Answers what was shown."""
        known = sections()[section] if section else beginning()
        chosen = [_the_one(known, line) for line in lines] if lines else known
        typed = []
        for statement in chosen:
            for name in dict.fromkeys(re.findall(r":'(\w+)'", statement.text)):
                if self._set.get(name) != self.values[name]:
                    self._set[name] = self.values[name]
                    typed.append(f"\\set {name} {str(self.values[name])!r}")
            typed.append(f"{statement.text};")
        return await asyncio.to_thread(self._psql, typed)

    def _psql(self, typed: list[str]) -> str:
        """All in one session, so that it is told apart what showed what."""
        options = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-P", "pager=off"]
        options += ["-P", f"columns={WIDTH}", "-P", "expanded=auto", "-P", "null=-"]
        settings = [f"\\set {name} {str(value)!r}" for name, value in self._set.items()]
        echoed = [part for line in typed for part in (f"\\echo {MARK}", line)]
        done = subprocess.run(
            [str(program("psql")), self.dsn, *options],
            input="\n".join([*settings, *echoed, ""]),
            capture_output=True,
            text=True,
            env={"LC_ALL": "C", "PATH": os.defpath, "PGTZ": "UTC"},
            timeout=60,
        )
        if done.returncode:
            raise Failed(f"{self.title}: {typed}: {done.stderr}")
        answers = done.stdout.split(f"{MARK}\n")[1:]
        block = []
        for line, answer in zip(typed, answers, strict=True):
            block.append(PROMPT + line.replace("\n", f"\n{' ' * len(PROMPT)}"))
            block += _trimmed(answer)
        self.note("psql:\n\n```text\n" + "\n".join(block) + "\n```")
        return done.stdout

    async def close(self) -> None:
        """The end of the shift."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._monitor is not None:
            await self._monitor.close()


MARK = "~ ~ ~"
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
PROMPT = "baton=> "


def _the_one(known: list[Statement], line: str) -> Statement:
    found = [statement for statement in known if statement.text.startswith(line)]
    if not found:
        raise Failed(f"The runbook does not have: {line}")
    return found[0]


def _trimmed(answer: str) -> list[str]:
    """What is kept of an answer: no keys, and no more than people read."""
    masked = re.sub(r"fr_[A-Za-z0-9_-]{20,}", "fr_…", answer)
    lines = [line.rstrip()[: WIDTH + 10] for line in masked.splitlines() if line.strip()]
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN - 2], f"… {len(lines) - SHOWN + 1} lines more", lines[-1]]
    return lines


# --- The faults ----------------------------------------------------------------------------


async def stuck_provider(call: OnCall) -> None:
    """A provider that takes requests and does not answer."""
    port = free_port()
    provider = subprocess.Popen(
        [sys.executable, "-m", "tests.llm_servers", str(port), "0.2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await call.lab.start(
            {
                "BATON_PROVIDER": "openai",
                "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
                "OPENAI_API_KEY": "sk-test-canary-key",
                "BATON_ATTEMPT_TIMEOUT": "10",
            },
            workers=1,
        )
        before = await call.lab.submit(*["x"] * 5)
        await call.lab.driver.until("completed", 60, before)
        provider.send_signal(signal.SIGSTOP)
        call.fault(
            "The provider's process is stopped (SIGSTOP): it takes connections and answers "
            "nothing. Ten jobs come in; an attempt may take 10 s here.",
            "open_breakers",
        )
        jobs = await call.lab.submit(*["x"] * 10)
        await call.alarm()
        await call.type("", "select job_id")
        await call.type("open_breakers", "select id, name, provider", "select outcome, status")
        call.note(
            "The provider it is: it took ten requests and answered none. Its people are called; "
            "there is nothing to type. Five more jobs come in meanwhile."
        )
        jobs += await call.lab.submit(*["x"] * 5)
        await asyncio.sleep(OUTAGE)
        waiting = await call.ask("select count(*) from jobs where status = 'pending'")
        provider.send_signal(signal.SIGCONT)
        call.acts()
        call.note(f"The provider is back (SIGCONT); {waiting} jobs wait.")
        await call.lab.driver.until("completed", LONGEST, jobs)
        await call.well("open_breakers")
        call.recovered("All fifteen jobs are completed, without anybody doing anything,")
        await call.type("open_breakers", "select ops.retry_failed")
        call.note("Nothing had failed for good, so there was nothing to retry.")
        _expect(call, all(job.status == "completed" for job in jobs), "all jobs complete")
    finally:
        provider.send_signal(signal.SIGCONT)
        provider.kill()
        provider.wait()


async def poison_job(call: OnCall) -> None:
    """A job that takes its worker with it."""
    _, [worker] = await call.lab.start(workers=1)
    call.lab.keep(worker)
    call.fault(
        "A job makes a library crash: SIGSEGV ends the worker, and the next one. Four other jobs "
        "run beside it. The supervisor starts a worker again after a second.",
        "dead_workers",
    )
    [poison] = await call.lab.submit("sleep=1 segv@1 segv@2 sleep=120@3 segv@3")
    others = await call.lab.submit(*["sleep=6"] * 4)
    await call.alarm()
    await call.until(
        "it has crashed twice", call.ask, "select count(*) > 0 from jobs where crashes > 1"
    )
    named = len(ID.findall(await call.type("dead_workers")))
    call.note(f"{named} named by now: what ran in the same worker is suspected, too.")
    suspects = "select count(*) from jobs where crashes > 1 and status <> 'completed'"
    await call.until("one suspect is left", call.ask, f"select ({suspects}) = 1")
    shown = await call.type("dead_workers", "select job_id")
    [call.values["job"]] = ID.findall(shown)
    call.note("The others have ended well, in processes of their own. This one it is.")
    await call.type("worker_lost", "select kind, attempt, crashes")
    call.acts()
    await call.type("worker_lost", "select ops.cancel_job")
    await call.lab.driver.until("failed", LONGEST, [poison])
    await call.lab.driver.until("completed", LONGEST, others)
    call.recovered("The job is cancelled, its client reads why,")
    call.note(
        "Left alone, its third crash would have ended it as `worker_lost`: from the second on it "
        "runs in a process of its own, and no further worker dies. Its client reads: "
        f"*{poison.last['job']['error']}*"
    )
    _expect(call, poison.last["job"]["error_code"] == "cancelled", "the poison is cancelled")
    _expect(call, all(job.status == "completed" for job in others), "the others complete")
    call.note("`dead_workers` is ok again by itself after 15 minutes.")


async def dead_worker(call: OnCall) -> None:
    """The only worker is gone, and nobody starts another."""
    _, [worker] = await call.lab.start(workers=1)
    jobs = await call.lab.run(*["sleep=60@1"] * 3)
    worker.kill()
    call.fault(
        "The only worker is killed (SIGKILL) in the middle of three jobs; nothing restarts it. "
        "Three more jobs come in.",
        "worker_seen",
    )
    more = await call.lab.submit(*["sleep=0.1"] * 3)
    await call.alarm()
    await call.type("worker_seen")
    call.acts()
    call.note("A worker is started: `baton worker`.")
    await call.lab.stack.worker()
    await call.lab.driver.until("completed", LONGEST, [*jobs, *more])
    await call.well("worker_seen")
    call.recovered("The three that ran and the three that waited are completed,")
    _expect(call, all(job.status == "completed" for job in [*jobs, *more]), "all jobs complete")
    await call.type("dead_workers", "select id, name, state")


async def flood(call: OnCall) -> None:
    """One tenant asks for far more than there are workers for."""
    await call.lab.start({"BATON_CONCURRENCY": "10"}, workers=1)
    sql = await call.lab.stack.sql()
    user = str(await sql.fetchval("select ops.create_user('mallory@example.com')"))
    project = str(await sql.fetchval("select ops.create_project('Nightly', $1)", user))
    key = await sql.fetchval("select ops.create_api_key($1)", user)
    port = call.lab.stack.apis[0].port
    assert port
    tenant = Connection(port, key)
    event = {"source": "github", "event_type": "commit", "title": "sleep=3", "resource": "flood"}
    stored = await tenant.ask("POST", "/api/v1/events", {"project_id": project, "events": [event]})
    _expect(call, stored.status == 200, "the event is stored")
    call.fault(
        "A script of one tenant asks for 600 handoffs in a row; each takes 3 s, and the worker "
        "runs ten at once. Somebody else asks for one, and waits behind them.",
        "pending_of_a_project",
    )
    for _ in range(600):
        await tenant.ask("POST", "/api/v1/handoffs", {"project_id": project})
    [one] = await call.lab.submit("sleep=0.1")
    await call.alarm()
    call.values |= {"project": project, "user": user}
    await call.type("pending_of_a_project", "select project_id, project, owner", "select u.email")
    call.acts()
    await call.type("pending_of_a_project", "select ops.set_concurrency(:'project', 5)")
    await call.lab.driver.until("completed", LONGEST, [one])
    call.recovered("The other one's handoff is completed")
    await call.type(
        "pending_of_a_project", "select ops.set_limit", "select ops.cancel_project(:'project'"
    )
    admitted = 0
    while (await tenant.ask("POST", "/api/v1/handoffs", {"project_id": project})).status == 202:
        admitted += 1
    call.note(f"The script goes on, and is answered `429` after {admitted} requests.")
    await call.well("pending_of_a_project")
    await call.type("pending_of_a_project", "select ops.set_concurrency(:'project', null)")
    tenant.close()


async def leaked_key(call: OnCall) -> None:
    """A key is in a public repository."""
    apis, _ = await call.lab.start(apis=2, workers=1)
    [job] = await call.lab.run("sleep=60")
    thieves = [Connection(api.port, call.lab.stack.key) for api in apis if api.port]
    for thief in thieves:
        answer = await thief.ask("GET", "/api/v1/projects")
        _expect(call, answer.status == 200, "the key works")
    waiting = asyncio.create_task(_stream_ends(apis[0].port or 0, call.lab.stack.key, job.id))
    await asyncio.sleep(1)
    call.fault(
        "A key is found in a public repository. Two API processes serve it, and a stream of events "
        "is held open with it."
    )
    call.sign, call.sign_after = "a report", 0.0
    call.values |= {"prefix": call.lab.stack.key[:11], "user": call.lab.stack.user_id}
    await call.type("A key has leaked", "select k.prefix")
    call.acts()
    await call.type("A key has leaked", "select ops.revoke_api_key")
    for thief in thieves:
        while (await thief.ask("GET", "/api/v1/projects")).status != 401:
            await asyncio.sleep(0.02)
        thief.close()
    refused = time.monotonic() - call._acted
    ended = await waiting - call._acted
    call.recovered("Both API processes answer `401`, and the open stream has ended")
    call.note(f"Requests are refused after {refused:.1f} s; the stream ended after {ended:.1f} s.")
    await call.type("A key has leaked", "select id, kind", "select ops.create_api_key")


async def _stream_ends(port: int, key: str, job_id: str | None) -> float:
    """When the server ends a stream of events of a job."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"GET /api/v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Accept: text/event-stream\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    )
    await writer.drain()
    with suppress(ConnectionError):
        while await reader.read(65536):
            pass
    writer.close()
    return time.monotonic()


OLD_JOBS = """
insert into jobs (id, user_id, project_id, kind, input, credits, status, outcome, error, error_code,
  created_at, updated_at, started_at, completed_at)
select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0')
    || '7' || substring(replace(gen_random_uuid()::text, '-', '') from 14))::uuid,
  $1, $2, 'handoff', '{}', 1, 'failed', 'failed', 'It failed.', 'generation_failed', at, at, at, at
from (select now() - interval '90 days' + n * interval '1 minute' as at
  from generate_series(1, 50000) n) old
"""


async def full_table(call: OnCall) -> None:
    """The disk fills up, because somebody wanted to keep everything."""
    await call.lab.start(workers=1)
    sql = await call.lab.stack.sql()
    await sql.execute("select ops.set_retention('jobs', null)")
    await sql.execute(OLD_JOBS, call.lab.stack.user_id, call.lab.stack.project_id, timeout=120)
    await sql.execute("analyze jobs")
    call.fault(
        "The disk is nearly full. Months ago somebody told Baton to keep ended jobs for ever; "
        "there are 50,000 of 55 to 90 days ago."
    )
    call.sign, call.sign_after = "the disk's alarm", 0.0
    await call.type("A table has grown", "select name, keep, least")
    call.values["table"] = "jobs"
    call.acts()
    await call.type("A table has grown", "select ops.set_retention")
    [meanwhile] = await call.lab.submit("sleep=0.1")
    calls = 0
    while "| t" in await call.type("A table has grown", "select * from ops.purge"):
        calls += 1
        if calls > 1:
            del call.record[-1]  # the first and the last are enough to read
    await call.until(
        "nothing old is left",
        call.ask,
        "select count(*) = 0 from jobs where completed_at < now() - interval '30 days'",
    )
    call.recovered(f"Nothing older than 30 days is left, after {calls + 1} calls,")
    await call.lab.driver.until("completed", 60, [meanwhile])
    took = meanwhile.ended_at - meanwhile.accepted_at
    call.note(f"A handoff that was asked for meanwhile took {took:.1f} s.")
    await call.type("A table has grown", "select name, keep, least")
    call.note(
        "`rows` is an estimate that lags; the file keeps its size, and its room is used again."
    )


FAULTS: dict[str, tuple[str, Callable[[OnCall], Awaitable[None]]]] = {
    "provider": ("A stuck provider", stuck_provider),
    "poison": ("A poison job", poison_job),
    "worker": ("A dead worker", dead_worker),
    "flood": ("A tenant floods the queue", flood),
    "key": ("A leaked key", leaked_key),
    "table": ("A full retention table", full_table),
}


def _expect(call: OnCall, good: bool, what: str) -> None:
    if not good:
        raise Failed(f"{call.title}: {what}")


# --- The drill -----------------------------------------------------------------------------


@asynccontextmanager
async def _shift(name: str, postgres: Postgres, folder: Path) -> AsyncIterator[OnCall]:
    """A Baton of its own, healthy, and somebody on call for it."""
    stack = Stack(postgres, f"drill_{name}", folder / name)
    driver = Driver(stack)
    lab = Lab(stack, driver, postgres, folder / name)
    call = OnCall(lab, FAULTS[name][0])
    try:
        await stack.open()
        yield call
    finally:
        await call.close()
        await lab.stop_keeping()
        await driver.close()
        await stack.close()


async def drill(names: list[str], postgres: Postgres, folder: Path) -> list[OnCall]:
    """One fault after the other; answers what was written down."""
    admin = await asyncpg.connect(postgres.dsn("postgres"))
    await admin.execute(f"create role {LOGIN} login in role baton_ops")
    await admin.close()
    shifts = []
    for name in names:
        title, fault = FAULTS[name]
        print(f"{title} ...", flush=True)
        async with _shift(name, postgres, folder) as call:
            await fault(call)
            call.record.append(await _audit(call))
        print(
            f"  sign: {call.sign} after {call.sign_after:.1f} s, recovery {call.recovery}",
            flush=True,
        )
        shifts.append(call)
    return shifts


async def _audit(call: OnCall) -> str:
    """What `ops.audit` has of it."""
    sql = await call.lab.stack.sql()
    rows = await sql.fetch("select what from ops.audit where who = $1 order by id", LOGIN)
    done = ", ".join(f"`{row['what']}`" for row in rows) or "nothing"
    return f"In `ops.audit`, by `{LOGIN}`: {done}."


def written(shifts: list[OnCall], seconds: float) -> str:
    """The record, as Markdown."""
    lines = [
        "# On-call drill",
        "",
        "Recorded by `make drill` ([its source](../tests/chaos/drill.py)): real processes, a",
        "real PostgreSQL, and psql as a login in the role `baton_ops`. Every line typed is one of",
        "the [runbook](runbook.md); it cannot type others. Thresholds are the defaults.",
        "",
        f"PostgreSQL {MAJOR}, Python {platform.python_version()}, {os.cpu_count()} busy cores; "
        f"{seconds:.0f} s for all of it.",
        "",
        "| fault | first sign | after the fault | recovery after the action | in all |",
        "|---|---|---|---|---|",
        *(
            f"| [{s.title}](#{s.title.lower().replace(' ', '-')}) | {s.sign} | "
            f"{f'{s.sign_after:.1f} s' if s.sign_after else '-'} | {s.recovery} | {s.in_all} |"
            for s in shifts
        ),
        "",
        "Keys are masked, long answers cut (`…`). `+` is the time since the fault.",
    ]
    for shift in shifts:
        lines += ["", f"## {shift.title}"]
        for entry in shift.record:
            lines += ["", entry]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.drill", description=__doc__)
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the record goes")
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else list(FAULTS)
    if unknown := set(names) - set(FAULTS):
        raise SystemExit(f"--only: no such fault: {', '.join(sorted(unknown))}")
    folder = Path(tempfile.mkdtemp(prefix="baton-drill-"))
    folder.chmod(0o711)  # the server's account has to be able to pass
    started = time.monotonic()
    template = make_template(folder / "template")
    postgres = Postgres(copy_of(template, folder / "pg"), folder / "pg.log")
    postgres.start()
    try:
        shifts = asyncio.run(drill(names, postgres, folder))
    except (Failed, NoAnswer) as error:
        print(f"{error}\nLogs: {folder}", file=sys.stderr)
        sys.exit(1)
    finally:
        postgres.close()
    record = written(shifts, time.monotonic() - started)
    if asked.write or not asked.only:
        (asked.write or RECORD).write_text(record)
    else:
        print(record)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
