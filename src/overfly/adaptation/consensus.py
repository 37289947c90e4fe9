"""Consensus: how far each of several networks agrees with what all of them say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from overfly.evaluation.confusion import Confusion
from overfly.evaluation.images import predict_scores
from overfly.evaluation.label_free_metrics import balanced_miou
from overfly.evaluation.score import evaluation_mode

FEWEST = 3
"""Networks that have a consensus: two agree with their mean alike."""


def consensus(
    candidates: Iterable[tuple[nn.Module, int | None]], images: Sequence[Tensor], device: torch.device | str = "cpu"
) -> list[float | None]:
    """Class-balanced mIoU of each network's predictions with those of the mean of all networks' probabilities.

    Networks that err in ways of their own err against the mean; the mean of many is commonly better than any of them.
    Where most of them make the same mistake, the mean makes it too. Memory holds one network at a time, the mean, and a
    byte for each pixel and network.

    Args:
        candidates: each with the side of the windows it reads larger pictures in; images (C, H, W) to `Logits`.
        images: pictures (C, H, W) in the sensor's range.
        device: where networks run.

    Returns:
        0 to 1 for each network; None for each of fewer than three.
    """
    sums: list[Tensor] = []
    said: list[list[Tensor]] = []
    classes = 0
    for network, window in candidates:
        own = []
        with evaluation_mode(network.to(device)), torch.inference_mode():
            for place, image in enumerate(images):
                probability = predict_scores(network, image.to(device), window).softmax(0).cpu()
                classes = len(probability)
                if len(sums) == place:
                    sums.append(torch.zeros_like(probability))
                sums[place] += probability
                own.append(probability.argmax(0).to(torch.uint8))
        said.append(own)
    if len(said) < FEWEST:
        return [None] * len(said)
    together = [total.argmax(0) for total in sums]
    found: list[float | None] = []
    for own in said:
        pair = Confusion.empty(classes)
        for mine, common in zip(own, together, strict=True):
            pair += Confusion.of(mine, common, classes)
        found.append(balanced_miou(pair))
    return found


__all__ = ["FEWEST", "consensus"]
