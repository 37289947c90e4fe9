from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from offered import bright
from overfly.core.errors import DataError, OverflyError
from overfly.exporting.predictor import Floats
from overfly.web.batching import Batcher
from overfly.web.config import LateError, Room


def _images(value: float, number: int = 1, side: int = 8) -> Floats:
    return np.full((number, 3, side, side), value, np.float32)


def _later(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def test_images_of_one_size_go_together_and_everyone_gets_his_own() -> None:
    seen: list[int] = []
    batcher = Batcher(bright, most=8, wait=0.5, on_batch=seen.append)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda value: batcher(_images(value), _later()), range(0, 160, 20)))
    batcher.close()
    assert seen == [8]
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(answer[0, 1], 20 * index / 255, rtol=1e-6)


def test_other_sizes_wait_for_their_own_turn() -> None:
    shapes: list[tuple[int, ...]] = []

    def noted(images: Floats) -> Floats:
        shapes.append(images.shape)
        return bright(images)

    batcher = Batcher(noted, most=4, wait=0.2)
    sides = [8, 16, 8, 16, 8, 8, 8]
    with ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(lambda side: batcher(_images(1, side=side), _later()), sides))
    batcher.close()
    assert [answer.shape[-1] for answer in answers] == sides
    assert all(shape[0] <= 4 for shape in shapes)
    assert sum(shape[0] for shape in shapes) == 7
    assert len(shapes) < 7


def test_one_bad_image_harms_nobody_else() -> None:
    def picky(images: Floats) -> Floats:
        if (images == 13).any():
            raise DataError("thirteen is unlucky; take another number")
        return bright(images)

    batcher = Batcher(picky, most=4, wait=0.3)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(batcher, _images(value), _later()) for value in (12, 13, 14)]
    with pytest.raises(DataError, match="unlucky"):
        asked[1].result()
    np.testing.assert_allclose(asked[2].result()[0, 1], 14 / 255, rtol=1e-6)
    batcher.close()


def test_nobody_waits_beyond_the_deadline_and_late_work_is_not_done() -> None:
    held, done = threading.Event(), []

    def slow(images: Floats) -> Floats:
        held.wait(10)
        done.append(len(images))
        return bright(images)

    batcher = Batcher(slow, most=1, wait=0.0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher, _images(1), _later())
        time.sleep(0.05)
        with pytest.raises(LateError):
            batcher(_images(2), _later(0.05))
        held.set()
        first.result()
    batcher.close()
    assert done == [1]


def test_a_closing_server_says_so() -> None:
    batcher = Batcher(bright)
    batcher.close()
    with pytest.raises(OverflyError, match="closing"):
        batcher(_images(1), _later())


def test_room_is_given_when_there_is_some_and_given_up_in_time() -> None:
    room = Room(100)
    with room.take(80, _later()):
        with room.take(20, _later()), pytest.raises(LateError), room.take(1, _later(0.02)):
            pass
        with room.take(20, _later(0.02)):
            pass
    with room.take(1000, _later(0.02)):
        pass
