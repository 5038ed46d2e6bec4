"""Job: one video that was asked for, as it is stored, and as clients see it."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import Any

from steploom import DiffusionRequest, SteploomError
from steploom.server.errors import error_object

PREFIX = "video_"
UNFINISHED = "queued"
"""The stored status of whatever is not done: what a process that died was doing with it means nothing any more."""


@dataclasses.dataclass(kw_only=True)
class Job:
    """One video that was asked for.

    Attributes:
        id: Names the job, its request of the engine, and its files.
        owner: Digest of the API key that asked for it; None without keys.
        key: Digest of its ``Idempotency-Key``.
        body: Digest of what was asked for with that key.
        model: As clients call it.
        prompt: What to draw.
        arguments: Of the request of the engine: fields of ours, and the pipeline's arguments.
        given: What the client said, for remixes.
        pictured: Whether it starts from a picture, which is stored beside it.
        size: ``WIDTHxHEIGHT``, or ``auto`` until that is known.
        seconds: Its length, as text; empty until that is known.
        fps: Frames per second.
        frames: How many; None until that is known.
        remixed_from: Id of the job that this one is a remix of.
        attempts: How often it was begun, but for ends that were announced.
        status: ``queued``, ``completed`` or ``failed``.
        created: Unix time; ``completed`` and ``expires`` likewise, once it is done.
        bytes: Size of its files.
        error: Why it failed: ``code``, ``message``, ``param``, ``type``.
    """

    id: str = dataclasses.field(default_factory=lambda: f"{PREFIX}{uuid.uuid4().hex}")
    owner: str | None = None
    key: str | None = None
    body: str | None = None
    model: str = ""
    prompt: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    given: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    pictured: bool = False
    size: str = "auto"
    seconds: str = ""
    fps: float = 16.0
    frames: int | None = None
    remixed_from: str | None = None
    attempts: int = 0
    status: str = UNFINISHED
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    expires: float | None = None
    bytes: int = 0
    error: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status != UNFINISHED

    def request(self, picture: bytes | None) -> DiffusionRequest:
        """The request of the engine, the same at every attempt."""
        arguments = dict(self.arguments)
        arguments["lora"] = [tuple(entry) for entry in arguments.get("lora") or ()] or None
        if picture is not None:
            arguments["image"] = picture
        return DiffusionRequest(self.prompt, **arguments, request_id=self.id)

    def completed_as(self, size: tuple[int, int], frames: int, written: int, ttl_s: float) -> Job:
        """The job once its video is there.

        Args:
            size: Width and height.
            frames: How many.
            written: Bytes of its files.
            ttl_s: Seconds that they stay.
        """
        now = time.time()
        return dataclasses.replace(
            self, status="completed", completed=int(now), expires=now + ttl_s, size=f"{size[0]}x{size[1]}",
            frames=frames, seconds=self.seconds or f"{round(frames / self.fps, 3):g}", bytes=self.bytes + written,
        )  # fmt: skip

    def failed_for(self, error: Exception, ttl_s: float) -> Job:
        """The job once it is known that there will be no video; what is known of it stays for ``ttl_s`` seconds."""
        return dataclasses.replace(
            self, status="failed", expires=time.time() + ttl_s, error=_told(error), bytes=0, pictured=False
        )

    def text(self) -> str:
        """All of it as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Job:
        """What :meth:`text` has written, by this version or another one."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def shown(self, step: int = 0, total: int | None = None) -> dict[str, Any]:
        """OpenAI's ``Video``; ``seed``, ``num_frames``, ``fps``, ``step`` and ``num_inference_steps`` are ours.

        Args:
            step: Steps done so far, if it runs.
            total: Steps in all, if known.
        """
        status, progress = self.status, 100 if self.status == "completed" else 0
        if not self.finished and step:
            status = "in_progress"
            progress = min(99, 100 * step // total) if total else 0
        return {
            "id": self.id, "object": "video", "created_at": self.created, "completed_at": self.completed,
            "expires_at": None if self.expires is None else int(self.expires), "model": self.model,
            "prompt": self.prompt, "status": status, "progress": progress, "seconds": self.seconds, "size": self.size,
            "error": self.error, "remixed_from_video_id": self.remixed_from, "seed": self.arguments.get("seed"),
            "num_frames": self.frames, "fps": self.fps, "step": step, "num_inference_steps": total,
        }  # fmt: skip


def _told(error: Exception) -> dict[str, Any]:
    """``error`` as OpenAI's ``VideoCreateError``, whose code is always there."""
    told = error_object(error)
    if isinstance(error, OSError) and not isinstance(error, SteploomError):
        told |= {"message": f"the video could not be stored: {error.strerror}", "code": "storage_failed"}
    return {**told, "code": told["code"] or "server_error"}
