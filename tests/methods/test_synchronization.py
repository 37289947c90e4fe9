"""No step of a method waits for the device: a GPU would idle while the host reads a value from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from overfly.core.records import Batch
from overfly.data.loading import BatchDataset
from overfly.methods.method import Method
from overfly.ops.criterion import Criterion
from overfly.recipe import Recipe
from overfly.training.setup import initial_network, training_streams

SYNCHRONIZING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::masked_select",
    "aten::bincount", "aten::equal", "aten::is_nonzero",
}  # fmt: skip
ALLOWED = {
    # torch's BatchNorm with momentum=None reads its own batch counter
    "recalibrate": "momentum=None",
}


class Synchronizations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is not annotated
    """Count operators that would wait for a GPU if the given tensors, and all computed from them, were there.

    Everything else, such as random draws from the CPU's generator, stays on the host.
    """

    def __init__(self, device_tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is not annotated
        self.on_device: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.synchronizing: list[str] = []
        for tensor in device_tensors:
            self.on_device[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        inputs = [each for each in tree_flatten((args, kwargs or {}))[0] if isinstance(each, Tensor)]
        on_device = any(each in self.on_device for each in inputs)
        result = func(*args, **(kwargs or {}))
        if on_device:
            name = func._schema.name
            masks = name == "aten::index" and any(each.dtype == torch.bool for each in inputs[1:])
            if name in SYNCHRONIZING or masks:
                self.synchronizing.append(name)
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    self.on_device[each] = True
        return result


def synchronizations(method: Method[Any], recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operators of one call of `losses`, and of `after_step`, that would wait for the device."""
    nets = method.networks(initial_network(recipe)[0]).train()
    batch = BatchDataset(*training_streams(recipe)).batch(0)
    nodata_mask = torch.zeros(len(batch.target), *batch.target.shape[-2:], dtype=torch.bool)
    nodata_mask[..., :9] = True
    batch = Batch(batch.source, batch.target, nodata_mask if len(batch.target) else None)
    held = [*nets.parameters(), *nets.buffers(), *batch.source, batch.target]
    mode = Synchronizations([*held, *([] if batch.nodata_mask is None else [batch.nodata_mask])])
    for name in ("cpu", "tolist", "numpy"):  # transfers that the dispatcher does not see on a CPU
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, original: Any = original, name: str = name) -> Any:
            result = original(self, *args)
            if self in mode.on_device:
                mode.synchronizing.append(f"Tensor.{name}")
                if name == "cpu":  # on a CPU it would be the tensor itself
                    result = result.clone()
                    del mode.on_device[result]
            return result

        monkeypatch.setattr(Tensor, name, counted)
    with mode:
        method.losses(nets, batch)
        method.after_step(nets, 0)
    return mode.synchronizing


@pytest.mark.parametrize("name", sorted(name for name, kind in Method.kinds.items() if "overfly." in kind.__module__))
def test_losses_do_not_wait_for_the_device(
    name: str, recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(name)
    if name == "daformer":
        recipe = recipe_of(name, method={"name": name, "warmup": 0})
    found = synchronizations(recipe.method, recipe, monkeypatch)
    if name in ALLOWED:
        assert set(found) == {"aten::_local_scalar_dense"}
    else:
        assert not found


@pytest.mark.parametrize("name", sorted(Criterion.kinds))
def test_criteria_do_not_wait_for_the_device(
    name: str, recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("source_only")
    criterion = Criterion.kind(name)(class_weights=(1.0,) * 7)
    assert not synchronizations(recipe.method.model_copy(update={"criterion": criterion}), recipe, monkeypatch)


def test_synchronizations_are_counted_on_device_tensors_only() -> None:
    tensor = torch.rand(4)
    with Synchronizations([tensor]) as mode:
        _ = (tensor * 2)[tensor > 0.5]
        bool((tensor + 1).sum() > 0)
        float(torch.rand(()))  # on the host
    assert mode.synchronizing == ["aten::index", "aten::_local_scalar_dense"]
