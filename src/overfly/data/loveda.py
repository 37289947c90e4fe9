"""LoveDA (Wang et al., 2021): aerial scenes of Nanjing, Changzhou and Wuhan at 0.3 m; the dataset and its download."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from overfly.core.atomic_files import lock
from overfly.core.classes import Classes
from overfly.core.download import OnBytes, disk_errors, download_file, unpack_zip
from overfly.core.errors import DataError, DownloadError
from overfly.core.records import IGNORE, Item, UInt8
from overfly.data import reading
from overfly.data.domain import SPLITS, Domain, Split, SplitError
from overfly.data.reading import UNKNOWN, from_numbers, list_codes, unknown_codes

CLASSES = Classes(
    names=("background", "building", "road", "water", "barren", "forest", "agriculture"),
    colors=(
        (255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128),
    ),
)  # fmt: skip
"""The label set of LoveDA, with its official colors."""
MEANING = {0: IGNORE, **{number: number - 1 for number in range(1, 8)}}
"""Class id of each number in a mask file: 0 is no data, 1 to 7 are the classes."""


class LoveDA(Domain, name="loveda"):
    """LoveDA: 5,987 aerial scenes for domain adaptation between urban and rural scenes.

    * Format: RGB PNG, 1024×1024, 8 bits; ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.
    * Bands: red, green, blue. Resolution: 0.3 m. Places: Nanjing, Changzhou, Wuhan (Google Earth, July 2016).
    * Scenes: 2,713 urban, 3,274 rural, each split into train, val and test.
    * Classes (number in the mask): background 1, building 2, road 3, water 4, barren 5, forest 6, agriculture 7;
      0 is no data and ignored. The masks of test are not public; the benchmark's server scores predictions.
    * License: CC BY-NC-SA 4.0, for academic use; the imagery is subject to the terms of Google Earth.
    * Citation: Wang, Zheng, Ma, Lu, Zhong: LoveDA: A Remote Sensing Land-Cover Dataset for Domain Adaptive Semantic
      Segmentation. NeurIPS Datasets and Benchmarks, 2021. doi:10.5281/zenodo.5706578
    """

    root: Path
    """Folder that holds ``Train``, ``Val`` and ``Test``; synthetic images can be written in the same layout."""
    scene: Literal["urban", "rural", "both"] = "both"
    """Scenes: ``urban``, ``rural``, or ``both`` as one domain."""

    @property
    def classes(self) -> Classes:
        """LoveDA's seven classes."""
        return CLASSES

    @property
    def gsd(self) -> float:
        """Length of a pixel on the ground: 0.3 m."""
        return 0.3

    def items(self, split: Split) -> Sequence[Item]:
        """Return scenes by number, urban before rural, with names such as ``Rural_12``.

        Raises:
            SplitError: a folder of images does not exist.
            DataError: a scene of train or val has no mask, or a folder of images is empty.
        """
        scenes = ("Urban", "Rural") if self.scene == "both" else (self.scene.capitalize(),)
        return [item for scene in scenes for item in self._scene(split, scene)]

    def read_label(self, item: Item) -> UInt8:
        """Read a label, no data as 255 and the classes as 0 to 6; see `Domain.read_label`."""
        values = reading.read_item_label(item).values
        if values.ndim != 2:
            raise DataError(f"{item.label} must hold numbers 0 to 7, not colors; download it again")
        label = from_numbers(values, MEANING)
        if (label == UNKNOWN).any():
            found = list_codes(unknown_codes(values, label))
            raise DataError(
                f"{item.label} must hold numbers 0 to 7, got {found}; download it again, or use the domain 'folder' "
                "for other masks"
            )
        return label

    def _scene(self, split: Split, scene: str) -> list[Item]:
        root = self.root.expanduser()
        folder = root / split.capitalize() / scene / "images_png"
        if not folder.is_dir():
            raise SplitError(f"{folder} does not exist; download LoveDA with: overfly data fetch loveda --root {root}")
        paths = [path for path in folder.glob("*.png") if path.stem.isdecimal()]
        if not paths:
            raise DataError(f"{folder} has no N.png; download them with: overfly data fetch loveda --root {root}")
        paths.sort(key=lambda path: int(path.stem))
        masks = folder.parent / "masks_png"
        present = {path.name for path in masks.glob("*.png")}
        missing = [path for path in paths if path.name not in present]
        if missing and split != "test":
            raise DataError(
                f"{masks / missing[0].name} is missing ({len(missing)} of {len(paths)} images have no mask); "
                f"download the split again with: overfly data fetch loveda --root {root}"
            )
        return [
            Item(f"{scene}_{path.stem}", path, masks / path.name if path.name in present else None) for path in paths
        ]


LOVEDA_URL = "https://zenodo.org/records/5706578/files"
"""Base URL of LoveDA's archives (DOI 10.5281/zenodo.5706578); ``OVERFLY_LOVEDA_URL`` overrides it."""
LOVEDA_LICENSE = (
    "LoveDA is licensed CC BY-NC-SA 4.0, and its images are subject to the terms of Google Earth: academic use only, "
    "no commercial use of the images or of networks trained on them; cite Wang et al. (2021), "
    "doi 10.5281/zenodo.5706578"
)
SCENES = ("Urban", "Rural")
RECEIPT = ".overfly.json"
"""File in an unpacked split that names its archive and its number of files."""
NamedProgress = Callable[[str, int, int | None], None]
"""Called with the name of the step, the bytes so far, and all bytes, or None if unknown."""


class Archive(NamedTuple):
    """A published archive of some images and masks, which unpacks to a folder of the same stem."""

    name: str
    md5: str
    files: int
    masks: bool = True


