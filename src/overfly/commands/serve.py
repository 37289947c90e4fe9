"""The command ``serve``."""

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import MAX_SIDE, PathLikes, check_bounds
from overfly.core.choices import Backend
from overfly.core.errors import DataError, OverflyError, RecipeError, RunError, printable

if TYPE_CHECKING:
    from overfly.exporting.predictor import Predictor
    from overfly.training.run import Run
    from overfly.video.capture import VideoStream
    from overfly.video.player import LatestFrame
    from overfly.web.service import ServedNetwork

MAX_REASONS = 3
"""Unreadable scenes whose reason is printed; more are counted."""


def serve(
    networks: PathLikes, *, scenes: PathLikes | None = None, base_map: str | None = None, watch: str | None = None,
    watch_size: int | None = None, host: str = "127.0.0.1", port: int = 8000, token: str | None = None,
    backend: Backend = "auto", device: str = "auto", upload: int = 64, megapixels: float = 9.0, seconds: float = 60.0,
    queue: int = 16,
) -> str:  # fmt: skip
    """Serve networks in a browser and over HTTP, until Ctrl-C.

    The page lists the networks, compares two of them, and shows the map of an image that is dropped on it. Programs
    send images to /predict; /docs describes the API.

    Args:
        networks: runs, folders of runs, weights files (.safetensors) or exported files.
        scenes: images of any size on this machine that the page lists, or folders of them; may be repeated: --scenes A
            --scenes B. Their maps are kept in the cache folder.
        base_map: address of tiles in Web Mercator, with {z}, {x} and {y}, which the page offers as a background.
        watch: a video, a camera, an address or a folder of images, shown live with the predictions of the first network
            (extra: stream).
        watch_size: longest side in pixels to which its frames are shrunk for the network.
        host: address to serve on; any other than 127.0.0.1 and localhost requires a token.
        port: 0 selects a free port.
        token: required from clients, at least 12 characters; or set the environment variable OVERFLY_TOKEN, which other
            users of the machine cannot read.
        backend: torch, onnxruntime or openvino; auto: the file's own; for a run, PyTorch or its fastest export.
        device: auto, cpu, cuda, cuda:1 or mps.
        upload: megabytes of a request; beyond them 413.
        megapixels: million pixels of an image that is sent; beyond them 400.
        seconds: time to receive a request, and to predict an image; maps of the page take any time.
        queue: images that are processed or wait at the same time; beyond them 429.

    Returns:
        A line with the address, after the server was stopped.
    """
    from overfly.web import load_server

    check_bounds({"port": (port, 0, 65535), "upload": (upload, 1, 10**5), "queue": (queue, 1, 1000)})
    check_bounds({"watch-size": (watch_size or 16, 16, MAX_SIDE)})
    if not 0.01 <= megapixels <= 1000 or not 0.1 <= seconds <= 86400:
        raise RecipeError("--megapixels must be from 0.01 to 1000, and --seconds from 0.1 to 86400")
    token = _check_token(host, token)
    server = load_server()
    from overfly.web.service import Limits  # after the check of the extra

    limits = Limits(upload=upload * 10**6, pixels=round(megapixels * 1e6), seconds=seconds, queue=queue)
    served = served_networks(networks, backend, device)
    images = _list_scenes([Path(scene) for scene in scenes or ()])
    with (
        live_stream(watch, served[0].load, watch_size) as frame,
        contextlib.closing(server.bind(host, port)) as bound,
    ):
        app = server.application(
            served, limits=limits, token=token, latest_frame=frame, scenes=images, base_map=base_map
        )
        address: str = server.socket_url(bound)
        print(f"overfly: {len(served)} network(s) at {address}; Ctrl-C stops it", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(app, bound, limits)
    return f"stopped: {address}"


@contextlib.contextmanager
def live_stream(
    source: str | None, load: "Callable[[], Predictor]", size: int | None = None
) -> "Iterator[LatestFrame | None]":
    """Process a stream in a thread within the context; yield its newest overlay, or None without a ``source``.

    ``source`` and ``size`` are those of `overfly watch`; ``load`` loads the network of the stream.

    Raises:
        OverflyError: the stream cannot be opened, or the network does not fit it. A later error ends the stream; its
            message goes to stderr and to the page.
    """
    if source is None:
        yield None
        return
    from overfly.video import player
    from overfly.video.capture import open_stream
    from overfly.video.overlay import OverlayRenderer, OverlayStyle

    latest_frame, stop = player.LatestFrame(), threading.Event()

    def process(stream: "VideoStream") -> None:
        end_reason = player.INTERNAL_ERROR
        try:
            with player.closed_on_error(latest_frame, source):
                summary = player.process_stream(
                    renderer, stream.frames, [latest_frame.show], live=stream.live, realtime=not stream.live, stop=stop
                )
            end_reason = player.end_message(summary, stream.errors.end_reason)
            latest_frame.close(end_reason)
        except OverflyError as error:
            end_reason = str(error)
        finally:
            if not stop.is_set():
                print(f"overfly: the stream has ended: {end_reason}", file=sys.stderr, flush=True)

    with open_stream(source) as opened:
        renderer = OverlayRenderer(load(), OverlayStyle(size=size))
        thread = threading.Thread(target=process, args=(opened,), name="overfly-watch", daemon=True)
        thread.start()
        try:
            yield latest_frame
        finally:
            stop.set()
            latest_frame.close()
            thread.join(10)


def served_networks(
    paths: Sequence[Path | str], backend: Backend = "auto", device: str = "auto"
) -> "list[ServedNetwork]":
    """Return the networks of runs, folders of runs, and files; runs are loaded on the first request.

    Raises `OverflyError` if a path contains no network, or a file cannot be loaded.
    """
    from overfly.adaptation.selection import is_comparison
    from overfly.commands.load_predictor import NetworkFolder, fastest_file, load_predictor
    from overfly.commands.predict import network_digest
    from overfly.reporting.report import find_runs, recipe_title
    from overfly.web.service import ServedNetwork

    result: dict[Path, ServedNetwork] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            if path.resolve() not in result:
                predictor = load_predictor(path, backend=backend, device=device)
                about = {"model": predictor.metadata.architecture, "folder": path.resolve().parent.name}
                about |= dict(zip(("format", "precision"), predictor.export or (), strict=False))
                about["runtime"] = predictor.backend
                load, digest = partial(lambda loaded: loaded, predictor), partial(network_digest, path)
                result[path.resolve()] = ServedNetwork(str(len(result)), path.name, load, None, about, digest)
            continue
        folders = [path] if is_comparison(path) else [run.path for run in find_runs([path]) if run.finished]
        if not folders:
            raise RunError(f"{path} contains no finished run; finish one with overfly train, or give another folder")
        for folder in folders:
            if folder.resolve() not in result:
                file, runtime = fastest_file(folder, backend, device)
                load = partial(load_predictor, file, backend=runtime, device=device)
                digest = partial(network_digest, file)
                run = NetworkFolder.open(folder).run
                title = folder.name if run is None else f"{recipe_title(run.recipe)}, seed {run.recipe.seed}"
                about = {"folder": folder.name} if run is None else _describe(run) | {"folder": folder.name}
                result[folder.resolve()] = ServedNetwork(str(len(result)), title, load, run, about, digest)
    _make_titles_unique(result)
    for network in result.values():
        network.title = printable(network.title)
        network.about = {name: printable(str(value)) for name, value in network.about.items()}
    return list(result.values())


def _describe(run: "Run") -> dict[str, str]:
    """Return the columns of the table of networks: model, method, domains, mIoU by domain and split."""
    from overfly.core.progress import percent

    recipe = run.recipe
    about = {"model": recipe.model.architecture, "method": recipe.method.name}
    domains = {role: domain for role in ("source", "target") if (domain := getattr(recipe, role)) is not None}
    about |= {role: domain.title for role, domain in domains.items()}
    for role in domains:
        for split in ("val", "test"):
            miou = run.scores.get(f"{role}/{split}", {}).get("miou")
            if isinstance(miou, float):
                about[f"mIoU {role} {split}"] = percent(miou, 1)
    return about


def _make_titles_unique(networks: "Mapping[Path, ServedNetwork]") -> None:
    """Append the shortest distinct folder, and format and precision of exports, to equal titles."""
    titles = Counter(network.title for network in networks.values())
    for title in [title for title, count in titles.items() if count > 1]:
        same = {path: network for path, network in networks.items() if network.title == title}
        folders = [path if network.run is not None else path.parent for path, network in same.items()]
        tails = [folder.as_posix() for folder in folders]
        for length in range(1, max(len(folder.parts) for folder in folders)):
            tails = [Path(*folder.parts[-length:]).as_posix() for folder in folders]
            if len(set(tails)) == len(tails):
                break
        for network, tail in zip(same.values(), tails, strict=True):
            kind = [network.about[name] for name in ("format", "precision") if name in network.about]
            network.title = f"{title} ({', '.join([tail, *kind])})"


def _check_token(host: str, token: str | None) -> str | None:
    """Return the token of option or environment; raise `RecipeError` if it is too short, or missing where required."""
    token = token or os.environ.get("OVERFLY_TOKEN") or None
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise RecipeError(f"--host {host} gives other machines access and requires a --token of at least 12 characters")
    if token is not None and len(token) < 12:
        raise RecipeError(f"--token must have at least 12 characters, got {len(token)}; make one: openssl rand -hex 16")
    return token


def _list_scenes(paths: Sequence[Path]) -> list[Path]:
    """List the images of files and folders, name unreadable ones on stderr; raise `DataError` for a missing path."""
    from overfly.data.headers import read_raster_header
    from overfly.data.listing import check_name, is_image_name

    result: list[Path] = []
    reasons: list[str] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"--scenes {path} does not exist; give image files or folders of them")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in (file for file in files if file == path or is_image_name(file)):
            try:
                check_name(file)
                read_raster_header(file)
                result.append(file)
            except OverflyError as error:
                reasons.append(str(error))
    if reasons:
        more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
        shown = "; ".join([*reasons[:MAX_REASONS], *more])
        print(f"overfly: {len(reasons)} scene(s) left out of the page: {shown}", file=sys.stderr, flush=True)
    return result
