"""Frames in, overlays out: every frame in order, or the newest one and no lag.

A source gives pictures at its own pace. A file that is processed whole waits for the network; a camera, or a file
played at its own speed, does not: its frames go through a slot that holds the newest alone, and what the network has
no time for is dropped and counted. So what is shown is never older than one pass of the network and one frame.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from overfly.core.records import UInt8
from overfly.core.spec import NonNegative, Spec, Whole
from overfly.video.latency import Latencies
from overfly.video.overlay import OverlayRenderer

Clock = Callable[[], float]
"""Seconds of a clock that never goes back."""
Sink = Callable[[UInt8, float], None]
"""Takes an overlay (H, W, 3), 0 to 255, and its time in the stream, in seconds. May be slow: it is waited for."""
REFRESH = 0.5
"""Seconds that drawn figures stand still, so that they can be read."""

PATIENCE = 2.0
"""Seconds that a reading thread has to end before it is left alone: a camera may never answer."""


class SourceFrame(NamedTuple):
    """What a source gives.

    Attributes:
        pixels: makes the frame (H, W, 3), 0 to 255; costs time, so it is not asked of frames that are dropped.
        time: its place in the stream, in seconds after the first.
    """

    pixels: Callable[[], UInt8]
    time: float


class Frame(NamedTuple):
    """A picture that is there: ``began`` is when it was decoded, or due where it is played, by the machine's clock."""

    picture: SourceFrame
    began: float


class StreamSummary(Spec):
    """What became of a stream."""

    read: Whole
    """Frames that the source gave."""
    shown: Whole
    """Frames that got an overlay."""
    dropped: Whole
    """Frames that were passed over because a newer one was there."""
    seconds: NonNegative
    """From the first frame decoded to the last overlay ready."""
    frames_per_second: NonNegative | None
    """Overlays a second over all; None where there was none."""
    p50_ms: NonNegative | None
    """Half of the overlays were ready within it after their frame was decoded, the network included."""
    p95_ms: NonNegative | None
    """95 % of the overlays were ready within it after their frame was decoded, the network included."""
    stopped: bool = False
    """Whether it was stopped by hand, before the source ended."""


