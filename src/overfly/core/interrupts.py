"""Ctrl-C in processes that help: it is the first process that is told, and ends them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Start processes in this block that a Ctrl-C does not reach, from their first moment on.

    A terminal sends Ctrl-C to all processes of a command, and each helper would print a traceback of its own. The
    block is inherited by what is started in it; a Ctrl-C that comes meanwhile reaches this process at the block's end.
    Where there are no such blocks (Windows) nothing is done.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


__all__ = ["interrupts_held"]
