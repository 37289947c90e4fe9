"""What every kind of augmentation must keep, whatever it does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Generator, Tensor

from overfly.core.records import IGNORE, Labeled
from overfly.ops import color, geometry
from overfly.ops.augmentation import Augment, augment, chance, log_uniform, uniform

SIZE = 24
KINDS = sorted(Augment.kinds)
GEOMETRY = {name for name in KINDS if Augment.kind(name).__module__ == geometry.__name__}
COLOR = {name for name in KINDS if issubclass(Augment.kind(name), color.ColorAugment)}


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def make(name: str, p: float = 1.0) -> Augment:
    """A kind with its defaults, or a crop that fits."""
    crop = {"size": 16} if name == "random_crop" else {}
    return Augment.kind(name).model_validate({"p": p, **crop})


def scene(seed: int, *, count: int = 4, bands: int = 3, height: int = SIZE, width: int = SIZE) -> Labeled:
    """Images of three classes in blocks of four pixels, some ignored."""
    generator = seeded(seed)
    label = torch.randint(0, 3, (count, height // 4, width // 4), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORE
    label = label.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return Labeled(torch.rand(count, bands, height, width, generator=generator), label)


def test_the_kinds_are_these() -> None:
    assert {
        "horizontal_flip", "dihedral", "shift_scale_rotate", "grid_distortion", "random_crop", "scale_jitter",
        "coarse_dropout",
    } == GEOMETRY  # fmt: skip
    assert {
        "brightness_contrast", "color_jitter", "gaussian_blur", "gray", "gamma", "gaussian_noise", "illumination",
    } == COLOR  # fmt: skip
    assert set(KINDS) == GEOMETRY | COLOR


@given(
    name=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    bands=st.sampled_from([1, 3, 5]),
    height=st.sampled_from([16, 24, 32]),
    p=st.sampled_from([0.5, 1.0]),
)
@settings(deadline=None, max_examples=120)
def test_shapes_types_and_values(name: str, seed: int, bands: int, height: int, p: float) -> None:
    batch = scene(seed, bands=bands, height=height)
    before = Labeled(batch.image.clone(), batch.label.clone())
    image, label = make(name, p)(batch, seeded(seed))
    size = (16, 16) if name == "random_crop" else (height, SIZE)
    assert image.shape == (4, bands, *size)
    assert label.shape == (4, *size)
    assert image.dtype == torch.float32
    assert label.dtype == torch.int64
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    for i in range(4):
        assert set(label[i].flatten().tolist()) <= {*batch.label[i].flatten().tolist(), IGNORE}
    assert torch.equal(batch.image, before.image)
    assert torch.equal(batch.label, before.label)
    if name in COLOR:
        assert torch.equal(label, batch.label)


@pytest.mark.parametrize("name", KINDS)
def test_p_zero_changes_nothing_and_p_one_does(name: str) -> None:
    batch = scene(0)
    same = make(name, 0.0)(batch, seeded(0))
    if name == "random_crop":
        batch = Labeled(batch.image[..., 4:20, 4:20], batch.label[..., 4:20, 4:20])
    assert torch.equal(same.image, batch.image)
    assert torch.equal(same.label, batch.label)
    changed = make(name)(scene(0), seeded(0))
    assert changed.image.shape != batch.image.shape or not torch.equal(changed.image, batch.image)


@pytest.mark.parametrize("name", KINDS)
def test_equal_seeds_give_equal_results(name: str) -> None:
    batch = scene(1, count=8)
    first, again, other = (make(name, 0.7)(batch, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.label, again.label)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("name", sorted({*KINDS} - {"random_crop"}))  # a crop changes every image
def test_only_the_chosen_images_change(name: str) -> None:
    batch = scene(2, count=16)
    chosen = chance(16, 0.5, seeded(7))
    image, label = make(name, 0.5)(batch, seeded(7))
    changed = (image != batch.image).flatten(1).any(1)
    assert not (changed & ~chosen).any()
    assert torch.equal(label[~chosen], batch.label[~chosen])
    if name != "dihedral":  # one of its eight leaves an image as it is
        assert torch.equal(changed, chosen)


@pytest.mark.parametrize("name", KINDS)
def test_an_empty_batch_stays_empty(name: str) -> None:
    empty = Labeled(torch.zeros(0, 3, SIZE, SIZE), torch.zeros(0, SIZE, SIZE, dtype=torch.int64))
    image, label = make(name)(empty, seeded(0))
    assert len(image) == len(label) == 0


def test_images_are_changed_each_in_their_own_way() -> None:
    one = scene(3, count=1)
    batch = Labeled(one.image.expand(6, -1, -1, -1), one.label.expand(6, -1, -1))
    for name in set(KINDS) - {"horizontal_flip", "dihedral", "gray"}:
        image = make(name)(batch, seeded(0)).image
        assert all(not torch.equal(image[0], image[i]) for i in range(1, 6)), name


@given(
    seed=st.integers(0, 100),
    name=st.sampled_from(sorted(COLOR)),
    other=st.sampled_from(["horizontal_flip", "dihedral"]),
)
@settings(deadline=None, max_examples=20)
def test_color_commutes_with_flips(seed: int, name: str, other: str) -> None:
    if name == "gaussian_noise":
        name = "gamma"  # noise is drawn in place, it does not turn with the image
    batch = scene(seed)
    recolor, move = make(name), make(other)
    first = move(recolor(batch, seeded(1)), seeded(2))
    second = recolor(move(batch, seeded(2)), seeded(1))
    torch.testing.assert_close(first.image, second.image, atol=1e-5, rtol=0)
    assert torch.equal(first.label, second.label)


@pytest.mark.parametrize("max_value", [1.0, 255.0, 65535.0, 10000.0])
def test_augment_works_in_the_sensors_range(max_value: float) -> None:
    batch = scene(4)
    augments = [make(name) for name in ("scale_jitter", "color_jitter", "gaussian_blur")]
    expected = augment(batch, augments, max_value=1.0, generator=seeded(3))
    raised = augment(Labeled(batch.image * max_value, batch.label), augments, max_value=max_value, generator=seeded(3))
    torch.testing.assert_close(raised.image / max_value, expected.image, atol=1e-5, rtol=0)
    assert torch.equal(raised.label, expected.label)


def test_augment_needs_a_range_and_leaves_no_graph() -> None:
    batch = scene(5)
    with pytest.raises(ValueError, match="max_value"):
        augment(batch, [make("gray")], max_value=0, generator=seeded(0))
    assert augment(batch, (), max_value=255, generator=seeded(0)) is batch
    tracked = Labeled(batch.image.clone().requires_grad_(), batch.label)
    assert not augment(tracked, [make("gamma")], max_value=1, generator=seeded(0)).image.requires_grad


def test_augments_are_recipe_values() -> None:
    adapter = TypeAdapter(tuple[Augment, ...])
    given_names = ["dihedral", {"name": "scale_jitter", "low": 0.7, "p": 0.8}]
    values = adapter.validate_python(given_names)
    assert values == (geometry.Dihedral(), geometry.ScaleJitter(low=0.7, p=0.8))
    assert adapter.validate_python(adapter.dump_python(values, serialize_as_any=True)) == values
    for wrong in ({"name": "scale_jitter", "low": 3.0}, {"name": "gray", "p": 2}, {"name": "gray", "hue": 1}, "sepia"):
        with pytest.raises(ValidationError):
            adapter.validate_python([wrong])


def test_random_numbers_lie_in_their_range() -> None:
    flat, ratio = uniform((1000,), -2, 3, seeded(0)), log_uniform((1000,), 0.5, 2.0, seeded(0))
    assert -2 <= float(flat.min()) < -1.9
    assert 2.9 < float(flat.max()) <= 3
    assert 0.5 <= float(ratio.min()) < 0.51
    assert 1.96 < float(ratio.max()) <= 2
    assert 0.45 < float((ratio < 1).float().mean()) < 0.55
    share: Tensor = chance(2000, 0.3, seeded(0)).float().mean()
    assert 0.25 < float(share) < 0.35
