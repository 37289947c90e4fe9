"""Through a whole domain, file by file: what is broken, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from overfly.core.errors import DataError, OverflyError
from overfly.core.records import IGNORE, Array, Item
from overfly.core.spec import Share, Spec, Whole
from overfly.data.domain import SPLITS, Domain, Split, SplitError
from overfly.data.headers import read_header


class Problem(Spec):
    """One thing that is wrong with one picture."""

    image: str
    """Name of the picture; empty if it is the split as a whole."""
    sentence: str
    """Which file, what is wrong with it, and what to do."""


class SplitReport(Spec):
    """What a split holds. Shares, sizes and types are those of the files that could be read."""

    split: Split
    """Which split."""
    images: Whole
    """Images listed."""
    labeled: Whole
    """Images with a mask."""
    problems: tuple[Problem, ...] = ()
    """Everything that is wrong, in the order of the pictures."""
    shares: dict[str, Share] = Field(default_factory=dict)
    """Share of each class among the pixels that have one."""
    ignored: Share = 0.0
    """Share of ignored pixels among all pixels of masks."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Number of images of each size, width×height, the commonest first."""
    bands: dict[int, int] = Field(default_factory=dict)
    """Number of images of each number of bands."""
    dtypes: dict[str, int] = Field(default_factory=dict)
    """Number of images of each type of pixel."""
    unread: Whole = 0
    """Images whose last band their file marks as opacity, and which was not read."""
    empty: Whole = 0
    """Masks in which every pixel is ignored: nothing can be learned from them."""


class Report(Spec):
    """What a domain holds."""

    domain: str
    """Which kind of domain."""
    splits: tuple[SplitReport, ...]
    """The splits that it has."""
    absent: dict[Split, str] = Field(default_factory=dict)
    """The splits that it has not, each with the reason."""

    @property
    def bad(self) -> tuple[Problem, ...]:
        """Everything that is wrong in any split."""
        return tuple(problem for split in self.splits for problem in split.problems)

    def __str__(self) -> str:
        """The report in words, a line a fact."""
        told: list[str] = []
        for split in self.splits:
            told += [f"{split.split}: {split.images} images, {split.labeled} with a mask"]
            for what, counts in (("sizes", split.sizes), ("bands", split.bands), ("types", split.dtypes)):
                told += [f"  {what}: " + ", ".join(f"{value} ({count})" for value, count in counts.items())]
            if split.unread:
                told += [
                    f"  {split.unread} images mark their last band as opacity, and it is not read; if it was measured "
                    "like the others, such as near infrared, count it in the domain's bands"
                ]
            told += [f"  {name}: {share:.2%}" for name, share in split.shares.items()]
            if split.labeled:
                told += [f"  ignored: {split.ignored:.2%}"]
            if split.empty:
                told += [f"  {split.empty} masks are ignored in every pixel"]
            told += [f"  wrong: {problem.sentence}" for problem in split.problems]
        told += [f"no {split} split: {reason}" for split, reason in self.absent.items()]
        return "\n".join(told)


def check(
    domain: Domain, splits: Sequence[Split] | None = None, progress: Callable[[Item], None] | None = None
) -> Report:
    """Read every image and mask of some splits; list everything that is wrong.

    Labels are opened: on a target this is an inspection by a person, and no part of training.

    Args:
        domain: what to go through.
        splits: which splits; None takes all. Those that the domain does not have are reported as absent.
        progress: called after each picture.

    Raises:
        DataError: the domain has none of the splits, or the same is wrong with all that it has: the settings or the
            folder as a whole; the message is that of the first.
    """
    reports: list[SplitReport] = []
    absent: dict[Split, str] = {}
    faults: list[DataError] = []
    for split in SPLITS if splits is None else splits:
        try:
            items = domain.items(split)
        except SplitError as error:
            absent[split] = str(error)
        except DataError as error:
            faults.append(error)
            problem = Problem(image="", sentence=str(error))
            reports.append(SplitReport(split=split, images=0, labeled=0, problems=(problem,)))
        else:
            reports.append(_checked(domain, split, items, progress))
    if faults and len(faults) == len(reports) and len({str(fault) for fault in faults}) == 1:
        raise faults[0]
    if not reports:
        raise SplitError(next(iter(absent.values()), "no split was asked for; name one of train, val, test"))
    return Report(domain=domain.name, splits=tuple(reports), absent=absent)


