"""The command line: ``python -m dit_rewrite demo | generate | latency | verify``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dit_rewrite.errors import DitRewriteError

BUNDLED = "dit_rewrite.demo.shapes.calls:build"  # the denoiser that comes with the package
FAILED = 2  # the exit code of what could not be done; argparse's own for a wrong command line


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def seed(text: str) -> int:
    """An argparse type: what torch takes as a seed."""
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} does not fit into 64 bits")
    return value


def lengths(text: str) -> tuple[int, ...]:
    """An argparse type: numbers of tokens with commas between them, each at least 1 and none twice."""
    try:
        found = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 16,64,256") from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1, or one twice")
    return found


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the pictures, graphs and figures")
    parser.add_argument("--images", type=positive, default=16, help="how many images a method samples")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps of the uncached reference")
    parser.add_argument("--intervals", type=positive, nargs="+", default=[2, 3, 4, 6], help="of the policies")
    parser.add_argument("--rounds", type=positive, default=3, help="timed runs of each method; the median counts")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise that all methods start from")
    parser.add_argument("--backend", default="inductor", help="what lowers the graphs: inductor or aot_eager")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive, default=1, help="one is hardly disturbed by a busy machine")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, or a folder written by save_pretrained")
    parser.add_argument("--policy", default="fora:interval=3", help="for instance fora:interval=3, or never")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--prompt", help="what to draw, for pipelines that read text")
    wanted.add_argument("--label", type=int, nargs="+", help="class numbers, for class-conditional pipelines")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance", type=float, help="guidance scale; the pipeline's own when not given")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--backend", default="inductor", help="what lowers the graphs: inductor or aot_eager")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("image.png"), help="further images get a number")


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--conditions", type=lengths, default="16,64,256,1024", help="text tokens of each bar, with commas between"
    )
    parser.add_argument("--width", type=positive, default=288, help="of the model: 72 a head; PixArt's own is 1152")
    parser.add_argument("--tokens", type=positive, default=256, help="of the image, a square number")
    parser.add_argument("--layers", type=positive, default=2, help="blocks; the times are their mean")
    parser.add_argument("--rounds", type=positive, default=10, help="timed calls of each length; the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--threads", type=positive, default=1, help="one is hardly disturbed by a busy machine")
    parser.add_argument("--out", type=Path, default=Path("latency"), help="folder of the figure and the figures")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=BUNDLED, help="module:factory, a folder, or a hub id")
    parser.add_argument("--policy", default="fora:interval=3", help="for instance fora:interval=3")
    parser.add_argument("--backend", default="aot_eager", help="what lowers the graphs: aot_eager or inductor")
    parser.add_argument("--lowering", default="auto", help="auto, variants or segments")
    parser.add_argument("--steps", type=positive, default=12, help="of the trajectory that is replayed")
    parser.add_argument("--dump", type=Path, help="folder for each pass's graph and the diffs")


COMMANDS = {
    "demo": (_add_demo, "dit_rewrite.demo.run", "sample images with and without caching, and compare"),
    "generate": (_add_generate, "dit_rewrite.cli.generate", "run a diffusers pipeline with its denoiser rewritten"),
    "latency": (_add_latency, "dit_rewrite.cli.latency", "time the parts of a text-conditional block"),
    "verify": (_add_verify, "dit_rewrite.cli.verify", "prove that a rewrite computes what it should"),
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
    """Run one command; 0 is success, 2 an error that is named on stderr."""
    arguments = build_parser().parse_args(argv)
    _, module, _ = COMMANDS[arguments.command]
    try:
        return import_module(module).run(arguments)
    except DitRewriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
