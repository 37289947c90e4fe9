"""Weights by formula: every tensor follows from its name and shape alone, on any machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from overfly.core.classes import Classes
from overfly.models import Segmenter, build


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that keeps activations near 1: scaled waves for convolutions, near-identity for BatchNorm."""
    count = int(torch.Size(shape).numel())
    phase = zlib.crc32(name.encode()) % 1000 / 159.0
    wave = torch.sin(torch.arange(count, dtype=torch.float32) * 0.7321 + phase).reshape(shape)
    if len(shape) == 4:
        return wave * math.sqrt(4.0 / (shape[1] * shape[2] * shape[3]))
    if name.endswith(("running_var", "weight")):
        return 1 + 0.25 * wave
    return 0.1 * wave


def fill(network: nn.Module) -> None:
    state = network.state_dict()
    filled = {name: formula(name, tuple(tensor.shape)) for name, tensor in state.items() if tensor.is_floating_point()}
    network.load_state_dict(filled, strict=False)


def smooth_image(height: int, width: int, batch: int = 1, bands: int = 3) -> Tensor:
    """A smooth smooth_image, (batch, bands, height, width), about -1 to 1."""
    rows = torch.arange(height, dtype=torch.float32).view(1, 1, -1, 1)
    columns = torch.arange(width, dtype=torch.float32).view(1, 1, 1, -1)
    band = torch.arange(bands, dtype=torch.float32).view(1, -1, 1, 1)
    item = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1)
    return torch.sin(rows * 0.31 + band) * torch.cos(columns * 0.17 - item) + 0.3 * torch.sin(rows * columns * 0.05)


def segmenter(
    name: str, classes: Classes, *, mean: Sequence[float], std: Sequence[float], training_heads: bool = True
) -> Segmenter:
    """A segmenter by the name of its network; as many bands as there are means."""
    network = build(name, len(classes), training_heads, len(mean))
    return Segmenter(network, classes, architecture=name, mean=mean, std=std)
