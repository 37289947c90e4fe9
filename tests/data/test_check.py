from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Item
from overfly.data import reading
from overfly.data.check import check, class_counts
from overfly.data.domain import SplitError, check_masks
from overfly.data.folder import Folder
from overfly.data.loveda import CLASSES, LoveDA
from overfly.data.synthetic import synthesize

LOVEDA = Path(__file__).parents[2] / ".." / "shared" / "data" / "loveda-sample"


def write(root: Path, count: int = 8) -> Folder:
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number in range(count):
        image = np.random.default_rng(number).integers(0, 200, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        label = np.zeros((8, 8), np.uint8)
        label[:, 6:] = 1
        label[0] = 255
        Image.fromarray(label).save(root / "masks" / f"{number}.png")
    return Folder(root=root, classes=Classes(names=("a", "b", "c")), masks="masks")


def test_check_counts_images_classes_and_types(tmp_path: Path) -> None:
    domain = write(tmp_path)
    report = check(domain)
    (split,) = report.splits
    assert not report.problems
    assert (split.images, split.labeled, split.sizes, split.bands, split.dtypes) == (
        8,
        8,
        {"8×8": 8},
        {3: 8},
        {"uint8": 8},
    )
    assert split.shares == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert split.ignored == 1 / 8
    assert set(report.absent) == {"val", "test"}
    assert "a: 75.00%" in str(report)
    assert class_counts(domain, domain.items("train")[0]).tolist() == [42, 14, 0]


def test_check_counts_unread_alpha_bands(tmp_path: Path) -> None:
    domain = write(tmp_path)
    image = np.random.default_rng(0).integers(0, 200, (8, 8, 4)).astype(np.uint8)
    Image.fromarray(image, "RGBA").save(tmp_path / "images" / "3.png")
    report = check(domain)
    assert not report.problems
    assert report.splits[0].unread_alpha == 1
    for number in range(8):
        Image.fromarray(image, "RGBA").save(tmp_path / "images" / f"{number}.png")
    whole = check(domain.model_copy(update={"bands": 4}))
    assert whole.splits[0].unread_alpha == 0
    assert whole.splits[0].bands == {4: 8}


def test_check_lists_every_bad_file(tmp_path: Path) -> None:
    domain = write(tmp_path, 10)
    images, masks = tmp_path / "images", tmp_path / "masks"
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:150])
    (images / "2.png").write_bytes(b"<html>not found</html>")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / "3.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(masks / "4.png")
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(masks / "5.png")
    (masks / "6.png").write_bytes(b"")
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(images / "7.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(masks / "8.png")
    report = check(domain, ["train"])
    assert [problem.image for problem in report.problems] == ["1", "2", "3", "4", "6", "7", ""]
    expected = ["truncated", "web page", "1 band", "8×9", "empty", "one value", "3 (64 pixels)"]
    for problem, word in zip(report.problems, expected, strict=True):
        assert word in problem.message
        assert f"{problem.image or 5}.png" in problem.message
        assert problem.message in str(report)
    assert report.splits[0].empty == 1


def test_check_lists_values_above_max_value_and_missing_masks(tmp_path: Path) -> None:
    domain = write(tmp_path, 3)
    report = check(domain.model_copy(update={"max_value": 1.0}), ["train"])
    assert len(report.problems) == 3
    assert "max_value" in report.problems[0].message
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(DataError, match=r"images/2\.png .*1 of 3"):
        check(domain, ["train"])


def test_check_raises_an_error_of_the_whole_folder(tmp_path: Path) -> None:
    domain = write(tmp_path, 4).model_copy(update={"splits": {"train": "train.txt", "val": "val.txt"}})
    with pytest.raises(DataError, match=r"train\.txt"):
        check(domain)
    (tmp_path / "train.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match=r"train\.txt"):
        check(domain)
    with pytest.raises(DataError, match="nowhere"):
        check(domain.model_copy(update={"root": tmp_path / "nowhere"}))


def test_check_reports_an_error_of_one_split(tmp_path: Path) -> None:
    report = check(write(tmp_path, 4).model_copy(update={"splits": {"train": "*", "val": "nothing*"}}))
    assert [split.images for split in report.splits] == [4, 0]
    assert [problem.message.startswith("the split val") for problem in report.problems] == [True]


def test_check_reports_pipes_and_empty_images_once(tmp_path: Path) -> None:
    domain = write(tmp_path, 4)
    (tmp_path / "images" / "1.png").unlink()
    os.mkfifo(tmp_path / "images" / "1.png")
    small = (tmp_path / "images" / "2.png").read_bytes()
    (tmp_path / "images" / "2.png").write_bytes(small[:16] + bytes(8) + small[24:])
    report = check(domain, ["train"])
    assert [problem.image for problem in report.problems] == ["1", "2"]
    for problem, expected in zip(report.problems, ("pipe", "damaged"), strict=True):
        assert expected in problem.message


def test_check_without_masks(tmp_path: Path) -> None:
    report = check(write(tmp_path).model_copy(update={"masks": None}))
    assert (report.splits[0].labeled, report.splits[0].shares, report.problems) == (0, {}, ())


def test_check_of_missing_folder_or_no_splits(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="LoveDA"):
        check(LoveDA(root=tmp_path, scene="urban"))
    with pytest.raises(DataError, match="splits"):
        check(LoveDA(root=tmp_path), [])


def test_check_masks_finds_unknown_values_in_a_later_split(tmp_path: Path) -> None:
    domain = write(tmp_path, 4).model_copy(update={"splits": {"train": ("0", "1"), "val": ("2", "3")}})
    check_masks(domain, ["train", "val"])
    for name in ("2", "3"):
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    check_masks(domain, ["train", "test"])
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"masks/2\.png .*2 masks hold such values: 7 \(128 pixels\); for example, ignore: \[7\]"
        ):
            check_masks(domain, ["train", "val"])


def test_check_masks_reads_only_changed_masks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain, decoded = write(tmp_path, 4), list[str]()
    read_item_label = reading.read_item_label

    def record(item: Item, band: int | None = None) -> reading.LabelPixels:
        decoded.append(item.name)
        return read_item_label(item, band)

    monkeypatch.setattr(reading, "read_item_label", record)
    check_masks(domain, ["train"])
    check_masks(domain, ["train"])
    assert sorted(decoded) == ["0", "1", "2", "3"]
    os.utime(tmp_path / "masks" / "1.png", ns=(0, 0))
    check_masks(domain, ["train"])
    assert decoded[4:] == ["1"]
    check_masks(domain.model_copy(update={"unknown": "ignore"}), ["train"])
    assert len(decoded) == 9


@pytest.mark.skipif(not LOVEDA.is_dir(), reason="the LoveDA sample does not lie beside this repository")
def test_class_shares_of_loveda_tiles() -> None:
    domain = LoveDA(root=LOVEDA, scene="rural")
    report = check(domain)
    counts = dict.fromkeys(range(8), 0)
    for path in (LOVEDA / "Train" / "Rural" / "masks_png").glob("*.png"):
        with Image.open(path) as mask:
            for value, count in zip(*np.unique(np.asarray(mask), return_counts=True), strict=True):
                counts[int(value)] += int(count)
    labeled = sum(counts.values()) - counts[0]
    assert report.splits[0].shares == {name: counts[number + 1] / labeled for number, name in enumerate(CLASSES.names)}
    assert report.splits[0].ignored == counts[0] / sum(counts.values())
    assert report.splits[0].sizes == {"1024×1024": 3}
    assert not report.problems


def test_masks_that_are_turned_against_their_images_are_a_problem(tmp_path: Path) -> None:
    """Images that lost the tag that turned them."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(8):
        image, label = synthesize("urban", "train", index, 96)
        Image.fromarray(image[::-1, ::-1] if index < 5 else image).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(label).save(tmp_path / "masks" / f"{index}.png")
    classes = ["background", "building", "road", "water", "barren", "forest", "agriculture"]
    domain = Folder(root=tmp_path, masks="masks", classes=Classes.model_validate(classes), label_format="index")
    (problem,) = check(domain, ["train"]).problems
    assert "5 masks fit their images better rotated by 180°" in problem.message
