"""ServerSettings: what a server allows, and whom."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from steploom.errors import ConfigError

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of :func:`steploom.server.create_app`.

    Attributes:
        api_keys: A request under ``/v1`` must bring one of these as ``Authorization: Bearer KEY``; none: anybody may.
        admin_keys: Whoever brings one of these may pause, drain, put to sleep and reload the engine, under ``/admin``;
            none: there is no ``/admin``.
        model_names: What clients call the model; none: the name or path that the engine was given.
        on_disconnect: What becomes of a request whose client has hung up: it is cancelled, or kept.
        linger_s: Seconds that a request with an ``Idempotency-Key`` waits for its client to come back.
        max_images: Images of one request (``n``), at most.
        max_body_bytes: Size of a request's body, at most.
        body_timeout_s: Seconds in which a body must arrive.
        stream_silence_s: Seconds of silence after which a stream says that it lives, lest a proxy takes it for dead.
        max_prompt_chars: Length of a prompt, or of all messages together, at most.
        max_choices: Texts of one request (``n`` times its prompts), at most.
        previews: Whether streams have previews; without them they have the finished images only.
        default_timeout_s: ``timeout`` of requests that give none; None is no limit.
        cors_origins: Web pages of these origins may use the server from a browser; ``"*"`` is any.
        stored_images: Images that ``response_format="url"`` keeps in memory, at most, for ``stored_s``.
        stored_s: Seconds.
        video_dir: Folder of ``/v1/videos``; None is one for this model among the user's states
            (``$XDG_STATE_HOME/steploom/videos``). One server at a time may use it.
        video_ttl_s: Seconds that a video stays once it is done.
        max_videos: Videos that are stored, at most; the oldest finished ones make room.
        max_video_bytes: Size of all their files, likewise.
        max_unfinished_videos: Videos that wait or run, at most; one more is a 429.
        page: Whether there is a page at ``/``, and what feeds it.
        max_watchers: Pages that are open at once, at most.
        watcher_idle_s: Seconds without work after which the connection of a page ends, and it opens the next.
        scrape_timeout_s: Seconds that ``/metrics`` waits for workers that are in a tick.
    """

    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    admin_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    model_names: tuple[str, ...] = ()
    on_disconnect: Literal["cancel", "keep"] = "cancel"
    linger_s: float = 10.0
    max_images: int = 10
    max_body_bytes: int = 64 * MIB
    body_timeout_s: float = 120.0
    stream_silence_s: float = 15.0
    max_prompt_chars: int = 32_000
    max_choices: int = 32
    previews: bool = True
    default_timeout_s: float | None = None
    cors_origins: tuple[str, ...] = ()
    stored_images: int = 128
    stored_s: float = 3600.0
    video_dir: str | Path | None = None
    video_ttl_s: float = 24 * 3600.0
    max_videos: int = 1000
    max_video_bytes: int = 20 * 1024 * MIB
    max_unfinished_videos: int = 100
    page: bool = True
    max_watchers: int = 64
    watcher_idle_s: float = 20.0
    scrape_timeout_s: float = 0.2

    def __post_init__(self) -> None:
        for name in ("max_images", "max_body_bytes", "body_timeout_s", "max_prompt_chars", "max_choices",
                     "stored_images", "stored_s", "video_ttl_s", "max_videos", "max_video_bytes",
                     "max_unfinished_videos", "max_watchers", "stream_silence_s", "watcher_idle_s",
                     "scrape_timeout_s"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be greater than 0")
        if self.on_disconnect not in ("cancel", "keep"):
            raise ConfigError(f"on_disconnect={self.on_disconnect!r}: must be 'cancel' or 'keep'")
        for name in ("api_keys", "admin_keys"):
            if any(not key or key != key.strip() for key in getattr(self, name)):
                raise ConfigError(f"{name}: a key must not be empty, nor begin or end with white space")
