"""Reading one event: what kind of change it is, what it refers to, and which sentences matter.

Pure, and made for hostile text: every pattern has bounded quantifiers and bodies are cut before
anything looks at them. The one rule: a signal only repeats what its event says.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from tasks.context import Event

LINE_MAX = 240  # characters of one statement: two terminal lines, enough for any real sentence
BODY_MAX = 20_000  # characters of one body that are read; decisions stand near the top
FILES_MAX = 200  # touched paths that are read; beyond that a change is "everywhere"
PARAGRAPHS_MAX = 300  # of one body
REFERENCES_MAX = 40  # of one event: a body that names more is a list, not a link


def _set(listed: str) -> frozenset[str]:
    """Words as a set, so that a table of them reads like a sentence."""
    return frozenset(listed.split())


# --- Cleaning ------------------------------------------------------------------------------

ANSI = re.compile(r"\x1b(?:\[[0-9;?]{0,20}[A-Za-z]|\][^\x07\x1b]{0,200}\x07?)")
# C0 and C1 controls, zero-width and bidirectional controls, lone surrogates, non-characters.
CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffc\ufffe\uffff\ud800-\udfff]"
)
# Only real HTML tags: `/<database>/` in a sentence is not markup.
TAG = re.compile(
    r"</?(?:a|b|i|u|p|em|br|hr|li|ol|ul|td|th|tr|h[1-6]|img|div|pre|sub|sup|svg|kbd|code|span|"
    r"font|table|tbody|thead|style|script|strong|iframe|details|summary|picture|blockquote)"
    r"(?:\s[^<>]{0,400})?/?>",
    re.I,
)
IMAGE = re.compile(r"!\[[^\[\]]{0,200}\]\([^()\s]{0,500}\)")
LINK = re.compile(r"\[([^\[\]]{1,200})\]\([^()\s]{0,500}(?:\s[^()]{0,100})?\)")
SLACK_LINK = re.compile(r"<(?:https?://|mailto:|#)[^<>|\s]{1,500}\|([^<>]{1,200})>")
SLACK_MENTION = re.compile(r"<[@!][^<>\s]{1,80}>,?\s{0,2}")
URL = re.compile(r"<?https?://[^\s<>()\[\]\"'`|]{1,500}>?")
MAIL = re.compile(r"<?\b([A-Za-z0-9._+-]{1,64})@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}>?")
BLOB = re.compile(r"[A-Za-z0-9+/=_-]{80,20000}")  # base64 and minified text, never a word
EMPHASIS = re.compile(
    r"\*\*|~~|(?<!\w)__(?=[A-Za-z][^_]{0,80}__(?!\w))|(?<=\w)__(?!\w)(?=[\s.,:;]|$)"
)
STRUCTURE = re.compile(r"^(?:[>|=~+*_\s-]|#(?!\d)|#(?=#)|\d{1,3}[.)]\s|\[[ xX]?\]\s)+")
LEADING_NUMBER = re.compile(r"^#(\d{1,7})\b")
TAIL = re.compile(r"[\s,;:|\u2014\u2013-]+$")
EMPTY_BRACKETS = re.compile(r"\(\s{0,3}\)|\[\s{0,3}\]")
SHORTCODE = re.compile(r"(?<!\w):[a-z0-9_+-]{2,40}:(?!\w)")  # :tada:

# --- What a subject says -------------------------------------------------------------------

CONVENTIONAL = re.compile(
    r"^(?:[^\w\s]{1,4}\s?)?(feat|feature|fix|bugfix|hotfix|perf|refactor|docs?|tests?|build|ci"
    r"|chore|"
    r"style|revert|security|sec|deps?|i18n|wip|release|deprecate|remove|types?|lint)"
    r"\s?(?:\(([^()]{1,60})\))?(!)?:\s*(.+)$",
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
# `scope: subject`, the habit of Go and kernel projects; a path or a plain lower-case word.
SCOPED = re.compile(r"^([a-z][a-z0-9_./-]{1,30}): (?=\S)")
# The first word of an imperative subject. Past and third person are reduced by `_stem`.
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
NOISE = re.compile(
    r"^(?:\(no (?:message|subject)\)$|"
    r"v?\d+(?:\.\d+){1,3}\S{0,12}$|(?:prepare |bump |new )?(?:version|release)\b.{0,12}\d|"
    r"release notes\b|(?:prepare|prep|cut|tag|start|draft)\b.{0,30}\brelease\b|bump version|"
    r"version bump|back to (?:dev|work)|(?:update|tweak|tidied up|fix|draft|regenerate)d? (?:the )?"
    r"(?:change ?log|release notes)|changelog\b|wip\b|fixup!|squash!|amend!|oops\b|typos?\b|"
    r"(?:.{0,40}\b)?typos?$|fix (?:a |some |the )?(?:typos?|lint|format|formatting|ci|tests?"
    r"|build)\b|"
    r"(?:ran|run|apply|applied) (?:black|ruff|prettier|isort|cog|lint)|lint(?:ing)?$"
    r"|format(?:ting)?$|"
    r"\.$|update(?:d)? \S{1,60}\.(?:md|rst|txt|py|js|ya?ml|toml)$|merge (?:branch|remote"
    r"|upstream|main"
    r"|master|tag|commit)\b|cleanup$|minor$|tweaks?$|initial commit$|trigger ci|empty commit|"
    r"(?:pre-commit|weblate|translations?) (?:auto|update))",
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
BREAKING = re.compile(r"^BREAKING[ -]CHANGES?:?\s{0,3}(.{0,600})", re.M)
UNUSED = re.compile(
    r"^remov\w{1,3}\b.{0,80}\b(?:unused|unneeded|unnecessary|un-?used|obsolete|dead|redundant"
    r"|leftover|duplicated?|"
    r"remaining bits|no[- ]longer[- ](?:necessary|needed|used|required)|temporary)\b",
    re.I,
)
BEHAVIOUR = re.compile(r"\bbehaviou?rs?\b", re.I)
DROPPED = re.compile(
    r"\bdrop\w{0,4}\b.{1,40}\bsupport\b|\bdrop\w{0,4} support\b|\bremov\w{1,3} support for\b", re.I
)
INTERNAL = re.compile(
    r"\b(?:tests?(?: suite| cases?| coverage)?|ci|github actions?|workflow|mypy|pyright"
    r"|type hints?|"
    r"typing|type annotations?|ruff|flake8|coverage|linter|linting|pre-commit|dev(?:elopment)? "
    r"(?:server|dependenc\w{1,4})|refactor(?:ed|ing)?|code comments?|docstrings?|makefile|"
    r"justfile|benchmarks?|type warnings?|f-?strings?|unused (?:imports?|code|variables?)"
    r"|dead code|golangci)\b",
    re.I,
)

MERGE_PR = re.compile(r"^Merge pull request #(\d{1,7}) from (\S{1,200})", re.I)
MERGE_OTHER = re.compile(
    r"^Merged? (?:in (\S{1,200}) \(pull request #(\d{1,7})\)|branch '([^']{1,200})')", re.I
)
MERGE_REQUEST = re.compile(r"See merge request \S{0,200}!(\d{1,7})")
PR_SUFFIX = re.compile(r"\s*[(\[]\s?(?:PR\s?|GH-|pull request\s)?[#!](\d{1,7})\s?[)\]]\s*$", re.I)
REFERENCE_SUFFIX = re.compile(
    r"[,;.]?\s*[(\[]?\b(?:refs?|closes?[ds]?|fix(?:es|ed)?|resolve[sd]?|see|related(?: to)?"
    r"|pr)\b:?\s"
    r"{0,2}#\d{1,7}(?:(?:,|\sand|\s&)?\s{0,2}#\d{1,7}){0,6}[)\]]?\.?\s*$",
    re.I,
)
ANY_SUFFIX = re.compile(r"[,;]?\s*[(\[]\s?(?:#\d{1,7}(?:,\s?)?){1,8}[)\]]\s*\.?$")
PR_BODY = re.compile(r"^PR:? #(\d{1,7})\b", re.M)
REVERT = re.compile(
    r"^(?:Revert(?:ed|s)?[: ]+|(Reapply)[: ]+)[\"\u201c']?(.{1,900}?)[\"\u201d']?$", re.I
)
REVERTED_SHA = re.compile(r"This reverts commit ([0-9a-f]{7,40})")

# --- References ----------------------------------------------------------------------------

FORGE_URL = re.compile(
    r"https?://[\w.-]{1,100}/([\w.-]{1,100}(?:/[\w.-]{1,100}){1,3}?)/(?:-/)?"
    r"(?:(?:issues|pull|pulls|pull-requests|merge_requests|discussions)/(\d{1,7})"
    r"|commits?/([0-9a-f]{7,40}))(?![0-9a-f])"
)
QUALIFIED = re.compile(r"(?<![\w/.-])([\w.-]{1,60}/[\w.-]{1,80})[#!](\d{1,7})\b")
BARE = re.compile(r"(?<![\w/#&])(?:#|GH-)(\d{1,7})\b(?![-\w])")
TICKET = re.compile(r"(?<![A-Za-z0-9_-])([A-Z][A-Z0-9]{1,9}-\d{1,6})(?![\w-]|\.\d)")
BRANCH_TICKET = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2,8}-\d{1,6})(?![A-Za-z0-9])")
SHA = re.compile(r"(?<![\w/#-])(?=[a-f]{0,39}\d)(?=\d{0,39}[a-f])([0-9a-f]{7,40})(?![\w-])")
# Looks like a ticket key, is a standard, a model or a charset.
NOT_TICKETS = _set(
    "UTF SHA ISO RFC CVE CWE HTTP TLS SSL AES RSA MD PEP GPT COVID UCS IPV X509 BASE US EN ES ECMA "
    "OAUTH GHSA PYSEC H2 H3 MP4 WIN ARM X86 PY CP RC TOP V"
)
CLOSES = re.compile(
    r"\b(?:clos(?:e|es|ed|ing)|fix(?:es|ed|ing)?|resolv(?:e|es|ed|ing))\b:?\s{0,3}"
    r"((?:(?:,|and|&)?\s{0,3}(?:https?://\S{1,200}|[\w./-]{0,100}#\d{1,7}"
    r"|[A-Z][A-Z0-9]{1,9}-\d{1,6})){1,8})",
    re.I,
)

# --- Trailers, mails, lists ----------------------------------------------------------------

TRAILER = re.compile(
    r"^(?:co-authored-by|signed-off-by|reviewed-by|acked-by|tested-by|reported-by|suggested-by|"
    r"change-id|cc|git-svn-id|cherry-picked from|\(cherry picked from|see merge request|"
    r"(?:refs?|closes?[ds]?|fix(?:es|ed)?|resolve[sd]?)\b:?\s{0,2}(?:#|https?:|[A-Z]+-\d)|pr:? #\d|"
    r"-{3,}$|={3,}$|\*{3,}$)",
    re.I,
)
COAUTHOR = re.compile(
    r"^co-authored-by:\s{0,3}([^<\n]{1,100}?)\s{0,3}<([^<>\n]{0,200})>", re.I | re.M
)
MAIL_QUOTE = re.compile(
    r"^(?:On .{5,120} wrote:|-{2,} ?(?:Original|Forwarded) Message|From: .{1,200})$", re.I
)
BULLET = re.compile(r"^(?:[-*+\u2022]|\d{1,3}[.)])\s+(?:\[([ xX])\]\s*)?(.*)$")
HEADING = re.compile(r"^(?:#{1,6}\s|\*\*[^*]{1,80}\*\*:?$)")
SENTENCE = re.compile(
    r"(?<=[.!?\u3002\uff01\uff1f])[\"')\]]?\s+(?=[\"'(\[`]?[^\W\d_a-z]|[A-Z])"
    r"|(?<=[\u3002\uff01\uff1f])"
)

# --- Cues ----------------------------------------------------------------------------------
# (label, strength, pattern). A higher strength wins, both for the label and for the rank. What a
# cue looks at is one cleaned sentence.
CUES: list[tuple[str, int, tuple[str, ...]]] = [
    ("decision", 3, (
        r"(?:we|i|team|they)(?:'ve| have)? (?:have )?decided",
        r"decided (?:to|on|against|that|not)", r"decision:", r"approved:",
        r"agreed (?:to|on|that)", r"we agreed", r"consensus(?: is|:)",
        r"(?:is|are) going with", r"we(?:'re| are|'ll| will)? (?:go|going) with", r"^going with",
        r"let's go with", r"settled on", r"opted (?:to|for)", r"we chose", r"chosen approach",
        r"final call",
    )),
    ("decision", 2, (
        r"switch(?:ed|ing|es)? (?:\w+ ){0,4}(?:to|from)", r"in favou?r of",
        r"drop(?:ped|ping|s)? (?:\w+ ){0,2}support", r"migrat(?:e|ed|ing) (?:\w+ ){0,4}(?:to|from)",
        r"we (?:will|won't) (?:keep|use|support|drop|ship|stick)",
    )),
    ("decision", 1, (r"instead of", r"rather than")),
    ("next", 3, (
        r"todo", r"next steps?:", r"next up:", r"next:", r"^next", r"action items?:",
        r"follow[- ]?ups?:", r"^follow[- ]?up", r"still needs? to", r"still (?:missing|to do|open)",
        r"remaining (?:work|tasks?|steps?|items?)", r"^remaining", r"remaining:", r"remains to be",
        r"left to do", r"needs? to be (?:done|finished|reviewed|deployed|migrated)",
        r"blocked (?:by|on)", r"waiting (?:for|on) (?:review|the|a|\w+ to)",
    )),
    ("next", 2, (
        r"follow[- ]?up", r"i'll (?:\w+ ){0,8}(?:tomorrow|later|next|today)",
        r"(?:will|we'll|i'll|to be|do(?:ne)?|fix(?:ed)?|handled?|address(?:ed)?) (?:\w+ ){0,5}"
        r"(?:later|tomorrow|next week|next sprint|in a (?:separate|future|later))",
        r"not yet (?:implemented|supported|done|finished|handled)",
        r"before we (?:can )?(?:ship|release|merge|deploy)",
        r"(?:needs?|have|has) to (?:be )?\w+ (?:\w+ ){0,8}before",
    )),
    ("question", 3, (
        r"open questions?", r"not sure (?:if|whether|how|what|why|about|yet)", r"tbd", r"should we",
        r"needs? to decide", r"to be (?:decided|determined)", r"undecided",
        r"unclear (?:if|whether|how|what|why)",
    )),
    ("risk", 2, (
        r"risk(?:s|y)?", r"data loss", r"outage", r"regression", r"vulnerab\w+", r"deadlocks?",
        r"security (?:issue|hole|fix|advisory)", r"race condition", r"memory leak", r"fragile",
        r"rolled? back", r"will break", r"breaks? (?:existing|backward)",
        r"single point of failure",
    )),
    ("done", 1, (
        r"shipped", r"deployed", r"launched", r"rolled out", r"finished", r"completed", r"released",
        r"merged", r"went live", r"is live", r"migrated", r"(?:is|are) done", r"(?:is|been) fixed",
    )),
]  # fmt: skip
CUE_PATTERNS = [
    (label, strength, re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.I))
    for label, strength, phrases in CUES
]
# A sentence without any of these fragments cannot match a cue; finding them costs far less than
# the patterns, which keeps a thousand long bodies cheap.
STEMS = (
    "decid", "decision", "agree", "consensus", "going with", "go with", "settled", "opted", "chose",
    "final call", "approved:", "switch", "drop", "favour", "favor", "migrat", "instead of",
    "rather than", "we will", "we won't", "todo", "next", "follow", "still ", "remain",
    "left to do",
    "need", "block", "waiting", "later", "tomorrow", "i'll", "separate", "not yet", "before we",
    "before", "action item", "?", "\uff1f", "open question", "not sure", "tbd", "to be de",
    "should we", "unclear",
    "undecided", "risk", "data loss", "outage", "regression",
    "vulnerab", "security", "race cond",
    "deadlock", "memory leak", "roll", "break", "fragile", "single point", "shipped", "deployed",
    "launched", "finished", "completed", "released", "merged", "live", "is done", "are done",
    "fixed",
)  # fmt: skip
HEDGE = re.compile(
    r"\b(?:perhaps|maybe|might|could|would|if (?:we|they|you)|not decided|undecided)\b", re.I
)
SMALL_TALK = re.compile(
    r"^(?:lol|lmao|haha\w{0,6}|\+1|-1|thanks?(?: you)?|thx|ty|ok(?:ay)?|cool|nice|great|yes|yep"
    r"|no|nope|"
    r"sure|same|lgtm|sgtm|ship it|done|congrats|welcome|morning|good morning|hi|hey|hello|bye|brb|"
    r"\W|(?:thanks?|hey|hi|nice|great|good)(?:\s\S{1,20}){0,3})*\W*$",
    re.I,
)
QUESTION_WORDS = re.compile(
    r"\b(?:who|what|when|where|why|how|which|should|could|can|do|does|did|is|are|will|would|has"
    r"|have|any)\b", re.I
)  # fmt: skip

# --- Events --------------------------------------------------------------------------------

BOT = re.compile(
    r"\[bot\]|^(?:dependabot|renovate|pre-commit-ci|github-actions?|greenkeeper|snyk-bot|weblate|"
    r"allcontributors|codecov|mergify|semantic-release-bot|imgbot|web-flow)\b|\bbot$",
    re.I,
)
CHAT_SOURCES = _set(
    "slack discord microsoft_teams gmail microsoft_outlook intercom fireflies zoom google_meet "
    "microsoft_teams_meetings fathom"
)
INCIDENT_SOURCES = _set("sentry pagerduty datadog incident_io grafana new_relic alertmanager")
TRACKERS = _set("linear jira asana clickup monday_com shortcut jira_service_management zendesk")
GIT_SOURCES = _set("github gitlab bitbucket azure_devops git")
OPENING = _set("opened created reopened triggered started new unresolved firing regression")
CLOSING = _set(
    "closed merged resolved done completed fixed cancelled canceled recovered "
    "released shipped wontfix duplicate succeeded"
)
URGENCY = {"urgent": 3, "critical": 3, "blocker": 3, "highest": 3, "p0": 3, "fatal": 3, "1": 3,
           "high": 2, "p1": 2, "error": 2, "major": 2, "2": 2}  # fmt: skip

DOC_FILE = re.compile(
    r"(?:^|/)(?:docs?|documentation)/|\.(?:md|rst|adoc)$|(?:^|/)(?:readme|license|authors)", re.I
)
TEST_FILE = re.compile(
    r"(?:^|/)(?:tests?|spec|__tests__|testdata|fixtures)/|(?:^|/)(?:test_|conftest)|_test\.\w+$"
    r"|\.(?:test|spec)\.\w+$",
    re.I,
)
CI_FILE = re.compile(
    r"^(?:\.github/|\.circleci/|\.ci/|\.gitlab-ci|\.travis|azure-pipelines|\.pre-commit"
    r"|\.gitignore|\.editorconfig|"
    r"tox\.ini|noxfile|Makefile|justfile|scripts/|\.golangci|\.readthedocs|codecov|\.vscode"
    r"|\.devcontainer)", re.I)  # fmt: skip
CHANGELOG_FILE = re.compile(r"(?:^|/)(?:change(?:s|log)|history|news|releases?)(?:\.\w+)?$", re.I)
MANIFEST_FILE = re.compile(
    r"(?:^|/)(?:pyproject\.toml|setup\.(?:py|cfg)|requirements[\w.-]*|package(?:-lock)?\.json"
    r"|yarn\.lock|"
    r"pnpm-lock\.yaml|poetry\.lock|uv\.lock|Pipfile(?:\.lock)?|go\.(?:mod|sum|work|work\.sum)"
    r"|Cargo\.(?:toml|lock)|Gemfile(?:\.lock)?|"
    r"composer\.(?:json|lock)|mix\.(?:exs|lock)|Dockerfile)$", re.I)  # fmt: skip
VERSION_FILE = re.compile(r"(?:^|/)_*version_*\.\w+$", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence of an event that a cue marks as worth repeating."""

    label: str  # decision, question, next, risk, done
    strength: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What one event says, ready to be grouped with others."""

    event: Event
    role: str  # change, pull, ticket, incident, release, chat, other
    state: str  # open, closed or ""
    kind: str  # feature, fix, … or noise
    breaking: str  # what breaks, when the event says so; "" otherwise
    text: str  # the headline: no prefix, no trailing references
    scope: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    own: str  # the reference that names this event itself: acme/web#12, ENG-42, @a1b2c3d
    pull: str  # the pull request that brought this change, when it is known
    references: tuple[str, ...]  # everything it mentions, `own` first
    closes: tuple[str, ...]
    unresolved: tuple[str, ...]  # bare `#12` whose repository the event does not name
    head: str  # the branch a merge brought in
    base: str  # the subject without reverts: the same for a change and what reverts it
    reverts: int  # how many reverts are wrapped around `base`
    reverted_sha: str
    author: str
    coauthors: tuple[str, ...]
    bot: bool
    urgency: int
    why: str  # the first paragraph of a body
    sentences: tuple[Sentence, ...]
    tasks: tuple[tuple[bool, str], ...]  # task-list items: (done, text)


def read(event: Event, *, limit: int = BODY_MAX) -> Signal:
    """Read one event; never fails, whatever the text or the metadata hold."""
    title = cleaned(event.title[:2_000])
    body = (event.content or "")[: min(limit, BODY_MAX)]
    body = CONTROLS.sub("", ANSI.sub("", body)).replace("\r", "\n")
    metadata = event.metadata if isinstance(event.metadata, Mapping) else {}
    role, state = _role(event, metadata)
    headline, merge_pull, head = _headline(title, body, metadata)
    subject, prefix, scope, bang = _prefix(headline)
    files = tuple(path[:300] for path in strings(metadata.get("files"))[:FILES_MAX] if path.strip())
    author, bot = _author(event, metadata)
    kind = _kind(subject, prefix, files, bot=bot) if headline else "noise"
    paragraphs, tasks = _paragraphs(body)
    broken = BREAKING.search(body)
    breaking = line(broken[1].split("\n")[0]) or subject if broken else subject if bang else ""
    own, pull, references, unresolved = _references(event, metadata, title, body, merge_pull, role)
    base, reverts = _unwrapped(headline)
    sha = REVERTED_SHA.search(body)
    return Signal(
        event=event, role=role, state=state, kind=kind, breaking=breaking,
        text=line(_without_suffix(subject)), scope=line(scope)[:60],
        labels=tuple(line(label)[:60] for label in strings(metadata.get("labels"))[:20]),
        files=files, own=own, pull=pull, references=references,
        closes=_closes(event, body, title), unresolved=unresolved, head=head, base=base,
        reverts=reverts, reverted_sha=sha[1][:7] if sha else "", author=author,
        coauthors=tuple(m[1].strip() for m in COAUTHOR.finditer(body) if not BOT.search(m[1])),
        bot=bot, urgency=URGENCY.get(str(event.priority or "").strip().casefold(), 0),
        why=_why(paragraphs), sentences=_sentences(subject, paragraphs, role, kind),
        tasks=tuple((done, text) for done, item in tasks[:40] if (text := line(item))),
    )  # fmt: skip


def cleaned(text: str) -> str:
    """Text without controls, markup, addresses and blobs, on one line."""
    if not text.isprintable():
        text = CONTROLS.sub(" ", ANSI.sub("", text))
    if "<" in text:
        text = SLACK_MENTION.sub("", SLACK_LINK.sub(r"\1", TAG.sub("", _uncommented(text))))
    if "](" in text:
        text = LINK.sub(r"\1", IMAGE.sub("", text))
    if "://" in text:
        text = URL.sub(lambda found: _short_url(found[0]), text)
    if "@" in text:
        text = MAIL.sub(r"\1", text)
    if len(text) > 80:
        text = BLOB.sub("", text)
    if "**" in text or "__" in text or "~~" in text:
        text = EMPHASIS.sub("", text)
    if ":" in text:
        text = SHORTCODE.sub("", text)
    if "(" in text or "[" in text:
        text = EMPTY_BRACKETS.sub("", text)
    return " ".join(text.split())


def _uncommented(text: str) -> str:
    """Text without HTML comments; an open one hides the rest, as it does in a browser."""
    kept, rest = [], text
    while rest:
        before, opened, rest = rest.partition("<!--")
        kept.append(before)
        if opened:
            rest = rest.partition("-->")[2]
    return "".join(kept)


def line(text: str, limit: int = LINE_MAX) -> str:
    """One line of plain text that cannot be mistaken for Markdown structure, cut at a word."""
    text = _started(_balanced(cleaned(text)))
    if len(text) > limit:
        kept = text[: limit - 1]
        head, space, _ = kept.rpartition(" ")
        text = TAIL.sub("", head if space and len(head) > limit // 2 else kept) + "\u2026"
        text = _started(_balanced(text))  # the cut may have split a code span
    return text.strip()


def _balanced(text: str) -> str:
    return text.replace("`", "") if text.count("`") % 2 else text


def _started(text: str) -> str:
    """Text without the marks of a heading, list or quote in front."""
    if not text or text[0].isalpha():
        return text
    return LEADING_NUMBER.sub(r"(#\1)", STRUCTURE.sub("", text.lstrip()))


def words(text: str) -> frozenset[str]:
    """The words that carry meaning, reduced to stems, for comparing two texts."""
    found = WORD.findall(text[:600].casefold().replace("'", ""))
    return frozenset(_stem(word) for word in found if word not in STOP_WORDS)


def sentences_of(text: str) -> list[str]:
    """Split prose in sentences; also for scripts that put no space after a full stop."""
    return [part.strip() for part in SENTENCE.split(text) if part and part.strip()]


def strings(value: object) -> list[str]:
    """The non-empty strings of a JSON value that should be a list of them, names included."""
    found = []
    for item in value if isinstance(value, list | tuple) else ():
        if isinstance(item, Mapping):
            item = item.get("name") or item.get("filename") or item.get("path")
        if isinstance(item, str) and item.strip():
            found.append(CONTROLS.sub("", item))
    return found


# Single letters say nothing; a single digit or ideograph does.
WORD = re.compile(r"[^\W_]{2,40}(?:[._][^\W_]{1,40}){0,4}|\d|[\u3040-\u9fff]")
STOP_WORDS = _set(
    "the and for with from into that this when was were are is be to of in on by as at an or it "
    "if so we our you your has have had can now also only more use uses used using via per all any "
    "after before than then there their them they will would should which while where"
)


def _stem(word: str) -> str:
    for suffix in ("ing", "ed", "es", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def _short_url(url: str) -> str:
    """A forge address becomes its reference, anything else its host."""
    url = url.strip("<>")
    found = FORGE_URL.match(url)
    if found and found[2]:
        return f"{found[1]}#{found[2]}"
    if found:
        return found[3][:7]
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


# --- Event -> role, author -----------------------------------------------------------------


def _role(event: Event, metadata: Mapping[str, object]) -> tuple[str, str]:
    """What the event is about and whether it leaves something open."""
    spoken = set(re.split(r"[\W_]+", event.event_type[:200].casefold()))
    status = metadata.get("state") or metadata.get("status")
    if isinstance(status, str):
        spoken.add(status[:40].strip().casefold().replace(" ", "_"))
    if metadata.get("merged") is True:
        spoken.add("merged")
    closed, opened = bool(spoken & CLOSING), bool(spoken & OPENING)
    state = "closed" if closed else "open" if opened or isinstance(status, str) else ""
    if spoken & {"tag", "release", "tagged", "released"}:
        return "release", ""
    if spoken & {
        "comment",
        "commented",
        "review",
        "reviewed",
        "message",
        "reply",
        "thread",
        "discussion",
    }:
        return "chat", ""
    if spoken & {"incident", "alert"} or event.source in INCIDENT_SOURCES:
        return "incident", state or "open"
    if spoken & {"pull", "pr", "mr"} or {"merge", "request"} <= spoken:
        return ("change", "closed") if "merged" in spoken else ("pull", state)
    if spoken & {"commit", "commits", "push", "merge", "merged"}:
        return "change", ""
    if (
        spoken & {"issue", "ticket", "task", "bug", "story", "card", "epic"}
        or event.source in TRACKERS
    ):
        return "ticket", state
    if event.source in CHAT_SOURCES:
        return "chat", ""
    return "other", state


def _author(event: Event, metadata: Mapping[str, object]) -> tuple[str, bool]:
    raw = CONTROLS.sub("", event.author or "").strip()
    name = " ".join(raw.split())[:120]
    bot = bool(BOT.search(name)) or metadata.get("bot") is True or metadata.get("is_bot") is True
    return name, bot


# --- Event -> headline, kind ---------------------------------------------------------------


def _headline(title: str, body: str, metadata: Mapping[str, object]) -> tuple[str, str, str]:
    """The words that name the change, the pull request number and the branch of a merge.

    An importer may have read them already; then the title is the request's own.
    """
    head = metadata.get("merged_branch")
    for key in ("pull_request", "merge_request"):
        number = metadata.get(key)
        if isinstance(number, int) and not isinstance(number, bool) and not MERGE_PR.match(title):
            return (
                title,
                str(number),
                head[:200].partition("/")[2] or head[:200] if isinstance(head, str) else "",
            )
    return _merged_headline(title, body)


def _merged_headline(title: str, body: str) -> tuple[str, str, str]:
    """The same, from the message that a forge or git wrote."""
    found = MERGE_PR.match(title)
    if found:
        number, head = found[1], found[2].partition("/")[2] or found[2]
    elif found := MERGE_OTHER.match(title):
        request = MERGE_REQUEST.search(body)
        number, head = found[2] or (request[1] if request else ""), found[1] or found[3]
        if not number and "main" in (found[3] or ""):
            return "", "", ""
    else:
        named = PR_BODY.search(body)
        return title, named[1] if named else "", ""
    first = next((text for text in body.split("\n") if text.strip()), "")
    first = "" if TRAILER.match(first.strip()) else cleaned(first[:2_000])
    return first, number, head


def _prefix(headline: str) -> tuple[str, str, str, bool]:
    """Split `feat(scope)!: subject` in subject, prefix, scope and the mark of a break."""
    found = CONVENTIONAL.match(headline)
    if found:
        return found[4].strip(), found[1].casefold(), found[2] or "", bool(found[3])
    scoped = SCOPED.match(headline)
    return headline, "", scoped[1] if scoped else "", False


def _kind(subject: str, prefix: str, files: tuple[str, ...], *, bot: bool) -> str:
    """One word for what a change is; what its files say beats what its verb says."""
    plain = _without_suffix(subject)
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


def _kind_of_prefix(plain: str, prefix: str) -> str:
    """The declared kind, made more precise by the words where that is safe."""
    declared = CONVENTIONAL_KINDS.get(prefix)
    if SECURITY.search(plain) and declared in (None, "fix", "feature", "change"):
        return "security"
    if declared in ("fix", "feature", "chore", "refactor", None):
        spoken = _kind_of_words(plain)
        if declared is None:
            return spoken
        if declared == "chore":
            return spoken if spoken in ("removal", "deprecation") else "chore"
        if declared == "feature" and spoken in ("removal", "deprecation", "performance"):
            return spoken
    return declared or "change"


def _kind_of_files(files: tuple[str, ...]) -> str:
    """Docs, tests, CI or a version: when nothing else was touched; "" when code was."""
    rest = [path for path in files if not CHANGELOG_FILE.search(path)]
    if not files:
        return ""
    if not rest or all(VERSION_FILE.search(path) for path in rest):
        return "noise"
    for kind, pattern in (
        ("ci", CI_FILE),
        ("build", MANIFEST_FILE),
        ("test", TEST_FILE),
        ("docs", DOC_FILE),
    ):
        rest = [path for path in rest if not pattern.search(path)]
        if not rest:
            return kind
    return ""


def _kind_of_words(subject: str) -> str:
    scoped = SCOPED.match(subject)
    rest = subject[scoped.end() :] if scoped else subject
    if PERFORMANCE.search(rest):
        return "performance"
    first = rest.split(" ", 1)[0].strip('.,:;!"`').casefold()
    kind = FIRST_WORDS.get(first) or _STEMMED.get(_stem(first), "")
    if kind == "removal" and UNUSED.match(rest):
        return "refactor"
    if kind == "refactor" and BEHAVIOUR.search(rest):
        return "change"
    if kind in ("feature", "change", "fix") and INTERNAL.search(rest):
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


_STEMMED = {_stem(word): kind for word, kind in FIRST_WORDS.items()}


def _without_suffix(subject: str) -> str:
    """A subject without the references that end it; they are kept apart."""
    for _ in range(3):
        shorter = subject
        for pattern in (PR_SUFFIX, REFERENCE_SUFFIX, ANY_SUFFIX):
            shorter = pattern.sub("", shorter)
        if shorter == subject or not shorter.strip():
            break
        subject = shorter
    return subject.strip().rstrip(".") if not subject.endswith("...") else subject.strip()


def _unwrapped(headline: str) -> tuple[str, int]:
    """The innermost subject and how many reverts stand around it; a reapply adds none."""
    text, depth = headline, 0
    for _ in range(6):
        text = _without_suffix(text)
        found = REVERT.match(text)
        if not found:
            break
        depth += 0 if found[1] else 1
        text = found[2]
    return " ".join(_without_suffix(text).split()), depth


# --- Event -> references -------------------------------------------------------------------


def _references(
    event: Event, metadata: Mapping[str, object], title: str, body: str, merge_pull: str, role: str
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """The event's own name, its pull request, all it mentions, and what it cannot resolve."""
    repository = event.resource if event.source in GIT_SOURCES else None
    number = merge_pull
    suffix = PR_SUFFIX.search(title)
    if not number and suffix and role in ("change", "pull"):
        number = suffix[1]
    own = _own(event, metadata, role, repository)
    pull = (
        f"{repository or ''}#{number}".casefold()
        if number
        else own
        if "#" in own and role != "ticket"
        else ""
    )
    text = "\n".join((event.title[:1_000], body[:BODY_MAX], (event.url or "")[:500]))
    found: dict[str, None] = {own: None, pull: None}
    for match in FORGE_URL.finditer(text):
        found[f"{match[1]}#{match[2]}".casefold() if match[2] else f"@{match[3][:7]}"] = None
    bare = URL.sub(" ", text) if "://" in text else text
    if "#" in bare or "!" in bare:
        found.update((f"{m[1]}#{m[2]}".casefold(), None) for m in QUALIFIED.finditer(bare))
    numbers = [m[1] for m in BARE.finditer(bare)] if "#" in bare or "GH-" in bare else []
    if repository is not None:
        found.update((f"{repository}#{number}".casefold(), None) for number in numbers)
    found.update((key, None) for m in TICKET.finditer(text) if (key := _ticket(m[1])))
    found.update((f"@{m[1][:7]}", None) for m in SHA.finditer(bare))
    for match in URL.finditer(text) if "://" in text else ():
        if not FORGE_URL.match(match[0].strip("<>")) and (address := _address(match[0])):
            found[address] = None
    found.pop("", None)
    unresolved = tuple(dict.fromkeys(f"#{n}" for n in numbers)) if repository is None else ()
    return own, pull, tuple(found)[:REFERENCES_MAX], unresolved[:REFERENCES_MAX]


