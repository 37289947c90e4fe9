"""What a run begins with: the streams of its data and its first network."""

from __future__ import annotations

import sys
from pathlib import Path

from overfly.core.errors import RecipeError
from overfly.core.transfer import format_bytes
from overfly.data.cache import estimate
from overfly.data.domain import Domain, without_labels
from overfly.data.loading import Stream
from overfly.data.sampling import Uniform
from overfly.data.statistics import statistics
from overfly.models.network import Network, build
from overfly.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, Segmenter
from overfly.models.weights import Report, load_weights
from overfly.recipe import Recipe

ESTIMATED_FROM = 200
"""Pictures that mean and standard deviation are estimated from where nobody has given them."""


def streams(recipe: Recipe, cache: Path | str | None = None) -> tuple[Stream | None, Stream | None]:
    """The source with its labels and the target without, as far as the method reads them."""
    method = recipe.method
    found: list[Stream | None] = []
    reads_source = method.needs_source or (method.takes_source and recipe.source is not None)
    for key, (role, needed) in enumerate((("source", reads_source), ("target", method.needs_target))):
        if not needed:
            found.append(None)
            continue
        domain = recipe.domain("source" if role == "source" else "target")
        items = list(domain.items("train"))
        if isinstance(cache, Path):
            needed_bytes = estimate(domain, items, recipe.resize)
            print(f"decoded pictures of {domain.title} take {format_bytes(needed_bytes)} in {cache}", file=sys.stderr)
        found.append(
            Stream(
                domain,
                items if role == "source" else without_labels(items),
                recipe.sampling if role == "source" else Uniform(),
                batch=recipe.batch,
                crop=recipe.crop,
                resize=recipe.resize,
                seed=recipe.seed,
                key=key,
                cache=cache,
                labeled=role == "source",
            )
        )
    return found[0], found[1]


def first_segmenter(recipe: Recipe, start: Path | None = None) -> Segmenter:
    """The network that training begins with, its training heads on.

    Raises:
        RecipeError: the network to start from does not fit the domains.
        WeightsError: the weights do not fit the network.
    """
    domain = recipe.source or recipe.domain("target")
    if start is not None:
        segmenter = Segmenter.load(start)
        if segmenter.classes.names != domain.classes.names:
            raise RecipeError(
                f"{start} knows the classes {', '.join(segmenter.classes.names)}, the {domain.name} domain has "
                f"{', '.join(domain.classes.names)}; bring them together with the folder domain's mapping"
            )
        if segmenter.architecture != recipe.model.name:
            raise RecipeError(
                f"{start} holds {segmenter.architecture}, and the recipe asks for {recipe.model.name}; "
                f"write model: {segmenter.architecture}, or start from another run"
            )
        if segmenter.bands != domain.bands:
            raise RecipeError(
                f"{start} reads {segmenter.bands} bands, and the {domain.title} domain has {domain.bands}; "
                "give them the same bands"
            )
        if segmenter.max_value != domain.max_value:
            raise RecipeError(
                f"{start} was trained on values up to {segmenter.max_value:g}, and the {domain.title} domain "
                f"has them up to "
                f"{domain.max_value:g}; bring its images to that range"
            )
        return segmenter
    network = build(recipe.model.name, len(domain.classes), training_heads=True, bands=domain.bands)
    if recipe.model.weights is not None:
        report = load_weights(network, recipe.model.weights, sha256=recipe.model.sha256)
        print(report, file=sys.stderr)
        _check_trained(recipe, network, report)
    mean, std = normalization(recipe, domain)
    return Segmenter(
        network, domain.classes, architecture=recipe.model.name, mean=mean, std=std, max_value=domain.max_value
    )


def _check_trained(recipe: Recipe, network: Network, report: Report) -> None:
    """Refuse weights without a class layer where the method changes a trained network.

    Raises:
        RecipeError: the class layer was left at random.
    """
    layer = network.class_layer
    if (
        layer
        and recipe.start is None
        and recipe.method.needs_start
        and not any(name.startswith(f"{layer}.") for name in report.loaded)
    ):
        raise RecipeError(
            f"method {recipe.method.name} changes a trained network, and {report.source.name} holds no class layer for "
            "these classes; name a run or recipe under start"
        )


def normalization(recipe: Recipe, domain: Domain) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band in the sensor's range: given, ImageNet's with weights, or the data's."""
    model = recipe.model
    if model.mean is not None and model.std is not None:
        if len(model.mean) != domain.bands or len(model.std) != domain.bands:
            raise RecipeError(
                f"model.mean and model.std need {domain.bands} numbers each, one a band, not {len(model.mean)} and "
                f"{len(model.std)}"
            )
        return model.mean, model.std
    if model.weights is not None and domain.bands == len(IMAGENET_MEAN):
        mean, std = (tuple(value * domain.max_value for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return mean, std
    if domain.statistics is not None:
        return domain.statistics
    found = statistics(domain, "train", limit=ESTIMATED_FROM)
    return tuple(found.mean), tuple(max(value, 1e-6) for value in found.std)
