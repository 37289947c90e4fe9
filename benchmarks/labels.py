"""What a few labeled target tiles are worth: choice, choice and training, fine-tuning on them alone.

    python benchmarks/labels.py COMPARISON … [--choice] [--counts 1,2,4,8] [--tile 384] [--limit 60] [--out runs/labels]
        [SETTING=VALUE …]

COMPARISON is a comparison folder of `overfly adapt` whose target has masks, such as those of `python
benchmarks/pairs.py`. Tiles are suggested, and drawn at random; their masks are copied from the target's train split.
Networks are scored on the target's val split. With --choice nothing is trained: choice and intervals are compared with
the mIoU on all tiles, in 100 draws of tiles from a random half of them. Prints lines of JSON, appended to
OUT/labels.jsonl too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch

from overfly.adaptation import suggestion
from overfly.adaptation.labels import LabeledTiles, confusions, tile_scores
from overfly.adaptation.selection import BASELINE, Comparison
from overfly.commands.rank import suggest
from overfly.data.domain import Domain
from overfly.evaluation.images import MetricOptions, predict_scores
from overfly.evaluation.scores import Confusion
from overfly.methods.source_only import SourceOnly
from overfly.recipe import load
from overfly.training.engine import TrainerConfig, launch_fabric
from overfly.training.evaluate import evaluate_domain, stored_scores
from overfly.training.run import Run
from overfly.training.train_recipe import train_recipe

CONFIG = TrainerConfig("cpu", quiet=True)


def target_miou(run: Run, target: Domain) -> float:
    """mIoU on the target's val split, in percent; computed once."""
    scores = stored_scores(run, "target", "val", target) or evaluate_domain(run, target, "target", "val")
    return 100 * (scores.miou or 0.0)


def random_tiles(target: Domain, count: int, side: int, limit: int, out: Path) -> list[str]:
    """Write tiles drawn at random as a suggestion; return their names."""
    tiles = suggestion.target_tiles(target, side, limit)
    drawn = np.random.default_rng(0).permutation(len(tiles))[:count]
    picks = []
    for index in drawn:
        size = tiles[index].window[2:]
        picks.append(suggestion.Pick(tiles[index], 0.0, 0.0, np.zeros(size, np.uint8), None))
    suggestion.write_suggestion(picks, target, out, {})
    return [pick.tile.name for pick in picks]


