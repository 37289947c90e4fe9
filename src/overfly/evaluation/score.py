"""The one scorer: a network on the labeled pictures of a split. Nothing else opens a target's labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.classes import Classes
from overfly.core.errors import DataError, NotFiniteError, OverflyError, RecipeError
from overfly.core.prefetch import map_ahead
from overfly.core.records import IGNORE, Array, Item, Logits, UInt8
from overfly.data.domain import Domain, Split
from overfly.evaluation.confusion import over_ranks
from overfly.evaluation.samples import Sample, SampleCollector, Samples
from overfly.evaluation.scores import Protocol, Scores, Tally, number, summarize
from overfly.ops.windows import sliding


class Picture(NamedTuple):
    """One item as read: its place in the split, image (H, W, C), label (H, W)."""

    place: int
    item: Item
    image: Array
    label: UInt8


def score(
    segmenter: nn.Module,
    domain: Domain,
    split: Split,
    *,
    resize: int | None = None,
    window: int | None = None,
    overlap: float = 0.25,
    device: torch.device | str = "cpu",
    batch: int = 1,
    boundary_width: int = 5,
    samples: SampleCollector | None = None,
    on_image: Callable[[int, int], None] | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    add: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score a network on the labeled pictures of a split, in constant memory.

    Args:
        segmenter: images (B, C, H, W), float, in the sensor's range, to `Logits` at the image's size. It is moved to
            ``device``; training or evaluation mode is as before afterwards.
        domain: whose pictures and labels to read.
        split: which of them.
        resize: side of the square that pictures are resized to before the network; labels are never resized, scores
            are brought to the label's size instead.
        window: side of overlapping windows, in pixels after ``resize``; None: whole pictures.
        overlap: share of a window's side that the next one covers again.
        device: where the network runs.
        batch: windows, or whole pictures of equal size, in one forward pass.
        boundary_width: width of the band of Boundary IoU, in pixels of the label.
        samples: is shown every picture with its prediction, such as `Samples`, which keeps a few to draw.
        on_image: called with (pictures done, pictures in all) after each.
        workers: threads that read ahead; 0 reads in turn.
        shard: (rank, ranks): this process scores every ``ranks``-th picture, and all get the scores of the sum.
        add: sums a tensor over ranks; left out, `torch.distributed`.

    Raises:
        DataError: the split has no labels, or a label and its image differ in size; the message names the file.
        RecipeError: the network and the domain have different classes.
        OverflyError: the network gives scores that are not finite.
    """
    protocol = Protocol(resize=resize, window=window, overlap=overlap if window else 0.0, boundary_width=boundary_width)
    items = domain.items(split)
    labeled = _labeled(items, segmenter, domain, split)
    todo = list(enumerate(labeled))[shard[0] :: shard[1]]
    tally = Tally.empty(len(domain.classes), protocol)
    with evaluation_mode(segmenter.to(device)), torch.inference_mode(), _shared_errors(shard[1], add or over_ranks):
        for group in _groups(read_ahead(domain, todo, workers), 1 if window else batch):
            predicted = _predict(segmenter, group, protocol, torch.device(device), batch)
            for picture, scores in zip(group, predicted, strict=True):
                prediction, one = _counted(scores, picture, domain, protocol)
                tally = tally + one
                if samples is not None:
                    samples.show(_sample(picture, prediction, one), picture.place, len(labeled))
                if on_image is not None:
                    on_image(tally.images, len(todo))
    if shard[1] > 1:
        tally = tally.reduce(add)
    return summarize(tally, domain, split, protocol, unlabeled=len(items) - len(labeled))