def _own(event: Event, metadata: Mapping[str, object], role: str, repository: str | None) -> str:
    """What other events would call this one."""
    identity = " ".join((event.external_id or "")[:300].split())
    if re.fullmatch(r"[0-9a-f]{7,64}", identity):
        return f"@{identity[:7]}"
    if event.url and (found := FORGE_URL.match(event.url[:500])):
        return f"{found[1]}#{found[2]}".casefold() if found[2] else f"@{found[3][:7]}"
    if role == "chat":
        return ""
    named = [metadata.get(key) for key in ("identifier", "key", "issue_key", "ticket")]
    for text in (*named, identity, event.title[:300] if role == "ticket" else ""):
        if isinstance(text, str) and (ticket := TICKET.search(text[:300])) and _ticket(ticket[1]):
            return ticket[1]
    number = metadata.get("number")
    if (
        isinstance(number, int)
        and not isinstance(number, bool)
        and role in ("change", "pull", "ticket")
    ):
        return f"{repository or ''}#{number}".casefold()
    if (
        role in ("pull", "ticket")
        and repository
        and (m := re.search(r"#?(\d{1,7})\D{0,20}$", identity))
    ):
        return f"{repository}#{m[1]}".casefold()
    return ""


def _ticket(key: str) -> str:
    prefix = key.rpartition("-")[0]
    return "" if prefix in NOT_TICKETS or prefix == "GH" else key


