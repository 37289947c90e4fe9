from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from overfly.raster.overlapping import ahead, behind


def test_items_come_in_order_and_are_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    with ahead(items(), 2) as read:
        assert next(read) == 0
        time.sleep(0.3)
        assert made == [0, 1, 2, 3]  # two wait, and one is in the hand of the thread
        assert list(read) == [1, 2, 3, 4, 5]


def test_what_goes_wrong_ahead_is_raised_where_it_is_read() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with ahead(items(), 2) as read:
        assert next(read) == 1
        with pytest.raises(ValueError, match="broken"):
            next(read)


def test_leaving_stops_the_reader_and_closes_it() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with ahead(items(), 1) as read:
        next(read)
    assert closed.is_set()


def test_all_is_done_behind_before_leaving() -> None:
    done: list[int] = []

    def run_task(item: int) -> None:
        time.sleep(0.01)
        done.append(item)

    with behind(run_task, 2) as put:
        for item in range(8):
            put(item)
    assert done == list(range(8))


def test_what_goes_wrong_behind_is_raised() -> None:
    def run_task(item: int) -> None:
        raise OSError(f"no room for {item}")

    with pytest.raises(OSError, match="no room for 0"), behind(run_task, 1) as put:  # noqa: PT012
        put(0)
        for _ in range(100):
            time.sleep(0.01)
            put(1)
    with pytest.raises(OSError, match="no room for 5"), behind(run_task, 1) as put:
        put(5)


def test_an_error_of_the_one_who_hands_over_drops_what_waits() -> None:
    done: list[int] = []

    def run_task(item: int) -> None:
        time.sleep(0.2)
        done.append(item)

    with pytest.raises(RuntimeError, match="stop"), behind(run_task, 4) as put:  # noqa: PT012
        for item in range(4):
            put(item)
        raise RuntimeError("stop")
    assert len(done) <= 1
