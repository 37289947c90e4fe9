from __future__ import annotations

import torch

from overfly.models.registry import build
from overfly.ops.freezing import freeze_unreached


def test_only_the_boundary_head_is_frozen_and_nothing_else_changes() -> None:
    network = build("pidnet_s", 3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    freeze_unreached(network, 3, lambda logits: (logits.main, *logits.aux))
    frozen = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith("seghead_d.")}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(part.training for part in network.modules())
    assert all(weight.grad is None for weight in network.parameters())
