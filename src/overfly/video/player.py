"""Process a stream: every frame in order, or the newest frame without lag.

Frames of a live source, or of a file in real-time playback, pass through a slot that holds only the newest; replaced
frames are dropped and counted. An overlay is at most one prediction and one frame old.
"""

import io
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from overfly.core.errors import OverflyError
from overfly.core.records import UInt8
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Spec
from overfly.evaluation.speed import Latencies
from overfly.video.overlay import OverlayRenderer

Clock = Callable[[], float]
"""A monotonic clock, in seconds."""
Sink = Callable[[UInt8, float], None]
"""Receives an overlay (H, W, 3), 0 to 255, and its time in the stream in seconds; called synchronously."""
REFRESH = 0.5
"""Seconds between two updates of the drawn statistics."""
JOIN_TIMEOUT = 2.0
"""Seconds to wait for the end of the reading thread, which a camera can block."""
INTERNAL_ERROR = "an internal error; see the output of the program"
"""Message for viewers after an unexpected error."""


class SourceFrame(NamedTuple):
    """A frame of a source: decodes the frame (H, W, 3), 0 to 255, unless dropped; seconds after the first frame."""

    pixels: Callable[[], UInt8]
    time: float


class TimedFrame(NamedTuple):
    """A frame, and the start of its latency: when it was decoded or, in real-time playback, due (clock seconds)."""

    frame: SourceFrame
    start: float


class StreamSummary(Spec):
    """Frames and times of a processed stream."""

    read: NonNegativeInt
    """Frames that the source yielded."""
    shown: NonNegativeInt
    """Frames with an overlay."""
    dropped: NonNegativeInt
    """Frames that were skipped for a newer one."""
    seconds: NonNegativeFloat
    """From the first frame decoded to the last overlay ready."""
    frames_per_second: NonNegativeFloat | None
    """Overlays per second over all; None without any."""
    p50_ms: NonNegativeFloat | None
    """Median latency from a frame decoded to its overlay ready, prediction included."""
    p95_ms: NonNegativeFloat | None
    """95th percentile of the latency from a frame decoded to its overlay ready, prediction included."""
    stopped: bool = False
    """Whether the user stopped it before the source ended."""


class StreamStats(NamedTuple):
    """Statistics of a stream so far."""

    latencies: Latencies
    read: int
    dropped: int

    def lines(self, *, live: bool) -> list[str]:
        """Format frame rate, latency and dropped frames as lines of text."""
        rate, median, high = self.latencies.recent()
        speed = "– frames/s" if rate is None else f"{rate:.1f} frames/s"
        ms = ["–" if seconds is None else f"{1000 * seconds:.0f}" for seconds in (median, high)]
        dropped = [f"dropped {self.dropped} of {self.read}"] if live else []
        return [f"{speed}   p50 {ms[0]} ms   p95 {ms[1]} ms", *dropped]

    def summary(self, *, stopped: bool = False) -> StreamSummary:
        """Summarize all frames."""
        (rate, median, high), count = self.latencies.overall(), self.latencies.count
        return StreamSummary(
            read=self.read, shown=count, dropped=self.dropped, seconds=count / rate if rate else 0.0,
            frames_per_second=rate,
            p50_ms=None if median is None else 1000 * median, p95_ms=None if high is None else 1000 * high,
            stopped=stopped,
        )  # fmt: skip


