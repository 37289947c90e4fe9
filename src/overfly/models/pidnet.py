"""PIDNet: branches for detail, context and boundaries (Xu et al., CVPR 2023), with the names of its release."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.records import Logits
from overfly.models.network import Network, register, resize


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias; sides are divided by the stride and rounded up."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _conv_bn(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, size, stride), nn.BatchNorm2d(outputs))


def _bn_relu_conv(inputs: int, outputs: int, size: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return [nn.BatchNorm2d(inputs), nn.ReLU(), conv]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut, without the last ReLU where ``last_relu`` is False."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1, last_relu: bool = True) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None if stride == 1 and inputs == planes else _conv_bn(inputs, planes, 1, stride)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, planes, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out) if self.last_relu else out


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions to twice the planes, with a shortcut."""

    expansion = 2

    def __init__(self, inputs: int, planes: int, stride: int = 1, last_relu: bool = False) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = _conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None if stride == 1 and inputs == outputs else _conv_bn(inputs, outputs, 1, stride)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 2 planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out) if self.last_relu else out


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, blocks: int, stride: int = 1
) -> nn.Sequential:
    """Several blocks; the last one, or the only `Bottleneck`, has no final ReLU."""
    first = block(inputs, planes, stride, last_relu=block is BasicBlock)
    rest = [block(planes * block.expansion, planes, last_relu=i < blocks - 1) for i in range(1, blocks)]
    return nn.Sequential(first, *rest)


