"""Threads that read ahead of a consumer, or process items of a producer in the background."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, repeat
from threading import Lock
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_SETTING = Lock()


def use_one_thread() -> None:
    """Let PyTorch use one thread in the current one; more of them slow those of the network (docs/results/costs.md)."""
    with _SETTING, ThreadPoolExecutor(1) as other:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        other.submit(torch.set_num_threads, count)  # the default of threads that start later


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Apply a function in threads and yield the results in order, at most two per thread ahead of the consumer."""
    with ThreadPoolExecutor(workers, initializer=use_one_thread) as pool:
        yield from _map_in_order(pool, function, items, 2 * workers)


@contextmanager
def prefetch(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` in one thread, ``depth`` items ahead of the consumer.

    An error of the iteration is raised where its item is consumed. On leaving, a generator is closed in its own thread.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, "prefetch", use_one_thread) as pool:

        def results() -> Generator[T, None, None]:
            for item in _map_in_order(pool, lambda _: next(source, end), repeat(None), depth):
                if item is end:
                    return
                yield item  # type: ignore[misc]

        consumer = results()
        try:
            yield consumer
        finally:
            consumer.close()
            if isinstance(source, Generator):
                pool.submit(source.close).result()


def _map_in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    rest = iter(items)
    waiting = deque(pool.submit(function, item) for item in islice(rest, depth))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def background(function: Callable[[T], None], depth: int) -> Iterator[Callable[[T], None]]:
    """Yield a function that hands items to ``function`` in one thread, in order, and waits while ``depth`` are pending.

    On exit all pending items are processed, or dropped if the block raised an error. After an error of ``function`` no
    further item is processed; the next call, or the exit, raises it.
    """
    pending: deque[Future[None]] = deque()
    failed = False

    def run(item: T) -> None:
        nonlocal failed
        if failed:
            return
        try:
            function(item)
        except BaseException:
            failed = True
            raise

    with ThreadPoolExecutor(1, "background", use_one_thread) as pool:

        def put(item: T) -> None:
            while pending and (failed or len(pending) >= depth or pending[0].done()):
                pending.popleft().result()
            pending.append(pool.submit(run, item))

        try:
            yield put
            while pending:
                pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
