"""``/v1/videos``, as the OpenAI SDK sends and expects it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, MalformedRangeHeader, RangeNotSatisfiable, Response
from starlette.routing import Route

from steploom import InvalidRequest
from steploom.server.answers import fingerprint
from steploom.server.body import read_body, take_pictures
from steploom.server.errors import ApiError, invalid
from steploom.server.kinds import FormText, choice, text, whole
from steploom.server.openapi.operation import ERRORS, HEADERS, as_json, operation
from steploom.server.openapi.videos import DELETED, FILES, PART, VIDEO, VIDEOS, video_body
from steploom.server.picture_files import check_files
from steploom.server.state import ServerState
from steploom.server.videos.fields import VideoFields, length_of, param_of, read_fields
from steploom.server.videos.job import Job
from steploom.server.videos.store import VARIANTS
from steploom.threads import SERVING

POLL_AFTER_MS = 500
"""What the SDK's ``poll`` is told to wait between two looks at a job."""

MOST_LISTED, LISTED = 100, 20
_MEDIA = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
_ONE_OF = (("seconds", "num_frames"), ("size", "width"), ("size", "height"))
"""Fields of which a new one replaces the other of its pair."""


def _state(request: Request) -> ServerState:
    return request.app.state.server


def _owner(request: Request) -> str | None:
    """Whose jobs a client may see: those of its key. What is stored tells nobody the key."""
    if not _state(request).settings.api_keys:
        return None
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    return hashlib.sha256(f"steploom video owner\n{key}".encode()).hexdigest()


def _check_held(state: ServerState) -> None:
    """What is stored can be looked at, while the server is being shut down, too."""
    if state.loading is not None:
        state.check_serving()
    if state.videos.makes_videos:
        state.videos.check_serving()


def _find(request: Request) -> Job:
    _check_held(_state(request))
    return _state(request).videos.find(request.path_params["video_id"], _owner(request))


@operation(body=video_body, answers={200: as_json(VIDEO)}, errors=ERRORS, headers=HEADERS)
async def create(request: Request) -> Response:
    """Takes on a job."""
    _check_serving(_state(request))
    body = await read_body(request, _state(request).settings)
    return await _once(request, body, None)


@operation(body=video_body, answers={200: as_json(VIDEO)}, errors=ERRORS, headers=HEADERS)
async def remix(request: Request) -> Response:
    """Takes on a job that is like a finished one, its seed included, but for its prompt and whatever else is given."""
    _check_serving(_state(request))
    source = _find(request)
    if source.status != "completed":
        raise ApiError(400, f"video {source.id} is {_status(request, source)}, only a completed one can be remixed",
                       param="video_id", code="video_not_ready")  # fmt: skip
    body = await read_body(request, _state(request).settings)
    if body.get("prompt") is None:
        raise invalid("prompt: must be given, and not empty", "prompt", "missing_required_parameter")
    return await _once(request, body, source)


def _check_serving(state: ServerState) -> None:
    state.check_serving()
    state.engine.check_serving()
    if not state.videos.makes_videos:
        made = " and ".join(state.engine.info.makes)
        raise invalid(f"model: makes {made}, no videos", "model", "unsupported_model")
    state.videos.check_serving()


async def _once(request: Request, body: dict[str, Any], source: Job | None) -> Response:
    """The job of a body, or the one that was asked for with the same ``Idempotency-Key`` before."""
    videos, owner, key = _state(request).videos, _owner(request), request.headers.get("idempotency-key")
    if not key:
        return JSONResponse(videos.shown(await _make(request, body, source, Job(owner=owner))))
    told = {"source": source.id if source else None, **body}
    digest = await SERVING.run(fingerprint, told)
    name = hashlib.sha256(f"{owner}\n{key}".encode()).hexdigest()
    blank = Job(owner=owner, key=name, body=digest)
    return JSONResponse(videos.shown(await videos.once(name, digest, partial(_make, request, body, source, blank))))


async def _make(request: Request, body: dict[str, Any], source: Job | None, job: Job) -> Job:
    """Takes on a job for a body."""
    state = _state(request)
    given = body if source is None else _remixed(source, body)
    pictures = await SERVING.run(take_pictures, given, "input_reference")
    if len(pictures) > 1:
        raise invalid(f"input_reference: {len(pictures)} images, one is taken", "input_reference")
    await SERVING.run(check_files, "input_reference", pictures, state.engine.config.max_pixels)
    picture = pictures[0] if pictures else await state.videos.picture_of(source)
    fields = read_fields(given, state.settings)
    try:
        _fill(state, job, fields, given, picture is not None)
        job.remixed_from = source.id if source else None
        await state.videos.create(job, picture)
    except InvalidRequest as error:
        raise ApiError(400, str(error), param=param_of(error, fields), code="invalid_value") from None
    return job


