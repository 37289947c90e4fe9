"""List rasters, and map them in parallel on several processes or machines with dask.distributed."""

import glob
import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from overfly.core.errors import DataError, OverflyError, RecipeError, import_extra
from overfly.data.headers import SUFFIXES
from overfly.data.listing import is_image_name, natural_key
from overfly.exporting.predictor import Predictor
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import MapResult, map_raster
from overfly.raster.writer import BusyError

WILDCARDS = frozenset("*?[")
RETRIES = 3
"""Retries of a raster after its worker was lost or the system failed."""
BUSY_TIMEOUT = 600.0
"""Seconds to wait for a map that another process is writing."""
CONNECT_TIMEOUT = 30.0
"""Seconds to wait for a scheduler or a worker."""
OpenPredictor = Callable[[], Predictor]
"""Picklable function that opens the network on a worker."""


def list_rasters(entries: Sequence[str], out: Path) -> dict[str, Path]:
    """List rasters (files, folders, globs, addresses such as s3://bucket/scenes/*.tif), with the path of each map.

    ``out`` is a .tif file for one raster; else a folder for maps named after their rasters, which keeps the folders
    below a glob's first wildcard. Raises `DataError`: an entry matches nothing, or ``out`` cannot hold the maps.
    """
    rasters: dict[str, Path] = {}
    for entry in entries:
        rasters.update(_list_addresses(entry) if "://" in entry else _list_paths(entry))
    if not rasters:
        raise DataError("no raster was given; give files, folders or globs")
    if out.suffix.lower() in (".tif", ".tiff") and not out.is_dir():
        if len(rasters) > 1:
            raise DataError(f"--out {out} is one map, and there are {len(rasters)} rasters; give a folder")
        return dict.fromkeys(rasters, out)
    if len(rasters) > 1 or not out.is_dir():
        for path in (out, *out.absolute().parents):
            if path.exists() and not path.is_dir():
                raise DataError(f"--out {out} is not a folder: {path} is a file; give a folder, or a .tif file")
    return {source: out / name.with_suffix(".tif") for source, name in rasters.items()}


def check_distinct_outputs(files: Mapping[str, Iterable[Path]]) -> None:
    """Check that no two rasters would write the same of their output files; raise `DataError` otherwise."""
    first: dict[Path, str] = {}
    for source, paths in files.items():
        for path in paths:
            if path in first:
                raise DataError(
                    f"{first[path]} and {source} would both write {path}; map them by two commands with an --out each"
                )
            first[path] = source


def _list_paths(entry: str) -> dict[str, Path]:
    """List the files of a path, folder or glob, with the names of their maps below the folder of maps."""
    path = Path(entry)
    if path.is_dir():
        files = sorted(filter(is_image_name, path.iterdir()), key=lambda file: natural_key(file.name))
        if not files:
            raise DataError(f"{entry} contains no rasters ({', '.join(SUFFIXES)}); give another folder, or a glob")
        return {str(file): Path(file.name) for file in files}
    if path.exists() or not WILDCARDS & set(entry):
        return {entry: Path(path.name)}
    names = sorted(glob.glob(entry, recursive=True), key=natural_key)  # noqa: PTH207 - any root
    files = [Path(name) for name in names if not Path(name).is_dir()]
    if not files:
        raise DataError(f"{entry} matches no file; correct the pattern")
    fixed = list(itertools.takewhile(lambda part: not WILDCARDS & set(part), path.parts))
    return {str(file): file.relative_to(Path(*fixed)) if fixed else file for file in files}


def _list_addresses(entry: str) -> dict[str, Path]:
    """List the addresses of an entry with "://"; fsspec lists those with wildcards."""
    scheme, _, rest = entry.partition("://")
    if not WILDCARDS & set(rest.split("?")[0] if scheme.startswith("http") else rest):
        return {entry: Path(PurePosixPath(rest.split("?")[0]).name)}
    try:
        from fsspec.core import url_to_fs

        system, pattern = url_to_fs(entry)
        listed = sorted(system.glob(pattern), key=natural_key)
    except ImportError as error:
        raise DataError(f"listing {entry} needs a package ({error}); install it, or give each raster") from None
    except Exception as error:  # each storage has its own errors
        raise DataError(
            f"{entry} cannot be listed ({' '.join(str(error).split())}); check the address and its permissions"
        ) from error
    if not listed:
        raise DataError(f"{entry} matches nothing; correct the pattern")
    return {system.unstrip_protocol(name): Path(PurePosixPath(name).name) for name in listed}