LOVEDA: Mapping[Split, Archive] = {
    "train": Archive("Train.zip", "de2b196043ed9b4af1690b3f9a7d558f", 2 * 2522),
    "val": Archive("Val.zip", "84cae2577468ff0b5386758bb386d31d", 2 * 1669),
    "test": Archive("Test.zip", "a489be0090465e01fb067795d24e6b47", 1796, masks=False),
}
"""LoveDA's archives; 2522 + 1669 + 1796 = 5987 images."""


class DownloadedSplit(NamedTuple):
    """A split on disk, ``downloaded`` by this call or complete before; its archive, if that was kept."""

    split: Split
    folder: Path
    files: int
    downloaded: bool
    archive: Path | None = None


@dataclass(frozen=True)
class Downloaded:
    """A dataset on disk; ``root`` is that of a domain in a recipe."""

    root: Path
    splits: tuple[DownloadedSplit, ...]
    license: str

    def __str__(self) -> str:
        """Splits and license, one a line."""
        lines = [
            f"{'downloaded' if part.downloaded else 'complete already'}: {part.folder} ({part.files} images and masks)"
            + (f"; archive kept: {part.archive}" if part.archive else "")
            for part in self.splits
        ]
        return "\n".join([*lines, f"license: {self.license}"])

    __rich__ = __str__


def download_loveda(
    root: Path, splits: Iterable[Split] = SPLITS, *, base: str | None = None, progress: NamedProgress | None = None,
    keep_archives: bool = False,
) -> Downloaded:  # fmt: skip
    """Download LoveDA (Wang et al., 2021) to ``root``: ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.

    Complete splits are skipped, interrupted downloads resume, and incomplete or foreign folders are an error. A split
    appears when it is complete. An archive that exists in ``root`` with the right checksum is used and kept.

    The arguments are those of `overfly data fetch`. ``base`` is by default ``OVERFLY_LOVEDA_URL``, else `LOVEDA_URL`;
    ``progress`` is called as bytes are downloaded and unpacked. The masks of ``test`` are not public.

    Returns:
        The splits and the license, which the caller must show.

    Raises:
        DataError: a split's folder exists and is incomplete or another dataset.
        DownloadError: the download fails, does not match its checksum, or does not unpack.
    """
    base = (base or os.environ.get("OVERFLY_LOVEDA_URL") or LOVEDA_URL).rstrip("/")
    chosen = tuple(dict.fromkeys(splits))
    unknown = [name for name in chosen if name not in LOVEDA]
    if unknown:
        raise DataError(f"splits must be some of {', '.join(LOVEDA)}, got {unknown[0]!r}")
    for split in chosen:  # before gigabytes are downloaded
        _complete_files(root, split)
    done = tuple(_download_split(root, split, base, progress, keep_archives) for split in chosen)
    return Downloaded(root=root, splits=done, license=LOVEDA_LICENSE)


def _download_split(
    root: Path, split: Split, base: str, progress: NamedProgress | None, keep_archives: bool
) -> DownloadedSplit:
    archive = LOVEDA[split]
    folder, path = root / Path(archive.name).stem, root / archive.name
    hidden = root / f".{archive.name}"  # removed in the end, also after a process was killed

    def step(verb: str) -> OnBytes | None:
        return partial(progress, f"{verb} {archive.name}") if progress else None

    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{folder.name}.lock"):
            files = _complete_files(root, split)  # another process may have finished it while this one waited
            if not files:
                packed = path if path.exists() else hidden
                download_file(f"{base}/{path.name}", packed, known_hash=f"md5:{archive.md5}", progress=step("download"))
                unpack_zip(packed, folder, check=partial(_check_layout, archive=archive), progress=step("unpack"))
            if keep_archives and hidden.exists():
                hidden.replace(path)
            hidden.unlink(missing_ok=True)
    kept = path if not files and path.exists() else None
    return DownloadedSplit(split, folder, _complete_files(root, split), not files, kept)


def _complete_files(root: Path, split: Split) -> int:
    """Count the files of a complete split, 0 without a folder; raise `DataError` for an incomplete or other one."""
    archive = LOVEDA[split]
    folder = root / Path(archive.name).stem
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return 0
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; move it away or choose another root")
    files, expected = _count_files(folder), archive.files
    with suppress(OSError, ValueError, KeyError, TypeError):
        expected = int(json.loads((folder / RECEIPT).read_text(encoding="utf-8"))["files"]) or expected
    if files != expected:
        raise DataError(
            f"{folder} holds {files} images and masks, and LoveDA's {split} split has {expected}: it is incomplete or "
            "another dataset; move it away or choose another root"
        )
    return files


def _count_files(folder: Path) -> int:
    return sum(
        len(list((folder / scene / kind).glob("*.png"))) for scene in SCENES for kind in ("images_png", "masks_png")
    )


def _check_layout(folder: Path, archive: Archive) -> None:
    """Check that an unpacked archive has LoveDA's layout and a mask for each image, and write the receipt."""
    for scene in SCENES:
        images = {path.name for path in (folder / scene / "images_png").glob("*.png")}
        masks = {path.name for path in (folder / scene / "masks_png").glob("*.png")}
        if not images or (archive.masks and images != masks):
            raise DownloadError(
                f"{archive.name} does not have LoveDA's layout: {len(images)} images and {len(masks)} masks in "
                f"{scene}; check the base URL"
            )
    receipt = {"archive": archive.name, "md5": archive.md5, "files": _count_files(folder)}
    (folder / RECEIPT).write_text(json.dumps(receipt) + "\n", encoding="utf-8")
