"""Videos, cameras, addresses and folders of pictures as streams; overlays as a video. The one file that knows PyAV."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from overfly.core.atomic_files import temporary_path
from overfly.core.errors import DataError, MissingExtraError, RecipeError
from overfly.core.records import UInt8
from overfly.data.headers import SUFFIXES, read_header
from overfly.data.listing import natural_key
from overfly.data.reading import read_image
from overfly.video.overlay import fitted
from overfly.video.player import SourceFrame

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""What a video is written as, by its ending."""
ENCODERS = (("libx264", {"preset": "veryfast", "crf": "20"}), ("mpeg4", {"qscale": "3"}))
"""Who writes it: the first that this FFmpeg has."""
TICKS = 90_000
"""Parts of a second that a written frame's time is counted in."""
TIMEOUT = 10.0
"""Seconds that an address has to answer."""
FPS = 10.0
"""Pictures of a folder shown in a second, where nothing else is said."""
HOPELESS = 300
"""Damaged packets in a row after which a live source is given up."""
BT709 = 1
"""What FFmpeg calls the colors of high definition, in each of four fields; range 1 is that of television."""


@dataclass
class StreamErrors:
    """What went wrong with a live source that went on all the same.

    Attributes:
        damaged: packets that could not be decoded.
        ended: why it ended, where that was no plain end.
    """

    damaged: int = 0
    ended: str = ""


@dataclass(frozen=True)
class VideoStream:
    """A stream that has been opened.

    Attributes:
        title: what it is, as a person named it.
        live: whether it goes on whether or not somebody looks.
        rate: frames a second, as it says itself.
        width, height: of a frame as it is coded, in pixels; it may say that it is to be turned.
        pictures: its frames; they may be read once, in any one thread.
        trouble: what went wrong, filled in while it is read.
    """

    title: str
    live: bool
    rate: float
    width: int
    height: int
    frames: Iterator[SourceFrame]
    errors: StreamErrors = field(default_factory=StreamErrors)


class _Stream(NamedTuple):
    """An open container, its stream of pictures, and whether it is live."""

    container: Any
    video: Any
    live: bool


