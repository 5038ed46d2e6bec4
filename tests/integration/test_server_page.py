"""What feeds the page: its files, the facts of the model, the ticks, and images that come over the same connection."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx2
import pytest
from PIL import Image
from serving import image_of, listening, openai_client
from starlette.applications import Starlette
from starlette.routing import Mount

from steploom import DiffusionRequest, EngineObserver
from steploom.protocol import RunnerOutput, SchedulerOutput, request_id_of
from steploom.server import create_app
from steploom.server.page import ticks
from steploom.testing import FakeEngine

STEPS = {"num_inference_steps": 4}


@contextlib.asynccontextmanager
async def served(path: str = "", engine: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Any]:
    """A client of a server, and its engine."""
    async with FakeEngine(**(engine or {})) as made:
        app = create_app(made, **settings)
        async with (
            listening(Starlette(routes=[Mount(path, app)]) if path else app) as address,
            httpx2.AsyncClient(base_url=f"{address}{path}/", follow_redirects=True, timeout=30) as client,
        ):
            yield client, made


class Watch:
    """A page's connection: the events that have come over it."""

    def __init__(self, response: Any) -> None:
        self._lines = response.aiter_lines()

    async def __anext__(self) -> tuple[str, dict[str, Any]]:
        kind = ""
        async for line in self._lines:
            if line.startswith("event: "):
                kind = line[7:]
            if line.startswith("data: "):
                return kind, json.loads(line[6:])
        raise StopAsyncIteration

    async def until(self, kind: str, times: int = 1) -> list[tuple[str, dict[str, Any]]]:
        """The events up to the ``times``-th of that kind."""
        found = []
        with anyio.fail_after(30):
            while sum(one == kind for one, _ in found) < times:
                found.append(await self.__anext__())
        return found


@contextlib.asynccontextmanager
async def watching(client: Any, query: str = "channel=c") -> AsyncIterator[Watch]:
    async with client.stream("GET", f"v1/ticks?{query}") as response:
        assert response.status_code == 200, await response.aread()
        watch = Watch(response)
        assert (await watch.__anext__())[0] == "hello"
        yield watch


class Told(EngineObserver):
    """The engine's own account of its ticks."""

    def __init__(self) -> None:
        self.ticks: list[tuple[int, list[tuple[str, int]]]] = []

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        self.ticks.append((output.tick, [(request_id_of(one.run_id), one.step) for one in result.reports]))


