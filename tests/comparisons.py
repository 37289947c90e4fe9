"""Comparisons of `overfly adapt` with a known recommendation."""

from __future__ import annotations

from typing import Any

import pytest

from overfly.adaptation import candidates
from overfly.adaptation.gate import select


def recommend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Select the last of some candidates that is among those that pass, whatever the networks predict."""

    def chosen(baseline: str, agreements: Any) -> Any:
        found, scores, better = select(baseline, agreements)
        return next((name for name in reversed(names) if name in agreements), found), scores, better

    monkeypatch.setattr(candidates, "select", chosen)
