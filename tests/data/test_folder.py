from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from overfly.core.errors import DataError
from overfly.core.records import Array
from overfly.data.domain import Domain, SplitError, without_labels
from overfly.data.folder import Folder

DUBAI = Path(__file__).parents[2] / ".." / "shared" / "data" / "dubai"
COLORS = {
    "building": (60, 16, 152),
    "land": (132, 41, 246),
    "road": (110, 193, 228),
    "vegetation": (254, 221, 58),
    "water": (226, 169, 41),
}


def folder(**settings: Any) -> Folder:
    found = Domain.model_validate({"name": "folder", "masks": "masks", **settings})
    assert isinstance(found, Folder)
    assert Domain.model_validate(found.model_dump(mode="json")) == found
    return found


def pair(root: Path, mask: Array | Image.Image | None, name: str = "a") -> Path:
    (root / "images").mkdir(exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(root / "images" / f"{name}.png")
    if mask is not None:
        mask = Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask
        mask.save(root / "masks" / f"{name}.png")
    return root


def label(domain: Domain) -> list[list[int]]:
    read = domain.read_label(domain.items("train")[0])
    assert read.dtype == np.uint8
    found: list[list[int]] = read.tolist()
    return found


def rgb(*colors: tuple[int, int, int]) -> Array:
    return np.array(colors, np.uint8).reshape(2, 2, 3)


def palette(*colors: tuple[int, int, int]) -> Image.Image:
    image = Image.frombytes("P", (2, 2), bytes(range(4)))
    image.putpalette([value for color in colors for value in color])
    return image


def test_numbers_are_the_order_of_the_classes(tmp_path: Path) -> None:
    pair(tmp_path, np.array([[0, 1], [2, 255]], np.uint8))
    assert label(folder(root=tmp_path, classes=["a", "b", "c"])) == [[0, 1], [2, 255]]


def test_numbers_of_ones_own_several_a_class_and_several_ignored(tmp_path: Path) -> None:
    pair(tmp_path, np.array([[7, 1], [300, 9]], np.uint16))
    domain = folder(root=tmp_path, classes=["a", "b"], ids={"a": 7, "b": [1, 300]}, ignore=[9, 10])
    assert label(domain) == [[0, 1], [1, 255]]


def test_colors_and_ignored_colors(tmp_path: Path) -> None:
    pair(tmp_path, rgb((1, 1, 1), (2, 2, 2), (9, 9, 9), (8, 8, 8)))
    domain = folder(root=tmp_path, classes={"a": [1, 1, 1], "b": [2, 2, 2]}, ignore=[[9, 9, 9], [8, 8, 8]])
    assert label(domain) == [[0, 1], [255, 255]]


def test_palette_needs_a_label_format(tmp_path: Path) -> None:
    pair(tmp_path, palette((9, 9, 9), (2, 2, 2), (1, 1, 1), (1, 1, 1)))
    classes = {"a": [1, 1, 1], "b": [2, 2, 2], "c": [9, 9, 9], "d": [3, 3, 3]}
    assert label(folder(root=tmp_path, classes=classes, label_format="index")) == [[0, 1], [2, 3]]
    assert label(folder(root=tmp_path, classes=classes, label_format="rgb")) == [[2, 1], [0, 0]]
    assert label(folder(root=tmp_path, classes=classes, ids={"a": [0, 1], "d": [2, 3]})) == [[0, 0], [3, 3]]
    with pytest.raises(DataError, match=r"a\.png .*label_format .*index .*rgb"):
        label(folder(root=tmp_path, classes={**classes, "c": [7, 7, 7]}))


def test_a_palette_of_the_classes_colors_gives_colors(tmp_path: Path) -> None:
    pair(tmp_path, palette((9, 9, 9), (2, 2, 2), (1, 1, 1), (1, 1, 1)))
    classes = {"a": [1, 1, 1], "b": [2, 2, 2], "c": [9, 9, 9], "d": [3, 3, 3]}
    assert label(folder(root=tmp_path, classes=classes)) == [[2, 1], [0, 0]]


@pytest.mark.parametrize("kind", ["gray", "one bit", "palette", "black and white palette", "color"])
def test_masks_of_one_band_have_the_colors_of_gray_classes(tmp_path: Path, kind: str) -> None:
    white = np.array([[0, 255], [255, 0]], np.uint8)
    images = {
        "gray": Image.fromarray(white), "one bit": Image.fromarray(white).convert("1"),
        "palette": palette((0, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 0)),
        "black and white palette": Image.fromarray(white).convert("1").convert("P"),
        "color": Image.fromarray(np.repeat(white[..., None], 3, -1)),
    }  # fmt: skip
    pair(tmp_path, images[kind])
    classes = {"building": [255, 255, 255], "background": [0, 0, 0]}
    assert label(folder(root=tmp_path, classes=classes)) == [[1, 0], [0, 1]]


def test_numbers_that_are_no_gray_of_a_class_are_named(tmp_path: Path) -> None:
    pair(tmp_path, np.array([[0, 1], [1, 0]], np.uint8))
    classes = {"building": [255, 255, 255], "background": [0, 0, 0]}
    with pytest.raises(DataError, match=r"colors of no class: 1,1,1 .*\(or set label_format to index\)"):
        label(folder(root=tmp_path, classes=classes))
    assert label(folder(root=tmp_path, classes=classes, label_format="index")) == [[0, 1], [1, 0]]


def test_mapping_unites_two_label_sets(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pair(tmp_path / "one", np.array([[0, 1], [2, 3]], np.uint8))
    pair(tmp_path / "two", rgb((1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 1, 1)))
    final = ["built", "green"]
    one = folder(
        root=tmp_path / "one",
        classes=final,
        ids={"house": 0, "street": 1, "forest": 2, "cloud": 3},
        mapping={"house": "built", "street": "built", "forest": "green", "cloud": None},
    )
    two = folder(
        root=tmp_path / "two",
        classes=final,
        colors={"green": [[1, 1, 1], [2, 2, 2]], "roof": [3, 3, 3]},
        mapping={"roof": "built"},
    )
    assert label(one) == [[0, 0], [1, 255]]
    assert label(two) == [[1, 1], [0, 1]]
    assert one.classes == two.classes


def test_unknown_is_an_error_or_ignored(tmp_path: Path) -> None:
    pair(tmp_path, rgb((1, 1, 1), (2, 2, 2), (9, 9, 9), (9, 9, 9)))
    classes: dict[str, list[int]] = {"a": [1, 1, 1], "b": [2, 2, 2]}
    with pytest.raises(DataError, match=r"a\.png .*9,9,9 \(2 pixels\)"):
        label(folder(root=tmp_path, classes=classes))
    assert label(folder(root=tmp_path, classes=classes, unknown="ignore")) == [[0, 1], [255, 255]]
    pair(tmp_path, np.array([[0, 1], [2, 254]], np.uint8))
    with pytest.raises(DataError, match=r"2 \(1 pixels\), 254 \(1 pixels\)"):
        label(folder(root=tmp_path, classes=["a", "b"]))


def test_mask_of_another_encoding_or_size_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path, np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match=r"a\.png .*label_format .*rgb"):
        label(folder(root=tmp_path, classes=["a"], label_format="rgb"))
    with pytest.raises(DataError, match="number 0"):
        label(folder(root=tmp_path, classes=["a"], ignore=[0]))
    pair(tmp_path, np.zeros((3, 2), np.uint8))
    with pytest.raises(DataError, match="2×3 pixels"):
        label(folder(root=tmp_path, classes=["a"]))


def test_folder_without_masks(tmp_path: Path) -> None:
    pair(tmp_path, None)
    domain = folder(root=tmp_path, classes=["a", "b"], masks=None)
    (item,) = domain.items("train")
    assert item.label is None
    assert domain.read_image(item).shape == (2, 2, 3)
    with pytest.raises(DataError, match="has no mask"):
        domain.read_label(item)
    with pytest.raises(SplitError, match="val"):
        domain.items("val")


def test_pixels_without_data_are_ignored(tmp_path: Path) -> None:
    pair(tmp_path, np.array([[0, 1], [1, 0]], np.uint8))
    image = np.full((2, 2, 4), 255, np.uint8)
    image[0, 1, 3] = 0
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    assert label(folder(root=tmp_path, classes=["a", "b"])) == [[0, 255], [1, 0]]


def test_split_directories(tmp_path: Path) -> None:
    for name in ("training", "validation", "test"):
        (tmp_path / name).mkdir()
        pair(tmp_path / name, None if name == "test" else np.zeros((2, 2), np.uint8), name=f"{name[:2]}_1")
    domain = folder(
        root=tmp_path,
        classes=["a"],
        images="{split}/images/*.png",
        masks="{split}/masks/*.png",
        splits={"train": "training", "val": "validation", "test": "test"},
    )
    found = [
        [(item.name, item.label is not None) for item in domain.items(split)] for split in ("train", "val", "test")
    ]
    assert found == [[("tr_1", True)], [("va_1", True)], [("te_1", False)]]
    plain = folder(root=tmp_path, classes=["a"], images="{split}/images", masks=None)
    assert len(plain.items("test")) == 1
    with pytest.raises(SplitError, match="train/images"):
        plain.items("train")


def test_settings_of_images_reach_the_domain(tmp_path: Path) -> None:
    domain = folder(root=tmp_path, classes=["a"], bands=2, max_value=1.0, mean=[0.5, 0.4], std=[0.1, 0.2], gsd=0.3)
    assert (domain.bands, domain.max_value, domain.gsd) == (2, 1.0, 0.3)
    assert domain.statistics == ((0.5, 0.4), (0.1, 0.2))
    assert folder(root=tmp_path, classes=["a"]).statistics is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mapping": {"x": "a"}}, "mapping .*'x'"),
        ({"ids": {"x": 1}}, r"'x' .*a, b"),
        ({"colors": {"a": [1, 1, 1], "b": [1, 1, 1]}}, "color .1, 1, 1."),
        ({"ids": {"a": 1, "b": [2, 1]}}, "number 1 "),
        ({"ids": {"a": 1, "b": 2}, "ignore": [2]}, "number 2 "),
        ({"mean": [1.0, 1.0, 1.0]}, "mean .*std"),
        ({"mean": [1.0], "std": [1.0]}, "3 bands"),
        ({"splits": {"train": 0.8, "val": 0.3}}, "more than 1"),
        ({"splits": {"train": 0.8, "val": "*"}}, "mix shares"),
        ({"images": "{split}/a", "masks": "b"}, "images .*masks"),
        ({"images": "*/a/*.png", "masks": "b/*.png"}, "images .*2 .*masks 1"),
        ({"classes": ["a", "a"]}, "names"),
        ({"label_fromat": "rgb"}, "label_fromat"),
    ],
)
def test_invalid_settings_are_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        folder(**{"root": tmp_path, "classes": ["a", "b"], **settings})


