"""What the API does to send a network out: export it, push it to a model hub, load it from one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from overfly.adaptation.selection import Selection
from overfly.commands.arguments import MAX_SIDE, check_bounds, load_domain, pathlike
from overfly.commands.load_predictor import NetworkFolder, load_network
from overfly.core.choices import ExportFormat, ExportOutput, ExportPrecision
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.core.records import Item
from overfly.data.domain import Domain, Split, SplitError, sample_evenly, without_labels
from overfly.evaluation.images import to_tensor
from overfly.exporting import hub
from overfly.exporting.exporter import EvaluationData, ExportReport
from overfly.exporting.exporter import export as write
from overfly.exporting.formats import OPSET
from overfly.exporting.hub import CardContent, CardDomain, model_card
from overfly.exporting.metadata import ExportSettings
from overfly.exporting.parity import LabeledSplit
from overfly.exporting.predictor import Floats, ModelMetadata
from overfly.ops.windows import cut, windows
from overfly.recipe import Recipe
from overfly.training.evaluate import has_labels
from overfly.training.run import Run

__all__ = ["export", "hub_load", "hub_push"]

CALIBRATION = 32
"""Unlabeled target images that the ranges of 8-bit maps are measured on."""


@dataclass(frozen=True)
class ExportResult:
    """An exported file that agrees with PyTorch."""

    path: Path
    card: Path
    found: ExportReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
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
        yield f"figures:  {self.path.with_suffix('.json')}"
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


@pathlike
def export(
    run: Path | str,
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
    out: Path | None = None,
    quiet: bool = False,
) -> ExportResult:
    """Export a trained network, and measure that it says what PyTorch says before it gets its name.

    The file takes images in the sensor's own range and normalizes them itself; heads that only training reads are
    gone. It is compared with PyTorch on real images of the target; beyond tolerance the command fails, says in which
    layer the difference begins, and leaves no file.

    Args:
        run: the folder of a finished run; or a comparison folder, for its recommended network.
        format: onnx (.onnx), openvino (.xml and .bin) or torch (.pt2).
        precision: 32, 16, or int8, whose ranges are measured on unlabeled images of the target.
        output: what the file gives: probabilities, logits, or classes (ids, 8 bits).
        size: side of tiles of one fixed size, in pixels, as QGIS wants it; left out: images of any size.
        resize: side of the square that the file resizes images to inside; 0: none; left out: as the run's recipe says.
        domain: target or source of the recipe, or the file or name of another domain, to measure on.
        images: how many images it is compared on.
        labels: let the scorer read the domain's labels in val, where there are any, to compare mIoU too.
        name: of the file, without suffix; left out: network, format and precision.
        out: folder to write to; left out: the run's folder exports.
        quiet: do not say what is being done.

    Returns:
        The file, the figures, and the model card beside it.
    """
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
    stem = _stem(name, metadata, settings, size)
    place = _domain(opened, domain, metadata)
    data = _evidence(place, recipe, settings, metadata.window, images, labels=labels)
    folder = Path(out) if out is not None else opened.path / "exports"
    path, found = write(
        segmenter, metadata, settings, data, folder=folder, name=stem, on_progress=(lambda _: None) if quiet else _tell
    )
    own = {"target": recipe.target, "source": recipe.source} if recipe else {}
    role = next((role for role, each in own.items() if domain in own and each is place), domain)
    if opened.run is not None:
        _note_labels(opened.run, role, found)
    written = path.with_suffix(".md")
    written.write_text(model_card(found, card_content(opened)), encoding="utf-8")
    return ExportResult(path, written, found)


@pathlike
def hub_push(export: Path, repository: str, *, private: bool = True, endpoint: str | None = None) -> HubResult:
    """Push an exported file, its figures and its model card to a model hub.

    The card becomes the hub's page. The hub's token is the one that `hf auth login` keeps, or that of HF_TOKEN.

    Args:
        export: an exported file (.onnx, .xml or .pt2).
        repository: of the hub, as OWNER/NAME; or a folder, as file:///FOLDER, which is laid out like one.
        private: make a new repository private.
        endpoint: address of another hub than Hugging Face's.

    Returns:
        What was pushed, and where.
    """
    files, place = hub.push(Path(export), repository, private=private, endpoint=endpoint)
    return HubResult(files, place, "pushed")


@pathlike
def hub_load(
    repository: str, *, out: Path = Path("hub"), revision: str | None = None, endpoint: str | None = None
) -> HubResult:
    """Load exported files from a model hub.

    Args:
        repository: of the hub, as OWNER/NAME; or a folder, as file:///FOLDER.
        out: folder to write to.
        revision: branch, tag or commit; left out: the newest.
        endpoint: address of another hub than Hugging Face's.

    Returns:
        The files. `overfly predict` opens them.
    """
    files = hub.load(repository, Path(out), revision=revision, endpoint=endpoint)
    return HubResult([str(file) for file in files], f"predict with: overfly predict {files[0]} scene.tif", "loaded")


def _tell(said: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(said)


def _stem(name: str | None, metadata: ModelMetadata, settings: ExportSettings, size: int | None) -> str:
    """Name of the exported file, without suffix."""
    output = [settings.output] * (settings.output != "probabilities")
    stem = name or "-".join(
        [metadata.architecture, settings.format, settings.precision, *output, *([str(size)] * bool(size))]
    )
    if Path(stem).name != stem or not stem:
        raise RecipeError(f"--name {stem} is no name of a file; give one without folders, and --out for the folder")
    return stem


def _domain(folder: NetworkFolder, text: str, metadata: ModelMetadata) -> Domain:
    """The domain that an export is measured on, which has the network's classes and bands."""
    recipe = None if folder.run is None else folder.run.recipe
    domains = (recipe.target, recipe.source) if recipe else ()
    order = domains if text == "target" else domains[::-1]
    own = next((domain for domain in order if domain is not None), None)
    found = own if text in ("target", "source") else load_domain(text)
    if found is None:
        raise DataError(f"{folder.path} has no domain to measure an export on; name one as --domain")
    if found.classes.names != metadata.classes.names or found.bands != metadata.bands:
        raise RecipeError(
            f"the domain {found.title} has other classes or bands than the network; give one with "
            f"{', '.join(metadata.classes.names)} and {metadata.bands} bands as --domain"
        )
    return found


