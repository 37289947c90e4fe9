"""Requests that come at the same time go through the network together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Waited
from functools import partial
from typing import NamedTuple

import numpy as np

from overfly.core.errors import OverflyError
from overfly.exporting.predictor import Floats
from overfly.web.config import LateError


class Job(NamedTuple):
    """Images (N, C, H, W) that wait, and who waits for them."""

    images: Floats
    deadline: float
    answer: Future[Floats]


class Batcher:
    """A network behind one thread that stacks what waits and has the same size.

    Call it from any number of threads; each call blocks until its own images are done.
    """

    def __init__(
        self,
        run: Callable[[Floats], Floats],
        *,
        most: int = 8,
        wait: float = 0.004,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Begin to wait for images.

        Args:
            run: images (B, C, H, W) to class probabilities (B, K, H, W), such as a `Predictor`.
            most: images in one call of it.
            wait: seconds that the first images of a batch wait for others.
            on_batch: told the number of images of each batch.
        """
        self.run, self.most, self.wait = run, most, wait
        self.on_batch = on_batch or (lambda _: None)
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __call__(self, images: Floats, deadline: float) -> Floats:
        """Class probabilities (N, K, H, W) of images (N, C, H, W).

        Args:
            images: at least one, at most ``most``.
            deadline: time of `time.monotonic` after which nobody wants them.

        Raises:
            LateError: the deadline has passed.
            OverflyError: the network cannot read them, or the server is closing.
        """
        job = Job(images, deadline, Future())
        with self._changed:
            if self._closed:
                raise OverflyError("the server is closing; try again later")
            self._jobs.append(job)
            self._changed.notify_all()
        try:
            return job.answer.result(max(0.0, deadline - time.monotonic()))
        except Waited:
            job.answer.cancel()
            raise LateError from None

    @property
    def waiting(self) -> int:
        """Images that nobody has begun with."""
        with self._changed:
            return sum(len(job.images) for job in self._jobs)

    def close(self) -> None:
        """Stop; what still waits is told so."""
        with self._changed:
            self._closed = True
            left, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(OverflyError("the server is closing; try again later"))
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                shape = self._jobs[0].images.shape[1:]
                self._changed.wait_for(partial(self._full, shape), self.wait)
                batch = self._taken(shape)
            now = time.monotonic()
            wanted = [job for job in batch if job.deadline > now and job.answer.set_running_or_notify_cancel()]
            if wanted:
                self._do(wanted)

    def _full(self, shape: tuple[int, ...]) -> bool:
        """Whether there is nothing more to wait for."""
        like = sum(len(job.images) for job in self._jobs if job.images.shape[1:] == shape)
        return self._closed or like >= self.most

    def _taken(self, shape: tuple[int, ...]) -> list[Job]:
        """The next jobs of one size, first come first served; the others stay where they are."""
        batch: list[Job] = []
        rest: deque[Job] = deque()
        for job in self._jobs:
            full = sum(len(each.images) for each in batch) + len(job.images) > self.most
            (batch if job.images.shape[1:] == shape and (not batch or not full) else rest).append(job)
        self._jobs = rest
        return batch

    def _do(self, batch: list[Job]) -> None:
        self.on_batch(sum(len(job.images) for job in batch))
        try:
            found = self.run(np.concatenate([job.images for job in batch]))
        except Exception as error:  # whatever a runtime raises belongs to who asked; the thread goes on
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for job in batch:
                self._do([job])
            return
        first = 0
        for job in batch:
            job.answer.set_result(found[first : first + len(job.images)])
            first += len(job.images)


__all__ = ["Batcher"]
