"""An attempt in a process of its own, for jobs whose workers have died twice.

The worker keeps the lease and writes the outcome; the child only generates. So when the child dies
(a segmentation fault, the memory killer, an `exit` deep in a library), the worker is there to say
so, and no neighbour is harmed. Run as `python -m tasks.isolated`: the job as JSON on stdin, the
artifact or the failure as JSON on stdout. Only an end without an answer counts as a death.
"""

import asyncio
import logging
import os
import sys
from dataclasses import asdict
from typing import Any

import orjson

from app import logs
from app.background import child_environment, stop_with_parent
from app.db import Unavailable, open_database
from app.settings import Settings
from tasks.generate import ClaimedJob, generate
from tasks.outcomes import Failed, Retry, from_json, to_json, unforeseen
from tasks.providers import make_provider

log = logging.getLogger("baton.worker")


class ChildDied(Exception):
    """The child ended without an answer; the message says how."""


async def generate_isolated(job: ClaimedJob, database_url: str) -> dict[str, Any]:
    """The artifact of a job, made in a child process.

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
    )
    try:
        answer, _ = await child.communicate(orjson.dumps(asdict(job)))
    except asyncio.CancelledError:
        child.kill()
        await child.wait()
        raise
    if child.returncode != 0:
        raise ChildDied(_how(child.returncode or 0))
    told: dict[str, Any] = orjson.loads(answer)
    if "unavailable" in told:
        raise Unavailable(told["unavailable"])
    if "outcome" in told:
        raise from_json(told["outcome"])
    artifact: dict[str, Any] = told["artifact"]
    return artifact


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


async def _main() -> bytes:
    stop_with_parent()
    job = ClaimedJob.from_json(orjson.loads(sys.stdin.buffer.read()))
    settings = Settings.from_env()
    assert settings.database_url
    logs.configure(settings.log)
    async with open_database(
        settings.database_url, application_name="baton isolated", size=1
    ) as database:
        try:
            artifact = await generate(database, make_provider(settings), job, lambda *_: None)
        except (Failed, Retry) as outcome:
            return orjson.dumps({"outcome": to_json(outcome)})
        except Unavailable as error:
            return orjson.dumps({"unavailable": str(error)})
        except Exception as error:
            log.error("attempt failed", extra={"job_id": job.id, "trace": logs.trace(error)})
            return orjson.dumps({"outcome": to_json(unforeseen(error))})
    return orjson.dumps({"artifact": artifact})


if __name__ == "__main__":
    # The answer has the pipe to itself; what a library prints goes to the log.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        answer.write(asyncio.run(_main()))
