"""Load batches from domains, with a cache of decoded images. A batch is a function of (seed, step) alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from overfly.core.atomic_files import TRAILER_BYTES, append_digest, atomic_write, has_digest, json_sha256
from overfly.core.errors import DataError, OverflyError, RecipeError
from overfly.core.records import IGNORE, Array, Batch, Counts, Item, Labeled, LazyArray, UInt8
from overfly.data.check import check_max_value, class_counts, item_source
from overfly.data.domain import Domain
from overfly.data.headers import file_stamp, read_header
from overfly.data.sampling import SampleSlot, Sampling, crop

MAX_MEMORY_BYTES = 2 * 2**30
"""Largest size of the decoded images of a domain that a process caches in memory."""
MAX_SIDE = 16_384
"""Largest crop or resize, in pixels."""
MAX_CROP_RATIO = 8
"""Largest ratio of a crop to the longer side of its image; the rest is mirrored."""
CACHE_VERSION = 3
"""Version of the content of cache entries; entries of other versions are not read."""
_VERIFIED: dict[Path, tuple[int, int]] = {}
"""Size and time of the cache entries whose digest this process has checked."""


@dataclass
class BatchStream:
    """Loads the samples of one domain for every batch.

    Attributes:
        items: items of one split; without labels for a target.
        batch: images in a step, over all ranks.
        crop: side of the square crop, in pixels.
        resize: side that images are first resized to, or None.
        seed, key: seed of the run, and number of the stream: the streams of one run differ by it.
        cache: folder of decoded images, "memory" (up to `MAX_MEMORY_BYTES`), or None.
        counts: labeled pixels of each class in each image, if the sampling needs them; None reads every mask.
        labeled: require a mask for every image, and a labeled pixel in at least one mask.

    Raises `RecipeError`: crop or resize is out of range, and `DataError`: there are no images, or no labels where there
    must be some.
    """

    domain: Domain
    items: Sequence[Item]
    sampling: Sampling
    batch: int
    crop: int
    resize: int | None
    seed: int
    key: int
    cache: Path | str | None = None
    counts: Counts | None = None
    labeled: bool = False
    _memory: dict[str, tuple[Array, UInt8]] = field(default_factory=dict, repr=False)
    _bytes: int = 0
    _checked: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"the {self.domain.name} domain has no images in this split; check its folders")
        for setting, side in (("crop", self.crop), ("resize", self.resize)):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise RecipeError(f"{setting} must be 1 to {MAX_SIDE} pixels, got {side}")
        if self.labeled or self.sampling.needs_counts:
            self._check_labels()

    def _check_labels(self) -> None:
        known = self.domain.known_counts(self.items) if self.counts is None else None
        if known is not None and known.any():  # blocks without labels teach nothing
            self.items = [item for item, count in zip(self.items, known, strict=True) if count.any()]
            self.counts = known[known.any(axis=1)]
        without = [item for item in self.items if item.label is None]
        if without and self.labeled:
            raise DataError(
                f"the source {self.domain.title} has no masks for {len(without)} of {len(self.items)} images, the "
                f"first {item_source(without[0])}; set source.masks, or source.labels"
            )
        if without and self.counts is None:
            raise DataError(
                f"sampling {self.sampling.name!r} needs labels, and {item_source(without[0])} has none; make it uniform"
            )
        if self.sampling.needs_counts and self.counts is None:
            self.counts = np.stack([class_counts(self.domain, item) for item in self.items])
        counts = (class_counts(self.domain, item) for item in self.items) if self.counts is None else self.counts
        if not any(count.any() for count in counts):
            raise DataError(
                f"the masks of {self.domain.title} are ignored in every pixel of all {len(self.items)} images, the "
                f"first {item_source(self.items[0])}; correct the masks or the domain's settings"
            )

    def select(self, step: int, slots: Sequence[int]) -> list[tuple[Item, int]]:
        """Select the items of a step, each with the class it was selected for (-1: none)."""
        seed, count = self.seed * 16 + self.key, len(self.items)
        sample_slots = [SampleSlot(seed, step, slot, self.batch, count) for slot in slots]
        choices = [self.sampling.choose_image(slot, self.counts) for slot in sample_slots]
        return [(self.items[index], class_id) for index, class_id in choices]

    def read(self, step: int, slots: Sequence[int]) -> Labeled:
        """Read images (B, C, crop, crop) in the sensor's range, and labels (B, crop, crop), of some slots of a step.

        An item without a label is `IGNORE` everywhere.
        """
        batch = self._read_crops(step, slots)
        without = [index for index, (item, _) in enumerate(self.select(step, slots)) if item.label is None]
        batch.label[without] = IGNORE
        return batch

    def read_unlabeled(self, step: int, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read images (B, C, crop, crop) and no-data masks (B, crop, crop); raise `ValueError` if one has a label."""
        if any(item.label is not None for item, _ in self.select(step, slots)):
            raise ValueError("the target's items have labels; remove them by without_labels")
        batch = self._read_crops(step, slots)
        return batch.image, batch.label == IGNORE

    def _read_crops(self, step: int, slots: Sequence[int]) -> Labeled:
        images, labels = [], []
        try:
            for slot, (item, class_id) in zip(slots, self.select(step, slots), strict=True):
                random = np.random.default_rng([self.seed, self.key, step, slot])
                fits = partial(self.sampling.fits, class_id=class_id)
                part = None if self.resize else self.domain.read_crop(item, self.crop, random, fits)
                image, label = self._crop(item, random, fits) if part is None else part
                if part is not None:
                    check_max_value(self.domain, item, image)
                images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)))
                labels.append(torch.from_numpy(np.ascontiguousarray(label, np.int64)))
            return Labeled(torch.stack(images), torch.stack(labels))
        except MemoryError:
            raise RecipeError(
                f"images of batch {self.batch} and crop {self.crop} do not fit into memory; make one of them smaller"
            ) from None

    def _crop(self, item: Item, random: np.random.Generator, fits: Callable[[UInt8], bool]) -> tuple[Array, UInt8]:
        image, label = self._open(item)
        longer = max(image.shape[:2])
        if self.crop > MAX_CROP_RATIO * longer:
            raise RecipeError(
                f"crop is {self.crop}, more than {MAX_CROP_RATIO} times the longer side {longer} of "
                f"{item_source(item)}; set crop to {longer} or less"
            )
        return crop(image, label, self.crop, random, fits)

    def _open(self, item: Item) -> tuple[Array, UInt8]:
        """Image and label; without a mask, `IGNORE` where the image has no data and 0 elsewhere."""
        if item.name in self._memory:
            return self._memory[item.name]
        folder = Path(self.cache) if self.cache not in (None, "memory") else None
        image, label = open_image(self.domain, item, self.resize, folder)
        if item.name not in self._checked:
            check_max_value(self.domain, item, image)
            self._checked.add(item.name)
        if label is None:
            label = nodata_label(self.domain, item, self.resize, folder)
        if label is None:
            label = np.zeros(image.shape[:2], np.uint8)
        if self.cache == "memory" and self._bytes < MAX_MEMORY_BYTES:
            self._memory[item.name] = image, label
            self._bytes += image.nbytes + label.nbytes
        return image, label


