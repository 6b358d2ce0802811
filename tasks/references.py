"""What an event refers to: pull requests, issues, tickets, commits and addresses.

A reference is a key that means the same in every event: `acme/web#12`, `ENG-42`, `@a1b2c3d` for a
commit, `host/path` for an address. The one rule: a bare `#12` gets a repository only from an event
that has one.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from tasks.context import Event
from tasks.lines import FORGE_URL, URL, line, set_of

REFERENCES_MAX = 40  # of one event: a body that names more is a list, not a link
GIT_SOURCES = set_of("github gitlab bitbucket azure_devops git")
# Looks like a ticket key, is a standard, a model or a charset.
NOT_TICKETS = set_of(
    "UTF SHA ISO RFC CVE CWE HTTP TLS SSL AES RSA MD PEP GPT COVID UCS IPV X509 BASE US EN ES ECMA "
    "OAUTH GHSA PYSEC H2 H3 MP4 WIN ARM X86 PY CP RC TOP V"
)
QUALIFIED = re.compile(r"(?<![\w/.-])([\w.-]{1,60}/[\w.-]{1,80})[#!](\d{1,7})\b")
# What a match starts with comes before the look behind it, so that the search can skip to it.
BARE = re.compile(r"(?:#(?<![\w/#&]#)|GH-(?<![\w/#&]GH-))(\d{1,7})\b(?![-\w])")
TICKET = re.compile(r"([A-Z](?<![A-Za-z0-9_-][A-Z])[A-Z0-9]{1,9}-\d{1,6})(?![\w-]|\.\d)")
BRANCH_TICKET = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2,8}-\d{1,6})(?![A-Za-z0-9])")
QUERIED = set_of("graph query explore search discover dashboard alerts logs list new")
SHA = re.compile(r"(?<![\w/#-])(?=[a-f]{0,39}\d)(?=\d{0,39}[a-f])([0-9a-f]{7,40})(?![\w-])")
HEX = re.compile(r"[0-9a-f]{7}")
CLOSES = re.compile(
    r"\b(?:clos(?:e|es|ed|ing)|fix(?:es|ed|ing)?|resolv(?:e|es|ed|ing))\b:?\s{0,3}"
    r"((?:(?:,|and|&)?\s{0,3}(?:https?://\S{1,200}|[\w./-]{0,100}#\d{1,7}"
    r"|[A-Z][A-Z0-9]{1,9}-\d{1,6})){1,8})",
    re.I,
)
PR_SUFFIX = re.compile(r"\s*[(\[]\s?(?:PR\s?|GH-|pull request\s)?[#!](\d{1,7})\s?[)\]]\s*$", re.I)
REFERENCE_SUFFIX = re.compile(
    r"[,;.]?\s*[(\[]?\b(?:refs?|closes?[ds]?|fix(?:es|ed)?|resolve[sd]?|see|related(?: to)?"
    r"|pr)\b:?\s{0,2}#\d{1,7}(?:(?:,|\sand|\s&)?\s{0,2}#\d{1,7}){0,6}[)\]]?\.?\s*$",
    re.I,
)
ANY_SUFFIX = re.compile(r"[,;]?\s*[(\[]\s?(?:#\d{1,7}(?:,\s?)?){1,8}[)\]]\s*\.?$")
# What has addresses of several forms, and the one that stands for all of them. A message of Slack
# stands for its thread.
SAME_PAGE_HOSTS = ("slack.com", "app.asana.com", "notion.so", "notion.com")
SAME_PAGES = {
    re.compile(pattern): one
    for pattern, one in (
        (r"[^/]*/archives/(\w+)/p\d+\?(?:.{0,200}&)?thread_ts=([\d.]+)", r"slack.com/\1/\2"),
        (r"[^/]*/archives/(\w+)/p(\d{10})(\d{6})", r"slack.com/\1/\2.\3"),
        (r"app\.slack\.com/client/\w+/(\w+)/thread/\w+-([\d.]+)", r"slack.com/\1/\2"),
        (r"app\.asana\.com/(?:0/\d+|1/\d+/(?:project/\d+/)?task)/(\d+)", r"app.asana.com/\1"),
        (r"[^/]*notion[^/]*/(?:[^?]{0,300}[/-])?([0-9a-f]{32})\?", r"notion.so/\1"),
    )
}
# A reference as it stands in prose; a pattern to build others from.
KEY = (
    r"(?:[\w./-]{0,80}#\d{1,7}|GH-\d{1,7}|@[\w-]{1,40}"
    rf"|(?!(?:{'|'.join(sorted(NOT_TICKETS))})-)[A-Z][A-Z0-9]{{1,9}}-\d{{1,6}})"
)
KEYS = rf"{KEY}(?:(?:,|\sand|\s&)?\s{{0,2}}{KEY}){{0,8}}"
LEAD = r"(?i:refs?|see(?: also)?|related(?: to)?|part of|clos(?:es?|ed)|fix(?:es|ed)?|resolve[sd]?)"
# What ends a sentence without being part of it: "cc #124", ", see #12 and #13", "(ENG-4)".
TAIL_REFERENCES = re.compile(
    rf"(?:[,;]?\s/?(?i:cc):?\s{{1,2}}|[,;]\s{{1,2}}{LEAD}:?\s{{1,2}}"
    rf"|(?<=[.!?])\s{{1,2}}(?:{LEAD}:?\s{{1,2}})?|\s{{0,2}}[(\[]\s?(?:(?i:cc|pr)\s|{LEAD}:?\s)?)"
    rf"{KEYS}\s?[)\]]?\.?$"
)


def own_of(event: Event, metadata: Mapping[str, object], role: str) -> str:
    """What other events would call this one; "" when they cannot name it."""
    repository = event.resource if event.source in GIT_SOURCES else None
    identity = " ".join((event.external_id or "")[:300].split())
    if re.fullmatch(r"[0-9a-f]{7,64}", identity):
        return f"@{identity[:7]}"
    if event.url and (found := FORGE_URL.match(event.url[:500])):
        return _forge_key(found)
    if role == "chat":
        return ""
    named = [metadata.get(key) for key in ("identifier", "key", "issue_key", "ticket")]
    for text in (*named, identity, event.title[:300] if role == "ticket" else ""):
        if isinstance(text, str) and (ticket := TICKET.search(text[:300])) and _ticket(ticket[1]):
            return ticket[1]
    number = metadata.get("number")
    if type(number) is int and role in ("change", "pull", "ticket"):
        return f"{repository or ''}#{number}".casefold()
    last = re.search(r"#?(\d{1,7})\D{0,20}$", identity)
    if last and repository and role in ("pull", "ticket"):
        return f"{repository}#{last[1]}".casefold()
    return ""


def number_at_end(title: str, role: str) -> str:
    """The number in `Keep the session (#12)`, which is how a squashed pull request ends."""
    found = PR_SUFFIX.search(title) if role in ("change", "pull") else None
    return found[1] if found else ""


def pull_of(event: Event, role: str, own: str, number: str) -> str:
    """The pull request that brought the change: its number, or the event when it is one."""
    if number:
        repository = event.resource if event.source in GIT_SOURCES and event.resource else ""
        return f"{repository}#{number}".casefold()
    return own if "#" in own and role != "ticket" else ""


def mentions(
    event: Event, body: str, own: str, pull: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All that the event refers to, itself first, and the numbers that it cannot resolve."""
    text = "\n".join((event.title[:1_000], body, (event.url or "")[:500]))
    found: dict[str, None] = {own: None, pull: None}
    found.update((_forge_key(match), None) for match in FORGE_URL.finditer(text))
    bare = URL.sub(" ", text) if "://" in text else text
    if "/" in bare and ("#" in bare or "!" in bare):
        found.update((f"{m[1]}#{m[2]}".casefold(), None) for m in QUALIFIED.finditer(bare))
    numbers = [m[1] for m in BARE.finditer(bare)] if "#" in bare or "GH-" in bare else []
    repository = event.resource if event.source in GIT_SOURCES else None
    if repository is not None:
        found.update((f"{repository}#{number}".casefold(), None) for number in numbers)
    found.update((key, None) for m in TICKET.finditer(text) if (key := _ticket(m[1])))
    if HEX.search(bare):  # most texts hold none, and this search costs a fraction of the next
        found.update((f"@{m[1][:7]}", None) for m in SHA.finditer(bare))
    for match in URL.finditer(text) if "://" in text else ():
        if not FORGE_URL.match(match[0].strip("<>")) and (address := address_of(match[0])):
            found[address] = None
    found[commit_of(event)] = None
    found.pop("", None)
    unresolved = dict.fromkeys(f"#{n}" for n in numbers) if repository is None else {}
    return tuple(found)[:REFERENCES_MAX], tuple(unresolved)[:REFERENCES_MAX]


