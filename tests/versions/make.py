"""Write small files of this version below ``tests/versions/VERSION``, which later versions must open.

    PYTHONPATH=src:tests python tests/versions/make.py [FOLDER]

Run it for each released version whose files differ, and commit what it writes; `test_versions.py` opens all of it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import small_network  # noqa: F401 - registers the network
from overfly import __version__, adapt, predict, train
from overfly.adaptation import pipeline
from overfly.exporting import exporter
from overfly.exporting.exporter import EvaluationData
from overfly.exporting.predictor import ExportSettings, model_metadata
from overfly.recipe import load
from overfly.training.evaluate import evaluate_domain
from overfly.training.trainer import Trainer
from rasters import noise, write

WORLD: dict[str, Any] = {"name": "synthetic", "size": 64, "train": 4, "val": 2, "test": 2}
RECIPE: dict[str, Any] = {
    "source": {**WORLD, "scene": "urban"}, "target": {**WORLD, "scene": "rural"}, "model": "small_network",
    "optim": {"name": "sgd", "lr": 0.01}, "crop": 64, "batch": 2, "steps": 4,
}  # fmt: skip
EXPORTS = ("onnx", "torch", "openvino")


class StoppedError(Exception):
    """What stops a run before it is finished."""


def stop(_: Trainer) -> None:
    raise StoppedError


def rename(pattern: str, name: str) -> None:
    """Give the only folder of a pattern a name without its time."""
    next(Path().glob(pattern)).rename(name)


def make() -> None:
    """Write all files into the current folder."""
    run = train(load(RECIPE), out=".", device="cpu", quiet=True).run
    for role in ("source", "target"):
        evaluate_domain(run, run.recipe.domain(role), role, "val")
    rename("20*_*", "finished")
    with patch.object(Trainer, "finish", stop):
        try:
            train(load(RECIPE, "seed=1"), out=".", device="cpu", quiet=True, checkpoint_every=2)
        except StoppedError:
            rename("20*_*", "stopped")
    with patch.object(pipeline, "RECALIBRATION", {"batch": 2, "steps": 2}):
        adapt(
            load({**RECIPE, "start": RECIPE}, "method=multiscale_self_training"),
            out="adapted",
            device="cpu",
            quiet=True,
        )
    for folder in Path("adapted").rglob("samples"):
        shutil.rmtree(folder)
    for lock in Path().rglob(".lock"):
        lock.unlink()
    network = shutil.copy("finished/checkpoints/best.safetensors", "network.safetensors")
    write(Path("scene.tif"), noise(100, 120))
    os.utime("scene.tif", ns=(0, 10**18))
    predict(network, ["scene.tif"], out="map.tif", uncertainty=True, window=64, device="cpu", quiet=True)
    export(Path(network))


def export(network: Path) -> None:
    """Export the network in each format."""
    from overfly.models.segmenter import Segmenter

    segmenter = Segmenter.load(network).eval()
    image = noise(64, 64)[None].astype("float32")
    metadata = model_metadata(segmenter, window=64)
    exporter.SECONDS, exporter.ROUNDS = 0.0, 1
    for kind in EXPORTS:
        settings, data = ExportSettings(format=kind), EvaluationData([image], [image], None, "noise")
        exporter.export(
            segmenter, metadata, settings, data, folder=Path(), name=kind, on_progress=lambda _: None
        )  # fmt: skip


def main() -> None:
    """Make the folder of this version."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name(__version__))
    folder.mkdir(parents=True)
    sys.argv = ["overfly"]  # recorded by a run
    os.chdir(folder)
    make()


if __name__ == "__main__":
    main()