class BatchDataset(Dataset[Batch | OverflyError]):
    """The batches of a rank, by step; images of ``labels`` follow those of the source."""

    def __init__(
        self, source: BatchStream | None, target: BatchStream | None, rank: int = 0, world: int = 1,
        labels: BatchStream | None = None,
    ) -> None:  # fmt: skip
        self.source, self.target, self.rank, self.world = source, target, rank, world
        self.labeled = [stream for stream in (source, labels) if stream is not None]

    def __getitem__(self, step: int) -> Batch | OverflyError:
        """Load the batch of a step; errors are returned, since worker processes would raise them in another form."""
        try:
            return self.batch(step)
        except OverflyError as error:
            return error

    def batch(self, step: int) -> Batch:
        """Load the batch of a step; raise `OverflyError` if an image cannot be read."""
        empty = Labeled(torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, dtype=torch.int64))
        parts = [stream.read(step, slots) for stream in self.labeled if (slots := self._slots(stream))]
        source = Labeled(*map(torch.cat, zip(*parts, strict=True))) if parts else empty
        if self.target is None:
            return Batch(source, empty.image)
        images, nodata_mask = self.target.read_unlabeled(step, self._slots(self.target))
        return Batch(source, images, nodata_mask if bool(nodata_mask.any()) else None)

    def names(self, step: int) -> list[str]:
        """Names of the images that this rank loads in a step."""
        streams = [*self.labeled, *([self.target] if self.target else [])]
        return [item.name for stream in streams for item, _ in stream.select(step, self._slots(stream))]

    def _slots(self, stream: BatchStream) -> list[int]:
        return list(range(self.rank, stream.batch, self.world))


def batch_loader(
    steps: BatchDataset, start: int, stop: int, *, workers: int, pin: bool
) -> DataLoader[Batch | OverflyError]:
    """Load the batches of the steps from ``start`` up to ``stop`` in ``workers`` processes (0: in the caller's)."""
    return DataLoader(
        steps, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin,
        prefetch_factor=2 if workers else None,
    )  # fmt: skip


