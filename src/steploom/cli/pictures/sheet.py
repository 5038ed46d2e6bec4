"""Contact sheets: many small images on one page, each with a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER = (250, 249, 246)
INK = (44, 44, 52)
FAINT = (138, 138, 146)
MARGIN = 36
GAP = 18
CAPTION_LINE = 17


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    columns: int = 6,
    tile: int = 144,
) -> Image.Image:
    """Lays ``images`` out row by row.

    Args:
        images: At least one, of any size; each is fitted into a square of ``tile`` pixels.
        captions: One for each image, of one or several lines.
        title: Stands above them.
        subtitle: Stands below the title, fainter.
        columns: Images in a row, at most.
        tile: Side of an image on the sheet, in pixels.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    top = MARGIN + (34 if title else 0) + (28 if subtitle else 0) + (12 if title or subtitle else 0)
    width = 2 * MARGIN + columns * tile + (columns - 1) * GAP
    below = 8 + CAPTION_LINE * max(caption.count("\n") + 1 for caption in captions)
    height = top + rows * (tile + below) + (rows - 1) * GAP + MARGIN - 8
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    _write(pen, (MARGIN, MARGIN - 6), title, 22, INK, width - 2 * MARGIN)
    _write(pen, (MARGIN, MARGIN + 28), subtitle, 15, FAINT, width - 2 * MARGIN)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = MARGIN + place % columns * (tile + GAP)
        upper = top + place // columns * (tile + below + GAP)
        _paste(page, image, left, upper, tile)
        *lines, last = caption.split("\n")
        for line, text in enumerate((*lines, last)):
            ink = FAINT if lines and line == len(lines) else INK
            _write(pen, (left, upper + tile + 6 + line * CAPTION_LINE), text, 13, ink, tile)
    return page


def _paste(page: Image.Image, image: Image.Image, left: int, upper: int, tile: int) -> None:
    """Pastes ``image`` centred into its square, with a hairline around it."""
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    fitted = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    corner = (left + (tile - size[0]) // 2, upper + (tile - size[1]) // 2)
    page.paste(fitted, corner)
    frame = (corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1])
    ImageDraw.Draw(page).rectangle(frame, outline=(222, 220, 214))


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], width: int
) -> None:
    """Writes one line, whatever breaks the text has, cut with an ellipsis if it is wider than ``width`` pixels."""
    font, text = ImageFont.load_default(size), " ".join(text.split())
    if pen.textlength(text, font=font) > width:
        while text and pen.textlength(text + "…", font=font) > width:
            text = text[:-1]
        text = text.rstrip() + "…"
    pen.text(place, text, font=font, fill=ink)
