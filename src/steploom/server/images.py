"""``/v1/images/generations`` and ``/v1/images/edits``, as the OpenAI SDK sends and expects them."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steploom import DiffusionRequest
from steploom.protocol import PipelineInfo
from steploom.server.answers import Answer, fingerprint, key_of
from steploom.server.body import read_body, take_pictures
from steploom.server.errors import ApiError, invalid
from steploom.server.fields import ImageFields, read_fields
from steploom.server.image_generation import Completed, ImageGeneration, Partial
from steploom.server.openapi import page
from steploom.server.openapi.images import STORED, edits_body, generations_body, images_answer
from steploom.server.openapi.operation import ERRORS, HEADERS, Content, as_json, operation
from steploom.server.page.channels import HEADER
from steploom.server.picture_files import check_files
from steploom.server.pictures import mask_of, size_of, text_of
from steploom.server.state import ServerState
from steploom.server.usage import usage_of
from steploom.threads import SERVING

_QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto")
_SEEDS = 2**64


_HEADERS = {**HEADERS, **page.HEADERS}


def _answers(kind: str) -> dict[int, Content]:
    return {200: images_answer(kind), 202: as_json(page.TAKEN)}


@operation(body=generations_body, answers=_answers("image_generation"), errors=(*ERRORS, 409), headers=_HEADERS)
async def generations(request: Request) -> Response:
    """Images from a prompt."""
    state: ServerState = request.app.state.server
    state.check_serving()
    body = await read_body(request, state.settings)
    return await _answer(request, state, body, "image_generation")


@operation(body=edits_body, answers=_answers("image_edit"), errors=(*ERRORS, 409), headers=_HEADERS)
async def edits(request: Request) -> Response:
    """Images from images and a prompt; with a mask, only what is transparent there is painted."""
    state: ServerState = request.app.state.server
    state.check_serving()
    body = await read_body(request, state.settings)
    return await _answer(request, state, body, "image_edit")


async def _answer(request: Request, state: ServerState, body: dict[str, Any], kind: str) -> Response:
    channel = request.headers.get(HEADER)
    key = key_of(request, kind) if channel is None else None  # a channel runs what it is given, for itself
    digest = await SERVING.run(fingerprint, body) if key else ""
    known = state.joins.find(key, digest) if key else None
    if known is not None:
        return _respond(request, state, known, kind, leads=False, lingers=False)
    pictures, masks = await SERVING.run(_take_pictures, body) if kind == "image_edit" else ([], [])
    fields = read_fields(body, state.settings)
    if len(masks) > 1:
        raise invalid(f"mask: {len(masks)} pictures; give one", "mask")
    fields.images, fields.mask = pictures, masks[0] if masks else None
    generation = await _generation(state, fields, kind)
    known = state.joins.find(key, digest) if key else None  # of one that came while the pictures were looked at
    if known is not None:
        return _respond(request, state, known, kind, leads=False, lingers=False)
    if key:
        state.joins.add(key, digest, generation)
    if channel is not None:
        return await state.channels.hand_over(channel, generation, partial(_event, generation, kind))
    return _respond(request, state, generation, kind, leads=True, lingers=bool(key))


def _take_pictures(body: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
    return take_pictures(body, "image", "image[]", "images"), take_pictures(body, "mask")


async def _generation(state: ServerState, fields: ImageFields, kind: str) -> ImageGeneration:
    info = state.engine.info
    if info.makes and "images" not in info.makes:
        raise invalid(f"model: makes {' and '.join(info.makes)}, no images", "model", "unsupported_model")
    base: dict[str, Any] = {**fields.own, **fields.params}
    base["lora"] = state.adapters(fields)
    base.setdefault("timeout", state.settings.default_timeout_s)
    base["user"] = fields.user
    if kind == "image_edit":
        base |= await _pictures(state, fields, info)
    if not state.settings.previews:
        fields.partial_images = fields.preview_every = 0
    if fields.stream and fields.preview_every:
        base["preview_every"] = fields.preview_every
    elif fields.stream and fields.partial_images:
        base["preview_every"] = 1  # which of them are shown follows from how many steps there turn out to be
    seed: int | None = base.pop("seed", None)
    prefix = f"img_{uuid.uuid4().hex[:20]}"
    requests = [
        DiffusionRequest(
            fields.prompt,
            **base,
            seed=None if seed is None else (seed + index) % _SEEDS,
            request_id=f"{prefix}_{index}",
        )
        for index in range(fields.n)
    ]
    return ImageGeneration(fields, requests, await _sizes(fields, info))


async def _sizes(fields: ImageFields, info: PipelineInfo) -> list[tuple[int, int]]:
    """What size the images may have, as far as known: the one that is asked for, or the pipeline's or the picture's."""
    asked = fields.params.get("width"), fields.params.get("height")
    width, height = (given or default for given, default in zip(asked, info.default_size or (0, 0), strict=True))
    sizes = [(width, height)] if width and height else []
    if fields.images and not any(asked):
        picture = await SERVING.run(size_of, fields.images[0])
        sizes += [picture] if picture is not None else []
    return sizes


async def _pictures(state: ServerState, fields: ImageFields, info: PipelineInfo) -> dict[str, Any]:
    """The arguments that pictures become, and the task that takes them."""
    if not fields.images:
        raise invalid("image: must be given", "image", "missing_required_parameter")
    most = state.engine.config.max_pixels
    await SERVING.run(check_files, "image", fields.images, most)
    given: dict[str, Any] = {"image": fields.images[0] if len(fields.images) == 1 else fields.images}
    if fields.mask is not None:
        given["mask_image"] = await mask_of(fields.mask, most, fields.images[0])
    own = {parameter.name for parameter in info.parameters}
    if not given.keys() <= own:  # the model's own pipeline takes none: another of its family does
        given["task"] = "inpainting" if fields.mask is not None else "image-to-image"
    return given


def _respond(
    request: Request, state: ServerState, generation: ImageGeneration, kind: str, *, leads: bool, lingers: bool
) -> Response:
    return Answer(
        generation,
        engine=state.engine if leads else None,
        running=state.running,
        settings=state.settings,
        lingers=lingers,
        whole=partial(_whole, request, state, generation),
        say=partial(_event, generation, kind),
    )


def _whole(request: Request, state: ServerState, generation: ImageGeneration) -> dict[str, Any]:
    """OpenAI's ``ImagesResponse``."""
    fields = generation.fields
    done = sorted((entry for entry in generation.log if isinstance(entry, Completed)), key=lambda entry: entry.image)
    width, height = done[0].size
    answer: dict[str, Any] = {
        "created": generation.created, "background": "opaque", "output_format": fields.output_format,
        "size": f"{width}x{height}", "data": [_image(request, state, fields, entry) for entry in done],
        "usage": usage_of(fields, [entry.size for entry in done]),
    }  # fmt: skip
    if fields.quality in _QUALITIES[:-1]:
        answer["quality"] = fields.quality
    if fields.safety_identifier:
        answer["safety_identifier"] = fields.safety_identifier
    return answer


