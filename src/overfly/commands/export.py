"""The commands ``export``, ``hub push`` and ``hub load``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from overfly.commands.arguments import MAX_SIDE, PathLike, check_bounds
from overfly.core.choices import ExportFormat, ExportOutput, ExportPrecision
from overfly.core.errors import OverflyError, RecipeError
from overfly.core.progress import print_status

if TYPE_CHECKING:
    from overfly.exporting.exporter import ExportReport


@dataclass(frozen=True)
class ExportResult:
    """An exported file with its model card and report."""

    path: Path
    card: Path
    report: ExportReport

    def __rich_console__(self, *_: object) -> Iterator[str | Table]:
        report = self.report
        table = Table(title=f"{self.path.name} against PyTorch, on {report.images}", title_justify="left")
        time = f"ms an image of {report.latency_side}×{report.latency_side}"
        for heading in ("runtime", "same class", "mIoU", "mIoU of PyTorch", time):
            table.add_column(heading, justify="left" if heading == "runtime" else "right")
        for parity in report.parity:
            latency = report.latency.get(parity.backend)
            time = "–" if latency is None else f"{latency.median_ms:.1f}"
            mious = ["–" if value is None else f"{100 * value:.2f}" for value in (parity.miou, parity.miou_of_torch)]
            table.add_row(parity.backend, f"{100 * parity.agreement:.3f} %", *mious, time)
        if "torch eager" in report.latency:
            threads = report.machine["threads"]
            eager = f"torch eager, {threads} thread{'s' * (threads != 1)}"
            table.add_row(eager, "", "", "", f"{report.latency['torch eager'].median_ms:.1f}")
        yield table
        for parity in report.parity:
            if parity.violations:
                yield f"beyond tolerance with {parity.backend}: {parity.violations}"
        yield f"exported: {self.path} ({report.bytes / 1e6:.1f} MB)"
        yield f"report:   {self.path.with_suffix('.json')}"
        yield f"card:     {self.card}"


@dataclass(frozen=True)
class HubResult:
    """Files that were pushed to a hub or loaded from it."""

    verb: str
    files: list[str]
    note: str

    def __rich_console__(self, *_: object) -> Iterator[str | Table]:
        yield from (f"{self.verb}: {file}" for file in self.files)
        yield self.note


def export(
    run: PathLike, *, format: ExportFormat = "onnx",  # noqa: A002  (the command line's --format)
    precision: ExportPrecision = "32", output: ExportOutput = "probabilities", size: int | None = None,
    resize: int | None = None, domain: str = "target", images: int = 12, labels: bool = True, name: str | None = None,
    out: PathLike | None = None, quiet: bool = False,
) -> ExportResult:  # fmt: skip
    """Export a trained network and compare the file with PyTorch.

    The exported network normalizes images itself and has no training heads. Its predictions on images of the target
    are compared with PyTorch's; where they differ by more than the tolerance, the command fails and writes no file.

    Args:
        run: the folder of a finished run; or a comparison folder, for its recommended network.
        format: onnx (.onnx), openvino (.xml and .bin) or torch (.pt2).
        precision: 32, 16, or int8, which is calibrated on unlabeled images of the target.
        output: output of the network: probabilities, logits, or classes (ids, 8 bits).
        size: fixed side of the images in pixels, as QGIS requires; default: any size.
        resize: side of the square to which the file resizes images; 0: none; default: the recipe's.
        domain: target or source of the recipe, or the file or name of another domain, to compare on.
        images: number of images to compare on.
        labels: open the domain's labels in val, if any, to compare mIoU too.
        name: file name without suffix; default: network, format and precision.
        out: folder to write to; default: the run's folder exports.
        quiet: print no progress.

    Returns:
        The file, its report and its model card.
    """
    from overfly.commands.export_data import card_content, evaluation_data, export_domain, record_labels
    from overfly.commands.load_predictor import NetworkFolder, load_network
    from overfly.core.atomic_files import write_text
    from overfly.core.download import disk_errors
    from overfly.exporting.exporter import export as export_network
    from overfly.exporting.formats import OPSET
    from overfly.exporting.hub import model_card
    from overfly.exporting.predictor import ExportSettings
    from overfly.models.checkpoints import weights_sha256

    sides = {name: (value or 32, 32, MAX_SIDE) for name, value in (("size", size), ("resize", resize))}
    check_bounds({**sides, "images": (images, 1, 10**4)})
    folder, (segmenter, metadata) = NetworkFolder.open(run), load_network(run)
    recipe = None if folder.run is None else folder.run.recipe
    resize = recipe.resize if resize is None and recipe else resize
    metadata = metadata.model_copy(update={"window": size, "fixed": True}) if size else metadata
    opset = OPSET if format == "onnx" else 0
    settings = ExportSettings(format=format, precision=precision, output=output, resize=resize or None, opset=opset)
    parts = (metadata.architecture, format, precision, output if output != "probabilities" else "", size)
    stem = name or "-".join(map(str, filter(None, parts))).replace(":", "-")
    if Path(stem).name != stem:
        raise RecipeError(f"--name must be a file name without folders, got {stem}; give the folder as --out")
    compared = export_domain(folder, domain, metadata)
    data = evaluation_data(compared, recipe, settings, metadata.window, images, labels=labels)
    path, report = export_network(
        segmenter, metadata, settings, data, folder=Path(out or folder.path / "exports"), name=stem,
        on_progress=partial(print_status, quiet=quiet), weights_sha256=weights_sha256(folder.weights),
    )  # fmt: skip
    record_labels(folder.run, domain, compared, report)
    with disk_errors(card := path.with_suffix(".md"), OverflyError):
        write_text(card, model_card(report, card_content(folder)))
    return ExportResult(path, card, report)


def hub_push(export: PathLike, repository: str, *, private: bool = True, endpoint: str | None = None) -> HubResult:
    """Push an exported file, its report and its model card to a model hub.

    The card becomes the hub's page. The hub's token is the one that `hf auth login` keeps, or that of HF_TOKEN.

    Args:
        export: an exported file (.onnx, .xml or .pt2).
        repository: OWNER/NAME on the hub; or file:///FOLDER, a folder of the same layout.
        private: make a new repository private.
        endpoint: address of another hub than Hugging Face's.

    Returns:
        What was pushed, and where.
    """
    from overfly.exporting import hub

    files, address = hub.push(Path(export), repository, private=private, endpoint=endpoint)
    return HubResult("pushed", files, address)


def hub_load(
    repository: str, *, out: PathLike = Path("hub"), revision: str | None = None, endpoint: str | None = None
) -> HubResult:
    """Load exported files from a model hub.

    Args:
        repository: OWNER/NAME on the hub; or file:///FOLDER.
        out: folder to write to.
        revision: branch, tag or commit; default: the newest.
        endpoint: address of another hub than Hugging Face's.

    Returns:
        The files. `overfly predict` opens them.
    """
    from overfly.exporting import hub

    files = hub.load(repository, Path(out), revision=revision, endpoint=endpoint)
    return HubResult("loaded", list(map(str, files)), f"predict with: overfly predict {files[0]} scene.tif")
