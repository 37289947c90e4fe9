"""Draw docs/images/two_domains.png from the runs of `make demo`.

python docs/figures.py runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from overfly.adaptation.pipeline import RECALIBRATED
from overfly.data.domain import Domain
from overfly.evaluation.panels import comparison_figure
from overfly.evaluation.score import Sample, Samples, score
from overfly.recipe import Recipe
from overfly.training.run import Run

HALF = RECALIBRATED["half recalibrated"]
FIGURE = Path(__file__).parent / "images" / "two_domains.png"


def sample(run: Run, domain: Domain, position: int) -> Sample:
    """Predict one of six evenly sampled images of a domain's test split, numbered from 0."""
    samples = Samples(evenly_spaced=6, extremes=False)
    score(run.segmenter(), domain, "test", resize=run.recipe.resize, window=run.recipe.window, samples=samples)
    return list(samples)[position]


def main() -> None:
    """Find the runs below a folder and draw both domains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--positions", type=int, nargs=2, default=(1, 4))
    settings = parser.parse_args()
    result = [Run(file.parent) for file in settings.runs.glob("*/recipe.yaml")]
    result = [run for run in result if getattr(run.recipe.method, "share", None) != HALF.share]
    runs = {(run.recipe.method.name, run.recipe.domain("source").title): run for run in result}
    names = {
        "source only": ("source_only", "Urban"),
        "recalibrated": ("recalibrate", "Urban"),
        "adapted": ("multiscale_self_training", "Urban"),
        "oracle": ("source_only", "Rural"),
    }
    recipe: Recipe = runs["source_only", "Urban"].recipe
    rows = {
        domain.title: {words: sample(runs[key], domain, position) for words, key in names.items()}
        for domain, position in zip((recipe.domain("source"), recipe.domain("target")), settings.positions, strict=True)
    }
    FIGURE.parent.mkdir(exist_ok=True)
    print(comparison_figure(rows.items(), recipe.domain("source").classes, FIGURE, side=256))


if __name__ == "__main__":
    main()
