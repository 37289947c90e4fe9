"""Many rasters over many machines: one network a worker, on dask.distributed."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overfly.core.errors import DataError, MissingExtraError, OverflyError, RecipeError
from overfly.exporting.predictor import Predictor
from overfly.raster.job import MapSettings
from overfly.raster.map_raster import MapResult, map_raster
from overfly.raster.resume_store import BusyError

RETRIES = 3
"""How often a raster is tried again: on another worker, where its worker was lost; and where the system failed."""
PATIENCE = 600.0
"""Seconds to wait for a map that another process is making."""
LOST = 30.0
"""Seconds without a sign of life after which a worker of this machine counts as lost."""

OpenPredictor = Callable[[], Predictor]
"""What opens the network on a worker; it travels there, so it is a function of a module with plain arguments."""
Heard = Callable[[str, MapResult | str], None]
"""Called with a raster and its map, or why there is none."""


@dataclass(frozen=True)
class MapTask:
    """What a worker is asked to do.

    Attributes:
        source: path or address of the raster, as the worker sees it.
        out: the map.
        settings: how it is made.
        network: what tells this network from others.
        threads: of the network on the worker; None leaves them as they are.
    """

    source: str
    out: Path
    settings: MapSettings
    network: str
    threads: int | None


def map_rasters(
    open_network: OpenPredictor,
    jobs: Mapping[str, Path],
    settings: MapSettings,
    *,
    network: str,
    workers: int = 0,
    scheduler: str | None = None,
    on_progress: Heard | None = None,
) -> tuple[list[MapResult], dict[str, str]]:
    """Make maps of many rasters on many processes or machines.

    A worker opens the network once. A raster whose worker is lost is given to another, which goes on where it was;
    what fails for a reason of its own, such as damage, is not tried again and does not stop the others. Workers must
    see rasters and maps under the same paths as this process.

    Args:
        open_network: opens the network on a worker.
        jobs: rasters with their maps.
        settings: how maps are made.
        network: what tells this network from others.
        workers: processes to start on this machine, where there is no scheduler.
        scheduler: address of a running scheduler, such as tcp://10.0.0.1:8786.
        on_progress: called as rasters are done, in whatever order.

    Returns:
        The maps in the order of the rasters, and the rasters that failed with the reason.

    Raises:
        MissingExtraError: distributed is not installed.
        DataError: the scheduler does not answer, or has no workers.
    """
    done: dict[str, MapResult] = {}
    failures: dict[str, str] = {}
    with _client(workers, scheduler) as client:
        from distributed import as_completed

        threads = max(1, (os.cpu_count() or 1) // workers) if scheduler is None else None
        futures = {
            client.submit(
                run_task, open_network, MapTask(source, out, settings, network, threads), pure=False, retries=RETRIES
            ): source
            for source, out in jobs.items()
        }  # fmt: skip
        for future in as_completed(futures):  # type: ignore[no-untyped-call]
            source = futures[future]
            found = _outcome(future)
            if isinstance(found, str):
                failures[source] = found
            else:
                done[source] = found
            if on_progress is not None:
                on_progress(source, found)
    return [done[source] for source in jobs if source in done], failures


_OPENED: dict[str, Predictor] = {}
"""The network of this process, where it is a worker."""


def run_task(open_network: OpenPredictor, task: MapTask) -> MapResult | str:
    """Make one map on a worker.

    Returns:
        The map; or why there is none, where trying again would not help.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    try:
        if task.network not in _OPENED:
            _OPENED.clear()
            _OPENED[task.network] = open_network()
        return _patiently(_OPENED[task.network], task)
    except OverflyError as error:
        return str(error)


def _patiently(predictor: Predictor, task: MapTask) -> MapResult:
    """Make a map; wait where another process makes it, such as a worker that the scheduler lost sight of."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return map_raster(predictor, task.source, task.out, task.settings, network=task.network)
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)


def _outcome(future: Any) -> MapResult | str:
    """What became of a raster."""
    from distributed import KilledWorker

    error = future.exception()
    if error is None:
        found: MapResult | str = future.result()
        return found
    if isinstance(error, KilledWorker):
        return f"the workers that took it were lost, {RETRIES + 1} times; it may not fit their memory, lower --batch"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of a running scheduler, or of processes of this machine that end with it."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise MissingExtraError("distributed", "cluster", "maps over several workers") from None
    if scheduler is None and workers < 1:
        raise RecipeError(f"--workers {workers} is too few; take 1 or more")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what happens to rasters is told by us
    settled = {
        "distributed.scheduler.allowed-failures": RETRIES,
        "distributed.comm.timeouts.connect": f"{LOST}s",
        "distributed.worker.daemon": True,
    }
    with warnings.catch_warnings(), dask.config.set(settled):
        warnings.simplefilter("ignore")
        if scheduler is not None:
            with _connected(Client, scheduler) as client:
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


@contextmanager
def _connected(make: Callable[..., Any], address: str) -> Iterator[Any]:
    try:
        client = make(address, timeout=LOST)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"no scheduler answers at {address} ({reason}); start one with: dask scheduler") from None
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            raise DataError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
        yield client
