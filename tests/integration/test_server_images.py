"""The images API over a pretended engine, as OpenAI's own client sees it."""

from __future__ import annotations

import anyio
import httpx2
import openai
import pytest
from PIL import Image
from serving import file_of, image_of, openai_client

from steploom.server.pictures import _mask

STEPS = {"num_inference_steps": 4}


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


async def test_each_image_of_n_is_the_engines_own_with_the_next_seed() -> None:
    async with openai_client() as (client, engine):
        answer = await client.images.generate(prompt="a cat", n=3, size="64x96", extra_body={"seed": 5, **STEPS})
        assert (answer.size, answer.output_format, answer.background) == ("64x96", "png", "opaque")
        assert answer.data is not None
        for index, image in enumerate(answer.data):
            alone = await engine.generate("a cat", seed=5 + index, height=96, width=64, **STEPS)
            assert same(image_of(image.b64_json), alone.images[0])
            assert image.seed == 5 + index
        assert answer.usage is not None
        assert answer.usage.output_tokens == 3 * 4 * 6
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize(("kind", "compression"), [("png", None), ("webp", 40), ("jpeg", 100)])
async def test_formats(kind: str, compression: int | None) -> None:
    async with openai_client() as (client, _):
        asked = {} if compression is None else {"output_compression": compression}
        answer = await client.images.generate(prompt="a", output_format=kind, quality="high", **asked)
        assert image_of(answer.data[0].b64_json).format == kind.upper()
        assert (answer.output_format, answer.quality) == (kind, "high")


async def test_compression_that_is_not_given_is_the_best() -> None:
    async with openai_client() as (client, _):
        asked = {"prompt": "a", "output_format": "jpeg", "size": "256x256", "extra_body": {"seed": 1, **STEPS}}
        best, worse, plain = [
            (await client.images.generate(**asked, output_compression=given)).data[0].b64_json
            for given in (100, 90, None)
        ]
        assert plain == best != worse


async def test_an_address_instead_of_the_image() -> None:
    async with openai_client(stored_images=1) as (client, _):
        first, second = [
            (await client.images.generate(prompt=prompt, response_format="url")).data[0].url for prompt in ("a", "b")
        ]
        async with httpx2.AsyncClient() as plain:
            found = await plain.get(second)
            assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
            assert (await plain.get(first)).status_code == 404  # one is kept


async def test_a_stream_has_previews_of_each_image_and_then_the_images() -> None:
    async with openai_client() as (client, _):
        asked = {"prompt": "a cat", "n": 2, "extra_body": {"seed": 5, "num_inference_steps": 8}}
        whole = await client.images.generate(**asked)
        stream = await client.images.generate(**asked, stream=True, partial_images=3)
        events = [event async for event in stream]
        for index in range(2):
            own = [event for event in events if event.image_index == index]
            assert [event.type for event in own] == 3 * ["image_generation.partial_image"] + [
                "image_generation.completed"
            ]
            assert [event.partial_image_index for event in own[:-1]] == [0, 1, 2]
            assert [(event.step, event.num_inference_steps) for event in own] == [(1, 8), (4, 8), (6, 8), (8, 8)]
            assert {event.seed for event in own} == {5 + index}
            assert same(image_of(own[-1].b64_json), image_of(whole.data[index].b64_json))
            assert len({event.b64_json for event in own}) == 4
            assert own[-1].usage.output_tokens == 16
        short = {"num_inference_steps": 2}
        stream = await client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body=short)
        assert [event.step async for event in stream] == [1, 2]  # the last step's preview would be the image itself


