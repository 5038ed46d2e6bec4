"""An engine inside a FastAPI application. Whoever hangs up frees the slot by the next step.

    pip install steploom fastapi uvicorn
    python examples/fastapi_app.py [PORT]

    curl --json '{"prompt": "a large red circle on a white background", "seed": 1}' -o circle.png 127.0.0.1:8000/draw
    curl -N '127.0.0.1:8000/stream?prompt=a+small+blue+star+on+a+black+background'

``STEPLOOM_MODEL=...`` serves another model.
"""

import contextlib
import sys
from collections.abc import AsyncGenerator
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from steploom import AsyncDiffusionEngine, EngineConfig, SteploomError
from steploom.web import SSE_HEADERS, cancel_on_disconnect, http_error, png, sse

engine = AsyncDiffusionEngine(EngineConfig.from_env())


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with engine:
        yield


app = FastAPI(lifespan=lifespan)


class Wish(BaseModel):
    """What a client may ask for."""

    prompt: str
    seed: int | None = None
    num_inference_steps: int = 20


@app.post("/draw")
async def draw(request: Request, wish: Wish) -> Response:
    """The finished image as PNG."""
    out = await cancel_on_disconnect(request, engine.generate(**wish.model_dump(), timeout=60))
    return Response(await png(out.images[0]), media_type="image/png")


@app.get("/stream")
async def stream(wish: Annotated[Wish, Query()]) -> StreamingResponse:
    """Steps and previews as server-sent events."""
    events = await sse(engine.stream(**wish.model_dump(), preview_every=1, timeout=60))
    return StreamingResponse(events, headers=SSE_HEADERS)


@app.exception_handler(SteploomError)
async def refused(request: Request, error: SteploomError) -> JSONResponse:
    return JSONResponse(*http_error(error))


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000, timeout_graceful_shutdown=5)
