"""What an event refers to."""

from stories import signal


def test_references_name_their_repository() -> None:
    read = signal(
        "Keep the session (#12)",
        "Fixes ENG-42, see https://github.com/acme/api/issues/7 and acme/cli#3.\nUses UTF-8, #5.",
    )
    assert read.pull == "acme/web#12"
    assert set(read.references) == {
        "acme/web#12",
        "acme/api#7",
        "acme/cli#3",
        "acme/web#5",
        "ENG-42",
    }
    assert read.closes == ("ENG-42",)


def test_a_bare_number_in_a_chat_belongs_to_no_repository_yet() -> None:
    read = signal("look at #12", source="slack", event_type="message", resource="backend")
    assert read.references == ()
    assert read.unresolved == ("#12",)


def test_the_text_has_no_prefix_and_no_trailing_references() -> None:
    assert signal("feat(auth): sign in with a passkey (#12)").text == "sign in with a passkey"
    assert signal("Expanded analysis of SQL operations, refs #2748").text == (
        "Expanded analysis of SQL operations"  # simonw/datasette
    )
