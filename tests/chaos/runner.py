"""The runner: scenarios in lanes, measurements alone, one table.

Scenarios that only break their own processes share one PostgreSQL and run side by side, because
most of their time is spent waiting for leases to expire. Those that break PostgreSQL get one of
their own.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import cells, crashes, database, hooks, latency, tickets, webhooks
from .lab import REGISTRY, Result, Scenario, run_scenario
from .postgres import Postgres, copy_of, make_template

DECLARING = (
    crashes,
    tickets,
    database,
    webhooks,
    hooks,
    latency,
    cells,
)  # each fills REGISTRY when imported
LANES = 5  # scenarios at a time
LIMIT = 300.0  # seconds for one scenario, settling included
DISK = "160m"


def selected(only: str | None, *, short: bool) -> list[Scenario]:
    """The scenarios that were asked for, in the order of the table."""
    if only:
        ids = [id.strip() for id in only.split(",")]
        if unknown := set(ids) - {s.id for s in REGISTRY}:
            raise SystemExit(f"--only: no such scenario: {', '.join(sorted(unknown))}")
        return [s for s in ordered() if s.id in ids]
    return [s for s in ordered() if s.short or not short]


def ordered() -> list[Scenario]:
    """All scenarios: by the numbers of the design's list, then those with names."""

    def place(scenario: Scenario) -> tuple[int, str]:
        number = scenario.id.partition("-")[0]
        return (int(number), scenario.id) if number.isdigit() else (1000, "")

    return sorted(REGISTRY, key=place)


def run(
    scenarios: Sequence[Scenario],
    folder: Path,
    *,
    scale: float = 1.0,
    lanes: int = LANES,
    report: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Run scenarios; answers their results in the order of the table."""
    template = make_template(folder / "template")
    shared = Postgres(copy_of(template, folder / "shared"), folder / "shared.log")
    shared.start()
    try:
        found = asyncio.run(_run_all(scenarios, folder, shared, scale, lanes, report))
    finally:
        shared.close()
    return [found[s.id] for s in scenarios]


async def _run_all(
    scenarios: Sequence[Scenario],
    folder: Path,
    shared: Postgres,
    scale: float,
    lanes: int,
    report: Callable[[Result], None],
) -> dict[str, Result]:
    found: dict[str, Result] = {}
    gate = asyncio.Semaphore(lanes)

    async def one(scenario: Scenario) -> None:
        async with gate:
            result = await _run_one(scenario, folder, shared, scale)
        found[scenario.id] = result
        report(result)

    # The longest first would be best; the table's order is near enough, and easier to follow.
    await asyncio.gather(*(one(s) for s in scenarios if not s.alone))
    for scenario in scenarios:
        if scenario.alone:
            await one(scenario)
    return found


async def _run_one(scenario: Scenario, folder: Path, shared: Postgres, scale: float) -> Result:
    mine = folder / scenario.id
    try:
        async with asyncio.timeout(LIMIT * max(1.0, scale)):
            if scenario.cluster == "shared" or scenario.body is None:
                return await run_scenario(scenario, shared, mine, scale=scale)
            with own_server(scenario, folder) as server:
                if server is None:
                    return Result(scenario, skipped="skipped: no file system can be mounted here")
                return await run_scenario(scenario, server, mine, scale=scale)
    except TimeoutError:
        result = Result(scenario)
        result.verdict.add("scenario", [f"not done after {LIMIT:.0f} s"])
        return result


@contextmanager
def own_server(scenario: Scenario, folder: Path) -> Iterator[Postgres | None]:
    """A PostgreSQL of one scenario; None when it should lie on a small disk and cannot."""
    place = folder / f"{scenario.id}-pg"
    place.mkdir(mode=0o711)
    mounted = scenario.cluster == "disk" and _mount(place)
    if scenario.cluster == "disk" and not mounted:
        yield None
        return
    settings = {"max_wal_size": "64MB", "min_wal_size": "32MB"} if mounted else None
    try:
        data = copy_of(folder / "template" / "pg", place / "data")
        server = Postgres(data, folder / f"{scenario.id}-pg.log", settings=settings)
        server.start()
        try:
            yield server
        finally:
            server.close()
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)
        shutil.rmtree(place, ignore_errors=True)


def _mount(place: Path) -> bool:
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0711", "chaos", str(place)]
    return subprocess.run(command, capture_output=True).returncode == 0


COLUMNS = ("#", "scenario", "jobs", "calls", "violations", "truth", "limit", "ratio", "note")


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    rows = [COLUMNS, *(_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append(f"| {' | '.join([*padded, row[-1]])} |")
    rule = "|".join("-" * (width + 2) for width in (*widths, len(COLUMNS[-1])))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _row(result: Result) -> tuple[str, ...]:
    scenario = result.scenario
    if result.skipped:
        return (scenario.id, scenario.title, *[""] * 6, result.skipped)
    bad = ", ".join(f"{name} {n}" for name, n in result.verdict.counts.items() if n)
    return (
        scenario.id,
        scenario.title,
        str(result.accepted),
        str(result.calls),
        bad or "0",
        "" if result.truth is None else f"{result.truth:.1f} s",
        "" if scenario.limit is None else f"{scenario.limit:g} s",
        "" if result.ratio is None else f"{result.ratio:.2f}",
        "; ".join(result.notes),
    )
