"""How long a request waits while the database is upgraded: `python -m bench.upgrade` at the root.

A database of the released version before, filled with jobs, its programs at work under a steady
load of submits and polls; then `migrate`, with as much load before and after. Prints the longest
request of each phase, and what became of all. Loopback only; ends by itself after a minute or two.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import httpx  # noqa: E402  (the path has to be set first)
from conftest import connected, with_database  # noqa: E402
from test_upgrade import BEFORE, client, extract, ingest, install, running  # noqa: E402

from app.embedded import EmbeddedPostgres  # noqa: E402
from app.migration import migrate  # noqa: E402

FILL = """
insert into jobs (user_id, project_id, kind, input, credits, status, outcome, result_kind,
  result_id, lease_token, completed_at, created_at, started_at, fingerprint)
select user_id, p, 'handoff', '{}', 1, 'completed', 'succeeded', 'handoff', gen_random_uuid(),
  gen_random_uuid(), now(), now() - n * interval '1 minute', now() - interval '5 seconds', n
from generate_series(1, $1) n, (select id as p, owner_id as user_id from projects limit 1) p
"""


async def main(jobs: int, rate: float, seconds: float) -> None:
    """Fill, load, upgrade, print."""
    with tempfile.TemporaryDirectory(prefix="baton-upgrade-") as folder:
        Path(folder).chmod(0o711)
        server = EmbeddedPostgres(Path(folder) / "data")
        try:
            await _measure(server.start(), Path(folder), jobs, rate, seconds)
        finally:
            server.stop()


async def _measure(dsn: str, folder: Path, jobs: int, rate: float, seconds: float) -> None:
    code = extract(BEFORE, folder / "before")
    async with connected(dsn) as connection:
        await connection.execute("create database bench")
    dsn = with_database(dsn, "bench")
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(connected(dsn))
        await install(code, BEFORE, connection)
        ada = await client(connection)
        await connection.execute(FILL, jobs)
        await connection.execute("vacuum analyze")
        api = await stack.enter_async_context(running(code, "serve", dsn, folder))
        await stack.enter_async_context(running(code, "worker", dsn, folder))
        await api.ready()
        await ingest(api.url, ada)
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"{api.url}/api/v1",
                headers={"Authorization": f"Bearer {ada.key}"},
                trust_env=False,
                timeout=30,
            )
        )
        phase, took, statuses, asked = "before", {}, {}, []  # type: ignore[var-annotated]

        async def ask(number: int) -> None:
            body = {"project_id": ada.project_id, "job": {"metadata": {"n": str(number)}}}
            of, started = phase, time.monotonic()
            response = await http.post("/handoffs", json=body)
            took.setdefault(of, []).append(time.monotonic() - started)
            counts = statuses.setdefault(of, {})
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
            if response.status_code == 202:
                asked.append(response.json()["jobId"])
                started = time.monotonic()
                await http.get(f"/jobs/{asked[-1]}")
                took.setdefault(of, []).append(time.monotonic() - started)

        async def load() -> None:
            async with asyncio.TaskGroup() as tasks:
                for number in range(1_000_000):
                    tasks.create_task(ask(number))
                    await asyncio.sleep(1 / rate)
                    if phase == "over":
                        return

        loading = asyncio.create_task(load())
        await asyncio.sleep(seconds)
        phase = "during"
        done = await migrate(dsn)
        await asyncio.sleep(0.2)  # who began to wait then has its answer
        phase = "after"
        await asyncio.sleep(seconds)
        phase = "over"
        await loading
        print(done)
        for name, values in took.items():
            values.sort()
            print(
                f"{name:<7} {len(values):>6} requests, median {values[len(values) // 2] * 1000:.0f}"
                f" ms, longest {values[-1] * 1000:.0f} ms, statuses {statuses[name]}"
            )
        print(
            f"ratio of the longest during and before: {took['during'][-1] / took['before'][-1]:.1f}"
        )
        ended = await ada.ended(api.url, *asked)
        outcomes = [job["outcome"] for job in ended]
        print({each: outcomes.count(each) for each in set(outcomes)}, "of", len(asked), "accepted")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.upgrade", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="finished jobs in the database")
    parser.add_argument("--rate", type=float, default=20.0, help="submits a second")
    parser.add_argument("--seconds", type=float, default=8.0, help="of load before and after")
    given = parser.parse_args()
    asyncio.run(main(given.jobs, given.rate, given.seconds))
