"""Public datasets, fetched from where they are published, checked and unpacked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from overfly.core.download import download_file, exclusive_lock
from overfly.core.errors import DataError, DownloadError
from overfly.core.spec import Spec
from overfly.data.domain import SPLITS, Split
from overfly.data.unpacking import remove_stale, unpack_zip

LOVEDA_URL = "https://zenodo.org/records/5706578/files"
"""Where LoveDA's archives are published (DOI 10.5281/zenodo.5706578); ``OVERFLY_LOVEDA_URL`` stands in for it."""
LOVEDA_LICENSE = (
    "LoveDA is licensed CC BY-NC-SA 4.0, and its images are subject to the terms of Google Earth: academic use only, "
    "no commercial use, of the pictures or of what is trained on them; cite Wang et al. (2021), "
    "doi 10.5281/zenodo.5706578"
)
"""What a user of LoveDA must know."""
SCENES = ("Urban", "Rural")
RECEIPT = ".overfly.json"
"""File in an unpacked split that says from which archive it comes and how many files belong to it."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes so far, and the bytes in all, or None where they are not known."""


class Archive(NamedTuple):
    """One published archive, which unpacks to a folder of the same stem.

    Attributes:
        name: file name, as published.
        md5: as published.
        files: pictures and masks within.
        masks: whether there are masks.
    """

    name: str
    md5: str
    files: int
    masks: bool = True


LOVEDA: Mapping[Split, Archive] = {
    "train": Archive("Train.zip", "de2b196043ed9b4af1690b3f9a7d558f", 2 * 2522),
    "val": Archive("Val.zip", "84cae2577468ff0b5386758bb386d31d", 2 * 1669),
    "test": Archive("Test.zip", "a489be0090465e01fb067795d24e6b47", 1796, masks=False),
}
"""LoveDA's archives; 2522 + 1669 + 1796 = 5987 pictures."""


class DownloadedSplit(Spec):
    """What became of one split."""

    split: Split
    """Which split."""
    folder: Path
    """Where it lies."""
    files: int
    """Number of its pictures and masks."""
    fetched: bool
    """Whether it was fetched now; False: it was there and complete."""
    archive: Path | None = None
    """The archive, where it was kept."""


class Downloaded(Spec):
    """What became of a dataset that was asked for."""

    root: Path
    """Folder of the dataset: the ``root`` of a domain in a recipe."""
    splits: tuple[DownloadedSplit, ...]
    """What became of each split."""
    license: str
    """What a user of it must know."""

    def __str__(self) -> str:
        """What happened to each split, and the license, a line each."""
        lines = [
            f"{'fetched' if part.fetched else 'was there'}: {part.folder} ({part.files} pictures and masks)"
            + (f"; archive kept: {part.archive}" if part.archive else "")
            for part in self.splits
        ]
        return "\n".join([*lines, f"license: {self.license}"])

    def __rich__(self) -> str:
        """The same in a terminal."""
        return str(self)


def download_loveda(
    root: Path,
    splits: Iterable[Split] = SPLITS,
    *,
    base: str | None = None,
    progress: Progress | None = None,
    keep_archives: bool = False,
) -> Downloaded:
    """Bring LoveDA (Wang et al., 2021) to ``root``: ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.

    A split that is there and complete is skipped. A transfer that broke is taken up where it broke. A folder that holds
    something else, or a part only, is left as it is and named. Each split appears when all of it is there. An archive
    that lay in ``root`` before, with the right checksum, is used and stays.

    Args:
        root: folder of the dataset; made if missing.
        splits: which splits; the masks of ``test`` are not public.
        base: address of the folder that the archives lie in; left out, ``OVERFLY_LOVEDA_URL``, else `LOVEDA_URL`.
        progress: told how far it is.
        keep_archives: keep the zip files after unpacking.

    Returns:
        What was fetched and what was there, and the license, which the caller must show.

    Raises:
        DataError: a split's folder is there and is not complete, or is not LoveDA's.
        DownloadError: the download failed, does not match its checksum, or does not unpack.
    """
    root = Path(root)
    base = base or os.environ.get("OVERFLY_LOVEDA_URL") or LOVEDA_URL
    wanted = tuple(dict.fromkeys(splits))
    unknown = [name for name in wanted if name not in LOVEDA]
    if unknown:
        raise DataError(f"LoveDA has no split {unknown[0]!r}; it has: {', '.join(LOVEDA)}")
    for split in wanted:  # before gigabytes are on their way
        _standing(root, split)
    done = tuple(_fetch_split(root, split, base, progress, keep_archives) for split in wanted)
    return Downloaded(root=root, splits=done, license=LOVEDA_LICENSE)


