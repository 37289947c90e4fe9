from __future__ import annotations

import io
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

import overfly
from overfly import cli
from overfly.commands.serve import _list_scenes, live_stream, served_networks
from overfly.core.errors import DataError, MissingExtraError
from overfly.exporting.predictor import Predictor
from overfly.recipe import load
from overfly.training.run import Run
from overfly.web.server import application
from streams import numbered_frame, rule_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source-only run that was scored on val and test of its target."""
    out = tmp_path_factory.mktemp("runs")
    synthetic = {"name": "synthetic", "size": 64, "train": 4, "val": 3, "test": 2}
    recipe = load(
        {
            "source": {**synthetic, "scene": "urban"}, "target": {**synthetic, "scene": "rural"}, "crop": 64,
            "model": "lraspp_mobilenet_v2", "optim": {"name": "sgd", "lr": 0.01}, "batch": 2, "steps": 2,
        }
    )  # fmt: skip
    overfly.train(recipe, out=out, device="cpu", quiet=True)
    (run,) = out.glob("*")
    for split in ("val", "test"):
        overfly.evaluate(run, domain="target", split=split, device="cpu", samples=False)
    return out


def test_networks_are_described_with_one_column_a_split(runs: Path) -> None:
    (served,) = served_networks([str(runs), str(runs)])
    assert (served.key, served.title) == ("0", "source only, Urban to Rural, seed 0")
    assert served.run is not None
    for split in ("val", "test"):
        miou = Run(served.run.path).scores[f"target/{split}"]["miou"]
        assert served.about[f"mIoU target {split}"] == f"{100 * miou:.1f}"
    assert "mIoU source val" not in served.about
    assert served.load().metadata.classes.names[0] == "background"
    (weights,) = served_networks([str(served.run.path / "checkpoints" / "best.safetensors")])
    assert weights.about["model"] == "lraspp_mobilenet_v2"


def test_two_networks_are_compared(runs: Path, tmp_path: Path) -> None:
    (first,) = served_networks([str(runs)])
    assert first.run is not None
    other = shutil.copytree(first.run.path, tmp_path / "other")
    shutil.copy(first.run.path / "checkpoints" / "best.safetensors", tmp_path / "weights.safetensors")
    (other / "scores.json").unlink()
    networks = served_networks([str(runs), str(other), str(tmp_path / "weights.safetensors")])
    with TestClient(application(networks), base_url="http://127.0.0.1") as client:
        page = client.get("/compare?one=0&other=1").text
        miou = 100 * first.run.scores["target/val"]["miou"]
        assert f'<td>mIoU</td><td class="number">{miou:.2f}</td><td class="number">–</td>' in page
        assert page.count('aria-label="IoU of each class, target/') == 2
        assert "None: the same recipe" in page
        page = client.get("/compare?one=1&other=2").text
        assert "Neither network has scores" in page
        assert "<td><code>optim.lr</code></td><td>0.01</td><td>–</td>" in page
        page = client.get("/").text
        assert 'name="network" value="0" aria-label="A: source only, Urban to Rural, seed 0' in page
        assert len(re.findall(r'name="network" value="0"[^>]* checked', page)) == 1
        assert len(re.findall(r'name="other" value="2"[^>]* checked', page)) == 1


def test_titles_of_equal_file_names_are_made_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"a/exports/x.onnx": "32", "b/exports/x.onnx": "int8", "b/exports/y.onnx": "16"}
    for name in kinds:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def opened(path: Path, **_: str) -> Predictor:
        return replace(rule_model(), export=("onnx", kinds[path.relative_to(tmp_path).as_posix()]))

    monkeypatch.setattr("overfly.commands.load_predictor.load_predictor", opened)
    first, *others = [str(tmp_path / name) for name in kinds]
    offered = served_networks([first, first, *others])
    assert [each.title for each in offered] == [
        "x.onnx (a/exports, onnx, 32)", "x.onnx (b/exports, onnx, int8)", "y.onnx",
    ]  # fmt: skip
    assert [each.key for each in offered] == ["0", "1", "2"]
    assert offered[2].about["precision"] == "16"
    assert offered[2].about["folder"] == "exports"


def test_titles_of_one_recipe_in_two_folders_are_made_unique(runs: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(runs, tmp_path / "copies")
    one, other = served_networks([str(runs), str(copied)])
    assert one.run is not None
    assert one.title == f"source only, Urban to Rural, seed 0 ({runs.name}/{one.run.path.name})"
    assert other.title == f"source only, Urban to Rural, seed 0 (copies/{one.run.path.name})"


def test_unreadable_scenes_are_left_out_and_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(numbered_frame(1)).save(tmp_path / "good.png")
    Image.fromarray(numbered_frame(1, 200, 100)).save(tmp_path / "large.png")
    for name in ("empty.png", "text.tif", "words.jpg"):
        (tmp_path / name).write_text("" if name == "empty.png" else "words")
    (tmp_path / "folder.png").mkdir()
    assert _list_scenes([tmp_path]) == [tmp_path / "good.png", tmp_path / "large.png"]
    printed = capsys.readouterr().err
    assert printed.startswith(f"overfly: 4 scene(s) left out of the page: {tmp_path / 'empty.png'} is")
    assert printed.endswith("; and 1 more\n")
    assert len(printed.splitlines()) == 1
    assert _list_scenes([tmp_path / "good.png"]) == [tmp_path / "good.png"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--token"),  # noqa: S104  (refused)
        (["--host", "0.0.0.0", "--token", "short"], "--token"),  # noqa: S104  (refused)
        (["--port", "70000"], "--port"),
        (["--megapixels", "0"], "--megapixels"),
        (["--scenes", "nowhere"], "--scenes nowhere"),
    ],
)
def test_serve_refuses_invalid_options(
    runs: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OVERFLY_TOKEN", raising=False)
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", str(runs), *arguments])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfly.web.importlib.util.find_spec", {}.get)
    with pytest.raises(MissingExtraError, match=r"overfly\[serve\]"):
        overfly.serve([str(runs)])


def test_live_stream_renders_overlays(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(tmp_path / f"{number}.png")
    with live_stream(str(tmp_path), rule_model) as latest_frame:
        assert latest_frame is not None
        while (shown := latest_frame.latest()) is None:
            time.sleep(0.01)
        assert Image.open(io.BytesIO(shown.jpeg)).size == (64, 48)
    assert latest_frame.closed
    with live_stream(None, rule_model) as latest_frame:
        assert latest_frame is None
    with pytest.raises(DataError, match=r"none\.mp4"), live_stream(str(tmp_path / "none.mp4"), rule_model):
        pass


def _end_of(source: str) -> str:
    with live_stream(source, rule_model) as latest_frame:
        assert latest_frame is not None
        limit_duration = time.monotonic() + 30
        while not latest_frame.closed and time.monotonic() < limit_duration:
            time.sleep(0.01)
        return latest_frame.end_reason


def test_live_stream_reports_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(tmp_path / f"{number}.png")
    assert _end_of(str(tmp_path)) == "finished after 3 frames"
    assert "after 3 frames" in capsys.readouterr().err
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    assert str(tmp_path / "1.png") in _end_of(str(tmp_path))
    printed = capsys.readouterr().err
    assert printed.startswith(f"overfly: the stream has ended: {tmp_path / '1.png'}")
