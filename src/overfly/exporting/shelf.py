"""Files of a folder that is shared: copied whole or not at all, and never over what is somebody else's."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from overfly.core.atomic_files import atomic_write
from overfly.core.errors import DownloadError, OverflyError, WeightsError
from overfly.models.checkpoints import check_digest

OPENED = (".onnx", ".xml", ".pt2")
"""Suffixes of the files that are opened."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room."""
OWN_PAGE = "---\nlibrary_name: overfly\n"
"""Begins the page of a repository of ours."""
OWN_CARD = "Semantic segmentation of aerial imagery: `"
"""Stands in every card of ours."""


def parts(export: Path) -> list[Path]:
    """An export with its weights and figures, those that are there."""
    return [part for part in (export, *(export.with_suffix(end) for end in (".bin", ".json"))) if part.is_file()]


def exports(folder: Path) -> list[Path]:
    """Files of a folder that are opened; an .xml is one only with its .bin (others, such as .aux.xml, are not)."""
    found = (part for part in sorted(folder.glob("*")) if part.suffix in OPENED and part.is_file())
    return [part for part in found if part.suffix != ".xml" or part.with_suffix(".bin").is_file()]


def check_export(export: Path) -> None:
    """Compare an export with the checksum and the size in the figures beside it, where they are.

    Raises:
        WeightsError: it is another file, or damaged.
    """
    figures = _figures(export.with_suffix(".json"))
    if figures.get("file") != export.name:
        return
    size = sum(part.stat().st_size for part in (export, export.with_suffix(".bin")) if part.is_file())
    if size != figures["bytes"]:
        raise WeightsError(
            f"{export} is damaged: with its weights it has {size} bytes, {figures['bytes']} by the .json beside it; "
            "export it again, or fetch it again"
        )
    check_digest(export, str(figures["sha256"]))


def put(files: Mapping[Path, Path | str], folder: Path) -> None:
    """Write files into a folder, all of them or none; those that lie there with the same content are left alone.

    Args:
        files: what is to be written by where: a file to copy, or text. The last is given its name last.
        folder: where they go; made where it is not there.

    Raises:
        DownloadError: a file of somebody else is there, or the disk refuses.
    """
    for target, source in files.items():
        if target.exists() and not (_same(target, source) or _ours(target)):
            raise DownloadError(
                f"{target} is there already and is none of overfly's files, so nothing was written; move it away, or "
                "choose another folder"
            )
    new = not folder.exists()
    written: dict[Path, Path] = {}
    try:
        with contextlib.ExitStack() as held:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for target, source in files.items():
                if target.exists() and _same(target, source):
                    continue
                with writing(target):
                    written[target] = held.enter_context(atomic_write(target))
                    _write(source, written[target])
            for target, part in written.items():
                with writing(target):
                    part.replace(target)
    except OverflyError:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk says while a file is written into a sentence that names the file."""
    try:
        yield
    except BrokenPipeError:  # no disk's: whoever listened has gone
        raise
    except OSError as error:
        if error.errno in FULL:
            text = "the disk is full; free some space there, or choose another folder, then try again"
        else:
            text = f"it cannot be written ({error.strerror or error}); choose a folder you may write to"
        raise DownloadError(f"{path}: {text}") from error


def page_target(page: Path, found: Iterable[Path], out: Path) -> Path | None:
    """Where a repository's page goes: the card of the export that it tells of; None: nowhere that is free."""
    names = list(found)
    text = page.read_text(encoding="utf-8", errors="replace")
    told = [export for export in names if f"`{export.name}`" in text] or names
    if len(told) == 1 and not told[0].with_suffix(".md").is_file():
        return out / f"{told[0].stem}.md"
    target = out / page.name
    return target if not target.exists() or _same(target, page) else None


def _write(source: Path | str, target: Path) -> None:
    if isinstance(source, str):
        target.write_text(source, encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def _same(target: Path, source: Path | str) -> bool:
    if not target.is_file():
        return False
    if isinstance(source, str):
        return target.read_bytes() == source.encode()
    return filecmp.cmp(target, source, shallow=False)


def _ours(file: Path) -> bool:
    """Whether a file is one that overfly wrote: a page or card by its words, the rest by the figures beside it."""
    if not file.is_file():
        return False
    if file.suffix == ".md":
        text = file.read_text(encoding="utf-8", errors="replace")
        return text.startswith(OWN_PAGE) or OWN_CARD in text
    return Path(str(_figures(file.with_suffix(".json")).get("file", ""))).stem == file.stem


def _figures(file: Path) -> dict[str, object]:
    """The figures of an export; empty where a file is not there or no such one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = {"file", "bytes", "sha256", "settings", "metadata"}
    return found if isinstance(found, dict) and keys <= found.keys() else {}


__all__ = ["FULL", "OPENED", "OWN_PAGE", "check_export", "exports", "page_target", "parts", "put", "writing"]
