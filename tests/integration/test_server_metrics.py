"""/metrics: the numbers are the engine's own, and nothing that a client sends becomes a label."""

from __future__ import annotations

import anyio
import httpx2
import openai
import pytest
from exposition import counted, local, parsed, scraped
from prometheus_client import CollectorRegistry
from serving import openai_client
from starlette.applications import Starlette
from starlette.routing import Mount

from steploom import DeadlineExceeded, GenerationFailed, InvalidRequest, QueueFull
from steploom.errors import ProtocolError
from steploom.protocol import RunnerOutput
from steploom.server import create_app
from steploom.telemetry import EngineMetrics
from steploom.testing import FakeEngine

BODY = {"prompt": "a", "num_inference_steps": 3}
PATH = "/v1/images/generations"
ZERO = {"completed": 0, "failed": 0, "cancelled": 0, "timed_out": 0, "refused": 0, "invalid": 0}


async def numbers(client: openai.AsyncOpenAI):
    async with httpx2.AsyncClient() as plain:
        return parsed((await plain.get(f"http://{client.base_url.netloc.decode()}/metrics")).text)


async def test_every_outcome_is_counted_once_as_the_engine_has_it() -> None:
    async with openai_client(engine={"max_waiting": 2, "max_batch": 1, "max_resident": 1}) as (client, engine):
        errors: list[type[Exception]] = []

        async def ask(prompt: str = "a", steps: int = 3, **extra: object) -> None:
            try:
                await client.images.generate(prompt=prompt, extra_body={"num_inference_steps": steps, **extra})
            except openai.APIError as error:
                errors.append(type(error))

        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await engine.held()
            async with anyio.create_task_group() as gone:
                gone.start_soon(ask)
                await waiting(client, 1)
                gone.cancel_scope.cancel()
            await waiting(client, 0)  # it hung up while it waited
            group.start_soon(lambda: ask("fail"))
            await waiting(client, 1)
            await ask(timeout=0.01)
            group.start_soon(lambda: ask(steps=2))
            await waiting(client, 2)
            await ask()
            now = await numbers(client)
            assert (now("requests_running"), now("requests_waiting")) == (1, 2)
            engine.release()
        assert sorted(error.__name__ for error in errors) == [
            "InternalServerError", "InternalServerError", "RateLimitError",
        ]  # fmt: skip
        await ask(width=13)
        now = await numbers(client)
        found = {outcome: now("requests_total", outcome=outcome) for outcome in ZERO}
        assert found == {"completed": 2, "failed": 1, "cancelled": 1, "timed_out": 1, "refused": 1, "invalid": 1}
        assert (now("requests_running"), now("requests_waiting")) == (0, 0)
        assert now("steps_total") == 3 + 2 + 2 == now("step_seconds_count") == now("step_batch_requests_sum")
        assert now("queue_seconds_count") == 3
        assert now("request_seconds_count") == now("encode_seconds_count") == now("decode_seconds_count") == 2
        assert now("http_requests_total", method="POST", route=PATH, status="499") == 1
        assert now("http_requests_total", method="POST", route=PATH, status="200") == 2


async def waiting(client: openai.AsyncOpenAI, wanted: int) -> None:
    """Returns when so many wait: each scrape waits for the one before."""
    with anyio.fail_after(30):
        while (await numbers(client))("requests_waiting") != wanted:
            await anyio.lowlevel.checkpoint()


async def test_batches_previews_and_queues_are_measured() -> None:
    async with FakeEngine() as engine:
        engine.observers.append(metrics := EngineMetrics(engine))
        engine.hold()
        async with anyio.create_task_group() as group:
            for seed in range(3):
                group.start_soon(lambda seed=seed: drawn(engine, seed))
            await engine.held()
            engine.release()
        now = counted(metrics)
        shared = 3 * 3 + 3 * 3 + 2 * 2 + 1  # of 2, 3 and 4 steps
        assert now("step_batch_requests_sum") == shared
        assert now("step_batch_requests_bucket", le="1.0") == 1
        assert now("step_batch_requests_bucket", le="2.0") == 3
        assert now("time_to_first_preview_seconds_count") == 3
        assert now("time_to_first_preview_seconds_sum") <= now("request_seconds_sum")
        assert now("ticks_total") == 4


async def drawn(engine: FakeEngine, seed: int) -> None:
    await engine.generate("a", seed=seed, num_inference_steps=2 + seed, preview_every=1)


async def test_labels_hold_nothing_that_a_client_sends() -> None:
    async with FakeEngine() as engine:
        app = create_app(engine, api_keys=("secret",))
        async with local(app, headers={"Authorization": "Bearer secret"}) as client:
            await client.post(PATH, json=BODY)
            await client.get("/v1/requests/first")
            first = await scraped(app)
            for number in range(20):
                name = f"one-{number}"
                sent = {**BODY, "prompt": name, "user": name, "seed": number}
                await client.post(PATH, json=sent, headers={"x-request-id": name, "Idempotency-Key": name})
                await client.post(PATH, json={**BODY, "model": name})
                await client.get(f"/v1/requests/{name}")
                await client.get(f"/nowhere/{name}")
                await client.request(f"VERB{number}", "/live")
            later = await scraped(app)
        held = {value for _, labels in later for _, value in labels}
        assert not any("one-" in value or "VERB" in value or "secret" in value for value in held)
        assert len(set(later) - set(first)) < 100  # a few routes and their buckets
        assert later("http_requests_total", method="GET", route="/v1/requests/{request_id}", status="404") == 21
        assert later("http_requests_total", method="GET", route="unmatched", status="404") == 20
        assert later("http_requests_total", method="OTHER", route="/live", status="405") == 20


