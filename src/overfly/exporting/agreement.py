"""What a graph says of its own input and answer, compared with what the file's metadata say of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from overfly.core.errors import WeightsError
from overfly.exporting.graph import Answer
from overfly.exporting.metadata import FACTS, MADE, Made
from overfly.exporting.predictor import Facts

Shape = tuple[int | None, ...]
"""Sides of a value, None where any goes."""
ANSWERS: tuple[str, ...] = get_args(Answer)


@dataclass(frozen=True)
class Ends:
    """Both ends of a graph, as the graph itself has them.

    Attributes:
        image: shape of its input; None where the graph does not say how many sides there are.
        answer: shape of its answer, likewise.
        whole: whether its answer is of whole numbers.
        name: what its answer is called, or what its last operator gives: one of `ANSWERS` where that can be told.
    """

    image: Shape | None
    answer: Shape | None
    whole: bool
    name: str = ""


def check(path: Path, ends: Ends, facts: Facts, made: Made) -> None:
    """See that a graph is what the metadata of its file say.

    Args:
        path: the file, for messages.
        ends: the graph's own account.
        facts: the metadata's, of classes and bands.
        made: the metadata's, of its answer.

    Raises:
        WeightsError: they disagree.
    """
    classes = made.answer == "classes"
    rank = 3 if classes else 4
    if ends.image is not None:
        _same(path, "images of", len(ends.image), 4, "sides")
        _same(path, "images of", ends.image[1], facts.bands, "bands")
        for side in ends.image[2:]:
            if side is not None and not facts.fixed:
                raise _other(path, f"takes images of {side} pixels a side only", "images of any size", FACTS)
            _same(path, "images of", side, facts.window, "pixels a side")
    if ends.answer is not None and len(ends.answer) != rank:
        raise _other(path, f"gives an answer of {len(ends.answer)} sides", f"{made.answer}, of {rank}", MADE)
    if ends.whole != classes:
        kinds = ("fractions", "whole numbers")
        raise _other(path, f"gives {kinds[ends.whole]}", f"{made.answer}, which are {kinds[classes]}", MADE)
    if ends.answer is not None and not classes:
        _same(path, "an answer of", ends.answer[1], len(facts.classes), "classes")
    if ends.name in ANSWERS and ends.name != made.answer:
        raise _other(path, f"gives {ends.name}", made.answer, MADE)


def check_given(path: Path, given: Any, facts: Facts, made: Made) -> None:
    """See that an answer has the classes of the metadata; of class ids, and of shapes left open, no graph tells before.

    Raises:
        WeightsError: it has others.
    """
    count = len(facts.classes)
    if made.answer == "classes":
        last = int(np.max(given, initial=0))
        if last >= count:
            raise _other(path, f"gives class {last}", f"{count} classes, the last of them {count - 1}", FACTS)
    elif given.ndim != 4 or given.shape[1] != count:
        raise _other(path, f"gives an answer of shape {given.shape}", f"{count} classes", FACTS)


def of_session(session: Any) -> Ends:
    """Both ends of a graph that ONNX Runtime has opened."""
    given, answer = session.get_inputs()[0], session.get_outputs()[0]
    shapes = [tuple(side if isinstance(side, int) else None for side in end.shape) for end in (given, answer)]
    return Ends(shapes[0], shapes[1], "int" in answer.type, answer.name)


def of_model(model: Any) -> Ends:
    """Both ends of a graph that OpenVINO has read."""
    answer = model.output(0)
    names = [name for name in sorted(answer.get_names()) if name in ANSWERS]
    kind: Any = answer.get_element_type()
    return Ends(
        _partial(model.input(0).get_partial_shape()),
        _partial(answer.get_partial_shape()),
        bool(kind.is_integral()),
        names[0] if names else "",
    )


def of_graph(program: Any) -> Ends:
    """Both ends of a program of torch.export; a last softmax tells probabilities, its lack scores."""
    by_name = {node.name: node for node in program.graph.nodes}
    told = program.graph_signature
    ends = [by_name[names[0]] for names in (told.user_inputs, told.user_outputs)]
    values = [end.meta["val"] for end in ends]
    shapes = [tuple(side if isinstance(side, int) else None for side in value.shape) for value in values]
    whole = not values[1].dtype.is_floating_point
    name = "" if whole else "probabilities" if "softmax" in str(ends[1].target) else "logits"
    return Ends(shapes[0], shapes[1], whole, name)


def _partial(shape: Any) -> Shape | None:
    if shape.rank.is_dynamic:
        return None
    return tuple(None if side.is_dynamic else int(side.get_length()) for side in shape)


def _same(path: Path, what: str, found: int | None, wanted: int, unit: str) -> None:
    if found is not None and found != wanted:
        verb = "takes" if what.startswith("images") else "gives"
        raise _other(path, f"{verb} {what} {found} {unit}", f"{wanted}", FACTS)


def _other(path: Path, graph: str, said: str, key: str) -> WeightsError:
    return WeightsError(
        f"{path}: its graph {graph}, its metadata (key {key}) say {said}; one of them was changed, export it again"
    )


__all__ = ["Ends", "check", "check_given", "of_graph", "of_model", "of_session"]
