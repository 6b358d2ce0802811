"""What a provider says as plain text: one line, nothing hidden in it, nothing in it that acts.

Pure, and made for hostile text: every pattern runs in linear time. The one rule: what leaves this
file does as little when it is read as Markdown or as HTML as when it is read as plain text, so a
client may show it as it likes. Only what nobody can see is taken away. What would act is spelled so
that it does not, as people do who write about attacks:

    [a](b), ![a](b)    [a] (b)          the two brackets of a link stand side by side
    [a]: b             [a] : b          as a whole text, where a link elsewhere would lead to
    <img src=x>        < img src=x>     a tag has no space there; `<T>` and `a < b` stay
    https://host       hxxps://host     www[.]host, // host, mailto: a@host likewise

No address is left alone, not even an event's own: links are citations, and render.py makes those.
In a code span, addresses and brackets stay as they are: nothing acts there, and people copy it.
"""

import re

from tasks.lines import set_of

# What shows nothing and tells something: controls, what turns text around, fillers, tags, selectors
# of variants. Joiners and the emoji selector are needed, but only where there is something to join.
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb"
    "\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![#*0-9\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff])\ufe0f"
)
LONE_JOINER = re.compile(
    "(?<![^\x00-\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\u200c\u200d])"
)
CODE = re.compile(r"(`[^`]+`)")
CODE_MAX = 202  # characters, marks included; render.py takes nothing longer for code
UNCERTAIN = re.compile(r"``|\\`")  # then what is code depends on who reads it
TARGET = re.compile(r"\](?=\()")
DEFINITION = re.compile(
    r"""^([>*+\-\s\d.)]{0,40}\[(?:[^\[\]\\]|\\.){1,999}\]):(?=\s*(?:<|\S+\s*(?:$|["'(])))"""
)
WEB = re.compile(r"(?<=h)tt(?=ps?://)|(?<=(?<![a-z])f)t(?=p://)", re.I)
WWW = re.compile(r"(?<![\w-])www\.(?=\w)", re.I)
HOST = re.compile(r"(?<![:/\w])//(?=[^\s/.]+\.|localhost)")
MAIL = re.compile(r"\b(mailto|xmpp):(?=\S)", re.I)
# An opening bracket that HTML, Slack or a server would read on from; and all of a `<K, V>`.
TAG = re.compile(
    r"<(?=[a-z/!?@#%])(?:/?([a-z][\w.]{0,60}(?:, ?[a-z][\w.]{0,60}){0,5})(?: ?/)?>)?", re.I
)
ELEMENTS = set_of(
    "a abbr acronym address animate applet area article aside audio b base basefont bdi bdo "
    "bgsound big blink blockquote body br button canvas caption center cite code col colgroup "
    "command content data datalist dd del details dfn dialog dir div dl dt element em embed "
    "fieldset figcaption figure font footer foreignobject form frame frameset h1 h2 h3 h4 h5 h6 "
    "head header hgroup hr html i iframe image img input ins isindex kbd keygen label layer "
    "legend li link listing main map mark marquee math menu menuitem meta meter multicol nav "
    "nextid nobr noembed noframes noscript object ol optgroup option output p param picture "
    "plaintext pre progress q rb rbc rp rt rtc ruby s samp script search section select "
    "selectedcontent set shadow slot small source spacer span strike strong style sub summary sup "
    "svg table tbody td template textarea tfoot th thead time title tr track tt u ul use var "
    "video wbr xml xmp"
)


def plain(text: str, longest: int) -> str:
    """The text on one line, inert, and cut to `longest` characters."""
    # Spaces before what is hidden, for some of that is a space; and again for what stood around it.
    text = HIDDEN.sub("", " ".join(text[: 4 * longest].split()))
    text = _inert(" ".join(LONE_JOINER.sub("", text).split()))
    room = longest
    while len(text) > longest:  # what a cut leaves of a code span or of a `<T>` may act, and grow
        room -= 1
        text = _inert(text[:room].rstrip() + "\u2026")
    return text


def _inert(text: str) -> str:
    text = DEFINITION.sub(r"\1 :", text)
    pieces = CODE.split(text)
    if UNCERTAIN.search(text) or any(len(code) > CODE_MAX for code in pieces[1::2]):
        pieces = [text]
    changed = (piece if at % 2 else _unlinked(piece) for at, piece in enumerate(pieces))
    return TAG.sub(_spaced, "".join(changed))


def _spaced(found: re.Match[str]) -> str:
    kept = found[1] and found[1].casefold() not in ELEMENTS
    return found[0] if kept else f"< {found[0][1:]}"


def _unlinked(text: str) -> str:
    text = WEB.sub(lambda found: "x" * len(found[0]), TARGET.sub("] ", text))
    text = WWW.sub(lambda found: f"{found[0][:3]}[.]", text)
    return HOST.sub("// ", MAIL.sub(r"\1: ", text))
