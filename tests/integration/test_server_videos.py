"""``/v1/videos`` over a pretended engine: what OpenAI's client sends and expects."""

from __future__ import annotations

import base64
import io
import pathlib
from typing import Any

import av
import httpx2
import openai
import pytest
from PIL import Image
from serving import file_of, video_client

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")
QUICK = {"poll_interval_ms": 1}
SIZE: Any = "32x64"


def frames_of(data: bytes) -> tuple[list[Any], float]:
    with av.open(io.BytesIO(data)) as container:
        rate = float(container.streams.video[0].average_rate)
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], rate


async def test_a_video_is_made_and_downloaded(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, _):
        video = await client.videos.create_and_poll(
            prompt="a cat", seconds="4", size=SIZE, extra_body={"fps": 8, "seed": 5}, **QUICK
        )
        assert (video.status, video.progress, video.error, video.object) == ("completed", 100, None, "video")
        assert (video.seconds, video.size, video.model, video.prompt) == ("4", "32x64", "demo", "a cat")
        assert (video.num_frames, video.fps, video.seed) == (33, 8, 5)  # 32 frames are no 4k + 1
        assert video.completed_at - video.created_at in range(60)
        assert video.expires_at - video.completed_at == 24 * 3600
        whole = await client.videos.download_content(video.id)
        assert whole.response.headers["content-type"] == "video/mp4"
        frames, rate = frames_of(whole.content)
        assert (len(frames), frames[0].shape, rate) == (33, (64, 32, 3), 8)
        thumbnail = await client.videos.download_content(video.id, variant="thumbnail")
        assert Image.open(io.BytesIO(thumbnail.content)).size == (32, 64)
        sheet = await client.videos.download_content(video.id, variant="spritesheet")
        assert Image.open(io.BytesIO(sheet.content)).size == (4 * 32, 4 * 64)
        async with client.videos.with_streaming_response.download_content(
            video.id, extra_headers={"Range": "bytes=4-7"}
        ) as part:
            assert (part.status_code, part.headers["content-range"]) == (206, f"bytes 4-7/{len(whole.content)}")
            assert await part.read() == whole.content[4:8] == b"ftyp"
        for asked, status in (("bytes=9-4", 400), ("seconds=1-2", 400), ("bytes=99999999-", 416)):
            with pytest.raises(openai.APIStatusError, match="Range=") as caught:
                await client.videos.download_content(video.id, extra_headers={"Range": asked})
            assert (caught.value.status_code, caught.value.param) == (status, "Range")
        assert not [file for file in (tmp_path / "files").iterdir() if file.name.startswith("part-")]


async def test_progress_advances_with_steps(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, engine):
        engine.hold()
        video = await client.videos.create(prompt="a", extra_body={"num_inference_steps": 4})
        assert (video.status, video.progress, video.completed_at, video.expires_at) == ("queued", 0, None, None)
        assert (video.seconds, video.num_frames) == ("1.062", 17)  # the pipeline's own
        await engine.held()
        for step in range(1, 4):
            engine.release(1)
            await engine.held()
            response = await client.videos.with_raw_response.retrieve(video.id)
            video = response.parse()
            assert (video.status, video.progress, video.step) == ("in_progress", 25 * step, step)
            assert int(response.headers["openai-poll-after-ms"]) > 0
        (entry,) = (await client.get("/requests", cast_to=dict))["data"]
        assert (entry["id"], entry["step"]) == (video.id, 3)
        with pytest.raises(openai.NotFoundError, match="in_progress") as early:
            await client.videos.download_content(video.id)
        assert early.value.code == "video_not_ready"
        engine.release()
        assert (await client.videos.poll(video.id, **QUICK)).progress == 100


async def test_videos_are_listed_page_by_page(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, _):
        assert (await client.videos.list()).data == []
        ids = [(await client.videos.create(prompt=f"{place}")).id for place in range(5)]
        assert [video.id async for video in client.videos.list()] == ids[::-1]
        assert [video.id async for video in client.videos.list(limit=2, order="asc")] == ids
        page = await client.videos.list(limit=2, after=ids[3])
        assert ([video.id for video in page.data], page.has_more, page.last_id) == ([ids[2], ids[1]], True, ids[1])
        for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "video_0"}):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.videos.list(**wrong)
            assert caught.value.param == next(iter(wrong))


async def test_a_failure_is_told(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, engine):
        video = await client.videos.create_and_poll(prompt="fail here", **QUICK)
        assert (video.status, video.completed_at) == ("failed", None)
        assert (video.error.code, "fail here" in video.error.message) == ("generation_failed", True)
        with pytest.raises(openai.NotFoundError, match="fail here") as caught:
            await client.videos.download_content(video.id)
        assert caught.value.code == "video_failed"
        engine.hold()
        video = await client.videos.create(prompt="a", extra_body={"timeout": 0.01})
        late = await client.videos.poll(video.id, **QUICK)
        assert late.error.code == "deadline_exceeded"
        video = await client.videos.create(prompt="a")
        await client.delete(f"/requests/{video.id}", cast_to=dict)
        assert (await client.videos.poll(video.id, **QUICK)).error.code == "request_cancelled"


async def test_deleting_frees_the_slot_and_the_files(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, engine):
        done = await client.videos.create_and_poll(
            prompt="a", input_reference=file_of(Image.new("RGB", (8, 8))), **QUICK
        )
        engine.hold()
        video = await client.videos.create(prompt="a", input_reference=file_of(Image.new("RGB", (8, 8))))
        await engine.held()
        engine.release(1)
        await engine.held()
        for one in (video, done):
            answer = await client.videos.delete(one.id)
            assert (answer.id, answer.deleted, answer.object) == (one.id, True, "video.deleted")
        assert (await client.get("/requests", cast_to=dict))["data"] == []
        engine.release(2)
        await engine._core.idled()  # after the step in flight, and the one that tells the worker
        assert not engine._core.executor._resident
        for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
            with pytest.raises(openai.NotFoundError):
                await call(video.id)
        assert list((tmp_path / "files").iterdir()) == []
        assert (await client.videos.list()).data == []