async def test_edits_take_files_lists_and_masks() -> None:
    async with openai_client() as (client, _):
        picture = Image.new("RGB", (64, 64), "red")
        mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
        file = ("a.png", file_of(picture), "image/png")
        answer = await client.images.edit(image=file, prompt="b", extra_body={"seed": 1, "strength": 0.5, **STEPS})
        assert answer.usage.input_tokens_details.image_tokens == 16
        answer = await client.images.edit(
            image=[file], mask=("m.png", file_of(mask), "image/png"), prompt="b", n=2, size="64x64"
        )
        assert len(answer.data) == 2
        stream = await client.images.edit(image=[file], prompt="b", stream=True, partial_images=1)
        assert [event.type async for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
        with pytest.raises(openai.BadRequestError, match="64x64") as caught:
            await client.images.edit(image=file, mask=("m.png", file_of(mask.resize((8, 8))), "image/png"), prompt="b")
        assert caught.value.param == "mask"


def test_a_mask_is_painted_where_it_is_transparent() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((1, 0), (0, 0, 0, 0))
    assert list(_mask(file_of(mask), 100, None).tobytes()) == [0, 255]
    grey = Image.new("L", (2, 1), 0)
    grey.putpixel((1, 0), 255)
    assert list(_mask(file_of(grey), 100, None).tobytes()) == [0, 255]


async def test_pictures_as_json() -> None:
    import base64

    async with openai_client() as (client, _):
        data = base64.b64encode(file_of(Image.new("RGB", (8, 8)))).decode()
        lines = base64.encodebytes(file_of(Image.new("RGB", (64, 64)))).decode()
        assert lines.count("\n") > 1
        for given in ({"image": data}, {"image": [data]}, {"images": [{"image_url": f"data:image/png;base64,{data}"}]},
                      {"image": lines}, {"image[]": [data]}):  # fmt: skip
            body = await client.post("/images/edits", body={"prompt": "a", **given}, cast_to=dict)
            assert len(body["data"]) == 1
        for given, why in (
            ({"image": "http://example.org/a.png"}, "fetched"),
            ({"image": "?"}, "base64"),
            ({}, "given"),
        ):
            with pytest.raises(openai.BadRequestError, match=why) as caught:
                await client.post("/images/edits", body={"prompt": "a", **given}, cast_to=dict)
            assert caught.value.param == "image"


WRONG = [
    ({"prompt": ""}, "prompt"), ({"prompt": "a", "n": 0}, "n"), ({"prompt": "a", "n": 11}, "n"),
    ({"prompt": "a", "n": "two"}, "n"), ({"prompt": "a", "n": True}, "n"), ({"prompt": "a", "size": "63x64"}, "size"),
    ({"prompt": "a", "size": "big"}, "size"), ({"prompt": "a", "width": 63}, "width"),
    ({"prompt": "a", "size": "9999x9999"}, "size"), ({"prompt": "a", "output_format": "svg"}, "output_format"),
    ({"prompt": "a", "output_format": "gif"}, "output_format"), ({"prompt": "a", "svg": {}}, "svg"),
    ({"prompt": "a", "frame_count": 3}, "frame_count"), ({"prompt": "a", "background": "transparent"}, "background"),
    ({"prompt": "a", "output_compression": 50}, "output_compression"), ({"prompt": "a", "stream": "maybe"}, "stream"),
    ({"prompt": "a", "partial_images": 4}, "partial_images"), ({"prompt": "a", "seeds": 1}, "seeds"),
    ({"prompt": "a", "seed": 2**64}, "seed"), ({"prompt": "a", "num_inference_steps": 10**6}, "num_inference_steps"),
    ({"prompt": "a", "true_cfg_scale": 4}, "true_cfg_scale"), ({"prompt": "a", "timeout": -1}, "timeout"),
    ({"prompt": "a", "guidance_scale": "NaN"}, "guidance_scale"), ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a", "guidance_scale": 1e300}, "guidance_scale"),
    ({"prompt": "a", "lora": "/etc/passwd"}, "lora"), ({"prompt": "a", "lora": [{"path": "x"}]}, "lora"),
    ({"prompt": "a" * 32_001}, "prompt"), ({"prompt": "a", "image": "x"}, "image"),
]  # fmt: skip


async def test_a_wrong_field_is_named() -> None:
    async with openai_client() as (client, _):
        for body, param in WRONG:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post("/images/generations", body=body, cast_to=dict)
            assert caught.value.param == param, body
            assert caught.value.type == "invalid_request_error"


async def test_fields_of_openai_that_mean_nothing_here_and_nulls_are_taken() -> None:
    async with openai_client() as (client, _):
        await client.images.generate(
            prompt="a", quality="hd", style="vivid", moderation="low", background="auto", user="me", n=None, size="auto"
        )
        answer = await client.images.generate(prompt="a", safety_identifier="me", model="demo")
        assert answer.safety_identifier == "me"


async def test_adapters_are_models_of_their_own_name() -> None:
    async with openai_client(engine={"loras": {"ink": "./ink"}}, model_names=("art",)) as (client, engine):
        assert [model.id async for model in await client.models.list()] == ["art", "ink"]
        assert (await client.models.retrieve("ink")).owned_by == "steploom"
        engine.hold()
        async with anyio.create_task_group() as group:
            for asked in ({"model": "ink"}, {"model": "art", "extra_body": {"lora": [{"name": "ink", "scale": 0.5}]}}):
                group.start_soon(lambda asked=asked: client.images.generate(prompt="a", **asked))
                await engine.held()
            engine.release()
        with pytest.raises(openai.NotFoundError, match="art, ink"):
            await client.images.generate(prompt="a", model="gpt-image-2")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-image-2")
