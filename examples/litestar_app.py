"""An engine inside a Litestar application. Whoever hangs up frees the slot by the next step.

    pip install steploom litestar uvicorn
    python examples/litestar_app.py [PORT]

    curl --json '{"prompt": "a large red circle on a white background", "seed": 1}' -o circle.png 127.0.0.1:8000/draw
    curl -N '127.0.0.1:8000/stream?prompt=a+small+blue+star+on+a+black+background'

``STEPLOOM_MODEL=...`` serves another model.
"""

import contextlib
import sys
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar, Request, Response, get, post
from litestar.params import FromQuery, JSONBody
from litestar.response import Stream

from steploom import AsyncDiffusionEngine, EngineConfig, SteploomError
from steploom.web import SSE_HEADERS, cancel_on_disconnect, http_error, png, sse

engine = AsyncDiffusionEngine(EngineConfig.from_env())


@contextlib.asynccontextmanager
async def lifespan(app: Litestar) -> AsyncGenerator[None]:
    async with engine:
        yield


class Wish(msgspec.Struct):
    """What a client may ask for."""

    prompt: str
    seed: int | None = None
    num_inference_steps: int = 20


@post("/draw", status_code=200)
async def draw(request: Request[Any, Any, Any], data: JSONBody[Wish]) -> Response[bytes]:
    """The finished image as PNG."""
    out = await cancel_on_disconnect(request, engine.generate(**msgspec.structs.asdict(data), timeout=60))
    return Response(await png(out.images[0]), media_type="image/png")


@get("/stream")
async def stream(
    prompt: FromQuery[str], seed: FromQuery[int | None] = None, num_inference_steps: FromQuery[int] = 20
) -> Stream:
    """Steps and previews as server-sent events."""
    run = engine.stream(prompt, seed=seed, num_inference_steps=num_inference_steps, preview_every=1, timeout=60)
    events = await sse(run)
    return Stream(events, headers=SSE_HEADERS, media_type=SSE_HEADERS["Content-Type"])


def refused(request: Request[Any, Any, Any], error: SteploomError) -> Response[Any]:
    content, status, headers = http_error(error)
    return Response(content, status_code=status, headers=headers, media_type="application/json")


app = Litestar([draw, stream], lifespan=[lifespan], exception_handlers={SteploomError: refused})

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000, timeout_graceful_shutdown=5)
