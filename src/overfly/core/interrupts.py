"""Ctrl-C in processes that help: it is the first process that is told, and ends them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Start processes in this block that a Ctrl-C does not reach, from their first moment on.

    A terminal sends Ctrl-C to all processes of a command, and each helper would print a traceback of its own. The
    block is inherited by what is started in it; a Ctrl-C that comes meanwhile reaches this process at the block's end,
    also where another of its threads, such as one of PyTorch's, is given the signal and blocks
    nothing. Where there are no such blocks (Windows) nothing is done.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    came: list[int] = []
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


__all__ = ["interrupts_held"]
