from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overfly.core.atomic_files import TRAILER_BYTES
from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Array, Item, UInt8
from overfly.data import reading
from overfly.data.domain import without_labels
from overfly.data.folder import Folder
from overfly.data.loading import estimate_cache_bytes, open_image, resize_image, resize_label

CLASSES = Classes(names=("a", "b", "c"))


@pytest.fixture
def domain(tmp_path: Path) -> Folder:
    random = np.random.default_rng(0)
    for kind, shape in (("images", (20, 30, 3)), ("masks", (20, 30))):
        (tmp_path / kind).mkdir()
        for number in range(4):
            values = random.integers(0, 256 if kind == "images" else 3, shape).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / kind / f"{number}.png")
    return Folder(root=tmp_path, classes=CLASSES, masks="masks")


def size(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/*.npy"))


def fail(*_: object, **__: object) -> Array:
    raise AssertionError("decoded although it is cached")


@pytest.mark.parametrize("side", [None, 16])
def test_cached_arrays_equal_decoded_arrays(
    domain: Folder, tmp_path: Path, side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    items = domain.items("train")
    plain = [open_image(domain, item, side) for item in items]
    for item in items:
        open_image(domain, item, side, cache)
    monkeypatch.setattr(reading, "read_image", fail)
    monkeypatch.setattr(reading, "read_label_pixels", fail)
    for item, (image, label) in zip(items, plain, strict=True):
        cached, cached_label = open_image(domain, item, side, cache)
        np.testing.assert_array_equal(cached, image)
        assert label is not None
        np.testing.assert_array_equal(cached_label, label)
        assert image.shape == ((20, 30, 3) if side is None else (16, 16, 3))


def test_estimate_is_the_size_of_the_cache(domain: Folder, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    items = domain.items("train")
    assert size(cache) == 0
    for item in items:
        open_image(domain, item, 16, cache)
    assert size(cache) == estimate_cache_bytes(domain, items, 16) == 4 * (16 * 16 * 4 + 2 * (128 + TRAILER_BYTES))


def test_changed_arrays_do_not_change_the_cache(domain: Folder, tmp_path: Path) -> None:
    item = domain.items("train")[0]
    image, _ = open_image(domain, item, None, tmp_path / "cache")
    before = image.copy()
    image += 1
    np.testing.assert_array_equal(open_image(domain, item, None, tmp_path / "cache")[0], before)


def test_items_without_label_open_no_mask(domain: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for item in domain.items("train"):
        open_image(domain, item, None, tmp_path / "cache")
    monkeypatch.setattr(reading, "read_label_pixels", fail)
    for item in without_labels(domain.items("train")):
        assert open_image(domain, item, None, tmp_path / "cache")[1] is None
        assert open_image(domain, item)[1] is None


def test_changed_files_and_settings_are_decoded_again(domain: Folder, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    item = domain.items("train")[0]
    first = open_image(domain, item, None, cache)
    assert isinstance(item.image, Path)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(item.image)
    os.utime(item.image, ns=(1, 1))
    assert not open_image(domain, item, None, cache)[0].any()
    swapped = domain.model_copy(update={"ids": {"a": (2,), "b": (1,), "c": (0,)}})
    label = open_image(swapped, item, None, cache)[1]
    assert first[1] is not None
    np.testing.assert_array_equal(label, 2 - first[1])


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_damaged_entries_are_replaced(domain: Folder, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    item = domain.items("train")[0]
    whole = [np.array(part) for part in open_image(domain, item, None, cache)]
    for path in cache.rglob("*.npy"):
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-7], "empty": b"", "garbage": b"x" * len(data)}[damage])
    for part, expected in zip(open_image(domain, item, None, cache), whole, strict=True):
        np.testing.assert_array_equal(part, expected)


def fill(domain: Folder, cache: Path) -> int:
    return sum(int(open_image(domain, item, 16, cache)[0].sum()) for item in domain.items("train"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children only read and write files
def test_processes_share_a_cache(domain: Folder, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with get_context("fork").Pool(2) as pool:
        sums = pool.starmap(fill, [(domain, cache)] * 4)
    assert len(set(sums)) == 1
    assert len(list(cache.rglob("*.npy"))) == 8
    assert not list(cache.rglob("*.part"))


def test_unwritable_cache_is_an_error(domain: Folder, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cache"):
        open_image(domain, domain.items("train")[0], None, tmp_path / "cache")


def test_generated_images_are_not_cached(domain: Folder, tmp_path: Path) -> None:
    generated = Item("synthetic", lambda: np.ones((4, 4, 3), np.uint8))
    assert open_image(domain, generated, 2, tmp_path / "cache")[0].shape == (2, 2, 3)
    assert size(tmp_path / "cache") == 0
    assert estimate_cache_bytes(domain, [generated]) == 0


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from(["uint8", "uint16", "float32"]),
)
def test_resizing_keeps_type_bands_and_range(height: int, width: int, bands: int, side: int, dtype: str) -> None:
    image = (np.random.default_rng(side).random((height, width, bands)) * 200 + 50).astype(dtype)
    resized = resize_image(image, side)
    assert resized.shape == (side, side, bands)
    assert resized.dtype == dtype
    assert image.min() - 1e-3 <= resized.min() <= resized.max() <= image.max() + 1e-3
    label: UInt8 = (image[..., 0] % 5).astype(np.uint8)
    assert set(np.unique(resize_label(label, side))) <= set(np.unique(label))


def test_shrinking_averages_in_all_types() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2] = 200
    assert abs(int(resize_image(image, 16)[8, 8, 0]) - 100) < 15
    for dtype in ("uint16", "float32"):
        assert np.abs(resize_image(image.astype(dtype), 16) - resize_image(image, 16).astype(np.float32)).max() <= 1
