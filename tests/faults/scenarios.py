"""Work that writes files, for `driver.py`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import small_network  # noqa: F401 - registers the network
from fake_hub import FakeHub, fake_hub
from fileserver import FOLDERS, archive_of, publish, serving
from overfly import adapt, benchmark, train
from overfly.adaptation.selection import Comparison
from overfly.core.atomic_files import TRAILER, TRAILER_BYTES
from overfly.core.errors import OverflyError
from overfly.data import loading, loveda
from overfly.data.domain import Domain
from overfly.data.loveda import download_loveda
from overfly.data.synthetic import write_synthetic
from overfly.exporting import exporter, hub
from overfly.exporting.predictor import ExportSettings, model_metadata
from overfly.exporting.runtimes import check_export
from overfly.models.segmenter import Segmenter
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster
from overfly.recipe import load
from overfly.training.run import Run
from random_networks import random_network
from rasters import ids, noise, pointwise, write


class Scenario(NamedTuple):
    """Work in a folder.

    Attributes:
        prepare: writes what the work needs.
        act: does the work, and returns its content.
        check: raises unless every file of the work is whole or absent.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], bytes]
    check: Callable[[Path], object]


def nothing(_: Path) -> None:
    """Prepare or check nothing."""


def save_weights(folder: Path) -> bytes:
    network = random_network("small_network")
    network.mean += 1
    return network.save(folder / "w.safetensors").read_bytes()


ARCHIVES = {split: archive_of(split) for split in FOLDERS}
WORLD: dict[str, Any] = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2, "test": 2}
RECIPE = {"source": WORLD, "model": "small_network", "optim": {"name": "sgd", "lr": 0.01}, "crop": 64, "batch": 2}


def train_run(folder: Path) -> bytes:
    run = train(load(RECIPE, "steps=3"), out=folder, device="cpu", quiet=True, checkpoint_every=1).run
    return b"".join(tensor.numpy().tobytes() for tensor in run.segmenter().state_dict().values())


def check_runs(folder: Path) -> None:
    for file in folder.glob("*/recipe.yaml"):
        run = Run.open(file.parent)
        assert run.recipe
        assert list(run.log.rows()) or not run.scores
        run.whole_checkpoint()
        if run.weights.exists():
            Segmenter.load(run.weights)


def export(folder: Path) -> bytes:
    segmenter, image = random_network("small_network"), np.full((1, 3, 64, 64), 100, np.float32)
    metadata = model_metadata(segmenter, window=64)
    data = exporter.EvaluationData([image], [image], None, "gray")
    file, report = exporter.export(
        segmenter, metadata, ExportSettings(format="torch"), data, folder=folder, name="net", on_progress=lambda _: None
    )
    assert check_export(file)
    return str(report.parity[0].agreement).encode()


def check_exports(folder: Path) -> None:
    if (folder / "net.pt2").exists():
        assert check_export(folder / "net.pt2")


def make_map(folder: Path) -> bytes:
    settings = MapSettings(window=64, uncertainty=True)
    map_raster(pointwise(), str(folder / "scene.tif"), folder / "map.tif", settings, network="none")
    return ids(folder / "map.tif").tobytes() + ids(folder / "map_uncertainty.tif").tobytes()


def check_map(folder: Path) -> None:
    for name in ("map.tif", "map_uncertainty.tif"):
        if (folder / name).exists():
            assert ids(folder / name).shape == (200, 150)


def report(folder: Path) -> bytes:
    from overfly.commands.train import report as write_report

    write_report([next(folder.glob("*/recipe.yaml")).parent], out=folder / "report.html", images=0, speed=False)
    check_report(folder)
    return b"written"


def check_report(folder: Path) -> None:
    if (folder / "report.html").exists():
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def synthesize(folder: Path) -> bytes:
    write_synthetic(folder / "world", size=16, train=1, val=1, test=1)
    return b"".join(file.read_bytes() for file in sorted((folder / "world").rglob("*.png")))


def move_from_hub(folder: Path) -> bytes:
    """The part of `hub load` after the download."""
    shutil.copytree(folder / "downloaded", folder / "copy", dirs_exist_ok=True)
    files = hub._move_exports(folder / "copy", folder / "out", "me/net")
    return files[0].read_bytes()


def prepare_hub(folder: Path) -> None:
    (folder / "downloaded").mkdir()
    export(folder / "downloaded")


