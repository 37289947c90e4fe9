"""Public data sets by name: folders with the settings of a data sheet, ``sheets/NAME.yaml``."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import new_class
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_serializer, model_validator

from overfly.core.atomic_files import json_sha256
from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Item, UInt8
from overfly.core.settings import read_mapping
from overfly.core.spec import Spec
from overfly.data import listing
from overfly.data.domain import Domain, Split, SplitError
from overfly.data.folder import Folder
from overfly.data.reading import LabelPixels

SHEETS = Path(__file__).with_name("sheets")
THRESHOLD = 128
"""Value from which a color of a data set with ``binarize`` counts as 255."""


class Sheet(Spec):
    """A data sheet: facts about a published data set, and the settings of a folder that read it."""

    title: str
    """Name in tables."""
    summary: str
    """The data set in one sentence."""
    facts: dict[str, str]
    """Format of the images, labels, splits, license, citation, and URL of the publisher's page."""
    get: str
    """How to get it; ``{root}`` is the domain's root."""
    layout: str
    """An example of each kind of file below the root, as published."""
    settings: dict[str, Any]
    """Settings of the domain ``folder``."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Other bands, labels or classes: settings in place of those above, by the name of the variant."""
    subset: str | None = None
    """Glob of the names of the images of a subset, such as a region; ``{}`` is the name of the subset."""
    subsets: tuple[str, ...] = ()
    """All subsets, where they are few; each must be there if none is chosen."""
    unlabeled: tuple[Split, ...] = ()
    """Splits whose labels are not public."""
    partial_lists: bool = False
    """Whether list files may name images that are not there."""
    binarize: bool = False
    """Whether each value of a label's color is taken as 0 below `THRESHOLD`, else as 255."""
    download: dict[str, Any] = Field(default_factory=dict)
    """What ``overfly data fetch`` downloads: the url of the archives, their names, digests and files, the license."""

    @property
    def sha256(self) -> str:
        """Digest of what decides how files are read."""
        others = {"title", "summary", "facts", "get", "layout", "download"}
        return json_sha256(self.model_dump(mode="json", exclude=others))


@cache
def read_sheet(name: str) -> Sheet:
    """Read the data sheet of a data set."""
    return Sheet.model_validate(read_mapping(SHEETS / f"{name}.yaml", "data sheet"))


