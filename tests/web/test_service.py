"""Inference of the server, without HTTP."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from overfly.exporting.predictor import Floats
from overfly.web.service import RequestTimeoutError
from served import bright, network


def test_a_network_is_called_by_one_request_at_a_time() -> None:
    calls: list[int] = []
    active = 0

    def count(images: Floats) -> Floats:
        nonlocal active
        active += 1
        calls.append(active)
        time.sleep(0.02)
        active -= 1
        return bright(images)

    shared = network("0", count)
    images = np.zeros((1, 3, 8, 8), np.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shared.probabilities(images, time.monotonic() + 10), range(8)))
    assert calls == [1] * 8
    with pytest.raises(RequestTimeoutError):
        shared.probabilities(images, time.monotonic() - 1)
