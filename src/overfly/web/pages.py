"""HTML pages of the server: networks, a map, a comparison of two runs, the live stream, the API."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse, RedirectResponse, Response

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
            stream=latest_frame is not None, networks=list(service.networks.values()), percent=percent, **values
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
        return page("networks", columns=columns, limits=service.limits, scenes=scenes)

    @routes.get("/map/{key}")
    def show_map(key: str) -> HTMLResponse:
        return page("map", key=key) if store.get(key) is not None else page("map_not_found", 404)

    @routes.get("/compare")
    def compare(one: Annotated[str, Query(max_length=64)], other: Annotated[str, Query(max_length=64)]) -> HTMLResponse:
        if one not in service.networks or other not in service.networks:
            raise HTTPException(404, "unknown network; /networks lists the keys")
        pair = [service.networks[one], service.networks[other]]
        scores = [valid_scores(network.run.scores if network.run is not None else {}) for network in pair]
        settings = [_settings(network) for network in pair]
        return page("compare", pair=pair, scores=scores, settings=settings, metrics=METRICS, bars=grouped_bars)

    @routes.get("/live")
    def live() -> HTMLResponse:
        closed = latest_frame is not None and latest_frame.closed
        return page("live", ended=closed, reason=latest_frame.end_reason if latest_frame is not None else "")

    @routes.get("/docs")
    def api() -> HTMLResponse:
        return page("api")

    return routes


def _settings(network: ServedNetwork) -> dict[str, str]:
    try:
        values = network.run.recipe.model_dump(mode="json") if network.run is not None else {}
    except OverflyError:
        return {}
    values |= {"start": "a recipe"} if isinstance(values.get("start"), dict) else {}
    return {name: "none" if value is None else str(value) for name, value in flatten_settings(values).items()}
