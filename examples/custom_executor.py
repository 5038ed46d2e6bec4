"""An executor of your own: this one prints what every tick did, and lets the in-process executor do it.

python examples/custom_executor.py [FOLDER]
"""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steploom import AsyncDiffusionEngine, DiffusionOutput, EngineConfig, EngineError
from steploom.executor import DiffusionExecutor, InprocExecutor, ProgressCallback
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput

PROMPTS = {"a large red circle on a white background": 4, "a small yellow star on a blue background": 7,
           "a medium purple heart on a pink background": 10}  # fmt: skip
MARKS = {"encode": "e", "denoise": "*", "decode": "d", "done": "."}


class PrintingExecutor(DiffusionExecutor):
    """Prints a line per tick: who took part, in which phase, and how long it took."""

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self._inner = InprocExecutor(config, pipeline)

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        return await self._inner.start(on_progress)

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        result = await self._inner.execute_step(output)
        phases = "  ".join(f"{report.run_id.rpartition('#')[0]} {MARKS[report.phase]}" for report in result.reports)
        print(f"tick {output.tick:2}  {1000 * result.seconds:6.1f} ms  {phases}")
        return result

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        return await self._inner.collective_rpc(method, timeout, args, kwargs, unique_reply_rank)

    async def wait_failed(self) -> EngineError:
        return await self._inner.wait_failed()

    async def shutdown(self) -> None:
        await self._inner.shutdown()


async def draw() -> list[DiffusionOutput]:
    config = EngineConfig(model="demo", distributed_executor_backend=PrintingExecutor)
    async with AsyncDiffusionEngine(config) as engine:
        return await asyncio.gather(
            *(
                engine.generate(prompt, seed=1, num_inference_steps=steps, request_id=prompt.split()[2])
                for prompt, steps in PROMPTS.items()
            )
        )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for out in asyncio.run(draw()):
        path = folder / f"custom-executor-{out.request_id}.png"
        out.images[0].save(path)
        print(f"{path}  {out.timings.steps} steps, {out.timings.mean_batch_requests:.1f} requests a forward")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out"]))
