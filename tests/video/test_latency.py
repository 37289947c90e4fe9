from __future__ import annotations

import numpy as np
import pytest

from overfly.video.latency import Latencies


def test_percentiles_over_all_are_those_of_the_latencies() -> None:
    values = np.random.default_rng(0).lognormal(-3, 1, 5000)
    latencies = Latencies(window=100)
    for index, value in enumerate(values):
        latencies.add(index, index + value)
    for share in (0.5, 0.95, 0.99):
        wanted = np.quantile(values, share, method="inverted_cdf")
        assert latencies.overall(share) == pytest.approx(wanted, rel=0.006)
        recent = latencies.recent(share)
        assert recent == pytest.approx(np.quantile(values[-100:], share, method="inverted_cdf"))
    assert latencies.count == 5000


def test_the_rate_is_of_the_window_and_of_all() -> None:
    latencies = Latencies(window=5)
    for index in range(10):
        latencies.add(index, index + 0.5)
    for index in range(5):
        latencies.add(10 + index / 10, 10.5 + index / 10)
    assert latencies.recent_rate == pytest.approx(10)
    assert latencies.overall_rate == pytest.approx(15 / 10.9)


def test_nothing_is_said_before_the_first_frame() -> None:
    latencies = Latencies()
    assert (latencies.recent(0.5), latencies.overall(0.5), latencies.recent_rate, latencies.overall_rate) == (None,) * 4
    latencies.add(0, 0)
    assert latencies.recent_rate is None
    assert latencies.overall(0.5) is not None


def test_hours_and_nothing_have_a_place() -> None:
    latencies = Latencies()
    latencies.add(0, 90_000)
    assert latencies.overall(0.5) == pytest.approx(10_000, rel=0.02)
    latencies.add(5, 4)
    assert latencies.overall(0.5) == pytest.approx(1e-5, rel=0.01)
