"""Adaptation that does no harm: source only, recalibrated and adapted in one way or in several.

All are looked at without labels, and one of them is recommended.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from pydantic import Field

from overfly.core.errors import RecipeError
from overfly.core.spec import Share, Spec, Whole
from overfly.data.domain import Split
from overfly.methods.recalibrate import Recalibrate
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from overfly.scoring.consensus import consensus
from overfly.scoring.estimate import Estimate, estimate
from overfly.scoring.gate import Gate, familiarity, favourite
from overfly.scoring.pictures import predict, unlabelled
from overfly.scoring.samples import Sample
from overfly.scoring.score import evaluating
from overfly.scoring.validators import LabelFree, elect, look
from overfly.training.assess import assess, labelled, recorded
from overfly.training.carry_out import carry_out, weights_of
from overfly.training.engine import Engine, on_main
from overfly.training.run import Run
from overfly.views.panels import comparison

BEFORE = "source only"
"""The network that the others are measured against."""
RECALIBRATED = "recalibrated"
"""The same with statistics of the target."""
ADAPTED = "adapted"
"""What the recipe makes; numbered, ``adapted 1`` and so on, where there are several recipes."""
RECALIBRATION = {"batch": 16, "steps": 25}
"""How much of the target the recalibrated network sees."""
LOOKED_AT = 16
"""Target pictures that networks are looked at on."""
ESTIMATED_ON = 8
"""Pictures of each domain that the estimate rests on; each is seen under two dozen shifts."""
CROP = 320
"""Longest side that is cut from the middle of these."""


class Standing(Spec):
    """One of the networks."""

    run: str
    """Its run's folder, or the file of its weights."""
    figures: LabelFree
    """What can be said of it without target labels."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What its recipe says otherwise than the other adapted ones', such as ``method.mix``."""
    committee: Share | None = None
    """Where several pass: mean rank among them and the one before adaptation over the committee's members, 1 for first
    with all."""
    against: tuple[str, ...] = ()
    """What speaks against it; empty where nothing does."""
    estimate: Estimate | None = None
    """Estimated mIoU on the target with an interval: an estimate, no measurement."""
    truth: dict[str, Share | None] = Field(default_factory=dict)
    """mIoU against labels, by domain and split, where it was measured earlier; it had no part in the verdict."""


