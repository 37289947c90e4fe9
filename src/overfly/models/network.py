"""What every network is: a module that says its stride, its new layers, and which heads only training needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from overfly.core.records import Logits


class Network(nn.Module):
    """A segmentation network: normalized images (B, C, H, W) in, `Logits` at its own stride out.

    Attributes:
        stride: `Logits.main` is this many times smaller than the image; sides of the image should be multiples of it.
        heads: prefixes of the parameters that ImageNet weights never hold (decoder, class layers), for a multiplier
            of the learning rate.
        training_heads: names of the submodules that only training reads; None where they have been left out.
        first: name of the convolution that reads the image's bands.
        class_layer: name of the submodule that reads one map and gives `Logits.main`; methods with two class layers
            make a second of its kind. Empty: there is no such submodule, and those methods are not to be had.
    """

    stride: int = 1
    heads: tuple[str, ...] = ()
    training_heads: tuple[str, ...] = ()
    first: str = ""
    class_layer: str = ""

    def forward(self, image: Tensor) -> Logits:
        """Class scores and, with training heads, auxiliary and boundary scores of normalized images (B, C, H, W)."""
        raise NotImplementedError

    if TYPE_CHECKING:  # torch types a module's call as Any

        def __call__(self, image: Tensor) -> Logits:
            """See `forward`."""

    @property
    def has_training_heads(self) -> bool:
        """Whether this network carries heads that only training reads."""
        return any(getattr(self, name, None) is not None for name in self.training_heads)

    def drop_training_heads(self) -> None:
        """Take away, in place, the heads that only training reads; `Logits.main` stays as it was."""
        for name in self.training_heads:
            setattr(self, name, None)

    def is_head(self, parameter: str) -> bool:
        """Whether a parameter, named as by `named_parameters`, is one that ImageNet weights never hold."""
        return any(parameter.startswith(f"{prefix}.") for prefix in self.heads)

    def adopt(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Rename the tensors of public checkpoints of this architecture to the names used here.

        Args:
            state: tensors of a checkpoint by name, prefixes such as ``module.`` already gone.

        Returns:
            The tensors under this network's names, and sentences on what a person should know about them.
        """
        return state, ()
