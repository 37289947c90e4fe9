"""Rule-based networks and a simulated clock, for tests of streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overfly.core.classes import Classes
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor

RED, GREEN, BLUE = (230, 20, 30), (10, 200, 60), (20, 40, 240)
NAMES = Classes(names=("brick", "grass", "pond"), colors=(RED, GREEN, BLUE))


def brightest(images: Floats) -> Floats:
    """Probability 1 for the class whose band is the brightest of the pixel."""
    return np.asarray(np.arange(3)[None, :, None, None] == images.argmax(1)[:, None], np.float32)


def rule_model(run: Callable[[Floats], Floats] = brightest, **changes: object) -> Predictor:
    """A network of three classes that needs no weights."""
    metadata = ModelMetadata(architecture="rule", classes=NAMES, mean=(0.0,) * 3, std=(1.0,) * 3, title="rule")
    return Predictor(metadata.model_copy(update=changes), "torch", "cpu", run)


class Clock:
    """A simulated clock; callbacks run at their times."""

    def __init__(self) -> None:
        self.time = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.time

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Schedule a callback."""
        self.due.append((when, what))
        self.due.sort(key=lambda entry: entry[0])

    def advance(self, seconds: float) -> None:
        """Advance the clock and run due callbacks."""
        end = self.time + seconds
        while self.due and self.due[0][0] <= end:
            self.time, what = self.due.pop(0)
            what()
        self.time = end


def numbered_frame(index: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """A frame that encodes its number, 0 to 15, in its brightness, with a third each of red, green and blue."""
    frame = np.zeros((height, width, 3), np.uint8)
    for band in range(3):
        frame[:, band * width // 3 : (band + 1) * width // 3, band] = 100 + 10 * index
    return frame


def frame_number(frame: NDArray[np.uint8]) -> int:
    """The number of a `numbered_frame` frame, from its pixels, also after a lossy codec."""
    red = frame[:, : frame.shape[1] // 3 - 4, 0]
    return round((float(red.mean()) - 100) / 10)


def video(path: Path, frames: int = 10, fps: float = 10.0, size: tuple[int, int] = (64, 48)) -> Path:
    """A video of `numbered_frame` frames."""
    from overfly.video.capture import write_video

    with write_video(path, fps) as file:
        for index in range(frames):
            file.write(numbered_frame(index % 16, *size), index / fps)
    return path


def read(path: Path) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """Frames and times of a video, by PyAV alone."""
    import av

    with av.open(str(path)) as container:
        result = list(container.decode(video=0))
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in result], [
            float(frame.time or 0) for frame in result
        ]