def filled(folder: Path, names: Sequence[str], target: Domain, out: Path) -> Path:
    """Copy a suggestion with the true masks of some tiles; the others stay empty."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    items = {item.name: item for item in target.items("train")}
    tiles = {row["tile"]: row for row in json.loads((folder / "suggestion.json").read_text())["tiles"]}
    for name in names:
        top, left, height, width = tiles[name]["window"]
        whole = items.get(name)
        item = whole or items[name.rsplit("_r", 1)[0]]
        label = target.read_label(item)[top : top + height, left : left + width]
        file = next((out / "masks").glob(f"{name}.*"))
        with rasterio.open(file) as dataset:
            profile, colors = dataset.profile, dataset.colormap(1)
        with rasterio.open(file, "w", **profile) as dataset:
            dataset.write(label[None])
            dataset.write_colormap(1, colors)
    return out


def study(path: Path, counts: Sequence[int], side: int, limit: int, out: Path, *settings: str) -> None:
    """Measure one comparison; ``settings`` change the recipe that learns from the tiles."""
    comparison = Comparison(path)
    selection = comparison.selection
    target = Domain.model_validate(selection.target)
    runs = {name: run for name in selection.candidates if (run := comparison.run(name)) is not None}
    mious = {name: target_miou(run, target) for name, run in runs.items()}
    title = path.name.split("_", 1)[1].removesuffix("_comparison")
    record(out, pair=title, kind="candidates", miou=mious, recommended=selection.recommended)
    adapted, base = runs["adapted"].recipe, runs[BASELINE]
    fabric = launch_fabric(adapted, CONFIG)
    options = MetricOptions(resize=adapted.resize, window=adapted.window)
    networks = {name: run.segmenter().without_training_heads() for name, run in runs.items()}
    for mode in ("suggested", "random"):
        folder = out / title / mode / "all"
        if mode == "suggested":
            found = suggest([path], count=max(counts), tile=side, limit=limit, out=folder, device="cpu", quiet=True)
            names = [pick.tile.name for pick in found.picks]
        else:
            names = random_tiles(target, max(counts), side, limit, folder)
        for count in counts:
            labels = filled(folder, names[:count], target, out / title / mode / str(count))
            tiles = LabeledTiles.open(labels, adapted)
            counted = {name: confusions(network, tiles.pairs, options) for name, network in networks.items()}
            scores = {name: tile_scores(each, counted[BASELINE]) for name, each in counted.items()}
            chosen = max(scores, key=lambda name: scores[name].miou.value)
            row: dict[str, Any] = {"pair": title, "mode": mode, "k": count}
            record(out, **row, kind="choice", miou=mious[chosen], chosen=chosen, tiles={
                name: score.model_dump(mode="json") for name, score in scores.items()
            })  # fmt: skip
            learned = train_recipe(load(tiles.extend(adapted), *settings), out / "runs", fabric, CONFIG)
            record(out, **row, kind="choice and training", miou=target_miou(learned, target))
            alone = load({
                **adapted.model_dump(mode="json"), "source": tiles.labels.domain.model_dump(mode="json"),
                "target": selection.target, "method": SourceOnly().model_dump(mode="json"),
                "start": str(base.path), "labels": None,
            })  # fmt: skip
            tuned = train_recipe(alone, out / "runs", fabric, CONFIG)
            record(out, **row, kind="fine-tuning alone", miou=target_miou(tuned, target))


def choice_study(path: Path, counts: Sequence[int], side: int, limit: int, out: Path) -> None:
    """Regret of the choice by some tiles, and coverage of its intervals, against all tiles of a comparison."""
    comparison = Comparison(path)
    selection = comparison.selection
    target = Domain.model_validate(selection.target)
    names = [name for name in selection.candidates if comparison.run(name) is not None]
    networks = [comparison.run(name).segmenter().without_training_heads() for name in names]  # type: ignore[union-attr]
    items = {item.name: item for item in target.items("train")}
    counted: list[list[Confusion]] = [[] for _ in names]
    differ, vectors, title = [], [], path.name.split("_", 1)[1].removesuffix("_comparison")
    with torch.inference_mode():
        for tile, image, _ in suggestion.read_tiles(target, suggestion.target_tiles(target, side, limit)):
            label = torch.from_numpy(target.read_label(items[tile.item.name])[tile.window.rows, tile.window.columns])
            scores = torch.stack([predict_scores(network.eval(), image) for network in networks])
            for each, prediction in zip(counted, scores.argmax(1), strict=True):
                each.append(Confusion.from_predictions(prediction, label.long(), len(target.classes)))
            differ.append(float(suggestion.disagreement(scores.softmax(1)).mean()))
            vectors.append(suggestion.tile_features(networks[names.index(selection.recommended)], image))
    true, generator = [sum(each[1:], each[0]).miou for each in counted], np.random.default_rng(0)
    weight, vector = np.sqrt(differ), torch.stack(vectors)
    record(out, pair=title, kind="all tiles", tiles=len(differ), miou=dict(zip(names, true, strict=True)),
           recommended=selection.recommended)  # fmt: skip
    for mode in ("suggested", "random"):
        for count in counts:
            found: dict[str, list[float]] = {
                "regret": [],
                "covered": [],
                "covered difference": [],
                "bias": [],
                "half": [],
            }
            for _ in range(100):
                pool = np.sort(generator.permutation(len(differ))[: len(differ) // 2])
                if mode == "random":
                    picked = generator.permutation(pool)[:count].tolist()
                else:
                    even = np.full(len(pool), 1 / len(pool))
                    similar = suggestion.similarity(vector[pool])
                    picked = pool[suggestion.facility_location(even, weight[pool], similar, count)].tolist()
                scores = [tile_scores([each[i] for i in picked], [counted[0][i] for i in picked]) for each in counted]
                best = max(range(len(names)), key=lambda index: scores[index].miou.value)
                found["regret"].append(max(true) - true[best])
                if count == 1:
                    continue
                for key, interval, value in (
                    ("covered", scores[best].miou, true[best]),
                    ("covered difference", scores[-1].difference, true[-1] - true[0]),
                ):
                    found[key].append(interval.low <= value <= interval.high)  # type: ignore[union-attr,operator]
                found["bias"].append(scores[best].miou.value - true[best])
                found["half"].append((scores[best].miou.high - scores[best].miou.low) / 2)  # type: ignore[operator]
            means = {key: round(100 * float(np.mean(values)), 2) for key, values in found.items() if values}
            record(out, pair=title, kind="choice of all", mode=mode, k=count, **means)


def record(out: Path, **row: Any) -> None:
    """Print a row, and append it to the file."""
    out.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row)
    print(line, flush=True)
    with (out / "labels.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("comparisons", type=Path, nargs="+")
    parser.add_argument("--choice", action="store_true")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--tile", type=int, default=384)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    arguments, settings = parser.parse_known_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    for path in arguments.comparisons:
        if arguments.choice:
            choice_study(path, counts, arguments.tile, arguments.limit, arguments.out)
        else:
            study(path, counts, arguments.tile, arguments.limit, arguments.out, *settings)


if __name__ == "__main__":
    main()
