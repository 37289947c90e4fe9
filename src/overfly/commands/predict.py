"""What the API makes of rasters: maps."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from overfly.commands.arguments import MAX_SIDE, check_bounds, pathlike
from overfly.commands.load_predictor import load_predictor
from overfly.core.choices import Backend
from overfly.core.errors import OverflyError, RecipeError
from overfly.exporting.predictor import Predictor
from overfly.raster.fleet import map_rasters
from overfly.raster.inputs import check_distinct_outputs, list_rasters
from overfly.raster.job import MapSettings, outputs
from overfly.raster.map_raster import MapResult, map_raster

__all__ = ["Predicted", "predict"]

PLAIN_SECONDS = 20.0
"""How often a plain line tells how far a map is."""
LISTED = 12
"""Maps that the summary lists; more are counted."""


@dataclass(frozen=True)
class Predicted:
    """Maps, and the rasters that none could be made of."""

    maps: Sequence[MapResult]
    failures: Mapping[str, str]

    @property
    def exit_status(self) -> int:
        """1 where a raster failed."""
        return int(bool(self.failures))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self.maps) == 1 and not self.failures:
            yield from _told(self.maps[0])
        else:
            yield from _summary(self.maps)
        for note in dict.fromkeys(note for each in self.maps for note in each.notes):
            yield f"note: {note}"
        for source, why in self.failures.items():
            yield f"failed: {why if source in why else f'{source}: {why}'}"
        if self.failures:
            total = len(self.failures) + len(self.maps)
            yield f"{len(self.failures)} of {total} rasters failed; the same command does only these again"


Share = Callable[..., tuple[list[MapResult], dict[str, str]]]
"""What gives rasters to several processes: the maps, and what went wrong by raster."""


@pathlike
def predict(
    network: Path, rasters: list[str], *, out: Path = Path("maps"), bands: str | None = None,
    nodata: float | None = None, alpha_band: bool | None = None, max_value: float | None = None,
    resolution: float | None = None, match_gsd: bool = False, probabilities: bool = False, uncertainty: bool = False,
    polygons: Literal["gpkg", "geojson"] | None = None, min_area: int = 10, window: int | None = None,
    overlap: float = 0.25, batch: int = 4, backend: Backend = "auto", device: str = "auto", workers: int = 0,
    scheduler: str | None = None, overwrite: bool = False, quiet: bool = False,
) -> Predicted:  # fmt: skip
    """Make georeferenced maps of rasters, however large, window by window.

    A map lies on its raster's own grid: a Cloud Optimized GeoTIFF of class ids, 255 where nothing was measured, with
    the classes' names and colors. A job that was killed goes on where it was; a map that is there is not made again.

    Args:
        network: the folder of a run, a .safetensors file that it wrote, or an export.
        rasters: files, folders, globs or addresses (s3://, https://) of GeoTIFF, JPEG 2000, PNG or JPEG.
        out: for one raster a name ending in .tif; else a folder for maps called after their rasters.
        bands: numbers of the bands to read, in the order of the training images, such as 4,3,2.
        nodata: value of pixels in which nothing was measured, where the file does not say it.
        alpha_band: the last band is an alpha band, or with --no-alpha-band none is; left out, as the file declares.
        max_value: value of the brightest pixel, where the network was trained on another range.
        resolution: meters a pixel at which the network sees the raster; the map keeps the raster's grid.
        match_gsd: the same, with the resolution of the network's training.
        probabilities: write MAP_probabilities.tif too, a band a class, in percent.
        uncertainty: write MAP_uncertainty.tif too: entropy, in percent of the largest.
        polygons: outline each class's areas too, beside the map (extra: vector).
        min_area: area of the smallest polygon, in pixels.
        window: side of the windows in pixels; left out, the network's.
        overlap: share of a window that the next one covers again.
        batch: windows given to the network at once.
        backend: auto, torch, onnxruntime or openvino.
        device: auto, cpu, cuda, cuda:1 or mps.
        workers: processes that share the rasters on this machine (extra: cluster); 0 makes one map after the other.
        scheduler: address of a running dask scheduler whose workers share the rasters, such as tcp://10.0.0.1:8786.
        overwrite: replace maps that were made otherwise.
        quiet: print no progress.

    Returns:
        The maps, and the rasters that failed. The command exits with status 1 where one of several failed.
    """
    check_bounds(
        {"window": (window or 32, 32, MAX_SIDE), "batch": (batch, 1, 4096), "min-area": (min_area, 1, 10**9)}
        | {"workers": (workers, 0, 256)}
    )
    predictor = load_predictor(network, backend=backend, device=device)
    settings = MapSettings(
        window=window, overlap=overlap, batch=batch, bands=bands, nodata=nodata, alpha_band=alpha_band,
        max_value=max_value,
        resolution=_resolution(resolution, match_gsd, predictor.metadata.gsd), probabilities=probabilities,
        uncertainty=uncertainty, polygons=polygons, min_area=min_area, overwrite=overwrite,
    )  # fmt: skip
    opener = partial(load_predictor, Path(network).absolute(), backend=backend, device=device)
    share = (
        partial(map_rasters, opener, workers=workers, scheduler=scheduler) if workers or scheduler is not None else None
    )
    return _made(predictor, share, list_rasters(rasters, Path(out)), settings, fingerprint(Path(network)), quiet=quiet)


def _made(
    predictor: Predictor, share: Share | None, jobs: dict[str, Path], settings: MapSettings, mark: str, *,
    quiet: bool,
) -> Predicted:  # fmt: skip
    """Maps made one after the other, or by ``share``, which gives them to several processes."""
    check_distinct_outputs({source: outputs(place, settings).values() for source, place in jobs.items()})
    with OnProgress(quiet) as on_progress:
        if share is None:
            return _one_by_one(predictor, jobs, settings, mark, on_progress)
        return _shared(partial(share, settings=settings, network=mark), jobs, on_progress)


def _one_by_one(
    predictor: Predictor, jobs: Mapping[str, Path], settings: MapSettings, mark: str, on_progress: OnProgress
) -> Predicted:
    maps: list[MapResult] = []
    failures: dict[str, str] = {}
    for source, place in jobs.items():
        try:
            maps.append(
                map_raster(predictor, source, place, settings, network=mark, on_progress=on_progress.of(source))
            )
        except OverflyError as error:
            if len(jobs) == 1:
                raise
            failures[source] = str(error)
            on_progress.say(f"failed: {error}")
    return Predicted(maps, failures)


def _shared(share: Share, jobs: Mapping[str, Path], on_progress: OnProgress) -> Predicted:
    """Maps made by several processes or machines, which take paths from the root."""
    absolute = {
        source if "://" in source else str(Path(source).absolute()): place.absolute() for source, place in jobs.items()
    }
    count = on_progress.of(f"{len(jobs)} rasters")
    count(0, len(jobs))
    done = 0

    def on_progress(source: str, found: MapResult | str) -> None:
        nonlocal done
        done += 1
        count(done, len(jobs))
        if isinstance(found, str):
            on_progress.say(f"failed: {found if source in found else f'{source}: {found}'}")

    return Predicted(*share(absolute, on_progress=on_progress))


def fingerprint(network: Path) -> str:
    """Checksum of the file or files that a network is in (SHA-256, 16 digits)."""
    files = [network]
    if network.is_dir():
        held = [network / "best.safetensors", network / "checkpoints" / "best.safetensors"]
        files = [file for file in held if file.is_file()][:1]
    else:
        files += [file for file in (network.with_suffix(".bin"), Path(f"{network}.data")) if file.is_file()]
    checksum = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                checksum.update(piece)
    return checksum.hexdigest()[:16]


def _resolution(resolution: float | None, match_gsd: bool, ground: float | None) -> float | None:
    if not match_gsd:
        return resolution
    if resolution is not None:
        raise RecipeError("--match-gsd and --resolution say the same in two ways; give one of them")
    if ground is None:
        raise RecipeError("the network's training images do not say their ground resolution; give --resolution METERS")
    return ground


class OnProgress:
    """What a person sees while maps are made: a bar in a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True, quiet=quiet),
            disable=quiet or not sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> OnProgress:
        self.bar.start()
        return self

    def __exit__(self, *trace: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            print(f"overfly: {line}", file=sys.stderr, flush=True)

    def of(self, source: str) -> Teller:
        """What tells how far one raster's map is."""
        return Teller(self, source)


class Teller:
    """How far one map is."""

    def __init__(self, on_progress: OnProgress, source: str) -> None:
        self.on_progress, self.source = on_progress, source
        self.task: TaskID | None = None
        self.first, self.began, self.said = 0, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` rows of windows are done."""
        now = time.monotonic()
        if self.task is None:
            self.task = self.on_progress.bar.add_task(Path(self.source).name, total=total)
            self.first, self.began, self.said = done, now, now
            if done:
                self.on_progress.say(f"{self.source} goes on at {done} of {total} rows of windows")
        self.on_progress.bar.update(self.task, completed=done)
        if self.on_progress.bar.disable and now - self.said >= PLAIN_SECONDS and done > self.first:
            self.said = now
            left = (now - self.began) / (done - self.first) * (total - done)
            self.on_progress.say(f"{self.source}: {100 * done / total:.0f} %, {left:.0f} s left")


def _told(made: MapResult) -> RenderResult:
    if not made.made:
        yield f"there already, made alike: {made.out}"
        return
    for file in made.files:
        yield f"written: {file}"
    table = Table(title="share of the measured pixels", title_justify="left")
    table.add_column("class")
    table.add_column("%", justify="right")
    for name, share in made.shares.items():
        table.add_row(name, f"{100 * share:.2f}")
    yield table
    rate = made.windows / made.seconds if made.seconds else 0.0
    yield f"{made.windows} windows in {made.seconds:.1f} s ({rate:.1f} windows/s; the network {made.network:.1f} s)"


def _summary(maps: Sequence[MapResult]) -> RenderResult:
    for each in maps[:LISTED]:
        yield f"{'written' if each.made else 'there already'}: {each.out}"
    if len(maps) > LISTED:
        yield f"… and {len(maps) - LISTED} more in {maps[0].out.parent}"
    there = sum(not each.made for each in maps)
    yield f"maps: {len(maps)}, of which {there} were there already; {sum(each.windows for each in maps)} windows"
