from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overfly.commands.load_predictor import load_predictor
from overfly.core.atomic_files import read_json
from overfly.core.choices import Backend, ExportFormat
from overfly.core.errors import OverflyError, WeightsError
from overfly.exporting import exporter as exporting
from overfly.exporting.exporter import TOLERANCES, EvaluationData, ExportReport, ParityError, export
from overfly.exporting.formats import write_onnx
from overfly.exporting.graph import ExportModule
from overfly.exporting.predictor import (
    ExportSettings,
    Floats,
    ModelMetadata,
    metadata_entries,
    model_metadata,
    segmenter_predictor,
)
from overfly.exporting.runtimes import onnx_predictor
from overfly.models import names
from overfly.models.segmenter import Segmenter
from random_networks import random_network

SIDE = 64


def data(count: int = 1) -> EvaluationData:
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (count, 1, 3, SIDE // 8, SIDE // 8))
    images: list[Floats] = [np.kron(each, np.ones((1, 1, 8, 8))).astype(np.float32) for each in coarse]
    return EvaluationData(images, images, None, "noise")


def metadata(segmenter: Segmenter, *, fixed: bool = True) -> ModelMetadata:
    return model_metadata(segmenter, window=SIDE, title="a run").model_copy(update={"fixed": fixed, "gsd": 0.3})


def exported(segmenter: Segmenter, settings: ExportSettings, folder: Path, **changes: Any) -> Path:
    lines: list[str] = []
    file, _ = export(
        segmenter, metadata(segmenter, **changes), settings, data(), folder=folder, name="it", on_progress=lines.append
    )
    assert lines
    return file


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ROUNDS", 1)
    monkeypatch.setattr(exporting, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """A small network, for what does not depend on the architecture."""
    return random_network("small_network")


@pytest.fixture(scope="module")
def lraspp() -> Segmenter:
    return random_network("lraspp_mobilenet_v2")


def test_every_network_is_listed() -> None:
    assert {"pidnet_s", "pidnet_m", "pidnet_l", "lraspp_mobilenet_v2", "deeplabv2_resnet101"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_network_predicts_as_pytorch(tmp_path: Path, name: str) -> None:
    segmenter = random_network(name)
    known, image = metadata(segmenter), data().images[0]
    module = ExportModule(segmenter, fixed=(SIDE, SIDE)).eval()
    folded = sum(isinstance(part, torch.nn.BatchNorm2d) for part in module.modules())
    assert folded < 0.2 * sum(isinstance(part, torch.nn.BatchNorm2d) for part in segmenter.modules())
    predictor = onnx_predictor(write_onnx(module, tmp_path / "it.onnx", metadata_entries(known, ExportSettings())))
    result, expected = predictor(image), segmenter_predictor(segmenter, known)(image)
    np.testing.assert_allclose(result, expected, atol=2e-4)
    assert (result.argmax(1) == expected.argmax(1)).mean() > 0.999


BACKENDS: dict[ExportFormat, tuple[Backend, ...]] = {
    "onnx": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "torch": ("torch",),
}


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_format_predicts_as_pytorch_and_reports_parity(
    lraspp: Segmenter, tmp_path: Path, kind: ExportFormat
) -> None:
    file = exported(lraspp, ExportSettings(format=kind), tmp_path)
    report = ExportReport.model_validate(read_json(tmp_path / "it.json"))
    assert tuple(parity.backend for parity in report.parity) == BACKENDS[kind]
    for parity in report.parity:
        assert parity.agreement >= TOLERANCES["32"].agreement
        assert parity.pixels == SIDE * SIDE
        assert 0 <= parity.probability_difference < 1e-2
    assert set(report.latency) == {"torch eager", *BACKENDS[kind]}
    assert not list(tmp_path.glob(".*"))
    image = data().images[0]
    expected = segmenter_predictor(lraspp, metadata(lraspp))(image)
    backends: tuple[Backend, ...] = ("auto", *BACKENDS[kind])
    for backend in backends:
        predictor = load_predictor(file, backend=backend, device="cpu")
        assert predictor.metadata == metadata(lraspp)
        assert predictor.backend == (BACKENDS[kind][0] if backend == "auto" else backend)
        np.testing.assert_allclose(predictor(image), expected, atol=2e-4, err_msg=backend)
        with pytest.raises(OverflyError, match="64"):
            predictor(np.zeros((1, 3, 64, 32), np.float32))
    if kind == "onnx":
        with pytest.raises(OverflyError, match=r"onnxruntime.*openvino"):
            load_predictor(file, backend="torch", device="cpu")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("onnx", "lraspp_mobilenet_v2"), ("torch", "small_network")],  # torch needs a minute for others
)
def test_any_size_and_batch(tmp_path: Path, kind: ExportFormat, name: str) -> None:
    segmenter = random_network(name)
    expected = segmenter_predictor(segmenter, metadata(segmenter, fixed=False))
    file = exported(segmenter, ExportSettings(format=kind), tmp_path, fixed=False)
    images = np.random.default_rng(1).uniform(0, 255, (2, 3, 70, 101)).astype(np.float32)
    for backend in BACKENDS[kind]:
        predictor = load_predictor(file, backend=backend, device="cpu")
        for given in (images, images[:1, :, :64, :64]):
            np.testing.assert_allclose(predictor(given), expected(given), atol=1e-4)


@pytest.mark.parametrize(("output", "resize"), [("logits", None), ("classes", None), ("probabilities", 32)])
def test_outputs_and_inner_sizes(segmenter: Segmenter, tmp_path: Path, output: Any, resize: int | None) -> None:
    file = exported(segmenter, ExportSettings(output=output, resize=resize), tmp_path)
    predictor = load_predictor(file, backend="onnxruntime", device="cpu")
    image = data().images[0]
    result = predictor(image)
    assert result.shape == (1, len(segmenter.classes), SIDE, SIDE)
    np.testing.assert_allclose(result.sum(1), 1, atol=1e-5)
    if resize is None:
        expected = segmenter_predictor(segmenter, predictor.metadata)(image)
        assert (result.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("kind", BACKENDS)
def test_half_precision(
    segmenter: Segmenter, tmp_path: Path, kind: ExportFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = TOLERANCES["16"].model_copy(update={"agreement": 0.6})  # of noise, where classes are close
    monkeypatch.setitem(TOLERANCES, "16", loose)
    exported(segmenter, ExportSettings(format=kind, precision="16"), tmp_path)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_is_calibrated_and_smaller(
    lraspp: Segmenter, tmp_path: Path, kind: ExportFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = TOLERANCES["int8"].model_copy(update={"agreement": 0.1})
    monkeypatch.setitem(TOLERANCES, "int8", loose)
    file = exported(lraspp, ExportSettings(format=kind, precision="int8"), tmp_path)
    report = json.loads((tmp_path / "it.json").read_text())
    assert report["calibration_images"] == 1
    weights = sum(weight.numel() for weight in lraspp.without_training_heads().parameters())
    assert file.with_suffix(".bin" if kind == "openvino" else file.suffix).stat().st_size < 2 * weights
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    signal.raise_signal(signal.SIGUSR1)  # ends the process where a library left the stack of signals broken
    signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


def test_int8_is_refused_for_torch(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(OverflyError, match=r"onnx.*openvino"):
        exported(segmenter, ExportSettings(format="torch", precision="int8"), tmp_path)


def test_a_file_beyond_tolerance_is_deleted(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_onnx

    def tampered(module: Any, *rest: Any) -> Path:
        with torch.no_grad():
            module.network.classifier.weight.mul_(-3.0)
        return written(module, *rest)

    monkeypatch.setattr("overfly.exporting.formats.write_onnx", tampered)
    with pytest.raises(ParityError, match=r"it\.onnx .*it\.failed\.json"):
        exported(segmenter, ExportSettings(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["it.failed.json"]
    monkeypatch.setattr("overfly.exporting.formats.write_onnx", written)
    exported(segmenter, ExportSettings(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.json", "it.onnx"]


def test_full_disk_is_named(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OverflyError, match=r"it\.onnx: .*disk is full"):
        exported(segmenter, ExportSettings(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    for suffix in (".onnx", ".xml", ".pt2"):
        file = tmp_path / f"it{suffix}"
        file.write_bytes(b"no such thing")
        with pytest.raises(WeightsError, match=file.name):
            load_predictor(file, device="cpu")
        with pytest.raises(WeightsError, match="does not exist"):
            load_predictor(tmp_path / f"none{suffix}", device="cpu")