@pytest.mark.parametrize("path", ["", "/art"])
async def test_the_page_and_its_files(path: str) -> None:
    async with served(path) as (client, _):
        page = await client.get("")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in page.text.replace("http-equiv", "")
        for name in ("page/main.js", "page/page.css", "page/icon.svg"):
            assert f'"{name}"' in page.text
            file = await client.get(name)
            assert file.status_code == 200
            again = await client.get(name, headers={"If-None-Match": file.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for name in ("page/index.html", "page/../app.py", "page/%2e%2e%2fapp.py", "page/none.js"):
            assert (await client.get(name)).status_code == 404


async def test_without_the_page_there_is_nothing_of_it() -> None:
    async with served(page=False) as (client, engine):
        for name in ("", "page/main.js", "v1/info", "v1/ticks"):
            assert (await client.get(name)).status_code == 404
        assert not any(isinstance(one, ticks.TickFeed) for one in engine.observers)


async def test_the_key_protects_what_feeds_the_page_but_not_the_page() -> None:
    async with served(api_keys=("k",)) as (client, _):
        assert (await client.get("")).status_code == 200
        assert (await client.get("page/main.js")).status_code == 200
        assert [(await client.get(name)).status_code for name in ("v1/info", "v1/ticks")] == [401, 401]


async def test_the_facts_of_the_model() -> None:
    async with served(model_names=("mine",)) as (client, engine):
        facts = (await client.get("v1/info")).json()
        assert facts["models"] == ["mine"]
        assert (facts["default_steps"], facts["default_size"], facts["size_multiple"]) == (8, [64, 64], 8)
        assert "strength" in facts["image_parameters"]
        assert "strength" not in facts["parameters"]
        assert facts["needs_image"] is False
        engine.info.tasks.clear()
        assert (await client.get("v1/info")).json()["image_parameters"] is None


async def test_the_feed_tells_the_engines_own_ticks_and_no_prompt() -> None:
    async with served(engine={"max_batch": 2, "max_resident": 2, "policy": "fcfs"}) as (client, engine):
        told = Told()
        engine.observers.append(told)
        engine.hold()
        async with watching(client) as watch, anyio.create_task_group() as group:
            for number, steps in enumerate((3, 5, 2)):
                one = DiffusionRequest("secret words", request_id=f"r{number}", user="me", num_inference_steps=steps)
                group.start_soon(engine.generate, one)
            await engine.held()
            engine.release()
            events = await watch.until("ended", 3)
        shown = [data for kind, data in events if kind == "tick"]
        assert [(one["tick"], [(cell["id"], cell["step"]) for cell in one["requests"]]) for one in shown] == told.ticks
        assert [cell["batch_requests"] for cell in shown[0]["requests"]] == [2, 2]
        joins = {cell["id"]: one["tick"] for one in shown for cell in one["requests"] if cell["joined"]}
        ends = [(data["id"], data["outcome"]) for kind, data in events if kind == "ended"]
        assert joins == {"r0": 1, "r1": 1, "r2": 4}
        assert ends == [("r0", "completed"), ("r1", "completed"), ("r2", "completed")]
        assert {data["number"] for kind, data in events if kind != "tick"} == {1, 2, 3}
        assert shown[0]["waiting"] == 1
        assert "secret" not in json.dumps(events)
        assert '"me"' not in json.dumps(events)
        async with watching(client) as late:
            assert (await late.until("ended", 3))[-1] == events[-1]  # what has been is told to who comes later
        name, count = late_feed(client, engine)
        async with watching(client, f"feed={name}&after={count - 1}") as again:
            assert await again.until("ended") == events[-1:]  # and to who comes again only what is new


def late_feed(client: Any, engine: Any) -> tuple[str, int]:
    (feed,) = [one for one in engine.observers if isinstance(one, ticks.TickFeed)]
    return feed.name, feed.count


async def test_images_come_over_the_channel_with_a_preview_of_each_step() -> None:
    async with served() as (client, engine), watching(client) as watch:
        asked = {"prompt": "a", "seed": 7, "stream": True, "preview_every": 1, "num_inference_steps": 6}
        answer = await client.post("v1/images/generations", json=asked, headers={"steploom-channel": "c"})
        assert answer.status_code == 202
        (made,) = answer.json()["data"]
        assert made["seed"] == 7
        events = [data for kind, data in await watch.until("image_generation.completed") if kind.startswith("image_")]
        assert {one["request_id"] for one in events} == {made["id"]}
        assert [one["step"] for one in events] == [1, 2, 3, 4, 5, 6]
        alone = await engine.generate("a", seed=7, num_inference_steps=6)
        assert image_of(events[-1]["b64_json"]).tobytes() == alone.images[0].tobytes()


async def test_a_page_that_is_closed_ends_its_requests() -> None:
    for keeps in (False, True):
        async with served(on_disconnect="keep" if keeps else "cancel") as (client, engine):
            engine.hold()
            async with watching(client):
                headers = {"steploom-channel": "c"}
                assert (await client.post("v1/images/generations", json={"prompt": "a"}, headers=headers)).is_success
                await engine.held()
            async with watching(client, "channel=d") as other:
                if keeps:
                    engine.release()
                ended = (await other.until("ended"))[-1][1]
            assert ended["outcome"] == ("completed" if keeps else "cancelled")
            engine.release()


async def test_what_cannot_be_handed_over() -> None:
    async with served(max_watchers=1) as (client, engine):
        headers = {"steploom-channel": "c"}

        async def ask(**asked: Any) -> Any:
            return await client.post("v1/images/generations", json=asked, headers=headers)

        headers["Idempotency-Key"] = "k"
        for _ in range(2):  # the second one waits for nobody
            answer = await ask(prompt="a")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_channel")
        del headers["Idempotency-Key"]
        async with watching(client) as watch:
            answer = await ask(prompt="a", width=63)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "width")
            assert (await client.get("v1/ticks?channel=d")).status_code == 429
            assert (await ask(prompt="fail here")).status_code == 202
            failed = (await watch.until("error"))[-1][1]
            assert failed["error"]["code"] == "generation_failed"
            engine.hold()
            (made,) = (await ask(prompt="b")).json()["data"]
            await client.delete(f"v1/requests/{made['id']}")
            cancelled = (await watch.until("error"))[-1][1]
            assert (cancelled["request_ids"], cancelled["error"]["code"]) == ([made["id"]], "request_cancelled")
            engine.release()


async def test_a_connection_without_work_ends_and_so_do_all_when_the_server_does() -> None:
    async with served() as (client, engine), watching(client) as watch:
        next(one for one in engine.observers if isinstance(one, ticks.TickFeed)).close()
        with anyio.fail_after(30), pytest.raises(StopAsyncIteration):
            await watch.__anext__()
    async with served(watcher_idle_s=0.01) as (client, _), watching(client) as watch:
        with anyio.fail_after(10), pytest.raises(StopAsyncIteration):
            await watch.__anext__()


def test_who_reads_slowly_misses_the_oldest() -> None:
    feed = ticks.TickFeed()
    for number in range(ticks.HISTORY + 5):
        feed.on_queued(DiffusionRequest("a", request_id=f"r{number}"))
    text, last = feed.read(2, 3)
    assert [json.loads(line[6:])["id"] for line in text.decode().split("\n") if line.startswith("data")] == [
        "r5", "r6", "r7",
    ]  # fmt: skip
    assert last == 8
    assert feed.read(feed.count, 3) == (b"", feed.count)


async def test_who_is_cancelled_while_a_tick_runs_has_no_more_columns_and_leaves_nothing() -> None:
    async with FakeEngine() as engine:
        engine.observers.append(feed := ticks.TickFeed())
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.generate, "a")
            await engine.held()
            group.cancel_scope.cancel()
        engine.release()
        await engine.generate("b", **STEPS)
        told = feed.read(0, 100)[0].decode()
        assert told.count("event: ended") == 2
        assert '"number":2' in told
        assert '"number":3' not in told
        assert feed._numbers == {}


