"""Four ways to end a request early. The slot is free by the next step each time, and the neighbour does not notice.

python examples/cancel.py [FOLDER]
"""

import asyncio
import sys
from pathlib import Path

from steploom import AsyncDiffusionEngine, DeadlineExceeded, DiffusionOutput, RequestCancelled, StepEvent

PROMPT = "a medium purple heart on a pink background"
FOREVER = 1000


async def show() -> DiffusionOutput:
    async with AsyncDiffusionEngine(model="demo", torch_threads=1) as engine, asyncio.TaskGroup() as group:
        neighbour = group.create_task(engine.generate(PROMPT, seed=1, num_inference_steps=100))
        for way in (leave_the_stream, cancel_the_task, run_out_of_time, abort_by_id):
            print(f"{way.__name__.replace('_', ' ')}: {await way(engine)}")
        out = await neighbour
        stats = await engine.collective_rpc("stats", unique_reply_rank=0)
        print(f"requests left in the worker: {stats.resident}")
        return out


async def leave_the_stream(engine: AsyncDiffusionEngine) -> str:
    async with engine.stream(PROMPT, num_inference_steps=FOREVER) as run:
        async for event in run:
            if isinstance(event, StepEvent) and event.step >= 3:
                break
    return "left after step 3"


async def cancel_the_task(engine: AsyncDiffusionEngine) -> str:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(engine.generate(PROMPT, num_inference_steps=FOREVER))
        await asyncio.sleep(0.2)
        task.cancel()
    return f"task.cancelled() is {task.cancelled()}"


async def run_out_of_time(engine: AsyncDiffusionEngine) -> str:
    try:
        await engine.generate(PROMPT, num_inference_steps=FOREVER, timeout=0.2)
    except DeadlineExceeded as error:
        return f"{type(error).__name__}: {error}"
    return "done in time"


async def abort_by_id(engine: AsyncDiffusionEngine) -> str:
    async with engine.stream(PROMPT, num_inference_steps=FOREVER, request_id="number-four") as run:
        await engine.abort("number-four")
        try:
            await run.result()
        except RequestCancelled as error:
            return f"{type(error).__name__}: {error}"
    return "too late"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    out = asyncio.run(show())
    out.images[0].save(folder / "cancel.png")
    print(f"the neighbour took its {out.timings.steps} steps in {out.timings.total_s:.1f} s: {folder / 'cancel.png'}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out"]))
