"""The command `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from overfly import cli
from overfly.commands.predict import network_digest, predict
from overfly.core.errors import RecipeError
from overfly.recipe import load
from overfly.training.setup import initial_network
from rasters import ids, noise, write


def overfly(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", *(str(argument) for argument in arguments)])
    return int(left.value.code or 0)


@pytest.fixture
def network(small: dict[str, Any], tmp_path: Path) -> Path:
    return initial_network(load(small))[0].eval().save(tmp_path / "network.safetensors")


def test_predict_maps_one_raster(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = write(tmp_path / "scene.tif", noise(100, 130))
    command = (network, scene, "--out", tmp_path / "map.tif", "--window", "64", "--device", "cpu", "--polygons", "gpkg")
    assert overfly(*command) == 0
    shown = capsys.readouterr().out
    assert f"written: {tmp_path / 'map.tif'}" in shown
    assert f"written: {tmp_path / 'map.gpkg'}" in shown
    assert "agriculture" in shown
    assert "6 windows in" in shown
    assert ids(tmp_path / "map.tif").shape == (100, 130)
    assert overfly(*command) == 0
    assert "exists already" in capsys.readouterr().out
    assert overfly(*command, "--overlap", "0.5") == 2
    message = capsys.readouterr().err
    assert "--overwrite" in message
    assert len(message.strip().splitlines()) == 1


def test_predict_maps_a_folder_with_bad_files(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for name in ("a", "b"):
        write(scenes / f"{name}.tif", noise(64, 64))
    (scenes / "c.tif").write_bytes((scenes / "a.tif").read_bytes()[:900])
    command = (network, scenes, "--out", tmp_path / "maps", "--device", "cpu")
    assert overfly(*command) == 1
    shown = capsys.readouterr()
    assert "1 of 3" in shown.out
    assert f"failed: {scenes / 'c.tif'}" in shown.out
    assert sorted(path.name for path in (tmp_path / "maps").iterdir() if path.suffix == ".tif") == ["a.tif", "b.tif"]
    write(scenes / "c.tif", noise(64, 64))
    assert overfly(*command) == 0
    assert "maps: 3, 2 " in capsys.readouterr().out


MISTAKES: list[tuple[list[str], str]] = [
    (["{network}", "{folder}/none.tif"], "does not exist"),
    (["{network}", "{folder}/none-*.tif"], "none-"),
    (["{folder}/none", "{scene}"], "none"),
    (["{network}", "{scene}", "--out", "{scene}"], "scene.tif"),
    (["{network}", "{scene}", "--bands", "1,2"], "--bands"),
    (["{network}", "{scene}", "--bands", "1,2,9"], "--bands"),
    (["{network}", "{scene}", "--bands", "red"], "--bands"),
    (["{network}", "{scene}", "--overlap", "1"], "--overlap"),
    (["{network}", "{scene}", "--batch", "0"], "--batch"),
    (["{network}", "{scene}", "--resolution", "-1"], "--resolution"),
    (["{network}", "{scene}", "--match-gsd"], "--resolution"),
    (["{network}", "{scene}", "--max-value", "0"], "--max-value"),
    (["{network}", "{scene}", "--alpha-band"], "--alpha-band"),
    (["{network}", "{scene}", "--polygons", "shp"], "shp"),
    (["{network}", "{scene}", "--out", "{network}"], "--out"),
    (["{network}", "{scene}", "--scheduler", "tcp://127.0.0.1:1"], "no scheduler answers"),
    (["{network}"], "rasters"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(entry[0][1:]) or "-" for entry in MISTAKES])
def test_mistakes_give_one_line(  # noqa: PLR0917 - fixtures
    arguments: list[str], message: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("overfly.raster.parallel.CONNECT_TIMEOUT", 1.0)
    monkeypatch.chdir(tmp_path)
    scene = write(tmp_path / "scene.tif", noise(64, 64))
    names = {"{network}": str(network), "{folder}": str(tmp_path), "{scene}": str(scene)}
    filled = []
    for entry in arguments:
        for name, value in names.items():
            entry = entry.replace(name, value)  # noqa: PLW2901
        filled.append(entry)
    before = sorted(tmp_path.iterdir())
    assert overfly(*filled, "--device", "cpu") == 2
    shown = capsys.readouterr()
    assert message.lower() in shown.err.lower()
    assert len(shown.err.strip().splitlines()) == 1
    assert "Traceback" not in shown.err
    assert sorted(tmp_path.iterdir()) == before


def test_predict_in_python(network: Path, tmp_path: Path) -> None:
    scene = write(tmp_path / "scene.tif", noise(64, 96))
    done = predict(network, [str(scene)], out=tmp_path / "map.tif", device="cpu", quiet=True, uncertainty=True)
    assert done.exit_status == 0
    assert sum(done.maps[0].shares.values()) == pytest.approx(1)
    with rasterio.open(tmp_path / "map_uncertainty.tif") as result:
        assert 0 <= result.read().min() <= result.read().max() <= 100
    with pytest.raises(RecipeError, match="--resolution"):
        predict(network, [str(scene)], match_gsd=True, resolution=1.0, device="cpu", quiet=True)


def test_digest_of_networks(network: Path, small: dict[str, Any], tmp_path: Path) -> None:
    other = initial_network(load(small, "model=lraspp_mobilenet_v2"))[0].save(
        tmp_path / "run" / "recommended.safetensors"
    )
    assert network_digest(network) != network_digest(other)
    assert network_digest(other) == network_digest(tmp_path / "run")
    assert np.unique([network_digest(network), network_digest(network)]).size == 1
