"""The rendering: structure from us, text from events, and no way for one to become the other."""

import random
import re
from datetime import UTC, datetime

import pytest

from app.schemas import (
    Area,
    Contributor,
    Correlation,
    CorrelationDraft,
    HandoffDraft,
    NotesSection,
    OnboardingDraft,
    Person,
    ReleaseNotesDraft,
    Statement,
)
from tasks.context import Event
from tasks.render import escaped, render

SHA = "3b9060ee1121f48669f0b30045c9344065f3c9ae"


def event(number: int, **given: object) -> Event:
    fields: dict[str, object] = {
        "id": f"e{number}",
        "source": "github",
        "event_type": "commit",
        "title": "Fix environment proxies",
        "occurred_at": datetime(2026, 3, number, 9, tzinfo=UTC),
    }
    return Event(**(fields | given))  # type: ignore[arg-type]


def handoff(*texts: str, ids: list[str] | None = None) -> HandoffDraft:
    return HandoffDraft(
        title="web: proxies",
        summary=Statement(text="One change.", event_ids=["e1"]),
        key_changes=[Statement(text=text, event_ids=ids or ["e1"]) for text in texts],
        decisions=[],
        open_questions=[],
        next_steps=[],
    )


def bullets(text: str) -> list[str]:
    return [row for row in text.split("\n") if row.startswith("- ")]


def test_a_handoff_is_title_summary_sections_and_footer() -> None:
    one = event(1, url="https://github.com/acme/web/pull/12", folded=("e9",))
    two = event(3, source="slack")
    text = render("handoff", handoff("Fix environment proxies"), {"e1": one, "e2": two})
    assert text == (
        "# web: proxies\n\nOne change.\n\n## Key changes\n\n"
        "- Fix environment proxies ([#12](https://github.com/acme/web/pull/12))\n\n"
        "_1 to 3 Mar 2026, 3 events from github, slack_\n"
    )


def test_a_folded_duplicate_is_cited_by_the_event_that_stands_for_it() -> None:
    one = event(1, external_id=SHA, folded=("e9",))
    assert bullets(render("handoff", handoff("Fix", ids=["e9"]), {"e1": one})) == [
        "- Fix (`3b9060e`)"
    ]


def test_a_reference_at_the_end_becomes_the_link_and_is_not_said_twice() -> None:
    one = event(1, url="https://github.com/acme/web/pull/12")
    [bullet] = bullets(render("handoff", handoff("Fix proxies (#12)"), {"e1": one}))
    assert bullet == "- Fix proxies ([#12](https://github.com/acme/web/pull/12))"


def test_a_reference_without_a_link_stays_in_the_text() -> None:
    [bullet] = bullets(render("handoff", handoff("Fix (#12)"), {"e1": event(1, external_id=SHA)}))
    assert bullet == "- Fix (#12) (`3b9060e`)"


def test_three_citations_are_shown_and_the_rest_counted() -> None:
    events = {f"e{n}": event(n, source="slack") for n in range(1, 6)}
    [bullet] = bullets(render("handoff", handoff("Talk", ids=list(events)), events))
    assert bullet == "- Talk (slack, 1 Mar, slack, 2 Mar, slack, 3 Mar +2 more)"


def test_an_event_that_is_not_known_is_not_cited() -> None:
    assert bullets(render("handoff", handoff("Fix", ids=["gone"]), {"e1": event(1)})) == ["- Fix"]


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "data:text/html,x",
        "http://",
        "//evil.example",
        "https://[broken",
        "ftp://host/file",
    ],
)
def test_only_web_addresses_become_links(url: str) -> None:
    [bullet] = bullets(render("handoff", handoff("Fix"), {"e1": event(1, url=url)}))
    assert bullet == "- Fix (github, 1 Mar)"


def test_an_address_cannot_leave_its_brackets() -> None:
    one = event(1, url="https://host/a) [x](javascript:b) <i>")
    [bullet] = bullets(render("handoff", handoff("Fix"), {"e1": one}))
    address = re.fullmatch(r"- Fix \(\[github, 1 Mar\]\(([^()\s<>]*)\)\)", bullet)
    assert address, bullet


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# heading", "\\# heading"),
        ("- item", "\\- item"),
        ("1. first", "1\\. first"),
        ("> quote", "&gt; quote"),
        ("a *b* _c_ snake_case", "a \\*b\\* \\_c\\_ snake_case"),
        ("![x](http://a/b.png)", "!\\[x\\](http://a/b.png)"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("| a | b |", "\\| a \\| b \\|"),
        ("ping @channel", "ping @\u200bchannel"),
        ("see javascript:alert(1)", "see javascript\\:alert(1)"),
        ("two\n\n# lines", "two # lines"),
        ("use `a|b` here", "use `a|b` here"),
        ("odd ` tick", "odd \\` tick"),
        ("\x1b[31mred\x00", "\\[31mred"),
        ("~~gone~~", "\\~\\~gone\\~\\~"),
    ],
)
def test_text_renders_as_itself(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_no_text_can_add_a_line_or_an_open_tag() -> None:
    rng = random.Random(7)
    alphabet = "ab \n\r\t#->`*_[]()!<>&|~@:\\\u202e\x00\x1b1."
    for _ in range(300):
        junk = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))
        events = {"e1": event(1, source=junk or "x", url=f"https://h/{junk}", external_id=junk)}
        text = render("handoff", handoff(junk), events)
        rows = text.split("\n")
        assert len(rows) == 10, junk
        assert text.endswith("_\n")
        outside = re.sub(r"`[^`]*`", "", rows[6])
        assert not re.search(r"(?<!\\)<|(?<!\\)!\[", outside), rows[6]


def test_people_areas_and_threads_are_named_in_bold() -> None:
    ids = ["e1"]
    brief = OnboardingDraft(
        title="web",
        summary=Statement(text="S", event_ids=ids),
        areas=[Area(name="app/auth", text="3 changes", event_ids=ids)],
        key_people=[Person(name="Ada", areas=["app/auth"], text="3 of 3", event_ids=ids)],
        decisions=[],
        open_questions=[],
        first_steps=[],
    )
    known = {"e1": event(1, external_id=SHA)}
    assert bullets(render("onboarding_brief", brief, known)) == [
        "- **app/auth**: 3 changes (`3b9060e`)",
        "- **Ada** (app/auth): 3 of 3 (`3b9060e`)",
    ]
    thread = Correlation(title="ENG-4", text="T", references=[], sources=["slack"], event_ids=ids)
    draft = CorrelationDraft(
        title="web", summary=Statement(text="S", event_ids=ids), correlations=[thread]
    )
    assert bullets(render("cross_source_correlation", draft, known)) == [
        "- **ENG-4**: T (`3b9060e`)"
    ]


def test_release_notes_keep_their_headings_and_name_contributors() -> None:
    draft = ReleaseNotesDraft(
        title="web 1.2.0",
        version="1.2.0",
        summary=Statement(text="S", event_ids=["e1"]),
        sections=[
            NotesSection(heading="Added", items=[Statement(text="X", event_ids=["e1"])]),
            NotesSection(heading="Fixed", items=[]),
        ],
        contributors=[Contributor(name=name, event_ids=["a"]) for name in ("Ada", "<Eve>")],
    )
    text = render("release_notes", draft, {"e1": event(1)})
    assert "## Added\n\n- X" in text
    assert "## Fixed" not in text
    assert "## Contributors\n\nAda, &lt;Eve&gt;\n" in text


def test_without_events_there_is_no_footer() -> None:
    assert render("handoff", handoff("Fix"), {}).endswith("- Fix\n")
