"""The verdict on an adaptation: all networks that stand beside each other, which is recommended, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from overfly.adaptation.estimate import Estimate
from overfly.adaptation.gate import Gate, geometric_consistency
from overfly.core.spec import Share, Spec, Whole
from overfly.evaluation.label_free_metrics import LabelFreeMetrics

BEFORE = "source only"
"""The network that the others are measured against."""
RECALIBRATED = "recalibrated"
"""The same with statistics of the target."""
ADAPTED = "adapted"
"""What the recipe makes; numbered, ``adapted 1`` and so on, where there are several recipes."""
SAID = 3
"""Settings that a sentence names; where there are more, it names the method, or says how many."""


class CandidateReport(Spec):
    """One of the networks."""

    run: str
    """Its run's folder, or the file of its weights."""
    metrics: LabelFreeMetrics
    """What can be said of it without target labels."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What its recipe says otherwise than the other adapted ones', such as ``method.mix_share``."""
    rejections: tuple[str, ...] = ()
    """What speaks against it; empty where nothing does."""
    estimate: Estimate | None = None
    """Estimated mIoU on the target with an interval: an estimate, no measurement."""
    truth: dict[str, Share | None] = Field(default_factory=dict)
    """mIoU against labels, by domain and split, where it was measured earlier; it had no part in the verdict."""


class Selection(Spec):
    """Which network to use in the target, and why."""

    recommended: str
    """The network to use."""
    candidates: dict[str, CandidateReport]
    """All that were looked at."""
    gate: Gate
    """What a network had to hold."""
    target: dict[str, Any]
    """The target as a recipe names it."""
    familiarity: Share | None = None
    """How familiar the target is to the network before adaptation, against the source's held-out pictures; none where
    there are no such pictures."""
    reverse_validation: Share | None = None
    """What its labels of the target teach of the source's classes, against what the source's own labels teach; none
    where nobody could or needed to be asked."""
    labels_opened: Whole
    """Target labels that were read for training, choice and verdict: 0 unless pictures of the target are the source's
    too."""

    @property
    def summary(self) -> str:
        """The verdict in words."""
        refused = [role for role, report in self.candidates.items() if report.rejections]
        if self.recommended == BEFORE:
            return f"use the source-only network: {_refused(refused) or 'there is no other'}"
        tail = f"; {_refused(refused)}" if refused else ""
        first = self.candidates[self.recommended]
        way = in_words(first.settings)
        network = f"{self.recommended} ({way})" if way else f"the {self.recommended} network"
        behind = [role for role in self.candidates if role not in (BEFORE, self.recommended, *refused)]
        lead = {
            role: geometric_consistency(first.metrics) - geometric_consistency(self.candidates[role].metrics)
            for role in behind
        }
        clear = [role for role in behind if lead[role] >= self.gate.alike]
        others = [role for role in behind if role not in clear]
        rest = f", and it is steadier on the target than {_listed(clear)}" if clear else ""
        rest += f", and {_listed(others)} {_is(others)} not clearly steadier there" if others else ""
        return f"use {network}: nothing speaks against it{rest}{tail}"

    @property
    def familiarity_summary(self) -> str:
        """How familiar the target is, in words; empty where nobody could be asked."""
        if self.familiarity is None:
            return ""
        share = f"{100 * self.familiarity:.0f} %"
        known = f"To the source-only network the target is {share} as familiar as held-out source pictures."
        if self.reverse_validation is None:
            return f"{known} What its labels of the target teach could not be asked, or needed not."
        taught = f"{100 * self.reverse_validation:.0f} %"
        return (
            f"{known} Its labels of the target teach {taught} of what the source's own teach of the source's classes."
        )

    @property
    def differences(self) -> list[str]:
        """Which run each of several adapted networks is, and in which settings it differs, a sentence each."""
        return [
            f"{role}: {Path(each.run).name} ({in_words(each.settings, most=None)})"
            for role, each in self.candidates.items()
            if each.settings
        ]

    def table(self) -> str:
        """The networks and their label-free figures in percent, as a Markdown table."""
        rows = [
            "| network | source | masked | views | steady | as before | target, estimated | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for role, report in self.candidates.items():
            seen = report.metrics
            guess = report.estimate
            between = f"{_percent(guess.miou)} ({_percent(guess.low)} to {_percent(guess.high)})" if guess else "–"
            word = "recommended" if role == self.recommended else "refused" if report.rejections else ""
            cells = [seen.source_miou, seen.masked_miou, seen.views_miou, geometric_consistency(seen), seen.agreement]
            rows.append(f"| {role} | {' | '.join(_percent(cell) for cell in cells)} | {between} | {word} |")
        return "\n".join(rows)

    def report(self) -> str:
        """All of it as a Markdown page."""
        differences = [f"- {way}." for way in self.differences]
        rejections = [f"- {role}: {reason}." for role, each in self.candidates.items() for reason in each.rejections]
        known = (
            self.familiarity_summary
            or "Without held-out pictures of the source nobody asked how familiar the target is."
        )
        return "\n".join(
            [
                "# Verdict", "", self.summary[0].upper() + self.summary[1:] + ".", "", self.table(), "",
                *(["In what the adapted networks differ:", "", *differences, ""] if differences else []),
                *(["What speaks against a network:", "", *rejections, ""] if rejections else []),
                "All figures are mIoU in percent. *Source* is measured on the source's held-out labels. *Masked* "
                "and *views* compare predictions on target pictures as they are with those half covered, and turned, "
                "scaled and recolored; *steady*, by which one of those that nothing speaks against is chosen, is "
                "the turned and scaled part of that; *as before* compares them with the source-only network's. "
                "*Target* is an estimate with its interval, and had no part in the verdict. "
                f"Target labels opened: {self.labels_opened}.", "",
                known, "",
                "![Target pictures and what each network says](samples/selection.png)", "",
            ]
        )  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def in_words(settings: Mapping[str, Any], most: int | None = SAID) -> str:
    """In what an adapted network differs from others, in a few words; empty where it does in nothing.

    Args:
        settings: as `CandidateReport` holds them.
        most: how many settings to name; None names all.
    """
    if most is None or len(settings) <= most:
        return ", ".join(f"{name.removeprefix('method.')} {said(value)}" for name, value in settings.items())
    method = settings.get("method.name")
    return f"method {method}" if method else f"{len(settings)} settings of its own"


def said(value: object) -> str:
    """A setting's value in a sentence."""
    if isinstance(value, list):
        return (
            " + ".join(said(each.get("name")) if isinstance(each, Mapping) else said(each) for each in value) or "none"
        )
    return "none" if value is None else str(value)


def _refused(names: Sequence[str]) -> str:
    """``a and b are refused``; empty where none is."""
    return f"{_listed(names)} {_is(names)} refused" if names else ""


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)


__all__ = ["ADAPTED", "BEFORE", "RECALIBRATED", "CandidateReport", "Selection", "in_words", "said"]
