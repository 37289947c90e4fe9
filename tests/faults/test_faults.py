"""A short part of `driver.py`: a few writes, renames, fsyncs and creations of files of each scenario fail or kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
MOST = {
    "weights": 2,
    "training": 1,
    "export": 1,
    "map": 2,
    "report": 1,
    "synthesize": 2,
    "hub": 1,
    "cache": 1,
    "push": 1,
}
"""Cases of each fault and call, by scenario."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("faults need Linux and a C compiler")
    file = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", file, HERE / "shim.c", "-ldl"], check=True)
    return file


def run(shim: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [HERE.parents[1] / "src", HERE.parent, HERE]
    environment = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(HERE / "driver.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("scenario", MOST)
def test_files_are_whole_or_absent_after_a_fault(scenario: str, shim: Path) -> None:
    few = ("--fault", "kill", "--fault", "full disk") if scenario == "export" else ()  # an export takes seconds
    ended = run(shim, scenario, "--most", str(MOST[scenario]), *few)
    result = json.loads(ended.stdout or "{}")
    assert not result.get("problems", [ended.stderr])
    assert result["killed"]
    assert result["refused"]


def test_torn_files_are_found(shim: Path) -> None:
    """A scenario that writes without care fails."""
    ended = run(shim, "careless")
    result = json.loads(ended.stdout or "{}")
    assert any("not whole" in problem for problem in result["problems"])
    assert any("ZeroDivisionError" in problem for problem in result["problems"])
