"""One engine, two tasks: an image from text, then variations of it, while others still ask for images from text.

python examples/image_to_image.py [FOLDER]
"""

import asyncio
import sys
from pathlib import Path

from steploom import AsyncDiffusionEngine, DiffusionOutput

PROMPT = "a large red circle on a white background"
CHANGED = "a large blue circle on a white background"


async def draw(source: Path) -> dict[str, DiffusionOutput]:
    async with AsyncDiffusionEngine(model="demo", torch_threads=1) as engine:
        print("tasks:", ", ".join(engine.info.tasks))
        first = await engine.generate(PROMPT, seed=1, num_inference_steps=20)
        first.images[0].save(source)
        async with asyncio.TaskGroup() as group:
            tasks = {
                f"strength-{strength}": group.create_task(
                    engine.generate(
                        CHANGED,
                        task="image-to-image",
                        image=source,  # a path; PIL images, arrays and the bytes of a file do as well
                        strength=strength,
                        num_inference_steps=round(20 / strength),  # of which the last 20 are done
                        seed=2,
                    )
                )
                for strength in (0.5, 0.8)
            }
            tasks["from-text"] = group.create_task(engine.generate(CHANGED, seed=3, num_inference_steps=20))
    return {name: task.result() for name, task in tasks.items()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, out in asyncio.run(draw(folder / "image-to-image-source.png")).items():
        path, t = folder / f"image-to-image-{name}.png", out.timings
        out.images[0].save(path)
        print(f"{path}  {t.steps} steps, {t.mean_batch_requests:.1f} requests a forward")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out"]))
