"""The page for people, in a real browser: from a key to a document, which can do nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from browser import Page, chromium
from conftest import Caller, Workers, served
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from app.main import create_app
from app.settings import NO_LIMITS, Limits, Settings
from app.static import FILES, POLICY
from tasks.calls import Calls
from tasks.context import Context
from tasks.executor import Executor
from tasks.providers import Completion, Extractive, Provider
from tasks.render import escaped

Working = Callable[..., AbstractAsyncContextManager[Executor]]
in_a_browser = pytest.mark.browser
KINDS = ("Handoff", "Release notes", "Onboarding brief", "Architecture", "Correlation")
REQUESTS = "performance.getEntriesByType('resource').map((entry) => entry.name)"
OPENED = "!$('#document').hidden"


class Held(Extractive):
    """Extracts once it may."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.may = asyncio.Event()

    async def complete(self, context: Context, calls: Calls) -> Completion:
        self.asked.set()
        await self.may.wait()
        return await super().complete(context, calls)


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    """One browser for all tests of this file."""
    with chromium() as driver:
        yield driver


@pytest.fixture
async def page(driver: Chrome, base_url: str) -> AsyncIterator[Page]:
    """The page, just opened; nothing that it did may have upset the browser."""
    page = Page(driver)
    await page.open(base_url)
    yield page
    complaints = await page.complaints()
    await page.open("about:blank")  # ends its requests while the server still runs
    assert complaints == []


@pytest.fixture
def working(worker: Workers) -> Working:
    """A worker that runs beside the body."""

    @asynccontextmanager
    async def run(provider: Provider | None = None) -> AsyncIterator[Executor]:
        running, executor = worker(provider)
        task = asyncio.create_task(running.run())  # type: ignore[no-untyped-call]
        try:
            yield executor
        finally:
            running.stop()
            await task

    return run


@pytest.fixture
def read(
    page: Page, caller: Caller, sql: asyncpg.Connection, drain: Callable[[], Awaitable[None]]
) -> Callable[[str], Awaitable[None]]:
    """Opens a document that says what it is told to."""

    async def open_document(markdown: str) -> None:
        await caller.ingest({"title": "feat: a cache"})
        await caller.submit()
        await drain()
        await sql.execute("update handoffs set markdown = $1", markdown)
        await enter(page, caller.key)
        await page.click("#documents button")
        await page.until(OPENED)

    return open_document


async def enter(page: Page, key: str) -> None:
    """Give the page a key, and see what the first project has."""
    await page.type("#key", key + Keys.ENTER)
    await page.until("!$('#room').hidden && $('#library').getAttribute('aria-busy') === null")


# --- The files ------------------------------------------------------------------------------


async def test_the_page_is_served_with_a_strict_policy_and_kept_only_after_asking(
    base_url: str,
) -> None:
    async with httpx.AsyncClient(base_url=base_url, trust_env=False) as http:
        for path, (_, media_type) in FILES.items():
            answer = await http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
            assert answer.headers["content-security-policy"] == POLICY
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-cache"
            assert "{version}" not in answer.text
            tag = answer.headers["etag"]
            same = await http.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
            assert (same.status_code, same.content) == (304, b"")
            head = await http.head(path)
            assert head.content == b""
            assert head.headers["content-length"] == str(len(answer.content))
            assert (await http.post(path)).status_code == 405
    for forbidden in ("unsafe", "http:", "https:", "*"):
        assert forbidden not in POLICY


# --- The key --------------------------------------------------------------------------------


