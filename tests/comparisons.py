"""Comparisons of `overfly adapt` with a known recommendation."""

from __future__ import annotations

from typing import Any

import pytest

from overfly.adaptation import candidates
from overfly.adaptation.gate import select


def recommend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recommend a candidate, whatever the networks predict, if it is among those that pass."""

    def chosen(baseline: str, agreements: Any) -> Any:
        found, scores, better = select(baseline, agreements)
        return (name if name in agreements else found), scores, better

    monkeypatch.setattr(candidates, "select", chosen)
