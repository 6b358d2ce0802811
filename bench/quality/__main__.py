"""Run every way over the data set and print, per kind and repository, how it did."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.settings import ConfigurationError, Settings
from bench.quality.releases import REPORT, TUNE, Release, load, missing
from bench.quality.rule import GROUNDED, RULE, Scores, scores, supported
from bench.quality.ways import BASELINES, drafts, items_of, statements_of
from tasks.providers import Extractive, Provider, open_provider

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "changelogs"
SPLITS = {"tune": TUNE, "report": REPORT}
KINDS = ("release_notes", "handoff")
BUILT_IN = "extractive"


def main(arguments: Sequence[str]) -> int:
    """Print the tables; 2 when the data is not there or the settings are wrong."""
    folder = Path(arguments[0]) if arguments else FOLDER
    if lacking := missing(folder, TUNE + REPORT):
        print(f"no data: {folder} lacks {', '.join(lacking)}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_report(folder, Settings.from_env()))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


async def _report(folder: Path, settings: Settings) -> None:
    async with open_provider(settings) as provider:
        providers = {BUILT_IN: Extractive(), settings.provider: provider}
        print(f"Rule: {RULE}.")
        print(f"Grounded: the cited events exist and hold {GROUNDED:.0%} of a statement's words.\n")
        for split, names in SPLITS.items():
            releases = {name: load(folder / f"{name}.jsonl") for name in names}
            for kind in KINDS:
                found = {name: await measured(kind, releases[name], providers) for name in releases}
                print(table(f"{split}: {kind}", found))


async def measured(
    kind: str, releases: Sequence[Release], providers: Mapping[str, Provider]
) -> dict[str, Scores]:
    """The scores of each way over the releases of a repository."""
    sums: dict[str, Scores] = dict.fromkeys((*providers, *BASELINES), Scores())
    contexts = [release.context(kind) for release in releases]
    lengths: list[int] = []
    for way, provider in providers.items():
        made = await drafts(provider, contexts)
        lengths = lengths or [len(items_of(draft)) for draft in made]
        for release, draft in zip(releases, made, strict=True):
            told = [*statements_of(draft.model_dump())] if draft else []
            grounded = sum(supported(text, ids, release.said) for text, ids in told)
            sums[way] += scores(items_of(draft), release.human)
            sums[way] += Scores(statements=len(told), grounded=grounded)
    for way, baseline in BASELINES.items():
        for release, length in zip(releases, lengths, strict=True):
            sums[way] += scores(baseline(release, length), release.human)
    return {way: found + Scores(lists=len(releases)) for way, found in sums.items()}


def table(title: str, found: Mapping[str, Mapping[str, Scores]]) -> str:
    """Recall, precision, F1 and length of each way for each repository, and the means."""
    cells = f"{'rec  prec    F1     n':>23}"
    lines = [
        f"{title:28}" + "".join(f"{name:>23}" for name in (*found, "mean")),
        f"{'':28}" + cells * (len(found) + 1) + f"{'words  repeated  grounded':>27}",
    ]
    for way in next(iter(found.values())):
        each = [scores_of[way] for scores_of in found.values()]
        rows = [(s.recall, s.precision, s.f1, s.length) for s in each]
        more = [(s.wordy, s.redundancy, s.grounding) for s in each]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        wordy, repeated, grounding = (sum(column) / len(more) for column in zip(*more, strict=True))
        shown = "".join(
            f"{recall:9.2f}{precision:5.2f}{f1:5.2f}{length:5.1f}".rjust(23)
            for recall, precision, f1, length in (*rows, mean)
        )
        last = f"{grounding:10.2f}" if each[0].statements else ""
        lines.append(f"{way:28}{shown}{wordy:7.1f}{repeated:10.2f}{last}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
