"""Check the files of a domain, and compute statistics of its masks and bands."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from overfly.core.errors import DataError, OverflyError, RecipeError, render_text
from overfly.core.records import IGNORE, Array, Item, UInt8
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, PositiveInt, Share, Spec
from overfly.data.domain import SPLITS, Domain, Split, SplitError, UnknownCodesError, absent_classes, sample_evenly
from overfly.data.headers import read_header

Float64 = NDArray[np.float64]
MAX_FRACTION = 16.0
"""Maximum value below which a network was trained on fractions, such as reflectances of 0 to 1."""
REPORT = Path(__file__).with_name("check_report.txt.jinja")
TURNS: dict[str, Callable[[UInt8], UInt8]] = {
    "rotated by 180°": lambda label: label[::-1, ::-1],
    "upside down": lambda label: label[::-1],
    "mirrored": lambda label: label[:, ::-1],
}
"""Turns of a label that keep its size."""
TURN_MARGIN = 1.25
"""Ratio of edge strengths above which a turn is clearly better."""
MIN_TURNED, MIN_TURNED_SHARE = 3, 0.25
"""Masks, and share of a split's images, from which masks that fit better when turned are a problem."""


class FileProblem(Spec):
    """A problem of one image or mask."""

    image: str
    """Name of the image; empty if the problem concerns the whole split."""
    message: str
    """The file, the problem, and how to correct it."""


class SplitReport(Spec):
    """Contents of a split. Shares, sizes and types cover the files that could be read."""

    split: Split
    """Name of the split."""
    images: NonNegativeInt
    """Number of images."""
    labeled: NonNegativeInt
    """Number of images with a mask."""
    problems: tuple[FileProblem, ...] = ()
    """All problems, in the order of the images."""
    shares: dict[str, Share] = Field(default_factory=dict)
    """Share of each class among the labeled pixels."""
    ignored: Share = 0.0
    """Share of ignored pixels among all pixels of the masks."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Number of images of each size, width×height, most frequent first."""
    bands: dict[int, int] = Field(default_factory=dict)
    """Number of images by number of bands."""
    dtypes: dict[str, int] = Field(default_factory=dict)
    """Number of images by pixel type."""
    notes: tuple[str, ...] = ()
    """What may be intended."""
    unread_alpha: NonNegativeInt = 0
    """Images with an alpha band that the domain does not read."""
    empty: NonNegativeInt = 0
    """Masks in which every pixel is ignored."""

    @property
    def faults(self) -> list[list[FileProblem]]:
        """The problems, grouped by messages that differ in paths and numbers only."""
        alike: dict[str, list[FileProblem]] = {}
        for problem in self.problems:
            alike.setdefault(re.sub(r"\S*[/\\]\S+|[-\d.]+", "", problem.message), []).append(problem)
        return list(alike.values())


class DomainReport(Spec):
    """Contents of a domain."""

    domain: str
    """Name of the domain's kind."""
    splits: tuple[SplitReport, ...]
    """Reports of the splits that exist."""
    absent: dict[Split, str] = Field(default_factory=dict)
    """Splits that do not exist, each with the reason."""
    digests: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)
    """Split and name of an image by the digest of its pixels."""

    @property
    def problems(self) -> tuple[FileProblem, ...]:
        """Problems of all splits."""
        return tuple(problem for split in self.splits for problem in split.problems)

    def __str__(self) -> str:
        """The report as text, one fact a line."""
        return render_text(REPORT, report=self).rstrip("\n")


def check(domain: Domain, splits: Sequence[Split] | None = None) -> DomainReport:
    """Read every image and mask of some splits, None: of all, and report all problems. Opens the labels.

    Splits that the domain does not have are reported as absent. Raises `DataError` if it has none of the splits, or all
    its splits fail with the same message.
    """
    reports: list[SplitReport] = []
    absent: dict[Split, str] = {}
    errors: list[DataError] = []
    digests: dict[str, str] = {}
    for split in SPLITS if splits is None else splits:
        try:
            items = domain.items(split)
        except SplitError as error:
            absent[split] = str(error)
        except DataError as error:
            errors.append(error)
            problem = FileProblem(image="", message=str(error))
            reports.append(SplitReport(split=split, images=0, labeled=0, problems=(problem,)))
        else:
            reports.append(_check_split(domain, split, items, digests))
    if errors and len(errors) == len(reports) and len({str(error) for error in errors}) == 1:
        raise errors[0]
    if not reports:
        raise SplitError(next(iter(absent.values()), "splits must name at least one of train, val, test"))
    return DomainReport(domain=domain.name, splits=tuple(reports), absent=absent, digests=digests)


def class_counts(domain: Domain, item: Item) -> NDArray[np.int64]:
    """Count the pixels of each class in an item's label (K,); raise `DataError` if it cannot be read."""
    return np.bincount(domain.read_label(item).ravel(), minlength=256)[: len(domain.classes)]


