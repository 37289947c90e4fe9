"""``data check`` and training name what ruins a network in silence, with the setting that mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from overfly.commands.data import CheckResult
from overfly.core.errors import DataError
from overfly.core.records import Array
from overfly.data.check import DomainReport, check
from overfly.data.domain import check_masks
from overfly.data.folder import Folder


def write(root: Path, masks: list[Array] | None = None, **settings: Any) -> Folder:
    """Four images of 16×16 pixels, and masks of the classes a, b and c."""
    random = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number in range(4):
        Image.fromarray(random.integers(0, 200, (16, 16, 3), np.uint8)).save(root / "images" / f"{number}.png")
        mask = masks[number] if masks else random.integers(0, 3, (16, 16), np.uint8)
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return Folder(root=root, masks="masks", **{"classes": ["a", "b", "c"]} | settings)


def messages(report: DomainReport) -> list[str]:
    return [problem.message for problem in report.problems]


def test_a_class_stored_as_255_is_named_with_its_setting(tmp_path: Path) -> None:
    masks = [np.repeat(np.array([0, 255], np.uint8), [160, 96]).reshape(16, 16)] * 4
    domain = write(tmp_path, masks, classes=["land", "building"])
    expected = r"no mask contains building; 38% of pixels are 255.*ids: \{land: 0, building: 255\}"
    assert len(messages(check(domain))) == 1
    with pytest.raises(DataError, match=expected):
        raise DataError(messages(check(domain))[0])
    with pytest.raises(DataError, match=expected):
        check_masks(domain, ["train"])
    mended = domain.model_copy(update={"ids": {"land": (0,), "building": (255,)}})
    assert check(mended).splits[0].shares == {"land": 0.625, "building": 0.375}
    check_masks(mended, ["train"])


def test_a_class_without_pixels_is_a_note(tmp_path: Path) -> None:
    report = check(write(tmp_path, [np.eye(16, dtype=np.uint8)] * 4))
    assert not report.problems
    assert [note.split(";")[0] for note in report.splits[0].notes] == ["no mask contains c"]
    assert str(report).count("no mask contains c") == 1


def test_numbers_of_no_class_are_named_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    masks = [random.integers(0, 3, (16, 16), np.uint8) for _ in range(4)]
    masks[1][:4], masks[3][:2] = 9, 11
    report = check(write(tmp_path, masks))
    assert len(report.problems) == 1
    for part in ("1.png", "2 masks", "9 (64 pixels)", "11 (32 pixels)", "ignore: [9, 11]"):
        assert part in messages(report)[0]


def test_faults_of_a_split_are_named_once(tmp_path: Path) -> None:
    domain = write(tmp_path, max_value=1.0, splits={"train": ("[012]",), "val": ("3",)})
    (tmp_path / "images" / "3.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    for number in range(3):
        image = np.asarray(Image.open(tmp_path / "images" / f"{number}.png")).copy()
        image[..., 2] = 7
        if number == 0:
            (tmp_path / "images" / "3.png").unlink()
            Image.fromarray(image).save(tmp_path / "images" / "3.png")
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    report = check(domain, ["train", "val"])
    text = str(report)
    assert text.count("above the domain's max_value") == 2  # once in each split
    assert "(and 2 more: 1, 2)" in text
    assert text.count("band 3 is 7 in every image") == 1
    assert text.count("set bands to 2") == 1
    assert text.count("3 (train: 0)") == 1


def test_mixed_types_and_negative_values(tmp_path: Path) -> None:
    domain = write(tmp_path, bands=1)
    for number in range(4):
        values = np.full((16, 16), 7, np.float32) - np.eye(16, dtype=np.float32) * 9
        (tmp_path / "images" / f"{number}.png").unlink()
        image = Image.fromarray(values if number else np.eye(16, dtype=np.uint8))
        image.save(tmp_path / "images" / f"{number}.tif")
    report = check(domain)
    assert [message for message in messages(report) if "types" in message and "max_value" in message] == messages(
        report
    )
    assert len(report.problems) == 1
    assert any("-2" in note and "nodata" in note for note in report.splits[0].notes)


def test_training_names_classes_of_no_mask_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [np.repeat(np.array([0, 1], np.uint8), 128).reshape(16, 16)] * 4
    domain = write(tmp_path, masks, splits={"train": 0.5, "val": 0.5})
    check_masks(domain, ["val"])
    assert capsys.readouterr().err == ""
    for _ in range(2):
        check_masks(domain, ["train", "val"])
    assert capsys.readouterr().err == "Folder: no mask contains c; correct ids or colors, or the classes\n"


def test_images_of_source_and_target_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    reports = {"City": check(write(tmp_path / "a")), "Coast": check(write(tmp_path / "b"))}
    Console(width=200).print(CheckResult(reports))
    text = capsys.readouterr().out
    assert "4 images are in Coast too" in text
    assert "4 images are in City too" in text
