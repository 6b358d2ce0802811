"""Every statement of queries.sql fits the schema, and every one is used."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg

from app.db import queries

ROOT = Path(__file__).parent.parent
ASKING = {"rows", "row", "value"}  # the methods of Database and Connection that take a name
TEMPLATES = {"set_{}_status", "read_{}"}  # app/resources.py builds these from a noun
NOUNS = ("handoff", "insight")


def calls() -> Iterator[tuple[str, str, int | None]]:
    """File, name and number of arguments of every use of a query in the code."""
    for path in sorted([*ROOT.glob("app/*.py"), *ROOT.glob("tasks/*.py")]):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr=method), args=[first, *rest]) if (
                    method in ASKING
                ):
                    starred = any(isinstance(each, ast.Starred) for each in rest)
                    for name in names(first):
                        yield path.name, name, None if starred else len(rest)
                case ast.Subscript(value=ast.Call(func=ast.Name("queries")), slice=key):
                    for name in names(key):
                        yield path.name, name, None


def names(node: ast.expr) -> list[str]:
    """The names that an argument can stand for."""
    match node:
        case ast.Constant(value=name) if isinstance(name, str):
            return [name]
        case ast.JoinedStr(values=parts):
            template = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)
            assert template in TEMPLATES, f"an unknown template of names: {template}"
            return [template.format(noun) for noun in NOUNS]
        case _:
            return []


CALLS = list(calls())


def chosen_in() -> set[tuple[Path, str]]:
    """Strings of the code that are a query's name, for names that are chosen before the call."""
    return {
        (path, node.value)
        for path in [*ROOT.glob("app/*.py"), *ROOT.glob("tasks/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in queries()
    }


async def test_every_query_prepares_on_the_schema(sql: asyncpg.Connection) -> None:
    faults = {}
    for name, text in queries().items():
        numbers = {int(number) for number in re.findall(r"\$(\d+)", text)}
        try:
            prepared = await sql.prepare(text)
        except asyncpg.PostgresError as error:
            faults[name] = str(error)
            continue
        if numbers != set(range(1, len(prepared.get_parameters()) + 1)):
            faults[name] = f"its parameters are {sorted(numbers)}"
    assert faults == {}


def test_every_query_is_used() -> None:
    assert (
        sorted(set(queries()) - {name for _, name, _ in CALLS} - {name for _, name in chosen_in()})
        == []
    )


def test_every_name_that_is_asked_for_exists() -> None:
    assert len(CALLS) > 30
    assert [(file, name) for file, name, _ in CALLS if name not in queries()] == []


def test_every_call_passes_as_many_arguments_as_its_query_takes() -> None:
    def takes(name: str) -> int:
        return max((int(n) for n in re.findall(r"\$(\d+)", queries()[name])), default=0)

    assert [
        f"{file}: {name} takes {takes(name)}, gets {given}"
        for file, name, given in CALLS
        if given is not None and name in queries() and given != takes(name)
    ] == []


def test_the_line_above_a_query_lists_its_parameters() -> None:
    text = (ROOT / "app" / "queries.sql").read_text()
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        comment = "".join(re.findall(r"^--.*\n", part, re.MULTILINE))
        assert comment, name
        used = set(re.findall(r"\$\d+", queries()[name]))
        assert used <= set(re.findall(r"\$\d+", comment)), name
