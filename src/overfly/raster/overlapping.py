"""Work that goes on at the same time: read ahead of somebody, and finish behind somebody, in threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_END = object()
_LOOK = 0.2
"""Seconds after which a thread that waits looks whether the other side is still there."""


@contextmanager
def ahead(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Make items in a thread, up to ``depth`` of them before they are asked for.

    Leaving stops the thread at its next item. What goes wrong in it is raised where its items are taken.

    Args:
        items: what is iterated over in the thread.
        depth: items that may wait.
    """
    waiting: queue.Queue[object] = queue.Queue(max(1, depth))
    left = threading.Event()

    def put(item: object) -> bool:
        while not left.is_set():
            try:
                waiting.put(item, timeout=_LOOK)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # raised again by the one who takes the items
            put(error)
        finally:
            if isinstance(items, Generator):
                items.close()

    def take() -> Iterator[T]:
        while (item := waiting.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=make, name="overfly-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        left.set()
        thread.join()


@contextmanager
def behind(work: Callable[[T], None], depth: int) -> Iterator[Callable[[T], None]]:
    """Hand items to a function that runs in a thread, one after the other; up to ``depth`` of them may wait.

    Leaving waits until all are done; leaving by an error drops those that wait. What goes wrong in the thread is raised
    by the next call, or on leaving.

    Args:
        work: what is done with each item.
        depth: items that may wait.
    """
    waiting: queue.Queue[object] = queue.Queue(max(1, depth))
    wrong: list[BaseException] = []
    dropped = threading.Event()

    def run() -> None:
        while (item := waiting.get()) is not _END:
            if wrong or dropped.is_set():
                continue
            try:
                work(item)  # type: ignore[arg-type]
            except BaseException as error:  # raised again by the one who hands over
                wrong.append(error)

    def put(item: T) -> None:
        if wrong:
            raise wrong[0]
        waiting.put(item)

    thread = threading.Thread(target=run, name="overfly-behind", daemon=True)
    thread.start()
    try:
        yield put
    except BaseException:
        dropped.set()
        raise
    finally:
        waiting.put(_END)
        thread.join()
    if wrong:
        raise wrong[0]
