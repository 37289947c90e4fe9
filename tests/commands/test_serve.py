"""Report and server as commands, on runs that were trained here."""

from __future__ import annotations

import io
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import overfly
from overfly import cli
from overfly.commands import serve
from overfly.commands.serve import live_stream, served_networks
from overfly.core.errors import DataError, MissingExtraError, RecipeError, RunError
from overfly.exporting.predictor import Predictor
from overfly.recipe import Recipe, load
from overfly.training.run import Run
from seeing import seeing, striped


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapted run with its selection, what it began from, and one without a target; two of them scored."""
    out = tmp_path_factory.mktemp("runs")
    drawn = {"name": "synthetic", "size": 64, "train": 4, "val": 3, "test": 2}
    small: dict[str, Any] = {
        "source": {**drawn, "scene": "urban"}, "target": {**drawn, "scene": "rural"}, "model": "lraspp_mobilenet_v2",
        "optim": {"name": "sgd", "lr": 0.01}, "crop": 64, "batch": 2, "steps": 2,
    }  # fmt: skip
    adapted = load({**small, "start": small, "method": {"name": "multiscale_self_training", "statistics": "joint"}})
    overfly.adapt(adapted, out=out, device="cpu", quiet=True, estimate=False)
    alone = {key: value for key, value in small.items() if key != "target"}
    overfly.train(load({**alone, "seed": 1}), out=out, device="cpu", quiet=True)
    for run in map(Run, sorted(out.glob("*"))):
        if run.recipe.target is not None:
            overfly.evaluate(run.path, device="cpu", samples=False)
    return out


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def _opened(folder: Path) -> dict[str, int]:
    found = {
        run.path.name: run.scores.get("labels_opened", {}).get("target/val", {}) for run in map(Run, folder.glob("*"))
    }
    return {name: counts.get("times", 0) for name, counts in found.items()}


def test_a_report_tells_all_and_counts_the_labels_it_reads(copied: Path, tmp_path: Path) -> None:
    before = _opened(copied)
    found = overfly.report([str(copied)], out=tmp_path / "r.html", device="cpu", size=64)
    after = _opened(copied)
    text = (tmp_path / "r.html").read_text()
    assert found.recipes == 4
    assert found.labels_opened == 12
    assert sum(after.values()) - sum(before.values()) == 3
    for words in (
        "source only, Urban to Rural",
        "recalibrate, Urban to Rural",
        "multiscale_self_training, Urban to Rural",
    ):
        assert text.count(words) > 4
    for words in ("Verdict without target labels", "worst", "best", "labels read for this choice: 9", "agriculture"):
        assert words in text
    names = [
        row["target/val"]["miou"] for row in (run.scores for run in map(Run, copied.glob("*"))) if "target/val" in row
    ]
    assert len(names) == 3
    assert all(f"{100 * value:.2f}" in text for value in names)
    assert len(text) < 5_000_000
    assert "lraspp_mobilenet_v2" in text
    assert list(tmp_path.glob(".r.html*")) == []


def test_no_labels_means_no_label_is_read(copied: Path, tmp_path: Path) -> None:
    before = _opened(copied)
    found = overfly.report([str(copied)], out=tmp_path / "r.html", labels=False, speed=False, device="cpu")
    assert found.labels_opened == 0
    assert _opened(copied) == before
    text = (tmp_path / "r.html").read_text()
    assert "labels were not opened" in text
    assert "<img" in text


def test_one_run_and_data_that_are_gone(copied: Path, tmp_path: Path) -> None:
    (alone,) = [run for run in map(Run, copied.glob("*")) if run.recipe.target is None]
    found = overfly.report([str(alone.path)], out=tmp_path / "r.html", speed=False, device="cpu")
    assert (found.recipes, found.labels_opened) == (1, 3)
    moved = alone.recipe.model_dump(mode="json")
    moved["source"] = {"name": "loveda", "root": str(tmp_path / "gone"), "scene": "urban"}
    Recipe.model_validate(moved).save(alone.path / "recipe.yaml")
    overfly.report([str(alone.path)], out=tmp_path / "r.html", speed=False, device="cpu")
    text = (tmp_path / "r.html").read_text()
    assert "No pictures: " in text
    assert "gone" in text


def test_what_is_no_run_is_told_so(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        overfly.report([str(tmp_path)], out=tmp_path / "r.html")
    with pytest.raises(RecipeError, match="--out"):
        overfly.report([str(runs)], out=tmp_path / "no" / "r.html")
    with pytest.raises(RecipeError, match=r"no ending of a page; name it recipe\.html"):
        overfly.report([str(runs)], out=tmp_path / "recipe.yaml")
    assert list(tmp_path.glob("*.html")) == []


def test_a_damaged_verdict_is_named(copied: Path, tmp_path: Path) -> None:
    (file,) = copied.glob("*/selection.json")
    file.write_text("{}")
    with pytest.raises(RunError, match=re.escape(str(file))):
        overfly.report([str(copied)], out=tmp_path / "r.html", speed=False, pictures=0, device="cpu")


def test_networks_are_offered_by_what_they_are_and_loaded_when_asked(runs: Path, copied: Path) -> None:
    offered = served_networks([str(runs), str(runs)])
    assert [each.key for each in offered] == ["0", "1", "2", "3"]
    assert len({each.title for each in offered}) == 4
    refused = next(each for each in offered if "_overfly_" in each.about["folder"])
    assert refused.about["method"] == "source_only"  # what its folder ships
    (selection,) = copied.glob("*/selection.json")
    selection.unlink()
    (selection.parent / "best.safetensors").unlink()
    adapted = next(
        each for each in served_networks([str(copied)]) if each.about["method"] == "multiscale_self_training"
    )
    assert adapted.title == "overfly, Urban to Rural, seed 0"
    assert adapted.about["mIoU target"].endswith("(val)")
    assert adapted.opened().metadata.classes.names[0] == "background"
    (file,) = runs.glob("*/best.safetensors")
    (alone,) = served_networks([str(file)])
    assert alone.about["model"] == "lraspp_mobilenet_v2"


def test_exports_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"a/exports/x.onnx": "32", "b/exports/x.onnx": "int8", "b/exports/y.onnx": "16"}
    for name in kinds:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def opened(path: Path, **_: str) -> Predictor:
        return replace(seeing(), export=("onnx", kinds[path.relative_to(tmp_path).as_posix()]))

    monkeypatch.setattr("overfly.commands.serve.load_predictor", opened)
    first, *others = [str(tmp_path / name) for name in kinds]
    offered = served_networks([first, first, *others])
    assert [each.title for each in offered] == [
        "x.onnx (a/exports, onnx, 32)", "x.onnx (b/exports, onnx, int8)", "y.onnx",
    ]  # fmt: skip
    assert [each.key for each in offered] == ["0", "1", "2"]
    assert offered[2].about["precision"] == "16"
    assert offered[2].about["folder"] == "exports"


def test_runs_of_one_recipe_in_two_folders_are_told_apart(copied: Path, runs: Path) -> None:
    offered = served_networks([str(runs), str(copied)])
    assert len({each.title for each in offered}) == len(offered) == 8
    (one, other) = (each for each in offered if "_overfly_" in each.about["folder"])
    assert one.run is not None
    assert one.title == f"source only, Urban to Rural, seed 0 ({runs.name}/{one.run.path.name})"
    assert other.title == f"source only, Urban to Rural, seed 0 ({copied.name}/{one.run.path.name})"


def test_scenes_that_cannot_be_read_are_left_out_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(striped(1)).save(tmp_path / "good.png")
    Image.fromarray(striped(1, 200, 100)).save(tmp_path / "large.png")
    for name in ("empty.png", "text.tif", "words.jpg"):
        (tmp_path / name).write_text("" if name == "empty.png" else "words")
    (tmp_path / "folder.png").mkdir()
    assert serve._pictures([tmp_path], 64 * 48) == [tmp_path / "good.png"]
    told = capsys.readouterr().err
    assert told.startswith(f"overfly: 5 scene(s) left out of the page: {tmp_path / 'empty.png'} is")
    assert told.endswith("; and 2 more\n")
    assert "large.png has 0.0 million pixels" in told
    assert len(told.splitlines()) == 1
    assert serve._pictures([tmp_path / "good.png"], 64 * 48) == [tmp_path / "good.png"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "needs a --token"),  # noqa: S104  (refused)
        (["--host", "0.0.0.0", "--token", "short"], "too short"),  # noqa: S104  (refused)
        (["--port", "70000"], "out of range"),
        (["--megapixels", "0"], "--megapixels"),
        (["--scenes", "nowhere"], "nowhere is not there"),
    ],
)
def test_the_server_does_not_begin_what_it_should_not(
    runs: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OVERFLY_TOKEN", raising=False)
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", str(runs), *arguments])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_without_the_extra_its_name_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfly.web.importlib.util.find_spec", {}.get)
    with pytest.raises(MissingExtraError, match=r"overfly\[serve\]"):
        overfly.serve([str(runs)])


def test_a_stream_is_looked_at_beside_the_page(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(striped(number)).save(tmp_path / f"{number}.png")
    with live_stream(str(tmp_path), seeing) as screen:
        assert screen is not None
        shown = screen.wait(0, timeout=30)
        assert shown is not None
        assert Image.open(io.BytesIO(shown.jpeg)).size == (64, 48)
    assert screen.closed
    with live_stream(None, seeing) as screen:
        assert screen is None
    with pytest.raises(DataError, match=r"none\.mp4"), live_stream(str(tmp_path / "none.mp4"), seeing):
        pass


def _end_of(source: str) -> str:
    with live_stream(source, seeing) as screen:
        assert screen is not None
        limit_duration = time.monotonic() + 30
        while not screen.closed and time.monotonic() < limit_duration:
            time.sleep(0.01)
        return screen.ended


def test_a_stream_that_ends_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.fromarray(striped(number)).save(tmp_path / f"{number}.png")
    assert _end_of(str(tmp_path)) == "it came to its end after 3 pictures"
    assert "the stream has ended: it came to its end after 3 pictures" in capsys.readouterr().err
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    assert str(tmp_path / "1.png") in _end_of(str(tmp_path))
    told = capsys.readouterr().err
    assert told.startswith(f"overfly: the stream has ended: {tmp_path / '1.png'}")
