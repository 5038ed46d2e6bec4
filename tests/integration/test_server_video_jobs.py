"""Jobs of ``/v1/videos``: what outlives a server, whose they are, how many there may be, and for how long."""

from __future__ import annotations

import pathlib
from typing import Any

import anyio
import openai
import pytest
from serving import listening, sdk, video_client
from starlette.applications import Starlette
from starlette.routing import Mount

from steploom import ConfigError
from steploom.server import create_app
from steploom.server.videos.job import Job
from steploom.server.videos.store import VideoStore, folder_for
from steploom.server.videos.work import MAX_ATTEMPTS
from steploom.testing import FakeEngine

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")
QUICK = {"poll_interval_ms": 1}


async def test_jobs_outlive_their_server(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, engine):
        done = await client.videos.create_and_poll(prompt="a", **QUICK)
        data = (await client.videos.download_content(done.id)).content
        failed = await client.videos.create_and_poll(prompt="fail", **QUICK)
        engine.hold()
        begun = await client.videos.create(prompt="b", extra_body={"num_frames": 5})
        await engine.held()
        engine.release(1)
        await engine.held()
        waiting = await client.videos.create(prompt="c", extra_body={"num_frames": 5})
        engine.release()
        engine.hold()
    async with video_client(tmp_path) as (client, _):
        listed = [video.id async for video in client.videos.list(order="asc")]
        assert listed == [done.id, failed.id, begun.id, waiting.id]
        again = await client.videos.retrieve(done.id)
        assert again.to_dict() == done.to_dict()
        assert (await client.videos.download_content(done.id)).content == data
        for video in (begun, waiting):
            made = await client.videos.poll(video.id, **QUICK)
            assert (made.status, made.seed, made.created_at) == ("completed", video.seed, video.created_at)
    async with video_client(tmp_path) as (client, _):
        assert {video.status async for video in client.videos.list()} == {"completed", "failed"}


async def test_a_job_is_not_begun_for_ever(tmp_path: pathlib.Path) -> None:
    """Ends that are announced do not count; those that are not, do."""
    ids = []
    async with video_client(tmp_path) as (client, engine):
        engine.hold()
        ids += [(await client.videos.create(prompt="a")).id for _ in range(3)]
    stored = VideoStore(tmp_path)
    jobs = stored.open()
    assert [job.attempts for job in jobs] == [0, 0, 0]
    jobs[0].attempts, jobs[1].attempts, jobs[2].model = MAX_ATTEMPTS - 1, MAX_ATTEMPTS, "another"
    stored.put(*jobs)
    stored.close()
    async with video_client(tmp_path) as (client, _):
        last, many, other = [await client.videos.poll(name, **QUICK) for name in ids]
        assert last.status == "completed"
        assert (many.status, many.error.code) == ("failed", "interrupted")
        assert (other.status, other.error.code) == ("failed", "model_not_found")


async def test_what_a_killed_server_leaves_half_done_is_dropped(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, _):
        video = await client.videos.create_and_poll(prompt="a", **QUICK)
    files = tmp_path / "files"
    for name in (f"part-{video.id}.mp4", "video_0.mp4"):
        (files / name).write_bytes(b"half")
    (files / "mine.txt").write_text("not the server's")
    stored = VideoStore(tmp_path)
    (job,) = stored.open()  # killed between the file's name and the job's
    job.status = "queued"
    stored.put(job)
    stored.close()
    async with video_client(tmp_path) as (client, _):
        assert (await client.videos.poll(video.id, **QUICK)).status == "completed"
        await client.videos.download_content(video.id)
    assert sorted(file.name for file in files.iterdir()) == sorted(
        ["mine.txt", *(f"{video.id}{ending}" for ending in (".mp4", ".webp", ".jpg"))]
    )


async def test_a_folder_belongs_to_one_server_and_its_user(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "deep" / "videos"
    async with video_client(folder):
        assert [path.stat().st_mode & 0o077 for path in (folder, folder / "files", folder / "jobs.sqlite3")] == [
            0,
            0,
            0,
        ]
        with pytest.raises(ConfigError, match="another server"):
            async with video_client(folder):
                pass
    async with video_client(folder):
        pass
    stored = VideoStore(folder)
    stored.open()
    assert stored._database is not None
    stored._database.execute("PRAGMA user_version = 99")
    stored.close()
    with pytest.raises(ConfigError, match="later version"):
        stored.open()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        VideoStore(tmp_path / "file").open()


def test_the_folder_follows_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    one, other = folder_for("./models/wan"), folder_for("owner/wan")
    assert one != other
    assert one.parent == other.parent == pathlib.Path("/state/steploom/videos")
    assert one.name.startswith("wan-")


async def test_a_key_sees_its_own_jobs(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path, api_keys=("one", "two")) as (client, _):
        one, two = client.with_options(api_key="one"), client.with_options(api_key="two")
        video = await one.videos.create_and_poll(prompt="a", **QUICK)
        assert [found.id async for found in one.videos.list()] == [video.id]
        assert (await two.videos.list()).data == []
        for call in (two.videos.retrieve, two.videos.delete, two.videos.download_content):
            with pytest.raises(openai.NotFoundError):
                await call(video.id)
        with pytest.raises(openai.NotFoundError):
            await two.videos.remix(video.id, prompt="b")
        with pytest.raises(openai.AuthenticationError):
            await client.videos.list()
        assert b"one" not in (tmp_path / "jobs.sqlite3").read_bytes()
    async with video_client(tmp_path) as (client, _):
        assert (await client.videos.list()).data == []


async def test_a_retried_create_is_the_same_job(tmp_path: pathlib.Path) -> None:
    key: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "k"}}
    async with video_client(tmp_path) as (client, _):
        ids: list[str] = []

        async def ask() -> None:
            ids.append((await client.videos.create(prompt="a", **key)).id)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
        await client.videos.poll(ids[0], **QUICK)
    async with video_client(tmp_path) as (client, _):
        ids.append((await client.videos.create(prompt="a", **key)).id)
        assert len(set(ids)) == len((await client.videos.list()).data) == 1
        with pytest.raises(openai.UnprocessableEntityError):
            await client.videos.create(prompt="b", **key)
        await client.videos.delete(ids[0])
        assert (await client.videos.create(prompt="b", **key)).id != ids[0]


