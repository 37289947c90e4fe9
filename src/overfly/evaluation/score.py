"""Score a network on the labeled images of a split."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.classes import Classes
from overfly.core.errors import DataError, NotFiniteError, OverflyError, RecipeError
from overfly.core.prefetch import map_ahead
from overfly.core.records import IGNORE, Array, Item, Logits, UInt8
from overfly.data.check import check_max_value
from overfly.data.domain import Domain, Split
from overfly.evaluation.images import resized, to_tensor
from overfly.evaluation.scores import Confusion, Protocol, Scores, SplitCounts, finite, sum_over_ranks, summarize
from overfly.ops.normalization import restored_modes
from overfly.ops.windows import slide_inference


class LabeledImage(NamedTuple):
    """An item with its position in the split (from 0), its image (H, W, C) and its label (H, W)."""

    position: int
    item: Item
    image: Array
    label: UInt8


@dataclass(frozen=True, eq=False)
class Sample:
    """An image (H, W, C), in the sensor's own type and range, with its prediction and label (H, W).

    Without labeled pixels, the pixel accuracy, 0 to 1, is None.
    """

    name: str
    image: Array
    prediction: UInt8
    label: UInt8 | None = None
    accuracy: float | None = None


SampleCollector = Callable[[Sample, int, int], None]
"""Receives every image while a split is scored: the sample, its position from 0, and the number of samples."""


class Samples:
    """Collects evenly spaced samples, and those of lowest and highest accuracy (``extremes``); iterates in this order.

    Pass it to `score` and draw it with `overfly.evaluation.panels.samples_figure`.
    """

    def __init__(self, evenly_spaced: int = 4, extremes: bool = True) -> None:
        self.evenly_spaced, self.extremes = evenly_spaced, extremes
        self._spaced: dict[int, Sample] = {}
        self._worst: Sample | None = None
        self._best: Sample | None = None

    def __call__(self, sample: Sample, index: int, total: int) -> None:
        """Keep a sample if it is evenly spaced or of extreme accuracy; see `SampleCollector`."""
        if index in {(2 * part + 1) * total // (2 * self.evenly_spaced) for part in range(self.evenly_spaced)}:
            self._spaced[index] = sample
        if not self.extremes or sample.accuracy is None:
            return
        if self._worst is None or sample.accuracy < (self._worst.accuracy or 0):
            self._worst = sample
        if self._best is None or sample.accuracy > (self._best.accuracy or 0):
            self._best = sample

    def __iter__(self) -> Iterator[Sample]:
        samples = [self._spaced[index] for index in sorted(self._spaced)]
        for extreme in (self._worst, self._best):
            if extreme is not None and extreme.name not in {sample.name for sample in samples}:
                samples.append(extreme)
        return iter(samples)


def score(
    segmenter: nn.Module, domain: Domain, split: Split, *, resize: int | None = None, window: int | None = None,
    overlap: float = 0.25, device: torch.device | str = "cpu", batch: int = 1, boundary_width: int = 5,
    samples: SampleCollector | None = None, workers: int = 0, shard: tuple[int, int] = (0, 1),
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Scores:  # fmt: skip
    """Score a network on the labeled images of a split, in constant memory.

    The segmenter maps images (B, C, H, W), float, in the sensor's range, to `Logits` at the image's size. It is moved
    to ``device``; its training or evaluation mode is restored.

    ``resize`` is the side of the square that images are resized to before the network; labels are never resized, scores
    are resized to the label. ``window`` is the side of overlapping windows, in pixels after ``resize`` (None: whole
    images), ``overlap`` a share of it, ``batch`` the number of windows in a forward pass; ``boundary_width`` is the
    width of the band of Boundary IoU, in pixels of the label. ``samples`` receives every image with its prediction,
    such as `Samples`. ``workers`` threads read ahead; 0 reads in the calling thread. With a
    ``shard`` (rank, ranks) this process scores every ``ranks``-th image; scores are of the sum over ranks, by
    ``all_reduce`` or `torch.distributed`.

    Raises `DataError`: the split has no labels, or a label and its image differ in size; the message names the file,
    and `RecipeError`: the network and the domain have different classes, and `NotFiniteError`: the network's scores are
    not finite.
    """
    protocol = Protocol(resize=resize, window=window, overlap=overlap if window else 0.0, boundary_width=boundary_width)
    items = domain.items(split)
    labeled = _labeled_items(items, segmenter, domain, split)
    entries = list(enumerate(labeled))[shard[0] :: shard[1]]
    counts = SplitCounts.empty(len(domain.classes), protocol)
    all_reduce = all_reduce or sum_over_ranks
    with evaluation_mode(segmenter.to(device)), torch.inference_mode(), _shared_errors(shard[1], all_reduce):
        for image in read_ahead(domain, entries, workers):
            check_max_value(domain, image.item, image.image)
            scores = _predict(segmenter, image, protocol, device, batch)
            prediction, image_counts = _count(scores, image, domain, protocol)
            counts = counts.plus(image_counts)
            if samples is not None:
                ids = prediction.to("cpu", torch.uint8).numpy()
                accuracy = finite(Confusion(image_counts.confusion).accuracy)
                sample = Sample(image.item.name, image.image, ids, image.label, accuracy)
                samples(sample, image.position, len(labeled))
    if shard[1] > 1:
        counts = counts.reduce(all_reduce)
    return summarize(counts, domain, split, protocol, unlabeled=len(items) - len(labeled))


@contextlib.contextmanager
def _shared_errors(ranks: int, all_reduce: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Raise an error of one rank in all ranks, so that none waits in the sum of the counts."""
    error: OverflyError | None = None
    try:
        yield
    except OverflyError as caught:
        error = caught
    if ranks > 1:
        flags = [isinstance(error, NotFiniteError), error is not None and not isinstance(error, NotFiniteError)]
        not_finite, other = all_reduce(torch.tensor(flags, dtype=torch.int64)).tolist()
        if other and (error is None or isinstance(error, NotFiniteError)):
            raise DataError("another process could not score its share of the images; see its message")
        if not_finite and error is None:
            raise NotFiniteError("predictions of another process are not finite")
    if error is not None:
        raise error


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Switch a network to evaluation mode within the context; restore every submodule's mode on exit."""
    with restored_modes(network):
        network.eval()
        yield


