"""The stack on which signals are handled, put back after a library that leaves it broken."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of Linux (man 2 sigaltstack)."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put back, at the end, the alternative stack on which this thread handles signals.

    OpenVINO's plug-in for processors makes one of its own and restores the one before it when it is closed. Two that
    are closed in the order of their opening, as within one quantization, leave a stack that is mapped no more: the
    next signal, Ctrl-C say, ends the process by a segmentation fault. Elsewhere than on Linux nothing is done.
    """
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None)
    before = _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        gc.collect()  # what still waits to be closed would change it once more
        library.sigaltstack(ctypes.byref(before), None)


__all__ = ["signal_stack_kept"]
