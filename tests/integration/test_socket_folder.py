"""The folder of the sockets: it may be removed, fill up, or be seen by a fork that ends."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from processes import content

from steploom.config import EngineConfig
from steploom.errors import EngineError
from steploom.executor import MultiprocExecutor, multiproc, process

pytestmark = pytest.mark.usefixtures("temporary")

TESTS = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="its file names are text")


class Scripted(MultiprocExecutor):
    runner = "scripted_runner:make"


@pytest.mark.parametrize("how", ["removed", "replaced by another's"])
async def test_a_socket_folder_that_a_cleaner_has_removed_is_made_anew(
    temporary: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as private as a folder for sockets has to be (0700), and none
    executor = Scripted(EngineConfig())
    await executor.start()
    try:
        (folder,) = content(temporary)
        shutil.rmtree(folder)
        if how != "removed":
            folder.mkdir(mode=0o777)
            folder.chmod(0o777)
        await executor.add_worker()
        os.kill(await executor.collective_rpc("pid", unique_reply_rank=0), signal.SIGKILL)
        executor.discard(await executor.wait_failed())
        await executor.recover()
        assert await executor.collective_rpc("ping") == ["pong", "pong"]
        (new,) = [path for path in content(temporary) if path != folder]
        assert stat.S_IMODE(new.stat().st_mode) == 0o700
    finally:
        await executor.shutdown()
    assert [path for path in content(temporary) if path != folder] == []


@pytest.mark.parametrize("name", ["l" * 90, "tab\t", "line\nbreak", pytest.param("\udcff", marks=LINUX)], ids=ascii)
def test_a_place_whose_path_no_socket_can_have_is_not_taken(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (temporary / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / name))
    folder = Path(multiproc._private_folder())
    try:
        assert folder.parent == Path("/tmp")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert content(temporary / name) == []
    finally:
        folder.rmdir()
        (temporary / name).rmdir()


async def test_where_no_socket_can_be_made_that_is_an_engine_error(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    executor = Scripted(EngineConfig())
    await executor.start()
    shutil.rmtree(*content(temporary))
    with monkeypatch.context() as patch:
        patch.setattr(multiproc, "_is_private", lambda folder: True)  # it is removed just after that was asked
        with pytest.raises(EngineError, match=r"no socket can be made for worker 1: No such file.*TMPDIR"):
            await executor.add_worker()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary / "gone"))
        with pytest.raises(EngineError, match=r"no socket can be made for worker 1: .*No such file.*TMPDIR"):
            await executor.add_worker()
    with monkeypatch.context() as patch:
        patch.setattr(process.WorkerProcess, "spawn", _full)
        with pytest.raises(EngineError, match=r"worker 1 could not be started: .*Too many open files"):
            await executor.add_worker()
    await executor.add_worker()
    assert await executor.collective_rpc("ping") == ["pong", "pong"]
    await executor.shutdown()


def _full(self: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.slow
def test_a_fork_that_ends_leaves_the_socket_folder_alone(temporary: Path) -> None:
    script = """
        import asyncio, gc, os, sys, weakref
        from test_socket_folder import Scripted
        from steploom.config import EngineConfig

        async def main():
            executor = Scripted(EngineConfig())
            await executor.start()
            child = os.fork()
            if child == 0:
                weakref.finalize._exitfunc()  # as at the end of any process; asyncio.run is not to end its loop here
                os._exit(0)
            os.waitpid(child, 0)
            print(len(os.listdir(os.environ["TMPDIR"])))
            await executor.shutdown()
            print(len(os.listdir(os.environ["TMPDIR"])))
            forgotten = Scripted(EngineConfig())
            await forgotten.start()
            os.kill(*await forgotten.collective_rpc("pid"), 9)  # else it would remove what nobody needs any more
            await forgotten.wait_failed()

        asyncio.run(main())
    """
    path = os.pathsep.join([str(TESTS), str(TESTS / "integration"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["1", "0"], done.stderr
    assert content(temporary) == []
