from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overfly import train
from overfly.core.errors import DataError, RunError
from overfly.recipe import Recipe, load
from overfly.training.evaluate import domain_roles, evaluate_domain, stored_scores
from overfly.training.run import Run


def test_a_run_is_scored_as_its_recipe_says_and_counts_opened_labels(small: dict[str, Any], tmp_path: Path) -> None:
    run = train(load(small, "window=32", "optim.lr=1e-5"), out=tmp_path, device="cpu", quiet=True).run
    domain = run.recipe.domain("target")
    assert stored_scores(run, "target", "val", domain) is None
    first = evaluate_domain(run, domain, "target", "val")
    assert first.protocol.window == 32
    assert stored_scores(run, "target", "val", domain) == first
    whole = evaluate_domain(run, domain, "target", "val", window=0)
    assert whole.protocol.window is None
    assert stored_scores(run, "target", "val", domain) is None, "another protocol's score is no answer"
    assert run.scores["labels_opened"] == {"target/val": {"times": 2, "images": 4}}
    assert [row["event"] for row in run.log.rows() if "event" in row] == ["scored", "scored"]


def test_what_cannot_be_scored(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, load(recipe, "target=null"))
    with pytest.raises(RunError, match="no trained network yet"):
        evaluate_domain(run, run.recipe.domain("source"), "source", "val")
    with pytest.raises(DataError, match="has no target domain"):
        domain_roles(run, "target")
    assert [key for key, _ in domain_roles(run, "both")] == ["source"]
