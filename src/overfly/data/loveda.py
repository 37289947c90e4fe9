"""LoveDA (Wang et al., 2021): aerial scenes of Nanjing, Changzhou and Wuhan at 0.3 m; the dataset and its download."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import model_validator

from overfly.core.atomic_files import lock
from overfly.core.classes import Classes
from overfly.core.download import OnBytes, disk_errors, download_file, unpack_zip
from overfly.core.errors import DataError, DownloadError, render_text
from overfly.data.datasets import Dataset
from overfly.data.domain import SPLITS, Split


class LoveDA(Dataset, name="loveda"):
    """LoveDA, with `scene` in place of a subset; its facts are in its data sheet."""

    scene: Literal["urban", "rural", "both"] = "both"
    """Scenes: ``urban``, ``rural``, or ``both`` as one domain."""

    @model_validator(mode="before")
    @classmethod
    def _use_scene(cls, values: Any) -> Any:
        """Choose the subset and the title by the scene."""
        if not isinstance(values, Mapping):
            return values
        scene = str(values.get("scene", "both")).capitalize()
        return {"title": scene, "subset": () if scene == "Both" else scene, **values}


CLASSES = Classes.model_validate(LoveDA.sheet().settings["classes"])
"""The label set of LoveDA, with its official colors."""
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


DOWNLOAD = LoveDA.sheet().download
LOVEDA: Mapping[Split, Archive] = {split: Archive(**entry) for split, entry in DOWNLOAD["archives"].items()}
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
        return render_text(Path(__file__).with_name("downloaded.txt.jinja"), splits=self.splits, license=self.license)

    __rich__ = __str__


def download_loveda(
    root: Path, splits: Iterable[Split] = SPLITS, *, base: str | None = None, progress: NamedProgress | None = None,
    keep_archives: bool = False,
) -> Downloaded:  # fmt: skip
    """Download LoveDA (Wang et al., 2021) to ``root``: ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.

    Complete splits are skipped, interrupted downloads resume, and incomplete or foreign folders are an error. A split
    appears when it is complete. An archive that exists in ``root`` with the right checksum is used and kept.

    The arguments are those of `overfly data fetch`. ``base`` is by default ``OVERFLY_LOVEDA_URL``, else the sheet's;
    ``progress`` is called as bytes are downloaded and unpacked. The masks of ``test`` are not public. Returns the
    splits and the license, which the caller must show. Raises `DataError`: a split's folder exists and is incomplete or
    another dataset, and `DownloadError`: the download fails, does not match its checksum, or does not unpack.
    """
    base = (base or os.environ.get("OVERFLY_LOVEDA_URL") or DOWNLOAD["url"]).rstrip("/")
    chosen = tuple(dict.fromkeys(splits))
    unknown = [name for name in chosen if name not in LOVEDA]
    if unknown:
        raise DataError(f"splits must be some of {', '.join(LOVEDA)}, got {unknown[0]!r}")
    for split in chosen:  # before gigabytes are downloaded
        _complete_files(root, split)
    done = tuple(_download_split(root, split, base, progress, keep_archives) for split in chosen)
    return Downloaded(root=root, splits=done, license=DOWNLOAD["license"])


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
    return sum(len(_names(folder, scene, kind)) for scene in SCENES for kind in ("images_png", "masks_png"))


def _names(folder: Path, scene: str, kind: str) -> set[str]:
    return {path.name for path in (folder / scene / kind).glob("*.png")}


def _check_layout(folder: Path, archive: Archive) -> None:
    """Check that an unpacked archive has LoveDA's layout and a mask for each image, and write the receipt."""
    for scene in SCENES:
        images, masks = (_names(folder, scene, kind) for kind in ("images_png", "masks_png"))
        if not images or (archive.masks and images != masks):
            raise DownloadError(
                f"{archive.name} does not have LoveDA's layout: {len(images)} images and {len(masks)} masks in "
                f"{scene}; check the base URL"
            )
    receipt = {"archive": archive.name, "md5": archive.md5, "files": _count_files(folder)}
    (folder / RECEIPT).write_text(json.dumps(receipt) + "\n", encoding="utf-8")
