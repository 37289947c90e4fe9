"""Predict a raster window by window into a georeferenced map, in constant memory; a stopped job resumes."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from overfly.core.atomic_files import append_digest
from overfly.core.errors import DataError, NotFiniteError, OverflyError, RecipeError
from overfly.core.prefetch import background, prefetch
from overfly.data.headers import GDAL_ERRORS
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor
from overfly.raster import manifest as manifests
from overfly.raster import tiling, writer
from overfly.raster.manifest import MapSettings, ProductKind
from overfly.raster.polygons import write_polygons
from overfly.raster.raster_source import RasterSource, inspect_raster, resampling_factors
from overfly.raster.tiling import MEMORY, Blend, FinishedRows, TilingPlan, WindowBatch
from overfly.raster.writer import UnfinishedMap, UnwrittenError, write_cog

QUEUE_SIZE = 3
"""Batches queued before and after the network."""
MAX_SCALE = 64
"""Largest factor by which a raster is enlarged for the network, along each axis."""
SIZE_MULTIPLE = 32
"""Windows of small rasters are multiples of this, in pixels."""
OnProgress = Callable[[int, int], None]
"""Called with the numbers of finished and of all steps."""


@dataclass(frozen=True)
class MapResult:
    """A finished map of a raster.

    Attributes:
        files: all files, the map first.
        created: False if the map existed already.
        resumed: steps finished before the job was interrupted.
        windows: number of predicted windows.
        seconds, network_seconds: duration of the whole job, and of the network's predictions.
        shares: share of each class in the valid pixels.
        notes: remarks for the user.
    """

    source: str
    out: Path
    files: Sequence[Path]
    created: bool = True
    resumed: int = 0
    windows: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Job:
    """A network, a raster, its windows, the unfinished map, and the steps that are finished already."""

    predictor: Predictor
    source: RasterSource
    plan: TilingPlan
    unfinished: UnfinishedMap
    done: int


def map_raster(
    predictor: Predictor, source: str, out: Path, settings: MapSettings, *, network: str,
    on_progress: OnProgress | None = None, memory: int = MEMORY,
) -> MapResult:  # fmt: skip
    """Predict the map of one raster.

    Reading, prediction, and blending with writing run concurrently. The unfinished map is in a hidden folder beside
    ``out``, from which an interrupted job resumes.

    ``network`` is the digest of the network's file; ``memory`` is the number of bytes that the probabilities of a row
    of windows may take. Raises `DataError`: the raster cannot be read or does not fit the network, the map cannot be
    written, or a map of other settings exists.
    """
    start = time.monotonic()
    raster = inspect_raster(
        source, predictor.metadata, bands=settings.bands, nodata=settings.nodata, max_value=settings.max_value,
        alpha_band=settings.alpha_band,
    )  # fmt: skip
    manifest = manifests.make_manifest(raster, predictor, settings, network)
    files = manifests.output_files(out, settings)
    manifests.check_outputs(raster, out, files)
    if manifests.map_exists(out, files, manifest, settings):
        writer.discard_stale(out, manifest)
        return MapResult(source, out, list(files.values()), created=False)
    plan = plan_raster(raster, predictor.metadata, settings, memory)
    notes = _notes(raster, predictor.metadata, settings)
    classes = predictor.metadata.classes
    products = manifests.list_products(classes, settings)
    with writer.lock_unfinished(out) as folder:
        if manifests.map_exists(out, files, manifest, settings):  # finished by another process meanwhile
            writer.discard(folder)
            return MapResult(source, out, list(files.values()), created=False)
        unfinished = UnfinishedMap(folder, raster, classes, products, manifest, settings.temporary)
        with _write_errors(out):
            done, discarded = unfinished.begin()
        if out.exists() and not settings.overwrite:
            notes.append(f"{out} was made again: one of its files was missing, cut, changed or of an older version")
        if discarded:
            notes.append(f"an unfinished {out.name} of other settings was discarded")
        job = _Job(predictor, raster, plan, unfinished, done)
        windows, network_seconds, shares = _finish(job, out, files, settings, on_progress)
    seconds = time.monotonic() - start
    return MapResult(source, out, list(files.values()), True, done, windows, seconds, network_seconds, shares, notes)


def plan_raster(source: RasterSource, metadata: ModelMetadata, settings: MapSettings, memory: int) -> TilingPlan:
    """Plan the windows of a raster; smaller than the settings' for a smaller raster if the network accepts any size.

    Raises `DataError`: the resolution would enlarge the raster too much, or its ground sample distance is unknown, and
    `RecipeError`: the network has a fixed window, and ``settings.window`` is another.
    """
    size = settings.window or metadata.window
    if metadata.fixed and size != metadata.window:
        raise RecipeError(f"--window must be {metadata.window}, the fixed window of this network, got {size}")
    scale = resampling_factors(source, settings.resolution)
    if source.gsd is not None and max(scale) > MAX_SCALE:
        raise DataError(
            f"{source.source} has pixels of {max(source.gsd):.3g} m, and --resolution {settings.resolution:.3g} would "
            f"enlarge it {max(scale):.3g} times; give a --resolution of {1.01 * max(source.gsd) / MAX_SCALE:.3g} m or "
            "more, or leave out --resolution and --match-gsd"
        )
    if not metadata.fixed:
        longest = max(tiling.scaled(source.height, scale[0]), tiling.scaled(source.width, scale[1]))
        size = min(size, -(-longest // SIZE_MULTIPLE) * SIZE_MULTIPLE)
    return tiling.plan_windows(
        source.height, source.width, classes=len(metadata.classes), size=size, overlap=settings.overlap, scale=scale,
        memory=memory,
    )  # fmt: skip


def _notes(source: RasterSource, metadata: ModelMetadata, settings: MapSettings) -> list[str]:
    """Return remarks on differences between a raster and the network's training images."""
    notes: list[str] = []
    if source.alpha_band is not None and settings.alpha_band is None:
        notes.append(
            f"{source.source} marks its band {source.alpha_band} as alpha, so the map has no data where it is 0; if it "
            "is a measurement, give --no-alpha-band"
        )
    if source.gain != 1 and settings.max_value is None:
        notes.append(
            f"{source.source} declares a scale of {source.gain:g}, and its values were multiplied by it; for another "
            "scale, give the value of its brightest pixel with --max-value"
        )
    if settings.resolution is not None or metadata.gsd is None or source.gsd is None:
        return notes
    ratio = (source.gsd[0] * source.gsd[1]) ** 0.5 / metadata.gsd
    if not 2 / 3 < ratio < 3 / 2:
        notes.append(
            f"{source.source} has pixels of {ratio * metadata.gsd:.3g} m and the network was trained on "
            f"{metadata.gsd:g} m; --match-gsd resamples the raster to that"
        )
    return notes


