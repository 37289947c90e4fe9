"""What the API's functions return: values that print themselves as a person wants to read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from overfly.adaptation.model_selection import Candidate, Ranking
from overfly.adaptation.selection import Selection
from overfly.benchmarking import Table as Benchmark
from overfly.data.check import Report
from overfly.evaluation.scores import Scores
from overfly.evaluation.speed import Speed
from overfly.training.run import Run


@dataclass(frozen=True)
class Trained:
    """A trained run."""

    path: Path

    @property
    def run(self) -> Run:
        """The run's folder as an object."""
        return Run.open(self.path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"trained: {self.path}"
        yield f"score it with: overfly evaluate {self.path}"


@dataclass(frozen=True)
class Adapted:
    """An adaptation, and whether to use it."""

    path: Path
    selection: Selection

    @property
    def run(self) -> Run:
        """The adapted run's folder as an object."""
        return Run.open(self.path)

    @property
    def best(self) -> Path:
        """File of the recommended network."""
        return self.path / "best.safetensors"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Markdown(self.selection.table())
        yield f"result: {self.selection.summary}"
        for role, report in self.selection.candidates.items():
            yield from (f"  rejected {role}: {reason}" for reason in report.rejections)
        yield from (f"  {way}" for way in self.selection.differences)
        yield f"target labels opened: {self.selection.labels_opened}"
        yield f"recommended network: {self.best}"
        yield f"report: {self.path / 'selection.md'}"


@dataclass(frozen=True)
class Evaluation:
    """Scores of one run, by domain and split."""

    path: Path
    scores: Mapping[str, Scores]
    pictures: Sequence[Path] = field(default_factory=list)
    told: Sequence[str] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield scores_table(self.scores)
        yield from self.told
        yield f"written: {self.path / 'scores.json'}"
        for picture in self.pictures:
            yield f"drawn:   {picture}"


def scores_table(scores: Mapping[str, Scores]) -> Table:
    """IoU of each class, and what they mean together, a column a domain."""
    table = Table(title="IoU in percent", title_justify="left")
    table.add_column("")
    for key, found in scores.items():
        table.add_column(f"{key} ({found.images} images)", justify="right")
    names = dict.fromkeys(name for found in scores.values() for name in found.classes)
    for name in names:
        ious = [found.classes[name].iou if name in found.classes else None for found in scores.values()]
        table.add_row(name, *(_percent(iou) for iou in ious))
    table.add_section()
    table.add_row("mIoU", *(_percent(found.miou) for found in scores.values()), style="bold")
    table.add_row("pixel accuracy", *(_percent(found.accuracy) for found in scores.values()))
    table.add_row("mean F1", *(_percent(found.f1) for found in scores.values()))
    table.add_row("boundary mIoU", *(_percent(found.boundary_miou) for found in scores.values()))
    table.add_row("calibration error", *(_percent(found.calibration.ece) for found in scores.values()))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


@dataclass(frozen=True)
class Tabulated:
    """A benchmark's table."""

    table: Benchmark
    folder: Path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console.is_terminal:
            yield Markdown(self.table.markdown())
        else:
            yield self.table.markdown()
        yield f"written: {self.folder / 'table.md'}, {self.folder / 'table.json'}"


@dataclass(frozen=True)
class Measured:
    """Size and speed of a network."""

    name: str
    speed: Speed
    as_json: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.speed
        if self.as_json:
            yield found.model_dump_json(indent=2)
            return
        height, width = found.size
        yield f"{self.name}: {found.parameters:,} parameters (without the heads that only training reads)"
        yield f"one image of {found.bands}×{height}×{width}: {found.macs / 1e9:.3f} G multiply-accumulates"
        for batch, macs in found.macs_of_batch.items():
            yield f"a batch of {batch}: {macs / 1e9:.3f} G multiply-accumulates"
        table = Table()
        for heading in ("batch", "p50 ms", "p95 ms", "p99 ms", "mean ± sd ms", "images/s", "peak memory"):
            table.add_column(heading, justify="right")
        for timing in found.timings:
            memory = "–" if timing.peak_memory_mb is None else f"{timing.peak_memory_mb:.0f} MB"
            table.add_row(
                str(timing.batch), f"{timing.p50_ms:.2f}", f"{timing.p95_ms:.2f}", f"{timing.p99_ms:.2f}",
                f"{timing.mean_ms:.2f} ± {timing.std_ms:.2f}", f"{timing.images_per_second:.1f}", memory,
            )  # fmt: skip
        yield table
        machine = found.machine
        yield f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {found.precision} bits"
        yield f"{found.repeats} passes after {found.warmup} of warm-up; {found.method}; memory: {found.memory}"


@dataclass(frozen=True)
class Synthesized:
    """A synthetic world on disk."""

    root: Path
    pictures: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"drawn: {self.pictures} pictures in LoveDA's layout below {self.root}"


@dataclass(frozen=True)
class Checked:
    """What `overfly data check` found."""

    reports: Mapping[str, Report]

    @property
    def exit_status(self) -> int:
        """1 where a file is bad."""
        return int(any(report.bad for report in self.reports.values()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for name, report in self.reports.items():
            yield f"== {name}"
            yield str(report)


@dataclass(frozen=True)
class Ranked:
    """Networks ranked without target labels."""

    ranking: Ranking
    written: Path | None = None
    as_json: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
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
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(COLUMNS[name], justify="right", style="bold" if name in members else None)
    rows = [[_percent(each.metrics.by_validator()[name]) for name in shown] for each in candidates]
    if members:
        table.add_column("committee", justify="right")
        for row, each in zip(rows, candidates, strict=True):
            row.append(_percent(each.committee))
    if members and any(each.estimate for each in candidates):
        table.add_column("estimated mIoU", justify="right")
        for row, each in zip(rows, candidates, strict=True):
            guess = each.estimate
            row.append(f"{_percent(guess.miou)} ({_percent(guess.low)} to {_percent(guess.high)})" if guess else "–")
    if members and any(each.truth is not None for each in candidates):
        table.add_column("true mIoU", justify="right")
        for row, each in zip(rows, candidates, strict=True):
            row.append(_percent(each.truth))
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *row)
    return table


def _study_table(ranking: Ranking) -> Table:
    """How well each validator chose, least regret first."""
    table = Table(title="study: validators against true target mIoU", title_justify="left")
    for heading in ("validator", "rank correlation", "regret", "chosen"):
        table.add_column(heading, justify="left" if heading in ("validator", "chosen") else "right")
    numbers = {each.title: number for number, each in enumerate(ranking.candidates, 1)}
    for name, trust in sorted((ranking.study or {}).items(), key=lambda entry: entry[1].regret):
        correlation = "–" if trust.correlation is None else f"{trust.correlation:+.2f}"
        table.add_row(COLUMNS.get(name, name), correlation, _percent(trust.regret), str(numbers[trust.chosen]))
    return table
