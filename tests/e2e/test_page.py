"""The page in a real browser, over a pretended engine that steps when it is told to, and over the built-in model."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import pytest
from browser import Tab, browsing, tab
from PIL import Image
from serving import file_of, listening
from starlette.applications import Starlette
from starlette.routing import Mount

from steploom import AsyncDiffusionEngine, EngineObserver
from steploom.protocol import RunnerOutput, SchedulerOutput, request_id_of
from steploom.server import create_app
from steploom.server.page import ticks
from steploom.testing import FakeEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Told(EngineObserver):
    """The engine's own ticks: who was in each of them, at which step, with how many."""

    def __init__(self) -> None:
        self.cells: dict[str, list[list[Any]]] = {}

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        for one in result.reports:
            cells = self.cells.setdefault(request_id_of(one.run_id), [])
            cells.append([output.tick, one.step, round(one.batch_requests, 2)])


@contextlib.asynccontextmanager
async def shown(path: str = "", app: dict[str, Any] | None = None, **engine: Any) -> AsyncIterator[Any]:
    """A pretended engine, its ticks, a browser, and where to look."""
    async with FakeEngine(**engine) as made:
        told = Told()
        made.observers.append(told)
        served = create_app(made, **(app or {}))
        served = Starlette(routes=[Mount(path, served)]) if path else served
        async with listening(served) as address, browsing() as browser:
            yield made, told, browser, f"{address}{path}/"


async def ask(one: Tab, prompt: str, steps: int = 6, **fields: Any) -> str:
    """Fills the form and sends it; returns the request's id, once the server has taken it."""
    page = one.page
    await page.fill("#prompt", prompt)
    for name, value in {"num_inference_steps": steps, **fields}.items():
        await page.fill(f"[name={name}]", str(value))
    known = await page.locator(".card").count() + int(fields.get("count", 1))
    await page.click("#go")
    await page.wait_for_selector(f".card[data-request]:nth-last-child({known})")
    return str(await page.locator(".card").first.get_attribute("data-request"))


def card(request: str, state: str | None = None) -> str:
    return f'.card[data-request="{request}"]' + (f"[data-state={state}]" if state else "")


async def pixels(one: Tab, request: str, pictures: int) -> bytes:
    """The image that a card shows, once it is that of so many."""
    await one.page.wait_for_selector(f'{card(request)}[data-pictures="{pictures}"]')
    script = """async (image) => {
        await image.decode();
        const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
        const paper = canvas.getContext("2d");
        paper.drawImage(image, 0, 0, 64, 64);
        return [...paper.getImageData(0, 0, 64, 64).data];
    }"""
    return bytes(await one.page.eval_on_selector(f"{card(request)} img", script))


async def lanes(one: Tab) -> dict[str, list[list[Any]]]:
    """The cells of each lane, as the page holds them and draws them."""
    return await one.page.evaluate(
        "Object.fromEntries([...window.steploom.lanes.lanes.values()].map((lane) =>"
        " [lane.id, lane.cells.map((cell) => [cell.tick, cell.step, cell.batch])]))"
    )


async def drop(one: Tab, name: str, data: bytes) -> None:
    """Drops a file somewhere on the page."""
    script = """([name, bytes]) => {
        const given = new DataTransfer();
        given.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
        for (const kind of ["dragenter", "dragover", "drop"]) {
            document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: given, bubbles: true, cancelable: true }));
        }
    }"""
    await one.page.evaluate(script, [name, list(data)])


async def test_an_image_sharpens_from_step_to_step() -> None:
    async with shown("/art") as (engine, _, browser, address), tab(browser, address) as one:
        words = "<img src=x onerror=alert(1)> & 'quotes'"
        engine.hold()
        request = await ask(one, words, steps=4, seed=7)
        seen = []
        for done in (1, 2, 3):
            engine.release(1)
            await one.page.wait_for_selector(f'{card(request)} .count:text-is("{done}/4")')
            seen.append(await pixels(one, request, done))
        engine.release()
        await one.page.wait_for_selector(card(request, "completed"))
        seen.append(await pixels(one, request, 4))
        assert len(set(seen)) == 4
        alone = await engine.generate(words, seed=7, num_inference_steps=4, guidance_scale=5.0)  # as suggested
        assert seen[-1] == alone.images[0].convert("RGBA").tobytes()
        assert await one.page.locator(f"{card(request)} .words").text_content() == words
        assert one.complaints == []


async def test_cancelling_frees_the_slot() -> None:
    async with shown(max_batch=1, max_resident=1) as (engine, told, browser, address), tab(browser, address) as one:
        engine.hold()
        first = await ask(one, "a", steps=100)
        second = await ask(one, "b", steps=2)
        engine.release(2)
        await one.page.wait_for_selector(f'{card(first)} .count:text-is("2/100")')
        await one.page.wait_for_selector(card(second, "waiting"))
        await one.page.click(f"{card(first)} .corner")
        await one.page.wait_for_selector(card(first, "cancelled"))
        assert set(engine._core.scheduler._alive) == {second}
        engine.release(3)  # one was on its way; then the other has the slot
        await one.page.wait_for_selector(card(second, "completed"))
        assert len(told.cells[first]) <= 3
        assert not engine._core.executor._resident
        assert await one.page.locator("#lanes li[data-outcome=cancelled]").count() == 1
        assert one.complaints == []


