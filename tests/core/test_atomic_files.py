"""Temporary files of killed and of running processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from overfly.core.atomic_files import atomic_write, lock, remove_stale, temporary_path

HOLDER = """
import sys, time
from pathlib import Path
from overfly.core.atomic_files import temporary_path
with temporary_path(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as part:
    (part / "file" if part.is_dir() else part).write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def holder(path: Path, kind: str) -> subprocess.Popen[str]:
    """A process that has a part and would not let go of it."""
    words = [sys.executable, "-c", HOLDER, str(path), kind]
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
def test_parts_of_killed_processes_are_removed(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "out.onnx"
    others = [tmp_path / name for name in (".out.onnx.part", ".out.onnx.12.part", "out.onnx.part", ".other.onnx.part")]
    others.append(tmp_path / f".out.onnx.00000000.{12 * '0'}.part")  # of another machine
    for other in others:
        other.touch()
    killed, running = holder(path, kind), holder(path, kind)
    assert len(list(tmp_path.iterdir())) == len(others) + 4
    kill(killed)
    try:
        with atomic_write(path) as part:
            part.write_text("whole")
            assert (
                len(list(tmp_path.iterdir())) == len(others) + 4
            )  # the parts of this and the running process, with their locks
        assert path.read_text() == "whole"
    finally:
        kill(running)
    remove_stale(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


@pytest.mark.parametrize("folder", [False, True])
def test_temporary_path_is_removed(tmp_path: Path, folder: bool) -> None:
    with temporary_path(tmp_path / "a", folder=folder) as part:
        assert part.is_dir() == folder
        assert part.exists()
    assert not list(tmp_path.iterdir())


def test_temporary_path_honors_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a") as part:
            assert part.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_concurrent_writers(tmp_path: Path) -> None:
    wrong: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(100):
                with atomic_write(tmp_path / "a") as part:
                    part.write_text("whole")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_atomic_write_honors_the_umask_of_the_process(tmp_path: Path) -> None:
    """Also when the writer replaces the temporary file by one with mode 0600, as safetensors does."""
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as part:
            part.unlink()
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_lock_admits_one_at_a_time(tmp_path: Path) -> None:
    """Although every holder removes the lock file while others wait for it."""
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(8):
            with lock(tmp_path / "a.lock"):
                inside.append(1)
                time.sleep(0.001)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 48
    assert not list(tmp_path.iterdir())


def test_lock_of_another_holder_without_waiting(tmp_path: Path) -> None:
    with lock(tmp_path / "a.lock"), pytest.raises(Timeout), lock(tmp_path / "a.lock", wait=False):
        pass


def test_a_lock_that_cannot_be_opened_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: FileLock) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, other = tmp_path / "new.lock", tmp_path / "other.lock"
    other.touch()
    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", fail)
        for file in (path, other):
            with pytest.raises(OSError, match="No space"), lock(file):
                pass
    assert not path.exists()
    assert other.exists()  # another process may hold it
    with lock(path), pytest.raises(Timeout), lock(path, wait=False):
        pass
    assert not path.exists()
