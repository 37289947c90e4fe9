"""Feed inputs that reach new code to the readers of tests/fuzzing.py, with atheris (libFuzzer).

    pip install -e '.[fuzz]'
    PYTHONPATH=src:tests python tests/coverage_fuzzing.py [TARGET …] [--seconds 60]

The corpus begins with tests/seeds, and grows by each input that reaches a line or branch of overfly that none before
has reached. The bounds of an input, and what counts as a finding, are those of tests/fuzzing.py. Prints the number of
inputs of a target, the size of its corpus, and each kind of finding with the file that holds such an input; exits 1 if
there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["overfly"], enable_loader_override=False):
    import fuzzing
    import overfly.adaptation.selection
    import overfly.data.folder
    import overfly.exporting.runtimes
    import overfly.exporting.torch_program
    import overfly.models.checkpoints
    import overfly.raster.raster_source
    import overfly.training.run
    import overfly.web.server  # noqa: F401 - imported here, so that they are instrumented

PYTHON_ALONE = [name for name in fuzzing.TARGETS if name not in ("onnx", "openvino", "program", "request")]
"""Targets whose code is Python, which atheris sees."""


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Fuzz a target until libFuzzer ends the process; write one line an input."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with (folder / "log").open("w") as log:

        def feed(data: bytes) -> None:
            outcome = fuzzing.attempt(fuzzing.TARGETS[name], data)
            if outcome not in ("read", "refused"):
                file = Path(tempfile.gettempdir(), f"overfly-{name}-{hashlib.sha256(data).hexdigest()[:12]}")
                file.write_bytes(data)
                outcome = "\n".join([str(file), *outcome.strip().splitlines()[-3:]])[:600]
            log.write(json.dumps(outcome) + "\n")
            log.flush()

        feed(fuzzing.seeds_of(name)[0])  # imports
        options = [f"-max_total_time={seconds}", "-max_len=200000", "-timeout=0", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], feed)
        atheris.Fuzz()


def main() -> int:
    """Fuzz each target in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=PYTHON_ALONE)
    parser.add_argument("--seconds", type=int, default=60)
    settings = parser.parse_args()
    failed = False
    for name in settings.targets:
        with tempfile.TemporaryDirectory(prefix="overfly-corpus-") as root:
            folder = Path(root)
            shutil.copytree(fuzzing.SEEDS / name, folder / "corpus")
            child = os.fork()
            if not child:
                fuzz(name, folder, settings.seconds)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            outcomes = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
            size = len(list((folder / "corpus").iterdir()))
        counts = Counter(outcome if outcome in ("read", "refused") else "findings" for outcome in outcomes)
        kinds = {outcome.partition("\n")[2]: outcome for outcome in outcomes if outcome not in ("read", "refused")}
        print(f"{name}: {dict(counts)}, corpus {size}, status {status}", *kinds.values(), sep="\n", flush=True)
        failed |= bool(kinds) or status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
