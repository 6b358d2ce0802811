"""Reads the SQL out of docs/runbook.md, for the test that runs all of it and for the drill."""

import re
from pathlib import Path
from typing import Any, NamedTuple

RUNBOOK = Path(__file__).parent.parent.parent / "docs" / "runbook.md"
ADMINISTRATOR = "-- as the server's administrator\n"


class Statement(NamedTuple):
    """A line of SQL."""

    text: str
    as_administrator: bool

    def filled(self, values: dict[str, Any]) -> str:
        """With what the on-call would have found in the place of psql's variables."""
        return re.sub(r":'(\w+)'", lambda name: _quoted(values[name[1]]), self.text)


def _quoted(value: Any) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def statements(text: str) -> list[Statement]:
    """Those of all blocks, in order."""
    return [
        Statement(one.strip(), block.startswith(ADMINISTRATOR))
        for block in re.findall(r"^```sql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for one in re.split(r";$", re.sub(r" *--.*", "", block), flags=re.MULTILINE)
        if one.strip()
    ]


def parts(text: str, level: str) -> dict[str, str]:
    """The texts under the headings of a level, by heading."""
    found = re.split(rf"^{level} (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def chapters() -> dict[str, str]:
    """The texts of the runbook by the heading of their chapter."""
    return parts(RUNBOOK.read_text(), "##")


def sections() -> dict[str, list[Statement]]:
    """The statements of the runbook by the heading of their section."""
    return {
        title: statements(text)
        for chapter in chapters().values()
        for title, text in parts(chapter, "###").items()
    }


def beginning() -> list[Statement]:
    """The statements before the first section: what to ask first."""
    return statements(RUNBOOK.read_text().partition("\n### ")[0])
