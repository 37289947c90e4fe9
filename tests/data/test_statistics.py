from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.errors import DataError, RecipeError
from overfly.core.records import Array, Item
from overfly.data.check import statistics
from overfly.data.domain import Domain, Split, sample_evenly
from overfly.data.folder import Folder


class Given(Domain, name="given_by_test_statistics"):
    """Images of random values with an offset that would spoil a naive sum of squares."""

    dtype: str
    seed: int
    bands: int = 2

    @property
    def classes(self) -> Classes:
        return Classes(names=("a",))

    def items(self, split: Split) -> list[Item]:
        del split
        return [Item(str(number), self.draw(number)) for number in range(7)]

    def draw(self, number: int) -> _Fixed:
        random = np.random.default_rng([self.seed, number])
        shape = (int(random.integers(1, 9)), 5, self.bands)
        values = random.integers(0, 100, shape) if self.dtype == "uint8" else random.normal(60000, 3, shape)
        return _Fixed(values.astype(self.dtype))


class _Fixed:
    def __init__(self, values: Array) -> None:
        self.values = values

    def __call__(self) -> Array:
        return self.values


Domain.kinds.pop("given_by_test_statistics")


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["uint8", "uint16", "float32"]), st.integers(0, 1000))
def test_statistics_equal_numpy(dtype: str, seed: int) -> None:
    domain = Given(dtype=dtype, seed=seed)
    pixels = np.concatenate([domain.read_image(item).reshape(-1, 2) for item in domain.items("train")]).astype(
        np.float64
    )
    found = statistics(domain, "train")
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(0), rtol=1e-9)
    assert (found.minimum, found.maximum) == (tuple(pixels.min(0)), tuple(pixels.max(0)))
    assert (found.pixels, found.images) == (len(pixels), 7)


def write(root: Path, count: int = 3) -> Folder:
    (root / "images").mkdir()
    for number in range(count):
        image = np.full((4, 4, 4), 255, np.uint8)
        image[..., :3] = np.random.default_rng(number).integers(0, 256, (4, 4, 3))
        image[:2, :, 3] = 0
        Image.fromarray(image).save(root / "images" / f"{number}.png")
    return Folder(root=root, classes=Classes(names=("a",)))


def test_statistics_leave_out_pixels_without_data(tmp_path: Path) -> None:
    domain = write(tmp_path)
    pixels = np.concatenate([domain.read_image(item)[2:].reshape(-1, 3) for item in domain.items("train")])
    found = statistics(domain, "train")
    assert found.pixels == 3 * 8
    np.testing.assert_allclose(found.mean, pixels.mean(0))


def test_statistics_without_pixels_are_an_error(tmp_path: Path) -> None:
    domain = write(tmp_path, 1)
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "images" / "0.png")
    with pytest.raises(DataError, match="train"):
        statistics(domain, "train")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_an_error(limit: int) -> None:
    with pytest.raises(RecipeError, match="--limit"):
        statistics(Given(dtype="uint8", seed=0), "train", limit)


def test_limit_samples_evenly() -> None:
    items = [Item(str(number), Path(), None) for number in range(10)]
    assert [item.name for item in sample_evenly(items, 2)] == ["2", "7"]
    assert len(sample_evenly(items, 7)) == len({item.name for item in sample_evenly(items, 7)}) == 7
    assert sample_evenly(items, 20) == items
