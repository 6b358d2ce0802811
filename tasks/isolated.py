"""An attempt in a process of its own, for jobs whose workers have died twice.

The worker keeps the lease and writes the outcome; the child only generates. So when the child dies
(a segmentation fault, the memory killer, an `exit` deep in a library), the worker is there to say
so, and no neighbour is harmed. Run as `python -m tasks.isolated`: the job as JSON on stdin; on
stdout JSON lines with progress, calls that were made, and at last the artifact or the failure. Only
an end without an answer counts as a death.
"""

import asyncio
import logging
import os
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, BinaryIO

import orjson

from app import __version__, logs, tracing
from app.background import child_environment, stop_with_parent
from app.db import Unavailable, open_database
from app.settings import Settings
from tasks.calls import Calls
from tasks.generate import ClaimedJob, generate
from tasks.outcomes import Failed, Retry, from_json, to_json, unforeseen
from tasks.providers import open_provider

log = logging.getLogger("baton.worker")

LINE_MAX = 1 << 28  # bytes of a line: an artifact is one


class ChildDied(Exception):
    """The child ended without an answer; the message says how."""


async def generate_isolated(job: ClaimedJob, database_url: str, calls: Calls) -> dict[str, Any]:
    """The artifact of a job, made in a child process; `calls` is told what its own is told there.

    Raises:
        tasks.outcomes.Failed, tasks.outcomes.Retry: as `generate` would.
        db.Unavailable: the database went away from the child.
        ChildDied: the child was killed or crashed.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "tasks.isolated",
        env=child_environment(DATABASE_URL=database_url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=LINE_MAX,
    )
    try:
        handed = replace(job, traceparent=tracing.traceparent())
        told = await _listen(child, orjson.dumps(asdict(handed)), calls)
        code = await child.wait()
    except asyncio.CancelledError:
        child.kill()
        await child.wait()
        raise
    if code != 0 or not told.keys() & {"artifact", "outcome", "unavailable"}:
        raise ChildDied(_how(code))
    if "unavailable" in told:
        raise Unavailable(told["unavailable"])
    if "outcome" in told:
        raise from_json(told["outcome"])
    artifact: dict[str, Any] = told["artifact"]
    return artifact


async def _listen(child: Process, request: bytes, calls: Calls) -> dict[str, Any]:
    """Hand the request over and pass on what the child tells; answers the last thing."""
    assert child.stdin and child.stdout
    child.stdin.write(request)
    with suppress(BrokenPipeError, ConnectionResetError):  # it is dead already, which it will tell
        await child.stdin.drain()
    child.stdin.close()
    told: dict[str, Any] = {}
    async for line in child.stdout:
        if not line.endswith(b"\n"):  # it died in the middle of it
            break
        told = orjson.loads(line)
        if "progress" in told:
            calls.report(**told["progress"])
        elif "call" in told:
            calls.record(**told["call"])
    return told


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


class _CallsHome(Calls):
    """Tells the worker what it is told."""

    def __init__(self, answer: BinaryIO, job: ClaimedJob) -> None:
        super().__init__(
            lambda progress: _tell(answer, progress=progress),
            kind=job.kind,
            plan=job.plan,
            models=job.models,
        )
        self._answer = answer

    def record(self, **call: Any) -> None:
        _tell(self._answer, call=call)


def _tell(answer: BinaryIO, **what: Any) -> None:
    answer.write(orjson.dumps(what, option=orjson.OPT_APPEND_NEWLINE))
    answer.flush()


async def _main(answer: BinaryIO) -> None:
    stop_with_parent()
    job = ClaimedJob.from_json(orjson.loads(sys.stdin.buffer.read()))
    settings = Settings.from_env()
    logs.configure(settings.log)
    if settings.traces:
        tracing.start("baton-worker", __version__)
    with (
        logs.about(job.told, job.request_id),
        tracing.span("isolated", parent=job.traceparent),
    ):
        await _generate(answer, job, settings)


async def _generate(answer: BinaryIO, job: ClaimedJob, settings: Settings) -> None:
    assert settings.database_url
    async with open_database(
        settings.database_url, application_name="baton isolated", role="baton_worker", size=1
    ) as database:
        try:
            calls = _CallsHome(answer, job)
            async with open_provider(settings) as provider:
                artifact = await generate(database, provider, job, calls)
        except (Failed, Retry) as outcome:
            _tell(answer, outcome=to_json(outcome))
        except Unavailable as error:
            _tell(answer, unavailable=str(error))
        except Exception as error:
            log.error("attempt failed", extra={"trace": logs.trace(error)})
            _tell(answer, outcome=to_json(unforeseen(error)))
        else:
            _tell(answer, artifact=artifact)


if __name__ == "__main__":
    # The answer has the pipe to itself; what a library prints goes to the log.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        asyncio.run(_main(answer))
