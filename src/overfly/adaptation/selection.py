"""The result of `overfly adapt`: candidates, the recommended one, reasons for rejections, and the comparison folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from overfly.adaptation.estimate import Estimate
from overfly.adaptation.gate import UNSURE, Check, Gate, passes
from overfly.adaptation.labels import LEARNED, TileScores
from overfly.core.atomic_files import read_json
from overfly.core.errors import RunError, markdown_text, render_text
from overfly.core.progress import percent
from overfly.core.spec import NonNegativeInt, Share, Spec
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.models.checkpoints import weights_sha256
from overfly.recipe import Recipe
from overfly.training.run import Run

BASELINE = "source only"
"""Name of the network before adaptation, which the others are compared with."""
ADAPTED = "adapted"
"""Name of the recipe's network; ``adapted 1``, ``adapted 2`` … for several recipes."""
MAX_SETTINGS = 3
"""Settings that a summary lists; with more, it names the method or their number."""
CHECKED = ("source mIoU", "nuclear norm", "classes", "consistency", "agreement")
"""Checks of a candidate, each with a column."""
COLUMNS = (*CHECKED, "own source mIoU", "score", "better", "estimate", "decision")
"""Columns of the candidates' table, after the candidate."""
FORMAT = 2
"""Version of ``selection.json``."""
TEMPLATE = Path(__file__).with_name("selection.md.jinja")
LEGEND = Path(__file__).with_name("selection_legend.md").read_text(encoding="utf-8").strip()
"""Explanation of the table."""
UNFAMILIAR = "the target may show other objects than the source's classes, or lack some: look at the predictions"


class CandidateReport(Spec):
    """A candidate network."""

    run: str
    """Its run folder, or its weights file."""
    weights_sha256: str | None = None
    """Digest of its weights; none in files of before."""
    metrics: LabelFreeMetrics
    """Label-free metrics on the target."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings in which its recipe differs from the other adapted ones, such as ``method.mix``."""
    checks: tuple[Check, ...] = ()
    """Its checks."""
    better: Share | None = None
    """Share of bootstrap samples of the images in which its score is higher than that of source only; none if rejected,
    and for source only."""
    tiles: TileScores | None = None
    """Scores on labeled target tiles; none without such tiles, and for the network that learned from them."""
    estimate: Estimate | None = None
    """Estimated target mIoU with an interval; not a measurement."""
    labeled_miou: dict[str, Share | None] = Field(default_factory=dict)
    """Empty; in files of before, mIoU from labels that was computed earlier."""

    @property
    def rejected(self) -> bool:
        """Whether a failed check rejects it."""
        return not passes(self.checks)


class Selection(Spec):
    """The recommended candidate, with the metrics and checks of all."""

    format: Literal[2] = 2
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
    target_checks: tuple[Check, ...] = ()
    """Warnings about the target; none without held-out source images."""
    labels_opened: NonNegativeInt
    """Target labels that were read for training and selection: those of target images that are source images too, and
    of labeled tiles."""
    labels: dict[str, Any] | None = None
    """Labeled target tiles, as in a recipe, that decided; none: no target label did."""

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.recommended not in self.candidates:
            raise ValueError(f"recommended must be one of {', '.join(self.candidates)}, got {self.recommended}")
        return self

    @property
    def summary(self) -> str:
        """The recommendation in one sentence."""
        rejected = [name for name, report in self.candidates.items() if report.rejected]
        tail = f"; rejected: {', '.join(rejected)}" if rejected else ""
        best = self.candidates[self.recommended]
        settings = settings_text(best.settings)
        text = f"recommended: {self.recommended}{f' ({settings})' if settings else ''}"
        if self.recommended == LEARNED:
            return f"{text}, which passes the checks; its tiles cannot score it, since it learned from them{tail}"
        if self.labels is not None:
            return f"{text}, of the highest mIoU on the labeled tiles{tail}"
        samples = "" if best.better is None else f" (higher than {BASELINE} in {percent(best.better, 0)} % of samples)"
        return f"{text}, of the highest score{samples}{tail}"

    @property
    def unsure(self) -> str:
        """Why a recommendation without labels is unsure; empty if it is sure, or labels decided."""
        shares = {name: report.better for name, report in self.candidates.items() if report.better is not None}
        if self.labels is not None or not shares:
            return ""
        name = max(shares, key=lambda name: shares[name]) if self.recommended == BASELINE else self.recommended
        low, high = UNSURE
        if not low < shares[name] < high:
            return ""
        share, bounds = percent(shares[name], 0), f"{percent(low, 0)} and {percent(high, 0)}"
        return f"unsure: {name} is higher in {share} % of samples, between {bounds} %; label a few target tiles"

    @property
    def tile_lines(self) -> list[str]:
        """A sentence per candidate with its scores on the labeled tiles."""
        return [f"{name}: {report.tiles}" for name, report in self.candidates.items() if report.tiles is not None]

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
        """Failed checks: those of the candidates, with the name in front, and warnings about the target."""
        lines = [
            f"{name} {'rejected' if check.rejects else 'warning'}: {check}"
            for name, report in self.candidates.items()
            for check in sorted(report.checks, key=lambda check: not check.rejects)
            if not check.passed
        ]
        return lines + [f"target warning: {check}; {UNFAMILIAR}" for check in self.target_checks if not check.passed]

    def rows(self) -> list[list[str]]:
        """Rows of the candidates' table: the name, then a cell per entry of `COLUMNS`, in percent; the bounds last."""
        checks = {check.name: check for report in self.candidates.values() for check in report.checks}
        bounds = [f"≥ {percent(checks[name].bound, 1)}" if name in checks else "" for name in CHECKED]
        rows = [self._row(name, report) for name, report in self.candidates.items()]
        return [*rows, ["bound", *bounds, *[""] * (len(COLUMNS) - len(CHECKED))]]

    def _row(self, name: str, report: CandidateReport) -> list[str]:
        checks, estimate = {check.name: check.cell for check in report.checks}, report.estimate
        interval = f" ({percent(estimate.low, 1)} to {percent(estimate.high, 1)})" if estimate else ""
        decision = "rejected" if report.rejected else "baseline" if name == BASELINE else "accepted"
        return [
            name, *(checks.get(check, percent(None)) for check in CHECKED),
            percent(report.metrics.source_miou, 1), percent(report.metrics.score, 1), percent(report.better, 0),
            percent(estimate.miou if estimate else None, 1) + interval,
            "recommended" if name == self.recommended else decision,
        ]  # fmt: skip

    def table(self) -> str:
        """The candidates as a Markdown table, in percent."""
        lines = [["candidate", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *self.rows()]
        return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)

    def markdown(self) -> str:
        """The selection as a Markdown page."""
        return render_text(TEMPLATE, selection=self, legend=LEGEND)


