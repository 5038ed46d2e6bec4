"""A real browser for the tests of the page: Chromium, without a window."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str:
    """Where the browser is; a machine without one fails the test: unshown is untested."""
    named = os.environ.get("STEPLOOM_BROWSER")
    found = named or next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.fail(
            "no browser: `apt-get install chromium` (nox -s slow does so as root), or name one in STEPLOOM_BROWSER"
        )
    return found


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


class Tab:
    """A page of the browser, and all that it has complained of: errors, refused resources, requests elsewhere."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.complaints: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", self._requested)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.complaints.append(f"asked elsewhere: {request.url}")


@contextlib.asynccontextmanager
async def tab(browser: Browser, address: str, **context: Any) -> AsyncIterator[Tab]:
    """A tab with the page open and connected, in a browser profile of its own."""
    async with await browser.new_context(**context) as profile:
        found = Tab(await profile.new_page(), address)
        await found.page.goto(address)
        await found.page.wait_for_selector("#state[data-state=idle], #state[data-state=running], #key-dialog[open]")
        yield found
