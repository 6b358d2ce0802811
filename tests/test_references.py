"""What an event refers to."""

import pytest
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


@pytest.mark.parametrize(
    ("addresses", "one"),
    [
        (
            "https://acme.slack.com/archives/C024BE91L/p1355517523000005 "
            "https://acme.slack.com/archives/C024BE91L/p1355517601000007"
            "?thread_ts=1355517523.000005&cid=C024BE91L "
            "https://app.slack.com/client/T1/C024BE91L/thread/C024BE91L-1355517523.000005.",
            "slack.com/c024be91l/1355517523.000005",
        ),
        (
            "https://app.asana.com/0/0/120217885427 https://app.asana.com/0/77/120217885427/f "
            "https://app.asana.com/1/5/project/77/task/120217885427?focus=true",
            "app.asana.com/120217885427",
        ),
        (
            "https://www.notion.so/0ef104cd477e80e18571cfd10e92339a "
            "https://www.notion.so/acme/How-we-ship-0ef104cd477e80e18571cfd10e92339a?pvs=4",
            "notion.so/0ef104cd477e80e18571cfd10e92339a",
        ),
    ],
)
def test_one_page_has_one_reference_whatever_its_address(addresses: str, one: str) -> None:
    assert signal("Look", addresses).references == (one,)


def test_the_text_has_no_prefix_and_no_trailing_references() -> None:
    assert signal("feat(auth): sign in with a passkey (#12)").text == "sign in with a passkey"
    assert signal("Expanded analysis of SQL operations, refs #2748").text == (
        "Expanded analysis of SQL operations"  # simonw/datasette
    )


def test_an_address_ties_only_where_its_path_says_what_it_shows() -> None:
    def told(url: str) -> tuple[str, ...]:
        given = {"source": "alertmanager", "event_type": "alert.firing", "resource": "checkout"}
        return signal("Too many errors", url=url, **given).references

    assert told("https://acme.sentry.io/issues/117/?project=2") == ("acme.sentry.io/issues/117",)
    assert told("https://acme.pagerduty.com/incidents/PGR0") == (
        "acme.pagerduty.com/incidents/pgr0",
    )
    for anything in (
        "http://prometheus:9090/graph?g0.expr=up+%3D%3D+0",
        "https://play.grafana.org/alerting/silence/new?matchers=alertname%3DT2",
        "https://alerts.acme.com/alertmanager/#/alerts?filter=%7Balertname%3D%22T2%22%7D",
    ):
        assert told(anything) == ()