@dataclass(frozen=True)
class Comparison:
    """A comparison folder: ``selection.json``, ``selection.md``, the recommended network, ``samples/``."""

    path: Path

    @classmethod
    def find_all(cls, folder: Path) -> "list[Comparison]":
        """Find comparisons: the folder itself, and those in it, by name."""
        files = [folder / "selection.json", *sorted(folder.glob("*_comparison*/selection.json"))]
        return [cls(file.parent) for file in files if file.is_file()]

    @property
    def weights(self) -> Path:
        """The recommended network, for images of the target: weights, classes and normalization."""
        return self.path / "recommended.safetensors"

    @property
    def source_weights(self) -> Path:
        """The recommended network with batch-normalization statistics of the source, for its images."""
        return self.path / "recommended-source.safetensors"

    @cached_property
    def selection(self) -> Selection:
        """The content of ``selection.json``; raises `RunError` if it is damaged or of another format version."""
        file = self.path / "selection.json"
        try:
            values = read_json(file)
            if isinstance(number := values.get("format"), int) and number > FORMAT:
                raise RunError(f"{file} was written by a newer version of overfly (format {number}); update overfly")
            return Selection.model_validate(values)
        except (ValueError, OSError):
            raise RunError(
                f"{file} is damaged or of another version of overfly; delete the folder and run `overfly adapt` again"
            ) from None

    def run(self, candidate: str) -> Run | None:
        """The run of a candidate, beside this folder or at its path; None for a weights file or a lost run.

        Raises `RunError` if its weights changed since the comparison.
        """
        path = Path(self.selection.candidates[candidate].run)
        folders = (self.path.parent / path.name, path)
        run = next((Run.open(folder) for folder in folders if (folder / "recipe.yaml").is_file()), None)
        if run is not None and run.weights.is_file():
            self.check_weights(run.weights, candidate)
        return run

    def check_weights(self, file: Path, candidate: str) -> None:
        """Raise `RunError` if a file does not hold the weights that a candidate had when it was compared."""
        expected = self.selection.candidates[candidate].weights_sha256
        if expected is not None and weights_sha256(file) != expected:
            raise RunError(f"{file} changed since {self.path} was written; run `overfly adapt` again")

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


def setting_differences(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return for each recipe the settings that differ between recipes, by dotted name."""
    flat = [
        flatten_settings(recipe.model_dump(mode="json", exclude={"source", "target", "start", "labels"}))
        for recipe in recipes
    ]
    names = list(dict.fromkeys(key for settings in flat for key in settings))
    differing = [name for name in names if any(settings.get(name) != flat[0].get(name) for settings in flat)]
    return [{name: settings[name] for name in differing if name in settings} for settings in flat]


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
