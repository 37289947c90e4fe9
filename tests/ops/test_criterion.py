from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Labeled, Logits
from overfly.ops.criterion import Criterion, CrossEntropy, Dice, Ohem, boundaries
from overfly.ops.geometry import turn
from overfly.ops.losses import boundary_loss, cross_entropy, dice_loss, ohem_cross_entropy

K = 3
KINDS = sorted(Criterion.kinds)


def scores(seed: int = 0, *, heads: bool = True) -> Logits:
    """Scores of a network in training, or without its training heads."""
    generator = torch.Generator().manual_seed(seed)

    def head(channels: int) -> Tensor:
        return (2 * torch.randn(2, channels, 16, 16, generator=generator)).requires_grad_()

    return Logits(head(K), (head(K), head(K)), head(1)) if heads else Logits(head(K))


def blocks(seed: int = 0) -> Tensor:
    label = torch.randint(0, K, (2, 4, 4), generator=torch.Generator().manual_seed(seed))
    label[0, 0, 0] = IGNORE
    return label.repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_the_kinds_are_these() -> None:
    assert KINDS == ["cross_entropy", "dice", "ohem"]
    adapter = TypeAdapter(Criterion)
    assert adapter.validate_python("ohem") == Ohem()
    assert adapter.validate_python({"name": "cross_entropy", "aux": 0.2}) == CrossEntropy(aux=0.2)
    with pytest.raises(ValidationError, match="cross_entropy, dice, ohem"):
        adapter.validate_python("focal")


@pytest.mark.parametrize("name", KINDS)
def test_heads_that_are_absent_drop_their_terms(name: str) -> None:
    criterion = Criterion.kind(name)()
    own = {"dice": {"main", "dice"}}.get(name, {"main"})
    assert set(criterion.terms(scores(heads=False), blocks())) == own
    whole = own | {"aux", "boundary"} | ({"at_boundary"} if name == "ohem" else set())
    terms = criterion.terms(scores(), blocks())
    assert set(terms) == whole
    assert all(term.ndim == 0 and term.item() > 0 for term in terms.values())
    off = criterion.model_copy(update={"aux": 0.0, "boundary": 0.0})
    assert set(off.terms(scores(), blocks())) == whole - {"aux", "boundary"}


def test_cross_entropy_terms() -> None:
    logits, label = scores(), blocks()
    assert logits.boundary is not None
    terms = CrossEntropy().terms(logits, label)
    torch.testing.assert_close(terms["main"], cross_entropy(logits.main, label))
    each = [cross_entropy(head, label) for head in logits.aux]
    torch.testing.assert_close(terms["aux"], 0.4 * (each[0] + each[1]))
    edges = boundaries(label, 4)
    expected = boundary_loss(logits.boundary, edges, 20, valid=label != IGNORE)
    torch.testing.assert_close(terms["boundary"], expected)


def test_ohem_is_the_whole_training_loss_of_pidnet() -> None:
    logits, label = scores(), blocks()
    assert logits.boundary is not None
    terms = Ohem(min_kept=100).terms(logits, label)
    torch.testing.assert_close(terms["main"], ohem_cross_entropy(logits.main, label, 0.9, 100))
    torch.testing.assert_close(terms["aux"], CrossEntropy().terms(logits, label)["aux"])
    torch.testing.assert_close(terms["boundary"], CrossEntropy().terms(logits, label)["boundary"])
    sure = logits.boundary.sigmoid()[:, 0] > 0.8
    assert 0 < sure.float().mean().item() < 1
    expected = ohem_cross_entropy(logits.main, torch.where(sure, label, IGNORE), 0.9, 100)
    torch.testing.assert_close(terms["at_boundary"], expected)
    (gradient,) = torch.autograd.grad(terms["at_boundary"], logits.boundary, allow_unused=True)
    assert gradient is None  # where the boundary is seen is not itself learned from


def test_dice_terms() -> None:
    logits, label = scores(), blocks()
    terms = Dice(dice=0.5).terms(logits, label)
    torch.testing.assert_close(terms["dice"], 0.5 * dice_loss(logits.main, label))
    torch.testing.assert_close(terms["main"], cross_entropy(logits.main, label))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 1, 1)])
def test_half_the_weight_is_half_the_loss(name: str, shape: tuple[int, ...]) -> None:
    criterion, logits, label = Criterion.kind(name)(), scores(), blocks()
    whole = criterion.terms(logits, label)
    half = criterion.terms(logits, label, torch.full(shape, 0.5))
    for key, term in whole.items():
        torch.testing.assert_close(half[key], term / 2)


