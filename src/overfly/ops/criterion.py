"""Supervised losses as recipe settings: their terms, their weights, and the class boundaries that they need."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Logits
from overfly.core.spec import Choice, NonNegativeFloat, NonNegativeInt, Pixels, Share
from overfly.ops.losses import boundary_loss, cross_entropy, dice_loss, ohem_cross_entropy


class Criterion(Choice, ABC):
    """Supervised loss of all heads of a network; a head that the network lacks has no term."""

    aux: NonNegativeFloat = 0.4
    """Weight of the cross-entropy of each auxiliary head."""
    boundary: NonNegativeFloat = 20.0
    """Weight of the balanced binary cross-entropy of the boundary head."""
    width: Pixels = 4
    """Width of the boundaries that the boundary head is trained on, in pixels."""
    class_weights: tuple[NonNegativeFloat, ...] = ()
    """Weight of each class, in the order of the ids; empty: equal weights."""

    @abstractmethod
    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """The terms of the main head, by name."""

    def terms(
        self, logits: Logits, label: Tensor, weight: Tensor | None = None, *, where: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms, by name, whose sum is minimized: ``main``, and ``aux`` and ``boundary`` with such heads.

        Scores have the size of the label, class ids (B, H, W) or `IGNORE`. ``weight``, which broadcasts to (B, H, W),
        multiplies every term's loss at a pixel. ``where`` is True at pixels whose boundaries are known, bool (B, H, W):
        in mixed images the source's; None: all with a class. The boundary head is not trained within reach of the other
        pixels, except at boundaries between known pixels.

        Raises `RecipeError`: `class_weights` does not have one weight per class, and `ValueError`: scores and label
        differ in size.
        """
        terms = self.main(logits, label, weight)
        if logits.aux and self.aux:
            classes = self._class_weight(logits.main)
            aux = [cross_entropy(scores, label, weight=weight, class_weight=classes) for scores in logits.aux]
            terms["aux"] = self.aux * torch.stack(aux).sum()
        if logits.boundary is not None and self.boundary:
            valid = label != IGNORE
            edges = boundaries(label, self.width, where)
            if where is not None:
                valid = valid & where & (edges | within_known(where, self.width))
            terms["boundary"] = boundary_loss(logits.boundary, edges, self.boundary, valid=valid, pixel_weight=weight)
        return terms

    def _class_weight(self, scores: Tensor) -> Tensor | None:
        """The class weights as a tensor (K,) on the scores' device; None: equal weights."""
        if not self.class_weights:
            return None
        if len(self.class_weights) != scores.shape[1]:
            raise RecipeError(
                f"criterion.class_weights needs a number per class ({scores.shape[1]}), got {len(self.class_weights)}"
            )
        return torch.tensor(self.class_weights, dtype=torch.float32).to(scores.device, non_blocking=True)


class CrossEntropy(Criterion, name="cross_entropy"):
    """Cross-entropy of the main and auxiliary heads, balanced binary cross-entropy of the boundary head."""

    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Cross-entropy, mean over the valid pixels."""
        classes = self._class_weight(logits.main)
        return {"main": cross_entropy(logits.main, label, weight=weight, class_weight=classes)}


class Ohem(Criterion, name="ohem"):
    """PIDNet's training loss: hard pixels only, and again where the network predicts a boundary (Xu et al., 2023).

    The sum is ``0.4 CE(aux) + OHEM(main) + 20 BCE(boundary) + OHEM(main at predicted boundaries)``, with the weights of
    the published configurations.
    """

    threshold: Share = 0.9
    """Pixels whose true class has a probability below this are hard."""
    min_kept: NonNegativeInt = 131072
    """Smallest number of pixels of a batch that are kept, hard or not."""
    boundary_threshold: Share = 0.8
    """Predicted boundary probability above which a pixel counts in the term ``at_boundary``."""

    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """OHEM cross-entropy; with a boundary head also that of the pixels at predicted boundaries."""
        terms = {"main": self._ohem(logits.main, label, weight)}
        if logits.boundary is not None:
            predicted = logits.boundary.detach().float().sigmoid().squeeze(1) > self.boundary_threshold
            terms["at_boundary"] = self._ohem(logits.main, label.masked_fill(~predicted, IGNORE), weight)
        return terms

    def _ohem(self, scores: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        classes = self._class_weight(scores)
        return ohem_cross_entropy(scores, label, self.threshold, self.min_kept, class_weight=classes, weight=weight)


class Dice(Criterion, name="dice"):
    """Cross-entropy plus the soft Dice loss, which weighs small classes like large ones (Milletari et al., 2016)."""

    dice: NonNegativeFloat = 1.0
    """Weight of the Dice loss."""

    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Cross-entropy and Dice loss."""
        classes = self._class_weight(logits.main)
        return {
            "main": cross_entropy(logits.main, label, weight=weight, class_weight=classes),
            "dice": self.dice * dice_loss(logits.main, label, weight=weight),
        }


def boundaries(label: Tensor, width: int = 4, where: Tensor | None = None) -> Tensor:
    """Boundaries between classes: pixels with another valid class within reach, bool (B, H, W).

    Call it after all augmentations. A straight border gives a band ``width`` pixels wide, half of it on either
    side; an odd width has its extra pixel on the lower or right side. Ignored pixels neither are nor create
    boundaries. The published PIDNet code dilates Canny edges of the label with a 4×4 kernel, a band of the same width.

    The label holds class ids (B, H, W), integers. ``where`` is True at pixels that take part, and broadcasts to (B, H,
    W); the others count as ignored. In mixed images these are the source's pixels, so that pseudo-labels and paste
    seams create no boundaries.

    Raises `ValueError`: ``width`` is below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    valid = label != IGNORE
    if where is not None:
        valid = valid & where.bool()
    ids = label.to(torch.int16)
    highest = _window(ids.masked_fill(~valid, -1), width, torch.maximum, fill=-1)
    lowest = _window(ids.masked_fill(~valid, IGNORE + 1), width, torch.minimum, fill=IGNORE + 1)
    return valid & (highest != lowest)


def within_known(where: Tensor, width: int = 4) -> Tensor:
    """Pixels of which every pixel within reach of `boundaries` is known, bool (B, H, W).

    Beside a pasted region the label is a pseudo-label, so a missing boundary there is no negative example. ``where`` is
    True at known pixels, bool (B, H, W); pixels outside the image count as known. ``width`` is that of `boundaries`.
    """
    return _window(where.to(torch.int16), width, torch.minimum, fill=1).bool()


def _window(ids: Tensor, width: int, extreme: Callable[[Tensor, Tensor], Tensor], fill: int) -> Tensor:
    """Extreme of ids (B, H, W) over windows of (width + 1)², one axis after the other; ``fill`` lies outside."""
    after = width // 2
    before = width - after
    result = F.pad(ids, (before, after, before, after), value=fill)
    for dim in (1, 2):
        span = 1  # pixels that each value covers so far; doubled at each step
        while span <= width:
            step = min(span, width + 1 - span)
            rest = result.shape[dim] - step
            result = extreme(result.narrow(dim, 0, rest), result.narrow(dim, step, rest))
            span += step
    return result
