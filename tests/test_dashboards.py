"""The dashboard and the alerts ask only for what exists, and every metric is asked for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import promql_parser
import pytest
import yaml
from promql_parser import AggregateExpr, VectorSelector
from test_metrics import families, labels_of, name_of

from app import metrics

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = orjson.loads((DEPLOY / "grafana" / "baton.json").read_bytes())
[GROUP] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = GROUP["rules"]
SCRAPED = {"job", "instance"}  # labels that Prometheus gives to whatever it scrapes
VARIABLES = {"$__rate_interval": "5m", "$kind": "handoff"}


def series() -> dict[str, set[str]]:
    """The labels of every name that a page has."""
    found: dict[str, set[str]] = {}
    for family in families():
        labels = set(labels_of(family))
        if family.type == "histogram":
            found |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
            found[f"{family.name}_bucket"] = labels | {"le"}
        else:
            found[name_of(family)] = labels | ({"version"} if family.type == "info" else set())
    return found


SERIES = series()


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> Iterator[tuple[str, str]]:
    """Who asks, and what."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def parsed(text: str) -> promql_parser.Expr:
    for variable, value in VARIABLES.items():
        text = text.replace(variable, value)
    assert "$" not in text, text
    return promql_parser.parse(text)


def selectors(expression: promql_parser.Expr) -> list[VectorSelector]:
    found: list[VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)

    promql_parser.walk(expression, visit)
    return found


def grouped(expression: promql_parser.Expr) -> Iterator[tuple[set[str], list[VectorSelector]]]:
    """By what labels something is added up, and what."""
    found: list[AggregateExpr] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, AggregateExpr) and node.modifier:
            found.append(node)

    promql_parser.walk(expression, visit)
    for node in found:
        assert node.modifier
        yield set(node.modifier.labels), selectors(node.expr)


def test_what_is_asked_for_exists_with_all_its_labels() -> None:
    for who, text in expressions():
        expression = parsed(text)
        asked = selectors(expression)
        assert asked, who
        for selector in asked:
            assert selector.name in SERIES, f"{who}: there is no {selector.name}"
            named = {matcher.name for matcher in selector.matchers.matchers}
            assert named <= SERIES[selector.name] | SCRAPED, f"{who}: {selector}"
        for labels, inside in grouped(expression):
            for selector in inside:
                assert labels <= SERIES[str(selector.name)] | SCRAPED, f"{who}: by {labels}"


def test_what_every_api_process_says_of_the_one_database_is_not_added_up() -> None:
    shared = {family.name for family in metrics.DATABASE.collect()}
    asked = set()
    for who, text in expressions():
        for selector in selectors(parsed(text)):
            if selector.name in shared:
                asked.add(selector.name)
                assert re.search(rf"(max|min)( by \([a-z, ]+\))? ?\({selector.name}", text), who
    assert asked == shared


def test_every_metric_is_shown_or_alerted_on() -> None:
    asked = {str(s.name) for _, text in expressions() for s in selectors(parsed(text))}
    assert [
        name_of(family)
        for family in families()
        if not asked & {name_of(family), f"{family.name}_bucket"}
    ] == []


def test_every_value_of_a_label_that_a_query_names_is_one_that_is_counted(root: Path) -> None:
    """A word that nobody counts by would make an alert that never fires."""
    code = "".join(p.read_text() for d in ("app", "tasks") for p in (root / d).glob("*.py"))
    code += (root / "schema.sql").read_text()
    words = {
        word
        for _, text in expressions()
        for selector in selectors(parsed(text))
        for matcher in selector.matchers.matchers
        if matcher.name not in ("kind", "status")
        for word in matcher.value.split("|")
    }
    assert len(words) > 5
    assert [word for word in words if not re.search(rf"['\"]{word}['\"]", code)] == []


# --- Alerts --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(
    rule: dict[str, Any],
) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Baton([A-Z][a-z]+)+", rule["alert"])
    assert promql_parser.parse_duration(rule["for"]).total_seconds() > 0
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["summary"].endswith(".")
    produced: set[str] = set()
    for labels, _ in grouped(parsed(rule["expr"])):
        produced |= labels
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= produced, text


async def test_an_alert_leads_to_where_the_runbook_says_what_to_do(
    sql: asyncpg.Connection, root: Path
) -> None:
    checks = {row["name"] for row in await sql.fetch("select name from ops.checks")}
    text = (root / "docs" / "runbook.md").read_text()
    headings = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert checks <= headings
    for rule in RULES:
        place, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert place == "docs/runbook.md"
        assert anchor == "{{ $labels.check }}" or anchor in headings, rule["alert"]


def test_no_two_alerts_have_one_name() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) > 10


def test_the_example_of_a_scrape_reads_the_rules_and_both_processes() -> None:
    example = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert example["rule_files"] == ["alerts.yml"]
    assert {job["job_name"] for job in example["scrape_configs"]} == {"baton-api", "baton-worker"}


# --- The dashboard -------------------------------------------------------------------------


def test_the_dashboard_can_be_imported_as_it_is() -> None:
    datasource, kind = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"]) == ("datasource", "datasource")
    assert kind["query"]["query"] == "label_values(baton_jobs, kind)" and "baton_jobs" in SERIES
    assert "__inputs" not in DASHBOARD and "id" not in DASHBOARD
    for panel in panels():
        for user in (panel, *panel["targets"]):
            assert user["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_no_two_panels_lie_on_each_other_and_none_hangs_over() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        assert 0 <= x < x + w <= 24
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_a_legend_names_only_labels_that_its_series_have() -> None:
    for panel in panels():
        for target in panel["targets"]:
            produced: set[str] = set()
            for labels, _ in grouped(parsed(target["expr"])):
                produced |= labels
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= produced, panel["title"]
