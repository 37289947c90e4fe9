"""Export a network to a temporary file, compare its predictions with PyTorch's, and rename it if both agree."""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor, nn

from overfly.core.atomic_files import file_sha256, lock, temporary_path, write_json, write_text
from overfly.core.choices import ExportPrecision
from overfly.core.classes import Classes
from overfly.core.device import describe_machine
from overfly.core.download import disk_errors
from overfly.core.errors import MissingExtraError, OverflyError, RecipeError
from overfly.core.records import Logits
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Pixels, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.evaluation.score import score
from overfly.evaluation.speed import Latency, compare_latency
from overfly.exporting import formats
from overfly.exporting import predictor as predictors
from overfly.exporting.graph import ExportModule
from overfly.exporting.predictor import ExportSettings, Floats, ModelMetadata, Predictor
from overfly.exporting.runtimes import export_parts, onnx_predictor, openvino_predictor, torch_predictor
from overfly.exporting.torch_program import write_torch
from overfly.exporting.trial import remember
from overfly.models.segmenter import Segmenter

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""Suffix of the main file, by format."""
ROUNDS, SECONDS = 10, 20.0
"""Maximum rounds of timing, and seconds after which timing ends."""
RANGE_IMAGES = 8
"""Calibration images used to select the `Ranges` of 8-bit feature maps."""


@dataclass(frozen=True)
class EvaluationData:
    """Images on which an export is compared with PyTorch, each (1, C, H, W), float32, in the sensor's own range.

    ``calibration`` are unlabeled images of one size to calibrate 8-bit ranges; without ``labels`` mIoU is not computed.
    """

    images: Sequence[Floats]
    calibration: Sequence[Floats]
    labels: "LabeledSplit | None"
    title: str


class ExportReport(Spec):
    """Description and measurements of an exported file; written beside it as JSON."""

    file: str
    """Name of the file."""
    bytes: NonNegativeInt
    """Its size, weights included."""
    sha256: str
    """SHA-256 of the file; for OpenVINO of the .xml followed by the .bin."""
    weights_sha256: str = ""
    """Digest of the weights that were exported; empty if unknown."""
    settings: ExportSettings
    """Settings of the export."""
    metadata: ModelMetadata
    """Input and classes of the network."""
    images: str
    """Domain and split of the compared images."""
    calibration_images: NonNegativeInt
    """Number of calibration images; 0 without quantization."""
    parity: "tuple[Parity, ...]"
    """Agreement with PyTorch, by runtime; the runtime of the file's format first."""
    latency: dict[str, Latency]
    """Time of one image, by runtime; ``torch eager`` is the trained network in float32."""
    latency_side: Pixels
    """Side of the timed image."""
    machine: dict[str, Any]
    """Machine of the measurements."""


def export(
    segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings, data: EvaluationData, *,
    folder: Path, name: str, on_progress: Callable[[str], None] = print, weights_sha256: str = "",
) -> tuple[Path, ExportReport]:  # fmt: skip
    """Export a network; the file is deleted if it does not agree with PyTorch.

    ``metadata.fixed`` exports a graph for tiles of the size ``metadata.window`` only. ``name`` has no suffix;
    ``on_progress`` is called with a message for each phase. Returns the file, and its report, which is also written to
    ``NAME.json`` and names the exported weights by ``weights_sha256``. Raises `ParityError`: it does not agree with
    PyTorch; ``NAME.failed.json`` holds the report, and `MissingExtraError`: a package is not installed, and
    `OverflyError`: the folder cannot be written.
    """
    if settings.precision == "int8" and settings.format == "torch":
        raise RecipeError("precision int8 needs format onnx or openvino, got torch; set --format, or --precision 16")
    final = folder / f"{name}{SUFFIXES[settings.format]}"
    with contextlib.ExitStack() as stack:
        with disk_errors(final, OverflyError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock(final.with_name(f".{final.name}.lock"), wait=False))
            except Timeout:
                raise OverflyError(f"{final} is being exported by another process; wait for it or stop it") from None
            temporary = stack.enter_context(temporary_path(final, folder=True))
            on_progress(f"writing {final.name}")
            file = _write(segmenter, metadata, settings, data, temporary / final.name)
        on_progress(f"comparing it with PyTorch on {len(data.images)} images of {data.title}")
        report = _measure(file, segmenter, metadata, settings, data)
        report = report.model_copy(update={"weights_sha256": weights_sha256})
        with disk_errors(final, OverflyError):
            _raise_if_different(report, folder / f"{name}.failed.json")
            write_json(temporary / f"{name}.json", json.loads(report.model_dump_json()))
            for part in sorted(temporary.iterdir(), key=lambda part: part == file):  # the main file last
                part.replace(folder / part.name)
    remember(final, *(parity.backend for parity in report.parity))
    return final, report


