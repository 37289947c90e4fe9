from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overfly.core.errors import DataError, RecipeError
from overfly.core.records import IGNORE, Batch, UInt8
from overfly.data.check import check_max_value
from overfly.data.domain import Domain, without_labels
from overfly.data.folder import Folder
from overfly.data.loading import BatchDataset, BatchStream, batch_loader
from overfly.data.sampling import Rare, SampleSlot, Uniform, crop
from overfly.recipe import load
from overfly.training.setup import training_streams


def anywhere(label: UInt8) -> bool:
    return label.size > 0


def stream(**changes: Any) -> BatchStream:
    domain = Domain.model_validate({"name": "synthetic", "scene": "urban", "size": 64, "train": 5})
    values: dict[str, Any] = {"sampling": Uniform(), "batch": 4, "crop": 32, "resize": None, "seed": 3, "key": 0}
    items = without_labels(domain.items("train")) if changes.get("key") else list(domain.items("train"))
    return BatchStream(domain, items, **(values | changes))


def test_batch_depends_on_seed_and_step_only() -> None:
    steps = BatchDataset(stream(), stream(key=1))
    late = list(batch_loader(steps, 6, 8, workers=0, pin=False))
    early = list(batch_loader(BatchDataset(stream(cache="memory"), stream(key=1)), 0, 8, workers=0, pin=False))
    assert len(late) == 2
    for one, other in zip(late, early[6:], strict=True):
        assert isinstance(one, Batch)
        assert isinstance(other, Batch)
        assert torch.equal(one.source.image, other.source.image)
        assert torch.equal(one.source.label, other.source.label)
        assert torch.equal(one.target, other.target)
    assert not torch.equal(
        BatchDataset(stream(), None).batch(0).source.image, BatchDataset(stream(), None).batch(1).source.image
    )


def test_target_with_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="without_labels"):
        BatchDataset(stream(), stream()).batch(0)


