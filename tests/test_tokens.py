"""The estimate of tokens is never too low."""

import random

import pytest

from tasks.tokens import estimate_tokens

# The most that seven tokenizers made of a text: cl100k (GPT-4), Claude 2, Llama 3, Mistral 7B,
# Mistral Nemo, Qwen 2 and DeepSeek V3.
COUNTED = {
    "Fix the expiry of sessions when the browser is offline (#123)": 19,
    "def lease_of(job_id: str, *, seconds: float = 15.0) -> Lease | None:\n"
    "    return await conn.fetchrow(LEASE, job_id)\n": 44,
    '{"id": "0193f2c4-7a1b-7c3d-9e4f-5a6b7c8d9e0f", "status": "pending", "progress": 0.25}': 56,
    "app/auth/session.py tests/auth/test_session.py deploy/requirements.lock": 22,
    "https://github.com/acme/web/pull/123/files#diff-9f86d081884c7d659a2feaa0c55ad015": 50,
    "2026-03-02T14:05:09.123456Z 10.0.13.247 3.14159265358979323846": 63,
    "OLTmUuRNp/I3DZ4mDicTZVCko6bQf1wMMy+LEiQIP9IrkC+JEegYGPjJnV1dmDGV": 53,
    "7504d90e945de2e8f54ee781cc75f636d85099095aa300165a67036f9b540d6b": 61,
    "qzx wvk jjq bnm xcv plk hgf tyr zxq wmn": 25,
    "!?#$%^&*~|\\<>{}[]`@=+;'\"": 19,
    "日本語のコミットメッセージを読む": 18,
    "修复会话过期的问题，并添加测试": 16,
    "세션 만료 문제를 수정했습니다": 17,
    "Исправлена ошибка сессии": 13,
    "تم إصلاح انتهاء الجلسة": 21,
    "Die Sitzung läuft über Nacht ab; Änderung geprüft": 21,
    "👩\u200d👩\u200d👧\u200d👦 🎉✅❤\ufe0f🇩🇪": 39,
    "龘靐齉爨": 13,
    "𝕋𝕙𝕖": 13,
    "\n\n\t\n \t\n": 8,
}


@pytest.mark.parametrize(("text", "tokens"), COUNTED.items())
def test_no_tokenizer_makes_more_of_a_text(text: str, tokens: int) -> None:
    assert tokens <= estimate_tokens(text)


@pytest.mark.parametrize(("text", "tokens"), COUNTED.items())
def test_it_is_never_four_times_too_high(text: str, tokens: int) -> None:
    assert estimate_tokens(text) <= 4 * tokens


def test_what_no_tokenizer_has_a_word_for_counts_a_token_for_each_byte() -> None:
    """A tokenizer that works on bytes makes a token of each byte at worst."""
    rng = random.Random(1)
    for first, last in ((0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x4E00, 0x9FFF), (0x900, 0xDFF)):
        text = "".join(chr(rng.randrange(first, last)) for _ in range(200))
        assert estimate_tokens(text) >= len(text.encode())


def test_parts_may_be_added_up() -> None:
    rng = random.Random(2)
    pieces = ["Fix it", "\n", "\u6f22\u5b57", "\U0001f389", "a1b2c3", "\ud800", "", " ", "\x00"]
    for _ in range(300):
        one = "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))
        other = "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))
        whole = estimate_tokens(one + other)
        assert max(estimate_tokens(one), estimate_tokens(other)) <= whole
        assert whole <= estimate_tokens(one) + estimate_tokens(other)


def test_nothing_is_one_token() -> None:
    assert estimate_tokens("") == 1