def push_to_hub(folder: Path) -> bytes:
    """Push an export; its card is written to a temporary folder first."""
    (folder / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "tmp")
    with fake_hub() as address:
        try:
            hub.push(folder / "downloaded" / "net.pt2", "me/net", endpoint=address)
        except OverflyError:
            assert not FakeHub.files  # one commit holds all files
            raise
        return b"".join(name.encode() + data for name, data in sorted(FakeHub.files.items()))


def fetch(folder: Path) -> bytes:
    """Download and unpack archives in LoveDA's layout from a server on this machine."""
    with pytest.MonkeyPatch.context() as patch, serving(patch) as server:
        publish(patch, server, ARCHIVES)
        root = download_loveda(folder / "loveda", base=server.address).root
    return b"".join(file.read_bytes() for file in sorted(root.rglob("*.png")))


def check_fetched(folder: Path) -> None:
    for split in FOLDERS:
        loveda._complete_files(folder / "loveda", split)


def fill_cache(folder: Path) -> bytes:
    """Decoded images and masks, by way of a cache folder."""
    domain = Domain.model_validate({"name": "loveda", "root": str(folder / "world"), "scene": "urban"})
    loading._VERIFIED.clear()  # as in a new process
    arrays = [loading.open_image(domain, item, None, folder / "cache") for item in domain.items("train")]
    return b"".join(np.asarray(array).tobytes() for pair in arrays for array in pair)


def check_cache(folder: Path) -> None:
    for file in folder.glob("cache/**/*.npy"):
        assert file.read_bytes()[-TRAILER_BYTES:].startswith(TRAILER)


def adapt_run(folder: Path) -> bytes:
    target = {**WORLD, "scene": "rural"}
    recipe = load({**RECIPE, "target": target, "start": {**RECIPE, "steps": 2}}, "method=multiscale_self_training")
    path = adapt(recipe, "steps=2", out=folder, device="cpu", quiet=True, checkpoint_every=1).path
    comparison = Comparison(path)
    tensors = Segmenter.load(comparison.weights).state_dict().values()
    return comparison.selection.recommended.encode() + b"".join(tensor.numpy().tobytes() for tensor in tensors)


def check_comparisons(folder: Path) -> None:
    check_runs(folder)
    for comparison in Comparison.find_all(folder):
        assert comparison.selection.candidates
    for file in folder.glob("*_comparison*/*.safetensors"):
        Segmenter.load(file)


def benchmark_run(folder: Path) -> bytes:
    load(RECIPE, "steps=2").save(folder / "benchmark.yaml")
    table = benchmark([folder / "benchmark.yaml"], seeds="1", out=folder, size=64, device="cpu", quiet=True).table
    return table.model_dump_json(include={"seeds": True, "rows": {0: {"miou": True}}}).encode()


def check_benchmark(folder: Path) -> None:
    check_runs(folder)
    if (folder / "table.json").exists():
        assert json.loads((folder / "table.json").read_text())["rows"]


def write_carelessly(folder: Path) -> bytes:
    """Leave a torn file behind, and fail with a traceback on a full disk."""
    try:
        with (folder / "a").open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(b"12345678")
    except OSError:
        return bytes(1 // 0)
    return (folder / "a").read_bytes()


def check_careless(folder: Path) -> None:
    assert not (folder / "a").exists() or (folder / "a").stat().st_size == 32


SCENARIOS = {
    "weights": Scenario(
        lambda folder: random_network("small_network").save(folder / "w.safetensors"),
        save_weights,
        lambda folder: Segmenter.load(folder / "w.safetensors"),
    ),
    "training": Scenario(nothing, train_run, check_runs),
    "export": Scenario(nothing, export, check_exports),
    "map": Scenario(lambda folder: write(folder / "scene.tif", noise(200, 150)), make_map, check_map),
    "report": Scenario(train_run, report, check_report),
    "synthesize": Scenario(nothing, synthesize, nothing),
    "hub": Scenario(prepare_hub, move_from_hub, lambda folder: check_exports(folder / "out")),
    "push": Scenario(prepare_hub, push_to_hub, lambda folder: check_export(folder / "downloaded" / "net.pt2")),
    "fetch": Scenario(nothing, fetch, check_fetched),
    "cache": Scenario(
        lambda folder: write_synthetic(folder / "world", size=16, train=2, val=1, test=1), fill_cache, check_cache
    ),
    "adapt": Scenario(nothing, adapt_run, check_comparisons),
    "benchmark": Scenario(nothing, benchmark_run, check_benchmark),
    "careless": Scenario(nothing, write_carelessly, check_careless),
}