class Verdict(Spec):
    """Which network to use in the target, and why."""

    recommended: str
    """The network to use."""
    networks: dict[str, Standing]
    """All that were looked at."""
    gate: Gate
    """What a network had to hold."""
    target: dict[str, Any]
    """The target as a recipe names it."""
    familiarity: Share | None = None
    """How familiar the target is to the network before adaptation, against the source's held-out pictures; none where
    there are no such pictures."""
    labels_opened: Whole
    """Target labels that were read for training, choice and verdict: 0."""

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        refused = [role for role, standing in self.networks.items() if standing.against]
        if self.recommended == BEFORE:
            return f"use the source-only network: {' and '.join(refused) or 'nothing else'} would do harm here"
        tail = f"; {' and '.join(refused)} would do harm here" if refused else ""
        said = self.networks[self.recommended].settings
        ways = ", ".join(f"{name} {_said(value)}" for name, value in said.items())
        network = f"{self.recommended} ({ways})" if ways else f"the {self.recommended} network"
        others = [role for role, each in self.networks.items() if role not in (BEFORE, self.recommended, *refused)]
        rest = f", and the committee puts it before {' and '.join(others)}" if others else ""
        return f"use {network}: nothing speaks against it{rest}{tail}"

    def table(self) -> str:
        """The networks and their label-free figures in percent, as a Markdown table."""
        rows = [
            "| network | source | masked | views | as before | target, estimated | |",
            "|---|---|---|---|---|---|---|",
        ]
        for role, standing in self.networks.items():
            seen = standing.figures
            guess = standing.estimate
            between = f"{_percent(guess.miou)} ({_percent(guess.low)} to {_percent(guess.high)})" if guess else "–"
            word = "recommended" if role == self.recommended else "refused" if standing.against else ""
            cells = [seen.source_miou, seen.masked_miou, seen.views_miou, seen.agreement]
            rows.append(f"| {role} | {' | '.join(_percent(cell) for cell in cells)} | {between} | {word} |")
        return "\n".join(rows)

    def report(self) -> str:
        """All of it as a Markdown page."""
        against = [f"- {role}: {reason}." for role, each in self.networks.items() for reason in each.against]
        ways = [
            f"- {role}: {', '.join(f'{name} {_said(value)}' for name, value in each.settings.items())}."
            for role, each in self.networks.items()
            if each.settings
        ]
        known = []
        if self.familiarity is not None:
            share = f"{100 * self.familiarity:.0f} %"
            known = [f"To the source-only network the target is {share} as familiar as held-out source pictures.", ""]
        return "\n".join(
            [
                "# Verdict", "", self.sentence[0].upper() + self.sentence[1:] + ".", "", self.table(), "",
                *(["In what the adapted networks differ:", "", *ways, ""] if ways else []),
                *(["What speaks against a network:", "", *against, ""] if against else []),
                "All figures are mIoU in percent. *Source* is measured on the source's held-out labels. *Masked* "
                "and *views* compare predictions on target pictures as they are with those half covered, and turned, "
                "scaled and recoloured; *as before* compares them with the source-only network's. *Target* is an "
                "estimate with its interval, and had no part in the verdict. "
                f"Target labels opened: {self.labels_opened}.", "",
                *known,
                "![Target pictures and what each network says](samples/verdict.png)", "",
            ]
        )  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _said(value: object) -> str:
    """A setting's value in a sentence."""
    if isinstance(value, list):
        return (
            " + ".join(_said(each.get("name")) if isinstance(each, Mapping) else _said(each) for each in value)
            or "none"
        )
    return "none" if value is None else str(value)


def beside(recipe: Recipe, *others: Recipe) -> dict[str, Recipe | Path]:
    """The recipes of all networks: what adaptation begins from, the same recalibrated, and the recipes themselves.

    A recipe that starts from another recipe, a run or weights begins from that; any other is given a source-only
    network trained by its own settings.

    Raises:
        RecipeError: a recipe does not adapt, names no target, or does not begin where the others do.
    """
    before = _before(recipe)
    for other in others:
        alike = all(getattr(other, key) == getattr(recipe, key) for key in ("source", "target", "resize", "window"))
        if not alike or _before(other) != before:
            raise RecipeError(
                "recipes to choose among need the same source, target, start, resize and window; adapt by others in a "
                "command of their own"
            )
    found: dict[str, Recipe | Path] = {BEFORE: before}
    if not isinstance(recipe.method, Recalibrate):
        found[RECALIBRATED] = Recipe(
            source=recipe.source,
            target=recipe.target,
            start=before,
            model=recipe.model,
            method=Recalibrate(),
            crop=recipe.crop,
            window=recipe.window,
            resize=recipe.resize,
            seed=recipe.seed,
            **RECALIBRATION,
        )
    if not others:
        return {**found, ADAPTED: recipe}
    return found | {f"{ADAPTED} {number}": each for number, each in enumerate((recipe, *others), start=1)}