def closes_of(event: Event, body: str, title: str) -> tuple[str, ...]:
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


def commit_of(event: Event) -> str:
    """The commit that a build or a deployment is of, or that a request was merged as; or ""."""
    sha = event.metadata.get("sha") if isinstance(event.metadata, Mapping) else None
    return f"@{sha[:7]}" if isinstance(sha, str) and HEX.match(sha) else ""


def head_branch(event: Event) -> str | None:
    """The branch that a request brings in, merged or not; its name may hold a ticket's key."""
    if not isinstance(event.metadata, Mapping):
        return None
    found = event.metadata.get("merged_branch") or event.metadata.get("head_branch")
    return found if isinstance(found, str) else None


def branch_tickets(branch: str | None) -> list[str]:
    """Keys that a branch name may hold, such as `ada/eng-42-login`; weak until seen elsewhere."""
    found = BRANCH_TICKET.findall((branch or "")[:200])
    return [key for text in found if (key := _ticket(text.upper()))]


def without_suffix(subject: str) -> str:
    """A subject without the references that end it; they are kept apart."""
    for _ in range(3):
        shorter = subject
        for pattern in (PR_SUFFIX, REFERENCE_SUFFIX, ANY_SUFFIX):
            shorter = pattern.sub("", shorter)
        if shorter == subject or not shorter.strip():
            break
        subject = shorter
    return subject.strip().rstrip(".") if not subject.endswith("...") else subject.strip()