def _evidence(
    place: Domain, recipe: Recipe | None, settings: ExportSettings, window: int, images: int, *, labels: bool
) -> EvaluationData:
    """Unlabeled images of a domain, and where its labels are for the scorer."""
    before = None if settings.resize or recipe is None else recipe.resize
    side = None if settings.resize else window
    shown: Split = "val" if _pictures(place, "val") else "train" if _pictures(place, "train") else "test"
    measured: Split = "train" if _pictures(place, "train") else shown
    calibration: list[Floats] = []
    if settings.precision == "int8":
        calibration = list(patches(place, measured, CALIBRATION, window))
    labeled_split = None
    if labels and has_labels(place, "val"):
        labeled_split = LabeledSplit(place, "val", before, side, images)
    return EvaluationData(
        images=list(patches(place, shown, images, side or window)),
        calibration=calibration,
        labels=labeled_split,
        title=f"{place.title} ({shown})",
    )


def patches(place: Domain, split: Split, limit: int, side: int) -> Iterator[Floats]:
    """Square patches of a split's pictures, evenly spread over pictures and places in them; labels are taken away.

    Args:
        place: whose pictures.
        split: which of them.
        limit: how many.
        side: of each, in pixels; smaller pictures are padded by repeating their border.

    Yields:
        (1, C, side, side), float32, in the sensor's own range.

    Raises:
        DataError: the split has no pictures.
    """
    items = sample_evenly(_pictures(place, split), limit)
    if not items:
        raise DataError(f"the domain {place.title} has no pictures to measure an export on; name another as --domain")
    for index, item in enumerate(items):
        image = to_tensor(place.read_image(item))
        found = windows(image.shape[-2], image.shape[-1], side, 0.0)
        share = limit * (index + 1) // len(items) - limit * index // len(items)
        count = min(share, len(found))
        for at in range(count):
            window = found[int((at + 0.5) * len(found) / count)]
            yield np.ascontiguousarray(cut(image, window, side)[None].numpy(), np.float32)


