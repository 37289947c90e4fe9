"""Prepare training: data streams, initial networks and optimizers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.filesize import decimal
from torch import Tensor
from torch.optim import Optimizer

from overfly.core.atomic_files import file_sha256
from overfly.core.errors import DownloadError, OverflyError, RecipeError, WeightsError
from overfly.core.progress import print_status
from overfly.data.check import statistics
from overfly.data.domain import Domain, Split, check_masks, without_labels
from overfly.data.loading import BatchDataset, BatchStream, estimate_cache_bytes
from overfly.data.sampling import Uniform
from overfly.methods.method import Networks
from overfly.models.hugging_face import TransformersNetwork
from overfly.models.network import Network, build
from overfly.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, Segmenter
from overfly.models.weights import LoadReport, load_tensors, load_weights
from overfly.recipe import Model, Recipe
from overfly.training.engine import TrainerConfig, run_on_rank_zero

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STATISTICS_BATCHES = 50
"""Most batches that batch-normalization statistics are estimated on after training."""
STATISTICS_IMAGES = 200
"""Images from which mean and standard deviation are estimated if the recipe does not set them."""


@dataclass(frozen=True)
class TrainingSetup:
    """Data and networks of a run."""

    batches: BatchDataset
    """Batches by number; an optimizer step uses ``accumulate`` batches."""
    nets: Networks
    """The method's networks with their initial weights."""
    optimizers: list[Optimizer]
    """The method's optimizers; empty for methods without a loss."""
    total_steps: int
    """Optimizer steps of the whole run."""
    initial_weights: str
    """File that the initial weights were read from, or ``random``."""


def prepare_training(
    recipe: Recipe, fabric: "Fabric", config: TrainerConfig, start: Path | None = None
) -> TrainingSetup:
    """Open the data and build the networks, without writing files; ``start`` is the weights file of the recipe's start.

    Raises `OverflyError` if data, weights and recipe do not fit together.
    """
    quiet = config.quiet or not fabric.is_global_zero
    print_status("checking the masks of the source", quiet=quiet or recipe.source is None)
    run_on_rank_zero(fabric, lambda: _check_source_masks(recipe))
    print_status("reading the data", quiet=quiet)
    source, target = training_streams(recipe, config.cache, quiet=quiet)
    torch.manual_seed(recipe.seed)
    segmenter, initial_weights = initial_network(recipe, start, quiet=quiet)
    nets = recipe.method.networks(segmenter)
    nets.trained = start is not None
    optimizers: list[Optimizer] = recipe.method.optimizers(nets, recipe.optim)
    shard = (fabric.global_rank, fabric.world_size) if optimizers else (0, 1)  # (0, 1): every process sees all images
    batches = BatchDataset(source, target, *shard, labels=_labels_stream(recipe, config.cache))
    first = batches[0]  # raises data errors before the run folder exists
    if isinstance(first, OverflyError):
        raise first
    steps = recipe.length(len(source.items) if source else 0)
    return TrainingSetup(batches, nets, optimizers, steps, initial_weights)


def _check_source_masks(recipe: Recipe) -> None:
    """Decode the source masks of training and validation."""
    splits: list[Split] = ["train"] if _reads_source(recipe) else []
    if recipe.validation.every:
        splits.append(recipe.validation.split)
    if recipe.source is not None and splits:
        check_masks(recipe.source, splits)


def _reads_source(recipe: Recipe) -> bool:
    return recipe.method.needs_source or (recipe.method.uses_optional_source and recipe.source is not None)


def training_streams(
    recipe: Recipe, cache: Path | str | None = None, *, quiet: bool = True
) -> tuple[BatchStream | None, BatchStream | None]:
    """Return the labeled source and the unlabeled target; None for a domain that the method does not read."""
    streams: list[BatchStream | None] = []
    reads = {"source": _reads_source(recipe), "target": recipe.method.needs_target}
    for key, (role, needed) in enumerate(reads.items()):
        if not needed:
            streams.append(None)
            continue
        domain = recipe.domain("source" if role == "source" else "target")
        items, labeled = list(domain.items("train")), role == "source"
        if isinstance(cache, Path):
            size = decimal(estimate_cache_bytes(domain, items, recipe.resize))
            print_status(f"decoded images of {domain.title} take {size} in {cache}", quiet=quiet)
        stream = BatchStream(
            domain, items if labeled else without_labels(items), recipe.sampling if labeled else Uniform(),
            batch=recipe.batch - (recipe.labels.count(recipe.batch) if labeled and recipe.labels else 0),
            crop=recipe.crop, resize=recipe.resize, seed=recipe.seed, key=key, cache=cache, labeled=labeled,
        )  # fmt: skip
        streams.append(stream)
        if rarely := [] if stream.counts is None else stream.sampling.neglected(stream.counts):
            classes = ", ".join(domain.classes.names[index] for index in rarely)
            print_status(
                f"warning: sampling {stream.sampling.name} draws fewer than one of 1,000 images for {classes}; raise "
                "sampling.temperature", quiet=quiet,
            )  # fmt: skip
    return streams[0], streams[1]


def _labels_stream(recipe: Recipe, cache: Path | str | None) -> BatchStream | None:
    """Return the labeled target images of a recipe."""
    if recipe.labels is None:
        return None
    domain = recipe.labels.domain
    if recipe.labels.sha256 not in (None, files_sha256(domain)):
        raise RecipeError(f"images or masks of labels ({domain.title}) changed; run overfly adapt with --labels again")
    return BatchStream(
        domain, domain.items("train"), Uniform(), batch=recipe.labels.count(recipe.batch), crop=recipe.crop,
        resize=recipe.resize, seed=recipe.seed, key=2, cache=cache, labeled=True,
    )  # fmt: skip


