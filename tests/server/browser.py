"""Debian's Chromium without a window, and what users see and do in it."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Selenium's driver of it, which reaches nothing but 127.0.0.1; skips where there is none."""
    pytest.importorskip("selenium", reason="needs selenium: pip install 'qjax[browser]'")
    from selenium import webdriver  # pyright: ignore[reportMissingImports]

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for option in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{option}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found


class Tab:
    """A browser with the page, and what users see and do there."""

    def __init__(self, driver: Any):
        self.driver = driver
        self.refused: list[str] = []

    def open(self, url: str, width: int = 900, height: int = 700, scheme: str = "light") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Of the elements that can be seen, as they are in the document."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter(e => e.checkVisibility()).map(e => e.textContent)",
            selector,
        )

    def value(self, selector: str) -> str:
        return self.find(selector).get_property("value")

    def until(self, what: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.wait import (  # pyright: ignore[reportMissingImports]
            WebDriverWait,
        )

        return WebDriverWait(self.driver, 60, 0.02).until(lambda _: what())

    def set(self, selector: str, text: str) -> None:
        self.find(selector).clear()
        self.find(selector).send_keys(text)

    def send(self, text: str) -> None:
        """Types it, and waits for the answer to begin."""
        self.until(lambda: self.texts("#send"))
        self.set("#text", text)
        self.find("#text").send_keys("\ue007")  # Enter

    def answered(self) -> str:
        """The last answer, when it has ended."""
        self.until(lambda: self.texts("#send"))
        return self.texts(".assistant")[-1]

    def errors(self) -> list[str]:
        """What the console has of errors, among them breaches of the page's policy."""
        logged = [each for each in self.driver.get_log("browser") if each["level"] == "SEVERE"]
        return [each["message"] for each in logged]
