"""What the API does with streams: watch a video, a camera or a folder, and make a video to watch."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from overfly.commands.arguments import MAX_SIDE, check_bounds, pathlike
from overfly.commands.load_predictor import load_predictor
from overfly.core.choices import Backend, Scene
from overfly.core.device import describe_machine
from overfly.core.errors import OverflyError, RecipeError
from overfly.core.spec import Spec
from overfly.data.synthetic.domain import synthesize
from overfly.video import flight
from overfly.video.capture import VideoStream, check_output, open_stream, writing
from overfly.video.endings import FAULT, end_message, public_message
from overfly.video.mjpeg import serving
from overfly.video.overlay import OverlayRenderer, OverlayStyle, overlay_renderer
from overfly.video.player import LatestFrame, Sink, StreamStats, StreamSummary, limit_duration, warm_up
from overfly.video.player import process_stream as look_at

__all__ = ["data_fly", "watch"]

PLAIN_SECONDS = 20.0
"""How often a line says how far it is, where there is no terminal."""
DRAWN = 4096
"""Largest side of the synthetic world that is flown over where no raster is given, in pixels."""


class Record(Spec):
    """What was watched, by what, and how fast."""

    source: str
    """What was watched."""
    network: str
    """The network's run, or its name."""
    backend: str
    """Runtime of the network."""
    device: str
    """Where it ran."""
    machine: str
    """The processor or the GPU, by its name."""
    threads: int
    """Threads of the processor that PyTorch may use."""
    frame: tuple[int, int]
    """Width and height of the first frame, in pixels."""
    seen: tuple[int, int]
    """Width and height at which the network saw it, in pixels."""
    realtime: bool
    """Whether frames were dropped rather than waited for."""
    damaged: int
    """Packets of a live source that could not be decoded."""
    ended: str
    """Why a live source ended, where that was no plain end."""
    summary: StreamSummary
    """Frames and times."""
    out: Path | None
    """The overlay's video, where one was written."""


