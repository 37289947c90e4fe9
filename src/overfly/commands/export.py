"""The commands ``export``, ``hub push`` and ``hub load``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import MAX_SIDE, PathLike, check_bounds
from overfly.core.choices import ExportFormat, ExportOutput, ExportPrecision
from overfly.core.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from overfly.exporting.exporter import ExportReport
    from overfly.exporting.predictor import ExportSettings


@dataclass(frozen=True)
class ExportResult:
    """An exported file that agrees with PyTorch."""

    path: Path
    card: Path
    found: ExportReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        found = self.found
        table = Table(title=f"{self.path.name} against PyTorch, on {found.images}", title_justify="left")
        time = f"ms an image of {found.latency_side}×{found.latency_side}"
        for heading in ("runtime", "same class", "mIoU", "mIoU of PyTorch", time):
            table.add_column(heading, justify="left" if heading == "runtime" else "right")
        for each in found.parity:
            time = f"{found.latency[each.backend].median_ms:.1f}" if each.backend in found.latency else "–"
            mious = ["–" if value is None else f"{100 * value:.2f}" for value in (each.miou, each.miou_of_torch)]
            table.add_row(each.backend, f"{100 * each.agreement:.3f} %", *mious, time)
        if "torch eager" in found.latency:
            threads = found.machine["threads"]
            eager = f"torch eager, {threads} thread{'s' * (threads != 1)}"
            table.add_row(eager, "", "", "", f"{found.latency['torch eager'].median_ms:.1f}")
        yield table
        for each in found.parity:
            if each.violations:
                yield f"not for {each.backend}: {each.violations}"
        yield f"exported: {self.path} ({found.bytes / 1e6:.1f} MB)"
        yield f"report:   {self.path.with_suffix('.json')}"
        yield f"card:     {self.card}"


@dataclass(frozen=True)
class HubResult:
    """Files that went to a hub or came from it."""

    files: list[str]
    place: str
    verb: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (f"{self.verb}: {file}" for file in self.files)
        yield self.place


def export(
    run: PathLike,
    *,
    format: ExportFormat = "onnx",  # noqa: A002  (the command line's --format)
    precision: ExportPrecision = "32",
    output: ExportOutput = "probabilities",
    size: int | None = None,
    resize: int | None = None,
    domain: str = "target",
    images: int = 12,
    labels: bool = True,
    name: str | None = None,
    out: PathLike | None = None,
    quiet: bool = False,
) -> ExportResult:
    """Export a trained network and compare the file with PyTorch.

    The file takes images in the sensor's own range and normalizes them itself; training heads
    are removed. It is compared with PyTorch on images of the target; beyond the tolerance the command fails and leaves
    no file.

    Args:
        run: the folder of a finished run; or a comparison folder, for its recommended network.
        format: onnx (.onnx), openvino (.xml and .bin) or torch (.pt2).
        precision: 32, 16, or int8, whose value ranges are measured on unlabeled images of the target.
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
    from overfly.commands.export_inputs import card_content, evaluation_data, export_domain, record_labels
    from overfly.commands.load_predictor import NetworkFolder, load_network
    from overfly.core.progress import print_status
    from overfly.exporting.exporter import export as export_network
    from overfly.exporting.formats import OPSET
    from overfly.exporting.hub import model_card
    from overfly.exporting.predictor import ExportSettings

    check_bounds(
        {"size": (size or 32, 32, MAX_SIDE), "resize": (resize or 32, 32, MAX_SIDE), "images": (images, 1, 10**4)}
    )
    opened = NetworkFolder.open(run)
    segmenter, metadata = load_network(opened.path)
    recipe = None if opened.run is None else opened.run.recipe
    inner = ((recipe.resize if recipe else None) if resize is None else resize) or None
    if size is not None:
        metadata = metadata.model_copy(update={"window": size, "fixed": True})
    settings = ExportSettings(
        format=format, precision=precision, output=output, resize=inner, opset=OPSET if format == "onnx" else 0
    )
    stem = name or _stem(metadata.architecture, settings, size)
    if Path(stem).name != stem:
        raise RecipeError(f"--name must be a file name without folders, got {stem}; give the folder as --out")
    compared = export_domain(opened, domain, metadata)
    data = evaluation_data(compared, recipe, settings, metadata.window, images, labels=labels)
    folder = Path(out) if out is not None else opened.path / "exports"
    path, found = export_network(
        segmenter,
        metadata,
        settings,
        data,
        folder=folder,
        name=stem,
        on_progress=lambda text: print_status(text, quiet=quiet),
    )
    own = {"target": recipe.target, "source": recipe.source} if recipe else {}
    role = next((role for role, each in own.items() if domain in own and each is compared), domain)
    if opened.run is not None:
        record_labels(opened.run, role, found)
    written = path.with_suffix(".md")
    written.write_text(model_card(found, card_content(opened)), encoding="utf-8")
    return ExportResult(path, written, found)


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

    files, place = hub.push(Path(export), repository, private=private, endpoint=endpoint)
    return HubResult(files, place, "pushed")


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
    return HubResult([str(file) for file in files], f"predict with: overfly predict {files[0]} scene.tif", "loaded")


def _stem(architecture: str, settings: ExportSettings, size: int | None) -> str:
    """Return the default file name, without suffix."""
    output = [settings.output] * (settings.output != "probabilities")
    return "-".join([architecture, settings.format, settings.precision, *output, *([str(size)] * bool(size))])