def without_tail(sentence: str) -> str:
    """A sentence without the references hung on its end; its events are cited anyway."""
    ends = "@" in sentence or sentence.rstrip(" .)]")[-1:].isdigit()  # costs less than the pattern
    found = TAIL_REFERENCES.search(sentence) if ends else None
    if not found:
        return sentence
    kept = sentence[: found.start()]
    return f"{kept}." if found[0].endswith(".") and not kept.endswith((".", "!", "?")) else kept


def as_written(reference: str, several: bool) -> str:
    """A reference as people write it: the repository only where it is needed."""
    if reference.startswith("@"):
        return reference[1:]
    repository, mark, number = reference.rpartition("#")
    if mark:
        return f"{line(repository, 100) if several else ''}#{number}"
    return line(reference, 100)


def _forge_key(found: re.Match[str]) -> str:
    """The reference that a match of FORGE_URL stands for."""
    return f"{found[1]}#{found[2]}".casefold() if found[2] else f"@{found[3][:7]}"


def _ticket(key: str) -> str:
    """The key, unless it is one of those that only look like a ticket's."""
    prefix = key.rpartition("-")[0]
    return "" if prefix in NOT_TICKETS or prefix == "GH" else key


def address_of(url: str) -> str:
    """A web address as a reference: host and path, when the path is more than a landing page.

    What has addresses of several forms has one reference: a Slack thread, a task, a page.
    """
    url = url.strip("<>").rstrip(".,;:!?").casefold()
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    path = parts.path.rstrip("/")
    if parts.netloc.endswith(SAME_PAGE_HOSTS):
        for pattern in SAME_PAGES:
            if found := pattern.match(f"{parts.netloc}{path}?{parts.query}"):
                return found.expand(SAME_PAGES[pattern])
    # What such a page shows stands behind its path: a graph of anything, a search for anything.
    anything = parts.query and path.rpartition("/")[2] in QUERIED
    if anything or parts.fragment.startswith(("/", "!/")):
        return ""
    return f"{parts.netloc}{path}" if len(path) > 4 else ""
