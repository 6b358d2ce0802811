"""The client that the README shows, run as it stands there: its loop ends whatever the job does."""

import asyncio
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
from conftest import Caller, Workers


def shown(root: Path, base_url: str, caller: Caller) -> str:
    """The README's Python, with nothing but the address and the key filled in."""
    text = (root / "README.md").read_text()
    [code] = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "BASE" in block
    ]
    return str(code).replace("http://127.0.0.1:8000", base_url).replace("fr_…", caller.key)


async def run(code: str) -> tuple[int | None, str, str]:
    """Run a program; answers its exit status and what it printed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(30):
        out, err = await child.communicate()
    return child.returncode, out.decode(), err.decode()


async def test_the_client_of_the_readme_prints_the_handoff(
    root: Path, base_url: str, caller: Caller, worker: Workers
) -> None:
    await caller.ingest({"title": "feat: switch the cache to an LRU"})
    working, _ = worker()
    running = asyncio.create_task(working.run())  # type: ignore[no-untyped-call]
    status, out, err = await run(shown(root, base_url, caller))
    working.stop()
    await running
    assert (status, err) == (0, "")
    assert "LRU" in out and out.startswith("# ")


async def test_the_client_of_the_readme_ends_on_every_outcome(
    root: Path, base_url: str, caller: Caller, sql: asyncpg.Connection,
    drain: Callable[..., Awaitable[None]],
) -> None:  # fmt: skip
    """Four statuses, for ever: a fifth terminal word would keep this loop going."""

    async def cancelled(job_id: str) -> None:
        await caller.http.post(f"/jobs/{job_id}/cancel")

    async def timed_out(job_id: str) -> None:
        await sql.execute("update jobs set deadline_at = now() - interval '1 s'")
        await sql.fetch("select sweep_job(id) from jobs")

    async def nothing(job_id: str) -> None:
        await drain()

    for end, code in ((cancelled, "cancelled"), (timed_out, "timeout"), (nothing, "no_result")):
        asking = asyncio.create_task(run(shown(root, base_url, caller)))
        async with asyncio.timeout(30):
            while not (jobs := (await caller.http.get("/jobs?status=pending")).json()["jobs"]):
                await asyncio.sleep(0.05)
        await end(jobs[0]["id"])
        status, _, err = await asking
        assert status == 1 and err.startswith(f"{code}: "), err


def test_every_complaint_has_tests_that_exist(root: Path) -> None:
    made = {
        name
        for file in (root / "tests").glob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    rows = [
        line
        for line in (root / "docs" / "complaints.md").read_text().splitlines()
        if re.match(r"\| \d", line)
    ]
    assert len(rows) == 15
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named and named <= made, row


def test_every_link_in_the_documents_leads_somewhere(root: Path) -> None:
    pages = [root / "README.md", root / "CHANGELOG.md", *(root / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                made = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in made, f"{page.name}: {link}"
