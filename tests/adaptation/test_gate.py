from __future__ import annotations

import pytest

from overfly.adaptation.gate import GEOMETRIC, Gate, consistency, familiarity, geometric_consistency, select
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics
from planted import ByLevel, Constant, Patches

LEVELS = {"masked_miou": 0.3, "views_miou": 0.6, "source_miou": 0.6, "agreement": 1.0, "nuclear_norm": 0.75}


@pytest.fixture(scope="module")
def base_metrics() -> LabelFreeMetrics:
    return label_free_metrics(ByLevel(20), Patches())


def metrics(base_metrics: LabelFreeMetrics, **changes: float | None) -> LabelFreeMetrics:
    return base_metrics.model_copy(update={**LEVELS, **changes})


def test_a_more_consistent_network_is_accepted(base_metrics: LabelFreeMetrics) -> None:
    after = metrics(base_metrics, views_miou=0.65, agreement=0.6, source_miou=0.58)
    assert Gate().rejections(metrics(base_metrics), after) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_miou": 0.5}, "10.0 points"),
        ({"agreement": 0.2}, "20.0 % mIoU"),
        ({"views_miou": 0.5}, "consistency"),
        ({"nuclear_norm": 0.69}, "nuclear norm"),
    ],
)
def test_each_failed_check_gives_one_reason(
    base_metrics: LabelFreeMetrics, change: dict[str, float], words: str
) -> None:
    after = metrics(base_metrics, **{"views_miou": 0.65, "agreement": 0.6, **change})
    (reason,) = Gate().rejections(metrics(base_metrics), after)
    assert words in reason


def test_source_miou_is_skipped_without_a_source(base_metrics: LabelFreeMetrics) -> None:
    after = metrics(base_metrics, views_miou=0.65, agreement=0.6, source_miou=None)
    assert Gate().rejections(metrics(base_metrics, source_miou=None), after) == ()


def recommended(
    candidates: dict[str, LabelFreeMetrics],
    source_metrics: LabelFreeMetrics | None = None,
    reverse_validation: float | None = None,
) -> tuple[str, dict[str, tuple[str, ...]]]:
    known = None if source_metrics is None else familiarity(source_metrics, candidates["source only"])
    reasons = Gate().all_rejections("source only", candidates, known, reverse_validation)
    passed = {name: each for name, each in candidates.items() if not reasons.get(name)}
    return select("source only", passed, Gate().tolerance), reasons


def with_consistency(
    base_metrics: LabelFreeMetrics, geometric: float, other: float, agreement: float = 0.6
) -> LabelFreeMetrics:
    """Metrics with one consistency under rotation and scale, and another under the other perturbations."""
    by_view = {name: geometric if name in GEOMETRIC else other for name in base_metrics.by_view}
    mean = sum(by_view.values()) / len(by_view)
    found = metrics(base_metrics, views_miou=mean, agreement=agreement)
    return found.model_copy(update={"by_view": by_view})


def test_the_most_consistent_accepted_candidate_is_recommended(base_metrics: LabelFreeMetrics) -> None:
    candidates = {
        "source only": metrics(base_metrics),
        "recalibrated": with_consistency(base_metrics, 0.66, 0.66),
        "adapted": with_consistency(base_metrics, 0.7, 0.7),
        "wild": with_consistency(base_metrics, 0.9, 0.9, agreement=0.1),
    }
    chosen, reasons = recommended(candidates)
    assert chosen == "adapted"
    assert [name for name, found in reasons.items() if found] == ["wild"]
    assert select("source only", {"source only": metrics(base_metrics)}, 0.02) == "source only"
    assert consistency(candidates["adapted"]) == pytest.approx(0.5)


def test_consistency_under_trained_color_changes_does_not_count(base_metrics: LabelFreeMetrics) -> None:
    """A network trained with color changes is more consistent under them, and less under geometric perturbations."""
    assert set(GEOMETRIC) < set(base_metrics.by_view)
    recolored, pasted = with_consistency(base_metrics, 0.76, 0.95), with_consistency(base_metrics, 0.79, 0.75)
    assert consistency(recolored) > consistency(pasted)
    assert (geometric_consistency(recolored), geometric_consistency(pasted)) == pytest.approx((0.76, 0.79))
    assert select("source only", {"one": recolored, "other": pasted}, 0.02) == "other"


def test_the_baseline_is_recommended_if_all_are_rejected(base_metrics: LabelFreeMetrics) -> None:
    candidates = {"source only": metrics(base_metrics), "adapted": metrics(base_metrics, agreement=0.1)}
    assert recommended(candidates)[0] == "source only"


