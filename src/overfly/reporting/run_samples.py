"""The pictures of a run, in its folder samples."""

from __future__ import annotations

from pathlib import Path

from overfly.core.errors import RunError
from overfly.data.domain import Domain
from overfly.evaluation.panels import confusion_figure, panels
from overfly.evaluation.samples import Samples
from overfly.evaluation.scores import Scores
from overfly.reporting.curves import curves
from overfly.training.run import Run


def samples_folder(run: Run) -> Path:
    """The folder of a run's pictures, made.

    Raises:
        RunError: a file has its name.
    """
    folder = run.path / "samples"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, and pictures are drawn into a folder of this name; move it away")
    folder.mkdir(exist_ok=True)
    return folder


def draw(run: Run, name: str, domain: Domain, scores: Scores, samples: Samples) -> list[Path]:
    """Draw panels, the confusion matrix and the curves of training into the run's folder.

    Args:
        run: whose folder.
        name: stem of the files, such as target-val.
        domain: whose classes and colors.
        scores: with the confusion matrix.
        samples: a few pictures with their predictions.

    Returns:
        The files.
    """
    folder = samples_folder(run)
    drawn = [folder / f"{name}.png", folder / f"{name}-confusion.png", folder / "curves.png"]
    panels(samples, domain.classes, drawn[0])
    confusion_figure(scores.confusion, domain.classes, drawn[1])
    curves(list(run.log.rows()), drawn[2])
    return drawn


__all__ = ["draw", "samples_folder"]
