"""The command line: ``python -m dit_rewrite autopolicy | demo | generate | latency | tune | verify``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dit_rewrite.cli import autopolicy, tune
from dit_rewrite.errors import DitRewriteError

BUNDLED = "dit_rewrite.demo.shapes.calls:build"  # the factory of the bundled denoiser
FAILED = 2  # the exit code for errors, which argparse also uses for an invalid command line


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def seed(text: str) -> int:
    """An argparse type: an integer that torch accepts as a seed."""
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} does not fit into 64 bits")
    return value


def lengths(text: str) -> tuple[int, ...]:
    """An argparse type: distinct integers of at least 1, separated by commas."""
    try:
        found = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 16,64,256") from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1 or a duplicate")
    return found


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder for images, graphs and results")
    parser.add_argument("--images", type=positive, default=16, help="number of images that each method samples")
    parser.add_argument(
        "--steps", type=positive, default=50, help="DDIM steps of the uncached reference and of the policies"
    )
    parser.add_argument("--intervals", type=positive, nargs="+", default=[2, 3, 4, 6], help="intervals of the policies")
    parser.add_argument("--rounds", type=positive, default=3, help="timed runs of each method; the median is reported")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the initial noise of all methods")
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; other load disturbs one thread least")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, or a folder written by save_pretrained")
    parser.add_argument("--policy", default="fora:interval=3", help="for example fora:interval=3, or never")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--prompt", help="prompt, for text-conditional pipelines")
    wanted.add_argument("--label", type=int, nargs="+", help="class numbers, for class-conditional pipelines")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("image.png"), help="further images get a number")


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--conditions", type=lengths, default="16,64,256,1024", help="numbers of text tokens, separated by commas"
    )
    parser.add_argument("--width", type=positive, default=288, help="width of the model, 72 per head; PixArt has 1152")
    parser.add_argument("--tokens", type=positive, default=256, help="number of image tokens, a square number")
    parser.add_argument("--layers", type=positive, default=2, help="number of blocks; the times are averaged over them")
    parser.add_argument("--rounds", type=positive, default=10, help="timed calls per length; the median is reported")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; other load disturbs one thread least")
    parser.add_argument("--out", type=Path, default=Path("latency"), help="output folder for the plot and the times")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=BUNDLED, help="module:factory, a folder, or a hub id")
    parser.add_argument("--policy", default="fora:interval=3", help="for example fora:interval=3")
    parser.add_argument(
        "--backend", default="aot_eager", help="backend that compiles the graphs: aot_eager or inductor"
    )
    parser.add_argument("--lowering", default="auto", help="auto, variants or segments")
    parser.add_argument("--steps", type=positive, default=12, help="number of steps of the replayed trajectory")
    parser.add_argument("--dump", type=Path, help="output folder for the graphs after each pass and their diffs")


COMMANDS = {
    "autopolicy": (autopolicy.add_arguments, "dit_rewrite.cli.autopolicy", "find a policy from one number"),
    "demo": (_add_demo, "dit_rewrite.demo.run", "sample images with and without caching, and compare"),
    "generate": (_add_generate, "dit_rewrite.cli.generate", "run a diffusers pipeline with its denoiser rewritten"),
    "latency": (_add_latency, "dit_rewrite.cli.latency", "time the parts of a text-conditional block"),
    "tune": (tune.add_arguments, "dit_rewrite.cli.tune", "search the parameters of a policy"),
    "verify": (_add_verify, "dit_rewrite.cli.verify", "verify a rewrite against the unmodified model"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_rewrite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, _, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 for success, or 2 after an error, whose message goes to stderr."""
    arguments = build_parser().parse_args(argv)
    _, module, _ = COMMANDS[arguments.command]
    try:
        return import_module(module).run(arguments)
    except DitRewriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
