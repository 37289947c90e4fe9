"""Labeled target tiles: read them, score candidates on them with intervals, and learn from them."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from overfly.adaptation.gate import bootstrap_samples, ious, sampled_counts
from overfly.core.errors import DataError, RecipeError
from overfly.core.progress import percent
from overfly.core.records import IGNORE
from overfly.core.settings import validation_message
from overfly.core.spec import Share, Spec
from overfly.data.folder import DOMAIN_SETTINGS, Folder, UserDomain, read_classes
from overfly.evaluation.images import MetricOptions, labeled_images
from overfly.evaluation.label_free_metrics import predict_probabilities
from overfly.evaluation.scores import Confusion
from overfly.models.segmenter import Segmenter
from overfly.recipe import Labels, Recipe, load
from overfly.training.setup import files_sha256

LEARNED = "adapted with labels"
"""Name of the candidate that learned from labeled target tiles."""
COVERAGE = 0.95
"""Nominal coverage of the intervals; docs/results/labels.md has the measured one."""


class Interval(Spec):
    """A value on the tiles, as a share, and an interval for the whole target; without ends for a single tile."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        ends = "" if self.low is None else f" ({percent(self.low, 1)} to {percent(self.high, 1)})"
        return percent(self.value, 1) + ends


class TileScores(Spec):
    """Scores of a candidate on labeled target tiles that it did not learn from."""

    tiles: int
    """Number of tiles."""
    miou: Interval
    """mIoU over all tiles, and the classes that their labels hold."""
    difference: Interval | None = None
    """The same above that of source only; none for source only."""
    better: Share | None = None
    """Share of bootstrap samples of the tiles in which mIoU is above that of source only; none for source only."""

    def __str__(self) -> str:
        text = f"mIoU {self.miou} on {self.tiles} labeled tiles"
        if self.difference is None:
            return text
        low, high = self.difference.low, self.difference.high
        zero = low is None or high is None or low <= 0 <= high
        reason = "one tile gives no interval" if low is None else "includes zero"
        samples = f", higher in {percent(self.better, 0)} % of samples" if low is not None else ""
        tail = f"; {reason}: not decided by these tiles" if zero else ""
        return f"{text}, difference to source only {self.difference}{samples}{tail}"


class LabeledTiles(NamedTuple):
    """Target tiles with masks: the domain in a recipe, and its images (C, H, W) with labels (H, W)."""

    labels: Labels
    pairs: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> "LabeledTiles":
        """Read the tiles of a folder with ``images`` and ``masks``, except those whose masks are empty.

        Masks are decoded by the folder's ``classes.yaml``, which `overfly suggest` writes, else as the source's. Raises
        `OverflyError`: the folder is missing, a mask cannot be decoded, or all are empty.
        """
        domain = _folder(folder.absolute(), recipe)
        filled = [item for item in domain.items("train") if (domain.read_label(item) != IGNORE).any()]
        if not filled:
            raise DataError(f"--labels: no mask in {folder / 'masks'} has a labeled pixel; fill them, see README.txt")
        domain = domain.model_copy(update={"splits": {"train": tuple(glob.escape(item.name) for item in filled)}})
        pairs = list(labeled_images(domain, "train", MetricOptions(None, resize=recipe.resize)))
        return cls(Labels(domain=domain, sha256=files_sha256(domain)), pairs)

    def extend(self, recipe: Recipe) -> Recipe:
        """Return a recipe that learns from the tiles too."""
        return load(recipe.model_copy(update={"labels": self.labels}))


def _folder(folder: Path, recipe: Recipe) -> Folder:
    """The domain of a folder of labels."""
    file, target = folder / "classes.yaml", recipe.domain("target")
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise DataError(f"--labels: {folder} has no folder {name}; give a folder as overfly suggest writes it")
    values: dict[str, Any] = {"classes": target.classes}
    if file.is_file():
        values = read_classes(file)
    elif isinstance(recipe.source, UserDomain) and not getattr(recipe.source, "has_polygons", False):
        own = {*type(recipe.source).model_fields} - {*DOMAIN_SETTINGS, "name", "mean", "std"}
        values = {name: getattr(recipe.source, name) for name in own & {*Folder.model_fields}}
    values |= {"bands": target.bands, "max_value": target.max_value, "nodata": target.nodata, "gsd": target.gsd}
    try:
        domain = Folder(root=folder, title="labels", masks="masks", **values)
    except ValidationError as error:
        raise RecipeError(validation_message(error, f"--labels: {folder}")) from None
    if domain.classes.names != target.classes.names:
        raise RecipeError(f"{file} has other classes than the target: {', '.join(target.classes.names)}; use these")
    return domain


def confusions(network: Segmenter, pairs: Sequence[tuple[Tensor, Tensor]], options: MetricOptions) -> list[Confusion]:
    """Confusion matrices, by labels and predictions, of images (C, H, W) with labels (H, W)."""
    predicted = predict_probabilities(network, (image for image, _ in pairs), options)
    both = zip(predicted, pairs, strict=True)
    return [Confusion.from_predictions(each.argmax(0), label, len(each)) for each, (_, label) in both]


def tile_scores(tiles: Sequence[Confusion], baseline: Sequence[Confusion] | None) -> TileScores:
    """Scores of a candidate on tiles, and its difference to ``baseline``, source only, on the same tiles."""
    count = len(tiles)
    without = np.vstack([np.ones((1, count), np.int64), 1 - np.eye(count, dtype=np.int64)])
    mious = _mious(without, tiles)
    if baseline is None:
        return TileScores(tiles=count, miou=_jackknife(mious, least=0.0))
    drawn = bootstrap_samples(count, np.random.default_rng(0))
    better = float(np.mean(_mious(drawn, tiles) > _mious(drawn, baseline)))
    difference = _jackknife(mious - _mious(without, baseline))
    return TileScores(tiles=count, miou=_jackknife(mious, least=0.0), difference=difference, better=better)


def _mious(samples: NDArray[np.int64], tiles: Sequence[Confusion]) -> NDArray[np.float64]:
    """Mean IoU of samples (S, N) of N tiles, over the classes of their labels; others would decide by chance."""
    counts = sampled_counts(samples, tiles)
    return np.asarray(ious(counts).where(counts.sum(-1) > 0, torch.nan).nanmean(1))


def _jackknife(values: NDArray[np.float64], least: float = -1.0) -> Interval:
    """Jackknife interval with Student's t, at least ``least``, of values (1 + N,): of all tiles, and without each."""
    from scipy.stats import t

    value, without = float(values[0]), values[1:]
    count = len(without)
    if count < 2:
        return Interval(value=value)
    deviation = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    half = float(t.ppf((1 + COVERAGE) / 2, count - 1) * deviation)
    return Interval(value=value, low=max(least, value - half), high=min(1.0, value + half))
