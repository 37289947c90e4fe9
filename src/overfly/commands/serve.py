"""`overfly serve`: networks and their predictions in a browser and over HTTP."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from overfly.commands.arguments import MAX_SIDE, check_bounds, pathlike
from overfly.commands.load_predictor import load_predictor, origin_of
from overfly.core.choices import Backend
from overfly.core.errors import DataError, OverflyError, RecipeError, RunError
from overfly.data.headers import SUFFIXES
from overfly.exporting.predictor import Predictor
from overfly.reporting.report_data import find_runs, recipe_title
from overfly.training.run import Run
from overfly.video import player as stream
from overfly.video.capture import VideoStream, open_stream
from overfly.video.endings import FAULT, end_message, public_message
from overfly.video.overlay import OverlayStyle, overlay_renderer
from overfly.web import load_server
from overfly.web.config import Limits
from overfly.web.networks import Network
from overfly.web.uploads import within

__all__ = ["live_stream", "serve", "served_networks"]

NAMED = 3
"""Scenes that cannot be offered, of which the reason is told."""


@dataclass(frozen=True)
class Served:
    """A server that was stopped."""

    address: str

    def __rich__(self) -> str:
        return f"stopped: {self.address}"


@pathlike
def serve(
    networks: list[str],
    *,
    scenes: list[Path] | None = None,
    watch: str | None = None,
    watch_size: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    backend: Backend = "auto",
    device: str = "auto",
    upload: int = 64,
    megapixels: float = 9.0,
    seconds: float = 60.0,
    queue: int = 16,
    batch: int = 8,
) -> Served:
    """Look at runs and predictions in a browser, and predict images by HTTP, until stopped by Ctrl-C.

    The page lists the networks, compares two of them, and shows an image that is dropped on it with its map. Programs
    send images to /predict; /docs describes it.

    Args:
        networks: runs, folders of runs, networks' files (.safetensors) or exported files.
        scenes: a picture of this machine that the page offers, or a folder of such; may be repeated: --scenes A
            --scenes B.
        watch: a video, a camera, an address or a folder of pictures, shown live through the first network (extra:
            stream).
        watch_size: longest side that its frames are shrunk to before the network sees them, in pixels.
        host: address to serve on; any but 127.0.0.1 and localhost needs a token.
        port: 0 takes one that is free.
        token: what clients must know, 12 characters or more; or set the environment variable OVERFLY_TOKEN, which other
            users of the machine cannot see.
        backend: torch, onnxruntime or openvino; auto takes the one that each file is made for.
        device: auto, cpu, cuda, cuda:1 or mps.
        upload: megabytes that a request may have.
        megapixels: million pixels that an image may have.
        seconds: time that a request may take.
        queue: requests at the same time; the next is told to come back later (429).
        batch: images that go through the network together.

    Returns:
        Nothing to speak of; it runs until it is stopped.
    """
    check_bounds({"port": (port, 0, 65535), "upload": (upload, 1, 10**5), "queue": (queue, 1, 1000)})
    check_bounds({"batch": (batch, 4, 256), "watch-size": (watch_size or 16, 16, MAX_SIDE)})
    if not 0.01 <= megapixels <= 1000 or not 0.1 <= seconds <= 86400:
        raise RecipeError("--megapixels goes from 0.01 to 1000 and --seconds from 0.1 to 86400; correct the one given")
    token = _token(host, token)
    server = load_server()
    limits = Limits(upload=upload * 10**6, pixels=round(megapixels * 1e6), seconds=seconds, queue=queue, batch=batch)
    offered = served_networks(networks, backend, device)
    pictures = _pictures(scenes or [], limits.pixels)
    with (
        live_stream(watch, offered[0].opened, watch_size) as screen,
        contextlib.closing(server.bound(host, port)) as place,
    ):
        app = server.application(offered, limits=limits, token=token, screen=screen, scenes=pictures)
        where = server.address(place)
        print(f"overfly: {len(offered)} network(s) at {where}; Ctrl-C stops it", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(app, place)
    return Served(where)


@contextlib.contextmanager
def live_stream(
    source: str | None, network: Callable[[], Predictor], size: int | None = None
) -> Iterator[stream.LatestFrame | None]:
    """A stream looked at in a thread, for as long as the context lasts; its newest overlay is on the screen given.

    Args:
        source: what `overfly watch` takes; None: there is no stream, and no screen.
        network: loads the network that looks; it is not shared with others.
        size: longest side that frames are shrunk to before the network sees them, in pixels.

    Raises:
        OverflyError: there is no such stream, or the network does not go with it. What goes wrong later ends the
            stream, and a line on stderr and the screen say how.
    """
    if source is None:
        yield None
        return
    screen, stop = stream.LatestFrame(), threading.Event()

    def show(found: VideoStream) -> None:
        ended = public = FAULT
        try:
            summary = stream.process_stream(
                renderer, found.frames, [screen.show], live=found.live, realtime=not found.live, stop=stop
            )
            ended = public = end_message(summary, found.errors.ended)
        except OverflyError as error:
            ended, public = str(error), public_message(error, source or "")
        finally:
            if not stop.is_set():
                print(f"overfly: the stream has ended: {ended}", file=sys.stderr, flush=True)
            screen.close(public)

    with open_stream(source) as found:
        renderer = overlay_renderer(network(), OverlayStyle(size=size))
        thread = threading.Thread(target=show, args=(found,), name="overfly-watch", daemon=True)
        thread.start()
        try:
            yield screen
        finally:
            stop.set()
            screen.close()
            thread.join(10)


def served_networks(paths: list[str], backend: Backend = "auto", device: str = "auto") -> list[Network]:
    """The networks that some paths mean, for a server; each is loaded when it is first asked.

    Raises:
        OverflyError: a path means none, or a file cannot be loaded.
    """
    found: dict[Path, Network] = {}
    for path in map(Path, paths):
        if path.is_dir():
            runs = [run for run in find_runs([path]) if run.finished or (run.path / "best.safetensors").is_file()]
            if not runs:
                raise RunError(f"{path} has no finished run; finish one with overfly train, or give another folder")
            for run in runs:
                if run.path.resolve() in found:
                    continue
                opened = partial(load_predictor, run.path, backend=backend, device=device)
                origin = origin_of(run)
                title = run.path.name if origin is None else f"{recipe_title(origin.recipe)}, seed {origin.recipe.seed}"
                found[run.path.resolve()] = Network(str(len(found)), title, opened, run, _about(run, origin))
        elif path.resolve() not in found:
            predictor = load_predictor(path, backend=backend, device=device)
            about = {"model": predictor.metadata.architecture, "folder": path.resolve().parent.name}
            about |= dict(zip(("format", "precision"), predictor.export or (), strict=False))
            about["runtime"] = predictor.backend
            opened = partial(_same, predictor)
            found[path.resolve()] = Network(str(len(found)), path.name, opened, None, about)
    _tell_apart(found)
    return list(found.values())


def _tell_apart(found: Mapping[Path, Network]) -> None:
    """Say, behind each title that several networks have, where they lie, and format and precision of exports."""
    titles = Counter(each.title for each in found.values())
    for title in [title for title, count in titles.items() if count > 1]:
        alike = {path: each for path, each in found.items() if each.title == title}
        folders = [path if each.run is not None else path.parent for path, each in alike.items()]
        for each, folder in zip(alike.values(), _tails(folders), strict=True):
            kind = [each.about[name] for name in ("format", "precision") if name in each.about]
            each.title = f"{title} ({', '.join([folder, *kind])})"


def _tails(folders: list[Path]) -> list[str]:
    """The ends of some paths, as short as tells them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders)):
        found = [Path(*folder.parts[-length:]).as_posix() for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]