@in_a_browser
async def test_a_key_is_in_the_memory_of_the_page_and_nowhere_else(
    page: Page, caller: Caller
) -> None:
    await enter(page, caller.key)
    assert await page.text("#project") == "ada"
    kept = await page.js(
        """const html = document.documentElement.outerHTML;
        const values = [...document.querySelectorAll('input')].map((input) => input.value);
        const named = Object.getOwnPropertyNames(window).map((name) => {
          try { return JSON.stringify(window[name]); } catch { return ""; }
        });
        return [html, values, named, location.href, document.cookie, history.state,
          {...localStorage}, {...sessionStorage}].map((value) => JSON.stringify(value)).join()"""
    )
    assert "ada" in kept, "it looked at the page"
    assert caller.key[3:] not in kept
    assert await page.js("return indexedDB.databases()") == []
    assert await page.js("return caches.keys()") == []

    await page.click("#forget")
    await page.until(
        "!$('#door').hidden && $('#room').hidden && document.activeElement.id === 'key'"
    )
    assert "ada" not in await page.js("return document.documentElement.outerHTML")


@in_a_browser
async def test_a_wrong_key_is_told_in_a_sentence(page: Page, caller: Caller) -> None:
    await page.type("#key", "fr_short" + Keys.ENTER)
    await page.until("$('#key-problem').textContent.includes('46 characters')")
    assert await page.complaints() == [], "nothing was sent"
    await page.js("$('#key').value = ''")
    await page.type("#key", "fr_" + "x" * 43 + Keys.ENTER)
    await page.until("$('#key-problem').textContent.startsWith('Baton does not know this key.')")
    [refused] = await page.complaints()
    assert "401" in refused
    assert await page.js("return $('#key').value") == ""


# --- From a button to a document ------------------------------------------------------------


@in_a_browser
async def test_a_handoff_goes_from_the_button_to_the_document_over_the_stream(
    page: Page, caller: Caller, working: Working
) -> None:
    await caller.ingest(
        {"title": "feat: an LRU cache (#7)", "url": "https://example.com/acme/web/pull/7"},
        {"title": "We decided to keep `TTL`_maps_.", "source": "slack", "event_type": "message"},
    )
    await enter(page, caller.key)
    await page.click("#ask")
    await page.until("$('.card .state')?.textContent === 'Queued, next in line'")
    assert await page.js("return $('.card').getAttribute('aria-busy')") == "true"
    provider = Held()
    async with working(provider) as executor:
        await page.until("!$('.card .state').textContent.startsWith('Queued')")
        await provider.asked.wait()
        await executor.report_once()
        await page.until("$('.card .state').textContent === 'Writing, from 2 events'")
        assert await page.text(".card button") == "Cancel"
        provider.may.set()
        await page.until(OPENED)
    [job] = (await caller.http.get("/jobs")).json()["jobs"]
    result = (await caller.job(job["id"]))["result"]
    shown = await page.text("#sheet")
    assert shown.startswith(result["title"])
    for heading in ("KEY CHANGES", "DECISIONS"):
        assert heading in shown
    assert await page.js("return $('#sheet li a').href") == "https://example.com/acme/web/pull/7"
    assert await page.js("return $('#sheet li a').rel") == "noreferrer noopener"
    assert await page.js("return $('#sheet code')?.textContent") == "TTL"
    assert "\\" not in shown and "**" not in shown
    assert await page.js("return document.activeElement.id") == "document-title"
    assert await page.js("return $('#documents [aria-current]').innerText.includes('Handoff')")
    assert "ready" in await page.js("return $('#news').textContent")
    await page.click("#copy")
    await page.until("$('#copy').textContent === 'Copied'")
    asked = await page.js(f"return {REQUESTS}.filter((name) => name.includes('/jobs/'))")
    assert sum(name.endswith("/events") for name in asked) >= 1


@in_a_browser
async def test_jobs_beyond_the_streams_are_followed_by_the_clock(
    page: Page, caller: Caller, working: Working
) -> None:
    await caller.ingest({"title": "feat: a cache", "metadata": {"files": ["app/cache.py"]}})
    await enter(page, caller.key)
    for place in (1, 3, 4):
        await page.click(f"#kinds label:nth-of-type({place})")
        await page.click("#ask")
        await page.until(f"$('.card h3')?.textContent === {KINDS[place - 1]!r}")
    async with working():
        await page.until("document.querySelectorAll('#documents li').length === 3")
    assert await page.js("return $('#jobs-section').hidden")
    streamed = await page.js(
        f"return new Set({REQUESTS}.filter((name) => name.endsWith('/events'))).size"
    )
    assert streamed == 2


