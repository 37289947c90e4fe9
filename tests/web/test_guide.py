"""The serving guide: its curl lines against a server, its Python, and its limits."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from overfly.training.setup import initial_network
from overfly.web.server import BackgroundServer, application, start
from overfly.web.service import Limits
from served import network, ramp

GUIDE = (REPOSITORY / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")
CURL = [line for line in GUIDE.splitlines() if line.startswith("curl ")]


@pytest.fixture(scope="module")
def running() -> Iterator[BackgroundServer]:
    result = start(application([network()]))
    yield result
    result.stop()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_lines_of_the_guide(running: BackgroundServer, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    settings = {"height": 40, "width": 50, "count": 3, "dtype": "uint8", "crs": "EPSG:32650"}
    transform = rasterio.Affine(0.3, 0.0, 500000.0, 0.0, -0.3, 3500000.0)
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", transform=transform, **settings) as file:
        file.write(np.moveaxis(ramp(), -1, 0))
    outputs = []
    for line in CURL:
        words = shlex.split(line.replace("http://127.0.0.1:8000/", running.address))
        done = subprocess.run([*words, "--silent"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        outputs.append(done.stdout)
    assert len(outputs) == 4
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs.to_epsg() == 32650
        assert (file.read(1) == (ramp()[..., 0] > 127)).all()
    assert json.loads(outputs[1])["classes"][0]["name"] == "dark"
    assert json.loads(outputs[2])["status"] == "ok"
    assert b"overfly_http_requests_total" in outputs[3]


def test_python_of_the_guide(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    weights = initial_network(recipe)[0].save(tmp_path / "network.safetensors")
    assert isinstance(Segmenter.load(weights), Segmenter)
    monkeypatch.chdir(tmp_path)
    code = block.replace("runs/NAME", "network.safetensors")
    assert code != block
    exec(compile(code, "serving.md", "exec"), {})  # noqa: S102  (our own guide)
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")


def test_limits_in_the_guide_are_the_defaults() -> None:
    limits = Limits()
    for words in (
        f"| megabytes of a request, `--upload` | {limits.upload // 10**6} |",
        f"`--seconds` | {limits.seconds:g} |",
        f"`--queue` | {limits.queue} |",
        f"before anything is decoded | {limits.pixels / 1e6:g} |",
        f"{limits.cache // 10**6} million",
        f"open connections | {limits.connections} |",
    ):
        assert words in GUIDE, words
