"""Synthetic dataset: golden values, class shares, domain shift, files in LoveDA's layout."""

from __future__ import annotations

import hashlib
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overfly.core.choices import Scene
from overfly.core.errors import DataError
from overfly.core.records import UInt8
from overfly.data import synthetic
from overfly.data.domain import SPLITS, Domain, Split
from overfly.data.loveda import CLASSES, LoveDA
from overfly.data.synthetic import SCENES, Synthetic, synthesize, write_synthetic

GOLDEN: dict[tuple[Scene, Split, int, int], tuple[str, tuple[float, ...]]] = {
    ("urban", "train", 0, 256): (
        "8a58f23ac2e78e6c",
        (113.8, 124.1, 116.7, 122.7, 129.9, 137.2, 132.9, 129.4, 120.4, 125.1, 128.2, 119.1),
    ),
    ("urban", "val", 7, 128): (
        "9adce4b2ad27474e",
        (118.0, 128.0, 115.6, 155.0, 133.1, 107.1, 129.6, 138.6, 129.1, 121.6, 123.0, 124.7),
    ),
    ("rural", "train", 0, 256): (
        "56dcaea19dfa3bbb",
        (105.8, 112.6, 80.0, 134.0, 125.1, 90.2, 105.5, 114.1, 84.2, 124.8, 127.4, 105.7),
    ),
    ("rural", "test", 59, 128): (
        "e8ce9b62ea5000ea",
        (111.7, 119.4, 103.7, 116.6, 121.5, 97.0, 118.3, 119.5, 96.1, 124.0, 126.6, 97.0),
    ),
}
"""Digest of the label, and the mean of red, green and blue of each quarter of the image."""
SCENE_COUNT = 16


@cache
def first_scenes(scene: Scene) -> tuple[UInt8, UInt8]:
    """The first scenes of train: images (N, S, S, 3), labels (N, S, S)."""
    images, labels = zip(*(synthesize(scene, "train", index) for index in range(SCENE_COUNT)), strict=True)
    return np.stack(images), np.stack(labels)


def shares(scene: Scene) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    label = first_scenes(scene)[1]
    return np.bincount(label.ravel(), minlength=7) / label.size


def quarters(image: UInt8) -> list[float]:
    half = image.shape[0] // 2
    parts = image[: 2 * half, : 2 * half].reshape(2, half, 2, half, 3).mean((1, 3), dtype=np.float64)
    return [round(float(value), 2) for value in parts.ravel()]


def digest(label: UInt8) -> str:
    return hashlib.sha256(label.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("key", GOLDEN, ids=lambda key: "-".join(map(str, key)))
def test_golden_scenes(key: tuple[Scene, Split, int, int]) -> None:
    image, label = synthesize(*key)
    golden_label, golden_means = GOLDEN[key]
    assert digest(label) == golden_label
    assert quarters(image) == pytest.approx(golden_means, abs=0.3)


def test_scene_is_independent_of_earlier_scenes() -> None:
    before = synthesize("urban", "train", 3, 64)
    np.random.default_rng(0).random(5)
    synthesize("rural", "test", 8, 64)
    after = synthesize("urban", "train", 3, 64)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_each_argument_changes_the_image() -> None:
    base = synthesize("urban", "train", 0, 64)[0]
    others = [
        synthesize("rural", "train", 0, 64),
        synthesize("urban", "val", 0, 64),
        synthesize("urban", "train", 1, 64),
    ]
    assert all(np.abs(base.astype(int) - other[0]).mean() > 5 for other in others)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SCENES), st.sampled_from(SPLITS), st.integers(0, 10**6), st.integers(16, 100))
def test_every_pixel_of_any_scene_has_a_class(scene: Scene, split: Split, index: int, size: int) -> None:
    image, label = synthesize(scene, split, index, size)
    assert image.shape == (size, size, 3)
    assert label.shape == (size, size)
    assert image.dtype == label.dtype == np.uint8
    assert label.max() < 7
    assert image.std() > 1


@pytest.mark.parametrize("scene", SCENES)
def test_every_class_is_frequent_enough(scene: Scene) -> None:
    assert shares(scene).min() >= 0.02
    label = first_scenes(scene)[1]
    scenes_with = [sum(bool((one == index).mean() > 0.005) for one in label) for index in range(7)]
    assert min(scenes_with) >= SCENE_COUNT / 3


def test_class_shares_differ_between_domains() -> None:
    ratio = dict(zip(CLASSES.names, shares("urban") / shares("rural"), strict=True))
    assert ratio["building"] > 2
    assert ratio["road"] > 3
    assert ratio["agriculture"] < 0.3
    assert ratio["forest"] < 0.7


