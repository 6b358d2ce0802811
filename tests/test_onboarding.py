"""Briefs for new members."""

from stories import REVERTED, WORK, context, event, texts

from app.schemas import OnboardingDraft
from tasks.extractive import extract


def test_a_brief_names_areas_people_and_first_steps() -> None:
    draft = extract(context("onboarding_brief", *WORK))
    assert isinstance(draft, OnboardingDraft)
    assert [area.name for area in draft.areas[:2]] == ["app/auth", "app/db"]
    assert [(person.name, person.areas[0]) for person in draft.key_people] == [
        ("Ada Lovelace", "app/auth"),
        ("Grace Hopper", "static/css"),
    ]
    assert draft.key_people[0].text.startswith("4 changes: 4 of 4 in app/auth")
    steps = texts(draft.first_steps)
    assert steps[0].startswith("Read `README.md`, touched by 1 change")
    assert steps[1].startswith("Read `app/auth/session.py`, touched by 4 changes")
    assert "Pick up: Typo on the pricing page (ENG-9)" in steps


def test_a_focus_and_a_role_bring_their_areas_to_the_front() -> None:
    focused = extract(context("onboarding_brief", *WORK, focusArea="db"))
    assert isinstance(focused, OnboardingDraft)
    assert focused.areas[0].name == "app/db"
    designer = extract(context("onboarding_brief", *WORK, newMemberRole="designer"))
    assert isinstance(designer, OnboardingDraft)
    assert designer.areas[0].name == "static/css"
    assert designer.title == "web: brief for a new designer"


def test_what_was_reverted_is_neither_the_largest_nor_the_most_notable() -> None:
    more = event("Fix one lookup", hour=10, files=["app/cache/a.py"])
    draft = extract(context("onboarding_brief", more, *REVERTED))
    assert isinstance(draft, OnboardingDraft)
    assert draft.areas[0].text.endswith("Largest: Fix one lookup")
    assert draft.key_people[0].text.endswith("Most notable: Fix one lookup")
    assert not any(step.text.startswith("Study") for step in draft.first_steps)
    alone = extract(context("onboarding_brief", *REVERTED))
    assert isinstance(alone, OnboardingDraft)
    assert "Reverted: add the great" in alone.areas[0].text
    assert "Most notable" not in alone.key_people[0].text
