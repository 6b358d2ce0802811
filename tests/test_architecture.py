"""Architecture insights."""

from stories import REVERTED, WORK, context, event, texts

from app.schemas import ArchitectureDraft
from tasks.extractive import extract


def test_an_insight_names_components_structure_and_risks() -> None:
    draft = extract(
        context(
            "architecture_insight",
            *WORK,
            event("Move the queue to Postgres", hour=8, files=["app/queue/core.py"]),
            event("Cache the lookup", hour=9),
            event('Revert "Cache the lookup"', hour=10),
        )
    )
    assert isinstance(draft, ArchitectureDraft)
    assert draft.components[0].name == "app/auth"
    assert "2 of them together with app/auth" in draft.components[1].text
    assert "Move the queue to Postgres" in texts(draft.changes)
    assert texts(draft.risks) == [
        "Reverted: cache the lookup",
        "`app/auth/session.py` was fixed 3 times",
    ]


def test_a_question_steers_the_insight() -> None:
    draft = extract(
        context("architecture_insight", *WORK, focusQuestion="How do tokens expire in the db?")
    )
    assert isinstance(draft, ArchitectureDraft)
    assert draft.summary.text.startswith(
        "On \u201cHow do tokens expire in the db?\u201d: Fix the expiry of tokens."
    )
    assert draft.components[0].name == "app/db"


def test_what_was_reverted_says_so_wherever_it_is_named() -> None:
    draft = extract(
        context("architecture_insight", *REVERTED, focusQuestion="What of the lookup cache?")
    )
    assert isinstance(draft, ArchitectureDraft)
    assert "\u201d: Reverted: add the great big lookup cache." in draft.summary.text
    assert "Largest" not in draft.components[0].text