@contextlib.contextmanager
def _shared_errors(ranks: int, add: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Raise an error of one rank in all ranks, which would otherwise wait for it in the sum of the counts."""
    error: OverflyError | None = None
    try:
        yield
    except OverflyError as caught:
        error = caught
    if ranks > 1:
        mine = [isinstance(error, NotFiniteError), error is not None and not isinstance(error, NotFiniteError)]
        not_finite, other = add(torch.tensor(mine, dtype=torch.int64)).tolist()
        if other and (error is None or isinstance(error, NotFiniteError)):
            raise DataError("another process could not score its share of the images; see its message")
        if not_finite and error is None:
            raise NotFiniteError("predictions of another process are not finite")
    if error is not None:
        raise error


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every submodule's own mode again afterwards."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def read_ahead(domain: Domain, todo: Sequence[tuple[int, Item]], workers: int = 0) -> Iterator[Picture]:
    """Read images and labels in order, with ``workers`` threads at most two pictures each ahead.

    Raises:
        DataError: a label and its image differ in size.
    """

    def read(entry: tuple[int, Item]) -> Picture:
        index, item = entry
        image, label = domain.read_image(item), domain.read_label(item)
        if image.shape[:2] != label.shape:
            named = item.name if callable(item.label) else item.label
            raise DataError(
                f"label {named} is {label.shape[1]} x {label.shape[0]} pixels and its image {image.shape[1]} x "
                f"{image.shape[0]}; bring them to one size, or take the picture out"
            )
        return Picture(index, item, image, label)

    if workers == 0:
        yield from map(read, todo)
        return
    yield from map_ahead(read, todo, workers=workers)


def _groups(images: Iterator[Picture], batch: int) -> Iterator[list[Picture]]:
    """Neighboring pictures of equal size, at most ``batch`` together."""
    group: list[Picture] = []
    for picture in images:
        if group and (len(group) == batch or picture.image.shape != group[0].image.shape):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def _predict(
    segmenter: nn.Module, group: list[Picture], protocol: Protocol, device: torch.device, batch: int
) -> Tensor:
    """Class scores (B, K, H, W), float32, at the labels' own size."""
    stack = np.stack([np.ascontiguousarray(picture.image, dtype=np.float32) for picture in group])
    image = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous().to(device)
    size = image.shape[-2:]
    if protocol.resize is not None and size != (protocol.resize, protocol.resize):
        square = (protocol.resize, protocol.resize)
        image = F.interpolate(image, square, mode="bilinear", align_corners=False, antialias=True)

    def main(patch: Tensor) -> Tensor:
        logits: Logits = segmenter(patch)
        return logits.main.float()

    scores = main(image) if protocol.window is None else sliding(main, image, protocol.window, protocol.overlap, batch)
    if scores.shape[-2:] != size:
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores


def _counted(scores: Tensor, picture: Picture, domain: Domain, protocol: Protocol) -> tuple[Tensor, Tally]:
    """Class ids (H, W) and counts of one picture; or what is wrong with it."""
    if len(scores) != len(domain.classes):
        raise RecipeError(
            f"the network tells {len(scores)} classes apart and domain {domain.name} has {len(domain.classes)}; "
            "score it on a domain with its classes, or map the labels onto them"
        )
    highest, prediction = scores.max(0)
    if not bool(highest.isfinite().all()):
        raise NotFiniteError(
            f"the network gives scores that are not finite on {picture.item.name}; its weights or its mean and "
            "standard deviation are broken, so train again or take another checkpoint"
        )
    label = torch.from_numpy(picture.label.astype(np.int64)).to(scores.device)
    if bool(((label >= len(scores)) & (label != IGNORE)).any()):
        named = picture.item.name if callable(picture.item.label) else picture.item.label
        raise DataError(
            f"label {named} holds id {int(label[label != IGNORE].max())}, but the classes are 0 to "
            f"{len(scores) - 1} and {IGNORE} is ignored; correct the file or the domain's mapping"
        )
    return prediction, Tally.of(scores, prediction, label, protocol)


def _sample(picture: Picture, prediction: Tensor, tally: Tally) -> Sample:
    ids = prediction.to("cpu", torch.uint8).numpy()
    return Sample(picture.item.name, picture.image, ids, picture.label, number(tally.confusion.accuracy))


def _labeled(items: Sequence[Item], segmenter: nn.Module, domain: Domain, split: Split) -> list[Item]:
    """The items that can be scored, if any can."""
    own = getattr(segmenter, "classes", None)
    if isinstance(own, Classes) and own.names != domain.classes.names:
        raise RecipeError(
            f"the network tells apart {', '.join(own.names)}, but domain {domain.name} has "
            f"{', '.join(domain.classes.names)}; score it on a domain with its classes, or map the labels onto them"
        )
    labeled = [item for item in items if item.label is not None]
    if not labeled:
        raise DataError(f"split {split} of domain {domain.name} has no labels to score against; choose another split")
    return labeled


__all__ = ["Protocol", "Sample", "Samples", "Scores", "evaluation_mode", "read_ahead", "score"]
