from __future__ import annotations

import pytest

from overfly.adaptation.gate import GEOMETRIC, Gate, consistency, familiarity, geometric_consistency, select
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics
from planted import ByLevel, Constant, Patches

LEVELS = {"masked_miou": 0.3, "views_miou": 0.6, "source_miou": 0.6, "agreement": 1.0, "nuclear_norm": 0.75}


@pytest.fixture(scope="module")
def anything() -> LabelFreeMetrics:
    return label_free_metrics(ByLevel(20), Patches())


def metrics(anything: LabelFreeMetrics, **changes: float | None) -> LabelFreeMetrics:
    return anything.model_copy(update={**LEVELS, **changes})


def test_nothing_speaks_against_a_network_that_is_more_consistent(anything: LabelFreeMetrics) -> None:
    after = metrics(anything, views_miou=0.65, agreement=0.6, source_miou=0.58)
    assert Gate().rejections(metrics(anything), after) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_miou": 0.5}, "loses 10.0 points"),
        ({"agreement": 0.2}, "agrees with the network before adaptation by 20.0 %"),
        ({"views_miou": 0.5}, "not clearly more consistent"),
        ({"nuclear_norm": 0.69}, "less sure of its classes, or of fewer"),
    ],
)
def test_each_fault_alone_is_refused_in_words(anything: LabelFreeMetrics, change: dict[str, float], words: str) -> None:
    after = metrics(anything, **{"views_miou": 0.65, "agreement": 0.6, **change})
    (reason,) = Gate().rejections(metrics(anything), after)
    assert words in reason


def test_without_a_source_its_labels_are_not_asked_for(anything: LabelFreeMetrics) -> None:
    after = metrics(anything, views_miou=0.65, agreement=0.6, source_miou=None)
    assert Gate().rejections(metrics(anything, source_miou=None), after) == ()


def recommended(
    candidates: dict[str, LabelFreeMetrics],
    home: LabelFreeMetrics | None = None,
    reverse_validation: float | None = None,
) -> tuple[str, dict[str, tuple[str, ...]]]:
    known = None if home is None else familiarity(home, candidates["source only"])
    reasons = Gate().refusals("source only", candidates, known, reverse_validation)
    passed = {name: each for name, each in candidates.items() if not reasons.get(name)}
    return select("source only", passed, Gate().alike), reasons


def seen(anything: LabelFreeMetrics, geometric: float, else_: float, agreement: float = 0.6) -> LabelFreeMetrics:
    """Figures of a network with one consistency under turns and sizes and another under the rest."""
    by_view = {name: geometric if name in GEOMETRIC else else_ for name in anything.by_view}
    mean = sum(by_view.values()) / len(by_view)
    found = metrics(anything, views_miou=mean, agreement=agreement)
    return found.model_copy(update={"by_view": by_view})


def test_the_steadiest_of_those_that_pass_is_recommended(anything: LabelFreeMetrics) -> None:
    candidates = {
        "source only": metrics(anything),
        "recalibrated": seen(anything, 0.66, 0.66),
        "adapted": seen(anything, 0.7, 0.7),
        "wild": seen(anything, 0.9, 0.9, agreement=0.1),
    }
    chosen, reasons = recommended(candidates)
    assert chosen == "adapted"
    assert [name for name, found in reasons.items() if found] == ["wild"]
    assert select("source only", {"source only": metrics(anything)}, 0.02) == "source only"
    assert consistency(candidates["adapted"]) == pytest.approx(0.5)


def test_what_a_method_teaches_to_ignore_does_not_speak_for_it(anything: LabelFreeMetrics) -> None:
    """One of two was trained on changed colors and stands firm under them, and is the worse under turns and sizes."""
    assert set(GEOMETRIC) < set(anything.by_view)
    recolored, pasted = seen(anything, 0.76, 0.95), seen(anything, 0.79, 0.75)
    assert consistency(recolored) > consistency(pasted)
    assert (geometric_consistency(recolored), geometric_consistency(pasted)) == pytest.approx((0.76, 0.79))
    assert select("source only", {"one": recolored, "other": pasted}, 0.02) == "other"