@in_a_browser
async def test_a_job_is_cancelled_and_asked_for_again(
    page: Page, caller: Caller, working: Working
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await enter(page, caller.key)
    await page.click("#ask")
    await page.click(".card button")
    await page.until("$('.card .state').textContent === 'Cancelled by the caller.'")
    [first] = (await caller.http.get("/jobs")).json()["jobs"]
    assert first["outcome"] == "cancelled"
    assert await page.text(".card .buttons") == "Try again\nDismiss"
    async with working():
        await page.click(".card button")
        await page.until(OPENED)
    again = (await caller.http.get("/jobs")).json()["jobs"][0]
    assert (again["retry_of"], again["status"]) == (first["id"], "completed")


@in_a_browser
async def test_a_job_that_failed_says_why(page: Page, caller: Caller, working: Working) -> None:
    await enter(page, caller.key)
    async with working():
        await page.click("#kinds label:nth-of-type(3)")
        assert await page.text("#ask") == "Write the brief"
        await page.click("#ask")
        await page.until("$('.card')?.getAttribute('aria-busy') === 'false'")
    [job] = (await caller.http.get("/jobs")).json()["jobs"]
    assert (job["kind"], job["status"]) == ("onboarding_brief", "failed")
    assert await page.text(".card .state") == job["error"]


@in_a_browser
async def test_everything_can_be_done_with_the_keyboard(
    page: Page, caller: Caller, working: Working
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    await page.press(Keys.TAB, Keys.TAB)
    assert await page.js("return document.activeElement.id") == "key"
    await page.press(caller.key, Keys.ENTER)
    await page.until("document.activeElement.id === 'project'")
    await page.press(Keys.TAB, Keys.ARROW_DOWN)
    assert await page.text("#ask") == "Write the release notes"
    await page.press(Keys.ARROW_UP, Keys.TAB, Keys.TAB)
    assert await page.js("return document.activeElement.id") == "ask"
    outline = await page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    async with working():
        await page.press(Keys.ENTER)
        await page.until(f"{OPENED} && document.activeElement.id === 'document-title'")
    await page.press(Keys.ESCAPE)
    await page.until("$('#document').hidden && document.activeElement.closest('#documents')")
    await page.press(Keys.ENTER)
    await page.until(OPENED)


# --- What a document cannot do --------------------------------------------------------------

HOSTILE = """# <img src=x onerror=alert(1)> title

<script>window.done = 1</script> <b onclick="window.done = 1">bold</b>

- [one](javascript:window.done=1) [two](JaVaScRiPt:alert(1)) [three](data:text/html,x)
- [four](<java\tscript:alert(1)>) [five](//evil.example) [six](https://good.example/"onclick=x)
- ![picture](https://evil.example/pixel.png) <https://good.example/auto>
- &#60;script&#62; `<i>code</i>`

    - nested

```
</code><script>window.done = 1</script>
```

> "><svg onload=alert(1)>
"""


@in_a_browser
async def test_a_hostile_document_is_shown_and_does_nothing(
    page: Page, read: Callable[[str], Awaitable[None]]
) -> None:
    await read(HOSTILE)
    names = await page.js(
        "return [...new Set([...$('#sheet').querySelectorAll('*')].map((e) => e.localName))].sort()"
    )
    assert names == ["a", "blockquote", "code", "h2", "li", "p", "pre", "span", "ul"]
    attributes = await page.js(
        "return [...$('#sheet').querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
    )
    assert set(attributes) == {"href", "id", "rel", "tabindex", "target"}
    links = await page.js("return [...$('#sheet').querySelectorAll('a')].map((a) => a.href)")
    assert links == ["https://good.example/%22onclick=x", "https://good.example/auto"]
    shown = await page.text("#sheet")
    for text in (
        "<img src=x onerror=alert(1)> title",
        "<script>",
        "<b onclick",
        "</code>",
        "three",
    ):
        assert text in shown
    assert await page.js("return window.done") is None
    assert not [name for name in await page.js(f"return {REQUESTS}") if "evil" in name]


@in_a_browser
async def test_what_was_escaped_is_read_as_it_was_written(
    page: Page, read: Callable[[str], Awaitable[None]]
) -> None:
    texts = [
        "a * b * c, 2*3*4, **bold**, _under_, snake_case_name, __init__, ***",
        "# no heading", "> no quote", "- no list", "+ nor this", "1. nor this", "=== ---",
        "[link](https://example.com) ![image](x.png) [a][b] <https://example.com>",
        "<b>&lt; &amp; &#60; &nbsp;</b> \\ \\* $HOME | ~~gone~~ javascript:alert(1)",
        "https://example.com/a_b_c?x=1&y=2", "``` ticks ``",
        "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d",
    ]  # fmt: skip
    await read("# T\n\n" + "\n".join(f"- {escaped(text)}" for text in texts))
    shown = await page.js(
        "return [...document.querySelectorAll('#sheet li')].map((li) => li.textContent)"
    )
    assert [text.replace("\u200b", "") for text in shown] == texts


# --- Where it is used -----------------------------------------------------------------------


@in_a_browser
async def test_nothing_is_wider_than_a_small_phone(
    page: Page, read: Callable[[str], Awaitable[None]]
) -> None:
    await page.resize(320, 640)
    try:
        fits = "return document.documentElement.scrollWidth <= 320"
        assert await page.js(fits)
        word = "x" * 150
        await read(f"# {word}\n\n- {word} `{word}`\n\n```\n{word}\n```\n")
        assert await page.js(fits)
        top = await page.js("return $('#document').getBoundingClientRect().top / innerHeight")
        assert -0.1 < top < 0.5, "it was scrolled to"
    finally:
        await page.resize(1280, 900)


@in_a_browser
async def test_the_page_goes_on_when_the_server_comes_back(
    driver: Chrome, caller: Caller, dsn: str, working: Working
) -> None:
    await caller.ingest({"title": "feat: a cache"})
    page, app = Page(driver), create_app(Settings(database_url=dsn, limits=NO_LIMITS))
    async with served(app) as url:
        await page.open(url)
        await page.js(
            """const real = fetch;
            window.resumed = [];
            window.fetch = (address, options) => {
              resumed.push(options.headers?.["Last-Event-ID"]);
              return real(address, options);
            };"""
        )
        await enter(page, caller.key)
        await page.click("#ask")
        await page.until("$('.card .state')?.textContent.startsWith('Queued')")
    await page.until("$('#health').dataset.state === 'down'")
    provider = Held()
    async with served(app, port=urlsplit(url).port or 0), working(provider):
        await page.until("resumed.includes('1')")
        provider.may.set()
        await page.until(f"{OPENED} && $('#health').dataset.state === 'ready'")
        await page.open("about:blank")
    await page.complaints()


@in_a_browser
@pytest.mark.parametrize("limits", [Limits(generate=1)])
async def test_a_limit_is_told_and_waited_for(page: Page, caller: Caller) -> None:
    await enter(page, caller.key)
    await page.click("#ask")
    await page.until("$('.card')")
    await page.click(".card button")
    await page.click("#ask")
    await page.until("$('#ask-problem').textContent.startsWith('Too many requests.')")
    await page.until("/^Wait [0-9]+ s$/.test($('#ask').textContent)")
    [refused] = await page.complaints()
    assert "429" in refused
    await page.click("#ask")
    assert await page.complaints() == [], "it does not ask again before it may"