def open_image(
    domain: Domain, item: Item, resize: int | None = None, cache: Path | None = None
) -> tuple[Array, UInt8 | None]:
    """Read the image (H, W, C), in the sensor's type and range, and the label (H, W) of an item, or None.

    The arrays may be written to: entries of the folder ``cache`` are mapped copy-on-write. Generated images are not
    cached. Several processes may share a cache folder. ``resize`` is the side in pixels of the square that images are
    resized to. Raises `DataError`: a file cannot be read, or the cache cannot be written.
    """
    image = _read(domain, resize, cache, "image", lambda: domain.read_image(item), item.image)
    if item.label is None:
        return image, None
    return image, _read(domain, resize, cache, "label", lambda: domain.read_label(item), item.label, item.image)


def nodata_label(domain: Domain, item: Item, resize: int | None = None, cache: Path | None = None) -> UInt8 | None:
    """Label of an item without a mask (H, W): `IGNORE` where the image has no data, else 0; None if all have data.

    Arguments and errors are those of `open_image`.
    """

    def label() -> UInt8:
        nodata_mask = domain.nodata_mask(item)
        return np.zeros((0, 0), np.uint8) if nodata_mask is None else np.where(nodata_mask, IGNORE, 0).astype(np.uint8)

    result = _read(domain, resize, cache, "nodata", label, item.image)
    return result if result.size else None


def _read(
    domain: Domain, side: int | None, cache: Path | None, kind: str, read: Callable[[], Array],
    *sources: Path | LazyArray,
) -> Array:  # fmt: skip
    """Read and resize an image or label, or load it from the cache."""

    def make() -> Array:
        array = read()
        resize = resize_image if array.ndim == 3 else resize_label
        return array if side is None or not array.size else resize(array, side)

    return make() if cache is None else cached_entry(cache, _key(domain, side, kind, *sources), make)


def resize_image(image: Array, side: int) -> Array:
    """Resize an image (H, W, C) of any type to (side, side, C): bilinear, averaged over the area when shrinking."""
    if image.shape[:2] == (side, side):
        return image
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    bands = (Image.fromarray(np.ascontiguousarray(band, np.float32)) for band in np.moveaxis(image, -1, 0))
    resized = np.stack([np.asarray(band.resize((side, side), Image.Resampling.BILINEAR)) for band in bands], axis=-1)
    if image.dtype.kind == "f":
        return resized.astype(image.dtype)
    limits = np.iinfo(image.dtype)
    return resized.round().clip(limits.min, limits.max).astype(image.dtype)


def resize_label(label: UInt8, side: int) -> UInt8:
    """Resize a label (H, W) to (side, side) by nearest neighbor."""
    if label.shape == (side, side):
        return label
    return np.array(Image.fromarray(label).resize((side, side), Image.Resampling.NEAREST))


def estimate_cache_bytes(domain: Domain, items: Sequence[Item], resize: int | None = None) -> int:
    """Estimate the cached bytes of items from their headers; raise `DataError` if a file cannot be read."""
    total = 0
    for item in items:
        if not isinstance(item.image, Path):
            continue
        header = read_header(item.image)
        pixels = header.height * header.width if resize is None else resize * resize
        masks = isinstance(item.label, Path)
        total += pixels * (domain.bands * np.dtype(header.dtype).itemsize + masks) + (128 + TRAILER_BYTES) * (1 + masks)
    return total


def _key(domain: Domain, resize: int | None, kind: str, *sources: Path | LazyArray) -> str | None:
    """Hash of everything that an entry depends on; None if a source is generated or missing."""
    stamps: list[object] = []
    for source in sources:
        if not isinstance(source, Path):
            return None
        try:
            stamps.append((str(source.resolve()), *file_stamp(source)[::-1]))
        except OSError:
            return None
    return json_sha256([CACHE_VERSION, kind, resize, type(domain).__qualname__, domain.model_dump(mode="json"), stamps])


def cached_entry(cache: Path, key: str | None, make: Callable[[], Array]) -> Array:
    """Load the entry ``key``; create it if it is missing or damaged."""
    if key is None:
        return make()
    path = cache / key[:2] / f"{key}.npy"
    entry = _load(path, key)
    if entry is None:
        _save(path, key, make())
        entry = _load(path, key)
    if entry is None:
        raise DataError(f"{path} was written and cannot be read back; check the disk, or train without a cache")
    return entry


def _load(path: Path, key: str) -> Array | None:
    """Map an entry into memory; None if it is missing, or its content is not that of its digest and key."""
    try:
        stamp = file_stamp(path)
        if _VERIFIED.get(path) != stamp and not has_digest(path, key):
            return None
        _VERIFIED[path] = stamp
        entry: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError):
        return None
    return entry


def _save(path: Path, key: str, entry: Array) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part, part.open("w+b") as file:
            np.save(file, entry, allow_pickle=False)
            append_digest(file, key)
    except OSError as error:
        raise DataError(
            f"the cache {path.parent.parent} cannot be written ({error.strerror}); free space, or train without it"
        ) from None
