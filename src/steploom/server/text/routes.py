"""``/v1/completions`` and ``/v1/chat/completions``, as the OpenAI SDK sends and expects them."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steploom import DiffusionRequest
from steploom.protocol import PipelineInfo
from steploom.server.answers import Answer, fingerprint, key_of
from steploom.server.body import read_json
from steploom.server.errors import invalid
from steploom.server.openapi.operation import ERRORS, HEADERS, operation
from steploom.server.openapi.text import text_answer, text_body
from steploom.server.state import ServerState
from steploom.server.text.fields import NEUTRAL, TextFields, read_fields
from steploom.server.text.generation import TextGeneration
from steploom.server.text.wire import CLOSING, chunk, whole
from steploom.threads import SERVING

_SEEDS = 2**64


@operation(body=partial(text_body, chat=False), answers={200: text_answer(chat=False)}, errors=ERRORS, headers=HEADERS)
async def completions(request: Request) -> Response:
    """Texts that follow prompts."""
    return await _answer(request, chat=False)


@operation(body=partial(text_body, chat=True), answers={200: text_answer(chat=True)}, errors=ERRORS, headers=HEADERS)
async def chat_completions(request: Request) -> Response:
    """Texts that answer the messages of a chat."""
    return await _answer(request, chat=True)


async def _answer(request: Request, *, chat: bool) -> Response:
    state: ServerState = request.app.state.server
    state.check_serving()
    body = await read_json(request)
    key = key_of(request, "chat" if chat else "completion")
    digest = await SERVING.run(fingerprint, body) if key else ""
    known: TextGeneration | None = state.joins.find(key, digest) if key else None
    generation = known or _generation(
        state, read_fields(body, state.settings, state.engine.config.max_tokens, chat=chat)
    )
    if key and known is None:
        state.joins.add(key, digest, generation)
    return Answer(
        generation,
        engine=state.engine if known is None else None,
        running=state.running,
        settings=state.settings,
        lingers=bool(key) and known is None,
        whole=partial(whole, generation),
        say=partial(chunk, generation),
        closing=CLOSING,
    )


def _generation(state: ServerState, fields: TextFields) -> TextGeneration:
    info = state.engine.info
    if info.makes and "text" not in info.makes:
        raise invalid(f"model: makes {' and '.join(info.makes)}, no text", "model", "unsupported_model")
    own: dict[str, Any] = {**fields.own, "lora": state.adapters(fields), "user": fields.user, "draft_every": 0}
    own.setdefault("timeout", state.settings.default_timeout_s)
    seed: int | None = own.pop("seed", None)
    params = _params(fields, info, state.engine.config.max_tokens)
    answer_id = f"{'cmpl' if fields.messages is None else 'chatcmpl'}-{uuid.uuid4().hex[:24]}"
    requests = [
        DiffusionRequest(
            prompt,
            **own,
            **params,
            seed=None if seed is None else (seed + index) % _SEEDS,
            request_id=f"{answer_id}_{place * fields.n + index}",
        )
        for place, prompt in enumerate(fields.prompts or [None])
        for index in range(fields.n)
    ]
    return TextGeneration(fields, requests, answer_id=answer_id, model=fields.model or state.model_names[0])


def _params(fields: TextFields, info: PipelineInfo, most: int) -> dict[str, Any]:
    """Arguments of the pipeline. A text without a length of its own has the pipeline's, or the most that is allowed."""
    known = {parameter.name for parameter in info.parameters}
    params = {
        name: value
        for name, value in fields.params.items()
        if not known or name in known or value not in NEUTRAL.get(name, ())
    }
    if fields.messages is not None:
        params["messages"] = fields.messages
    params["gen_length"] = fields.max_tokens or min(info.default_length or most, most)
    return params
