"""Settings, files, bands and manifest of a map, and checks for existing maps."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from overfly.core.atomic_files import has_digest
from overfly.core.classes import Classes
from overfly.core.errors import DataError, RecipeError
from overfly.core.records import IGNORE, UInt8
from overfly.data.headers import open_raster
from overfly.data.reading import Mask
from overfly.exporting.predictor import Floats, Predictor
from overfly.raster.raster_source import RasterSource

ProductKind = Literal["classes", "probabilities", "uncertainty", "confidence"]
Manifest = Mapping[str, Any]
"""Raster, network and settings of a map, as JSON values."""
TAG = "OVERFLY_MANIFEST"
"""Metadata key of the manifest in a finished map."""
CHUNK = 1 << 16
"""Pixels that are encoded at once, to stay in the CPU's cache."""


@dataclass(frozen=True)
class MapSettings:
    """Settings of maps: the options of `overfly predict` of the same names; overlap is 0 to 0.9.

    The server sets ``confidence``, which writes MAP_confidence.tif too, the probability of the class in percent, and
    ``temporary``, with which files are not flushed to the disk.

    None stands for the network's window, all bands, the no-data value and alpha band that the file declares, the
    network's value range, a raster that is not resampled, and no polygons.
    """

    window: int | None = None
    overlap: float = 0.25
    batch: int = 4
    bands: str | None = None
    nodata: float | None = None
    alpha_band: bool | None = None
    max_value: float | None = None
    resolution: float | None = None
    probabilities: bool = False
    uncertainty: bool = False
    confidence: bool = False
    temporary: bool = False
    polygons: str | None = None
    min_area: int = 10
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise RecipeError(f"--overlap must be 0 to 0.9, got {self.overlap}")
        for option, value in (("--max-value", self.max_value), ("--resolution", self.resolution)):
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError(f"{option} must be above 0, got {value}")
        if self.polygons not in (None, "gpkg", "geojson"):
            raise RecipeError(f"--polygons must be gpkg or geojson, got {self.polygons}")


@dataclass(frozen=True)
class Product:
    """A file of a map, and the descriptions of its bands.

    ``encode`` converts weighted sums of probabilities (K, h, w) and the no-data mask (h, w) to bands (bands, h, w).
    """

    kind: ProductKind
    bands: tuple[str, ...]
    encode: Callable[[Floats, Mask | None], UInt8]


def list_products(classes: Classes, settings: MapSettings) -> list[Product]:
    """List the files of a map: class ids, and optionally in percent probabilities, entropy and confidence."""
    result = [Product("classes", ("class",), _class_ids)]
    if settings.probabilities:
        result.append(Product("probabilities", tuple(f"{name}: probability" for name in classes.names), _percentages))
    if settings.uncertainty:
        result.append(Product("uncertainty", ("uncertainty: entropy, as a share of the largest",), _entropy))
    if settings.confidence:
        result.append(Product("confidence", ("confidence: probability of the class",), _confidence))
    return result


