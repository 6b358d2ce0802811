"""The answer to a question: the sentences that say most about it, each with who said it."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from app.schemas import QuestionDraft, Statement
from tasks.cues import paragraphs_of
from tasks.lines import ANSI, CONTROLS, line, sentences_of, set_of, words
from tasks.passages import KEY_CHANGES, attributed
from tasks.reading import Reading
from tasks.signals import Signal
from tasks.statements import Seen, merged

STATEMENTS = 6  # more is a list of hits and no answer
NEAR = 0.55  # of the best weight, below which an event is only related
BODY_MAX = 8_000  # characters of a body in which a sentence is looked for
# What people put around what they want to know, in the languages that they ask in. Nothing is found
# by it: no event says "what happened last week".
AROUND = set_of(
    "what who whom whose when where why how which is are was were be been do does did done has "
    "have had can could will would should may might any anyone anything anybody somebody "
    "someone some there the a an of in on at to for from by with about us we our you your they "
    "them their i me my it its this that these those and or if not so now then please tell show "
    "give list explain summarise summarize know find happen happens happened happening go going "
    "went new news latest recent recently last lately current currently today yesterday week "
    "weeks weekend day days month since until ago far status update updates progress exactly "
    "team project work works worked working much many more most still yet also just all "
    "everything get got make made wer wie wann wo warum wieso weshalb welche welcher welches "
    "ist sind war waren hat haben hatte wird werden wurde wurden kann soll der die das den dem "
    "des ein eine einen einem einer und oder nicht mit von vom f\u00fcr auf im zum zur zu bei "
    "\u00fcber es wir uns ihr sie ich gibt gab passiert letzte letzten letzter woche tage tagen "
    "heute gestern aktuell stand neues bitte noch gerade seit que qu qui quoi quand o\u00f9 "
    "pourquoi comment est sont le la les l un une du dans sur avec pour qu\u00e9 el los las por "
    "c\u00f3mo cu\u00e1ndo d\u00f3nde qui\u00e9n en con para del"
)


def searched(question: str) -> str:
    """What of a question events can speak about; "" when it asks for whatever happened."""
    kept = []
    for token in question.split():
        word = re.split(
            "['\u2019]", token.strip("?!.,;:()[]\"'\u201c\u201d\u201e\u2026").casefold()
        )[0]
        if word not in AROUND and re.search(r"\w", word):
            kept.append(token)
    return " ".join(kept)


def answer(reading: Reading) -> QuestionDraft:
    """The sentences of the best events that cover most of the question; without words to look for,
    what mattered most."""
    question = str(reading.context.options.get("question") or "")
    title = line(question, 120)
    statements = _said_about(reading, question) if searched(question) else []
    if not statements:
        changes = [change for change in reading.changes if change.kind != "noise"]
        statements = [change.statement for change in changes[:KEY_CHANGES]]
        if not statements:
            statements = [attributed(reading, s, s.text) for s in reading.signals if s.text]
    return QuestionDraft(title=title, statements=merged(statements, Seen())[:STATEMENTS])


def _said_about(reading: Reading, question: str) -> list[Statement]:
    """What the events nearest to the question say about it, the best first."""
    signals = {signal.event.id: signal for signal in reading.signals}
    relevance = _relevance(reading, question)
    weighed = [member for thread in reading.context.threads for member in thread.members]
    top = max((member.weight for member in weighed), default=1.0) - 1
    near = [m for m in weighed if m.weight - 1 >= NEAR * top]
    told = []
    for member in near[: 3 * STATEMENTS]:
        signal = signals[member.event.id]
        text = _best_sentence(signal, relevance)
        if text:
            told.append(attributed(reading, signal, text))
    return told


def _best_sentence(signal: Signal, relevance: Callable[[str], float]) -> str:
    """The headline, unless a sentence of the body says more about the question."""
    best, most = signal.text, relevance(signal.text) + 0.001
    for text in _sentences(signal):
        if (more := relevance(text)) > most:
            best, most = text, more
    return best


def _sentences(signal: Signal) -> Sequence[str]:
    body = (signal.event.content or "")[:BODY_MAX]
    body = CONTROLS.sub("", ANSI.sub("", body)).replace("\r", "\n")
    prose = (
        text[:1_000] for paragraph in paragraphs_of(body)[0] for text in sentences_of(paragraph)
    )
    return [text for raw in prose if len(text := line(raw)) >= 8]


def _relevance(reading: Reading, question: str) -> Callable[[str], float]:
    """How much of the question a sentence covers, between 0 and 1; rare words weigh more."""
    wanted = words(searched(question)) or words(question)
    common = Counter(
        word
        for s in reading.signals
        for word in words(f"{s.text} {s.event.content or ''}") & wanted
    )
    weights = {word: 1 / (1 + common[word]) for word in wanted}
    total = sum(weights[word] for word in sorted(wanted)) or 1.0

    def relevance(text: str) -> float:
        return sum(weights[word] for word in sorted(wanted & words(text))) / total

    return relevance
