"""An engine inside an aiohttp application. Whoever hangs up frees the slot by the next step.

    pip install steploom aiohttp
    python examples/aiohttp_app.py [PORT]

    curl --json '{"prompt": "a large red circle on a white background", "seed": 1}' -o circle.png 127.0.0.1:8000/draw
    curl -N '127.0.0.1:8000/stream?prompt=a+small+blue+star+on+a+black+background'

``STEPLOOM_MODEL=...`` serves another model.
"""

import contextlib
import sys
from collections.abc import AsyncGenerator

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from steploom import AsyncDiffusionEngine, EngineConfig, SteploomError
from steploom.web import SSE_HEADERS, http_error, png, sse

engine = AsyncDiffusionEngine(EngineConfig.from_env())


async def lifespan(app: web.Application) -> AsyncGenerator[None]:
    async with engine:
        yield


class Wish(msgspec.Struct):
    """What a client may ask for."""

    prompt: str
    seed: int | None = None
    num_inference_steps: int = 20


async def draw(request: web.Request) -> web.StreamResponse:
    """The finished image as PNG."""
    wish = msgspec.json.decode(await request.read(), type=Wish)
    out = await engine.generate(**msgspec.structs.asdict(wish), timeout=60)
    return web.Response(body=await png(out.images[0]), content_type="image/png")


async def stream(request: web.Request) -> web.StreamResponse:
    """Steps and previews as server-sent events."""
    wish = msgspec.convert(dict(request.query), Wish, strict=False)
    events = await sse(engine.stream(**msgspec.structs.asdict(wish), preview_every=1, timeout=60))
    async with contextlib.aclosing(events):
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        async for event in events:
            await response.write(event)
    return response


@web.middleware
async def refused(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except (SteploomError, msgspec.DecodeError) as error:
        content, status, headers = http_error(error)
        return web.json_response(content, status=status, headers=headers)


app = web.Application(middlewares=[refused])
app.add_routes([web.post("/draw", draw), web.get("/stream", stream)])
app.cleanup_ctx.append(lifespan)

if __name__ == "__main__":
    # With handler_cancellation, aiohttp cancels a handler whose client is gone: that is all it takes.
    port = int(sys.argv[1]) if sys.argv[1:] else 8000
    web.run_app(app, host="127.0.0.1", port=port, handler_cancellation=True, shutdown_timeout=5)
