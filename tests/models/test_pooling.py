"""PIDNet's average pools with and without padding."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from formula_weights import smooth_image
from torch import Tensor, nn

from overfly import train
from overfly.core.classes import Classes
from overfly.core.errors import RecipeError
from overfly.models import Network, Segmenter, build
from overfly.recipe import load
from overfly.training.setup import initial_network


def pooled(network: Network, side: int) -> list[Tensor]:
    """Values at the center of the pooled scales, of a map of ones of the size of an image of ``side`` pixels."""
    cells = -(-side // 64)
    pools = [part for part in network.modules() if isinstance(part, nn.AvgPool2d | nn.AdaptiveAvgPool2d)]
    assert len(pools) == 4
    return [pool(torch.ones(1, 1, cells, cells))[0, 0, 0, 0] for pool in pools]


@pytest.mark.parametrize("name", ["pidnet_s", "pidnet_l"])
def test_means_over_the_map_do_not_depend_on_its_size(name: str) -> None:
    with torch.device("meta"):
        network = build(name)
    released = [pooled(network, side) for side in (256, 512, 2048)]
    assert all(small[2] < large[2] for small, large in pairwise(released))
    assert released[0][2].item() == pytest.approx(4 * 4 / 17**2)  # 4 × 4 cells of a window of 17 × 17
    network.set_count_include_pad(False)
    for side in (256, 512, 2048):
        assert [value.item() for value in pooled(network, side)] == pytest.approx([1.0] * 4)


def segmenter(**changes: Any) -> Segmenter:
    torch.manual_seed(0)
    classes = Classes(names=tuple("abc"))
    return Segmenter(build("pidnet_s", 3), classes, architecture="pidnet_s", mean=[0.0] * 3, std=[1.0] * 3, **changes)


def test_a_file_keeps_the_pooling_and_its_scores(tmp_path: Path) -> None:
    image = smooth_image(64, 128)
    own, released = segmenter().eval(), segmenter().eval()
    own.network.set_count_include_pad(False)
    with torch.no_grad():
        assert not torch.allclose(own.scores(image), released.scores(image))
        for each in (own, released):
            for with_heads in (True, False):
                saved = each if with_heads else each.without_training_heads()
                loaded = Segmenter.load(saved.save(tmp_path / "network.safetensors")).eval()
                assert loaded.network.count_include_pad == each.network.count_include_pad
                assert torch.equal(loaded.scores(image), each.scores(image))


def test_the_recipe_sets_the_pooling_and_a_start_keeps_it(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**small, "model": {"name": "pidnet_s", "weights": None, "count_include_pad": False}, "steps": 1})
    run = train(recipe, out=tmp_path, device="cpu", quiet=True).run
    assert not run.segmenter().network.count_include_pad
    assert initial_network(load(small, "model=pidnet_s", "model.weights=null"))[0].network.count_include_pad
    further = load({**small, "start": str(run.weights), "model": "pidnet_s"})
    assert not initial_network(further, run.weights)[0].network.count_include_pad
    released = load(further, "model.count_include_pad=true")
    assert initial_network(released, run.weights)[0].network.count_include_pad


def test_a_network_without_padded_pools_is_an_error(small: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"model\.count_include_pad needs a network with padded pools"):
        initial_network(load(small, "model.count_include_pad=false"))