class LatestSlot:
    """Pass the newest frame from the reading to the predicting thread, and count dropped frames."""

    def __init__(self) -> None:
        self.read = self.dropped = 0
        self.abandoned = False
        self._frame: TimedFrame | None = None
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, frame: TimedFrame) -> None:
        """Store a frame; an unread frame is dropped."""
        with self._changed:
            self.read += 1
            self.dropped += self._frame is not None
            self._frame = frame
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """End the frames, with an error or without."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def frames(self, stop: threading.Event) -> Iterator[TimedFrame]:
        """Yield the newest frame repeatedly, until the source ends, then its error if any, or ``stop`` is set."""
        while True:
            with self._changed:
                while self._frame is None and not self._closed and not stop.is_set():
                    self._changed.wait(0.1)
                frame, self._frame = self._frame, None
                if frame is None or stop.is_set():
                    self.dropped += frame is not None
                    break
            yield frame
        if self._error is not None and not stop.is_set():
            raise self._error


class JpegFrame(NamedTuple):
    """An overlay as a JPEG, and its number, from 1."""

    jpeg: bytes
    number: int


class LatestFrame:
    """The newest overlay of a stream, for viewers in any number of threads.

    A JPEG is encoded once per overlay, when the first viewer requests it. ``number`` counts the overlays so far;
    ``end_reason`` is that for viewers, empty if unknown.
    """

    def __init__(self) -> None:
        self.number, self.closed, self.end_reason = 0, False, ""
        self._overlay: UInt8 | None = None
        self._encoded = JpegFrame(b"", 0)
        self._changing, self._encoding = threading.Lock(), threading.Lock()

    def show(self, overlay: UInt8, at: float = 0.0) -> None:
        """Publish an overlay (H, W, 3), 0 to 255; a `Sink`."""
        del at
        with self._changing:
            self._overlay, self.number = overlay, self.number + 1

    def close(self, end_reason: str = "") -> None:
        """End the stream for its viewers; later reasons are ignored."""
        with self._changing:
            if not self.closed:
                self.closed, self.end_reason = True, end_reason

    def latest(self) -> JpegFrame | None:
        """Return the newest overlay, or None before the first."""
        with self._encoding:
            with self._changing:
                overlay, number = self._overlay, self.number
            if overlay is None:
                return None
            if number != self._encoded.number:
                buffer = io.BytesIO()
                Image.fromarray(overlay).save(buffer, "JPEG", quality=80)
                self._encoded = JpegFrame(buffer.getvalue(), number)
            return self._encoded


def timed_frames(
    frames: Iterable[SourceFrame], stop: threading.Event, now: Clock = time.perf_counter,
    sleep: Callable[[float], object] | None = None, *, realtime: bool = False,
) -> Iterator[TimedFrame]:  # fmt: skip
    """Yield frames with the start of their latency.

    It is when a frame is decoded; with ``realtime``, where frames come at the source's own speed, when a frame is due,
    so that slow decoding counts. ``sleep`` waits for some seconds; by default ``stop`` interrupts it.
    """
    start: float | None = None
    for frame in frames:
        start = now() - frame.time if start is None else start
        due = start + frame.time
        if realtime and (early := due - now()) > 0:
            (sleep or stop.wait)(early)
        if stop.is_set():
            return
        yield TimedFrame(frame, due if realtime else now())


def limit_duration(frames: Iterable[SourceFrame], seconds: float | None) -> Iterator[SourceFrame]:
    """Yield the frames of the first ``seconds`` of a stream; all if None."""
    for frame in frames:
        if seconds is not None and frame.time >= seconds:
            return
        yield frame


def read_into_slot(frames: Iterator[TimedFrame], slot: LatestSlot) -> threading.Thread:
    """Start a thread that reads frames into a slot, until they end or the slot is abandoned."""

    def read() -> None:
        error: BaseException | None = None
        try:
            for frame in frames:
                slot.put(frame)
                if slot.abandoned:
                    break
        except BaseException as caught:
            error = caught
        finally:
            slot.close(error)

    thread = threading.Thread(target=read, name="overfly-frames", daemon=True)
    thread.start()
    return thread


def render_frames(
    renderer: OverlayRenderer, frames: Iterable[TimedFrame], sinks: Sequence[Sink], *, slot: LatestSlot | None = None,
    now: Clock = time.perf_counter, on_progress: Callable[[StreamStats], None] | None = None,
) -> StreamStats:  # fmt: skip
    """Render the overlay of every frame and pass it to the sinks; the latency excludes the sinks.

    ``slot`` is the slot that the frames come from, if any; it counts dropped frames.
    """
    latencies, lines, drawn_at = Latencies(), list[str](), float("-inf")
    read = dropped = 0
    for frame, start in frames:
        read, dropped = (slot.read, slot.dropped) if slot else (read + 1, 0)
        if now() - drawn_at >= REFRESH:
            lines, drawn_at = StreamStats(latencies, read, dropped).lines(live=slot is not None), now()
        overlay = renderer(frame.pixels(), lines)
        latencies.add(start, now())
        for sink in sinks:
            sink(overlay, frame.time)
        if on_progress is not None:
            on_progress(StreamStats(latencies, read, dropped))
    return StreamStats(latencies, slot.read if slot else read, slot.dropped if slot else dropped)


def process_stream(
    renderer: OverlayRenderer, frames: Iterable[SourceFrame], sinks: Sequence[Sink], *, live: bool = False,
    realtime: bool = False, stop: threading.Event | None = None,
    on_progress: Callable[[StreamStats], None] | None = None,
) -> StreamSummary:  # fmt: skip
    """Process a whole stream, every frame in order.

    With ``live`` frames are read in another thread, the newest one is processed and older ones are dropped; with
    ``realtime`` too, and the source is played at its own speed. ``stop`` ends the stream after the current frame.
    Raises `OverflyError`: the source is damaged; earlier frames were passed to the sinks.
    """
    stop = stop or threading.Event()
    timed = timed_frames(frames, stop, realtime=realtime)
    if live or realtime:
        slot = LatestSlot()
        thread = read_into_slot(timed, slot)
        try:
            stats = render_frames(renderer, slot.frames(stop), sinks, slot=slot, on_progress=on_progress)
        finally:
            slot.abandoned = True
            thread.join(JOIN_TIMEOUT)
    else:
        stats = render_frames(renderer, timed, sinks, on_progress=on_progress)
    return stats.summary(stopped=stop.is_set())


def end_message(summary: StreamSummary, reason: str = "") -> str:
    """Return the reason of a stream's end for its viewers; ``reason`` is empty for a regular end."""
    how = "stopped by the user" if summary.stopped else f"failed ({reason})" if reason else "finished"
    return f"{how} after {summary.shown} frame{'s' * (summary.shown != 1)}"


@contextmanager
def closed_on_error(latest: LatestFrame, source: str) -> Iterator[None]:
    """End a stream for its viewers after an error, with its message but not the address, which may hold a password."""
    try:
        yield
    except OverflyError as error:
        message = str(error).replace(source, "the stream") if "://" in source else str(error)
        latest.close(message.replace(source, "the stream", 1) if message.startswith(f"{source} ") else message)
        raise
    except Exception:
        latest.close(INTERNAL_ERROR)
        raise