def check_max_value(domain: Domain, item: Item, image: Array) -> None:
    """Raise `DataError` if an image (H, W, C) has values above the domain's ``max_value``, or far below it."""
    fractions = image.dtype.kind == "f" and domain.max_value > MAX_FRACTION and 0 < image.max() <= 1
    if fractions or (image.dtype == np.uint8 and domain.max_value > 255):
        found = f"{image.dtype} up to {image.max():g}, and max_value is {domain.max_value:g}"
        raise DataError(f"{item_source(item)} holds {found}; set max_value to {1 if fractions else 255}")
    within = image.dtype.kind == "u" and np.iinfo(image.dtype).max <= domain.max_value
    if not (within or (highest := image.max()) <= domain.max_value):
        above = f"{highest:g}, above the domain's max_value {domain.max_value:g}"
        raise DataError(f"{item_source(item)} holds {above}; correct max_value or the file")


def item_source(item: Item) -> str:
    """Path of an item's image, or the item's name if the image is generated."""
    return str(item.image) if isinstance(item.image, Path) else item.name


def _check_split(domain: Domain, split: Split, items: Sequence[Item], digests: dict[str, str]) -> SplitReport:
    problems = [
        FileProblem(image=name, message=f"{count} images are called {name}; rename all but one")
        for name, count in Counter(item.name for item in items).items()
        if count > 1
    ]
    counts = np.zeros(256, np.int64)
    sizes, bands, dtypes, turned = Counter[str](), Counter[int](), Counter[str](), Counter[str]()
    empty = unread_alpha = 0
    ranges: list[tuple[Array, Array]] = []
    unknown: list[UnknownCodesError] = []
    copies: list[str] = []
    for item in items:
        image: str | Array = ""
        for image in _check_image(domain, item):
            if isinstance(image, str):
                problems.append(FileProblem(image=item.name, message=image))
                continue
            sizes[f"{image.shape[1]}×{image.shape[0]}"] += 1
            bands[image.shape[2]] += 1
            dtypes[str(image.dtype)] += 1
            ranges.append((image.min((0, 1)), image.max((0, 1))))
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
            other = digests.setdefault(digest, f"{split}: {item.name}")
            copies += [] if image.min() == image.max() or other.startswith(f"{split}: ") else [f"{item.name} ({other})"]
        if isinstance(item.image, Path):
            with suppress(OverflyError):  # reported by `_check_image`
                header = read_header(item.image)
                unread_alpha += header.alpha and domain.bands < header.bands
        if item.label is not None:
            try:
                label = domain.read_label(item)
            except UnknownCodesError as error:
                unknown.append(error)
            except DataError as error:
                if str(error) not in {problem.message for problem in problems[-1:]}:
                    problems.append(FileProblem(image=item.name, message=str(error)))
            else:
                counts += np.bincount(label.ravel(), minlength=256)
                empty += int((label == IGNORE).all())
                turn = None if isinstance(image, str) or callable(item.image) else better_turn(image, label)
                turned.update([turn] if turn else ())
    faults = _split_faults(dtypes, ranges, unknown, copies, turned, images=len(items))
    problems += [FileProblem(image="", message=text) for text in faults]
    labeled = counts[: len(domain.classes)]
    present = labeled.nonzero()[0].tolist()
    notes = [absent_classes(domain, items, present)] if counts.any() and not labeled.all() and not unknown else []
    if len(present) == 1 and notes:
        problems.append(FileProblem(image="", message=notes.pop()))
    lowest = min((low.min() for low, _ in ranges), default=0)
    if lowest < 0:
        notes.append(f"values go down to {lowest:g}, below 0; if they mean no data, set nodata")
    shares = dict(zip(domain.classes.names, (labeled / max(labeled.sum(), 1)).tolist(), strict=True))
    return SplitReport(
        split=split, images=len(items), labeled=sum(item.label is not None for item in items),
        problems=tuple(problems), shares=shares if counts.any() else {},
        ignored=float(counts[IGNORE] / max(counts.sum(), 1)), sizes=dict(sizes.most_common()),
        bands=dict(bands.most_common()), dtypes=dict(dtypes.most_common()), empty=empty, unread_alpha=unread_alpha,
        notes=tuple(notes),
    )  # fmt: skip


def _split_faults(
    dtypes: Counter[str], ranges: Sequence[tuple[Array, Array]], unknown: Sequence[UnknownCodesError],
    copies: Sequence[str], turned: Mapping[str, int], *, images: int,
) -> Iterator[str]:  # fmt: skip
    """Yield the faults of a whole split, each with the setting that mends it."""
    if len(dtypes) > 1:
        yield f"the images have the types {', '.join(dtypes)}; export all at one, since max_value is one for all"
    if len(ranges) > 1 and len({low.shape for low, _ in ranges}) == 1:
        low, high = np.min([low for low, _ in ranges], axis=0), np.max([high for _, high in ranges], axis=0)
        for band in np.flatnonzero(low == high) if (low != high).any() else ():
            yield f"band {band + 1} is {low[band]:g} in every image; leave it out, and set bands to {len(low) - 1}"
    if copies:
        yield f"{len(copies)} images are in another split too: {', '.join(copies[:5])}; correct the splits"
    for turn, count in turned.items():
        if count >= max(MIN_TURNED, MIN_TURNED_SHARE * images):
            yield f"{count} masks fit their images better {turn}; turn these images or masks"
    if unknown:
        yield UnknownCodesError.message(unknown)


