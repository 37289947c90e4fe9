"""Feed damaged and hostile files to every reader, and count what happens.

    PYTHONPATH=src:tests python tests/fuzzing.py --inputs 100000 [--target image] [--first 0]

An input is made from a file of tests/seeds by its number alone, so that `--first N --inputs 1` makes input N again. A
reader may return, or raise an `OverflyError`. Anything else is counted as a finding: another exception, a crash of the
process, more than 10 seconds, more than 2 GB, or a file beside the input's. Exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import small_network  # noqa: F401 - registers the network of the seeds

SEEDS = Path(__file__).parent / "seeds"
SECONDS, MEMORY = 10, 2 * 2**30
"""Bounds of one input: seconds, and bytes of memory beyond those of the process at its start."""
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
TOKENS = (
    b"null", b"true", b"-1", b"0", b"1e308", b"1e-308", b".nan", b".inf", b"9" * 400, b"[]", b"{}", b"[[", b"{a: ",
    b"\n", b"- ", b": ", b"&a ", b"*a", b"!!python/object:os.system ", b"!!binary ", b"<<: ", b"%YAML 9\n", b"---\n",
    b"\xff", b"\xef\xbb\xbf", b"\x00", b"\x1b[31m", b"../../../etc/passwd", b"/dev/zero", b"name: folder", b"name: ",
    b"start: ", b"x" * 3000, b"\xed\xb3\xbf", b"a.b=", b"'", b'"', b"\\u0000", b"\\ud800", b"NaN", b"Infinity",
    b"<VRTDataset>", b"</VRTRasterBand>", b"<SourceFilename>/etc/passwd</SourceFilename>", b'rasterXSize="999999999"',
)  # fmt: skip


class Target(NamedTuple):
    """A reader: the name of its file in a folder, how often it is fed of 1000 inputs, and a function of the folder."""

    file: str
    share: int
    read: Callable[[Path], object]


def mutate(seeds: list[bytes], number: int) -> bytes:
    """Make an input from seeds: one to eight changes of one of them, cuts and joints among them."""
    random = np.random.default_rng(number)
    data = bytearray(seeds[int(random.integers(len(seeds)))])
    for _ in range(1 + min(7, int(random.exponential(1.2)))):
        size = len(data) + 1
        first, second = sorted(int(random.integers(size)) for _ in range(2))
        if random.random() < 0.3:  # headers are at the start
            first, second = min(first, 64), min(second, 96)
        kind = int(random.integers(9))
        if kind <= 1 and data:
            data[min(first, len(data) - 1)] ^= 1 << int(random.integers(8))
        elif kind == 2 and data:
            data[min(first, len(data) - 1)] = int(random.integers(256))
        elif kind == 3:
            width = int(random.choice([1, 2, 4, 8]))
            value = INTEGERS[int(random.integers(len(INTEGERS)))] & (256**width - 1)
            data[first : first + width] = value.to_bytes(width, "little" if random.random() < 0.5 else "big")
        elif kind == 4:
            data[first : first + int(random.integers(2)) * 8] = TOKENS[int(random.integers(len(TOKENS)))]
        elif kind == 5:
            del data[first : min(second, first + 64)]
        elif kind == 6:
            data[second:second] = data[first : min(second, first + 256)] * int(random.integers(1, 5))
        elif kind == 7 and random.random() < 0.3:
            del data[second:]
        elif kind == 8 and random.random() < 0.3:
            other = seeds[int(random.integers(len(seeds)))]
            data[first:] = other[int(random.integers(len(other) + 1)) :]
    return bytes(data[:200_000])


def read_image(folder: Path) -> object:
    from overfly.data import reading
    from overfly.web.images import check_header

    header = check_header(folder / "x", pixels=1_000_000)
    return reading.read_image(folder / "x", bands=None), reading.nodata_mask(folder / "x", bands=None), header


def read_mask(folder: Path) -> object:
    from overfly.core.records import Item
    from overfly.data import reading
    from overfly.web.images import check_header

    check_header(folder / "x.png", pixels=1_000_000)
    return reading.read_index_label(Item("x", Path(folder / "x.png"), Path(folder / "x.png")), 7)


def read_raster(folder: Path) -> object:
    from overfly.raster.raster_source import inspect_raster
    from overfly.web.images import check_header
    from rasters import metadata

    source = str(folder / "x.vrt") if (folder / "x.vrt").read_bytes()[:1] == b"<" else str(folder / "x")
    if not source.endswith(".vrt"):
        (folder / "x.vrt").rename(folder / "x")
        check_header(Path(source), pixels=1_000_000)
    return inspect_raster(source, metadata(), bands=None, nodata=None, max_value=None)


def read_recipe(folder: Path) -> object:
    from overfly.recipe import load

    return load(folder / "x.yaml")


def read_override(folder: Path) -> object:
    from overfly.recipe import load

    texts = [text for text in (folder / "x").read_bytes().decode("utf-8", "surrogateescape").split("\n") if text]
    return load({"source": {"name": "synthetic", "scene": "urban"}}, *texts)


def read_classes(folder: Path) -> object:
    from overfly.data.folder import read_classes as read

    return read(folder / "x.yaml")


def read_weights(folder: Path) -> object:
    from overfly.models.segmenter import Segmenter

    return Segmenter.load(folder / "x.safetensors")


def read_description(folder: Path) -> object:
    """The file as the description of a weights file whose digest fits."""
    from safetensors.torch import load, save

    from overfly.models.checkpoints import KEY, tensors_sha256
    from overfly.models.segmenter import Segmenter

    tensors = load((SEEDS / "weights" / "small.safetensors").read_bytes())
    text = (folder / "x").read_text(errors="surrogateescape")
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        described = dict(json.loads(text))
        described.pop("sha256", None)
        text = json.dumps({**described, "sha256": tensors_sha256(described, tensors)})
    (folder / "x.safetensors").write_bytes(save(tensors, {KEY: text.encode("utf-8", "replace").decode()}))
    return Segmenter.load(folder / "x.safetensors")


def read_metadata(folder: Path) -> object:
    from overfly.exporting.predictor import EXPORT_KEY, MODEL_KEY
    from overfly.exporting.predictor import read_metadata as read

    model, _, export = (folder / "x").read_text(errors="replace").partition("\n")
    return read({MODEL_KEY: model, EXPORT_KEY: export}, folder / "x")


def read_checkpoint(folder: Path) -> object:
    from overfly.models.checkpoints import check_values, read_tensors

    check_values(folder / "x.pth", read_tensors(folder / "x.pth"))
    return None


def read_run(folder: Path) -> object:
    from overfly.adaptation.selection import Comparison
    from overfly.training.run import Run

    (folder / "recipe.yaml").write_text("source: {name: synthetic, scene: urban}\n")
    results: list[object] = []
    errors = []
    for name in ("machine.json", "scores.json", "selection.json", "log.jsonl"):
        (folder / name).write_bytes((folder / "x").read_bytes())
    for part in (Run.open, lambda path: Run(path).scores, lambda path: Comparison(path).selection.markdown()):
        try:
            results.append(part(folder))
        except _known() as error:
            errors.append(error)
    results += Run(folder).log.rows()
    if not results:
        raise errors[0]
    return results


def read_onnx(folder: Path) -> object:
    from overfly.exporting.runtimes import onnx_predictor

    predictor = onnx_predictor(folder / "x.onnx", threads=1)
    if not predictor.metadata.fixed:
        predictor(np.zeros((1, predictor.metadata.bands, 64, 64), np.float32))
    return predictor


def read_openvino(folder: Path) -> object:
    from overfly.exporting.runtimes import openvino_predictor

    (folder / "x.bin").write_bytes((SEEDS / "openvino" / "net.bin").read_bytes())
    return openvino_predictor(folder / "x.xml", threads=1)


def read_program(folder: Path) -> object:
    from overfly.exporting.torch_program import read_program as read

    return read(folder / "x.pt2")


def read_list(folder: Path) -> object:
    from overfly.data.listing import find_images, select_split

    for name in ("a.png", "b 1.png"):
        (folder / name).write_bytes(b"")
    return select_split(find_images(folder, "*.png", None), "val", {"train": "a", "val": "x.txt"}, folder, 0)


def read_request(folder: Path) -> object:
    """The bytes of a file as a request of /predict: its form, or the image in a correct form."""
    from starlette.testclient import TestClient

    from overfly.web.server import application
    from overfly.web.service import Limits
    from served import network

    data = (folder / "x").read_bytes()
    app = application([network("0")], limits=Limits(upload=2_000_000, pixels=200_000, seconds=20))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        if data.startswith(b"--"):
            headers = {"content-type": "multipart/form-data; boundary=b"}
            answer = client.post("/predict", content=data, headers=headers)
        else:
            answer = client.post("/predict", files={"image": ("x", data)})
    if answer.status_code >= 500:
        raise AssertionError(f"status {answer.status_code}")
    return answer.json() if answer.status_code >= 400 else answer.content


TARGETS = {
    "image": Target("x", 200, read_image), "mask": Target("x.png", 100, read_mask),
    "raster": Target("x.vrt", 100, read_raster), "recipe": Target("x.yaml", 120, read_recipe),
    "override": Target("x", 60, read_override), "classes": Target("x.yaml", 60, read_classes),
    "weights": Target("x.safetensors", 40, read_weights), "description": Target("x", 30, read_description),
    "metadata": Target("x", 30, read_metadata), "checkpoint": Target("x.pth", 40, read_checkpoint),
    "run": Target("x", 80, read_run), "list": Target("x.txt", 50, read_list), "onnx": Target("x.onnx", 40, read_onnx),
    "openvino": Target("x.xml", 15, read_openvino), "program": Target("x.pt2", 15, read_program),
    "request": Target("x", 20, read_request),
}  # fmt: skip


def _known() -> type[Exception]:
    from overfly.core.errors import OverflyError

    return OverflyError


def seeds_of(name: str) -> list[bytes]:
    """The seeds of a target, in the order of their names."""
    return [file.read_bytes() for file in sorted((SEEDS / name).iterdir()) if file.suffix != ".bin"]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound time and memory of a block; the process ends with SIGALRM where the time is exceeded."""
    used = int(re.findall(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def attempt(target: Target, data: bytes) -> str:
    """Feed one input; return what happened: read, refused, or a finding of several lines."""
    with tempfile.TemporaryDirectory(prefix="overfly-fuzz-") as parent, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(parent) / "folder"
        folder.mkdir()
        (folder / target.file).write_bytes(data)
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(folder)
            outcome = "read"
        except _known() as error:
            outcome = "refused" if str(error).isprintable() and len(str(error)) <= 2000 else f"message {error!r}"
        except BaseException:
            outcome = traceback.format_exc()
        if [path.name for path in Path(parent).iterdir()] != ["folder"]:
            outcome = "a file beside the folder"
    return outcome


def work(target: Target, seeds: list[bytes], numbers: range, log: Path) -> None:
    """Feed inputs in this process; write the number and outcome of each to a file."""
    with log.open("a") as file:
        for number in numbers:
            file.write(f'{{"number": {number}}}\n')
            file.flush()
            outcome = attempt(target, mutate(seeds, number))
            file.write(json.dumps({"number": number, "outcome": outcome}) + "\n")


def fuzz(name: str, numbers: range, batch: int = 500) -> tuple[Counter[str], dict[int, str]]:
    """Feed inputs to a target in child processes.

    Returns:
        How many were read and refused, and the findings by the number of their input.
    """
    target, seeds = TARGETS[name], seeds_of(name)
    counts: Counter[str] = Counter()
    findings: dict[int, str] = {}
    first = numbers.start
    if name not in ("onnx", "openvino", "program", "request"):  # whose threads do not survive a fork
        attempt(target, seeds[0])  # imports, once for all children
    while first < numbers.stop:
        part = range(first, min(first + batch, numbers.stop))
        with tempfile.TemporaryDirectory(prefix="overfly-fuzz-log-") as folder:
            log = Path(folder) / "log"
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                faulthandler.disable()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                work(target, seeds, part, log)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            done = {}
            for line in log.read_text().splitlines():
                entry = json.loads(line)
                done[entry["number"]] = entry.get("outcome", f"the process ended with status {status}")
        for number, outcome in done.items():
            counts[outcome if outcome in ("read", "refused") else "findings"] += 1
            if outcome not in ("read", "refused"):
                findings[number] = outcome
        first = max(done, default=part.stop - 1) + 1
    return counts, findings


def main() -> int:
    """All targets, each with its share of the inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--first", type=int, default=0)
    settings = parser.parse_args()
    found = 0
    for name, target in TARGETS.items():
        if settings.target not in (None, name):
            continue
        count = settings.inputs if settings.target else max(1, settings.inputs * target.share // 1000)
        started = time.monotonic()
        counts, findings = fuzz(name, range(settings.first, settings.first + count))
        print(f"{name}: {dict(counts)}, {time.monotonic() - started:.0f} s", flush=True)
        kinds: dict[str, list[int]] = {}
        for number, outcome in findings.items():
            lines = outcome.strip().splitlines()
            kinds.setdefault("\n".join([*lines[-3:-1], lines[-1][:300]]), []).append(number)
        for kind, numbers in kinds.items():
            print(f"{len(numbers)} inputs, such as {numbers[:3]}:\n{kind}\n", flush=True)
        found += len(findings)
    print(f"{found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
