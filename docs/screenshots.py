"""Takes the pictures of the Dagster UI for the docs: `make screenshots`. Needs Chromium."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import FloatRect, Locator, Page, ViewportSize, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeoutError

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
DAYS = [f"2013-01-{day:02}" for day in range(1, 8)]
_ADDRESSES = ("KAFKA_BOOTSTRAP_SERVERS", "SCHEMA_REGISTRY_URL")
_SIZE: ViewportSize = {"width": 1500, "height": 1020}
_START_SECONDS = 240
_PAGE_SECONDS = 60

_PUBLISH = """
import sys
import dagster as dg
from example_project.definitions import defs

definitions = defs()
with dg.DagsterInstance.get() as instance:
    for day in sys.argv[1:]:
        definitions.resolve_job_def("publish_day").execute_in_process(partition_key=day, instance=instance)
"""


class Ui(NamedTuple):
    """A running `make ui`."""

    url: str
    servers: str
    registry: str
    home: Path


@contextlib.contextmanager
def running_ui() -> Iterator[Ui]:
    """`make ui` on a free port, with a home folder of its own; it has ended afterwards, with its Kafka."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ui.log"
        with log.open("w") as output:
            ui = subprocess.Popen(
                [sys.executable, "-u", "example_project/demo.py", "ui", "--port", str(port), "--home", folder],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name not in _ADDRESSES},
            )
            try:
                url = f"http://127.0.0.1:{port}"
                _wait_for(url, ui, log)
                said = dict(re.findall(r"^(Kafka|Schema Registry): (\S+)", log.read_text(), re.MULTILINE))
                yield Ui(url, said["Kafka"], said["Schema Registry"], Path(folder))
            finally:
                ui.send_signal(signal.SIGTERM)
                try:
                    ui.wait(60)
                except subprocess.TimeoutExpired:
                    ui.kill()


def _wait_for(url: str, ui: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/server_info", timeout=5):  # noqa: S310
            return
        if ui.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{url} did not answer in {_START_SECONDS} s:\n{log.read_text()}")
        time.sleep(0.5)


@contextlib.contextmanager
def chromium_page() -> Iterator[Page]:
    """A page of a headless Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise RuntimeError("Chromium is needed, for instance Debian's package 'chromium'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport=_SIZE)
            page.set_default_timeout(_PAGE_SECONDS * 1000)
            yield page
        finally:
            browser.close()


def open_when_shown(page: Page, url: str, text: str) -> None:
    """Open a page, anew every few seconds, until it shows a text."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        page.goto(url)
        with contextlib.suppress(PageTimeoutError):
            return page.get_by_text(text).first.wait_for(timeout=10_000)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} did not show {text!r} in {_START_SECONDS} s")


def launch_partition(page: Page, url: str, asset: str, partition: str) -> None:
    """Launch a run for one Dagster partition of an asset, by hand on its page."""
    page.goto(f"{url}/assets/{asset}")
    page.get_by_role("button", name="Materialize…").click()
    dialog = page.get_by_role("dialog")
    chosen = dialog.locator("input[type=text]").first
    chosen.fill(partition)
    chosen.press("Enter")
    dialog.get_by_role("button", name=re.compile(r"^Launch (1 )?run")).click()
    dialog.wait_for(state="hidden")


def publish(ui: Ui, days: list[str]) -> None:
    """Materialize the days' assets, in one process."""
    addresses = dict(zip(_ADDRESSES, (ui.servers, ui.registry), strict=True))
    subprocess.run(
        [sys.executable, "-c", _PUBLISH, *days],
        env={**os.environ, **addresses, "DAGSTER_HOME": str(ui.home)},
        check=True,
        timeout=600,
    )


def fail(page: Page, ui: Ui) -> None:
    """Launch the asset that fails on purpose, and open the explanation of its failure."""
    page.goto(f"{ui.url}/assets/planes")
    page.get_by_role("button").filter(has_text=re.compile("^Materialize$")).click()
    query = "{runsOrError(limit: 1) {... on Runs {results {runId assetSelection {path}}}}}"
    deadline = time.monotonic() + _START_SECONDS
    while True:
        answer = page.request.post(f"{ui.url}/graphql", data={"query": query}).json()
        latest = answer["data"]["runsOrError"]["results"]
        if latest and latest[0]["assetSelection"] == [{"path": ["planes"]}]:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"no run was launched in {_START_SECONDS} s")
        page.wait_for_timeout(1000)
    run = latest[0]["runId"]
    open_when_shown(page, f"{ui.url}/runs/{run}", "kafka/what_to_do")


def _take(page: Page, name: str, until: Locator | None = None) -> None:
    """Take a picture of the page; of an open dialog only, as far as an element in it, if one is given."""
    page.wait_for_timeout(2000)
    clip: FloatRect | None = None
    if until is not None:
        box, last = page.get_by_role("dialog").bounding_box(), until.bounding_box()
        if box is None or last is None:
            raise RuntimeError(f"{name}: what the picture is of is not visible")
        clip = {**box, "height": last["y"] + last["height"] - box["y"] + 8}
    page.screenshot(path=IMAGES / name, animations="disabled", clip=clip)
    print(f"{name}: {(IMAGES / name).stat().st_size // 1024} KiB")


def main() -> None:
    """Run the example, materialize some days, let an asset fail, and take the pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with running_ui() as ui, chromium_page() as page:
        publish(ui, DAYS)
        page.goto(f"{ui.url}/assets/flights")
        page.get_by_text("last offset").first.wait_for()
        _take(page, "asset-flights.png")
        page.get_by_role("button", name="Plots").click()
        page.get_by_role("button").filter(has_text=re.compile("^Events$")).click()
        page.get_by_text("kafka/records_per_second").wait_for()
        page.set_viewport_size({**_SIZE, "height": 1600})  # all the plots
        _take(page, "plots.png")
        page.set_viewport_size(_SIZE)
        page.goto(f"{ui.url}/assets/flights?view=lineage&lineageScope=downstream")
        page.get_by_text("long_delays").last.wait_for()
        _take(page, "lineage.png")
        fail(page, ui)
        page.get_by_text("View full message").first.click()
        dialog = page.get_by_role("dialog")
        _take(page, "failure.png", until=dialog.locator("tr", has_text="kafka/field"))


if __name__ == "__main__":
    main()
