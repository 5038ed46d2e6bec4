"""An engine inside a Quart application. Whoever hangs up frees the slot by the next step.

    pip install steploom quart
    python examples/quart_app.py [PORT]

    curl --json '{"prompt": "a large red circle on a white background", "seed": 1}' -o circle.png 127.0.0.1:8000/draw
    curl -N '127.0.0.1:8000/stream?prompt=a+small+blue+star+on+a+black+background'

``STEPLOOM_MODEL=...`` serves another model.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

import hypercorn.asyncio
import msgspec
from quart import Quart, Response, request

from steploom import AsyncDiffusionEngine, EngineConfig, SteploomError
from steploom.web import SSE_HEADERS, http_error, png, sse

engine = AsyncDiffusionEngine(EngineConfig.from_env())
app = Quart(__name__)


@app.while_serving
async def lifespan() -> AsyncGenerator[None]:
    async with engine:
        yield


class Wish(msgspec.Struct):
    """What a client may ask for."""

    prompt: str
    seed: int | None = None
    num_inference_steps: int = 20


@app.post("/draw")
async def draw() -> Response:
    """The finished image as PNG. Quart cancels a handler whose client is gone: that is all it takes."""
    wish = msgspec.json.decode(await request.get_data(), type=Wish)
    out = await engine.generate(**msgspec.structs.asdict(wish), timeout=60)
    return Response(await png(out.images[0]), mimetype="image/png")


@app.get("/stream")
async def stream() -> Response:
    """Steps and previews as server-sent events."""
    wish = msgspec.convert(request.args.to_dict(), Wish, strict=False)
    events = await sse(engine.stream(**msgspec.structs.asdict(wish), preview_every=1, timeout=60))
    response = Response(events, headers=SSE_HEADERS)
    response.timeout = None  # Quart's own is one minute for the whole response.
    return response


@app.errorhandler(SteploomError)
@app.errorhandler(msgspec.DecodeError)
async def refused(error: Exception) -> Any:
    return http_error(error)


if __name__ == "__main__":
    config = hypercorn.Config()
    config.bind = [f"127.0.0.1:{sys.argv[1] if sys.argv[1:] else 8000}"]
    asyncio.run(hypercorn.asyncio.serve(app, config))
