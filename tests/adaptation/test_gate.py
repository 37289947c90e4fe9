from __future__ import annotations

import pytest
import torch

from overfly.adaptation.gate import (
    Check,
    Gate,
    ImageCounts,
    familiarity,
    passes,
    read_gate,
    share_better,
)
from overfly.core.errors import RecipeError
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, balanced_miou, label_free_metrics
from overfly.evaluation.perturbations import GEOMETRIC
from overfly.evaluation.scores import Confusion
from planted import ByLevel, Constant, Patches

LEVELS = {"source_miou": 0.5, "source_statistics_miou": 0.6, "agreement": 1.0, "nuclear_norm": 0.75}
REJECTING = {"source mIoU", "nuclear norm", "classes"}


@pytest.fixture(scope="module")
def base_metrics() -> LabelFreeMetrics:
    return label_free_metrics(ByLevel(20), Patches())


def metrics(base_metrics: LabelFreeMetrics, **changes: object) -> LabelFreeMetrics:
    return base_metrics.model_copy(update={**LEVELS, **changes})


def with_consistency(base_metrics: LabelFreeMetrics, geometric: float, other: float) -> LabelFreeMetrics:
    """Metrics with one consistency under rotation and scale, and another under the other perturbations."""
    by_view = {name: geometric if name in GEOMETRIC else other for name in base_metrics.by_view}
    return metrics(base_metrics, by_view=by_view, consistency=geometric)


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_a_candidate_equal_to_source_only_passes_every_check(base_metrics: LabelFreeMetrics) -> None:
    checks = Gate().checks(metrics(base_metrics), metrics(base_metrics))
    assert not failed(checks)
    assert [check.name for check in checks] == [
        "source mIoU", "nuclear norm", "classes", "consistency", "agreement",
    ]  # fmt: skip
    assert {check.name for check in checks if check.rejects} == REJECTING


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"source_statistics_miou": 0.549}, "source mIoU", 0.549),
        ({"nuclear_norm": 0.599}, "nuclear norm", 0.599),
        ({"shares": (1.0, 0.0, 0.0)}, "classes", 1 / 3),
        ({"agreement": 0.249}, "agreement", 0.249),
    ],
)
def test_a_value_beyond_a_bound_fails_one_check(
    base_metrics: LabelFreeMetrics, change: dict[str, object], name: str, value: float
) -> None:
    checks = Gate().checks(metrics(base_metrics), metrics(base_metrics, **change))
    (check,) = [check for check in checks if not check.passed]
    assert (check.name, check.rejects) == (name, name in REJECTING)
    assert check.value == pytest.approx(value)
    assert passes(checks) == (name not in REJECTING)


@pytest.mark.parametrize(
    "change",
    [{"source_statistics_miou": 0.551}, {"nuclear_norm": 0.601}, {"shares": (0.5, 0.5, 0.0)}, {"agreement": 0.251}],
)
def test_a_value_within_a_bound_passes(base_metrics: LabelFreeMetrics, change: dict[str, object]) -> None:
    assert not failed(Gate().checks(metrics(base_metrics), metrics(base_metrics, **change)))


def test_lower_geometric_consistency_is_a_warning(base_metrics: LabelFreeMetrics) -> None:
    before = with_consistency(base_metrics, 0.7, 0.7)
    checks = Gate().checks(before, with_consistency(base_metrics, 0.69, 0.95))
    assert failed(checks) == ["consistency"]
    assert passes(checks)
    assert not failed(Gate().checks(before, with_consistency(base_metrics, 0.71, 0.1)))


def test_source_miou_is_not_checked_without_a_source(base_metrics: LabelFreeMetrics) -> None:
    none = {"source_miou": None, "source_statistics_miou": None}
    checks = Gate().checks(metrics(base_metrics, **none), metrics(base_metrics, **none))
    assert "source mIoU" not in [check.name for check in checks]
    assert passes(checks)
    assert not passes(Gate().checks(metrics(base_metrics, **none), metrics(base_metrics, **none, nuclear_norm=0.749)))


def test_classes_that_source_only_does_not_predict_do_not_count(base_metrics: LabelFreeMetrics) -> None:
    before = metrics(base_metrics, shares=(0.9996, 0.0002, 0.0002))
    assert not failed(Gate().checks(before, metrics(base_metrics, shares=(1.0, 0.0, 0.0))))


def test_a_collapsed_network_is_rejected() -> None:
    before = label_free_metrics(ByLevel(20), Patches())
    checks = Gate().checks(before, label_free_metrics(Constant(), Patches(), reference=ByLevel(20)))
    assert not passes(checks)
    assert {"nuclear norm", "classes"} <= set(failed(checks))


