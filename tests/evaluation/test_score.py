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
from overfly.evaluation.score import Sample, Samples, evaluation_mode, score
from overfly.evaluation.scores import Confusion, Scores

CLASSES = Classes(names=("dark", "gray", "bright", "never"))


class Memory(Domain):
    """Unregistered images in memory: the class of a pixel is its level; some labels are wrong, for scores below 1."""

    name: ClassVar[str] = "memory"
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 16), (12, 20), (16, 16), (9, 7))
    wrong_labels: bool = True

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
        if self.wrong_labels:
            label[3, : 2 + int(item.name[1:])] = 1
        return label


opened: list[str] = []


class Levels(nn.Module):
    """Classify each pixel by its level; dropout and a counter show mode and number of passes."""

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
    total = Confusion(torch.zeros(4, 4, dtype=torch.int64))
    for item in domain.items(split):
        if item.label is not None:
            prediction = torch.from_numpy(domain.read_image(item)[..., 0] // 100).long()
            total = total + Confusion.from_predictions(prediction, torch.from_numpy(domain.read_label(item)).long(), 4)
    return total


def test_scores_one_confusion_matrix_over_the_split() -> None:
    domain = Memory()
    scores, expected = score(Levels(), domain, "train"), _expected(domain, "train")
    assert scores.confusion == tuple(tuple(row) for row in expected.counts.tolist())
    assert scores.miou == pytest.approx(expected.miou)
    assert scores.miou is not None
    assert 0.7 < scores.miou < 1
    assert scores.classes["bright"].iou == pytest.approx(float(expected.iou[2]))
    assert scores.classes["never"].iou is None
    assert scores.classes["never"].pixels == 0
    assert list(scores.classes) == list(CLASSES.names)
    assert scores.protocol.resize is None
    assert scores.boundary_miou is not None
    assert scores.calibration.ece is not None
    assert sum(scores.calibration.pixels) == expected.pixels


def test_labels_opened_are_counted() -> None:
    opened.clear()
    scores = score(Levels(), Memory(), "val")
    assert scores.labels_opened == len(opened) == len(set(opened)) == scores.images == 4
    assert scores.unlabeled == 1


def test_scores_round_trip_through_json_without_nan() -> None:
    scores = score(Levels(), Memory(), "train")
    text = json.dumps(scores.model_dump(mode="json"), allow_nan=False)
    assert Scores.model_validate_json(text) == scores


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [None, 8, 64])
def test_batches_workers_and_windows_do_not_change_a_pointwise_network(
    batch: int, workers: int, window: int | None
) -> None:
    plain = score(Levels(), Memory(), "train")
    network = Levels()
    scores = score(network, Memory(), "train", batch=batch, workers=workers, window=window, overlap=0.5)
    assert scores.confusion == plain.confusion
    assert scores.classes == plain.classes
    assert scores.calibration.ece == pytest.approx(plain.calibration.ece, abs=1e-6)
    assert scores.protocol.window == window
    assert max(shape[0] for shape in network.batches) == (batch if window == 8 else 1)
    if window:
        assert {shape[-2:] for shape in network.batches} == {(window, window)}


def test_resize_applies_to_the_image_only() -> None:
    network = Levels()
    scores = score(network, Memory(), "train", resize=32)
    assert {shape[-2:] for shape in network.batches} == {(32, 32)}
    assert scores.protocol.resize == 32
    assert sum(map(sum, scores.confusion)) == _expected(Memory(), "train").pixels


def test_evaluation_mode_restores_each_module() -> None:
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


def test_sum_over_ranks_equals_one_process() -> None:
    plain = score(Levels(), Memory(), "train")
    ranks: list[list[Tensor]] = []
    for rank in range(2):
        sent: list[Tensor] = []

        def keep(counts: Tensor, sent: list[Tensor] = sent) -> Tensor:
            sent.append(counts)
            return counts

        score(Levels(), Memory(), "train", shard=(rank, 2), all_reduce=keep)
        ranks.append(sent)
    other = iter(ranks[1])
    scores = score(Levels(), Memory(), "train", shard=(0, 2), all_reduce=lambda counts: counts + next(other))
    assert scores.confusion == plain.confusion
    assert scores.labels_opened == plain.labels_opened == 5
    assert scores.boundary_miou == pytest.approx(plain.boundary_miou)
    assert scores.calibration.ece == pytest.approx(plain.calibration.ece)


def test_samples_of_extreme_accuracy() -> None:
    samples = Samples(evenly_spaced=2)
    score(Levels(), Memory(), "train", samples=samples)
    selected = list(samples)
    assert [sample.name for sample in selected][:2] == ["p1", "p3"]
    best = max(selected, key=lambda sample: sample.accuracy or 0)
    worst = min(selected, key=lambda sample: sample.accuracy or 0)
    assert worst.name == "p4"
    assert best.accuracy is not None
    for sample in selected:
        assert sample.label is not None
        assert sample.prediction.shape == sample.label.shape == sample.image.shape[:2]
        assert sample.prediction.dtype == np.uint8


def test_samples_are_few_and_distinct() -> None:
    samples = Samples(evenly_spaced=3)
    image = np.zeros((2, 2, 3), np.uint8)
    for index in range(100):
        samples(Sample(f"s{index}", image, image[..., 0], None, index / 100), index, 100)
    assert [sample.name for sample in samples] == ["s16", "s50", "s83", "s0", "s99"]
    few = Samples(evenly_spaced=4)
    few(Sample("only", image, image[..., 0]), 0, 1)
    assert len(list(few)) == 1


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
    ("domain", "split", "match"),
    [
        (Memory(), "test", "test"),
        (Broken(), "train", r"p2_mask\.png .*20 x 11 .*20 x 12"),
        (Broken(fault="ids"), "train", r"p2_mask\.png .* 9.* 0 to 3"),
    ],
)
def test_invalid_labels_raise(domain: Domain, split: Split, match: str) -> None:
    with pytest.raises(DataError, match=match):
        score(Levels(), domain, split)


class Few(nn.Module):
    """A constant score for each of a few classes; may be NaN."""

    def __init__(self, classes: int = 2, value: float = 0.0) -> None:
        super().__init__()
        self.size, self.value = classes, value

    def forward(self, image: Tensor) -> Logits:
        return Logits(image.new_full((len(image), self.size, *image.shape[-2:]), self.value))


def test_networks_with_other_classes_raise() -> None:
    with pytest.raises(RecipeError, match=r"2 classes .* 4"):
        score(Few(), Memory(), "train")
    with pytest.raises(OverflyError, match="p0"):
        score(Few(4, float("nan")), Memory(), "train")
    named: Any = Few(4)
    named.classes = Classes(names=("a", "b", "c", "d"))
    with pytest.raises(RecipeError, match="a, b, c, d"):
        score(named, Memory(), "train")
