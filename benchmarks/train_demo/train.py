"""Train the demo model: ``python benchmarks/train_demo/train.py``.

It can be stopped at any moment and started again; it goes on from its last checkpoint. See docs/demo-model.md.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
import vae
from bank import build
from common import load_if_there, log
from dit import Trainer


def main() -> None:
    """Run the stages that are not done yet, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(".train"), help="checkpoints and logs")
    parser.add_argument("--vae-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--export", type=pathlib.Path, metavar="FOLDER", help="where to write the model as it grows")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    autoencoder = vae.train(args.folder, args.vae_steps).eval()
    figures = load_if_there(args.folder / "latents.pt")
    if figures is None:
        figures = vae.measure(autoencoder, args.folder)
    log(args.folder, f"vae: latent mean {figures['shift']:.3f}, factor {figures['factor']:.3f}")
    bank = build(args.folder, autoencoder, figures["shift"], figures["factor"])
    Trainer(args.folder, bank, args.steps).run(args.export)


if __name__ == "__main__":
    main()
