"""Validation during training, and evaluation of a finished run with the number of labels read for it."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from overfly.core.atomic_files import json_sha256
from overfly.core.errors import DataError, NotFiniteError, OverflyError, RecipeError
from overfly.core.progress import print_status
from overfly.data.domain import Domain, Split, split_items
from overfly.data.headers import file_stamp
from overfly.data.loading import MAX_SIDE
from overfly.evaluation.images import MetricOptions, unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, prediction_statistics
from overfly.evaluation.score import Samples, score
from overfly.evaluation.scores import Scores
from overfly.methods.method import Method, Networks
from overfly.models.checkpoints import weights_sha256
from overfly.recipe import Recipe
from overfly.training.engine import run_on_rank_zero
from overfly.training.run import Run

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Role = Literal["source", "target"]
MIN_WINDOW = 16
"""Smallest side of a window, in pixels."""
MAX_OVERLAP = 0.9
"""Largest share of a window that the next one overlaps."""
TARGET_IMAGES = 24
"""Target images of every validation, each center-cropped to the size of a training crop."""


def evaluate_domain(
    run: Run, domain: Domain, key: str, split: Split, *, device: torch.device | str = "cpu", window: int | None = None,
    resize: int | None = None, overlap: float = 0.25, samples: Samples | None = None, workers: int = 0,
    checkpoint: int | None = None,
) -> Scores:  # fmt: skip
    """Score a finished run's network on a split and store the scores in ``scores.json``.

    There, ``key`` is the name of the domain: source, target, or another. ``window`` is the side of overlapping windows
    in pixels (0: whole images; None: the recipe's), ``overlap`` the share of a window that the next one overlaps, 0 to
    0.9. ``resize`` is the side of the square that images are resized to, masks are not (0: unchanged; None: the
    recipe's). ``workers`` threads read ahead. ``checkpoint`` is the validation step whose weights are scored; None: the
    final weights. Raises `DataError`: no image of the split has a label, and `RecipeError`: window, resize or overlap
    is out of range, and `RunError`: the run is not finished.
    """
    side = (run.recipe.window if window is None else window) or None
    square = (run.recipe.resize if resize is None else resize) or None
    for name, value in (("window", side), ("resize", square)):
        if value is not None and not MIN_WINDOW <= value <= MAX_SIDE:
            raise RecipeError(f"{name} must be 0, or {MIN_WINDOW} to {MAX_SIDE} pixels, got {value}")
    if not 0 <= overlap <= MAX_OVERLAP:
        raise RecipeError(f"overlap must be between 0 and {MAX_OVERLAP}, got {overlap:g}")
    weights = run.weights if checkpoint is None else run.weights_at(checkpoint)
    result = score(
        run.segmenter(checkpoint), domain, split,
        resize=square, device=device, window=side, overlap=overlap, samples=samples, workers=workers,
    )  # fmt: skip
    stored = record_opened_labels(run, key, split, result.labels_opened)
    scores = stored if checkpoint is None else stored.setdefault("checkpoints", {}).setdefault(f"step-{checkpoint}", {})
    digests = {"weights_sha256": weights_sha256(weights), "files_sha256": _files_sha256(domain, split)}
    result = result.model_copy(update=digests)
    scores[f"{key}/{split}"] = result.model_dump(mode="json")
    run.write_json("scores.json", stored)
    step = max((row["step"] for row in run.log.rows()), default=0) if checkpoint is None else checkpoint
    run.log.write(step, event="scored", domain=key, split=split, miou=result.miou)
    return result


def record_opened_labels(run: Run, key: str, split: Split, images: int) -> dict[str, Any]:
    """Add the reading of ``images`` labels of a domain and split to ``scores.json``, and return its contents."""
    stored = run.scores
    opened = stored.setdefault("labels_opened", {})
    before = opened.get(f"{key}/{split}", {"times": 0, "images": 0})
    opened[f"{key}/{split}"] = {"times": before["times"] + 1, "images": before["images"] + images}
    run.write_json("scores.json", stored)
    return stored


def stored_scores(run: Run, key: str, split: Split, domain: Domain, checkpoint: int | None = None) -> Scores | None:
    """Return the scores of a domain in ``scores.json``.

    None if resize or window are not the recipe's, or weights, images or masks changed since; files that cannot be
    listed now, as on another machine, count as unchanged.
    """
    try:
        stored = run.scores if checkpoint is None else run.scores["checkpoints"][f"step-{checkpoint}"]
        scores = Scores.model_validate(stored[f"{key}/{split}"])
    except (KeyError, ValidationError):
        return None
    same = (scores.protocol.resize, scores.protocol.window) == (run.recipe.resize, run.recipe.window)
    if not same or scores.domain != domain.model_dump(mode="json"):
        return None
    weights = run.weights if checkpoint is None else run.weights_at(checkpoint)
    changed = weights.is_file() and scores.weights_sha256 not in (None, weights_sha256(weights))
    if scores.files_sha256 not in (None, _files_sha256(domain, split) or scores.files_sha256) or changed:
        print_status(f"{run.path}: weights, images or masks changed since {key}/{split} was scored: not used")
        return None
    return scores


def _files_sha256(domain: Domain, split: Split) -> str | None:
    """Digest of the names of a split's images, and of size and time of their files; None if they cannot be listed."""
    try:
        return json_sha256([(item.name, _stamp(item.image), _stamp(item.label)) for item in domain.items(split)])
    except (OverflyError, OSError):
        return None


def training_files_sha256(recipe: Recipe) -> str | None:
    """Return the digest of the images and masks that a recipe trains on, as `Run.fits` compares it."""
    domains = [recipe.source, recipe.target if recipe.method.needs_target else None]
    digests = [_files_sha256(domain, "train") for domain in domains if domain is not None]
    return None if None in digests else json_sha256(digests)


def _stamp(file: object) -> object:
    """Size and time of a file; of others, their own stamp, or whether there is one."""
    return file_stamp(file) if isinstance(file, Path) else getattr(file, "stamp", file is not None)


def has_labels(domain: Domain, split: Split) -> bool:
    """Return whether a split of a domain has a label."""
    return any(item.label is not None for item in split_items(domain, split))


def domain_roles(run: Run, which: str) -> list[tuple[str, Domain]]:
    """Return a recipe's domains by role (source, target or both); raise `DataError` if the recipe has none of them."""
    pairs = [("source", run.recipe.source), ("target", run.recipe.target)]
    selected = [(key, domain) for key, domain in pairs if domain is not None and which in (key, "both")]
    if not selected:
        raise DataError(f"{run.path} has no {which} domain; give a domain file instead, such as --domain mine.yaml")
    return selected


class Evaluator:
    """Score the networks of a run during training, without changing random state or networks."""

    def __init__(self, recipe: Recipe, nets: Networks, fabric: "Fabric") -> None:
        self.recipe, self.nets, self.fabric = recipe, nets, fabric

    def source_miou(self, workers: int = 0) -> float | None:
        """Return the mIoU (0 to 1) on the source's held-out labels; the processes share the images.

        Returns None in all processes if a prediction is not finite.
        """
        recipe = self.recipe
        try:
            return score(
                recipe.method.inference_network(self.nets), recipe.domain("source"), recipe.validation.split,
                resize=recipe.resize, window=recipe.window, device=self.fabric.device, workers=workers,
                shard=(self.fabric.global_rank, self.fabric.world_size),
            ).miou  # fmt: skip
        except NotFiniteError:  # normalization statistics of the first steps may overflow
            return None

    def target_metrics(self, source_miou: float | None = None) -> LabelFreeMetrics | None:
        """Return label-free metrics of the inference network, from the first process; None if they are not finite.

        ``source_miou`` is stored with the metrics.
        """
        method = self.recipe.method

        def work() -> LabelFreeMetrics | None:
            try:
                metrics = prediction_statistics(
                    method.inference_network(self.nets), self.images, self.recipe.domain("target").max_value,
                    self.options, reference=reference(method, self.nets),
                ).metrics()  # fmt: skip
            except NotFiniteError:
                return None
            return metrics.model_copy(update={"source_miou": source_miou})

        return run_on_rank_zero(self.fabric, work)

    @cached_property
    def images(self) -> list[Tensor]:
        """The target images without labels, read once."""
        return list(unlabeled_images(self.recipe.domain("target"), "train", self.options))

    @property
    def options(self) -> MetricOptions:
        """Number, crop, resize and window of the target images."""
        recipe = self.recipe
        return MetricOptions(TARGET_IMAGES, recipe.crop, recipe.resize, recipe.window, self.fabric.device)


def reference(method: Method[Any], nets: Networks) -> nn.Module | None:
    """Return the network to compare the inference network with: student or teacher; None without a teacher."""
    teacher = getattr(nets, "teacher", None)
    if not isinstance(teacher, nn.Module):
        return None
    return teacher if method.inference_network(nets) is nets.student else nets.student


def log_entry(metrics: LabelFreeMetrics) -> dict[str, Any]:
    """Return label-free metrics as values of a log line; those that are not numbers are under ``details``."""
    details = {"shares", "by_view", "images"}
    return {**metrics.model_dump(exclude=details), "details": metrics.model_dump(include=details)}


def logged_source_miou(rows: list[dict[str, Any]], step: int) -> float | None:
    """Return the source mIoU logged at a step, or None."""
    values = [row.get("source_miou") for row in rows if row.get("event") == "validation" and row["step"] == step]
    return values[-1] if values else None
