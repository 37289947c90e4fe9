from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from overfly.core.records import IGNORE, Logits
from overfly.ops.pseudo_labels import (
    PseudoLabels,
    class_thresholds,
    confident_share,
    ema_thresholds,
    ema_update,
    filter_by_threshold,
    instance_thresholds,
    mask_nodata,
    multiscale_pseudo_labels,
    pseudo_label,
)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network(torch.randn(2, 3, 4, 4) * seed)
    return network


def random_pseudo_labels(seed: int, classes: int = 4, shape: tuple[int, ...] = (2, 16, 16)) -> PseudoLabels:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, shape, generator=generator)
    return PseudoLabels(label, torch.rand(shape, generator=generator) * 0.99 + 0.01)


def test_ema_update_at_step_0_copies_the_student_with_buffers() -> None:
    teacher, student = network(1), network(2)
    ema_update(teacher, student, 0.99, 0)
    own = teacher.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in student.state_dict().items())


def test_ema_update_averages_parameters_and_statistics_and_copies_counters() -> None:
    teacher, student = network(1), network(2)
    student[1].num_batches_tracked += 5  # type: ignore[index]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    ema_update(teacher, student, 0.9, 1000)
    for name, value in student.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * value if value.is_floating_point() else value
        assert torch.allclose(teacher.state_dict()[name], expected, atol=1e-6), name
    ema_update(teacher, student, 0.9, 1)
    assert not torch.equal(teacher.state_dict()["1.running_var"], before["1.running_var"])


def test_ema_update_of_the_first_steps_is_a_plain_average() -> None:
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    values = [3.0, 5.0, 10.0, -2.0]
    for step, value in enumerate(values):
        nn.init.constant_(student.weight, value)
        ema_update(teacher, student, 0.99, step)
    assert abs(teacher.weight.item() - sum(values) / 4) < 1e-6


def test_pseudo_labels_are_the_most_probable_class() -> None:
    logits = torch.randn(2, 5, 3, 3)
    result = pseudo_label(logits.requires_grad_())
    assert torch.equal(result.label, logits.argmax(1))
    assert torch.allclose(result.probability, logits.softmax(1).amax(1))
    assert not result.probability.requires_grad


def test_confident_share() -> None:
    probability = torch.tensor([[[0.9, 0.5], [0.97, 0.99]], [[0.1, 0.2], [0.3, 0.968]]])
    label = torch.zeros(2, 2, 2, dtype=torch.int64)
    assert confident_share(PseudoLabels(label, probability), 0.968).flatten().tolist() == [0.5, 0.0]


def test_pixels_without_data_do_not_count() -> None:
    """Half an image without data changes neither the share of confident pixels nor thresholds nor labels."""
    logits = torch.randn(1, 3, 8, 8)
    nodata_mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    nodata_mask[..., 4:] = True
    logits[..., 4:] = torch.tensor([9.0, 0.0, 0.0]).view(1, 3, 1, 1)  # surely the first class
    whole, half = pseudo_label(logits, nodata_mask), pseudo_label(logits[..., :4])
    assert confident_share(whole, 0.5).allclose(confident_share(half, 0.5))
    thresholds = class_thresholds(whole, 0.3, 3)
    assert torch.equal(thresholds, class_thresholds(half, 0.3, 3))
    kept = filter_by_threshold(whole, thresholds)
    assert torch.equal(kept[..., :4], filter_by_threshold(half, thresholds))
    assert (kept[..., 4:] == IGNORE).all()
    nothing = pseudo_label(logits, torch.ones_like(nodata_mask))
    assert confident_share(nothing, 0.5).item() == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]))
def test_class_thresholds_keep_the_same_share_of_every_class(seed: int, share: float) -> None:
    pseudo = random_pseudo_labels(seed)
    kept = filter_by_threshold(pseudo, class_thresholds(pseudo, share, 4))
    for index in range(4):
        own = pseudo.label == index
        count = int((kept == index).sum())
        assert abs(count - share * int(own.sum())) <= max(0.5 + 1e-6, 1 - share * int(own.sum()))
        if 0 < count < int(own.sum()):
            assert pseudo.probability[kept == index].min() >= pseudo.probability[own & (kept == IGNORE)].max()


def test_a_class_without_pixels_has_no_threshold() -> None:
    pseudo = PseudoLabels(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 0.95))
    result = class_thresholds(pseudo, 0.5, 3)
    assert result[0].item() == pseudo.probability[0, 0, 0]
    assert result[1:].isnan().all()


