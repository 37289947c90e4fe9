"""The commands ``rank`` and ``suggest``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import MAX_SIDE, PathLike, PathLikes, check_bounds
from overfly.core.choices import Split
from overfly.core.errors import import_extra

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from overfly.adaptation.model_selection import Candidate, Ranking
    from overfly.adaptation.suggestion import Pick
    from overfly.data.domain import Domain
    from overfly.models.segmenter import Segmenter
    from overfly.recipe import Recipe


@dataclass(frozen=True)
class RankResult:
    """Networks ranked without target labels."""

    ranking: Ranking
    written: Path | None = None
    as_json: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        ranking = self.ranking
        if self.as_json:
            yield ranking.model_dump_json(indent=2)
            return
        wide = options.max_width >= WIDE_TERMINAL
        yield _candidates_table(ranking.candidates, ranking.validators, others=wide)
        yield "" if wide else f"other metrics: --json, or a terminal of {WIDE_TERMINAL} characters"
        for number, candidate in enumerate(ranking.candidates, 1):
            yield Text(f"{number:>3}  {candidate.title}", no_wrap=True, overflow="ignore")
        yield ""
        if ranking.quality is not None:
            yield _quality_table(ranking)
        best = ranking.candidates[0]
        yield f"highest mean rank ({', '.join(ranking.validators)}): {best.run}, {best.checkpoint}"
        yield f"target labels opened: {ranking.labels_opened}"
        if self.written is not None:
            yield f"written: {self.written}"


COLUMNS = {
    "score": "score", "source_miou": "source mIoU", "consensus": "consensus", "information": "information",
    "nuclear_norm": "nuclear norm", "masked_miou": "masked mIoU", "views_miou": "views mIoU", "masked": "masked",
    "views": "views", "agreement": "agreement", "snd": "SND", "entropy": "entropy", "mean_rank": "mean rank",
    "expected": "expected mIoU",
}  # fmt: skip
"""Column headings of the validators, in order."""
WIDE_TERMINAL = 120
"""Smallest terminal width, in characters, for all metrics; a narrower one shows those of the ranking."""


def _candidates_table(candidates: Sequence[Candidate], validators: Sequence[str], *, others: bool) -> Table:
    """Return validators of candidates, other metrics if asked for, mean rank, estimate and target mIoU."""
    from rich.table import Column, Table

    from overfly.core.progress import percent

    metrics = [candidate.metrics.by_validator() for candidate in candidates]
    known = [name for name in COLUMNS if any(values.get(name) is not None for values in metrics)]
    shown = [name for name in known if others or name in validators]
    columns = {COLUMNS[name]: [percent(values[name]) for values in metrics] for name in shown}
    bold = {COLUMNS[name] for name in validators}
    columns["mean rank"] = [percent(candidate.mean_rank) for candidate in candidates]
    if any(candidate.estimate for candidate in candidates):
        columns["estimated mIoU"] = [
            f"{percent(value.miou)} ({percent(value.low)} to {percent(value.high)})" if value else "–"
            for value in (candidate.estimate for candidate in candidates)
        ]
    if any(candidate.target_miou is not None for candidate in candidates):
        columns["target mIoU"] = [percent(candidate.target_miou) for candidate in candidates]
    headings = [Column(name, justify="right", style="bold" if name in bold else "") for name in columns]
    title = "label-free metrics in percent, higher is better"
    table = Table(Column("", justify="right", no_wrap=True), *headings, title=title, title_justify="left")
    for number, row in enumerate(zip(*columns.values(), strict=True), 1):
        table.add_row(str(number), *row)
    return table


def _quality_table(ranking: Ranking) -> Table:
    """Return the quality of each validator, smallest regret first."""
    from rich.table import Column, Table

    from overfly.core.progress import percent

    numeric = (Column(heading, justify="right") for heading in ("rank correlation", "regret"))
    title = "validators against target mIoU from labels"
    table = Table("validator", *numeric, "best", title=title, title_justify="left")
    numbers = {candidate.title: number for number, candidate in enumerate(ranking.candidates, 1)}
    for name, quality in sorted((ranking.quality or {}).items(), key=lambda entry: entry[1].regret):
        correlation = "–" if quality.correlation is None else f"{quality.correlation:+.2f}"
        table.add_row(COLUMNS.get(name, name), correlation, percent(quality.regret), str(numbers[quality.best]))
    return table


def rank(
    runs: PathLikes, *, with_labels: bool = False, estimate: bool = False, validators: list[str] | None = None,
    reference: PathLike | None = None, split: Split = "train", limit: int = 24, crop: int = 512, device: str = "auto",
    out: PathLike | None = None, json: bool = False,
) -> RankResult:  # fmt: skip
    """Rank runs and their stored checkpoints without target labels.

    Args:
        runs: folders of finished runs of one target, or folders of such; validation.keep_all keeps their checkpoints.
        with_labels: open the target's labels in val to measure the ranking: rank correlation and regret of each metric.
        estimate: estimate each network's target mIoU too, with an interval made on shifted source images.
        validators: a metric whose ranks are averaged; may be repeated: --validators consensus --validators masked_miou;
            default: score, the mean of consistency on the target and mIoU on the source.
        reference: a run, such as source-only, with whose predictions all are compared (agreement).
        split: split of the target whose images are predicted; its labels are not read.
        limit: number of images, evenly sampled.
        crop: largest side of the center crop of each image, in pixels.
        device: auto, cpu, cuda, cuda:1 or mps.
        out: folder for ranking.json.
        json: print JSON instead of tables.

    Returns:
        Every candidate's metrics, best first.
    """
    from overfly.adaptation import model_selection
    from overfly.core.device import select_device
    from overfly.evaluation.images import MetricOptions
    from overfly.training.run import Run

    check_bounds({"limit": (limit, 1, 10**6), "crop": (crop, 16, MAX_SIDE)})
    ranking = model_selection.rank(
        model_selection.find_trained_runs(runs), validators=validators or model_selection.DEFAULT_VALIDATORS,
        reference=Run.open(reference) if reference is not None else None, estimates=estimate, with_labels=with_labels,
        split=split, options=MetricOptions(limit, crop, device=select_device(device)), quiet=json,
    )  # fmt: skip
    written = None if out is None else model_selection.write_ranking(ranking, Path(out))
    return RankResult(ranking, written, as_json=json)


@dataclass(frozen=True)
class SuggestResult:
    """Suggested tiles, and the folder that they were written to."""

    path: Path
    picks: Sequence[Pick]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for rank, pick in enumerate(self.picks, 1):
            yield f"{rank:>3}  {pick.tile.name}: {pick.reason}"
        yield f"written: {self.path}, with README.txt"
        yield f"when the masks are filled: overfly adapt … --labels {self.path}"


def suggest(
    runs: PathLikes, *, count: int = 5, tile: int = 512, limit: int = 200, out: PathLike = Path("labels"),
    device: str = "auto", quiet: bool = False,
) -> SuggestResult:  # fmt: skip
    """Suggest the target tiles whose labels help most, and write them with drafts to correct.

    Picks tiles on which the candidates disagree, that much of the target looks like, and that differ from each other.
    No target label is read.

    Args:
        runs: a comparison folder of `adapt`, or finished runs of one target, of which the first predicts the drafts.
        count: number of tiles.
        tile: largest side of a tile in pixels; larger images are cut into windows.
        limit: number of tiles to choose from, evenly spaced.
        out: folder to write; a suggestion whose masks were changed is not replaced.
        device: auto, cpu, cuda, cuda:1 or mps.
        quiet: print no progress.

    Returns:
        The tiles, most useful first.
    """
    from overfly.adaptation import suggestion
    from overfly.core.device import select_device
    from overfly.core.progress import print_status
    from overfly.evaluation.images import MetricOptions

    check_bounds({"count": (count, 1, 1000), "tile": (tile, 32, MAX_SIDE), "limit": (limit, count, 10**6)})
    import_extra("pyogrio", "vector", "the outlines of the tiles")
    suggestion.check_replaceable(Path(out))
    networks, target, recipe = _candidates([Path(run) for run in runs])
    tiles = suggestion.target_tiles(target, None if recipe.resize else tile, limit)
    print_status(f"predicting {len(tiles)} tiles by {len(networks)} networks", quiet=quiet)
    options = MetricOptions(resize=recipe.resize, window=recipe.window, device=select_device(device))
    picks = suggestion.suggest(networks, target, tiles, count, options)
    suggestion.write_suggestion(picks, target, Path(out), {"networks": list(map(str, runs)), "tile": tile})
    return SuggestResult(Path(out), picks)


def _candidates(paths: Sequence[Path]) -> tuple[list[Segmenter], Domain, Recipe]:
    """Return the candidates' networks, the recommended one first, the target, and a recipe with its settings."""
    from overfly.adaptation.candidates import load_candidate
    from overfly.adaptation.model_selection import find_trained_runs, shared_target
    from overfly.adaptation.selection import Comparison, is_comparison
    from overfly.data.domain import Domain
    from overfly.models.segmenter import Segmenter
    from overfly.recipe import load

    if len(paths) > 1 or not is_comparison(paths[0]):
        runs = find_trained_runs(paths)
        networks = [run.segmenter().without_training_heads() for run in runs]
        return networks, shared_target(runs), runs[0].recipe
    comparison = Comparison(paths[0])
    selection = comparison.selection
    networks = [Segmenter.load(comparison.weights).without_training_heads()]
    for name, report in selection.candidates.items():
        found = comparison.run(name) or Path(report.run)
        if name != selection.recommended and not report.rejected and (not isinstance(found, Path) or found.is_file()):
            networks.append(load_candidate(found).without_training_heads())
    return networks, Domain.model_validate(selection.target), load(selection.recipes[0])
