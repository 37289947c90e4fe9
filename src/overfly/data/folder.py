"""Dataset of the user's own images, with or without masks: any naming, class encoding and split."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from overfly.core.classes import Classes, Color
from overfly.core.errors import DataError, RecipeError
from overfly.core.records import IGNORE, Item, UInt8
from overfly.core.settings import parse_yaml
from overfly.core.spec import Meters, PositiveFloat, PositiveInt
from overfly.data import listing, reading
from overfly.data.domain import SPLITS, Domain, Split, SplitError, UnknownCodesError
from overfly.data.headers import is_gray
from overfly.data.reading import GRAYS, UNKNOWN, from_colors, from_numbers, from_palette, list_codes, unknown_codes

Number = Annotated[int, Field(ge=-(2**31), lt=2**32)]
"""A number that a mask may store."""
SplitShare = Annotated[float, Field(gt=0, le=1)]
"""A share of the images."""
CodeT = TypeVar("CodeT", int, Color)
DOMAIN_SETTINGS = ("root", "title", "images", "masks", "splits")
"""Settings of a folder that the options give for each domain."""


class UserDomain(Domain):
    """Settings of the user's own imagery: classes, encoding of the labels, sensor."""

    classes: Classes
    """Names of the classes, as a list or with display colors: ``{building: [60, 16, 152], …}``; default for the target
    of a recipe: those of the source."""
    label_format: Literal["auto", "index", "rgb"] = "auto"
    """Encoding of the masks: class numbers (``index``) or colors (``rgb``); a palette image can be read either way.
    ``auto`` decides by the number of bands, and for a palette by which of ``colors`` and ``ids`` is given, or whether
    all colors of a mask are those of classes. Masks of one band are read by colors if those of all classes are grays,
    such as black and white."""
    colors: dict[str, tuple[Color, ...]] = Field(default_factory=dict)
    """Colors of each class in the masks, one or several; default: the display colors of ``classes``."""
    ids: dict[str, tuple[Number, ...]] = Field(default_factory=dict)
    """Numbers of each class in the masks, one or several; default: 0, 1, 2 … in the order of ``classes``."""
    mapping: dict[str, str | None] = Field(default_factory=dict)
    """For masks with another label set: class of each name in ``colors`` or ``ids``; null ignores it."""
    ignore: tuple[Number | Color, ...] = ()
    """Numbers and colors in the masks that are ignored; always includes 255."""
    unknown: Literal["error", "ignore"] = "error"
    """Handling of numbers and colors that are neither a class nor listed under ``ignore``."""
    bands: PositiveInt = 3
    """Number of bands of the images; an alpha band is not counted."""
    max_value: PositiveFloat = 255.0
    """Value of the brightest pixel that the sensor can give: 255 for 8 bits, 65535 for 16, 1 for most floats."""
    nodata: float | None = None
    """Value of pixels without data in the images, where the files do not declare it."""
    mean: tuple[float, ...] | None = None
    """Mean of each band, in the images' own range; computed by ``overfly data stats``."""
    std: tuple[PositiveFloat, ...] | None = None
    """Standard deviation of each band, in the images' own range."""

    @field_validator("colors", "ids", mode="before")
    @classmethod
    def _several_codes(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept one color or number in place of a list."""
        if not isinstance(value, Mapping):
            return value
        is_code = _is_color if info.field_name == "colors" else _is_number
        return {name: (entry,) if is_code(entry) else entry for name, entry in value.items()}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        known = self._label_names()
        for name in (*self.colors, *self.ids, *self.mapping):
            class_name = self.mapping.get(name, name)
            if name not in known:
                raise ValueError(f"mapping holds {name!r}, which is not in colors, ids or classes")
            if class_name is not None and class_name not in self.classes.names:
                known_names = ", ".join(self.classes.names)
                raise ValueError(f"{name!r} is not one of the classes ({known_names}); set its class in mapping")
        self._table(self.colors, self._ignored_colors(), "color")
        self._table(self.ids, self._ignored_numbers(), "number")
        for setting, values in (("mean", self.mean), ("std", self.std)):
            if (values is None) != (self.mean is None):
                raise ValueError("mean and std go together; give both or neither")
            if values is not None and len(values) != self.bands:
                raise ValueError(f"{setting} has {len(values)} numbers, and there are {self.bands} bands")
        return self

    def _label_names(self) -> set[str]:
        """Names that ``mapping`` may hold."""
        return {*self.colors, *self.ids, *self.classes.names}

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each band, where they are given."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)

    def decode(self, name: str, pixels: reading.LabelPixels) -> UInt8:
        """Convert the numbers or colors of a label, as it is stored, to class ids (H, W); its name is for messages.

        Raises `UnknownCodesError`: there are numbers or colors of no class, and `DataError`: the encoding is not that
        of the settings.
        """
        if pixels.values.ndim == 2 and pixels.palette is None and self._has_gray_classes():
            pixels = pixels._replace(palette=GRAYS)
        encoding = self._detect_encoding(name, pixels)
        try:
            label = self._decode_label(pixels, encoding)
        except ValueError as error:
            raise DataError(f"{name} cannot be decoded: {error}") from None
        if pixels.masked is not None:
            label[pixels.masked] = IGNORE
        self._replace_unknown(name, pixels, label, encoding)
        return label

    def _decode_label(self, pixels: reading.LabelPixels, encoding: str) -> UInt8:
        names = self.classes.names
        if encoding == "index":
            ids = self.ids or {name: (number,) for number, name in enumerate(names)}
            numbers = self._table(ids, self._ignored_numbers(), "number")
            nodata = pixels.nodata
            if nodata is not None and nodata.is_integer() and not (self.ids and int(nodata) in numbers):
                numbers[int(nodata)] = IGNORE
            return from_numbers(pixels.values, numbers)
        shown = {name: (color,) for name, color in zip(names, self.classes.colors, strict=True)}
        colors = self._table(self.colors or shown, self._ignored_colors(), "color")
        if pixels.nodata in range(256):
            colors.setdefault((int(pixels.nodata or 0),) * 3, IGNORE)
        if pixels.palette is None:
            return from_colors(pixels.values, colors)
        return from_palette(pixels.values, pixels.palette, colors)

    def _detect_encoding(self, name: str, pixels: reading.LabelPixels) -> Literal["index", "rgb"]:
        if pixels.values.ndim == 3:
            if self.label_format == "index":
                raise DataError(f"{name} holds colors, and label_format is index; set label_format to rgb")
            return "rgb"
        if pixels.palette is None:
            if self.label_format == "rgb":
                raise DataError(f"{name} holds numbers, and label_format is rgb; set label_format to index or auto")
            return "index"
        if self.label_format != "auto":
            return self.label_format
        if is_gray(pixels.palette) and not self.colors:
            return "rgb" if self._has_gray_classes() else "index"
        undecided = bool(self.colors) == bool(self.ids)
        if undecided and (self._decode_label(pixels, "rgb") == UNKNOWN).any():
            raise DataError(
                f"{name} is a palette image; set label_format to index if its numbers are the classes, "
                "or to rgb if its colors are"
            )
        return "rgb" if self.colors or undecided else "index"

    def _has_gray_classes(self) -> bool:
        """Whether the colors of all classes are grays, by which masks of one band are read too."""
        colors = [color for colors in self.colors.values() for color in colors] or self.classes.colors
        return self.label_format != "index" and not self.ids and all(len(set(color)) == 1 for color in colors)

    def _replace_unknown(self, name: str, pixels: reading.LabelPixels, label: UInt8, encoding: str) -> None:
        unknown = label == UNKNOWN
        if not unknown.any():
            return
        if self.unknown == "error":
            codes = unknown_codes(pixels.values, label, pixels.palette if encoding == "rgb" else None)
            what, where = ("numbers", "ids") if encoding == "index" else ("colors", "colors")
            if pixels.palette is not None and is_gray(pixels.palette) and encoding == "rgb":
                where += " (or set label_format to index)"
            raise UnknownCodesError(
                f"{name} holds {what} of no class: {list_codes(codes)}; add them to {where} or ignore, or set unknown "
                "to ignore",
                codes,
            )
        label[unknown] = IGNORE

    def _table(self, codes: Mapping[str, tuple[CodeT, ...]], ignored: Iterable[CodeT], kind: str) -> dict[CodeT, int]:
        """Class id of each color or number."""
        class_ids: dict[CodeT, int] = {}
        for name, values in codes.items():
            class_name = self.mapping.get(name, name)
            number = IGNORE if class_name is None else self.classes.index(class_name)
            for code in values:
                if class_ids.setdefault(code, number) != number:
                    raise ValueError(f"the {kind} {code} belongs to two classes; list it for one class")
        for code in ignored:
            if class_ids.setdefault(code, IGNORE) != IGNORE:
                raise ValueError(f"the {kind} {code} is both a class and ignored; remove it from one of them")
        return class_ids

    def _ignored_colors(self) -> tuple[Color, ...]:
        return tuple(entry for entry in self.ignore if isinstance(entry, tuple))

    def _ignored_numbers(self) -> tuple[int, ...]:
        used = {number for numbers in self.ids.values() for number in numbers}
        always = () if IGNORE in used else (IGNORE,)
        return (*always, *(entry for entry in self.ignore if isinstance(entry, int)))


class Folder(UserDomain, name="folder"):
    """The user's own images in folders.

    * Format: PNG, JPEG, TIFF, GeoTIFF, JPEG 2000, BMP, WebP; the rules are those of `overfly.data.reading`.
    * Masks: files of numbers, of a palette, or of RGB colors, without loss; none at all for a target. What a mask
      declares as no data is ignored, unless ``ids`` or ``colors`` list it.
    * Bands, resolution, classes, license: see the settings; ``overfly data check`` verifies them.

    Images and masks are paired by the text that the wildcards match: ``Tile */images/*.jpg`` and
    ``Tile */masks/*.png`` pair ``Tile 4/images/a.jpg`` with ``Tile 4/masks/a.png``; in two directories, files with the
    same stem are paired. This text also names the image: ``4_a``. No-data pixels of an image are ignored.
    """

    root: Path
    """Folder that the other paths are relative to."""
    title: str = "Folder"
    """Name in tables and run folders."""
    images: str = "images"
    """Directory or glob of the images below the root; ``{split}`` is replaced by the name of the split."""
    masks: str | None = None
    """Directory or glob of the masks, with as many wildcards as ``images``; none: no labels."""
    mask_band: PositiveInt | None = None
    """Band of the masks, from 1, that holds the numbers; none: the only one, or three bands of colors."""
    splits: dict[Split, SplitShare | str | tuple[str, ...]] = Field(default_factory=dict)
    """Splits: shares ``{train: 0.8, val: 0.2}``, list files ``{train: train.txt, …}`` (a name or path per line), globs
    ``{train: "*_00[1-6]", …}`` of image names (with a slash: of paths below the root), or the text that replaces
    ``{split}`` in the patterns; default: all images are for training."""
    seed: int = 0
    """Seed of the shares; the split of an image depends on its name and this seed only."""
    gsd: Meters | None = None
    """Length of a pixel on the ground in meters; none if unknown."""

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        shares = [rule for rule in self.splits.values() if isinstance(rule, float)]
        if shares and len(shares) < len(self.splits):
            raise ValueError("splits mix shares with lists or globs; use one kind")
        if sum(shares) > 1 + 1e-9:
            raise ValueError(f"the shares of the splits add up to {sum(shares):g}, more than 1")
        has_placeholder = "{split}" in self.images
        if has_placeholder and not all(isinstance(rule, str) for rule in self.splits.values()):
            raise ValueError("images holds {split}, so splits gives the text to put there: {train: Train, val: Val}")
        if self.masks is None:
            return self
        if has_placeholder != ("{split}" in self.masks):
            raise ValueError("{split} must stand in both images and masks, or in neither")
        count, other = listing.count_wildcards(self.images), listing.count_wildcards(self.masks)
        if count != other:
            raise ValueError(f"images has {count} wildcards and masks {other}; use the same number in both")
        return self

    def items(self, split: Split) -> Sequence[Item]:
        """Return the images of a split, in natural order of their names.

        Raises `SplitError`: the settings do not define the split, or its directory does not exist, and `DataError`:
        there are no images, images and masks cannot be paired, or the splits overlap.
        """
        root = self.root.expanduser()
        listing.check_name(root)
        if not os.path.isdir(root):  # noqa: PTH112  (pathlib raises for paths that may not be read)
            raise DataError(f"{root} is not a folder; set the domain's root to the folder that holds {self.images}")
        has_placeholder = "{split}" in self.images
        if self.splits or not has_placeholder:
            check_split(split, self.splits, f"folder {self.root}")
        text = str(self.splits.get(split, split)) if has_placeholder else ""
        images = self.images.replace("{split}", text)
        masks = self.masks.replace("{split}", text) if self.masks is not None else None
        pairs = listing.find_images(root, images, masks, masks_optional=has_placeholder and split == "test")
        if not pairs:
            kind = SplitError if has_placeholder else DataError
            raise kind(listing.no_images_message(root, images))
        if self.splits and not has_placeholder:
            rules: dict[str, listing.Rule] = {name: self.splits[name] for name in SPLITS if name in self.splits}
            pairs = listing.select_split(pairs, split, rules, root, self.seed)
        return [Item(pair.name, pair.image, pair.mask) for pair in pairs]

    def nodata_mask(self, item: Item) -> reading.Mask | None:
        """Pixels without data, masked or fully transparent (H, W), None if none; raise `DataError` if unreadable."""
        return reading.nodata_mask(item.image, bands=self.bands, nodata=self.nodata)

    def read_label(self, item: Item) -> UInt8:
        """Read a label in the encoding of the settings; see `Domain.read_label`."""
        label = self.decode(reading.source_name(item.label), reading.read_item_label(item, self.mask_band))
        nodata_mask = self.nodata_mask(item)
        if nodata_mask is not None:
            label[nodata_mask] = IGNORE
        return label


def _is_number(entry: object) -> bool:
    return isinstance(entry, int)


def _is_color(entry: object) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 3 and all(map(_is_number, entry))


def check_split(split: Split, splits: Collection[Split], domain: str) -> None:
    """Raise `SplitError` if a domain does not define a split; one without ``splits`` has train alone."""
    if split not in (splits or ("train",)):
        raise SplitError(
            f"the {domain} has no split {split}; name one in the domain's splits, such as {{train: 0.8, val: 0.2}}"
        )


def read_classes(file: Path) -> dict[str, Any]:
    """Read a YAML file of class names, colors by name, or settings with ``classes``; raise `RecipeError` otherwise."""
    if not file.is_file():
        raise RecipeError(f"--classes: {file} is not a file; give a YAML file such as {{building: [255, 0, 0], …}}")
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"--classes: {file} is not valid YAML: {' '.join(str(error).split())}") from None
    settings = values if isinstance(values, dict) and "classes" in values else {"classes": values}
    try:
        Classes.model_validate(settings["classes"])
        if not settings["classes"]:
            raise ValueError("no class")
    except ValueError:  # pydantic's ValidationError is one
        raise RecipeError(
            f"--classes: {file} must hold a list of names, such as [building, road], or a color for each name, such as "
            f"{{building: [255, 0, 0], road: [0, 0, 255]}}; got {str(settings['classes'])[:80]}; quote yes and no"
        ) from None
    if settings.get("name", "folder") not in ("folder", "raster"):
        raise RecipeError(
            f"--classes: {file} names the domain {settings['name']}; only settings of folder or raster are allowed"
        )
    reserved = [str(key) for key in settings if key in DOMAIN_SETTINGS]
    if reserved:
        raise RecipeError(
            f"--classes: {file} sets {', '.join(reserved)}, which the options give for source and target; remove them, "
            "or write a recipe"
        )
    return {str(key): value for key, value in settings.items() if key != "name"}
