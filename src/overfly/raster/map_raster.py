"""A raster in, a georeferenced map out, window by window, in constant memory; what is killed goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from overfly.core.errors import DataError, NotFiniteError, OverflyError
from overfly.core.records import IGNORE
from overfly.exporting.predictor import Floats, Predictor
from overfly.raster import blending
from overfly.raster import resume_store as store
from overfly.raster.cog import write_cog
from overfly.raster.job import MapSettings, check_outputs, is_made, make_manifest, outputs, plan_raster, raster_notes
from overfly.raster.overlapping import ahead, behind
from overfly.raster.polygons import write_polygons
from overfly.raster.products import Kind, Product, make, products
from overfly.raster.raster_source import RasterSource, inspect_raster
from overfly.raster.resume_store import Manifest, Store, UnwrittenError
from overfly.raster.tiling import MEMORY, TilingPlan
from overfly.raster.window_reader import FinishedRows, WindowBatch, read_windows

AHEAD = 3
"""Batches that wait before the network, and behind it."""
IMPLAUSIBLE = 1000
"""Times the brightest pixel from which on a value is no brightness."""
OnProgress = Callable[[int, int], None]
"""Called with the steps that are done, and how many there are."""


@dataclass(frozen=True)
class MapResult:
    """A finished map.

    Attributes:
        source: the raster.
        out: the map.
        files: all that was written, the map first.
        made: False where the same map was there already.
        resumed: steps that an earlier, killed job had done.
        windows: windows that the network saw.
        seconds: the whole job.
        network: seconds in which the network was at work.
        shares: share of each class among the pixels that were measured.
        notes: sentences that a user should read.
    """

    source: str
    out: Path
    files: Sequence[Path]
    made: bool = True
    resumed: int = 0
    windows: int = 0
    seconds: float = 0.0
    network: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Work:
    """All that a job works with.

    Attributes:
        predictor: the network.
        scene: the raster.
        plan: its windows.
        held: where the unfinished map lies.
        wanted: what is written.
        job: what the map is made of.
        done: steps that were done before.
    """

    predictor: Predictor
    scene: RasterSource
    plan: TilingPlan
    held: Store
    wanted: Sequence[Product]
    job: Manifest
    done: int


def map_raster(
    predictor: Predictor,
    source: str,
    out: Path,
    settings: MapSettings,
    *,
    network: str,
    on_progress: OnProgress | None = None,
    memory: int = MEMORY,
) -> MapResult:
    """Make the map of one raster.

    Reading, the network, and blending with writing go on at the same time. The map appears under its name when it is
    whole; until then it lies in a hidden folder beside it, which a job that was killed goes on from.

    Args:
        predictor: the network.
        source: path or address of the raster.
        out: the map, a .tif file.
        settings: how it is made.
        network: what tells this network from others, such as its file's checksum.
        on_progress: called as the job goes on.
        memory: bytes that the probabilities of a row of windows may take.

    Raises:
        DataError: the raster cannot be read or does not fit the network, the map cannot be written, or there is one
            already that was made otherwise.
    """
    began = time.monotonic()
    scene = inspect_raster(
        source, predictor.metadata, bands=settings.bands, nodata=settings.nodata, max_value=settings.max_value,
        alpha_band=settings.alpha_band,
    )  # fmt: skip
    job = make_manifest(scene, predictor, settings, network)
    files = outputs(out, settings)
    check_outputs(scene, out, files)
    if is_made(out, files, job, settings):
        store.clear(out, job)
        return MapResult(source, out, list(files.values()), made=False)
    plan = plan_raster(scene, predictor.metadata, settings, memory)
    notes = raster_notes(scene, predictor.metadata, settings)
    with store.locked(out) as folder:
        if is_made(out, files, job, settings):  # another process has just finished it
            store.discard(folder)
            return MapResult(source, out, list(files.values()), made=False)
        wanted = products(
            len(predictor.metadata.classes), probabilities=settings.probabilities, uncertainty=settings.uncertainty
        )
        held = Store(folder, scene.height, scene.width)
        with _writable(out):
            done, other = store.begin(held, wanted, job)
        if other:
            notes.append(f"an unfinished {out.name} of other settings was thrown away")
        work = Work(predictor, scene, plan, held, wanted, job, done)
        windows, busy, shares = _finished(work, out, files, settings, on_progress)
    took = time.monotonic() - began
    return MapResult(source, out, list(files.values()), True, done, windows, took, busy, shares, notes)


def _finished(
    work: Work, out: Path, files: dict[str, Path], settings: MapSettings, on_progress: OnProgress | None
) -> tuple[int, float, dict[str, float]]:
    """Do what is left and give the map its name; windows, the network's seconds, and the classes' shares.

    What is half done stays where it is if it cannot be written now, and is thrown away if it can never be finished.
    """
    try:
        with _writable(out):
            windows, busy = _run(work, settings.batch, on_progress)
            shares = _shares(work)
            _publish(work, files, settings)
    except OverflyError as error:
        if not isinstance(error, UnwrittenError):
            store.discard(work.held.folder)
        raise
    store.discard(work.held.folder)
    return windows, busy, shares


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    """Tell what the system refuses to write as a sentence."""
    try:
        yield
    except OSError as error:
        raise UnwrittenError(
            f"{out} cannot be written ({error.strerror or error}); put this right and give the same command again: it "
            "goes on where it was"
        ) from error


def _run(work: Work, batch: int, on_progress: OnProgress | None) -> tuple[int, float]:
    """Do the steps that are left; how many windows that took, and how long the network was at work."""
    count, busy = 0, 0.0
    if on_progress is not None:
        on_progress(work.done, work.plan.steps)
    items = read_windows(work.scene, work.plan, batch, work.done)
    with behind(_finisher(work, on_progress), AHEAD) as put, ahead(items, AHEAD) as read:
        for item in read:
            if isinstance(item, FinishedRows):
                put(item)
                continue
            begun = time.monotonic()
            probabilities = work.predictor(item.images)
            busy += time.monotonic() - begun
            count += len(item.images)
            put((item, probabilities))
    return count, busy


def _finisher(
    work: Work, on_progress: OnProgress | None
) -> Callable[[FinishedRows | tuple[WindowBatch, Floats]], None]:
    """What blends and writes, given batches and the ends of rows in order."""
    plan, rows = work.plan, len(work.plan.tops)
    blends: dict[int, blending.Blend] = {}

    def current(slab: int) -> blending.Blend:
        if slab not in blends:
            blends.clear()
            made = plan.made(min(max(work.done - slab * rows, 0), rows) - 1)
            blends[slab] = blending.blend(plan, plan.slabs[slab], len(work.predictor.metadata.classes), made)
        return blends[slab]

    def finish(item: FinishedRows | tuple[WindowBatch, Floats]) -> None:
        if not isinstance(item, FinishedRows):
            batch, probabilities = item
            if not np.isfinite(probabilities.sum()):
                raise _not_finite(work, batch, probabilities)
            for window, scores in zip(batch.places, probabilities, strict=True):
                blending.add(current(batch.slab), scores, window)
            return
        blend = current(item.slab)
        sums = blending.take(blend, item.first, item.last)
        for product in work.wanted:
            store.write(
                work.held, product, make(product, sums, item.nodata_mask), item.first, plan.slabs[item.slab].first
            )
        blending.drop(blend, item.last)
        step = item.slab * rows + item.row + 1
        store.advance(work.held, work.job, step)
        if on_progress is not None:
            on_progress(step, plan.steps)

    return finish


def _not_finite(work: Work, batch: WindowBatch, probabilities: Floats) -> OverflyError:
    """Whose fault it is: the raster's, where the network was shown what no picture holds, else the network's."""
    scene, metadata = work.scene, work.predictor.metadata
    images = batch.images[~np.isfinite(probabilities).all(axis=(1, 2, 3))].astype(np.float64)
    largest = images.flat[np.abs(images).argmax()] / scene.gain
    if abs(largest) * scene.gain <= IMPLAUSIBLE * metadata.max_value:
        return NotFiniteError(f"the network's probabilities are not finite on {scene.source}; train or export it anew")
    shown = f"such as {largest:.9g}" if np.isfinite(largest) else "of up to 1e38"
    value = f"{largest:.9g}" if np.isfinite(largest) else "VALUE"
    return DataError(
        f"{scene.source} holds values {shown}, and {metadata.max_value / scene.gain:g} is taken for its brightest "
        f"pixel; say "
        f"--nodata {value} if they stand for nothing measured, or --max-value if pixels are as bright"
    )


def _shares(work: Work) -> dict[str, float]:
    """Share of each class among the pixels that were measured."""
    counts = np.zeros(256, np.int64)
    with work.held.plane(work.wanted[0]).open("rb") as file:
        while piece := file.read(1 << 22):
            counts += np.bincount(np.frombuffer(piece, np.uint8), minlength=256)
    total = max(1, int(counts[:IGNORE].sum()))
    return {name: int(counts[index]) / total for index, name in enumerate(work.predictor.metadata.classes.names)}


def _publish(work: Work, files: dict[Kind | str, Path], settings: MapSettings) -> None:
    """Make all files in the hidden folder, then give them their names, the map's last."""
    classes = work.predictor.metadata.classes
    made = {product.kind: write_cog(work.held, product, classes, work.scene.place, work.job) for product in work.wanted}
    ready: list[tuple[Path, Path]] = []
    if settings.polygons:
        outlines = work.held.folder / f"polygons.{settings.polygons}"
        write_polygons(made["classes"], outlines, classes, min_area=settings.min_area)
        ready.append((outlines, files["polygons"]))
    for kind, file in reversed(made.items()):
        sidecar = Path(f"{file}.aux.xml")
        ready += [(sidecar, Path(f"{files[kind]}.aux.xml"))] if sidecar.exists() else []
        ready.append((file, files[kind]))
    for file, _ in ready:  # all of them first: a disk that is full says so before any has its name
        with file.open("rb") as written:
            os.fsync(written.fileno())
    for kind in made:
        Path(f"{files[kind]}.aux.xml").unlink(missing_ok=True)  # of an earlier map: it would speak for this one
    for file, target in ready:
        file.replace(target)
