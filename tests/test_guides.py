"""The commands of the guides to rasters and clusters run on small rasters."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from conftest import REPOSITORY
from overfly import cli
from overfly.recipe import load
from overfly.training.setup import initial_network
from rasters import ids, noise, write

GUIDES = REPOSITORY / "docs" / "guides"


def commands(page: str) -> list[list[str]]:
    """Return the `overfly predict` commands of a guide."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("overfly predict")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def network(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a network, in a working folder with the files that the guides name."""
    weights = initial_network(load(small))[0].eval().save(tmp_path / "runs" / "NAME" / "network.safetensors")
    for name in ("scene.tif", "scenes/a.tif", "scenes/b.tif", "scenes/east/c.tif", "more/d.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, noise(64, 80))
    Image.fromarray(np.moveaxis(noise(64, 64), 0, -1)).save(tmp_path / "photo.png")
    write(tmp_path / "multispectral.tif", noise(64, 80, bands=4).astype(np.uint16) * 39)
    monkeypatch.chdir(tmp_path)
    return weights


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of the photograph
def test_the_guide_to_rasters_runs(network: Path) -> None:
    for words in commands("rasters.md"):
        filled = [str(network) if word == "runs/NAME" else word for word in words]
        with pytest.raises(SystemExit) as left:
            cli.main([*filled, "--device", "cpu", "--quiet"])
        assert left.value.code == 0, words
    for name in ("map.tif", "map_b.tif", "map_c.tif", "maps/a.tif", "maps/photo.tif", "maps/d.tif", "maps/east/c.tif"):
        assert ids(Path(name)).shape[0] == 64
    assert Path("map_c.gpkg").is_file()
    assert Path("map_c_probabilities.tif").is_file()
    (block,) = re.findall(r"```python\n(.*?)```", (GUIDES / "rasters.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block.replace("runs/NAME", str(network)), "rasters.md", "exec"), names)  # noqa: S102  (our own guide)
    assert sum(names["result"].maps[0].shares.values()) == pytest.approx(1)


def test_the_guide_to_clusters_uses_tested_options() -> None:
    """Its first command is run by tests/raster/test_parallel.py, torchrun reads the options of the others."""
    local, remote = commands("cluster.md")
    assert local[-2:] == ["--workers", "2"]
    assert "--scheduler" in remote
    text = (GUIDES / "cluster.md").read_text(encoding="utf-8")
    options = get_args_parser()._option_string_actions
    for option in re.findall(r"torchrun (--\S+)|(--node-rank|--master-addr|--master-port|--nproc-per-node)", text):
        assert "".join(option) in options