async def test_there_may_be_so_many(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path, max_videos=3, max_unfinished_videos=2) as (client, engine):
        done = [(await client.videos.create_and_poll(prompt="a", **QUICK)).id for _ in range(4)]
        assert [video.id async for video in client.videos.list(order="asc")] == done[1:]
        engine.hold()
        new = [(await client.videos.create(prompt="a")).id for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            await client.videos.create(prompt="a")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert [video.id async for video in client.videos.list(order="asc")] == [done[-1], *new]
        assert len(list((tmp_path / "files").glob("*.mp4"))) == 1
        await client.videos.delete(new[0])
        await client.videos.create(prompt="a")


async def test_a_full_queue_of_the_engine_is_told(tmp_path: pathlib.Path) -> None:
    limits = {"max_waiting": 1, "max_batch": 1, "max_resident": 1}
    async with video_client(tmp_path, engine=limits) as (client, engine):
        engine.hold()
        await client.videos.create(prompt="a")
        await engine.held()
        await client.videos.create(prompt="a")
        with pytest.raises(openai.RateLimitError, match="max_waiting"):
            await client.videos.create(prompt="a")
        assert len((await client.videos.list()).data) == 2


async def test_there_may_be_so_many_bytes(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, _):
        first = await client.videos.create_and_poll(prompt="a", **QUICK)
    size = sum(file.stat().st_size for file in (tmp_path / "files").iterdir())
    async with video_client(tmp_path, max_video_bytes=size + size // 2) as (client, _):
        second = await client.videos.create_and_poll(prompt="a", **QUICK)
        assert [video.id async for video in client.videos.list()] == [second.id]
        assert first.id not in {file.stem for file in (tmp_path / "files").iterdir()}
    async with video_client(tmp_path / "less", max_video_bytes=size // 2) as (client, _):
        large = await client.videos.create_and_poll(prompt="a", **QUICK)
        assert (large.status, large.error.code) == ("failed", "too_large")
        assert list((tmp_path / "less" / "files").iterdir()) == []


async def test_videos_expire_by_themselves(tmp_path: pathlib.Path) -> None:
    async with FakeEngine(makes="videos") as engine:
        app = create_app(engine, video_dir=tmp_path, video_ttl_s=0.3)
        async with app.state.server, listening(app) as address, sdk(address) as client:
            removed = anyio.Event()
            shelf = app.state.server.videos.shelf
            drop = shelf.drop

            async def told(jobs: list[Job]) -> None:
                await drop(jobs)
                if jobs:
                    removed.set()

            shelf.drop = told
            video = await client.videos.create_and_poll(prompt="a", **QUICK)
            with anyio.fail_after(30):
                await removed.wait()
            with pytest.raises(openai.NotFoundError):
                await client.videos.retrieve(video.id)
            assert list((tmp_path / "files").iterdir()) == []


async def test_a_mounted_server_is_held_by_its_host(tmp_path: pathlib.Path) -> None:
    async with FakeEngine(makes="videos") as engine:
        inner = create_app(engine, video_dir=tmp_path)
        host = Starlette(routes=[Mount("/art", inner)])
        async with listening(host) as address, sdk(f"{address}/art") as client:
            for call in (client.videos.create(prompt="a"), client.videos.list(), client.videos.retrieve("video_0")):
                with pytest.raises(openai.InternalServerError, match=r"app\.state\.server") as caught:
                    await call
                assert (caught.value.status_code, caught.value.code) == (503, "not_started")
            async with inner.state.server:
                assert (await client.videos.create_and_poll(prompt="a", **QUICK)).status == "completed"


async def test_the_applications_own_lifespan_holds_all(tmp_path: pathlib.Path) -> None:
    engine = FakeEngine(makes="videos")
    app = create_app(engine, video_dir=tmp_path)
    async with app.router.lifespan_context(app), listening(app) as address, sdk(address) as client:
        assert (await client.videos.create_and_poll(prompt="a", **QUICK)).status == "completed"
    assert engine._core is not None
    assert engine._core.ended.is_set()


async def test_a_model_without_videos_says_so(tmp_path: pathlib.Path) -> None:
    async with FakeEngine() as engine:
        app = create_app(engine, video_dir=tmp_path / "none")
        async with app.state.server, listening(app) as address, sdk(address) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.videos.create(prompt="a")
            assert (caught.value.param, caught.value.code) == ("model", "unsupported_model")
            assert (await client.videos.list()).data == []
    assert not (tmp_path / "none").exists()