@pytest.mark.parametrize(
    ("known", "reverse", "names"),
    [
        (0.65, 0.5, []),
        (0.64, 0.5, ["familiarity"]),
        (0.65, 0.49, ["reverse validation"]),
        (0.1, 0.1, ["familiarity", "reverse validation"]),
        (None, 0.1, ["reverse validation"]),
        (0.1, None, ["familiarity"]),
        (None, None, []),
    ],
)
def test_an_unfamiliar_target_is_a_warning(known: float | None, reverse: float | None, names: list[str]) -> None:
    checks = Gate().target_checks(known, reverse)
    assert failed(checks) == names
    assert passes(checks)
    assert len(checks) == (known is not None) + (reverse is not None)


def test_bounds_are_read_from_options(base_metrics: LabelFreeMetrics) -> None:
    assert read_gate([]) == Gate()
    gate = read_gate(["max_source_loss=0.1", "min_familiarity=0"])
    assert gate == Gate(max_source_loss=0.1, min_familiarity=0.0)
    after = metrics(base_metrics, source_statistics_miou=0.52)
    assert passes(gate.checks(metrics(base_metrics), after))
    assert not passes(Gate().checks(metrics(base_metrics), after))


@pytest.mark.parametrize(
    "setting", ["max_sauce_loss=0.1", "max_source_loss=2", "max_source_loss=some", "max_source_loss", "a.b=1"]
)
def test_unknown_or_invalid_bounds_raise(setting: str) -> None:
    with pytest.raises(RecipeError, match=setting.split("=", maxsplit=1)[0].split(".", maxsplit=1)[0]) as raised:
        read_gate([setting])
    assert "\n" not in str(raised.value)


def confusion(correct: int, wrong: int) -> Confusion:
    return Confusion(torch.tensor([[correct, wrong], [wrong, correct]]))


def test_the_bootstrap_share_is_that_of_samples_with_a_higher_score() -> None:
    """Better on two images by little, worse on one by much; the sampled images decide."""
    baseline = ImageCounts([[confusion(80, 20)] * 3], ())
    mixed = ImageCounts([[confusion(82, 18), confusion(82, 18), confusion(60, 40)]], ())
    always = ImageCounts([[confusion(81, 19)] * 3], ())
    assert share_better(baseline, always) == 1.0
    # better only in samples without the third image: (2/3) ** 3 of them
    assert share_better(baseline, mixed) == pytest.approx((2 / 3) ** 3, abs=0.05)
    assert share_better(baseline, baseline) == 0.0


def test_accuracy_on_the_source_counts_as_much_as_consistency() -> None:
    baseline = ImageCounts([[confusion(80, 20)] * 2], [confusion(80, 20)] * 3)
    forgot = ImageCounts([[confusion(90, 10)] * 2], [confusion(60, 40)] * 3)
    learned = ImageCounts([[confusion(90, 10)] * 2], [confusion(75, 25)] * 3)
    assert share_better(baseline, forgot) == 0.0
    assert share_better(baseline, learned) == 1.0


def test_a_rare_class_that_grows_does_not_raise_the_score() -> None:
    """The second class covers 1 % before and 15 % after, as consistently as large areas are; the first loses as much.

    Its IoU between the views rises from 0.5 to 0.83, and with it the mean over classes; fewer pixels agree.
    """
    before = Confusion(torch.tensor([[5930, 30, 20], [30, 70, 0], [20, 0, 3900]]))
    after = Confusion(torch.tensor([[4930, 90, 80], [90, 900, 0], [80, 0, 3830]]))
    assert balanced_miou(after) > balanced_miou(before) + 0.05
    source = [confusion(80, 20)] * 3
    assert share_better(ImageCounts([[before] * 3], source), ImageCounts([[after] * 3], source)) == 0.0


def test_familiarity_is_consistency_times_confidence_relative_to_the_source(base_metrics: LabelFreeMetrics) -> None:
    source = with_consistency(base_metrics, 0.8, 0.9).model_copy(update={"nuclear_norm": 0.8})
    target = with_consistency(base_metrics, 0.6, 0.6).model_copy(update={"nuclear_norm": 0.75})
    assert familiarity(source, target) == pytest.approx(0.75 * 0.9375)
    assert source.consistency == pytest.approx(0.8)
    more_certain = target.model_copy(update={"nuclear_norm": 1.0})
    assert familiarity(source, more_certain) == pytest.approx(0.75)
