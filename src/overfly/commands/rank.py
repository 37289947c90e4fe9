"""The command ``rank``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import MAX_SIDE, PathLike, PathLikes, check_bounds
from overfly.core.choices import Split

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from overfly.adaptation.model_selection import Candidate, Ranking


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
        yield from _candidates_tables(ranking.candidates, ranking.members, options.max_width)
        yield ""
        for number, each in enumerate(ranking.candidates, 1):
            yield Text(f"{number:>3}  {each.title}", no_wrap=True, overflow="ignore")
        yield ""
        if ranking.study is not None:
            yield _study_table(ranking)
        chosen = ranking.candidates[0]
        yield f"chosen by the committee ({', '.join(ranking.members)}): {chosen.run}, {chosen.checkpoint}"
        if ranking.study is None:
            yield f"target labels opened: {ranking.labels_opened}"
        else:
            yield f"this is a study: its true scores rest on {ranking.labels_opened} opened target labels"
        if self.written is not None:
            yield f"written: {self.written}"


COLUMNS = {
    "consensus": "consensus", "source_miou": "source mIoU", "information": "information", "nuclear_norm": "BNM",
    "masked_miou": "masked mIoU", "views_miou": "views mIoU", "masked": "masked", "views": "views",
    "agreement": "agreement", "snd": "SND",
    "entropy": "entropy",
}  # fmt: skip
"""What the table calls the validators, most trusted first."""


WIDE = 120
"""Characters of a terminal from which all label-free figures stand in one table."""


def _candidates_tables(candidates: Sequence[Candidate], members: Sequence[str], width: int) -> Iterator[Table]:
    """Figures of every candidate in percent, best of the committee first and numbered; its members apart if narrow."""
    shown = [name for name in COLUMNS if any(each.metrics.by_validator()[name] is not None for each in candidates)]
    if width >= WIDE:
        yield _candidates_table(candidates, shown, members, "label-free figures in percent, higher is better")
        return
    voting = [name for name in shown if name in members]
    yield _candidates_table(candidates, voting, members, "committee: label-free figures in percent, higher is better")
    if others := [name for name in shown if name not in members]:
        yield _candidates_table(candidates, others, (), "other label-free figures")


def _candidates_table(
    candidates: Sequence[Candidate], shown: Sequence[str], members: Sequence[str], title: str
) -> Table:
    """Some figures of every candidate; with members of the committee in bold, their vote and what is known beside."""
    from rich.table import Table

    from overfly.core.text import percent

    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(COLUMNS[name], justify="right", style="bold" if name in members else None)
    rows = [[percent(each.metrics.by_validator()[name]) for name in shown] for each in candidates]
    if members:
        table.add_column("committee", justify="right")
        for row, each in zip(rows, candidates, strict=True):
            row.append(percent(each.committee))
    if members and any(each.estimate for each in candidates):
        table.add_column("estimated mIoU", justify="right")
        for row, each in zip(rows, candidates, strict=True):
            guess = each.estimate
            row.append(f"{percent(guess.miou)} ({percent(guess.low)} to {percent(guess.high)})" if guess else "–")
    if members and any(each.truth is not None for each in candidates):
        table.add_column("true mIoU", justify="right")
        for row, each in zip(rows, candidates, strict=True):
            row.append(percent(each.truth))
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *row)
    return table


def _study_table(ranking: Ranking) -> Table:
    """How well each validator chose, least regret first."""
    from rich.table import Table

    from overfly.core.text import percent

    table = Table(title="study: validators against true target mIoU", title_justify="left")
    for heading in ("validator", "rank correlation", "regret", "chosen"):
        table.add_column(heading, justify="left" if heading in ("validator", "chosen") else "right")
    numbers = {each.title: number for number, each in enumerate(ranking.candidates, 1)}
    for name, trust in sorted((ranking.study or {}).items(), key=lambda entry: entry[1].regret):
        correlation = "–" if trust.correlation is None else f"{trust.correlation:+.2f}"
        table.add_row(COLUMNS.get(name, name), correlation, percent(trust.regret), str(numbers[trust.chosen]))
    return table


def rank(
    runs: PathLikes,
    *,
    with_labels: bool = False,
    estimate: bool = False,
    committee: list[str] | None = None,
    reference: PathLike | None = None,
    split: Split = "train",
    limit: int = 24,
    crop: int = 512,
    device: str = "auto",
    out: PathLike | None = None,
    json: bool = False,
) -> RankResult:
    """Rank runs and their stored checkpoints without target labels.

    Args:
        runs: folders of finished runs of one target, or folders of such; validation.keep_all keeps their checkpoints.
        with_labels: open the target's labels in val to measure the ranking: rank correlation and regret of each metric.
        estimate: estimate each network's target mIoU too, with an interval made on shifted source images.
        committee: a metric whose ranks are averaged; may be repeated: --committee consensus --committee masked_miou;
            default: consensus, masked_miou, views_miou and source_miou.
        reference: a run, such as source-only, with whose predictions all are compared (agreement).
        split: split of the target whose images are predicted; its labels are not read.
        limit: number of images, evenly sampled.
        crop: largest side of the center crop of each image, in pixels.
        device: auto, cpu, cuda, cuda:1 or mps.
        out: folder for validators.json.
        json: print JSON instead of tables.

    Returns:
        Every candidate's metrics, best first.
    """
    from overfly.adaptation import model_selection
    from overfly.core.device import select_device
    from overfly.evaluation.label_free_metrics import DEFAULT_VALIDATORS
    from overfly.training.run import Run

    check_bounds({"limit": (limit, 1, 10**6), "crop": (crop, 16, MAX_SIDE)})
    ranking = model_selection.rank(
        model_selection.gather(runs),
        members=committee or DEFAULT_VALIDATORS,
        reference=Run.open(reference) if reference is not None else None,
        estimates=estimate,
        study=with_labels,
        sight=model_selection.TargetImages(split, limit, crop, select_device(device)),
    )
    written = None if out is None else model_selection.write(ranking, Path(out))
    return RankResult(ranking, written, as_json=json)
