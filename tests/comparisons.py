"""Comparisons of `overfly adapt` with a known recommendation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from overfly.adaptation.candidates import CandidateComparison
from overfly.training.run import Run


def recommend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Select the last of some candidates that is among those that pass, whatever the networks predict."""
    select = CandidateComparison.select

    def chosen(self: CandidateComparison, runs: Mapping[str, Run | Path]) -> str:
        self.recommended = select(self, runs)
        found = [name for name in names if name in self.passing]
        self.recommended = found[-1] if found else self.recommended
        return self.recommended

    monkeypatch.setattr(CandidateComparison, "select", chosen)
