"""Foreign text as plain lines."""

import pytest

from tasks.lines import line, sentences_of, words


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("## **Bold** title", "Bold title"),
        ("- [ ] task", "task"),
        ("\x1b[31mred\x1b[0m alert\u202e", "red alert"),
        ("[docs](https://host/x) for <b>all</b>", "docs for all"),
        ("see https://github.com/acme/web/pull/12/files", "see acme/web#12"),
        ("mail ada@example.com", "mail ada"),
        ("#12 is broken", "(#12) is broken"),
        ("<@U123> look at <https://host/x|the log>", "look at the log"),
        ("@U061F7AUR could you look, @80351110224678912?", "could you look, ?"),
        ("an ` odd tick", "an odd tick"),
        ("/<database>/-/query stays", "/<database>/-/query stays"),
        ("<!-- template", ""),
        ("A" * 300, ""),
    ],
)
def test_a_line_is_plain_text(raw: str, clean: str) -> None:
    assert " ".join(line(raw).split()) == clean


def test_a_long_line_is_cut_at_a_word() -> None:
    cut = line("word " * 100)
    assert len(cut) <= 240
    assert cut.endswith("word\u2026")


def test_sentences_split_also_without_spaces_after_the_stop() -> None:
    assert sentences_of("One is 1.5. Two? Three") == ["One is 1.5.", "Two?", "Three"]
    assert (
        len(sentences_of("\u6211\u4eec\u51b3\u5b9a\u4e86\u3002\u660e\u5929\u53d1\u5e03\u3002")) == 2
    )


def test_words_are_compared_without_endings_and_fillers() -> None:
    assert words("Fixed the proxies") == words("fixes proxies")
