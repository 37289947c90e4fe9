from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overfly.core.errors import DataError
from overfly.data.domain import Domain, SplitError
from overfly.data.loveda import CLASSES, LoveDA


def scene(root: Path, split: str, name: str, numbers: range, masks: bool = True) -> None:
    folder = root / split / name
    (folder / "images_png").mkdir(parents=True)
    (folder / "masks_png").mkdir()
    for number in numbers:
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / "images_png" / f"{number}.png")
        if masks:
            label = np.arange(64, dtype=np.uint8).reshape(8, 8) % 8
            Image.fromarray(label).save(folder / "masks_png" / f"{number}.png")


def test_layout_order_and_names(tmp_path: Path) -> None:
    scene(tmp_path, "Train", "Urban", range(2, 4))
    scene(tmp_path, "Train", "Rural", range(9, 12))
    both = LoveDA(root=tmp_path).items("train")
    assert [item.name for item in both] == ["Urban_2", "Urban_3", "Rural_9", "Rural_10", "Rural_11"]
    assert [item.name for item in LoveDA(root=tmp_path, scene="rural").items("train")] == [
        "Rural_9",
        "Rural_10",
        "Rural_11",
    ]
    assert both[0].label == tmp_path / "Train" / "Urban" / "masks_png" / "2.png"


def test_masks_become_ids(tmp_path: Path) -> None:
    scene(tmp_path, "Val", "Urban", range(1))
    domain = LoveDA(root=tmp_path, scene="urban")
    (item,) = domain.items("val")
    label = domain.read_label(item)
    assert label[0].tolist() == [255, 0, 1, 2, 3, 4, 5, 6]
    assert domain.read_image(item).shape == (8, 8, 3)


def test_test_has_no_masks(tmp_path: Path) -> None:
    scene(tmp_path, "Test", "Urban", range(2), masks=False)
    domain = LoveDA(root=tmp_path, scene="urban")
    assert [item.label for item in domain.items("test")] == [None, None]
    with pytest.raises(DataError, match="has no mask"):
        domain.read_label(domain.items("test")[0])


def test_missing_files_are_errors(tmp_path: Path) -> None:
    scene(tmp_path, "Train", "Rural", range(2))
    with pytest.raises(SplitError, match=r"Val.* matches no files; .*overfly data fetch loveda --root"):
        LoveDA(root=tmp_path, scene="rural").items("val")
    with pytest.raises(SplitError, match="Urban"):
        LoveDA(root=tmp_path, scene="both").items("train")
    (tmp_path / "Train/Rural/masks_png/1.png").unlink()
    with pytest.raises(DataError, match=r"images_png/1\.png has no mask"):
        LoveDA(root=tmp_path, scene="rural").items("train")


def test_unknown_numbers_are_an_error(tmp_path: Path) -> None:
    scene(tmp_path, "Train", "Rural", range(1))
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "Train/Rural/masks_png/0.png")
    domain = LoveDA(root=tmp_path, scene="rural")
    with pytest.raises(DataError, match=r"0\.png .*9 \(64 pixels\)"):
        domain.read_label(domain.items("train")[0])


def test_loveda_as_a_setting(tmp_path: Path) -> None:
    domain = Domain.model_validate({"name": "loveda", "root": str(tmp_path), "scene": "urban"})
    assert domain == LoveDA(root=tmp_path, scene="urban")
    assert Domain.model_validate(domain.model_dump(mode="json")) == domain
    assert domain.classes == CLASSES
    assert (domain.bands, domain.max_value, domain.gsd, domain.statistics) == (3, 255.0, 0.3, None)
