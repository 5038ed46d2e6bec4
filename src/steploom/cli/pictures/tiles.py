"""Images in the terminal: two pixels a character cell, as upper and lower half blocks."""

from __future__ import annotations

import itertools

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

    def pixel(x: int, y: int) -> bytes:
        place = 3 * (y * columns + x)
        return data[place : place + 3]

    text = Text(no_wrap=True)
    for y in range(0, rows, 2):
        # Neighbours that look the same become one run: terminals are slow at changing colours.
        for (upper, lower), run in itertools.groupby((pixel(x, y), pixel(x, y + 1)) for x in range(columns)):
            style = Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))
            text.append(HALF * len(list(run)), style)
        if y + 2 < rows:
            text.append("\n")
    return text


def blank(columns: int) -> Text:
    """A square of nothing, as large as :func:`half_blocks` would make a square image."""
    return Text("\n".join([" " * columns] * (columns // 2)), style=Style(bgcolor=Color.from_rgb(28, 28, 32)))
