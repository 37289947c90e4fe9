"""Open an exported file in a child process with bounds of time and memory, before this process opens it.

A file that was opened, or exported, is remembered in the cache folder by its digest, and not tried again.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from overfly.core.atomic_files import file_sha256
from overfly.core.download import cache_folder
from overfly.core.errors import OverflyError, WeightsError
from overfly.exporting.predictor import Predictor
from overfly.exporting.runtimes import export_parts, onnx_predictor, openvino_core, openvino_predictor, torch_predictor

SECONDS = 120
"""Most seconds of computing in which a file is opened and predicts one image."""
PATIENCE = 5
"""Times as many seconds after which the child process is ended on a machine with other work."""
MEMORY = 8 * 2**30
"""Most bytes of memory that it takes."""
PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "onnxruntime": onnx_predictor, "openvino": openvino_predictor, "torch": torch_predictor,
}  # fmt: skip
LOOPS = {"Loop", "Scan", "If", "SequenceMap", "TensorIterator"}
"""Operators whose time depends on the image, so that no trial bounds it; `overfly export` writes none."""


def check_resources(path: Path, backend: str) -> None:
    """Open a file in a child process, and predict one image, unless it was opened before.

    Raises `WeightsError` if it cannot be opened, or not within `SECONDS` and `MEMORY`.
    """
    record = _record(path, backend)
    if record.exists():
        return
    command = [sys.executable, "-P", "-m", "overfly.exporting.trial", str(path), backend]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=PATIENCE * SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        ended = None
    if ended is None or ended.returncode not in (0, 2):
        raise WeightsError(
            f"{path} cannot be opened by {backend} within {SECONDS} s and {MEMORY / 2**30:g} GB, so that it is not "
            "used; export it again"
        )
    if ended.returncode:
        raise WeightsError(ended.stdout.decode(errors="replace").strip())
    remember(path, backend)


def remember(path: Path, *backends: str) -> None:
    """Record that a file can be opened."""
    with suppress(OSError):
        for backend in backends:
            record = _record(path, backend)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()


def _record(path: Path, backend: str) -> Path:
    return cache_folder() / "opened" / f"{file_sha256(*export_parts(path))}-{backend}"


def _limit() -> None:
    """Bound the time and memory that this process takes from now on, where the system can."""
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        used = int(re.findall(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))


def _operators(path: Path) -> set[str]:
    """Return the types of operators of an ONNX or OpenVINO file; those of .pt2 files are checked when it is read."""
    if path.suffix.lower() == ".xml":
        return {str(operator.get_type_name()) for operator in openvino_core().read_model(path).get_ops()}
    if path.suffix.lower() != ".onnx":
        return set()
    import onnx

    model = onnx.load(path, load_external_data=False)
    return {node.op_type for part in (model.graph, *model.functions) for node in part.node}


def main(path: Path, backend: str) -> int:
    """Open a file and predict one image; print why it cannot be used, and return 2 then."""
    _limit()
    loops = ""
    with suppress(Exception):  # a damaged file gets the runtime's message
        loops = ", ".join(sorted(_operators(path) & LOOPS))
    try:
        if loops:
            raise WeightsError(f"{path} has operators without a bound of time ({loops}); export it again")
        predictor = PREDICTORS[backend](path)
        side = predictor.metadata.window
        predictor(np.zeros((1, predictor.metadata.bands, side, side), np.float32))
    except OverflyError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # runtimes write lines of their own to standard output
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
