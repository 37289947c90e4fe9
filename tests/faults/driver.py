"""Make the n-th write, rename, fsync or creation of a file fail, or kill there, and look at what is left.

    gcc -shared -fPIC -o shim.so tests/faults/shim.c -ldl
    LD_PRELOAD=$PWD/shim.so PYTHONPATH=src:tests:tests/faults python tests/faults/driver.py [SCENARIO …] [--most 1000]
    PYTHONPATH=src:tests:tests/faults python tests/faults/driver.py [SCENARIO …] --random 20

Every case runs in a forked child, in a copy of the scenario's folder. It must succeed, be killed, or raise an error
that the command line prints as one sentence. Then its files are whole or absent, and the same work done again without a
fault gives the same content and leaves no unfinished file. Prints a line of JSON a scenario; exits 1 if a case failed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scenarios import SCENARIOS, Scenario

import small_network  # noqa: F401 - registers the network
from overfly.adaptation import pipeline
from overfly.core.errors import OverflyError
from overfly.exporting import exporter

CALLS = {"write": 1, "rename": 2, "fsync": 4, "create": 8}
KILL, SHORT = -1, -2
FAULTS = {
    "kill": (KILL, ("write", "rename", "fsync", "create")), "full disk": (errno.ENOSPC, ("write", "create")),
    "EIO": (errno.EIO, ("write", "fsync", "rename")), "read only": (errno.EROFS, ("create", "rename")),
    "EACCES": (errno.EACCES, ("create", "rename")), "short write": (SHORT, ("write",)),
}  # fmt: skip
"""Faults, and the calls that they befall."""
IMPORTED = (
    "huggingface_hub.hf_api", "huggingface_hub.repocard",
    "kornia", "lightning_fabric.strategies.ddp", "matplotlib.figure", "overfly.reporting.report",
    "overfly.training.trainer", "overfly.training.train_recipe", "torch.export.passes", "torch._dynamo",
    "torch._inductor.compile_fx",
)  # fmt: skip
"""Modules that the work imports late, imported once for all children."""


def in_child(work: Callable[[], bytes]) -> tuple[str, str]:
    """Do work in a forked child.

    Returns:
        done, refused, killed or failed; and the digest of its content, the message or the traceback.
    """
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(300)
        try:
            outcome, text = "done", hashlib.sha256(work()).hexdigest()
        except (OverflyError, OSError) as error:
            outcome, text = "refused", f"{type(error).__name__}: {error}"
        except BaseException:
            outcome, text = "failed", traceback.format_exc()
        os.write(send, f"{outcome}\n{text}".encode()[-60_000:])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if not answer:
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return ("killed" if killed else "failed"), f"status {status}"
    outcome, _, text = answer.partition("\n")
    return outcome, text


def with_fault(fault: tuple[int, int, int], folder: Path, act: Callable[[Path], bytes]) -> bytes:
    """Do work in a folder with a fault: calls, number, action."""
    ctypes.CDLL(None).fault_arm(os.fsencode(folder), *fault)
    return act(folder)


def run_case(
    scenario: Scenario, prepared: Path, folder: Path, disturb: Callable[[Path, Callable[[Path], bytes]], bytes]
) -> tuple[str, str]:
    """Do the work, disturbed; look at its files; do it again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)

    def look() -> bytes:
        scenario.check(folder)
        return b""

    first, text = in_child(lambda: disturb(folder, scenario.act))
    if first == "failed":
        return "failed", text
    looked, problem = in_child(look)
    if looked != "done":
        return "failed", f"after {first} ({text}), its files are not whole: {problem}"
    again, digest = in_child(lambda: scenario.act(folder))
    if again != "done":
        return "failed", f"after {first} ({text}), it cannot be done again: {digest}"
    for path in folder.glob("20*_*"):  # a run that was killed before it had a recipe: nothing reads its folder
        if not (path / "recipe.yaml").exists() and first == "killed":
            shutil.rmtree(path)
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".part.lock", ".unfinished"))]
    if first == "killed":  # between a file's rename and the removal of its lock, which the file's next writer removes
        left = [name for name in left if not name.endswith(".lock") or name.removesuffix(".lock") in left]
    if left:
        return "failed", f"after {first} ({text}), {left} are left"
    return first, digest


