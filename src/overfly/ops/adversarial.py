"""Critics, which tell the domains apart, and the two terms of the game that a student plays against them.

The game needs no second loop. The student's term scores with the critic's weights `frozen`; the critic's term is given
the student's maps detached. So each term has gradients for one side alone, and the gradients of their sum are those of
the classic update in two phases.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.errors import RecipeError

SMALLEST = 32
"""Side of the smallest maps that a `Critic` can judge, in pixels."""


class Critic(nn.Sequential):
    """Fully convolutional critic: 4×4 convolutions of stride 2, widths 64-128-256-512-1, leaky by 0.2.

    It maps (B, C, H, W) to scores (B, 1, ⌊H/32⌋, ⌊W/32⌋), before any sigmoid; above 0 means source.
    Source: AdaptSegNet (Tsai et al., 2018), section 4.1, after DCGAN.

    Args:
        channels: C of the maps.
        width: channels of the first layer; the next three have 2, 4 and 8 times as many.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        widths = (channels, width, 2 * width, 4 * width, 8 * width, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        """Scores of maps (B, C, H, W).

        Raises:
            RecipeError: the maps are too small for five halvings.
        """
        height, width = maps.shape[-2:]
        if min(height, width) < SMALLEST:
            raise RecipeError(
                f"the critic judges maps of {SMALLEST}×{SMALLEST} pixels or more, and these have {height}×{width}; "
                f"raise crop to {SMALLEST} or more"
            )
        for layer in self:
            maps = layer(maps)
        return maps


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of ``x``, its weights taken as given: gradients reach ``x`` alone, buffers do not move."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    scores: Tensor = torch.func.functional_call(module, weights | _copied_buffers(module), (x,))
    return scores


def given(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of ``x``, taken as given: gradients reach its weights alone, buffers do not move."""
    scores: Tensor = torch.func.functional_call(module, _copied_buffers(module), (x.detach(),))
    return scores


def fool(critic: nn.Module, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The student's term: how far the critic is from taking the target's maps for the source's.

    Args:
        critic: its weights get no gradient.
        target: maps of target images (B, C, H, W).
        weight: what each pixel counts (B, H, W); left out, all count 1.

    Returns:
        Binary cross-entropy, mean over the scores.
    """
    return _cross_entropy(frozen(critic, target), True, weight)


def tell_apart(critic: nn.Module, source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The critic's term: how far it is from telling the source's maps from the target's.

    Args:
        critic: what learns.
        source: maps of source images (B, C, H, W); they get no gradient.
        target: maps of target images (B, C, H, W); they get no gradient.
        weight: what each pixel of the target counts (B, H, W), without gradient; left out, all count 1.

    Returns:
        Mean of the binary cross-entropies of the two domains.
    """
    true = _cross_entropy(critic(source.detach()), True)
    false = _cross_entropy(critic(target.detach()), False, None if weight is None else weight.detach())
    return (true + false) / 2


def _cross_entropy(scores: Tensor, is_source: bool, weight: Tensor | None = None) -> Tensor:
    if weight is not None:
        scores = F.interpolate(scores, size=weight.shape[-2:], mode="bilinear", align_corners=False)
        weight = weight[:, None]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # under autocast too
    loss = F.softplus(-scores if is_source else scores)
    return loss.mean() if weight is None else (weight * loss).mean()


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}