def _remixed(source: Job, body: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for with ``source``, and its seed, with the changes of ``body``."""
    changes = {name: value for name, value in body.items() if value is not None}
    said = {name: FormText(value) if isinstance(value, str) else value for name, value in source.given.items()}
    before = {"seed": source.arguments.get("seed"), "model": source.model, **said}
    for one, other in _ONE_OF:
        for new, old in ((one, other), (other, one)):
            if new in changes:
                before.pop(old, None)
    return before | changes


def _fill(state: ServerState, job: Job, fields: VideoFields, given: dict[str, Any], pictured: bool) -> None:
    """Fills in what was asked for."""
    info = state.engine.info
    if pictured and info.parameters and "image" not in {parameter.name for parameter in info.parameters}:
        raise invalid(f"input_reference: {info.pipeline_class} starts from no picture; leave it out", "input_reference")
    length = length_of(fields, info)
    arguments: dict[str, Any] = {**fields.own, **fields.params, **length.arguments, "user": fields.user}
    arguments["lora"] = state.adapters(fields)
    arguments.setdefault("timeout", state.settings.default_timeout_s)
    job.prompt, job.given, job.pictured = fields.prompt, given, pictured
    job.arguments = arguments
    job.arguments["seed"] = job.request(None).seed  # drawn now, so that every attempt makes the same video
    job.model = fields.model or state.model_names[0]
    width, height = (
        fields.params.get(side) or default
        for side, default in zip(("width", "height"), info.default_size or (None, None), strict=True)
    )
    job.size = f"{width}x{height}" if width and height else "auto"
    job.seconds, job.fps, job.frames = length.seconds, length.fps, length.frames


@operation(
    answers={200: as_json(VIDEOS)},
    errors=(503,),
    query={"limit": whole(1, MOST_LISTED).schema, "order": choice("asc", "desc").schema, "after": text.schema},
)
async def listing(request: Request) -> Response:
    """Jobs, the newest first, a page at a time."""
    state, query = _state(request), request.query_params
    _check_held(state)
    jobs = state.videos.shelf.owned(_owner(request))
    limit = whole(1, MOST_LISTED)("limit", FormText(query.get("limit", LISTED)))
    if choice("asc", "desc")("order", query.get("order", "desc")) == "desc":
        jobs.reverse()
    after = query.get("after")
    if after:
        places = [place for place, job in enumerate(jobs, start=1) if job.id == after]
        if not places:
            raise invalid(f"after={after!r:.80}: no such video; it may have been deleted", "after")
        jobs = jobs[places[0] :]
    page = jobs[:limit]
    return JSONResponse({
        "object": "list", "data": [state.videos.shown(job) for job in page], "has_more": len(jobs) > limit,
        "first_id": page[0].id if page else None, "last_id": page[-1].id if page else None,
    })  # fmt: skip


@operation(answers={200: as_json(VIDEO)}, errors=(404, 503))
async def retrieve(request: Request) -> Response:
    """A job, and how far it is."""
    job = _find(request)
    headers = {} if job.finished else {"openai-poll-after-ms": str(POLL_AFTER_MS)}
    return JSONResponse(_state(request).videos.shown(job), headers=headers)


@operation(answers={200: as_json(DELETED)}, errors=(404, 503))
async def delete(request: Request) -> Response:
    """Ends a job that is not done, and deletes it with its files."""
    job = _find(request)
    await _state(request).videos.delete(job)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


@operation(
    answers={200: FILES, 206: PART},
    errors=(404, 416, 503),
    query={"variant": choice(*VARIANTS).schema},
)
async def content(request: Request) -> Response:
    """The video, its thumbnail, or a sheet of its frames; also a range of it."""
    variant = choice(*VARIANTS)("variant", request.query_params.get("variant", "video"))
    job = _find(request)
    if job.status != "completed":
        why = f": {job.error['message']}" if job.error else ""
        raise ApiError(404, f"video {job.id} is {_status(request, job)}{why}; there is nothing to download",
                       code="video_failed" if job.finished else "video_not_ready")  # fmt: skip
    file = _state(request).videos.shelf.store.file(job, variant)
    try:
        stat = await SERVING.run(os.stat, file)
    except FileNotFoundError:
        raise ApiError(404, f"the {variant} of video {job.id} is gone", code="not_found") from None
    return _File(
        file, media_type=_MEDIA[variant], filename=file.name, stat_result=stat, content_disposition_type="inline",
        headers={"Cache-Control": "private, max-age=3600"},
    )  # fmt: skip


class _File(FileResponse):
    """A file, or a part of it. What is wrong with a range is said as all errors are."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            raise invalid(f"Range={http_range!r:.80}: must read bytes=FIRST-LAST", "Range") from None
        except RangeNotSatisfiable:
            raise ApiError(416, f"Range={http_range!r:.80}: there are {file_size} bytes", param="Range",
                           headers={"Content-Range": f"bytes */{file_size}"}) from None  # fmt: skip


def _status(request: Request, job: Job) -> str:
    return text("status", _state(request).videos.shown(job)["status"])


_NOT_MADE = ("edits", "extensions", "characters")


async def not_made(request: Request) -> Response:
    """What OpenAI makes of videos and this server does not."""
    raise ApiError(
        400, f"{request.url.path}: videos are made from prompts and pictures here, not from videos", param="video",
        code="unsupported_parameter",
    )  # fmt: skip


ROUTES = [
    Route("/v1/videos", create, methods=["POST"]),
    Route("/v1/videos", listing),
    *(Route(f"/v1/videos/{name}", not_made, methods=["POST"], include_in_schema=False) for name in _NOT_MADE),
    Route("/v1/videos/{video_id}", retrieve),
    Route("/v1/videos/{video_id}", delete, methods=["DELETE"]),
    Route("/v1/videos/{video_id}/content", content),
    Route("/v1/videos/{video_id}/remix", remix, methods=["POST"]),
]
