"""The command line as a stranger meets it: what it prints, and how it answers mistakes."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from overfly import cli
from overfly.commands import api
from overfly.recipe import load


def overfly(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def file(small: dict[str, Any], tmp_path: Path) -> Path:
    load(small).save(tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_train_evaluate_and_look(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overfly("train", file, "steps=2", "--out", tmp_path / "runs", "--device", "cpu") == 0
    shown = capsys.readouterr()
    run = Path(shown.out.split("trained: ")[1].splitlines()[0])
    assert (run / "recipe.yaml").is_file()
    assert "step 2/2" in shown.err
    assert "images/s" in shown.err
    assert overfly("evaluate", run, "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert "mIoU" in shown.out
    assert "agriculture" in shown.out
    scores = json.loads((run / "scores.json").read_text())
    assert scores["labels_opened"] == {"source/val": {"times": 1, "images": 2}, "target/val": {"times": 1, "images": 2}}
    assert 0 <= scores["target/val"]["miou"] <= 1
    for picture in ("source-val.png", "target-val-confusion.png", "curves.png"):
        with Image.open(run / "samples" / picture) as drawn:
            assert np.asarray(drawn).std() > 0
    assert overfly("evaluate", run, "size=32", "--domain", "target", "--split", "test", "--device", "cpu") == 0
    assert "target/test" in json.loads((run / "scores.json").read_text())
    assert overfly("speed", run, "--size", "64", "--repeats", "2", "--warmup", "1", "--device", "cpu") == 0
    assert "7,624,167 parameters" in capsys.readouterr().out


def test_speed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--size", "64", "--repeats", "2", "--warmup", "0", "--device", "cpu")
    assert (
        overfly("speed", "pidnet_s", "--batch", "1", "--batch", "2", "--macs-of-batch", "6", "--json", *settings) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [timing["batch"] for timing in found["timings"]] == [1, 2]
    assert found["macs_of_batch"]["6"] == 6 * found["macs"]
    assert found["machine"]["device"]


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


def test_draw_check_and_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "world"
    draw = ("data", "draw", root, "--size", "64", "--train", "3", "--val", "1", "--test", "1")
    assert overfly(*draw) == 0
    assert "below" in capsys.readouterr().out
    assert overfly("data", "check", "loveda", f"root={root}", "scene=urban") == 0
    assert "building" in capsys.readouterr().out
    assert overfly("data", "stats", "loveda", f"root={root}", "scene=urban") == 0
    assert "mean" in capsys.readouterr().out
    broken = root / "Train" / "Urban" / "images_png"
    next(broken.glob("*.png")).write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    assert overfly("data", "check", "loveda", f"root={root}", "scene=urban") == 1
    assert str(broken) in capsys.readouterr().out


MISTAKES = [
    (["train", "nowhere.yaml"], "nowhere.yaml is not there"),
    (["train", "{file}", "optim.lr=fast"], "optim"),
    (["train", "{file}", "mehtod=dacs"], "mehtod: there is no such setting"),
    (["train", "{file}", "--device", "tpu"], "no device is called 'tpu'"),
    (["train", "{file}", "source={name: loveda, root: /nowhere, scene: urban}"], "/nowhere"),
    (["train", "{file}", "model.weights=/nowhere.pth"], "/nowhere.pth"),
    (["train", "{file}", "start=/nowhere"], "/nowhere is not there"),
    (["evaluate", "{folder}/empty"], "no recipe.yaml"),
    (["evaluate", "/nowhere"], "/nowhere is not there"),
    (["benchmark", "{folder}/no*.yaml"], "means no recipe"),
    (["benchmark", "{file}", "--seeds", "many"], "--seeds many"),
    (["speed", "unet"], "unet"),
    (["data", "check", "no_such_domain"], "no domain is called 'no_such_domain'"),
    (["data", "draw"], "root"),
    (["fly"], "fly"),
    (["train", "{file}", "--devices", "some"], "devices"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[" ".join(mistake[0])[:40] for mistake in MISTAKES])
def test_mistakes_are_answered_in_one_sentence(
    arguments: list[str], named: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [entry.replace("{file}", str(file)).replace("{folder}", str(tmp_path)) for entry in arguments]
    out = tmp_path / "runs"
    (tmp_path / "empty").mkdir()
    assert overfly(*filled, *(["--out", str(out)] if arguments[0] in ("train", "benchmark") else [])) == 2
    shown = capsys.readouterr()
    assert named in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not list(out.glob("*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("instead", [None, ImportError("cannot import name 'x' from partially initialized module")])
def test_being_told_to_end_is_one_sentence(
    number: int,
    status: int,
    instead: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended() -> None:
        """A command; a library that it imports may turn the interruption into an error of its own."""
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            if instead is not None:
                raise instead from None
            raise

    before = signal.getsignal(number)
    monkeypatch.setattr(api, "list_kinds", ended)
    assert overfly("list") == status
    shown = capsys.readouterr().err
    assert "stopped" in shown
    assert len(shown.splitlines()) == 1
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("module", ["overfly.cli", "signal", "cyclopts", "torch", "lightning_fabric"])
def test_ctrl_c_while_it_imports_is_no_traceback(module: str) -> None:
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
        [sys.executable, "-c", code, "list"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_help_is_there_before_the_heavy_packages() -> None:
    code = (
        "import sys\nfrom overfly.cli import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "found = {'torch', 'numpy', 'pydantic', 'overfly.commands.api'} & set(sys.modules)\nassert not found, found\n"
    )
    for arguments in (["--help"], ["hub", "--help"], []):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=600, stdout=subprocess.DEVNULL)


def test_help_says_which_options_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name in api.__all__:
        told = " ".join(str(inspect.getdoc(getattr(api, name))).split())
        for option in inspect.signature(getattr(api, name)).parameters.values():
            if option.kind is option.KEYWORD_ONLY and str(option.annotation).startswith("list["):
                found.append(f"{name} {option.name}")
                assert f"may be repeated: --{option.name}" in told, found[-1]
    assert "serve scenes" in found
    assert overfly("serve", "--help") == 0
    assert "may be repeated: --scenes" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_quick_help_says_what_the_commands_say() -> None:
    told = cli.summaries()
    assert list(told) == api.__all__
    for name, sentence in told.items():
        assert sentence == " ".join(str(inspect.getdoc(getattr(api, name))).partition("\n\n")[0].split())
