"""What a path tells: docs, tests, CI or packaging, and else the part of the system it is in."""

import re
from collections import Counter

DOC_FILE = re.compile(
    r"(?:^|/)(?:docs?|documentation)/|\.(?:md|rst|adoc)$|(?:^|/)(?:readme|license|authors)", re.I
)
TEST_FILE = re.compile(
    r"(?:^|/)(?:tests?|spec|__tests__|testdata|fixtures)/|(?:^|/)(?:test_|conftest)|_test\.\w+$"
    r"|\.(?:test|spec)\.\w+$",
    re.I,
)
CI_FILE = re.compile(
    r"^(?:\.github/|\.circleci/|\.ci/|\.gitlab-ci|\.travis|azure-pipelines|\.pre-commit|\.gitignore"
    r"|\.editorconfig|tox\.ini|noxfile|Makefile|justfile|scripts/|\.golangci|\.readthedocs|codecov"
    r"|\.vscode|\.devcontainer)", re.I)  # fmt: skip
CHANGELOG_FILE = re.compile(  # one file, or a folder with a file for each change
    r"(?:^|/)(?:change(?:s|[-_]?log)|history|news|releases?|release[-_]?notes|whats?[-_]?new)"
    r"(?:\.\w+)?$|(?:^|/)(?:\.changeset|change(?:s|log)\.d|newsfragments)/",
    re.I,
)
MANIFEST_FILE = re.compile(
    r"(?:^|/)(?:pyproject\.toml|setup\.(?:py|cfg)|requirements[\w.-]*|package(?:-lock)?\.json"
    r"|yarn\.lock|pnpm-lock\.yaml|poetry\.lock|uv\.lock|Pipfile(?:\.lock)?|go\.(?:mod|sum|work"
    r"|work\.sum)|Cargo\.(?:toml|lock)|Gemfile(?:\.lock)?|composer\.(?:json|lock)|mix\.(?:exs|lock)"
    r"|Dockerfile)$", re.I)  # fmt: skip
VERSION_FILE = re.compile(r"(?:^|/)_*version_*\.\w+$", re.I)
SCHEMA_FILE = re.compile(r"migrations?/|schema|\.sql$|openapi|\.proto$|\.graphql$", re.I)
SIDE_FILES = (
    ("", CHANGELOG_FILE),  # every change touches it, so it is no area
    ("CI", CI_FILE),
    ("tests", TEST_FILE),
    ("packaging", MANIFEST_FILE),
    ("docs", DOC_FILE),
)
SIDE_AREAS = frozenset(name for name, _ in SIDE_FILES)
WRAPPERS = frozenset(("src", "lib", "packages", "apps"))  # folders that say nothing about a part


def area_name(path: str) -> str:
    """Folders, two deep at most; docs, tests and the like by what they are, a changelog by none."""
    for name, pattern in SIDE_FILES:
        if pattern.search(path):
            return name
    parts = [part for part in path.split("/") if part]
    folders = parts[:-1]
    if len(folders) > 1 and folders[0] in WRAPPERS:
        folders = folders[1:]
    if not folders:
        return parts[0].partition(".")[0] if parts else ""
    return "/".join(folders[:2])


def area_names(touches: Counter[str]) -> dict[str, str]:
    """The area of each path; when one folder takes most of the work, its files are the areas."""
    names = {path: area_name(path) for path in touches}
    load: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path, name in names.items():
        if name not in SIDE_AREAS:
            load[name] += touches[path]
            files[name] += 1
    crowded = {name for name in load if load[name] * 2 > load.total() and files[name] >= 6}
    for path, name in names.items():
        stem = path.rpartition("/")[2].partition(".")[0]
        if name in crowded and "/" in path and stem not in ("", "__init__"):
            names[path] = f"{name}/{stem}"
    return names


def is_side(path: str) -> bool:
    """Whether a path is docs, tests, CI or packaging rather than code."""
    return area_name(path) in SIDE_AREAS
