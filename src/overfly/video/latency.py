"""How long frames take, over the last of them and over all: percentiles in constant memory."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

WINDOW = 120
"""Frames that the sliding figures look back over."""
SHORTEST = 1e-5
"""Latencies below it, in seconds, count as it."""
RATIO = 1.01
"""The bins of the percentiles over all frames: each ends 1 % above where it begins."""
BINS = math.ceil(math.log(1e4 / SHORTEST) / math.log(RATIO))
"""Enough for latencies of up to 10,000 s."""


class Latencies:
    """Latencies and the rate of frames, for as long as a stream lasts.

    The last `WINDOW` frames are kept as they are. Of all frames only counts by bins of 1 % are kept, so a percentile
    over all is right to half a percent of its value, and a camera that runs for a month takes no more memory than one
    that runs for a minute.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.count = 0
        self._last: deque[tuple[float, float]] = deque(maxlen=window)
        self._bins = np.zeros(BINS, np.int64)
        self._first_began = self._last_ready = 0.0

    def add(self, began: float, ready: float) -> None:
        """Count a frame.

        Args:
            began: when it was decoded, in seconds of one clock.
            ready: when its overlay was ready, in seconds of the same clock.
        """
        latency = max(ready - began, SHORTEST)
        if not self.count:
            self._first_began = began
        self._last.append((latency, ready))
        self._bins[min(BINS - 1, int(math.log(latency / SHORTEST) / math.log(RATIO)))] += 1
        self._last_ready = ready
        self.count += 1

    def recent(self, share: float) -> float | None:
        """The latency in seconds that this share of the last frames did not exceed; None before the first."""
        if not self._last:
            return None
        ordered = sorted(latency for latency, _ in self._last)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def overall(self, share: float) -> float | None:
        """The latency in seconds that this share of all frames did not exceed; None before the first."""
        if not self.count:
            return None
        place = int(np.searchsorted(np.cumsum(self._bins), max(1, math.ceil(share * self.count))))
        return SHORTEST * float(RATIO ** (place + 0.5))

    @property
    def recent_rate(self) -> float | None:
        """Overlays a second over the last frames; None before the second."""
        if len(self._last) < 2:
            return None
        took = self._last[-1][1] - self._last[0][1]
        return (len(self._last) - 1) / took if took > 0 else None

    @property
    def overall_rate(self) -> float | None:
        """Overlays a second, from the first frame decoded to the last overlay ready; None before the first."""
        took = self._last_ready - self._first_began
        return self.count / took if took > 0 else None
