"""Helpers do not hear Ctrl-C; who starts them does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from overfly.core.interrupts import interrupts_held

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals are not blocked here")
BLOCKED = "import signal; print(int(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"


def _blocked() -> bool:
    return bool(int(subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, check=True).stdout))


def test_what_is_started_in_the_block_is_not_interrupted() -> None:
    with interrupts_held():
        assert _blocked()
    assert not _blocked()


def test_an_interruption_of_this_process_waits_for_the_end_of_the_block() -> None:
    reached, done = False, threading.Event()
    other = threading.Thread(target=done.wait)  # blocks nothing, so that it may be given the signal
    other.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117, PT012  (it is the inner block's end that raises)
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            reached = True
    done.set()
    other.join()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
