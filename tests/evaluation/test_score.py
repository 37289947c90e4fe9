from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError, RecipeError
from overfly.core.records import IGNORE, Array, Item, Logits, UInt8
from overfly.data.domain import Domain, Split
from overfly.evaluation.confusion import Confusion
from overfly.evaluation.score import Sample, Samples, evaluation_mode, score
from overfly.evaluation.scores import Scores

CLASSES = Classes(names=("dark", "gray", "bright", "never"))


class Memory(Domain):
    """Pictures in memory, not registered: the class of a pixel is its level; some labels lie, to score below 1."""

    name: ClassVar[str] = "memory"
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 16), (12, 20), (16, 16), (9, 7))
    lies: bool = True

    @property
    def classes(self) -> Classes:
        return CLASSES

    def items(self, split: Split) -> Sequence[Item]:
        count = len(self.sizes)
        known = {"train": count, "val": count - 1, "test": 0}[split]
        return [Item(f"p{i}", Path(f"p{i}.png"), Path(f"p{i}_mask.png") if i < known else None) for i in range(count)]

    def read_image(self, item: Item) -> Array:
        index = int(item.name[1:])
        level = np.random.default_rng(index).integers(0, 3, self.sizes[index])
        return np.repeat((level * 100 + 20).astype(np.uint8)[..., None], 3, axis=2)

    def read_label(self, item: Item) -> UInt8:
        assert item.label is not None
        opened.append(item.name)
        label = (self.read_image(item)[..., 0] // 100).astype(np.uint8)
        label[0] = IGNORE
        if self.lies:
            label[3, : 2 + int(item.name[1:])] = 1
        return label


opened: list[str] = []


class Levels(nn.Module):
    """Tells the classes apart by level, pixel by pixel; dropout and a counter show mode and number of passes."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.batches: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Logits:
        self.batches.append(tuple(image.shape))
        assert image.dtype == torch.float32
        level = self.drop(image.mean(1, keepdim=True))
        centers = torch.tensor([20.0, 120.0, 220.0, 900.0]).view(1, 4, 1, 1)
        return Logits(-(level - centers).abs() / 20)


def _expected(domain: Memory, split: Split) -> Confusion:
    total = Confusion.empty(4)
    for item in domain.items(split):
        if item.label is not None:
            prediction = torch.from_numpy(domain.read_image(item)[..., 0] // 100).long()
            total = total + Confusion.from_predictions(prediction, torch.from_numpy(domain.read_label(item)).long(), 4)
    return total


def test_scores_one_confusion_matrix_over_the_split() -> None:
    domain = Memory()
    found, want = score(Levels(), domain, "train"), _expected(domain, "train")
    assert found.confusion == tuple(tuple(row) for row in want.counts.tolist())
    assert found.miou == pytest.approx(want.miou)
    assert found.miou is not None
    assert 0.7 < found.miou < 1
    assert found.classes["bright"].iou == pytest.approx(float(want.iou[2]))
    assert found.classes["never"].iou is None
    assert found.classes["never"].pixels == 0
    assert list(found.classes) == list(CLASSES.names)
    assert found.protocol.resize is None
    assert found.boundary_miou is not None
    assert found.calibration.ece is not None
    assert sum(found.calibration.pixels) == want.pixels


def test_says_how_many_labels_were_opened() -> None:
    opened.clear()
    found = score(Levels(), Memory(), "val")
    assert found.labels_opened == len(opened) == len(set(opened)) == found.images == 4
    assert found.unlabeled == 1


def test_is_json_without_nan_and_reads_back() -> None:
    found = score(Levels(), Memory(), "train")
    text = json.dumps(found.model_dump(mode="json"), allow_nan=False)
    assert Scores.model_validate_json(text) == found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [None, 8, 64])
def test_batches_threads_and_windows_change_nothing_for_a_pointwise_network(
    batch: int, workers: int, window: int | None
) -> None:
    plain = score(Levels(), Memory(), "train")
    network = Levels()
    found = score(network, Memory(), "train", batch=batch, workers=workers, window=window, overlap=0.5)
    assert found.confusion == plain.confusion
    assert found.classes == plain.classes
    assert found.calibration.ece == pytest.approx(plain.calibration.ece, abs=1e-6)
    assert found.protocol.window == window
    assert max(shape[0] for shape in network.batches) <= batch
    if window:
        assert {shape[-2:] for shape in network.batches} == {(window, window)}
    elif batch == 3:
        assert [shape[0] for shape in network.batches] == [2, 1, 1, 1]


def test_the_network_sees_the_resized_picture_and_the_label_stays_whole() -> None:
    network = Levels()
    found = score(network, Memory(), "train", resize=32)
    assert {shape[-2:] for shape in network.batches} == {(32, 32)}
    assert found.protocol.resize == 32
    assert sum(map(sum, found.confusion)) == _expected(Memory(), "train").pixels


def test_modes_are_as_before_and_nothing_learns() -> None:
    network = nn.Sequential(Levels(), nn.Identity())
    network.train()
    network[1].eval()
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, True, True, False]
    levels = Levels().train()
    score(levels, Memory(), "train")
    assert levels.training
    assert levels.drop.training


def test_ranks_add_up_to_the_whole() -> None:
    plain = score(Levels(), Memory(), "train")
    kept: list[list[Tensor]] = []
    for rank in range(2):
        sent: list[Tensor] = []

        def keep(counts: Tensor, sent: list[Tensor] = sent) -> Tensor:
            sent.append(counts)
            return counts

        score(Levels(), Memory(), "train", shard=(rank, 2), add=keep)
        kept.append(sent)
    other = iter(kept[1])
    found = score(Levels(), Memory(), "train", shard=(0, 2), add=lambda counts: counts + next(other))
    assert found.confusion == plain.confusion
    assert found.labels_opened == plain.labels_opened == 5
    assert found.boundary_miou == pytest.approx(plain.boundary_miou)
    assert found.calibration.ece == pytest.approx(plain.calibration.ece)


def test_progress_and_samples() -> None:
    done: list[tuple[int, int]] = []
    samples = Samples(spread=2)
    score(Levels(), Memory(), "train", samples=samples, on_image=lambda number, total: done.append((number, total)))
    assert done == [(number, 5) for number in range(1, 6)]
    kept = list(samples)
    assert [sample.name for sample in kept][:2] == ["p1", "p3"]
    best = max(kept, key=lambda sample: sample.accuracy or 0)
    worst = min(kept, key=lambda sample: sample.accuracy or 0)
    assert worst.name == "p4"
    assert best.accuracy is not None
    for sample in kept:
        assert sample.label is not None
        assert sample.prediction.shape == sample.label.shape == sample.image.shape[:2]
        assert sample.prediction.dtype == np.uint8


def test_samples_keep_few_and_name_each_once() -> None:
    samples = Samples(spread=3)
    picture = np.zeros((2, 2, 3), np.uint8)
    for index in range(100):
        samples.add(Sample(f"s{index}", picture, picture[..., 0], None, index / 100), index, 100)
    assert [sample.name for sample in samples] == ["s16", "s50", "s83", "s0", "s99"]
    few = Samples(spread=4)
    few.add(Sample("only", picture, picture[..., 0]), 0, 1)
    assert len(few) == 1


class Broken(Memory):
    """Labels of another size, or with ids that are no classes."""

    fault: str = "size"

    def read_label(self, item: Item) -> UInt8:
        label = super().read_label(item)
        if item.name != "p2":
            return label
        if self.fault == "size":
            return label[:-1]
        label[4, 4] = 9
        return label


@pytest.mark.parametrize(
    ("domain", "split", "says"),
    [
        (Memory(), "test", "split test of domain .* has no labels"),
        (Broken(), "train", r"label p2_mask\.png is 20 x 11 pixels and its image 20 x 12"),
        (Broken(fault="ids"), "train", r"label p2_mask\.png holds id 9, but the classes are 0 to 3"),
    ],
)
def test_bad_labels_are_named(domain: Domain, split: Split, says: str) -> None:
    with pytest.raises(DataError, match=says):
        score(Levels(), domain, split)


class Few(nn.Module):
    """Two classes, or no number at all."""

    def __init__(self, classes: int = 2, value: float = 0.0) -> None:
        super().__init__()
        self.size, self.value = classes, value

    def forward(self, image: Tensor) -> Logits:
        return Logits(image.new_full((len(image), self.size, *image.shape[-2:]), self.value))


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"2 classes .* 4"):
        score(Few(), Memory(), "train")
    with pytest.raises(OverflyError, match="not finite on p0"):
        score(Few(4, float("nan")), Memory(), "train")
    named: Any = Few(4)
    named.classes = Classes(names=("a", "b", "c", "d"))
    with pytest.raises(RecipeError, match="a, b, c, d"):
        score(named, Memory(), "train")
