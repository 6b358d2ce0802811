"""The data set: releases with their commits and the changelog items that people wrote for them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tasks.context import Context, Event, fold

TUNE = ("httpx", "healthchecks", "datasette")
REPORT = ("river", "starlette", "llm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What happened between two releases, and what people wrote about it."""

    repo: str
    version: str
    events: tuple[Event, ...]  # the commits as a git import makes them, newest first
    human: tuple[str, ...]

    def context(self, kind: str) -> Context:
        """The commits as a provider reads them for an artifact of that kind."""
        moments = [event.occurred_at for event in self.events]
        return Context(
            kind=kind,
            project_name=self.repo.rpartition("/")[2],
            since=min(moments),
            until=max(moments),
            events=fold(self.events),
        )

    @property
    def said(self) -> dict[str, str]:
        """All that each event says, by its id, for checking statements against it."""
        return {
            event.id: " ".join(
                (
                    event.title,
                    event.content or "",
                    event.author or "",
                    event.id[:7],
                    *event.metadata["files"],
                )
            )
            for event in self.events
        }


def load(path: Path) -> list[Release]:
    """The releases of one repository, newest first."""
    return [_release(json.loads(text)) for text in path.read_text().splitlines()]


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """The repositories that the folder has no file of."""
    return [name for name in names if not (folder / f"{name}.jsonl").is_file()]


def _release(row: dict[str, Any]) -> Release:
    events = tuple(
        Event(
            id=commit["sha"],
            source="github",
            event_type="merge" if commit["merge"] else "commit",
            title=commit["subject"] or "(no subject)",
            content=commit["body"] or None,
            author=commit["author"],
            external_id=commit["sha"],
            resource=row["repo"],
            occurred_at=datetime.fromisoformat(commit["date"]),
            metadata={"files": commit["files"]},
        )
        for commit in row["commits"]
    )
    return Release(
        repo=row["repo"], version=row["version"], events=events, human=tuple(row["changelog"])
    )
