"""Networks by name: one short builder function a variant."""

from __future__ import annotations

from collections.abc import Callable

from overfly.core.errors import RecipeError
from overfly.core.spec import load_plugins
from overfly.models.network import Network

Builder = Callable[[int, bool, int], Network]
"""Number of classes, training heads or not, number of bands: a network with random weights."""

_BUILDERS: dict[str, Builder] = {}


def register(builder: Builder) -> Builder:
    """Make a builder known under its function's name (decorator).

    Args:
        builder: function of (classes, training_heads, bands) that returns a `Network`.

    Raises:
        ValueError: another builder has this name already.
    """
    name = str(getattr(builder, "__name__", builder))
    if name in _BUILDERS:
        raise ValueError(f"two networks want to be called {name!r}; rename the builder in {builder.__module__}")
    _BUILDERS[name] = builder
    return builder


def names() -> tuple[str, ...]:
    """Names of all networks known so far, sorted."""
    return tuple(sorted(_BUILDERS))


def build(name: str, classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
    """Build a network with random weights.

    Args:
        name: a name out of `names`, or of a plug-in (entry point ``overfly.plugins``).
        classes: number of classes K.
        training_heads: whether to add the auxiliary and boundary heads that only training reads.
        bands: number of bands C of the images.

    Returns:
        A module that maps normalized images (B, C, H, W) to `Logits` at its own stride.

    Raises:
        RecipeError: nothing has this name (the message lists what has one), or a number is not positive.
    """
    if name not in _BUILDERS:
        load_plugins()
    if name not in _BUILDERS:
        raise RecipeError(f"no network is called {name!r}; choose one of: {', '.join(names())}")
    if classes < 1 or bands < 1:
        raise RecipeError(
            f"network {name} needs at least 1 class and 1 band, not {classes} and {bands}; change the setting"
        )
    return _BUILDERS[name](classes, training_heads, bands)


def about(name: str) -> str:
    """First sentence of what a network's builder says of it."""
    return (_BUILDERS[name].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
