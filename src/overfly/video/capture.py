"""Open videos, cameras, addresses and folders of images as streams; write overlays as a video. Uses PyAV."""

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
from overfly.core.errors import DataError, RecipeError, import_extra
from overfly.core.records import UInt8
from overfly.data.headers import SUFFIXES, read_header
from overfly.data.listing import is_image_name, natural_key
from overfly.data.reading import read_image
from overfly.video.overlay import letterbox
from overfly.video.player import SourceFrame

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Container format of a written video by its suffix."""
ENCODERS = (("libx264", {"preset": "veryfast", "crf": "20"}), ("mpeg4", {"qscale": "3"}))
"""Encoders with options; the first available one is used."""
TICKS = 90_000
"""Ticks per second in the time base of a written video."""
TIMEOUT = 10.0
"""Timeout of network streams in seconds."""
FPS = 10.0
"""Frames per second of a folder of images by default."""
MAX_DAMAGED = 300
"""Damaged packets in a row after which a live source ends."""
BT709 = 1
"""FFmpeg's number of the BT.709 color space; as a range, 1 is limited (video) range."""


@dataclass
class StreamErrors:
    """Damaged packets of a live source that continued, and the reason of an irregular end; empty for a regular one."""

    damaged: int = 0
    end_reason: str = ""


@dataclass(frozen=True)
class VideoStream:
    """An open stream, under the name that the user gave it.

    Attributes:
        live: whether the source sets the pace, such as a camera.
        rate: nominal frames per second.
        width, height: of a coded frame in pixels, before its rotation flag is applied.
        frames: iterator over the frames, for one thread.
        errors: errors so far, updated while the frames are read.
    """

    title: str
    live: bool
    rate: float
    width: int
    height: int
    frames: Iterator[SourceFrame]
    errors: StreamErrors = field(default_factory=StreamErrors)


class _Container(NamedTuple):
    """An open PyAV container, its video stream, and whether it is live."""

    container: Any
    video: Any
    live: bool


@contextmanager
def open_stream(source: str, *, fps: float | None = None) -> Iterator[VideoStream]:
    """Open a video, a camera such as ``/dev/video0`` or its number, an address, or a folder of images.

    An address, such as ``rtsp://…`` or ``http://…``, of known length is not live. The images of a folder come in
    natural order of their names, ``fps`` of them a second. Raises `DataError`: the source does not exist, or has no
    frames, and `RecipeError`: ``fps`` for a source with its own speed, and `MissingExtraError`: PyAV is not installed.
    """
    path = Path(source)
    if path.is_dir():
        stream = _open_folder(path, FPS if fps is None else fps)
    elif fps is not None:
        raise RecipeError(f"--fps is for folders of images, and {source} has its own speed; leave it out")
    else:
        opened, errors = _open_container(source), StreamErrors()
        context, rate = opened.video.codec_context, opened.video.average_rate or opened.video.guessed_rate or 25
        frames = _decode(source, opened, float(rate), errors)
        stream = VideoStream(source, opened.live, float(rate), context.width, context.height, frames, errors)
    try:
        yield stream
    finally:
        with suppress(ValueError, AttributeError):  # a blocked reading thread still iterates
            stream.frames.close()  # type: ignore[attr-defined]


_av = partial(import_extra, "av", "stream", "reading and writing video")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".").lower()


def _open_folder(path: Path, fps: float) -> VideoStream:
    files = sorted(filter(is_image_name, path.iterdir()), key=lambda file: natural_key(file.name))
    if not files:
        raise DataError(f"{path} contains no images ({', '.join(SUFFIXES)}); give a folder of frames, or a video")

    def frames() -> Iterator[SourceFrame]:
        for index, file in enumerate(files):
            image = read_image(file, bands=3)
            if image.dtype != np.uint8:
                raise DataError(f"{file} holds {image.dtype}, and a stream 8 bits per band; use overfly predict")
            yield SourceFrame(partial(np.asarray, image), index / fps)

    first = read_header(files[0])
    return VideoStream(str(path), False, fps, first.width, first.height, frames())


