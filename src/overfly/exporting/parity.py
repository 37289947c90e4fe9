"""Whether an exported file says what PyTorch says, measured on real images before anybody is told that it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from overfly.core.classes import Classes
from overfly.core.errors import OverflyError
from overfly.core.records import Logits
from overfly.core.spec import NonNegative, Share, Spec, Whole
from overfly.data.domain import Domain, Split
from overfly.evaluation.score import score
from overfly.exporting.graph import ExportModule, Precision
from overfly.exporting.metadata import ExportSettings
from overfly.exporting.predictor import Floats, Predictor
from overfly.exporting.probes import SCORES, Layer, Maps, differences, maps_in, maps_of

PROBED = 2
"""Images that files are compared on layer by layer."""


class ParityError(OverflyError):
    """An exported file that does not say what PyTorch says."""


class Tolerance(Spec):
    """How far an exported file may be from PyTorch."""

    agreement: Share
    """Least share of pixels with the same class."""
    miou: Share
    """Most that mIoU may differ, where it is measured."""
    layer: NonNegative
    """Error of a layer, as a share of its largest value, from which it is named where the answer is off."""


TOLERANCES: dict[Precision, Tolerance] = {
    "32": Tolerance(agreement=0.9999, miou=0.0005, layer=1e-3),
    "16": Tolerance(agreement=0.98, miou=0.005, layer=0.03),
    "int8": Tolerance(agreement=0.97, miou=0.01, layer=0.2),
}
"""16 bits are float16 or, where the processor has nothing else, bfloat16, of which 8 bits are digits."""


class Parity(Spec):
    """An exported file against PyTorch in float32, on images of one split."""

    backend: str
    """The runtime."""
    images: Whole
    """Images that both have seen."""
    pixels: Whole
    """Their pixels."""
    agreement: Share
    """Share of pixels with the same class."""
    logit_difference: NonNegative | None
    """Largest difference of a class score at the network's own stride; none where the runtime has melted them away."""
    probability_difference: NonNegative
    """Largest difference of a probability at the images' size."""
    miou: Share | None = None
    """mIoU of the file against labels; none where there are no labels."""
    miou_of_torch: Share | None = None
    """mIoU of PyTorch against the same labels."""
    labels_opened: Whole = 0
    """Labels that the scorer read for it, each time for both."""
    tolerance: Tolerance
    """What was allowed."""
    layers: tuple[Layer, ...] = ()
    """Every layer's error, where the answer is beyond tolerance."""

    @property
    def violations(self) -> str:
        """What is beyond tolerance, in words; empty where nothing is."""
        said = []
        if self.agreement < self.tolerance.agreement:
            said.append(
                f"{self.agreement:.4%} of pixels have the same class, {self.tolerance.agreement:.2%} are needed"
            )
        if self.miou is not None and self.miou_of_torch is not None:
            moved = abs(self.miou - self.miou_of_torch)
            if moved > self.tolerance.miou:
                allowed = f"{self.tolerance.miou:.2%} is allowed"
                said.append(f"mIoU is {self.miou:.2%} instead of {self.miou_of_torch:.2%}, and {allowed}")
        return "; ".join(said)

    @property
    def where(self) -> str:
        """The first layer beyond tolerance, in words."""
        first = next((layer for layer in self.layers if layer.error > self.tolerance.layer), None)
        if first is not None:
            return f"the first layer beyond {self.tolerance.layer:g} of its range is {first.name} ({first.error:.2g})"
        if not self.layers:
            return "no layer inside the file could be compared"
        worst = max(self.layers, key=lambda layer: layer.error)
        furthest = f"{worst.name} is furthest ({worst.error:.2g})"
        return f"no single layer is beyond {self.tolerance.layer:g} of its range; {furthest}"


@dataclass(frozen=True)
class LabeledSplit:
    """Where labels are, for the scorer alone.

    Attributes:
        domain: whose labels.
        split: which of them.
        resize: side that pictures are resized to before either network sees them.
        window: side of the windows that they are predicted in.
        limit: pictures at most, evenly spread.
    """

    domain: Domain
    split: Split
    resize: int | None
    window: int | None
    limit: int


def measure_parity(
    file: Path, predictor: Predictor, settings: ExportSettings, *, reference: Predictor, module: ExportModule,
    images: Sequence[Floats], labeled_split: LabeledSplit | None = None, truth_of_torch: float | None = None,
) -> Parity:  # fmt: skip
    """Measure an exported file against PyTorch.

    Args:
        file: the exported file.
        predictor: the same file on a runtime.
        settings: how it was made.
        reference: the trained network in PyTorch, float32, as it was before anything was folded.
        module: the graph that was exported, in float32.
        images: each (1, C, H, W), float32, in the sensor's own range.
        labeled_split: where labels are; None: mIoU is not measured.
        truth_of_torch: mIoU of PyTorch on them, where it is known already.
    """
    same = pixels = 0
    furthest = 0.0
    for image in images:
        wanted, found = reference(image), predictor(image)
        same += int((wanted.argmax(1) == found.argmax(1)).sum())
        pixels += wanted[:, 0].size
        if settings.output != "classes":
            furthest = max(furthest, float(np.abs(wanted - found).max()))
    scored, opened = (None, 0) if labeled_split is None else miou(predictor, labeled_split)
    parity = Parity(
        backend=predictor.backend,
        images=len(images),
        pixels=pixels,
        agreement=same / pixels,
        logit_difference=_logit_difference(file, predictor.backend, settings, module, images[:PROBED]),
        probability_difference=furthest,
        miou=scored,
        miou_of_torch=truth_of_torch,
        labels_opened=opened,
        tolerance=TOLERANCES[settings.precision],
    )
    if parity.violations:
        layers = differences(*_both(file, predictor.backend, settings, module, images[0]))
        return parity.model_copy(update={"layers": tuple(layers)})
    return parity


def miou(predictor: Predictor, labeled_split: LabeledSplit) -> tuple[float | None, int]:
    """Score a predictor: its mIoU against labels, and how many of them were read."""
    count = sum(item.label is not None for item in labeled_split.domain.items(labeled_split.split))
    every = max(1, -(-count // labeled_split.limit))
    scores = score(
        _Scored(predictor), labeled_split.domain, labeled_split.split,
        resize=labeled_split.resize, window=labeled_split.window, shard=(0, every), add=lambda counts: counts,
    )  # fmt: skip
    return scores.miou, scores.labels_opened


class _Scored(nn.Module):
    """A predictor as the scorer asks for it: images (B, C, H, W) to `Logits` at their size."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.classes: Classes = predictor.metadata.classes

    def forward(self, image: Tensor) -> Logits:
        """Logarithms of the probabilities, which a softmax turns back into them."""
        found = torch.from_numpy(self.predictor(image.cpu().numpy()))
        return Logits(found.clamp_min(1e-30).log())


def _logit_difference(
    file: Path, backend: str, settings: ExportSettings, module: ExportModule, images: Sequence[Floats]
) -> float | None:
    furthest: list[float] = []
    for image in images:
        wanted, found = _both(file, backend, settings, module, image)
        if SCORES not in found or found[SCORES].shape != wanted[SCORES].shape:
            return None
        furthest.append(float(np.abs(found[SCORES] - wanted[SCORES]).max()))
    return max(furthest, default=None)


def _both(file: Path, backend: str, settings: ExportSettings, module: ExportModule, image: Floats) -> tuple[Maps, Maps]:
    return maps_of(module, image), maps_in(file, backend, image, settings)


__all__ = ["TOLERANCES", "LabeledSplit", "Parity", "ParityError", "Tolerance", "measure_parity", "miou"]
