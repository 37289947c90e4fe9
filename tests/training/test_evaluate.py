from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overfly import train
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.recipe import Recipe, load
from overfly.training.evaluate import domain_roles, evaluate_domain, stored_scores
from overfly.training.run import Run


def test_scores_follow_the_recipe_and_count_opened_labels(small: dict[str, Any], tmp_path: Path) -> None:
    run = train(load(small, "window=32", "optim.lr=1e-5"), out=tmp_path, device="cpu", quiet=True).run
    domain = run.recipe.domain("target")
    assert stored_scores(run, "target", "val", domain) is None
    first = evaluate_domain(run, domain, "target", "val")
    assert first.protocol.window == 32
    assert stored_scores(run, "target", "val", domain) == first
    whole = evaluate_domain(run, domain, "target", "val", window=0)
    assert whole.protocol.window is None
    halved = evaluate_domain(run, domain, "target", "val", window=0, resize=32)
    assert (halved.protocol.resize, halved.confusion != whole.confusion) == (32, True)
    assert sum(map(sum, halved.confusion)) == sum(map(sum, whole.confusion))  # at the masks' own size
    for size in (-1, 5, 20_000):
        with pytest.raises(RecipeError, match=f"resize must be 0, or 16 to 16384 pixels, got {size}"):
            evaluate_domain(run, domain, "target", "val", resize=size)
    assert stored_scores(run, "target", "val", domain) is None
    assert run.scores["labels_opened"] == {"target/val": {"times": 3, "images": 6}}
    assert [row["event"] for row in run.log.rows() if "event" in row] == ["scored"] * 3


def test_evaluate_refuses_another_range(small: dict[str, Any], tmp_path: Path) -> None:
    run = train(load(small, "optim.lr=1e-5"), out=tmp_path, device="cpu", quiet=True).run
    other = run.recipe.domain("target").model_copy(update={"max_value": 10_000.0})
    with pytest.raises(RecipeError, match=r"values up to 255, and domain .* has max_value 10000"):
        evaluate_domain(run, other, "other", "val")


def test_evaluate_refuses_unfinished_runs_and_missing_domains(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, load(recipe, "target=null"))
    with pytest.raises(RunError, match=run.path.name):
        evaluate_domain(run, run.recipe.domain("source"), "source", "val")
    with pytest.raises(DataError, match="target"):
        domain_roles(run, "target")
    assert [key for key, _ in domain_roles(run, "both")] == ["source"]
