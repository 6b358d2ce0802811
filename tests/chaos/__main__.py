"""The command line of the fault suite: run scenarios, print one table, exit 1 when anything that
must hold was violated."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .lab import Result
from .runner import LANES, run, selected, table


def _report(result: Result) -> None:
    if result.skipped:
        return
    state = "ok" if result.good else "VIOLATED"
    print(f"{state:<9} {result.scenario.id}: {result.scenario.title} ({result.seconds:.0f} s)")
    for example in result.verdict.examples:
        print(f"          {example}")
    sys.stdout.flush()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", metavar="ID,ID", help="these scenarios")
    parser.add_argument("--short", action="store_true", help="the selection of `make test`")
    parser.add_argument("--long", action="store_true", help="durations of the measurements x 4")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--lanes", type=int, default=LANES, help="scenarios at a time")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs and data there")
    asked = parser.parse_args()
    scenarios = selected(asked.only, short=asked.short)
    if asked.list:
        for one in scenarios:
            print(f"{one.id:<22} {one.title}{f'  (needs: {one.needs})' if one.needs else ''}")
        return
    # Not TMPDIR's own: the server's account has to be able to pass.
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="baton-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)
    started = time.monotonic()
    results = run(
        scenarios,
        folder.resolve(),
        scale=4.0 if asked.long else 1.0,
        lanes=asked.lanes,
        report=_report,
    )
    ran = [result for result in results if not result.skipped]
    bad = [result for result in ran if not result.good]
    print(f"\n{table(results)}\n")
    print(
        f"{len(ran)} scenarios, {sum(r.verdict.violations for r in ran)} violations,"
        f" {time.monotonic() - started:.0f} s"
    )
    if bad or asked.keep:
        print(f"Logs, calls and data: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
