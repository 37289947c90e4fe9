from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from overfly.core.prefetch import background, map_ahead, prefetch


def test_prefetch_yields_in_order_and_reads_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    with prefetch(items(), 2) as read:
        assert next(read) == 0
        time.sleep(0.3)
        assert made == [0, 1, 2]  # two ahead of the consumer
        assert list(read) == [1, 2, 3, 4, 5]


def test_prefetch_raises_errors_of_the_source() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with prefetch(items(), 2) as read:
        assert next(read) == 1
        with pytest.raises(ValueError, match="broken"):
            next(read)


def test_prefetch_closes_its_source() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with prefetch(items(), 1) as read:
        next(read)
    assert closed.is_set()


def test_background_finishes_before_leaving() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01)
        done.append(item)

    with background(work, 2) as put:
        for item in range(8):
            put(item)
    assert done == list(range(8))


def test_background_raises_errors_of_the_function() -> None:
    def work(item: int) -> None:
        raise OSError(f"disk full at {item}")

    with pytest.raises(OSError, match="disk full at 0"), background(work, 1) as put:  # noqa: PT012
        put(0)
        for _ in range(100):
            time.sleep(0.01)
            put(1)
    with pytest.raises(OSError, match="disk full at 5"), background(work, 1) as put:
        put(5)


def test_background_drops_pending_items_on_error() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.2)
        done.append(item)

    with pytest.raises(RuntimeError, match="stop"), background(work, 4) as put:  # noqa: PT012
        for item in range(4):
            put(item)
        raise RuntimeError("stop")
    assert len(done) <= 1


def test_background_skips_items_after_an_error() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError(item)
        done.append(item)

    with pytest.raises(ValueError, match="1"), background(work, 8) as put:  # noqa: PT012
        for item in range(4):
            put(item)
    assert done == [0]


def test_map_ahead_keeps_the_order() -> None:
    assert list(map_ahead(lambda number: number * 2, range(20), workers=3)) == [2 * number for number in range(20)]


def test_helping_threads_use_one_thread_and_leave_the_number_of_others() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with prefetch((torch.get_num_threads() for _ in range(2)), 1) as numbers:
            assert list(numbers) == [1, 1]
        assert list(map_ahead(lambda _: torch.get_num_threads(), range(3), workers=2)) == [1, 1, 1]
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