async def test_a_picture_to_start_from(tmp_path: pathlib.Path) -> None:
    red = file_of(Image.new("RGB", (8, 8), "red"))
    link = "data:image/png;base64," + base64.b64encode(red).decode()
    seen: list[Any] = []
    async with video_client(tmp_path) as (client, engine):
        submit = engine._core.submit
        engine._core.submit = lambda request, *checked: seen.append(request) or submit(request, *checked)
        await client.videos.create(prompt="a", input_reference=("red.png", red))
        await client.videos.create(prompt="a", extra_body={"input_reference": {"image_url": link}})  # the form's a[b]
        await client.post("/videos", cast_to=dict, body={"prompt": "a", "input_reference": {"image_url": link}})
        assert [request.params["image"].getpixel((0, 0)) for request in seen] == [(255, 0, 0)] * 3
        for wrong in ("bm8gcGljdHVyZQ==", {"file_id": "file-1"}, {"image_url": "https://example.com/a.png"}):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.videos.create(prompt="a", extra_body={"input_reference": wrong})
            assert caught.value.param == "input_reference"
        vast = file_of(Image.new("1", (9000, 9000)))
        for wrong, why in ((b"no picture", "is no image"), (vast, "9000x9000 is more")):
            with pytest.raises(openai.BadRequestError, match=f"input_reference: .*{why}") as caught:
                await client.videos.create(prompt="a", input_reference=("a.png", wrong))
            assert caught.value.param == "input_reference"


async def test_a_remix_is_like_its_source(tmp_path: pathlib.Path) -> None:
    seen: list[Any] = []
    async with video_client(tmp_path) as (client, engine):
        submit = engine._core.submit
        engine._core.submit = lambda request, *checked: seen.append(request) or submit(request, *checked)
        picture = file_of(Image.new("RGB", (8, 8), "red"))
        asked = {"num_frames": 5, "fps": 4, "guidance_scale": 3.5, "lora": []}
        source = await client.videos.create_and_poll(
            prompt="a", size=SIZE, input_reference=picture, extra_body=asked, **QUICK
        )
        other = await client.videos.remix(source.id, prompt="b", extra_body={"seconds": "2"})
        assert other.remixed_from_video_id == source.id
        assert (other.prompt, other.seconds, other.size, other.num_frames) == ("b", "2", "32x64", 9)
        first, second = seen
        assert (first.seed, first.params["guidance_scale"]) == (second.seed, second.params["guidance_scale"])
        assert second.params["image"].getpixel((0, 0)) == (255, 0, 0)
        engine.hold()
        with pytest.raises(openai.BadRequestError, match="prompt"):
            await client.post(f"/videos/{source.id}/remix", body={}, cast_to=dict)
        unfinished = await client.videos.create(prompt="a")
        with pytest.raises(openai.BadRequestError, match="completed"):
            await client.videos.remix(unfinished.id, prompt="b")
        engine.release()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"size": "big"}, "size"),
    ({"size": "33x64"}, "size"),
    ({"width": 33}, "width"),
    ({"size": "64x64", "width": 32}, "size"),
    ({"seconds": "long"}, "seconds"),
    ({"seconds": "-1"}, "seconds"),
    ({"seconds": "1000"}, "seconds"),
    ({"num_frames": 5000}, "num_frames"),
    ({"seconds": "1", "num_frames": 5}, "seconds"),
    ({"fps": 0}, "fps"),
    ({"fps": 0.001}, "fps"),
    ({"num_inference_steps": 100000}, "num_inference_steps"),
    ({"guidance_scale": "much"}, "guidance_scale"),
    ({"true_cfg_scale": 2.0}, "true_cfg_scale"),
    ({"n": 2}, "n"),
    ({"secnods": "4"}, "secnods"),
    ({"image": "x"}, "image"),
    ({"lora": "ink"}, "lora"),
    ({"timeout": 0}, "timeout"),
    ({"seed": "x"}, "seed"),
]


@pytest.mark.slow
async def test_what_is_wrong_is_named_and_nothing_is_kept(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, _):
        for asked, param in WRONG:
            with pytest.raises(openai.BadRequestError) as form:
                await client.videos.create(prompt="a", extra_body=asked)
            with pytest.raises(openai.BadRequestError) as json:
                await client.post("/videos", cast_to=dict, body={"prompt": "a", **asked})
            assert (form.value.param, json.value.param) == (param, param)
        with pytest.raises(openai.NotFoundError):
            await client.videos.create(prompt="a", model="sora-2")
        assert (await client.videos.list()).data == []


async def test_what_is_not_made_is_refused(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, _):
        video = await client.videos.create_and_poll(prompt="a", **QUICK)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.videos.download_content(video.id, variant="sound")
        assert caught.value.param == "variant"
        for call in (
            client.videos.edit(prompt="a", video=b"x"),
            client.videos.extend(prompt="a", seconds="4", video=b"x"),
            client.videos.create_character(name="a", video=b"x"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await call
            assert caught.value.param == "video"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.generate(prompt="a")
        assert (caught.value.param, caught.value.code) == ("model", "unsupported_model")
        async with httpx2.AsyncClient(base_url=str(client.base_url)) as plain:
            assert (await plain.put("videos")).status_code == 405