def _finish(
    job: _Job, out: Path, files: Mapping[ProductKind | str, Path], settings: MapSettings, on_progress: OnProgress | None
) -> tuple[int, float, dict[str, float]]:
    """Finish and publish a map; after a write error keep it for resuming. Return windows, network's seconds, shares."""
    try:
        with _write_errors(out):
            windows, seconds = _predict(job, settings.batch, on_progress)
            if job.unfinished.intact_steps(job.plan.steps) < job.plan.steps:
                raise UnwrittenError(f"{out}: finished rows changed on the disk; the same command resumes")
            unfinished = job.unfinished
            shares = writer.class_shares(unfinished.path(unfinished.products[0]), unfinished.classes)
            _publish(job, files, settings)
    except OverflyError as error:
        if not isinstance(error, UnwrittenError):
            writer.discard(job.unfinished.folder)
        raise
    writer.discard(job.unfinished.folder)
    return windows, seconds, shares


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """Convert errors of the system or of GDAL while writing to `UnwrittenError`."""
    try:
        yield
    except (OSError, *GDAL_ERRORS) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UnwrittenError(
            f"{out} cannot be written ({reason}); correct this and give the same command again: it resumes"
        ) from error


def _predict(job: _Job, batch: int, on_progress: OnProgress | None) -> tuple[int, float]:
    """Predict the remaining windows; return their number and the network's seconds."""
    count, seconds = 0, 0.0
    if on_progress is not None:
        on_progress(job.done, job.plan.steps)
    items = tiling.read_windows(job.source, job.plan, batch, job.done)
    with background(_row_writer(job, on_progress), QUEUE_SIZE) as put, prefetch(items, QUEUE_SIZE) as read:
        for item in read:
            if isinstance(item, FinishedRows):
                put(item)
                continue
            start = time.monotonic()
            probabilities = job.predictor(item.images)
            seconds += time.monotonic() - start
            count += len(item.images)
            put((item, probabilities))
    return count, seconds


