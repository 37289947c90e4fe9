"""Compare the predictions of an exported file with PyTorch's on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from overfly.core.choices import ExportPrecision
from overfly.core.classes import Classes
from overfly.core.errors import OverflyError
from overfly.core.records import Logits
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.evaluation.score import score
from overfly.exporting.predictor import ExportSettings, Floats, Predictor


class ParityError(OverflyError):
    """An exported file whose predictions differ from PyTorch's."""


class Tolerance(Spec):
    """Allowed difference of an exported file from PyTorch."""

    agreement: Share
    """Smallest allowed share of pixels with the same class."""
    miou: Share
    """Largest allowed difference of mIoU."""


TOLERANCES: dict[ExportPrecision, Tolerance] = {
    "32": Tolerance(agreement=0.9999, miou=0.0005),
    "16": Tolerance(agreement=0.98, miou=0.005),
    "int8": Tolerance(agreement=0.97, miou=0.01),
}
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
            violations.append(
                f"{self.agreement:.4%} of pixels have the same class, {self.tolerance.agreement:.2%} are needed"
            )
        difference = abs((self.miou or 0) - (self.miou_of_torch or 0))
        if self.miou is not None and self.miou_of_torch is not None and difference > self.tolerance.miou:
            violations.append(
                f"mIoU is {self.miou:.2%}, {self.miou_of_torch:.2%} in PyTorch, and may differ by "
                f"{self.tolerance.miou:.2%}"
            )
        return "; ".join(violations)


@dataclass(frozen=True)
class LabeledSplit:
    """Labels of a split for mIoU.

    Attributes:
        domain: the domain.
        split: split of the domain.
        resize: side that images are resized to before prediction.
        window: side of sliding windows.
        limit: largest number of images, sampled evenly.
    """

    domain: Domain
    split: Split
    resize: int | None
    window: int | None
    limit: int


def measure_parity(
    predictor: Predictor, settings: ExportSettings, *, reference: Predictor, images: Sequence[Floats],
    labels: LabeledSplit | None = None, miou_of_torch: float | None = None,
) -> Parity:  # fmt: skip
    """Compare an exported file with PyTorch.

    Args:
        predictor: the exported file.
        settings: its settings.
        reference: the original network in PyTorch, float32.
        images: images (1, C, H, W), float32, in the sensor's own range.
        labels: labels for mIoU; None: mIoU is not computed.
        miou_of_torch: mIoU of PyTorch with the labels.
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
        backend=predictor.backend,
        images=len(images),
        pixels=pixels,
        agreement=same / pixels,
        probability_difference=difference,
        miou=miou,
        miou_of_torch=miou_of_torch,
        labels_opened=opened,
        tolerance=TOLERANCES[settings.precision],
    )


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