def branch_tickets(branch: str | None) -> list[str]:
    """Keys that a branch name may hold, such as `ada/eng-42-login`; weak until seen elsewhere."""
    found = BRANCH_TICKET.findall((branch or "")[:200])
    return [key for text in found if (key := _ticket(text.upper()))]


def _address(url: str) -> str:
    """A web address as a reference: host and path, when the path is more than a landing page."""
    try:
        parts = urlsplit(url.strip("<>").rstrip(".,;:!?"))
    except ValueError:
        return ""
    path = parts.path.rstrip("/")
    return f"{parts.netloc}{path}".casefold() if len(path) > 4 else ""


def _closes(event: Event, body: str, title: str) -> tuple[str, ...]:
    """References that the event says it closes."""
    repository = event.resource if event.source in GIT_SOURCES and event.resource else ""
    found: dict[str, None] = {}
    for match in CLOSES.finditer(f"{title}\n{body[:4_000]}"):
        for url in FORGE_URL.finditer(match[1]):
            found[f"{url[1]}#{url[2]}".casefold()] = None
        rest = URL.sub(" ", match[1])
        found.update((f"{m[1]}#{m[2]}".casefold(), None) for m in QUALIFIED.finditer(rest))
        found.update((f"{repository}#{m[1]}".casefold(), None) for m in BARE.finditer(rest))
        found.update((key, None) for m in TICKET.finditer(rest) if (key := _ticket(m[1])))
    return tuple(found)[:REFERENCES_MAX]


