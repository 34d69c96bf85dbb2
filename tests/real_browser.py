"""A real browser without a window, for tests of pages."""

from __future__ import annotations

import shutil
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def find_browser() -> tuple[str, str] | None:
    """(browser, its driver), or None where they are not installed."""
    browser, driver = next(filter(None, map(shutil.which, _BROWSERS)), None), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def start_browser(found: tuple[str, str], profile: Path, *, dark: bool = False) -> Chrome:
    """A browser with a profile of its own."""
    options = ChromeOptions()
    options.binary_location = found[0]
    for option in (*_OPTIONS, f"--user-data-dir={profile}", "--window-size=1440,1000"):
        options.add_argument(option)
    if dark:
        options.add_argument("--blink-settings=preferredColorScheme=0")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=ChromeService(found[1]))
