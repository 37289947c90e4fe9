"""The command `overfly export`, and the commands of its guides."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from conftest import REPOSITORY
from fake_hub import fake_hub
from overfly import cli
from overfly.commands import export_data
from overfly.commands.load_predictor import load_predictor
from overfly.commands.predict import network_digest
from overfly.commands.serve import served_networks
from overfly.core.atomic_files import read_json, write_json
from overfly.exporting import exporter as exporting
from overfly.exporting.predictor import Predictor
from overfly.recipe import load
from overfly.training.run import Run
from rasters import noise, write


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, scored, beside a sibling of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    domain = {"name": "synthetic", "size": 64, "train": 4, "val": 2, "test": 2}
    small = {
        "source": {**domain, "scene": "urban"},
        "target": {**domain, "scene": "rural"},
        "model": "small_network",
        "optim": {"name": "sgd", "lr": 0.001},
        "crop": 64, "batch": 2, "steps": 3, "window": 64,
    }  # fmt: skip
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    load(small).save(file)
    for seed in (1, 0):
        assert overfly("train", file, f"seed={seed}", "--out", folder, "--device", "cpu") == 0
    runs = sorted(folder.glob("*/recipe.yaml"))
    chosen = next(file.parent for file in runs if yaml.safe_load(file.read_text())["seed"] == 0)
    for file in runs:
        assert overfly("evaluate", file.parent, "--device", "cpu", "--no-samples") == 0
    return chosen


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ROUNDS", 1)
    monkeypatch.setattr(exporting, "SECONDS", 0.0)


def overfly(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_export_reports_parity(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = Run.open(trained).scores["labels_opened"]["target/val"]["images"]
    assert overfly("export", trained, "--images", "2") == 0
    shown = capsys.readouterr()
    assert "2 images of Rural (val)" in shown.err
    assert "onnxruntime" in shown.out
    assert "ms an image of 64×64" in shown.out
    assert "torch eager, 1 thread " in shown.out
    file = trained / "exports" / "small_network-onnx-32.onnx"
    report = json.loads(file.with_suffix(".json").read_text())
    for parity in report["parity"]:
        assert parity["agreement"] >= 0.9999
        assert parity["miou"] == pytest.approx(parity["miou_of_torch"], abs=1e-6)
        assert parity["labels_opened"] == 2
    after = Run.open(trained).scores["labels_opened"]["target/val"]["images"]
    assert after == before + 2 * (1 + len(report["parity"]))
    assert load_predictor(file).metadata.title == trained.name
    sizes = onnx.load(file).graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param for size in sizes] == ["batch", "", "height", "width"]


def test_a_run_is_opened_as_its_fastest_export(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("exports"))
    assert overfly("export", run, "--no-labels", "--quiet", "--images", "1") == 0
    file = run / "exports" / "small_network-onnx-32.onnx"
    report = read_json(file.with_suffix(".json"))

    def opened(milliseconds: float = 1.0, **changes: Any) -> Predictor:
        runtimes = {"onnxruntime": milliseconds, "openvino": milliseconds + 1, "torch eager": 3.0}
        latency = {name: report["latency"][name] | {"median_ms": value} for name, value in runtimes.items()}
        write_json(file.with_suffix(".json"), report | {"latency": latency} | changes)
        return load_predictor(run)

    fast = opened()
    assert fast.backend == "onnxruntime"
    assert f"using {file.name} with onnxruntime" in capsys.readouterr().err
    (served,) = served_networks([run])
    assert served.predictor().backend == "onnxruntime"
    assert served.digest() == network_digest(file) != network_digest(run)
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, 70, 90)).astype(np.float32)
    np.testing.assert_allclose(fast(image), load_predictor(run, backend="torch")(image), atol=2e-4)
    scene, out = write(tmp_path / "scene.tif", noise(70, 90)), tmp_path / "map.tif"
    assert overfly("predict", run, scene, "--out", out) == 0
    assert overfly("predict", run, scene, "--out", out, "--backend", "torch") == 2  # another network's map
    assert opened(latency={}).backend == "torch"
    assert opened(4.0).backend == "torch"
    assert opened(weights_sha256="0" * 64).backend == "torch"
    assert opened(machine=report["machine"] | {"processor": "another"}).backend == "torch"
    assert opened(settings=report["settings"] | {"output": "classes"}).backend == "torch"
    worse = [parity | {"agreement": 0.5} for parity in report["parity"]]
    assert opened(parity=[worse[0], report["parity"][1]]).backend == "openvino"
    capsys.readouterr()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert opened().backend == "torch"
    assert "differs from the digest" in capsys.readouterr().err


def test_model_card(trained: Path) -> None:
    assert overfly("export", trained, "--no-labels", "--quiet", "--name", "named", "--images", "1") == 0
    card = (trained / "exports" / "named.md").read_text()
    for text in (
        "0 background, 1 building", "License: that of this package.", "seeds 0, 1", "(2) |", "| mIoU |",
        "with labels, used in training", "not seen in training", "## Latency", "## Limits", "torch eager", "## Recipe",
    ):  # fmt: skip
        assert text in card, text
    report = json.loads((trained / "exports" / "named.json").read_text())
    assert report["parity"][0]["miou"] is None
    assert report["sha256"] in card
    assert not re.search(r"(?<![\w.:])/(home|tmp|root|work)/", card)


def test_fixed_tiles(trained: Path) -> None:
    assert overfly("export", trained, "--size", "96", "--images", "2", "--quiet") == 0
    predictor = load_predictor(trained / "exports" / "small_network-onnx-32-96.onnx")
    assert predictor.metadata.fixed
    assert predictor.metadata.window == 96
    assert predictor(np.zeros((1, 3, 96, 96), np.float32)).shape == (1, 7, 96, 96)


MISTAKES = [
    (["--format", "torch", "--precision", "int8"], "onnx or openvino"),
    (["--size", "7"], "--size"),
    (["--name", "a/b"], "--name"),
    (["--domain", "nowhere"], "nowhere"),
    (["--precision", "8"], "precision"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_mistakes(arguments: list[str], named: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((trained / "exports").glob("*"))
    assert overfly("export", trained, *arguments) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert len(shown.strip().splitlines()) <= 2
    assert sorted((trained / "exports").glob("*")) == before


def commands(page: str) -> list[list[str]]:
    text = (REPOSITORY / "docs" / "guides" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("overfly ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", ["qgis.md", "export.md"])
def test_the_commands_of_the_guides_run(page: str, trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    from overfly.exporting.exporter import TOLERANCES

    loose = TOLERANCES["int8"].model_copy(update={"agreement": 0.3, "miou": 1.0})
    monkeypatch.setitem(TOLERANCES, "int8", loose)  # after three steps all classes are as likely
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(trained)
    network = "small_network"
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(export_data, "CALIBRATION", 2)
    quick: dict[str, list[str]] = {"export": ["--images", "1", "--no-labels"]}
    with fake_hub() as address:
        quick["hub"] = ["--endpoint", address]
        for words in commands(page):
            filled = [word.replace("pidnet_s", network) for word in words]
            tiles = ["--size", "64"] if "torch" in words else []  # tracing any size takes ten times as long
            assert overfly(*filled, *quick.get(words[0], []), *tiles) == 0, words
    if page == "qgis.md":
        assert (trained / "exports" / f"{network}-onnx-32-512.onnx").is_file()
    else:
        assert load_predictor(tmp_path / "networks" / f"{network}-onnx-32.onnx").metadata.classes.names[1] == "building"