def _row_writer(
    job: _Job, on_progress: OnProgress | None
) -> Callable[[FinishedRows | tuple[WindowBatch, Floats]], None]:
    """Return a function that blends batches and writes finished rows in order."""
    plan, rows, unfinished = job.plan, len(job.plan.tops), job.unfinished
    blends: dict[int, Blend] = {}

    def get_blend(strip: int) -> Blend:
        if strip not in blends:
            blends.clear()
            finished = plan.finished_rows(min(max(job.done - strip * rows, 0), rows) - 1)
            blends[strip] = Blend.start(plan, plan.strips[strip], len(unfinished.classes), finished)
        return blends[strip]

    def process(item: FinishedRows | tuple[WindowBatch, Floats]) -> None:
        if not isinstance(item, FinishedRows):
            batch, probabilities = item
            if not np.isfinite(probabilities.sum()):
                raise NotFiniteError(
                    f"the network's probabilities are not finite on {job.source.source}; give --nodata or --max-value "
                    "if it holds values beyond the sensor's range, else train or export the network again"
                )
            for window, scores in zip(batch.windows, probabilities, strict=True):
                get_blend(batch.strip).add(scores, window)
            return
        blend = get_blend(item.strip)
        sums, left = blend.read(item.first, item.last), plan.strips[item.strip].first
        digest = hashlib.sha256()
        for product in unfinished.products if item.first < item.last else ():
            bands = manifests.encode(product, sums, item.nodata_mask)
            unfinished.write(product, bands, item.first, left)
            digest.update(bands.data)
        blend.drop(item.last)
        step = item.strip * rows + item.row + 1
        unfinished.advance(step, (item.first, item.last, left, left + sums.shape[2]), digest.hexdigest())
        if on_progress is not None:
            on_progress(step, plan.steps)

    return process


def _publish(job: _Job, files: Mapping[ProductKind | str, Path], settings: MapSettings) -> None:
    """Write all files in the hidden folder, then rename them, the map last."""
    unfinished = job.unfinished
    written = {product.kind: write_cog(unfinished, product) for product in unfinished.products}
    ready: list[tuple[Path, Path]] = []
    if settings.polygons:
        outlines = unfinished.folder / f"polygons.{settings.polygons}"
        write_polygons(written["classes"], outlines, unfinished.classes, min_area=settings.min_area)
        ready.append((outlines, files["polygons"]))
    for kind, file in reversed(written.items()):
        sidecar = Path(f"{file}.aux.xml")
        ready += [(sidecar, Path(f"{files[kind]}.aux.xml"))] if sidecar.exists() else []
        ready.append((file, files[kind]))
    for file, _ in ready:  # before the first rename, to detect a full disk
        with file.open("r+b") as stream:
            if file.suffix == ".tif":
                append_digest(stream)
            if not settings.temporary:
                os.fsync(stream.fileno())
    for kind in written:
        Path(f"{files[kind]}.aux.xml").unlink(missing_ok=True)  # of a replaced map
    for file, target in ready:
        file.replace(target)
