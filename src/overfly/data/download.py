"""Download LoveDA: archives verified by checksum, unpacked safely, and put in place when complete."""

from __future__ import annotations

import json
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from overfly.core.atomic_files import lock, temporary_path
from overfly.core.download import CHUNK, Progress, check_free_space, disk_errors, download_file, format_bytes
from overfly.core.errors import DataError, DownloadError
from overfly.core.spec import Spec
from overfly.data.domain import SPLITS, Split

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
MAX_BYTES = 20 * 10**9
"""Largest unpacked size of an archive."""
MAX_FILES = 50_000
"""Largest number of files in an archive."""
CLUTTER = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
"""Files of file managers, which are not unpacked."""

NamedProgress = Callable[[str, int, int | None], None]
"""Called with the name of the step, the bytes so far, and all bytes, or None where they are not known."""


class Archive(NamedTuple):
    """A published archive, which unpacks to a folder of the same stem.

    Attributes:
        name: file name.
        md5: checksum.
        files: number of images and masks.
        masks: whether it holds masks.
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
"""LoveDA's archives; 2522 + 1669 + 1796 = 5987 images."""


class DownloadedSplit(Spec):
    """A split on disk."""

    split: Split
    """Name of the split."""
    folder: Path
    """Its folder."""
    files: int
    """Number of images and masks."""
    downloaded: bool
    """Whether it was downloaded now; False: it existed and was complete."""
    archive: Path | None = None
    """The archive, if it was kept."""


class Downloaded(Spec):
    """A dataset on disk."""

    root: Path
    """Folder of the dataset: the ``root`` of a domain in a recipe."""
    splits: tuple[DownloadedSplit, ...]
    """Its splits."""
    license: str
    """License of the dataset."""

    def __str__(self) -> str:
        """Splits and license, one a line."""
        lines = [
            f"{'downloaded' if part.downloaded else 'complete already'}: {part.folder} ({part.files} images and masks)"
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
    progress: NamedProgress | None = None,
    keep_archives: bool = False,
) -> Downloaded:
    """Download LoveDA (Wang et al., 2021) to ``root``: ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.

    Complete splits are skipped, interrupted downloads resume, and incomplete or foreign folders are an error. A split
    appears when it is complete. An archive that exists in ``root`` with the right checksum is used and kept.

    Args:
        root: folder of the dataset; created if missing.
        splits: splits to download; the masks of ``test`` are not public.
        base: URL of the archives' folder; defaults to ``OVERFLY_LOVEDA_URL``, else `LOVEDA_URL`.
        progress: called as bytes are downloaded and unpacked.
        keep_archives: keep the zip files after unpacking.

    Returns:
        The splits and the license, which the caller must show.

    Raises:
        DataError: a split's folder exists and is incomplete or not LoveDA's.
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

    def step(verb: str) -> Progress | None:
        return partial(progress, f"{verb} {archive.name}") if progress else None

    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{folder.name}.lock"):
            files = _complete_files(root, split)  # another process may have finished it while this one waited
            if files:
                return DownloadedSplit(split=split, folder=folder, files=files, downloaded=False)
            keep = keep_archives or path.exists()
            download_file(f"{base}/{path.name}", path, known_hash=f"md5:{archive.md5}", progress=step("download"))
            unpack_zip(path, folder, check=partial(_check_layout, archive=archive), progress=step("unpack"))
            if not keep:
                path.unlink()
    files = _complete_files(root, split)
    return DownloadedSplit(split=split, folder=folder, files=files, downloaded=True, archive=path if keep else None)


def _complete_files(root: Path, split: Split) -> int:
    """Number of files of a complete split; 0 if its folder is missing or empty.

    Raises:
        DataError: the folder holds something else than the complete split.
    """
    archive = LOVEDA[split]
    folder = root / Path(archive.name).stem
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return 0
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; move it away or choose another root")
    files, expected = _count_files(folder), _receipt_files(folder) or archive.files
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


def _receipt_files(folder: Path) -> int:
    try:
        return int(json.loads((folder / RECEIPT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


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


def unpack_zip(
    archive: Path, folder: Path, *, check: Callable[[Path], None] | None = None, progress: Progress | None = None
) -> None:
    """Unpack ``archive`` as ``folder``, which appears when it is complete and checked.

    A top folder of the same name within the archive is left out: ``Train/Urban/…`` and ``Urban/…`` both unpack to
    ``folder/Urban/…``.

    Args:
        archive: the zip file.
        folder: the folder to create; it does not exist, or is empty.
        check: called with the folder before it gets its name; raises if its content is wrong.
        progress: called with the number of bytes unpacked and of all bytes.

    Raises:
        DownloadError: the archive is damaged, encrypted, too large or unsafe, or the disk is full.
    """
    with disk_errors(folder), _zip_errors(archive), zipfile.ZipFile(archive) as opened:
        members = _safe_members(opened, archive, folder.name)
        total = sum(info.file_size for info, _ in members)
        if total > MAX_BYTES or len(members) > MAX_FILES:
            raise DownloadError(
                f"{archive} unpacks to {len(members)} files of {format_bytes(total)}, more than {MAX_FILES} files or "
                f"{format_bytes(MAX_BYTES)}; nothing was unpacked, check its origin"
            )
        check_free_space(folder, total)
        with temporary_path(folder, folder=True) as part:
            done = 0
            for info, name in members:
                path = part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as packed, path.open("xb") as file:
                    while chunk := packed.read(CHUNK):
                        file.write(chunk)
                        done += len(chunk)
                if progress:
                    progress(done, total)
            if check:
                check(part)
            if folder.is_dir():
                folder.rmdir()
            part.rename(folder)


def _safe_members(opened: zipfile.ZipFile, archive: Path, top: str) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of an archive with their paths below the folder.

    Raises:
        DownloadError: a member would be written outside the folder, is a link, is encrypted, or occurs twice.
    """
    members: dict[str, tuple[zipfile.ZipInfo, PurePosixPath]] = {}
    for info in opened.infolist():
        name = info.orig_filename
        path = PurePosixPath(name)
        unsafe = None
        if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name):
            unsafe = "has a path outside the folder"
        elif stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            unsafe = "is a link or a device"
        elif info.flag_bits & 0x1:
            unsafe = "is encrypted"
        if path.parts[:1] == (top,) and len(path.parts) > 1:
            path = PurePosixPath(*path.parts[1:])
        if str(path).casefold() in members:  # some file systems ignore case
            unsafe = "occurs twice"
        if unsafe:
            raise DownloadError(f"{archive}: {name!r} {unsafe}; nothing was unpacked, check the archive's origin")
        if not info.is_dir() and not any(part in CLUTTER or part.startswith("._") for part in path.parts):
            members[str(path).casefold()] = info, path
    return list(members.values())


@contextmanager
def _zip_errors(archive: Path) -> Iterator[None]:
    """Raise errors of a damaged archive as `DownloadError`; `zipfile` raises RuntimeError for encryption."""
    damage = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, RuntimeError)
    try:
        yield
    except damage as error:
        raise DownloadError(
            f"{archive} is not an intact zip archive ({error}); delete it and download it again"
        ) from error