def read_ahead(domain: Domain, entries: Sequence[tuple[int, Item]], workers: int = 0) -> Iterator[LabeledImage]:
    """Read images and labels in order, ahead in ``workers`` threads; raise `DataError` if their sizes differ."""

    def read(entry: tuple[int, Item]) -> LabeledImage:
        index, item = entry
        image, label = domain.read_image(item), domain.read_label(item)
        if image.shape[:2] != label.shape:
            name = item.name if callable(item.label) else item.label
            raise DataError(
                f"label {name} is {label.shape[1]} x {label.shape[0]} pixels and its image {image.shape[1]} x "
                f"{image.shape[0]}; make them the same size, or remove the image"
            )
        return LabeledImage(index, item, image, label)

    yield from map_ahead(read, entries, workers=workers) if workers else map(read, entries)


def _predict(
    segmenter: nn.Module, entry: LabeledImage, protocol: Protocol, device: torch.device | str, batch: int
) -> Tensor:
    """Class scores (K, H, W), float32, at the label's own size."""
    image = resized(to_tensor(entry.image).to(device), protocol.resize)[None]

    def run(patch: Tensor) -> Tensor:
        logits: Logits = segmenter(patch)
        return logits.main.float()

    side, size = protocol.window, entry.image.shape[:2]
    scores = run(image) if side is None else slide_inference(run, image, side, protocol.overlap, batch)
    if scores.shape[-2:] != size:
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores[0]


def _count(scores: Tensor, image: LabeledImage, domain: Domain, protocol: Protocol) -> tuple[Tensor, SplitCounts]:
    """Class ids (H, W) and counts of one image."""
    if len(scores) != len(domain.classes):
        raise RecipeError(
            f"the network has {len(scores)} classes and domain {domain.name} has {len(domain.classes)}; "
            "use a domain with the network's classes, or map its labels onto them"
        )
    highest, prediction = scores.max(0)
    if not bool(highest.isfinite().all()):
        raise NotFiniteError(
            f"the network's scores are not finite on {image.item.name}: its weights or its mean and standard deviation "
            "are invalid; train it again or use another checkpoint"
        )
    label = torch.from_numpy(image.label.astype(np.int64)).to(scores.device)
    if bool(((label >= len(scores)) & (label != IGNORE)).any()):
        name = image.item.name if callable(image.item.label) else image.item.label
        raise DataError(
            f"label {name} holds id {int(label[label != IGNORE].max())}, but the classes are 0 to "
            f"{len(scores) - 1} and {IGNORE} is ignored; correct the file or the domain's mapping"
        )
    return prediction, SplitCounts.from_predictions(scores, prediction, label, protocol)


def _labeled_items(items: Sequence[Item], segmenter: nn.Module, domain: Domain, split: Split) -> list[Item]:
    """The items with labels, after a check that network and domain have the same classes."""
    own = getattr(segmenter, "classes", None)
    if isinstance(own, Classes) and own.names != domain.classes.names:
        raise RecipeError(
            f"the network has the classes {', '.join(own.names)}, and domain {domain.name} has "
            f"{', '.join(domain.classes.names)}; use a domain with the network's classes, or map its labels onto them"
        )
    if (trained := getattr(segmenter, "max_value", domain.max_value)) != domain.max_value:
        values = f"values up to {trained:g}, and domain {domain.name} has max_value {domain.max_value:g}"
        raise RecipeError(f"the network was trained on {values}; rescale the images to one range, and set max_value")
    labeled = [item for item in items if item.label is not None]
    if not labeled:
        raise DataError(f"split {split} of domain {domain.name} has no labels; choose another split")
    return labeled
