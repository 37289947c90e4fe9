"""LR-ASPP on MobileNetV2: a light real-time network that starts from ImageNet weights.

The encoder is MobileNetV2 (Sandler et al., CVPR 2018) with torchvision's names, its last stages dilated to output
stride 16. The decoder is LR-ASPP (Howard et al., MobileNetV3, ICCV 2019), with skips from output strides 8 and 4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.records import Logits
from overfly.models.network import Network, register, resize


class Stage(NamedTuple):
    """A stage of inverted residuals: one row of table 2 of the MobileNetV2 paper."""

    expansion: int
    planes: int
    blocks: int
    stride: int
    dilation: int = 1


STAGES = (
    Stage(1, 16, 1, 1), Stage(6, 24, 2, 2), Stage(6, 32, 3, 2), Stage(6, 64, 4, 2), Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 1, dilation=2),  # stride 2 in the paper
    Stage(6, 320, 1, 1, dilation=2),
)  # fmt: skip
QUARTER, EIGHTH = 3, 6
"""Indices of the last blocks at output strides 4 and 8."""


class Depthwise(nn.Conv2d):
    """Depthwise 3×3 convolution without bias, with a faster backward pass in bfloat16 on a CPU.

    PyTorch 2.13 takes 10 to 50 times as long for the backward pass of a stride of 2 in bfloat16 as in float32, and 15
    to 20 times as long for a dilation of 2 as for none. In training the first is computed in float32, the second
    without dilation on even and odd rows and columns apart, with the same result.
    """

    def __init__(self, planes: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(planes, planes, 3, stride, dilation, dilation, planes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, ⌈H / stride⌉, ⌈W / stride⌉)."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        batch, planes, height, width = x.shape
        if self.stride == (2, 2):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        if self.dilation != (2, 2) or height % 2 or width % 2:
            return super().forward(x)
        rows, columns = height // 2, width // 2
        cells = x.permute(0, 2, 3, 1).reshape(batch, rows, 2, columns, 2, planes)
        parts = cells.permute(2, 4, 0, 1, 3, 5).reshape(4 * batch, rows, columns, planes).permute(0, 3, 1, 2)
        out = F.conv2d(parts, self.weight, padding=1, groups=planes).permute(0, 2, 3, 1)
        cells = out.reshape(2, 2, batch, rows, columns, planes).permute(2, 3, 0, 4, 1, 5)
        return cells.reshape(batch, height, width, planes).permute(0, 3, 1, 2)


def _bn_relu6(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6())


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    """Depthwise 3×3 convolution, then 1×1 convolution."""
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(
        Depthwise(inputs), nn.BatchNorm2d(inputs), nn.ReLU(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU()
    )


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, 1×1 projection; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widen = [] if expansion == 1 else [_bn_relu6(nn.Conv2d(inputs, inner, 1, bias=False))]
        self.conv = nn.Sequential(
            *widen, _bn_relu6(Depthwise(inner, stride, dilation)), nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, ⌈H / stride⌉, ⌈W / stride⌉)."""
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


def mobilenet_v2_features(bands: int, width: float = 1.0) -> nn.Sequential:
    """MobileNetV2 up to its 320 × ``width`` planes, at output stride 16, without the 1280 planes of its classifier.

    The first block of a dilated stage is not dilated, since its input is not.
    """
    inputs, before = int(32 * width), 1
    blocks: list[nn.Module] = [_bn_relu6(nn.Conv2d(bands, inputs, 3, 2, 1, bias=False))]
    for stage in STAGES:
        for index in range(stage.blocks):
            dilation = before if index == 0 else stage.dilation
            stride = stage.stride if index == 0 else 1
            planes = int(stage.planes * width)
            blocks.append(InvertedResidual(inputs, planes, stage.expansion, stride, dilation))
            inputs = planes
        before = stage.dilation
    return nn.Sequential(*blocks)


class LRASPP(Network):
    """MobileNetV2 with an LR-ASPP decoder of output stride 4; for training also ``auxiliary`` at a 16th."""

    stride = 4
    heads = ("context", "gate", "at_eighth", "at_quarter", "auxiliary", "classifier")
    training_heads = ("auxiliary",)
    first_conv = "features.0.0"
    class_layer = "classifier"
    imagenet = "mobilenet_v2"

    def __init__(self, classes: int, training_heads: bool, bands: int, width: float = 1.0) -> None:
        super().__init__()
        if width != 1:
            self.imagenet = ""
        self.features = mobilenet_v2_features(bands, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        last, context, eighth, quarter = (int(planes * width) for planes in (320, 256, 128, 64))
        self.context = nn.Sequential(nn.Conv2d(last, context, 1, bias=False), nn.BatchNorm2d(context), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(last, context, 1), nn.Sigmoid())
        self.at_eighth = _separable(context + int(32 * width), eighth)
        self.at_quarter = _separable(eighth + int(24 * width), quarter)
        self.auxiliary = nn.Conv2d(context, classes, 1) if training_heads else None
        self.classifier = nn.Conv2d(quarter, classes, 1)

    def forward(self, image: Tensor) -> Logits:
        """Scores at a 4th of the size, from normalized images (B, C, H, W).

        Returns:
            main (B, K, ⌈H/4⌉, ⌈W/4⌉); with training heads aux (B, K, ⌈H/16⌉, ⌈W/16⌉); features (B, 320 × width,
            ⌈H/16⌉, ⌈W/16⌉).
        """
        quarter = self.features[: QUARTER + 1](image)
        eighth = self.features[QUARTER + 1 : EIGHTH + 1](quarter)
        coarse = self.features[EIGHTH + 1 :](eighth)

        context = self.context(coarse) * self.gate(coarse)
        aux = () if self.auxiliary is None else (self.auxiliary(context),)
        fine = self.at_eighth(torch.cat([resize(context, eighth), eighth], 1))
        fine = self.at_quarter(torch.cat([resize(fine, quarter), quarter], 1))
        return Logits(self.classifier(fine), aux, features=coarse)


@register
def lraspp_mobilenet_v2(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """LR-ASPP on MobileNetV2: 2.0 million parameters, for training from ImageNet weights on little data."""
    return LRASPP(classes, training_heads, bands)


@register
def lraspp_mobilenet_v2_half(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """LR-ASPP on MobileNetV2 with half the planes: 0.5 million parameters, to be taught by a larger network."""
    return LRASPP(classes, training_heads, bands, width=0.5)
