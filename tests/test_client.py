"""A client that others generate from the document completes a handoff by its own types."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import httpx
from conftest import Caller, Workers

# What a person writes who has generated the client: ask, poll, done.
PROGRAM = """
import sys
from baton_client import AuthenticatedClient
from baton_client.api.ask import create_handoff, read_job
from baton_client.models import Accepted, Error, Handoff, HandoffRequest, JobResponse, JobStatus

base_url, key, project_id = sys.argv[1:]
with AuthenticatedClient(base_url=base_url, token=key) as client:
    refused = create_handoff.sync(client=client, body=HandoffRequest(project_id="x"))
    assert isinstance(refused, Error) and refused.code == "not_found", refused
    asked = HandoffRequest(project_id=project_id, sources=["github"])
    accepted = create_handoff.sync(client=client, body=asked, idempotency_key="generated-1")
    assert isinstance(accepted, Accepted), accepted
    while True:
        read = read_job.sync(accepted.job_id, client=client, prefer="wait=5")
        assert isinstance(read, JobResponse), read
        if read.job.done:
            break
    assert read.job.status is JobStatus.COMPLETED, read.job
    assert isinstance(read.result, Handoff)
    print(read.result.markdown)
"""
# The generator knows no NDJSON, and would leave the route's other body out, too.
CONFIG = {
    "content_type_overrides": {"application/x-ndjson": "application/octet-stream"},
    "post_hooks": [],
}


async def run(*command: str | Path, cwd: Path) -> str:
    """Run a program that has to succeed; answers what it printed."""
    child = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdout=PIPE, stderr=PIPE)
    out, err = await child.communicate()
    assert child.returncode == 0, (out + err).decode()
    return out.decode()


async def test_a_generated_client_completes_a_handoff(
    tmp_path: Path, base_url: str, caller: Caller, worker: Workers
) -> None:
    await caller.ingest({"title": "feat: switch the cache to an LRU"})
    async with httpx.AsyncClient(base_url=base_url, trust_env=False) as http:
        (tmp_path / "openapi.json").write_bytes((await http.get("/openapi.json")).content)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "program.py").write_text(PROGRAM)
    await run(
        *(sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning"),
        *("--path", "openapi.json", "--config", "config.json"),
        *("--meta", "none", "--output-path", "baton_client"),
        cwd=tmp_path,
    )
    working, _ = worker()
    running = asyncio.create_task(working.run())  # type: ignore[no-untyped-call]
    printed = await run(
        *(sys.executable, "program.py", base_url, caller.key, caller.project_id), cwd=tmp_path
    )
    working.stop()
    await running
    assert printed.startswith("# ") and "LRU" in printed
