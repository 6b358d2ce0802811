"""The kind of a change. Subjects marked with a repository are real commit messages from there."""

import pytest
from stories import signal


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("feat(auth)!: sign in with a passkey", "feature"),
        ("fix: keep the session on redirect", "fix"),
        ("perf(db): fewer round trips", "performance"),
        ("refactor: split the client", "refactor"),
        ("docs: explain seats", "docs"),
        ("chore(deps): bump cryptography from 41.0.6 to 41.0.7", "dependency"),
        ("Add the 'proxy' parameter and deprecate 'proxies'. (#2879)", "feature"),  # encode/httpx
        ("Fix environment proxies (#2741)", "fix"),  # encode/httpx
        ("Fixed `iter_text` adding an empty string (#2998)", "fix"),  # encode/httpx
        ("Drop support for Python 3.7 (#2813)", "removal"),  # encode/httpx
        ("Bump uvicorn from 0.22.0 to 0.24.0.post1 (#2972)", "dependency"),  # encode/httpx
        ("Version 0.26.0 (#3009)", "noise"),  # encode/httpx
        ("Update CHANGELOG.md (#3000)", "noise"),  # encode/httpx
        ("Remove unused curio check (#3010)", "refactor"),  # encode/httpx
        ("Refactor tests a bit", "refactor"),  # simonw/datasette
        ("Release 1.0a31", "noise"),  # simonw/datasette
        ("Upgrade to Django 6.0", "change"),  # healthchecks/healthchecks
        ("Fix CVE-2026-1234 in the upload form", "security"),
        ("Deprecate the v1 endpoints", "deprecation"),
        ("fix typo", "noise"),
        ("wip", "noise"),
        ("fixup! Fix environment proxies", "noise"),
        ("Merge branch 'main' into feature", "noise"),
        ("\u4fee\u590d\u767b\u5f55\u5faa\u73af", "change"),
    ],
)
def test_a_subject_tells_the_kind_of_change(title: str, kind: str) -> None:
    assert signal(title).kind == kind


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["docs/index.md", "README.md"], "docs"),
        (["tests/test_url.py"], "test"),
        ([".github/workflows/ci.yml"], "ci"),
        (["CHANGELOG.md", "httpx/__version__.py"], "noise"),
        (["requirements.txt"], "build"),
        (["app/auth.py", "tests/test_auth.py"], "feature"),
    ],
)
def test_what_was_touched_says_more_than_the_verb(files: list[str], kind: str) -> None:
    assert signal("Add more of it", files=files).kind == kind
