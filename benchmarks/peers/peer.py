"""Our side of a peer: its process, and what is said to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]


class PeerError(Exception):
    """A peer could not do what it was told, or is gone."""


class Peer:
    """A peer's process; use it as a context manager.

    Args:
        name: As reports call it.
        driver: Module of its driver (``"peers.drive_pipe"``), or its folder is on ``paths``.
        interpreter: Python of the environment that it is installed in; None is this one.
        paths: Where its modules are, besides this folder.
        log: Where its libraries' output goes; None is our stderr.

    Raises:
        PeerError: There is no such interpreter.
    """

    def __init__(
        self, name: str, driver: str, interpreter: str | None = None, paths: tuple[str, ...] = (),
        log: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self._log = name, None if log is None else log.open("w")
        own = os.environ.get("PYTHONPATH", "") if interpreter is None else ""  # ours are not theirs
        folders = [str(FOLDER), *paths, *filter(None, own.split(os.pathsep))]
        try:
            self._process = subprocess.Popen(
                [interpreter or sys.executable, "-m", "peers.speak", driver],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            )  # fmt: skip
        except OSError as fault:
            if self._log is not None:
                self._log.close()
            raise PeerError(f"{name}: {interpreter} cannot be run: {fault}") from None
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(hurry=error is not None)

    def start(self, checkpoint: str, settings: dict[str, Any]) -> None:
        """Loads the checkpoint.

        Raises:
            PeerError: It cannot.
        """
        self.versions = self._ask({"do": "start", "checkpoint": checkpoint, "settings": settings})["versions"]

    def run(self, requests: list[dict[str, Any]], keep: Path | None = None) -> list[dict[str, Any]]:
        """Runs a workload: one result for each request, in order.

        Args:
            requests: As :class:`peers.workload.Item` has them.
            keep: Folder for the latents; None drops them.

        Raises:
            PeerError: The peer as a whole failed.
        """
        return self._ask({"do": "run", "requests": requests, "keep": None if keep is None else str(keep)})["results"]

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self.name}: its process ended with status {self._process.wait()} during {order['do']!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self.name}: {order['do']!r} failed: {reply['error']}")
        return reply["ok"]

    def close(self, *, hurry: bool = False) -> None:
        """Ends the process: politely, or at once if ``hurry``. Idempotent."""
        if self._process.poll() is None:
            if hurry:
                self._process.terminate()
            else:
                self._say_stop()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def _say_stop(self) -> None:
        try:
            self._ask({"do": "stop"})
        except PeerError:
            self._process.terminate()
