"""The result of `overfly adapt`: candidates, the recommended one, reasons for rejections, and the comparison folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from overfly.adaptation.estimate import Estimate
from overfly.adaptation.gate import Gate, geometric_consistency
from overfly.core.errors import RunError
from overfly.core.progress import percent
from overfly.core.spec import NonNegativeInt, Share, Spec
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.training.run import Run

BASELINE = "source only"
"""Name of the network before adaptation, which the others are compared with."""
RECALIBRATED = "recalibrated"
"""Name of the same network with BatchNorm statistics of the target."""
ADAPTED = "adapted"
"""Name of the recipe's network; ``adapted 1``, ``adapted 2`` … for several recipes."""
MAX_SETTINGS = 3
"""Settings that a summary lists; with more, it names the method or their number."""
COLUMNS = (
    "source mIoU", "masked mIoU", "views mIoU", "geometric mIoU", "agreement", "estimated target mIoU", "decision",
)  # fmt: skip
"""Columns of the candidates' table, after the candidate."""


class CandidateReport(Spec):
    """A candidate network."""

    run: str
    """Its run folder, or its weights file."""
    metrics: LabelFreeMetrics
    """Label-free metrics on the target."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings in which its recipe differs from the other adapted ones, such as ``method.mix``."""
    rejections: tuple[str, ...] = ()
    """Reasons to reject it; empty if it is accepted."""
    estimate: Estimate | None = None
    """Estimated target mIoU with an interval; not a measurement."""
    labeled_miou: dict[str, Share | None] = Field(default_factory=dict)
    """mIoU from labels, by domain and split, if it was computed earlier; not used for the selection."""