def encode(product: Product, sums: Floats, nodata_mask: Mask | None) -> UInt8:
    """Encode weighted sums of probabilities (K, h, w) as bands (bands, h, w); 255 for no data (h, w)."""
    _, height, width = sums.shape
    result = np.empty((len(product.bands), height, width), np.uint8)
    rows = max(1, CHUNK // max(1, width))
    for begin in range(0, height, rows):
        part = slice(begin, min(begin + rows, height))
        result[:, part] = product.encode(sums[:, part], None if nodata_mask is None else nodata_mask[part])
    return result


def _class_ids(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    """Return the most probable class; the first of equal ones."""
    best = sums[0].copy()
    ids = np.zeros(best.shape, np.uint8)
    for number in range(1, len(sums)):
        np.copyto(ids, np.uint8(number), where=sums[number] > best)
        np.maximum(best, sums[number], out=best)
    ids[best <= 0] = IGNORE  # covered by no window
    if nodata_mask is not None:
        ids[nodata_mask] = IGNORE
    return ids[None]


def _means(sums: Floats, nodata_mask: Mask | None) -> tuple[Floats, Mask]:
    """Return mean probabilities, and the mask of pixels without data or window."""
    total = sums.sum(0)
    empty: Mask = total <= 0
    means: Floats = (sums / np.where(empty, np.float32(1), total)).astype(np.float32, copy=False)
    return means, empty if nodata_mask is None else nodata_mask | empty


def _percentages(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    means, empty = _means(sums, nodata_mask)
    result: UInt8 = np.rint(100 * means).astype(np.uint8)
    result[:, empty] = IGNORE
    return result


def _confidence(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    return np.asarray(_percentages(sums, nodata_mask).max(0, keepdims=True))


def _entropy(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    means, empty = _means(sums, nodata_mask)
    entropy = -(means * np.log(np.maximum(means, 1e-12))).sum(0) / np.log(max(2, len(means)))
    result: UInt8 = np.rint(100 * np.clip(entropy, 0, 1)).astype(np.uint8)
    result[empty] = IGNORE
    return result[None]


def output_files(out: Path, settings: MapSettings) -> dict[ProductKind | str, Path]:
    """The files of a map by what they hold; the class ids first."""
    files: dict[ProductKind | str, Path] = {"classes": out}
    kinds = ("probabilities", "uncertainty", "confidence")
    files |= {kind: out.with_name(f"{out.stem}_{kind}.tif") for kind in kinds if getattr(settings, kind)}
    if settings.polygons:
        files["polygons"] = out.with_suffix(f".{settings.polygons}")
    return files


def check_outputs(source: RasterSource, out: Path, files: Mapping[ProductKind | str, Path]) -> None:
    """Check that the output files can be written and are not the input raster; raise `DataError` otherwise."""
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise DataError(f"--out must end in .tif, or be a folder, got {out}")
    for file in files.values():
        if file.is_symlink() and not file.exists():  # replacing the link would not write its target
            raise DataError(
                f"{file} is a link to {file.readlink()}, which does not exist; delete the link, or choose another "
                "--out, such as its target"
            )
        if file.is_dir():
            raise DataError(f"{file} is a folder, not a map; choose another --out")
        if file.exists() and Path(source.source).exists() and file.samefile(source.source):
            raise DataError(f"{file} is the input raster; choose another --out")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{out} cannot be written: {folder} is not a writable folder; choose another --out")


def make_manifest(source: RasterSource, predictor: Predictor, settings: MapSettings, network: str) -> Manifest:
    """Return the manifest of a map, with the digest of the network's file; equal manifests give equal maps."""
    path = Path(source.source)
    stat = path.stat() if path.is_file() else None
    values = asdict(settings)
    for key in ("batch", "overwrite", "temporary"):  # they do not change the pixels
        del values[key]
    if not settings.confidence:  # maps of earlier versions do not name it
        del values["confidence"]
    return {
        "raster": path.name if stat else source.source, "bytes": stat.st_size if stat else None,
        "modified": stat.st_mtime_ns if stat else None, "network": network, "title": predictor.metadata.title,
        "backend": predictor.backend, **values, "window": settings.window or predictor.metadata.window,
        "bands": ",".join(map(str, source.bands)),
    }  # fmt: skip


def read_manifest(path: Path) -> Any:
    """Read the manifest of a finished map; None without a manifest, or for other files."""
    try:
        with open_raster(str(path)) as dataset:
            return json.loads(dataset.tags().get(TAG, "null"))
    except (DataError, ValueError):
        return None


def equal_json(first: Any, second: Any) -> bool:
    """Return whether two values are equal as JSON: a tuple equals a list, and NaN equals NaN."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def unfinished_folder(out: Path) -> Path:
    """Return the hidden folder of an unfinished map."""
    return out.with_name(f".{out.name}.unfinished")


def is_unfinished(out: Path, manifest: Manifest) -> bool:
    """Return whether there is an unfinished map of this manifest."""
    try:
        return equal_json(json.loads((unfinished_folder(out) / "progress.json").read_text())["manifest"], manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def map_exists(out: Path, files: Mapping[ProductKind | str, Path], manifest: Manifest, settings: MapSettings) -> bool:
    """Return whether the map of this manifest exists with all files, unchanged; raise `DataError` if another exists."""
    if settings.overwrite or not any(file.exists() for file in files.values()):
        return False
    if not out.exists() and is_unfinished(out, manifest):  # killed while the files were renamed, the map last
        return False
    existing = read_manifest(out) if out.exists() else {}
    if equal_json(existing, manifest):
        return all(file.exists() and (kind == "polygons" or has_digest(file)) for kind, file in files.items())
    if not isinstance(existing, dict):
        raise DataError(f"{out} exists and is not a map of overfly; choose another --out, or replace it by --overwrite")
    if not existing:
        first = next(file for file in files.values() if file.exists())
        raise DataError(f"{first} exists without its map; move it away, or replace it by --overwrite")
    others = [key for key in manifest if key not in existing or not equal_json(existing[key], manifest[key])]
    if {"raster", "bytes", "modified"} & set(others):
        differences = f"of another version of {existing.get('raster')}"
    else:
        differences = ", ".join(f"{key} {existing.get(key)} instead of {manifest[key]}" for key in others[:3])
        differences = differences or "settings that this version of overfly does not have"
    raise DataError(f"{out} was made with other settings ({differences}); choose another --out, or give --overwrite")