async def test_a_png_says_how_it_was_made_if_asked_to() -> None:
    async with openai_client() as (client, _):
        own = {"seed": 2**63 + 5, "negative_prompt": "blur\u00e9", "metadata": True, **STEPS}
        answer = await client.images.generate(prompt="a ca\u0142", size="64x96", extra_body=own)
        notes = image_of(answer.data[0].b64_json).info
        made = {"prompt": "a ca\u0142", "negative_prompt": "blur\u00e9", "seed": 2**63 + 5, "width": 64, "height": 96}
        assert json.loads(notes["steploom"]) == {**made, **STEPS}
        first, *_, last = notes["parameters"].split("\n")
        assert (first, last) == ("a ca\u0142", f"Steps: 4, Seed: {2**63 + 5}, Size: 64x96")
        answer = await client.images.generate(prompt="a cat")
        assert not image_of(answer.data[0].b64_json).info.keys() & {"steploom", "parameters"}
        with pytest.raises(Exception, match="output_format png"):
            await client.images.generate(prompt="a", output_format="webp", extra_body={"metadata": True})


async def test_a_slow_client_gets_the_newest_previews_and_the_engine_does_not_wait() -> None:
    from steploom.server.fields import read_fields
    from steploom.server.image_generation import KEPT_PREVIEWS, ImageGeneration, Partial
    from steploom.server.running import Running
    from steploom.server.settings import ServerSettings

    steps = {"num_inference_steps": 40}
    fields = read_fields({"prompt": "a", "stream": True, "preview_every": 1, **steps}, ServerSettings())
    async with FakeEngine() as engine:
        generation = ImageGeneration(fields, [DiffusionRequest("a", preview_every=1, **steps)], None)
        await generation.run(engine, Running())  # and nobody reads
        kept = [one for one in generation.log if isinstance(one, Partial)]
        assert 0 < len(kept) <= KEPT_PREVIEWS
        assert kept[-1].index == len(generation.log) - 2
        assert Image.open(io.BytesIO(kept[0].data)).format == "PNG"
