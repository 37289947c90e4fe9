"""A predictor that sees every image at one size, as a network whose training pictures were resized needs it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from overfly.exporting.predictor import Floats, Predictor


def resized(predictor: Predictor, side: int) -> Predictor:
    """A predictor before which images are resized to a square, and whose scores are brought back to their size.

    Args:
        predictor: sees the square.
        side: its side in pixels.
    """

    def run(images: Floats) -> Floats:
        given = torch.from_numpy(images)
        square = F.interpolate(given, (side, side), mode="bilinear", align_corners=False, antialias=True)
        found = torch.from_numpy(predictor.run(np.ascontiguousarray(square.numpy()))).clamp_min(1e-30).log()
        large = F.interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)
        probabilities: Floats = large.softmax(1).numpy()
        return probabilities

    return replace(predictor, run=run)


__all__ = ["resized"]
