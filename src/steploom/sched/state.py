"""What the scheduler remembers about one live request, and the first guess at its batch key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from steploom.requests import DiffusionRequest, Timings

Clock = Callable[[], float]
"""Returns seconds from any fixed origin; never runs backwards. ``time.monotonic`` outside of tests."""

SIZE_PARAMS = frozenset(
    ("height", "width", "resolution", "num_frames", "video_length", "max_sequence_length", "audio_length_in_s",
     "audio_end_in_s")
)  # fmt: skip
"""Pipeline arguments that decide the shape of the denoiser's input, under diffusers' own names."""


def guess_key(request: DiffusionRequest) -> str:
    """A batch key from what is known before the worker has seen the request: task and sizes.

    Two requests with the same guess probably share a forward; the worker's report settles it. A guess that splits too
    finely costs little: two guesses with the same observed key share a group from then on. Images count by their size
    unless height and width are given, to which pipelines resize them. It starts with ``"?"``, so
    that it is told apart from observed keys.
    """
    params = request.params
    sized = params.get("height") is not None and params.get("width") is not None
    parts: list[str] = []
    for name, value in params.items():
        size = (
            _size(value, sized) if name not in SIZE_PARAMS else value if isinstance(value, int | float | str) else None
        )
        if size is not None:
            parts.append(f"{name}={size!s:.64}")
    parts.sort()
    return "|".join((f"?{request.task or ''}", *parts))


def _size(value: Any, sized: bool) -> tuple[int, ...] | None:
    """The shape of a tensor or array, the size of an image, of the first one if there are several; else None.

    With ``sized`` images have none: pipelines resize them to the height and width that were given.
    """
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        return _size(items[0], sized) if items else None
    size = getattr(value, "shape", None)
    if size is None and not sized:
        size = getattr(value, "size", None)
    return cast("tuple[int, ...]", tuple(size)) if isinstance(size, tuple) else None  # pyright: ignore[reportUnknownArgumentType]


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class RequestState:
    """One live request, as scheduler and policy see it.

    Attributes:
        request: As submitted.
        arrival: Rank of submission, from 0; orders requests of equal priority.
        submitted: Clock reading at submission.
        guess: :func:`guess_key` of the request.
        run_id: Id of the current attempt; never used twice, also when a later request has the same request id.
        attempt: Attempts before the current one: 0 unless a worker died.
        resident: Whether a worker holds (or is about to get) the current attempt; else the request waits.
        retired: Whether it is resident, but not planned for: its last step is under way, or its worker keeps it out.
        batch_key: The observed batch key of the current attempt; None until a worker has reported it.
        steps: Steps that the current attempt has done.
        queued_s: Seconds from submission to first scheduling; None until then.
        encode_s: Seconds that the current attempt has spent before its loop, as reported.
        denoise_s: Likewise in its loop.
        decode_s: Likewise after its loop.
        calls: Ticks in which the current attempt made a denoiser call.
        mates: Requests that shared these calls, itself included, summed over the ticks.
        rows: Rows that its denoiser calls bring, once a worker has reported them; 0 until then.
        held_bytes: Bytes that it keeps between steps, likewise.
        total_steps: Its steps in all, likewise; None until then, or if nobody knows.
        kind: Its guess, and whether it has guidance, once somebody has asked.
        images: Images or videos that it asks for, likewise; 0 until then.
        priority: Its class: that of the request, or a better one that it has risen to.
        standalone_s: Seconds that it would take by itself, estimated when it came, and anew when more was known.
        sure: Whether ticks of its kind had been measured by then.
        place: Where it stands among those that wait, if it has a rank there; of the policy's.
        charged_s: Seconds that its user was charged when it was let in.
        deadline: Clock reading by which it should be done.
        request_id: The request's id, at hand because every step needs it.
        user: Whose it is; empty if nobody said.
    """

    request: DiffusionRequest
    arrival: int
    submitted: float
    guess: str
    run_id: str
    attempt: int = 0
    resident: bool = False
    retired: bool = False
    batch_key: str | None = None
    steps: int = 0
    queued_s: float | None = None
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    calls: int = 0
    mates: float = 0
    rows: int = 0
    held_bytes: int = 0
    total_steps: int | None = None
    kind: tuple[str, bool] | None = None
    images: int = 0
    standalone_s: float = 0.0
    sure: bool = False
    place: tuple[Any, ...] | None = None
    charged_s: float = 0.0
    deadline: float = math.inf
    request_id: str = dataclasses.field(init=False)
    user: str = dataclasses.field(init=False)
    priority: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.request_id, self.user, self.priority = request.request_id, request.user or "", request.priority

    def begin_attempt(self, run_id: str) -> None:
        """Back to waiting, as the next attempt: what the lost attempt measured is forgotten, the wait is not."""
        self.attempt += 1
        self.run_id = run_id
        self.resident = self.retired = False
        self.batch_key = self.total_steps = None
        self.steps = self.calls = self.mates = 0
        self.encode_s = self.denoise_s = self.decode_s = 0.0

    def timings(self, now: float, skipped_steps: int) -> Timings:
        """Where its time went, if it ends ``now``."""
        return Timings(
            queued_s=self.queued_s or 0.0,
            encode_s=self.encode_s,
            denoise_s=self.denoise_s,
            decode_s=self.decode_s,
            total_s=now - self.submitted,
            steps=self.steps,
            skipped_steps=skipped_steps,
            mean_batch_requests=self.mates / self.calls if self.calls else 0.0,
        )
