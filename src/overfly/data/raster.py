"""Dataset of whole rasters of any size, with labels in a vector file or in rasters; nothing is cut into files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from pydantic import Field, field_validator, model_validator

from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Counts, Item, UInt8
from overfly.core.spec import Meters, NonNegativeInt, Pixels
from overfly.data import listing, reading
from overfly.data.domain import SPLITS, Split
from overfly.data.folder import SplitShare, UserDomain, check_split
from overfly.data.headers import ImageHeader, file_stamp, is_address, keep_raster, read_raster_header
from overfly.data.raster_grid import Assignment, Grid, assign_splits, open_grid, split_pixels
from overfly.data.raster_labels import VECTOR_FORMATS, VectorFile, converted_labels, labels_key, open_vector
from overfly.data.reading import Mask, may_lack_data, raster_bands
from overfly.data.sampling import crop
from overfly.ops.windows import Window


class Raster(UserDomain, name="raster"):
    """The user's own rasters of any size, such as orthomosaics, with labels as polygons or rasters.

    * Format: GeoTIFF, COG, JPEG 2000, VRT and other files that `folder` reads, and addresses that GDAL reads
      (``https://…``, ``s3://…``); a VRT may name files only.
    * Labels: polygons in a GeoPackage, GeoJSON, Shapefile or FlatGeobuf (extra ``vector``), or rasters of numbers or
      colors on any grid; none for a target. They are converted once, window by window, to class ids on the grid of the
      image, and stored compressed in the cache.
    * Items: blocks of about ``block`` pixels that have data and touch the area. Training crops lie anywhere around a
      block, and show no pixel of other splits; scores use each pixel of a block once.
    * Bands, resolution, classes, license: see the settings; ``overfly data check`` verifies them.
    """

    title: str = "Raster"
    """Name in tables and run folders."""
    images: str | tuple[str, ...]
    """Rasters: files, folders, globs, addresses, or a list of these."""
    labels: str | tuple[str, ...] | None = None
    """A vector file, or rasters (as ``images``; the first with a class counts); none: no labels."""
    layer: str | None = None
    """Layer of the vector file, if it has several."""
    attribute: str | None = None
    """Attribute of the polygons that holds the class: its name, a key of ``mapping``, or a number in ``ids``; polygons
    without a value are ignored. Not needed for a single class besides the background."""
    all_touched: bool = False
    """Burn all pixels that a polygon touches, not only those whose center lies in it."""
    overlap: Literal["last", "smallest"] = "last"
    """Which of overlapping polygons counts: the last in the file, or the smallest."""
    background: str | None = None
    """Class of pixels in no polygon; none: they are ignored."""
    area: Path | None = None
    """Vector file of the area where labels are complete, or to adapt to; pixels outside are ignored."""
    resolution: Meters | None = None
    """Length of a pixel on the ground that rasters are resampled to on reading, in meters; none: unchanged."""
    splits: dict[Split, SplitShare] = Field(default_factory=dict)
    """Share of the blocks in each split, such as ``{train: 0.8, val: 0.2}``; default: all blocks are for training."""
    block: Pixels = Field(default=512, ge=32)
    """Side of the blocks that are assigned to splits, in pixels after resampling."""
    gap: NonNegativeInt = 64
    """Pixels beside a block of val or test that training leaves out, and beside one of test that val leaves out."""
    seed: NonNegativeInt = 0
    """Seed of the assignment of blocks to splits."""

    @field_validator("mapping", mode="before")
    @classmethod
    def _numbers_as_text(cls, value: Any) -> Any:
        """Accept numbers as values of an attribute."""
        return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check_raster(self) -> Self:
        if sum(self.splits.values()) > 1 + 1e-9:
            raise ValueError(f"the shares of the splits add up to {sum(self.splits.values()):g}, more than 1")
        if self.gap > self.block:
            raise ValueError(f"gap is {self.gap}, more than the side {self.block} of a block; make it smaller")
        if self.background is not None and self.background not in self.classes.names:
            raise ValueError(f"background is {self.background}, which is not one of the classes")
        if self.has_polygons and not isinstance(self.labels, str):
            raise ValueError("labels holds several files, one of them a vector file; give one vector file")
        return self

    def _label_names(self) -> set[str]:
        return super()._label_names() | (set(self.mapping) if self.has_polygons or self.labels is None else set())

    @property
    def has_polygons(self) -> bool:
        """Whether the labels are polygons."""
        files = (self.labels,) if isinstance(self.labels, str) else self.labels or ()
        return any(Path(file).suffix.lower() in VECTOR_FORMATS for file in files)

    @property
    def gsd(self) -> float | None:
        """Length of a pixel on the ground in meters."""
        try:
            return self.resolution or self.grids()[0].gsd
        except DataError:  # the network is used where the rasters are not
            return None

    def label_files(self) -> list[str]:
        """Return the files and addresses of the labels; raise `DataError` if there are none."""
        return _find(self.labels or (), "labels")

    def grids(self) -> tuple[Grid, ...]:
        """Open the rasters; raise `DataError` if one cannot be read or their bands differ."""
        sources = _find(self.images, "images")
        headers = {source: read_raster_header(source) for source in sources}
        bands = {header.bands - header.alpha: source for source, header in headers.items()}
        if len(bands) > 1:
            found = ", ".join(f"{source} has {count}" for count, source in bands.items())
            raise DataError(f"the rasters differ in their number of bands: {found}; give rasters of one sensor")
        return tuple(open_grid(source, file_stamp(source), self.block, self.resolution) for source in sources)

    def open_area(self) -> VectorFile | None:
        """Open the file of the area; raise `DataError` if it cannot be read or overlaps no raster."""
        return None if self.area is None else open_vector(self.area, None, self.grids())

    def assignments(self) -> list[tuple[Grid, Assignment]]:
        """Return each raster with the splits of its blocks; raise `DataError` if a split would get none."""
        grids, area = self.grids(), self.open_area()
        usable = [_usable_blocks(grid, self.bands, self.nodata, area) for grid in grids]
        if not any(blocks.any() for blocks in usable):
            inside = f" in the polygons of {self.area}" if self.area else ""
            raise DataError(f"{grids[0].source} has no pixel with data{inside}; correct nodata or area")
        try:
            return list(zip(grids, assign_splits(usable, self.splits or {"train": 1.0}, self.seed), strict=True))
        except DataError as error:
            size = f"{grids[0].width}×{grids[0].height} pixels, and block is {self.block}"
            raise DataError(f"{grids[0].source} has {size}: {error}; set a smaller block") from None

    def items(self, split: Split) -> Sequence[Item]:
        """Return the blocks of a split, row by row.

        Raises `SplitError`: the settings do not define the split, and `DataError`: a raster or the area cannot be read,
        or no block has data.
        """
        check_split(split, self.splits, f"raster {self.title}")
        items, number, area = [], SPLITS.index(split), self.open_area()
        for index, (grid, assigned) in enumerate(self.assignments()):
            key = "" if self.labels is None else labels_key(self, grid)
            for row, column in np.argwhere(assigned == number).tolist():
                name = f"{index}_{Path(grid.source).stem}_{row}_{column}"
                block = Block(name, grid, row, column, number, key, assigned, area, self)
                items.append(Item(name, block, None if self.labels is None else block.label))
        return items

    def overview(self, grid: Grid, assigned: Assignment, side: int) -> tuple[Array, UInt8, UInt8 | None]:
        """Read a raster at a longer side of ``side`` pixels: image (H, W, C), number of the split, label (H, W)."""
        step = max(1.0, max(grid.height, grid.width) / side)
        shape = (max(1, int(grid.height / step)), max(1, int(grid.width / step)))
        rows, columns = (((np.arange(count) + 0.5) * step).astype(np.int64) for count in shape)
        splits: UInt8 = np.full(shape, IGNORE, np.uint8)
        for number in range(len(SPLITS)):
            splits[split_pixels(grid, assigned, number, (rows, columns), self.gap)] = number
        label = None
        if self.labels is not None:
            with keep_raster(converted_labels(self, grid, labels_key(self, grid))[0]) as dataset:
                label = dataset.read(1, out_shape=shape)
        return grid.read(None, self.bands, self.nodata, shape)[0], splits, label

    def known_counts(self, items: Sequence[Item]) -> Counts | None:
        """Count the labeled pixels of each class of blocks, from the index that is made with their labels."""
        blocks = [item.image for item in items if isinstance(item.image, Block) and item.label is not None]
        return np.stack([block.labels[1][block.row, block.column] for block in blocks]) if blocks else None

    def value_ids(self) -> dict[str, int]:
        """Class id of each value of the attribute, as text."""
        names = {name: name for name in (*self.classes.names, *self.mapping)}
        names |= {str(number): name for name, numbers in self.ids.items() for number in numbers}
        classes = {value: self.mapping.get(name, name) for value, name in names.items()}
        table = {value: IGNORE if name is None else self.classes.index(name) for value, name in classes.items()}
        return {str(value): IGNORE for value in self.ignore} | table

    def nodata_mask(self, item: Item) -> Mask | None:
        """Pixels of a block without data or outside the area (H, W), None if there are none."""
        block = cast("Block", item.image)
        return block.missing(block.window)

    def read_crop(
        self, item: Item, size: int, random: np.random.Generator, fits: Callable[[UInt8], bool]
    ) -> tuple[Array, UInt8] | None:
        """Read a crop around a block: the first of ten places full of its split's data that fits, or the best."""
        block, best = cast("Block", item.image), None
        for _ in range(10):
            window = block.random_window(size, random)
            own = block.own_pixels(window)
            label = np.where(own, 0, IGNORE).astype(np.uint8) if item.label is None else block.read_label(window, own)
            rank = (fits(label), float(own.mean()))
            if best is not None and rank <= best[0]:
                continue
            image, missing = block.read(window)
            own = own if missing is None else own & ~missing
            rank = (rank[0], float(own.mean()))
            if best is None or rank > best[0]:
                best = rank, image, label, own
            if rank == (True, 1.0):
                break
        if best is None:
            return None
        _, image, label, own = best
        image[~own], label[~own] = 0, IGNORE
        return crop(image, label, size, random, lambda _: True)


@dataclass(frozen=True)
class Block:
    """A block of a raster; called, it reads its image (H, W, C).

    Attributes:
        row, column: place of the block in the grid.
        split: number of its split in `SPLITS`.
        key: of the converted labels; empty without labels.
        assigned: splits of all blocks of the raster.
        area: pixels outside are ignored; None: all count.
    """

    name: str
    grid: Grid
    row: int
    column: int
    split: int
    key: str
    assigned: Assignment = field(compare=False, repr=False)
    area: VectorFile | None = field(compare=False, repr=False)
    domain: Raster = field(compare=False, repr=False)

    @property
    def window(self) -> Window:
        """The pixels of the block."""
        return self.grid.block(self.row, self.column)

    @property
    def header(self) -> ImageHeader:
        """Header of the block, as if it were a file."""
        place, (_, _, height, width) = self.grid.transform and self.grid.geotransform(self.window), self.window
        return read_raster_header(self.grid.source)._replace(height=height, width=width, transform=place)

    @property
    def stamp(self) -> object:
        """What changes with the raster or its labels."""
        return self.grid.stamp, self.key

    @property
    def labels(self) -> tuple[Path, Counts]:
        """The class ids of the raster as a file, and the pixels of each class by block; see `converted_labels`."""
        return converted_labels(self.domain, self.grid, self.key)

    def __call__(self) -> Array:
        """Read the image (H, W, C)."""
        return self.read(self.window)[0]

    def label(self) -> UInt8:
        """Read the class ids (H, W), 255 for no data."""
        label, missing = self.read_label(self.window, self.own_pixels(self.window)), self.missing(self.window)
        if missing is not None:
            label[missing] = IGNORE
        return label

    def read(self, window: Window) -> tuple[Array, Mask | None]:
        """Read the image (H, W, C) of a window, and which pixels have no data or lie outside the area (H, W)."""
        image, missing = self.grid.read(window, self.domain.bands, self.domain.nodata)
        outside = None if self.area is None else ~self.area.mask(self.grid, window)
        return image, reading.union(missing, outside)

    def missing(self, window: Window) -> Mask | None:
        """Pixels of a window without data or outside the area (H, W); None: none."""
        if self.area or may_lack_data(raster_bands(self.grid.source, self.domain.bands, self.domain.nodata)):
            return self.read(window)[1]
        return None

    def read_label(self, window: Window, own: Mask) -> UInt8:
        """Read the class ids of a window (H, W), 255 outside ``own``."""
        with keep_raster(self.labels[0]) as dataset:
            label: UInt8 = dataset.read(1, window=window.ranges)
        label[~own] = IGNORE
        return label

    def own_pixels(self, window: Window) -> Mask:
        """Pixels of a window (H, W) in the block's split; all without splits."""
        if not self.domain.splits:
            return np.ones((window.height, window.width), np.bool_)
        rows, columns = (np.arange(*limits) for limits in window.ranges)
        return split_pixels(self.grid, self.assigned, self.split, (rows, columns), self.domain.gap)

    def random_window(self, size: int, random: np.random.Generator) -> Window:
        """Draw a window of ``size`` whose center lies in the block, shifted into the raster."""
        whole, starts = (self.grid.height, self.grid.width), []
        for length, (first, end) in zip(whole, self.grid.block(self.row, self.column).ranges, strict=True):
            starts.append(min(max(0, int(random.integers(first, end)) - size // 2), max(0, length - size)))
        return Window(starts[0], starts[1], min(size, whole[0]), min(size, whole[1]))


_usable_blocks = lru_cache(maxsize=4096)(Grid.usable_blocks)


def _find(entries: str | tuple[str, ...], setting: str) -> list[str]:
    """Files and addresses of a setting, in natural order within each entry."""
    found: dict[str, None] = {}
    for entry in (entries,) if isinstance(entries, str) else entries:
        files = [entry] if is_address(entry) else [*listing.match_files(Path(), str(Path(entry).expanduser())).values()]
        if not files:
            raise DataError(f"{entry} does not exist, or matches no file; correct {setting}")
        found |= dict.fromkeys(map(str, files))
    return list(found)
