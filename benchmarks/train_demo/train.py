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
from models import compiler_is_there

from steploom.cli.arguments import count

NO_COMPILER = "no C++ compiler (g++, or what CXX names): training goes without torch.compile, which is slower"


EXAMPLES = """
examples:
  the shipped model, in about two hours on two cores
    python benchmarks/train_demo/train.py --export src/steploom/demo/model
  a trial of about ten minutes, most of them for the bank, to see that all stages run
    python benchmarks/train_demo/train.py --folder .trial --vae-steps 50 --steps 50
"""


def read_arguments() -> argparse.Namespace:
    """Read the command line; what makes no sense is refused."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=shown)
    for name, kind, default, what in (
        ("folder", pathlib.Path, ".train", "checkpoints and logs"),
        ("vae-steps", count, 900, "steps of the autoencoder"),
        ("steps", count, 14000, "steps of the denoiser"),
        ("threads", count, 2, "CPU threads"),
    ):
        mark = "FOLDER" if kind is pathlib.Path else "N"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=mark, help=f"{what} (default: {default})")
    growing = "where to write the model as it grows (default: nowhere)"
    parser.add_argument("--export", type=pathlib.Path, metavar="FOLDER", help=growing)
    return parser.parse_args()


def main() -> None:
    """Run the stages that are not done yet, in order."""
    args = read_arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not compiler_is_there():
        log(args.folder, NO_COMPILER)
    for name in ("latents.pt", "dit.pt"):  # better told now than when their turn comes
        load_if_there(args.folder / name)
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
