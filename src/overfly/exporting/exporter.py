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

from overfly.core.atomic_files import atomic_write
from overfly.core.device import describe_machine
from overfly.core.errors import MissingExtraError, RecipeError
from overfly.core.spec import Pixels, Spec, Whole
from overfly.exporting.formats import write_onnx, write_openvino, write_torch
from overfly.exporting.graph import Deployed
from overfly.exporting.metadata import Made, entries
from overfly.exporting.onnx_metadata import deepness
from overfly.exporting.parity import Parity, ParityError, Truth, compare, miou
from overfly.exporting.predictor import Facts, Floats, Predictor, of_segmenter
from overfly.exporting.quantize import Ranges, quantize_onnx, quantize_openvino
from overfly.exporting.resizing import resized
from overfly.exporting.runtimes import of_onnx, of_openvino, of_program
from overfly.exporting.shelf import writing
from overfly.exporting.timing import Latency, take_turns
from overfly.models.segmenter import Segmenter

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""Suffix of the file that is opened, by format."""
ROUNDS, SECONDS = 10, 20.0
"""Images that each runtime is timed on, and after how long no further round begins."""
CHOSEN_ON = 8
"""Calibration images that decide how the ranges of 8-bit maps are taken."""


@dataclass(frozen=True)
class Evidence:
    """Real images that an export is measured on; the first two have no labels, the last is for the scorer alone.

    Attributes:
        images: each (1, C, H, W), float32, in the sensor's own range, compared with PyTorch pixel by pixel.
        calibration: images of the same kind that the ranges of 8-bit maps are measured on, all of one size.
        truth: where labels are; None: there are none.
        title: where the images are from, in words.
    """

    images: Sequence[Floats]
    calibration: Sequence[Floats]
    truth: Truth | None
    title: str


class Exported(Spec):
    """What is known of an exported file; written beside it as JSON."""

    file: str
    """Its name."""
    bytes: Whole
    """Its size on disk, weights included."""
    sha256: str
    """Checksum of the file."""
    made: Made
    """How it was made."""
    facts: Facts
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
    segmenter: Segmenter, facts: Facts, made: Made, evidence: Evidence, *, folder: Path, name: str,
    tell: Callable[[str], None] = print,
) -> tuple[Path, Exported]:  # fmt: skip
    """Write a network for other runtimes, measure it, and give it its name only if it agrees with PyTorch.

    Args:
        segmenter: the trained network; it is left alone.
        facts: what is to be known of it; ``fixed`` and ``window`` say whether tiles have one size.
        made: format, precision, answer and inner size.
        evidence: what it is measured on.
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
    if made.precision == "int8" and made.format == "torch":
        raise RecipeError("PyTorch runs no exported 8-bit network; take --format onnx or openvino, or --precision 16")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{name}{SUFFIX[made.format]}"
    with atomic_write(final, folder=True) as work:
        tell(f"writing {final.name}")
        with writing(final):
            file = _write(segmenter, facts, made, evidence, work / final.name)
        tell(f"comparing it with PyTorch on {len(evidence.images)} images of {evidence.title}")
        found = _measure(file, segmenter, facts, made, evidence)
        _judge(found, folder / f"{name}.failed.json")
        with writing(final):
            _move(work, folder, file, found, name)
    return final, found


def _write(segmenter: Segmenter, facts: Facts, made: Made, evidence: Evidence, path: Path) -> Path:
    """Write the file."""
    fixed = (facts.window, facts.window) if facts.fixed else None
    halves = {"onnx": torch.float16, "torch": torch.bfloat16, "openvino": torch.float32}
    dtype = halves[made.format] if made.precision == "16" else torch.float32
    deployed = Deployed(segmenter, answer=made.answer, dtype=dtype, resize=made.resize, fixed=fixed).eval()
    metadata = entries(facts, made)
    if made.format == "torch":
        return write_torch(deployed, path, facts.bands, metadata)
    if made.answer == "probabilities" and made.format == "onnx":
        metadata |= deepness(facts)
    plain = path.with_suffix(".plain.onnx")
    write_onnx(deployed, plain, facts.bands, metadata)
    try:
        if made.format == "onnx" and made.precision != "int8":
            return plain.replace(path)
        if made.precision == "int8":
            return _quantize(plain, path, _reference(segmenter, facts, made), evidence, made, **metadata)
        return write_openvino(plain, path, metadata, half=made.precision == "16")
    finally:
        plain.unlink(missing_ok=True)


