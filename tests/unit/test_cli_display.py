"""What the command line shows and draws: tiles, walls, contact sheets, figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from steploom.cli import comparison, demo
from steploom.cli.pictures import sheet, tiles, wall
from steploom.requests import StepEvent


def test_half_blocks_show_two_pixels_a_cell() -> None:
    image = Image.new("RGB", (4, 4), "red")
    image.paste((0, 0, 255), (0, 1, 4, 2))
    text = tiles.half_blocks(image, 4)
    assert text.plain == "▀▀▀▀\n▀▀▀▀"
    first = text.get_style_at_offset(_console(), 0)
    assert first.color is not None
    assert first.bgcolor is not None
    assert tuple(first.color.triplet) == (255, 0, 0)
    assert tuple(first.bgcolor.triplet) == (0, 0, 255)


def _console():
    from rich.console import Console

    return Console(width=80)


@pytest.mark.parametrize("width", wall.TILE_WIDTHS)
def test_a_blank_tile_takes_the_place_of_an_image(width: int) -> None:
    shown = tiles.half_blocks(Image.new("RGB", (64, 64)), width).plain.split("\n")
    blank = tiles.blank(width).plain.split("\n")
    assert (len(blank), len(blank[0])) == (len(shown), len(shown[0]))


@given(count=st.integers(1, 40), width=st.integers(10, 400), height=st.integers(5, 200))
def test_the_wall_fits_wherever_it_can(count: int, width: int, height: int) -> None:
    tile, columns = wall.fitting(count, width, height)
    rows = math.ceil(count / columns)
    assert tile in wall.TILE_WIDTHS
    assert columns == 1 or columns * (tile + wall.SPACE) - wall.SPACE <= width
    if tile > wall.TILE_WIDTHS[-1]:
        assert rows * (tile // 2 + 2) <= height - 3, "it does not fit"
    wider = [other for other in wall.TILE_WIDTHS if other > tile]
    for other in wider:
        needed = math.ceil(count / max(1, (width + wall.SPACE) // (other + wall.SPACE)))
        assert needed * (other // 2 + 2) > height - 3, "a wider tile would have fitted"
    assert (rows - 1) * columns < count, "a row is empty"


def test_a_tile_keeps_every_preview_and_shows_how_far_it_is() -> None:
    tile = wall.Tile(demo.JOBS[0], 16, tiles.blank(16))
    console = _console()
    preview = Image.new("RGB", (64, 64), "red")
    tile.take(StepEvent(request_id="r", step=9, total_steps=36, sigma=0.75, preview=preview))
    tile.take(StepEvent(request_id="r", step=10, total_steps=36))
    with console.capture() as shown:
        console.print(tile)
    assert "10/36 ━" in shown.get()
    assert tile.previews == [("step 9\nnoise 0.75", preview)]


def test_a_contact_sheet_holds_every_image_once() -> None:
    images = [Image.new("RGB", (64, 64), (40 * place, 10, 10)) for place in range(5)]
    page = sheet.contact_sheet(images, [f"step {place}" for place in range(5)], title="a cat", columns=3, tile=50)
    counts = {color: count for count, color in page.getcolors(maxcolors=1 << 20)}
    assert [counts[(40 * place, 10, 10)] for place in range(5)] == [2500] * 5
    assert page.width == 2 * sheet.MARGIN + 3 * 50 + 2 * sheet.GAP


def test_a_contact_sheet_cuts_what_does_not_fit() -> None:
    tall = Image.new("RGB", (20, 80), "green")
    page = sheet.contact_sheet([tall], ["word " * 50], title="title " * 90, columns=6, tile=80)
    counts = {color: count for count, color in page.getcolors(maxcolors=1 << 20)}
    assert counts[(0, 128, 0)] == 20 * 80
    edge = page.crop((page.width - sheet.MARGIN + 2, 0, page.width, page.height))
    assert edge.getcolors() == [(edge.width * edge.height, sheet.PAPER)]


def test_the_demo_asks_for_different_things() -> None:
    assert len({job.prompt for job in demo.JOBS}) == len(demo.JOBS) >= 8
    assert len({job.steps for job in demo.JOBS}) >= 8
    assert len({job.guidance for job in demo.JOBS}) >= 5
    assert any(job.guidance == 1.0 for job in demo.JOBS), "one without classifier-free guidance"


def test_the_report_states_medians_sharing_and_how() -> None:
    measured = comparison.Comparison(
        jobs=2, steps=60, together_s=[3.0, 1.0, 2.0], alone_s=[5.0, 6.0, 4.0], forwards=30, difference=1, where="here"
    )
    text = comparison.report(measured)
    assert "2.50 times the throughput" in text
    assert "2.0 requests shared a forward (60 steps in 30 forwards" in text
    assert "1 of 255 grey levels" in text
    assert "medians of 3 rounds of each way in turn" in text
    assert "here" in text