async def test_the_format_is_the_one_that_a_client_accepts_and_no_key_is_needed() -> None:
    async with FakeEngine() as engine, local(create_app(engine, api_keys=("secret",))) as client:
        plain = await client.get("/metrics", headers={"Accept-Encoding": "identity"})
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        opened = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert opened.text.endswith("# EOF\n")
        some = await client.get("/metrics", params={"name[]": "steploom_steps_total"})
        assert parsed(some.text).names == {"steploom_steps_total"}
        assert (await client.post("/metrics")).status_code == 405


async def test_applications_of_one_process_do_not_clash() -> None:
    async with FakeEngine() as one, FakeEngine() as other:
        apps = create_app(one), create_app(other), create_app(other)
        host = Starlette(routes=[Mount("/art", apps[0])])
        async with local(host) as client:
            assert (await client.post(f"/art{PATH}", json=BODY)).status_code == 200
            through = parsed((await client.get("/art/metrics")).text)
        assert through("http_requests_total", method="POST", route=PATH, status="200") == 1
        assert [(await scraped(app))("steps_total") for app in apps] == [3, 0, 0]


async def test_a_busy_worker_does_not_hold_up_the_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeEngine() as engine:
        app = create_app(engine)
        idle = await scraped(app)
        timeouts = []

        async def busy(method: str, timeout: float | None = None, *args: object) -> object:
            timeouts.append(timeout)
            raise TimeoutError

        monkeypatch.setattr(engine._core.executor, "collective_rpc", busy)
        now = await scraped(app)
        labels = {"worker": "0", "kind": "host"}
        assert now("memory_bytes", **labels) == idle("memory_bytes", **labels) > 1_000_000
        assert timeouts == [0.2]
    assert (await scraped(app))("requests_running") == 0  # closed: still answered


async def test_starting_again_restarts_the_workers_and_lost_requests_are_told() -> None:
    engine = FakeEngine()
    registry = CollectorRegistry()
    engine.observers.append(EngineMetrics(engine, registry))
    for _ in range(3):
        async with engine:
            execute, lost = engine._core.executor.execute_step, []

            async def loses_one(output, execute=execute, lost=lost):
                result = await execute(output)
                if not lost and output.scheduled_new_reqs:
                    lost.append(engine._core.executor._resident.clear())
                    return RunnerOutput(tick=result.tick)
                return result

            engine._core.executor.execute_step = loses_one
            await engine.generate("a", num_inference_steps=3)
    assert registry.get_sample_value("steploom_worker_restarts_total") == 2
    assert registry.get_sample_value("steploom_requests_restarted_total") == 3
    assert registry.get_sample_value("steploom_queue_seconds_count") == 3


async def test_what_dies_with_the_engine_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeEngine() as engine:
        engine.observers.append(metrics := EngineMetrics(engine))

        async def dies(output: object) -> object:
            raise ProtocolError("gibberish")

        monkeypatch.setattr(engine._core.executor, "execute_step", dies)
        with pytest.raises(ProtocolError):
            await engine.generate("a")
        now = counted(metrics)
        assert (now("requests_total", outcome="failed"), now("requests_running"), now("requests_waiting")) == (1, 0, 0)


async def test_without_a_server_the_engine_is_counted_too() -> None:
    async with FakeEngine(max_waiting=1) as engine:
        engine.observers.append(metrics := EngineMetrics(engine))
        await engine.generate("a")
        for error, asked in (
            (GenerationFailed, {"prompt": "fail"}),
            (InvalidRequest, {"prompt": "a", "guidance": 1}),
            (InvalidRequest, {"prompt": "a", "task": "inpainting", "image": b"none", "mask_image": b"none"}),
        ):
            with pytest.raises(error):
                await engine.generate(**asked)
        engine.hold()
        with pytest.raises(DeadlineExceeded):
            await engine.generate("a", timeout=0.01)
        async with engine.stream("b"):
            with pytest.raises(QueueFull):
                await engine.generate("c")
        engine.release()
        now = counted(metrics)
    found = {outcome: now("requests_total", outcome=outcome) for outcome in ZERO}
    assert found == {"completed": 1, "failed": 1, "cancelled": 1, "timed_out": 1, "refused": 1, "invalid": 2}


async def test_an_application_that_has_ended_watches_no_more() -> None:
    async with FakeEngine() as engine:
        others = list(engine.observers)
        app = create_app(engine)
        for _ in range(2):
            assert len(engine.observers) > len(others)  # mounted, it may never be entered
            async with app.state.server:
                watching = list(engine.observers)
                assert len(set(watching)) == len(watching)
                with app.state.server.aside():
                    assert engine.observers == others
            assert engine.observers == others
            app = create_app(engine)


async def test_a_text_that_ends_at_a_stop_sequence_is_completed() -> None:
    async with openai_client(engine={"makes": "text"}) as (client, engine):
        engine.observers.append(metrics := EngineMetrics(engine))
        asked = {"model": "demo", "prompt": "a", "seed": 1, "max_tokens": 64}
        whole = (await client.completions.create(**asked)).choices[0].text
        cut = (await client.completions.create(**asked, stop=whole[8:12])).choices[0]
        assert (cut.finish_reason, len(cut.text) <= 8) == ("stop", True)
        assert metrics._outcomes["completed"] == 2
        assert metrics._outcomes["cancelled"] == 0