def test_each_class_may_have_a_share_of_its_own() -> None:
    pseudo = random_pseudo_labels(3)
    shares = torch.tensor([0.1, 0.3, 0.6, 1.0])
    kept = filter_by_threshold(pseudo, class_thresholds(pseudo, shares, 4))
    result = [((kept == index).sum() / (pseudo.label == index).sum()).item() for index in range(4)]
    assert torch.allclose(torch.tensor(result), shares, atol=0.02)


def test_ema_thresholds_update_present_classes() -> None:
    before = torch.tensor([0.5, 0.5, 0.0, 0.0])
    result = torch.tensor([1.0, float("nan"), 0.8, float("nan")])
    assert torch.allclose(ema_thresholds(before, result, 0.9), torch.tensor([0.55, 0.5, 0.8, 0.0]))


def image_of(probability: Tensor) -> PseudoLabels:
    return PseudoLabels(torch.zeros_like(probability, dtype=torch.int64), probability)


def test_thresholds_follow_the_instance() -> None:
    before = torch.full((2,), 0.9)
    low, high = torch.linspace(0.3, 0.5, 100), torch.linspace(0.95, 0.999, 100)
    pair = image_of(torch.stack([low, high]).view(2, 10, 10))
    rows = instance_thresholds(pair, before, share=0.2, hardness=8.0, decay=0.5)
    assert rows[0, 0] < 0.9 < rows[1, 0] + 0.3
    assert rows[0, 0] < rows[1, 0]
    assert (rows[:, 1] == 0.9).all()  # a class that no image shows
    expected = 0.5 * 0.9 + 0.5 * low.sort(descending=True).values[round(100 * 0.2 * 0.9**8) - 1]
    assert abs(rows[0, 0] - expected) < 0.01
    kept = filter_by_threshold(pair, rows)
    assert (kept[0] == IGNORE).all()
    assert (kept[1] != IGNORE).all()


def test_hard_classes_keep_fewer_pixels() -> None:
    pseudo = random_pseudo_labels(5, classes=2, shape=(1, 64, 64))
    rows = instance_thresholds(pseudo, torch.tensor([0.9, 0.6]), share=0.5, hardness=4.0, decay=0.0)
    kept = filter_by_threshold(pseudo, rows)
    shares = [((kept == index).sum() / (pseudo.label == index).sum()).item() for index in range(2)]
    assert abs(shares[0] - 0.5 * 0.9**4) < 0.01
    assert abs(shares[1] - 0.5 * 0.6**4) < 0.01


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 9), st.floats(0, 1))
def test_class_thresholds_equal_the_kth_value_of_each_class(seed: int, classes: int, share: float) -> None:
    pseudo = random_pseudo_labels(seed, classes, (2, 9, 7))
    pseudo = mask_nodata(pseudo, torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(seed)) < 0.3)
    expected = torch.full((classes + 1,), torch.nan)
    for index in range(classes):
        values = pseudo.probability[pseudo.label == index]
        if len(values):
            rank = min(len(values), max(1, round(len(values) * (1 - share)) + 1))
            expected[index] = values.kthvalue(rank).values
    assert torch.equal(class_thresholds(pseudo, share, classes + 1).nan_to_num(-1), expected.nan_to_num(-1))


def test_multiscale_pseudo_labels_do_not_change_the_class_prior_in_place() -> None:
    class Scores(nn.Module):
        def forward(self, image: Tensor) -> Logits:
            return Logits(image)

    image, prior = torch.rand(2, 3, 16, 16) * 9, torch.full((3,), 1 / 3)
    nodata_mask = torch.ones(2, 16, 16, dtype=torch.bool)
    before = prior.clone()
    _, updated = multiscale_pseudo_labels(Scores(), image, prior, prior, scales=(1.0, 1.5), power=0.5, decay=0.9)
    assert torch.equal(prior, before)
    assert not torch.equal(updated, before)
    _, same = multiscale_pseudo_labels(
        Scores(), image, prior, prior, scales=(1.0,), power=0.5, decay=0.9, nodata_mask=nodata_mask
    )
    assert torch.equal(same, before)
    _, first = multiscale_pseudo_labels(Scores(), image, torch.zeros(3), prior, scales=(1.0,), power=0.5, decay=0.9)
    assert abs(float(first.sum()) - 1) < 1e-5  # not averaged with zeros
