"""Boundaries between classes, derived from a label on its own device.

To be called after every augmentation: a boundary map that is not moved with its label teaches the wrong place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from overfly.core.records import IGNORE


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