def _check_image(domain: Domain, item: Item) -> Iterator[str | Array]:
    """Yield an image and its problems."""
    try:
        image = domain.read_image(item)
        yield image
        check_max_value(domain, item, image)
    except DataError as error:
        yield str(error)
        return
    if image.min() == image.max():
        advice = "remove it, or export it again" if isinstance(item.image, Path) else "if it means no data, set nodata"
        yield f"{item_source(item)} has one value in all pixels, {image.min():g}; {advice}"


def better_turn(image: Array, label: UInt8) -> str | None:
    """Return the turn, a key of `TURNS`, of a label (H, W) whose borders then lie on clearly stronger image edges.

    Images (H, W, C) are often stored with a turn that their masks do not have, or lose the tag that undoes it. None: no
    turn.
    """
    if image.shape[:2] != label.shape or min(label.shape) < 2:
        return None
    edges = np.hypot(*np.gradient(image.mean(-1)))[:-1, :-1]
    strengths = {}
    for name, turn in {"": lambda array: array, **TURNS}.items():
        turned = turn(label).astype(np.int16)
        borders = (np.diff(turned, axis=0)[:, :-1] != 0) | (np.diff(turned, axis=1)[:-1] != 0)
        strengths[name] = float(edges[borders].mean()) if borders.any() else 0.0
    best = max(strengths, key=lambda name: strengths[name])
    return best if best and strengths[best] > TURN_MARGIN * strengths[""] else None


class Statistics(Spec):
    """Statistics of each band over all pixels with data, in the images' own range."""

    mean: tuple[float, ...]
    """Mean of each band."""
    std: tuple[NonNegativeFloat, ...]
    """Standard deviation of each band, of the population."""
    minimum: tuple[float, ...]
    """Smallest value of each band."""
    maximum: tuple[float, ...]
    """Largest value of each band."""
    pixels: PositiveInt
    """Number of pixels with data."""
    images: PositiveInt
    """Number of images."""

    def __str__(self) -> str:
        """Lines to put into a recipe, under its domain."""
        rows = {"mean": self.mean, "std": self.std}
        lines = [f"{name}: [{', '.join(f'{value:.6g}' for value in values)}]" for name, values in rows.items()]
        minimum, maximum = (", ".join(f"{value:g}" for value in values) for values in (self.minimum, self.maximum))
        return "\n".join([*lines, f"# {self.images} images; minimum {minimum}; maximum {maximum}"])

    __rich__ = __str__


_Moments = tuple[int, Float64, Float64, Float64, Float64]
"""Number of pixels of an image, and mean, sum of squared deviations and range of its bands."""


def statistics(domain: Domain, split: Split, limit: int | None = None) -> Statistics:
    """Compute mean, standard deviation and range of each band of a split's images; opens no labels.

    ``limit`` is the number of images, at least 1, evenly spaced; None takes all. Raises `RecipeError` if it is below 1,
    and `DataError` if an image cannot be read, or no pixel has data.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit must be at least 1, got {limit}")
    items = sample_evenly(domain.items(split), limit)
    parts = [moments for item in items if (moments := _moments(domain, item)) is not None]
    if not parts:
        raise DataError(f"no pixel of the split {split} has data; check the no-data value of its images")
    number, means, deviations, low, high = (np.array(values) for values in zip(*parts, strict=True))
    mean = number @ means / number.sum()
    variance = (deviations.sum(0) + number @ np.square(means - mean)) / number.sum()
    return Statistics(
        mean=tuple(mean.tolist()), std=tuple(np.sqrt(variance).tolist()), minimum=tuple(low.min(0).tolist()),
        maximum=tuple(high.max(0).tolist()), pixels=int(number.sum()), images=len(items),
    )  # fmt: skip


def _moments(domain: Domain, item: Item) -> _Moments | None:
    image, nodata_mask = domain.read_image(item), domain.nodata_mask(item)
    pixels = image.reshape(-1, image.shape[-1]) if nodata_mask is None else image[~nodata_mask]
    if not len(pixels):
        return None
    mean, deviations = np.array([_band_moments(band) for band in pixels.T]).T
    return len(pixels), mean, deviations, pixels.min(axis=0), pixels.max(axis=0)


def _band_moments(values: Array) -> tuple[float, float]:
    """Mean and sum of squared deviations of a band's values (N,); a histogram is faster for integers."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values)
        levels = np.arange(len(counts), dtype=np.float64)
        mean = float(counts @ levels) / len(values)
        return mean, float(counts @ np.square(levels - mean))
    exact = values.astype(np.float64)
    mean = float(exact.mean())
    return mean, float(np.square(exact - mean).sum())
