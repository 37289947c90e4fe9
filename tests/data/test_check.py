from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.data.check import check, class_counts
from overfly.data.domain import SplitError
from overfly.data.folder import Folder
from overfly.data.loveda import CLASSES, LoveDA

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


def test_a_sound_domain(tmp_path: Path) -> None:
    domain = write(tmp_path)
    seen: list[str] = []
    report = check(domain, progress=lambda item: seen.append(item.name))
    (split,) = report.splits
    assert not report.bad
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
    assert len(seen) == 8
    assert "a: 75.00%" in str(report)
    assert class_counts(domain, domain.items("train")[0]).tolist() == [42, 14, 0]


def test_a_band_of_opacity_that_is_not_read_is_said(tmp_path: Path) -> None:
    domain = write(tmp_path)
    picture = np.random.default_rng(0).integers(0, 200, (8, 8, 4)).astype(np.uint8)
    Image.fromarray(picture, "RGBA").save(tmp_path / "images" / "3.png")
    report = check(domain)
    assert not report.bad
    assert report.splits[0].unread == 1
    assert "1 images mark their last band as opacity, and it is not read" in str(report)
    for number in range(8):
        Image.fromarray(picture, "RGBA").save(tmp_path / "images" / f"{number}.png")
    whole = check(domain.model_copy(update={"bands": 4}))
    assert whole.splits[0].unread == 0
    assert whole.splits[0].bands == {4: 8}


def test_every_bad_file_is_listed(tmp_path: Path) -> None:
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
    assert [problem.image for problem in report.bad] == ["1", "2", "3", "4", "5", "6", "7"]
    said = ["truncated", "web page", "1 band", "8×9", "3 (64 pixels)", "empty", "one color"]
    for problem, word in zip(report.bad, said, strict=True):
        assert word in problem.sentence
        assert f"{problem.image}.png" in problem.sentence
        assert problem.sentence in str(report)
    assert report.splits[0].empty == 1


def test_values_above_the_peak_and_missing_masks(tmp_path: Path) -> None:
    domain = write(tmp_path, 3)
    report = check(domain.model_copy(update={"max_value": 1.0}), ["train"])
    assert len(report.bad) == 3
    assert "max_value" in report.bad[0].sentence
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(DataError, match=r"images/2\.png has no mask .*1 of 3 images"):
        check(domain, ["train"])


def test_a_fault_of_the_whole_folder_is_one_sentence(tmp_path: Path) -> None:
    domain = write(tmp_path, 4).model_copy(update={"splits": {"train": "train.txt", "val": "val.txt"}})
    with pytest.raises(DataError, match="no such file"):
        check(domain)
    (tmp_path / "train.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match="not UTF-8 text"):
        check(domain)
    with pytest.raises(DataError, match="not a folder"):
        check(domain.model_copy(update={"root": tmp_path / "nowhere"}))


def test_a_fault_of_one_split_is_a_finding(tmp_path: Path) -> None:
    report = check(write(tmp_path, 4).model_copy(update={"splits": {"train": "*", "val": "nothing*"}}))
    assert [split.images for split in report.splits] == [4, 0]
    assert [problem.sentence.startswith("the split val") for problem in report.bad] == [True]


def test_pipes_and_empty_pictures_are_one_finding_each(tmp_path: Path) -> None:
    domain = write(tmp_path, 4)
    (tmp_path / "images" / "1.png").unlink()
    os.mkfifo(tmp_path / "images" / "1.png")
    small = (tmp_path / "images" / "2.png").read_bytes()
    (tmp_path / "images" / "2.png").write_bytes(small[:16] + bytes(8) + small[24:])
    report = check(domain, ["train"])
    assert [problem.image for problem in report.bad] == ["1", "2"]
    for problem, said in zip(report.bad, ("pipe", "0×0"), strict=True):
        assert said in problem.sentence


def test_images_alone(tmp_path: Path) -> None:
    report = check(write(tmp_path).model_copy(update={"masks": None}))
    assert (report.splits[0].labeled, report.splits[0].shares, report.bad) == (0, {}, ())


def test_a_domain_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="LoveDA is not in"):
        check(LoveDA(root=tmp_path, scene="urban"))
    with pytest.raises(DataError, match="no split"):
        check(LoveDA(root=tmp_path), [])


@pytest.mark.skipif(not LOVEDA.is_dir(), reason="the LoveDA sample does not lie beside this repository")
def test_shares_of_real_tiles_agree_with_another_count() -> None:
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
    assert not report.bad
