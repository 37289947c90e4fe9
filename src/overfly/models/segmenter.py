"""Segmenter: a network with its normalization and its class names. What is trained, saved, scored and exported."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from overfly.core.atomic_files import atomic_write
from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError, RecipeError, WeightsError
from overfly.core.records import Logits
from overfly.models.checkpoints import check_values, first_line
from overfly.models.network import Network, build

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue over ImageNet, as a share of the peak."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue over ImageNet, as a share of the peak."""

FORMAT = "overfly.segmenter/1"
"""What the metadata of a saved file calls itself."""


class Segmenter(nn.Module):
    """Images (B, C, H, W) in the sensor's own range in, `Logits` at the size of the image out.

    Args:
        network: what maps normalized images to `Logits` at its own stride.
        classes: names and colors of the K classes that the network tells apart.
        architecture: the network's name in the registry.
        mean: mean of each band, in the sensor's own range.
        std: standard deviation of each band, in the sensor's own range.
        max_value: value of the brightest pixel that the sensor can give.

    Attributes:
        network: the network itself.
        classes: the classes.
        architecture: the network's name in the registry.
        bands: number of bands C.
        max_value: value of the brightest pixel that the sensor can give.
        mean: buffer (1, C, 1, 1).
        std: buffer (1, C, 1, 1).

    Raises:
        RecipeError: mean and std are not one positive number a band.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Network,
        classes: Classes,
        *,
        architecture: str,
        mean: Sequence[float],
        std: Sequence[float],
        max_value: float = 255.0,
    ) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise RecipeError(
                f"the normalization needs one mean and one standard deviation above 0 for each band, not mean "
                f"{list(mean)} and std {list(std)}; estimate them with: overfly data stats"
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
        """Sides of images that are multiples of this are not padded."""
        stride: int = self.network.stride
        return stride

    @property
    def heads(self) -> tuple[str, ...]:
        """Prefixes of this module's parameters that ImageNet weights never hold."""
        return tuple(f"network.{prefix}" for prefix in self.network.heads)

    def forward(self, image: Tensor) -> Logits:
        """Scores at the image's size.

        Args:
            image: (B, C, H, W), any number type, in the sensor's own range. Sides that are no multiple of the stride
                are padded on the right and below by repeating the last pixels, and the scores are cut back.

        Returns:
            main, aux and boundary upsampled to H × W (bilinear, corners not aligned); features as the network gives
            them.

        Raises:
            DataError: the images do not have the bands that the network reads.
        """
        if image.ndim != 4 or image.shape[1] != self.bands:
            raise DataError(
                f"{self.architecture} reads images (B, {self.bands}, H, W), not {tuple(image.shape)}; give it "
                f"{self.bands} bands, or build a network with another number of bands"
            )
        height, width = image.shape[-2:]
        normalized = (image.to(self.mean.dtype) - self.mean) / self.std
        below, right = -height % self.stride, -width % self.stride
        if below or right:
            normalized = F.pad(normalized, (0, right, 0, below), mode="replicate")
        out = self.network(normalized)
        return Logits(
            main=self.upsample(out.main, height, width),
            aux=tuple(self.upsample(scores, height, width) for scores in out.aux),
            boundary=None if out.boundary is None else self.upsample(out.boundary, height, width),
            features=out.features,
        )

    def upsample(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Scores (B, K, h, w) of one of the network's heads at the size of the image, H × W."""
        size = (height + -height % self.stride, width + -width % self.stride)
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[..., :height, :width]

    if TYPE_CHECKING:  # torch types a module's call as Any

        def __call__(self, image: Tensor) -> Logits:
            """See `forward`."""

    def scores(self, image: Tensor) -> Tensor:
        """Class scores before any softmax, (B, K, H, W), of images (B, C, H, W) in the sensor's own range."""
        main: Tensor = self(image).main
        return main

    def without_training_heads(self) -> Self:
        """A copy without the heads that only training reads; its class scores are the same."""
        lighter = copy.deepcopy(self)
        lighter.network.drop_training_heads()
        return lighter

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file that holds the weights and all that is needed to use them.

        The file appears whole or not at all: it is written under another name in the same folder and then renamed.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "architecture": self.architecture,
            "classes": self.classes.model_dump(mode="json"),
            "bands": self.bands,
            "max_value": self.max_value,
            "training_heads": self.network.has_training_heads,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(path) as unfinished:
            save_file(tensors, unfinished, metadata={key: json.dumps(value) for key, value in about.items()})
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        return path

    @classmethod
    def load(cls, path: Path | str, training_heads: bool | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: a file that `save` wrote.
            training_heads: None keeps the training heads that the file holds. False leaves them out. True builds them
                in any case; where the file has none they start from random weights.

        Raises:
            WeightsError: the file is missing, damaged, not one of ours, holds values that are not finite, or needs a
                network that is not known here.
        """
        about, tensors = read_segmenter_file(Path(path))
        check_values(Path(path), tensors)
        try:
            held = bool(about["training_heads"])
            wanted = held if training_heads is None else training_heads
            classes = Classes.model_validate(about["classes"])
            network = build(about["architecture"], len(classes), wanted, about["bands"])
            made = cls(
                network,
                classes,
                architecture=about["architecture"],
                mean=tensors["mean"].flatten().tolist(),
                std=tensors["std"].flatten().tolist(),
                max_value=about["max_value"],
            )
        except (OverflyError, ValueError, TypeError, KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise WeightsError(
                f"{path} describes a network that cannot be built here ({why}); install the plug-in or the version "
                "of overfly that wrote it"
            ) from error
        own = made.state_dict()
        heads = tuple(f"network.{name}." for name in network.training_heads)
        missing = [name for name in own if name not in tensors and not (wanted and not held and name.startswith(heads))]
        extra = [name for name in tensors if name not in own and not (held and not wanted and name.startswith(heads))]
        shaped = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
        if missing or extra or shaped:
            name = (missing + extra + shaped)[0]
            raise WeightsError(
                f"{path} does not fit {made.architecture} as this version builds it ({len(missing)} tensors missing, "
                f"{len(extra)} not known, {len(shaped)} of another shape; first: {name}); load it with the version of "
                "overfly that wrote it"
            )
        made.load_state_dict(tensors, strict=False)
        return made


def read_segmenter_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file that `Segmenter.save` wrote.

    Raises:
        WeightsError: the file is missing, damaged or not one of ours.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file of weights at {path}; give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises many kinds for a file that is not what it says
        raise WeightsError(_no_segmenter_file(path, error)) from error
    try:
        about = {key: json.loads(value) for key, value in metadata.items()}
    except ValueError:
        about = {}
    if about.get("format") != FORMAT:
        raise WeightsError(
            f"{path} holds bare weights and says nothing of their network, classes and normalization; name the file as "
            "model.weights in a recipe, or build the network by name and read the file with overfly.load_weights"
        )
    return about, tensors


def _no_segmenter_file(path: Path, error: Exception) -> str:
    """What a file is that safetensors cannot read, by its name, and where it belongs."""
    suffix = path.suffix.lower()
    if suffix in {".pth", ".pt", ".tar", ".ckpt", ".bin", ".pkl"}:
        return (
            f"{path} is no network file of overfly, which is one .safetensors file with the network's description; "
            f"bare weights such as a {suffix} belong under model.weights in a recipe"
        )
    if suffix in {".yaml", ".yml"}:
        return (
            f"{path} is no network file of overfly but, by its name, a recipe; give the .safetensors file that a run "
            "of it wrote (a .pth of bare weights goes under model.weights)"
        )
    if suffix != ".safetensors":
        return (
            f"{path} is no network file of overfly ({first_line(error)}); give a .safetensors file that a run wrote (a "
            ".pth of bare weights goes under model.weights)"
        )
    return f"{path} is damaged or no safetensors file ({first_line(error)}); copy or train it again"