@contextmanager
def open_stream(source: str, *, fps: float | None = None) -> Iterator[VideoStream]:
    """Open a video, a camera, an address or a folder of pictures.

    Args:
        source: file; folder, whose pictures come in natural order of their names; camera such as ``/dev/video0`` or
            its number; address such as ``rtsp://…`` or ``http://…``. An address with a known length is no live source.
        fps: pictures of a folder a second.

    Raises:
        DataError: there is nothing such, or nothing that can be seen.
        RecipeError: ``fps`` for something that has its own speed.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(source)
    if path.is_dir():
        found = _folder(path, FPS if fps is None else fps)
    elif fps is not None:
        raise RecipeError(f"--fps is the speed of a folder of pictures, and {source} has its own; leave it out")
    else:
        found = _video(source)
    try:
        yield found
    finally:
        with suppress(ValueError, AttributeError):  # still in the hands of a thread that does not answer
            found.frames.close()  # type: ignore[attr-defined]


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "stream", "reading and writing video") from None
    return av


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".").lower()


def _folder(path: Path, fps: float) -> VideoStream:
    files = sorted(
        (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")),
        key=lambda file: natural_key(file.name),
    )
    if not files:
        raise DataError(f"{path} holds no picture ({', '.join(SUFFIXES)}); name a folder of frames, or a video")

    def frames() -> Iterator[SourceFrame]:
        for index, file in enumerate(files):
            image = read_image(file, bands=3)
            if image.dtype != np.uint8:
                raise DataError(
                    f"{file} has pixels of {image.dtype}, and a stream has 8 bits a band; map it with overfly predict"
                )
            yield SourceFrame(partial(_same, image), index / fps)

    first = read_header(files[0])
    return VideoStream(str(path), False, fps, first.width, first.height, frames())


def _same(image: UInt8) -> UInt8:
    return image


def _video(source: str) -> VideoStream:
    stream = _open(source)
    errors = StreamErrors()
    context = stream.video.codec_context
    rate = float(stream.video.average_rate or stream.video.guessed_rate or 25)
    return VideoStream(
        source, stream.live, rate, context.width, context.height, _decoded(source, stream, rate, errors), errors
    )


def _open(source: str) -> _Stream:
    """Open what FFmpeg reads; a file by its path alone, whatever its name looks like."""
    address = "://" in source
    if not address and source.isdecimal() and not Path(source).exists():
        source = f"/dev/video{source}"
    camera = not address and source.startswith("/dev/video")
    if not address and not Path(source).exists():
        raise DataError(
            f"there is no camera {source}; see which there are with ls /dev/video*, and plug yours in"
            if camera
            else f"{source} is not there; give a video, a folder of pictures, a camera such as /dev/video0 or an "
            "address such as rtsp://…"
        )
    av = _av()
    try:
        if camera:
            container = av.open(source, format="v4l2")
        elif address:
            options = {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}
            container = av.open(source, options=options, timeout=TIMEOUT)
        else:
            container = av.open(f"file:{source}")
    except (av.FFmpegError, OSError, ValueError) as error:
        what = "stream" if address else "camera" if camera else "video"
        todo = "see that it is on, and not in use" if address or camera else "play it to see, or copy it again"
        raise DataError(f"{source} cannot be opened as a {what} ({_reason(error)}); {todo}") from None
    if not container.streams.video:
        container.close()
        raise DataError(f"{source} has no pictures in it, only other streams; give a video")
    live = camera or (address and container.duration is None)
    video = container.streams.video[0]
    if video.codec_context is None or not video.codec_context.width:
        container.close()
        raise DataError(f"{source} says neither how it is coded nor its size; play it to see, or copy it again")
    video.thread_type = "SLICE" if live else "AUTO"  # frames in several threads come late
    return _Stream(container, video, live)


class _CutError(Exception):
    """A file that breaks off; says why."""


def _batches(stream: _Stream, errors: StreamErrors) -> Iterator[list[Any]]:
    """The frames of each packet. What is damaged ends a file (`_CutError`); a live source goes on, if it can."""
    av = _av()
    packets, bad = stream.container.demux(stream.video), 0
    while True:
        packet = None
        try:
            packet = next(packets)
            frames = packet.decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError as error:
            bad += 1
            if not stream.live:
                raise _CutError(_reason(error)) from None
            if not isinstance(error, av.InvalidDataError) or bad > HOPELESS:
                errors.ended = _reason(error)
                return
            errors.damaged += 1
            if packet is None:
                packets = stream.container.demux(stream.video)
            continue
        if packet.is_corrupt and not stream.live:
            raise _CutError("a packet is cut short")
        errors.damaged += packet.is_corrupt
        bad = 0
        yield frames


def _decoded(source: str, stream: _Stream, rate: float, errors: StreamErrors) -> Iterator[SourceFrame]:
    """The frames of an open container with their times: a live source's are those at which they came."""
    first: float | None = None
    count, at = 0, 0.0
    try:
        for frame in chain.from_iterable(_batches(stream, errors)):
            told = time.perf_counter() if stream.live else frame.time
            if told is not None:
                first = told if first is None else first
                at = told - first
            elif count:
                at += 1 / rate
            count += 1
            yield SourceFrame(partial(_pixels, frame), at)
        if not count and not stream.live:
            raise DataError(f"{source} holds no frame that can be decoded; play it to see, or copy it again")
        if missing := _missing(stream, at + 1 / rate):
            raise _CutError(f"it says that {missing:.1f} s more follow")
    except _CutError as cut:
        raise _broken_off(source, at, str(cut)) from None
    finally:
        stream.container.close()


def _missing(stream: _Stream, seconds: float) -> float:
    """Seconds that a file lacks of the length that it declares; 0 where nothing can be said.

    A format that counts its frames tells by itself where they end; in one that does not, a video without other streams
    is as long as it says.
    """
    container = stream.container
    if stream.live or stream.video.frames or container.duration is None or len(container.streams) > 1:
        return 0.0
    lacking = float(container.duration / 1e6 - seconds)
    return lacking if lacking > max(0.5, 0.01 * seconds) else 0.0


