"""The images that `overfly adapt` is given on the command line, as domains."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from overfly.core.errors import DataError, RecipeError
from overfly.core.settings import validation_message
from overfly.data import listing
from overfly.data.check import statistics
from overfly.data.domain import SAMPLED_IMAGES, Split
from overfly.data.folder import Folder, UserDomain
from overfly.data.headers import is_address, read_raster_header
from overfly.data.raster import Raster
from overfly.data.raster_grid import Grid
from overfly.data.raster_labels import VECTOR_FORMATS, open_vector

DomainT = TypeVar("DomainT", bound=UserDomain)
SPLITS: dict[Split, float] = {"train": 0.85, "val": 0.15}
"""Shares of the labeled images for training and validation."""
MIN_BLOCKS, MAX_HELD, SEEDS, MAX_VALUES = 40, 64, 20, 50
"""Blocks that small rasters are divided into, most blocks for validation, draws of the splits that are compared, and
most values of an attribute that become classes."""


@dataclass(frozen=True)
class ImageInputs:
    """Image folders or patterns, or rasters, and a file of classes or a trained network."""

    source_images: Path | str | None = None
    source_masks: Path | None = None
    target_images: Path | str | None = None
    classes: Path | None = None
    checkpoint: Path | None = None
    """Run or weights, in place of source images."""
    source_labels: Path | str | None = None
    attribute: str | None = None

    @property
    def rasters(self) -> bool:
        """Whether the images are rasters: files or addresses, or with labels for rasters."""
        images = [entry for entry in (self.source_images, self.target_images) if entry is not None]
        return self.source_labels is not None or any(is_address(entry) or Path(entry).is_file() for entry in images)

    def check(self) -> None:
        """Raise `RecipeError` if an option is missing, or does not fit the others."""
        names: tuple[str, ...] = ("source_images", "source_masks", "target_images", "classes")
        if self.checkpoint is not None:
            names = ("target_images",)
            if self.source_images or self.source_masks or self.source_labels or self.classes:
                raise RecipeError("--checkpoint replaces the options of the source and --classes; omit these")
        elif self.rasters:
            names = ("source_images", "source_labels", "target_images")
            if self.source_masks is not None:
                raise RecipeError("--source-masks is for folders; give the labels of rasters with --source-labels")
        missing = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is None]
        if missing:
            lacking = "" if self == ImageInputs() else f"{' and '.join(missing)} missing; "
            raise RecipeError(
                f"{lacking}adapt needs a recipe; or --source-images, --source-masks, --target-images and --classes; or "
                "for rasters --source-images, --source-labels, --attribute and --target-images; or --checkpoint and "
                "--target-images"
            )


def input_domain(role: Literal["source", "target"], inputs: ImageInputs, settings: Mapping[str, Any]) -> UserDomain:
    """Create the domain of image folders or rasters with some settings, and estimate mean and standard deviation.

    Raises `OverflyError`: a folder or file is missing, empty or cannot be read, or a setting is invalid.
    """
    own = role == "source"
    images, masks = (inputs.source_images, inputs.source_masks) if own else (inputs.target_images, None)
    domain: UserDomain
    try:
        if inputs.rasters:
            labels = (inputs.source_labels, inputs.attribute) if own else (None, None)
            domain = raster_domain({"title": role, "images": _absolute(images), **settings}, *labels)
        else:
            domain = folder_domain(role, Path(images or ""), settings, masks)
    except ValidationError as error:
        raise RecipeError(validation_message(error, str(inputs.classes or f"the images {images}"))) from None
    return with_statistics(domain)


def with_statistics(domain: DomainT) -> DomainT:
    """Set mean and standard deviation of a domain without them, estimated from images of ``train``."""
    if domain.mean is not None:
        return domain
    measured = statistics(domain, "train", limit=SAMPLED_IMAGES)
    mean = tuple(round(value, 3) for value in measured.mean)
    std = tuple(round(max(value, 1e-3), 3) for value in measured.std)
    return domain.model_copy(update={"mean": mean, "std": std})


def folder_domain(role: str, images: Path, settings: Mapping[str, Any], masks: Path | None) -> Folder:
    """Create the domain of an image folder; arguments and errors are those of `input_domain`."""
    paths = (("images", images), ("masks", masks))
    for kind, path in paths:
        if path is not None and not _is_pattern(path) and not path.is_dir():
            raise DataError(f"--{role}-{kind}: {path} is not a folder; give a folder, or a pattern in quotes")
    root = Path(os.path.commonpath([path.absolute() for path in (images, masks) if path is not None]))
    while _is_pattern(root) or root == images.absolute():
        root = root.parent
    values: dict[str, Any] = {kind: str(path.absolute().relative_to(root)) for kind, path in paths if path is not None}
    domain = Folder(root=root, title=role, **{**settings, **values})
    try:
        domain.items("train")
    except DataError as error:
        raise DataError(f"--{role}-images: {error}") from None
    return domain if masks is None else _split_off_validation(domain, images)


def _absolute(path: Path | str | None) -> str:
    return str(path) if path is None or is_address(path) else os.path.abspath(path)  # noqa: PTH100 - also a pattern


def _is_pattern(path: Path) -> bool:
    return any(mark in str(path) for mark in "*?[")


def _split_off_validation(domain: Folder, images: Path) -> Folder:
    """Add `SPLITS` to a domain, with the first seed for which both have an image; `RecipeError` for one image."""
    if len(domain.items("train")) < 2:
        raise RecipeError(f"{images} has 1 image, and training and validation need one each; cut it into several")
    seed = domain.seed
    while True:
        divided = domain.model_copy(update={"seed": seed, "splits": SPLITS})
        with suppress(DataError):  # a split is empty
            if divided.items("train") and divided.items("val"):
                return divided
        seed += 1


def raster_domain(settings: Mapping[str, Any], labels: Path | str | None, attribute: str | None) -> Raster:
    """Create the domain of rasters from its settings, labels, and the attribute of their polygons.

    Its bands are those of the rasters, and its classes the values of the attribute if ``settings`` have none. Labeled
    blocks are divided so that training and validation have similar class shares. Raises `OverflyError`: a file cannot
    be read, or the classes are unknown.
    """
    grids = Raster(**{"classes": ["unknown"], **settings}).grids()
    header = read_raster_header(grids[0].source)
    pixels = sum(grid.height * grid.width for grid in grids)
    block = min(512, max(64, int(np.sqrt(pixels / MIN_BLOCKS)) // 32 * 32))
    values = {"bands": header.bands - header.alpha, "block": block, "gap": block // 8, **settings}
    if labels is None:
        return Raster(**values)
    held = min(SPLITS["val"], MAX_HELD * block**2 / pixels)
    values |= {"labels": _absolute(labels), "attribute": attribute, "splits": {"train": 1 - held, "val": held}}
    if "classes" not in settings:
        if attribute is None or Path(labels).suffix.lower() not in VECTOR_FORMATS:
            raise RecipeError("--classes missing: give the classes, or for polygons the --attribute that holds them")
        values["classes"] = _attribute_values(Path(labels), attribute, grids)
    domain = Raster(**values)
    return min((domain.model_copy(update={"seed": seed}) for seed in range(SEEDS)), key=_imbalance)


def _attribute_values(path: Path, attribute: str, grids: tuple[Grid, ...]) -> list[str]:
    vector = open_vector(path, None, grids)
    found = {value for grid in grids for value in vector.read(grid, None, attribute, shapes=False)[1]}
    values = sorted((value for value in found if value is not None), key=listing.natural_key)
    if not 1 < len(values) <= MAX_VALUES:
        raise RecipeError(
            f"{path} has {len(values)} values of {attribute} in the rasters, such as {', '.join(values[:5])}; give the "
            "classes with --classes"
        )
    return values


def _imbalance(domain: Raster) -> float:
    """Difference of the class shares of training and validation (total variation), and a class for each absent one."""
    counts = [domain.known_counts(domain.items(split)) for split in ("train", "val")]
    pixels = [np.zeros(len(domain.classes)) if each is None else each.sum(0).astype(float) for each in counts]
    shares = [each / max(1.0, each.sum()) for each in pixels]
    absent = sum(int((each[pixels[0] + pixels[1] > 0] == 0).sum()) for each in pixels)
    return float(absent + abs(shares[0] - shares[1]).sum() / 2)