@pytest.mark.parametrize("name", KINDS)
def test_all_ignored_is_zero_without_nan(name: str) -> None:
    logits = scores()
    terms = Criterion.kind(name)().terms(logits, torch.full((2, 16, 16), IGNORE))
    total = torch.stack(list(terms.values())).sum()
    assert total.item() == 0
    torch.autograd.backward(total)
    heads = [logits.main, *logits.aux, logits.boundary]
    for head in heads:
        assert head is not None
        assert head.grad is not None
        assert not head.grad.any()


def test_boundaries_are_those_of_the_source_pixels() -> None:
    logits, label = scores(), blocks()
    source = torch.zeros(2, 16, 16, dtype=torch.bool)
    source[:, :, :8] = True
    plain, mixed = CrossEntropy().terms(logits, label), CrossEntropy().terms(logits, label, where=source)
    torch.testing.assert_close(mixed["main"], plain["main"])
    assert not torch.isclose(mixed["boundary"], plain["boundary"])
    assert logits.boundary is not None
    (gradient,) = torch.autograd.grad(mixed["boundary"], logits.boundary)
    assert not gradient[..., 8:].any()
    assert gradient[..., :8].any()
    label[:, :, 8:] = 0  # whatever is pasted elsewhere does not matter
    torch.testing.assert_close(CrossEntropy().terms(logits, label, where=source)["boundary"], mixed["boundary"])


def test_boundary_loss_beside_pasted_pixels_uses_known_boundaries_only() -> None:
    label = torch.zeros(1, 16, 24, dtype=torch.int64)
    label[:, 8:] = 1  # runs across the seam, and along the source's half of it
    source = torch.zeros(1, 16, 24, dtype=torch.bool)
    source[..., :12] = True
    head = torch.zeros(1, 1, 16, 24, requires_grad=True)
    logits = Logits(torch.zeros(1, 3, 16, 24), boundary=head)
    loss = CrossEntropy(width=4).terms(logits, label, where=source)["boundary"]
    (gradient,) = torch.autograd.grad(loss, head)
    has_gradient = gradient[0, 0] != 0
    assert has_gradient[:, :10].all()
    assert has_gradient[6:10, 10:12].all()  # a boundary of the source is one beside the seam too
    assert not has_gradient[:6, 10:12].any()
    assert not has_gradient[10:, 10:12].any()
    assert not has_gradient[:, 12:].any()


def test_class_weights() -> None:
    logits, label = scores(), blocks()
    weights = (0.5, 1.0, 2.0)
    terms = CrossEntropy(class_weights=weights).terms(logits, label)
    torch.testing.assert_close(terms["main"], cross_entropy(logits.main, label, class_weight=torch.tensor(weights)))
    with pytest.raises(RecipeError, match=r"criterion\.class_weights .* \(3\), got 2"):
        Ohem(class_weights=(1, 2)).terms(logits, label)


def halves(width: int = 12) -> Tensor:
    """Class 0 on the left, class 3 on the right."""
    label = torch.zeros(1, 8, width, dtype=torch.int64)
    label[..., width // 2 :] = 3
    return label


def slow(label: Tensor, width: int) -> Tensor:
    """Boundaries pixel by pixel."""
    after = width // 2
    before = width - after
    result = torch.zeros(label.shape, dtype=torch.bool)
    for b, y, x in (label != IGNORE).nonzero().tolist():
        window = label[b, max(0, y - before) : y + after + 1, max(0, x - before) : x + after + 1]
        result[b, y, x] = len(set(window.flatten().tolist()) - {IGNORE}) > 1
    return result


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
def test_a_straight_border_gives_a_band_of_width_pixels(width: int) -> None:
    band = boundaries(halves(), width)
    assert band.dtype == torch.bool
    columns = band[0, 0].nonzero().flatten().tolist()
    assert columns == list(range(6 - width // 2, 6 - width // 2 + width))
    assert bool((band == band[:, :1]).all())


@given(seed=st.integers(0, 1000), width=st.integers(1, 5), ignored=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=25)
def test_boundaries_equal_the_definition_by_loops(seed: int, width: int, ignored: float) -> None:
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


def test_boundaries_between_source_pixels_only() -> None:
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
def test_boundaries_turn_with_the_label(quarters: int, mirrored: bool) -> None:
    label = torch.randint(0, 3, (1, 4, 4), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 1)
    label = label.repeat_interleave(4, 2)
    image = boundaries(label).unsqueeze(1)
    assert image.any()
    assert not image.all()
    moved = turn(Labeled(image, label), quarters, mirrored)
    assert torch.equal(boundaries(moved.label).unsqueeze(1), moved.image)


def test_boundary_width_below_1_raises() -> None:
    with pytest.raises(ValueError, match="width"):
        boundaries(halves(), 0)
