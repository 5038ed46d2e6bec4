"""Images in the terminal: two pixels a character cell, as upper and lower half blocks."""

from __future__ import annotations

from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

HALF = "▀"


def half_blocks(image: Image.Image, columns: int) -> Text:
    """``image`` as ``columns`` cells by ``columns * height / width / 2`` lines of text.

    The foreground of a cell is its upper pixel, the background its lower one.
    """
    rows = max(2, round(columns * image.height / image.width / 2) * 2)
    small = image.convert("RGB").resize(
        (columns, rows), Image.Resampling.BOX if columns <= image.width else Image.Resampling.BICUBIC
    )
    data = small.tobytes()

    def color(x: int, y: int) -> Color:
        place = 3 * (y * columns + x)
        return Color.from_rgb(*data[place : place + 3])

    text = Text(no_wrap=True)
    for y in range(0, rows, 2):
        for x in range(columns):
            text.append(HALF, Style(color=color(x, y), bgcolor=color(x, y + 1)))
        if y + 2 < rows:
            text.append("\n")
    return text


def blank(columns: int) -> Text:
    """A square of nothing, as large as :func:`half_blocks` would make a square image."""
    return Text("\n".join([" " * columns] * (columns // 2)), style=Style(bgcolor=Color.from_rgb(28, 28, 32)))
