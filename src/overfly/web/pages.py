"""HTML pages of the server: networks, a map, a comparison of two runs, the live stream, the API."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from markupsafe import Markup

from overfly.adaptation.selection import flatten_settings
from overfly.core.errors import OverflyError
from overfly.core.progress import percent
from overfly.evaluation.scores import valid_scores
from overfly.reporting.figures import grouped_bars
from overfly.reporting.report import environment
from overfly.video.player import LatestFrame
from overfly.web.maps import MapStore
from overfly.web.service import InferenceService, ServedNetwork

METRICS = (("mIoU", "miou"), ("pixel accuracy", "accuracy"), ("boundary mIoU", "boundary_miou"))
"""Metrics of a comparison: title and attribute of `Scores`."""


def page_router(service: InferenceService, store: MapStore, latest_frame: LatestFrame | None) -> APIRouter:
    """Return the routes of all pages; ``latest_frame`` is None without a live stream."""
    routes = APIRouter(default_response_class=HTMLResponse)
    templates = environment(Path(__file__).parent / "templates")

    def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
        text = templates.get_template(f"{name}.html.jinja").render(
            stream=latest_frame is not None, networks=list(service.networks.values()), **values
        )
        return HTMLResponse(text, status)

    @routes.head("/")
    @routes.get("/")
    def networks_page() -> Response:
        networks = list(service.networks.values())
        if not networks:
            return RedirectResponse("/live")
        columns = list(dict.fromkeys(name for network in networks for name in network.about))
        scenes = [path.name for path in service.scenes]
        selected = default_networks(networks)
        return page("networks", columns=columns, limits=service.limits, scenes=scenes, selected=selected)

    @routes.get("/map/{key}")
    def show_map(key: str) -> HTMLResponse:
        return page("map", key=key) if store.get(key) is not None else page("map_not_found", 404)

    @routes.get("/compare")
    def compare(one: Annotated[str, Query(max_length=64)], other: Annotated[str, Query(max_length=64)]) -> HTMLResponse:
        if one not in service.networks or other not in service.networks:
            raise HTTPException(404, "unknown network; /networks lists the keys")
        pair = [service.networks[one], service.networks[other]]
        return page("compare", pair=pair, comparisons=compare_scores(pair), differences=compare_recipes(pair))

    @routes.get("/live")
    def live() -> HTMLResponse:
        closed = latest_frame is not None and latest_frame.closed
        return page("live", ended=closed, reason=latest_frame.end_reason if latest_frame is not None else "")

    @routes.get("/docs")
    def api() -> HTMLResponse:
        return page("api")

    return routes


def default_networks(networks: list[ServedNetwork]) -> tuple[str, str]:
    """Return the keys of the networks selected by default: the first source-only and the last adapted network."""
    source_only = [network.key for network in networks if _method(network) == "source_only"]
    adapted = [network.key for network in networks if _method(network) not in ("source_only", "recalibrate", "")]
    return [*source_only, networks[0].key][0], [networks[-1].key, *adapted][-1]


def _method(network: ServedNetwork) -> str:
    return network.run.recipe.method.name if network.run is not None else ""


def compare_scores(pair: list[ServedNetwork]) -> list[tuple[str, Markup, list[tuple[str, list[str]]]]]:
    """Compare two networks on every domain and split on which either was scored.

    Returns:
        Domain and split, a chart of the IoU of each class, and rows of metrics in percent.
    """
    scores = [valid_scores(network.run.scores if network.run is not None else {}) for network in pair]
    titles = [f"{letter}: {network.title}" for letter, network in zip("AB", pair, strict=True)]
    result = []
    for key in dict.fromkeys(key for by_key in scores for key in by_key):
        both = [by_key.get(key) for by_key in scores]
        classes = [{} if value is None else value.classes for value in both]
        names = dict.fromkeys(name for by_name in classes for name in by_name)
        rows = {name: [by_name[name].iou if name in by_name else None for by_name in classes] for name in names}
        metrics = [(title, [percent(getattr(value, name, None), 2) for value in both]) for title, name in METRICS]
        result.append((key, grouped_bars(rows, titles, f"IoU of each class, {key}"), metrics))
    return result


def compare_recipes(pair: list[ServedNetwork]) -> list[tuple[str, str, str]]:
    """Return the settings in which two recipes differ: dotted name and both values."""
    first, second = (_settings(network) for network in pair)
    names = dict.fromkeys([*first, *second])
    return [(key, first.get(key, "–"), second.get(key, "–")) for key in names if first.get(key) != second.get(key)]


def _settings(network: ServedNetwork) -> dict[str, str]:
    try:
        values = network.run.recipe.model_dump(mode="json") if network.run is not None else {}
    except OverflyError:
        return {}
    values |= {"start": "a recipe"} if isinstance(values.get("start"), dict) else {}
    return {name: "none" if value is None else str(value) for name, value in flatten_settings(values).items()}
