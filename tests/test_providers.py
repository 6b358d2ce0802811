"""The built-in provider: off the event loop, deterministic, and honest when there is nothing."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta

import pytest

from app.schemas import DRAFTS, AnyDraft, HandoffDraft
from app.settings import ConfigurationError, Settings
from tasks import providers
from tasks.calls import Calls
from tasks.context import Context, Event
from tasks.extractive import MODEL
from tasks.outcomes import NoResult
from tasks.providers import Extractive, make_provider

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


def context(*titles: str, kind: str = "handoff") -> Context:
    events = tuple(
        Event(
            id=f"e{n}",
            source=("github", "slack")[n % 2],
            event_type=("commit", "message")[n % 2],
            title=title,
            content="We decided to keep it. Refs ENG-4.",
            author="Ada",
            resource="acme/web",
            occurred_at=NOON - timedelta(hours=n),
        )
        for n, title in enumerate(titles)
    )
    return Context(
        kind=kind, project_name="Demo", since=NOON - timedelta(days=2), until=NOON, events=events
    )


@pytest.mark.parametrize("kind", sorted(DRAFTS))
async def test_every_kind_gets_a_draft_of_its_type(kind: str) -> None:
    asked = context("feat: add a cache, ENG-4", "Cache for ENG-4 is up for review", kind=kind)
    first, second = [await Extractive().complete(asked, Calls()) for _ in range(2)]
    assert type(first.draft) is DRAFTS[kind]
    assert first == second
    assert (first.model, first.prompt_tokens, first.completion_tokens) == (MODEL, 0, 0)


async def test_the_loop_keeps_ticking_while_the_provider_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    started, go = asyncio.Event(), threading.Event()
    draft = (await Extractive().complete(context("feat: a cache"), Calls())).draft

    def slow(_: Context) -> AnyDraft:
        loop.call_soon_threadsafe(started.set)
        assert go.wait(10), "the loop never came round to set it"
        return draft

    monkeypatch.setattr(providers, "extract", slow)
    task = asyncio.create_task(Extractive().complete(context("feat: a cache"), Calls()))
    async with asyncio.timeout(5):
        await started.wait()
        assert not task.done()
        go.set()
        assert (await task).draft is draft


async def test_nothing_to_say_is_no_result_and_counts_what_was_read() -> None:
    with pytest.raises(NoResult) as caught:
        await Extractive().complete(context(), Calls())
    assert "(events: 0)" in caught.value.sentence
    assert caught.value.code == "no_result"


async def test_what_nobody_foresaw_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Context) -> AnyDraft:
        raise ZeroDivisionError

    monkeypatch.setattr(providers, "extract", broken)
    with pytest.raises(ZeroDivisionError):
        await Extractive().complete(context("feat: a cache"), Calls())


async def test_the_default_provider_is_the_built_in_one() -> None:
    provider = make_provider(Settings.from_env({}))
    assert isinstance(provider, Extractive)
    made = await provider.complete(context("feat: add a cache"), Calls())
    assert isinstance(made.draft, HandoffDraft)


def broken() -> None:
    """A provider of the operator's own that cannot start."""
    raise KeyError("MY_MODEL")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:make", "ModuleNotFoundError: No module named 'nowhere'"),
        (f"{__name__}:make", "AttributeError: "),
        (f"{__name__}:broken", "KeyError: 'MY_MODEL'"),
    ],
)
async def test_a_provider_that_cannot_start_is_a_fault_of_the_configuration(
    name: str, told: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_provider(Settings.from_env({"BATON_PROVIDER": name}))
    assert str(caught.value).startswith(f"BATON_PROVIDER: {name}: {told}")
