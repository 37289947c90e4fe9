"""The model card: what somebody must know who was not there when the network was trained (Mitchell et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from overfly.exporting.exporter import ExportReport


@dataclass(frozen=True)
class CardDomain:
    """A domain as the card tells of it.

    Attributes:
        title: what tables call it.
        about: lines of its data sheet: format, bands, license, citation.
        role: what the network had of it.
    """

    title: str
    about: Sequence[str]
    role: str


@dataclass(frozen=True)
class CardContent:
    """What is told beside the figures of an export.

    Attributes:
        title: of the run.
        method: how it was trained or adapted.
        places: the domains.
        scores: mIoU and IoU by class, by domain and split, by seed: of this run and of those that differ in the seed.
        verdict: the label-free evidence as Markdown; empty where the run was not adapted.
        recipe: the recipe as YAML.
    """

    title: str
    method: str
    places: Sequence[CardDomain]
    scores: Mapping[str, Mapping[int, Mapping[str, float | None]]] = field(default_factory=dict)
    verdict: str = ""
    recipe: str = ""


def card(found: ExportReport, story: CardContent) -> str:
    """A model card as Markdown."""
    metadata, settings = found.metadata, found.settings
    ground = "not known" if metadata.gsd is None else f"{metadata.gsd:g} m a pixel"
    size = f"tiles of {metadata.window}×{metadata.window}" if metadata.fixed else "any size"
    inner = "" if settings.resize is None else f", resized to {settings.resize}×{settings.resize} inside"
    gives = {
        "probabilities": "class probabilities (B, K, H, W), float32",
        "logits": "class scores before softmax (B, K, H, W), float32",
        "classes": "class ids (B, H, W), 8 bits",
    }[settings.output]
    lines = [
        f"# {metadata.architecture}, from {story.title}",
        "",
        f"Semantic segmentation of aerial imagery: `{found.file}`, {found.bytes / 1e6:.1f} MB, {settings.format}, "
        f"{_bits(settings.precision)}, written by overfly {settings.version}. SHA-256 `{found.sha256}`.",
        "",
        "## Use",
        f"- **In**: images (B, {metadata.bands}, H, W), float32, in the sensor's own range "
        f"(0 to {metadata.max_value:g}), {size}{inner}; the graph normalizes them itself.",
        f"- **Out**: {gives}.",
        f"- **Classes**: {', '.join(f'{number} {name}' for number, name in enumerate(metadata.classes.names))}.",
        f"- **Ground resolution** of the training images: {ground}. At another resolution objects have other sizes in "
        "pixels; resample first.",
        f"- `overfly predict {found.file} scene.tif` makes a map; in QGIS, see the guide." if settings.format == "onnx"
        else f"- `overfly predict {found.file} scene.tif` makes a map.",
        "",
        "## Data",
    ]  # fmt: skip
    for place in story.places:
        lines += [f"- **{place.title}** ({place.role}). {' '.join(place.about)}"]
    lines += ["", f"Trained by {story.method}.", "", "## Scores", *_scores(story), ""]
    if story.verdict:
        lines += ["## Evidence without target labels", story.verdict, ""]
    lines += ["## Agreement with PyTorch", *_parity(found), "", "## Latency", *_latency(found), "", "## Limits"]
    lines += _limits(found, story)
    if story.recipe:
        lines += ["", "## Recipe", "```text", story.recipe.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _bits(precision: str) -> str:
    return {"32": "32-bit floats", "16": "16-bit floats", "int8": "8-bit integers"}[precision]


def _scores(story: CardContent) -> list[str]:
    if not story.scores:
        return ["Not scored against labels. `overfly evaluate` does it."]
    seeds = sorted({seed for by_seed in story.scores.values() for seed in by_seed})
    lines = [
        f"Of the trained network in PyTorch, IoU in percent, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        + (" (mean ± standard deviation of the seeds that were scored):" if len(seeds) > 1 else ":"),
        "",
    ]
    names = list(dict.fromkeys(name for runs in story.scores.values() for each in runs.values() for name in each))
    keys = list(story.scores)
    lines += [f"| | {' | '.join(keys)} |", f"|---|{'---|' * len(keys)}"]
    for name in names:
        cells = [_mean([each[name] for each in story.scores[key].values() if name in each]) for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.1f}"
    deviation = (sum((value - mean) ** 2 for value in known) / (len(known) - 1)) ** 0.5
    return f"{mean:.1f} ± {deviation:.1f} ({len(known)})"


def _parity(found: ExportReport) -> list[str]:
    lines = [
        f"On {found.parity[0].images} images of {found.images}, PyTorch in float32 against this file:",
        "",
        "| runtime | same class | largest difference of a logit | of a probability | mIoU | mIoU of PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    for each in found.parity:
        logit = "–" if each.logit_difference is None else f"{each.logit_difference:.2g}"
        mious = [("–" if value is None else f"{100 * value:.2f}") for value in (each.miou, each.miou_of_torch)]
        lines.append(
            f"| {each.backend} | {100 * each.agreement:.3f} % | {logit} | {each.probability_difference:.2g} | "
            f"{mious[0]} | {mious[1]} |"
        )
    for each in found.parity:
        if each.violations:
            lines += ["", f"**Not for {each.backend}**: {each.violations}."]
    return lines


def _latency(found: ExportReport) -> list[str]:
    machine = found.machine
    lines = [
        f"One image of {found.latency_side}×{found.latency_side} on {machine.get('device')}, "
        f"{machine.get('threads')} thread(s) for PyTorch, the runtimes as they choose:",
        "",
        "| runtime | median ms | least ms |",
        "|---|---|---|",
    ]
    return [
        *lines,
        *(f"| {name} | {each.median_ms:.1f} | {each.least_ms:.1f} |" for name, each in found.latency.items()),
    ]


def _limits(found: ExportReport, story: CardContent) -> list[str]:
    seen = " and ".join(place.title for place in story.places) or "its training domains"
    lines = [
        f"- It knows {seen}; elsewhere, in another season or with another sensor, it has not been measured.",
        "- Every pixel gets one of the classes above, what is none of them too.",
        f"- It was made for images of {found.metadata.bands} bands in the order of the training images.",
    ]
    if not any("labels" in place.role for place in story.places):
        lines.append("- Nothing is known here of the labels that it was trained on.")
    if found.settings.output == "classes":
        lines.append("- The file tells no probabilities, so its certainty cannot be read.")
    return lines


__all__ = ["CardContent", "CardDomain", "card"]