class Head(nn.Module):
    """Scores of each pixel: BatchNorm, ReLU, 3×3 convolution, BatchNorm, ReLU, 1×1 convolution."""

    def __init__(self, inputs: int, planes: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to scores (B, outputs, h, w)."""
        scores: Tensor = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return scores


class Pag(nn.Module):
    """Pixel-attention-guided fusion of the P and I branches (section 3.1)."""

    def __init__(self, planes: int, inner: int) -> None:
        super().__init__()
        self.f_x = _conv_bn(planes, inner)
        self.f_y = _conv_bn(planes, inner)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        """Fuse detail (B, C, h, w) with coarser context (B, C, h', w') to (B, C, h, w)."""
        similarity = (self.f_x(detail) * resize(self.f_y(context), detail)).sum(1, keepdim=True).sigmoid()
        fused: Tensor = (1 - similarity) * detail + similarity * resize(context, detail)
        return fused


class Pyramid(nn.Module):
    """Base of the two pyramid pooling modules: context from five scales, added to a shortcut (section 3.2)."""

    def __init__(self, inputs: int, planes: int, outputs: int) -> None:
        super().__init__()
        self.scale0 = nn.Sequential(*_bn_relu_conv(inputs, planes))
        pools = [*(nn.AvgPool2d(2 * step + 1, step, step) for step in (2, 4, 8)), nn.AdaptiveAvgPool2d(1)]
        for i, pool in enumerate(pools, start=1):
            self.add_module(f"scale{i}", nn.Sequential(pool, *_bn_relu_conv(inputs, planes)))
        self.compression = nn.Sequential(*_bn_relu_conv(planes * 5, outputs))
        self.shortcut = nn.Sequential(*_bn_relu_conv(inputs, outputs))

    def pools(self, x: Tensor) -> list[Tensor]:
        """The four pooled scales, each (B, planes, h, w), at the size of x."""
        return [resize(self.get_submodule(f"scale{i}")(x), x) for i in range(1, 5)]


class DAPPM(Pyramid):
    """Deep aggregation pyramid: each scale is refined with the previous one (PIDNet-L)."""

    def __init__(self, inputs: int, planes: int, outputs: int) -> None:
        super().__init__(inputs, planes, outputs)
        for i in range(1, 5):
            self.add_module(f"process{i}", nn.Sequential(*_bn_relu_conv(planes, planes, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to context (B, outputs, h, w)."""
        scales = [self.scale0(x)]
        for i, pooled in enumerate(self.pools(x), start=1):
            scales.append(self.get_submodule(f"process{i}")(pooled + scales[-1]))
        context: Tensor = self.compression(torch.cat(scales, 1)) + self.shortcut(x)
        return context


class PAPPM(Pyramid):
    """Parallel aggregation pyramid: all scales refined by one grouped convolution (PIDNet-S and -M)."""

    def __init__(self, inputs: int, planes: int, outputs: int) -> None:
        super().__init__(inputs, planes, outputs)
        self.scale_process = nn.Sequential(*_bn_relu_conv(planes * 4, planes * 4, 3, groups=4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to context (B, outputs, h, w)."""
        own = self.scale0(x)
        scales = self.scale_process(torch.cat([pooled + own for pooled in self.pools(x)], 1))
        context: Tensor = self.compression(torch.cat([own, scales], 1)) + self.shortcut(x)
        return context


class LightBag(nn.Module):
    """Boundary-attention-guided fusion with 1×1 convolutions (PIDNet-S and -M, section 3.3)."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv_p = _conv_bn(planes, planes)
        self.conv_i = _conv_bn(planes, planes)

    def forward(self, p: Tensor, i: Tensor, d: Tensor) -> Tensor:
        """Fuse the three branches, each (B, C, h, w): detail at boundaries, context elsewhere."""
        edge = d.sigmoid()
        fused: Tensor = self.conv_p((1 - edge) * i + p) + self.conv_i(i + edge * p)
        return fused


class Bag(nn.Module):
    """Boundary-attention-guided fusion with one 3×3 convolution (PIDNet-L, section 3.3)."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*_bn_relu_conv(planes, planes, 3))

    def forward(self, p: Tensor, i: Tensor, d: Tensor) -> Tensor:
        """Fuse the three branches, each (B, C, h, w): detail at boundaries, context elsewhere."""
        edge = d.sigmoid()
        fused: Tensor = self.conv(edge * p + (1 - edge) * i)
        return fused


class PIDNet(Network):
    """PIDNet of any size.

    Args:
        classes: number of classes K.
        training_heads: add ``seghead_p`` (auxiliary class scores) and ``seghead_d`` (boundary).
        bands: number of bands C of the images.
        planes: width of the first stage; the others are multiples of it.
        depth: blocks of the shallow and of the deep stages.
        pyramid: planes of each scale of the context pyramid.
        head: planes of the class heads.
        large: the fusion, pyramid and boundary branch of PIDNet-L in place of the light ones.
    """

    stride = 8
    # not in the authors' ImageNet files, which hold the I and P branches with their fusions
    heads = (
        "layer3_d", "layer4_d", "layer5_d", "diff3", "diff4", "spp", "dfm", "seghead_p", "seghead_d", "final_layer",
    )  # fmt: skip
    training_heads = ("seghead_p", "seghead_d")
    first_conv = "conv1.0"
    class_layer = "final_layer"

    def __init__(
        self,
        classes: int, training_heads: bool, bands: int, *,
        planes: int, depth: tuple[int, int] = (2, 3), pyramid: int = 96, head: int = 128, large: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        shallow, deep = depth
        stem: list[nn.Module] = []
        for inputs in (bands, planes):
            stem += [nn.Conv2d(inputs, planes, 3, 2, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
        self.conv1 = nn.Sequential(*stem)
        # I: context, down to a 64th
        self.layer1 = _stage(BasicBlock, planes, planes, shallow)
        self.layer2 = _stage(BasicBlock, planes, planes * 2, shallow, 2)
        self.layer3 = _stage(BasicBlock, planes * 2, planes * 4, deep, 2)
        self.layer4 = _stage(BasicBlock, planes * 4, planes * 8, deep, 2)
        self.layer5 = _stage(Bottleneck, planes * 8, planes * 8, 2, 2)
        # P: detail, at an 8th
        self.compression3 = _conv_bn(planes * 4, planes * 2)
        self.compression4 = _conv_bn(planes * 8, planes * 2)
        self.pag3 = Pag(planes * 2, planes)
        self.pag4 = Pag(planes * 2, planes)
        self.layer3_ = _stage(BasicBlock, planes * 2, planes * 2, shallow)
        self.layer4_ = _stage(BasicBlock, planes * 2, planes * 2, shallow)
        self.layer5_ = _stage(Bottleneck, planes * 2, planes * 2, 1)
        # D: boundaries, at an 8th
        edge = planes * 2 if large else planes
        self.layer3_d = BasicBlock(planes * 2, edge, last_relu=False)
        self.layer4_d = BasicBlock(edge, edge, last_relu=False) if large else _stage(Bottleneck, edge, edge, 1)
        self.diff3 = _conv_bn(planes * 4, edge, 3)
        self.diff4 = _conv_bn(planes * 8, planes * 2, 3)
        self.layer5_d = _stage(Bottleneck, planes * 2, planes * 2, 1)

        self.spp = (DAPPM if large else PAPPM)(planes * 16, pyramid, planes * 4)
        self.dfm = Bag(planes * 4) if large else LightBag(planes * 4)
        self.seghead_p = Head(planes * 2, head, classes) if training_heads else None
        self.seghead_d = Head(planes * 2, planes, 1) if training_heads else None
        self.final_layer = Head(planes * 4, head, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Logits:
        """Scores at an 8th of the size, from normalized images (B, C, H, W).

        As in the release, whose ReLUs are in place, the training heads read the P and D maps after the ReLU.

        Returns:
            main (B, K, ⌈H/8⌉, ⌈W/8⌉); with training heads aux (the P head, as large) and boundary (the D head,
            (B, 1, ⌈H/8⌉, ⌈W/8⌉)); features: the fused map (B, 4 planes, ⌈H/8⌉, ⌈W/8⌉) that the class head reads.
        """
        i = F.relu(self.layer2(F.relu(self.layer1(self.conv1(image)))))
        p, d = self.layer3_(i), self.layer3_d(i)

        i = F.relu(self.layer3(i))
        p = F.relu(self.pag3(p, self.compression3(i)))
        d = F.relu(d + resize(self.diff3(i), d))
        aux = () if self.seghead_p is None else (self.seghead_p(p),)

        i = F.relu(self.layer4(i))
        p, d = self.layer4_(p), self.layer4_d(d)
        p = F.relu(self.pag4(p, self.compression4(i)))
        d = F.relu(d + resize(self.diff4(i), d))
        boundary = None if self.seghead_d is None else self.seghead_d(d)

        p, d = self.layer5_(p), self.layer5_d(d)
        i = resize(self.spp(self.layer5(i)), d)
        fused = self.dfm(p, i, d)
        return Logits(self.final_layer(fused), aux, boundary, fused)


@register
def pidnet_s(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """PIDNet-S: 7.6 million parameters and 5.9 GMAC for a 3×512×512 image of 7 classes without training heads."""
    return PIDNet(classes, training_heads, bands, planes=32)


@register
def pidnet_m(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """PIDNet-M: 28.5 million parameters and 22.2 GMAC for a 3×512×512 image of 7 classes without training heads."""
    return PIDNet(classes, training_heads, bands, planes=64)


@register
def pidnet_l(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """PIDNet-L: 36.9 million parameters and 34.4 GMAC for a 3×512×512 image of 7 classes without training heads."""
    return PIDNet(classes, training_heads, bands, planes=64, depth=(3, 4), pyramid=112, head=256, large=True)
