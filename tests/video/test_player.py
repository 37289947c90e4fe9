"""Processing of streams, on a simulated clock and with threads."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from overfly.core.errors import DataError
from overfly.exporting.predictor import Floats
from overfly.video.overlay import OverlayRenderer, OverlayStyle
from overfly.video.player import (
    LatestFrame,
    LatestSlot,
    SourceFrame,
    StreamStats,
    TimedFrame,
    limit_duration,
    process_stream,
    render_frames,
    timed_frames,
)
from streams import Clock, brightest, frame_number, numbered_frame, rule_model

PLAIN = OverlayStyle(opacity=0.0, legend=False, stats=False)


def source_frames(count: int, fps: float = 10.0) -> Iterator[SourceFrame]:
    for index in range(count):
        yield SourceFrame(partial(numbered_frame, index % 16), index / fps)


class Slow:
    """A slow network on the test's clock."""

    def __init__(self, clock: Clock, takes: Callable[[int], float]) -> None:
        self.clock, self.takes, self.passes = clock, takes, 0

    def __call__(self, images: Floats) -> Floats:
        self.clock.advance(self.takes(self.passes))
        self.passes += 1
        return brightest(images)


def live(count: int, fps: float, takes: Callable[[int], float]) -> tuple[StreamStats, list[float], list[float], Clock]:
    """A camera of ``count`` frames in front of a network; times of the shown frames, and how old they were then."""
    clock, slot, stop = Clock(), LatestSlot(), threading.Event()
    start = clock()

    def comes(index: int) -> None:
        slot.put(TimedFrame(SourceFrame(partial(numbered_frame, index % 16), index / fps), clock()))
        if index == count - 1:
            slot.close()

    for index in range(count):
        clock.at(start + index / fps, partial(comes, index))
    times: list[float] = []
    latencies: list[float] = []

    def sink(overlay: NDArray[np.uint8], at: float) -> None:
        assert frame_number(overlay) == round(at * fps) % 16
        times.append(at)
        latencies.append(clock() - start - at)

    def frames() -> Iterator[TimedFrame]:
        taken = slot.frames(stop)
        while clock.due or not slot._closed or slot._frame is not None:
            if slot._frame is None:  # time passes until the next frame
                clock.advance(max(0.0, clock.due[0][0] - clock()))
            yield next(taken)

    renderer = OverlayRenderer(rule_model(Slow(clock, takes)), PLAIN)
    return render_frames(renderer, frames(), [sink], slot=slot, now=clock), times, latencies, clock


def test_slow_network_drops_frames_without_lag() -> None:
    stats, times, latencies, clock = live(300, fps=30, takes=lambda _: 0.1)
    assert stats.read == 300
    assert stats.latencies.count + stats.dropped == 300
    assert stats.dropped == pytest.approx(200, abs=2)
    assert times == sorted(set(times))
    assert times[-1] == pytest.approx(299 / 30)
    assert max(latencies) <= 0.1 + 1 / 30 + 1e-9
    assert latencies[-1] <= latencies[1] + 1 / 30, "it lags more and more"
    assert clock() - 100 <= 299 / 30 + 0.2 + 1e-9


def test_latency_includes_waiting_and_prediction() -> None:
    stats, _, latencies, _ = live(200, fps=20, takes=lambda _: 0.07)
    result = stats.summary()
    assert result.p50_ms is not None
    assert 70 <= result.p50_ms <= 120.6
    assert result.p95_ms == pytest.approx(1000 * np.quantile(latencies, 0.95, method="inverted_cdf"), rel=0.01)
    assert result.frames_per_second == pytest.approx(1 / 0.07, rel=0.05)


def test_fast_network_drops_nothing() -> None:
    stats, times, latencies, _ = live(100, fps=25, takes=lambda _: 0.03)
    assert stats.dropped == 0
    assert len(times) == stats.read == 100
    assert max(latencies) == pytest.approx(0.03)


def test_delay_is_caught_up_at_once() -> None:
    stats, _, latencies, _ = live(100, fps=25, takes=lambda index: 2.0 if index == 10 else 0.01)
    assert stats.dropped == 49
    assert sum(latency > 0.06 for latency in latencies) <= 2


def test_paced_frames_begin_when_due() -> None:
    clock = Clock()
    given = [
        (frame.start, clock())
        for frame in timed_frames(source_frames(5), threading.Event(), clock, clock.advance, realtime=True)
    ]
    assert [start for start, _ in given] == pytest.approx([100, 100.1, 100.2, 100.3, 100.4])
    assert [now for _, now in given] == pytest.approx([100, 100.1, 100.2, 100.3, 100.4])


def test_slow_decoding_counts_as_latency() -> None:
    clock = Clock()

    def decoded() -> Iterator[SourceFrame]:
        for frame in source_frames(4):
            clock.advance(0.25)
            yield frame

    late = [
        clock() - frame.start
        for frame in timed_frames(decoded(), threading.Event(), clock, clock.advance, realtime=True)
    ]
    assert late == pytest.approx([0, 0.15, 0.30, 0.45])