@dataclass(frozen=True)
class Watched:
    """What `overfly watch` did."""

    record: Record
    as_json: bool = False
    asked: float | None = None
    """Seconds after which the stream was to be left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, summary = self.record, self.record.summary
        if self.as_json:
            yield found.model_dump_json(indent=2)
            return
        whole = "to its end" if self.asked is None else f"its first {self.asked:g} s at most"
        how = "stopped by hand" if summary.stopped else whole
        yield f"watched: {found.source}, {how}{f' ({found.ended})' if found.ended else ''}"
        yield f"frames: {summary.read} read, {summary.shown} shown, {summary.dropped} dropped" + (
            f", {found.damaged} damaged" if found.damaged else ""
        )
        if summary.p50_ms is not None and summary.p95_ms is not None and summary.frames_per_second is not None:
            yield (
                f"latency from frame to overlay: p50 {summary.p50_ms:.1f} ms, p95 {summary.p95_ms:.1f} ms; "
                f"{summary.frames_per_second:.1f} frames/s over {summary.seconds:.1f} s"
            )
        width, height = found.frame
        yield (
            f"frames of {width}×{height}, seen by the network at {found.seen[0]}×{found.seen[1]}; {found.network} by "
            f"{found.backend} on {found.machine}"
        )
        if summary.dropped and max(found.seen) > 256:
            yield f"to drop fewer: --size {max(found.seen) // 2 // 32 * 32}"
        if found.out is not None:
            yield f"written: {found.out}"


@dataclass(frozen=True)
class Flown:
    """A flight as a video."""

    path: Path
    frames: int
    fps: float
    size: tuple[int, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = self.size
        yield f"flown: {self.frames} frames of {width}×{height}, {self.frames / self.fps:.1f} s, {self.fps:g} a second"
        yield f"written: {self.path}"
        yield f"watch it with: overfly watch RUN {self.path} --out overlay.mp4"


@pathlike
def watch(
    run: Path | str,
    source: str,
    *,
    out: Path | None = None,
    serve: int | None = None,
    realtime: bool = False,
    size: int | None = None,
    opacity: float = 0.5,
    legend: bool = True,
    figures: bool = True,
    fps: float | None = None,
    seconds: float | None = None,
    backend: Backend = "auto",
    device: str = "auto",
    json: bool = False,
    quiet: bool = False,
) -> Watched:
    """Watch a video, a camera or a folder of pictures through a network: its classes on top of every frame.

    The overlay is written to a video (--out), or shown on a page of this machine (--serve), or both. A file is
    processed frame by frame, however long that takes; a camera, an address, or a file with --realtime is not waited
    for: the newest frame is taken, and what there is no time for is dropped and counted. Ctrl-C ends it in good order.
    Latency counts from the frame decoded to the overlay ready, the network included.

    Args:
        run: the folder of a finished run, or the file of a network.
        source: a video; a folder of pictures; a camera such as /dev/video0; an address such as rtsp://… or http://…
        out: video to write, .mp4, .mov or .mkv.
        serve: port of 127.0.0.1 to show the overlay on; 0 takes a free one.
        realtime: play a file at its own speed, and drop frames rather than lag behind.
        size: longest side that frames are shrunk to before the network sees them, in pixels; left out, as they are.
        opacity: share of the class colors in the picture, 0 to 1.
        legend: draw names and colors of the classes.
        figures: draw latency and frames a second.
        fps: pictures a second of a folder; 10 where left out.
        seconds: end after so much of the stream.
        backend: torch, onnxruntime or openvino; auto takes the one that the file is made for.
        device: auto, cpu, cuda, cuda:1 or mps.
        json: print JSON instead of words.
        quiet: print no progress.

    Returns:
        Frames read, shown and dropped, latency p50 and p95, and frames a second.
    """
    _check_place(out, serve)
    style = _style(size, opacity, legend=legend, figures=figures)
    _check_length(fps, seconds)
    with ExitStack() as stack:
        stream = stack.enter_context(open_stream(source, fps=fps))
        screen = LatestFrame()
        sinks, sizes = _sinks(stack, out, serve, stream.rate, screen, quiet=quiet)
        renderer = overlay_renderer(load_predictor(run, backend=backend, device=device), style)
        warm_up(renderer, stream.width, stream.height)
        told = None if quiet else stack.enter_context(_progress(source))
        pictures = limit_duration(stream.frames, seconds)
        with stopping() as stop, _telling(screen, source):
            summary = look_at(
                renderer, pictures, sinks, live=stream.live, realtime=realtime, stop=stop, on_progress=told
            )
            screen.close(end_message(summary, stream.errors.ended))
    return Watched(_recorded(stream, renderer, summary, sizes, realtime=realtime, out=out), as_json=json, asked=seconds)


def _check_place(out: Path | None, serve: int | None) -> None:
    if out is None and serve is None:
        raise RecipeError("watch needs a place for the overlay; give --out overlay.mp4, or --serve 8000 for a page")
    check_bounds({"serve": (serve or 0, 0, 65535)})
    if out is not None:
        check_output(out)


def _style(size: int | None, opacity: float, *, legend: bool, figures: bool) -> OverlayStyle:
    check_bounds({"size": (MAX_SIDE if size is None else size, 16, MAX_SIDE)})
    if not 0 <= opacity <= 1:
        raise RecipeError(f"--opacity {opacity} is no share; take 0 to 1")
    return OverlayStyle(size, opacity, legend, figures)


def _check_length(fps: float | None, seconds: float | None) -> None:
    for name, value, most in (("fps", fps, 1000.0), ("seconds", seconds, 1e9)):
        if value is not None and not 0 < value <= most:
            raise RecipeError(f"--{name} {value} is out of range; take more than 0, up to {most:g}")


@contextmanager
def _telling(screen: LatestFrame, source: str) -> Iterator[None]:
    """Say on the screen what went wrong."""
    try:
        yield
    except OverflyError as error:
        screen.close(public_message(error, source))
        raise
    except Exception:
        screen.close(FAULT)
        raise


def _sinks(
    stack: ExitStack, out: Path | None, serve: int | None, rate: float, screen: LatestFrame, *, quiet: bool
) -> tuple[list[Sink], list[tuple[int, int]]]:
    """Where overlays go, and a list that is given the size (width, height) of the first."""
    sizes: list[tuple[int, int]] = []
    sinks: list[Sink] = [lambda overlay, _: None if sizes else sizes.append((overlay.shape[1], overlay.shape[0]))]
    if out is not None:
        sinks.append(stack.enter_context(writing(out, rate)).write)
    if serve is not None:
        address = stack.enter_context(serving(screen, serve))
        sinks.append(screen.show)
        if not quiet or serve == 0:
            print(f"look at {address}", file=sys.stderr, flush=True)
    return sinks, sizes


def _recorded(
    stream: VideoStream,
    renderer: OverlayRenderer,
    summary: StreamSummary,
    sizes: list[tuple[int, int]],
    *,
    realtime: bool,
    out: Path | None,
) -> Record:
    """What came of a stream; ``sizes`` holds that of its first frame (width, height), where one was shown."""
    metadata, (width, height) = renderer.predictor.metadata, sizes[0] if sizes else (stream.width, stream.height)
    scale = min(1.0, (renderer.style.size or MAX_SIDE) / max(width, height))
    machine = describe_machine(renderer.predictor.device if renderer.predictor.backend == "torch" else "cpu")
    return Record(
        source=stream.title,
        network=metadata.title or metadata.architecture,
        backend=renderer.predictor.backend,
        device=renderer.predictor.device,
        machine=str(machine["device"]),
        threads=int(machine["threads"]),
        frame=(width, height),
        seen=(max(1, round(width * scale)), max(1, round(height * scale))),
        realtime=stream.live or realtime,
        damaged=stream.errors.damaged,
        ended=stream.errors.ended,
        summary=summary,
        out=out if summary.shown else None,
    )


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second interrupts at once. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    try:
        for name in before:
            signal.signal(name, ask)
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[StreamStats], None]]:
    """Show how a stream goes: a line that changes in a terminal, a new line now and then elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    task = bar.add_task(Path(title).name or title, total=None, figures="")
    said = time.monotonic()

    def told(standing: StreamStats) -> None:
        nonlocal said
        figures = "  ".join(standing.lines(live=True))
        bar.update(task, figures=figures)
        if bar.disable and time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            print(f"frame {standing.read}: {figures}", file=sys.stderr, flush=True)

    with bar:
        yield told


