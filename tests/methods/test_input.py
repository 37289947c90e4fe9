"""Methods that change what the student is shown."""

from __future__ import annotations

from typing import Any

import torch

from overfly.data.loading import BatchDataset
from overfly.methods.fda import FDA, ColorTransfer
from overfly.methods.method import Method
from overfly.methods.source_only import SourceOnly
from overfly.recipe import load
from overfly.training.setup import initial_network, training_streams


def test_style_transfer_between_equal_images_changes_nothing(small: dict[str, Any]) -> None:
    recipe = load(small, "method=fda")
    batch = BatchDataset(*training_streams(recipe)).batch(0)
    batch = batch._replace(target=batch.source.image)
    methods: list[Method[Any]] = [FDA(cycles=6, entropy=0), ColorTransfer(), ColorTransfer(style="image")]
    for method in methods:
        nets = method.networks(initial_network(recipe)[0]).train()
        shown: list[torch.Tensor] = []
        nets.student.register_forward_pre_hook(lambda _, given, shown=shown: shown.append(given[0]))
        result = method.losses(nets, batch)
        assert result.keys() == SourceOnly().losses(nets, batch).keys()
        assert torch.allclose(shown[0], batch.source.image, atol=1e-2)


def test_images_stay_in_the_sensors_range_and_labels_as_they_are(small: dict[str, Any]) -> None:
    recipe = load(small, "method=fda")
    batch = BatchDataset(*training_streams(recipe)).batch(0)
    batch = batch._replace(target=255 - batch.target)
    for method in (FDA(cycles=6), ColorTransfer()):
        nets = method.networks(initial_network(recipe)[0]).train()
        shown: list[torch.Tensor] = []
        nets.student.register_forward_pre_hook(lambda _, given, shown=shown: shown.append(given[0]))
        losses = method.losses(nets, batch)
        assert len(shown) == 1
        assert shown[0].min() >= 0
        assert shown[0].max() <= 255
        assert not torch.allclose(shown[0][:2], batch.source.image, atol=1)
        assert ("entropy" in losses) == isinstance(method, FDA)
        if isinstance(method, FDA):
            assert torch.equal(shown[0][2:], batch.target)