def _broken_off(source: str, at: float, reason: str) -> DataError:
    whole = math.floor(10 * at) / 10
    other = f", or watch up to there with --seconds {whole}" if whole else ""
    return DataError(f"{source} breaks off after {at:.1f} s ({reason}); copy it again{other}")


def _pixels(frame: Any) -> UInt8:
    """A decoded frame as (H, W, 3), turned as it says; colors that name no standard are taken as players take them."""
    untold = frame.colorspace in (0, 2) and frame.height >= 720 and not frame.format.is_rgb
    standard = {"src_colorspace": "ITU709"} if untold else {}
    pixels: UInt8 = frame.to_ndarray(format="rgb24", **standard)
    quarters = round(frame.rotation / 90) % 4  # a telephone held upright
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


class _Writer:
    """One video file under way. Frames of another size than the first are fitted into it."""

    def __init__(self, part: Path, kind: str, rate: float) -> None:
        self.av = _av()
        self.container = self.av.open(f"file:{part}", "w", format=kind, options={"movflags": "faststart"})
        self.rate = Fraction(rate).limit_denominator(1001)
        self.video: Any = None
        self.width = self.height = 0
        self.last = -1

    def write(self, overlay: UInt8, at: float) -> None:
        """Add a frame (H, W, 3) at ``at`` seconds; a `Sink`."""
        if self.video is None:
            self.height, self.width = overlay.shape[:2]
            self._begin()
        pixels = fitted(overlay, self.width, self.height)
        odd = (self.height % 2, self.width % 2)
        if any(odd):
            pixels = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        self.last = max(self.last + 1, round(at * TICKS))
        frame.pts, frame.time_base = self.last, Fraction(1, TICKS)
        self.container.mux(self.video.encode(frame))

    def _begin(self) -> None:
        known = self.av.codecs_available
        name, options = next((entry for entry in ENCODERS if entry[0] in known), ENCODERS[-1])
        self.video = self.container.add_stream(name, rate=self.rate)
        self.video.width, self.video.height = self.width + self.width % 2, self.height + self.height % 2
        self.video.pix_fmt = "yuv420p"
        self.video.options = dict(options)
        context = self.video.codec_context
        context.time_base = Fraction(1, TICKS)
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709

    def finish(self) -> None:
        """Write what is still in the encoder, and the file's index."""
        if self.video is not None:
            self.container.mux(self.video.encode(None))
        self.container.close()


@contextmanager
def writing(path: Path, rate: float) -> Iterator[_Writer]:
    """Write a video (H.264 in MP4, MOV or MKV). It appears under its name when it is whole, or not at all.

    Args:
        path: file, of which there is none yet.
        rate: frames a second that are expected; each frame brings its own time.

    Raises:
        DataError: the file is there, cannot be written, or has another ending.
        MissingExtraError: PyAV is not installed.
    """
    check_output(path)
    av = _av()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(
            path
        ) as part:  # FFmpeg opens it with the first frame; a place that cannot be written is told now
            writer = _Writer(part, CONTAINERS[path.suffix.lower()], rate)
            try:
                yield writer
                writer.finish()
                if writer.video is not None:
                    _publish(part, path)
            except BaseException:
                with suppress(av.FFmpegError, OSError):
                    writer.container.close()
                raise
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be written ({_reason(error)}); choose another --out, or make room") from None


def _publish(part: Path, path: Path) -> None:
    """Give a finished file its name, unless another process has taken it meanwhile."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise DataError(
            f"{path} was written by another process meanwhile and is left as it is; give this command another --out"
        ) from None
    except OSError:  # a file system without links
        part.replace(path)


def check_output(path: Path) -> None:
    """See that a video can be written to a path.

    Raises:
        DataError: it is there already, or its ending is not that of a video.
    """
    if path.suffix.lower() not in CONTAINERS:
        raise DataError(f"{path} has no ending of a video; name it {path.with_suffix('.mp4').name}")
    if os.path.lexists(path):
        raise DataError(f"{path} is there already; take it away, or choose another --out")
