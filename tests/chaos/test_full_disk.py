"""A disk without room: what has to be stored is refused or fails with the reason, all else goes on, and it recovers.

The kernel refuses for real: no file of this process may grow (``RLIMIT_FSIZE``), as it would on a disk that is full.
"""

from __future__ import annotations

import contextlib
import pathlib
import resource
from collections.abc import Generator

import openai
import pytest
from serving import video_client

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]
QUICK = {"poll_interval_ms": 1}


@contextlib.contextmanager
def no_room(most: int = 0) -> Generator[None]:
    """No file of this process may have more bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_videos_that_cannot_be_stored_fail_and_the_next_ones_do_not(tmp_path: pathlib.Path) -> None:
    async with video_client(tmp_path) as (client, engine):
        before = await client.videos.create_and_poll(prompt="before", **QUICK)
        engine.hold()
        begun = await client.videos.create(prompt="begun while there was room")
        await engine.held()
        with no_room():
            with pytest.raises(openai.InternalServerError, match="cannot be stored") as caught:
                await client.with_options(max_retries=0).videos.create(prompt="refused")
            assert caught.value.status_code == 503
            assert caught.value.code == "storage_failed"
            engine.release()
            lost = await client.videos.poll(begun.id, **QUICK)
            assert lost.status == "failed"
            assert lost.error is not None
            assert (await client.videos.download_content(before.id)).content, "what is there can be read"
        after = await client.videos.create_and_poll(prompt="after", **QUICK)
        assert after.status == "completed"
    files = {path.name.partition(".")[0] for path in (tmp_path / "files").iterdir()}
    assert files == {before.id, after.id}, "no half a file is left"
    async with video_client(tmp_path) as (client, _):
        again = await client.videos.poll(begun.id, **QUICK)
        assert again.status == "completed", "that it failed could not be stored either: so it is made after all"
        assert [video.id async for video in client.videos.list(order="asc")] == [before.id, begun.id, after.id]