def _write(
    segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings, data: EvaluationData, path: Path
) -> Path:
    fixed = (metadata.window, metadata.window) if metadata.fixed else None
    half_types = {"onnx": torch.float16, "torch": torch.bfloat16, "openvino": torch.float32}
    dtype = half_types[settings.format] if settings.precision == "16" else torch.float32
    module = ExportModule(segmenter, output=settings.output, dtype=dtype, resize=settings.resize, fixed=fixed).eval()
    properties = predictors.metadata_entries(metadata, settings)
    if settings.format == "torch":
        return write_torch(module, path, properties)
    if settings.output == "probabilities" and settings.format == "onnx":
        properties |= formats.deepness_entries(metadata)
    plain = path.with_suffix(".plain.onnx")
    formats.write_onnx(module, plain, properties)
    try:
        if settings.format == "onnx" and settings.precision != "int8":
            return plain.replace(path)
        if settings.precision == "int8":
            reference = _reference(segmenter, metadata, settings)
            return _quantize(plain, path, reference=reference, data=data, settings=settings, properties=properties)
        return formats.write_openvino(plain, path, properties, half=settings.precision == "16")
    finally:
        plain.unlink(missing_ok=True)


def _quantize(
    plain: Path, path: Path, *, reference: Predictor, data: EvaluationData, settings: ExportSettings,
    properties: dict[str, str],
) -> Path:  # fmt: skip
    """Quantize with each of the `Ranges`, and choose the file that agrees best with PyTorch on a few images."""
    quantize = formats.quantize_onnx if settings.format == "onnx" else formats.quantize_openvino
    images = data.calibration[:: max(1, len(data.calibration) // RANGE_IMAGES)][:RANGE_IMAGES]
    expected = [reference(image).argmax(1) for image in images]
    agreement: dict[formats.Ranges, float] = {}
    for ranges in formats.RANGES:
        file = quantize(plain, path.parent / ranges / path.name, data.calibration, properties, ranges)
        predictor = _open_file(file, settings)[0]
        same = [(predictor(image).argmax(1) == ids).mean() for image, ids in zip(images, expected, strict=True)]
        agreement[ranges] = float(sum(same))
    best = max(agreement, key=lambda ranges: agreement[ranges])
    for part in (path.parent / best).iterdir():
        part.replace(path.parent / part.name)
    for ranges in formats.RANGES:
        shutil.rmtree(path.parent / ranges)
    return path


def _reference(segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings) -> Predictor:
    """Return the predictor of the original network in PyTorch, float32."""
    reference = predictors.segmenter_predictor(segmenter, metadata)
    return reference if settings.resize is None else predictors.resizing_predictor(reference, settings.resize)


def _measure(
    file: Path, segmenter: Segmenter, metadata: ModelMetadata, settings: ExportSettings, data: EvaluationData
) -> ExportReport:
    reference = _reference(segmenter, metadata, settings)
    miou = None if data.labels is None else score_predictor(reference, data.labels)[0]
    predictors = _open_file(file, settings)
    compare = partial(measure_parity, reference=reference, images=data.images, labels=data.labels, miou_of_torch=miou)
    parity = tuple(compare(predictor, settings) for predictor in predictors)
    side = metadata.window
    noise = torch.rand(1, metadata.bands, side, side, generator=torch.Generator().manual_seed(0))
    image = (metadata.max_value * noise).numpy()
    runs: dict[str, Callable[[], Any]] = {"torch eager": partial(reference, image)}
    runs |= {predictor.backend: partial(predictor, image) for predictor in predictors}
    return ExportReport(
        file=file.name,
        bytes=sum(part.stat().st_size for part in export_parts(file)),
        sha256=file_sha256(*export_parts(file)), settings=settings, metadata=metadata, images=data.title,
        calibration_images=len(data.calibration) if settings.precision == "int8" else 0, parity=parity,
        latency={} if parity[0].violations else compare_latency(runs, rounds=ROUNDS, seconds=SECONDS),
        latency_side=side, machine=describe_machine(),
    )  # fmt: skip


def _open_file(file: Path, settings: ExportSettings) -> list[Predictor]:
    """Open a file with every installed runtime that reads it, the runtime of its format first."""
    if settings.format == "torch":
        return [torch_predictor(file)]
    if settings.format == "openvino":
        return [openvino_predictor(file)]
    predictors, missing = [], None
    for open_with in (onnx_predictor, openvino_predictor):
        try:
            predictors.append(open_with(file))
        except MissingExtraError as error:
            missing = missing or error
    if not predictors and missing is not None:
        raise missing
    return predictors


def _raise_if_different(report: ExportReport, failed: Path) -> None:
    """Write the report and raise ParityError if the main runtime exceeds its tolerance; others may exceed it."""
    failed.unlink(missing_ok=True)
    parity = report.parity[0]
    if parity.violations:
        write_text(failed, report.model_dump_json(indent=2) + "\n")
        raise ParityError(
            f"{report.file} was not written: on {parity.images} images of {report.images}, {parity.backend} differs "
            f"from PyTorch ({parity.violations}; see {failed}); choose a higher --precision, train for longer, or "
            "compare on other images with --domain"
        )


class ParityError(OverflyError):
    """An exported file whose predictions differ from PyTorch's."""


class Tolerance(Spec):
    """Allowed difference of an exported file from PyTorch."""

    agreement: Share
    """Smallest allowed share of pixels with the same class."""
    miou: Share
    """Largest allowed difference of mIoU."""


TOLERANCES: dict[ExportPrecision, Tolerance] = {
    "32": Tolerance(agreement=0.9999, miou=0.0005), "16": Tolerance(agreement=0.98, miou=0.005),
    "int8": Tolerance(agreement=0.97, miou=0.01),
}  # fmt: skip
"""Tolerances by precision; 16 bits are float16 or bfloat16."""


class Parity(Spec):
    """An exported file compared with PyTorch in float32, on images of one split."""

    backend: str
    """The runtime."""
    images: NonNegativeInt
    """Images compared."""
    pixels: NonNegativeInt
    """Pixels of these images."""
    agreement: Share
    """Share of pixels with the same class."""
    probability_difference: NonNegativeFloat
    """Largest difference of a probability."""
    miou: Share | None = None
    """mIoU of the file; none without labels."""
    miou_of_torch: Share | None = None
    """mIoU of PyTorch with the same labels."""
    labels_opened: NonNegativeInt = 0
    """Labels read for each of the two."""
    tolerance: Tolerance
    """The allowed difference."""

    @property
    def violations(self) -> str:
        """Metrics that exceed the tolerance, with their values; empty without any."""
        violations = []
        if self.agreement < self.tolerance.agreement:
            violations.append(f"{self.agreement:.4%} of pixels agree, {self.tolerance.agreement:.2%} are needed")
        difference = abs((self.miou or 0) - (self.miou_of_torch or 0))
        if self.miou is not None and self.miou_of_torch is not None and difference > self.tolerance.miou:
            violations.append(
                f"mIoU is {self.miou:.2%}, {self.miou_of_torch:.2%} in PyTorch; {self.tolerance.miou:.2%} is allowed"
            )
        return "; ".join(violations)


@dataclass(frozen=True)
class LabeledSplit:
    """Labels of a split for mIoU: at most ``limit`` images, evenly sampled; resized and in windows as for `score`."""

    domain: Domain
    split: Split
    resize: int | None
    window: int | None
    limit: int


def measure_parity(
    predictor: Predictor, settings: ExportSettings, *, reference: Predictor, images: Sequence[Floats],
    labels: LabeledSplit | None = None, miou_of_torch: float | None = None,
) -> Parity:  # fmt: skip
    """Compare an exported file with the original network in PyTorch, float32, on images and, if given, labels.

    Images are (1, C, H, W), float32, in the sensor's own range; ``miou_of_torch`` is the original network's mIoU.
    """
    same = pixels = 0
    difference = 0.0
    for image in images:
        expected, result = reference(image), predictor(image)
        same += int((expected.argmax(1) == result.argmax(1)).sum())
        pixels += expected[:, 0].size
        if settings.output != "classes":
            difference = max(difference, float(np.abs(expected - result).max()))
    miou, opened = (None, 0) if labels is None else score_predictor(predictor, labels)
    return Parity(
        backend=predictor.backend, images=len(images), pixels=pixels, agreement=same / pixels,
        probability_difference=difference, miou=miou, miou_of_torch=miou_of_torch, labels_opened=opened,
        tolerance=TOLERANCES[settings.precision],
    )  # fmt: skip


def score_predictor(predictor: Predictor, labels: LabeledSplit) -> tuple[float | None, int]:
    """Return a predictor's mIoU, and the number of labels read."""
    count = sum(item.label is not None for item in labels.domain.items(labels.split))
    stride = max(1, -(-count // labels.limit))
    scores = score(
        _PredictorModule(predictor), labels.domain, labels.split,
        resize=labels.resize, window=labels.window, shard=(0, stride), all_reduce=lambda counts: counts,
    )  # fmt: skip
    return scores.miou, scores.labels_opened


class _PredictorModule(nn.Module):
    """Module of a predictor: images (B, C, H, W) to `Logits` of the same size."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.classes: Classes = predictor.metadata.classes

    def forward(self, image: Tensor) -> Logits:
        """Return the logarithms of the probabilities."""
        return Logits(torch.from_numpy(self.predictor(image.cpu().numpy())).clamp_min(1e-30).log())
