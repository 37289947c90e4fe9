"""A comparison whose self-training starts from recalibrated statistics; its runs are trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from comparisons import recommend
from overfly import adapt, cli
from overfly.adaptation import candidates, pipeline
from overfly.adaptation.candidates import CandidateComparison
from overfly.adaptation.gate import Check, Gate
from overfly.adaptation.selection import Comparison, Selection
from overfly.commands.train import AdaptResult
from overfly.core.records import Item, UInt8
from overfly.data.synthetic import Synthetic
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.evaluation.perturbations import geometric_perturbations
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.ops.normalization import batch_norms, estimate_statistics
from overfly.recipe import Recipe, load
from overfly.training.run import Run
from overfly.training.setup import STATISTICS_BATCHES, source_images, training_streams

DOMAIN = {"name": "synthetic", "size": 32, "train": 4, "val": 2}
LIGHT: dict[str, Any] = {
    "source": {**DOMAIN, "scene": "urban"},
    "target": {**DOMAIN, "scene": "rural"},
    "model": "small_network",
    "optim": {"name": "adamw", "lr": 0.003},
    "batch": 4,
    "crop": 32,
}
START = "half recalibrated"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load({**LIGHT, "method": "dacs", "steps": 3, "start": {**LIGHT, "steps": 12}})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _start(monkeypatch: pytest.MonkeyPatch) -> None:
    recommend(monkeypatch, START)
    monkeypatch.setattr(pipeline, "RECALIBRATION", {"batch": 4, "steps": 4})


def compared(recipe: Recipe, out: Path, **options: Any) -> AdaptResult:
    return adapt(recipe, out=out, device="cpu", quiet=True, estimate=False, **options)


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def run_of(selection: Selection, name: str) -> Run:
    return Run.open(selection.candidates[name].run)


def test_self_training_starts_from_the_best_statistics(recipe: Recipe, out: Path) -> None:
    selection = compared(recipe, out).selection
    assert list(selection.candidates) == ["source only", *pipeline.RECALIBRATED, "adapted"]
    assert run_of(selection, "adapted").recipe.start == run_of(selection, START).recipe
    assert run_of(selection, START).recipe.start == run_of(selection, "source only").recipe
    assert Recipe.model_validate(selection.recipes[0]) == recipe


def test_no_label_of_the_target_is_opened(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Synthetic.read_label
    opened = set()

    def watched(self: Synthetic, item: Item) -> UInt8:
        opened.add(self.scene)
        return read(self, item)

    monkeypatch.setattr(Synthetic, "read_label", watched)
    compared(recipe, out)
    assert opened == {"urban"}


def shared_weights(first: Segmenter, second: Segmenter) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))


def means(network: Segmenter) -> torch.Tensor:
    return torch.cat([norm.running_mean for norm in batch_norms(network) if norm.running_mean is not None])


def test_the_network_for_the_source_has_the_adapted_weights_and_the_statistics_of_the_source(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommend(monkeypatch, START, "adapted")
    comparison = Comparison(compared(recipe, out).path)
    assert comparison.selection.recommended == "adapted"
    target, source = Segmenter.load(comparison.weights), Segmenter.load(comparison.source_weights)
    assert shared_weights(target, source)
    assert shared_weights(target, run_of(comparison.selection, "adapted").segmenter())
    stream, _ = training_streams(recipe.model_copy(update={"method": SourceOnly()}))
    estimate_statistics(target, source_images(stream, STATISTICS_BATCHES))
    assert not torch.equal(means(Segmenter.load(comparison.weights)), means(source))
    assert torch.allclose(means(target), means(source), atol=1e-5)


def test_the_network_for_the_source_of_recalibrated_statistics_is_source_only(recipe: Recipe, out: Path) -> None:
    comparison = Comparison(compared(recipe, out).path)
    assert comparison.selection.recommended == START
    before = run_of(comparison.selection, "source only").segmenter()
    assert torch.equal(means(Segmenter.load(comparison.source_weights)), means(before))
    assert not torch.equal(means(Segmenter.load(comparison.weights)), means(before))


def test_an_unfamiliar_target_is_a_warning(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "familiarity", lambda *_: 0.6)
    monkeypatch.setattr(candidates, "reverse_validation", lambda *_: 0.3)
    selection = compared(recipe, out).selection
    assert selection.target_checks == Gate().target_checks(0.6, 0.3)
    assert selection.recommended == START
    warnings = [line for line in selection.reasons if "familiarity" in line or "reverse validation" in line]
    assert len(warnings) == 2
    assert all(line in selection.markdown() for line in warnings)


def test_rejected_candidates_are_not_compared(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_baseline(_: Gate, before: LabelFreeMetrics, after: LabelFreeMetrics) -> tuple[Check, ...]:
        return (Check(name="classes", value=float(before is after), bound=0.5),)

    monkeypatch.setattr(Gate, "checks", only_baseline)
    selection = compared(recipe, out, gate=["min_classes=0.5"]).selection
    assert selection.recommended == "source only"
    for name, report in selection.candidates.items():
        assert report.rejected == (name != "source only")
        assert report.better is None


@pytest.mark.parametrize(("name", "status"), [("source only", 3), (START, 0)])
def test_require_adapted_sets_the_exit_status(
    name: str, status: int, recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommend(monkeypatch, name)
    recipe.save(out / "dacs.yaml")
    options = ("--out", out, "--device", "cpu", "--quiet")
    assert command("adapt", out / "dacs.yaml", *options, "--require-adapted") == status
    assert command("adapt", out / "dacs.yaml", *options) == 0


@pytest.mark.parametrize("turns", [False, True])
def test_only_networks_that_were_trained_with_turns_are_compared_under_turns(
    turns: bool, recipe: Recipe, out: Path
) -> None:
    start = run_of(compared(recipe, out).selection, "source only")
    turned = load(recipe, f"augment={'[dihedral]' if turns else '[color_jitter]'}")
    comparison = CandidateComparison([turned], Gate(), torch.device("cpu"), estimates=False)
    assert comparison.select({"source only": start}) == "source only"
    views = set(comparison.metrics["source only"].by_view)
    assert views == {view.name for view in geometric_perturbations(turns=turns)}
    assert any("90" in view for view in views) == turns
