"""The one exporter: write a file under another name, measure it against PyTorch, and give it its name if it agrees."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from overfly.core.atomic_files import temporary_path
from overfly.core.device import describe_machine
from overfly.core.errors import MissingExtraError, RecipeError
from overfly.core.spec import Pixels, Spec, Whole
from overfly.exporting.formats import write_onnx, write_openvino, write_torch
from overfly.exporting.graph import ExportModule
from overfly.exporting.metadata import ExportSettings, metadata_entries
from overfly.exporting.onnx_metadata import deepness_properties
from overfly.exporting.parity import LabeledSplit, Parity, ParityError, measure_parity, miou
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor, segmenter_predictor
from overfly.exporting.quantize import Ranges, quantize_onnx, quantize_openvino
from overfly.exporting.resizing import resized
from overfly.exporting.runtimes import onnx_predictor, openvino_predictor, torch_predictor
from overfly.exporting.shelf import writing
from overfly.exporting.timing import Latency, measure_latency
from overfly.models.segmenter import Segmenter

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""Suffix of the file that is opened, by format."""
ROUNDS, SECONDS = 10, 20.0
"""Images that each runtime is timed on, and after how long no further round begins."""
CHOSEN_ON = 8
"""Calibration images that decide how the ranges of 8-bit maps are taken."""


@dataclass(frozen=True)
class EvaluationData:
    """Real images that an export is measured on; the first two have no labels, the last is for the scorer alone.

    Attributes:
        images: each (1, C, H, W), float32, in the sensor's own range, compared with PyTorch pixel by pixel.
        calibration: images of the same kind that the ranges of 8-bit maps are measured on, all of one size.
        labeled_split: where labels are; None: there are none.
        title: where the images are from, in words.
    """

    images: Sequence[Floats]
    calibration: Sequence[Floats]
    labeled_split: LabeledSplit | None
    title: str


class ExportReport(Spec):
    """What is known of an exported file; written beside it as JSON."""

    file: str
    """Its name."""
    bytes: Whole
    """Its size on disk, weights included."""
    sha256: str
    """Checksum of the file."""
    settings: ExportSettings
    """How it was made."""
    metadata: ModelMetadata
    """What its user must know of it."""
    images: str
    """Where the images that it was measured on are from."""
    calibration_images: Whole
    """Unlabeled images that 8-bit ranges were measured on; 0 without 8-bit maps."""
    parity: tuple[Parity, ...]
    """Agreement with PyTorch, by runtime."""
    latency: dict[str, Latency]
    """Time of one image, by runtime; ``torch eager`` is the trained network as it was, in float32."""
    latency_side: Pixels
    """Side of the image of these times."""
    machine: dict[str, Any]
    """Where it was measured."""


def export(
    segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings, data: EvaluationData, *,
    folder: Path, name: str, tell: Callable[[str], None] = print,
) -> tuple[Path, ExportReport]:  # fmt: skip
    """Write a network for other runtimes, measure it, and give it its name only if it agrees with PyTorch.

    Args:
        segmenter: the trained network; it is left alone.
        metadata: what is to be known of it; ``fixed`` and ``window`` say whether tiles have one size.
        settings: format, precision, answer and inner size.
        data: what it is measured on.
        folder: where the file is to lie.
        name: of the file, without suffix.
        tell: says what is being done.

    Returns:
        The file, and what is known of it, as it lies beside it in ``NAME.json``.

    Raises:
        ParityError: it does not agree. No file of the name is there then; ``NAME.failed.json`` holds the figures.
        MissingExtraError: a package is not installed.
        DownloadError: the disk is full.
    """
    if settings.precision == "int8" and settings.format == "torch":
        raise RecipeError("PyTorch runs no exported 8-bit network; take --format onnx or openvino, or --precision 16")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{name}{SUFFIX[settings.format]}"
    with temporary_path(final, folder=True) as work:
        tell(f"writing {final.name}")
        with writing(final):
            file = _write(segmenter, metadata, settings, data, work / final.name)
        tell(f"comparing it with PyTorch on {len(data.images)} images of {data.title}")
        found = _measure(file, segmenter, metadata, settings, data)
        _judge(found, folder / f"{name}.failed.json")
        with writing(final):
            _move(work, folder, file, found, name)
    return final, found


def _write(
    segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings, data: EvaluationData, path: Path
) -> Path:
    """Write the file."""
    fixed = (metadata.window, metadata.window) if metadata.fixed else None
    halves = {"onnx": torch.float16, "torch": torch.bfloat16, "openvino": torch.float32}
    dtype = halves[settings.format] if settings.precision == "16" else torch.float32
    module = ExportModule(segmenter, output=settings.output, dtype=dtype, resize=settings.resize, fixed=fixed).eval()
    properties = metadata_entries(metadata, settings)
    if settings.format == "torch":
        return write_torch(module, path, metadata.bands, properties)
    if settings.output == "probabilities" and settings.format == "onnx":
        properties |= deepness_properties(metadata)
    plain = path.with_suffix(".plain.onnx")
    write_onnx(module, plain, metadata.bands, properties)
    try:
        if settings.format == "onnx" and settings.precision != "int8":
            return plain.replace(path)
        if settings.precision == "int8":
            return _quantize(plain, path, _reference(segmenter, metadata, settings), data, settings, **properties)
        return write_openvino(plain, path, properties, half=settings.precision == "16")
    finally:
        plain.unlink(missing_ok=True)


