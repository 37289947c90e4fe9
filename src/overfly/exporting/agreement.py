"""What a graph says of its own input and answer, compared with what the file's metadata say of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from overfly.core.errors import WeightsError
from overfly.exporting.graph import Output
from overfly.exporting.metadata import FACTS, MADE, ExportSettings
from overfly.exporting.predictor import ModelMetadata

Shape = tuple[int | None, ...]
"""Sides of a value, None where any goes."""
ANSWERS: tuple[str, ...] = get_args(Output)


@dataclass(frozen=True)
class GraphSignature:
    """Both ends of a graph, as the graph itself has them.

    Attributes:
        image: shape of its input; None where the graph does not say how many sides there are.
        output: shape of its answer, likewise.
        whole: whether its answer is of whole numbers.
        name: what its answer is called, or what its last operator gives: one of `ANSWERS` where that can be told.
    """

    image: Shape | None
    output: Shape | None
    whole: bool
    name: str = ""


def check(path: Path, signature: GraphSignature, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """See that a graph is what the metadata of its file say.

    Args:
        path: the file, for messages.
        signature: the graph's own account.
        metadata: the metadata's, of classes and bands.
        settings: the metadata's, of its answer.

    Raises:
        WeightsError: they disagree.
    """
    classes = settings.output == "classes"
    rank = 3 if classes else 4
    if signature.image is not None:
        _same(path, "images of", len(signature.image), 4, "sides")
        _same(path, "images of", signature.image[1], metadata.bands, "bands")
        for side in signature.image[2:]:
            if side is not None and not metadata.fixed:
                raise _other(path, f"takes images of {side} pixels a side only", "images of any size", FACTS)
            _same(path, "images of", side, metadata.window, "pixels a side")
    if signature.output is not None and len(signature.output) != rank:
        raise _other(path, f"gives an answer of {len(signature.output)} sides", f"{settings.output}, of {rank}", MADE)
    if signature.whole != classes:
        kinds = ("fractions", "whole numbers")
        raise _other(path, f"gives {kinds[signature.whole]}", f"{settings.output}, which are {kinds[classes]}", MADE)
    if signature.output is not None and not classes:
        _same(path, "an answer of", signature.output[1], len(metadata.classes), "classes")
    if signature.name in ANSWERS and signature.name != settings.output:
        raise _other(path, f"gives {signature.name}", settings.output, MADE)


def check_given(path: Path, given: Any, metadata: ModelMetadata, settings: ExportSettings) -> None:
    """See that an answer has the classes of the metadata; of class ids, and of shapes left open, no graph tells before.

    Raises:
        WeightsError: it has others.
    """
    count = len(metadata.classes)
    if settings.output == "classes":
        last = int(np.max(given, initial=0))
        if last >= count:
            raise _other(path, f"gives class {last}", f"{count} classes, the last of them {count - 1}", FACTS)
    elif given.ndim != 4 or given.shape[1] != count:
        raise _other(path, f"gives an answer of shape {given.shape}", f"{count} classes", FACTS)


def of_session(session: Any) -> GraphSignature:
    """Both ends of a graph that ONNX Runtime has opened."""
    given, output = session.get_inputs()[0], session.get_outputs()[0]
    shapes = [tuple(side if isinstance(side, int) else None for side in end.shape) for end in (given, output)]
    return GraphSignature(shapes[0], shapes[1], "int" in output.type, output.name)


def of_model(model: Any) -> GraphSignature:
    """Both ends of a graph that OpenVINO has read."""
    output = model.output(0)
    names = [name for name in sorted(output.get_names()) if name in ANSWERS]
    kind: Any = output.get_element_type()
    return GraphSignature(
        _partial(model.input(0).get_partial_shape()),
        _partial(output.get_partial_shape()),
        bool(kind.is_integral()),
        names[0] if names else "",
    )


def of_graph(program: Any) -> GraphSignature:
    """Both ends of a program of torch.export; a last softmax tells probabilities, its lack scores."""
    by_name = {node.name: node for node in program.graph.nodes}
    told = program.graph_signature
    signature = [by_name[names[0]] for names in (told.user_inputs, told.user_outputs)]
    values = [end.meta["val"] for end in signature]
    shapes = [tuple(side if isinstance(side, int) else None for side in value.shape) for value in values]
    whole = not values[1].dtype.is_floating_point
    name = "" if whole else "probabilities" if "softmax" in str(signature[1].target) else "logits"
    return GraphSignature(shapes[0], shapes[1], whole, name)


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


__all__ = ["GraphSignature", "check", "check_given", "of_graph", "of_model", "of_session"]
