"""Foreign text as plain lines: what a title or a body holds once markup and tricks are gone.

Pure, and made for hostile text: every pattern has bounded quantifiers. The one rule: a line that
leaves this file is one line, printable, and cannot be mistaken for Markdown structure.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit


def set_of(listed: str) -> frozenset[str]:
    """Words as a set, so that a table of them reads like a sentence."""
    return frozenset(listed.split())


LINE_MAX = 240  # characters of one statement: two terminal lines, enough for any real sentence
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
# Somebody whose name the source did not send, as Slack and Discord count people.
ACCOUNT_MENTION = re.compile(r"@(?<![\w@]@)(?:[UW][A-Z0-9]{8,11}|\d{17,20})\b,?\s{0,2}")
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
FORGE_URL = re.compile(
    r"https?://[\w.-]{1,100}/([\w.-]{1,100}(?:/[\w.-]{1,100}){1,3}?)/(?:-/)?"
    r"(?:(?:issues|pull|pulls|pull-requests|merge_requests|discussions)/(\d{1,7})"
    r"|commits?/([0-9a-f]{7,40}))(?![0-9a-f])"
)
SENTENCE = re.compile(
    r"(?<=[.!?\u3002\uff01\uff1f])[\"')\]]?\s+(?=[\"'(\[`]?[^\W\d_a-z]|[A-Z])"
    r"|(?<=[\u3002\uff01\uff1f])"
)


# Single letters say nothing; a single digit or ideograph does.
WORD = re.compile(r"[^\W_]{2,40}(?:[._][^\W_]{1,40}){0,4}|\d|[\u3040-\u9fff]")
STOP_WORDS = set_of(
    "the and for with from into that this when was were are is be to of in on by as at an or it "
    "if so we our you your has have had can now also only more use uses used using via per all any "
    "after before than then there their them they will would should which while where"
)


def cleaned(text: str) -> str:
    """Text without controls, markup, addresses and blobs, on one line."""
    if not text.isprintable():
        text = CONTROLS.sub(" ", ANSI.sub("", text))
    if "<" in text:
        text = SLACK_MENTION.sub("", SLACK_LINK.sub(r"\1", TAG.sub("", uncommented(text))))
    if "](" in text:
        text = LINK.sub(r"\1", IMAGE.sub("", text))
    if "://" in text:
        text = URL.sub(lambda found: _short_url(found[0]), text)
    if "@" in text:
        text = ACCOUNT_MENTION.sub("", MAIL.sub(r"\1", text))
    if len(text) > 80:
        text = BLOB.sub("", text)
    if "**" in text or "__" in text or "~~" in text:
        text = EMPHASIS.sub("", text)
    if ":" in text:
        text = SHORTCODE.sub("", text)
    if "(" in text or "[" in text:
        text = EMPTY_BRACKETS.sub("", text)
    return " ".join(text.split())


def line(text: str, limit: int = LINE_MAX) -> str:
    """One line of plain text that cannot be mistaken for Markdown structure, cut at a word."""
    text = _started(_balanced(cleaned(text)))
    if len(text) > limit:
        kept = text[: limit - 1]
        head, space, _ = kept.rpartition(" ")
        text = TAIL.sub("", head if space and len(head) > limit // 2 else kept) + "\u2026"
        text = _started(_balanced(text))  # the cut may have split a code span
    return text.strip()


def words(text: str) -> frozenset[str]:
    """The words that carry meaning, reduced to stems, for comparing two texts."""
    found = WORD.findall(text[:600].casefold().replace("'", ""))
    return frozenset(stem(word) for word in found if word not in STOP_WORDS)


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


def uncommented(text: str) -> str:
    """Text without HTML comments; an open one hides the rest, as it does in a browser."""
    kept, rest = [], text
    while rest:
        before, opened, rest = rest.partition("<!--")
        kept.append(before)
        if opened:
            rest = rest.partition("-->")[2]
    return "".join(kept)


def _balanced(text: str) -> str:
    """Text without backticks when one of them has no partner."""
    return text.replace("`", "") if text.count("`") % 2 else text


def _started(text: str) -> str:
    """Text without the marks of a heading, list or quote in front."""
    if not text or text[0].isalpha():
        return text
    return LEADING_NUMBER.sub(r"(#\1)", STRUCTURE.sub("", text.lstrip()))


def stem(word: str) -> str:
    """A word without its ending: enough to tell that `fixes` and `fixed` are one."""
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
