"""Registered networks that train in milliseconds, with every head that the methods use."""

from __future__ import annotations

from torch import Tensor, nn

from overfly.core.records import Logits
from overfly.models.network import Network, register


class SmallNetwork(Network):
    stride = 4
    heads = ("auxiliary", "boundary", "classifier")
    training_heads = ("auxiliary", "boundary")
    first_conv = "stem.0"
    class_layer = "classifier"

    def __init__(self, classes: int, training_heads: bool, bands: int, *, group_norm: bool = False) -> None:
        super().__init__()

        def block(inputs: int, planes: int) -> nn.Sequential:
            norm = nn.GroupNorm(2, planes) if group_norm else nn.BatchNorm2d(planes)
            return nn.Sequential(nn.Conv2d(inputs, planes, 3, 2, 1, bias=False), norm, nn.ReLU())

        self.stem, self.body = block(bands, 8), block(8, 16)
        self.auxiliary = nn.Conv2d(8, classes, 1) if training_heads else None
        self.boundary = nn.Conv2d(16, 1, 1) if training_heads else None
        self.classifier = nn.Conv2d(16, classes, 1)

    def forward(self, image: Tensor) -> Logits:
        early = self.stem(image)
        features = self.body(early)
        aux = () if self.auxiliary is None else (self.auxiliary(early),)
        boundary = None if self.boundary is None else self.boundary(features)
        return Logits(self.classifier(features), aux, boundary, features)


@register
def small_network(classes: int, training_heads: bool, bands: int) -> SmallNetwork:
    """A network for tests."""
    return SmallNetwork(classes, training_heads, bands)


@register
def small_group_norm(classes: int, training_heads: bool, bands: int) -> SmallNetwork:
    """A network without training heads whose gradient does not depend on how a batch is shared."""
    del training_heads
    return SmallNetwork(classes, False, bands, group_norm=True)
