"""A second class layer beside the student's, and what both say of the same images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Optim
from overfly.core.records import Logits
from overfly.methods.method import Networks
from overfly.models.segmenter import Segmenter


class Twins(Networks):
    """A student and a second class layer; the student with its own is what is validated, saved and shipped."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.twin = second_class_layer(student)


class Views(NamedTuple):
    """What two class layers say of the same images.

    Attributes:
        logits: the student's, at the image's size.
        twin: class scores of the second class layer (B, K, H, W), at the image's size.
    """

    logits: Logits
    twin: Tensor


def class_layer(student: nn.Module) -> nn.Module:
    """The part of a student that reads one map and gives its class scores.

    Raises:
        RecipeError: its network does not say which it is.
    """
    network = _segmenter(student).network
    return network.get_submodule(network.class_layer)


def second_class_layer(student: nn.Module) -> nn.Module:
    """A class layer of the same form as the student's, its weights newly drawn.

    Raises:
        RecipeError: the student's network does not say which of its parts is the class layer.
    """
    twin = copy.deepcopy(class_layer(student))
    for part in twin.modules():
        redraw = getattr(part, "reset_parameters", None)
        if redraw is not None:
            redraw()
    return twin


def look(student: nn.Module, twin: nn.Module, *images: Tensor) -> tuple[list[Views], Tensor]:
    """One forward pass of several sets of images (B, C, H, W) through both class layers; see `together` for why one.

    Returns:
        What both say of each set, and the map (B of all sets, F, h, w) that both have read.
    """
    batch = torch.cat(images)
    with _reading(class_layer(student)) as read:
        logits: Logits = student(batch)
    scores = enlarged(student, twin(read[0]), batch)
    views, begin = [], 0
    for part in images:
        which = slice(begin, begin := begin + len(part))
        views.append(Views(logits.of(which), scores[which]))
    return views, read[0]


def enlarged(student: nn.Module, scores: Tensor, images: Tensor) -> Tensor:
    """Scores (B, K, h, w) of a class layer at the size of the images (B, C, H, W)."""
    height, width = images.shape[-2:]
    return _segmenter(student).enlarge(scores, height, width)


def twin_optimizer(twin: nn.Module, optim: Optim) -> Optimizer:
    """The optimizer of a second class layer, which learns at the rate of heads."""
    return optim.optimizer(twin, [name for name, _ in twin.named_parameters()])


def _segmenter(student: nn.Module) -> Segmenter:
    """The student, whose network names its class layer."""
    if isinstance(student, Segmenter) and student.network.class_layer:
        return student
    name = getattr(student, "architecture", type(student).__name__)
    raise RecipeError(
        f"this method gives a network a second class layer, and {name} does not say which of its parts that is; set "
        "class_layer in the network's class, or choose another model"
    )


@contextmanager
def _reading(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer is given while this lasts."""
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        handle.remove()