def test_rural_buildings_are_smaller_and_contrast_is_lower() -> None:
    def edge_share(scene: Scene) -> float:
        """Share of the building pixels whose right neighbor is none: the inverse of the width."""
        building = first_scenes(scene)[1] == CLASSES.index("building")
        return float((building[:, :, :-1] & ~building[:, :, 1:]).sum() / building.sum())

    def contrast(scene: Scene) -> float:
        return float(first_scenes(scene)[0].astype(np.float64).std((1, 2)).mean())

    assert edge_share("rural") > 1.3 * edge_share("urban")
    assert contrast("rural") < 0.85 * contrast("urban")


@pytest.mark.parametrize("scene", SCENES)
def test_mean_color_does_not_separate_classes(scene: Scene) -> None:
    image, label = first_scenes(scene)
    means = np.stack([image[label == index].mean(0) for index in range(7)])
    nearest = np.argmin(((image[..., None, :] - means.astype(np.float32)) ** 2).sum(-1), -1)
    matrix = np.bincount((label.astype(int) * 7 + nearest).ravel(), minlength=49).reshape(7, 7)
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert iou.max() < 0.7
    assert iou.mean() < 0.4


@pytest.mark.parametrize("scene", SCENES)
def test_statistics_are_those_of_the_images(scene: Scene) -> None:
    image = first_scenes(scene)[0].astype(np.float64)
    mean, std = Synthetic(scene=scene).statistics
    assert mean == pytest.approx(image.mean((0, 1, 2)), abs=6)
    assert std == pytest.approx(image.std((0, 1, 2)), rel=0.12)


def test_domain_returns_synthesized_scenes() -> None:
    domain = Domain.model_validate({"name": "synthetic", "scene": "rural", "size": 64, "train": 3, "val": 2, "test": 1})
    assert [len(domain.items(split)) for split in SPLITS] == [3, 2, 1]
    item = pickle.loads(pickle.dumps(domain.items("train")[2]))
    image, label = synthesize("rural", "train", 2, 64)
    read = domain.read_image(item)
    np.testing.assert_array_equal(read, image)
    np.testing.assert_array_equal(domain.read_label(item), label)
    read[:] = 0
    np.testing.assert_array_equal(domain.read_image(item), image)
    assert domain.classes == CLASSES
    assert len({item.name for item in domain.items("train")}) == 3


def test_written_images_are_read_as_loveda(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "world"
    assert write_synthetic(root, size=48, train=2, val=1, test=1) == 8
    for scene in SCENES:
        domain = LoveDA(root=root, scene=scene)
        numbered: list[tuple[Split, int]] = [("train", 2), ("val", 1)]
        for split, number in numbered:
            items = domain.items(split)
            assert len(items) == number
            for index, item in enumerate(items):
                image, label = synthesize(scene, split, index, 48)
                np.testing.assert_array_equal(domain.read_image(item), image)
                np.testing.assert_array_equal(domain.read_label(item), label)
    assert len(list(root.glob("Test/*/images_png/*.png"))) == 2
    assert not list(root.glob("Test/*/masks_png"))
    numbers = [path.stem for path in root.glob("*/*/images_png/*.png")]
    assert sorted(numbers, key=int) == [str(number) for number in range(8)]
    mask = np.asarray(Image.open(next(root.glob("Train/Rural/masks_png/*.png"))))
    assert mask.min() >= 1
    assert mask.max() <= 7


def test_worker_processes_write_the_same_images(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "world", size=64, train=2, val=0, test=0, scenes=["rural"], workers=2)
    for index in range(2):
        image, label = synthesize("rural", "train", index, 64)
        folder = tmp_path / "world" / "Train" / "Rural"
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "images_png" / f"{index}.png")), image)
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "masks_png" / f"{index}.png")), label + 1)


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        write_synthetic(tmp_path, size=16, train=1, val=0, test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    root = tmp_path / "world"
    root.mkdir()
    write_synthetic(root, size=16, train=1, val=0, test=0)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_synthetic(root, size=16, train=1, val=0, test=0) == 2
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(DataError, match="other settings"):
        write_synthetic(root, size=16, train=2, val=0, test=0)
    with pytest.raises(DataError, match="other files"):
        write_synthetic(tmp_path / "mine.txt", size=16, train=1, val=0, test=0)


def test_failed_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "_write", broken)
    with pytest.raises(DataError, match="No space left on device"):
        write_synthetic(tmp_path / "world", size=16, train=3, val=0, test=0)
    assert list(tmp_path.iterdir()) == []


def test_arguments_out_of_range_are_errors() -> None:
    with pytest.raises(DataError, match="moon"):
        synthesize("moon", "train", 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"size .* 8"):
        synthesize("urban", "train", 0, 8)
    with pytest.raises(DataError, match=r"index .* -1"):
        synthesize("urban", "train", -1)
    with pytest.raises(DataError, match=r"workers .* 0"):
        write_synthetic("nowhere", workers=0)
