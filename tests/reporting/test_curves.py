from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from overfly.core.errors import RunError
from overfly.reporting.curves import collected, curves, smoothed


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "source": 2 / step, "boundary": 1 / step, "lr": 0.01 - step * 1e-4} for step in range(1, 41)
    ]
    rows.insert(20, {"step": 20, "event": "validation", "source_miou": 0.4})
    rows += [
        {"step": 40, "event": "scored", "domain": "target", "split": "val", "miou": 0.3},
        {"step": 40, "event": "not finite", "terms": "source = nan", "items": "a, b"},
    ]
    return rows


def test_rows_are_told_apart() -> None:
    losses, rates, measured = collected(_rows())
    assert set(losses) == {"source", "boundary"}
    assert set(rates) == {"lr"}
    assert measured == {"source_miou": [(20, 0.4)], "target val miou": [(40, 0.3)]}
    assert losses["source"][:2] == [(1, 2.0), (2, 1.0)]


def test_what_is_no_figure_is_left_out_and_the_last_word_counts() -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": float("nan"), "b": True}, {"a": 3.0}, {"step": 2, "a": 4.0}]
    assert collected(rows) == ({"a": [(2, 4.0)]}, {}, {})


@pytest.mark.parametrize("kept", ["all", "losses", "measured"])
def test_draws_what_there_is(tmp_path: Path, kept: str) -> None:
    rows = [row for row in _rows() if kept == "all" or ("event" in row) == (kept == "measured")]
    with Image.open(curves(rows, tmp_path / "new" / "curves.png")) as picture:
        assert picture.format == "PNG"
        assert picture.width == 960
        darkest, _ = picture.convert("L").getextrema()
        assert float(str(darkest)) < 100


def test_an_empty_log_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no figures yet"):
        curves([{"step": 1, "event": "not finite"}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_neither_lags_nor_bends_the_ends() -> None:
    line = [float(value) for value in range(20)]
    assert smoothed(line, 7) == pytest.approx(line)
    assert smoothed([0.0, 0.0, 3.0, 0.0, 0.0], 3) == pytest.approx([0, 1, 1, 1, 0])
    assert smoothed([5.0, 1.0], 1) == [5.0, 1.0]
