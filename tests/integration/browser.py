"""MLflow's pages as a person sees them: a headless Chromium, and nothing but this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Only the session `browser` installs playwright; the others collect its tests.
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Request

TIMEOUT_S = 40.0
"""For one text to appear or one thing to become clickable; MLflow's first page is slow."""
SIZE = (1500, 950)
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",  # Its sandbox refuses to run as root, which CI does.
    "--disable-gpu",
    "--disable-dev-shm-usage",
    # Other machines do not exist. To refuse requests to them by Playwright's routes would turn the
    # browser's cache off, and MLflow's pages are megabytes of scripts.
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
SEEN_BEFORE = """
    localStorage.clear();
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
    localStorage.setItem("mlflow.detectIssues.guidanceShown_v1", "true");
"""
"""What MLflow remembers of a person who has closed its assistant and its hints once, which else
cover half of each page; and nothing of what another page has stored."""

SETTLE = """() => new Promise(resolve => {
    let quiet = setTimeout(resolve, 700);
    setTimeout(resolve, 8000);
    new MutationObserver(() => { clearTimeout(quiet); quiet = setTimeout(resolve, 700); })
        .observe(document, {subtree: true, childList: true, characterData: true});
})"""
"""Resolves when the page has not changed for 0.7 s, or after 8 s. MLflow's pages poll their server
without end, so the network is never idle."""


def chromium() -> str | None:
    """The installed browser, or None."""
    return next(filter(None, map(shutil.which, EXECUTABLES)), None)


@dataclass(frozen=True)
class Pages:
    """Addresses of MLflow's pages about one experiment (seen in 3.17)."""

    server: str
    experiment_id: str

    @property
    def runs(self) -> str:
        """The table of runs."""
        return f"{self._experiment}/runs"

    @property
    def traces(self) -> str:
        """The table of traces."""
        return f"{self._experiment}/traces"

    @property
    def evaluations(self) -> str:
        """The table of evaluation runs."""
        return f"{self._experiment}/evaluation-runs"

    @property
    def overview(self) -> str:
        """Numbers of all traces, such as their cost."""
        return f"{self._experiment}/overview/usage"

    def evaluated(self, run_id: str) -> str:
        """The rows of an evaluation's run, with their scores."""
        return f"{self.evaluations}/{run_id}/traces"

    def run(self, run_id: str, tab: str = "") -> str:
        """A run; tabs: model-metrics (charts), traces, artifacts."""
        return f"{self._experiment}/runs/{run_id}/{tab}".rstrip("/")

    def trace(self, trace_id: str) -> str:
        """A trace's span tree, over the table of traces."""
        return f"{self._experiment}/traces?selectedEvaluationId={trace_id}"

    @property
    def _experiment(self) -> str:
        return f"{self.server}/#/experiments/{self.experiment_id}"


class Browser:
    """A browser that stays open for many pages. Requests to other machines are refused.

    Attributes:
        refused: addresses that pages asked for and did not get.
        errors: JavaScript errors that pages did not catch.
    """

    def __init__(self, chromium: Chromium) -> None:
        self.refused: list[str] = []
        self.errors: list[str] = []
        # One for all pages, which share the cache.
        self._context = chromium.new_context(color_scheme="light")
        self._context.set_default_timeout(TIMEOUT_S * 1000)
        self._context.add_init_script(SEEN_BEFORE)
        self._context.on("requestfailed", self._note_refused)

    def page_shot(
        self,
        url: str,
        path: Path | None = None,
        *,
        click: Sequence[str] = (),
        wait_for_text: Sequence[str] = (),
        size: tuple[int, int] = SIZE,
    ) -> str:
        """Open `url`, click, wait, and save a screenshot; returns the visible text.

        Args:
            url: a page of this machine.
            path: PNG file to write; None: no picture.
            click: what to click, one after another: a text, or a selector of Playwright's such
                as ``css=…`` or ``role=tab[name="Traces"]``.
            wait_for_text: texts that must all be visible in the end.
            size: width and height of the window in pixels.

        Raises:
            playwright.sync_api.TimeoutError: something did not appear; the picture shows what did.
        """
        with contextlib.closing(self._context.new_page()) as page:
            page.set_viewport_size({"width": size[0], "height": size[1]})
            page.on("pageerror", lambda error: self.errors.append(f"{url}: {error}"))
            try:
                page.goto(url)
                for what in click:
                    selector = what if "=" in what else f"text={what}"
                    page.locator(selector).locator("visible=true").first.click()
                for text in wait_for_text:
                    page.get_by_text(text).locator("visible=true").first.wait_for()
                page.evaluate(SETTLE)
                return page.inner_text("body")
            finally:
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=path)

    def _note_refused(self, request: Request) -> None:
        if request.failure == "net::ERR_NAME_NOT_RESOLVED":
            self.refused.append(request.url)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A `Browser` on the Chromium that is installed."""
    from playwright.sync_api import sync_playwright

    executable = chromium()
    assert executable is not None, f"none of {EXECUTABLES} is installed"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield Browser(launched)
        finally:
            launched.close()
