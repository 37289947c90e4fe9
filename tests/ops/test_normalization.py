from __future__ import annotations

import copy

import torch
from torch import nn

from overfly.core.records import Logits
from overfly.models.network import build
from overfly.ops.normalization import (
    batch_norms,
    blend_statistics,
    estimate_statistics,
    freeze_unused,
    joint_forward,
    replace_modules,
    reset_statistics,
    weighted_statistics,
)


class Scores(nn.Module):
    """A network of one normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image: torch.Tensor) -> Logits:
        out = self.norm(image)
        return Logits(out, (out * 2,), out[:, :1], out * 3)


def test_joint_forward_normalizes_groups_as_one_batch() -> None:
    first, second = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4) + 5
    network = Scores()
    result = joint_forward(network, first, second)
    whole = Scores()(torch.cat([first, second]))
    assert torch.equal(result[0].main, whole.main[:2])
    assert torch.equal(result[1].aux[0], whole.aux[0][2:])
    assert result[1].features is not None
    assert len(result[1].features) == 3
    assert network.norm.num_batches_tracked == 1


def test_blended_statistics_lie_between() -> None:
    modules = [Scores() for _ in range(3)]
    for index, module in enumerate(modules[:2]):
        module(torch.randn(4, 3, 5, 5) * (index + 1) + index)
    own, other, third = (module.norm for module in modules)
    third.load_state_dict(own.state_dict())
    blend_statistics(modules[2], modules[1], 0.0)
    assert torch.equal(third.running_var, own.running_var)  # type: ignore[arg-type]
    blend_statistics(modules[2], modules[1], 0.25)
    expected = 0.75 * own.running_var + 0.25 * other.running_var  # type: ignore[operator]
    assert torch.allclose(third.running_var, expected)  # type: ignore[arg-type]
    blend_statistics(modules[2], modules[1], 1.0)
    assert torch.equal(third.running_mean, other.running_mean)  # type: ignore[arg-type]


def test_parts_are_replaced_at_any_depth_but_for_those_to_skip() -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), nn.BatchNorm2d(3))
    replace_modules(module, nn.BatchNorm2d, lambda part: nn.Identity() if part.num_features > 1 else part, skip=("2",))
    assert [type(part).__name__ for part in module.modules()][1:] == [
        "BatchNorm2d", "Sequential", "Identity", "ReLU", "BatchNorm2d",
    ]  # fmt: skip


def test_only_the_boundary_head_is_frozen_and_nothing_else_changes() -> None:
    network = build("pidnet_s", 3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    freeze_unused(network, lambda logits: (logits.main, *logits.aux))
    frozen = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith("seghead_d.")}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(part.training for part in network.modules())
    assert all(weight.grad is None for weight in network.parameters())


def images(count: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(count)]


@torch.no_grad()
def test_equal_weights_give_the_plain_statistics_of_the_batches() -> None:
    weighted = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.BatchNorm2d(3))
    plain = copy.deepcopy(weighted).train()
    reset_statistics(weighted)
    for image in images(3):
        with weighted_statistics(weighted, torch.full((2, 8, 8), 7.0)):
            out = weighted(image)
            assert not any(part.training for part in weighted.modules())
        torch.testing.assert_close(out, plain(image))
    assert all(part.training for part in weighted.modules())
    means = torch.stack([image.mean((0, 2, 3)) for image in images(3)])
    variances = torch.stack([image.transpose(0, 1).flatten(1).var(1, correction=0) for image in images(3)])
    torch.testing.assert_close(weighted[0].running_mean, means.mean(0))
    torch.testing.assert_close(weighted[0].running_var, variances.mean(0))
    before = torch.as_tensor(weighted[0].running_mean).clone()
    weighted.eval()(images(1)[0])
    assert torch.equal(torch.as_tensor(weighted[0].running_mean), before)


@torch.no_grad()
def test_pixels_of_weight_zero_do_not_count() -> None:
    norms = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.BatchNorm2d(3))
    reset_statistics(norms)
    (image,), weight = images(1), torch.zeros(2, 8, 8)
    weight[:, 4:] = 1.0
    changed = image.clone()
    changed[:, :, :4] = 99.0
    found = []
    for each in (image, changed):
        with weighted_statistics(norms, weight):
            norms(each)
        found.append([norm.running_mean.clone() for norm in batch_norms(norms)])  # type: ignore[union-attr]
        reset_statistics(norms)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], image[:, :, 4:].mean((0, 2, 3)))


def test_estimated_statistics_replace_those_of_training() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    for image in images(3):
        norm(image * 100)
    estimate_statistics(norm, images(2))
    mean = torch.stack([image.mean((0, 2, 3)) for image in images(2)]).mean(0)
    torch.testing.assert_close(norm[0].running_mean, mean)
    assert norm[1].training
