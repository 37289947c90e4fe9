from __future__ import annotations

import numpy as np
import pytest

from overfly.evaluation import speed
from overfly.evaluation.speed import Latencies


def test_percentiles_of_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "RECENT", 100)
    values = np.random.default_rng(0).lognormal(-3, 1, 5000)
    latencies = Latencies()
    for index, value in enumerate(values):
        latencies.add(index, index + value)
    expected = np.quantile(values, (0.5, 0.95), method="inverted_cdf")
    assert latencies.overall()[1:] == pytest.approx(expected, rel=0.006)
    assert latencies.recent()[1:] == pytest.approx(np.quantile(values[-100:], (0.5, 0.95), method="inverted_cdf"))
    assert latencies.count == 5000


def test_rates_of_recent_and_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "RECENT", 5)
    latencies = Latencies()
    for index in range(10):
        latencies.add(index, index + 0.5)
    for index in range(5):
        latencies.add(10 + index / 10, 10.5 + index / 10)
    assert latencies.recent()[0] == pytest.approx(10)
    assert latencies.overall()[0] == pytest.approx(15 / 10.9)


def test_statistics_are_none_before_the_first_frame() -> None:
    latencies = Latencies()
    assert latencies.recent() == latencies.overall() == (None, None, None)
    latencies.add(0, 0)
    assert latencies.recent()[0] is None
    assert latencies.overall()[1] is not None
