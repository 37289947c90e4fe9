"""What a map is made of: settings, files, windows; and whether the same map is there already."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from overfly.core.errors import DataError, RecipeError
from overfly.exporting.predictor import ModelMetadata, Predictor
from overfly.raster.cog import read_manifest
from overfly.raster.products import Kind
from overfly.raster.raster_source import RasterSource, scale_of
from overfly.raster.resume_store import Manifest, alike, begun
from overfly.raster.tiling import TilingPlan, plan_windows, scaled

LARGEST = 64
"""How many times longer and wider a network may see a raster."""
STRIDE = 32
"""Sides of the windows of small pictures are multiples of this."""


@dataclass(frozen=True)
class MapSettings:
    """How maps are made.

    Attributes:
        window: side of the windows in pixels; None takes the network's.
        overlap: share of a window that the next one covers again, 0 to below 1.
        batch: windows given to the network at once.
        bands: numbers of the bands to read, from 1, separated by commas; None where they are the network's.
        nodata: value of pixels in which nothing was measured; None takes what the file says.
        opacity: whether the last band is opacity; None takes what the file says.
        max_value: value of the brightest pixel; None where it is the network's.
        resolution: meters a pixel at which the network sees the raster; None keeps the raster's own.
        probabilities: whether to write a band of probability for each class.
        uncertainty: whether to write a band of entropy.
        polygons: gpkg or geojson, to outline the classes' areas too.
        smallest: area of the smallest polygon, in pixels.
        overwrite: whether to replace a map that was made otherwise.
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
    polygons: str | None = None
    min_area: int = 10
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise RecipeError(f"--overlap {self.overlap} is out of range; take 0 to 0.9")
        for name, value in (("max_value", self.max_value), ("resolution", self.resolution)):
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        if self.polygons not in (None, "gpkg", "geojson"):
            raise RecipeError(f"--polygons {self.polygons} is no format of polygons; take gpkg or geojson")


def outputs(out: Path, settings: MapSettings) -> dict[Kind | str, Path]:
    """The files of a job by what they hold; the map itself first."""
    files: dict[Kind | str, Path] = {"classes": out}
    if settings.probabilities:
        files["probabilities"] = out.with_name(f"{out.stem}_probabilities.tif")
    if settings.uncertainty:
        files["uncertainty"] = out.with_name(f"{out.stem}_uncertainty.tif")
    if settings.polygons:
        files["polygons"] = out.with_suffix(f".{settings.polygons}")
    return files


def make_manifest(scene: RasterSource, predictor: Predictor, settings: MapSettings, network: str) -> Manifest:
    """What the map is made of, as plain values; two jobs that are equal make the same map."""
    path = Path(scene.source)
    stat = path.stat() if path.is_file() else None
    settled = asdict(settings)
    for key in ("batch", "overwrite"):  # they change how fast, and what is replaced
        del settled[key]
    if settings.alpha_band is None:  # a map that was made before there was this setting is the same
        del settled["alpha_band"]
    return {
        "raster": path.name if stat else scene.source,
        "bytes": stat.st_size if stat else None,
        "modified": stat.st_mtime_ns if stat else None,
        "network": network,
        "title": predictor.metadata.title,
        "backend": predictor.backend,
        **settled,
        "window": settings.window or predictor.metadata.window,
        "bands": ",".join(map(str, scene.bands)),
    }


def check_outputs(scene: RasterSource, out: Path, files: dict[Kind | str, Path]) -> None:
    """See that the files can be written where they are asked for."""
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise DataError(f"--out {out} is no name of a map; take one that ends in .tif, or a folder")
    for file in files.values():
        if file.is_symlink() and not file.exists():  # as cp does: it would be replaced, and its target never made
            raise DataError(
                f"{file} is a link to {file.readlink()}, which is not there; take the link away, or choose another "
                "--out, such as the link's target"
            )
        if file.is_dir():
            raise DataError(f"{file} is a folder, and a map of this name is to be written; choose another --out")
        if file.exists() and Path(scene.source).exists() and file.samefile(scene.source):
            raise DataError(f"{file} is the raster itself; choose another --out")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{out} cannot be written: {folder} is no folder that may be written to; choose another --out")


