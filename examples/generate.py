"""Eight prompts at once, each with its own steps and guidance, in one engine: they share the model's forward passes.

python examples/generate.py [FOLDER]
"""

import asyncio
import sys
from pathlib import Path

from steploom import AsyncDiffusionEngine, DiffusionOutput

PROMPTS = [
    "a large red circle above a small blue square on a white background",
    "a small yellow star to the left of a large green triangle on a black background",
    "a medium purple heart on a pink background",
    "a large cyan ring below a medium orange diamond on a gray background",
    "a small pink heart to the right of a large blue circle on a yellow background",
    "a large yellow star on a blue background",
    "a medium green square above a medium red triangle on a white background",
    "a large orange ring on a black background",
]


async def draw() -> list[DiffusionOutput]:
    async with AsyncDiffusionEngine(model="demo", torch_threads=1) as engine, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(engine.generate(prompt, seed=n, num_inference_steps=12 + 2 * n, guidance_scale=3 + n / 4))
            for n, prompt in enumerate(PROMPTS)
        ]
    return [task.result() for task in tasks]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, (prompt, out) in enumerate(zip(PROMPTS, asyncio.run(draw()), strict=True)):
        path, t = folder / f"generate-{n}.png", out.timings
        out.images[0].save(path)
        print(f"{path}  {prompt}")
        print(f"    {t.steps} steps in {t.total_s:.1f} s, {t.mean_batch_requests:.1f} requests a forward")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out"]))
