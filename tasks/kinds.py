"""What kind of change a subject tells of: a feature, a fix, …, or noise.

The one rule: what people declare (`fix:`) beats what their verb says, and what was touched beats
both. The patterns were tuned on the histories that `bench/quality` tunes on.
"""

import re

from tasks.lines import WORD, stem
from tasks.paths import CHANGELOG_FILE, CI_FILE, DOC_FILE, MANIFEST_FILE, TEST_FILE, VERSION_FILE
from tasks.references import without_suffix

CONVENTIONAL = re.compile(
    r"^(?:[^\w\s]{1,4}\s?)?(feat|feature|fix|bugfix|hotfix|perf|refactor|docs?|tests?|build|ci"
    r"|chore|style|revert|security|sec|deps?|i18n|wip|release|deprecate|remove|types?"
    r"|lint)\s?(?:\(([^()]{1,60})\))?(!)?:\s*(.+)$",
    re.I,
)
CONVENTIONAL_KINDS = {
    "feat": "feature", "feature": "feature", "fix": "fix", "bugfix": "fix", "hotfix": "fix",
    "perf": "performance", "refactor": "refactor", "doc": "docs", "docs": "docs", "test": "test",
    "tests": "test", "build": "build", "ci": "ci", "chore": "chore", "style": "noise",
    "revert": "change", "security": "security", "sec": "security", "dep": "dependency",
    "deps": "dependency", "i18n": "change", "wip": "noise", "release": "noise",
    "deprecate": "deprecation", "remove": "removal", "type": "refactor", "types": "refactor",
    "lint": "noise",
}  # fmt: skip
# What the words of a subject may make of the kind that its prefix declares.
PRECISER = {
    "chore": ("removal", "deprecation"),
    "feature": ("removal", "deprecation", "performance"),
}
# `scope: subject`, the habit of Go and kernel projects; a path or a plain lower-case word.
SCOPED = re.compile(r"^([a-z][a-z0-9_./-]{1,30}): (?=\S)")
# The first word of an imperative subject. Past and third person are reduced by `stem`.
VERBS = {
    "feature": "add introduce implement support allow enable new create provide expose accept "
    "include initial",
    "fix": "fix correct resolve repair handle prevent avoid ensure patch restore workaround "
    "guard stop don't",
    "removal": "remove delete drop",
    "deprecation": "deprecate",
    "refactor": "refactor cleanup clean simplify restructure rename move extract reorganise "
    "reorganize tidy split deduplicate inline rework reorder annotate type modernise modernize "
    "consolidate",
    "performance": "optimise optimize speed accelerate cache",
    "docs": "document clarify docs doc readme",
    "test": "test tests unskip",
    "dependency": "bump upgrade pin unpin",
    "noise": "format reformat lint typo typos wip merge blacken black ruff isort whitespace "
    "fixup squash nit",
}
FIRST_WORDS = {word: kind for kind, words in VERBS.items() for word in words.split()}
STEMMED = {stem(word): kind for word, kind in FIRST_WORDS.items()}
NOISE = re.compile(
    r"^(?:\(no (?:message|subject)\)$|(?:message|comment) deleted$"
    r"|v?\d+(?:\.\d+){1,3}\S{0,12}$|(?:prepare |bump |new )?(?:version|release)\b.{0,12}\d"
    r"|release notes\b|(?:prepare|prep|cut|tag|start|draft)\b.{0,30}\brelease\b|bump version"
    r"|version bump|back to (?:dev|work)|(?:update|tweak"
    r"|tidied up|fix|draft|regenerate)d? (?:the )?(?:change ?log|release notes)|changelog\b|wip\b"
    r"|fixup!|squash!|amend!|oops\b|typos?\b|(?:.{0,40}\b)?typos?$|fix (?:a |some |the )?(?:typos?"
    r"|lint|format|formatting|ci|tests?|build)\b|(?:ran|run|apply|applied) (?:black|ruff|prettier"
    r"|isort|cog|lint)|lint(?:ing)?$|format(?:ting)?$|\.$|update(?:d)? \S{1,60}\.(?:md|rst|txt|py"
    r"|js|ya?ml|toml)$|merge (?:branch|remote|upstream|main|master|tag|commit)\b|cleanup$|minor$"
    r"|tweaks?$|(?:add|fix)(?:ed|es)? (?:an? |some |the )?(?:grammar|(?:missing|omitted) (?:article"
    r"|word|comma|letter)s?)\b|initial commit$|trigger ci|empty commit|(?:pre-commit|weblate"
    r"|translations?) (?:auto|update))",
    re.I,
)
DEPENDENCY = re.compile(
    r"^(?:chore|build|deps?|fix)?(?:\([^()]{1,40}\))?:?\s{0,2}(?:bump|upgrade|update|pin"
    r"|unpin)s?d?\s+"
    r"(?:the\s+|dependency\s+|module\s+)?(@?[\w./\[\]-]{2,60})\s+(?:requirement\s+)?"
    r"(?:from\s+\S{1,40}\s+)?to\s+\S{0,1}v?\d",
    re.I,
)
UPGRADE = re.compile(r"^(?:upgrade|update|move|migrate)[sd]? to \S{2,40} v?\d", re.I)  # a framework
GROUP_BUMP = re.compile(r"^(?:\S{1,30}:\s)?bump the (\S{1,60}) group|pre-commit autoupdate", re.I)
SECURITY = re.compile(
    r"\b(?:security|vulnerabilit(?:y|ies)|CVE-\d{4}|xss|csrf|ssrf|injection)\b", re.I
)
PERFORMANCE = re.compile(r"\b(?:perf|performance|faster|speeds? up|sped up|slow quer|n\+1)\b", re.I)
BUG = re.compile(
    r"\b(?:bug(?:fix)?|fix(?:e[sd])?|regression|crash(?:es|ed)?|deadlock|race condition|typeerror|"
    r"keyerror|exception when|no longer (?:crash|fail|raise|break)\w{0,3}|incorrect(?:ly)?)\b",
    re.I,
)
ADDITION = re.compile(
    r"^(?:new\b|first (?:draft|version)|can now\b|now (?:support|accept)s?)"
    r"|\bsupport(?: for .{1,60})?$",
    re.I,
)
DEPRECATION = re.compile(r"\bdeprecat(?:e|es|ed|ing|ion)\b", re.I)
UNUSED = re.compile(
    r"^remov\w{1,3}\b.{0,80}\b(?:unused|unneeded|unnecessary|un-?used|obsolete|dead|redundant"
    r"|leftover|duplicated?|remaining bits|no[- ]longer[- ](?:necessary|needed|used|required)"
    r"|temporary)\b",
    re.I,
)
BEHAVIOUR = re.compile(r"\bbehaviou?rs?\b", re.I)
DROPPED = re.compile(
    r"\bdrop\w{0,4}\b.{1,40}\bsupport\b|\bdrop\w{0,4} support\b|\bremov\w{1,3} support for\b", re.I
)
INTERNAL = re.compile(
    r"\b(?:tests?(?: suite| cases?| coverage)?|ci|github actions?|workflow|mypy|pyright|type hints?"
    r"|typing|type annotations?|ruff|flake8|coverage|linter|linting|pre-commit"
    r"|dev(?:elopment)? (?:server|dependenc\w{1,4})|refactor(?:ed|ing)?|code comments?|docstrings?"
    r"|makefile|justfile|benchmarks?|type warnings?|f-?strings?|unused (?:imports?|code|variables?)"
    r"|dead code|golangci|typeshed|pragma|private imports?|type alias(?:es)?|missing imports?"
    r"|fixme)\b",
    re.I,
)
# About the documentation, although other files changed with it.
DOCUMENTATION = re.compile(r"\b(?:docs|readme)\b(?!\.\w)", re.I)
FILE_KINDS = (("ci", CI_FILE), ("build", MANIFEST_FILE), ("test", TEST_FILE), ("docs", DOC_FILE))


