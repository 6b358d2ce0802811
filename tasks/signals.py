"""Reading one event: what it is about, what it says, and how other events call it.

Pure, and made for hostile text: bodies are cut before anything looks at them. The one rule: a
signal only repeats what its event says.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tasks.context import Event
from tasks.cues import TRAILER, Sentence, marked, paragraphs_of
from tasks.kinds import kind_of, split_prefix
from tasks.lines import ANSI, CONTROLS, cleaned, line, set_of, strings
from tasks.references import (
    address_of,
    closes_of,
    mentions,
    number_at_end,
    own_of,
    pull_of,
    without_suffix,
)

BODY_MAX = 20_000  # characters of one body that are read; decisions stand near the top
FILES_MAX = 200  # touched paths that are read; beyond that a change is "everywhere"
MERGE_PR = re.compile(r"^Merge pull request #(\d{1,7}) from (\S{1,200})", re.I)
MERGE_OTHER = re.compile(
    r"^Merged? (?:in (\S{1,200}) \(pull request #(\d{1,7})\)|branch '([^']{1,200})')", re.I
)
MERGE_REQUEST = re.compile(r"See merge request \S{0,200}!(\d{1,7})")
PR_BODY = re.compile(r"^PR:? #(\d{1,7})\b", re.M)
REVERT = re.compile(
    r"^(?:Revert(?:ed|s)?[: ]+|(Reapply)[: ]+)[\"\u201c']?(.{1,900}?)[\"\u201d']?$", re.I
)
REVERTED_SHA = re.compile(r"This reverts commit ([0-9a-f]{7,40})")
BREAKING = re.compile(r"^BREAKING[ -]CHANGES?:?\s{0,3}(.{0,600})", re.M)
COAUTHOR = re.compile(
    r"^co-authored-by:\s{0,3}([^<\n]{1,100}?)\s{0,3}<([^<>\n]{0,200})>", re.I | re.M
)
BOT = re.compile(
    r"\[bot\]|^(?:dependabot|renovate|pre-commit-ci|github-actions?|greenkeeper|snyk-bot|weblate|"
    r"allcontributors|codecov|mergify|semantic-release-bot|imgbot|web-flow)\b|\bbot$",
    re.I,
)
# A person or a program as Slack, Discord, Notion and Asana count them, who has no name here.
ACCOUNT = re.compile(r"[UWB][A-Z0-9]{8,11}|\d{15,20}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CHAT_SOURCES = set_of(
    "slack discord microsoft_teams gmail microsoft_outlook intercom fireflies zoom google_meet "
    "microsoft_teams_meetings fathom"
)
INCIDENT_SOURCES = set_of("sentry pagerduty datadog incident_io grafana new_relic alertmanager")
TRACKERS = set_of("linear jira asana clickup monday_com shortcut jira_service_management zendesk")
OPENING = set_of("opened created reopened triggered started new unresolved firing regression")
CLOSING = set_of(
    "closed merged resolved done completed fixed cancelled canceled recovered "
    "released shipped wontfix duplicate succeeded archived"
)
TALKING = set_of("comment commented review reviewed message reply thread discussion")
ASKING = set_of("requested ready")  # a review, which is then still to come
TICKETS = set_of("issue ticket task bug story card epic")
# What tools for incidents tell that is none: work left behind, and how they are set up.
BESIDE = set_of("task service postmortem")
# What trackers tell that is no ticket, and so is neither left open nor done.
PLANS = set_of("project cycle sprint version document initiative milestone portfolio goal form")
URGENCY = {"urgent": 3, "critical": 3, "blocker": 3, "highest": 3, "p0": 3, "fatal": 3, "1": 3,
           "high": 2, "p1": 2, "error": 2, "major": 2, "2": 2}  # fmt: skip


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
    address: str  # where it can be opened, as others refer to it; ""
    thing: str  # what it is an event of: a request, a ticket, an incident, a conversation
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
    role, state = role_of(event, metadata)
    headline, merge_pull, head = _headline(title, body, metadata)
    subject, prefix, scope, bang = split_prefix(headline)
    files = tuple(path[:300] for path in strings(metadata.get("files"))[:FILES_MAX] if path.strip())
    author, bot = _author(event, metadata)
    kind = kind_of(subject, prefix, files, bot=bot) if headline else "noise"
    paragraphs, tasks = paragraphs_of(body)
    broken = BREAKING.search(body)
    breaking = line(broken[1].split("\n")[0]) or subject if broken else subject if bang else ""
    own = own_of(event, metadata, role)
    pull = pull_of(event, role, own, merge_pull or number_at_end(title, role))
    address = address_of((event.url or "")[:500])
    references, unresolved = mentions(event, body, own, pull)
    base, reverts = _unwrapped(headline)
    sha = REVERTED_SHA.search(body)
    return Signal(
        event=event, role=role, state=state, kind=kind, breaking=breaking,
        text=line(without_suffix(subject)), scope=line(scope)[:60],
        labels=tuple(line(label)[:60] for label in strings(metadata.get("labels"))[:20]),
        files=files, own=own, pull=pull, address=address,
        thing=_thing(event, metadata, own, address), references=references,
        closes=closes_of(event, body, title), unresolved=unresolved, head=head, base=base,
        reverts=reverts, reverted_sha=sha[1][:7] if sha else "", author=author,
        coauthors=tuple(m[1].strip() for m in COAUTHOR.finditer(body) if not BOT.search(m[1])),
        bot=bot, urgency=URGENCY.get(str(event.priority or "").strip().casefold(), 0),
        why=_why(paragraphs), sentences=marked(subject, paragraphs, role, kind),
        tasks=tuple((done, text) for done, item in tasks[:40] if (text := line(item))),
    )  # fmt: skip


def role_of(event: Event, metadata: Mapping[str, object]) -> tuple[str, str]:
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
    if spoken & TALKING and not spoken & ASKING:
        return "chat", ""
    watched = event.source in INCIDENT_SOURCES and not spoken & BESIDE
    if spoken & {"incident", "alert"} or watched:
        return "incident", state or "open"
    if spoken & {"pull", "pr", "mr"} or {"merge", "request"} <= spoken:
        return ("change", "closed") if "merged" in spoken else ("pull", state)
    if spoken & {"commit", "commits", "push", "merge", "merged"}:
        return "change", ""
    if spoken & TICKETS or (event.source in TRACKERS and not spoken & PLANS):
        return "ticket", state
    if event.source in CHAT_SOURCES:
        return "chat", ""
    return "other", state


def _thing(event: Event, metadata: Mapping[str, object], own: str, address: str) -> str:
    """What other events are of as well: its own reference, a thread, an address; else the event."""
    thread = metadata.get("thread")
    told = f"{event.source} {thread[:300]}" if isinstance(thread, str) and thread else ""
    return own or told or address or event.id


def _author(event: Event, metadata: Mapping[str, object]) -> tuple[str, bool]:
    """Who did it, as written, and whether that is a program."""
    raw = CONTROLS.sub("", event.author or "").strip()
    name = " ".join(raw.split())[:120]
    if name.casefold().replace(" ", "_") == event.source or ACCOUNT.fullmatch(name):
        name = ""  # an importer that knew no better
    bot = bool(BOT.search(name)) or metadata.get("bot") is True or metadata.get("is_bot") is True
    return name, bot


def _headline(title: str, body: str, metadata: Mapping[str, object]) -> tuple[str, str, str]:
    """The words that name the change, the pull request number and the branch of a merge.

    An importer may have read them already; then the title is the request's own.
    """
    head = metadata.get("merged_branch")
    for key in ("pull_request", "merge_request"):
        number = metadata.get(key)
        if type(number) is int and not MERGE_PR.match(title):
            return title, str(number), _branch(head[:200]) if isinstance(head, str) else ""
    return _merged_headline(title, body)


def _merged_headline(title: str, body: str) -> tuple[str, str, str]:
    """The same, from the message that a forge or git wrote."""
    found = MERGE_PR.match(title)
    if found:
        number, head = found[1], _branch(found[2])
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


def _branch(head: str) -> str:
    """`login` of `ada/login`: the branch without the fork that it is in."""
    return head.partition("/")[2] or head


def _unwrapped(headline: str) -> tuple[str, int]:
    """The innermost subject and how many reverts stand around it; a reapply adds none."""
    text, depth = headline, 0
    for _ in range(6):
        text = without_suffix(text)
        found = REVERT.match(text)
        if not found:
            break
        depth += 0 if found[1] else 1
        text = found[2]
    return " ".join(without_suffix(text).split()), depth


def _why(paragraphs: list[str]) -> str:
    """The first paragraph, when it is a sentence and not a list of commit subjects."""
    prose = [text for text in paragraphs[:4] if not BREAKING.match(text)]
    text = line(prose[0][:1_000]) if prose else ""
    told = len(text.split()) >= 5 or any(ord(letter) > 0x2E80 for letter in text[:5])
    return text if told else ""
