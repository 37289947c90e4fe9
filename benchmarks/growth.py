"""Time and memory of commands on one, three and ten times as much: images, pixels, windows, classes, runs, rasters.

    python benchmarks/growth.py [--only pixels,classes] [--out docs/results]

Each command runs in a process of its own, with random networks and synthetic images, and is measured by its CPU time
and peak memory. The growth is what another unit costs from three to ten, over what it costs from one to three: 1 is
linear. Writes growth.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from PIL import Image

from overfly.core.device import describe_machine
from overfly.data.synthetic import synthesize

AMOUNTS = (1, 3, 10)
SETTINGS = ("model=lraspp_mobilenet_v2", "crop=128", "window=128", "batch=4", "precision=32", "validation.every=0")


def cost(*command: str | Path) -> dict[str, float]:
    """CPU seconds and peak memory in MB of a command of overfly; ends the program if it fails."""
    program = Path(sys.executable).with_name("overfly")
    process = subprocess.Popen([program, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"overfly {' '.join(map(str, command))}: {message.decode()[-500:]}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "mb": usage.ru_maxrss / 1024}


@cache
def scene(number: int, side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A synthetic image (H, W, 3) and its class ids (H, W)."""
    return synthesize("urban", "train", number, side)


def write_images(folder: Path, count: int, classes: int = 7, side: int = 256) -> Path:
    """Images and masks of a folder domain with its settings; classes beyond the synthetic seven are drawn at random."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number in range(count):
        image, label = scene(number % 10, side)
        if classes > 7:
            label = np.random.default_rng(number).integers(0, classes, (side // 16,) * 2, np.uint8).repeat(16, 0)
            label = label.repeat(16, 1)
        Image.fromarray(np.roll(image, number, 1)).save(folder / "images" / f"{number}.png")
        Image.fromarray(label).save(folder / "masks" / f"{number}.png")
    names = [f"class {number}" for number in range(classes)]
    domain = {
        "name": "folder", "root": str(folder), "images": "images", "masks": "masks", "classes": names,
        "splits": {"train": 0.5, "val": 0.5},
    }  # fmt: skip
    (folder / "domain.yaml").write_text(yaml.safe_dump(domain))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"source": domain}))
    return folder


def write_raster(path: Path, pixels: int) -> Path:
    """A raster 1,000 pixels wide of about so many pixels."""
    image = np.tile(synthesize("rural", "train", 0, 1000)[0].transpose(2, 0, 1), (1, -(-pixels // 1_000_000), 1))
    shape = {"width": 1000, "height": image.shape[1], "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", tiled=True, crs="EPSG:32640", **shape) as file:
        file.write(image)
    return path


def trained(folder: Path, out: Path, *settings: str) -> Path:
    """A run of two steps."""
    cost("train", folder / "recipe.yaml", *SETTINGS, "steps=2", *settings, "--out", out, "--quiet")
    return next(path for path in sorted(out.iterdir()) if path.is_dir())


def images(folder: Path, amount: int) -> dict[str, float]:
    """`data check` of 100 to 1,000 images of 256²."""
    return cost("data", "check", write_images(folder, 100 * amount) / "domain.yaml")


def scored(folder: Path, amount: int) -> dict[str, float]:
    """`evaluate` on 20 to 200 images of 256²."""
    run = trained(write_images(folder, 40 * amount), folder / "runs")
    return cost("evaluate", run, "--domain", "source", "--split", "val")


def pixels(folder: Path, amount: int) -> dict[str, float]:
    """`predict` of a raster of 2 to 20 million pixels, windows of 128."""
    run = trained(write_images(folder, 4), folder / "runs")
    return cost("predict", run, write_raster(folder / "a.tif", 2_000_000 * amount), "--out", folder / "m.tif")


def rasters(folder: Path, amount: int) -> dict[str, float]:
    """`predict` of 3 to 30 rasters of a million pixels."""
    run, many = trained(write_images(folder, 4), folder / "runs"), folder / "rasters"
    many.mkdir()
    for number in range(3 * amount):
        write_raster(many / f"{number}.tif", 1_000_000)
    return cost("predict", run, many, "--out", folder / "maps")


def classes(folder: Path, amount: int) -> dict[str, float]:
    """`train` of 40 steps with 7 to 70 classes."""
    recipe = write_images(folder, 40, classes=7 * amount) / "recipe.yaml"
    return cost("train", recipe, *SETTINGS, "steps=40", "--out", folder / "runs", "--quiet")


def steps(folder: Path, amount: int) -> dict[str, float]:
    """`train` of 40 to 400 steps."""
    recipe = write_images(folder, 40) / "recipe.yaml"
    return cost("train", recipe, *SETTINGS, f"steps={40 * amount}", "--out", folder / "runs", "--quiet")


def runs(folder: Path, amount: int) -> dict[str, float]:
    """`report` of 5 to 50 runs that were scored."""
    run = trained(write_images(folder, 20), folder / "runs")
    cost("evaluate", run, "--domain", "source", "--split", "val")
    for number in range(1, 5 * amount):
        shutil.copytree(run, run.with_name(f"{run.name}{number}"))
        recipe = run.with_name(f"{run.name}{number}") / "recipe.yaml"
        _, text = recipe.read_text().split("\n", 1)  # the first line is the digest of the others
        recipe.write_text(text.replace("crop: 128", f"crop: {128 + 32 * number}", 1))
    return cost("report", folder / "runs", "--out", folder / "report.html")


MEASURED: tuple[Callable[[Path, int], dict[str, float]], ...] = (
    images, scored, pixels, rasters, classes, steps, runs
)  # fmt: skip


def growth(values: Sequence[dict[str, float]]) -> dict[str, Any]:
    """CPU time, peak memory in MB, and the growth of CPU time."""
    once, thrice, ten = (value["cpu"] for value in values)
    slopes = (thrice - once) / 2, (ten - thrice) / 7
    return {"cpu": [once, thrice, ten], "mb": [value["mb"] for value in values], "growth": slopes[1] / slopes[0]}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for measure in MEASURED:
        if given.only and measure.__name__ not in given.only.split(","):
            continue
        values = []
        for amount in AMOUNTS:
            with tempfile.TemporaryDirectory() as name:
                values.append(measure(Path(name) / "work", amount))
        title = (measure.__doc__ or "").strip(".")
        rows[title] = growth(values)
        print(title, json.dumps(rows[title]), flush=True)
    content = {"machine": describe_machine(), "rows": rows}
    (given.out / "growth.json").write_text(json.dumps(content, indent=1) + "\n")
    print("| work | CPU, seconds | growth | peak memory, MB |\n|---|---|---|---|")
    for title, row in rows.items():
        cpu, memory = (
            ", ".join(f"{value:.{digits}f}" for value in row[key]) for key, digits in (("cpu", 1), ("mb", 0))
        )
        print(f"| {title} | {cpu} | {row['growth']:.2f} | {memory} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