def test_where_all_are_refused_the_network_before_is_kept(anything: LabelFreeMetrics) -> None:
    candidates = {"source only": metrics(anything), "adapted": metrics(anything, agreement=0.1)}
    assert recommended(candidates)[0] == "source only"


def test_a_collapsed_network_is_refused() -> None:
    before = label_free_metrics(ByLevel(20), Patches())
    after = label_free_metrics(Constant(), Patches(), reference=ByLevel(20))
    assert len(Gate().rejections(before, after)) == 3


def test_pictures_of_other_things_refuse_every_adaptation(anything: LabelFreeMetrics) -> None:
    def of(geometric: float, nuclear_norm: float) -> LabelFreeMetrics:
        return seen(anything, geometric, 0.6).model_copy(update={"nuclear_norm": nuclear_norm})

    home, better = of(0.8, 0.8), {"adapted": metrics(anything, views_miou=0.7, agreement=0.6)}
    known, unfamiliar = {"source only": of(0.6, 0.75), **better}, {"source only": of(0.6, 0.6), **better}
    assert familiarity(home, known["source only"]) == pytest.approx(0.75 * 0.9375)
    assert recommended(known, home)[0] == "adapted"
    chosen, reasons = recommended(unfamiliar, home)
    assert chosen == "source only"
    assert "56.2 % as familiar" in reasons["adapted"][0]
    assert Gate(familiar=0.0).refusals("source only", unfamiliar, 0.56) == {"adapted": ()}
    assert recommended(unfamiliar)[0] == "adapted"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ((0.651, None), []), ((0.649, None), ["only 64.9 % as familiar", "less than 65"]),  # nobody else can be asked
        ((0.5, 0.77), []), ((0.77, 0.5), []),
        ((0.5, 0.75), ["50.0 % as familiar", "teach 75.0 %", "37.5 % together, less than 38"]),
        ((1.0, 0.37), ["100.0 % as familiar", "teach 37.0 %"]), ((0.37, 1.0), ["37.0 % as familiar"]),
        ((None, None), []), ((None, 0.1), []),  # without the source nobody can tell
    ],
)  # fmt: skip
def test_pictures_must_be_known_by_steadiness_and_by_what_is_said_of_them(
    answers: tuple[float | None, float | None], words: list[str]
) -> None:
    reasons = Gate().unfamiliar(*answers)
    assert len(reasons) == bool(words)
    assert all(word in reasons[0] for word in words)
    assert all(reason.count("--skip-familiarity") == 1 for reason in reasons)
    assert Gate(familiar=0.0).unfamiliar(*answers) == ()


def test_being_surer_away_than_at_home_makes_nothing_familiar(anything: LabelFreeMetrics) -> None:
    home, away = seen(anything, 0.8, 0.9), seen(anything, 0.4, 0.9)
    home, away = home.model_copy(update={"nuclear_norm": 0.5}), away.model_copy(update={"bnm": 1.0})
    assert familiarity(home, away) == pytest.approx(0.5)


def test_what_every_network_ignores_makes_nothing_familiar(anything: LabelFreeMetrics) -> None:
    home, away = seen(anything, 0.8, 0.9), seen(anything, 0.4, 0.9)  # as firm under changed colors, not when turned
    assert familiarity(home, away) == pytest.approx(0.5)


@pytest.mark.parametrize(("second", "chosen"), [(0.719, "first"), (0.721, "second")])
def test_of_networks_alike_the_first_is_recommended(anything: LabelFreeMetrics, second: float, chosen: str) -> None:
    candidates = {
        "source only": metrics(anything),
        "first": seen(anything, 0.7, 0.7),
        "second": seen(anything, second, 0.7),
    }
    assert select("source only", candidates, Gate().alike) == chosen
