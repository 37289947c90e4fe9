"""Files that released versions wrote open in this one, or are refused with one sentence; so are those of later ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from conftest import REPOSITORY
from overfly import predict, rank, report, train
from overfly.adaptation import selection
from overfly.adaptation.selection import Comparison
from overfly.commands.load_predictor import load_predictor
from overfly.core.atomic_files import read_json, write_json
from overfly.core.errors import OverflyError
from overfly.evaluation.scores import Scores
from overfly.exporting import predictor, runtimes
from overfly.models import checkpoints, segmenter
from overfly.models.segmenter import Segmenter
from overfly.raster.manifest import TAG
from overfly.training import run as run_module
from overfly.training.run import Run
from random_networks import random_network
from rasters import ids, noise

FOLDERS = sorted(path for path in (REPOSITORY / "tests" / "versions").iterdir() if path.is_dir())
REFUSED: set[tuple[str, str]] = set()
"""Versions and kinds of files that this version refuses, with one sentence, instead of opening them."""


def check_run(folder: Path) -> None:
    run = Run.open(folder / "finished")
    assert run.finished
    assert run.recipe.steps == 4
    assert {row["step"] for row in run.log.rows()} >= {4}
    for role in ("source", "target"):
        assert 0 < (Scores.model_validate(run.scores[f"{role}/val"]).miou or 0) < 1
    assert train(run.path, device="cpu", quiet=True).run.path == run.path


def check_weights(folder: Path) -> None:
    network = Segmenter.load(folder / "network.safetensors")
    assert network.architecture == "small_network"
    assert len(network.classes) == len(Run.open(folder / "finished").recipe.domain("source").classes)


def check_resume(folder: Path) -> None:
    run = Run.open(folder / "stopped")
    assert not run.finished
    assert run.whole_checkpoint() == run.checkpoint
    assert train(run.path, device="cpu", quiet=True).run.finished


def check_map(folder: Path) -> None:
    os.utime(folder / "scene.tif", ns=(0, 10**18))
    for out, created in (("map.tif", False), ("again.tif", True)):
        settings: dict[str, Any] = {"uncertainty": True, "window": 64, "device": "cpu", "quiet": True}
        made = predict(folder / "network.safetensors", [folder / "scene.tif"], out=folder / out, **settings)
        assert made.maps[0].created == created
    assert (ids(folder / "map.tif") == ids(folder / "again.tif")).mean() > 0.99  # other kernels round differently


def check_report(folder: Path) -> None:
    report([folder / "finished"], out=folder / "report.html", images=2, speed=False, device="cpu")
    assert "small_network" in (folder / "report.html").read_text()


def check_comparison(folder: Path) -> None:
    comparison = Comparison.find_all(folder / "adapted")[0]
    assert len(comparison.selection.candidates) == 5
    assert comparison.selection.markdown()
    assert load_predictor(comparison.path).metadata.architecture == "small_network"
    ranked = rank([folder / "adapted"], limit=2, crop=48, device="cpu")
    assert len(ranked.ranking.candidates) == 5


def check_export(name: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        image = noise(64, 64)[None].astype(np.float32)
        network = load_predictor(folder / "network.safetensors")
        assert runtimes.check_export(folder / name)
        np.testing.assert_allclose(load_predictor(folder / name)(image), network(image), atol=1e-3)

    return check


KINDS: dict[str, Callable[[Path], None]] = {
    "run": check_run, "weights": check_weights, "checkpoint": check_resume, "map": check_map, "report": check_report,
    "comparison": check_comparison, "onnx": check_export("onnx.onnx"), "pt2": check_export("torch.pt2"),
    "openvino": check_export("openvino.xml"),
}  # fmt: skip


def test_files_of_versions_are_kept() -> None:
    assert FOLDERS
    assert sum(file.stat().st_size for file in (REPOSITORY / "tests" / "versions").rglob("*")) < 1_500_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [path.name for path in FOLDERS])
def test_files_of_a_version_open(version: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / version
    shutil.copytree(REPOSITORY / "tests" / "versions" / version, folder)
    if (version, kind) in REFUSED:
        with pytest.raises(OverflyError) as caught:
            KINDS[kind](folder)
        assert "\n" not in str(caught.value)
    else:
        KINDS[kind](folder)


def newer_run(folder: Path, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    file = folder / "finished" / "machine.json"
    write_json(file, read_json(file) | {"format": run_module.FORMAT + 1})
    del patch
    return lambda: Run.open(file.parent)


def newer_weights(folder: Path, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    with patch.context() as later:
        later.setattr(segmenter, "FORMAT", checkpoints.FORMAT + 1)
        random_network("small_network").save(folder / "new.safetensors")
    return lambda: Segmenter.load(folder / "new.safetensors")


def newer_selection(folder: Path, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    comparison = Comparison.find_all(folder / "adapted")[0]
    file = comparison.path / "selection.json"
    write_json(file, read_json(file) | {"format": selection.FORMAT + 1})
    del patch
    return lambda: comparison.selection


def newer_export(folder: Path, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    patch.setattr(predictor, "FORMAT_VERSION", predictor.FORMAT_VERSION - 1)
    return lambda: runtimes.onnx_predictor(folder / "onnx.onnx")


@pytest.mark.parametrize("make", [newer_run, newer_weights, newer_selection, newer_export])
def test_files_of_a_newer_format_are_refused_with_one_sentence(
    make: Callable[[Path, pytest.MonkeyPatch], Callable[[], object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(FOLDERS[-1], folder)
    opened = make(folder, monkeypatch)
    with pytest.raises(
        OverflyError, match=r"(newer version of|exported by) overfly .*format \d.*update overfly"
    ) as caught:
        opened()
    assert "\n" not in str(caught.value)


def test_a_map_of_a_newer_version_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(FOLDERS[-1], folder)
    with rasterio.open(folder / "map.tif", "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
        dataset.update_tags(**{TAG: json.dumps(json.loads(dataset.tags()[TAG]) | {"new_setting": 1})})
    with pytest.raises(OverflyError, match=r"map\.tif .*settings that this version of overfly does not have"):
        check_map(folder)
