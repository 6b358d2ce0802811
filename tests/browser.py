"""Headless Chromium for tests that serve the page in their own event loop.

Selenium blocks, so every command runs in a thread. Browser and driver are those of the machine:
with both paths given, Selenium never looks for one to download.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conftest import BROWSER, DRIVER, NEEDED
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

PATIENCE = 20.0  # seconds until something that has to happen counts as not happening
DOLLAR = "const $ = (selector) => document.querySelector(selector);"
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--no-proxy-server", "--lang=en"),
    "--window-size=1280,900",
)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, for as long as the body runs."""
    assert BROWSER and DRIVER, f"{NEEDED}."
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="baton-chromium-") as profile:
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """The page as a person has it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    async def open(self, url: str) -> None:
        """Load it."""
        await asyncio.to_thread(self._driver.get, url)

    async def js(self, script: str, *values: Any) -> Any:
        """What a script of the test returns."""
        return await asyncio.to_thread(self._driver.execute_script, DOLLAR + script, *values)

    async def until(self, condition: str, *values: Any) -> Any:
        """The value of an expression, once it is true; a failure shows the page."""
        return await asyncio.to_thread(self._until, condition, *values)

    def _until(self, condition: str, *values: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            value = self._driver.execute_script(f"{DOLLAR}return ({condition})", *values)
            if value:
                return value
            time.sleep(0.02)
        seen = self._driver.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"never: {condition}\n{seen}")

    async def text(self, selector: str) -> str:
        """What a person reads there."""
        return str(await asyncio.to_thread(lambda: self._find(selector).text))

    async def click(self, selector: str) -> None:
        """Click it, once it can be seen."""
        await self.until(f"$({selector!r})?.checkVisibility()")
        await asyncio.to_thread(lambda: self._find(selector).click())

    async def type(self, selector: str, text: str) -> None:
        """Click it, and type."""
        await self.click(selector)
        await self.press(text)

    async def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        await asyncio.to_thread(ActionChains(self._driver, 0).send_keys(*keys).perform)

    async def resize(self, width: int, height: int, **emulated: Any) -> None:
        """Another window; narrower than browsers make theirs, as on a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await asyncio.to_thread(
            self._driver.execute_cdp_cmd, "Emulation.setDeviceMetricsOverride", metrics | emulated
        )

    async def complaints(self) -> list[str]:
        """What the console has said since the last time: errors, violations of the policy."""
        entries = await asyncio.to_thread(self._driver.get_log, "browser")
        return [f"{entry['level']} {entry['message']}" for entry in entries]

    def _find(self, selector: str) -> WebElement:
        return self._driver.find_element(By.CSS_SELECTOR, selector)