def map_rasters(
    open_network: OpenPredictor, outputs: Mapping[str, Path], settings: MapSettings, *, network: str, workers: int = 0,
    scheduler: str | None = None, on_progress: Callable[[str, MapResult | str], None] | None = None,
) -> tuple[list[MapResult], dict[str, str]]:  # fmt: skip
    """Map many rasters with several processes or machines.

    Each worker opens the network once. If a worker is lost, another worker resumes its raster. A raster that cannot be
    mapped, such as a damaged file, is not retried and does not stop the others. Workers need rasters and maps under the
    same paths as this process.

    ``network`` is the digest of the network's file; ``workers`` and ``scheduler`` are those of `overfly predict`.
    ``on_progress`` is called with each finished raster and its result, or the reason of its failure, in any order.
    Returns the maps in the order of the rasters, and the failed rasters with their reasons. Raises `MissingExtraError`:
    distributed is not installed, and `DataError`: the scheduler does not answer, or has no workers.
    """
    done: dict[str, MapResult] = {}
    failures: dict[str, str] = {}
    with _client(workers, scheduler) as client:
        from distributed import KilledWorker, as_completed

        threads = max(1, (os.cpu_count() or 1) // workers) if scheduler is None else None
        futures = {
            client.submit(
                run_task, open_network, source, out, settings, network=network, threads=threads, pure=False,
                retries=RETRIES,
            ): source
            for source, out in outputs.items()
        }  # fmt: skip
        for future in as_completed(futures):  # type: ignore[no-untyped-call]
            source, error = futures[future], future.exception()
            outcome: MapResult | str = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if isinstance(error, KilledWorker):
                outcome = f"its workers were lost {RETRIES + 1} times, perhaps for lack of memory; lower --batch"
            elif error is None:
                outcome = future.result()
            if isinstance(outcome, str):
                failures[source] = outcome
            else:
                done[source] = outcome
            if on_progress is not None:
                on_progress(source, outcome)
    return [done[source] for source in outputs if source in done], failures


_OPENED: dict[str, Predictor] = {}
"""The network of a worker process, by its digest."""


def run_task(
    open_network: OpenPredictor, source: str, out: Path, settings: MapSettings, *, network: str, threads: int | None
) -> MapResult | str:
    """Write one map on a worker; return the reason of a failure that a retry would not correct.

    Wait for a map that another process is writing, such as a worker that the scheduler considers lost.

    ``network`` is the digest of the network's file; ``threads`` sets PyTorch's CPU threads unless None.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        if network not in _OPENED:
            _OPENED.clear()
            _OPENED[network] = open_network()
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                return map_raster(_OPENED[network], source, out, settings, network=network)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
    except OverflyError as error:
        return str(error)


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """Connect to a running scheduler, or start a cluster of local processes that ends with the context."""
    import_extra("distributed", "cluster", "maps over several workers")
    import dask
    from distributed import Client, LocalCluster

    if scheduler is None and workers < 1:
        raise RecipeError(f"--workers must be at least 1, got {workers}")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # failures are reported by raster instead
    options = {
        "distributed.scheduler.allowed-failures": RETRIES,
        "distributed.comm.timeouts.connect": f"{CONNECT_TIMEOUT}s",
        "distributed.worker.daemon": True,
    }
    with warnings.catch_warnings(action="ignore"), dask.config.set(options):
        if scheduler is not None:
            try:
                client = Client(scheduler, timeout=CONNECT_TIMEOUT)  # type: ignore[no-untyped-call]
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise DataError(f"no scheduler answers at {scheduler} ({reason}); start one: dask scheduler") from None
            with client:
                if not client.scheduler_info(n_workers=-1)["workers"]:
                    raise DataError(f"the scheduler at {scheduler} has no workers; start some: dask worker {scheduler}")
                yield client
            return
        with (
            LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1",
                memory_limit=0, silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,  # type: ignore[no-untyped-call]
        ):  # fmt: skip
            yield client