async def test_two_tabs_share_batches_and_see_the_same_lanes() -> None:
    async with shown() as (engine, told, browser, address), tab(browser, address) as one, tab(browser, address) as two:
        engine.hold()
        first = await ask(one, "mine", steps=6)
        engine.release(2)  # it runs alone for two steps
        await one.page.wait_for_selector(f'{card(first)} .count:text-is("2/6")')
        second = await ask(two, "yours", steps=3)
        engine.release(2)  # the first of them was on its way already
        for tab_, request, count in ((one, first, "4/6"), (two, second, "1/3")):
            await tab_.page.wait_for_selector(f'{card(request)} .count:text-is("{count}")')
            assert await tab_.page.locator(f"{card(request)} .mates").text_content() == "batch of 2"
        engine.release()
        for tab_, request in ((one, first), (two, second)):
            await tab_.page.wait_for_selector(card(request, "completed"))
            for lane in (first, second):
                await tab_.page.wait_for_selector(f'#lanes li[data-request="{lane}"][data-outcome=completed]')
            assert await lanes(tab_) == told.cells
        assert [cell[2] for cell in told.cells[first]] == [1, 1, 1, 2, 2, 2]
        assert await one.page.locator(f'#lanes li[data-request="{second}"]').get_attribute("data-first") == "4"
        assert "yours" not in await one.page.content()
        colours = [
            await t.page.locator(f'#lanes li[data-request="{first}"] i').get_attribute("style") for t in (one, two)
        ]
        own = await one.page.locator(card(first)).get_attribute("style")
        assert colours[0] == colours[1]
        assert "var(--dye-1)" in str(colours[0])
        assert "var(--dye-1)" in str(own)
        assert one.complaints == two.complaints == []


async def test_a_picture_is_downloaded_with_its_parameters_and_brings_them_back(tmp_path: pathlib.Path) -> None:
    async with shown() as (_, _, browser, address), tab(browser, address) as one:
        request = await ask(one, "a \u017c\u00f3\u0142w", steps=5, seed=2**63 + 1, guidance_scale=3.5, width=96)
        await one.page.wait_for_selector(card(request, "completed"))
        async with one.page.expect_download() as download:
            await one.page.click(f"{card(request)} .corner")
        saved = tmp_path / "saved.png"
        await (await download.value).save_as(saved)
        with Image.open(saved) as image:
            made = json.loads(image.info["steploom"])
            assert (image.size, made["seed"], made["guidance_scale"]) == ((96, 64), 2**63 + 1, 3.5)
        await one.page.fill("#prompt", "something else")
        await drop(one, "saved.png", saved.read_bytes())
        await one.page.wait_for_selector("#note:has-text('are back')")
        again = await one.page.evaluate("window.steploom.form.read(0)")
        assert {name: again[name] for name in ("prompt", "seed", "guidance_scale", "width", "height")} == {
            "prompt": made["prompt"], "seed": str(2**63 + 1), "guidance_scale": 3.5, "width": 96, "height": 64,
        }  # fmt: skip
        await one.page.click("#note button")  # no, start from the image
        await one.page.wait_for_selector("#chip:not([hidden])")
        assert one.complaints == []


async def test_an_image_to_start_from() -> None:
    async with shown() as (engine, _, browser, address), tab(browser, address) as one:
        assert not await one.page.locator("[name=strength]").is_visible()
        await drop(one, "red.png", file_of(Image.new("RGB", (300, 200), "red")))
        await one.page.wait_for_selector("#chip:not([hidden]) img")
        assert await one.page.locator("#chip-name").text_content() == "red.png"
        engine.hold()
        request = await ask(one, "a", steps=4)
        given = engine._core.scheduler._alive[request].request
        assert (given.task, given.params["image"].size, given.params["strength"]) == ("image-to-image", (64, 64), 0.6)
        assert given.params["image"].getpixel((0, 0)) == (255, 0, 0)
        engine.release()
        await one.page.wait_for_selector(card(request, "completed"))
        await one.page.click("#chip-remove")
        assert not await one.page.locator("[name=strength]").is_visible()
        await one.page.click(f"{card(request)} .shot")
        await one.page.click("#viewer-actions >> text=Start from it")
        await one.page.wait_for_selector("#chip:not([hidden])")
        assert one.complaints == []


async def test_many_at_once_wait_for_no_connection() -> None:
    async with shown() as (engine, told, browser, address), tab(browser, address) as one:
        engine.hold()
        await ask(one, "a", steps=3, seed=10, count=12)
        await one.page.wait_for_selector(".card[data-state=waiting] >> nth=11")
        await one.page.click(".card >> nth=0 >> .corner")  # there is a connection left to cancel with
        await one.page.wait_for_selector(".card[data-state=cancelled]")
        engine.release()
        await one.page.wait_for_selector("#cards[data-live='0']", state="attached")
        assert await one.page.locator(".card[data-state=completed]").count() == 11
        assert max(cell[2] for cells in told.cells.values() for cell in cells) == 11
        seeds = await one.page.evaluate(
            "window.steploom.cards.all.map((card) => Number(card.seed)).sort((a, b) => a - b)"
        )
        assert seeds == list(range(10, 22))
        await one.page.click("#clear")
        assert await one.page.locator(".card").count() == 0
        assert one.complaints == []


