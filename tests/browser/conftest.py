"""A headless Chromium for tests of the page. Without one, or without Playwright, they are skipped and say so."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.scene import Scene, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_S = 60.0  # the tested machine may be busy


@pytest.fixture(scope="module")  # while it runs, so does an event loop of its own in this thread
def browser() -> "Iterator[Browser]":
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make test-browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: make test-browser installs it")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page that was opened, and what it said and asked for meanwhile.

    Attributes:
        complaints: lines of the console that are errors or warnings, and errors that nobody caught.
        requests: URLs of all requests.
    """

    def __init__(self, page: "Page", scene: Scene, url: str) -> None:
        self.page, self.scene, self.url = page, scene, url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on(
            "console", lambda line: self.complaints.append(line.text) if line.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.set_default_timeout(WAIT_S * 1e3)
        page.goto(url)

    def wait(self, condition: str) -> None:
        """Until an expression of JavaScript is true. Playwright's own wait evaluates text, which the page forbids."""
        end_s = time.monotonic() + WAIT_S
        while not self.page.evaluate(condition):
            assert time.monotonic() < end_s, f"not true within {WAIT_S:g} s: {condition}"
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.page.inner_text(selector)

    def pixels(self, selector: str) -> int:
        """How many different colours a canvas shows."""
        count: int = self.page.evaluate(
            """(selector) => {
                const canvas = document.querySelector(selector);
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                return new Set(new Uint32Array(data.buffer)).size;
            }""",
            selector,
        )
        return count

    def durations_ms(self, name: str) -> list[float]:
        """Of everything that the page measured under a name."""
        found: list[float] = self.page.evaluate(
            "(name) => performance.getEntriesByName(name).map((entry) => entry.duration)", name
        )
        return found


@pytest.fixture
def open_page(browser: "Browser") -> "Iterator[Callable[..., Opened]]":
    """Opens the page over a scene: ``open_page(Scene(), color_scheme="dark")``."""
    closing: list[Any] = []

    def opened(scene: Scene | None = None, **options: Any) -> Opened:
        scene = scene or Scene()
        server = serving(scene)
        url = server.__enter__()
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 1000}, **options})
        closing.append((context, server))
        return Opened(context.new_page(), scene, url)

    yield opened
    for context, server in closing:
        context.close()
        server.__exit__(None, None, None)
