"""The text API over real diffusion language models, tiny ones, as OpenAI's own client sees it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
import tiny_language
from serving import listening, sdk

from steploom import AsyncDiffusionEngine, EngineObserver
from steploom.cli.serving.serve import _warm_up
from steploom.server import create_app

LLADA = {"block_length": 8, "num_inference_steps": 4, "threshold": 0.3}
GEMMA = {"num_inference_steps": 3}
MODELS = pytest.mark.parametrize(("name", "own"), [("llada", LLADA), ("gemma", GEMMA)])
PROMPTS = ("a red circle", "two", "old house")


@contextlib.asynccontextmanager
async def served(name: str) -> AsyncIterator[tuple[openai.AsyncOpenAI, AsyncDiffusionEngine, Any]]:
    pipe = getattr(tiny_language, name)()
    pipe.set_progress_bar_config(disable=True)
    async with (
        AsyncDiffusionEngine.from_pipeline(pipe) as engine,
        listening(create_app(engine, model_names=(name,))) as address,
        sdk(address) as client,
    ):
        yield client, engine, pipe


class Mates(EngineObserver):
    """How many requests shared each step's forward."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
        self.seen += [report.batch_requests for report in result.reports if report.stepped]


@MODELS
async def test_streams_at_once_share_forwards_and_are_what_the_engine_gives(name: str, own: dict[str, Any]) -> None:
    found: dict[str, str] = {}
    async with served(name) as (client, engine, pipe):

        async def ask(prompt: str, seed: int, chat: bool) -> None:
            asked: dict[str, Any] = {"model": name, "max_tokens": 16, "temperature": 1.0, "seed": seed, "stream": True}
            asked |= {"extra_body": own, "stream_options": {"include_usage": True}}
            if chat:
                stream = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **asked)
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            else:
                stream = await client.completions.create(prompt=prompt, **asked)
                chunks = [chunk async for chunk in stream]
                pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
                tokenizer = getattr(pipe, "tokenizer", None) or pipe.processor
                usage, whole = chunks[-1].usage, tokenizer(prompt, add_special_tokens=False).input_ids
                assert (usage.prompt_tokens, usage.completion_tokens) == (len(whole), 16)
            assert sum(map(bool, pieces)) >= 2
            found[prompt] = "".join(pieces)

        mates = Mates()
        engine.observers.append(mates)
        async with anyio.create_task_group() as group:
            for seed, prompt in enumerate(PROMPTS):
                group.start_soon(ask, prompt, seed, seed == 1)
        assert max(mates.seen) == len(PROMPTS)
        for seed, prompt in enumerate(PROMPTS):
            alone = await engine.generate(prompt, seed=seed, gen_length=16, temperature=1.0, **own)
            assert found[prompt] == alone.text
        assert len(set(found.values())) == len(PROMPTS)


async def test_a_text_ends_by_its_end_token_or_for_want_of_room() -> None:
    async with served("llada") as (client, engine, pipe):
        asked: Any = {"model": "llada", "prompt": "a red circle", "seed": 5, "max_tokens": 16, "temperature": 1.0}
        whole = await client.completions.create(**asked, extra_body=LLADA)
        assert whole.choices[0].finish_reason == "length"
        same = {"gen_length": 16, "temperature": 1.0, **LLADA}
        row = (await engine.generate("a red circle", seed=5, **same)).output.sequences[0].tolist()
        pipe.eos_token_id = row[10]
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine, listening(create_app(engine)) as address:
        async with sdk(address) as client:
            ended = await client.completions.create(**{**asked, "model": None}, extra_body=LLADA)
        assert ended.choices[0].finish_reason == "stop"
        tokens = (await engine.generate("a red circle", seed=5, **same)).output.sequences[0].tolist()
        assert ended.usage.completion_tokens == tokens.index(row[10]) + 1 < 16


async def test_what_the_pipeline_or_its_chat_template_refuses_is_the_clients_fault() -> None:
    async with served("llada") as (client, _, pipe):
        pipe.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        said: Any = {"model": "llada", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
        with pytest.raises(openai.BadRequestError, match="roles must alternate"):
            await client.chat.completions.create(**said)
    async with served("gemma") as (client, _, _):
        plain: Any = {"model": "gemma", "prompt": "a", "max_tokens": 8, "extra_body": GEMMA}
        await client.completions.create(**plain, top_p=1.0)
        for wrong in ({"top_p": 0.5}, {"extra_body": {"block_length": 4}}):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(**{**plain, **wrong})
            assert caught.value.param in ("top_p", "block_length")


@pytest.mark.slow
@MODELS
async def test_over_a_process_boundary(name: str, own: dict[str, Any], tmp_path: Path) -> None:
    """As ``steploom serve FOLDER`` has it: warmed up, with the tokenizer and its chat template in the worker alone."""
    pipe = getattr(tiny_language, name)()
    pipe.save_pretrained(tmp_path)
    if name == "llada":  # diffusers leaves it out
        pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    async with AsyncDiffusionEngine(model=str(tmp_path), torch_threads=1) as engine:
        await _warm_up(engine)
        async with listening(create_app(engine)) as address, sdk(address) as client:
            said: Any = [{"role": "system", "content": "a"}, {"role": "user", "content": "red circle"}]
            asked: dict[str, Any] = {"model": tmp_path.name, "messages": said, "max_tokens": 16, "seed": 5}
            asked |= {"temperature": 1.0, "extra_body": own}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        alone = await engine.generate(messages=said, seed=5, gen_length=16, temperature=1.0, **own)
        assert "".join(pieces) == whole.choices[0].message.content == alone.text
        assert whole.usage.prompt_tokens == len("ared circle")
