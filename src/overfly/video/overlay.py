"""Render a frame with its predicted classes on top: colors, legend, statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from overfly.core.classes import Classes, Color
from overfly.core.errors import RecipeError
from overfly.core.records import UInt8
from overfly.exporting.predictor import Floats, Predictor
from overfly.ops.windows import slide_inference

BACKGROUND = (12, 14, 18, 178)
"""Color of the panels of legend and statistics, partly transparent."""
TEXT = (255, 255, 255, 255)
SWATCH = 0.62
"""Side of a color's swatch, as a share of a line's height."""
MIN_SIDE = 64
"""Side of the smallest frame with a legend or statistics, in pixels."""


@dataclass(frozen=True)
class OverlayStyle:
    """Rendering options of overlays: the options of `overfly watch` of the same names."""

    size: int | None = None
    opacity: float = 0.5
    legend: bool = True
    stats: bool = True


@dataclass
class OverlayRenderer:
    """Renders frames with the predictions of one network in one style."""

    predictor: Predictor
    style: OverlayStyle = field(default_factory=OverlayStyle)

    def __post_init__(self) -> None:
        if self.predictor.metadata.bands != 3:
            raise RecipeError(
                f"the network reads {self.predictor.metadata.bands} bands, and a video has red, green and blue; choose "
                "a network of 3 bands, or predict images of all bands with overfly predict"
            )
        self._colors = np.asarray(self.predictor.metadata.classes.colors, np.uint8)

    def predict(self, frame: UInt8) -> UInt8:
        """Predict class ids (h, w) of a frame (H, W, 3) at the network's input size."""
        metadata = self.predictor.metadata
        image = np.ascontiguousarray(downscale(frame, self.style.size).transpose(2, 0, 1), dtype=np.float32)
        if metadata.max_value != 255:
            image *= metadata.max_value / 255
        probabilities: Floats

        def run(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.predictor(images.numpy()))

        if metadata.fixed:
            probabilities = slide_inference(run, torch.from_numpy(image), metadata.window, batch=1).numpy()
        else:
            probabilities = self.predictor(image[None])[0]
        ids: UInt8 = probabilities.argmax(0).astype(np.uint8)
        return ids

    def __call__(self, frame: UInt8, lines: Sequence[str] = ()) -> UInt8:
        """Render the overlay (H, W, 3) of a frame (H, W, 3), both RGB, 0 to 255, with text in the top left corner."""
        height, width = frame.shape[:2]
        colors = Image.fromarray(self._colors[self.predict(frame)])
        if colors.size != (width, height):
            colors = colors.resize((width, height), Image.Resampling.BILINEAR)
        blended = Image.blend(Image.fromarray(frame), colors, self.style.opacity)
        if self.style.stats and lines:
            _paste(blended, _stats(tuple(lines), width, height), top=True)
        if self.style.legend:
            _paste(blended, legend(self.predictor.metadata.classes, width, height), top=False)
        return np.asarray(blended)


def downscale(frame: UInt8, size: int | None) -> UInt8:
    """Downscale a frame (H, W, 3) to a longest side of at most ``size`` pixels, with antialiasing."""
    height, width = frame.shape[:2]
    if size is None or max(height, width) <= size:
        return frame
    shape = [max(1, round(side * size / max(height, width))) for side in (width, height)]
    return np.asarray(Image.fromarray(frame).resize(shape, Image.Resampling.BILINEAR))


def letterbox(frame: UInt8, width: int, height: int) -> UInt8:
    """Scale a frame (h, w, 3) to fit into (height, width, 3), padded with black."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(ImageOps.pad(Image.fromarray(frame), (width, height), Image.Resampling.BILINEAR))


@lru_cache(maxsize=8)
def legend(classes: Classes, width: int, height: int) -> Image.Image | None:
    """Draw the legend of a frame, at most half as wide and high; None if the frame is too small.

    If not all classes fit, the last line is the number of the others.
    """
    font, line = _font(width, height)
    lines = (height // 2 - line // 2) // line
    if lines < 1 or min(width, height) < MIN_SIDE:
        return None
    longest = width // 2 - round(line * SWATCH) - 3 * (line // 3)
    swatches = len(classes) if len(classes) <= lines else lines - 1
    names = [_shorten(name, font, longest) for name in classes.names[:swatches]]
    if swatches < len(classes):
        names.append(f"+ {len(classes) - swatches} more" if swatches else f"{len(classes)} classes")
    return _panel(names, font, line, classes.colors[:swatches])


@lru_cache(maxsize=2)
def _stats(lines: tuple[str, ...], width: int, height: int) -> Image.Image | None:
    if min(width, height) < MIN_SIDE:
        return None
    font, line = _font(width, height)
    return _panel([_shorten(text, font, width - line) for text in lines[: max(1, height // 2 // line)]], font, line)


def _panel(
    lines: Sequence[str], font: ImageFont.FreeTypeFont, line: int, colors: Sequence[Color] | None = None
) -> Image.Image:
    """Draw lines of text, ``line`` pixels high; with ``colors``, after a swatch of each color."""
    edge, swatch = line // 3, round(line * SWATCH)
    left = edge if colors is None else edge + swatch + edge
    width = round(max(font.getlength(text) for text in lines)) + left + edge
    panel = Image.new("RGBA", (width, line * len(lines) + line // 2), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    for index, text in enumerate(lines):
        top = line // 4 + index * line
        draw.text((left, top + line // 2), text, TEXT, font, anchor="lm")
        if colors is not None and index < len(colors):
            box = (edge, top + (line - swatch) // 2, edge + swatch, top + (line - swatch) // 2 + swatch)
            draw.rectangle(box, fill=(*colors[index], 255), outline=(160, 160, 160, 255))
    return panel


def _paste(image: Image.Image, panel: Image.Image | None, *, top: bool) -> None:
    if panel is not None:
        edge = max(2, image.height // 60)
        image.paste(panel, (edge, edge if top else image.height - panel.height - edge), panel)


@lru_cache(maxsize=8)
def _font(width: int, height: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """Font of a frame, DejaVu Sans, which comes with matplotlib and covers many languages, and height of a line."""
    import matplotlib

    size = max(8, min(28, round(min(width, height) / 32)))
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size), round(size * 1.5)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text with an ellipsis to fit the width."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
