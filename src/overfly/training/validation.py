"""What a validation looks at: the source's held-out labels, and fixed pictures of the target without labels."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn

from overfly.core.errors import NotFiniteError
from overfly.evaluation.images import unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics_of_images
from overfly.evaluation.score import score
from overfly.methods.method import Method, Networks
from overfly.recipe import Recipe
from overfly.training.engine import on_main

WATCHED = 24
"""Pictures of the target that every validation looks at, the middle of each in the size of a crop."""


class Watch:
    """The validations of one run. They read no random state and change none, nor any network."""

    def __init__(self, recipe: Recipe, nets: Networks, fabric: Fabric) -> None:
        self.recipe, self.nets, self.fabric = recipe, nets, fabric

    def source(self, workers: int = 0) -> float | None:
        """Mean IoU on the source's held-out labels, every process its share of the pictures; None if not finite."""
        recipe = self.recipe
        try:
            return score(
                recipe.method.deployed(self.nets),
                recipe.domain("source"),
                recipe.validation.split,
                resize=recipe.resize,
                window=recipe.window,
                device=self.fabric.device,
                workers=workers,
                shard=(self.fabric.global_rank, self.fabric.world_size),
            ).miou
        except NotFiniteError:  # statistics of the first steps may not hold yet
            return None

    def target(self, source_miou: float | None = None) -> LabelFreeMetrics | None:
        """Label-free figures of the network that would be shipped now; the first process works, the others wait.

        Args:
            source_miou: what `source` found, to stand beside them.

        Returns:
            None where the network's scores are not finite.
        """

        def work() -> LabelFreeMetrics | None:
            try:
                found = label_free_metrics_of_images(
                    self.recipe.method.deployed(self.nets),
                    self.images,
                    self.recipe.domain("target").max_value,
                    reference=reference(self.recipe.method, self.nets),
                    window=self.recipe.window,
                    device=self.fabric.device,
                )
            except NotFiniteError:
                return None
            return found.model_copy(update={"source_miou": source_miou})

        return on_main(self.fabric, work)

    @cached_property
    def images(self) -> list[Tensor]:
        """The pictures, read once, labels taken away before."""
        recipe = self.recipe
        domain = recipe.domain("target")
        return list(unlabeled_images(domain, "train", limit=WATCHED, resize=recipe.resize, crop=recipe.crop))


def reference(method: Method[Any], nets: Networks) -> nn.Module | None:
    """What the deployed network is compared with: the student, where a teacher is deployed; else a teacher, or None.

    A network that is made of one of the two for deployment, such as one with normalizations folded, counts as that one.
    """
    teacher = getattr(nets, "teacher", None)
    if not isinstance(teacher, nn.Module):
        return None
    return teacher if method.deployed(nets) is nets.student else nets.student


def journalled(found: LabelFreeMetrics) -> dict[str, Any]:
    """A line of the journal: the validators as its figures, the rest under ``looked``."""
    rest = ("shares", "by_view", "images", "labels_opened")
    return {**found.model_dump(exclude=set(rest)), "looked": found.model_dump(include=set(rest))}


def label_free_metrics_at(rows: list[dict[str, Any]], step: int) -> LabelFreeMetrics | None:
    """What `journalled` wrote at a step, or None."""
    for row in reversed(rows):
        if row.get("event") == "label-free" and row["step"] == step:
            values = {key: value for key, value in row.items() if key not in ("step", "event", "looked")}
            return LabelFreeMetrics.model_validate({**values, **row["looked"]})
    return None


def source_miou_at(rows: list[dict[str, Any]], step: int) -> float | None:
    """The source mIoU that was journalled at a step, or None."""
    found = [row.get("source_miou") for row in rows if row.get("event") == "validation" and row["step"] == step]
    return found[-1] if found else None


__all__ = ["WATCHED", "Watch", "journalled", "label_free_metrics_at", "reference", "source_miou_at"]
