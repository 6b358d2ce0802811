"""The layout is a contract: a file may import only files listed above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LISTED = """
app.logs app.settings app.cipher app.metrics app.tracing app.background app.connector app.embedded
app.schemas app.sources app.chat
app.history app.db app.migration app.queue app.sweeper app.retention app.errors app.wire app.guard
app.exporter app.limits app.auth app.waits app.events app.jobs app.stream app.resources
app.channels app.webhooks app.hooks app.digests app.integrations app.openapi app.docs app.static
app.main
app.client app.mcp_server app.supervisor app.terminal app.github app.operator app.connect app.demo
tasks.sources.event
tasks.outcomes tasks.breaker tasks.calls tasks.context tasks.entering
tasks.lines tasks.sources.body tasks.sources.forge tasks.sources.github tasks.sources.gitlab
tasks.sources.bitbucket tasks.sources.circleci tasks.sources.buildkite tasks.sources.vercel
tasks.sources.generic tasks.sources.sentry tasks.sources.pagerduty tasks.sources.incident_io
tasks.sources.alertmanager tasks.sources.grafana tasks.sources.cloudevents
tasks.sources.slack tasks.sources.discord tasks.sources.linear tasks.sources.jira
tasks.sources.notion tasks.sources.asana
tasks.references tasks.paths tasks.kinds tasks.cues tasks.signals tasks.statements
tasks.changes tasks.reading tasks.passages tasks.areas
tasks.handoff tasks.notes tasks.onboarding tasks.architecture tasks.correlation tasks.question
tasks.extractive
tasks.selection tasks.tokens tasks.briefs
tasks.providers tasks.prompts tasks.replies tasks.chat tasks.openai_chat
tasks.anthropic_chat tasks.drafting tasks.plain tasks.render tasks.generate tasks.isolated
tasks.executor tasks.outbound tasks.delivery tasks.posting tasks.mapping tasks.intake tasks.naming
tasks.worker
app.__main__
"""
ORDER = LISTED.split()
SHARED = {  # all that tasks/ may see of app/
    "app.logs",
    "app.settings",
    "app.cipher",
    "app.metrics",
    "app.tracing",
    "app.exporter",
    "app.background",
    "app.connector",
    "app.db",
    "app.queue",
    "app.sweeper",
    "app.retention",
    "app.schemas",
    "app.sources",
    "app.chat",
}
SIBLINGS = {
    "app.events",
    "app.jobs",
    "app.stream",
    "app.resources",
    "app.channels",
    "app.webhooks",
    "app.hooks",
    "app.integrations",
}  # never each other
SQL = re.compile(
    r"\s*(select\s.+\sfrom|insert\s+into|update\s+\w+\s+set|delete\s+from|with\s+\w+\s+as)\s",
    re.IGNORECASE | re.DOTALL,
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for side in ("app", "tasks")
    for path in sorted((ROOT / side).rglob("*.py"))
    if path.stem != "__init__"
}


def imported(text: str) -> Iterator[str]:
    """The names of our modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "absolute imports only"
            deep = node.module in ("app", "tasks", "tasks.sources")
            names = [f"{node.module}.{a.name}" for a in node.names] if deep else [node.module]
        else:
            continue
        yield from (n for n in names if n.startswith(("app.", "tasks.")) and n != "app.__version__")


def test_every_file_has_its_place() -> None:
    assert set(FILES) == set(ORDER)


def test_imports_flow_one_way() -> None:
    def wrong(name: str, target: str) -> bool:
        return (
            ORDER.index(target) >= ORDER.index(name)
            or {name, target} <= SIBLINGS
            or (name.startswith("tasks.") and target.startswith("app.") and target not in SHARED)
        )

    assert [
        f"{n} imports {t}" for n, text in FILES.items() for t in imported(text) if wrong(n, t)
    ] == []


def test_the_http_side_never_imports_the_worker_side() -> None:
    assert [
        f"{name} imports {target}"
        for name, text in FILES.items()
        for target in imported(text)
        if name.startswith("app.") and name != "app.__main__" and target.startswith("tasks.")
    ] == []


def test_sql_lives_in_sql_files() -> None:
    assert [
        f"{name}: {node.value[:40]!r}"
        for name, text in FILES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.match(node.value)
    ] == []


def test_configuration_is_read_in_settings_only() -> None:
    # The others hand an environment to a child process, or are handed one as a child.
    assert {name for name, text in FILES.items() if "os.environ" in text} <= {
        "app.settings",
        "app.background",
        "app.embedded",
        "app.history",
    }