def _pictures(place: Domain, split: Split) -> list[Item]:
    try:
        return without_labels(place.items(split))
    except SplitError:
        return []


def _note_labels(run: Run, key: str, found: ExportReport) -> None:
    """Write down in the run how often labels were opened to compare mIoU."""
    opened = max((each.labels_opened for each in found.parity), default=0)
    if not opened:
        return
    scores = run.scores
    counts = scores.setdefault("labels_opened", {}).setdefault(f"{key}/val", {"times": 0, "images": 0})
    times = 1 + len(found.parity)
    counts["times"] += times
    counts["images"] += times * opened
    run.write_json("scores.json", scores)


def card_content(folder: NetworkFolder) -> CardContent:
    """The content of a model card: domains, scores of the run and of its other seeds, and the selection."""
    selection = _selection_text(folder.selection)
    if folder.run is None:
        return CardContent(
            title=folder.path.name,
            method="unknown: the run of the recommended network does not exist any more",
            domains=[],
            selection=selection,
        )
    run, recipe = folder.run, folder.run.recipe
    places = []
    for domain, role in ((recipe.source, "with labels, trained on"), (recipe.target, "without labels, adapted to")):
        if domain is not None:
            places.append(CardDomain(domain.title, sheet(domain), role))
    if recipe.target is not None and not recipe.method.needs_target:
        places[-1] = CardDomain(recipe.target.title, sheet(recipe.target), "not seen in training")
    return CardContent(
        title=run.path.name,
        method=f"`{recipe.method.name}`: {(inspect.getdoc(type(recipe.method)) or '').splitlines()[0].rstrip('.')}",
        domains=places,
        scores=scores_of_seeds(run),
        selection=selection,
        recipe=yaml.safe_dump(_without_paths(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    )


def sheet(domain: Domain) -> list[str]:
    """The lines of a domain's data sheet, joined to sentences."""
    text = inspect.getdoc(type(domain)) or ""
    return [" ".join(entry.split()) for entry in text.split("* ")[1:]]


def scores_of_seeds(run: Run) -> dict[str, dict[int, dict[str, float | None]]]:
    """Scores of a run and of its siblings that differ in the seed: by domain and split, by seed, mIoU and classes."""
    found: dict[str, dict[int, dict[str, float | None]]] = {}
    plain = _unseeded(run.recipe.model_dump(mode="json"))
    for file in sorted(run.path.parent.glob("*/recipe.yaml")):
        sibling = Run(file.parent)
        try:
            recipe = sibling.recipe
            if file.parent != run.path and _unseeded(recipe.model_dump(mode="json")) != plain:
                continue
            scores = sibling.scores
        except RunError:
            continue
        for key, value in scores.items():
            if isinstance(value, dict) and "miou" in value:
                classes = {name: each.get("iou") for name, each in value.get("classes", {}).items()}
                found.setdefault(key, {})[recipe.seed] = {"mIoU": value["miou"], **classes}
    return found


def _unseeded(values: Any) -> Any:
    """A recipe's values without the seeds of training, at any depth of ``start``."""
    if isinstance(values, dict):
        keep = {key: value for key, value in values.items() if key not in ("seed", "weights")}
        return {key: _unseeded(value) if key == "start" else value for key, value in keep.items()}
    return None if isinstance(values, str) else values


def _selection_text(selection: Selection | None) -> str:
    """Summary, candidates and differing settings of a selection as Markdown; empty without one."""
    if selection is None:
        return ""
    summary = f"{selection.summary[0].upper()}{selection.summary[1:]}. Target labels opened: {selection.labels_opened}."
    differences = "\n".join(f"- {line}" for line in selection.differences)
    return "\n\n".join(filter(None, [summary, selection.table(), differences]))


def _without_paths(values: Any) -> Any:
    """A recipe's values with paths of this machine cut down to their last part."""
    if isinstance(values, dict):
        return {key: _without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    return Path(values).name if isinstance(values, str) and values.startswith("/") else values
