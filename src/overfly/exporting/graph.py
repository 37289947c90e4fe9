"""The exported graph: from images in the sensor's range to predictions, with normalization in the convolutions."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from overfly.core.choices import ExportOutput
from overfly.models.network import Network
from overfly.models.segmenter import Segmenter

MIN_SIDE = 32
"""Smallest image side of graphs without a fixed size, in pixels."""


class ExportModule(nn.Module):
    """A trained network as it is exported: images (B, C, H, W), float32, in the sensor's own range, to its output.

    The output is probabilities (B, K, H, W), logits (B, K, H, W), or classes: class ids (B, H, W), uint8. The segmenter
    is not changed: the network is a folded copy, which computes in ``dtype``; normalization and output stay in float32.
    ``resize`` is the side of the square that images are resized to before the network, whose scores are resized back to
    the image's own size. ``fixed`` are height and width of all images; None: any size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, segmenter: Segmenter, *, output: ExportOutput = "probabilities", dtype: torch.dtype = torch.float32,
        resize: int | None = None, fixed: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        segmenter = segmenter.without_training_heads().eval().cpu().float().requires_grad_(False)
        network = fold_batch_norm(segmenter.network, segmenter.bands)
        self.output, self.dtype, self.resize, self.fixed = output, dtype, resize, fixed
        self.stride = segmenter.stride
        self.bands, self.classes = segmenter.bands, len(segmenter.classes)
        self.register_buffer("mean", segmenter.mean.clone())
        self.register_buffer("std", segmenter.std.clone())
        # only the division is folded: the convolution pads with 0, which must stay the mean
        self.divides = dtype != torch.float32 or not fold_division(network, segmenter.std)
        self.network = network.to(dtype)
        self.head = OutputHead(output)

    def forward(self, image: Tensor) -> Tensor:
        """Return the output at the image's size."""
        height, width = image.shape[-2:]
        x = image
        if self.resize is not None:
            smooth = not torch.onnx.is_in_onnx_export()  # not supported by the exporter; `formats` adds it
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", align_corners=False, antialias=smooth)
        x = x - self.mean
        if self.divides:
            x = x / self.std
        rows, columns = x.shape[-2:]
        x, padded_size, padded = self._padded(x, rows, columns)
        scores = self.network(x.to(self.dtype)).main.float()
        crop = (rows, columns) if padded else None
        result: Tensor = self.head(scores, padded_size, crop, None if self.resize is None else (height, width))
        return result

    def _padded(self, x: Tensor, rows: int, columns: int) -> tuple[Tensor, tuple[int, int], bool]:
        """Pad images to multiples of the stride by their last pixels; without a fixed size always, without a branch."""
        known = self.fixed is not None or self.resize is not None
        stride = self.stride
        size = ((rows + stride - 1) // stride * stride, (columns + stride - 1) // stride * stride)
        if known and size == (rows, columns):
            return x, size, False
        return F.pad(x, (0, size[1] - columns, 0, size[0] - rows), mode="replicate"), size, True


class OutputHead(nn.Module):
    """Convert class scores at the network's stride to the output at the image's size."""

    def __init__(self, output: ExportOutput) -> None:
        super().__init__()
        self.output = output

    def forward(
        self, scores: Tensor, size: tuple[int, int], crop: tuple[int, int] | None, image: tuple[int, int] | None
    ) -> Tensor:
        """Return the output at the image's size.

        The scores (B, K, h, w) are interpolated to ``size``, cropped to ``crop`` if the image was padded, and resized
        to ``image`` if it was resized.
        """
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        if crop is not None:
            scores = scores[..., : crop[0], : crop[1]]
        if image is not None:
            scores = F.interpolate(scores, size=image, mode="bilinear", align_corners=False)
        if self.output == "logits":
            return scores
        if self.output == "classes":
            return scores.argmax(1).to(torch.uint8)
        if not torch.onnx.is_in_onnx_export():
            return scores.softmax(1)
        # the definition of softmax is faster than the operator: for dimension 1, ONNX Runtime transposes the maps twice
        odds = (scores - scores.amax(1, keepdim=True)).exp()
        return odds / odds.sum(1, keepdim=True)


def fold_batch_norm(network: Network, bands: int) -> Network:
    """Return a copy whose batch normalizations are folded into the convolutions before them; its output is the same.

    A normalization is folded if its input is the output of a convolution in a forward pass of a small image. If folding
    changes the output, because other modules use the convolution's output too, nothing is folded. Both passes are in
    float64, because a deep network can amplify rounding in float32. ``network`` is in evaluation mode.
    """
    folded = copy.deepcopy(network).double()
    image = torch.randn(1, bands, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[str, nn.Conv2d, nn.BatchNorm2d]] = []
    hooks = []
    for name, part in folded.named_modules():
        if isinstance(part, nn.Conv2d):

            def record(conv: nn.Module, _inputs: object, out: Tensor) -> None:
                if isinstance(conv, nn.Conv2d):
                    outputs[id(out)] = (conv, out)

            hooks.append(part.register_forward_hook(record))
        elif isinstance(part, nn.BatchNorm2d):

            def pair(norm: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in outputs and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                    pairs.append((name, outputs[id(inputs[0])][0], norm))

            hooks.append(part.register_forward_pre_hook(pair))
    with torch.no_grad():
        expected = folded(image).main
        for hook in hooks:
            hook.remove()
        if len({id(conv) for _, conv, _ in pairs}) < len(pairs):
            return copy.deepcopy(network)
        for name, conv, norm in pairs:
            fused = fuse_conv_bn_eval(conv, norm)
            conv.weight, conv.bias = fused.weight, fused.bias
            owner, _, child = name.rpartition(".")
            setattr(folded.get_submodule(owner), child, nn.Identity())
        result = folded(image).main
    close = torch.allclose(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1e-12))
    return folded.float() if close else copy.deepcopy(network)


@torch.no_grad()
def fold_division(network: Network, std: Tensor) -> bool:
    """Fold the division by ``std`` (1, C, 1, 1) into the first convolution, in place; return whether it was folded."""
    try:
        conv = network.get_submodule(network.first_conv) if network.first_conv else None
    except AttributeError:
        conv = None
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    conv.weight.div_(std)
    return True
