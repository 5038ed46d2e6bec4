"""Fuzzes the decoder of the wire with atheris: errors, never a crash, a hang, or more memory than a message may have.

    python tests/fuzz/decoder.py [--runs 1000000] [--corpus FOLDER] [--coverage 95]

Starts from a valid message of every type, and mutates them as coverage leads. Ends with an error if the decoder raises
anything but ProtocolError, takes longer than 5 seconds for a message or asks for more than 256 MiB, or if the
inputs that were found cover less of the decoder's lines than ``--coverage`` percent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DECODER = ["steploom.codec.reader", "steploom.codec.keys"]


def fuzz(runs: int, corpus: Path, seconds: int) -> None:
    """In this process, which libFuzzer ends."""
    import atheris
    import diffusers.models.autoencoders.vae  # a worker builds its classes; no message is to wait for imports
    import diffusers.pipelines.stable_diffusion.pipeline_output  # noqa: F401

    # What looks at each byte of a message would take fifty times as long if each comparison were traced.
    with atheris.instrument_imports(include=["steploom.codec"], exclude=["steploom.codec.keys"]):
        from frames import LARGEST, decode

    flags = [f"-runs={runs}", f"-max_len={LARGEST}", "-timeout=5", "-rss_limit_mb=2048", "-print_final_stats=1",
             "-verbosity=0"]  # fmt: skip
    if seconds:
        flags.append(f"-max_total_time={seconds}")
    atheris.Setup([sys.argv[0], str(corpus), *flags], decode)
    atheris.Fuzz()


def covered(corpus: Path) -> float:
    """Percent of the decoder's lines that the inputs in ``corpus`` reach; prints those that they do not."""
    import coverage
    import diffusers  # noqa: F401 - in a worker its classes are built

    watch = coverage.Coverage(source_pkgs=DECODER, data_file=None)
    watch.start()
    from frames import decode

    for path in sorted(corpus.iterdir()):
        decode(path.read_bytes())
    watch.stop()
    return watch.report(show_missing=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="end after so many, however few runs that were")
    parser.add_argument("--corpus", type=Path, help="where inputs are kept (default: a temporary folder)")
    parser.add_argument("--coverage", type=float, default=95.0)
    parser.add_argument("--part", choices=("fuzz", "cover"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = options.corpus or Path(folder)
        if options.part == "fuzz":
            fuzz(options.runs, corpus, options.seconds)
        if options.part == "cover":
            share = covered(corpus)
            print(f"{share:.1f}% of the decoder's lines")
            return int(share < options.coverage)
        from frames import joined, nearly_valid, valid

        corpus.mkdir(parents=True, exist_ok=True)
        for name, frames in (*valid(), *nearly_valid()):
            (corpus / name).write_bytes(joined(frames))
        command = [sys.executable, __file__, "--corpus", str(corpus), "--coverage", str(options.coverage)]
        told = ["--runs", str(options.runs), "--seconds", str(options.seconds)]
        for part in ("fuzz", "cover"):
            code = subprocess.run([*command, *told, "--part", part], cwd=HERE, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