def _quantize(
    plain: Path, path: Path, reference: Predictor, data: EvaluationData, settings: ExportSettings, **text: str
) -> Path:
    """Write 8-bit integers with ranges taken in each way, and keep the file that agrees best on the same images."""
    quantize = quantize_onnx if settings.format == "onnx" else quantize_openvino
    shown = data.calibration[:: max(1, len(data.calibration) // CHOSEN_ON)][:CHOSEN_ON]
    wanted = [reference(image).argmax(1) for image in shown]
    found: dict[Ranges, float] = {}
    ways: tuple[Ranges, ...] = ("extremes", "means")
    for ranges in ways:
        file = quantize(plain, path.parent / ranges / path.name, data.calibration, text, ranges)
        predictor = runtimes_of(file, settings)[0]
        same = [(predictor(image).argmax(1) == right).mean() for image, right in zip(shown, wanted, strict=True)]
        found[ranges] = float(sum(same))
    best = max(found, key=lambda ranges: found[ranges])
    for part in (path.parent / best).iterdir():
        part.replace(path.parent / part.name)
    for ranges in ways:
        shutil.rmtree(path.parent / ranges)
    return path


def _reference(segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings) -> Predictor:
    """PyTorch in float32, as the network was before anything was folded."""
    reference = segmenter_predictor(segmenter, metadata)
    return reference if settings.resize is None else resized(reference, settings.resize)


def _measure(
    file: Path, segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings, data: EvaluationData
) -> ExportReport:
    """Everything that is known of a file."""
    reference = _reference(segmenter, metadata, settings)
    fixed = (metadata.window, metadata.window) if metadata.fixed else None
    graph = ExportModule(segmenter, output=settings.output, resize=settings.resize, fixed=fixed).eval()
    truth_of_torch = None if data.labeled_split is None else miou(reference, data.labeled_split)[0]
    predictors = runtimes_of(file, settings)
    parity = [
        measure_parity(file, predictor, settings, reference=reference, module=graph, images=data.images,
            labeled_split=data.labeled_split, truth_of_torch=truth_of_torch,
        )
        for predictor in predictors
    ]  # fmt: skip
    side = metadata.window
    image = (
        metadata.max_value * torch.rand(1, metadata.bands, side, side, generator=torch.Generator().manual_seed(0))
    ).numpy()
    runs: dict[str, Callable[[], Any]] = {"torch eager": partial(reference, image)}
    runs |= {predictor.backend: partial(predictor, image) for predictor in predictors}
    agrees = not parity[0].violations
    return ExportReport(
        file=file.name,
        bytes=sum(part.stat().st_size for part in (file, file.with_suffix(".bin")) if part.exists()),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        settings=settings,
        metadata=metadata,
        images=data.title,
        calibration_images=len(data.calibration) if settings.precision == "int8" else 0,
        parity=tuple(parity),
        latency=measure_latency(runs, rounds=ROUNDS, seconds=SECONDS) if agrees else {},
        latency_side=side,
        machine=describe_machine(),
    )


def runtimes_of(file: Path, settings: ExportSettings, threads: int | None = None) -> list[Predictor]:
    """A file on every runtime that is installed and opens it, the one that it is made for first.

    Raises:
        MissingExtraError: no runtime for it is installed.
    """
    if settings.format == "torch":
        return [torch_predictor(file)]
    if settings.format == "openvino":
        return [openvino_predictor(file, threads=threads)]
    found, missing = [], None
    for opened in (onnx_predictor, openvino_predictor):
        try:
            found.append(opened(file, threads=threads))
        except MissingExtraError as error:
            missing = missing or error
    if not found and missing is not None:
        raise missing
    return found


def _judge(found: ExportReport, report: Path) -> None:
    """Raise where the runtime that a file is made for is beyond tolerance, and leave the figures.

    Others that open it too are measured, and what they are is told.
    """
    report.unlink(missing_ok=True)
    for parity in found.parity[:1]:
        if parity.violations:
            report.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
            raise ParityError(
                f"{found.file} was not written: run by {parity.backend} on {parity.images} images of {found.images} it "
                f"differs from PyTorch ({parity.violations}); {parity.where}; every layer's error is in {report}; "
                "take a higher --precision, train for longer, or measure on images of the target with --domain"
            )


def _move(work: Path, folder: Path, file: Path, found: ExportReport, name: str) -> None:
    """Give the files their names, the one that is opened last."""
    values = json.loads(found.model_dump_json())
    (work / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for part in sorted(work.iterdir(), key=lambda part: part == file):
        part.replace(folder / part.name)


__all__ = ["EvaluationData", "ExportReport", "export", "runtimes_of"]
