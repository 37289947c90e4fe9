from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from overfly.core.errors import RecipeError
from overfly.exporting.predictor import Floats, Predictor
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import MapResult
from overfly.raster.parallel import map_rasters, run_task
from rasters import brightness_classes, ids, metadata, noise, write

HERE = Path(__file__).parent


def slow(log: str, seconds: float) -> Predictor:
    """A network that takes its time, and writes down which process it was opened in."""
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\n")

    def run(images: Floats) -> Floats:
        time.sleep(seconds)
        return brightness_classes(images)

    return Predictor(metadata(), "torch", "cpu", run)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import this file by its name."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


SETTINGS = MapSettings(window=64, batch=2)


@pytest.mark.usefixtures("importable")
@pytest.mark.filterwarnings("ignore")  # dask's own processes end loudly when one of them is killed
def test_rasters_of_a_killed_worker_are_mapped(tmp_path: Path) -> None:
    log = tmp_path / "opened"
    outputs = {}
    for number in range(8):
        source = write(tmp_path / f"{number}.tif", noise(400, 64, seed=number))
        outputs[str(source)] = tmp_path / "maps" / f"{number}.tif"
    bad = tmp_path / "bad.tif"
    bad.write_bytes((tmp_path / "0.tif").read_bytes()[:2000])
    outputs[str(bad)] = tmp_path / "maps" / "bad.tif"
    reported: list[str] = []
    killed: list[int] = []

    def kill() -> None:
        """Kill one of the two workers once both are at work and something is written."""
        while not list((tmp_path / "maps").glob(".*.unfinished/progress.json")):
            time.sleep(0.02)
        worker = int(log.read_text().split()[0])
        killed.append(worker)
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    maps, failures = map_rasters(
        partial(slow, str(log), 0.05), outputs, SETTINGS, network="slow", workers=2,
        on_progress=lambda source, _: reported.append(source),
    )  # fmt: skip
    killer.join(5)
    assert killed
    assert sorted(reported) == sorted(outputs)
    assert list(failures) == [str(bad)]
    assert "truncated" in failures[str(bad)]
    assert [result.source for result in maps] == list(outputs)[:8]
    for number in range(8):
        truth = brightness_classes(noise(400, 64, seed=number)[None].astype(np.float32))[0].argmax(0)
        np.testing.assert_array_equal(ids(tmp_path / "maps" / f"{number}.tif"), truth)
    assert sum(result.created for result in maps) >= 7  # the killed worker may have finished one without reporting it
    assert any(result.resumed for result in maps)
    opened = log.read_text().split()
    assert len(opened) == len(set(opened)) in (2, 3)  # once per worker: two, and the replacement if it was needed
    assert not list((tmp_path / "maps").glob(".*"))


def test_worker_opens_the_network_once_and_returns_errors(tmp_path: Path) -> None:
    log = tmp_path / "opened"
    source = str(write(tmp_path / "a.tif", noise(64, 64)))
    task = partial(run_task, partial(slow, str(log), 0.0), settings=SETTINGS, network="once", threads=None)
    first, again = (task(source=source, out=tmp_path / "map.tif") for _ in range(2))
    assert isinstance(first, MapResult)
    assert isinstance(again, MapResult)
    assert (first.created, again.created) == (True, False)
    assert len(log.read_text().split()) == 1
    missing = task(source=str(tmp_path / "none.tif"), out=tmp_path / "b.tif")
    assert "none.tif does not exist" in str(missing)


def test_map_rasters_needs_workers() -> None:
    with pytest.raises(RecipeError, match="--workers"):
        map_rasters(partial(slow, "", 0.0), {}, SETTINGS, network="none")