def test_a_collapsed_network_is_rejected() -> None:
    before = label_free_metrics(ByLevel(20), Patches())
    after = label_free_metrics(Constant(), Patches(), reference=ByLevel(20))
    assert len(Gate().rejections(before, after)) == 3


def test_unfamiliar_images_reject_every_candidate(base_metrics: LabelFreeMetrics) -> None:
    def with_values(geometric: float, nuclear_norm: float) -> LabelFreeMetrics:
        return with_consistency(base_metrics, geometric, 0.6).model_copy(update={"nuclear_norm": nuclear_norm})

    source_metrics, better = with_values(0.8, 0.8), {"adapted": metrics(base_metrics, views_miou=0.7, agreement=0.6)}
    known, unfamiliar = (
        {"source only": with_values(0.6, 0.75), **better},
        {"source only": with_values(0.6, 0.6), **better},
    )
    assert familiarity(source_metrics, known["source only"]) == pytest.approx(0.75 * 0.9375)
    assert recommended(known, source_metrics)[0] == "adapted"
    chosen, reasons = recommended(unfamiliar, source_metrics)
    assert chosen == "source only"
    assert "56.2 %" in reasons["adapted"][0]
    assert Gate(skip_familiarity=True).all_rejections("source only", unfamiliar, 0.56) == {"adapted": ()}
    assert recommended(unfamiliar)[0] == "adapted"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.651, None), []), ((0.649, None), ["64.9 %", "65.0 %"]),
        ((0.5, 0.77), []), ((0.77, 0.5), []),
        ((0.5, 0.75), ["50.0 %", "75.0 %", "37.5 %", "38.0 %"]),
        ((1.0, 0.37), ["100.0 %", "37.0 %"]), ((0.37, 1.0), ["37.0 %"]),
        ((None, None), []), ((None, 0.1), []),
    ],
)  # fmt: skip
def test_familiarity_times_reverse_validation_must_reach_the_bound(
    scores: tuple[float | None, float | None], words: list[str]
) -> None:
    reasons = Gate().unfamiliar(*scores)
    assert len(reasons) == bool(words)
    assert all(word in reasons[0] for word in words)
    assert all(reason.count("--skip-familiarity") == 1 for reason in reasons)
    assert Gate(skip_familiarity=True).unfamiliar(*scores) == ()


def test_higher_confidence_on_the_target_does_not_raise_familiarity(base_metrics: LabelFreeMetrics) -> None:
    source_metrics, target_metrics = with_consistency(base_metrics, 0.8, 0.9), with_consistency(base_metrics, 0.4, 0.9)
    source_metrics, target_metrics = (
        source_metrics.model_copy(update={"nuclear_norm": 0.5}),
        target_metrics.model_copy(update={"nuclear_norm": 1.0}),
    )
    assert familiarity(source_metrics, target_metrics) == pytest.approx(0.5)


def test_consistency_under_color_changes_does_not_raise_familiarity(base_metrics: LabelFreeMetrics) -> None:
    source_metrics, target_metrics = with_consistency(base_metrics, 0.8, 0.9), with_consistency(base_metrics, 0.4, 0.9)
    assert familiarity(source_metrics, target_metrics) == pytest.approx(0.5)


@pytest.mark.parametrize(("second", "chosen"), [(0.719, "first"), (0.721, "second")])
def test_of_equally_consistent_candidates_the_first_is_recommended(
    base_metrics: LabelFreeMetrics, second: float, chosen: str
) -> None:
    candidates = {
        "source only": metrics(base_metrics),
        "first": with_consistency(base_metrics, 0.7, 0.7),
        "second": with_consistency(base_metrics, second, 0.7),
    }
    assert select("source only", candidates, Gate().tolerance) == chosen


def test_familiarity_counts_classes_that_are_predicted_on_the_source_only(base_metrics: LabelFreeMetrics) -> None:
    source = with_consistency(base_metrics, 0.8, 0.8).model_copy(update={"shares": (0.4, 0.3, 0.3)})
    target = source.model_copy(update={"shares": (0.5, 0.5, 0.0)})
    assert familiarity(source, target) == pytest.approx(2 / 3)


def test_a_gain_on_a_target_that_lacks_classes_is_accepted() -> None:
    """Over all three classes, a gain of 2.7 points over the two that occur would be 1.8, and rejected."""
    two = Patches(levels=2)
    network = ByLevel(20)
    before = label_free_metrics(network, two, reference=network, reference_classes=True)
    low = before.model_copy(update={"views_miou": 0.60, "masked_miou": 0.60})
    high = before.model_copy(update={"views_miou": 0.627, "masked_miou": 0.627})
    assert Gate().rejections(low, high) == ()
    assert Gate().rejections(low, low.model_copy(update={"views_miou": 0.618, "masked_miou": 0.618}))
