"""Which sentences of an event matter: decisions, questions, next steps, risks.

A cue is a phrase that people use when they mean it, such as "we decided to". The one rule: code,
quotes, tables, headings and quoted mails say nothing.
"""

import re
from dataclasses import dataclass

from tasks.lines import line, sentences_of, uncommented
from tasks.references import KEY, KEYS, without_suffix, without_tail

PARAGRAPHS_MAX = 300  # of one body
TRAILER = re.compile(
    r"^(?:co-authored-by|signed-off-by|reviewed-by|acked-by|tested-by|reported-by|suggested-by|"
    r"change-id|cc|git-svn-id|cherry-picked from|\(cherry picked from|see merge request|"
    r"(?:refs?|closes?[ds]?|fix(?:es|ed)?|resolve[sd]?)\b:?\s{0,2}(?:#|https?:|[A-Z]+-\d)|pr:? #\d|"
    r"-{3,}$|={3,}$|\*{3,}$)",
    re.I,
)
# A trailer that goes on: "Closes #12. We decided to keep it."
LED = re.compile(
    rf"^(?:refs?|closes?[ds]?|fix(?:es|ed)?|resolve[sd]?)\b:?\s{{0,2}}(?:{KEYS}|https?://\S{{1,300}})"
    r"\.\s+(?=\S)",
    re.I,
)
MAIL_QUOTE = re.compile(
    r"^(?:On .{5,120} wrote:|-{2,} ?(?:Original|Forwarded) Message|From: .{1,200})$", re.I
)
BULLET = re.compile(r"^(?:[-*+\u2022]|\d{1,3}[.)])\s+(?:\[([ xX])\]\s*)?(.*)$")
HEADING = re.compile(r"^(?:#{1,6}\s|\*\*[^*]{1,80}\*\*:?$)")
# (label, strength, pattern). A higher strength wins, both for the label and for the rank. What a
# cue looks at is one cleaned sentence.
CUES: list[tuple[str, int, tuple[str, ...]]] = [
    ("decision", 3, (
        r"(?:we|i|team|they)(?:'ve| have)? (?:have )?decided",
        r"decided (?:to|on|against|that|not)", r"decision:", r"decided:", r"approved:",
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
        r"todo", r"next steps?:", r"next up:", r"next:", r"^next", r"action(?: items?)?:",
        r"follow[- ]?ups?:", r"^follow[- ]?up", r"still needs? to", r"still (?:missing|to do|open)",
        r"remaining (?:work|tasks?|steps?|items?)", r"^remaining", r"remaining:", r"remains to be",
        r"left to do", r"needs? to be (?:done|finished|reviewed|deployed|migrated)",
        r"blocked (?:by|on)", r"waiting (?:for|on) (?:review|the|a|\w+ to)",
    )),
    ("next", 2, (
        r"@[\w.-]{1,40}[,:]? (?:(?:can|could|would) you )?(?:please|pls)",
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
    "rather than", "we will", "we won't", "todo", "next", "follow", "still ", "remain", "need",
    "left to do", "block", "waiting", "later", "tomorrow", "i'll", "separate", "not yet", "before",
    "action:", "action item", "please", "pls", "?", "\uff1f", "open question", "not sure", "tbd",
    "to be de", "should we", "unclear", "risk", "data loss", "outage", "regression", "vulnerab",
    "security", "race cond", "deadlock", "memory leak", "roll", "break", "fragile", "single point",
    "shipped", "deployed", "launched", "finished", "completed", "released", "merged", "live",
    "is done", "are done", "fixed",
)  # fmt: skip
# A guess is no decision. Behind "we decided to" such a word belongs to what was decided.
HEDGE = re.compile(
    r"\b(?:perhaps|maybe|might|could|would|if (?:we|they|you)|undecided)\b"
    r"|(?:\bnot|n't|\bnever)(?: yet| been| really){0,2} (?:decided|agreed|settled)\b",
    re.I,
)
EXPLICIT = 3  # the strength of a cue that nobody uses by chance
SMALL_TALK = re.compile(
    r"^(?:lol|lmao|haha\w{0,6}|\+1|-1|thanks?(?: you)?|thx|ty|ok(?:ay)?|cool|nice|great|yes|yep|no"
    r"|nope|sure|same|lgtm|sgtm|ship it|done|congrats|welcome|morning|good morning|hi|hey|hello|bye"
    r"|brb|\W|(?:thanks?|hey|hi|nice|great|good)(?:\s\S{1,20}){0,3})*\W*$",
    re.I,
)
# "Follow-up to #12": what is left of a sentence that only points somewhere else.
POINTER = re.compile(
    rf"(?>{KEY}|[\W_]|\b(?i:follow(?:ed)?[- ]?ups?|todo|next|steps?|see|also|cc|refs?|pr|for|to|of"
    r"|from|on|in|the|this|is|and|as|a)\b){0,60}+"
)
QUESTION_WORDS = re.compile(
    r"\b(?:who|what|when|where|why|how|which|should|could|can|do|does|did|is|are|will|would|has"
    r"|have|any)\b", re.I
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence of an event that a cue marks as worth repeating."""

    label: str  # decision, question, next, risk, done
    strength: int  # 1 to 3, as in CUES
    text: str


def paragraphs_of(body: str) -> tuple[list[str], list[tuple[bool, str]]]:
    """Prose of a body, one entry per paragraph or list item, and its task-list items.

    Left out: code, quotes, tables, headings, trailers and everything below a quoted mail.
    """
    paragraphs: list[str] = []
    tasks: list[tuple[bool, str]] = []
    current: list[str] = []
    fenced = False
    if "<!--" in body:
        body = uncommented(body)
    for raw in body.split("\n"):
        text = LED.sub("", raw.strip()) if raw[:1].isalpha() else raw.strip()
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


def marked(subject: str, paragraphs: list[str], role: str, kind: str) -> tuple[Sentence, ...]:
    """The sentences of title and body that a cue marks, each under its strongest label."""
    if kind in ("noise", "dependency") and role == "change":
        return ()
    found: dict[str, Sentence] = {}
    repeated = role == "chat" and _begins(paragraphs, subject)
    if not repeated and (role not in ("ticket", "incident") or subject.endswith("?")):
        _judge(without_suffix(subject), role, found, title=True)
    for paragraph in paragraphs:
        if _promising(paragraph):
            for text in sentences_of(paragraph):
                _judge(text, role, found, title=False)
    return tuple(found.values())


def _begins(paragraphs: list[str], subject: str) -> bool:
    """Whether the body says it all again, as where a title is the first words of a message."""
    start = line(subject, 1_000).rstrip(".\u2026 ")
    return bool(start and paragraphs) and line(paragraphs[0][:2_000], 2_000).startswith(start)


def _promising(text: str) -> bool:
    """Whether a cue can be in there at all."""
    lowered = text.casefold()
    return any(stem in lowered for stem in STEMS)


def _judge(raw: str, role: str, found: dict[str, Sentence], *, title: bool) -> None:
    """Add the sentence under the label of its strongest cue, if it has one."""
    if not _promising(raw[:1_000]):
        return
    text = line(without_tail(line(raw[:1_000], 1_000)))
    if len(text) < 8 or text in found or (role == "chat" and SMALL_TALK.match(text[:120])):
        return
    if POINTER.fullmatch(text):
        return
    asks = text.endswith(("?", "\uff1f"))
    best = _question(text, role) if asks else _strongest(text, role, title=title)
    if best:
        found[text] = Sentence(label=best[0], strength=best[1], text=text)


def _strongest(text: str, role: str, *, title: bool) -> tuple[str, int] | None:
    """The strongest cue that counts here; of two that are as strong, the first in the table."""
    best: tuple[str, int] | None = None
    for label, strength, pattern in CUE_PATTERNS:
        if best and strength <= best[1]:
            continue
        found = pattern.search(text)
        if not found:
            continue
        if strength == 1 and not _weak_cue_counts(label, text, role, title=title):
            continue
        if label == "risk" and role == "change" and title:
            continue  # "Fix a race condition" is a fix, not a risk
        decided = text[: found.end()] if strength == EXPLICIT else text
        if label == "decision" and HEDGE.search(decided):
            continue
        best = label, strength
    return best


def _question(text: str, role: str) -> tuple[str, int] | None:
    """A real question, not a tag at the end of a remark and not one that code asks itself."""
    asked = (
        len(text.split()) >= 4 and QUESTION_WORDS.search(text) or any(ord(c) > 0x2E80 for c in text)
    )
    if not asked or (role == "change" and "`" not in text and len(text.split()) < 5):
        return None
    direct = re.search(r"\b(?:should we|do we|who|open question)\b", text, re.I)
    return "question", 3 if direct else 2


def _weak_cue_counts(label: str, text: str, role: str, *, title: bool) -> bool:
    """Whether it does: "instead of" decides in talk and in titles, but rarely in a body."""
    if label == "done":
        return role in ("chat", "other")
    if role in ("chat", "ticket"):
        return bool(re.search(r"\b(?:we|let's|i)\b", text, re.I))
    return title and bool(
        re.match(r"(?:use|move|store|replace|switch|keep|make|run|rely|build)", text, re.I)
    )
