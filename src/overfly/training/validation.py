"""Validation during training: source mIoU on held-out labels, and label-free metrics of the target."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn

from overfly.core.errors import NotFiniteError
from overfly.evaluation.images import MetricOptions, unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics_of_images
from overfly.evaluation.score import score
from overfly.methods.method import Method, Networks
from overfly.recipe import Recipe
from overfly.training.engine import run_on_rank_zero

TARGET_IMAGES = 24
"""Target images of every validation, each center-cropped to the size of a training crop."""


class Validator:
    """Scores the networks of one run. It changes no random state and no network.

    Args:
        recipe: the experiment.
        nets: its networks.
        fabric: launched.
    """

    def __init__(self, recipe: Recipe, nets: Networks, fabric: Fabric) -> None:
        self.recipe, self.nets, self.fabric = recipe, nets, fabric

    def source_miou(self, workers: int = 0) -> float | None:
        """Mean IoU, 0 to 1, on the source's held-out labels, which the processes share.

        Returns:
            None, in all processes, where the predictions of one are not finite.
        """
        recipe = self.recipe
        try:
            return score(
                recipe.method.deployed(self.nets), recipe.domain("source"), recipe.validation.split,
                resize=recipe.resize, window=recipe.window, device=self.fabric.device, workers=workers,
                shard=(self.fabric.global_rank, self.fabric.world_size),
            ).miou  # fmt: skip
        except NotFiniteError:  # normalization statistics of the first steps may overflow
            return None

    def target_metrics(self, source_miou: float | None = None) -> LabelFreeMetrics | None:
        """Label-free metrics of the deployed network, computed by the first process.

        Args:
            source_miou: stored beside them.

        Returns:
            None where the network's predictions are not finite.
        """
        method = self.recipe.method

        def work() -> LabelFreeMetrics | None:
            try:
                metrics = label_free_metrics_of_images(
                    method.deployed(self.nets), self.images, self.recipe.domain("target").max_value, self.options,
                    reference=reference(method, self.nets),
                )  # fmt: skip
            except NotFiniteError:
                return None
            return metrics.model_copy(update={"source_miou": source_miou})

        return run_on_rank_zero(self.fabric, work)

    @cached_property
    def images(self) -> list[Tensor]:
        """The target images, without labels, read once."""
        return list(unlabeled_images(self.recipe.domain("target"), "train", self.options))

    @property
    def options(self) -> MetricOptions:
        """Which target images metrics are computed on, and how they are predicted."""
        recipe = self.recipe
        return MetricOptions(TARGET_IMAGES, recipe.crop, recipe.resize, recipe.window, self.fabric.device)


def reference(method: Method[Any], nets: Networks) -> nn.Module | None:
    """The network that the deployed one is compared with: the other of teacher and student; None without a teacher.

    A network derived from one of them for deployment, such as one with folded normalization, counts as that one.
    """
    teacher = getattr(nets, "teacher", None)
    if not isinstance(teacher, nn.Module):
        return None
    return teacher if method.deployed(nets) is nets.student else nets.student


def log_entry(metrics: LabelFreeMetrics) -> dict[str, Any]:
    """Label-free metrics as values of a log line; those that are not numbers stand under ``details``."""
    details = {"shares", "by_view", "images"}
    return {**metrics.model_dump(exclude=details), "details": metrics.model_dump(include=details)}


def logged_source_miou(rows: list[dict[str, Any]], step: int) -> float | None:
    """The source mIoU that was logged at a step, or None."""
    values = [row.get("source_miou") for row in rows if row.get("event") == "validation" and row["step"] == step]
    return values[-1] if values else None