async def test_the_page_asks_for_the_key_and_says_what_is_refused() -> None:
    async with shown(app={"api_keys": ("right",)}) as (_, _, browser, address), tab(browser, address) as one:
        for key in ("wrong", "right"):
            await one.page.wait_for_selector("#key-dialog[open]")
            await one.page.fill("#key", key)
            await one.page.press("#key", "Enter")
        await one.page.wait_for_selector("#state[data-state=idle]")
        assert await one.page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        refusals = [one.complaints.pop() for _ in range(len(one.complaints))]
        assert all("401" in said for said in refusals)  # the browser itself notes them
        await one.page.fill("[name=seed]", "")
        await one.page.fill("#prompt", "a")
        await one.page.fill("[name=width]", "63")
        await one.page.press("#prompt", "Control+Enter")
        await one.page.wait_for_selector("#note.wrong:has-text('63')")
        assert await one.page.locator("[name=width]").get_attribute("aria-invalid") == "true"


async def test_on_a_phone_nothing_is_too_wide_and_the_chart_can_be_read_by_keyboard() -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    async with shown() as (_, _, browser, address), tab(browser, address, **phone) as one:
        request = await ask(one, "a" * 300, steps=3)
        await one.page.wait_for_selector(card(request, "completed"))
        assert await one.page.evaluate("document.documentElement.scrollWidth") <= 360
        await one.page.focus("#strip")
        await one.page.keyboard.press("ArrowLeft")
        await one.page.wait_for_selector("#tip:has-text('step 3 of 3')")
        await one.page.keyboard.press("ArrowLeft")
        await one.page.wait_for_selector("#tip:has-text('step 2 of 3')")
        assert one.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_built_in_model_while_one_watches(scheme: Any, tmp_path: pathlib.Path) -> None:
    async with (
        AsyncDiffusionEngine(model="demo", distributed_executor_backend="inproc", torch_threads=1) as engine,
        listening(create_app(engine)) as address,
        browsing() as browser,
        tab(browser, address, color_scheme=scheme) as one,
    ):
        told = Told()
        engine.observers.append(told)
        requests = [await ask(one, f"a large {colour} circle", steps=8) for colour in ("red", "blue", "green")]
        for request in requests:
            await one.page.wait_for_selector(card(request, "completed"))
            assert int(str(await one.page.locator(card(request)).get_attribute("data-pictures"))) > 2
            await one.page.wait_for_selector(f'#lanes li[data-request="{request}"][data-outcome=completed]')
        assert await lanes(one) == told.cells
        assert max(cell[2] for cells in told.cells.values() for cell in cells) > 1
        picture = Image.open(io.BytesIO(await one.page.screenshot(full_page=True)))
        ground = picture.convert("L").getpixel((2, 2))
        assert (ground > 128) == (scheme == "light")
        assert one.complaints == []


async def test_what_ended_unseen_runs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks, "HISTORY", 2)
    async with shown() as (engine, _, browser, address), tab(browser, address) as one:
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(partial(engine.generate, "short", num_inference_steps=3))
            await one.page.wait_for_selector("#state[data-state=running]")
            group.start_soon(partial(engine.generate, "long", num_inference_steps=200))
            await one.page.wait_for_selector("#lanes li:nth-child(2)")
            engine.release()
        await one.page.wait_for_selector("#state[data-state=idle]")
        assert one.complaints == []


@pytest.mark.parametrize("makes", ["videos", "text"])
async def test_a_model_that_makes_no_images_is_told_and_not_asked(makes: str) -> None:
    async with shown(makes=makes) as (_, _, browser, address), tab(browser, address) as one:
        await one.page.fill("#prompt", "two boats")
        await drop(one, "a.png", file_of(Image.new("RGB", (64, 64))))
        await one.page.keyboard.press("Control+Enter")
        assert await one.page.is_disabled("#go")
        assert f"This model makes {makes}, no images" in await one.page.inner_text("#note")
        assert await one.page.locator(".card").count() == 0
        assert one.complaints == []


async def test_what_was_asked_while_the_server_was_gone_is_made_when_it_is_back() -> None:
    async with shown() as (_, _, browser, address), tab(browser, address) as one:
        await one.page.route("**/v1/ticks*", lambda route: route.abort())
        await one.page.reload()
        await one.page.wait_for_selector("#state[data-state=lost]")
        await one.page.fill("#prompt", "two boats")
        async with one.page.expect_event("requestfailed"):  # it is tried again in vain
            await one.page.click("#go")
        await one.page.unroute("**/v1/ticks*")
        await one.page.wait_for_selector(".card[data-state=completed]")
