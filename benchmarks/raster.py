"""A raster of 20,000 × 20,000 pixels: memory, time against the network alone, kill -9 and resume, a valid COG.

    python benchmarks/raster.py [--network RUN | --stand-in] [--size 20000] [--threads 1] [--out FOLDER]
        [--record FILE.json]

Without --network a light network of random weights is used; it takes as long as a trained one. With --stand-in,
memory and resuming are measured without a network. Linux only (memory is read from /proc). Each
measurement runs in its own process:

1. the network alone on some rows of windows; the whole job; the network alone on other rows. Times are per
   window; the network's are the mean before and after the job, so that a drift of the machine's speed affects both.
   CPU time and the network's time within the job are reported beside the wall clock.
2. the same job, killed by SIGKILL when half of the rows of windows are done, and resumed; its pixels are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio import Affine
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from overfly.commands.load_predictor import load_predictor
from overfly.core.classes import Classes
from overfly.core.device import describe_machine
from overfly.data.synthetic import synthesize
from overfly.exporting.predictor import ModelMetadata, Predictor
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster, plan_raster
from overfly.raster.raster_source import inspect_raster
from overfly.raster.tiling import FinishedRows, read_windows
from overfly.recipe import load
from overfly.training.setup import initial_network

TILE = 1024


def write_mosaic(path: Path, size: int) -> None:
    """A mosaic of a few synthetic images, rotated, with a coordinate reference system; tiled and compressed."""
    tiles = [synthesize(scene, "test", number, TILE)[0] for scene in ("urban", "rural") for number in (0, 1)]
    tiles = [np.moveaxis(np.rot90(tile, turn), -1, 0) for tile in tiles for turn in range(4)]
    generator = np.random.default_rng(0)
    georeference = {"crs": "EPSG:32640", "transform": Affine(0.3, 0, 300_000.15, 0, -0.3, 2_700_000.45)}
    how = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1}
    how |= {"num_threads": 2, "bigtiff": "if_safer", "interleave": "pixel"}
    with rasterio.open(path, "w", width=size, height=size, count=3, dtype="uint8", **georeference, **how) as result:
        for top in range(0, size, TILE):
            band = [tiles[number] for number in generator.integers(0, len(tiles), -(-size // TILE))]
            high = min(TILE, size - top)
            result.write(np.concatenate(band, axis=2)[:, :high, :size], window=Window(0, top, size, high))


def memory(key: str) -> int:
    """Bytes of this process's VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(predictor: Predictor, raster: Path, out: Path, share: int) -> dict[str, Any]:
    """The whole job, and the network alone on two of ``share`` rows of its windows, before and after."""
    settings = MapSettings(overwrite=True)
    scene = inspect_raster(str(raster), predictor.metadata, bands=None, nodata=None, max_value=None)
    plan = plan_raster(scene, predictor.metadata, settings, 400 * 2**20)
    predictor(np.zeros((settings.batch, 3, plan.size, plan.size), np.float32))
    model = memory("VmRSS")

    def alone(first: int) -> tuple[float, float, int]:
        wall = work = 0.0
        windows = row = 0
        for item in read_windows(scene, plan, settings.batch):
            if isinstance(item, FinishedRows):
                row += 1
            elif row % share == first:
                started, busy = time.perf_counter(), time.process_time()
                predictor(item.images)
                wall, work = wall + time.perf_counter() - started, work + time.process_time() - busy
                windows += len(item.images)
        return wall, work, windows

    before = alone(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    started, rested = time.perf_counter(), time.process_time()
    result = map_raster(predictor, str(raster), out, settings, network="benchmark")
    wall, work = time.perf_counter() - started, time.process_time() - rested
    peak = memory("VmHWM")
    after = alone(share // 2)
    times = result.windows / (before[2] + after[2])
    network_wall, network_work = (before[0] + after[0]) * times, (before[1] + after[1]) * times
    return {
        "windows": result.windows, "window": plan.size, "overlap": settings.overlap, "batch": settings.batch,
        "job_s": wall, "network_s": network_wall, "ratio": wall / network_wall, "network_alone_on": 1 / times,
        "network_within_job_s": result.network_seconds, "ratio_within_job": wall / result.network_seconds,
        "job_cpu_s": work, "network_cpu_s": network_work, "cpu_ratio": work / network_work,
        "machine": describe_machine(), "load": os.getloadavg(), "model_bytes": model,
        "peak_bytes": peak, "beyond_model_bytes": peak - model,
    }  # fmt: skip


def stand_in() -> Predictor:
    """A network of negligible cost: the brightness of each pixel in seven steps."""
    names = tuple(f"step {number}" for number in range(7))
    about = {"architecture": "stand-in", "classes": Classes(names=names), "mean": (0.0,) * 3, "std": (1.0,) * 3}

    def run(images: np.ndarray) -> np.ndarray:
        step = np.minimum(images[:, 1] // 32, 6)
        return np.stack([np.where(step == number, np.float32(0.7), np.float32(0.05)) for number in range(7)], axis=1)

    return Predictor(ModelMetadata.model_validate(about), "torch", "cpu", run)


def killed(command: list[str], raster: Path, out: Path) -> dict[str, object]:
    """Run a command, kill it in the middle, and run it again."""
    command = [*command, str(out)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    state = out.with_name(f".{out.name}.unfinished") / "progress.json"
    done = 0
    with rasterio.open(raster) as dataset:
        rows = -(-(dataset.height - 512) // 384) + 1
    while process.poll() is None and done < rows // 2:
        time.sleep(0.2)
        if state.is_file():
            done = json.loads(state.read_text())["done"]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = not out.exists()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        "killed_after_rows": done,
        "rows": rows,
        "no_map_at_the_kill": whole,
        "stderr": again.stderr.splitlines()[:1],
    }


def compare(raster: Path, first: Path, second: Path) -> dict[str, object]:
    """Compare the pixels and georeferences of two maps."""
    with rasterio.open(raster) as image, rasterio.open(first) as one, rasterio.open(second) as two:
        equal = all(
            np.array_equal(one.read(1, window=part), two.read(1, window=part)) for _, part in one.block_windows(1)
        )
        exact = one.crs == image.crs and one.transform == image.transform and one.shape == image.shape
    valid, errors, warned = cog_validate(first)
    return {
        "equal_pixels": equal, "crs_transform_size_equal": exact, "valid_cog": valid, "cog_errors": errors,
        "cog_warnings": warned, "map_bytes": first.stat().st_size, "raster_bytes": raster.stat().st_size,
    }  # fmt: skip


def main() -> int:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--stand-in", action="store_true", help="use a network of negligible cost")
    parser.add_argument("--threads", type=int, help="CPU threads of the network; default: one per core")
    parser.add_argument("--share", type=int, default=2, help="the network alone runs on 2 of this many rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    root = settings.out or Path(tempfile.mkdtemp(prefix="overfly-raster-"))
    root.mkdir(parents=True, exist_ok=True)
    raster = root / "raster.tif"
    if settings.stand_in is False and settings.network is None:
        synthetic = {"name": "synthetic", "scene": "urban", "size": 64, "train": 2}
        recipe = load({"source": synthetic, "target": {**synthetic, "scene": "rural"}, "model": "lraspp_mobilenet_v2"})
        settings.network = initial_network(recipe)[0].eval().save(root / "network.safetensors")
    predictor = stand_in() if settings.stand_in else load_predictor(settings.network, device="cpu")
    if settings.measure:
        result = measure(predictor, raster, root / "whole.tif", settings.share)
        settings.measure.write_text(json.dumps(result))
        return 0
    if settings.job:
        map_raster(predictor, str(raster), settings.job, MapSettings(), network="benchmark")
        return 0
    if not raster.exists():
        write_mosaic(raster, settings.size)
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    which = ["--stand-in"] if settings.stand_in else ["--network", str(settings.network)]
    child = [sys.executable, __file__, *which, "--out", str(root), "--share", str(settings.share)]
    subprocess.run([*child, "--measure", str(root / "measured.json")], check=True)
    result = {"size": settings.size, "network": predictor.metadata.architecture}
    result |= json.loads((root / "measured.json").read_text())
    print(json.dumps(result, indent=2), flush=True)
    command = [sys.executable, "-m", "overfly", "predict", str(settings.network), str(raster), "--out"]
    result |= killed([*child, "--job"] if settings.stand_in else command, raster, root / "resumed.tif")
    result |= compare(raster, root / "whole.tif", root / "resumed.tif")
    text = json.dumps(result, indent=2)
    print(text)
    if settings.record:
        settings.record.write_text(text + "\n")
    good = result["equal_pixels"] and result["valid_cog"] and result["crs_transform_size_equal"]
    good = good and (settings.stand_in or result["ratio"] <= 1.15)
    return int(not (good and result["beyond_model_bytes"] < 2e9))


if __name__ == "__main__":
    sys.exit(main())
