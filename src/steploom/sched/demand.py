"""Demand: how long a request takes by itself, and how much of that is left, from its steps and what a step costs."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NamedTuple, cast

from steploom.protocol import RequestReport
from steploom.requests import DiffusionRequest
from steploom.sched.cost_model import CostModel, cost_key
from steploom.sched.curve import SURE
from steploom.sched.state import RequestState

MAX_SHAPES = 4096
"""Kinds of requests that are remembered."""

UNKNOWN_STEP_S = 0.1
"""Seconds of a step of one megapixel, before anything was measured. Only the order of requests rests on it."""

GROWTH = 1.2
"""Seconds grow with pixels to this power, from the nearest size that was measured."""

DEFAULT_STEPS = 30

MOST_STEPS = 10**9
"""A request counts as no more steps, so that seconds stay numbers."""

MOST_IMAGES, MOST_PIXELS = 10**6, 10**6
"""Likewise as no more images, and as no more pixels a side, or frames."""


@dataclasses.dataclass(slots=True)
class Shape:
    """What requests of a kind turned out to be.

    Attributes:
        batch_key: That of their denoiser calls.
        rows: Rows per image.
        steps: Steps of one that does not say how many.
        pixels: Of one image or video, if its arguments say so.
    """

    batch_key: str
    rows: float
    steps: int
    pixels: float | None


Kind = tuple[str, bool]
"""The guess at the batch key of a request, and whether there is guidance, since that doubles the rows."""


class Need(NamedTuple):
    """Bytes of memory that requests take.

    Attributes:
        held: Kept between steps.
        step: More at the peak of a tick that they share.
        chores: More at the peak of a tick with text encoders or VAEs.
    """

    held: float
    step: float
    chores: float


def images(request: DiffusionRequest) -> int:
    """Images or videos that the request asks for."""
    prompts = len(request.prompt) if isinstance(request.prompt, list | tuple) else 1
    each = request.params.get("num_images_per_prompt") or request.params.get("num_videos_per_prompt")
    return max(1, min(prompts * each, MOST_IMAGES)) if isinstance(each, int) else max(1, prompts)


def images_of(state: RequestState) -> int:
    """Likewise, counted once."""
    if not state.images:
        state.images = images(state.request)
    return state.images


def pixels(params: Any) -> float | None:
    """Width times height times frames, as far as the arguments say."""
    width, height = params.get("width"), params.get("height")
    if not isinstance(width, int | float) or not isinstance(height, int | float):
        return None
    frames = params.get("num_frames", 1)
    sizes = (width, height, frames if isinstance(frames, int) else 1)
    return math.prod(float(min(max(1, size), MOST_PIXELS)) for size in sizes)


class Demands:
    """Estimates of requests: of those that wait from others of their kind, of those that run from themselves."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self._shapes: OrderedDict[Kind, Shape] = OrderedDict()
        self._last: Shape | None = None
        self._nearest: dict[Kind, Shape] = {}  # Of kinds that were not seen, since the last one was.
        self._unmeasured: OrderedDict[str, list[Kind]] = (
            OrderedDict()
        )  # Or not often enough, by the key of their ticks.
        self._measured: list[Kind] = []  # Kinds of whose ticks something was measured since somebody asked.
        self.knows = self._settled = False
        self._learned = 0

    @property
    def version(self) -> int:
        """Another number whenever :meth:`step_s` or :meth:`rows` may say something else of the same request."""
        return self.costs.version + self._learned

    def sure(self, kind: Kind) -> bool:
        """Whether ticks of that kind were measured often enough."""
        shape = self._shapes.get(kind)
        return shape is not None and self._sure(shape.batch_key)

    def _sure(self, batch_key: str) -> bool:
        curve = self.costs.find(batch_key)
        return curve is not None and curve.measured >= SURE

    @property
    def fresh(self) -> bool:
        """Whether there are :meth:`news`."""
        return bool(self._measured or self.costs.fresh)

    def news(self) -> tuple[bool, list[Kind]]:
        """Whether so little was known before that all is news, and the kinds of which more was measured since."""
        keys, self.costs.fresh = self.costs.fresh, []
        for key in keys:
            self._measured += self._unmeasured.pop(key, []) if self._sure(key) else self._unmeasured.get(key, [])
        kinds, self._measured = self._measured, []
        everything = bool(kinds) and not self._settled
        self.knows = self.knows or bool(kinds)
        self._settled = self._settled or any(map(self._sure, keys))
        return everything, kinds

    def _note(self, kind: Kind, batch_key: str) -> None:
        """A kind was seen, of whose ticks something was measured or not."""
        if self.costs.find(batch_key) is not None:
            self._measured.append(kind)
        if self._sure(batch_key):
            return
        self._unmeasured.setdefault(cost_key(batch_key), []).append(kind)
        if len(self._unmeasured) > MAX_SHAPES:
            self._unmeasured.popitem(last=False)

    def learn(self, state: RequestState, report: RequestReport) -> None:
        """A request has made its first denoiser call."""
        if report.batch_key is None:
            return
        if report.held_bytes:
            state.held_bytes = report.held_bytes
            self.costs.curve(report.batch_key).footprint.observe_request(report.held_bytes, report.rows)
        if report.rows < 1:
            return
        state.rows = report.rows
        kind, each = state.kind or kind_of(state), report.rows / (state.images or images_of(state))
        known = self._shapes.get(kind)
        if known is not None and known.batch_key == report.batch_key and known.rows == each:
            self._learned += known is not self._last
            self._last = known
            return
        size = pixels(state.request.params)
        steps = report.total_steps or DEFAULT_STEPS
        shape = Shape(report.batch_key, each, steps, size)
        self._shapes[kind] = self._last = shape
        self._learned += 1
        self._nearest.clear()
        self._note(kind, report.batch_key)
        self._shapes.move_to_end(kind)
        if len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)

    def rows(self, state: RequestState) -> int:
        """Rows that the request brings to a forward."""
        if state.rows:
            return state.rows
        shape = self._shape(state)
        return max(1, round((shape.rows if shape else 1.0) * images_of(state)))

    def steps(self, state: RequestState) -> int:
        """Steps that it takes in all."""
        if state.total_steps is not None:
            return state.total_steps
        params = state.request.params
        given, strength = params.get("num_inference_steps"), params.get("strength")
        if not isinstance(given, int):
            shape = self._shape(state)
            return shape.steps if shape else DEFAULT_STEPS
        if "image" in params and isinstance(strength, int | float) and 0 < strength < 1:
            return max(1, int(min(given, MOST_STEPS) * strength))
        return max(1, min(given, MOST_STEPS))

    def step_s(self, state: RequestState, company: int = 0) -> float:
        """Seconds of one of its steps beside so many rows of others."""
        rows = self.rows(state) + company
        if state.batch_key is not None:
            own = self.costs.find(state.batch_key)
            if own is not None:
                return own.at(rows)
        shape, size = self._shape(state), pixels(state.request.params)
        curve = self.costs.find(shape.batch_key) if shape else None
        if curve is None or shape is None:
            return UNKNOWN_STEP_S * ((size or 2**20) / 2**20) ** GROWTH * (0.5 + 0.5 * rows)
        scale = (size / shape.pixels) ** GROWTH if size and shape.pixels else 1.0
        return curve.at(rows) * scale

    def gain(self, state: RequestState, requests: int) -> float:
        """Seconds of such work, one at a time, that are done in a second by so many that share, or at the knee."""
        curve = self.costs.find(state.batch_key or getattr(self._shape(state), "batch_key", None))
        if curve is None:
            return 1.0
        rows = self.rows(state)
        most = rows * requests if curve.knee is None else max(rows, min(rows * requests, curve.knee))
        return max(1.0, most / rows * curve.at(rows) / max(curve.at(most), 1e-9))

    def chores_s(self, state: RequestState) -> float:
        """Seconds of its text encoders and VAEs."""
        curve = self.costs.find(state.batch_key or getattr(self._shape(state), "batch_key", None))
        return curve.chores_s if curve is not None else 0.0

    def memory(self, states: Collection[RequestState], batch_key: str | None) -> Need:
        """Bytes that these take together. ``batch_key``: what their calls share; None if that is not known."""
        known = self.costs.footprint(batch_key)
        if known is not None and known.held:
            rows, held = 0, 0.0
            for state in states:
                own = state.rows or self.rows(state)
                rows += own
                held += state.held_bytes or own * known.held
            return Need(held, rows * known.step, known.chores)
        needs = [self._memory(state) for state in states]
        return Need(
            sum(need.held for need in needs),
            sum(need.step for need in needs),
            max((need.chores for need in needs), default=0.0),
        )

    def _memory(self, state: RequestState) -> Need:
        """By its own batch key, or by the nearest kind."""
        known, scale = self.costs.footprint(state.batch_key), 1.0
        if known is None:
            shape, size = self._shape(state), pixels(state.request.params)
            known = self.costs.footprint(shape.batch_key) if shape else None
            scale = size / shape.pixels if shape and size and shape.pixels else 1.0
        if known is None:
            return Need(state.held_bytes, 0.0, 0.0)
        rows = scale * self.rows(state)
        return Need(state.held_bytes or rows * known.held, rows * known.step, scale * known.chores)

    def standalone_s(self, state: RequestState) -> float:
        """Seconds that the request would take by itself."""
        return self.steps(state) * self.step_s(state) + self.chores_s(state)

    def left(self, state: RequestState) -> int:
        """Steps that are left of it."""
        return max(0, self.steps(state) - state.steps)

    def remaining_s(self, state: RequestState, step_s: float) -> float:
        """Seconds that are left of it, if each of its steps takes so long: half of its chores come before the first."""
        return self.left(state) * step_s + self.chores_s(state) * (0.5 if state.steps else 1.0)

    def most_left_s(self, state: RequestState, step_s: float) -> float:
        """As :meth:`remaining_s`, but never less than that until :attr:`version` is another."""
        curve = self.costs.find(state.batch_key or getattr(self._shape(state), "batch_key", None))
        return self.left(state) * step_s + (curve.most_chores_s if curve is not None else 0.0)

    def _shape(self, state: RequestState) -> Shape | None:
        """The request's kind, or else the nearest one by size, of whatever guidance."""
        kind = kind_of(state)
        found = self._shapes.get(kind) or self._shapes.get((kind[0], not kind[1]))
        if found is not None or not self._shapes:
            return found
        if (near := self._nearest.get(kind)) is not None:
            return near
        size = pixels(state.request.params)
        sized = [shape for shape in self._shapes.values() if shape.pixels] if size and len(self._shapes) <= 64 else []
        if not sized or size is None:
            return self._last
        near = min(sized, key=lambda shape: max(shape.pixels or 1, size) / min(shape.pixels or 1, size))
        if len(self._nearest) < MAX_SHAPES:
            self._nearest[kind] = near
        return near

    def state(self) -> list[list[Any]]:
        """What another process needs to go on."""
        return [[*kind, shape.batch_key, shape.rows, shape.steps, shape.pixels] for kind, shape in self._shapes.items()]

    def restore(self, state: object) -> None:
        """Goes on where another process was, as far as that can be read."""
        for entry in cast("list[Any]", state) if isinstance(state, list) else []:
            try:
                guess, guided, key, rows, steps, size = entry
                shape = Shape(str(key), float(rows), int(steps), None if size is None else float(size))
            except (TypeError, ValueError):
                continue
            self._shapes.setdefault((str(guess), bool(guided)), shape)
            self._nearest.clear()
            self._learned += 1
            self.knows = self._settled = True


def kind_of(state: RequestState) -> Kind:
    """The kind of a request."""
    if state.kind is None:
        scales = (state.request.params.get(name) for name in ("guidance_scale", "true_cfg_scale"))
        guided = all(scale is None or not isinstance(scale, int | float) or scale > 1 for scale in scales)
        state.kind = state.guess, guided
    return state.kind
