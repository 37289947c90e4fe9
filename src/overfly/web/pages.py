"""The pages of the server: list of networks, a map, two runs beside each other, the live picture, the API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from markupsafe import Markup

from overfly.core.errors import OverflyError
from overfly.evaluation.scores import Scores
from overfly.reporting.charts import grouped
from overfly.reporting.report import environment
from overfly.training.run import Run
from overfly.video.player import LatestFrame
from overfly.web.networks import Network
from overfly.web.service import Desk


def router(desk: Desk, screen: LatestFrame | None) -> APIRouter:
    """All pages.

    Args:
        desk: the networks.
        screen: holds the live picture, where there is one.
    """
    live = screen is not None
    routes = APIRouter(default_response_class=HTMLResponse)
    templates = environment(Path(__file__).parent / "templates")

    def page(name: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(templates.get_template(f"{name}.html.jinja").render(live=live, **values))

    @routes.head("/")
    @routes.get("/")
    def start() -> Response:
        if not desk.networks:
            return RedirectResponse("/live")
        networks = list(desk.networks.values())
        columns = list(dict.fromkeys(name for each in networks for name in each.about))
        scenes = [path.name for path in desk.scenes]
        return page(
            "start", networks=networks, columns=columns, limits=desk.limits, scenes=scenes, chosen=pair(networks)
        )

    @routes.get("/map/{key}")
    def look(key: str) -> HTMLResponse:
        if desk.kept.get(key) is None:
            return HTMLResponse(templates.get_template("gone.html.jinja").render(live=live), 404)
        return page("map", key=key)

    @routes.get("/compare")
    def compare(one: Annotated[str, Query(max_length=64)], other: Annotated[str, Query(max_length=64)]) -> HTMLResponse:
        if one not in desk.networks or other not in desk.networks:
            raise HTTPException(404, "there is no such network here")
        both = [desk.networks[one], desk.networks[other]]
        return page("compare", both=both, charts=charts(both), differences=differences(both))

    @routes.get("/live")
    def look_at_film() -> HTMLResponse:
        return page("live", ended=screen is not None and screen.closed, how=screen.ended if screen is not None else "")

    @routes.get("/docs")
    def api() -> HTMLResponse:
        return page("api")

    return routes


def pair(networks: list[Network]) -> tuple[str, str]:
    """Keys of the two networks to begin with: one from the source alone, and the last that was adapted."""
    plain = [each.key for each in networks if _method(each) == "source_only"]
    adapted = [each.key for each in networks if _method(each) not in ("source_only", "recalibrate", "")]
    one = plain[0] if plain else networks[0].key
    return one, adapted[-1] if adapted else networks[-1].key


def _method(network: Network) -> str:
    return network.run.recipe.method.name if network.run is not None else ""


def charts(both: list[Network]) -> list[tuple[str, Markup, list[tuple[str, list[str]]]]]:
    """IoU of each class, for every domain and split that one of two runs was scored on, with figures beside it."""
    scores = [_scores(each.run) for each in both]
    titles = [f"{letter}: {each.title}" for letter, each in zip("AB", both, strict=True)]
    found = []
    for key in dict.fromkeys(key for each in scores for key in each):
        seen = [each.get(key) for each in scores]
        names = list(dict.fromkeys(name for one in seen if one is not None for name in one.classes))
        rows = {
            name: [one.classes[name].iou if one is not None and name in one.classes else None for one in seen]
            for name in names
        }
        figures = [
            (words, [_percent(getattr(one, attribute)) if one is not None else "–" for one in seen])
            for words, attribute in (
                ("mIoU", "miou"),
                ("pixel accuracy", "accuracy"),
                ("boundary mIoU", "boundary_miou"),
            )
        ]
        found.append((key, grouped(rows, titles, f"IoU of each class, {key}"), figures))
    return found


def _scores(run: Run | None) -> dict[str, Scores]:
    """What a run scored, by role and split; what cannot be read is left out."""
    found: dict[str, Scores] = {}
    for key, values in (run.scores if run is not None else {}).items():
        if "/" in key and isinstance(values, dict):
            try:
                found[key] = Scores.model_validate(values)
            except ValueError:
                continue
    return found


def differences(both: list[Network]) -> list[tuple[str, str, str]]:
    """Settings of two recipes that differ: their names, and what each says."""
    flat: list[dict[str, str]] = []
    for each in both:
        try:
            values = each.run.recipe.model_dump(mode="json") if each.run is not None else {}
        except OverflyError:
            values = {}
        flat.append(dict(_flat(values)))
    names = list(dict.fromkeys([*flat[0], *flat[1]]))
    return [
        (name, flat[0].get(name, "–"), flat[1].get(name, "–"))
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if name == "start" and isinstance(value, dict):
            found.append((f"{before}{name}", "another recipe, trained first"))
        elif isinstance(value, dict) and value:
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((f"{before}{name}", "none" if value is None else str(value)))
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


__all__ = ["router"]