class LatestSlot:
    """Holds the newest frame alone, between the thread that reads and the one that looks. Counts what it drops."""

    def __init__(self) -> None:
        self.read = self.dropped = 0
        self.abandoned = False
        self._frame: Frame | None = None
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> None:
        """Hand over a frame; one that still waits is dropped."""
        with self._changed:
            self.read += 1
            self.dropped += self._frame is not None
            self._frame = frame
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """Say that no frame will come any more, and why where something went wrong."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """The newest frame whenever one is asked for, until the source ends or ``stop`` is set.

        Raises:
            BaseException: what the reading thread failed with, after the frames before it.
        """
        while (frame := self._take(stop)) is not None:
            yield frame
        with self._changed:
            if self._frame is not None:
                self.dropped, self._frame = self.dropped + 1, None
            if self._error is not None and not stop.is_set():
                raise self._error

    def _take(self, stop: threading.Event) -> Frame | None:
        with self._changed:
            while self._frame is None and not self._closed and not stop.is_set():
                self._changed.wait(0.1)
            if stop.is_set():
                return None
            frame, self._frame = self._frame, None
            return frame


class JpegFrame(NamedTuple):
    """An overlay as a JPEG, and its number: 1 for the first that was shown."""

    jpeg: bytes
    number: int


class LatestFrame:
    """Holds the newest overlay for whoever looks, from any number of threads.

    A JPEG is made when somebody asks for it, once for all who ask: a stream that nobody looks at costs nothing.
    """

    def __init__(self, quality: int = 80) -> None:
        self.quality = quality
        self._picture: UInt8 | None = None
        self._number = 0
        self._made = JpegFrame(b"", 0)
        self._closed = False
        self._ended = ""
        self._changed = threading.Condition()
        self._making = threading.Lock()

    def show(self, overlay: UInt8, at: float = 0.0) -> None:
        """Put up an overlay (H, W, 3), 0 to 255; a `Sink`."""
        del at
        with self._changed:
            self._picture, self._number = overlay, self._number + 1
            self._changed.notify_all()

    def close(self, ended: str = "") -> None:
        """Say that nothing new will be shown, and how it ended; those who wait go. The first word stands."""
        with self._changed:
            if not self._closed:
                self._closed, self._ended = True, ended
            self._changed.notify_all()

    @property
    def ended(self) -> str:
        """How it ended, in words for those who look; empty where nobody has said."""
        return self._ended

    @property
    def closed(self) -> bool:
        """Whether nothing new will be shown."""
        return self._closed

    @property
    def number(self) -> int:
        """How many overlays were shown."""
        return self._number

    def latest(self) -> JpegFrame | None:
        """The newest overlay, or None before the first."""
        with self._making:
            with self._changed:
                picture, number = self._picture, self._number
            if picture is None:
                return None
            if number != self._made.number:
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "JPEG", quality=self.quality)
                self._made = JpegFrame(buffer.getvalue(), number)
            return self._made

    def wait(self, after: int = 0, timeout: float | None = None) -> JpegFrame | None:
        """The newest overlay whose number is above ``after``; None where the time is over or the screen is closed.

        Args:
            after: number of the overlay that one has; 0 for none.
            timeout: seconds to wait; None: as long as it takes.
        """
        with self._changed:
            there = self._changed.wait_for(lambda: self._number > after or self._closed, timeout)
            if not there or self._number <= after:
                return None
        return self.latest()


def live_frames(
    source_frames: Iterable[SourceFrame], stop: threading.Event, now: Clock = time.perf_counter
) -> Iterator[Frame]:
    """Frames as they come: each begins when it is decoded."""
    for picture in source_frames:
        if stop.is_set():
            return
        yield Frame(picture, now())


def paced_frames(
    source_frames: Iterable[SourceFrame],
    stop: threading.Event,
    now: Clock = time.perf_counter,
    sleep: Callable[[float], object] | None = None,
) -> Iterator[Frame]:
    """Frames at the speed of the stream's own time, as a camera would give them.

    Each begins when it is due: where decoding is too slow for the stream's speed, that counts as latency.

    Args:
        source_frames: what is played.
        stop: ends it, in the middle of waiting too.
        now: the clock.
        sleep: waits so many seconds; left out, until then or until ``stop`` is set.
    """
    start: float | None = None
    for picture in source_frames:
        if start is None:
            start = now() - picture.time
        due = start + picture.time
        if (early := due - now()) > 0:
            (sleep or stop.wait)(early)
        if stop.is_set():
            return
        yield Frame(picture, due)


def limit_duration(source_frames: Iterable[SourceFrame], seconds: float | None) -> Iterator[SourceFrame]:
    """The pictures of the first so many seconds of a stream; all where None."""
    for picture in source_frames:
        if seconds is not None and picture.time >= seconds:
            return
        yield picture


def read_into_slot(frames: Iterator[Frame], slot: LatestSlot) -> threading.Thread:
    """Read frames into a slot, until they end or it is abandoned, in a thread of its own that is started here."""

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


class StreamStats(NamedTuple):
    """Where a stream stands."""

    latencies: Latencies
    read: int
    dropped: int

    def lines(self, *, live: bool) -> list[str]:
        """The figures as they are drawn: of the last frames, up to the one before."""
        rate, middle, high = self.latencies.recent_rate, self.latencies.recent(0.5), self.latencies.recent(0.95)
        speed = "– frames/s" if rate is None else f"{rate:.1f} frames/s"
        ms = ["–" if seconds is None else f"{1000 * seconds:.0f}" for seconds in (middle, high)]
        dropped = [f"dropped {self.dropped} of {self.read}"] if live else []
        return [f"{speed}   p50 {ms[0]} ms   p95 {ms[1]} ms", *dropped]


def render_frames(
    renderer: OverlayRenderer,
    frames: Iterable[Frame],
    sinks: Sequence[Sink],
    *,
    slot: LatestSlot | None = None,
    now: Clock = time.perf_counter,
    on_progress: Callable[[StreamStats], None] | None = None,
) -> StreamStats:
    """Draw the overlay of every frame that comes, and hand it on.

    Args:
        renderer: network and style.
        frames: what to look at, in order.
        sinks: who gets the overlays; they are waited for, outside of the latency.
        slot: where the frames come from, for the count of the dropped ones.
        now: the clock of the frames.
        on_progress: called after each frame.
    """
    latencies, lines, drawn_at = Latencies(), list[str](), float("-inf")
    read = dropped = 0
    for frame in frames:
        read, dropped = (slot.read, slot.dropped) if slot else (read + 1, 0)
        if now() - drawn_at >= REFRESH:
            lines, drawn_at = StreamStats(latencies, read, dropped).lines(live=slot is not None), now()
        overlay = renderer(frame.picture.pixels(), lines)
        latencies.add(frame.began, now())
        for sink in sinks:
            sink(overlay, frame.picture.time)
        if on_progress is not None:
            on_progress(StreamStats(latencies, read, dropped))
    return StreamStats(latencies, slot.read if slot else read, slot.dropped if slot else dropped)


def process_stream(
    renderer: OverlayRenderer,
    source_frames: Iterable[SourceFrame],
    sinks: Sequence[Sink],
    *,
    live: bool = False,
    realtime: bool = False,
    stop: threading.Event | None = None,
    on_progress: Callable[[StreamStats], None] | None = None,
) -> StreamSummary:
    """Look at a whole stream.

    Args:
        renderer: network and style.
        source_frames: the source; with ``live`` or ``realtime`` it is read in another thread.
        sinks: who gets the overlays, such as ``LatestFrame().show``.
        live: take the newest frame and drop the ones between; else every frame in order.
        realtime: play the source at its own speed, and take the newest frame.
        stop: when set, the frame at work is finished and the stream ends.
        on_progress: called after each frame.

    Returns:
        What was read, shown and dropped, and how long it took.

    Raises:
        OverflyError: the source is broken; sinks have had the frames before it.
    """
    stop = stop or threading.Event()
    frames = paced_frames(source_frames, stop) if realtime else live_frames(source_frames, stop)
    if live or realtime:
        slot = LatestSlot()
        thread = read_into_slot(frames, slot)
        try:
            standing = render_frames(renderer, slot.frames(stop), sinks, slot=slot, on_progress=on_progress)
        finally:
            slot.abandoned = True
            thread.join(PATIENCE)
    else:
        standing = render_frames(renderer, frames, sinks, on_progress=on_progress)
    return summarize(standing, stopped=stop.is_set())


def summarize(standing: StreamStats, *, stopped: bool = False) -> StreamSummary:
    """The figures over all frames."""
    latencies = standing.latencies
    middle, high = latencies.overall(0.5), latencies.overall(0.95)
    rate = latencies.overall_rate
    return StreamSummary(
        read=standing.read,
        shown=latencies.count,
        dropped=standing.dropped,
        seconds=latencies.count / rate if rate else 0.0,
        frames_per_second=rate,
        p50_ms=None if middle is None else 1000 * middle,
        p95_ms=None if high is None else 1000 * high,
        stopped=stopped,
    )


def warm_up(renderer: OverlayRenderer, width: int, height: int) -> None:
    """Run the network once on a black frame, so that no frame of the stream pays for its start."""
    renderer.classes_of(np.zeros((height, width, 3), np.uint8))
