"""An engine inside a web application. Whoever closes the page frees the slot by the next step.

    pip install "steploom[server]"
    python examples/starlette_app.py [PORT]

Then open http://127.0.0.1:8000 and look at an image develop. ``STEPLOOM_MODEL=...`` serves another model.
"""

import base64
import contextlib
import io
import json
import sys
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

import anyio
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from steploom import AsyncDiffusionEngine, DiffusionOutput, EngineConfig, Finished, StepEvent, SteploomError

PAGE = """
<!doctype html><title>steploom</title>
<body style="font: 1.1rem system-ui; margin: 10vh auto; width: 24rem">
<form><input name=prompt style="width: 100%" value="a large red circle above a small blue square on a white background">
<button>draw</button> <span id=step></span></form><img id=image width=384 style="image-rendering: pixelated">
<script>
let events
document.forms[0].onsubmit = (submit) => {
  submit.preventDefault()
  events?.close()
  events = new EventSource("/stream?" + new URLSearchParams(new FormData(submit.target)))
  events.onmessage = (message) => {
    const {step, total, image} = JSON.parse(message.data)
    document.all.step.textContent = `step ${step} of ${total}`
    if (image) document.all.image.src = "data:image/png;base64," + image
    if (step == total) events.close()
  }
}
</script>
"""


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    async with AsyncDiffusionEngine(EngineConfig.from_env()) as app.state.engine:
        yield


async def page(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def generate(request: Request) -> Response:
    """The finished image as PNG. A client that hangs up cancels its request."""
    engine: AsyncDiffusionEngine = request.app.state.engine
    out = await unless_gone(request, engine.generate(**asked(request), timeout=60))
    return Response(png(out.images[0]), media_type="image/png") if out else Response(status_code=499)


async def stream(request: Request) -> Response:
    """Steps and previews as server-sent events."""
    engine: AsyncDiffusionEngine = request.app.state.engine

    async def events() -> AsyncGenerator[str]:
        async with engine.stream(**asked(request), preview_every=1) as run:
            async for event in run:
                match event:
                    case StepEvent(step=step, total_steps=total, preview=preview):
                        yield message(step, total, preview)
                    case Finished(output=output):
                        yield message(output.timings.steps, output.timings.steps, output.images[0])
                    case _:
                        pass

    return Events(events())


async def residents(request: Request) -> Response:
    """How many requests the worker holds."""
    stats = await request.app.state.engine.collective_rpc("stats", timeout=10, unique_reply_rank=0)
    return JSONResponse({"residents": stats.resident})


def asked(request: Request) -> dict[str, Any]:
    """The query's parameters as keywords of ``generate``."""
    return {"prompt": request.query_params["prompt"], "num_inference_steps": int(request.query_params.get("steps", 20))}


class Events(StreamingResponse):
    """A streaming response that closes its generator, and so the request, when the client hangs up."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.events = events

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self.events):
            await super().stream_response(send)


async def unless_gone(request: Request, work: Awaitable[DiffusionOutput]) -> DiffusionOutput | None:
    """The result of ``work``, cancelled if the client hangs up: then None."""
    result: DiffusionOutput | None = None
    failure: SteploomError | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            result = await work
        except SteploomError as error:  # Raised outside of the group, which would wrap it.
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


async def refused(request: Request, error: Exception) -> Response:
    """Every exception of steploom knows the status that fits."""
    assert isinstance(error, SteploomError)
    return JSONResponse({"error": str(error)}, error.status)


def message(step: int, total: int | None, image: Image.Image | None) -> str:
    data = {"step": step, "total": total, "image": image and base64.b64encode(png(image)).decode()}
    return f"data: {json.dumps(data)}\n\n"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


app = Starlette(
    routes=[Route(f"/{view.__name__}", view) for view in (generate, stream, residents)] + [Route("/", page)],
    lifespan=lifespan,
    exception_handlers={SteploomError: refused},
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000)