def test_missing_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        folder(root=tmp_path / "nowhere", classes=["a"]).items("train")
    with pytest.raises(DataError, match="images"):
        folder(root=tmp_path, classes=["a"]).items("train")


@pytest.mark.skipif(not DUBAI.is_dir(), reason="the Dubai tiles do not lie beside this repository")
@pytest.mark.parametrize(("tiles", "count"), [("48", 18), ("1356", 36)])
def test_dubai(tiles: str, count: int) -> None:
    settings = {
        "root": DUBAI,
        "images": f"Tile [{tiles}]/images/*.jpg",
        "masks": f"Tile [{tiles}]/masks/*.png",
        "splits": {"train": "*_00[1-6]", "val": "*_00[7-9]"},
        "label_format": "rgb",
        "classes": COLORS,
    }
    domain = folder(**settings, ignore=[(155, 155, 155), (0, 0, 0)])
    train, val = domain.items("train"), domain.items("val")
    assert (len(train), len(val)) == (count * 2 // 3, count // 3)
    assert len({item.name for item in (*train, *val)}) == count
    for tile in tiles:
        assert [sum(item.name.startswith(f"{tile}_") for item in items) for items in (train, val)] == [6, 3]
    assert isinstance(train[0].label, Path)
    raw = np.asarray(Image.open(train[0].label).convert("RGB")).reshape(-1, 3)
    read = domain.read_label(train[0]).ravel()
    for number, color in enumerate(COLORS.values()):
        assert ((raw == color).all(axis=1) == (read == number)).all()
    assert all(item.label is None for item in without_labels(train))


def test_folder_one_level_too_high_names_the_subfolders(tmp_path: Path) -> None:
    for name in ("tile 1", "tile 2"):
        (tmp_path / "city" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "city" / name / "a.png")
    with pytest.raises(DataError, match=r"city .*tile 1, tile 2 .*city/tile 1"):
        Folder(root=tmp_path, images="city", classes=["a"]).items("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="root or images"):
        Folder(root=tmp_path / "empty", classes=["a"]).items("train")
