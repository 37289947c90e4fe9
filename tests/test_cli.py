"""The command line: output, exit status and messages of mistakes."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import overfly as package
from overfly import cli
from overfly.commands import MODULES
from overfly.commands.data import CATALOG
from overfly.recipe import load


def overfly(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def file(small: dict[str, Any], tmp_path: Path) -> Path:
    load(small).save(tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_train_then_evaluate_then_speed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overfly("train", file, "steps=2", "--out", tmp_path / "runs", "--device", "cpu") == 0
    shown = capsys.readouterr()
    run = Path(shown.out.split("trained: ")[1].splitlines()[0])
    assert (run / "recipe.yaml").is_file()
    assert "2/2 steps" in shown.err
    assert "images/s" in shown.err
    assert overfly("evaluate", run, "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert "mIoU" in shown.out
    assert "agriculture" in shown.out
    scores = json.loads((run / "scores.json").read_text())
    assert scores["labels_opened"] == {"source/val": {"times": 1, "images": 2}, "target/val": {"times": 1, "images": 2}}
    assert 0 <= scores["target/val"]["miou"] <= 1
    for name in ("source-val.png", "target-val-confusion.png", "curves.png"):
        with Image.open(run / "samples" / name) as image:
            assert np.asarray(image).std() > 0
    assert overfly("evaluate", run, "size=32", "--domain", "target", "--split", "test", "--device", "cpu") == 0
    assert "target/test" in json.loads((run / "scores.json").read_text())
    assert overfly("speed", run, "--size", "64", "--repeats", "2", "--warmup", "1", "--device", "cpu") == 0
    assert "1,535 parameters" in capsys.readouterr().out


def test_speed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--size", "64", "--repeats", "2", "--warmup", "0", "--device", "cpu")
    assert (
        overfly("speed", "pidnet_s", "--batch", "1", "--batch", "2", "--macs-of-batch", "6", "--json", *settings) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [timing["batch"] for timing in found["timings"]] == [1, 2]
    assert found["macs_of_batch"]["6"] == 6 * found["macs"]
    assert found["machine"]["device"]


def test_speed_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("speed", "lraspp_mobilenet_v2", "--training", "--size", "64", "--batch", "2", "--device", "cpu")
    assert overfly(*command, "--threads", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["milliseconds"]["1"]["32"] > 0
    assert overfly(*command) == 0
    shown = capsys.readouterr().out
    assert "2 images of 64×64" in shown
    assert "32, channels-last" in shown
    assert overfly(*command, "--batch", "1") == 2
    assert "--batch must be 2" in capsys.readouterr().err


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert overfly("list") == 0
    shown = capsys.readouterr().out
    for name in (
        "pidnet_s",
        "deeplabv2_resnet101",
        "loveda",
        "folder",
        "synthetic",
        "recalibrate",
        "ohem",
        "dihedral",
        "poly",
    ):
        assert name in shown


def test_synthesize_check_and_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "world"
    synthesize = ("data", "synthesize", root, "--size", "64", "--train", "3", "--val", "1", "--test", "1")
    assert overfly(*synthesize) == 0
    assert str(root) in capsys.readouterr().out
    assert overfly("data", "check", "loveda", f"root={root}", "scene=urban") == 0
    assert "building" in capsys.readouterr().out
    assert overfly("data", "stats", "loveda", f"root={root}", "scene=urban") == 0
    assert "mean" in capsys.readouterr().out
    broken = root / "Train" / "Urban" / "images_png"
    next(broken.glob("*.png")).write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    assert overfly("data", "check", "loveda", f"root={root}", "scene=urban") == 1
    assert str(broken) in capsys.readouterr().out


MISTAKES = [
    (["train", "nowhere.yaml"], "nowhere.yaml"),
    (["train", "{file}", "optim.lr=fast"], "optim"),
    (["train", "{file}", "mehtod=dacs"], "mehtod"),
    (["train", "{file}", "--device", "tpu"], "tpu"),
    (["train", "{file}", "source={name: loveda, root: /nowhere, scene: urban}"], "/nowhere"),
    (["train", "{file}", "model.weights=/nowhere.pth"], "/nowhere.pth"),
    (["train", "{file}", "start=/nowhere"], "/nowhere"),
    (["evaluate", "{folder}/empty"], "recipe.yaml"),
    (["evaluate", "/nowhere"], "/nowhere"),
    (["benchmark", "{folder}/no*.yaml"], "no*.yaml"),
    (["benchmark", "{file}", "--seeds", "many"], "--seeds"),
    (["speed", "unet"], "unet"),
    (["data", "check", "no_such_domain"], "no_such_domain"),
    (["data", "synthesize"], "data synthesize needs ROOT"),
    (["trian"], "unknown command trian; did you mean train?; commands: adapt, benchmark, data,"),
    (["data", "chekc"], "unknown command chekc; did you mean check?"),
    (["--verbose"], "unknown option --verbose"),
    (["train"], "train needs RECIPE"),
    (["train", "{file}", "--out"], "train needs a value for --out"),
    (["speed", "unet", "resnet"], "got resnet"),
    (["train", "{file}", "--devcie", "cpu"], "did you mean --device?"),
    (["train", "{file}", "--epochs", "3"], "epochs=3"),
    (["evaluate", "{folder}", "--epochs=3"], "epochs=3"),
    (["train", "{file}", "quiet=true"], "--quiet"),
    (["adapt", "budget=5m"], "--budget 5m"),
    (["benchmark", "{file}", "seeds=2"], "--seeds 2"),
    (["train", "{file}", "--devices", "some"], "--devices must be an integer, got some"),
    (["train", "{file}", "--cache", "ram"], "--cache must be memory, disk or off, got ram"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0])[:40] for mistake in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [entry.replace("{file}", str(file)).replace("{folder}", str(tmp_path)) for entry in arguments]
    (tmp_path / "empty").mkdir()
    assert overfly(*filled) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    lines = shown.err.strip().splitlines()
    assert [line for line in lines if line.startswith("overfly: ")] == lines[-1:]  # after the phases, such as loading


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("replacement", [None, ImportError("cannot import name 'x' from partially initialized module")])
def test_a_signal_ends_a_command_with_one_line(
    number: int,
    status: int,
    replacement: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> None:
        """A command; a library that it imports may replace the interrupt by an error of its own."""
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            if replacement is not None:
                raise replacement from None
            raise

    before = signal.getsignal(number)
    monkeypatch.setattr("overfly.commands.data.list_kinds", interrupted)
    assert overfly("list") == status
    shown = capsys.readouterr().err
    assert "stopped" in shown
    assert len(shown.splitlines()) == 1
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("module", ["overfly.cli", "cyclopts", "torch"])
def test_ctrl_c_during_imports_is_no_traceback(module: str) -> None:
    code = (
        "import os, sys\n"
        "class At:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), 2)\n"
        "sys.meta_path.insert(0, At())\n"
        "from overfly.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "speed", "pidnet_s"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


HEAVY = {"torch", "numpy", "pydantic", "scipy", "yaml", "lightning_fabric", "matplotlib"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["hub", "--help"], ["list"], *([*cli.words(name), "--help"] for name in sorted(MODULES))],
    ids=" ".join,
)
def test_help_and_list_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom overfly.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=600, stdout=subprocess.DEVNULL)


def test_the_catalog_file_equals_the_registries() -> None:
    code = "import json; from overfly.commands.data import build_catalog; print(json.dumps(build_catalog().groups))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600)
    assert json.loads(CATALOG.read_text(encoding="utf-8")) == json.loads(done.stdout), "run `make docs`"


def test_help_names_the_options_that_may_be_repeated() -> None:
    repeated = []
    for name in MODULES:
        function = getattr(package, name)
        text = " ".join(str(inspect.getdoc(function)).split())
        for option in inspect.signature(function).parameters.values():
            if option.kind is option.KEYWORD_ONLY and re.match("list|PathLikes", str(option.annotation)):
                repeated.append(f"{name} {option.name}")
                assert f"may be repeated: --{option.name}" in text, repeated[-1]
    assert "serve scenes" in repeated