class Selection(Spec):
    """The recommended candidate, with the metrics and rejections of all."""

    format: Literal[1] = 1
    """Version of this file's format."""
    recommended: str
    """The candidate to use."""
    candidates: dict[str, CandidateReport]
    """All candidates by name."""
    recipes: tuple[dict[str, Any], ...]
    """Recipes of the adapted candidates; the same recipes use the same comparison folder."""
    gate: Gate
    """Bounds of the checks."""
    target: dict[str, Any]
    """The target domain, as in a recipe."""
    familiarity: Share | None = None
    """Familiarity of the target to the network before adaptation; none without held-out source images."""
    reverse_validation: Share | None = None
    """Reverse validation score of that network's predictions on the target; none if it was skipped or not possible."""
    labels_opened: NonNegativeInt
    """Target labels that were read for training and selection: those of target images that are source images too."""

    @property
    def summary(self) -> str:
        """The recommendation in one sentence."""
        rejected = [name for name, report in self.candidates.items() if report.rejections]
        tail = f"; rejected: {_join_names(rejected)}" if rejected else ""
        if self.recommended == BASELINE:
            return f"recommended: {BASELINE}{tail or '; there is no other candidate'}"
        best = self.candidates[self.recommended]
        settings = settings_text(best.settings)
        others = [name for name in self.candidates if name not in (BASELINE, self.recommended, *rejected)]
        value = geometric_consistency(best.metrics)
        lower = [
            name
            for name in others
            if value - geometric_consistency(self.candidates[name].metrics) >= self.gate.tolerance
        ]
        similar = [name for name in others if name not in lower]
        text = f"recommended: {self.recommended}{f' ({settings})' if settings else ''}, accepted by all checks"
        text += f"; geometric consistency higher than {_join_names(lower)}" if lower else ""
        text += f"; geometric consistency similar to {_join_names(similar)}" if similar else ""
        return text + tail

    @property
    def familiarity_summary(self) -> str:
        """Familiarity and reverse validation in words."""
        if self.familiarity is None:
            return "Familiarity of the target is unknown: the source has no held-out images."
        known = f"Familiarity of the target to the source-only network: {100 * self.familiarity:.0f} %"
        if self.reverse_validation is None:
            return f"{known}. Reverse validation was skipped or not possible."
        return f"{known}; reverse validation: {100 * self.reverse_validation:.0f} %."

    @property
    def differences(self) -> list[str]:
        """Run folder and differing settings of each adapted candidate, if there are several."""
        return [
            f"{name}: {Path(report.run).name} ({settings_text(report.settings, most=None)})"
            for name, report in self.candidates.items()
            if report.settings
        ]

    @property
    def reasons(self) -> list[str]:
        """Reasons of all rejections, with the candidate's name in front."""
        return [
            f"{name} rejected: {reason}" for name, report in self.candidates.items() for reason in report.rejections
        ]

    def rows(self) -> list[list[str]]:
        """Rows of the candidates' table: the name, then a cell per entry of `COLUMNS`, in percent."""
        rows = []
        for name, report in self.candidates.items():
            metrics, estimate = report.metrics, report.estimate
            values = [
                metrics.source_miou, metrics.masked_miou, metrics.views_miou, geometric_consistency(metrics),
                metrics.agreement,
            ]  # fmt: skip
            interval = f" ({percent(estimate.low, 1)} to {percent(estimate.high, 1)})" if estimate else ""
            decision = "rejected" if report.rejections else "baseline" if name == BASELINE else "accepted"
            decision = "recommended" if name == self.recommended else decision
            estimated = percent(estimate.miou if estimate else None, 1) + interval
            rows.append([name, *(percent(value, 1) for value in values), estimated, decision])
        return rows

    def table(self) -> str:
        """The candidates as a Markdown table, in percent."""
        lines = [["candidate", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *self.rows()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def markdown(self) -> str:
        """The selection as a Markdown page."""
        differences = [f"- {line}" for line in self.differences]
        reasons = [f"- {line}" for line in self.reasons]
        return "\n".join(
            [
                "# Selection", "", self.summary[0].upper() + self.summary[1:] + ".", "", self.table(), "",
                *(["Settings of the adapted candidates:", "", *differences, ""] if differences else []),
                *(["Reasons:", "", *reasons, ""] if reasons else []),
                "All values are mIoU in percent. *Source* is computed on the source's held-out labels. *Masked* and "
                "*views* compare predictions on target images with those on masked and perturbed images, over the "
                "classes that the source-only network predicts there; *geometric* is the rotated, flipped and scaled "
                "part of *views*, by which accepted candidates are compared. *Agreement* compares predictions with "
                "those of the source-only network. The *estimated* target mIoU is not a measurement and not used for "
                f"the selection. Target labels opened: {self.labels_opened}.", "",
                self.familiarity_summary, "",
                "![Target images and the candidates' predictions](samples/selection.png)", "",
            ]
        )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A comparison folder: ``selection.json``, ``selection.md``, ``recommended.safetensors``, ``samples/``."""

    path: Path

    @classmethod
    def find_all(cls, folder: Path) -> list[Comparison]:
        """Find comparisons: the folder itself, and those in it, by name."""
        files = [folder / "selection.json", *sorted(folder.glob("*_comparison*/selection.json"))]
        return [cls(file.parent) for file in files if file.is_file()]

    @property
    def weights(self) -> Path:
        """The recommended network: weights, classes and normalization."""
        return self.path / "recommended.safetensors"

    @cached_property
    def selection(self) -> Selection:
        """The content of ``selection.json``.

        Raises:
            RunError: the file is damaged or of another format version.
        """
        file = self.path / "selection.json"
        try:
            return Selection.model_validate_json(file.read_bytes())
        except (ValidationError, OSError):
            raise RunError(
                f"{file} is damaged or of another version of overfly; delete the folder and run `overfly adapt` again"
            ) from None

    def run(self, candidate: str) -> Run | None:
        """The run of a candidate, beside this folder or at its recorded path; None for a weights file or a lost run."""
        path = Path(self.selection.candidates[candidate].run)
        folders = (self.path.parent / path.name, path)
        return next((Run.open(folder) for folder in folders if (folder / "recipe.yaml").is_file()), None)

    def recommended_run(self) -> Run | None:
        """The run of the recommended candidate; None for a weights file or a lost run."""
        return self.run(self.selection.recommended)


def is_comparison(path: Path) -> bool:
    """Return True if a path is a comparison folder."""
    return (path / "selection.json").is_file() and not (path / "recipe.yaml").is_file()


def resolve_checkpoint(path: Path) -> Path:
    """Return the path, or for a comparison folder the run or weights file of its recommended candidate."""
    if not is_comparison(path):
        return path
    run = Comparison(path).recommended_run()
    return Comparison(path).weights if run is None else run.path


def settings_text(settings: Mapping[str, Any], most: int | None = MAX_SETTINGS) -> str:
    """Format settings of `CandidateReport`; the method's name if there are more than ``most``; None: no limit."""
    if most is None or len(settings) <= most:
        return ", ".join(f"{name.removeprefix('method.')} {value_text(value)}" for name, value in settings.items())
    method = settings.get("method.name")
    return f"method {method}" if method else f"{len(settings)} settings"


def value_text(value: object) -> str:
    """A setting's value as text: names of specs, lists joined by +, none."""
    if isinstance(value, Mapping):
        return value_text(value.get("name"))
    if isinstance(value, list):
        return " + ".join(map(value_text, value)) or "none"
    return "none" if value is None else str(value)


def _join_names(names: Sequence[str]) -> str:
    """Format a list as ``a, b and c``."""
    return re.sub(r", ([^,]*)$", r" and \1", ", ".join(names))
