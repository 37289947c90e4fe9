"""The command ``watch``."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from overfly.commands.arguments import MAX_SIDE, PathLike, check_bounds
from overfly.core.choices import Backend
from overfly.core.errors import RecipeError

if TYPE_CHECKING:
    from overfly.video.capture import VideoStream
    from overfly.video.overlay import OverlayRenderer, OverlayStyle
    from overfly.video.player import LatestFrame, Sink, StreamStats, StreamSummary


@dataclass(frozen=True)
class WatchResult:
    """Frames, latency and settings of a processed stream.

    Attributes:
        frame, input: width and height of the first frame, and of the network's input, in pixels.
        realtime: whether frames were dropped to keep up.
        damaged: packets of a live source that could not be decoded.
        end_reason: reason of an irregular end of a live source.
        out: the video, if one was written.
        seconds: limit of the duration, if one was given.
    """

    source: str
    network: str
    backend: str
    device: str
    machine: str
    threads: int
    frame: tuple[int, int]
    input: tuple[int, int]
    realtime: bool
    damaged: int
    end_reason: str
    summary: StreamSummary
    out: Path | None
    seconds: float | None = None
    as_json: bool = False

    def __rich_console__(self, *_: object) -> Iterator[str]:
        from json import dumps

        from overfly.core.errors import render_text

        values = {name: value for name, value in vars(self).items() if name not in ("seconds", "as_json")}
        if self.as_json:
            yield dumps(values | {"summary": self.summary.model_dump()}, indent=2, default=str)
        else:
            template = Path(__file__).with_name("watch.txt.jinja")
            yield render_text(template, seconds=self.seconds, **values).rstrip("\n")


def watch(
    run: PathLike, source: str, *, out: PathLike | None = None, serve: int | None = None, realtime: bool = False,
    size: int | None = None, opacity: float = 0.5, legend: bool = True, stats: bool = True, fps: float | None = None,
    seconds: float | None = None, backend: Backend = "auto", device: str = "auto", json: bool = False,
    quiet: bool = False,
) -> WatchResult:  # fmt: skip
    """Predict a video, a camera or a folder of images, and show the classes on top of every frame.

    The overlay is written to a video (--out), served as a page on this machine (--serve), or both. A file is processed
    frame by frame; of a camera, an address, or a file with --realtime the newest frame is processed, and frames for
    which there is no time are dropped and counted. Ctrl-C finishes the current frame and the video. Latency is measured
    from the frame decoded to the overlay ready, prediction included.

    Args:
        run: the folder of a finished run, a .safetensors file of a run, or an exported file.
        source: a video; a folder of images; a camera such as /dev/video0; an address such as rtsp://… or http://…
        out: video to write, .mp4, .mov or .mkv.
        serve: port of 127.0.0.1 on which the overlay is served (extra: serve); 0 selects a free one.
        realtime: play a file at its own speed, and drop frames instead of lagging behind.
        size: longest side to which frames are downscaled for the network, in pixels; by default unchanged.
        opacity: of the class colors over the frame, 0 to 1.
        legend: draw names and colors of the classes.
        stats: draw latency and frame rate.
        fps: frames per second of a folder; 10 by default.
        seconds: end after this time of the stream.
        backend: torch, onnxruntime or openvino; auto: the file's own; for a run, PyTorch or its fastest export.
        device: auto, cpu, cuda, cuda:1 or mps.
        json: print JSON instead of text.
        quiet: print no progress.

    Returns:
        Frames read, shown and dropped, latency p50 and p95, and frame rate.
    """
    import numpy as np

    from overfly.commands.load_predictor import load_predictor
    from overfly.video.capture import open_stream, write_video
    from overfly.video.overlay import OverlayRenderer
    from overfly.video.player import LatestFrame

    out = Path(out) if out is not None else None
    style = _check_options(out, serve, fps, seconds, size=size, opacity=opacity, legend=legend, stats=stats)
    frame: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_stream(source, fps=fps))
        sinks: list[Sink] = [lambda overlay, _: None if frame else frame.append((overlay.shape[1], overlay.shape[0]))]
        if out is not None:
            sinks.append(stack.enter_context(write_video(out, stream.rate)).write)
        latest = LatestFrame()
        if serve is not None:
            sinks.append(latest.show)
            stack.enter_context(_serve(latest, serve, quiet=quiet))
        renderer = OverlayRenderer(load_predictor(run, backend=backend, device=device), style)
        renderer.predict(np.zeros((stream.height, stream.width, 3), np.uint8))  # warm-up
        summary = _process(renderer, stream, sinks, latest, seconds=seconds, realtime=realtime, quiet=quiet)
    shape = frame[0] if frame else (stream.width, stream.height)
    return _result(
        stream, renderer, summary, shape, realtime=stream.live or realtime, out=out if summary.shown else None,
        seconds=seconds, as_json=json,
    )  # fmt: skip


def _process(
    renderer: OverlayRenderer, stream: VideoStream, sinks: list[Sink], latest: LatestFrame, *,
    seconds: float | None, realtime: bool, quiet: bool,
) -> StreamSummary:  # fmt: skip
    """Process a stream until its end, its limit in seconds, or a signal."""
    from overfly.core.progress import Progress
    from overfly.video.player import closed_on_error, end_message, limit_duration, process_stream

    def on_progress(stats: StreamStats) -> None:
        progress.update(Path(stream.title).name or stream.title, stats.read, detail="  ".join(stats.lines(live=True)))

    frames = limit_duration(stream.frames, seconds)
    with Progress("frames", quiet=quiet) as progress, _stop_on_signal() as stop, closed_on_error(latest, stream.title):
        summary = process_stream(
            renderer, frames, sinks, live=stream.live, realtime=realtime, stop=stop, on_progress=on_progress
        )
        latest.close(end_message(summary, stream.errors.end_reason))
    return summary


def _result(
    stream: VideoStream, renderer: OverlayRenderer, summary: StreamSummary, frame: tuple[int, int], **values: Any
) -> WatchResult:
    """The result of a stream whose frames have a width and height in pixels."""
    from overfly.core.device import describe_machine

    scale = min(1.0, (renderer.style.size or MAX_SIDE) / max(frame))
    predictor = renderer.predictor
    machine = describe_machine(predictor.device if predictor.backend == "torch" else "cpu")
    return WatchResult(
        source=stream.title, network=predictor.metadata.title or predictor.metadata.architecture,
        backend=predictor.backend, device=predictor.device, machine=str(machine["device"]),
        threads=int(machine["threads"]), frame=frame,
        input=(max(1, round(frame[0] * scale)), max(1, round(frame[1] * scale))),
        damaged=stream.errors.damaged, end_reason=stream.errors.end_reason, summary=summary, **values,
    )  # fmt: skip


def _check_options(
    out: Path | None, serve: int | None, fps: float | None, seconds: float | None, *, size: int | None,
    opacity: float, legend: bool, stats: bool,
) -> OverlayStyle:  # fmt: skip
    from overfly.video.capture import check_output
    from overfly.video.overlay import OverlayStyle

    if out is not None:
        check_output(out)
    elif serve is None:
        raise RecipeError("watch needs --out VIDEO.mp4 to write the overlay, or --serve 8000 to show it on a page")
    check_bounds({"serve": (serve or 0, 0, 65535), "size": (MAX_SIDE if size is None else size, 16, MAX_SIDE)})
    if not 0 <= opacity <= 1:
        raise RecipeError(f"--opacity must be 0 to 1, got {opacity}")
    for name, value, largest in (("fps", fps, 1000.0), ("seconds", seconds, 1e9)):
        if value is not None and not 0 < value <= largest:
            raise RecipeError(f"--{name} must be above 0 and at most {largest:g}, got {value}")
    return OverlayStyle(size, opacity, legend, stats)


@contextlib.contextmanager
def _serve(latest: LatestFrame, port: int, *, quiet: bool) -> Iterator[None]:
    """Serve the newest overlay on a page within the context."""
    from overfly.web import load_server

    with load_server().serve_stream(latest, port) as address:
        if not quiet or port == 0:
            print(f"overlay at {address}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            latest.close()


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; the second one interrupts. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {name: signal.signal(name, handle) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
