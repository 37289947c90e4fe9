"""Networks with random weights whose scores are of a sane order: batch normalization has seen images."""

from __future__ import annotations

import torch

from overfly.models import build
from overfly.models.segmenter import Segmenter
from overfly.recipe import load


def random_network(name: str) -> Segmenter:
    """A network in evaluation mode for the synthetic domain's classes."""
    torch.manual_seed(0)
    classes = load({"source": {"name": "synthetic", "scene": "urban", "size": 64}}).domain("source").classes
    network = build(name, len(classes))
    segmenter = Segmenter(network, classes, architecture=name, mean=(120.0, 110.0, 100.0), std=(50.0, 60.0, 70.0))
    segmenter.train()
    for part in segmenter.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        segmenter(torch.rand(4, 3, 128, 128) * 255)
    return segmenter.eval()
