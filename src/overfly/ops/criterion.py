"""The supervised loss as a value of a recipe: which terms, and what each weighs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Logits
from overfly.core.spec import Choice, NonNegative, Pixels, Share, Whole
from overfly.ops.losses import boundary_loss, cross_entropy, dice_loss, ohem_cross_entropy


class Criterion(Choice, ABC):
    """What a network is told about its scores where the label is known. Heads that a network lacks drop their terms."""

    aux: NonNegative = 0.4
    """Weight of the cross-entropy of each auxiliary head."""
    boundary: NonNegative = 20.0
    """Weight of the balanced binary cross-entropy of the boundary head."""
    width: Pixels = 4
    """Width of the boundaries that the boundary head learns, in pixels."""
    class_weights: tuple[NonNegative, ...] = ()
    """Weight of each class, in the order of the ids; left out, all weigh the same."""

    @abstractmethod
    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """The terms of the main head, by name."""

    def terms(
        self, logits: Logits, label: Tensor, weight: Tensor | None = None, *, where: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms whose sum is minimized.

        Args:
            logits: scores at the label's size.
            label: class ids (B, H, W) or `IGNORE`.
            weight: what each pixel counts, broadcasts to (B, H, W); multiplies every term's loss at that pixel.
            where: True at pixels whose boundaries may be trusted, bool (B, H, W): in mixed images the source's pixels.
                It concerns the boundary head alone, which is taught nothing within reach of the others unless
                a boundary between trusted classes is there; left out, all pixels with a class are trusted.

        Returns:
            Scalars by name: ``main``, then ``aux`` and ``boundary`` where the network has these heads.

        Raises:
            RecipeError: the number of class weights is not that of the classes.
            ValueError: scores and label differ in size.
        """
        terms = self.main(logits, label, weight)
        if logits.aux and self.aux:
            classes = self._classes(logits.main)
            each = [cross_entropy(scores, label, weight=weight, class_weight=classes) for scores in logits.aux]
            terms["aux"] = self.aux * torch.stack(each).sum()
        if logits.boundary is not None and self.boundary:
            valid = label != IGNORE
            edges = boundaries(label, self.width, where)
            if where is not None:  # beside a paste a boundary may run or not
                valid = valid & where & (edges.bool() | surroundings(where, self.width))
            terms["boundary"] = boundary_loss(logits.boundary, edges, self.boundary, valid=valid, pixel_weight=weight)
        return terms

    def _classes(self, scores: Tensor) -> Tensor | None:
        """The class weights as a tensor (K,) on the scores' device."""
        if not self.class_weights:
            return None
        if len(self.class_weights) != scores.shape[1]:
            raise RecipeError(
                f"criterion.class_weights has {len(self.class_weights)} weights and the network {scores.shape[1]} "
                f"classes; give one weight a class, or leave it out"
            )
        return torch.tensor(self.class_weights, dtype=torch.float32, device=scores.device)


class CrossEntropy(Criterion, name="cross_entropy"):
    """Cross-entropy of every head, and the boundary head's own loss."""

    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Cross-entropy, mean over the valid pixels."""
        return {
            "main": cross_entropy(logits.main, label, weight=weight, class_weight=self._classes(logits.main)),
        }


class Ohem(Criterion, name="ohem"):
    """PIDNet's training loss: hard pixels alone, and once more where the network sees a boundary (Xu et al., 2023).

    The sum is ``0.4 CE(aux) + OHEM(main) + 20 BCE(boundary) + OHEM(main at predicted boundaries)``, with the weights of
    the published configurations.
    """

    threshold: Share = 0.9
    """Pixels whose true class has a probability below this are hard."""
    min_kept: Whole = 131072
    """How many pixels of a batch are kept at least, hard or not."""
    boundary_threshold: Share = 0.8
    """Probability of a boundary above which a pixel counts in the term ``at_boundary``."""

    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """OHEM cross-entropy; with a boundary head also that of the pixels it is sure of."""
        terms = {"main": self._ohem(logits.main, label, weight)}
        if logits.boundary is not None:
            seen = logits.boundary.detach().float().sigmoid().squeeze(1) > self.boundary_threshold
            terms["at_boundary"] = self._ohem(logits.main, label.masked_fill(~seen, IGNORE), weight)
        return terms

    def _ohem(self, scores: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        classes = self._classes(scores)
        return ohem_cross_entropy(scores, label, self.threshold, self.min_kept, class_weight=classes, weight=weight)


class Dice(Criterion, name="dice"):
    """Cross-entropy plus the soft Dice loss, which weighs small classes like large ones (Milletari et al., 2016)."""

    dice: NonNegative = 1.0
    """Weight of the Dice loss."""

    def main(self, logits: Logits, label: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Cross-entropy and Dice loss."""
        classes = self._classes(logits.main)
        return {
            "main": cross_entropy(logits.main, label, weight=weight, class_weight=classes),
            "dice": self.dice * dice_loss(logits.main, label, weight=weight),
        }


def boundaries(label: Tensor, width: int = 4, where: Tensor | None = None, *, ignore: int = IGNORE) -> Tensor:
    """Where two classes meet: pixels with another valid class within reach.

    A straight border gives a band ``width`` pixels wide, half of it on either side (an odd width has its extra pixel
    on the lower or right side). Ignored pixels are no class: they neither are boundaries nor make any. The published
    PIDNet code dilates Canny edges of the label with a 4×4 kernel, a band of the same width.

    Args:
        label: class ids (B, H, W), integers.
        width: of the band, in pixels, 1 or more.
        where: True at pixels that take part, broadcasts to (B, H, W); the others are treated as ignored. With pasted
            images, name the source's pixels here, so that neither pseudo-labels nor paste seams make boundaries.
        ignore: the id of pixels without a class.

    Returns:
        (B, H, W), float32, 1 on boundaries and 0 elsewhere.

    Raises:
        ValueError: ``width`` is below 1.
    """
    if width < 1:
        raise ValueError(f"a boundary is 1 pixel wide or more, not {width}")
    valid = label != ignore
    if where is not None:
        valid = valid & where.bool()
    ids = label.to(torch.int16)
    highest = _window(ids.masked_fill(~valid, -1), width, torch.maximum, fill=-1)
    lowest = _window(ids.masked_fill(~valid, IGNORE + 1), width, torch.minimum, fill=IGNORE + 1)
    return (valid & (highest != lowest)).float()


def surroundings(where: Tensor, width: int = 4) -> Tensor:
    """Pixels of which all that decides whether they are a boundary is trusted.

    Beside a paste a boundary may run or not: the label there is a teacher's guess. Such pixels, unless a boundary
    between trusted classes runs through them anyway, are no example of either.

    Args:
        where: True at trusted pixels, bool (B, H, W).
        width: of the boundaries, in pixels, 1 or more.

    Returns:
        bool (B, H, W), True where every pixel within reach of `boundaries` is trusted; those outside the image are.
    """
    return _window(where.to(torch.int16), width, torch.minimum, fill=1).bool()


def _window(ids: Tensor, width: int, extreme: Callable[[Tensor, Tensor], Tensor], fill: int) -> Tensor:
    """Extreme of ids (B, H, W) over windows of (width + 1)², one axis after the other; ``fill`` lies outside."""
    after = width // 2
    before = width - after
    height, length = ids.shape[-2:]
    padded = F.pad(ids, (0, 0, before, after), value=fill)
    rows = reduce(extreme, [padded[..., i : i + height, :] for i in range(width + 1)])
    padded = F.pad(rows, (before, after), value=fill)
    return reduce(extreme, [padded[..., i : i + length] for i in range(width + 1)])
