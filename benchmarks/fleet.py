"""Forty small scenes over two workers, one of which is killed by SIGKILL in the middle: forty maps, each once.

    python benchmarks/fleet.py [--network RUN] [--scenes 40] [--out FOLDER] [--record FILE.json]

Exits 1 unless all maps exist, each was published once, and each equals that of a single process.
Linux only (processes are listed by psutil, which dask installs).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import rasterio
from rasterio import Affine

from overfly.core.device import describe_machine
from overfly.data.synthetic import synthesize
from overfly.recipe import load
from overfly.training.setup import initial_network


def scenes(folder: Path, count: int, size: int) -> None:
    """Write small synthetic images with different locations."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.moveaxis(synthesize("urban" if number % 2 else "rural", "test", number, size)[0], -1, 0)
        transform = Affine(0.3, 0, 300_000 + 0.3 * size * number, 0, -0.3, 2_700_000)
        how = {"driver": "GTiff", "tiled": True, "compress": "deflate", "crs": "EPSG:32640", "transform": transform}
        with rasterio.open(
            folder / f"scene_{number}.tif", "w", width=size, height=size, count=3, dtype="uint8", **how
        ) as result:
            result.write(pixels)


def workers(process: psutil.Process) -> list[psutil.Process]:
    """Processes that dask started below a command."""
    return [child for child in process.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def fleet(network: Path, folder: Path, out: Path, count: int) -> dict[str, object]:
    """Run the command, kill a worker once a quarter of the maps exist, and record when maps appear."""
    command = [sys.executable, "-m", "overfly", "predict", str(network), f"{folder}/*.tif", "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    published: dict[str, set[int]] = {}
    killed = at = 0
    while process.poll() is None:
        time.sleep(0.05)
        for file in out.glob("*.tif"):
            published.setdefault(file.name, set()).add(file.stat().st_ino)
        if not killed and len(published) >= count // 4:
            worker = workers(psutil.Process(process.pid))[0]
            killed, at = worker.pid, len(published)
            worker.send_signal(signal.SIGKILL)
    output, errors = process.communicate()
    return {
        "status": process.returncode, "seconds": time.monotonic() - started, "killed_after_maps": at,
        "maps": len(list(out.glob("*.tif"))), "published_once": all(len(seen) == 1 for seen in published.values()),
        "left_over": [path.name for path in out.glob(".*")], "output": output.splitlines()[-2:],
        "errors": errors[-500:],
    }  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path)
    settings = parser.parse_args()
    root = settings.out or Path(tempfile.mkdtemp(prefix="overfly-fleet-"))
    scenes(root / "scenes", settings.scenes, settings.size)
    if settings.network is None:
        synthetic = {"name": "synthetic", "scene": "urban", "size": 64, "train": 2}
        recipe = load({"source": synthetic, "target": {**synthetic, "scene": "rural"}, "model": "lraspp_mobilenet_v2"})
        settings.network = initial_network(recipe)[0].eval().save(root / "network.safetensors")
    result = fleet(settings.network, root / "scenes", root / "maps", settings.scenes)
    alone = [sys.executable, "-m", "overfly", "predict", str(settings.network), f"{root}/scenes/*.tif", "--quiet"]
    subprocess.run([*alone, "--out", str(root / "alone")], check=True, stdout=subprocess.DEVNULL)
    same = []
    for file in sorted((root / "alone").glob("*.tif")):
        with rasterio.open(file) as one, rasterio.open(root / "maps" / file.name) as other:
            same.append(float((one.read() == other.read()).mean()))
    result |= {"scenes": settings.scenes, "size": settings.size, "least_share_of_equal_pixels": min(same)}
    result |= {"machine": describe_machine()}
    text = json.dumps(result, indent=2)
    print(text)
    if settings.record:
        settings.record.write_text(text + "\n")
    whole = result["maps"] == len(same) == settings.scenes and result["published_once"] and not result["left_over"]
    return int(not (whole and result["status"] == 0 and result["killed_after_maps"] and min(same) > 0.9999))


if __name__ == "__main__":
    sys.exit(main())
