"""What a killed process left beside a name, and what a living one has there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from overfly.core import atomic_files as parts
from overfly.core.atomic_files import atomic_write, remove_stale

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from overfly.core.atomic_files import atomic_write
with atomic_write(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as part:
    (part / "file" if part.is_dir() else part).write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def holder(path: Path, kind: str) -> subprocess.Popen[str]:
    """A process that has a part and would not let go of it."""
    home = str(Path(parts.__file__).parent)  # by itself, as the whole package takes seconds to import
    words = [sys.executable, "-c", HOLDER, str(path), kind, home]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_dead_are_cleared_away_and_the_living_left_alone(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "out.onnx"
    others = [tmp_path / name for name in (".out.onnx.part", ".out.onnx.12.part", "out.onnx.part", ".other.onnx.part")]
    others.append(tmp_path / f".out.onnx.00000000.{12 * '0'}.part")  # of another machine
    for other in others:
        other.touch()
    dead, living = holder(path, kind), holder(path, kind)
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    kill(dead)
    try:
        with atomic_write(path) as part:
            part.write_text("whole")
            assert len(list(tmp_path.iterdir())) == len(others) + 2  # ours and the living one's
            part.replace(path)
        assert path.read_text() == "whole"
    finally:
        kill(living)
    remove_stale(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_not_renamed_is_taken_away(tmp_path: Path, folder: bool) -> None:
    with atomic_write(tmp_path / "a", folder=folder) as part:
        assert part.is_dir() == folder
        assert part.exists()
    assert not list(tmp_path.iterdir())


def test_a_part_is_a_file_like_any_other(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a") as part:
            assert part.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_many_at_once_have_each_their_own(tmp_path: Path) -> None:
    wrong: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(100):
                with atomic_write(tmp_path / "a") as part:
                    part.write_text("whole")
                    part.replace(tmp_path / "a")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(part: Path, *, wait: bool) -> int | None:
        raise OSError(part, wait)

    monkeypatch.setattr(parts, "lock", none)
    with atomic_write(tmp_path / "a") as first:
        remove_stale(tmp_path / "a")
        assert first.exists()
    assert not first.exists()
