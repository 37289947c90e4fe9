"""Files and names of strangers: each gives a sentence or is shown harmlessly, in bounded time and memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from starlette.testclient import TestClient

from overfly import cli, train
from overfly.adaptation.selection import CandidateReport, Comparison
from overfly.commands import serve
from overfly.core.download import unpack_zip
from overfly.core.errors import (
    MAX_MESSAGE,
    DataError,
    DownloadError,
    OverflyError,
    RecipeError,
    RunError,
    markdown_text,
    printable,
)
from overfly.core.records import Item
from overfly.core.settings import MAX_TEXT, parse_yaml, set_value
from overfly.data import synthetic
from overfly.data.folder import read_classes
from overfly.data.listing import match_files
from overfly.data.reading import read_index_label
from overfly.data.synthetic import write_synthetic
from overfly.exporting import exporter
from overfly.exporting.predictor import ExportSettings, model_metadata
from overfly.exporting.trial import remember
from overfly.recipe import load
from overfly.training.run import Run, new_folder
from overfly.web.server import application
from random_networks import random_network
from test_damage import METRICS, write_selection


def cli_status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


EVIL = '<img src="x" onerror="alert(1)"> | [a](javascript:b) `c`\n# d'
NESTED = {
    "brackets": "a: " + "[" * 3000,
    "closed brackets": "a: " + "[" * 900 + "]" * 900,
    "braces": "{a: " * 3000,
    "lines": "- " * 3000,
    "aliases": "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
    "cycle": "a: &a [*a]",
    "list as a key": "? [1, 2]\n: 3",
    "duplicate key": "a: 1\na: 2",
    "number": "a: " + "1:" * 20_000 + "1",
    "digits": "a: " + "9" * 5000,
    "length": "a" * (MAX_TEXT + 1),
}


@pytest.mark.parametrize("name", NESTED)
def test_hostile_yaml_is_refused_at_once(name: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises((yaml.YAMLError, ValueError)):
        parse_yaml(NESTED[name])
    (tmp_path / "a.yaml").write_text(NESTED[name])
    with pytest.raises(RecipeError, match=r"a\.yaml"):
        load(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml"):
        read_classes(tmp_path / "a.yaml")
    assert time.monotonic() - started < 10


def test_many_keys_take_linear_time() -> None:
    """16 times as many keys take about 16 times as long; a comparison of all pairs would take 256 times."""
    seconds = []
    for count in (1_500, 24_000):
        text = "".join(f"k{number}: 1\n" for number in range(count))
        started = time.process_time()
        assert len(parse_yaml(text)) == count
        seconds.append(time.process_time() - started)
    assert seconds[1] < 64 * seconds[0]


def test_a_hostile_recipe_below_out_stops_no_other_run(tmp_path: Path) -> None:
    recipe = load({"source": {"name": "synthetic", "scene": "urban"}})
    for number, text in enumerate(NESTED.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(text)
        (folder / "machine.json").write_text('{"format": 2}')
    assert Run.find(tmp_path, recipe) is None
    assert Run.open_or_create(tmp_path, recipe).recipe == recipe


def test_messages_are_short_and_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        set_value({}, "x" * 400_000)
    assert len(str(caught.value)) < MAX_MESSAGE
    assert str(caught.value).endswith("write key=value, such as method.ema=0.99")
    assert str(OverflyError("a\x1b[31m\udcff\n  b  c")) == r"a\x1b[31m\udcff b  c"
    assert cli.handle(OSError(5, "bad", "\x1b]0;title\x07" + "y" * 400_000)) == 2
    assert cli.handle(UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates")) == 2
    assert cli.handle(RuntimeError("[pair.cc, gloo/transport] Read error: Connection reset by peer")) == 2
    shown = capsys.readouterr().err
    assert len(shown) < 2 * MAX_MESSAGE
    assert "\x1b" not in shown
    assert printable("Straße 7") == "Straße 7"


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes need Linux")
@pytest.mark.parametrize("name", [b"a\xff.png", b"a\x1b[31m.png", b"a\nb.png"])
def test_names_that_cannot_be_printed_are_refused(name: bytes, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(DataError, match="rename it") as caught:
        match_files(tmp_path, "*.png")
    assert str(caught.value).isprintable()


def test_run_folders_have_plain_names(tmp_path: Path) -> None:
    for title in ("../../a", "a\0b", "\x1b[31m", "x" * 400, "a/b c", "\udcff"):
        folder = new_folder(tmp_path, title)
        assert folder.parent == tmp_path
        assert folder.name.isprintable()


def test_deep_archives_are_refused(tmp_path: Path) -> None:
    for name in ("a/" * 2000 + "b.png", "a" * 2000):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, b"")
        with pytest.raises(DownloadError, match=r"a\.zip .* folders deep|out: .*File name too long"):
            unpack_zip(tmp_path / "a.zip", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_markdown_shows_names_as_text() -> None:
    text = markdown_text(EVIL)
    assert "<" not in text
    assert "\n" not in text
    assert text.count("|") == text.count(r"\|") == 1
    assert text.count("[") == text.count(r"\[")
    assert text.count("`") == text.count(r"\`")


@pytest.mark.parametrize(
    "scores",
    [
        {"labels_opened": {"target/val": {"time": 1, "images": 2}}},
        {"labels_opened": {"target/val": {"times": "1", "images": []}}},
        {"labels_opened": {"target/val": 3}},
        {"checkpoints": {"step-10": 3}},
        {"checkpoints": {"step-10": {"source/val": 3}}},
        {"source/val": [1]},
    ],
)
def test_scores_of_another_form_are_damaged(scores: object, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(RunError, match=r"scores\.json is damaged"):
        _ = Run(tmp_path).scores


def test_pages_and_cards_hold_no_html_of_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "ROUNDS", 1)
    monkeypatch.setattr(exporter, "SECONDS", 0.0)
    write_synthetic(tmp_path / "world", size=64, train=6, val=2, test=1)
    folder = {"name": "folder", "root": str(tmp_path / "world" / "Train" / "Urban"), "images": "images_png"}
    source = folder | {
        "masks": "masks_png",
        "classes": [EVIL, *"bcdefg"],
        "ids": {EVIL: 1, **{name: 2 + number for number, name in enumerate("bcdefg")}},
    }
    recipe = {"source": source | {"title": EVIL, "splits": {"train": 0.5, "val": 0.5}}, "model": "small_network"}
    run = train(
        load(recipe, "crop=64", "batch=2", "steps=2", "seed=0"), out=tmp_path / "runs", device="cpu", quiet=True
    ).run
    assert cli_status("evaluate", run.path, "--device", "cpu", "--no-samples", "--domain", "source") == 0
    assert cli_status("export", run.path, "--format", "onnx", "--domain", "source", "--images", "1") == 0
    assert cli_status("report", run.path, "--out", tmp_path / "report.html", "--title", EVIL, "--no-speed") == 0
    card = next(run.path.glob("exports/*.md")).read_text()
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in card
    assert "alert(1)" in page
    for text in (card.partition("## Recipe")[0], page):
        assert '<img src="x"' not in text
    assert "](javascript" not in card.partition("## Recipe")[0].replace(r"\](", "")
    assert all(line.startswith("    ") or not line for line in card.partition("## Recipe\n")[2].splitlines())


def test_the_second_writer_of_a_world_finds_it_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, write_all = tmp_path / "world", synthetic._write_all

    def slow(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(synthetic, "_write_all", write_all)
            write_synthetic(world, size=16, train=1, val=1, test=1)  # the other writer
        write_all(*arguments)

    monkeypatch.setattr(synthetic, "_write_all", slow)
    assert write_synthetic(world, size=16, train=1, val=1, test=1) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_the_second_export_of_a_file_is_told(tmp_path: Path) -> None:
    image = np.zeros((1, 3, 64, 64), np.float32)
    network = random_network("small_network")
    metadata = model_metadata(network, window=64)
    data = exporter.EvaluationData([image], [image], None, "zeros")

    def begin(_: str) -> None:
        exporter.export(
            network, metadata, ExportSettings(format="torch"), data, folder=tmp_path, name="a", on_progress=fail
        )

    def fail(_: str) -> None:
        raise AssertionError

    with pytest.raises(OverflyError, match=r"a\.pt2 is being exported by another process"):
        exporter.export(
            network, metadata, ExportSettings(format="torch"), data, folder=tmp_path, name="a", on_progress=begin
        )
    assert list(tmp_path.iterdir()) == []


def test_found_by_fuzzing(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [300, 2]], np.float32)
    Image.fromarray(mask).save(tmp_path / "mask.tif")
    with pytest.raises(DataError, match=r"got 300 \(1 pixels\)"):
        read_index_label(Item("a", tmp_path / "mask.tif", tmp_path / "mask.tif"), 3)
    with pytest.raises(RecipeError, match="path: there is no such setting"):
        load({"source": {"name": "synthetic", "scene": "urban"}}, "path=1")
    write_selection(tmp_path, CandidateReport(run="a", metrics=METRICS))
    text = (tmp_path / "selection.json").read_text().replace('"recommended": "', '"recommended": "x')
    (tmp_path / "selection.json").write_text(re.sub(r',\s*"digest": "\w+"', "", text))
    with pytest.raises(RunError, match="damaged"):
        _ = Comparison(tmp_path).selection


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes need Linux")
def test_the_server_shows_names_of_any_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = Path(__file__).parent / "seeds"
    for name in (b"good.png", b"a\xff.png", b"a\x1b[31m.png"):
        shutil.copy(seeds / "image" / "rgb.png", tmp_path / os.fsdecode(name))
    scenes = serve._list_scenes([tmp_path])
    assert [path.name for path in scenes] == ["good.png"]
    assert "\x1b" not in capsys.readouterr().err
    file = tmp_path / "<blink>\x1b.onnx"
    shutil.copy(seeds / "onnx" / "net.onnx", file)
    remember(file, "onnxruntime")
    networks = serve.served_networks([file])
    with TestClient(application(networks, scenes=scenes), base_url="http://127.0.0.1") as client:
        for address in ("/", "/networks", "/health", "/compare?one=0&other=0"):
            answer = client.get(address)
            assert answer.status_code == 200, address
            assert "<blink>" not in answer.text or address == "/networks"
