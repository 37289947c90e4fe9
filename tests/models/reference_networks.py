"""Published networks, written a second time and in another way: as functions over tensors by name.

Nothing here is shared with the package. Each tensor is made by formula the first time that its name is asked for, so
one forward pass leaves a state dict with exactly the names of the release.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from formula_weights import formula
from torch import Tensor


class Tensors(dict[str, Tensor]):
    def get_or_make(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            self[name] = formula(name, shape)
        assert self[name].shape == shape
        return self[name]

    def conv(
        self,
        name: str,
        x: Tensor,
        out: int,
        size: int = 1,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> Tensor:
        weight = self.get_or_make(f"{name}.weight", out, x.shape[1] // groups, size, size)
        offset = self.get_or_make(f"{name}.bias", out) if bias else None
        return F.conv2d(x, weight, offset, stride, (size // 2) * dilation, dilation, groups)

    def bn(self, name: str, x: Tensor) -> Tensor:
        mean, var = (self.get_or_make(f"{name}.{part}", x.shape[1]) for part in ("running_mean", "running_var"))
        weight, bias = (self.get_or_make(f"{name}.{part}", x.shape[1]) for part in ("weight", "bias"))
        self[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, var, weight, bias)


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=list(like.shape[2:]), mode="bilinear", align_corners=False)


class PIDNetReference:
    """The release's forward in evaluation mode, with its ReLUs in place as they stand there."""

    def __init__(self, planes: int, m: int, n: int, *, ppm: int, head: int, classes: int) -> None:
        self.t = Tensors()
        self.planes, self.m, self.n, self.ppm, self.head, self.classes = planes, m, n, ppm, head, classes

    def basic(self, name: str, x: Tensor, out: int, stride: int = 1, *, last: bool = False) -> Tensor:
        y = self.t.bn(f"{name}.bn1", self.t.conv(f"{name}.conv1", x, out, 3, stride)).relu_()
        y = self.t.bn(f"{name}.bn2", self.t.conv(f"{name}.conv2", y, out, 3))
        y = y + self.shortcut(name, x, out, stride)
        return y if last else y.relu_()

    def bottleneck(self, name: str, x: Tensor, planes: int, stride: int = 1) -> Tensor:
        y = self.t.bn(f"{name}.bn1", self.t.conv(f"{name}.conv1", x, planes)).relu_()
        y = self.t.bn(f"{name}.bn2", self.t.conv(f"{name}.conv2", y, planes, 3, stride)).relu_()
        y = self.t.bn(f"{name}.bn3", self.t.conv(f"{name}.conv3", y, planes * 2))
        return y + self.shortcut(name, x, planes * 2, stride)

    def shortcut(self, name: str, x: Tensor, out: int, stride: int) -> Tensor:
        if stride == 1 and x.shape[1] == out:
            return x
        return self.conv_bn(f"{name}.downsample", x, out, 1, stride)

    def conv_bn(self, name: str, x: Tensor, out: int, size: int = 1, stride: int = 1) -> Tensor:
        return self.t.bn(f"{name}.1", self.t.conv(f"{name}.0", x, out, size, stride))

    def stage(self, name: str, x: Tensor, out: int, blocks: int, stride: int = 1) -> Tensor:
        for i in range(blocks):
            x = self.basic(f"{name}.{i}", x, out, stride if i == 0 else 1, last=i == blocks - 1 and i > 0)
        return x

    def pag(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        query = up(self.conv_bn(f"{name}.f_y", y, self.planes), x)
        key = self.conv_bn(f"{name}.f_x", x, self.planes)
        sigma = torch.sigmoid((key * query).sum(1)).unsqueeze(1)
        return (1 - sigma) * x + sigma * up(y, x)

    def norm_conv(self, name: str, x: Tensor, out: int, *, first: int = 0, size: int = 1, groups: int = 1) -> Tensor:
        x = self.t.bn(f"{name}.{first}", x).relu_()
        return self.t.conv(f"{name}.{first + 2}", x, out, size, groups=groups)

    def seghead(self, name: str, x: Tensor, inner: int, out: int) -> Tensor:
        x = self.t.conv(f"{name}.conv1", self.t.bn(f"{name}.bn1", x).relu_(), inner, 3)
        return self.t.conv(f"{name}.conv2", self.t.bn(f"{name}.bn2", x).relu_(), out, bias=True)

    def pyramid(self, x: Tensor) -> Tensor:
        pooled = [F.avg_pool2d(x, 5, 2, 2), F.avg_pool2d(x, 9, 4, 4), F.avg_pool2d(x, 17, 8, 8)]
        pooled.append(x.mean((2, 3), keepdim=True))
        own = self.norm_conv("spp.scale0", x, self.ppm)
        scales = [up(self.norm_conv(f"spp.scale{i + 1}", p, self.ppm, first=1), x) for i, p in enumerate(pooled)]
        if self.m == 2:
            joined = torch.cat([scale + own for scale in scales], 1)
            found = [own, self.norm_conv("spp.scale_process", joined, self.ppm * 4, size=3, groups=4)]
        else:
            found = [own]
            for i, scale in enumerate(scales):
                found.append(self.norm_conv(f"spp.process{i + 1}", scale + found[-1], self.ppm, size=3))
        out = self.planes * 4
        return self.norm_conv("spp.compression", torch.cat(found, 1), out) + self.norm_conv("spp.shortcut", x, out)

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, m, n, t = self.planes, self.m, self.n, self.t
        x = t.bn("conv1.1", t.conv("conv1.0", image, w, 3, 2, bias=True)).relu_()
        x = t.bn("conv1.4", t.conv("conv1.3", x, w, 3, 2, bias=True)).relu_()
        x = self.stage("layer1", x, w, m)
        x = self.stage("layer2", x.relu_(), w * 2, m, 2).relu_()
        x_ = self.stage("layer3_", x, w * 2, m)
        x_d = self.basic("layer3_d", x, w if m == 2 else w * 2, last=True)
        size = x_d

        x = self.stage("layer3", x, w * 4, n, 2).relu_()
        x_ = self.pag("pag3", x_, self.conv_bn("compression3", x, w * 2))
        x_d = x_d + up(self.conv_bn("diff3", x, w if m == 2 else w * 2, 3), size)
        temp_p = x_  # the same storage: the ReLU in place below changes it too

        x = self.stage("layer4", x, w * 8, n, 2).relu_()
        x_ = self.stage("layer4_", x_.relu_(), w * 2, m)
        x_d.relu_()
        x_d = self.bottleneck("layer4_d.0", x_d, w) if m == 2 else self.basic("layer4_d", x_d, w * 2, last=True)
        x_ = self.pag("pag4", x_, self.conv_bn("compression4", x, w * 2))
        x_d = x_d + up(self.conv_bn("diff4", x, w * 2, 3), size)
        temp_d = x_d

        x_ = self.bottleneck("layer5_.0", x_.relu_(), w * 2)
        x_d = self.bottleneck("layer5_d.0", x_d.relu_(), w * 2)
        x = self.bottleneck("layer5.0", x, w * 8, 2)
        x = up(self.pyramid(self.bottleneck("layer5.1", x, w * 8)), size)

        edge = torch.sigmoid(x_d)
        if m == 2:
            fused = self.conv_bn("dfm.conv_p", (1 - edge) * x + x_, w * 4)
            fused = fused + self.conv_bn("dfm.conv_i", x + edge * x_, w * 4)
        else:
            fused = self.norm_conv("dfm.conv", edge * x_ + (1 - edge) * x, w * 4, size=3)
        main = self.seghead("final_layer", fused, self.head, self.classes)
        extra_p = self.seghead("seghead_p", temp_p, self.head, self.classes)
        return main, extra_p, self.seghead("seghead_d", temp_d, w, 1)


def resnet_reference(t: Tensors, image: Tensor, blocks: tuple[int, ...], *, caffe: bool) -> Tensor:
    """Stages of a dilated ResNet in evaluation mode; ``caffe``: stage 2 halves in its 1×1 convolution."""
    x = t.bn("bn1", t.conv("conv1", image, 64, 7, 2)).relu_()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for stage, (count, planes) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        dilation = {1: 1, 2: 1, 3: 2, 4: 4}[stage]
        for i in range(count):
            name, stride = f"layer{stage}.{i}", 2 if stage == 2 and i == 0 else 1
            first, second = (stride, 1) if caffe else (1, stride)
            y = t.bn(f"{name}.bn1", t.conv(f"{name}.conv1", x, planes, 1, first)).relu_()
            y = t.bn(f"{name}.bn2", t.conv(f"{name}.conv2", y, planes, 3, second, dilation=dilation)).relu_()
            y = t.bn(f"{name}.bn3", t.conv(f"{name}.conv3", y, planes * 4))
            if i == 0:
                x = t.bn(f"{name}.downsample.1", t.conv(f"{name}.downsample.0", x, planes * 4, 1, stride))
            x = (x + y).relu_()
    return x


def classifiers_reference(t: Tensors, x: Tensor, prefix: str, classes: int) -> Tensor:
    """The sum of four dilated classifiers."""
    scores = [
        t.conv(f"{prefix}.conv2d_list.{i}", x, classes, 3, dilation=dilation, bias=True)
        for i, dilation in enumerate((6, 12, 18, 24))
    ]
    return torch.stack(scores).sum(0)


def mobilenet_v2_reference(t: Tensors, image: Tensor) -> Tensor:
    """The blocks of MobileNetV2 in evaluation mode, its last halving replaced by dilation."""
    x = F.hardtanh(t.bn("features.0.1", t.conv("features.0.0", image, 32, 3, 2)), 0, 6)
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    index, halved, dilation = 0, 2, 1
    for expand, planes, count, halving in rows:
        for i in range(count):
            index += 1
            name, stride, part, wide = f"features.{index}.conv", halving if i == 0 else 1, 0, x.shape[1] * expand
            now = dilation
            if stride == 2 and halved == 16:
                stride, dilation = 1, 2
            halved *= stride
            y = x
            if expand > 1:
                y = F.hardtanh(t.bn(f"{name}.0.1", t.conv(f"{name}.0.0", y, wide)), 0, 6)
                part = 1
            y = t.conv(f"{name}.{part}.0", y, wide, 3, stride, dilation=now, groups=wide)
            y = F.hardtanh(t.bn(f"{name}.{part}.1", y), 0, 6)
            y = t.bn(f"{name}.{part + 2}", t.conv(f"{name}.{part + 1}", y, planes))
            x = x + y if stride == 1 and x.shape[1] == planes else y
    return x
