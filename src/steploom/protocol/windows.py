"""Videos that are made in windows, one after another, each with all of the request's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from steploom.protocol.pictures import FRAMES
from steploom.protocol.pipeline import PipelineInfo

_DEFAULTS = {
    "base_num_frames": 97, "latent_window_size": 9, "num_latent_frames_per_chunk": 9, "segment_frame_length": 77,
    "prev_segment_conditioning_frames": 1, "temporal_tile_size": 80, "temporal_overlap": 24,
}  # fmt: skip
"""Of diffusers' pipelines, of which ``PipelineInfo`` does not tell them."""
_POSES = "pose_video"
"""What Wan's Animate makes as many frames as."""
_STEPS, _STEPS_LIST = "num_inference_steps", "pyramid_num_inference_steps_list"
"""Arguments that say how many steps a window takes: Helios' pyramid has some for each of its stages."""


class Windows(NamedTuple):
    """How a video is made.

    Attributes:
        times: In so many windows.
        steps: The steps that each takes.
        frames: The argument that says how long the video is.
        size: The one that says how long a window is.
    """

    times: int
    steps: int
    frames: str
    size: str


def windows(params: Mapping[str, Any], info: PipelineInfo) -> Windows | None:
    """In how many windows a request's video is made; None of one that is made as a whole, or nobody knows."""
    known = {parameter.name for parameter in info.parameters}

    def said(name: str) -> int:
        value = params.get(name)
        value = _DEFAULTS.get(name, 0) if value is None and name in known else value
        return value if isinstance(value, int) else 0

    of = _POSES if _POSES in known else FRAMES[0]
    poses: Any = params.get(_POSES)
    frames = len(cast("list[Any]", poses)) if isinstance(poses, (list, tuple)) else said(of) or info.default_frames or 0
    for size, how_many in _COUNTS.items():
        if said(size) > 0 and (size in params or size in known):
            times = how_many(frames, said, info.frame_multiple)
            return Windows(times, _steps_of_each(params, info), of, size) if times > 1 else None
    return None


def _steps_of_each(params: Mapping[str, Any], info: PipelineInfo) -> int:
    listed: Any = params.get(_STEPS_LIST)
    if isinstance(listed, (list, tuple)):
        return sum(steps for steps in cast("list[Any]", listed) if isinstance(steps, int))
    steps = params.get(_STEPS) or info.default_steps
    return steps if isinstance(steps, int) else 1


_Said = Callable[[str], int]


def _forced(frames: int, said: _Said, each: int) -> int:
    """SkyReels' diffusion forcing: windows that share latents with the one before."""
    overlap, window = said("overlap_history"), said("base_num_frames")
    if not overlap or frames <= window:
        return 1
    latents, shared, whole = ((one - 1) // each + 1 for one in (frames, overlap, window))
    return 2 + (latents - whole - 1) // (whole - shared) if whole > shared else 1  # which is an error of its own


def _continued(size: str) -> Callable[[int, _Said, int], int]:
    """Framepack and Helios: each window has frames of its own, and looks back at a history of all others."""
    return lambda frames, said, each: -(-frames // ((said(size) - 1) * each + 1))


def _animated(frames: int, said: _Said, each: int) -> int:
    """Wan's Animate: segments that begin with frames of the one before, which are not made again."""
    shared, segment = said("prev_segment_conditioning_frames"), said("segment_frame_length")
    segment = segment if segment % each == 1 else segment // each * each + 1
    return -(-(frames - shared) // (segment - shared)) if segment > shared else 1


def _tiled(frames: int, said: _Said, each: int) -> int:
    """LTX's long videos: tiles of latents that overlap."""
    latents = (frames - 1) // each + 1
    window, overlap = max(1, said("temporal_tile_size") // each), said("temporal_overlap") // each
    return 1 + -(-max(0, latents - window) // max(1, window - overlap))


_COUNTS: dict[str, Callable[[int, _Said, int], int]] = {
    "base_num_frames": _forced,
    "latent_window_size": _continued("latent_window_size"),
    "num_latent_frames_per_chunk": _continued("num_latent_frames_per_chunk"),
    "segment_frame_length": _animated,
    "temporal_tile_size": _tiled,
}