def split_prefix(headline: str) -> tuple[str, str, str, bool]:
    """Split `feat(scope)!: subject` in subject, prefix, scope and the mark of a break."""
    found = CONVENTIONAL.match(headline)
    if found:
        return found[4].strip(), found[1].casefold(), found[2] or "", bool(found[3])
    scoped = SCOPED.match(headline)
    return headline, "", scoped[1] if scoped else "", False


def kind_of(subject: str, prefix: str, files: tuple[str, ...], *, bot: bool) -> str:
    """One word for what a change is; what its files say beats what its verb says."""
    plain = without_suffix(subject)
    bumped = DEPENDENCY.match(plain) or GROUP_BUMP.match(plain)
    if bumped or (bot and prefix in ("chore", "build", "deps")):
        return "dependency"
    if NOISE.match(plain) or not WORD.search(plain):
        return "noise"
    if DROPPED.search(plain):
        return "removal"
    if UPGRADE.match(plain) and not bot:
        return "change"
    return _kind_of_files(files) or _kind_of_prefix(plain, prefix)


def _kind_of_files(files: tuple[str, ...]) -> str:
    """Docs, tests, CI or a version: when nothing else was touched; "" when code was."""
    rest = [path for path in files if not CHANGELOG_FILE.search(path)]
    if not files:
        return ""
    if not rest or all(VERSION_FILE.search(path) for path in rest):
        return "noise"
    for kind, pattern in FILE_KINDS:
        rest = [path for path in rest if not pattern.search(path)]
        if not rest:
            return kind
    return ""


def _kind_of_prefix(plain: str, prefix: str) -> str:
    """The declared kind, made more precise by the words where that is safe."""
    declared = CONVENTIONAL_KINDS.get(prefix)
    if SECURITY.search(plain) and declared in (None, "fix", "feature", "change"):
        return "security"
    spoken = _kind_of_words(plain)
    return spoken if declared is None or spoken in PRECISER.get(declared, ()) else declared


def _kind_of_words(subject: str) -> str:
    """What the verb says, or else a word that gives the kind away."""
    scoped = SCOPED.match(subject)
    rest = subject[scoped.end() :] if scoped else subject
    if PERFORMANCE.search(rest):
        return "performance"
    kind = kind_of_verb(rest.split(" ", 1)[0].strip('.,:;!"`').casefold())
    if kind == "removal" and UNUSED.match(rest):
        return "refactor"
    if kind == "refactor" and BEHAVIOUR.search(rest):
        return "change"
    if DOCUMENTATION.search(rest):
        return "docs"
    if kind in ("feature", "fix") and INTERNAL.search(rest):
        return "test" if re.search(r"\btests?\b", rest, re.I) else "refactor"
    if kind:
        return kind
    if DEPRECATION.search(rest):
        return "deprecation"
    if BUG.search(rest):
        return "fix"
    if INTERNAL.search(rest):
        return "refactor"
    return "feature" if ADDITION.search(rest) else "change"


def kind_of_verb(word: str) -> str:
    """The kind that a first word tells, in whatever form the verb stands; "" for other words."""
    return FIRST_WORDS.get(word) or STEMMED.get(stem(word), "")