def test_process_stream_keeps_every_frame_of_a_file() -> None:
    seen: list[int] = []
    times: list[float] = []

    def sink(overlay: NDArray[np.uint8], at: float) -> None:
        seen.append(frame_number(overlay))
        times.append(at)

    result = process_stream(OverlayRenderer(rule_model(), PLAIN), source_frames(16), [sink])
    assert seen == list(range(16))
    assert times == pytest.approx([index / 10 for index in range(16)])
    assert (result.read, result.shown, result.dropped, result.stopped) == (16, 16, 0, False)


def test_realtime_stream_drops_frames() -> None:
    times: list[float] = []

    def slow(images: Floats) -> Floats:
        time.sleep(0.05)
        return brightest(images)

    result = process_stream(
        OverlayRenderer(rule_model(slow), PLAIN),
        source_frames(60, fps=100),
        [lambda _, at: times.append(at)],
        realtime=True,
    )
    assert result.read == 60
    assert result.shown + result.dropped == 60
    assert result.shown == len(times)
    assert result.dropped >= 40
    assert times == sorted(set(times))
    assert result.seconds >= 0.59


def test_stop_finishes_the_current_frame() -> None:
    for live, realtime in ((False, False), (True, False), (False, True)):
        stop, times = threading.Event(), list[float]()

        def sink(_: NDArray[np.uint8], at: float, times: list[float] = times, stop: threading.Event = stop) -> None:
            times.append(at)
            if len(times) == 3:
                stop.set()

        result = process_stream(
            OverlayRenderer(rule_model(), PLAIN),
            source_frames(10**6, fps=1000),
            [sink],
            stop=stop,
            live=live,
            realtime=realtime,
        )
        assert result.stopped
        assert result.shown == len(times) == 3
        assert result.read == result.shown + result.dropped


@pytest.mark.parametrize("live", [False, True])
def test_error_of_the_source_follows_its_frames(live: bool) -> None:
    def breaking() -> Iterator[SourceFrame]:
        yield from source_frames(3)
        time.sleep(0.05)
        raise DataError("frame 4 is damaged")

    shown: list[float] = []
    with pytest.raises(DataError, match="frame 4"):
        process_stream(OverlayRenderer(rule_model(), PLAIN), breaking(), [lambda _, at: shown.append(at)], live=live)
    assert shown


def test_error_of_a_sink_ends_the_reading_thread() -> None:
    before = threading.active_count()

    def full(*_: object) -> None:
        raise DataError("the disk is full; make room")

    with pytest.raises(DataError, match="full"):
        process_stream(OverlayRenderer(rule_model(), PLAIN), source_frames(10**6, fps=1000), [full], realtime=True)
    assert threading.active_count() == before


def test_limit_duration() -> None:
    assert len(list(limit_duration(source_frames(30), 1.0))) == 10
    assert len(list(limit_duration(source_frames(30), None))) == 30
    stop = threading.Event()
    stop.set()
    assert not list(timed_frames(source_frames(3), stop))


def test_stats_are_refreshed_twice_a_second() -> None:
    clock, drawn = Clock(), list[str]()

    class RecordingRenderer(OverlayRenderer):
        def __call__(self, frame: NDArray[np.uint8], lines: Sequence[str] = ()) -> NDArray[np.uint8]:
            drawn.append(" | ".join(lines))
            return super().__call__(frame)

    renderer = RecordingRenderer(rule_model(Slow(clock, lambda _: 0.1)), PLAIN)
    render_frames(renderer, timed_frames(source_frames(12), threading.Event(), clock), [], now=clock)
    assert drawn[0] == "– frames/s   p50 – ms   p95 – ms"
    assert drawn[0:5] == drawn[:1] * 5
    assert drawn[6] == drawn[9] == "10.0 frames/s   p50 100 ms   p95 100 ms"


def test_latest_frame_is_encoded_once_for_all_viewers() -> None:
    latest_frame = LatestFrame()
    assert latest_frame.latest() is None
    latest_frame.show(numbered_frame(3))
    encoded: list[object] = []
    viewers = [threading.Thread(target=lambda: encoded.append(latest_frame.latest())) for _ in range(3)]
    for viewer in viewers:
        viewer.start()
    for viewer in viewers:
        viewer.join()
    first = latest_frame.latest()
    assert first is not None
    assert first.number == 1
    assert encoded == [first] * 3
    assert latest_frame.latest() is first, "a JPEG is made once"
    with Image.open(io.BytesIO(first.jpeg)) as image:
        assert frame_number(np.asarray(image)) == 3
    latest_frame.show(numbered_frame(4))
    latest_frame.show(numbered_frame(5))
    third = latest_frame.latest()
    assert third is not None
    assert third.number == 3
    latest_frame.close()
    assert latest_frame.closed
