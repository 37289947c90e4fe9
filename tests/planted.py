"""Images in memory, and networks with known predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Array, Item, Logits, UInt8
from overfly.data.domain import Domain, Split

CLASSES = Classes(names=("dark", "gray", "bright"))


class Patches(Domain):
    """Squares of two or three gray levels with noise; not registered. With ``blind``, reading a label fails."""

    name: ClassVar[str] = "patches"
    blind: bool = True
    images: int = 5
    side: int = 32
    first: int = 0
    levels: int = 3

    @property
    def classes(self) -> Classes:
        return CLASSES

    def items(self, split: Split) -> Sequence[Item]:
        del split
        return [Item(f"p{self.first + i}", Path(f"p{i}.png"), Path(f"p{i}_mask.png")) for i in range(self.images)]

    def _levels(self, item: Item) -> UInt8:
        coarse = np.random.default_rng(int(item.name[1:])).integers(0, self.levels, (self.side // 8, self.side // 8))
        return coarse.repeat(8, 0).repeat(8, 1).astype(np.uint8)

    def read_image(self, item: Item) -> Array:
        assert item.label is None or not self.blind, "an item with a label came to be read"
        noise = np.random.default_rng(1000 + int(item.name[1:])).integers(-5, 6, (self.side, self.side, 3))
        return (self._levels(item)[..., None] * 90 + 30 + noise).astype(np.uint8)

    def read_label(self, item: Item) -> UInt8:
        if self.blind:
            raise DataError("a label was opened")
        return self._levels(item)


class Constant(nn.Module):
    """The same class everywhere."""

    def __init__(self, strength: float = 50.0) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([0.0, strength, 0.0]))

    def forward(self, image: Tensor) -> Logits:
        return Logits(self.scores[:, None, None].expand(len(image), 3, *image.shape[-2:]))


class ByLevel(nn.Module):
    """Classifies pixels by brightness: equivariant to rotations; more confident with larger ``sharpness``."""

    def __init__(self, sharpness: float = 1.0, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.sharpness, self.order = sharpness, order

    def forward(self, image: Tensor) -> Logits:
        level = image.mean(1, keepdim=True)
        centers = torch.tensor([30.0, 120.0, 210.0])[:, None, None]
        scores = -self.sharpness * (level - centers).abs() / 10
        return Logits(scores[:, list(self.order)])