def with_kill(seconds: float, folder: Path, act: Callable[[Path], bytes]) -> bytes:
    """Do work in a folder, killed by another process after a time unless it is done by then."""
    worker, killer = os.getpid(), os.fork()
    if not killer:
        time.sleep(seconds)
        os.kill(worker, signal.SIGKILL)
        os._exit(0)
    content = act(folder)
    os.kill(killer, signal.SIGKILL)
    os.waitpid(killer, 0)
    return content


@contextmanager
def folders(scenario: Scenario) -> Iterator[tuple[Path, Path]]:
    """Yield the prepared folder of a scenario, and the path of that of a case."""
    with tempfile.TemporaryDirectory(prefix="overfly-faults-") as root:
        prepared = Path(root).resolve() / "prepared"
        prepared.mkdir()
        in_child(lambda: str(scenario.prepare(prepared)).encode())
        yield prepared, prepared.with_name("case")


def kill_at_random(name: str, times: int) -> dict[str, Any]:
    """Kill a scenario's work at random times within the duration of an undisturbed one."""
    scenario = SCENARIOS[name]
    counts: Counter[str] = Counter()
    problems: list[str] = []
    with folders(scenario) as (prepared, folder):
        shutil.copytree(prepared, folder)
        started = time.monotonic()
        outcome, expected = in_child(lambda: scenario.act(folder))
        duration = time.monotonic() - started
        for number in range(times):
            seconds = random.Random(number).uniform(0, duration)
            outcome, text = run_case(scenario, prepared, folder, partial(with_kill, seconds))
            if outcome != "failed" and text != expected:
                outcome, text = "failed", f"other content after {outcome}: {text}"
            counts[outcome] += 1
            if outcome == "failed":
                problems.append(f"kill after {seconds:.3f} s: {text}")
    return {"scenario": name, "seconds": round(duration, 1), **counts, "problems": problems}


def run_scenario(name: str, most: int, faults: list[str]) -> dict[str, Any]:
    """All cases of a scenario, or ``most`` evenly spaced ones of each fault and call."""
    scenario = SCENARIOS[name]
    counts: Counter[str] = Counter()
    problems: list[str] = []
    with folders(scenario) as (prepared, folder):
        outcome, expected = run_case(scenario, prepared, folder, partial(with_fault, (0, 0, 0)))
        if outcome != "done":
            return {"scenario": name, "problems": [expected]}
        totals = {}
        for call, mask in CALLS.items():

            def count(mask: int = mask) -> bytes:
                shutil.rmtree(folder)
                shutil.copytree(prepared, folder)
                with_fault((mask, 0, 0), folder, scenario.act)
                folder.with_name("count").write_text(str(ctypes.CDLL(None).fault_count()))
                return b""

            in_child(count)
            totals[call] = int(folder.with_name("count").read_text())
        for fault, (action, calls) in [(fault, FAULTS[fault]) for fault in faults]:
            for call in calls:
                step = max(1, -(-totals[call] // most))
                for number in range(1 + (len(fault) * 7) % step, totals[call] + 1, step):
                    disturb = partial(with_fault, (CALLS[call], number, action))
                    outcome, text = run_case(scenario, prepared, folder, disturb)
                    if outcome != "failed" and text != expected:
                        outcome, text = "failed", f"other content after {outcome}: {text}"
                    counts[outcome] += 1
                    if outcome == "failed":
                        problems.append(f"{fault} at {call} {number}: {text}")
    return {"scenario": name, "calls": totals, **counts, "problems": problems}


def set_up() -> None:
    """Import what children need, and make the work short."""
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    exporter.SECONDS, exporter.ROUNDS = 0.0, 1
    pipeline.RECALIBRATION = {"batch": 2, "steps": 1}


def main() -> int:
    """Run scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=[])
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--random", type=int, default=0, help="kills at random times instead; needs no shim")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    settings = parser.parse_args()
    set_up()
    failed = 0
    for name in settings.scenarios or [name for name in SCENARIOS if name != "careless"]:
        if settings.random:
            result = kill_at_random(name, settings.random)
        else:
            result = run_scenario(name, settings.most, settings.fault or list(FAULTS))
        failed += len(result["problems"])
        print(json.dumps(result), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
