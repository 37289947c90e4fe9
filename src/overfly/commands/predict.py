"""The command ``predict``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from overfly.commands.arguments import MAX_SIDE, PathLike, PathLikes, check_bounds
from overfly.core.atomic_files import file_sha256
from overfly.core.choices import Backend
from overfly.core.errors import OverflyError, RecipeError, render_text

if TYPE_CHECKING:
    from rich.table import Table

    from overfly.exporting.predictor import Predictor
    from overfly.raster.manifest import MapSettings
    from overfly.raster.map_raster import MapResult

MAX_LISTED = 12
"""Maximum maps listed in the summary."""


@dataclass(frozen=True)
class PredictResult:
    """Maps, and the rasters that failed with their reasons."""

    maps: Sequence[MapResult]
    failures: Mapping[str, str]

    @property
    def exit_status(self) -> int:
        """1 if a raster failed."""
        return int(bool(self.failures))

    def __rich_console__(self, *_: object) -> Iterator[str | Table]:
        several = len(self.maps) != 1 or bool(self.failures)
        if not several:
            yield from _one_map(self.maps[0])
        template = Path(__file__).with_name("maps.txt.jinja")
        failed = [_failure(source, reason) for source, reason in self.failures.items()]
        text = render_text(template, maps=self.maps, several=several, most=MAX_LISTED, failed=failed)
        if text:
            yield text.rstrip("\n")


def predict(
    network: PathLike, rasters: PathLikes, *, out: PathLike = Path("maps"), bands: str | None = None,
    nodata: float | None = None, alpha_band: bool | None = None, max_value: float | None = None,
    resolution: float | None = None, match_gsd: bool = False, probabilities: bool = False, uncertainty: bool = False,
    polygons: Literal["gpkg", "geojson"] | None = None, min_area: int = 10, window: int | None = None,
    overlap: float = 0.25, batch: int = 4, backend: Backend = "auto", device: str = "auto", workers: int = 0,
    scheduler: str | None = None, overwrite: bool = False, quiet: bool = False,
) -> PredictResult:  # fmt: skip
    """Predict georeferenced maps of rasters of any size, window by window.

    A map has its raster's own grid: a Cloud Optimized GeoTIFF of class ids, 255 for pixels without data, with the
    classes' names and colors. A stopped job resumes; an existing map of the same settings is not made again.

    Args:
        network: the folder of a run, a .safetensors file of a run, or an exported file.
        rasters: files, folders, globs or addresses (s3://, https://) of GeoTIFF, JPEG 2000, PNG or JPEG.
        out: for one raster a name ending in .tif; else a folder for maps named after their rasters.
        bands: numbers of the bands to read, in the order of the training images, such as 4,3,2.
        nodata: no-data value, if the file does not declare it.
        alpha_band: the last band is an alpha band, or with --no-alpha-band no band is; by default as the file declares.
        max_value: value of the brightest pixel, if the network was trained on another range.
        resolution: meters per pixel to which the raster is resampled for the network; the map keeps the raster's grid.
        match_gsd: resample to the ground sample distance of the network's training images.
        probabilities: write MAP_probabilities.tif too, one band per class, in percent.
        uncertainty: write MAP_uncertainty.tif too: entropy, in percent of its maximum.
        polygons: outline the classes' areas too, beside the map (extra: vector).
        min_area: area of the smallest polygon, in pixels.
        window: side of the windows in pixels; by default the network's.
        overlap: share of a window that the next one covers again.
        batch: windows per batch of the network.
        backend: torch, onnxruntime or openvino; auto: the file's own; for a run, PyTorch or its fastest export.
        device: auto, cpu, cuda, cuda:1 or mps.
        workers: processes of this machine that share the rasters (extra: cluster); 0 maps one after the other.
        scheduler: address of a running dask scheduler whose workers share the rasters, such as tcp://10.0.0.1:8786.
        overwrite: replace maps of other settings.
        quiet: print no progress.

    Returns:
        The maps, and the failed rasters. The command's exit status is 1 if one of several rasters failed.
    """
    from overfly.commands.load_predictor import fastest_file, load_predictor
    from overfly.raster.manifest import MapSettings, output_files
    from overfly.raster.parallel import check_distinct_outputs, list_rasters

    sizes = {"window": (window or 32, 32, MAX_SIDE), "batch": (batch, 1, 4096)}
    check_bounds(sizes | {"min-area": (min_area, 1, 10**9), "workers": (workers, 0, 256)})
    network, backend = fastest_file(network, backend, device)
    predictor = load_predictor(network, backend=backend, device=device)
    settings = MapSettings(
        window=window, overlap=overlap, batch=batch, bands=bands, nodata=nodata, alpha_band=alpha_band,
        max_value=max_value, resolution=_resolution(resolution, match_gsd, predictor.metadata.gsd),
        probabilities=probabilities, uncertainty=uncertainty, polygons=polygons, min_area=min_area,
        overwrite=overwrite,
    )  # fmt: skip
    outputs = list_rasters([str(raster) for raster in rasters], Path(out))
    check_distinct_outputs({source: output_files(path, settings).values() for source, path in outputs.items()})
    opener = partial(load_predictor, network.absolute(), backend=backend, device=device)
    if workers or scheduler is not None:
        return _map_in_parallel(opener, outputs, settings, network_digest(network), workers, scheduler, quiet=quiet)
    return _map_in_turn(predictor, outputs, settings, network_digest(network), quiet=quiet)


def _map_in_turn(
    predictor: Predictor, outputs: Mapping[str, Path], settings: MapSettings, digest: str, *, quiet: bool
) -> PredictResult:
    """Map rasters sequentially; raise the error of a single raster."""
    from overfly.core.progress import Progress, print_status
    from overfly.raster.map_raster import map_raster

    maps: list[MapResult] = []
    failures: dict[str, str] = {}
    with Progress("rows of windows", quiet=quiet) as progress:
        for source, path in outputs.items():
            on_progress = partial(progress.update, source)
            try:
                maps.append(map_raster(predictor, source, path, settings, network=digest, on_progress=on_progress))
            except OverflyError as error:
                if len(outputs) == 1:
                    raise
                failures[source] = str(error)
                print_status(f"failed: {error}", quiet=quiet)
    return PredictResult(maps, failures)


def _map_in_parallel(  # noqa: PLR0917
    opener: partial[Predictor], outputs: Mapping[str, Path], settings: MapSettings, digest: str, workers: int,
    scheduler: str | None, *, quiet: bool,
) -> PredictResult:  # fmt: skip
    """Map rasters with several processes or machines, under absolute paths."""
    from overfly.core.progress import Progress, print_status
    from overfly.raster.parallel import map_rasters

    absolute = {
        source if "://" in source else str(Path(source).absolute()): path.absolute() for source, path in outputs.items()
    }
    finished: list[str] = []
    with Progress("rasters", quiet=quiet) as progress:
        progress.update("maps", 0, len(outputs))

        def on_progress(source: str, result: MapResult | str) -> None:
            finished.append(source)
            progress.update("maps", len(finished), len(outputs))
            if isinstance(result, str):
                print_status(f"failed: {_failure(source, result)}", quiet=quiet)

        return PredictResult(
            *map_rasters(
                opener, absolute, settings, network=digest, workers=workers, scheduler=scheduler,
                on_progress=on_progress,
            )
        )  # fmt: skip


def network_digest(network: Path) -> str:
    """Return the digest of a network's files (SHA-256, 16 digits)."""
    files = [network]
    if network.is_dir():
        candidates = [network / "recommended.safetensors", network / "checkpoints" / "best.safetensors"]
        files = [file for file in candidates if file.is_file()][:1]
    else:
        files += [file for file in (network.with_suffix(".bin"), Path(f"{network}.data")) if file.is_file()]
    return file_sha256(*files)[:16]


def _resolution(resolution: float | None, match_gsd: bool, gsd: float | None) -> float | None:
    if not match_gsd:
        return resolution
    if resolution is not None:
        raise RecipeError("--match-gsd and --resolution exclude each other; give one of them")
    if gsd is None:
        raise RecipeError("the ground sample distance of the network's training images is unknown; give --resolution")
    return gsd


def _failure(source: str, reason: str) -> str:
    return reason if source in reason else f"{source}: {reason}"


def _one_map(result: MapResult) -> Iterator[str | Table]:
    from rich.table import Column, Table

    from overfly.core.progress import percent

    if not result.created:
        yield f"exists already, with the same settings: {result.out}"
        return
    if result.resumed:
        yield f"resumed after {result.resumed} rows of windows"
    for file in result.files:
        yield f"written: {file}"
    share = Column("%", justify="right")
    table = Table("class", share, title="share of the valid pixels", title_justify="left")
    for name, value in result.shares.items():
        table.add_row(name, percent(value))
    yield table
    rate = result.windows / result.seconds if result.seconds else 0.0
    seconds = f"{result.seconds:.1f} s ({rate:.1f} windows/s; the network {result.network_seconds:.1f} s)"
    yield f"{result.windows} windows in {seconds}"
