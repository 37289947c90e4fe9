"""Readers get damaged and hostile files: a short part of `tests/fuzzing.py`."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import pytest

import fuzzing
from fuzzing import TARGETS, fuzz
from overfly.core.errors import DataError


@pytest.mark.skipif(sys.platform != "linux", reason="the bounds of time and memory are Linux's")
@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("program", "request")])
def test_readers_survive_hostile_files(name: str) -> None:
    counts, findings = fuzz(name, range(TARGETS[name].share // 2))
    assert not findings
    assert counts["refused"]
    assert sum(counts.values()) == TARGETS[name].share // 2


def test_findings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that fails in every way that is looked for."""

    def read(folder: Path) -> object:
        number = (folder / "x").read_bytes()[0] % 6
        if number == 0:
            raise KeyError(number)
        if number == 1:
            return ctypes.string_at(0)
        if number == 2:
            time.sleep(60)
        if number == 3:
            return bytearray(2 * fuzzing.MEMORY)
        if number == 4:
            (folder.parent / "y").touch()
        raise DataError("refused")

    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    monkeypatch.setattr(fuzzing, "MEMORY", 2**28)
    monkeypatch.setattr(fuzzing, "mutate", lambda _, number: bytes([number]))
    monkeypatch.setattr(fuzzing, "seeds_of", lambda _: [bytes([5])])
    monkeypatch.setitem(TARGETS, "broken", fuzzing.Target("x", 0, read))
    counts, findings = fuzz("broken", range(6))
    assert counts == {"findings": 5, "refused": 1}
    words = ("KeyError", "status 11", "status 14", "MemoryError", "a file beside the folder")
    assert all(word in findings[number] for number, word in enumerate(words))
