"""Watches an image develop: every step is told as it happens, and the previews end up side by side in one strip.

python examples/stream.py [FOLDER]
"""

import asyncio
import sys
from pathlib import Path

from PIL import Image

from steploom import AsyncDiffusionEngine, Finished, Queued, StepEvent

PROMPT = "a large red circle above a small blue square on a white background"


async def watch() -> list[Image.Image]:
    frames: list[Image.Image] = []
    async with (
        AsyncDiffusionEngine(model="demo", torch_threads=1) as engine,
        engine.stream(PROMPT, seed=3, num_inference_steps=20, preview_every=2) as run,
    ):
        async for event in run:
            match event:
                case Queued(position=position):
                    print(f"queued behind {position}")
                case StepEvent(step=step, total_steps=total, sigma=sigma, preview=preview):
                    print(f"{'█' * step:<{total or step}} step {step} of {total}, sigma {sigma:.3f}")
                    if preview is not None:
                        frames.append(preview)
                case Finished(output=output):
                    print(f"done in {output.timings.total_s:.1f} s")
                    frames.append(output.images[0])
                case _:
                    pass
    return frames


def strip(frames: list[Image.Image], side: int = 128) -> Image.Image:
    """The frames side by side."""
    image = Image.new("RGB", (side * len(frames), side))
    for place, frame in enumerate(frames):
        image.paste(frame.resize((side, side), Image.Resampling.NEAREST), (side * place, 0))
    return image


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    strip(asyncio.run(watch())).save(folder / "stream.png")
    print(folder / "stream.png")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out"]))
