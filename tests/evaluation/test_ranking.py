from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.evaluation.ranking import best, committee, ranks, regret, spearman


def test_ranks_share_their_mean_where_values_are_equal() -> None:
    assert ranks([10, 30, 20]).tolist() == [1, 3, 2]
    assert ranks([5, 1, 5, 5]).tolist() == [3, 1, 3, 3]


def test_spearman_of_known_values() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # the textbook example: 10 pairs, no ties, rho = 1 - 6 * 194 / (10 * 99)
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    # ties: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4 give 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_spearman_of_nothing_to_rank() -> None:
    assert spearman([1], [2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="3 values cannot be correlated with 2"):
        spearman([1, 2, 3], [1, 2])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12))
def test_spearman_knows_order_alone(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = spearman(first, second)
    stretched = spearman([np.exp(a) for a in first], [b**3 for b in second])
    assert (found is None) == (stretched is None)
    if found is not None and stretched is not None:
        assert found == pytest.approx(stretched)
        assert -1 - 1e-9 <= found <= 1 + 1e-9
        assert spearman(second, first) == pytest.approx(found)


def test_the_best_and_what_choosing_it_costs() -> None:
    assert best([0.2, None, 0.7, 0.7]) == 2
    assert best([None, None]) is None
    assert regret([0.1, 0.9, 0.5], [0.6, 0.4, 0.5]) == pytest.approx(0.2)
    assert regret([None, None], [0.6, 0.4]) is None


def test_a_committee_is_the_mean_of_ranks_whatever_the_scales() -> None:
    candidates = [{"a": 0.1, "b": 900.0}, {"a": 0.2, "b": 100.0}, {"a": 0.3, "b": 800.0}]
    assert committee(candidates, ["a"]) == [0, 0.5, 1]
    assert committee(candidates, ["a", "b"]) == [0.5, 0.25, 0.75]
    missing: list[dict[str, float | None]] = [{"a": 0.1, "b": 9.0}, {"a": 0.2, "b": 1.0}, {"a": 0.3, "b": None}]
    assert committee(missing, ["a", "b"]) == [0, 0.5, 1], "who cannot rank all does not vote"
    assert committee(candidates, ["c"]) == [0.5, 0.5, 0.5]
    assert committee(candidates[:1], ["a"]) == [0.5]