def _quantize(plain: Path, path: Path, reference: Predictor, evidence: Evidence, made: Made, **text: str) -> Path:
    """Write 8-bit integers with ranges taken in each way, and keep the file that agrees best on the same images."""
    quantize = quantize_onnx if made.format == "onnx" else quantize_openvino
    shown = evidence.calibration[:: max(1, len(evidence.calibration) // CHOSEN_ON)][:CHOSEN_ON]
    wanted = [reference(image).argmax(1) for image in shown]
    found: dict[Ranges, float] = {}
    ways: tuple[Ranges, ...] = ("extremes", "means")
    for ranges in ways:
        file = quantize(plain, path.parent / ranges / path.name, evidence.calibration, text, ranges)
        predictor = runtimes_of(file, made)[0]
        same = [(predictor(image).argmax(1) == right).mean() for image, right in zip(shown, wanted, strict=True)]
        found[ranges] = float(sum(same))
    best = max(found, key=lambda ranges: found[ranges])
    for part in (path.parent / best).iterdir():
        part.replace(path.parent / part.name)
    for ranges in ways:
        shutil.rmtree(path.parent / ranges)
    return path


def _reference(segmenter: Segmenter, facts: Facts, made: Made) -> Predictor:
    """PyTorch in float32, as the network was before anything was folded."""
    reference = of_segmenter(segmenter, facts)
    return reference if made.resize is None else resized(reference, made.resize)


def _measure(file: Path, segmenter: Segmenter, facts: Facts, made: Made, evidence: Evidence) -> Exported:
    """Everything that is known of a file."""
    reference = _reference(segmenter, facts, made)
    fixed = (facts.window, facts.window) if facts.fixed else None
    graph = Deployed(segmenter, answer=made.answer, resize=made.resize, fixed=fixed).eval()
    truth_of_torch = None if evidence.truth is None else miou(reference, evidence.truth)[0]
    predictors = runtimes_of(file, made)
    parity = [
        compare(file, predictor, made, reference=reference, deployed=graph, images=evidence.images,
            truth=evidence.truth, truth_of_torch=truth_of_torch,
        )
        for predictor in predictors
    ]  # fmt: skip
    side = facts.window
    image = (
        facts.max_value * torch.rand(1, facts.bands, side, side, generator=torch.Generator().manual_seed(0))
    ).numpy()
    runs: dict[str, Callable[[], Any]] = {"torch eager": partial(reference, image)}
    runs |= {predictor.backend: partial(predictor, image) for predictor in predictors}
    agrees = not parity[0].beyond
    return Exported(
        file=file.name,
        bytes=sum(part.stat().st_size for part in (file, file.with_suffix(".bin")) if part.exists()),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        made=made,
        facts=facts,
        images=evidence.title,
        calibration_images=len(evidence.calibration) if made.precision == "int8" else 0,
        parity=tuple(parity),
        latency=take_turns(runs, rounds=ROUNDS, seconds=SECONDS) if agrees else {},
        latency_side=side,
        machine=describe_machine(),
    )


def runtimes_of(file: Path, made: Made, threads: int | None = None) -> list[Predictor]:
    """A file on every runtime that is installed and opens it, the one that it is made for first.

    Raises:
        MissingExtraError: no runtime for it is installed.
    """
    if made.format == "torch":
        return [of_program(file)]
    if made.format == "openvino":
        return [of_openvino(file, threads=threads)]
    found, missing = [], None
    for opened in (of_onnx, of_openvino):
        try:
            found.append(opened(file, threads=threads))
        except MissingExtraError as error:
            missing = missing or error
    if not found and missing is not None:
        raise missing
    return found


def _judge(found: Exported, report: Path) -> None:
    """Raise where the runtime that a file is made for is beyond tolerance, and leave the figures.

    Others that open it too are measured, and what they are is told.
    """
    report.unlink(missing_ok=True)
    for parity in found.parity[:1]:
        if parity.beyond:
            report.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
            raise ParityError(
                f"{found.file} was not written: run by {parity.backend} on {parity.images} images of {found.images} it "
                f"differs from PyTorch ({parity.beyond}); {parity.where}; every layer's error is in {report}; take a "
                "higher --precision, train the network for longer, or measure on the pictures it is for with --domain"
            )


def _move(work: Path, folder: Path, file: Path, found: Exported, name: str) -> None:
    """Give the files their names, the one that is opened last."""
    values = json.loads(found.model_dump_json())
    (work / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for part in sorted(work.iterdir(), key=lambda part: part == file):
        part.replace(folder / part.name)


__all__ = ["Evidence", "Exported", "export", "runtimes_of"]