def _same(predictor: Predictor) -> Predictor:
    return predictor


def _about(run: Run, origin: Run | None) -> dict[str, str]:
    """What is told of a run's network, which may be another run's, as of one that was refused."""
    if origin is None:
        return {"model": run.recipe.model.name, "folder": run.path.name}
    recipe = origin.recipe
    scores = origin.scores
    shown = {"model": recipe.model.name, "method": recipe.method.name}
    shown |= {"folder": run.path.name}
    shown |= {role: domain.title for role in ("source", "target") if (domain := getattr(recipe, role)) is not None}
    for role in ("source", "target"):
        for split in ("val", "test"):
            miou = scores.get(f"{role}/{split}", {}).get("miou")
            if isinstance(miou, float) and f"mIoU {role}" not in shown:
                shown[f"mIoU {role}"] = f"{100 * miou:.1f} ({split})"
    return shown


def _token(host: str, token: str | None) -> str | None:
    """The token given or of the environment; an open door is refused."""
    token = token or os.environ.get("OVERFLY_TOKEN") or None
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise RecipeError(f"--host {host} lets other machines in, so it needs a --token, 12 characters or more")
    if token is not None and len(token) < 12:
        raise RecipeError("the token is too short; take 12 characters or more, such as: openssl rand -hex 16")
    return token


def _pictures(scenes: list[Path], pixels: int) -> list[Path]:
    """The pictures that some paths mean; what cannot be one is left out, which a line on stderr says.

    Args:
        scenes: files, or folders of them.
        pixels: that a picture may have.

    Raises:
        DataError: a path is not there.
    """
    found: list[Path] = []
    refused: list[str] = []
    for path in scenes:
        if not path.exists():
            raise DataError(f"{path} is not there; give --scenes files or folders of pictures")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in (file for file in files if file == path or file.suffix.lower() in SUFFIXES):
            try:
                within(file, pixels)
                found.append(file)
            except OverflyError as error:
                refused.append(str(error))
    if refused:
        more = [f"and {len(refused) - NAMED} more"] if len(refused) > NAMED else []
        told = "; ".join([*refused[:NAMED], *more])
        print(f"overfly: {len(refused)} scene(s) left out of the page: {told}", file=sys.stderr, flush=True)
    return found
