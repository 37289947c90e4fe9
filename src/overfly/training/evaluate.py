"""Scoring a run and writing down what was found, and how often labels were opened for it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import ValidationError

from overfly.core.errors import DataError, RecipeError
from overfly.data.domain import Domain, Split, SplitError
from overfly.evaluation.samples import Samples
from overfly.evaluation.score import score
from overfly.evaluation.scores import Scores
from overfly.training.run import Run

Role = Literal["source", "target"]
SMALLEST_WINDOW = 16
"""Side of a window in pixels below which scoring would take for ever and mean nothing."""
MOST_OVERLAP = 0.9
"""Share of a window that the next may cover again."""


def assess(
    run: Run,
    domain: Domain,
    key: str,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    window: int | None = None,
    overlap: float = 0.25,
    samples: Samples | None = None,
    workers: int = 0,
    checkpoint: int | None = None,
) -> Scores:
    """Score a run's network on a split and record it in ``scores.json``.

    Args:
        run: finished.
        domain: whose labels are read.
        key: what the domain is called in ``scores.json``: source, target, or a name.
        split: which pictures.
        device: where the network runs.
        window: side of overlapping windows in pixels; 0: whole pictures; None: as the recipe says.
        overlap: share of a window that the next one covers again.
        samples: keeps a few pictures to draw.
        workers: threads that read ahead.
        checkpoint: the step of a kept validation, to score its weights instead of the run's own.

    Raises:
        DataError: no picture of the split has a label.
        RunError: the run is not finished.
    """
    chosen = (run.recipe.window if window is None else window) or None
    if chosen is not None and chosen < SMALLEST_WINDOW:
        raise RecipeError(f"windows of {chosen} pixels are too small; take {SMALLEST_WINDOW} or more, or 0 for none")
    if not 0 <= overlap <= MOST_OVERLAP:
        raise RecipeError(f"an overlap of {overlap:g} is none; take a share from 0 to {MOST_OVERLAP}")
    found = score(
        run.segmenter(checkpoint), domain, split,
        resize=run.recipe.resize, device=device, window=chosen, overlap=overlap, samples=samples, workers=workers,
    )  # fmt: skip
    scores = _opened(run, key, split, found.labels_opened)
    place = scores if checkpoint is None else scores.setdefault("checkpoints", {}).setdefault(f"step-{checkpoint}", {})
    place[f"{key}/{split}"] = found.model_dump(mode="json")
    run.record("scores.json", scores)
    step = run_length(run) if checkpoint is None else checkpoint
    run.journal.write(step, event="scored", domain=key, split=split, miou=found.miou)
    return found


def note_opened(run: Run, key: str, split: Split, images: int) -> None:
    """Write down that labels were read for something else than scores, such as pictures of a report.

    Args:
        run: whose ``scores.json``.
        key: source or target.
        split: which pictures.
        images: labels that were read.
    """
    run.record("scores.json", _opened(run, key, split, images))


def _opened(run: Run, key: str, split: Split, images: int) -> dict[str, Any]:
    """What ``scores.json`` holds, labels of a split counted as opened once more."""
    scores = run.scores
    opened = scores.setdefault("labels_opened", {})
    before = opened.get(f"{key}/{split}", {"times": 0, "images": 0})
    opened[f"{key}/{split}"] = {"times": before["times"] + 1, "images": before["images"] + images}
    return scores


def recorded(run: Run, key: str, split: Split, domain: Domain, checkpoint: int | None = None) -> Scores | None:
    """What was found earlier for this domain in the recipe's own way of scoring, or None; reading it opens no label."""
    try:
        place = run.scores if checkpoint is None else run.scores["checkpoints"][f"step-{checkpoint}"]
        found = Scores.model_validate(place[f"{key}/{split}"])
    except (KeyError, ValidationError):
        return None
    same = (found.protocol.resize, found.protocol.window) == (run.recipe.resize, run.recipe.window)
    return found if same and found.domain == domain.model_dump(mode="json") else None


def labeled(domain: Domain, split: Split) -> bool:
    """Whether a domain has this split, and labels in it."""
    try:
        return any(item.label is not None for item in domain.items(split))
    except SplitError:
        return False


def run_length(run: Run) -> int:
    """The last step that the journal knows."""
    return max((int(row.get("step", 0)) for row in run.journal.rows()), default=0)


def roles(run: Run, which: str) -> list[tuple[str, Domain]]:
    """The domains of a run's recipe that ``which`` means: source, target or both.

    Raises:
        DataError: the recipe has no such domain.
    """
    pairs = [("source", run.recipe.source), ("target", run.recipe.target)]
    chosen = [(key, domain) for key, domain in pairs if domain is not None and which in (key, "both")]
    if not chosen:
        raise DataError(f"{run.path} has no {which} domain; name a domain file instead, such as --domain mine.yaml")
    return chosen