class Dataset(Folder):
    """A public data set in its publisher's layout: a folder with the settings of its data sheet.

    Every setting of `Folder` can be changed; with ``classes`` and ``mapping`` the labels are those of another data set.
    A recipe that is saved holds the settings that differ from the sheet.
    """

    if TYPE_CHECKING:
        classes: Classes = Classes(names=())  # the sheet gives them
    variant: tuple[str, ...] = ()
    """Variants of the data sheet, such as ``irrg``; of two that change the same setting, the last counts."""
    subset: tuple[str, ...] = ()
    """Subsets, such as regions, cities, departments or conditions; default: all."""
    sheet_sha256: str = ""
    """Digest of the sheet's settings, so that a changed sheet is another recipe; filled in."""

    @classmethod
    def sheet(cls) -> Sheet:
        """The data sheet."""
        return read_sheet(cls.name)

    @field_validator("variant", "subset", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """Accept one name in place of a list."""
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _use_sheet(cls, values: Any) -> Any:
        """Take the settings that are not given from the sheet."""
        if not isinstance(values, Mapping):
            return values
        sheet = cls.sheet()
        given = (cls._several(values.get(key)) for key in ("variant", "subset"))
        names, subset = (tuple(map(str, value)) if isinstance(value, list | tuple) else () for value in given)
        settings = dict(sheet.settings)
        for name in names:
            if name not in sheet.variants:
                known = ", ".join(sheet.variants) or "none"
                raise ValueError(f"{sheet.title} has no variant {name!r}; there are: {known}")
            settings |= sheet.variants[name]
        if subset and sheet.subset is None:
            raise ValueError(f"{sheet.title} has no subsets; remove subset")
        ids = {name: index for index, name in enumerate(settings["classes"])}
        codes = {"colors": settings["classes"]} if settings["label_format"] == "rgb" else {"ids": ids}
        title = " ".join([sheet.title, *subset])
        return {"title": title, "sheet_sha256": sheet.sha256, **codes, **settings, **values}

    @model_serializer(mode="plain")
    def _with_changes(self) -> dict[str, Any]:
        """Serialize the name, the settings that `Folder` does not have, and those that differ from the sheet."""
        own = {key: getattr(self, key) for key in type(self).model_fields if key not in Folder.model_fields}
        usual = type(self).model_validate({"root": self.root, **own})
        changed = {key: value for key, value in self if key not in own and value != getattr(usual, key)}
        return {"name": self.name, "root": self.root, **own, **changed}

    def items(self, split: Split) -> Sequence[Item]:
        """Return the images of a split: subset by subset, each in natural order of their names.

        Raises `SplitError`: the data set has no such split, or no images of it are there, and `DataError`: the files
        are not those of the data set, or some are missing.
        """
        sheet, root = self.sheet(), self.root.expanduser()
        if split not in self.splits:
            raise SplitError(f"{sheet.title} has no split {split}; there are: {', '.join(self.splits)}")
        try:
            return [Item(pair.name.strip("_"), pair.image, pair.mask) for pair in self._pairs(split, root)]
        except DataError as error:
            files = " and ".join(filter(None, (self.images, self.masks))).replace("{split}", str(self.splits[split]))
            advice = f"{sheet.title} has {files} below its root; to get it, {sheet.get} ({sheet.facts['url']})"
            raise type(error)(f"{error}; {advice.replace('{root}', str(root))}") from None

    def _pairs(self, split: Split, root: Path) -> Iterator[listing.ImagePair]:
        """Yield the images of a split with their masks."""
        sheet, by_folder, unlabeled = self.sheet(), "{split}" in self.images, split in self.sheet().unlabeled
        listing.check_name(root)
        if not root.is_dir():
            raise DataError(f"{root} is not a folder")
        text = str(self.splits[split]) if by_folder else ""
        images, masks = (None if path is None else path.replace("{split}", text) for path in (self.images, self.masks))
        check = not self.subset and (by_folder or not sheet.unlabeled)
        pairs = listing.find_images(root, images or "", masks, masks_optional=unlabeled, check=check)
        if not pairs:
            raise SplitError(f"{root / (images or '')} matches no files")
        if not by_folder:
            pairs = listing.select_split(pairs, split, self.splits, root, self.seed, partial=sheet.partial_lists)
        for subset in self.subset or sheet.subsets or ("",):
            pattern = sheet.subset.format(subset) if sheet.subset and subset else "*"
            chosen = [pair for pair in pairs if fnmatchcase(pair.name, pattern)]
            if not chosen:
                raise SplitError(f"no image of {split} in {root} is of {subset}")
            lacking = [pair for pair in chosen if pair.mask is None and masks is not None and not unlabeled]
            if lacking:
                raise DataError(f"{lacking[0].image} has no mask ({len(lacking)} of {len(chosen)} images have none)")
            yield from chosen

    def _decode_label(self, pixels: LabelPixels, encoding: str) -> UInt8:
        if self.sheet().binarize and encoding == "rgb":
            pixels = pixels._replace(values=(pixels.values >= THRESHOLD).astype("uint8") * 255)
        return super()._decode_label(pixels, encoding)


def register_sheets() -> None:
    """Define the domain of each data sheet that has no class of its own."""
    for file in sorted(SHEETS.glob("*.yaml")):
        if file.stem not in Domain.kinds:
            new_class(file.stem, (Dataset,), {"name": file.stem}, lambda body: body.update(__module__=__name__))
