"""The text API over a pretended language model, as OpenAI's own client sees it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import openai
import pytest
from serving import openai_client

from steploom.testing import FakeEngine

SAID = [{"role": "user", "content": "a cat"}]


@contextlib.asynccontextmanager
async def text_client(**settings: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeEngine]]:
    engine = {"makes": "text", **settings.pop("engine", {})}
    async with openai_client(engine=engine, **settings) as found:
        yield found


async def test_texts_are_the_engines_own() -> None:
    async with text_client() as (client, engine):
        answer = await client.completions.create(model="demo", prompt=["a cat", "a big dog"], n=2, seed=5, max_tokens=9)
        assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "demo", "cmpl-")
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        for choice in answer.choices:
            alone = await engine.generate(["a cat", "a big dog"][choice.index // 2], seed=choice.seed, gen_length=9)
            assert (choice.text, choice.finish_reason) == (alone.text, "length")
            assert choice.seed == 5 + choice.index % 2
        assert answer.usage is not None
        counts = answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens
        assert counts == (2 + 3, 4 * 9, 5 + 36)
        chat = await client.chat.completions.create(model="demo", messages=SAID, seed=5, max_completion_tokens=9)
        assert (chat.object, chat.choices[0].message.role) == ("chat.completion", "assistant")
        assert chat.choices[0].message.content == answer.choices[0].text
        assert chat.usage.completion_tokens == 9
        short = await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "short"}])
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("stop", 3)


@pytest.mark.parametrize("counted", [True, False])
async def test_a_stream_has_the_text_piece_by_piece(counted: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if counted else {}
    asked = {"model": "demo", "n": 2, "seed": 5, "max_tokens": 9}
    async with text_client() as (client, _):
        for prompt in ({"prompt": "a cat"}, {"messages": SAID}):
            api: Any = client.completions if "prompt" in prompt else client.chat.completions
            whole = await api.create(**asked, **prompt)
            chunks = [chunk async for chunk in await api.create(**asked, **prompt, **options, stream=True)]
            assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
            if counted:
                last = chunks.pop()
                assert (last.choices, last.usage) == ([], whole.usage)
            assert all(chunk.usage is None for chunk in chunks)
            for index, expected in enumerate(whole.choices):
                own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
                assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + ["length"]
                if "prompt" in prompt:
                    pieces, text = [one.text for one in own], expected.text
                else:
                    assert [one.delta.role for one in own] == ["assistant"] + [None] * (len(own) - 1)
                    pieces, text = [one.delta.content or "" for one in own], expected.message.content
                assert "".join(pieces) == text
                assert sum(bool(piece) for piece in pieces) == 3  # as each block is settled


async def test_a_stream_is_of_nameless_events_and_says_that_it_is_done() -> None:
    async with text_client() as (client, _):
        for prompt, closing in (("a cat", "data: [DONE]"), ("fail now", "data: {")):
            ask = client.completions.with_raw_response.create(model="demo", prompt=prompt, stream=True)
            lines = [line async for line in (await ask).http_response.aiter_lines() if line]
            assert lines[-1].startswith(closing)
            assert ("error" in lines[-1]) is (prompt == "fail now")
            assert all(line.startswith("data: ") for line in lines[:-2])


async def test_pieces_come_while_the_text_grows() -> None:
    async with text_client() as (client, engine):
        engine.hold()
        messages: Any = [{"role": "user", "content": "short and good"}]
        opened = client.chat.completions.stream(model="demo", messages=messages, extra_body={"block_length": 1})
        async with opened as stream, anyio.create_task_group() as group:
            heard: list[str] = []

            async def listen() -> None:
                async for event in stream:
                    if event.type == "content.delta" and event.delta:  # the role comes with an empty one
                        heard.append(event.delta)
                        engine.release(2)  # the next block

            group.start_soon(listen)
            await engine.held()
            assert not heard
            engine.release(2)
        final = await stream.get_final_completion()
        assert "".join(heard) == final.choices[0].message.content
        assert len(heard) == 2


async def test_stop_sequences_end_a_text_and_its_work() -> None:
    async with text_client() as (client, engine):
        words = (await engine.generate("a cat", seed=5, gen_length=16)).text.split(" ")
        text = " ".join(words)
        for stop in (words[7], [f"{words[6]} {words[7]}", "never"], f"{words[3]} {words[4]}"):
            asked: Any = {"model": "demo", "prompt": "a cat", "seed": 5, "stop": stop}
            cut = text[: min(text.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in text)]
            answer = await client.completions.create(**asked)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
            assert answer.usage.completion_tokens <= 8
            chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
            assert "".join(chunk.choices[0].text for chunk in chunks) == cut
        kept = await client.completions.create(**{**asked, "stop": f"{words[-1]} and then"})
        assert (kept.choices[0].text, kept.choices[0].finish_reason) == (text, "length")


async def test_messages_are_of_text() -> None:
    async with text_client() as (client, engine):
        parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]
        asked = [
            {"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "me"},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
            {"role": "user", "content": "b"},
        ]  # fmt: skip
        answer = await client.chat.completions.create(model="demo", messages=asked, seed=5)
        plain = [("system", "be brief"), ("user", "a cat"), ("assistant", ""), ("user", "b")]
        messages = [{"role": role, "content": content} for role, content in plain]
        assert answer.choices[0].message.content == (await engine.generate(messages=messages, seed=5)).text


IMAGE = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
CHAT = [
    ({"messages": []}, "messages"), ({"messages": "a"}, "messages"), ({}, "messages"),
    ({"messages": ["a"]}, "messages"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"), ({"messages": [{"role": ["user"], "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 32_001}]}, "messages"),
    ({"messages": SAID, "prompt": "a"}, "prompt"), ({"messages": SAID, "tools": [{}]}, "tools"),
    ({"messages": SAID, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": SAID, "logprobs": True}, "logprobs"), ({"messages": SAID, "modalities": ["audio"]}, "modalities"),
    ({"messages": SAID, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"messages": SAID, "max_completion_tokens": 4097}, "max_completion_tokens"),
]  # fmt: skip
TEXT = [
    ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": [[1]]}, "prompt"), ({"prompt": True}, "prompt"), ({"prompt": ["a"] * 33}, "prompt"),
    ({"prompt": "a", "n": 0}, "n"), ({"prompt": "a", "n": 33}, "n"), ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 4097}, "max_tokens"), ({"prompt": "a", "gen_length": 4097}, "gen_length"),
    ({"prompt": "a", "block_length": 10**9}, "block_length"), ({"prompt": "a", "temperature": 2.1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"), ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "stop": ""}, "stop"), ({"prompt": "a", "stop": list("abcde")}, "stop"),
    ({"prompt": "a", "stop": [1]}, "stop"), ({"prompt": "a", "logprobs": 0}, "logprobs"),
    ({"prompt": "a", "echo": True}, "echo"), ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "frequency_penalty": 1}, "frequency_penalty"), ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "logit_bias": {"1": 1}}, "logit_bias"), ({"prompt": "a", "temperatur": 1}, "temperatur"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    ({"prompt": "a", "stream": True, "stream_options": 1}, "stream_options"), ({"prompt": "a", "seed": "x"}, "seed"),
    ({"prompt": "a", "messages": SAID}, "messages"),
    ({"prompt": "a", "max_completion_tokens": 1}, "max_completion_tokens"),
    ({"prompt": "a", "temperatur": None}, "temperatur"),
    ({"prompt": "a", "num_inference_steps": 10**6}, "num_inference_steps"), ({"prompt": "a", "timeout": 0}, "timeout"),
    ({"prompt": "a", "threshold": 0.5}, "threshold"), ({"prompt": "a", "lora": "ink"}, "lora"),
]  # fmt: skip


@pytest.mark.slow
async def test_a_wrong_field_is_named() -> None:
    async with text_client() as (client, _):
        for path, wrong in (("/completions", TEXT), ("/chat/completions", CHAT)):
            for body, param in wrong:
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.post(path, body=body, cast_to=dict)
                assert caught.value.param == param, body
                assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.APIStatusError) as caught:
            await client.post(
                "/completions", content=b"a", options={"headers": {"content-type": "text/plain"}}, cast_to=dict
            )
        assert caught.value.status_code == 415


async def test_what_asks_for_nothing_is_taken() -> None:
    async with text_client() as (client, _):
        await client.completions.create(
            model="demo", prompt="a", echo=False, best_of=1, frequency_penalty=0.0, presence_penalty=0, logit_bias={},
            logprobs=None, suffix=None, temperature=0.5, top_p=1, stop=None, user="me", n=None, max_tokens=None,
            extra_body={"top_k": 5, "num_inference_steps": 1, "block_length": 2, "priority": 1, "timeout": 60},
        )  # fmt: skip
        await client.chat.completions.create(
            model="demo", messages=SAID, tools=[], tool_choice="none", response_format={"type": "text"},
            logprobs=False, modalities=["text"], metadata={"a": "b"}, store=False, service_tier="auto",
            reasoning_effort="low", verbosity="low", prompt_cache_key="k", safety_identifier="me", seed=None,
            parallel_tool_calls=True, temperature=None, extra_body={"model": None, "gen_length": 4},
        )  # fmt: skip


async def test_a_model_makes_what_it_makes() -> None:
    async with text_client() as (client, _), openai_client() as (other, _):
        wrong = (
            client.images.generate(prompt="a"), other.completions.create(model="demo", prompt="a"),
            other.chat.completions.create(model="demo", messages=SAID),
        )  # fmt: skip
        for asked in wrong:
            with pytest.raises(openai.BadRequestError) as caught:
                await asked
            assert (caught.value.param, caught.value.code) == ("model", "unsupported_model")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a")
        assert missing.value.code == "model_not_found"


async def test_a_client_that_hangs_up_ends_its_work() -> None:
    async with text_client() as (client, engine):

        async def whole() -> None:
            await client.completions.create(model="demo", prompt="a", n=2)

        async def streamed() -> None:
            async with await client.chat.completions.create(model="demo", messages=SAID, n=2, stream=True):
                await anyio.sleep_forever()

        for asked in (whole, streamed):
            engine.hold()
            async with anyio.create_task_group() as group:
                group.start_soon(asked)
                await engine.held()
                assert len((await client.get("/requests", cast_to=dict))["data"]) >= 1
                group.cancel_scope.cancel()
            with anyio.fail_after(30):
                while (await client.get("/requests", cast_to=dict))["data"]:
                    await anyio.lowlevel.checkpoint()
            engine.release()
            await engine._core.idled()
            assert not engine._core.executor._resident


async def test_outcomes_retries_and_refusals() -> None:
    async with text_client(engine={"max_waiting": 1, "max_batch": 1, "max_resident": 1}) as (client, engine):
        stream = await client.completions.create(model="demo", prompt="fail now", stream=True)
        with pytest.raises(openai.APIError, match="fail now"):
            [chunk async for chunk in stream]
        with pytest.raises(openai.InternalServerError, match="fail now"):
            await client.completions.create(model="demo", prompt="fail now")
        key = {"extra_headers": {"Idempotency-Key": "k"}}
        first = await client.completions.create(model="demo", prompt="a", **key)
        assert await client.completions.create(model="demo", prompt="a", **key) == first
        with pytest.raises(openai.UnprocessableEntityError):
            await client.completions.create(model="demo", prompt="b", **key)
        engine.hold()
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="demo", prompt="a", n=3)
        assert int(full.value.response.headers["retry-after"]) >= 1
        engine.release()


async def test_a_text_has_at_most_so_many_tokens() -> None:
    async with text_client(engine={"max_tokens": 6}) as (client, _):
        answer = await client.completions.create(model="demo", prompt="a")
        assert answer.usage.completion_tokens == 6
