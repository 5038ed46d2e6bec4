"""What comes out of the engine: outputs and where their time went. Plain data, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from steploom import media
from steploom.errors import SteploomError


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one request went, in seconds.

    ``queued_s`` ends when the worker turns to the first tick of the request. What is in none of the parts are ticks of
    other groups meanwhile, and the way to and from the worker.

    ``mean_batch_requests`` is how many requests shared its denoiser calls on average, itself included. Of its
    ``steps``, ``skipped_steps`` were answered by its step cache: they made no denoiser call, and count in no average.
    """

    queued_s: float = 0.0
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    steps: int = 0
    skipped_steps: int = 0
    mean_batch_requests: float = 0.0


_VIEWS = {
    "images": ("images", "image"),
    "videos": ("frames", "videos", "video"),
    "audios": ("audios", "audio", "sound"),
    "text": ("texts", "text"),
}
"""What the fields of pipelines' outputs are called, by what they hold."""


class DiffusionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one request.

    Attributes:
        request_id: The request's id.
        seed: The seed that was used; None where a ``generator`` was given.
        output: What the pipeline returned, with the fields that it has in diffusers; None if ``error`` is set.
        output_type: As the request asked for: ``"pil"``, ``"latent"``...; None where that is not known.
        timings: Where the time went.
        trajectory_latents: With ``return_trajectory``: latents after each step ``[steps, rows, ...]``.
        trajectory_timesteps: With ``return_trajectory``: the timestep of each step ``[steps]``.
        frame_rate: Frames per second of its videos, as asked for or as the pipeline has it; None where nobody says.
        sampling_rate: Samples per second of its sound; None where there is none.
        texts: A language model's text, per row, where ``output`` has only its tokens.
        generator_states: The states, uint8 ``[bytes]``, that the given generators have now; None without any.
        error: Why there is no output; set only where whole requests are answered (``DiffusionEngine.step``,
            ``execute_model``); ``generate`` raises it instead.
    """

    request_id: str
    seed: int | None = None
    output: Any = None
    output_type: str | None = None
    timings: Timings = Timings()
    trajectory_latents: Any = None
    trajectory_timesteps: Any = None
    frame_rate: float | None = None
    sampling_rate: int | None = None
    texts: list[str] | None = None
    generator_states: Any = None
    error: SteploomError | None = None

    def _view(self, kind: str) -> Any:
        value = self._find(kind)
        if value is not None:
            return value
        there = [other for other in _VIEWS if self.has(other)]
        mend = f"it has {' and '.join(f'.{other}' for other in there)}" if there else "look at .output"
        raise AttributeError(f"request {self.request_id} made {type(self.output).__name__}, without {kind}; {mend}")

    def has(self, kind: str) -> bool:
        """Whether the pipeline made ``"images"``, ``"videos"``, ``"audios"`` or ``"text"``."""
        return self._find(kind) is not None

    def _find(self, kind: str) -> Any:
        value = _first(self.output, _VIEWS[kind])
        return self.texts if value is None and kind == "text" else value

    @property
    def images(self) -> Any:
        """The pipeline's images (PIL images with ``output_type="pil"``)."""
        return self._view("images")

    @property
    def videos(self) -> Any:
        """The pipeline's frames, one list of frames per video (an array or tensor with another ``output_type``)."""
        frames = self._view("videos")
        return [frames] if isinstance(frames, list) and _is_picture(next(iter(frames), None)) else frames  # pyright: ignore

    @property
    def audios(self) -> Any:
        """The pipeline's waveforms, ``[sounds, channels, samples]`` or ``[sounds, samples]``."""
        return self._view("audios")

    @property
    def text(self) -> Any:
        """The pipeline's text: a str, of a request of several rows a list of them."""
        texts = self._view("text")
        return texts[0] if isinstance(texts, (list, tuple)) and len(texts) == 1 else texts  # pyright: ignore

    def save(
        self, path: str | Path, *, frame_rate: float | None = None, sampling_rate: int | None = None
    ) -> list[Path]:
        """Saves images, videos, sound or text: the ending of the name says what, and in which format.

        It takes time and blocks: in an application, ``await anyio.to_thread.run_sync(out.save, "out.mp4")``. A video
        that has sound is saved with it.

        Args:
            path: Where to; several images, videos or sounds are numbered ``path-1``, ``path-2`` and so on.
            frame_rate: Frames per second; None takes :attr:`frame_rate`, else 16.
            sampling_rate: Samples per second; None takes :attr:`sampling_rate`.

        Returns:
            The files that were written.

        Raises:
            ConfigError: The ending names no format or does not fit what there is, it is latents, nothing runs at such a
                rate, or a package is missing.
            OSError: A file cannot be written, as on a full disk; what was there under its name stays.
        """
        return media.save(self, path, frame_rate=frame_rate, sampling_rate=sampling_rate)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "mode") and hasattr(value, "getpixel")


def _first(output: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)
