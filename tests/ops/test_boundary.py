from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overfly.core.records import IGNORE, Labeled
from overfly.ops.boundary import boundaries
from overfly.ops.geometry import turn


def halves(width: int = 12) -> Tensor:
    """Class 0 on the left, class 3 on the right."""
    label = torch.zeros(1, 8, width, dtype=torch.int64)
    label[..., width // 2 :] = 3
    return label


def slow(label: Tensor, width: int) -> Tensor:
    """Boundaries pixel by pixel."""
    after = width // 2
    before = width - after
    result = torch.zeros(label.shape)
    for b, y, x in (label != IGNORE).nonzero().tolist():
        window = label[b, max(0, y - before) : y + after + 1, max(0, x - before) : x + after + 1]
        result[b, y, x] = float(len(set(window.flatten().tolist()) - {IGNORE}) > 1)
    return result


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
def test_a_straight_border_gives_a_band_of_the_width(width: int) -> None:
    band = boundaries(halves(), width)
    assert band.dtype == torch.float32
    assert set(band.flatten().tolist()) == {0.0, 1.0}
    columns = band[0, 0].nonzero().flatten().tolist()
    assert columns == list(range(6 - width // 2, 6 - width // 2 + width))
    assert bool((band == band[:, :1]).all())


@given(seed=st.integers(0, 1000), width=st.integers(1, 5), ignored=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=25)
def test_equals_the_slow_definition(seed: int, width: int, ignored: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (2, 3, 4), generator=generator).repeat_interleave(3, 1).repeat_interleave(3, 2) * 254
    label[torch.rand(label.shape, generator=generator) < ignored] = IGNORE
    assert torch.equal(boundaries(label, width), slow(label, width))


def test_ignored_pixels_make_no_boundary() -> None:
    label = halves()
    label[..., 5:7] = IGNORE
    assert not boundaries(label, 2).any()
    assert boundaries(label, 4)[0, 0].nonzero().flatten().tolist() == []
    assert boundaries(label, 6)[0, 0].nonzero().flatten().tolist() == [4, 7]
    assert not boundaries(torch.full((2, 4, 4), IGNORE)).any()


def test_only_source_pixels_count() -> None:
    label = halves()
    label[:, :4] = 5  # pasted above
    pasted = torch.zeros(1, 8, 12, dtype=torch.bool)
    pasted[:, :4] = True
    seam = boundaries(label, 2)
    assert bool(seam[:, 3:5].all())
    source = boundaries(label, 2, where=~pasted)
    assert not source[:, :4].any()
    assert torch.equal(source[:, 4:], boundaries(halves(), 2)[:, 4:])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_turns_with_the_label(quarters: int, mirrored: bool) -> None:
    label = torch.randint(0, 3, (1, 4, 4), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 1)
    label = label.repeat_interleave(4, 2)
    image = boundaries(label).unsqueeze(1)
    assert 0 < float(image.mean()) < 1
    moved = turn(Labeled(image, label), quarters, mirrored)
    assert torch.equal(boundaries(moved.label).unsqueeze(1), moved.image)


def test_a_boundary_has_a_width() -> None:
    with pytest.raises(ValueError, match="1 pixel wide or more"):
        boundaries(halves(), 0)
