"""What a frame looks like with its classes on top: colors, legend, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from overfly.core.classes import Classes
from overfly.core.errors import RecipeError
from overfly.core.records import UInt8
from overfly.exporting.predictor import Floats, Predictor
from overfly.ops.windows import sliding

SHADE = (12, 14, 18, 178)
"""Ground of legend and figures: nearly black, so that what is below still shows."""
INK = (255, 255, 255, 255)
SMALLEST = 64
"""Side of the smallest frame that figures and a legend are drawn into, in pixels."""


@dataclass(frozen=True)
class OverlayStyle:
    """How an overlay is drawn.

    Attributes:
        size: longest side that a frame is shrunk to before the network sees it, in pixels; None: as it is.
        opacity: share of the class colors in the picture, 0 to 1.
        legend: whether names and colors of the classes are drawn.
        figures: whether latency and frames a second are drawn.
    """

    size: int | None = None
    opacity: float = 0.5
    legend: bool = True
    figures: bool = True


@dataclass
class OverlayRenderer:
    """From a frame to its overlay, by one network in one style."""

    predictor: Predictor
    style: OverlayStyle = field(default_factory=OverlayStyle)

    def __post_init__(self) -> None:
        classes = self.predictor.metadata.classes
        self._colors = np.asarray(classes.colors, np.uint8)

    def classes_of(self, frame: UInt8) -> UInt8:
        """Class ids (h, w) of a frame (H, W, 3), at the size at which the network sees it."""
        metadata = self.predictor.metadata
        small = shrunk(frame, self.style.size)
        image = np.ascontiguousarray(small.transpose(2, 0, 1), dtype=np.float32)
        if metadata.max_value != 255:
            image *= metadata.max_value / 255
        found: Floats
        if metadata.fixed:
            found = sliding(self._windows, torch.from_numpy(image), metadata.window, batch=1).numpy()
        else:
            found = self.predictor(image[None])[0]
        ids: UInt8 = found.argmax(0).astype(np.uint8)
        return ids

    def _windows(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.predictor(images.numpy()))

    def __call__(self, frame: UInt8, lines: Sequence[str] = ()) -> UInt8:
        """The overlay (H, W, 3) of a frame (H, W, 3), both 0 to 255.

        Args:
            frame: red, green and blue.
            lines: what is written into the top left corner.
        """
        height, width = frame.shape[:2]
        painted = Image.fromarray(self._colors[self.classes_of(frame)])
        if painted.size != (width, height):
            painted = painted.resize((width, height), Image.Resampling.BILINEAR)
        shown = Image.blend(Image.fromarray(frame), painted, self.style.opacity)
        if self.style.figures and lines:
            _paste(shown, _figures(tuple(lines), width, height), top=True)
        if self.style.legend:
            _paste(shown, legend(self.predictor.metadata.classes, width, height), top=False)
        overlay: UInt8 = np.asarray(shown)
        return overlay


def overlay_renderer(predictor: Predictor, style: OverlayStyle) -> OverlayRenderer:
    """A network that draws on frames of red, green and blue.

    Raises:
        RecipeError: it reads other bands.
    """
    bands = predictor.metadata.bands
    if bands != 3:
        raise RecipeError(
            f"the network reads {bands} bands, and a video has red, green and blue; watch with one of 3 bands, or map "
            "pictures of all bands with overfly predict"
        )
    return OverlayRenderer(predictor, style)


def shrunk(frame: UInt8, size: int | None) -> UInt8:
    """A frame (H, W, 3) with its longest side at most ``size`` pixels, each a mean of those that it stands for."""
    height, width = frame.shape[:2]
    if size is None or max(height, width) <= size:
        return frame
    scale = size / max(height, width)
    to = (max(1, round(width * scale)), max(1, round(height * scale)))
    found: UInt8 = np.asarray(Image.fromarray(frame).resize(to, Image.Resampling.BILINEAR))
    return found


def fitted(picture: UInt8, width: int, height: int) -> UInt8:
    """A picture (h, w, 3) brought to (H, W, 3): scaled until it fits, black bars beside it."""
    if picture.shape[:2] == (height, width):
        return picture
    scale = min(height / picture.shape[0], width / picture.shape[1])
    to = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    sheet = Image.new("RGB", (width, height))
    small = Image.fromarray(picture).resize(to, Image.Resampling.BILINEAR)
    sheet.paste(small, ((width - to[0]) // 2, (height - to[1]) // 2))
    found: UInt8 = np.asarray(sheet)
    return found


@lru_cache(maxsize=8)
def legend(classes: Classes, width: int, height: int) -> Image.Image | None:
    """Swatches with names for a frame of this size, at most half as wide and half as high; None where none fits.

    Where not all classes fit, the last line says how many more there are.
    """
    font, line = _font(_text_size(width, height)), _line(width, height)
    swatch = round(line * 0.62)
    room = (height // 2 - line // 2) // line
    if room < 1 or min(width, height) < SMALLEST:
        return None
    longest = width // 2 - swatch - 3 * (line // 3)
    swatches = len(classes) if len(classes) <= room else room - 1
    names = [_cut(name, font, longest) for name in classes.names[:swatches]]
    if swatches < len(classes):
        names.append(f"+ {len(classes) - swatches} more" if swatches else f"{len(classes)} classes")
    wide = round(max(font.getlength(name) for name in names)) + swatch + 3 * (line // 3)
    sheet = Image.new("RGBA", (wide, line * len(names) + line // 2), SHADE)
    pen = ImageDraw.Draw(sheet)
    for index, name in enumerate(names):
        top, left = line // 4 + index * line, line // 3
        if index < swatches:
            down = top + (line - swatch) // 2
            box = (left, down, left + swatch, down + swatch)
            pen.rectangle(box, fill=(*classes.colors[index], 255), outline=(160, 160, 160, 255))
        pen.text((left + swatch + line // 3, top + line // 2), name, INK, font, anchor="lm")
    return sheet


@lru_cache(maxsize=2)
def _figures(lines: tuple[str, ...], width: int, height: int) -> Image.Image | None:
    if min(width, height) < SMALLEST:
        return None
    font, line = _font(_text_size(width, height)), _line(width, height)
    shown = [_cut(text, font, width - line) for text in lines[: max(1, height // 2 // line)]]
    wide = round(max(font.getlength(text) for text in shown)) + 2 * (line // 3)
    sheet = Image.new("RGBA", (wide, line * len(shown) + line // 2), SHADE)
    pen = ImageDraw.Draw(sheet)
    for index, text in enumerate(shown):
        pen.text((line // 3, line // 4 + index * line + line // 2), text, INK, font, anchor="lm")
    return sheet


def _paste(shown: Image.Image, sheet: Image.Image | None, *, top: bool) -> None:
    if sheet is not None:
        edge = max(2, shown.height // 60)
        shown.paste(sheet, (edge, edge if top else shown.height - sheet.height - edge), sheet)


def _text_size(width: int, height: int) -> int:
    return max(8, min(28, round(min(width, height) / 32)))


def _line(width: int, height: int) -> int:
    return round(_text_size(width, height) * 1.5)


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows the letters of most languages."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
