"""Jobs that were stopped or killed, and what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from overfly.raster import writer
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import MapResult, map_raster
from rasters import ids, noise, pointwise, position_dependent, write

SETTINGS = MapSettings(window=64, batch=3)


def make_map(
    source: Path, out: Path, predictor: Any = None, settings: MapSettings = SETTINGS, **more: Any
) -> MapResult:
    return map_raster(predictor or pointwise(), str(source), out, settings, network="none", **more)


class StoppedError(Exception):
    """What stops a job in these tests."""


@pytest.mark.parametrize("memory", [1, 10**9])
@pytest.mark.parametrize("settings", [
    replace(SETTINGS, probabilities=True, uncertainty=True), replace(SETTINGS, overlap=0.7),
    replace(SETTINGS, resolution=0.41, probabilities=True), replace(SETTINGS, resolution=0.14),
])  # fmt: skip
def test_resumed_map_equals_an_uninterrupted_one(tmp_path: Path, settings: MapSettings, memory: int) -> None:
    pixels = noise(230, 170)
    pixels[:, 100:, :60] = 0
    source = write(tmp_path / "scene.tif", pixels, nodata=0)
    whole = make_map(source, tmp_path / "whole.tif", position_dependent(), settings, memory=memory)
    out, steps, left = tmp_path / "cut.tif", [], 0

    def on_progress(done: int, total: int) -> None:
        nonlocal left
        left = total - done
        steps.append(done)
        if len(steps) == 3 and left:  # two steps at a time
            raise StoppedError

    for _ in range(100):
        steps.clear()
        try:
            result = make_map(source, out, position_dependent(), settings, memory=memory, on_progress=on_progress)
            break
        except StoppedError:
            assert not out.exists()
    assert result.resumed > 0
    for one, other in zip(whole.files, result.files, strict=True):
        with rasterio.open(one) as first, rasterio.open(other) as second:
            np.testing.assert_array_equal(first.read(), second.read())


JOB = """
import sys, time
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
from rasters import position_dependent
from overfly.raster.map_raster import map_raster
from overfly.raster.manifest import MapSettings
slow = position_dependent()
def run(images):
    time.sleep(0.05)
    return slow.run(images)
map_raster(replace(slow, run=run), {source!r}, Path({out!r}), MapSettings(window=64, batch=3), network="none")
"""


def test_killed_job_resumes(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(700, 200)), tmp_path / "map.tif"
    code = JOB.format(tests=str(Path(__file__).parents[1]), source=str(source), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    state, done, deadline = tmp_path / ".map.tif.unfinished" / "progress.json", 0, time.monotonic() + 120
    while done < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        done = json.loads(state.read_text())["done"] if state.exists() else 0
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    result = make_map(source, out, position_dependent())
    assert result.resumed >= 4
    make_map(source, tmp_path / "whole.tif", position_dependent())
    np.testing.assert_array_equal(ids(out), ids(tmp_path / "whole.tif"))


@pytest.mark.parametrize("whole", [False, True])
def test_job_killed_while_renaming_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    source, out = write(tmp_path / "scene.tif", noise(90, 90)), tmp_path / "map.tif"
    replaced, names, discarded = Path.replace, [], writer.discard

    def named(self: Path, target: Path) -> Path:
        if self.suffix == ".tif":
            names.append(target)
        if len(names) == 2 and not whole:
            raise StoppedError
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", named)
    monkeypatch.setattr(writer, "discard", lambda _: None)  # as after a kill
    settings = replace(SETTINGS, uncertainty=True)
    if whole:
        make_map(source, out, settings=settings)
    else:
        with pytest.raises(StoppedError):
            make_map(source, out, settings=settings)
    assert (tmp_path / ".map.tif.unfinished").is_dir()
    assert out.exists() == whole
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(writer, "discard", discarded)
    with writer.lock_unfinished(out):  # another job is running
        assert not whole or not make_map(source, out, settings=settings).created
        assert (tmp_path / ".map.tif.unfinished").is_dir()
    assert make_map(source, out, settings=settings).created == (not whole)
    assert not (tmp_path / ".map.tif.unfinished").exists()


def test_unfinished_map_of_other_settings_is_discarded(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(300, 100)), tmp_path / "map.tif"

    def on_progress(done: int, total: int) -> None:
        del total
        if done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        make_map(source, out, on_progress=on_progress)
    result = make_map(source, out, settings=replace(SETTINGS, overlap=0.5))
    assert result.resumed == 0
    assert len(result.notes) == 1


def test_second_process_is_rejected(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(100, 100)), tmp_path / "map.tif"
    with writer.lock_unfinished(out), pytest.raises(writer.BusyError):
        make_map(source, out)
