"""An engine inside a Starlette application. Whoever hangs up frees the slot by the next step.

    pip install steploom starlette uvicorn
    python examples/starlette_app.py [PORT]

    curl --json '{"prompt": "a large red circle on a white background", "seed": 1}' -o circle.png 127.0.0.1:8000/draw
    curl -N '127.0.0.1:8000/stream?prompt=a+small+blue+star+on+a+black+background'

``STEPLOOM_MODEL=...`` serves another model.
"""

import contextlib
import sys
from collections.abc import AsyncGenerator

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from steploom import AsyncDiffusionEngine, EngineConfig, SteploomError
from steploom.web import SSE_HEADERS, cancel_on_disconnect, http_error, png, sse

engine = AsyncDiffusionEngine(EngineConfig.from_env())


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    async with engine:
        yield


class Wish(msgspec.Struct):
    """What a client may ask for."""

    prompt: str
    seed: int | None = None
    num_inference_steps: int = 20


async def draw(request: Request) -> Response:
    """The finished image as PNG."""
    wish = msgspec.json.decode(await request.body(), type=Wish)
    out = await cancel_on_disconnect(request, engine.generate(**msgspec.structs.asdict(wish), timeout=60))
    return Response(await png(out.images[0]), media_type="image/png")


async def stream(request: Request) -> Response:
    """Steps and previews as server-sent events."""
    wish = msgspec.convert(dict(request.query_params), Wish, strict=False)
    events = await sse(engine.stream(**msgspec.structs.asdict(wish), preview_every=1, timeout=60))
    return StreamingResponse(events, headers=SSE_HEADERS)


async def refused(request: Request, error: Exception) -> Response:
    return JSONResponse(*http_error(error))


app = Starlette(
    routes=[Route("/draw", draw, methods=["POST"]), Route("/stream", stream)],
    exception_handlers={SteploomError: refused, msgspec.DecodeError: refused},
    lifespan=lifespan,
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000, timeout_graceful_shutdown=5)
