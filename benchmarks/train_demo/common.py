"""What the stages of the demo model's training share: folders, atomic writes, logging and drawing batches."""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steploom.demo import scene

Checkpoint = dict[str, Any]

RESTS_ON = {"vae.pt": ", and also latents.pt, bank.pt and dit.pt, which were made with it,"}
"""What goes with a checkpoint; the others come out the same when they are made anew."""


def save_atomically(state: Checkpoint, file: pathlib.Path) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, whole."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def load_if_there(file: pathlib.Path) -> Checkpoint | None:
    """Read a checkpoint written by ``save_atomically``, or None if there is none; end the program if it is damaged."""
    if not file.exists():
        return None
    with file.open("rb") as stream:
        try:
            return torch.load(stream, map_location="cpu", weights_only=False)
        except Exception as error:  # noqa: BLE001 - whatever unpickling makes of such bytes
            said = (str(error) or type(error).__name__).splitlines()[0]
            mend = f"delete it{RESTS_ON.get(file.name, '')} to have it made anew, or give another --folder"
            raise SystemExit(f"{file}: is damaged, and cannot be read ({said}); {mend}") from None


def log(folder: pathlib.Path, text: str) -> None:
    """Print a line and append it, with the time of day (UTC), to ``log.txt`` of the working folder."""
    line = f"{time.strftime('%H:%M:%S', time.gmtime())} {text}"
    print(line, flush=True)
    with (folder / "log.txt").open("a") as stream:
        stream.write(line + "\n")


def to_tensor(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """Turn 8-bit pictures (n, h, w, 3) into float32 (n, 3, h, w) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def draw_batch(rng: np.random.Generator, count: int, pixels: int) -> tuple[list[scene.Scene], NDArray[np.uint8]]:
    """Draw ``count`` training scenes; return them with their pictures, (count, pixels, pixels, 3)."""
    scenes = [scene.random_scene(rng) for _ in range(count)]
    return scenes, np.stack([scene.draw(one, rng, pixels) for one in scenes])


class Clock:
    """Adds up the seconds spent in training over all restarts: of the wall, and of all cores together."""

    def __init__(self, before: float = 0.0, busy: float = 0.0) -> None:
        self._before, self._busy = before, busy
        self._start, self._worked = time.monotonic(), time.process_time()

    def seconds(self) -> float:
        """Seconds of the wall so far, those before the last restart included."""
        return self._before + time.monotonic() - self._start

    def busy(self) -> float:
        """Seconds in which a core worked for this so far, those before the last restart included."""
        return self._busy + time.process_time() - self._worked