def is_made(out: Path, files: dict[Kind | str, Path], job: Manifest, settings: MapSettings) -> bool:
    """Whether the same map is there, whole.

    Raises:
        DataError: there is another one, and it is not to be replaced.
    """
    if settings.overwrite or not any(file.exists() for file in files.values()):
        return False
    if not out.exists() and begun(out, job):  # killed while the files were given their names, the map's last
        return False
    held = read_manifest(out) if out.exists() else {}
    if alike(held, job):
        return all(file.exists() for file in files.values())
    if not isinstance(held, dict):
        raise DataError(f"{out} is there and is no map of ours; choose another --out, or replace it by --overwrite")
    if not held:
        first = next(file for file in files.values() if file.exists())
        raise DataError(f"{first} is there without its map; move it away, or replace it by --overwrite")
    others = [key for key in job if key not in held or not alike(held[key], job[key])]
    if {"raster", "bytes", "modified"} & set(others):
        shown = f"of {held.get('raster')} as it was then"
    else:
        shown = ", ".join(f"{key} {held.get(key)} instead of {job[key]}" for key in others[:3])
    raise DataError(f"{out} was made otherwise ({shown}); choose another --out, or replace it by --overwrite")


def plan_raster(scene: RasterSource, metadata: ModelMetadata, settings: MapSettings, memory: int) -> TilingPlan:
    """The windows. Small pictures get a window of their own size, where the network takes any."""
    size = settings.window or metadata.window
    if metadata.fixed and size != metadata.window:
        raise RecipeError(f"this network reads windows of {metadata.window} pixels alone; leave --window out")
    scale = scale_of(scene, settings.resolution)
    if scene.ground_size is not None and max(scale) > LARGEST:
        raise DataError(
            f"{scene.source} has pixels of {max(scene.ground_size):.3g} m, and at {settings.resolution:.3g} m the "
            f"network would see each of them {max(scale):.3g} times as long; take a --resolution of "
            f"{1.01 * max(scene.ground_size) / LARGEST:.3g} m or more, or leave --resolution and --match-gsd out"
        )
    if not metadata.fixed:
        longest = max(scaled(scene.height, scale[0]), scaled(scene.width, scale[1]))
        size = min(size, -(-longest // STRIDE) * STRIDE)
    return plan_windows(
        scene.height, scene.width, classes=len(metadata.classes), size=size, overlap=settings.overlap, scale=scale,
        memory=memory,
    )  # fmt: skip


def raster_notes(scene: RasterSource, metadata: ModelMetadata, settings: MapSettings) -> list[str]:
    """What a user should know of a raster that the network may not be made for."""
    notes: list[str] = []
    if scene.alpha_band is not None and settings.alpha_band is None:
        notes.append(
            f"{scene.source} marks its band {scene.alpha_band} as an alpha band: where it is 0 the map has no "
            "data; if it was measured like the others, say --no-alpha-band"
        )
    if scene.gain != 1 and settings.max_value is None:
        notes.append(
            f"{scene.source} says that its values times {scene.gain:g} are what was measured, and so the network saw "
            "them; say --max-value with the value of its brightest pixel for another scale"
        )
    if settings.resolution is not None or metadata.gsd is None or scene.ground_size is None:
        return notes
    ratio = (scene.ground_size[0] * scene.ground_size[1]) ** 0.5 / metadata.gsd
    if not 2 / 3 < ratio < 3 / 2:
        notes.append(
            f"{scene.source} has pixels of {ratio * metadata.gsd:.3g} m and the network was trained on "
            f"{metadata.gsd:g} m; with --match-gsd it sees the raster at that resolution"
        )
    return notes
