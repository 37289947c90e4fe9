"""The base class of all networks, and their registry: one builder function per variant."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.records import Logits
from overfly.core.spec import load_plugins


class Network(nn.Module):
    """Segmentation network: maps normalized images (B, C, H, W) to `Logits` at its own stride.

    Attributes:
        stride: downsampling factor of `Logits.main`; image sides should be multiples of it.
        heads: prefixes of the parameters that ImageNet weights do not contain (decoder and class layers), for a
            learning-rate multiplier.
        training_heads: names of the submodules that only training uses; None where they were removed.
        first_conv: name of the convolution that reads the image.
        class_layer: name of the submodule that maps one feature map to `Logits.main`, which methods with two
            classifiers (MCD, CLAN) need; empty: the network has none.
        imagenet: name of its ImageNet weights in `overfly.models.PRETRAINED`; empty: no address is known.
        config: what `build` needs beside name, classes, training heads and bands, as JSON; None: nothing.
        count_include_pad: True if average pools count the zeros around a map, as in PIDNet's release.
    """

    stride: int = 1
    heads: tuple[str, ...] = ()
    training_heads: tuple[str, ...] = ()
    first_conv: str = ""
    class_layer: str = ""
    imagenet: str = ""
    config: Mapping[str, Any] | None = None
    count_include_pad: bool = True
    __call__: Callable[..., Logits]

    def forward(self, image: Tensor) -> Logits:
        """Class scores and, with training heads, auxiliary and boundary scores of normalized images (B, C, H, W)."""
        raise NotImplementedError

    @property
    def has_training_heads(self) -> bool:
        """True if the network has heads that only training uses."""
        return any(getattr(self, name, None) is not None for name in self.training_heads)

    def drop_training_heads(self) -> None:
        """Remove, in place, the heads that only training uses; `Logits.main` does not change."""
        for name in self.training_heads:
            setattr(self, name, None)

    def set_count_include_pad(self, value: bool) -> None:
        """Let average pools count padding, or not; raise `RecipeError` if the network has no padded ones."""
        pools = [part for part in self.modules() if isinstance(part, nn.AvgPool2d) and part.padding]
        if not pools:
            raise RecipeError("model.count_include_pad needs a network with padded pools, such as pidnet_s; remove it")
        self.count_include_pad = value
        for pool in pools:
            pool.count_include_pad = value

    def convert_checkpoint(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Rename the tensors of public checkpoints of this architecture to this network's names; return notes too.

        The names in ``state`` are without prefixes such as ``module.``.
        """
        return state, ()


Builder = Callable[[int, bool, int], Network]
"""Function of (classes, training_heads, bands) that returns a network with random weights."""
_BUILDERS: dict[str, Builder] = {}
CHECKPOINT_BUILDERS: dict[str, Callable[[str, Mapping[str, Any] | None, int, int], Network]] = {}
"""Functions of (checkpoint, config, classes, bands), by name: networks whose architecture a checkpoint describes."""


def register(builder: Builder) -> Builder:
    """Register a `Builder` under its function's name (decorator); raise `ValueError` if the name is taken."""
    name = str(getattr(builder, "__name__", builder))
    if name in _BUILDERS:
        raise ValueError(f"network {name!r} is registered twice; rename the builder in {builder.__module__}")
    _BUILDERS[name] = builder
    return builder


def names() -> tuple[str, ...]:
    """Names of all registered networks, sorted."""
    return tuple(sorted(_BUILDERS))


def build(
    name: str, classes: int = 7, training_heads: bool = True, bands: int = 3, config: Mapping[str, Any] | None = None
) -> Network:
    """Build a network of `names` or a plug-in, with random weights, for K classes and images of C bands.

    ``transformers:CHECKPOINT`` is the network of a folder or of a name on the Hugging Face hub, or that of ``config``
    (`Network.config`). ``training_heads`` adds the auxiliary and boundary heads that only training uses. Raises
    `RecipeError` if the name is unknown, a number is below 1, or the checkpoint cannot be read.
    """
    kind, _, checkpoint = str(name).partition(":")
    if kind in CHECKPOINT_BUILDERS:
        return CHECKPOINT_BUILDERS[kind](checkpoint, config, classes, bands)
    if name not in _BUILDERS:
        load_plugins()
    if name not in _BUILDERS:
        raise RecipeError(f"unknown network {name!r}; choose one of: {', '.join(names())}")
    if classes < 1 or bands < 1:
        raise RecipeError(f"network {name} needs at least 1 class and 1 band, got {classes} and {bands}")
    return _BUILDERS[name](classes, training_heads, bands)


def resize(image: Tensor, like: Tensor) -> Tensor:
    """Resize (B, C, h, w) to the height and width of another map, bilinearly, corners not aligned."""
    return F.interpolate(image, size=like.shape[-2:], mode="bilinear", align_corners=False)


def builders() -> dict[str, Callable[..., Network]]:
    """All builders by name, sorted; those of `CHECKPOINT_BUILDERS` too."""
    every: dict[str, Callable[..., Network]] = {**_BUILDERS, **CHECKPOINT_BUILDERS}
    return {name: every[name] for name in sorted(every)}
