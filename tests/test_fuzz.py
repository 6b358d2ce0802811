"""Whatever is asked, the answer is one that the document tells: schemathesis, all of its checks."""

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest
from conftest import Caller, Workers

from app.background import background

EXAMPLES, SEED = 2, 1


@pytest.mark.timeout(600)  # two thousand requests, on a machine that may be busy
async def test_no_answer_contradicts_the_document(
    root: Path, base_url: str, caller: Caller, worker: Workers
) -> None:
    await caller.ingest({"title": "feat: switch the cache to an LRU", "resource": "acme/web"})
    working, executor = worker()
    async with background(executor.renew_forever()):
        running = asyncio.create_task(working.run())  # type: ignore[no-untyped-call]
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, root / "tests/fuzz.py", base_url, caller.key, caller.project_id),
            *(str(EXAMPLES), str(SEED)), stdout=PIPE, stderr=STDOUT, cwd=root,
        )  # fmt: skip
        try:
            out, _ = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
            working.stop()
            await running
    assert child.returncode == 0, out.decode()
    assert b" requests: " in out