def differences(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """What each of some recipes says otherwise than the rest, by dotted setting."""
    flat = [_flat(recipe.model_dump(mode="json", exclude={"source", "target", "start"})) for recipe in recipes]
    names = list(dict.fromkeys(key for each in flat for key in each))
    apart = [name for name in names if any(each.get(name) != flat[0].get(name) for each in flat)]
    return [{name: each[name] for name in apart if name in each} for each in flat]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _before(recipe: Recipe) -> Recipe | Path:
    """What adaptation by a recipe begins from."""
    if recipe.target is None:
        raise RecipeError("adapt needs the images to adapt to; say where they are under target")
    if isinstance(recipe.method, SourceOnly):
        raise RecipeError("method source_only does not adapt; name another under method, such as overfly")
    if recipe.start is not None:
        return recipe.start
    return recipe.model_copy(update={"method": SourceOnly(criterion=recipe.method.criterion), "target": recipe.target})


def adapt(
    recipe: Recipe,
    *others: Recipe,
    out: Path,
    fabric: Fabric,
    engine: Engine,
    gate: Gate | None = None,
    estimates: bool = True,
) -> tuple[Run, Verdict]:
    """Train the networks, look at them without target labels, and recommend one.

    What was trained already, by these recipes or others that share it, is not trained again. The verdict, the pictures
    and the recommended network (``best.safetensors``) lie in the folder of the adapted run that stands best: the
    recommended one, else the first that nothing speaks against, else the first.

    Args:
        recipe: of an adapted network.
        others: other ways to adapt from the same start; which is best is said without labels, too.
        out: folder of the runs.
        fabric: launched.
        engine: how, not what.
        gate: what a network must hold; left out, `Gate` by its defaults.
        estimates: whether to estimate each network's mIoU on the target.

    Raises:
        OverflyError: recipes, data or weights do not go together.
    """
    runs: dict[str, Run | Path] = {}
    for role, plan in beside(recipe, *others).items():
        if isinstance(plan, Recipe):
            runs[role] = carry_out(plan, out, fabric, engine)
        else:
            runs[role] = Run.open(plan) if plan.is_dir() else weights_of(plan)
    ours = {role: run for role, run in runs.items() if role not in (BEFORE, RECALIBRATED) and isinstance(run, Run)}
    verdict = on_main(fabric, lambda: _judge(recipe, runs, gate or Gate(), fabric.device, estimates))
    passed = [role for role in ours if not verdict.networks[role].against]
    adapted = ours[verdict.recommended if verdict.recommended in ours else (passed or list(ours))[0]]
    if fabric.is_global_zero:
        _keep(adapted, verdict, recipe, runs, fabric.device)
    return adapted, verdict


def _judge(
    recipe: Recipe, runs: Mapping[str, Run | Path], gate: Gate, device: torch.device, estimates: bool
) -> Verdict:
    """Look at every network on the same target pictures, labels taken away."""
    target = recipe.domain("target")
    networks = {role: _network(run) for role, run in runs.items()}
    sight: dict[str, Any] = {
        "limit": LOOKED_AT, "crop": CROP, "resize": recipe.resize, "window": recipe.window, "device": device
    }  # fmt: skip
    figures: dict[str, LabelFree] = {}
    guesses: dict[str, Estimate] = {}
    for role, network in networks.items():
        found = look(network, target, "train", reference=networks[BEFORE], **sight)
        figures[role] = found.model_copy(update={"source_miou": _source_miou(recipe, runs[role], device)})
        if estimates and recipe.source is not None and labelled(recipe.source, "val"):
            guesses[role] = estimate(network, recipe.source, target, **sight | {"limit": ESTIMATED_ON})
    home = None
    if recipe.source is not None and recipe.source.items(recipe.validation.split):
        home = look(networks[BEFORE], recipe.source, recipe.validation.split, **sight)
    reasons = gate.refusals(BEFORE, figures, home)
    ours = {
        role: run.recipe for role, run in runs.items() if role not in (BEFORE, RECALIBRATED) and isinstance(run, Run)
    }
    ways = dict(zip(ours, differences(list(ours.values())), strict=True))
    votes = _elected(
        recipe, networks, figures, [BEFORE, *(role for role, found in reasons.items() if not found)], device
    )
    passed = {role: figures[role] for role in figures if not reasons.get(role)}
    standings = {
        role: Standing(
            run=str(run.path if isinstance(run, Run) else run),
            figures=figures[role],
            settings=ways.get(role, {}),
            committee=votes.get(role),
            against=reasons.get(role, ()),
            estimate=guesses.get(role),
            truth=_truth(run, recipe),
        )
        for role, run in runs.items()
    }
    return Verdict(
        recommended=favourite(BEFORE, passed, votes),
        networks=standings,
        gate=gate,
        target=target.model_dump(mode="json"),
        familiarity=None if home is None else familiarity(home, figures[BEFORE]),
        labels_opened=sum(each.labels_opened for each in figures.values()),
    )


def _elected(
    recipe: Recipe, networks: Mapping[str, Segmenter], figures: dict[str, LabelFree], passed: Sequence[str], device: Any
) -> dict[str, float]:
    """The committee's votes on the networks that passed, where there are several to choose from.

    The network before adaptation is ranked with them: how far each agrees with all together, which is written into
    ``figures``, means something from three networks on.
    """
    if len(passed) < 3:
        return {}
    images = list(unlabelled(recipe.domain("target"), "train", limit=LOOKED_AT, resize=recipe.resize, crop=CROP))
    shares = consensus([(networks[role], recipe.window) for role in passed], images, device)
    for role, share in zip(passed, shares, strict=True):
        figures[role] = figures[role].model_copy(update={"consensus": share})
    return dict(zip(passed, elect([figures[role] for role in passed]), strict=True))


def _network(run: Run | Path) -> Segmenter:
    return run.segmenter() if isinstance(run, Run) else Segmenter.load(run)


def _source_miou(recipe: Recipe, run: Run | Path, device: torch.device) -> float | None:
    """MIoU on the source's held-out labels; measured once."""
    split = recipe.validation.split
    if recipe.source is None or not isinstance(run, Run) or not labelled(recipe.source, split):
        return None
    return (
        recorded(run, "source", split, recipe.source) or assess(run, recipe.source, "source", split, device=device)
    ).miou


def _truth(run: Run | Path, recipe: Recipe) -> dict[str, float | None]:
    """What ``scores.json`` holds already; nothing is opened for it."""
    if not isinstance(run, Run):
        return {}
    splits: tuple[Split, ...] = ("val", "test")
    found = {}
    for key, domain in (("source", recipe.source), ("target", recipe.target)):
        for split in splits:
            scores = recorded(run, key, split, domain) if domain is not None else None
            if scores is not None:
                found[f"{key}/{split}"] = scores.miou
    return found


def _keep(adapted: Run, verdict: Verdict, recipe: Recipe, runs: Mapping[str, Run | Path], device: torch.device) -> None:
    """Write the verdict, the recommended network and pictures of all three into the adapted run's folder."""
    chosen = runs[verdict.recommended]
    unfinished = adapted.path / ".best.safetensors"
    shutil.copyfile(chosen.weights if isinstance(chosen, Run) else chosen, unfinished)
    unfinished.replace(adapted.path / "best.safetensors")
    adapted.record("verdict.json", verdict.model_dump(mode="json"))
    (adapted.path / "verdict.md").write_text(verdict.report(), encoding="utf-8")
    _draw(adapted.path / "samples" / "verdict.png", recipe, runs, device)


def _draw(path: Path, recipe: Recipe, runs: Mapping[str, Run | Path], device: torch.device) -> None:
    """Target pictures as every network sees them; no label is read."""
    target = recipe.domain("target")
    pictures = list(unlabelled(target, "train", limit=4, resize=recipe.resize, crop=CROP))
    rows: dict[str, dict[str, Sample]] = {f"target {place + 1}": {} for place in range(len(pictures))}
    for role, run in runs.items():
        network = _network(run).to(device)
        with evaluating(network), torch.inference_mode():
            for place, image in enumerate(pictures):
                ids = predict(network, image.to(device), recipe.window).argmax(0).cpu().numpy().astype(np.uint8)
                name = f"target {place + 1}"
                rows[name][role] = Sample(name, image.permute(1, 2, 0).numpy().astype(_kind(target.peak)), ids)
    comparison(rows, target.classes, path)


def _kind(peak: float) -> type[np.generic]:
    """The number type of pictures with this brightest value, so that they are shown in their own range."""
    return np.uint8 if peak == 255 else np.uint16 if peak > 1 else np.float32


__all__ = ["ADAPTED", "BEFORE", "RECALIBRATED", "Standing", "Verdict", "adapt", "beside", "differences"]
