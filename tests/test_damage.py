"""Single bits of every kind of file are flipped: opening it raises an error, or gives the same content.

``pytest tests/test_damage.py -s`` prints the outcomes of each kind.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from overfly import train
from overfly.adaptation.gate import Gate
from overfly.adaptation.selection import BASELINE, CandidateReport, Comparison, Selection
from overfly.commands.load_predictor import load_predictor
from overfly.core.atomic_files import write_json
from overfly.core.choices import ExportFormat
from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError, RunError, WeightsError
from overfly.data import loading
from overfly.data.folder import Folder
from overfly.data.synthetic import write_synthetic
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.evaluation.scores import Scores
from overfly.exporting import exporter, hub
from overfly.exporting.exporter import EvaluationData
from overfly.exporting.predictor import ExportSettings, model_metadata
from overfly.models.checkpoints import weights_sha256
from overfly.models.segmenter import Segmenter
from overfly.models.weights import load_weights
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster
from overfly.recipe import load
from overfly.training.evaluate import evaluate_domain, stored_scores
from overfly.training.run import Run
from overfly.training.trainer import Trainer
from random_networks import random_network
from rasters import ids, noise, pointwise, write

FLIPS = 16
"""Flips of each kind, half of them in the first kilobyte."""
METRICS = LabelFreeMetrics(
    entropy=-0.25, information=0.5, nuclear_norm=0.75, snd=None, agreement=None, masked=0.5, masked_miou=0.5, views=0.5,
    views_miou=0.5, diversity=0.5, shares=(0.5, 0.5), by_view={"turn": 0.5}, images=2,
)  # fmt: skip


class Kind(NamedTuple):
    """A file in a folder, and what opens it: a function of the folder that returns the file's content."""

    file: str
    open: Callable[[Path], bytes]


def content(network: torch.nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())


def weights(folder: Path) -> Kind:
    random_network("small_network").save(folder / "w.safetensors")

    def read(folder: Path) -> bytes:
        segmenter = Segmenter.load(folder / "w.safetensors")
        return content(segmenter) + str((segmenter.classes, segmenter.max_value, segmenter.architecture)).encode()

    return Kind("w.safetensors", read)


def initial_weights(folder: Path) -> Kind:
    def read(folder: Path) -> bytes:
        network = random_network("small_network").network
        load_weights(network, folder / "w.safetensors")
        return content(network)

    return Kind(weights(folder).file, read)


class StoppedError(Exception):
    """What stops a run or a map in these tests."""


def stop(*_: object) -> None:
    raise StoppedError


def stopped_run(folder: Path) -> Run:
    """A run whose last step is done, and which is not finished."""
    source = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2, "test": 2}
    settings = {
        "source": source,
        "model": "small_network",
        "optim": {"name": "sgd", "lr": 0.01},
        "crop": 64,
        "batch": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish", stop)
        with pytest.raises(StoppedError):
            train(load(settings, "steps=4"), out=folder, device="cpu", quiet=True, checkpoint_every=2)
    return Run.open(next(folder.glob("*/recipe.yaml")).parent)


def checkpoint(folder: Path) -> Kind:
    name = str(stopped_run(folder).checkpoint.relative_to(folder))

    def read(folder: Path) -> bytes:
        return content(train(folder / Path(name).parts[0], device="cpu", quiet=True).run.segmenter())

    return Kind(name, read)


def only_checkpoint(folder: Path) -> Kind:
    kind = checkpoint(folder)
    (folder / kind.file).with_name("previous.ckpt").unlink()
    return kind


def export(file: str, format: ExportFormat) -> Callable[[Path], Kind]:  # noqa: A002
    def make(folder: Path) -> Kind:
        segmenter = random_network("small_network")
        image = np.random.default_rng(0).uniform(0, 255, (1, 3, 64, 64)).astype(np.float32)
        metadata = model_metadata(segmenter, window=64).model_copy(update={"fixed": True})
        data = EvaluationData([image], [image], None, "noise")
        made, _ = exporter.export(
            segmenter,
            metadata,
            ExportSettings(format=format),
            data,
            folder=folder,
            name="it",
            on_progress=lambda _: None,
        )
        return Kind(file, lambda folder: load_predictor(folder / made.name)(image).tobytes())

    return make


def recipe(folder: Path) -> Kind:
    name = stopped_run(folder).path.name
    return Kind(f"{name}/recipe.yaml", lambda folder: load(folder / name).model_dump_json().encode())


def machine(folder: Path) -> Kind:
    name = stopped_run(folder).path.name
    return Kind(f"{name}/machine.json", lambda folder: str(Run(folder / name).machine | {"digest": ""}).encode())


def scores(folder: Path) -> Kind:
    run = stopped_run(folder)
    run = train(run.path, device="cpu", quiet=True).run
    evaluate_domain(run, run.recipe.domain("source"), "source", "val")
    return Kind(f"{run.path.name}/scores.json", lambda folder: str(Run(folder / run.path.name).scores).encode())


def write_selection(folder: Path, report: CandidateReport) -> None:
    chosen = Selection(
        recommended=BASELINE, candidates={BASELINE: report}, recipes=({},), gate=Gate(), target={}, labels_opened=0
    )
    write_json(folder / "selection.json", chosen.model_dump(mode="json"))


def selection(folder: Path) -> Kind:
    write_selection(folder, CandidateReport(run="a", metrics=METRICS))
    return Kind("selection.json", lambda folder: Comparison(folder).selection.model_dump_json().encode())


def cache_entry(folder: Path) -> Kind:
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "0.png")

    def read(folder: Path) -> bytes:
        domain = Folder(root=folder, classes=Classes(names=("a", "b")))
        loading._VERIFIED.clear()  # as in a new process
        return loading.open_image(domain, domain.items("train")[0], None, folder / "cache")[0].tobytes()

    read(folder)
    return Kind(str(next(folder.rglob("*.npy")).relative_to(folder)), read)