def _open_container(source: str) -> _Container:
    """Open a source with FFmpeg; a file is opened by its path even if its name looks like an address."""
    address = "://" in source
    if not address and source.isdecimal() and not Path(source).exists():
        source = f"/dev/video{source}"
    camera = not address and source.startswith("/dev/video")
    if not address and not Path(source).exists():
        raise DataError(
            f"{source} does not exist; list cameras with ls /dev/video*, and connect one"
            if camera
            else f"{source} does not exist; give a video, a folder of images, a camera such as /dev/video0 or an "
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
        kind = "stream" if address else "camera" if camera else "video"
        advice = "check that it is on, and not in use" if address or camera else "play it to check, or copy it again"
        raise DataError(f"{source} cannot be opened as a {kind} ({_reason(error)}); {advice}") from None
    if not container.streams.video:
        container.close()
        raise DataError(f"{source} has no video stream; give a video")
    live = camera or (address and container.duration is None)
    video = container.streams.video[0]
    if video.codec_context is None or not video.codec_context.width:
        container.close()
        raise DataError(f"{source} declares neither codec nor size; play it to check, or copy it again")
    video.thread_type = "SLICE" if live else "AUTO"  # decoding frames in several threads delays them
    return _Container(container, video, live)


class _TruncatedError(Exception):
    """A file that ends early."""


def _packets(stream: _Container, errors: StreamErrors) -> Iterator[list[Any]]:
    """Yield the frames of each packet; a damaged packet ends a file (`_TruncatedError`), but not a live source."""
    av = _av()
    packets, damaged = stream.container.demux(stream.video), 0
    while True:
        packet = None
        try:
            packet = next(packets)
            frames = packet.decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError as error:
            damaged += 1
            if not stream.live:
                raise _TruncatedError(_reason(error)) from None
            if not isinstance(error, av.InvalidDataError) or damaged > MAX_DAMAGED:
                errors.end_reason = _reason(error)
                return
            errors.damaged += 1
            if packet is None:
                packets = stream.container.demux(stream.video)
            continue
        if packet.is_corrupt and not stream.live:
            raise _TruncatedError("a packet is cut short")
        errors.damaged += packet.is_corrupt
        damaged = 0
        yield frames


def _decode(source: str, stream: _Container, rate: float, errors: StreamErrors) -> Iterator[SourceFrame]:
    """Yield the frames of a container with their times; for a live source, the times of arrival."""
    first: float | None = None
    count, at = 0, 0.0
    try:
        for frame in chain.from_iterable(_packets(stream, errors)):
            timestamp = time.perf_counter() if stream.live else frame.time
            if timestamp is not None:
                first = timestamp if first is None else first
                at = timestamp - first
            elif count:
                at += 1 / rate
            count += 1
            yield SourceFrame(partial(_pixels, frame), at)
        if not count and not stream.live:
            raise DataError(f"{source} has no frame that can be decoded; play it to check, or copy it again")
        if missing := _missing_seconds(stream, at + 1 / rate):
            raise _TruncatedError(f"{missing:.1f} s of its declared length are missing")
    except _TruncatedError as error:
        whole = math.floor(10 * at) / 10
        other = f", or watch up to there with --seconds {whole}" if whole else ""
        raise DataError(f"{source} ends early, after {at:.1f} s ({error}); copy it again{other}") from None
    finally:
        stream.container.close()


def _missing_seconds(stream: _Container, seconds: float) -> float:
    """Seconds that a single-stream file without frame count is shorter than declared; 0 if unknown."""
    container = stream.container
    if stream.live or stream.video.frames or container.duration is None or len(container.streams) > 1:
        return 0.0
    missing = float(container.duration / 1e6 - seconds)
    return missing if missing > max(0.5, 0.01 * seconds) else 0.0


def _pixels(frame: Any) -> UInt8:
    """Convert a decoded frame to (H, W, 3), applying its rotation flag; HD frames without a color space are BT.709."""
    unspecified = frame.colorspace in (0, 2) and frame.height >= 720 and not frame.format.is_rgb
    colorspace = {"src_colorspace": "ITU709"} if unspecified else {}
    pixels: UInt8 = frame.to_ndarray(format="rgb24", **colorspace)
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


class _Writer:
    """Writer of a video file. Frames of another size than the first are letterboxed."""

    def __init__(self, part: Path, kind: str, rate: float) -> None:
        self.av = _av()
        self.container = self.av.open(f"file:{part}", "w", format=kind, options={"movflags": "faststart"})
        self.rate = Fraction(rate).limit_denominator(1001)
        self.video: Any = None
        self.width = self.height = 0
        self.last = -1

    def write(self, overlay: UInt8, seconds: float) -> None:
        """Add a frame (H, W, 3) with its time in seconds; a `Sink`."""
        if self.video is None:
            self.height, self.width = overlay.shape[:2]
            self._begin()
        pixels = letterbox(overlay, self.width, self.height)
        odd = (self.height % 2, self.width % 2)
        if any(odd):
            pixels = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        self.last = max(self.last + 1, round(seconds * TICKS))
        frame.pts, frame.time_base = self.last, Fraction(1, TICKS)
        self.container.mux(self.video.encode(frame))

    def _begin(self) -> None:
        available = self.av.codecs_available
        name, options = next((entry for entry in ENCODERS if entry[0] in available), ENCODERS[-1])
        self.video = self.container.add_stream(name, rate=self.rate)
        self.video.width, self.video.height = self.width + self.width % 2, self.height + self.height % 2
        self.video.pix_fmt = "yuv420p"
        self.video.options = dict(options)
        context = self.video.codec_context
        context.time_base = Fraction(1, TICKS)
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709

    def finish(self) -> None:
        """Write the encoder's pending frames and the file's index."""
        if self.video is not None:
            self.container.mux(self.video.encode(None))
        self.container.close()


@contextmanager
def write_video(path: Path, rate: float) -> Iterator[_Writer]:
    """Write a video (H.264 in MP4, MOV or MKV). The file is renamed to ``path`` when complete.

    ``rate`` is the nominal number of frames per second; each frame is written with its own time. Raises `DataError`:
    the file exists, cannot be written, or has another suffix, and `MissingExtraError`: PyAV is not installed.
    """
    check_output(path)
    av = _av()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(path) as part:
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
        raise DataError(f"{path} cannot be written ({_reason(error)}); choose another --out, or free space") from None


def _publish(part: Path, path: Path) -> None:
    """Rename a finished file, unless another process has created ``path``."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise DataError(f"{path} was created by another process; choose another --out") from None
    except OSError:  # a file system without hard links
        part.replace(path)


def check_output(path: Path) -> None:
    """Raise `DataError` if a path exists, or its suffix is not that of a video."""
    if path.suffix.lower() not in CONTAINERS:
        raise DataError(f"--out must end in {', '.join(CONTAINERS)}, got {path}; name it {path.stem}.mp4")
    if os.path.lexists(path):
        raise DataError(f"{path} exists; delete it, or choose another --out")
