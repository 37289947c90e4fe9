"""Draw docs/images/{report,map,start}-*.webp: the report and the server's pages, small and large, light and dark.

python docs/screenshots.py runs/demo

Needs the extras serve and dev, and a Chromium. Runs are those of `make demo`, which are not changed.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from overfly import report
from overfly.commands.serve import served_networks
from overfly.data.domain import Domain
from overfly.web.server import application, start

IMAGES = Path(__file__).parent / "images"
SIZES = ((390, 844), (1440, 900))
LARGEST = 300_000


def scene(path: Path) -> Path:
    """A rural synthetic image of six tiles."""
    domain = Domain.model_validate({"name": "synthetic", "scene": "rural", "size": 256, "val": 6})
    tiles = [domain.read_image(item) for item in domain.items("val")]
    rows = [np.concatenate(tiles[first : first + 3], axis=1) for first in (0, 3)]
    Image.fromarray(np.concatenate(rows)).save(path)
    return path


def shoot(browser: Any, name: str, visit: Callable[[Any], None], height: int | None = None) -> None:
    """Take a screenshot for each size and color scheme; the page must not be wider than the viewport."""
    for width, tall in SIZES:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": height or tall}, color_scheme=scheme)
            wrong: list[str] = []
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            visit(page)
            page.wait_for_timeout(800)
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            if wide > 0 or wrong:
                raise SystemExit(f"{name} at {width}: {wide} pixels too wide, {wrong}")
            path = IMAGES / f"{name}-{width}-{scheme}.webp"
            Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=80, method=6)
            if path.stat().st_size > LARGEST:
                raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
            print(path, path.stat().st_size)
            page.close()


def main() -> None:
    """Write a report, serve the runs, and take screenshots of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as engine:
        copied = Path(folder) / "runs"
        shutil.copytree(settings.runs, copied, symlinks=True)  # labels opened are counted in a run's folder
        written = report([str(copied)], out=Path(folder) / "report.html", title="Urban to Rural", device="cpu").path
        image = scene(Path(folder) / "scene.png")
        running = start(application(served_networks([str(copied)], device="cpu")))
        browser = engine.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )

        def drop(page: Any) -> None:
            page.goto(running.address)
            page.set_input_files("#file", str(image))
            page.wait_for_url("**/map/*", timeout=120_000)
            page.wait_for_selector("img.leaflet-tile-loaded")

        shoot(browser, "report", lambda page: page.goto(written.as_uri()), height=1500)
        shoot(browser, "start", lambda page: page.goto(running.address))
        shoot(browser, "map", drop)
        browser.close()
        running.stop()


if __name__ == "__main__":
    main()
