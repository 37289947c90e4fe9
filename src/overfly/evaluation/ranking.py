"""Ranks: which of several candidates is best by one figure, by many together, and whether the truth agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(values: Sequence[float]) -> Floats:
    """Ranks from 1 (lowest) on; equal values share the mean of their ranks (n,)."""
    given = np.asarray(values, np.float64)
    below = (given[None, :] < given[:, None]).sum(1)
    same = (given[None, :] == given[:, None]).sum(1)
    shared: Floats = below + (same + 1) / 2
    return shared


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, -1 to 1: the correlation of the ranks, equal values sharing their mean rank.

    Returns:
        None where there are fewer than two values, or all of one side are equal.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values cannot be correlated with {len(second)}")
    if len(first) < 2:
        return None
    one, two = (ranks(values) - (len(first) + 1) / 2 for values in (first, second))
    spread = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / spread if spread > 0 else None


def best(values: Sequence[float | None]) -> int | None:
    """Place of the highest value, the first of equals; None where there is none."""
    there = [(value, -place) for place, value in enumerate(values) if value is not None]
    return -max(there)[1] if there else None


def regret(metrics: Sequence[float | None], truth: Sequence[float]) -> float | None:
    """The best true value minus the true value of the candidate that a figure chooses; 0: it chose the best."""
    chosen = best(metrics)
    return None if chosen is None else max(truth) - truth[chosen]


def committee(candidates: Sequence[Mapping[str, float | None]], members: Sequence[str]) -> list[float]:
    """Mean rank of each candidate over the members of a committee, as a share: 0 last with all, 1 first with all.

    Each member ranks all candidates by its own figure, so that no scale of any of them counts. A member that lacks the
    figure of even one candidate does not vote; without any voter all get 0.5.

    Args:
        candidates: figures of each by validator, higher is better.
        members: the validators that vote.
    """
    if len(candidates) < 2:
        return [0.5] * len(candidates)
    votes = []
    for member in members:
        values = [candidate.get(member) for candidate in candidates]
        there = [value for value in values if value is not None]
        if len(there) == len(candidates):
            votes.append((ranks(there) - 1) / (len(candidates) - 1))
    if not votes:
        return [0.5] * len(candidates)
    return [float(share) for share in np.mean(votes, axis=0)]


__all__ = ["best", "committee", "ranks", "regret", "spearman"]