def _fetch_split(
    root: Path, split: Split, base: str, progress: Progress | None, keep_archives: bool
) -> DownloadedSplit:
    archive = LOVEDA[split]
    folder = _folder(root, archive)
    if files := _standing(root, split):
        return DownloadedSplit(split=split, folder=folder, files=files, fetched=False)
    _make(root)
    with exclusive_lock(root / f".{folder.name}.lock") as locked:
        if files := _standing(root, split):  # another process brought it while this one waited
            return DownloadedSplit(split=split, folder=folder, files=files, fetched=False)
        if locked:
            remove_stale(folder)
        path = root / archive.name
        brought = not path.exists()
        download_file(
            f"{base.rstrip('/')}/{archive.name}",
            path,
            md5=archive.md5,
            progress=_named(progress, f"fetch {archive.name}"),
        )
        unpack_zip(
            path,
            folder,
            check=lambda unfinished: _seal(unfinished, archive),
            progress=_named(progress, f"unpack {archive.name}"),
        )
        keep = keep_archives or not brought
        if not keep:
            path.unlink()
    files = _standing(root, split)
    return DownloadedSplit(split=split, folder=folder, files=files, fetched=True, archive=path if keep else None)


def _folder(root: Path, archive: Archive) -> Path:
    return root / Path(archive.name).stem


def _make(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{root} cannot be made ({error.strerror}); choose a folder you may write to") from error


def _named(progress: Progress | None, what: str) -> Callable[[int, int | None], None] | None:
    return (lambda done, total: progress(what, done, total)) if progress else None


def _standing(root: Path, split: Split) -> int:
    """Number of files of a split that is there and complete; 0 where there is nothing.

    Raises:
        DataError: something is there, and it is not the complete split.
    """
    archive = LOVEDA[split]
    folder = _folder(root, archive)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return 0
    if not folder.is_dir():
        raise DataError(f"{folder} is in the way of LoveDA's {split} split; move it away or choose another root")
    found, expected = _count(folder), _receipt(folder) or archive.files
    if found != expected:
        raise DataError(
            f"{folder} holds {found} pictures and masks where LoveDA's {split} split has {expected}: it is incomplete "
            "or another dataset; move it away or choose another root (nothing was changed)"
        )
    return found


def _count(folder: Path) -> int:
    """Number of pictures and masks in LoveDA's layout below a split's folder."""
    return sum(
        1 for scene in SCENES for kind in ("images_png", "masks_png") for _ in (folder / scene / kind).glob("*.png")
    )


def _receipt(folder: Path) -> int:
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        return int(receipt["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _seal(unfinished: Path, archive: Archive) -> None:
    """See that what was unpacked is in LoveDA's layout, each picture with its mask, and leave the receipt."""
    for scene in SCENES:
        images = {path.name for path in (unfinished / scene / "images_png").glob("*.png")}
        masks = {path.name for path in (unfinished / scene / "masks_png").glob("*.png")}
        if not images or (archive.masks and images != masks):
            raise DownloadError(
                f"{archive.name} holds {len(images)} pictures and {len(masks)} masks that fit in {scene}, which is not "
                "LoveDA's layout; check the address it was fetched from"
            )
    receipt = {"archive": archive.name, "md5": archive.md5, "files": _count(unfinished)}
    (unfinished / RECEIPT).write_text(json.dumps(receipt) + "\n", encoding="utf-8")