@pathlike
def data_fly(
    raster: Path | None = None,
    *,
    out: Path,
    seconds: float = 20.0,
    fps: float = 25.0,
    size: tuple[int, int] = (960, 540),
    rotate: bool = True,
    seed: int = 0,
    scene: Scene = "urban",
    quiet: bool = False,
) -> Flown:
    """Make a video by flying over a raster, or over a synthetic world: something to watch where there is no drone.

    The flight is smooth, with turns and changes of height, and the same for the same seed. A GeoTIFF of any size is
    read window by window.

    Args:
        raster: GeoTIFF, PNG or JPEG to fly over; left out, a synthetic world.
        out: video to write, .mp4, .mov or .mkv.
        seconds: length of the video.
        fps: frames a second.
        size: width and height of the video, even numbers of pixels.
        rotate: turn the camera too.
        seed: which flight.
        scene: urban or rural, of the synthetic world.
        quiet: print no progress.

    Returns:
        The video's file, and how many frames it has.
    """
    width, height = size
    check_bounds({"size": (min(size), 16, 8192), "seed": (seed, 0, 2**32)})
    if max(size) > 8192 or width % 2 or height % 2:
        raise RecipeError(f"--size {width} {height} is no size of a video; take even numbers of pixels up to 8192")
    _check_length(fps, seconds)
    check_output(out)
    count = 0
    with ExitStack() as stack:
        if raster is None:
            ground = flight.of_picture(synthesize(scene, "test", seed, max(256, min(DRAWN, 2 * max(size))))[0])
        else:
            ground = stack.enter_context(flight.over(raster))
        path = flight.path_over(ground, size, rotate=rotate, seed=seed, name=str(raster or "the synthetic world"))
        video = stack.enter_context(writing(out, fps))
        bar = stack.enter_context(
            Progress(BarColumn(30), TextColumn("{task.completed} of {task.total} frames"), console=Console(stderr=True),
                     disable=quiet or not sys.stderr.isatty())
        )  # fmt: skip
        task = bar.add_task("", total=max(1, round(seconds * fps)))
        for frame, at in flight.fly(ground, path, seconds=seconds, fps=fps, frame=size):
            video.write(frame, at)
            bar.advance(task)
            count += 1
    return Flown(out, count, fps, size)
