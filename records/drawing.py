"""Simple drawings without a browser: boxes, lines, dots and texts, written as SVG, or as PNG where Pillow is.

A `Drawing` is a size and a list of marks in pixels from the top left; what to draw is decided by `exports`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

INK, SOFT, PAPER = "#1c2024", "#60646c", "#ffffff"
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
SCALE = 2  # pixels of a PNG per pixel of the drawing
Anchor = Literal["start", "middle", "end"]


class MissingPillow(Exception):
    """A PNG was asked for and Pillow is not installed."""


@dataclass(frozen=True)
class Box:
    """A rectangle; `fill` or `line` of None is not drawn."""

    x: float
    y: float
    width: float
    height: float
    fill: str | None = None
    line: str | None = None


@dataclass(frozen=True)
class Line:
    """Straight pieces through `points`; two points may be dashed."""

    points: tuple[tuple[float, float], ...]
    colour: str = INK
    width: float = 1
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A filled circle, or a ring."""

    x: float
    y: float
    radius: float
    colour: str
    ring: bool = False


@dataclass(frozen=True)
class Text:
    """One line of text whose middle height is at `y`."""

    x: float
    y: float
    text: str
    anchor: Anchor = "start"
    size: int = 12
    colour: str = INK


Mark = Box | Line | Dot | Text


@dataclass
class Drawing:
    """A picture of `width` x `height` pixels with a title for those who cannot see it; later marks lie on top."""

    width: float
    height: float
    title: str
    marks: list[Mark] = field(default_factory=list)

    def add(self, *marks: Mark) -> None:
        """Put marks on top."""
        self.marks += marks

    def to_svg(self) -> str:
        """Return the drawing as an SVG document that refers to nothing outside."""
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        body = "\n".join(_svg(mark) for mark in self.marks)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">\n'
            f"<title>{escape(self.title)}</title>\n"
            f'<rect width="100%" height="100%" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )

    def save(self, path: str | Path) -> Path:
        """Write the drawing; the end of the name says how.

        Raises:
            ValueError: an ending other than .svg and .png.
            MissingPillow: .png without Pillow.
        """
        path = Path(path)
        if path.suffix == ".svg":
            path.write_text(self.to_svg(), encoding="utf-8")
        elif path.suffix == ".png":
            _png(self, path)
        else:
            raise ValueError(f"Drawing {path}: {path.suffix or 'no ending'} is not known. Use .svg or .png.")
        return path


def _svg(mark: Mark) -> str:
    if isinstance(mark, Box):
        place = f'x="{mark.x:g}" y="{mark.y:g}" width="{mark.width:g}" height="{mark.height:g}"'
        edge = f' stroke="{mark.line}" stroke-width="2.5"' if mark.line else ""
        return f'<rect {place} fill="{mark.fill or "none"}"{edge}/>'
    if isinstance(mark, Line):
        points = " ".join(f"{x:g},{y:g}" for x, y in mark.points)
        dash = ' stroke-dasharray="5 4"' if mark.dashed else ""
        return f'<polyline points="{points}" fill="none" stroke="{mark.colour}" stroke-width="{mark.width:g}"{dash}/>'
    if isinstance(mark, Dot):
        look = f'fill="none" stroke="{mark.colour}" stroke-width="2"' if mark.ring else f'fill="{mark.colour}"'
        return f'<circle cx="{mark.x:g}" cy="{mark.y:g}" r="{mark.radius:g}" {look}/>'
    place = f'x="{mark.x:g}" y="{mark.y:g}" text-anchor="{mark.anchor}" dominant-baseline="central"'
    return f'<text {place} font-size="{mark.size}" fill="{mark.colour}">{escape(mark.text)}</text>'


def require_pillow() -> None:
    """Do nothing where a PNG can be drawn.

    Raises:
        MissingPillow: Pillow is not installed.
    """
    try:
        importlib.import_module("PIL.Image")
    except ImportError:
        raise MissingPillow(
            "PNG figures need Pillow, which is not installed. Run `pip install pillow`, or ask for svg alone."
        ) from None


def _png(drawing: Drawing, path: Path) -> None:
    require_pillow()
    image_module, draw_module = importlib.import_module("PIL.Image"), importlib.import_module("PIL.ImageDraw")
    size = (round(drawing.width * SCALE), round(drawing.height * SCALE))
    image = image_module.new("RGB", size, PAPER)
    canvas = draw_module.Draw(image)
    for mark in drawing.marks:
        _paint(canvas, mark)
    image.save(path)


def _paint(canvas: Any, mark: Mark) -> None:
    if isinstance(mark, Box):
        # Pillow's boxes hold their last pixel.
        right, below = (mark.x + mark.width) * SCALE - 1, (mark.y + mark.height) * SCALE - 1
        canvas.rectangle((mark.x * SCALE, mark.y * SCALE, right, below), mark.fill, mark.line, 5 if mark.line else 0)
    elif isinstance(mark, Line):
        width = max(1, round(mark.width * SCALE))
        for piece in _dashes(mark.points) if mark.dashed else [mark.points]:
            canvas.line([(x * SCALE, y * SCALE) for x, y in piece], mark.colour, width)
    elif isinstance(mark, Dot):
        x, y, r = mark.x * SCALE, mark.y * SCALE, mark.radius * SCALE
        canvas.ellipse((x - r, y - r, x + r, y + r), None if mark.ring else mark.colour, mark.colour, 4)
    else:
        font = importlib.import_module("PIL.ImageFont").load_default(mark.size * SCALE)
        anchor = {"start": "lm", "middle": "mm", "end": "rm"}[mark.anchor]
        canvas.text((mark.x * SCALE, mark.y * SCALE), mark.text, mark.colour, font, anchor)


def _dashes(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    (x0, y0), (x1, y1) = points[0], points[-1]
    length = max(1e-9, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
    starts = [9 * index for index in range(int(length // 9) + 1)]
    ends = [min(start + 5, length) for start in starts]

    def at(distance: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * distance / length, y0 + (y1 - y0) * distance / length

    return [[at(start), at(end)] for start, end in zip(starts, ends, strict=True)]
