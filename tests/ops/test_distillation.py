from __future__ import annotations

import torch
import torch.nn.functional as F

from overfly.core.records import IGNORE
from overfly.ops.distillation import feature_distance, majority, soft_label_loss


def test_soft_labels_cost_nothing_where_both_agree() -> None:
    logits = torch.randn(2, 5, 4, 4)
    assert soft_label_loss(logits, logits, 2.0).abs() < 1e-6
    assert soft_label_loss(logits, logits + 3.0, 2.0).abs() < 1e-5  # a constant changes no probability


def test_soft_labels_are_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.randn(2, 5, 4, 4).requires_grad_(), torch.randn(2, 5, 4, 4).requires_grad_()
    found = soft_label_loss(student, teacher, 3.0)
    expected = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none").sum(1).mean() * 9
    assert torch.allclose(found, expected)
    found.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert teacher.grad is None


def test_a_cell_has_the_class_that_fills_it() -> None:
    label = torch.tensor([[[0, 0, 1, 2], [0, 0, 1, 1], [IGNORE, IGNORE, 2, 0], [IGNORE, 1, 1, 2]]])
    assert majority(label, (2, 2), 0.75, 3).tolist() == [[[0, 1], [IGNORE, IGNORE]]]
    assert majority(label, (2, 2), 0.0, 3).tolist() == [[[0, 1], [1, 2]]]
    assert (majority(torch.full((1, 4, 4), IGNORE), (2, 2), 0.0, 3) == IGNORE).all()


def test_feature_distance() -> None:
    anchor = torch.randn(1, 6, 2, 2)
    features = anchor.clone().requires_grad_()
    everywhere = torch.ones(1, 2, 2, dtype=torch.bool)
    found = feature_distance(features, anchor, everywhere)
    found.backward()  # type: ignore[no-untyped-call]
    assert found < 1e-5
    assert features.grad is not None
    assert features.grad.isfinite().all()
    moved = anchor + torch.tensor([3.0, 4.0, 0, 0, 0, 0]).view(1, 6, 1, 1)
    assert torch.allclose(feature_distance(moved, anchor, everywhere), torch.tensor(5.0))
    assert feature_distance(moved, anchor, ~everywhere) == 0
