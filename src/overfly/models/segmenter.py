"""Segmenter: a network with normalization and class names, for training, scoring and export."""

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor, nn

from overfly.core.atomic_files import atomic_write
from overfly.core.classes import Classes
from overfly.core.download import disk_errors
from overfly.core.errors import DataError, OverflyError, RecipeError, WeightsError
from overfly.core.records import Logits
from overfly.models.checkpoints import FORMAT, KEY, check_values, read_safetensors, tensors_sha256
from overfly.models.network import Network, build

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue over ImageNet, as a share of the maximum value."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue over ImageNet, as a share of the maximum value."""


class Segmenter(nn.Module):
    """A network with normalization: maps images (B, C, H, W) in the sensor's range to `Logits` at the image's size.

    The arguments are attributes too, mean and std of each band, in the sensor's range, as buffers (1, C, 1, 1);
    ``bands`` is the number of bands C. ``network`` maps normalized images to `Logits` at its own stride;
    ``architecture`` is its name in the registry; ``max_value`` is the largest value of the sensor's range. Raises
    `RecipeError`: mean and std are not one positive number per band.
    """

    mean: Tensor
    std: Tensor
    __call__: Callable[..., Logits]

    def __init__(
        self, network: Network, classes: Classes, *, architecture: str, mean: Sequence[float], std: Sequence[float],
        max_value: float = 255.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise RecipeError(
                f"mean and std need one value per band, std above 0, got {list(mean)} and {list(std)}; estimate them "
                "with: overfly data stats"
            )
        self.network = network
        self.classes = classes
        self.architecture = architecture
        self.bands = len(mean)
        self.max_value = float(max_value)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def stride(self) -> int:
        """Stride of the network; image sides are padded to multiples of it."""
        return self.network.stride

    @property
    def heads(self) -> tuple[str, ...]:
        """Prefixes of this module's parameters that ImageNet weights do not contain."""
        return tuple(f"network.{prefix}" for prefix in self.network.heads)

    def forward(self, image: Tensor) -> Logits:
        """Scores at the image's size, H × W, of images (B, C, H, W) of any number type in the sensor's range.

        Sides that are not a multiple of the stride are padded on the right and below by repeating the last pixels, and
        the scores are cropped. main, aux and boundary are upsampled (bilinear, corners not aligned); features are as
        the network returns them. Raises `DataError` if the images do not have the bands that the network reads.
        """
        if image.ndim != 4 or image.shape[1] != self.bands:
            raise DataError(
                f"{self.architecture} reads images (B, {self.bands}, H, W), got {tuple(image.shape)}; give it "
                f"{self.bands} bands, or build a network with another number of bands"
            )
        height, width = image.shape[-2:]
        normalized = (image.to(self.mean.dtype) - self.mean) / self.std
        below, right = -height % self.stride, -width % self.stride
        if below or right:
            normalized = F.pad(normalized, (0, right, 0, below), mode="replicate")
        output = self.network(normalized)
        main, boundary = self.upsample(output.main, height, width), output.boundary
        aux = tuple(self.upsample(scores, height, width) for scores in output.aux)
        boundary = None if boundary is None else self.upsample(boundary, height, width)
        return Logits(main, aux, boundary, output.features)

    def upsample(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Scores (B, K, h, w) of one of the network's heads at the size of the image, H × W."""
        size = (height + -height % self.stride, width + -width % self.stride)
        kind = scores.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            scores = scores.float().contiguous()  # losses need float32, and a small map is cheaper to convert
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[..., :height, :width]

    def scores(self, image: Tensor) -> Tensor:
        """Class scores before the softmax (B, K, H, W) of images (B, C, H, W) in the sensor's range."""
        return self(image).main

    def without_training_heads(self) -> Self:
        """Copy the segmenter without training heads; class scores are unchanged."""
        copied = copy.deepcopy(self)
        copied.network.drop_training_heads()
        return copied

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file with the weights and everything needed to use them, atomically.

        Equal segmenters give equal bytes. Returns the path; raises `WeightsError` if it cannot be written.
        """
        path = Path(path)
        with disk_errors(path, WeightsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        description: dict[str, Any] = {
            "format": FORMAT, "architecture": self.architecture, "classes": self.classes.model_dump(mode="json"),
            "bands": self.bands, "max_value": self.max_value, "training_heads": self.network.has_training_heads,
            "count_include_pad": self.network.count_include_pad,
            **({"config": self.network.config} if self.network.config else {}),
        }  # fmt: skip
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        description["sha256"] = tensors_sha256(description, tensors)
        # one key: safetensors writes several in a random order
        data = serialize(tensors, metadata={KEY: json.dumps(description, sort_keys=True)})
        with disk_errors(path, WeightsError), atomic_write(path) as unfinished, unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return path

    @classmethod
    def load(cls, path: Path | str, training_heads: bool | None = None) -> Self:
        """Read a file that `save` wrote.

        ``training_heads`` None keeps the training heads of the file; False removes them; True builds them in any case,
        with random weights where the file has none. Raises `WeightsError`: the file is missing, damaged, not written by
        `save`, has values that are not finite, or needs an unknown network.
        """
        description, tensors = read_segmenter_file(Path(path))
        check_values(Path(path), tensors)
        try:
            saved_heads = bool(description["training_heads"])
            with_heads = saved_heads if training_heads is None else training_heads
            classes = Classes.model_validate(description["classes"])
            parts = (description["architecture"], len(classes), with_heads, description["bands"])
            network = build(*parts, config=description.get("config"))
            if not description.get("count_include_pad", True):
                network.set_count_include_pad(False)
            segmenter = cls(
                network, classes, architecture=description["architecture"], mean=tensors["mean"].flatten().tolist(),
                std=tensors["std"].flatten().tolist(), max_value=description["max_value"],
            )  # fmt: skip
        except (OverflyError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise WeightsError(
                f"{path} describes a network that cannot be built here ({reason}); install the plug-in or the version "
                "of overfly that wrote it"
            ) from error
        own = segmenter.state_dict()
        heads = tuple(f"network.{name}." for name in network.training_heads)
        new, dropped = (heads if on else () for on in (with_heads and not saved_heads, saved_heads and not with_heads))
        missing = [name for name in own if name not in tensors and not name.startswith(new)]
        extra = [name for name in tensors if name not in own and not name.startswith(dropped)]
        mismatched = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
        if missing or extra or mismatched:
            raise WeightsError(
                f"{path} does not fit {segmenter.architecture} as this version builds it ({len(missing)} tensors "
                f"missing, {len(extra)} unknown, {len(mismatched)} of another shape; first: "
                f"{(missing + extra + mismatched)[0]}); load it with the version of overfly that wrote it"
            )
        segmenter.load_state_dict(tensors, strict=False)
        return segmenter


def read_segmenter_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file of `Segmenter.save`; raise `WeightsError` if it is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give the path of a .safetensors file")
    try:
        description, tensors = read_safetensors(path)
    except WeightsError as error:
        if path.suffix.lower() == ".safetensors":
            raise
        raise WeightsError(
            f"{path} is not a .safetensors file of overfly; give one that a run wrote (set bare weights such as a .pth "
            "as model.weights in a recipe)"
        ) from error
    if description is None or description.get("format") not in (2, FORMAT):
        raise WeightsError(
            f"{path} has no description of format {FORMAT}: it holds bare weights, to be set as model.weights in a "
            "recipe, or was written by another version of overfly, to be trained again"
        )
    return description, tensors