SETTINGS = MapSettings(window=64, uncertainty=True)


def make_map(folder: Path) -> bytes:
    map_raster(pointwise(), str(folder / "scene.tif"), folder / "map.tif", SETTINGS, network="none")
    return ids(folder / "map.tif").tobytes() + ids(folder / "map_uncertainty.tif").tobytes()


def finished_map(folder: Path) -> Kind:
    write(folder / "scene.tif", noise(300, 200))
    make_map(folder)
    return Kind("map.tif", make_map)


def unfinished(name: str) -> Callable[[Path], Kind]:
    def make(folder: Path) -> Kind:
        def on_progress(done: int, total: int) -> None:
            if done == total - 1:
                raise StoppedError

        source = write(folder / "scene.tif", noise(300, 200))
        with pytest.raises(StoppedError):
            map_raster(
                pointwise(), str(source), folder / "map.tif", SETTINGS, network="none", on_progress=on_progress
            )  # fmt: skip
        return Kind(f".map.tif.unfinished/{name}", make_map)

    return make


KINDS: dict[str, Callable[[Path], Kind]] = {
    "weights": weights, "initial weights": initial_weights, "last.ckpt": checkpoint, "only checkpoint": only_checkpoint,
    "onnx": export("it.onnx", "onnx"), "onnx's json": export("it.json", "onnx"),
    "openvino xml": export("it.xml", "openvino"), "openvino bin": export("it.bin", "openvino"),
    "pt2": export("it.pt2", "torch"), "recipe.yaml": recipe, "machine.json": machine, "scores.json": scores,
    "selection.json": selection, "cache entry": cache_entry, "finished map": finished_map,
    "unfinished map": unfinished("classes_unfinished.tif"), "its rows": unfinished("rows.jsonl"),
    "its progress": unfinished("progress.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits_are_refused_or_repaired(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter, "ROUNDS", 1)
    monkeypatch.setattr(exporter, "SECONDS", 0.0)
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    whole.mkdir()
    folder.mkdir()
    kind = KINDS[name](folder)
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    expected, original = kind.open(folder), (whole / kind.file).read_bytes()
    generator = np.random.default_rng(len(name))
    outcomes: Counter[str] = Counter()
    for number in range(FLIPS):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        position = int(generator.integers(min(len(original), 1024 if number % 2 else len(original))))
        flipped = bytearray(original)
        flipped[position] ^= 1 << int(generator.integers(8))
        (folder / kind.file).write_bytes(flipped)
        message, opened = "", b""
        try:
            opened = kind.open(folder)
        except OverflyError as error:
            message = str(error)
        if message:
            assert Path(kind.file).name in message
            outcomes["refused"] += 1
            continue
        assert opened == expected, f"a flip at byte {position} of {len(original)} was used"
        file = folder / kind.file
        outcomes["equal" if file.exists() and file.read_bytes() == flipped else "repaired"] += 1
    with capsys.disabled():
        print(f"\n{name}: {FLIPS} flips, {dict(outcomes)}, 0 used", end="")
    assert sum(outcomes.values()) == FLIPS


def cut(file: Path, share: float = 0.5) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_cut_recipe_of_a_run_is_refused(share: float, tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    cut(run.path / "recipe.yaml", share)
    with pytest.raises(OverflyError, match=r"recipe\.yaml"):
        _ = Run.open(run.path).recipe
    for path in (run.path, run.path / "recipe.yaml"):
        with pytest.raises(OverflyError, match=r"recipe\.yaml"):
            load(path)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_cut_map_and_cut_checkpoint(share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "map").mkdir()
    kind = finished_map(tmp_path / "map")
    whole = kind.open(tmp_path / "map")
    cut(tmp_path / "map" / "map_uncertainty.tif", share)
    assert kind.open(tmp_path / "map") == whole
    cut(tmp_path / "map" / kind.file, max(share, 0.5))
    assert kind.open(tmp_path / "map") == whole
    run = stopped_run(tmp_path / "runs")
    cut(run.checkpoint, share)
    capsys.readouterr()
    assert run.whole_checkpoint() == run.previous_checkpoint
    assert capsys.readouterr().err.count("last.ckpt") == 1
    cut(run.previous_checkpoint)
    with pytest.raises(RunError, match=r"last\.ckpt"):
        run.whole_checkpoint()


def test_torn_report_beside_an_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "SECONDS", 0.0)
    export("it.json", "torch")(tmp_path)
    for text in ("", '{"file": "it.pt2"', "[]", "{}"):
        (tmp_path / "it.json").write_text(text)
        with pytest.raises(WeightsError, match=r"it\.json"):
            load_predictor(tmp_path / "it.pt2")
        with pytest.raises(WeightsError, match=r"it\.json"):
            hub.push(tmp_path / "it.pt2", "me/net")


def test_cache_entry_of_another_array_is_decoded_again(tmp_path: Path) -> None:
    kind = cache_entry(tmp_path)
    whole = kind.open(tmp_path)
    other = tmp_path / "cache" / "other.npy"
    loading._save(other, "another key", np.zeros((20, 30, 3), np.uint8))
    for data in (np.zeros((2, 2)), np.zeros((20, 30, 3), np.float64)):
        np.save(tmp_path / kind.file, data)
        assert kind.open(tmp_path) == whole
    shutil.copy(other, tmp_path / kind.file)
    assert kind.open(tmp_path) == whole


def test_scores_of_changed_weights_or_masks_are_not_reused(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "world", size=64, train=4, val=2, test=1)
    source = {"name": "loveda", "root": str(tmp_path / "world"), "scene": "urban"}
    run = train(
        load({"source": source, "model": "small_network", "crop": 64, "batch": 2}, "steps=2"),
        out=tmp_path, device="cpu", quiet=True,
    ).run  # fmt: skip
    domain = run.recipe.domain("source")
    scored = evaluate_domain(run, domain, "source", "val")
    assert stored_scores(run, "source", "val", domain) == Scores.model_validate(run.scores["source/val"])
    mask = domain.items("val")[0].label
    assert isinstance(mask, Path)
    state = mask.stat()
    os.utime(mask, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert stored_scores(run, "source", "val", domain) is None
    os.utime(mask, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert stored_scores(run, "source", "val", domain) is not None
    shutil.move(tmp_path / "world", tmp_path / "elsewhere")  # as on a machine without the data
    assert stored_scores(run, "source", "val", domain) is not None
    random_network("small_network").save(run.weights)
    assert "source/val" not in run.scores
    assert run.scores["labels_opened"]["source/val"]["images"] == scored.images


def test_written_world_without_a_file_is_refused(tmp_path: Path) -> None:
    world = tmp_path / "world"
    assert [write_synthetic(world, size=16, train=1, val=1, test=1) for _ in range(2)] == [6, 6]
    next(world.rglob("*.png")).write_bytes(b"")
    with pytest.raises(DataError, match="world has 9 of its 10 files"):
        write_synthetic(world, size=16, train=1, val=1, test=1)


def test_other_weights_in_a_comparison_are_refused(tmp_path: Path) -> None:
    made = random_network("small_network").save(tmp_path / "recommended.safetensors")
    report = CandidateReport(run="gone", weights_sha256=weights_sha256(made), metrics=METRICS)
    write_selection(tmp_path, report)
    assert load_predictor(tmp_path).metadata.architecture == "small_network"
    made.rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match=r"recommended\.safetensors"):
        load_predictor(tmp_path)
    network = random_network("small_network")
    network.mean += 1
    network.save(made)
    with pytest.raises(RunError, match=r"recommended\.safetensors"):
        load_predictor(tmp_path)
