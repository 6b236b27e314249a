"""Takes the pictures of the Dagster UI for the docs: `make screenshots`. Needs Chromium on the PATH."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PORT = 3111
DAYS = ["2013-01-01", "2013-01-02", "2013-01-03"]


def wait_for_ui(url: str, seconds: float) -> None:
    """Wait until the UI answers."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return
        if time.monotonic() > deadline:
            sys.exit(f"{url} did not answer in {seconds:.0f} s")
        time.sleep(0.5)


def launch(day: str, home: Path, servers: str) -> None:
    """Materialize a day's assets."""
    subprocess.run(
        [str(Path(sys.executable).with_name("dg")), "launch", "--assets", "*", "--partition", day],
        cwd=ROOT / "example_project",
        env={
            **os.environ,
            "DAGSTER_HOME": str(home),
            "KAFKA_BOOTSTRAP_SERVERS": servers,
            "VIRTUAL_ENV": sys.prefix,
        },
        check=True,
        timeout=180,
    )


def picture(chromium: str, url: str, name: str, size: str) -> None:
    """Take a picture of a page, once its requests are answered."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={size}",
                "--virtual-time-budget=30000",
                f"--screenshot={IMAGES / name}",
                url,
            ],
            check=True,
            timeout=180,
        )


def main() -> None:
    """Run the example, materialize some days, and take the pictures."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is needed, for instance Debian's package 'chromium'")
    IMAGES.mkdir(parents=True, exist_ok=True)
    home = ROOT / ".dagster_home"
    ui = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "example_project" / "demo.py"), "ui", "--port", str(PORT)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        servers = next(found[1] for line in ui.stdout or [] if (found := re.match(r"Kafka: (\S+)", line)))
        wait_for_ui(f"http://127.0.0.1:{PORT}/server_info", 120)
        for day in DAYS:
            launch(day, home, servers)
        base = f"http://127.0.0.1:{PORT}"
        picture(chromium, f"{base}/assets/flights?partition={DAYS[-1]}", "asset-flights.png", "1500,1015")
        picture(chromium, f"{base}/asset-groups", "assets.png", "1400,800")
    finally:
        ui.send_signal(signal.SIGTERM)
        ui.wait(60)


if __name__ == "__main__":
    main()