# --- Body -> sentences ---------------------------------------------------------------------


def _paragraphs(body: str) -> tuple[list[str], list[tuple[bool, str]]]:
    """Prose of a body, one entry per paragraph or list item, and its task-list items.

    Left out: code, quotes, tables, headings, trailers and everything below a quoted mail.
    """
    paragraphs: list[str] = []
    tasks: list[tuple[bool, str]] = []
    current: list[str] = []
    fenced = False
    if "<!--" in body:
        body = _uncommented(body)
    for raw in body.split("\n"):
        text = raw.strip()
        fence = text.startswith(("```", "~~~"))
        fenced ^= fence
        bullet = BULLET.match(text[:2_000]) if text[:1] and not text[0].isalpha() else None
        code = raw.startswith(("    ", "\t")) and not bullet and not current
        skipped = not text or fence or fenced or code or text[0] in ">|" or HEADING.match(text)
        if skipped or bullet or TRAILER.match(text):
            if current:
                paragraphs.append(" ".join(current))
                current = []
            if bullet and not (skipped or fenced):
                if bullet[1]:
                    tasks.append((bullet[1] in "xX", bullet[2]))
                else:
                    current = [bullet[2]]
            continue
        if MAIL_QUOTE.match(text) or len(paragraphs) >= PARAGRAPHS_MAX:
            break
        current.append(text)
    if current:
        paragraphs.append(" ".join(current))
    return paragraphs, tasks


