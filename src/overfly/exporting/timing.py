"""How long runtimes take over one image, side by side: rounds take turns, so that a busy machine is busy for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from overfly.core.spec import Count, NonNegative, Spec


class Latency(Spec):
    """Times of one image on one runtime."""

    median_ms: NonNegative
    """Median over the rounds."""
    least_ms: NonNegative
    """Shortest: what the machine does when nobody else asks for it."""
    processor_ms: NonNegative
    """Median of the processor's time of all threads, waiting in a spin included, other processes not."""
    rounds: Count
    """Images timed."""


def measure_latency(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2, seconds: float | None = None
) -> dict[str, Latency]:
    """Time several things in turn, round after round.

    Args:
        runs: what to time, by name.
        rounds: times that each is run.
        warmup: times that each is run before.
        seconds: give up further rounds after so long, three at least; None: never.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    used: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for done in range(rounds):
        if seconds is not None and done >= 3 and time.perf_counter() - begun > seconds:
            break
        for name, run in runs.items():
            start, began = time.perf_counter(), time.process_time()
            run()
            used[name].append(1e3 * (time.process_time() - began))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: Latency(
            median_ms=float(np.median(found)),
            least_ms=min(found),
            processor_ms=float(np.median(used[name])),
            rounds=len(found),
        )
        for name, found in times.items()
    }


__all__ = ["Latency", "measure_latency"]