def _image(request: Request, state: ServerState, fields: ImageFields, entry: Completed) -> dict[str, Any]:
    extra: dict[str, Any] = {"seed": entry.seed}
    if entry.flagged:
        extra["flagged"] = True
    if fields.response_format == "b64_json":
        return {"b64_json": text_of(entry.data), **extra}
    name = state.stored.add(entry.data, fields.output_format)
    return {"url": str(request.url_for("stored image", name=name)), **extra}


def _event(generation: ImageGeneration, kind: str, entry: Partial | Completed) -> dict[str, Any]:
    """OpenAI's events of a stream; ``step``, ``num_inference_steps``, ``seed``, ``image_index`` and ids are ours."""
    fields = generation.fields
    width, height = entry.size
    event: dict[str, Any] = {
        "b64_json": text_of(entry.data), "background": fields.background, "created_at": int(time.time()),
        "output_format": fields.output_format, "size": f"{width}x{height}", "seed": entry.seed,
        "quality": fields.quality if fields.quality in _QUALITIES else "auto", "image_index": entry.image,
        "request_id": generation.requests[entry.image].request_id,
    }  # fmt: skip
    if isinstance(entry, Partial):
        index, step, total = entry.index, entry.step, entry.total
        event |= {"type": f"{kind}.partial_image", "partial_image_index": index, "output_format": entry.kind}
    else:
        step = total = entry.steps
        event |= {"type": f"{kind}.completed", "usage": usage_of(fields, [entry.size])}
        if fields.safety_identifier:
            event["safety_identifier"] = fields.safety_identifier
    return event | {"step": step, "num_inference_steps": total}


@operation(answers={200: STORED}, errors=(404,))
async def stored(request: Request) -> Response:
    """An image that ``response_format="url"`` has left here."""
    state: ServerState = request.app.state.server
    found = state.stored.find(request.path_params["name"])
    if found is None:
        raise ApiError(404, "no such image, or not any more", code="not_found")
    data, kind = found
    return Response(data, media_type=f"image/{kind}", headers={"Cache-Control": "private, max-age=3600"})