def _why(paragraphs: list[str]) -> str:
    """The first paragraph, when it is a sentence and not a list of commit subjects."""
    prose = [text for text in paragraphs[:4] if not BREAKING.match(text)]
    text = line(prose[0][:1_000]) if prose else ""
    return (
        text if len(text.split()) >= 5 or any(ord(letter) > 0x2E80 for letter in text[:5]) else ""
    )


def _sentences(subject: str, paragraphs: list[str], role: str, kind: str) -> tuple[Sentence, ...]:
    """The sentences of title and body that a cue marks, each under its strongest label."""
    found: dict[str, Sentence] = {}
    if kind in ("noise", "dependency") and role == "change":
        return ()
    if role not in ("ticket", "incident") or subject.endswith("?"):
        _judge(_without_suffix(subject), role, found, title=True)
    for paragraph in paragraphs:
        lowered = paragraph.casefold()
        if not any(stem in lowered for stem in STEMS):
            continue
        for text in sentences_of(paragraph):
            _judge(text, role, found, title=False)
    return tuple(found.values())


def _judge(raw: str, role: str, found: dict[str, Sentence], *, title: bool) -> None:
    """Add the sentence under the label of its strongest cue, if it has one."""
    lowered = raw[:1_000].casefold()
    if not any(stem in lowered for stem in STEMS):
        return
    text = line(raw[:1_000])
    if len(text) < 8 or text in found or (role == "chat" and SMALL_TALK.match(text[:120])):
        return
    question = text.endswith(("?", "\uff1f"))
    best: tuple[int, str] | None = None
    for label, strength, pattern in CUE_PATTERNS:
        if pattern.search(text) and (best is None or strength > best[0]):
            if strength == 1 and not _weak_cue_counts(label, text, role, title=title):
                continue
            if label == "risk" and role == "change" and title:
                continue  # "Fix a race condition" is a fix, not a risk
            if label == "decision" and HEDGE.search(text):
                continue
            best = (strength, label)
    if question:
        best = _question(text, role)
    if best:
        found[text] = Sentence(label=best[1], strength=best[0], text=text)


def _question(text: str, role: str) -> tuple[int, str] | None:
    """A real question, not a tag at the end of a remark and not one that code asks itself."""
    asked = (
        len(text.split()) >= 4 and QUESTION_WORDS.search(text) or any(ord(c) > 0x2E80 for c in text)
    )
    if not asked or (role == "change" and "`" not in text and len(text.split()) < 5):
        return None
    direct = re.search(r"\b(?:should we|do we|who|open question)\b", text, re.I)
    return 3 if direct else 2, "question"


def _weak_cue_counts(label: str, text: str, role: str, *, title: bool) -> bool:
    """Whether it does: "instead of" decides in talk and in titles, but rarely in a body."""
    if label == "done":
        return role in ("chat", "other")
    if role in ("chat", "ticket"):
        return bool(re.search(r"\b(?:we|let's|i)\b", text, re.I))
    return title and bool(
        re.match(r"(?:use|move|store|replace|switch|keep|make|run|rely|build)", text, re.I)
    )