def class_counts(domain: Domain, item: Item) -> NDArray[np.int64]:
    """Number of pixels of each class in an item's label, (K,); ignored ones are not counted.

    Raises:
        DataError: the label cannot be read.
    """
    return _counts(domain, item)[: len(domain.classes)]


def max_value_error(domain: Domain, item: Item, image: Array) -> str | None:
    """The sentence for an image (H, W, C) brighter than its domain's peak; None where all is well."""
    if image.dtype.kind == "u" and np.iinfo(image.dtype).max <= domain.max_value:
        return None
    highest = image.max()
    if highest <= domain.max_value:
        return None
    return (
        f"{place(item)} holds {highest:g}, above the domain's max_value {domain.max_value:g}; "
        "correct max_value or the file"
    )


def place(item: Item) -> str:
    """An item as words for a message: its file, or its name where it is drawn."""
    return str(item.image) if isinstance(item.image, Path) else item.name


def _counts(domain: Domain, item: Item) -> NDArray[np.int64]:
    counted: NDArray[np.int64] = np.bincount(domain.read_label(item).ravel(), minlength=256).astype(np.int64)
    return counted


def _checked(
    domain: Domain, split: Split, items: Sequence[Item], progress: Callable[[Item], None] | None
) -> SplitReport:
    problems: list[Problem] = []
    counts = np.zeros(256, np.int64)
    sizes: Counter[str] = Counter()
    bands: Counter[int] = Counter()
    dtypes: Counter[str] = Counter()
    empty = unread = 0
    for name, times in Counter(item.name for item in items).items():
        if times > 1:
            problems.append(Problem(image=name, sentence=f"{times} pictures are called {name}; rename all but one"))
    for item in items:
        for sentence in _check_image(domain, item, sizes, bands, dtypes):
            problems.append(Problem(image=item.name, sentence=sentence))
        unread += _leaves_opacity(domain, item)
        if item.label is not None:
            try:
                found = _counts(domain, item)
            except DataError as error:
                if str(error) not in {problem.sentence for problem in problems[-1:]}:
                    problems.append(Problem(image=item.name, sentence=str(error)))
            else:
                counts += found
                empty += int(found[IGNORE] == found.sum())
        if progress is not None:
            progress(item)
    known = counts[: len(domain.classes)]
    return SplitReport(
        split=split,
        images=len(items),
        labeled=sum(item.label is not None for item in items),
        problems=tuple(problems),
        shares=dict(zip(domain.classes.names, (known / max(known.sum(), 1)).tolist(), strict=True))
        if counts.any()
        else {},
        ignored=float(counts[IGNORE] / max(counts.sum(), 1)),
        sizes=dict(sizes.most_common()),
        bands=dict(bands.most_common()),
        dtypes=dict(dtypes.most_common()),
        empty=empty,
        unread=unread,
    )


def _leaves_opacity(domain: Domain, item: Item) -> bool:
    """Whether a picture's file marks a last band as opacity that the domain does not read."""
    if not isinstance(item.image, Path):
        return False
    try:
        found = read_header(item.image)
    except OverflyError:
        return False  # said already
    return found.alpha and domain.bands < found.bands


def _check_image(
    domain: Domain, item: Item, sizes: Counter[str], bands: Counter[int], dtypes: Counter[str]
) -> Iterator[str]:
    """Count what an image is; yield what is wrong with it."""
    try:
        image = domain.read_image(item)
    except DataError as error:
        yield str(error)
        return
    sizes[f"{image.shape[1]}×{image.shape[0]}"] += 1
    bands[image.shape[2]] += 1
    dtypes[str(image.dtype)] += 1
    above = max_value_error(domain, item, image)
    if above is not None:
        yield above
    elif image.min() == image.max():
        yield f"{place(item)} is one color throughout; take it away, or export it again"
