"""DeepLabV2 on ResNet-101: dilated stages and four dilated classifiers (Chen et al., TPAMI 2018).

The variant that domain adaptation papers use (Tsai et al., AdaptSegNet, CVPR 2018), with one scale. Names inside the
ResNet are torchvision's.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.records import Logits
from overfly.models.network import Network, register

DILATIONS = (6, 12, 18, 24)
"""Dilations of the four classifiers."""


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions to four times the planes, with a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        outputs = planes * 4
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if project else None
        self.downsample = None if shortcut is None else nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        self.stride = stride
        self.halve_at_first(True)

    def halve_at_first(self, first: bool) -> None:
        """Set the stride in the first convolution (Caffe's ResNet) or in the second (torchvision's)."""
        self.conv1.stride = (self.stride, self.stride) if first else (1, 1)
        self.conv2.stride = (1, 1) if first else (self.stride, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 planes, ⌈H / stride⌉, ⌈W / stride⌉)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def _stage(inputs: int, planes: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = Bottleneck(inputs, planes, stride, dilation, project=True)
    rest = [Bottleneck(planes * 4, planes, 1, dilation, project=False) for _ in range(1, blocks)]
    return nn.Sequential(first, *rest)


class SumOf(nn.ModuleList):
    """Sum of the outputs of several layers for one input."""

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the layers' outputs for (B, C, H, W)."""
        total: Tensor = self[0](x)
        for layer in self[1:]:
            total = total + layer(x)
        return total


class DeepLabV2(Network):
    """ResNet at output stride 8 (stages 3 and 4 dilated by 2 and 4) and the sum of four dilated 3×3 classifiers.

    Two kinds of ResNet share names and shapes: the stride of stage 2 is in the 1×1 convolution of its first block
    (Caffe, AdaptSegNet) or in the 3×3 one (torchvision). `convert_checkpoint` detects the kind of a checkpoint, and the
    state dict stores it (``_extra_state``). ``blocks`` are those of each stage.
    """

    stride = 8
    heads = ("classifier",)
    first_conv = "conv1"
    class_layer = "classifier"
    imagenet = "resnet101"

    def __init__(self, classes: int, bands: int, blocks: tuple[int, int, int, int] = (3, 4, 23, 3)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(bands, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.layer1 = _stage(64, 64, blocks[0])
        self.layer2 = _stage(256, 128, blocks[1], stride=2)
        self.layer3 = _stage(512, 256, blocks[2], dilation=2)
        self.layer4 = _stage(1024, 512, blocks[3], dilation=4)
        classifiers = [nn.Conv2d(2048, classes, 3, padding=dilation, dilation=dilation) for dilation in DILATIONS]
        self.classifier = SumOf(classifiers)
        self.halves_at_first = True
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for classifier in classifiers:
            nn.init.normal_(classifier.weight, std=0.01)

    def forward(self, image: Tensor) -> Logits:
        """Scores at about an 8th of the size, from normalized images (B, C, H, W).

        Returns:
            main (B, K, h, w), where h = ⌈H/8⌉ or, because the pool rounds up, one more; features (B, 2048, h, w).
        """
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return Logits(self.classifier(x), features=x)

    def get_extra_state(self) -> Tensor:
        """Kind of ResNet, for the state dict: 1 where the stride of stage 2 is in the first convolution."""
        return torch.tensor(int(self.halves_at_first))

    def set_extra_state(self, state: Tensor) -> None:
        """Set the kind of ResNet from a state dict."""
        self.halves_at_first = bool(state)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.halve_at_first(self.halves_at_first)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Rename the class layers of AdaptSegNet checkpoints, and detect the kind of ResNet.

        Files with two levels have the class layers of stage 4 as ``layer6`` and those of stage 3, which this network
        does not have, as ``layer5``.
        """
        main = "layer6" if any(name.startswith("layer6.") for name in state) else "layer5"
        spelling = re.compile(rf"^(?:{main}|classifier)\.conv2d_list\.")
        renamed = {spelling.sub("classifier.", name): tensor for name, tensor in state.items()}
        if "_extra_state" in state:
            return renamed, ()
        if any(".conv2d_list." in name for name in state):
            renamed["_extra_state"] = torch.tensor(1)
            note = (
                "AdaptSegNet checkpoint: stride of stage 2 in its 1×1 convolution; the input is blue, green, red, "
                "0 to 255, minus the mean (104.0, 116.7, 122.7)"
            )
            return renamed, (note,)
        if "fc.weight" in state or not any(name.startswith("classifier.") for name in state):
            renamed["_extra_state"] = torch.tensor(0)
            return renamed, ("torchvision's ResNet: the stride of stage 2 is in its 3×3 convolution",)
        return renamed, ()


@register
def deeplabv2_resnet101(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """DeepLabV2-ResNet101: 43.0 million parameters, 185 GMAC for a 3×512×512 image of 7 classes, no training heads."""
    del training_heads  # it has none
    return DeepLabV2(classes, bands)