def files_sha256(domain: Domain) -> str:
    """SHA-256 of the image and mask files of a domain's training images."""
    items = domain.items("train")
    return file_sha256(*(file for item in items for file in (item.image, item.label) if isinstance(file, Path)))


def source_images(stream: BatchStream | None, count: int) -> Iterator[Tensor]:
    """Yield the images (B, C, H, W) of the first batches of a stream, without augmentation."""
    if stream is not None:
        for step in range(count):
            yield stream.read(step, list(range(stream.batch))).image


def initial_network(recipe: Recipe, start: Path | None = None, *, quiet: bool = False) -> tuple[Segmenter, str]:
    """Return the initial network with its training heads, and the name of its file of weights or ``random``.

    It is loaded from the weights file ``start`` if given. Raises `RecipeError`: the network under ``start`` and the
    domains do not fit together, and `WeightsError`: ``model.weights`` do not fit the network.
    """
    domain = recipe.source or recipe.domain("target")
    if start is not None:
        segmenter, origin = Segmenter.load(start), str(start)
        _check_start(start, segmenter, recipe, domain)
    else:
        network = build(recipe.model.architecture, len(domain.classes), training_heads=True, bands=domain.bands)
        report = load_initial_weights(recipe.model, network, quiet=quiet)
        origin = "random" if report is None else str(report.source)
        if report is not None:
            _check_class_layer(recipe, network, report)
        mean, std = normalization(recipe.model, domain, pretrained=report is not None)
        architecture, max_value = recipe.model.title, domain.max_value
        segmenter = Segmenter(
            network, domain.classes, architecture=architecture, mean=mean, std=std, max_value=max_value
        )
    if recipe.model.count_include_pad is not None:
        segmenter.network.set_count_include_pad(recipe.model.count_include_pad)
    return segmenter, origin


def load_initial_weights(model: Model, network: Network, *, quiet: bool = False) -> LoadReport | None:
    """Load ``model.weights``, print what matched; None for random weights. Raise `WeightsError` if they do not fit."""
    if model.weights is None:
        return None
    try:
        if model.weights == "imagenet" and not (network.imagenet or model.checkpoint):
            raise WeightsError("no address of its ImageNet weights is known")
        if model.weights == "imagenet" and isinstance(network, TransformersNetwork):
            report = load_tensors(network, Path(str(model.checkpoint)), network.pretrained(str(model.checkpoint)))
        else:
            name = network.imagenet if model.weights == "imagenet" else model.weights
            report = load_weights(network, name, sha256=model.sha256)
    except (WeightsError, DownloadError) as error:
        if model.weights != "imagenet" or model.checkpoint:
            raise
        report = None
        failure = f"{model.name} starts from random weights ({error}); better set model.weights to an ImageNet file"
    print_status(str(report or failure), quiet=quiet)
    return report


def _check_start(start: Path, segmenter: Segmenter, recipe: Recipe, domain: Domain) -> None:
    """Check that classes, architecture, bands and value range of the start network are the recipe's."""
    advice = {
        "classes": "unify them with the folder domain's mapping",
        "model": f"set model: {segmenter.architecture}, or start from another run",
        "bands": "use the same bands in both", "max_value": "rescale the images to the same range",
    }  # fmt: skip
    names = (", ".join(segmenter.classes.names), ", ".join(domain.classes.names))
    models = (segmenter.architecture, recipe.model.title)
    bands, ranges = (segmenter.bands, domain.bands), (f"{segmenter.max_value:g}", f"{domain.max_value:g}")
    for (setting, correct), (own, other) in zip(advice.items(), (names, models, bands, ranges), strict=True):
        if own != other:
            raise RecipeError(f"{start} has {setting} {own}, the recipe with {domain.title} has {other}; {correct}")


def _check_class_layer(recipe: Recipe, network: Network, report: LoadReport) -> None:
    """Raise RecipeError for weights without a class layer if the method needs a trained network."""
    layer = network.class_layer
    missing = layer and not any(name.startswith(f"{layer}.") for name in report.loaded)
    if missing and recipe.start is None and recipe.method.needs_start:
        raise RecipeError(
            f"method {recipe.method.name} needs a trained network, and {report.source.name} has no class layer for "
            "these classes; set start to a run or a recipe"
        )


def normalization(
    model: Model, domain: Domain, *, pretrained: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each band, in the sensor's range.

    They are the recipe's if set, ImageNet's for ``pretrained`` weights, else the domain's.
    """
    if model.mean is not None and model.std is not None:
        if len(model.mean) != domain.bands or len(model.std) != domain.bands:
            raise RecipeError(
                f"model.mean and model.std need {domain.bands} numbers each, one per band, got {len(model.mean)} and "
                f"{len(model.std)}"
            )
        return model.mean, model.std
    if pretrained and domain.bands == len(IMAGENET_MEAN):
        mean, std = (tuple(value * domain.max_value for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return mean, std
    if domain.statistics is not None:
        return domain.statistics
    estimated = statistics(domain, "train", limit=STATISTICS_IMAGES)
    return tuple(estimated.mean), tuple(max(value, 1e-6) for value in estimated.std)