def test_ranks_load_disjoint_parts_of_a_batch() -> None:
    whole = BatchDataset(stream(), None).batch(2).source.image
    parts = [BatchDataset(stream(), None, rank, 2).batch(2).source.image for rank in (0, 1)]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])
    assert BatchDataset(stream(), None).batch(2).target.shape[0] == 0


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_every_epoch_holds_every_image_once(count: int, batch: int, seed: int) -> None:
    seen = [
        Uniform().choose_image(SampleSlot(seed, number // batch, number % batch, batch, count), None)[0]
        for number in range(2 * count)
    ]
    assert Counter(seen[:count]) == Counter(seen[count:]) == Counter(range(count))


def test_rare_sampling_prefers_rare_classes() -> None:
    counts = np.array([[10_000, 0, 50], [10_000, 0, 0], [9_000, 0, 0]])
    rare = Rare(temperature=0.1)
    share = rare.probabilities(counts)
    assert share[1] == 0
    assert share[2] > 0.99
    assert share.sum() == pytest.approx(1)
    choices = [rare.choose_image(SampleSlot(0, step, 0, 1, 3), counts) for step in range(50)]
    assert all(choose_image == 0 for choose_image, expected in choices if expected == 2)
    label = np.zeros((64, 64), np.uint8)
    label[:16, :16] = 2
    hits = [
        (
            crop(np.zeros((64, 64, 1)), label, 16, np.random.default_rng(i), lambda part: rare.fits(part, 2))[1] == 2
        ).any()
        for i in range(40)
    ]
    plain = [
        (crop(np.zeros((64, 64, 1)), label, 16, np.random.default_rng(i), anywhere)[1] == 2).any() for i in range(40)
    ]
    assert sum(hits) > sum(plain)


def test_rare_sampling_names_classes_that_are_practically_never_drawn() -> None:
    counts = np.array([[500_000, 340_000, 0, 100_000, 60_000]])
    assert Rare(temperature=0.01).neglected(counts) == [0, 1]
    assert Rare().neglected(counts) == []
    assert min(share for share in Rare().probabilities(counts) if share) > 1e-3
    assert Uniform().neglected(counts) == []


@pytest.mark.parametrize(("temperature", "warns"), [(0.001, True), (0.1, False)])
def test_the_warning_names_the_classes(
    temperature: float, warns: bool, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load({**small, "sampling": {"name": "rare", "temperature": temperature}})
    source, _ = training_streams(recipe, quiet=False)
    assert source is not None
    assert source.counts is not None
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == int(warns)
    if warns:
        assert recipe.domain("source").classes.names[int(source.counts.sum(0).argmax())] in lines[0]
        assert "sampling.temperature" in lines[0]


def test_crop_mirrors_small_images_and_ignores_the_border() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    label = np.ones((3, 4), np.uint8)
    part, ids = crop(image, label, 6, np.random.default_rng(0), anywhere)
    assert part.shape == (6, 6, 1)
    assert (ids[:3, :4] == 1).all()
    assert (ids[3:] == IGNORE).all()
    assert (part[3, :4] == part[2, :4]).all()


def test_streams_without_images_or_labels_are_errors() -> None:
    domain = stream().domain
    with pytest.raises(DataError, match="synthetic"):
        BatchStream(domain, [], Uniform(), 1, 8, None, 0, 0)
    with pytest.raises(DataError, match="rare"):
        BatchStream(domain, without_labels(domain.items("train")), Rare(), 1, 8, None, 0, 0)


def folder(root: Path, mask: int | None, image: int = 9, side: int = 8) -> Domain:
    """Three images of 16 bits, whose masks hold one number throughout."""
    settings: dict[str, Any] = {"name": "folder", "root": root, "classes": ["a", "b"], "bands": 1, "title": "Town"}
    for kind in ("images", "masks")[: 1 + (mask is not None)]:
        (root / kind).mkdir()
        for number in range(3):
            value = np.full((side, side), image if kind == "images" else mask, np.uint16 if kind == "images" else "u1")
            Image.fromarray(value).save(root / kind / f"{number}.png")
    return Domain.model_validate(settings | ({"masks": "masks"} if mask is not None else {}))


def folder_stream(domain: Domain, **changes: Any) -> BatchStream:
    values: dict[str, Any] = {"sampling": Uniform(), "batch": 1, "crop": 8, "resize": None, "seed": 0, "key": 0}
    return BatchStream(domain, domain.items("train"), **(values | changes))


def test_source_without_masks_is_an_error(tmp_path: Path) -> None:
    domain = folder(tmp_path, None)
    assert (folder_stream(domain).read(0, [0]).label == IGNORE).all()
    with pytest.raises(DataError, match=r"Town .*images/0\.png.* source\.masks"):
        folder_stream(domain, labeled=True)


@pytest.mark.parametrize("changes", [{"labeled": True}, {"sampling": Rare()}, {"sampling": Rare(), "labeled": True}])
def test_masks_without_classes_are_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    domain = folder(tmp_path, IGNORE)
    with pytest.raises(DataError, match=r"Town .* 3 images"):
        folder_stream(domain, **changes)
    with pytest.raises(DataError):
        Rare().probabilities(np.zeros((3, 2), np.int64))


def test_label_check_reads_the_first_mask_only(tmp_path: Path) -> None:
    domain = folder(tmp_path, 1)
    (tmp_path / "masks" / "1.png").write_bytes(b"")
    assert folder_stream(domain, labeled=True).labeled


def test_images_above_max_value_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.png .*300.* max_value 255"):
        folder_stream(folder(tmp_path, None, image=300)).read(0, [0])


@pytest.mark.parametrize(("dtype", "most", "right"), [(np.uint8, 10_000.0, 255), (np.float32, 255.0, 1)])
def test_images_far_below_max_value_are_an_error(tmp_path: Path, dtype: Any, most: float, right: int) -> None:
    domain = folder(tmp_path, None).model_copy(update={"max_value": most})
    with pytest.raises(DataError, match=rf"up to 1, and max_value is .*; set max_value to {right}"):
        check_max_value(domain, domain.items("train")[0], np.ones((2, 2, 1), dtype))
    check_max_value(domain, domain.items("train")[0], np.full((2, 2, 1), 200, np.float32))


def test_largest_crop_and_resize(tmp_path: Path) -> None:
    domain = folder(tmp_path, None)
    assert folder_stream(domain, crop=64).read(0, [0]).image.shape == (1, 1, 64, 64)
    with pytest.raises(RecipeError, match=r"crop .*65.* 8 .*\.png"):
        folder_stream(domain, crop=65).read(0, [0])
    for setting in ("crop", "resize"):
        with pytest.raises(RecipeError, match=f"{setting} .*16385"):
            folder_stream(domain, **{setting: 16385})


def test_out_of_memory_names_batch_and_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("overfly.data.loading.open_image", full)
    with pytest.raises(RecipeError, match=r"batch 4 .*crop 32"):
        stream().read(0, [0])


def test_names_are_those_of_the_loaded_images() -> None:
    steps = BatchDataset(stream(), None)
    names = steps.names(1)
    assert len(names) == 4
    by_name = {item.name: item for item in steps.source.items} if steps.source else {}
    image = steps.batch(1).source.image
    for name, part in zip(names, image, strict=True):
        whole = stream().domain.read_image(by_name[name]).transpose(2, 0, 1).astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(whole[0], (32, 32))
        assert (windows == part[0].numpy()).all((2, 3)).any()


@pytest.mark.parametrize("cache", [None, "memory", "disk"])
def test_target_batch_has_a_nodata_mask(tmp_path: Path, cache: str | None) -> None:
    """No data: transparent pixels and mirrored borders."""
    (tmp_path / "images").mkdir()
    image = np.full((40, 40, 4), 200, np.uint8)
    image[:, 20:, 3] = 0
    Image.fromarray(image, "RGBA").save(tmp_path / "images" / "1.png")
    domain = Folder(root=tmp_path, images="images/*.png", classes=["a", "b"])
    folder = tmp_path / "cache" if cache == "disk" else cache
    items = without_labels(domain.items("train"))
    target = BatchStream(domain, items, Uniform(), batch=1, crop=48, resize=None, seed=0, key=1, cache=folder)
    for step in (0, 1):
        batch = BatchDataset(None, target).batch(step)
        assert batch.nodata_mask is not None
        assert batch.valid_mask is not None
        assert batch.nodata_mask[0, :40, 20:].all()
        assert batch.nodata_mask[0, 40:].all()
        assert not batch.nodata_mask[0, :40, :20].any()
        assert torch.equal(batch.valid_mask, ~batch.nodata_mask)
        assert (batch.target[0, :, :40, :20] == 200).all()
    small = BatchStream(domain, items, Uniform(), batch=1, crop=20, resize=20, seed=0, key=1, cache=folder)
    halves = BatchDataset(None, small).batch(0).nodata_mask
    assert halves is not None
    assert halves[0, :, 10:].all()
    assert not halves[0, :, :10].any()


def test_nodata_mask_is_none_if_all_pixels_have_data(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(tmp_path / "images" / "1.png")
    domain = Folder(root=tmp_path, images="images/*.png", classes=["a", "b"])
    items = without_labels(domain.items("train"))
    target = BatchStream(domain, items, Uniform(), batch=1, crop=16, resize=None, seed=0, key=1)
    assert BatchDataset(None, target).batch(0).nodata_mask is None
