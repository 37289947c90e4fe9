"""Which rasters are meant, by files, folders, globs and addresses, and what their maps are called."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from overfly.core.errors import DataError
from overfly.data.headers import SUFFIXES
from overfly.data.listing import natural_key

WILD = frozenset("*?[")


def list_rasters(entries: Sequence[str], out: Path) -> dict[str, Path]:
    """The rasters that are meant, each with the map that will be made of it.

    Args:
        entries: files, folders, globs, addresses such as s3://bucket/scenes/*.tif.
        out: a .tif file for one raster; else a folder, in which maps are called after their rasters, below the folders
            that a glob's first wildcard begins at.

    Raises:
        DataError: an entry means nothing.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        found.update(_addresses(entry) if "://" in entry else _paths(entry))
    if not found:
        raise DataError("no raster was named; give files, folders or globs")
    if out.suffix.lower() in (".tif", ".tiff") and not out.is_dir():
        if len(found) > 1:
            raise DataError(f"--out {out} names one map, and there are {len(found)} rasters; give a folder")
        return dict.fromkeys(found, out)
    if len(found) > 1 or not out.is_dir():
        for place in (out, *out.absolute().parents):
            if place.exists() and not place.is_dir():
                raise DataError(
                    f"--out {out} is no folder, as {place} is a file; give a folder, or a name ending in .tif"
                )
    return {source: out / name.with_suffix(".tif") for source, name in found.items()}


def check_distinct_outputs(files: Mapping[str, Iterable[Path]]) -> None:
    """See that no two rasters would write one file.

    Args:
        files: what is made of each raster.

    Raises:
        DataError: two would.
    """
    first: dict[Path, str] = {}
    for source, places in files.items():
        for place in places:
            if place in first:
                raise DataError(
                    f"{first[place]} and {source} would both become {place}; do them in two commands, each with its "
                    "--out"
                )
            first[place] = source


def _paths(entry: str) -> dict[str, Path]:
    """Files by an entry, each with its map's name below the folder of maps."""
    path = Path(entry)
    if path.is_dir():
        files = sorted(
            (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")),
            key=lambda file: natural_key(file.name),
        )
        if not files:
            raise DataError(f"{entry} holds no rasters ({', '.join(SUFFIXES)}); name another folder, or a glob")
        return {str(file): Path(file.name) for file in files}
    if path.exists() or not WILD & set(entry):
        return {entry: Path(path.name)}
    named = [Path(name) for name in sorted(glob.glob(entry, recursive=True), key=natural_key)]  # noqa: PTH207 - any root
    files = [file for file in named if not file.is_dir()]
    if not files:
        raise DataError(f"{entry} matches no file; correct the pattern")
    fixed = []
    for part in path.parts:
        if WILD & set(part):
            break
        fixed.append(part)
    return {str(file): file.relative_to(Path(*fixed)) if fixed else file for file in files}


def _addresses(entry: str) -> dict[str, Path]:
    """Addresses by an entry with "://"; those with wildcards are listed by fsspec."""
    scheme, _, rest = entry.partition("://")
    if not WILD & set(rest.split("?")[0] if scheme.startswith("http") else rest):
        return {entry: Path(PurePosixPath(rest.split("?")[0]).name)}
    try:
        from fsspec.core import url_to_fs

        system, pattern = url_to_fs(entry)
        listed = sorted(system.glob(pattern), key=natural_key)
    except ImportError as error:
        raise DataError(
            f"listing {entry} takes a package ({error}); install it, or name the rasters one by one"
        ) from None
    except Exception as error:  # each storage raises its own
        raise DataError(
            f"{entry} cannot be listed ({' '.join(str(error).split())}); check address and rights"
        ) from error
    if not listed:
        raise DataError(f"{entry} matches nothing; correct the pattern")
    return {system.unstrip_protocol(name): Path(PurePosixPath(name).name) for name in listed}
